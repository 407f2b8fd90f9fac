"""Gradients of integers by products of floats equal sums of integers, which wrap."""

import numpy as np
import pytest

import cuconv
from cuconv import testing
from cuconv.engine.rewrites import float_copies
from tests.cases import LAYOUTS
from tests.support import host_peak

# More multiply-adds than OpenBLAS takes one thread for: smaller ones stay integers.
SHAPES = {
    "one axis": ((4, 8, 200), (16, 8, 9), {"padding": 3, "stride": 2}),
    "two axes": ((2, 16, 12, 13), (16, 8, 3, 3), {"padding": 1, "groups": 2}),
    "three axes": ((3, 8, 8, 9, 7), (16, 8, 3, 2, 3), {"dilation": (1, 2, 1)}),
}


def extremes(shape, dtype) -> np.ndarray:
    """All values, the most extreme ones among them."""
    limits = np.iinfo(dtype)
    return np.random.default_rng(1).integers(limits.min, limits.max + 1, shape, dtype)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_exact(name, dtype, monkeypatch) -> None:
    made = []
    copies = float_copies.FloatCopies
    monkeypatch.setattr(
        float_copies, "FloatCopies", lambda *a: made.append(a) or copies(*a)
    )
    x_shape, w_shape, options = SHAPES[name]
    x, w = extremes(x_shape, dtype), extremes(w_shape, dtype)
    dy = extremes(cuconv.conv(x, w, **options).shape, dtype)
    wide = [array.astype(np.float64) for array in (dy, x, w)]
    exact = {"dtype": np.float64, "precision": "strict"}
    calls = {
        cuconv.conv_input_grad: ((0, 2), x_shape),
        cuconv.conv_weight_grad: ((0, 1), w_shape),
    }
    for call, (places, shape) in calls.items():
        operands = [(dy, x, w)[i] for i in places]
        wanted = call(*(wide[i] for i in places), shape, **exact, **options)
        got = call(*operands, shape, dtype=np.int32, **options)
        testing.assert_equal(got, wanted.astype(np.int32), dtype="int32")
    assert len(made) == len(calls)


def test_sums_that_may_leave_the_range_wrap() -> None:
    """255² · 2¹⁶ terms: more than int32 can hold, so that integers are multiplied."""
    ones = np.full((1, 1, 2**16), 255, np.uint8)
    dw = cuconv.conv_weight_grad(np.repeat(ones, 8, 1), ones, (8, 1, 1), dtype=np.int32)
    wanted = np.int64(255**2) * 2**16
    assert (dw == (wanted + 2**31) % 2**32 - 2**31).all()


@pytest.mark.parametrize("limit", ["192 KiB", "1 MiB"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_limit_holds(limit, layout) -> None:
    """Copies that do not fit are not made."""
    rng = np.random.default_rng(2)
    shapes = {"channels_first": ((2, 16, 16, 16), (16, 16, 3, 3))}
    shapes["channels_last"] = ((2, 16, 16, 16), (3, 3, 16, 16))
    x, w = (rng.integers(-9, 9, shape, np.int8) for shape in shapes[layout])
    options = {"padding": 1, "layout": layout, "memory_limit": limit}
    dy = np.ones_like(cuconv.conv(x, w, padding=1, layout=layout))

    def call() -> np.ndarray:
        return cuconv.conv_input_grad(dy, w, x.shape, dtype=np.int32, **options)

    wanted = cuconv.conv_input_grad(
        dy, w, x.shape, dtype=np.int32, padding=1, layout=layout
    )
    nbytes = wanted.nbytes + {"192 KiB": 192 * 2**10, "1 MiB": 2**20}[limit]
    testing.assert_equal(call(), wanted, dtype="int32")
    cuconv.release_memory()
    assert host_peak(call, nbytes) <= nbytes


def test_a_transposed_convolution_is_exact() -> None:
    x, w = extremes((2, 16, 9, 9), "int8"), extremes((16, 8, 3, 3), "int8")
    wide = x.astype(float), w.astype(float)
    wanted = cuconv.conv_transpose(*wide, precision="strict")
    got = cuconv.conv_transpose(x, w, dtype=np.int32)
    testing.assert_equal(got, wanted.astype(np.int32), dtype="int32")
