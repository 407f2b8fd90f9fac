"""Every strategy against the seven loops, and against every other one.

Those of the strict class are exact on small integers; the others are held to their
documented bound.
"""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from cases import EMPTY, LARGE, cases, tiled_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    LAYOUTS,
    OPERATIONS,
    PLACES,
    ROUNDED,
    STRICT,
    Case,
    Operands,
    add_bias,
    assert_near,
    assert_within,
    candidates_of,
    device_of,
    host_peak,
    integers,
    normal,
    of,
    operands,
    plan_of,
    reference,
    run,
    run_candidate,
    slowly,
    smallest_limit,
    to_host,
    wanted_of,
)

import cuconv
from cuconv import testing
from cuconv.arrays import SUPPORTED_TYPES
from cuconv.memory import MemoryLimitError
from cuconv.strategies import strategies

# Wide enough for Winograd, grouped enough for loops, long enough for Fourier.
WIDE = {
    "one axis": Case((2, 9, 17), (10, 9, 3), {"padding": ((2, 1),)}),
    "two axes": Case((2, 8, 5, 7), (9, 8, 3, 3), {"padding": ((1, 2), (0, 1))}),
    "two axes, cropped": Case(
        (1, 16, 7, 6), (18, 8, 2, 3), {"padding": ((-1, 1), (2, -2)), "groups": 2}
    ),
    "five by three": Case((1, 8, 6, 5), (8, 8, 5, 3), {"padding": 2}),
    "a stride outside": Case(
        (1, 8, 7, 5), (9, 8, 5, 3), {"stride": (2, 1), "padding": (2, 1)}
    ),
    "three axes": Case(
        (1, 8, 5, 4, 5),
        (9, 8, 3, 3, 2),
        {"stride": (2, 1, 1), "padding": ((1, 1), (0, 2), (1, 0))},
    ),
    "no batch axis": Case((8, 4, 5), (8, 8, 3, 4), {"padding": 1}),
    "strided": Case((2, 8, 9, 8), (9, 8, 3, 3), {"stride": 2, "padding": 1}),
    "dilated": Case((1, 8, 7, 9), (9, 8, 3, 3), {"dilation": (2, 3)}),
    "pointwise": Case((3, 8, 3, 4), (9, 8, 1, 1), {}),
    "pointwise, strided": Case((3, 8, 4, 5), (9, 8, 1, 1), {"stride": (2, 3)}),
    "depthwise": Case(
        (3, 9, 6, 5), (9, 1, 3, 3), {"groups": 9, "padding": 1, "stride": (2, 1)}
    ),
    "depthwise with a multiplier": Case(
        (2, 6, 13), (12, 2, 4), {"groups": 3, "dilation": 2, "padding": ((3, 1),)}
    ),
    "many taps": Case((2, 3, 8, 9), (4, 3, 5, 6), {"padding": ((1, 3), (2, 0))}),
    "many taps, strided": Case(
        (1, 4, 9, 20), (6, 2, 3, 9), {"groups": 2, "stride": (2, 3), "dilation": 2}
    ),
}
# Of the largest number of the result.
BOUNDS = {
    ("winograd", "standard", "float32"): 1e-5,
    ("winograd", "fast", "float32"): 1e-4,
    ("winograd", "standard", "float64"): 1e-12,
    ("winograd", "fast", "float64"): 1e-12,
    ("fft", "standard", "float32"): 1e-5,
    ("fft", "standard", "float64"): 1e-12,
    ("fft", "fast", "float32"): 1e-5,
    ("fft", "fast", "float64"): 1e-12,
}


def test_these_are_the_strategies() -> None:
    """A new one belongs into the tests of its class; a kernel has a file of its own."""
    assert set(strategies()) == {*STRICT, *ROUNDED, "implicit_gemm", "cudnn"}


def on_both(names: Sequence[str]) -> Any:
    """Strategies on NumPy, and those that are kernels of their own on CuPy."""
    pairs = [("numpy", name) for name in names if name != "implicit_gemm"]
    pairs += [("cupy", n) for n in ("implicit_gemm", "depthwise") if n in names]
    return pytest.mark.parametrize(("xp", "name"), pairs, indirect=["xp"])


EXACT = (*STRICT, "implicit_gemm")


