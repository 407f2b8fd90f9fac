"""The product that gathers its own columns: exact, in place, and free of conflicts.

On a machine without a GPU this is the kernel's own text on the CPU, a warp's exchange
of fragments included; see `standin`.
"""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from support import (
    LAYOUTS,
    OPERATIONS,
    Case,
    Operands,
    candidates_of,
    device_peak,
    integers,
    of,
    operands,
    plan_of,
    reference,
    run,
    to_host,
    wanted_of,
    with_candidate,
)

import cuconv
from cuconv import testing
from cuconv.arrays import accumulator
from cuconv.backends.blocking import Blocking, block_sizes
from cuconv.backends.cuda import cuda_backend, implicit_gemm, structs, tilings
from cuconv.engine.call import forget_plans
from cuconv.engine.problem import in_groups
from cuconv.geometry import ConvGeometry
from cuconv.strategies.base import filters_of

pytestmark = pytest.mark.parametrize("xp", ["cupy"], indirect=True)
MINE = {"strategy": "implicit_gemm"}
_COUNTS = "images", "channels", "filters"

# Channels and filters that fill a copy of 16 bytes, or two, and tiles that they do not
# fill; sizes, kernels, strides, dilations and pads that all differ.
ALIGNED = Case(
    (2, 32, 7, 10),
    (96, 16, 3, 2),
    {
        "groups": 2,
        "stride": (2, 3),
        "dilation": (1, 2),
        "padding": ((1, 2), (3, -1)),
    },
)
ODD = Case(
    (3, 10, 9, 6),
    (70, 5, 2, 3),
    {"groups": 2, "stride": (1, 2), "dilation": (3, 1), "padding": ((0, 2), (2, 1))},
)
ONE_AXIS = Case(
    (2, 3, 41), (5, 3, 4), {"stride": 3, "dilation": 2, "padding": ((4, 1),)}
)
THREE_AXES = Case(
    (2, 8, 4, 5, 6),
    (10, 4, 2, 3, 2),
    {
        "groups": 2,
        "stride": (1, 2, 3),
        "dilation": (2, 1, 1),
        "padding": ((1, 0), (2, 1), (0, 3)),
    },
)
POINTWISE = Case((2, 64, 5, 7), (130, 64, 1, 1), {})
CASES = {
    "aligned": ALIGNED,
    "odd": ODD,
    "one axis": ONE_AXIS,
    "three axes": THREE_AXES,
    "pointwise": POINTWISE,
}


def geometry_of(case: Case) -> ConvGeometry:
    return ConvGeometry.of_weights(case.x_shape, case.w_shape, **case.options)


def launched(
    xp: Any, op: str, case: Case, arrays: Operands, how: Blocking, out: Any = None
) -> Any:
    """One launch of the kernel, with blocks and parts of the test's choosing."""
    g = geometry_of(case)
    problem = cuconv.plan_conv(
        case.x_shape, case.w_shape, op=op, dtype=arrays.x.dtype, **case.options
    ).problem
    shape = {"forward": g.y_shape, "weight_grad": g.w_shape}[op]
    out = xp.empty(shape, arrays.x.dtype) if out is None else out
    parts = xp.empty(how.parts * math.prod(shape), accumulator(arrays.x.dtype))
    kernels = cuda_backend().contraction
    if op == "forward":
        w, x = filters_of(arrays.w, problem), in_groups(arrays.x, g)
        kernels.convolve(w, x, None, in_groups(out, g), g.axes, how, parts)
    else:
        dy, x = in_groups(arrays.dy, g), in_groups(arrays.x, g)
        into = filters_of(out, problem)
        kernels.correlate(dy, x, into, g.axes, how, parts)
    return to_host(out)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", OPERATIONS)
def test_exact_on_small_integers(xp, op, name, layout):
    case = CASES[name].in_layout(layout)
    arrays = operands(case, "float32")
    wanted = wanted_of(op, case)
    testing.assert_equal(to_host(run(op, arrays.on(xp), case, **MINE)), wanted)


