"""`cuconv.plan_conv`: what a plan says, what it takes, and prepared weights."""

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
from cases import CASES, EMPTY, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    LAYOUTS,
    OPERATIONS,
    PLACES,
    Case,
    Operands,
    add_bias,
    chosen,
    device_of,
    forget_arenas,
    host_peak,
    integers,
    kept_arenas,
    of,
    operands,
    plan_of,
    reference,
    slowly,
    to_device,
    wanted_of,
)

import cuconv
from cuconv import testing
from cuconv.backends.cpu.backend import CpuBackend
from cuconv.strategies import strategies

BIG = Case((4, 16, 31, 29), (24, 16, 3, 3), {"padding": 1})


# What it says


def test_a_plan_shows_all_that_it_knows() -> None:
    plan = cuconv.plan_conv(
        (8, 64, 28, 30), (32, 32, 3, 5), groups=2, stride=(2, 1), padding=((1, 0), 2)
    )
    words = str(plan)
    y_shape = (8, 32, 14, 30)
    assert plan.result_shape == y_shape
    multiplications = 8 * 14 * 30 * 32 * 32 * 15
    assert plan.flops == 2 * multiplications
    moved = 4 * (8 * 64 * 28 * 30 + 32 * 32 * 15 + 8 * 32 * 14 * 30)
    assert plan.bytes_moved == moved
    assert plan.arithmetic_intensity == pytest.approx(plan.flops / moved)
    for part in (
        "the forward pass, float32, numpy",
        "(8, 64, 28, 30)",
        "(32, 32, 3, 5)",
        str(y_shape),
        "28 elements, 3 taps, stride 2, dilation 1, padding 1 and 0, 14 out",
        "30 elements, 5 taps, stride 1, dilation 1, padding 2 and 2, 30 out",
        f"{chosen(plan).label}, precision standard",
        f"{plan.chunks} of ",
        f"{plan.workspace_bytes:,} bytes, limit 67,108,864",
        f"{plan.flops / 1e9:.4g} GFLOP",
        f"{moved / 1e6:.4g} MB",
        f"{plan.arithmetic_intensity:.4g} FLOP per byte",
    ):
        assert part in words, part
    assert "groups        2" in words
    assert len(plan.passed_over) >= len(strategies()) - 1
    for name, reason in plan.passed_over.items():
        assert f"{name}: {reason}" in words


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_counts_of_an_operation(op) -> None:
    """Each reads both operands and writes its result, of its own type."""
    plan = cuconv.plan_conv((2, 3, 10), (4, 3, 3), op=op, dtype="float64")
    x, w, y = 2 * 3 * 10, 4 * 3 * 3, 2 * 4 * 8
    assert plan.bytes_moved == 8 * (x + w + y)
    assert plan.flops == 2 * 2 * 8 * 4 * 9
    shapes = {"forward": (2, 4, 8), "input_grad": (2, 3, 10), "weight_grad": (4, 3, 3)}
    assert plan.result_shape == shapes[op]


@pytest.mark.parametrize("op", OPERATIONS)
@settings(max_examples=30)
@given(case=cases(), precision=st.sampled_from(["strict", "fast"]))
def test_any_plan_can_be_read(xp, op, case, precision) -> None:
    plan = plan_of(op, case, precision=precision, device=device_of(xp))
    words = str(plan)
    assert xp.__name__ in words
    assert f"precision {precision}" in words
    assert plan.strategy in strategies()
    assert min(plan.workers, plan.chunks) >= 1
    assert plan.arithmetic_intensity > 0 or not plan.flops


