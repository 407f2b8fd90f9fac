"""Indices of maxima: over a plane or the array, to take elements, to put them back."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from cases import Pool, even_pools, pools
from hypothesis import given
from hypothesis import strategies as st
from support import (
    LAYOUTS,
    device_allocations,
    forget_plans,
    integers,
    large,
    peak,
    smallest_limit,
    to_host,
)

import cuconv
from cuconv import testing
from cuconv.backends.cpu import pool_maxima

OVER = ("plane", "array")
TYPES = ("float32", "float64", "float16", "bfloat16", "int8", "int64", "complex64")


def equal(actual: Any, wanted: Any, **options: Any) -> None:
    testing.assert_equal(to_host(actual), np.asarray(wanted), **options)


def in_planes(a: np.ndarray, rank: int, layout: str) -> np.ndarray:
    """(..., elements of a plane), channels first."""
    first = a if layout == "channels_first" else np.moveaxis(a, -1, -rank - 1)
    return first.reshape(*first.shape[:-rank], -1)


def taken(x: np.ndarray, indices: np.ndarray, pool: Pool) -> np.ndarray:
    """The elements with these indices in their planes, by NumPy's own function."""
    rank, layout = len(pool.kernel), pool.options["layout"]
    planes, at = (in_planes(a, rank, layout) for a in (x, indices))
    found = np.take_along_axis(planes, np.maximum(at, 0), -1)
    found = np.where(at < 0, np.zeros((), x.dtype), found)
    if layout == "channels_first":
        return found.reshape(indices.shape)
    moved = np.moveaxis(indices, -1, -rank - 1).shape
    return np.moveaxis(found.reshape(moved), -rank - 1, -1)


def check(xp: Any, pool: Pool, dtype: str, over: str, calls: tuple[Any, Any]) -> None:
    """Take elements; add to them; one is the adjoint of the other."""
    forward, backward = calls
    x = np.random.default_rng(1).permutation(int(np.prod(pool.x_shape)))
    x = x.reshape(pool.x_shape).astype("float64")
    options = {**pool.options, "indices_over": over}
    y, indices = forward(xp.asarray(x), return_indices=True, **options)
    at = to_host(indices)
    if over == "array":
        equal(x.reshape(-1)[at[at >= 0]], to_host(y)[at >= 0])
    plane = to_host(forward(xp.asarray(x), return_indices=True, **pool.options)[1])
    assert ((plane < 0) == (at < 0)).all()
    values = integers(pool.x_shape, dtype, seed=2)
    wanted = taken(values, plane, pool)
    got = forward(xp.asarray(values), indices=indices, **options)
    equal(got, wanted, dtype=values.dtype)
    dy = integers(y.shape, dtype, seed=3)
    dx = backward(xp.asarray(dy), indices, x.shape, **options)
    expected = backward(xp.asarray(dy), None, None, x=xp.asarray(x), **pool.options)
    equal(dx, to_host(expected), dtype=dy.dtype)
    if dy.dtype.kind in "fc" and dtype not in ("float16", "bfloat16"):
        both = (to_host(dx) * values).sum(), (dy * to_host(got)).sum()
        assert both[0] == both[1]


@given(
    pool=pools(),
    dtype=st.sampled_from(TYPES),
    over=st.sampled_from(OVER),
)
def test_elements_at_indices(xp, pool, dtype, over) -> None:
    calls = cuconv.max_pool, cuconv.max_pool_backward
    kernel = {"kernel_size": pool.kernel}
    check(xp, pool, dtype, over, tuple(partial(call, **kernel) for call in calls))


@given(pool=even_pools(), dtype=st.sampled_from(TYPES), over=st.sampled_from(OVER))
def test_elements_at_indices_of_even_windows(xp, pool, dtype, over) -> None:
    calls = cuconv.adaptive_max_pool, cuconv.adaptive_max_pool_backward
    size = {"output_size": pool.kernel}
    check(xp, pool, dtype, over, tuple(partial(call, **size) for call in calls))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_global_indices(xp, over, layout) -> None:
    pool = Pool((2, 3, 4, 5), (4, 5), {"layout": layout})
    if layout == "channels_last":
        pool = Pool((2, 4, 5, 3), (4, 5), {"layout": layout})
    calls = cuconv.global_max_pool, cuconv.global_max_pool_backward
    check(xp, pool, "float32", over, calls)