BLOCKS = [
    (dtype, fast, size)
    for dtype, fast in (("float32", 0), ("float32", 1), ("float16", 0), ("float64", 0))
    for size in block_sizes(np.dtype(dtype))
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "fast", "size"), BLOCKS)
@pytest.mark.parametrize("op", ["forward", "weight_grad"])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_block_size_and_sums_in_parts(xp, parts, op, dtype, fast, size, layout):
    case = ALIGNED.in_layout(layout)
    how = Blocking(*size, parts, fast=bool(fast))
    got = launched(xp, op, case, operands(case, dtype).on(xp), how)
    testing.assert_equal(got.astype("float64"), wanted_of(op, case))


def test_operands_that_are_not_aligned_are_read_one_by_one(xp):
    case = POINTWISE.in_layout("channels_last")
    host = operands(case, "float16")

    def moved(array: np.ndarray) -> Any:
        buffer = xp.zeros(array.size + 1, array.dtype)
        buffer[1:] = xp.asarray(array.ravel())
        return buffer[1:].reshape(array.shape)

    arrays = Operands(*map(moved, host))
    for op in ("forward", "weight_grad"):
        got = launched(xp, op, case, arrays, Blocking(64, 64))
        testing.assert_equal(got.astype("float64"), wanted_of(op, case))


def test_a_result_with_gaps_is_summed_whole(xp):
    """Parts are added as runs of memory, which such a result is not."""
    arrays = operands(ODD, "float32")
    shape = geometry_of(ODD).y_shape
    out = xp.zeros((*shape[:-1], 2 * shape[-1]), "float32")[..., ::2]
    got = launched(xp, "forward", ODD, arrays.on(xp), Blocking(64, 64, 4), out)
    testing.assert_equal(got, reference("forward", arrays, ODD))


def test_offsets_past_31_bits(xp):
    far = 2**30 + 8
    buffer = xp.zeros(2 * far + 64, dtype="uint8")
    host = integers((3, 2, 3, 4), "uint8", largest=5)
    x = xp.lib.stride_tricks.as_strided(buffer, (3, 2, 3, 4), (far, 12, 4, 1))
    x[...] = xp.asarray(host)
    w = integers((2, 2, 2, 3), "uint8", seed=1)
    wanted = testing.conv_reference(host.astype(int), w.astype(int))
    got = to_host(cuconv.conv(x, xp.asarray(w), **MINE))
    testing.assert_equal(got, wanted.astype("uint8"), dtype="uint8")


def test_tensor_cores_read_no_bank_twice(xp):
    if not getattr(xp, "IS_STAND_IN", False):
        pytest.skip("only the shim counts conflicts")
    conflicts = xp._kernels.bank_conflicts
    for layout, size in product(LAYOUTS, ((128, 128), (32, 64))):
        case = ALIGNED.in_layout(layout)
        arrays = operands(case, "float16").on(xp)
        for op in ("forward", "weight_grad"):
            launched(xp, op, case, arrays, Blocking(*size))
    assert conflicts["implicit_gemm"] == 0


@pytest.mark.parametrize("prepares", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision"), [("float16", "strict"), ("float32", "fast")]
)
@pytest.mark.parametrize("op", OPERATIONS)
def test_operands_turned_so_that_channels_come_last(xp, op, dtype, precision, prepares):
    """Every candidate, in place and turned, over strides and groups."""
    case = ALIGNED
    host = operands(case, dtype)
    arrays = host.on(xp)
    wanted = wanted_of(op, case)
    plan = plan_of(op, case, dtype, device="cuda", precision=precision, **MINE)
    turned = [c for c in candidates_of(plan) if c.tiling.variant[-1]]
    assert len(turned) == len(candidates_of(plan)) / 2 > 0
    for candidate in turned:
        own = with_candidate(plan, candidate)
        assert "operands copied to channels last" in candidate.label
        if prepares and op != "weight_grad":
            got = own.prepare(arrays.w)(
                *(a for a in of(op, arrays) if a is not arrays.w)
            )
        else:
            got = own(*of(op, arrays))
        testing.assert_equal(to_host(got).astype("float64"), wanted)
        taken = device_peak(xp, lambda own=own: own(*of(op, arrays)))
        assert 0 < taken <= candidate.workspace_bytes


