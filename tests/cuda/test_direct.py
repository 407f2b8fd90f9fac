"""Depthwise convolution by CUDA kernels: exact, wherever arrays lie, in no memory.

On a machine without a GPU this is the kernels' own text on the CPU; see `standin`.
"""

from typing import Any

import numpy as np
import pytest
from cases import EXTREMES, grouped_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    COMPLEX,
    HALVES,
    OPERATIONS,
    PLACES,
    Case,
    Operands,
    device_allocations,
    forget_plans,
    integers,
    operands,
    reference,
    run,
    slowly,
    spread_over,
    to_host,
)

import cuconv
from cuconv import testing
from cuconv.backends.cuda import cuda_backend
from cuconv.backends.cuda import depthwise as direct
from cuconv.geometry import Axis

pytestmark = pytest.mark.parametrize("xp", ["cupy"], indirect=True)
DEPTHWISE = {"strategy": "depthwise"}
FLOATS = ("float32", "float64", *HALVES, *COMPLEX)
REST = [dtype for dtype in FLOATS if dtype not in ("float32", "float16")]
# Strides with and without a common divisor with the dilation, pads of either sign.
CASES = {
    "one axis": Case(
        (5, 6, 29),
        (12, 2, 4),
        {"groups": 3, "stride": 4, "dilation": 6, "padding": ((7, 3),)},
    ),
    "two axes": Case(
        (6, 8, 7, 11),
        (16, 1, 3, 5),
        {"groups": 8, "stride": (2, 3), "padding": ((1, 2), (-1, 4))},
    ),
    "three axes": Case(
        (3, 6, 4, 5, 9),
        (6, 3, 2, 1, 3),
        {"groups": 2, "stride": (1, 3, 2), "dilation": (2, 1, 3), "padding": 2},
    ),
    "taps in three parts": Case((2, 3, 9, 8), (6, 1, 5, 4), {"groups": 3}),
    "no batch axis": Case((4, 6, 7), (4, 1, 2, 3), {"groups": 4, "padding": (0, 1)}),
}


def check(xp: Any, op: str, case: Case, dtype: Any, result: Any = None) -> None:
    arrays = operands(case, dtype)
    got = run(op, arrays.on(xp), case, dtype=result, **DEPTHWISE)
    wanted = reference(op, arrays, case).astype(result or dtype)
    testing.assert_equal(to_host(got), wanted, dtype=wanted.dtype)


@pytest.fixture
def wide_index(monkeypatch):
    """64-bit offsets, by pretending that launches are huge."""
    monkeypatch.setattr(direct, "MOST_THREADS", 2**31)


@pytest.fixture
def several_images(monkeypatch):
    """Images side by side and taps apart, however small the problem."""
    monkeypatch.setattr(direct, "_BUSY_THREADS", 0)
    monkeypatch.setattr(direct, "_WORTH_A_BLOCK", 1)


@pytest.mark.parametrize("op", OPERATIONS)
@settings(max_examples=80)
@given(case=grouped_cases(), dtype=st.sampled_from(FLOATS))
def test_exact_for_any_geometry_in_groups(xp, op, case, dtype) -> None:
    check(xp, op, case, dtype)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16", *slowly(*REST)])
@pytest.mark.usefixtures("several_images")
def test_images_side_by_side_and_taps_apart(xp, op, dtype, layout) -> None:
    """Each number of images that may be left over at the end."""
    case = CASES["two axes"].in_layout(layout)
    for images in range(1, 10):
        check(xp, op, case._replace(x_shape=(images, *case.x_shape[1:])), dtype)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.usefixtures("wide_index")
def test_wide_offsets(xp, op, dtype) -> None:
    for case in CASES.values():
        check(xp, op, case, dtype)
        check(xp, op, case.in_layout("channels_last"), dtype)