@on_both(EXACT)
@pytest.mark.parametrize("layout", [LAYOUTS[0], *slowly(LAYOUTS[1])])
@pytest.mark.parametrize("op", OPERATIONS)
def test_strict_strategies_are_exact_in_every_type(xp, op, layout, name) -> None:
    ran, dtypes = 0, set()
    few = ("float32", "bfloat16", "int8", "complex64")
    for dtype in SUPPORTED_TYPES if layout == LAYOUTS[0] else few:
        for case in (case.in_layout(layout) for case in WIDE.values()):
            plan = plan_of(op, case, dtype, strategy=name, device=device_of(xp))
            if plan is None:
                continue
            got = plan(*of(op, operands(case, dtype).on(xp)))
            testing.assert_equal(got, wanted_of(op, case, dtype), dtype=dtype)
            assert plan.strategy == name
            ran += 1
            dtypes.add(dtype)
    if layout == LAYOUTS[0]:
        assert ran >= len(dtypes) * (1 if name == "tap_matmul" else 2)
        assert len(dtypes) >= (2 if name == "depthwise" else 8)


@on_both(("im2col", "pointwise", "tap_matmul", "implicit_gemm"))
@pytest.mark.parametrize("op", OPERATIONS)
@given(case=cases(), dtype=st.sampled_from(["float32", "float16", "complex64", "int8"]))
def test_strict_strategies_are_exact_for_any_geometry(
    xp, op, name, case, dtype
) -> None:
    if name == "pointwise":
        ones = (1,) * len(case.options["stride"])
        first = case.layout == "channels_first"
        kernel = slice(2, None) if first else slice(0, -2)
        shape = list(case.w_shape)
        shape[kernel] = ones
        # The kernel is a single cell: pads that leave no input are not for it.
        pads = tuple((max(a, 0), max(b, 0)) for a, b in case.options["padding"])
        options = {**case.options, "padding": pads}
        case = Case(case.x_shape, tuple(shape), options)
    plan = plan_of(op, case, dtype, strategy=name, device=device_of(xp))
    if plan is None:
        assert name == "tap_matmul"
        return
    arrays = operands(case, dtype)
    wanted = reference(op, arrays, case).astype(dtype)
    testing.assert_equal(plan(*of(op, arrays.on(xp))), wanted, dtype=dtype)


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", ["float32", *slowly("float64")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_the_others_are_within_their_bound(op, layout, dtype, name) -> None:
    ran = 0
    for precision in ("standard", "fast"):
        for case in (case.in_layout(layout) for case in WIDE.values()):
            plan = plan_of(op, case, dtype, strategy=name, precision=precision)
            if plan is None:
                continue
            arrays = normal(case, dtype)
            wanted = reference(op, Operands(*(a.astype(float) for a in arrays)), case)
            bound = BOUNDS[name, precision, dtype]
            for candidate in candidates_of(plan):
                assert candidate.strategy.name == name
                got = run_candidate(plan, candidate, of(op, arrays))
                assert_near(got, wanted, bound)
                ran += 1
    assert ran >= (1 if name == "fft" else 4)


@pytest.mark.parametrize("op", OPERATIONS)
@settings(max_examples=40)
@given(
    case=st.one_of(tiled_cases(), cases()),
    precision=st.sampled_from(["standard", "fast"]),
)
def test_all_strategies_agree(op, case, precision) -> None:
    """Whatever can run: each variant of each strategy.

    What cancels in a transform leaves a rounding error as large as what cancelled,
    so that results are compared with the largest sum that there could be.
    """
    arrays = normal(case)
    wanted = reference(op, Operands(*(a.astype(float) for a in arrays)), case)
    largest = float(np.prod([np.abs(a).max(initial=0) for a in of(op, arrays)]))
    terms = max(arrays.x.size, arrays.w.size, arrays.dy.size) ** 0.5
    names = set()
    for name in strategies():
        plan = plan_of(op, case, strategy=name, precision=precision)
        for candidate in candidates_of(plan) if plan else ():
            got = run_candidate(plan, candidate, of(op, arrays))
            assert_within(got, wanted, 1e-5 * terms * largest)
            names.add(name)
    assert "im2col" in names


