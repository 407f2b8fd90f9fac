"""What was found wrong in general convolutions, and must not come back."""

from functools import partial

import numpy as np
import pytest
from support import (
    OPERATIONS,
    Case,
    host_peak,
    integers,
    operands,
    reference,
    run,
    smallest_limit,
    to_host,
)

import cuconv
from cuconv.geometry import ConvGeometry
from cuconv.memory import MemoryLimitError


@pytest.mark.parametrize("op", OPERATIONS)
def test_cells_far_apart_take_no_phases_without_taps(op) -> None:
    """A phase for every place between two cells would be 160 000 of them."""
    plan = cuconv.plan_conv((1, 1, 9, 9), (1, 1, 3, 3), op=op, input_dilation=400)
    assert plan.flops > 0
    geometry = ConvGeometry.of_weights((1, 1, 9), (1, 1, 3), input_dilation=2**31 - 1)
    assert len(list(geometry.phases())) == 3


def test_results_in_no_phase_are_the_bias(xp) -> None:
    x, w = xp.ones((1, 1, 2)), xp.full((1, 1, 1), 5.0)
    y = cuconv.conv(x, w, xp.full((1,), 7.0), input_dilation=3)
    assert to_host(y).tolist() == [[[12, 7, 7, 12]]]


def test_a_padding_mode_that_is_no_word_is_named() -> None:
    x, w = np.ones((1, 1, 4)), np.ones((1, 1, 3))
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        cuconv.conv(x, w, padding_mode=["reflect"])


def test_folds_keep_numpys_buffers_small() -> None:
    """Cells that lie apart are added by way of buffers, of 8192 items by default."""
    dy, w = integers((1, 2, 60, 60), "complex64"), integers((2, 4, 3, 3), "complex64")
    out = np.zeros((2, 8, 120, 120), np.complex64)[::2, ::2, ::2, ::2]
    options = {"padding": 1, "padding_mode": "circular", "out": out}
    call = partial(cuconv.conv_input_grad, dy, w, out.shape, **options)
    limit = 2**18

    def nothing() -> None:
        call(memory_limit=limit)

    assert host_peak(nothing, limit) <= limit


def test_sums_over_blocks_count_where_the_smallest_limit_is_sought() -> None:
    """One block of a small x needs less than two, which have sums of a large w."""
    x, dy = integers((2, 4, 8, 8), "float32"), integers((2, 64, 8, 8), "float32")
    options = {"padding": 1, "padding_mode": "reflect"}
    call = partial(cuconv.conv_weight_grad, dy, x, (64, 4, 3, 3), **options)
    smallest = smallest_limit(call)
    assert np.array_equal(call(memory_limit=smallest), call())
    with pytest.raises(MemoryLimitError):
        call(memory_limit=smallest - 1)


def test_a_bias_beside_zero_points_is_added_before_rounding(xp) -> None:
    """2051 and 2 lie on two sides of a tie in float16."""
    x = xp.asarray(np.array([[[205], [1]]], np.uint8))
    w = xp.asarray(np.array([[[10], [1]]], np.uint8))
    bias = xp.asarray(np.array([2], np.uint8))
    y = cuconv.conv(x, w, bias, x_zero_point=0, dtype="float16")
    assert to_host(y).item() == np.float16(2053)


def test_groups_of_images_under_no_window_are_the_bias(xp) -> None:
    """No cell is copied, and no memory is taken for a copy."""
    x, w = xp.ones((2, 1, 1)), xp.ones((2, 1, 1))
    bias = xp.asarray(np.array([3.0, 4.0]))
    y = cuconv.conv(x, w, bias, stride=4, padding=((1, 2),), batch_groups=2)
    assert to_host(y).tolist() == [[[3], [4]]]


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_sums_over_blocks_reach_a_result_that_lies_apart(xp, dtype) -> None:
    """The plans of blocks are for fresh buffers, and so is the sum of the first."""
    x, dy = integers((2, 3, 9, 9), dtype), integers((2, 4, 9, 9), dtype)
    w_shape = (4, 3, 3, 3)
    options = {"padding": 1, "padding_mode": "circular", "precision": "strict"}
    wanted = cuconv.conv_weight_grad(dy, x, w_shape, **options)
    spaced = xp.zeros((8, 6, 6, 6), dtype)
    out = spaced[::2, ::2, ::2, ::-2]
    call = partial(cuconv.conv_weight_grad, xp.asarray(dy), xp.asarray(x), w_shape)
    limit = smallest_limit(partial(call, out=out, **options))
    call(out=out, memory_limit=limit, **options)
    assert np.array_equal(to_host(out), wanted)


class Sealed(np.ndarray):
    """An array whose own arithmetic is not the library's."""

    def __array_ufunc__(self, *arguments: object, **options: object) -> None:
        raise AssertionError


@pytest.mark.parametrize("options", [{}, {"padding": 1, "padding_mode": "reflect"}])
def test_plans_take_subclasses_as_plain_arrays(options) -> None:
    x, w = integers((2, 3, 9, 9), "float32"), integers((4, 3, 3, 3), "float32")
    plan = cuconv.plan_conv(x.shape, w.shape, precision="strict", **options)
    y = plan(x.view(Sealed), w.view(Sealed))
    assert type(y) is np.ndarray
    assert np.array_equal(y, plan(x, w))