@given(pool=pools(), dtype=st.sampled_from(TYPES), over=st.sampled_from(OVER))
def test_unpooling_is_the_adjoint(xp, pool, dtype, over) -> None:
    """And what it puts back is where the maxima were."""
    for name in ("ceil_mode", "cover_all"):
        del pool.options[name]
    options = {**pool.options, "indices_over": over}
    x = integers(pool.x_shape, "float32")
    y, indices = cuconv.max_pool(
        xp.asarray(x), pool.kernel, return_indices=True, **options
    )
    rank, layout = len(pool.kernel), pool.options["layout"]
    spatial = x.shape[-rank:] if layout == "channels_first" else x.shape[-rank - 1 : -1]
    values = integers(y.shape, dtype, seed=1)
    got = cuconv.max_unpool(
        xp.asarray(values), indices, pool.kernel, output_size=spatial, **options
    )
    wanted = cuconv.max_pool_backward(
        xp.asarray(values), indices, x.shape, pool.kernel, **options
    )
    equal(got, to_host(wanted), dtype=values.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_unpooling_restores_the_smallest_size(xp, layout, rank) -> None:
    options = {"stride": (3, 2, 1)[:rank], "padding": ((1, 0), 2, 0)[:rank]}
    options |= {"dilation": (1, 2, 1)[:rank], "layout": layout}
    kernel, size = (2, 3, 2)[:rank], (7, 5, 4)[:rank]
    shape = (2, 3, *size) if layout == "channels_first" else (2, *size, 3)
    x = integers(shape, "float32")
    y, indices = cuconv.max_pool(xp.asarray(x), kernel, return_indices=True, **options)
    back = cuconv.max_unpool(y, indices, kernel, **options)
    again = getattr(cuconv, f"max_unpool{rank}d")(y[0], indices[0], kernel, **options)
    equal(to_host(back)[0], to_host(again))
    found = cuconv.max_pool(back, kernel, **options)
    assert found.shape == y.shape
    assert all(n <= m for n, m in zip(back.shape, x.shape, strict=True))


def test_overlapping_windows_add_what_they_put_back(xp) -> None:
    x = xp.asarray(np.array([[[1.0, 5.0, 4.0, 2.0]]]))
    y, indices = cuconv.max_pool(x, 2, stride=1, return_indices=True)
    equal(cuconv.max_unpool(y, indices, 2, stride=1), [[[0, 10, 4, 0]]])
    wide = cuconv.max_unpool(y, indices, 2, stride=1, output_size=(4,))
    equal(wide, [[[0, 10, 4, 0]]])
    y, indices = cuconv.max_pool(x, 2, padding="same", return_indices=True)
    equal(cuconv.max_unpool(y, indices, 2, padding="same"), [[[0, 5, 4, 0]]])


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("index", [-2, 0, 20, 2**40, -(2**63)])
def test_indices_that_are_not_of_their_window(dtype, jit, index, monkeypatch) -> None:
    """NumPy refuses them, and says which elements there are, under a limit too."""
    if not jit:
        monkeypatch.setattr(pool_maxima, "jit_is_installed", lambda: False)
    forget_plans()
    x = integers((2, 3, 6, 7), dtype)
    options = {"stride": 2, "padding": 1, "dilation": (2, 1)}
    y, indices = cuconv.max_pool(x, 2, return_indices=True, **options)
    indices[1, 2, 2, 3] = index  # rows 3 and 5, columns 5 and 6
    words = rf"indices has {index} for a window over .*\[3, 5\] × \[5, 6\] of 6 × 7"
    for call in (
        partial(cuconv.max_pool, x, 2, indices=indices),
        partial(cuconv.max_pool_backward, y, indices, x.shape, 2),
        partial(cuconv.max_unpool, y, indices, 2, output_size=(6, 7)),
    ):
        for limit in (None, "128 KiB"):
            with pytest.raises(ValueError, match=words):
                call(memory_limit=limit, **options)
    indices[1, 2, 2, 3] = -1
    assert cuconv.max_pool(x, 2, indices=indices, **options)[1, 2, 2, 3] == 0


@pytest.mark.parametrize("over", OVER)
def test_indices_that_are_not_of_their_window_on_a_device(over) -> None:
    """They count as -1, and nothing outside of an array is touched."""
    cupy = pytest.importorskip("cupy")
    x = integers((2, 3, 6, 7), "float32")
    options = {"stride": 2, "padding": 1, "dilation": (2, 1), "indices_over": over}
    y, indices = cuconv.max_pool(x, 2, return_indices=True, **options)
    for index in (-2, 0, 20, 2**40, -(2**63), 2**63 - 1):
        wrong, none = indices.copy(), indices.copy()
        wrong[1, 2, 2, 3], none[1, 2, 2, 3] = index, -1
        for call in (
            partial(cuconv.max_pool, cupy.asarray(x), 2),
            lambda indices, **o: cuconv.max_pool_backward(
                cupy.asarray(y), indices, x.shape, 2, **o
            ),
        ):
            got = call(indices=cupy.asarray(wrong), **options)
            equal(got, to_host(call(indices=cupy.asarray(none), **options)))


def test_kernels_take_no_memory() -> None:
    cupy = pytest.importorskip("cupy")
    x = cupy.asarray(integers((2, 3, 9, 10), "float16"))
    y, indices = cuconv.max_pool(x, 2, return_indices=True)
    back = cuconv.max_unpool(y, indices, 2, output_size=(9, 10))
    with device_allocations(cupy) as seen:
        cuconv.max_pool(x, 2, indices=indices, out=y)
        cuconv.max_unpool(y, indices, 2, output_size=(9, 10), out=back)
    assert seen.count == 0


@pytest.mark.parametrize("over", OVER)
def test_memory_is_bounded_and_changes_nothing(over) -> None:
    x = integers((2, 2, 13, 50), "float32")
    options = {"stride": 1, "padding": 1, "indices_over": over}
    y, indices = cuconv.max_pool(x, 3, return_indices=True, **options)
    for call in (
        partial(cuconv.max_pool, x[..., ::-1], 3, indices=indices, **options),
        partial(cuconv.max_pool, x, 3, return_indices=True, **options),
        partial(cuconv.max_pool_backward, y, indices, x.shape, 3, **options),
    ):
        wanted, least = call(), smallest_limit(call)
        for limit in (least, 2**18):
            got = call(memory_limit=limit)
            for one, two in zip(np.atleast_1d(got), np.atleast_1d(wanted), strict=True):
                np.testing.assert_array_equal(one, two)
            used = peak(
                np, lambda call=call, limit=limit: call(memory_limit=limit), limit
            )
            assert used <= limit


def test_any_view(xp) -> None:
    """Strides of all signs and none, and bytes of the other order."""
    x = xp.asarray(integers((2, 3, 8, 10), "float32"))
    plain, indices = cuconv.max_pool(x, 2, return_indices=True)
    spread = xp.stack([indices, indices], axis=-1)[..., 0]
    views = [x[..., ::-1][..., ::-1], xp.stack([x, x], axis=-1)[..., 1]]
    if xp is np:
        views.append(x.astype(">f4"))
    for view in views:
        out = xp.zeros_like(plain)
        assert cuconv.max_pool(view, 2, indices=spread, out=out) is out
        equal(out, to_host(plain))
    turned = x[:, :, ::-1]
    got = cuconv.max_pool(turned, 2, indices=indices)
    equal(
        got, to_host(cuconv.max_pool(xp.ascontiguousarray(turned), 2, indices=indices))
    )


def test_indices_of_planes_of_more_than_two_to_the_31_elements(xp) -> None:
    """Of one element in memory; over the array the last is past 2^32."""
    x = large(xp, 2, 1, 2**16, 2**16, dtype="int8")
    options = {"stride": 2**15, "indices_over": "array"}
    indices = cuconv.max_pool(x, 1, return_indices=True, **options)[1]
    last = 2**32 + 2**31 + 2**15
    assert to_host(indices)[1, 0, 1].tolist() == [2**32 + 2**31, last]
    y = cuconv.max_pool(x, 1, indices=indices, **options)
    assert y.shape == (2, 1, 2, 2)


REFUSED: list[Any] = [
    ("one of 'plane', 'array'; got 'all'", ValueError, {"indices_over": "all"}),
    ("return_indices must be False", TypeError, {"return_indices": True}),
    (r"indices has shape \(1, 1, 4\) and must", ValueError, {"kernel_size": 4}),
]


@pytest.mark.parametrize(("words", "error", "options"), REFUSED)
def test_refused(xp, words, error, options) -> None:
    x, indices = xp.zeros((1, 1, 8)), xp.zeros((1, 1, 4), dtype="int64")
    with pytest.raises(error, match=words):
        cuconv.max_pool(x, indices=indices, **{"kernel_size": 2, **options})


def test_unpooling_refuses(xp) -> None:
    x, indices = xp.zeros((1, 1, 4)), xp.zeros((1, 1, 4), dtype="int64")
    for words, error, call in (
        (
            r"x has shape \(1, 1, 4\) and must have \(1, 1, 5\)",
            ValueError,
            lambda: cuconv.max_unpool(
                x, xp.zeros((1, 1, 5), "int64"), 2, output_size=10
            ),
        ),
        (
            r"indices has shape",
            ValueError,
            lambda: cuconv.max_unpool(x, indices[..., :3], 2),
        ),
        (
            "must have int64",
            TypeError,
            lambda: cuconv.max_unpool(x, indices.astype("int32"), 2),
        ),
        (
            "x has type bool",
            TypeError,
            lambda: cuconv.max_unpool(x.astype("bool"), indices, 2),
        ),
        (
            "no option 'ceil_mode'",
            TypeError,
            lambda: cuconv.max_unpool(x, indices, 2, ceil_mode=True),
        ),
        (
            "sizes cannot be negative",
            ValueError,
            lambda: cuconv.max_unpool(x, indices, 2, padding=9),
        ),
        (
            "output_size has 2 values for 1",
            ValueError,
            lambda: cuconv.max_unpool(x, indices, 2, output_size=(8, 8)),
        ),
    ):
        with pytest.raises(error, match=words):
            call()