@on_both((*EXACT, *ROUNDED))
@pytest.mark.parametrize("op", OPERATIONS)
def test_bias_out_and_places(xp, op, name) -> None:
    """Odd strides of every array, a result that has neighbours, and a bias."""
    ran = 0
    exact = name in EXACT
    for case in WIDE.values():
        precision = "strict" if exact else "fast"
        options = {"strategy": name, "precision": precision}
        if plan_of(op, case, device=device_of(xp), **options) is None:
            continue
        arrays = operands(case, "float32")
        wanted = wanted_of(op, case, "float32")
        for place in PLACES.values():
            mine = Operands(*(place(xp, a) for a in arrays))
            around = xp.full([n + 2 for n in wanted.shape], 77, np.float32)
            inside, got = tuple(slice(1, -1) for _ in wanted.shape), None
            with contextlib.suppress(ValueError):
                got = run(op, mine, case, out=around[inside], **options)
                ran += 1
            if got is None:
                assert (name, xp) == ("depthwise", np)
                continue
            assert_near(around[inside], wanted, 0 if exact else 1e-4)
            around[inside] = 77
            assert (around == 77).all(), "it wrote beyond its result"
        if op == "forward":
            bias = integers((case.filters(),), "float32", largest=9)
            mine = (xp.asarray(a) for a in (arrays.x, arrays.w, bias))
            got = cuconv.conv(*mine, **case.options, **options)
            assert_near(got, add_bias(wanted, bias, case), 0 if exact else 1e-4)
    assert ran >= 2


@on_both((*EXACT, *ROUNDED))
@pytest.mark.parametrize("op", OPERATIONS)
def test_the_sum_over_nothing(xp, op, name) -> None:
    """No image, no filter, no channel, no cell: zero, whatever was asked for."""
    ran = 0
    nothing = [
        *EMPTY,
        Case((0, 16, 8, 9), (16, 16, 3, 3), {"padding": 1}),
        Case((2, 16, 0, 9), (16, 16, 3, 3), {"padding": 2}),
        Case((0, 16, 8, 9), (16, 1, 3, 3), {"groups": 16}),
        Case((0, 16, 8), (16, 16, 1), {}),
        Case((2, 8, 9), (0, 8, 3), {}),
        Case((0, 2, 40), (3, 2, 27), {}),
    ]
    for case in nothing:
        device = device_of(xp)
        plan = plan_of(op, case, strategy=name, precision="fast", device=device)
        if plan is None:
            continue
        arrays = operands(case, "float32")
        assert str(plan)
        got = plan(*of(op, arrays.on(xp)))
        testing.assert_equal(got, reference(op, arrays, case), dtype=np.float32)
        ran += 1
    assert ran >= 1


def test_four_axes_in_groups() -> None:
    """Every strategy that takes four spatial axes, or says that it does not."""
    case = Case((2, 16, 3, 3, 4, 5), (16, 8, 2, 2, 2, 3), {"groups": 2, "padding": 1})
    few = Case((1, 4, 3, 3, 3, 4), (4, 1, 2, 1, 2, 2), {"groups": 4})
    for op in OPERATIONS:
        for each in (case, few):
            arrays = operands(each, "float32")
            wanted = reference(op, arrays, each)
            testing.assert_equal(run(op, arrays, each), wanted, dtype=np.float32)
            for name in strategies():
                plan = plan_of(op, each, strategy=name, precision="fast")
                if plan:
                    assert_near(plan(*of(op, arrays)), wanted, 1e-4)


# What a NaN or an infinity reaches

SMALL = {
    "padded": Case((2, 4, 9, 8), (4, 1, 3, 3), {"groups": 4, "padding": 1}),
    "strided": Case((2, 4, 9, 8), (4, 1, 3, 3), {"groups": 4, "stride": 2}),
    "dilated": Case((2, 4, 9, 8), (4, 1, 3, 3), {"groups": 4, "dilation": 2}),
    "a tail": Case((1, 2, 12), (2, 1, 2), {"groups": 2, "stride": 5}),
    "whole": Case((2, 3, 7, 8), (4, 3, 3, 2), {"stride": (2, 3)}),
}


