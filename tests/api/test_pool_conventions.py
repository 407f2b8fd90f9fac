"""Pooling as ONNX and Chainer define it: values of their documents, and loops."""

import itertools
from typing import Any

import numpy as np
import pytest
from support import integers, to_host

import cuconv
from cuconv import testing


def equal(actual: Any, wanted: Any) -> None:
    testing.assert_equal(to_host(actual).astype("f8"), np.asarray(wanted, "f8"))


@pytest.fixture
def square(xp) -> Any:
    """1 to 25, row by row: the input of most examples of ONNX's."""
    return xp.asarray(np.arange(1, 26, dtype="float32").reshape(1, 1, 5, 5))


def test_onnx_indices_count_the_whole_array(xp, square) -> None:
    both = xp.concatenate([square, square + 1], axis=1)
    options = {"stride": 1, "padding": 2, "return_indices": True}
    y, indices = cuconv.max_pool(both, 5, indices_over="array", **options)
    first = [[13, 14, 15, 15, 15], [18, 19, 20, 20, 20], *[[23, 24, 25, 25, 25]] * 3]
    equal(y, [[first, np.add(first, 1)]])
    equal(indices, [[np.subtract(first, 1), np.add(first, 24)]])


def test_onnx_indices_column_by_column(square) -> None:
    """Their storage_order=1: axes in the other order, of arrays and of options."""
    y, indices = cuconv.max_pool(
        square.transpose(0, 1, 3, 2), 2, return_indices=True, indices_over="array"
    )
    equal(y.transpose(0, 1, 3, 2), [[[[7, 9], [17, 19]]]])
    equal(indices.transpose(0, 1, 3, 2), [[[[6, 16], [8, 18]]]])


def test_onnx_unpooling(xp) -> None:
    """With an output_shape the rest of a larger array is zero."""
    x = xp.asarray(np.array([[[[5, 6], [7, 8]]]], "float32"))
    indices = xp.asarray(np.array([[[[5, 7], [13, 15]]]]))
    wanted = np.zeros((1, 1, 5, 5))
    wanted[0, 0, 1:4:2, 1:4:2] = [[5, 6], [7, 8]]
    equal(cuconv.max_unpool(x, indices, 2, indices_over="array"), wanted[..., :4, :4])
    larger = xp.zeros((1, 1, 5, 5), dtype="float32")
    out = larger[..., :4, :4]
    cuconv.max_unpool(x, indices, 2, indices_over="array", out=out)
    equal(larger, wanted)


def test_onnx_rounding_up(xp, square) -> None:
    """AveragePool and MaxPool with ceil_mode, and auto_pad=SAME_UPPER."""
    four = square.reshape(1, 1, 25)[..., :16].reshape(1, 1, 4, 4)
    options: dict[str, Any] = {"stride": 2, "ceil_mode": True}
    equal(cuconv.max_pool(four, 3, **options), [[[[11, 12], [15, 16]]]])
    equal(cuconv.avg_pool(four, 3, **options), [[[[6, 7.5], [12, 13.5]]]])
    y = cuconv.max_pool(four[..., :2, :2], 1, stride=2, ceil_mode=True)
    equal(y, [[[[1]]]])
    means = cuconv.avg_pool(
        square, 3, stride=2, padding="same", count_include_pad=False
    )
    equal(means, [[[[4, 5.5, 7], [11.5, 13, 14.5], [19, 20.5, 22]]]])


def test_onnx_norms_and_global_pooling(square) -> None:
    equal(cuconv.lp_pool(square, 1, 2), [[[[16, 24], [56, 64]]]])
    equal(cuconv.global_avg_pool2d(square), [[[[13]]]])
    equal(cuconv.global_max_pool2d(square), [[[[25]]]])


SHAPES = [
    (size, kernel, stride, pad)
    for size, kernel, stride, pad in itertools.product(
        range(1, 7), (1, 2, 3), (1, 2, 3), (0, 2)
    )
    if size + 2 * pad >= kernel
]