# 2155 ones in each sum: past 2048 a float16, and past 256 a bfloat16, no longer counts,
# and neither holds the number itself; both round it up.
MANY = {
    "forward": Case((1, 2, 5, 432), (2, 1, 5, 431), {"groups": 2}),
    "input_grad": Case(
        (1, 2, 1, 1), (2, 1, 5, 431), {"groups": 2, "padding": (4, 430)}
    ),
    "weight_grad": Case((1, 2, 5, 432), (2, 1, 1, 2), {"groups": 2}),
}


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_summed_and_may_be_kept_in_float32(xp, op, dtype) -> None:
    plan = cuconv.plan_conv(MANY[op].x_shape, MANY[op].w_shape, **MANY[op].options)
    shapes = MANY[op].x_shape, MANY[op].w_shape, plan.result_shape
    ones = Operands(*(np.ones(shape, dtype) for shape in shapes)).on(xp)
    rounded = {"float16": 2156, "bfloat16": 2160}[dtype]
    for result, wanted in ((dtype, rounded), ("float32", 2155)):
        got = to_host(run(op, ones, MANY[op], dtype=result, **DEPTHWISE))
        assert got.dtype == result
        assert (got.astype("f4") == wanted).all()


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("op", OPERATIONS)
def test_extremes(xp, op, name) -> None:
    case = EXTREMES[name]
    arrays = operands(case, "float32") if name != "a long line" else _long(case)
    wanted = run(op, arrays, case, strategy="im2col")
    got = run(op, arrays.on(xp), case, **DEPTHWISE)
    testing.assert_equal(to_host(got), wanted, dtype=np.float32)


def _long(case: Case) -> Operands:
    shapes = case.x_shape, case.w_shape, case.x_shape
    return Operands(*(integers(shape, "float32") for shape in shapes))


# Where arrays lie


@pytest.mark.parametrize("op", OPERATIONS)
def test_cells_that_are_one_in_memory(xp, op) -> None:
    """Strides of zero, of every input at once."""
    case = CASES["two axes"]
    arrays = operands(case, "float32")
    rows = [np.ascontiguousarray(array[:1, :1]) for array in arrays]
    pairs = list(zip(rows, arrays, strict=True))
    same = Operands(*(np.broadcast_to(row, like.shape) for row, like in pairs))
    mine = Operands(*(spread_over(xp, xp.asarray(r), a.shape) for r, a in pairs))
    assert all(array.strides[0] == 0 for array in mine)
    got = to_host(run(op, mine, case, **DEPTHWISE))
    testing.assert_equal(got, reference(op, same, case).astype("f4"))


# Memory


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
def test_nothing_is_allocated_but_the_result(xp, op, dtype) -> None:
    """With ``out``, nothing at all, wherever arrays lie: fit for a graph."""
    for case in CASES.values():
        arrays = operands(case, dtype)
        shape = reference(op, arrays, case).shape
        mine = Operands(*(PLACES["_turned"](xp, array) for array in arrays))
        out = PLACES["_turned"](xp, np.zeros(shape, dtype))
        run(op, mine, case, out=out, **DEPTHWISE)
        with device_allocations(xp) as seen:
            run(op, mine, case, out=out, memory_limit=0, **DEPTHWISE)
        assert seen.count == 0
        with device_allocations(xp) as seen:
            run(op, mine, case, **DEPTHWISE)
        assert seen.count == 1


# Edges


def test_no_image_and_no_channel_for_the_kernels_themselves(xp) -> None:
    loops = cuda_backend().direct
    axes = (Axis(1, 1, 1, 1, 0, 0),) * 2 + (Axis(5, 2, 1, 1, 0, 0),)
    x, dy = xp.empty((0, 3, 1, 1, 1, 5), "f4"), xp.empty((0, 3, 1, 1, 1, 4), "f4")
    w = xp.empty((3, 1, 1, 1, 1, 2), "f4")
    loops.convolve(x, w, None, dy, axes)
    loops.correlate(x, dy, w, axes)
    assert not to_host(w).any()
    none = xp.empty((0, 1, 1, 1, 1, 2), "f4")
    loops.correlate(
        xp.empty((2, 0, 1, 1, 1, 5)), xp.empty((2, 0, 1, 1, 1, 4)), none, axes
    )


