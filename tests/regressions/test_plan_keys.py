"""Calls that differ in something small are not taken for the same call."""

import gc
import weakref

import numpy as np
import pytest

import cuconv
from cuconv import testing

X, W = np.ones((1, 1, 10, 10)), np.ones((1, 1, 3, 3))


def test_options_of_the_same_bytes_are_not_the_same() -> None:
    line, w = np.ones((1, 1, 600)), np.ones((1, 1, 3))
    assert cuconv.conv(line, w, padding=np.int8(-1)).shape == (1, 1, 596)
    assert cuconv.conv(line, w, padding=np.uint8(255)).shape == (1, 1, 1108)
    cuconv.conv(X, W, stride=np.int8(1))
    with pytest.raises(TypeError, match="stride"):
        cuconv.conv(X, W, stride=np.bool_(True))
    cuconv.im2col(X, np.array([2, 2], "i1"))
    with pytest.raises(ValueError, match="kernel"):
        cuconv.im2col(X, np.int16(514))
    x, filters = X.astype(np.uint8), W.astype(np.uint8)
    cuconv.conv(x, filters, x_zero_point=np.uint8(255))
    with pytest.raises(ValueError, match="x_zero_point"):
        cuconv.conv(x, filters, x_zero_point=np.int8(-1))


def test_a_tuple_of_results_is_no_result() -> None:
    y, pooled = np.empty((1, 1, 8, 8)), np.empty((1, 1, 5, 5))
    for out in (y, None):
        cuconv.conv(X, W, out=out)
        with pytest.raises(TypeError, match="tuple"):
            cuconv.conv(X, W, out=(out,))
    for out in (pooled, None):
        cuconv.max_pool(X, 2, out=out)
        with pytest.raises(TypeError, match="tuple"):
            cuconv.max_pool(X, 2, out=(out,))


def test_a_prepared_plan_takes_any_bias() -> None:
    w, x = np.ones((3, 1, 3, 3)), X
    plan = cuconv.plan_conv(x.shape, w.shape, dtype="float64", bias=True)
    prepared = plan.prepare(w)
    bias = np.arange(3.0)
    for each in (bias[::-1], np.stack([bias, bias], 1)[:, 0], bias):
        for _ in range(2):
            testing.assert_equal(prepared(x, each), cuconv.conv(x, w, each))


def test_a_plan_is_freed_with_its_last_reference() -> None:
    plan = cuconv.plan_conv(X.shape, W.shape, dtype="float64").prepare(W)
    plan(X)
    seen = weakref.ref(plan)
    gc.disable()
    try:
        del plan
        assert seen() is None
    finally:
        gc.enable()
