"""Arrays in the other byte order: every call answers in the machine's own."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from support import arrays_of, host_peak, integers

import cuconv
from cuconv import testing

SHAPE, W_SHAPE, PADDED = (2, 3, 9, 8), (4, 3, 3, 2), {"padding": 1}
Y_SHAPE = (2, 4, 9, 9)


def swapped(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder())


def calls(own: Any) -> dict[str, partial[Any]]:
    x, w = own(integers(SHAPE, "float32")), own(integers(W_SHAPE, "float32"))
    dy, columns = own(integers(Y_SHAPE, "float32")), own(integers((144, 12), "float32"))
    filters, every = own(integers((3, 1, 2, 2), "float32")), {"x_shape": SHAPE}
    pooled = own(cuconv.max_pool(x, 2))
    mean = {"kernel_size": 2, **every}
    return {
        "conv": partial(cuconv.conv, x, w, own(integers((4,), "float32")), **PADDED),
        "conv_backward": partial(cuconv.conv_backward, dy, x, w, **PADDED),
        "conv_transpose": partial(cuconv.conv_transpose, dy, w),
        "depthwise_conv": partial(cuconv.depthwise_conv, x, filters),
        "separable_conv": partial(
            cuconv.separable_conv, x, filters, own(integers((5, 3), "float32"))
        ),
        "im2col": partial(cuconv.im2col, x, 2),
        "im2col halves": partial(cuconv.im2col, own(x.astype("float16")), 2),
        "col2im": partial(cuconv.col2im, columns[:112], SHAPE, 2),
        "col2im halves": partial(
            cuconv.col2im, own(columns[:112].astype("float16")), SHAPE, 2
        ),
        "iter_im2col": lambda: next(iter(cuconv.iter_im2col(x, 2)))[1],
        "max_pool": partial(cuconv.max_pool, x, 2, return_indices=True),
        "avg_pool": partial(cuconv.avg_pool, x, 2),
        "avg_pool_backward": partial(cuconv.avg_pool_backward, pooled, **mean),
        "lp_pool": partial(cuconv.lp_pool, x, 2, 2),
    }


@pytest.mark.parametrize("name", calls(np.copy))
def test_results_are_in_the_byte_order_of_the_machine(name) -> None:
    wanted = arrays_of(calls(np.copy)[name]())
    found = arrays_of(calls(swapped)[name]())
    assert len(found) == len(wanted) > 0
    for one, two in zip(found, wanted, strict=True):
        assert one.dtype.isnative
        testing.assert_equal(one, two, dtype=two.dtype)


@pytest.mark.parametrize("dtype", ["complex128", "int16", "bool", "float16"])
def test_columns_of_every_type(dtype) -> None:
    x = integers(SHAPE, "float32").astype(dtype)
    columns = cuconv.im2col(x, (3, 2), padding=1)
    assert (cuconv.im2col(swapped(x), (3, 2), padding=1) == columns).all()
    back = cuconv.col2im(columns, SHAPE, (3, 2), padding=1)
    found = cuconv.col2im(swapped(columns), SHAPE, (3, 2), padding=1)
    assert (found == back).all()
    assert found.dtype.isnative
    own = np.empty_like(back)
    options = {"padding": 1, "out": own}
    assert cuconv.col2im(swapped(columns), SHAPE, (3, 2), **options) is own


def test_a_view_keeps_the_byte_order_of_its_array() -> None:
    x = swapped(integers(SHAPE, "float32"))
    assert cuconv.patches(x, 2).dtype == x.dtype


def test_blocks_of_columns_stay_within_the_limit() -> None:
    x, limit = swapped(integers((1, 8, 64, 64), "float32")), 2**18

    def first() -> None:
        next(iter(cuconv.iter_im2col(x, 3, memory_limit=limit)))

    first()
    assert host_peak(first, limit) <= limit


def test_determinism_is_a_boolean_of_python_or_numpy() -> None:
    columns = integers((112, 12), "float32")
    for asked in (True, np.False_, None):
        cuconv.col2im(columns, SHAPE, 2, deterministic=asked)
    with pytest.raises(TypeError, match="deterministic must be True, False or None"):
        cuconv.col2im(columns, SHAPE, 2, deterministic="no")