@pytest.mark.parametrize("op", OPERATIONS)
def test_views_whose_channels_lie_last_need_no_turning(xp, op):
    """A plan takes them for matrices as well, by columns instead of by rows."""
    case = ALIGNED
    host = operands(case, "float16")

    def viewed(array: np.ndarray) -> Any:
        last = np.ascontiguousarray(np.moveaxis(array, 1, -1))
        return xp.asarray(last).transpose(0, 3, 1, 2)

    arrays = Operands(viewed(host.x), xp.asarray(host.w), viewed(host.dy))
    plan = plan_of(op, case, "float16", device="cuda", **MINE)
    turned = [c for c in candidates_of(plan) if c.tiling.variant[-1]]
    assert turned
    got = with_candidate(plan, turned[0])(*of(op, arrays))
    testing.assert_equal(to_host(got).astype("float64"), wanted_of(op, case))


def test_only_tensor_cores_have_operands_turned(xp):
    def lies(dtype: str, **options: Any) -> set[int]:
        plan = plan_of("forward", ALIGNED, dtype, device="cuda", **MINE, **options)
        return {c.tiling.variant[-1] for c in candidates_of(plan)}

    assert lies("float16") == lies("float32", precision="fast") == {0, 1}
    assert lies("float32") == lies("float64") == {0}
    assert lies("float16", memory_limit=0) == {0}
    last = ALIGNED.in_layout("channels_last")
    plan = plan_of("forward", last, "float16", device="cuda", **MINE)
    assert {c.tiling.variant[-1] for c in candidates_of(plan)} == {0}


# Masks of taps, coordinates, and results that are written several at a time


@pytest.fixture
def launches(monkeypatch):
    """The launches that are computed from now on, none of them remembered."""
    made: list[Any] = []
    usual = implicit_gemm._launch

    def noted(*arguments: Any) -> Any:
        made.append(usual(*arguments))
        return made[-1]

    def forget() -> None:
        forget_plans()
        implicit_gemm._forward.cache_clear()
        implicit_gemm._backward.cache_clear()

    monkeypatch.setattr(implicit_gemm, "_launch", noted)
    forget()
    yield made
    forget()


def are_masked(launches: list[Any]) -> set[bool]:
    macros = [dict(m.split("=") for m in x.variant.macros) for x in launches]
    return {each["MASKED"] == "1" for each in macros}


def are_packed(launches: list[Any]) -> set[bool]:
    packed = (x.packed.view(structs.CONTRACTION)["is_packed"] for x in launches)
    return {bool(each[0]) for each in packed}


# The default ones; all others are `slow`.
FEW = {("odd", "channels_first"), ("three axes", "channels_last")}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(*each, marks=() if each in FEW else pytest.mark.slow)
        for each in product(CASES, LAYOUTS)
    ],
)
@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_coordinates_where_masks_have_too_few_bits(
    xp, dtype, name, layout, launches, monkeypatch
):
    monkeypatch.setattr(tilings, "MOST_TAPS", 2)
    case = CASES[name].in_layout(layout)
    arrays = operands(case, dtype).on(xp)
    for op in OPERATIONS:
        got = to_host(run(op, arrays, case, **MINE)).astype("float64")
        testing.assert_equal(got, wanted_of(op, case))
    assert are_masked(launches) == {False}


@pytest.mark.parametrize(
    ("kernel", "masked"),
    [
        ((29,), True),
        ((30,), False),
        pytest.param((14, 16), True, marks=pytest.mark.slow),
        pytest.param((15, 16), False, marks=pytest.mark.slow),
    ],
)
def test_a_mask_has_a_bit_for_each_tap_of_each_axis(xp, kernel, masked, launches):
    """31 of them, of which an axis that is not there takes one."""
    size = tuple(k + 5 for k in kernel)
    case = Case((2, 3, *size), (4, 3, *kernel), {"padding": 3})
    arrays = operands(case, "float32").on(xp)
    for op in OPERATIONS:
        testing.assert_equal(
            to_host(run(op, arrays, case, **MINE)), wanted_of(op, case)
        )
    assert are_masked(launches) == {masked}


