"""The choice among strategies: reasons, settings, and plans that are made once."""

import itertools
import re
from functools import partial

import numpy as np
import pytest
from cases import CASES, cases, tiled_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    OPERATIONS,
    Case,
    calls_that_plan,
    candidates_of,
    chosen,
    forget_plans,
    integers,
    keep_few_plans,
    operands,
    plan_of,
    run,
    slowly,
)

import cuconv
from cuconv import testing
from cuconv.backends.cpu.backend import CpuBackend
from cuconv.engine import costs, planner
from cuconv.engine.problem import NAMES
from cuconv.engine.rewrites import polyphase
from cuconv.memory import MemoryLimitError
from cuconv.strategies import STRATEGIES, strategies


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operation of each call that was not known before."""
    return calls_that_plan(monkeypatch)


# Reasons


def _is_sentence(reason: str) -> bool:
    return len(reason) > 10 and " " in reason and not reason.endswith((".", " "))


@pytest.mark.parametrize("op", OPERATIONS)
@settings(max_examples=40)
@given(
    case=st.one_of(cases(), tiled_cases(most=3)),
    dtype=st.sampled_from(["float32", "float16", "int8", "complex64"]),
    precision=st.sampled_from(["strict", "standard", "fast"]),
)
def test_every_other_strategy_has_a_reason(op, case, dtype, precision) -> None:
    plan = plan_of(op, case, dtype, precision=precision)
    passed = plan.passed_over
    assert chosen(plan).label not in passed
    words = {re.split(r" \(| over ", label)[0] for label in passed}
    assert words | {plan.strategy} == set(strategies())
    assert all(_is_sentence(reason) for reason in passed.values()), passed
    for strategy in strategies().values():
        able, reason = strategy.supports(plan.problem)
        assert able is (reason == "")
        assert able or _is_sentence(reason)


def test_what_was_passed_over_is_slower_by_estimate_or_cannot() -> None:
    plan = cuconv.plan_conv((8, 64, 28, 28), (64, 64, 3, 3), padding=1)
    times = [
        float(match[1])
        for match in map(
            re.compile(r"estimated (\d+\.\d+) times as long").fullmatch,
            plan.passed_over.values(),
        )
        if match
    ]
    assert len(times) > 3
    assert times == sorted(times)
    assert times[0] >= 1


def test_a_reason_names_the_limit_that_a_strategy_needs() -> None:
    options = {"padding": 1, "precision": "standard"}
    shapes = (4, 32, 28, 28), (32, 32, 3, 3)
    plan = cuconv.plan_conv(*shapes, memory_limit="203 KiB", **options)
    reason = plan.passed_over["winograd"]
    least = int(re.search(r"needs (\d+) bytes at least", reason)[1])
    assert least > 203 * 1024
    alone = partial(cuconv.plan_conv, *shapes, strategy="winograd", **options)
    assert alone(memory_limit=least).workspace_bytes <= least
    with pytest.raises(cuconv.MemoryLimitError):
        alone(memory_limit=least - 1)


@pytest.mark.parametrize("name", ["pointwise", "depthwise", "winograd", "fft"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_a_strategy_that_cannot_run_raises_with_its_reason(xp, op, name) -> None:
    case = CASES["two axes, all different"]
    arrays = operands(case, "float32").on(xp)
    with pytest.raises(ValueError, match=f"{name!r} cannot run .* here: .+") as caught:
        run(op, arrays, case, strategy=name, precision="standard")
    assert NAMES[op] in str(caught.value)
    reason = str(caught.value).split("here: ")[1]
    assert _is_sentence(reason)


def test_no_two_strategies_have_one_name() -> None:
    assert len(strategies()) == len(STRATEGIES)


def test_no_two_variants_have_the_same_words() -> None:
    """A record of the fastest knows a variant by them."""
    seen = 0
    for op, case, device in itertools.product(
        OPERATIONS, CASES.values(), ("cpu", "cuda")
    ):
        plan = plan_of(op, case, "float16", device=device, precision="fast")
        for strategy in STRATEGIES:
            able = strategy.supports(plan.problem)[0]
            if able and not any(map(plan.backend.missing, strategy.libraries)):
                variants = strategy.variants(plan.problem, plan.backend)
                assert len(set(map(strategy.describe, variants))) == len(variants)
                seen += len(variants) > 1
    assert seen > 10


@pytest.mark.parametrize("worth", [0, None])
@pytest.mark.parametrize("op", OPERATIONS)
@settings(max_examples=60)
@given(
    case=st.one_of(cases(), tiled_cases(most=3)),
    precision=st.sampled_from(["standard", "fast"]),
    limit=st.sampled_from([None, 165_000, 215_000]),
)
def test_no_rank_is_below_its_floor(worth, op, case, precision, limit) -> None:
    """Or the best might never be looked at."""
    eager = (
        {}
        if worth is None
        else {"rates": costs.CPU_RATES._replace(worth_workers=worth)}
    )
    backend = type("Eager", (CpuBackend,), eager)()
    try:
        plan = plan_of(op, case, precision=precision, memory_limit=limit)
    except MemoryLimitError:
        return
    limit = plan.memory_limit
    ranks = []
    for search in planner._searches(plan.problem, backend, "auto", limit):
        try:
            ranks.append(search.candidate(2).rank)
        except MemoryLimitError:
            continue
        assert search.floor <= ranks[-1] * planner._ROUNDED
    best = planner._best(plan.problem, backend, "auto", limit, 2)
    assert best.rank == min(ranks)


def test_an_unknown_strategy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'magic'") as caught:
        cuconv.plan_conv((1, 1, 3), (1, 1, 2), strategy="magic")
    for name in ("auto", "benchmark", *strategies()):
        assert repr(name) in str(caught.value)
    for bad in (None, 3, ("im2col",)):
        with pytest.raises(TypeError, match="strategy must be a str"):
            cuconv.plan_conv((1, 1, 3), (1, 1, 2), strategy=bad)


# The choice


def test_the_choice_is_the_cheapest() -> None:
    """By its own estimate, whatever the strategy."""
    several = 0
    for case in CASES.values():
        plan = plan_of("forward", case, precision="fast")
        times = [candidate.nanoseconds for candidate in candidates_of(plan)]
        assert min(times) == chosen(plan).nanoseconds
        several += len(times) > 1
    assert several > 10


SHAPES = list(
    itertools.product(
        [(1, 256, 7), (2, 8, 20), (4, 512, 14), (8, 64, 28), (1, 3, 112)],
        [32, 128],
        [1, 3],
        [1, 2],
        [None, 2**21, 2**23],
    )
)


@pytest.mark.parametrize("op", ["forward", *slowly(*OPERATIONS[1:])])
def test_what_runs_does_not_depend_on_the_number_of_threads(op) -> None:
    """Neither the strategy nor the cut: results would round differently."""
    checked = 0
    for (n, c, size), k, kernel, stride, limit in SHAPES:
        found = set()
        for threads in (1, 2, 3, 5):
            with cuconv.config(num_threads=threads):
                plan = cuconv.plan_conv(
                    (n, c, size, size),
                    (k, c, kernel, kernel),
                    op=op,
                    stride=stride,
                    padding=kernel // 2,
                    memory_limit=limit,
                )
            found.add((chosen(plan).label, chosen(plan).tiling._replace(workers=0)))
            assert plan.workers <= threads
        assert len(found) == 1, f"{found} for {n, c, size, k, kernel, stride, limit}"
        checked += 1
    assert checked == len(SHAPES) == 120


# Plans that are made once


def test_a_call_like_one_before_is_not_planned_again(planned) -> None:
    case = CASES["groups with stride"]
    arrays = operands(case, "float32")
    for op in OPERATIONS:
        planned.clear()
        wanted = run(op, arrays, case)
        assert planned == [op]
        for _ in range(3):
            testing.assert_equal(run(op, arrays, case), wanted)
        again = operands(case, "float32", seed=5)
        out = np.empty_like(wanted)
        assert planned == [op]
        run(op, again, case, out=out)
        assert planned == [op, op], "a result of the caller's may lie elsewhere"
        got = run(op, again, case, out=out)
        assert got is out
        assert planned == [op, op]
        testing.assert_equal(out, run(op, again, case))


def test_other_settings_are_another_plan(choices) -> None:
    case = Case((4, 32, 28, 28), (32, 32, 3, 3), {"padding": 1})
    x, w = integers(case.x_shape, "float32"), integers(case.w_shape, "float32")
    found = []
    for settings_ in (
        {},
        {"precision": "strict"},
        {"memory_limit": 3 * 2**17},
        {"num_threads": 1},
        {"num_threads": 2},
        {},
    ):
        with cuconv.config(**settings_):
            cuconv.conv(x, w, padding=1)
        found.append(choices[-1])
    assert found[0] == found[-1]
    assert found[1].strategy.name != "winograd"
    assert found[2].workspace_bytes <= 3 * 2**17
    assert [candidate.tiling.workers for candidate in found[3:5]] == [1, 2]


BAD = {
    "a stride of 1.0": ({"stride": 1}, {"stride": 1.0}),
    "strides of 1.0": ({"stride": (1, 1)}, {"stride": (1.0, 1)}),
    "a padding of 0.0": ({"padding": 0}, {"padding": 0.0}),
    "pads of 0.0": ({"padding": ((0, 0), (0, 0))}, {"padding": ((0, 0.0), (0, 0))}),
    "a dilation of 1.0": ({"dilation": (1, 1)}, {"dilation": (1, 1.0)}),
    "groups of 1.0": ({"groups": 1}, {"groups": 1.0}),
    "a limit of 1e6": ({"memory_limit": 10**6}, {"memory_limit": 1e6}),
    "deterministic 1": ({"deterministic": True}, {"deterministic": 1}),
    "a layout": ({"layout": "NCHW"}, {"layout": "NHCW"}),
    "an unknown option": ({"stride": 1}, {"strides": 1}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_option_is_refused_after_a_good_one(name) -> None:
    """Numbers that are equal and have one hash are not the same option."""
    good, bad = BAD[name]
    x, w = np.ones((1, 1, 6, 6)), np.ones((1, 1, 2, 2))
    dy = np.ones((1, 1, 5, 5))
    for call in (
        partial(cuconv.conv, x, w),
        partial(cuconv.conv_input_grad, dy, w, x.shape),
        partial(cuconv.conv_weight_grad, dy, x, w.shape),
    ):
        call(**good)
        with pytest.raises((TypeError, ValueError)):
            call(**bad)
        call(**good)


def test_a_bad_shape_is_refused_after_a_good_one() -> None:
    x, w, dy = np.ones((1, 1, 6, 6)), np.ones((1, 1, 2, 2)), np.ones((1, 1, 5, 5))
    for _ in range(2):
        cuconv.conv_input_grad(dy, w, (1, 1, 6, 6))
        with pytest.raises(TypeError, match="x must be made of integers"):
            cuconv.conv_input_grad(dy, w, (1, 1, 6.0, 6))
        cuconv.conv_weight_grad(dy, x, (1, 1, 2, 2))
        with pytest.raises(TypeError, match="w must be made of integers"):
            cuconv.conv_weight_grad(dy, x, (1, 1, 2.0, 2))


def test_out_that_overlaps_is_refused_the_second_time_too() -> None:
    """The plan is known; whether arrays share memory is asked on every call."""
    pool = np.zeros(300, np.float32)
    x, w = pool[:36].reshape(1, 1, 6, 6), np.ones((1, 1, 2, 2), np.float32)
    apart, over = (pool[i : i + 25].reshape(1, 1, 5, 5) for i in (100, 20))
    for _ in range(2):
        cuconv.conv(x, w, out=apart)
        with pytest.raises(ValueError, match="out may share memory with x"):
            cuconv.conv(x, w, out=over)
        with pytest.raises(ValueError, match="out may share memory with w"):
            cuconv.conv(x, apart[:, :, :2, :2], out=apart[:, :, :, :])
    assert (pool[:36] == 0).all()


def test_no_more_plans_are_kept_than_there_is_room_for(monkeypatch, planned) -> None:
    kept = keep_few_plans(monkeypatch, 8)
    w = np.ones((1, 1, 2))
    for length in range(2, 40):
        x = np.ones((1, 1, length))
        testing.assert_equal(cuconv.conv(x, w), np.full((1, 1, length - 1), 2))
        assert len(kept) <= 8
    assert len(planned) == 38


def test_a_plan_keeps_no_array_alive() -> None:
    """What was seen is shapes, not data."""
    import gc
    import weakref

    class Watched(np.ndarray):
        pass

    for kind in (np.ndarray, Watched):
        x = np.ones((1, 1, 50)).view(Watched)
        watch = weakref.ref(x)
        cuconv.conv(x.view(kind), np.ones((1, 1, 3)))
        cuconv.conv(x.view(kind), np.ones((1, 1, 3)))
        del x
        gc.collect()
        assert watch() is None


def test_the_reason_is_that_of_the_form_that_could_run() -> None:
    """An input gradient of stride 1 may run over dy: what forbids that is said too."""
    plan = cuconv.plan_conv((2, 4, 9, 9), (4, 4, 3, 3), op="input_grad", padding=1)
    reason = plan.passed_over["winograd"]
    assert "over dy: fewer than 8 channels" in reason
    with pytest.raises(ValueError, match="over dy: fewer than 8 channels"):
        cuconv.plan_conv(
            (2, 4, 9, 9), (4, 4, 3, 3), op="input_grad", strategy="winograd"
        )


def test_an_option_that_shows_its_address_is_never_taken_for_another() -> None:
    class Step:
        def __init__(self, size: int) -> None:
            self.size = size

        def __index__(self) -> int:
            return self.size

    x, w = np.ones((1, 1, 9)), np.ones((1, 1, 2))
    lengths = [cuconv.conv(x, w, stride=Step(n)).shape[-1] for n in (1, 2, 3, 4) * 20]
    assert lengths == [8, 4, 3, 2] * 20


STRIDED = list(
    itertools.product(
        [(1, 64, 20), (2, 128, 33), (1, 256, 60), (1, 16, 150)],
        [16, 64, 256],
        [(3, 1), (4, 1), (5, 2), (7, 3)],
        [2, 3],
        ["cpu", "cuda"],
    )
)


def test_phases_are_weighed_as_if_they_had_been_planned(monkeypatch) -> None:
    """What they cost at least says the same as what they cost."""

    def chosen() -> list[tuple[str, str]]:
        forget_plans()
        plans = [
            cuconv.plan_conv(
                (n, c, size, size + 3),
                (k, c, kernel, kernel),
                op="input_grad",
                stride=stride,
                padding=padding,
                device=device,
            )
            for (n, c, size), k, (kernel, padding), stride, device in STRIDED
        ]
        return [(plan.as_dict()["parts"], plan.candidates[0].label) for plan in plans]

    quick = chosen()
    monkeypatch.setattr(polyphase, "_may_take_less", lambda *_: True)
    assert quick == chosen()
    whole = sum(parts == "" for parts, _ in quick)
    assert len(STRIDED) * 0.1 < whole < len(STRIDED) * 0.97
