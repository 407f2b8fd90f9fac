"""Integer results that may wrap around say so, once, with what to pass instead."""

import re
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
from support import forget_plans, integers

import cuconv


def of(dtype: Any, *shape: int) -> np.ndarray:
    return integers(shape, np.dtype(dtype).name)


def called(call: Any) -> list[str]:
    """The texts of the warnings of a call, each of the line below."""
    forget_plans()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
        call()
    kinds = [warning.category for warning in seen]
    assert kinds == [cuconv.IntegerOverflowWarning] * len(kinds)
    assert all(warning.filename == __file__ for warning in seen)
    return [str(warning.message) for warning in seen]


CONV = {"x": (1, 3, 6, 6), "w": (4, 3, 3, 3), "dy": (1, 4, 4, 4)}
WRAPS: list[Any] = [
    ("27 products of uint8 and uint8 .* uint8: pass dtype='uint32'", "u1"),
    ("27 products of int8 and int8 .* int8: pass dtype='int32'", "i1"),
    ("27 products of int16 and int16 .* int16: pass dtype='int64'", "i2"),
    ("27 products of int32 and int32 .* int32: pass dtype='int64'", "i4"),
]


@pytest.mark.parametrize(("words", "dtype"), WRAPS)
def test_convolution(xp, words, dtype) -> None:
    x, w = (xp.asarray(of(dtype, *CONV[name])) for name in "xw")
    (text,) = called(lambda: cuconv.conv2d(x, w))
    assert re.search(words, text), text


@pytest.mark.parametrize(
    "call",
    [
        lambda: cuconv.conv2d(of("u1", *CONV["x"]), of("u1", *CONV["w"]), dtype="i4"),
        lambda: cuconv.conv2d(of("i8", *CONV["x"]), of("i8", *CONV["w"])),
        lambda: cuconv.conv2d(of("f4", *CONV["x"]), of("i4", *CONV["w"])),
        lambda: cuconv.conv2d(of("?", *CONV["x"]), of("?", *CONV["w"])),
        lambda: cuconv.conv2d(
            of("i1", *CONV["x"]), of("i1", *CONV["w"]), x_zero_point=3
        ),
        lambda: cuconv.max_pool2d(of("u1", *CONV["x"]), 3),
        lambda: cuconv.avg_pool2d(of("u1", *CONV["x"]), 3),
        lambda: cuconv.im2col(of("u1", *CONV["x"]), 3),
        lambda: cuconv.col2im(of("u1", 9, 12), (1, 3, 6, 6), 2, stride=2),
        lambda: cuconv.max_pool_backward(
            of("u1", 1, 3, 3, 3), None, None, 2, x=of("u1", *CONV["x"])
        ),
    ],
)
def test_what_cannot_wrap_is_silent(call) -> None:
    assert called(call) == []


SUMS: list[Any] = [
    (
        "36 products of uint8 and uint8 .*pass dtype='uint32'",
        partial(cuconv.conv_transpose, of("u1", *CONV["dy"]), of("u1", *CONV["w"])),
    ),
    (
        "16 products of uint8 and uint8 .*pass dtype='uint32'",
        partial(
            cuconv.conv_weight_grad,
            *(of("u1", *CONV["dy"]), of("u1", *CONV["x"]), CONV["w"]),
        ),
    ),
    (
        "36 products of int8 and int8 .*pass dtype='int32'",
        partial(
            cuconv.conv_input_grad,
            *(of("i1", *CONV["dy"]), of("i1", *CONV["w"]), CONV["x"]),
        ),
    ),
    (
        "9 products of uint8 and uint8 .*pass dtype='uint32'",
        partial(cuconv.depthwise_conv, of("u1", *CONV["x"]), of("u1", 3, 1, 3, 3)),
    ),
    (
        r"4 uint8 of cols .*pass cols.astype\('uint16'\)",
        partial(cuconv.col2im, of("u1", 25, 12), (1, 3, 6, 6), 2),
    ),
    (
        r"4 uint8 of dy .*pass dy.astype\('uint16'\)",
        lambda: cuconv.max_pool_backward(
            of("u1", 1, 3, 5, 5), None, None, 2, x=of("u1", *CONV["x"]), stride=1
        ),
    ),
]


@pytest.mark.parametrize(("words", "call"), SUMS)
def test_sums(words, call) -> None:
    (text,) = called(call)
    assert re.search(words, text), text


def test_a_repeated_call_says_nothing() -> None:
    """Nor does it do anything about it: the plan is kept."""
    x, w = of("u1", *CONV["x"]), of("u1", *CONV["w"])
    forget_plans()
    with pytest.warns(cuconv.IntegerOverflowWarning):
        cuconv.conv2d(x, w)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuconv.conv2d(x, w)