PACKED = Case((3, 16, 6, 8), (20, 8, 3, 3), {"groups": 2, "padding": 1})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype",
    [
        *("float32", "float16"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("f8", "c8", "int8")),
    ],
)
def test_neighbouring_results_are_written_several_at_a_time(
    xp, dtype, layout, launches
):
    case = PACKED.in_layout(layout)
    host = operands(case, dtype)
    wanted = reference("forward", host, case).astype(dtype)
    arrays = host.on(xp)
    testing.assert_equal(to_host(run("forward", arrays, case, **MINE)), wanted)
    # Ten filters in a group are not a multiple of four.
    by_filters = layout == "channels_last" and np.dtype(dtype).itemsize < 8
    assert are_packed(launches) == {not by_filters}
    # One element further, no result is aligned, and neighbours keep their contents.
    launches.clear()
    buffer = xp.zeros(wanted.size + 2, dtype)
    out = buffer[1:-1].reshape(wanted.shape)
    run("forward", arrays, case, out=out, **MINE)
    assert are_packed(launches) == {False}
    testing.assert_equal(to_host(out), wanted)
    assert not to_host(buffer)[[0, -1]].any()


def test_only_terms_of_the_sum_reach_a_result(xp):
    """Infinities of padded positions, of other filters and of other images do not."""
    x, w = np.ones((2, 5, 6, 7), "float32"), np.ones((6, 5, 3, 3), "float32")
    x[1], w[4] = np.inf, np.nan
    y = to_host(cuconv.conv(xp.asarray(x), xp.asarray(w), padding=2, **MINE))
    assert np.isnan(y[:, 4]).all()
    others = np.delete(y, 4, axis=1)
    assert np.isfinite(others[0]).all()
    assert np.isposinf(others[1]).all()


# What it takes, and what it rounds


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_nothing_is_allocated(xp, op, layout):
    case = ALIGNED.in_layout(layout)
    arrays = operands(case, "float32").on(xp)
    plan = plan_of(op, case, device="cuda", memory_limit=0, **MINE)
    assert plan.workspace_bytes == 0
    out = xp.empty(plan.result_shape, "float32")
    assert device_peak_of(xp, lambda: plan(*of(op, arrays), out=out)) == 0


def device_peak_of(xp: Any, call: Any) -> int:
    """Bytes that a call takes which returns an array of the caller's."""
    call()
    return device_peak(xp, lambda: (xp.empty(1), call())[0])


def test_parts_take_what_they_say_and_never_more_than_allowed(xp):
    case = Case((4, 8, 17, 16), (16, 8, 3, 3), {"padding": 1})
    arrays = operands(case, "float32").on(xp)
    wanted = wanted_of("weight_grad", case)
    parts: dict[int, set[int]] = {}
    for limit in (0, 2**13, 2**20):
        plan = plan_of("weight_grad", case, device="cuda", memory_limit=limit, **MINE)
        for candidate in candidates_of(plan):
            own = with_candidate(plan, candidate)
            parts.setdefault(limit, set()).add(candidate.tiling.variant[2])
            testing.assert_equal(to_host(own(*of("weight_grad", arrays))), wanted)
            taken = device_peak(xp, lambda own=own: own(*of("weight_grad", arrays)))
            assert taken <= candidate.workspace_bytes <= limit
            assert (taken > 0) == (candidate.tiling.variant[2] > 1)
    assert parts == {0: {1}, 2**13: {1}, 2**20: {1, 4}}


def test_halves_are_summed_in_float32(xp):
    """2048 and 1 add up to 2048 in half precision, however often one adds."""
    x = np.ones((1, 64, 40), "float16")
    w = np.ones((1, 64, 40), "float16")
    x[0, 0, 0] = 2048
    for dtype in (None, "float32"):
        y = cuconv.conv(xp.asarray(x), xp.asarray(w), dtype=dtype, **MINE)
        assert float(to_host(y)[0, 0, 0]) == np.dtype(dtype or "float16").type(4607)