@pytest.mark.parametrize("images", [65_535, 65_536])
@pytest.mark.parametrize("op", OPERATIONS)
def test_grids_of_any_length(xp, op, images) -> None:
    """Every image one cell; then as many filters, each in a block of its own."""
    few = Case((images, 2, 1), (2, 1, 1), {"groups": 2})
    many = Case((1, images, 2), (images, 1, 2), {"groups": images})
    for case in (few, many) if op != "weight_grad" else (few,):
        shapes = case.x_shape, case.w_shape, (*case.x_shape[:2], 1)
        arrays = Operands(*(integers(s, "float32") for s in shapes))
        wanted = _of_one_cell(op, arrays)
        got = to_host(run(op, arrays.on(xp), case, **DEPTHWISE))
        testing.assert_equal(got, wanted.astype("f4"))


def _of_one_cell(op: str, arrays: Operands) -> np.ndarray:
    """A convolution with one output, as a product; the reference takes minutes."""
    x, w, dy = arrays
    if op == "forward":
        return (x * w[:, 0]).sum(-1, keepdims=True)
    return dy * w[:, 0] if op == "input_grad" else (x * dy).sum((0, 2)).reshape(w.shape)


@pytest.mark.parametrize("op", OPERATIONS)
def test_threads_and_blocks_that_go_round_again(xp, op, monkeypatch) -> None:
    from cuconv.backends.cuda import backend

    monkeypatch.setattr(direct, "MOST_THREADS", 512)
    monkeypatch.setattr(backend, "MOST_BLOCKS", 3)
    for case in CASES.values():
        check(xp, op, case, "float32")
    if getattr(xp, "IS_STAND_IN", False):
        assert launches()[-1][1] in (1, 2, 3)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize(
    ("positions", "threads"), [(31, (32, 256)), (200, (256, 512)), (700, (512, 512))]
)
def test_blocks_of_every_size(xp, positions, threads, layout) -> None:
    """Sums of fewer positions than threads, of a block's, of more than one round."""
    case = Case((1, 11, positions + 2), (11, 1, 3), {"groups": 11}).in_layout(layout)
    check(xp, "weight_grad", case, "float32")
    if getattr(xp, "IS_STAND_IN", False):
        name, _, launched, *_ = launches()[-1]
        assert name == "depthwise_weights"
        assert launched == threads[layout == "channels_last"]


def launches() -> list[Any]:
    """What the stand-in has launched; the real CuPy does not tell."""
    from cupy._kernels import launches as all_of_them

    return all_of_them


# How launches are shared out


# What it says


def test_it_is_chosen_for_groups(xp) -> None:
    forget_plans()
    for op in OPERATIONS:
        for case in CASES.values():
            plan = cuconv.plan_conv(
                case.x_shape, case.w_shape, op=op, device="cuda", **case.options
            )
            assert plan.strategy == "depthwise"
            assert plan.workspace_bytes == 0


@pytest.mark.parametrize("op", OPERATIONS)
def test_several_types_go_elsewhere(xp, op) -> None:
    case = CASES["two axes"]
    arrays = operands(case, "float32")
    mine = arrays.on(xp)
    name = "w" if op == "input_grad" else "x"
    mixed = mine._replace(**{name: getattr(mine, name).astype("f8")})
    with pytest.raises(ValueError, match="several types"):
        run(op, mixed, case, **DEPTHWISE)
    wanted = reference(op, arrays, case)
    testing.assert_equal(to_host(run(op, mixed, case)), wanted, dtype=np.float64)
    with pytest.raises(ValueError, match="do not add int32"):
        run(op, operands(case, "int32").on(xp), case, **DEPTHWISE)


def test_lengths_past_31_bits_go_elsewhere(xp) -> None:
    far = {"stride": 2**16, "dilation": 3, "groups": 2}
    with pytest.raises(ValueError, match="lengths of 4294967303 elements, less than 2"):
        cuconv.plan_conv(
            (1, 2, 2**18), (2, 1, 3), op="input_grad", device="cuda", **far, **DEPTHWISE
        )