# What it does


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_a_plan_computes_what_the_function_does(xp, op, layout) -> None:
    checked = 0
    for case in (case.in_layout(layout) for case in CASES.values()):
        plan = plan_of(op, case, device=device_of(xp))
        mine = of(op, operands(case, "float32").on(xp))
        wanted = wanted_of(op, case, "float32")
        testing.assert_equal(plan(*mine), wanted, dtype=np.float32)
        testing.assert_equal(plan(*mine), wanted, dtype=np.float32)
        out = xp.full(wanted.shape, 77, dtype=np.float32)
        assert plan(*mine, out=out) is out
        testing.assert_equal(out, wanted)
        assert type(plan(*mine)) is xp.ndarray
        checked += 1
    assert checked == len(CASES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_with_a_bias(xp, layout) -> None:
    for case in (case.in_layout(layout) for case in CASES.values()):
        x, w, _ = operands(case, "float32")
        bias = integers((case.filters(),), "float32", seed=4)
        plan = plan_of("forward", case, bias=True, device=device_of(xp))
        wanted = add_bias(wanted_of("forward", case), bias, case)
        x, w, bias = (to_device(xp, array) for array in (x, w, bias))
        testing.assert_equal(plan(x, w, bias), wanted, dtype=np.float32)
        prepared = plan.prepare(w)
        testing.assert_equal(prepared(x, bias), wanted, dtype=np.float32)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("op", OPERATIONS)
def test_arrays_may_lie_otherwise_than_planned(xp, op, place) -> None:
    for case in CASES.values():
        plan = plan_of(op, case, device=device_of(xp))
        arrays = operands(case, "float32")
        mine = Operands(*(PLACES[place](xp, array) for array in arrays))
        testing.assert_equal(plan(*of(op, mine)), wanted_of(op, case, "float32"))


@pytest.mark.parametrize("name", ["forward", "input_grad"])
def test_prepared_plans_of_nothing(xp, name) -> None:
    more = [
        *EMPTY,
        Case((0, 16, 9, 9), (16, 16, 3, 3), {}),
        Case((0, 16, 9, 9), (16, 1, 3, 3), {"groups": 16}),
    ]
    for case in more:
        plan = plan_of(name, case, device=device_of(xp), precision="standard")
        first, w = of(name, operands(case, "float32").on(xp))
        wanted = reference(name, operands(case, "float32"), case)
        testing.assert_equal(plan.prepare(w)(first), wanted, dtype=np.float32)


def test_a_plan_holds_its_settings() -> None:
    """Those of where it was made, not of where it is called."""
    with cuconv.config(precision="strict", memory_limit="1 MiB", num_threads=1):
        plan = cuconv.plan_conv(BIG.x_shape, BIG.w_shape, **BIG.options)
    assert plan.strategy not in ("winograd", "fft")
    assert plan.workers == 1
    arrays = [integers(s, "float32") for s in (BIG.x_shape, BIG.w_shape)]
    wanted = cuconv.conv(*arrays, **BIG.options, precision="strict")
    with cuconv.config(precision="fast", memory_limit="32 MiB"):
        testing.assert_equal(plan(*arrays), wanted)
        assert host_peak(lambda: plan(*arrays), 2**20) <= 2**20


def test_a_plan_runs_as_it_says(choices) -> None:
    """Where arrays lie as planned: the strategy, the cut and the workers printed."""
    made = []
    for limit in (3 * 2**17, None):
        for threads in (1, 2):
            with cuconv.config(num_threads=threads):
                made.append(plan_of("forward", BIG, memory_limit=limit))
    arrays = [integers(s, "float32") for s in (BIG.x_shape, BIG.w_shape)]
    for plan in made:
        plan(*arrays)
        assert choices[-1].tiling == chosen(plan).tiling
        assert choices[-1].label == chosen(plan).label


# What it refuses


def test_shapes_that_are_not_planned(xp) -> None:
    case = CASES["two axes, all different"]
    arrays = operands(case, "float32").on(xp)
    for op in OPERATIONS:
        plan = plan_of(op, case, device=device_of(xp))
        names = {"forward": "xw", "input_grad": ("dy", "w"), "weight_grad": ("dy", "x")}
        for i, name in enumerate(names[op]):
            mine = list(of(op, arrays))
            good = mine[i].shape
            for bad in (mine[i][:1], mine[i][None], mine[i][..., :-1]):
                mine[i] = bad
                with pytest.raises(ValueError, match=f"{name} has shape") as caught:
                    plan(*mine)
                assert str(bad.shape) in str(caught.value)
                assert str(good) in str(caught.value)


@pytest.mark.parametrize("other", ["float64", "float16", "int32", "complex64"])
def test_types_that_are_not_planned(xp, other) -> None:
    """A plan is for arrays of one type; another would be rounded on the way."""
    case = CASES["two axes, all different"]
    for op in OPERATIONS:
        plan = plan_of(op, case, device=device_of(xp))
        good = of(op, operands(case, "float32").on(xp))
        bad = of(op, operands(case, other).on(xp))
        plan(*good)
        for mine in ((bad[0], good[1]), (good[0], bad[1]), bad):
            with pytest.raises(TypeError, match=other):
                plan(*mine)
        if op == "weight_grad":
            continue
        with pytest.raises(TypeError, match=other):
            plan.prepare(bad[1])
        with pytest.raises((TypeError, ValueError)):
            plan.prepare(good[1])(bad[0])


def test_the_number_of_arrays(xp) -> None:
    case = CASES["two axes, all different"]
    x, w, dy = operands(case, "float32").on(xp)
    bias = to_device(xp, integers((5,), "float32"))
    plain, with_bias = (
        plan_of("forward", case, bias=each, device=device_of(xp))
        for each in (False, True)
    )
    gradient = plan_of("input_grad", case, device=device_of(xp))
    for plan, arrays, words in (
        (plain, (), "x, w; got 0"),
        (plain, (None, w), "x, w; got 2"),
        (plain, (x, w, None, None), "x, w; got 4"),
        (with_bias, (x, w), "x, w, bias; got 2"),
        (gradient, (dy, w, x), "dy, w; got 3"),
        (plain.prepare(w), (x, w, x), "plan takes x; got 3"),
        (plain, (x, w, bias), "made without a bias"),
        (plain.prepare(w), (x, w), "takes x alone: its weights are prepared"),
        (with_bias, (x, w, bias[:4]), r"bias has shape \(4,\) and must have \(5,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            plan(*arrays)


def test_arrays_of_the_other_module_or_shape() -> None:
    import cupy

    arrays = operands(CASES["pointwise"], "float32")
    mine = arrays.on(cupy)
    plan, on_device = (
        plan_of("forward", CASES["pointwise"], device=name) for name in ("cpu", "cuda")
    )
    gradient = plan_of("weight_grad", CASES["pointwise"])
    for error, words, call in (
        (TypeError, "cupy", lambda: on_device(arrays.x, arrays.w)),
        (TypeError, "numpy", lambda: plan(mine.x, mine.w)),
        (TypeError, "mixed", lambda: plan(arrays.x, mine.w)),
        (TypeError, "x must be a NumPy or .*list", lambda: plan([1.0], arrays.w)),
        (TypeError, "numpy", lambda: plan.prepare(mine.w)),
        (TypeError, "w must be a NumPy or CuPy array", lambda: plan.prepare([[1.0]])),
        (ValueError, "w has shape .* must have", lambda: plan.prepare(arrays.w[:1])),
        (ValueError, "no weights to prepare", lambda: gradient.prepare(arrays.w)),
    ):
        with pytest.raises(error, match=words):
            call()


def test_out_is_checked(xp) -> None:
    case = CASES["two axes, all different"]
    arrays = operands(case, "float32").on(xp)
    plan = plan_of("forward", case, device=device_of(xp))
    shape = case.y_shape()
    for each in (plan, plan.prepare(arrays.w)):
        mine = (arrays.x,) if each is not plan else (arrays.x, arrays.w)
        call = partial(each, *mine)
        for out, error, words in (
            (xp.zeros(shape[1:], np.float32), ValueError, "out has shape"),
            (xp.zeros(shape, np.float64), TypeError, "out has type float64"),
            (arrays.x, ValueError, "out"),
        ):
            with pytest.raises(error, match=words):
                call(out=out)
        pool = xp.zeros(arrays.x.size + int(np.prod(shape)), np.float32)
        x = pool[: arrays.x.size].reshape(arrays.x.shape)
        over = pool[-int(np.prod(shape)) - 1 : -1].reshape(shape)
        with pytest.raises(ValueError, match="out may share memory with x"):
            each(x, *mine[1:], out=over)


def test_words_that_mean_nothing() -> None:
    shapes = (1, 1, 3), (1, 1, 2)
    plan = partial(cuconv.plan_conv, *shapes)
    for options, error, words in (
        ({"op": "backward"}, ValueError, "'forward', 'input_grad', 'weight_grad'"),
        ({"op": None}, ValueError, "None"),
        ({"device": "gpu"}, ValueError, "'cpu', 'cuda' or .* got 'gpu'"),
        ({"device": 0}, ValueError, "got 0"),
        ({"strategy": "magic"}, ValueError, "'magic'"),
        ({"precision": "exact"}, ValueError, "'exact'"),
        ({"dtype": "U3"}, TypeError, "supported: bool"),
        ({"strides": 1}, TypeError, "no option 'strides'"),
        ({"memory_limit": 7}, cuconv.MemoryLimitError, "of 7 bytes"),
        ({"stride": 0}, ValueError, "stride"),
        ({"bias": np.ones(1)}, TypeError, "bias must be True or False"),
        ({"dtype": "f33"}, TypeError, "got 'f33'"),
    ):
        with pytest.raises(error, match=words):
            plan(**options)
    with pytest.raises(ValueError, match="kernel is larger"):
        cuconv.plan_conv((1, 1, 3), (1, 1, 4))
    with pytest.raises(TypeError, match="must be made of integers"):
        cuconv.plan_conv((1, 1.0, 3), (1, 1, 2))
    with pytest.raises(TypeError, match=r"an array, whose shape is \(1, 1, 3\)"):
        cuconv.plan_conv(np.zeros((1, 1, 3)), (1, 1, 2))  # type: ignore[arg-type]


# Prepared weights


@pytest.mark.parametrize("precision", ["standard", *slowly("strict", "fast")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["forward", "input_grad"])
def test_prepared_weights_give_the_same_bits(xp, op, layout, precision) -> None:
    rng = np.random.default_rng(0)
    checked = set()
    more = (BIG, Case((2, 6, 9, 8), (6, 1, 3, 3), {"groups": 6, "stride": 2}))
    for case in (case.in_layout(layout) for case in (*CASES.values(), *more)):
        plan = plan_of(op, case, precision=precision, device=device_of(xp))
        names = {"forward": case.x_shape, "input_grad": None}
        y_shape = plan.problem.geometry.y_shape
        first = rng.standard_normal(names[op] or y_shape).astype("f4")
        w = rng.standard_normal(case.w_shape).astype("f4")
        first, w = to_device(xp, first), to_device(xp, w)
        wanted = plan(first, w)
        prepared = plan.prepare(w)
        w[...] = 55
        for _ in range(2):
            testing.assert_equal(prepared(first), wanted, dtype=np.float32)
        out = xp.full(wanted.shape, 77, dtype=np.float32)
        assert prepared(first, out=out) is out
        testing.assert_equal(out, wanted)
        assert prepared.strategy == plan.strategy
        checked.add(plan.strategy)
    assert len(checked) >= 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64", "int8", "bool"])
def test_prepared_weights_of_every_kind(xp, dtype) -> None:
    for op, case in itertools.product(("forward", "input_grad"), CASES.values()):
        plan = plan_of(op, case, dtype, device=device_of(xp))
        arrays = operands(case, dtype)
        first, w = of(op, arrays.on(xp))
        got = plan.prepare(w)(first)
        testing.assert_equal(got, wanted_of(op, case, dtype), dtype=dtype)


def test_a_prepared_plan_takes_arrays_wherever_they_lie(xp) -> None:
    for case in CASES.values():
        arrays = operands(case, "float32")
        plan = plan_of("forward", case, device=device_of(xp))
        prepared = plan.prepare(to_device(xp, arrays.w))
        wanted = wanted_of("forward", case)
        for place in PLACES.values():
            for _ in range(2):
                testing.assert_equal(prepared(place(xp, arrays.x)), wanted)


def test_prepared_plans_stay_within_the_limit() -> None:
    """The prepared weights are held beside; a call takes no more than was planned."""
    x, w = integers(BIG.x_shape, "float32"), integers(BIG.w_shape, "float32")
    for precision in ("strict", "standard"):
        for limit in (2**19, 2**21):
            plan = plan_of("forward", BIG, precision=precision, memory_limit=limit)
            prepared = plan.prepare(w)
            assert (
                host_peak(lambda p=prepared: p(x), limit)
                <= plan.workspace_bytes
                <= limit
            )


# Memory that is used again


@pytest.mark.parametrize("op", OPERATIONS)
def test_repeated_calls_take_nothing_large(op, monkeypatch) -> None:
    case = Case((4, 32, 28, 28), (32, 32, 3, 3), {"padding": 1})
    plan = plan_of(op, case, precision="standard")
    shapes = {"x": case.x_shape, "w": case.w_shape, "dy": plan.problem.geometry.y_shape}
    x, w, dy = (integers(shapes[name], "float32") for name in ("x", "w", "dy"))
    arrays = of(op, Operands(x, w, dy))
    assert plan.workspace_bytes > 2**18
    forget_arenas()
    for _ in range(2):
        plan(*arrays)
    assert sum(kept_arenas()) > 2**18
    taken = []
    empty = np.empty

    def spy(shape: Any, *arguments: Any, **options: Any) -> Any:
        made = empty(shape, *arguments, **options)
        taken.append(made.nbytes)
        return made

    monkeypatch.setattr(np, "empty", spy)
    monkeypatch.setattr(CpuBackend, "empty", staticmethod(spy))
    for _ in range(3):
        taken.clear()
        result = plan(*arrays)
        assert taken == [result.nbytes]


def test_a_plan_shows_itself():
    plan = cuconv.plan_conv((2, 3, 8, 8), (4, 3, 3, 3), padding=1, strategy="im2col")
    assert repr(plan) == (
        "<Plan of the forward pass: x (2, 3, 8, 8), w (4, 3, 3, 3), y (2, 4, 8, 8), "
        f"im2col, {plan.workspace_bytes:,} bytes of workspace>"
    )
    table = plan._repr_html_()
    rows = list(plan.rows())
    assert table.count("<tr>") == len(rows) > 10
    for name, text in rows:
        assert f"<tr><th>{name}</th><td>{text}</td></tr>" in table