@on_both(EXACT)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("op", OPERATIONS)
def test_what_is_no_number_stays_where_it_belongs(xp, op, bad, name) -> None:
    """A cell that no window of a result reads does not spoil it.

    Zeros of the padding times infinity are NaN, as in every framework; they are part
    of the sum.  The input gradient may pad dy likewise, so that bad weights spread to
    the rim.  Zeros that a strategy has put elsewhere for its own ends have no part.
    """
    ran = 0
    for case in SMALL.values():
        padded = "padding" in case.options
        for which in range(3):
            arrays = operands(case, "float32", seed=3)
            array = arrays[which]
            array[(0,) * array.ndim] = bad
            array[(-1,) * array.ndim] = bad
            plan = plan_of(op, case, strategy=name, device=device_of(xp))
            if plan is None:
                continue
            with np.errstate(invalid="ignore"):
                got = to_host(plan(*of(op, arrays.on(xp))))
                wanted = reference(op, arrays, case)
            spoiled = ~np.isfinite(got)
            ran += 1
            if not padded and not (op == "input_grad" and which == 1):
                np.testing.assert_array_equal(spoiled, ~np.isfinite(wanted))
                continue
            assert not (np.isfinite(got) & ~np.isfinite(wanted)).any()
            # Where x or dy is bad, zeros around x have no part in it.
            if which == 0 or (which == 2 and op == "input_grad"):
                np.testing.assert_array_equal(spoiled, ~np.isfinite(wanted))
    assert ran == 0 if name == "pointwise" else ran >= 3


@pytest.mark.parametrize("op", OPERATIONS)
def test_subnormal_numbers_are_numbers(op) -> None:
    """No strategy flushes them to zero on a CPU."""
    tiny = 2.0**-1060
    ran = 0
    for name in (*STRICT, "winograd"):
        for case in WIDE.values():
            plan = plan_of(op, case, "float64", strategy=name, precision="standard")
            if plan is None:
                continue
            first, second = of(op, operands(case, "float64"))
            got = plan(first * tiny, second)
            wanted = wanted_of(op, case, "float64")
            # A subnormal has 2^-1074 for its last place; Winograd rounds there.
            near = 0 if name in STRICT else 2.0**-7
            assert_near(got / tiny, wanted, near)
            ran += 1
    assert ran > 20


# Memory


@pytest.mark.parametrize("name", ["auto", *slowly(*STRICT, *ROUNDED)])
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_strategy_stays_within_any_limit(op, name) -> None:
    ran = 0
    for case in LARGE.values():
        options = {"strategy": name, "precision": "fast"}
        plan = plan_of(op, case, **options)
        if plan is None:
            continue
        arrays = integer_arrays(case)
        call = partial(run, op, arrays, case, **options)
        smallest = smallest_limit(call)
        with pytest.raises(MemoryLimitError) as caught:
            call(memory_limit=smallest - 1)
        assert caught.value.smallest == smallest
        wanted = run(op, arrays, case, strategy="im2col")
        # The smallest limits run one position at a time: not for all of these.
        for extra in (2**13, 2**16, 2**19):
            limit = smallest + extra
            took = host_peak(partial(call, memory_limit=limit), limit)
            own = plan_of(op, case, memory_limit=limit, **options)
            assert took <= own.workspace_bytes <= limit
            assert_near(call(memory_limit=limit), wanted, 1e-4)
            ran += 1
    assert ran >= 3


@pytest.mark.parametrize("name", ["winograd", *slowly(*STRICT, "fft")])
@pytest.mark.parametrize("op", OPERATIONS)
def test_the_smallest_limit_of_every_strategy_will_do(op, name) -> None:
    ran = 0
    for case in WIDE.values():
        options = {"strategy": name, "precision": "fast"}
        if plan_of(op, case, **options) is None:
            continue
        call = partial(run, op, operands(case, "float32"), case, **options)
        smallest = smallest_limit(call)
        for limit in (smallest, smallest + 512, smallest + 3000):
            assert host_peak(partial(call, memory_limit=limit), limit) <= limit
            got = call(memory_limit=limit)
            near = 0 if name in STRICT else 1e-4
            assert_near(got, wanted_of(op, case, "float32"), near)
            ran += 1
    assert ran >= 3


def integer_arrays(case: Case, dtype: Any = "float32") -> Operands:
    """Like `operands`, for cases that are too large for loops in Python."""
    y_shape = cuconv.plan_conv(case.x_shape, case.w_shape, **case.options).result_shape
    shapes = (case.x_shape, case.w_shape, y_shape)
    return Operands(*(integers(s, dtype, i) for i, s in enumerate(shapes)))