@pytest.mark.parametrize(
    "options",
    [{"input_dilation": 2}, {"padding": 1, "padding_mode": "reflect"}],
)
@pytest.mark.parametrize("op", ["forward", "input_grad"])
def test_a_prepared_plan_times_no_other_candidates(xp, op, options) -> None:
    """Its weights are those of the candidate that they were prepared for."""
    shapes = (1, 16, 9, 9), (16, 16, 3, 3)
    options = {**options, "strategy": "benchmark", "precision": "standard"}
    device = "cpu" if xp is np else "cuda"
    plan = cuconv.plan_conv(*shapes, op=op, device=device, **options)
    first = shapes[0] if op == "forward" else plan.problem.geometry.y_shape
    a, w = (integers(shape, "float32") for shape in (first, shapes[1]))
    prepared = plan.prepare(xp.asarray(w))
    y = to_host(prepared(xp.asarray(a)))
    wanted = to_host(plan(xp.asarray(a), xp.asarray(w)))
    assert np.allclose(y, wanted, rtol=0, atol=1e-3)
    assert np.array_equal(to_host(prepared(xp.asarray(a))), y)


@pytest.mark.parametrize("mode", ["replicate", "reflect", "symmetric"])
def test_wide_padding_is_not_listed(mode) -> None:
    """Thousands of pieces: a list of them would take megabytes."""
    dy, w = np.ones((1, 1, 4001), np.float32), np.ones((1, 1, 2), np.float32)
    options = {"padding": 2000, "padding_mode": mode}
    call = partial(cuconv.conv_input_grad, dy, w, (1, 1, 2), **options)
    assert host_peak(partial(call, memory_limit=2**18), 2**18) <= 2**18


@pytest.mark.parametrize("op", OPERATIONS)
def test_blocks_whose_windows_step_over_all_cells(xp, op) -> None:
    """The whole spans the only row; a block of one row of y never reads it."""
    options = {"stride": 2, "padding": 3, "batch_groups": 2, "strategy": "im2col"}
    x, w, dy = xp.ones((2, 3, 1, 1)), xp.ones((4, 3, 1, 1)), xp.ones((1, 4, 4, 4))
    call = {
        "forward": partial(cuconv.conv, x, w, **options),
        "input_grad": partial(cuconv.conv_input_grad, dy, w, x.shape, **options),
        "weight_grad": partial(cuconv.conv_weight_grad, dy, x, w.shape, **options),
    }[op]
    limit = smallest_limit(call)
    assert not to_host(call(memory_limit=limit)).any()


@pytest.mark.parametrize("batch_groups", [1, 2])
def test_no_cells_to_lie_apart(xp, batch_groups) -> None:
    x, w, dy = xp.ones((2, 1, 0, 1)), xp.ones((2, 1, 1, 1)), xp.ones((2, 2, 2, 3))
    options = {"input_dilation": 3, "padding": 1, "batch_groups": batch_groups}
    dy = dy[: 2 // batch_groups]
    assert not to_host(cuconv.conv(x, w, **options)).any()
    gradients = cuconv.conv_backward(dy, x, w, **options)
    assert gradients.x.shape == x.shape
    assert not to_host(gradients.w).any()


@pytest.mark.parametrize("xp", ["cupy"], indirect=True)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_a_gradient_between_cells_that_lie_apart_needs_no_columns(xp, layout) -> None:
    """By the kernel that gathers as it multiplies, as a CUDA graph wants it."""
    case = Case((2, 4, 5, 4), (6, 2, 3, 3), {"groups": 2, "padding": 2})
    case.options.update(input_dilation=(2, 3), stride=(1, 2), dilation=(2, 1))
    case = case.in_layout(layout)
    arrays = operands(case, "complex128")
    expected = reference("input_grad", arrays, case)
    found = run("input_grad", arrays.on(xp), case, strategy="implicit_gemm")
    np.testing.assert_array_equal(to_host(found), expected)


def test_a_strategy_of_the_canonical_form_alone_names_its_smallest_limit() -> None:
    """Not that it cannot run the convolution as it was given, which it need not."""
    dy, w, shape = np.ones((3, 3, 1, 3)), np.ones((3, 4, 4, 3)), (3, 4, 4, 3)
    options = {"stride": (2, 1), "padding": (0, 1), "strategy": "partial_im2col"}
    call = partial(cuconv.conv_input_grad, dy, w, shape, **options)
    assert call().shape == shape
    with pytest.raises(MemoryLimitError) as caught:
        call(memory_limit=0)
    assert np.array_equal(call(memory_limit=caught.value.smallest), call())


def test_an_input_that_no_window_reads_has_a_gradient_of_zeros() -> None:
    """Windows at -2 and 1 of one element: every phase of the gradient is empty."""
    dy, w, shape = np.ones((64, 256, 2)), np.ones((256, 256, 1)), (64, 256, 1)
    options = {"stride": 3, "padding": 2}
    assert not cuconv.conv_input_grad(dy, w, shape, **options).any()
    plan = cuconv.plan_conv(shape, w.shape, op="input_grad", **options)
    assert "times as long" in str(plan)