def test_only_fast_rounds_to_tf32(xp):
    x = np.full((1, 8, 3), 1 + 2**-12, "float32")
    w = np.ones((4, 8, 1), "float32")
    sums = {
        precision: float(
            to_host(
                cuconv.conv(xp.asarray(x), xp.asarray(w), precision=precision, **MINE)
            )[0, 0, 0]
        )
        for precision in ("strict", "standard", "fast")
    }
    exact = 8 * (1 + 2**-12)
    assert sums == {"strict": exact, "standard": exact, "fast": 8.0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tf32_rounds_factors_towards_zero(xp, layout):
    """Each by less than 2^-10 of itself: sums of positive products only shrink."""
    case = ALIGNED.in_layout(layout)
    rng = np.random.default_rng(0)
    x, w = (
        rng.uniform(0.5, 2, shape).astype("float32")
        for shape in (case.x_shape, case.w_shape)
    )
    y = to_host(
        cuconv.conv(
            xp.asarray(x), xp.asarray(w), precision="fast", **case.options, **MINE
        )
    )
    exact = testing.conv_reference(x, w, **case.options)
    error = (exact - y)[exact > 0] / exact[exact > 0]
    assert error.size > 1000
    # Sums in float32 round too: 96 terms, each by 2^-24 at most.
    assert error.min() > -96 * 2.0**-24
    assert 2.0**-11 < error.max() < 2.0**-9


@pytest.mark.parametrize("op", OPERATIONS)
def test_complex_numbers_may_lie_at_any_multiple_of_their_parts(xp, op):
    """A complex128 has 16 bytes and may begin at 8: no copy of 16 may be used."""

    def askew(array: np.ndarray) -> Any:
        parts = np.concatenate([np.zeros(1), array.ravel().view("float64")])
        flat = xp.asarray(parts)[1:].view("complex128")
        assert flat.data.ptr % 16 == 8
        return flat.reshape(array.shape)

    arrays = operands(ODD, "complex128")
    mine = Operands(*map(askew, arrays))
    out = askew(np.zeros_like(reference(op, arrays, ODD)))
    got = to_host(run(op, mine, ODD, out=out, **MINE))
    testing.assert_equal(got, reference(op, arrays, ODD))


# What it refuses


def test_refusals_say_why(xp):
    x, w = xp.ones((1, 2, 5, 5), "float32"), xp.ones((3, 2, 3, 3), "float32")
    with pytest.raises(ValueError, match="not all arrays are float64"):
        cuconv.conv(x, w, dtype="float64", **MINE)
    with pytest.raises(ValueError, match="not all arrays are float64"):
        cuconv.conv(x, xp.ones(w.shape, "float64"), **MINE)
    with pytest.raises(ValueError, match="it is a CUDA kernel"):
        cuconv.conv(to_host(x), to_host(w), **MINE)
    four = xp.ones((1, 1, 3, 3, 3, 3), "float32")
    with pytest.raises(ValueError, match="4 axes, 3 at most"):
        cuconv.conv(four, four[..., :2, :2, :2, :2], **MINE)
    far = 2**30
    with pytest.raises(ValueError, match=rf"spans {3 * far + 8} elements, {2**29} are"):
        cuconv.conv(x, w, padding=far, stride=far, **MINE)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("axis", _COUNTS)
def test_counts_past_32_bits_are_refused(xp, op, axis):
    """Each is a digit of 32 bits in the kernel; a plan takes no memory for them."""
    far = 2**31
    images, channels, filters = (far if axis == n else 1 for n in _COUNTS)
    shapes = (images, channels, 1), (filters, channels, 1)
    options = {"op": op, "dtype": "int8", "device": "cuda"}
    with pytest.raises(ValueError, match=f"{far} images, channels or filters, {2**30}"):
        cuconv.plan_conv(*shapes, **options, **MINE)
    assert cuconv.plan_conv(*shapes, **options).strategy != "implicit_gemm"


# What the host works out


def test_sums_past_32_bits_of_tiles_are_refused(xp):
    shapes = (2**17, 1, 2**17), (1, 1, 1)
    options = {"op": "weight_grad", "dtype": "int8", "device": "cuda"}
    with pytest.raises(ValueError, match=f"sums of {2**34} terms, {2**33} at most"):
        cuconv.plan_conv(*shapes, **options, **MINE)
    assert cuconv.plan_conv(*shapes, **options).strategy != "implicit_gemm"