def chainer_outputs(
    size: int, kernel: int, stride: int, pad: int, cover_all: bool
) -> int:
    rest = stride - 1 if cover_all else 0
    return (size + 2 * pad - kernel + rest) // stride + 1


def windows(size: int, kernel: int, stride: int, pad: int, outputs: int) -> Any:
    """The elements under each window."""
    for o in range(outputs):
        first = o * stride - pad
        yield [i for i in range(first, first + kernel) if 0 <= i < size]


@pytest.mark.parametrize("cover_all", [True, False])
def test_chainer_max_pooling_nd(cover_all) -> None:
    """Forward, indices and gradients of every window that cover_all adds."""
    added = 0
    for size, kernel, stride, pad in SHAPES:
        x = integers((1, 2, size), "float64")
        outputs = chainer_outputs(size, kernel, stride, pad, cover_all)
        under = list(windows(size, kernel, stride, pad, outputs))
        wanted = np.full((1, 2, outputs), -np.inf)
        dx = np.zeros_like(x)
        for c, (o, cells) in itertools.product(range(2), enumerate(under)):
            if cells:
                best = cells[int(x[0, c, cells].argmax())]
                wanted[0, c, o] = x[0, c, best]
                dx[0, c, best] += o + 1
        options = {"stride": stride, "padding": pad, "cover_all": cover_all}
        y, indices = cuconv.max_pool(x, kernel, return_indices=True, **options)
        equal(y, wanted)
        dy = np.broadcast_to(np.arange(1.0, outputs + 1), y.shape)
        arguments = dy, indices, x.shape, kernel
        equal(cuconv.max_pool_backward(*arguments, **options), dx)
        del options["cover_all"]
        ceil = cuconv.max_pool(x, kernel, ceil_mode=True, **options)
        added += cover_all and ceil.shape != y.shape
    assert added > 5 or not cover_all


@pytest.mark.parametrize("counted", [True, False])
def test_chainer_average_pooling_nd(counted) -> None:
    """pad_value=0 counts the padding, pad_value=None does not."""
    for size, kernel, stride, pad in SHAPES:
        x = integers((1, 2, size), "float64")
        outputs = chainer_outputs(size, kernel, stride, pad, cover_all=False)
        under = windows(size, kernel, stride, pad, outputs)
        wanted = np.zeros((1, 2, outputs))
        for o, cells in enumerate(under):
            divisor = kernel if counted else max(len(cells), 1)
            wanted[..., o] = x[..., cells].sum(-1) / divisor
        options = {"stride": stride, "padding": pad, "count_include_pad": counted}
        equal(cuconv.avg_pool(x, kernel, **options), wanted)


@pytest.mark.parametrize("cover_all", [True, False])
def test_chainer_unpooling_and_upsampling(cover_all) -> None:
    """A value for every element of its window, or for the one of an index."""
    for inputs, kernel, stride, pad in SHAPES:
        size = stride * (inputs - 1) + kernel - 2 * pad
        size -= stride - 1 if cover_all else 0
        if size < 1 or inputs != chainer_outputs(size, kernel, stride, pad, cover_all):
            continue
        x = integers((1, 2, inputs), "float64")
        wanted = np.zeros((1, 2, size))
        for o, cells in enumerate(windows(size, kernel, stride, pad, inputs)):
            for i in cells:
                wanted[..., i] += x[..., o]
        options = {"stride": stride, "padding": pad}
        spread = {**options, "cover_all": cover_all, "divisor_override": 1}
        got = cuconv.avg_pool_backward(x, (1, 2, size), kernel, **spread)
        equal(got, wanted)
        if not cover_all:
            _, indices = cuconv.max_pool(got, kernel, return_indices=True, **options)
            up = np.zeros((1, 2, size))
            for c, o in np.ndindex(2, inputs):
                if indices[0, c, o] >= 0:
                    up[0, c, indices[0, c, o]] += x[0, c, o]
            equal(cuconv.max_unpool(x, indices, kernel, **options), up)
