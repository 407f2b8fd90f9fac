"""Pooling and its gradients: exact, on both modules, for any windows and any views.

On a machine without a GPU, CuPy's side is the kernels' own text on the CPU.
"""

import inspect
import sys
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import Pool, even_pools, pools
from hypothesis import example, given
from hypothesis import strategies as st
from support import (
    HALVES,
    LAYOUTS,
    arrays_of,
    assert_refused,
    device_allocations,
    forget_plans,
    integers,
    large,
    peak,
    smallest_limit,
    spread_over,
    to_host,
)

import cuconv
from cuconv import testing
from cuconv.backends.cpu import backend as host
from cuconv.backends.cpu import pool_maxima as host_maxima
from cuconv.backends.cpu import pooling as host_pools
from cuconv.backends.cuda import cuda_backend
from cuconv.backends.cuda import pooling as packing
from cuconv.memory import MemoryLimitError

REAL = ("float32", "float64", *HALVES, "bool", "int8", "uint8", "uint16", "int64")
ADDED = ("float32", "float64", *HALVES, "int16", "uint8", "complex64", "complex128")
POOL = Pool(
    (2, 3, 7, 10),
    (3, 2),
    {"stride": (2, 3), "padding": ((1, 2), (0, 1)), "dilation": (1, 2)},
)


def equal(actual: Any, wanted: Any, **options: Any) -> None:
    testing.assert_equal(actual, np.asarray(wanted), **options)


def close(actual: Any, wanted: Any, **options: Any) -> None:
    testing.assert_close(actual, np.asarray(wanted), **options)


def reference(kind: str, x: np.ndarray, pool: Pool, **more: Any) -> Any:
    return testing.pool_reference(x, pool.kernel, kind=kind, **pool.options, **more)


def gradient(kind: str, dy: Any, x: Any, pool: Pool, **more: Any) -> np.ndarray:
    return testing.pool_grad_reference(
        dy, x, pool.kernel, kind=kind, **pool.options, **more
    )


def even(kind: str, x: np.ndarray, pool: Pool) -> Any:
    size, layout = pool.kernel, pool.options["layout"]
    return testing.pool_reference(x, kind=kind, output_size=size, layout=layout)


def check_max(xp: Any, pool: Pool, dtype: Any) -> None:
    """Values, places, and the gradient from places and from x."""
    x = integers(pool.x_shape, dtype)
    wanted = reference("max", x, pool)
    device, options = xp.asarray(x), pool.options
    y, indices = cuconv.max_pool(device, pool.kernel, return_indices=True, **options)
    equal(to_host(y), wanted.y.astype(dtype), dtype=x.dtype)
    equal(to_host(indices), wanted.indices, dtype=np.int64)
    again = cuconv.max_pool(device, pool.kernel, **options)
    equal(to_host(again), to_host(y))
    dy = integers(y.shape, "float32", seed=1)
    expected = gradient("max", dy, x, pool)
    dy = xp.asarray(dy)
    for source in ((indices, x.shape), (None, None)):
        more = {} if source[0] is not None else {"x": device}
        got = cuconv.max_pool_backward(dy, *source, pool.kernel, **more, **options)
        equal(to_host(got), expected, dtype=np.float32)


def check_mean(xp: Any, pool: Pool, dtype: Any, **more: Any) -> None:
    """The mean of float64 divides as Python does; a sum is equal in every type."""
    x = integers(pool.x_shape, dtype)
    kernel, options = pool.kernel, {**pool.options, **more}
    y = cuconv.avg_pool(xp.asarray(x), kernel, **options)
    inexact = x.dtype.kind not in "biu"
    kind = x.dtype if inexact else np.dtype(np.float64)
    rtol = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-6, "complex64": 1e-6}
    tolerance = rtol.get(kind.name, 1e-15)
    wanted = reference("mean", x, pool, **more).y
    close(to_host(y), wanted, rtol=tolerance, dtype=kind)
    dy = integers(y.shape, kind, seed=1)
    back = cuconv.avg_pool_backward(xp.asarray(dy), x.shape, kernel, **options)
    expected = gradient("mean", dy, x, pool, **more)
    atol = 20 * tolerance
    close(to_host(back), expected, rtol=tolerance, atol=atol, dtype=kind)


# Windows beside the cells along one axis, over rows that do not begin with the first.
BESIDE = Pool(
    (2, 3, 4, 1),
    (3, 1),
    {"stride": (2, 3), "padding": ((1, 2), (3, 1)), "dilation": (3, 2)},
)


@given(pool=pools(), dtype=st.sampled_from(REAL))
@example(pool=BESIDE, dtype="float32")
def test_maxima_and_their_places(xp, pool, dtype) -> None:
    check_max(xp, pool, dtype)


@given(pool=pools(), dtype=st.sampled_from(ADDED), padding=st.booleans())
def test_means(xp, pool, dtype, padding) -> None:
    check_mean(xp, pool, dtype, count_include_pad=padding)


@given(pool=pools(), dtype=st.sampled_from(ADDED), divisor=st.sampled_from((1, -2)))
def test_sums_are_equal(xp, pool, dtype, divisor) -> None:
    x = integers(pool.x_shape, dtype)
    options = {**pool.options, "divisor_override": divisor}
    y = to_host(cuconv.avg_pool(xp.asarray(x), pool.kernel, **options))
    wanted = reference("mean", x, pool, divisor_override=divisor).y
    equal(y, wanted)
    dy = integers(y.shape, y.dtype, seed=1)
    back = cuconv.avg_pool_backward(xp.asarray(dy), x.shape, pool.kernel, **options)
    expected = gradient("mean", dy, x, pool, divisor_override=divisor)
    equal(to_host(back), expected, dtype=y.dtype)


@given(
    pool=pools(),
    dtype=st.sampled_from(("float32", "float64", *HALVES)),
    norm=st.sampled_from((1, 2, 3.0, 0.5)),
)
def test_norms(xp, pool, dtype, norm) -> None:
    x = integers(pool.x_shape, dtype)
    device, options = xp.asarray(x), pool.options
    y = cuconv.lp_pool(device, norm, pool.kernel, **options)
    wanted = reference("norm", x, pool, norm_type=norm).y
    rtol = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5}.get(dtype, 1e-12)
    if norm == 1:
        equal(to_host(y), wanted, dtype=x.dtype)
    close(to_host(y), wanted, rtol=rtol, dtype=x.dtype)
    dy = integers(y.shape, dtype, seed=1)
    back = cuconv.lp_pool_backward(
        xp.asarray(dy), device, y, norm, pool.kernel, **options
    )
    expected = gradient("norm", dy, x, pool, norm_type=norm)
    scale = 4 * rtol * max(1.0, float(np.abs(expected).max()))
    assert np.isfinite(to_host(back).astype(float)).all()
    close(to_host(back), expected, rtol=rtol, atol=scale, dtype=x.dtype)


RANGES = {"float32": 30, "float64": 290, "float16": 3, "bfloat16": 30}


@given(
    pool=pools(),
    dtype=st.sampled_from(tuple(RANGES)),
    norm=st.sampled_from((1, 1.5, 2, 3.0, 20, 0.5)),
    seed=st.integers(0, 9),
)
def test_norms_of_any_size(xp, pool, dtype, norm, seed) -> None:
    """Elements and gradients of very different magnitudes, and windows of zeros."""
    rng, most = np.random.default_rng(seed), RANGES[dtype]
    if norm == 0.5:  # (1 + 1 + ...)² times the largest
        most //= 2

    def spread(shape: tuple[int, ...]) -> np.ndarray:
        """Numbers of one magnitude in a plane or, in some planes, of many."""
        heads = shape[:2] if pool.options["layout"] == "channels_first" else shape[:1]
        planes = rng.integers(
            -most, most + 1, (*heads, *(1,) * (len(shape) - len(heads)))
        )
        each = np.where(
            rng.random(planes.shape) < 0.3, rng.integers(-most, most, shape), planes
        )
        zero = rng.random(shape) < 0.2
        values = rng.integers(1, 4, shape) * rng.choice([-1, 1], shape)
        return np.where(zero, 0, values * 10.0**each).astype(dtype)

    x = spread(pool.x_shape)
    device, options = xp.asarray(x), pool.options
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        y = cuconv.lp_pool(device, norm, pool.kernel, **options)
        wanted = reference("norm", x, pool, norm_type=norm).y
        rtol = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5}.get(dtype, 1e-12)
        close(to_host(y), wanted, rtol=rtol, atol=tiny(dtype), dtype=x.dtype)
        dy = spread(y.shape)
        back = cuconv.lp_pool_backward(
            xp.asarray(dy), device, y, norm, pool.kernel, **options
        )
    expected = gradient("norm", dy, x, pool, norm_type=norm)
    # Shares of different signs may cancel each other.
    scale = gradient("norm", np.abs(dy), np.abs(x), pool, norm_type=norm)
    error = np.abs(to_host(back).astype("f8") - expected)
    assert (error <= 20 * rtol * scale + tiny(dtype)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_that_can_be_represented(xp, dtype) -> None:
    """Though the sums of their powers cannot."""
    rtol = 1e-6 if dtype == "float32" else 1e-2
    large, small, hundreds = [3e30, -4e30], [3e-30, 4e-30], [100, 100, -100, 100]
    for values, norm, wanted in (
        (large, 2, 5e30),
        (small, 2, 5e-30),
        (hundreds, 20, 100 * 4 ** (1 / 20)),
    ):
        x = xp.asarray(np.array([[values]]).astype(dtype))
        y = cuconv.lp_pool(x, norm, len(values))
        close(to_host(y), [[[wanted]]], rtol=rtol)
        back = cuconv.lp_pool_backward(xp.ones_like(y), x, y, norm, len(values))
        slopes = np.sign(values) * np.abs(np.array(values) / wanted) ** (norm - 1)
        close(to_host(back), [[slopes]], rtol=30 * rtol)
    x = xp.asarray(
        np.array([[[np.inf, 1, 1e30, np.nan, 0, 0, 1e-30, 0]]]).astype(dtype)
    )
    y = to_host(cuconv.lp_pool(x, 2, 2))
    close(y, [[[np.inf, np.nan, 0, 1e-30]]], rtol=rtol, equal_nan=True)


def test_scaled_norms_do_not_depend_on_pieces() -> None:
    """The same bits where a limit, or threads, divide arrays otherwise."""
    rng = np.random.default_rng(0)
    shape = (2, 3, 20, 30)
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-250, 250, shape)
    dy = rng.standard_normal(shape) * 10.0 ** rng.integers(-250, 250, shape)
    for norm in (2, 3):
        pool = partial(cuconv.lp_pool, x, norm, 3, stride=1, padding=1)
        y = pool()
        arguments = dy, x, y, norm, 3
        back = partial(cuconv.lp_pool_backward, *arguments, stride=1, padding=1)
        for call in (pool, back):
            limited = call(memory_limit=smallest_limit(call))
            np.testing.assert_array_equal(limited, call())


def tiny(dtype: str) -> float:
    """The smallest normal number."""
    return float(ml_dtypes.finfo(dtype).smallest_normal)


@given(pool=even_pools(), dtype=st.sampled_from(("float64", "float32", "int8")))
def test_adaptive(xp, pool, dtype) -> None:
    x = integers(pool.x_shape, dtype)
    device, options = xp.asarray(x), pool.options
    wanted, size = even("max", x, pool), pool.kernel
    y, indices = cuconv.adaptive_max_pool(device, size, return_indices=True, **options)
    equal(to_host(y), wanted.y, dtype=x.dtype)
    equal(to_host(indices), wanted.indices)
    mean = cuconv.adaptive_avg_pool(device, size, dtype="float64", **options)
    close(to_host(mean), even("mean", x, pool).y, rtol=1e-14)
    dy = integers(y.shape, "float64", seed=1)
    more = {"output_size": size, "layout": options["layout"]}
    expected = testing.pool_grad_reference(dy, x, kind="max", **more)
    dy = xp.asarray(dy)
    for given_indices, found in ((indices, {}), (None, {"x": device})):
        back = cuconv.adaptive_max_pool_backward(
            dy, given_indices, x.shape, size, **found, **options
        )
        equal(to_host(back), expected)
    expected = testing.pool_grad_reference(dy, x, kind="mean", **more)
    back = cuconv.adaptive_avg_pool_backward(dy, x.shape, size, **options)
    close(to_host(back), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("padding", ["valid", "full", "same", "same_lower"])
def test_words_for_padding(xp, padding) -> None:
    """With even kernels, strides that leave cells over, and a kernel's own stride."""
    options = {"padding": padding, "ceil_mode": False}
    for stride in ((2, 3), None):
        pool = Pool((2, 3, 7, 9), (2, 4), {**options, "stride": stride})
        check_max(xp, pool, "float32")
        check_mean(xp, pool, "float64", count_include_pad=False)


@pytest.mark.parametrize("ceil_mode", [True, False])
def test_causal_windows_hold_what_was_before(xp, ceil_mode) -> None:
    options = {"padding": "causal", "stride": 2, "dilation": 2, "ceil_mode": ceil_mode}
    pool = Pool((2, 3, 8), (3,), options)
    check_max(xp, pool, "float32")
    check_mean(xp, pool, "float64", count_include_pad=False)
    y = to_host(cuconv.max_pool(xp.arange(8.0).reshape(1, 1, 8), 3, **options))
    assert y[0, 0, :4].tolist() == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="for one spatial axis; there are 2"):
        cuconv.max_pool(xp.ones((1, 1, 4, 4)), 2, padding="causal")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batched", [True, False])
def test_global(xp, layout, batched) -> None:
    x, options = integers((2, 3, 4, 5)[not batched :]), {"layout": layout}
    options["batched"] = batched
    device, first = xp.asarray(x), layout == "channels_first"
    axes = (-2, -1) if first else tuple(range(batched, batched + 2))
    mean = cuconv.global_avg_pool(device, **options)
    close(to_host(mean), x.mean(axes, keepdims=True), rtol=1e-14)
    y, indices = cuconv.global_max_pool(device, return_indices=True, **options)
    equal(to_host(y), x.max(axes, keepdims=True))
    dy = xp.ones(y.shape)
    back = to_host(cuconv.global_max_pool_backward(dy, indices, x.shape, **options))
    assert back.sum() == y.size
    equal((back * x).sum(axes, keepdims=True), to_host(y))
    found = cuconv.global_max_pool_backward(dy, None, None, x=device, **options)
    equal(to_host(found), back)
    back = to_host(cuconv.global_avg_pool_backward(dy, x.shape, **options))
    close(back, np.full(x.shape, 1 / np.prod([x.shape[a] for a in axes])), rtol=1e-15)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_none_keeps_a_size(xp, layout) -> None:
    """Beside an axis that shrinks: places count all axes."""
    shape = (2, 3, 6, 7) if layout == "channels_first" else (2, 6, 7, 3)
    x = xp.asarray(integers(shape))
    for size in ((None, 4), (4, None), (None, None)):
        pool = Pool(shape, tuple(n or k for n, k in zip(size, (6, 7), strict=True)), {})
        pool = pool._replace(options={"layout": layout})
        wanted = even("max", to_host(x), pool)
        got = cuconv.adaptive_max_pool(x, size, return_indices=True, layout=layout)
        equal(to_host(got[0]), wanted.y)
        equal(to_host(got[1]), wanted.indices)


def test_ceil_mode_is_not_counted(xp) -> None:
    """A window that hangs over divides by what it has, padding included."""
    x = xp.asarray(np.full((1, 1, 4), 12.0))
    for padding, counted, wanted in (
        (0, True, [12, 12]),
        (1, True, [8, 12, 6]),
        (1, False, [12, 12, 12]),
    ):
        options = {"padding": padding, "count_include_pad": counted}
        y = cuconv.avg_pool(x, 3, stride=2, ceil_mode=True, **options)
        equal(to_host(y)[0, 0], wanted)


def test_no_window_starts_in_the_padding_after(xp) -> None:
    x = xp.asarray(np.arange(4.0).reshape(1, 1, 4))
    assert cuconv.max_pool(x, 2, stride=3, padding=1, ceil_mode=True).shape[2] == 2
    assert cuconv.max_pool(x, 1, stride=3, padding=(0,)).shape[2] == 2
    # Size 3, stride 2: the third window would start at cell 4, behind one of padding.
    y = cuconv.max_pool(x[..., :3], 2, stride=2, padding=1, ceil_mode=True)
    equal(to_host(y)[0, 0], [0, 2])
    # With cover_all it is one, of padding alone.
    y = cuconv.max_pool(x[..., :3], 2, stride=2, padding=1, cover_all=True)
    equal(to_host(y)[0, 0], [0, 2, -np.inf])
    # A kernel larger than the input has a window, if the stride is large enough.
    equal(to_host(cuconv.max_pool(x, 5, stride=2, ceil_mode=True)), [[[3.0]]])


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int64", "bool", "float32"])
def test_padding_is_below_every_value(xp, dtype) -> None:
    least = 0 if dtype in ("bool", "uint16") else -7
    x = xp.asarray(np.full((1, 1, 2), least, dtype))
    y, indices = cuconv.max_pool(x, 2, stride=1, padding=3, return_indices=True)
    nothing = {"int8": -128, "int64": -(2**63), "float32": -np.inf}.get(dtype, 0)
    wanted = [nothing] * 2 + [least] * 3 + [nothing] * 2
    equal(to_host(y)[0, 0], np.array(wanted, dtype), dtype=dtype)
    equal(to_host(indices)[0, 0], [-1, -1, 0, 0, 1, -1, -1])
    dy = xp.ones((1, 1, 7))
    back = cuconv.max_pool_backward(dy, indices, (1, 1, 2), 2, stride=1, padding=3)
    equal(to_host(back)[0, 0], [2, 1])
    if dtype == "float32":
        means = cuconv.avg_pool(x, 2, stride=1, padding=3, count_include_pad=False)
        equal(to_host(means)[0, 0], [0, 0, -7, -7, -7, 0, 0])


@pytest.mark.parametrize("dtype", ["float32", "float64", *HALVES])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_nan_is_the_maximum_of_its_windows(xp, dtype, rank) -> None:
    x = integers((2, 3, 6, 7)[: 2 + rank], dtype)
    x[0, 0, 2] = x[1, 2, -1] = np.nan
    x[0, 1] = -np.inf
    kernel = (3, 2)[:rank]
    wanted = testing.pool_reference(x, kernel, stride=1)
    got = cuconv.max_pool(xp.asarray(x), kernel, stride=1, return_indices=True)
    y, indices = (to_host(a).astype("f8") for a in got)
    close(y, wanted.y, equal_nan=True)
    equal(indices, wanted.indices)
    assert np.isnan(y).sum() > 3
    means = to_host(cuconv.avg_pool(xp.asarray(x[0, :1]), kernel[:1], stride=1))
    assert rank > 1 or np.isnan(means.astype("f8")).sum() == 3


def test_halves_are_summed_in_float32(xp) -> None:
    """2155 ones: past 2048 a float16, and past 256 a bfloat16, no longer counts."""
    for dtype in HALVES:
        x = xp.asarray(np.ones((1, 1, 2155), dtype))
        for y in (
            cuconv.avg_pool(x, 2155),
            cuconv.global_avg_pool(x),
            (cuconv.lp_pool(x, 1, 2155) / 2155).astype(dtype),
        ):
            assert float(to_host(y).astype("f8").item()) == 1
        back = cuconv.avg_pool_backward(
            x, (1, 1, 1), 2155, stride=1, padding=2154, divisor_override=1
        )
        assert to_host(back).astype("f4").item() == {"float16": 2156}.get(dtype, 2160)


@pytest.mark.parametrize(
    ("dtype", "asked", "result"),
    [
        ("int32", None, "float64"),
        ("bool", None, "float64"),
        ("uint8", "float32", "float32"),
        ("float32", "float64", "float64"),
        ("float64", "float32", "float32"),
        ("float16", "float32", "float32"),
        ("float32", "complex64", "complex64"),
        ("complex64", "complex128", "complex128"),
    ],
)
def test_types_of_means(xp, dtype, asked, result) -> None:
    x = integers((1, 2, 9), dtype)
    y = cuconv.avg_pool(xp.asarray(x), 4, stride=2, dtype=asked)
    wanted = testing.pool_reference(x, (4,), kind="mean", stride=2).y
    equal(to_host(y), wanted, dtype=result)


VIEWS = {
    "backwards": lambda a: a[..., ::-1, ::-1],
    "steps": lambda a: a[::2, :, 1::2, ::3],
    "turned": lambda a: a.transpose(1, 0, 3, 2),
    "channels apart": lambda a: a[:, ::2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_any_view_and_any_out(xp, view) -> None:
    """Every array in strides of its own; cells between those of out are left alone."""
    x = VIEWS[view](xp.asarray(integers((4, 6, 12, 13), "float32")))
    options = {"stride": (2, 1), "padding": (1, 0), "ceil_mode": True}
    plain = xp.ascontiguousarray(x)
    for name, call in (
        ("max", lambda a, **o: cuconv.max_pool(a, (3, 2), **options, **o)),
        ("mean", lambda a, **o: cuconv.avg_pool(a, (3, 2), **options, **o)),
    ):
        wanted = call(plain)
        wide = xp.full((*wanted.shape[:-1], 2 * wanted.shape[-1]), 7, wanted.dtype)
        out = wide[..., ::-2]
        assert call(x, out=out) is out
        equal(to_host(out), to_host(wanted))
        assert (to_host(wide)[..., ::2] == 7).all(), name
    indices = cuconv.max_pool(plain, (3, 2), return_indices=True, **options)[1]
    dy = xp.asarray(integers(indices.shape, "float32", seed=1))
    shape, kernel = x.shape, (3, 2)
    scattered = [xp.stack([a, a], axis=-1)[..., 0] for a in (dy, indices)]
    wanted = cuconv.max_pool_backward(dy, indices, shape, kernel, **options)
    for out in (VIEWS[view](xp.ones((4, 6, 12, 13), dtype="float32")), xp.ones_like(x)):
        cuconv.max_pool_backward(*scattered, shape, kernel, out=out, **options)
        equal(to_host(out), to_host(wanted))
        cuconv.max_pool_backward(dy, None, None, kernel, x=x, out=out, **options)
        equal(to_host(out), to_host(wanted))
    mean = cuconv.avg_pool_backward(dy, shape, kernel, **options)
    cuconv.avg_pool_backward(scattered[0], shape, kernel, out=out, **options)
    equal(to_host(out), to_host(mean))


@pytest.mark.parametrize("dtype", ["f2", "f4", "i4"])
def test_results_have_the_byte_order_of_the_machine(dtype) -> None:
    """NumPy alone: CuPy has only that one."""
    x = integers((2, 3, 6, 7), dtype, 1)
    needs_cast = x.dtype.newbyteorder()

    def calls(order: Any) -> Any:
        a = x.astype(order)
        y, indices = cuconv.max_pool(a, 2, return_indices=True)
        dy = y.astype(order)
        yield y
        yield indices
        yield cuconv.max_pool_backward(dy, indices, x.shape, 2)
        yield cuconv.max_pool_backward(dy, None, None, 2, x=a)
        yield cuconv.avg_pool(a, 2)
        yield cuconv.avg_pool_backward(dy, x.shape, 2)
        if x.dtype.kind == "f":
            norms = cuconv.lp_pool(a, 2, 2)
            yield norms
            yield cuconv.lp_pool_backward(dy, a, norms.astype(order), 2, 2)

    for got, wanted in zip(calls(needs_cast), calls(x.dtype), strict=True):
        assert got.dtype.isnative
        equal(got, wanted, dtype=wanted.dtype)


def test_zero_strides(xp) -> None:
    x = spread_over(xp, xp.asarray(integers((1, 3, 1, 5))), (2, 3, 4, 5))
    y, indices = cuconv.max_pool(x, (2, 3), return_indices=True)
    wanted = testing.pool_reference(to_host(x), (2, 3))
    equal(to_host(y), wanted.y)
    equal(to_host(indices), wanted.indices)


def test_inputs_are_left_alone() -> None:
    arrays = [integers((2, 3, 6, 7)), integers((2, 3, 3, 3), seed=1)]
    y, indices = cuconv.max_pool(arrays[0], 2, return_indices=True)
    copies = [a.copy() for a in (*arrays, indices, np.abs(y))]
    for array in copies:
        array.flags.writeable = False
    x, dy, indices, norms = copies
    for _ in range(2):
        cuconv.max_pool_backward(dy, indices, x.shape, 2)
        cuconv.max_pool_backward(dy, None, None, 2, x=x)
        cuconv.avg_pool(x, 2)
        cuconv.avg_pool_backward(dy, x.shape, 2)
        cuconv.lp_pool(x, 3, 2)
        cuconv.lp_pool_backward(dy, x, norms, 3, 2)
    equal(x, arrays[0])


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((0, 3, 5, 6), 2), ((2, 0, 5, 6), 2), ((2, 3, 0, 6), (1, 2)), ((0, 4), (2,))],
)
def test_nothing_to_pool(xp, shape, kernel) -> None:
    options = {"padding": "same"} if shape[2:3] == (0,) else {}
    x = xp.zeros(shape, dtype="float32")
    y, indices = cuconv.max_pool(x, kernel, return_indices=True, **options)
    assert y.size == indices.size == 0
    assert cuconv.avg_pool(x, kernel, **options).shape == y.shape
    assert cuconv.lp_pool(x, 2, kernel, **options).shape == y.shape
    back = cuconv.max_pool_backward(y, indices, shape, kernel, **options)
    assert back.shape == shape
    assert cuconv.avg_pool_backward(y, shape, kernel, **options).shape == shape


@pytest.mark.parametrize("shape", [(1, 1, 3, 0), (1, 1, 2, 3, 0)])
def test_windows_of_padding_around_an_empty_axis(xp, shape) -> None:
    kernel, pads = (2,) * (len(shape) - 2), [0] * (len(shape) - 3)
    options = {"stride": 1, "padding": (*pads, 2)}
    x = xp.zeros(shape, dtype="float32")
    y, indices = cuconv.max_pool(x, kernel, return_indices=True, **options)
    assert y.shape[-1] == 3
    equal(to_host(y), np.full(y.shape, -np.inf, np.float32))
    equal(to_host(indices), np.full(y.shape, -1))
    equal(to_host(cuconv.avg_pool(x, kernel, **options)), np.zeros(y.shape, np.float32))
    norms = cuconv.lp_pool(x, 2, kernel, **options)
    equal(to_host(norms), np.zeros(y.shape, np.float32))
    back = cuconv.max_pool_backward(y, indices, shape, kernel, **options)
    assert back.shape == shape


def test_no_window_at_all(xp) -> None:
    """An empty output has a gradient of zero, whatever was in memory."""
    x = xp.ones((2, 3, 5, 6))
    y = cuconv.adaptive_avg_pool(x, (0, 2))
    assert y.shape == (2, 3, 0, 2)
    out = xp.full(x.shape, 9.0)
    cuconv.adaptive_avg_pool_backward(y, x.shape, (0, 2), out=out)
    assert not to_host(out).any()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_named_ranks(xp, kind, rank) -> None:
    x = xp.asarray(integers((2, 3, 4, 5, 6)[: rank + 2]))
    general = getattr(cuconv, f"{kind}_pool")
    named = getattr(cuconv, f"{kind}_pool{rank}d")
    wanted = general(x, (2,) * rank, stride=1, padding=1)
    equal(to_host(named(x, 2, stride=1, padding=1)), to_host(wanted))
    equal(to_host(named(x[0], 2, stride=1, padding=1)), to_host(wanted[0]))
    equal(to_host(named(x, np.int64(2), stride=1, padding=1)), to_host(wanted))
    with pytest.raises(ValueError, match=f"5 values for {rank} spatial axes"):
        named(x, (2,) * 5)
    with pytest.raises(ValueError, match=f"x has 6 axes; {rank} spatial"):
        named(xp.zeros((1,) * 6), 2)
    shown = inspect.signature(named).parameters
    assert {"stride", "padding", "ceil_mode", "out"} <= set(shown)
    assert ("divisor_override" in shown) == (kind == "avg")


WINDOWS: dict[str, Any] = {"stride": 2, "padding": 1}
CALLS: dict[str, Any] = {
    "max": partial(cuconv.max_pool, kernel_size=3, **WINDOWS),
    "indices": partial(cuconv.max_pool, kernel_size=3, return_indices=True, **WINDOWS),
    "mean": partial(cuconv.avg_pool, kernel_size=3, **WINDOWS),
    "norm": lambda x, **o: cuconv.lp_pool(x, 2, 3, **WINDOWS, **o),
    "adaptive": partial(cuconv.adaptive_avg_pool, output_size=7),
    "global": partial(cuconv.global_max_pool, return_indices=True),
    "max gradient": lambda x, **o: cuconv.max_pool_backward(
        *_given(x), x.shape, 3, **WINDOWS, **o
    ),
    "search": lambda x, **o: cuconv.max_pool_backward(
        _given(x)[0], None, None, 3, x=x, **WINDOWS, **o
    ),
    "mean gradient": lambda x, **o: cuconv.avg_pool_backward(
        _given(x)[0], x.shape, 3, **WINDOWS, **o
    ),
}


_GIVEN: dict[Any, Any] = {}


def _given(x: Any) -> Any:
    """A gradient for `max_pool` of x and its places, made once."""
    key = x.shape, x.dtype.name, str(type(x))
    if key not in _GIVEN:
        _GIVEN[key] = cuconv.max_pool(x, 3, stride=2, padding=1, return_indices=True)
    return _GIVEN[key]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_is_bounded_and_changes_nothing(name, dtype) -> None:
    x = integers((2, 3, 23, 50), dtype)
    call = CALLS[name]
    wanted = call(x)
    least = smallest_limit(lambda **o: call(x, **o))
    assert 0 < least < 2**18
    for limit in (least, 2 * least, 2**20):
        got = call(x, memory_limit=limit)
        for one, two in zip(arrays_of(got), arrays_of(wanted), strict=True):
            equal(one, two)
        used = peak(np, lambda limit=limit: call(x, memory_limit=limit), limit)
        assert used <= limit, f"{name}: {used} of {limit}"
    with pytest.raises(MemoryLimitError, match=f"smallest that would do is {least} "):
        call(x, memory_limit=least - 1)


def test_a_limit_for_all_calls() -> None:
    x = integers((2, 3, 41, 90))
    with (
        cuconv.config(memory_limit="1 KiB"),
        pytest.raises(MemoryLimitError, match="limit of 1024 bytes"),
    ):
        CALLS["mean"](x)


def test_without_a_limit_the_least_that_will_do(monkeypatch) -> None:
    x = integers((2, 3, 41, 90))
    monkeypatch.setattr(host.CpuBackend, "default_memory_limit", 1000)
    forget_plans()
    equal(CALLS["mean"](x), CALLS["mean"](x, memory_limit="1 MiB"))


@pytest.mark.parametrize("name", CALLS)
def test_kernels_take_no_memory(name) -> None:
    cupy = pytest.importorskip("cupy")
    x = cupy.asarray(integers((2, 3, 9, 10), "float16"))
    call = CALLS[name]
    first = call(x)
    with device_allocations(cupy) as seen:
        call(x, out=first, memory_limit=0)
    assert seen.count == 0


@pytest.mark.parametrize("name", CALLS)
def test_workers_change_nothing(name, monkeypatch) -> None:
    x = integers((3, 4, 20, 31), "float32")
    wanted = CALLS[name](x)
    forget_plans()
    monkeypatch.setattr(host_pools, "_WORTH_WORKERS", 0)
    monkeypatch.setattr(host_pools, "_PIECE", 2**9)
    monkeypatch.setattr(host.CpuBackend, "workers", lambda _: 3)
    for layout in range(2):
        got = CALLS[name](x)
        for one, two in zip(arrays_of(got), arrays_of(wanted), strict=True):
            equal(one, two)
        x = np.asfortranarray(x) if layout == 0 else x


def test_workers_change_no_bit_of_a_mean_of_long_windows(monkeypatch) -> None:
    """Even where a piece of several workers is one window, and that of one is two."""
    x = np.random.default_rng(0).standard_normal((1, 1, 1024, 256), dtype="float32")
    monkeypatch.setattr(host.CpuBackend, "workers", lambda _: 1)
    wanted = cuconv.avg_pool(x, (512, 256))
    monkeypatch.setattr(host.CpuBackend, "workers", lambda _: 2)
    np.testing.assert_array_equal(cuconv.avg_pool(x, (512, 256)), wanted)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_wide_offsets(dtype, monkeypatch) -> None:
    """64-bit offsets, by pretending that launches are huge."""
    cupy = pytest.importorskip("cupy")
    forget_plans()
    monkeypatch.setattr(packing, "MOST_THREADS", 2**31)
    check_max(cupy, POOL, dtype)
    check_mean(cupy, POOL, dtype)
    x = cupy.asarray(integers((2, 3, 7, 9), dtype))
    y = to_host(cuconv.adaptive_max_pool(x, (3, 4)))
    wanted = testing.pool_reference(to_host(x), output_size=(3, 4)).y
    equal(y, wanted.astype(dtype))


def test_planes_of_more_than_two_to_the_31_cells(xp) -> None:
    """Of one cell in memory; the last place is past 2^31, and so is the last image."""
    x = large(xp, 2, 1, 2**16, 2**16, dtype="int8")
    y, indices = cuconv.max_pool(x, 1, stride=2**15, return_indices=True)
    assert y.shape == (2, 1, 2, 2)
    last = 2**31 + 2**15
    wanted = [[[[0, 2**15], [2**31, last]]]] * 2
    equal(to_host(indices), wanted, dtype=np.int64)


def test_a_graph_can_hold_them(monkeypatch) -> None:
    cupy = pytest.importorskip("cupy")
    x = cupy.asarray(integers((2, 3, 9, 10), "float32"))
    backend = cuda_backend(None)
    results = {name: call(x) for name, call in CALLS.items()}
    monkeypatch.setattr(type(backend), "is_capturing", lambda _: True)
    for name, call in CALLS.items():
        call(x, out=results[name])
        with pytest.raises(ValueError, match="graph is being captured"):
            call(x)


def test_adjoints(xp) -> None:
    kernel, options = (2, 3), {"stride": (1, 2), "padding": (1, 0), "ceil_mode": True}
    options["divisor_override"] = 1
    x_shape = (2, 3, 5, 8)
    y_shape = cuconv.avg_pool(np.zeros(x_shape), kernel, **options).shape
    testing.check_adjoint(
        lambda x: cuconv.avg_pool(x, kernel, **options),
        lambda dy: cuconv.avg_pool_backward(dy, x_shape, kernel, **options),
        x_shape,
        y_shape,
        xp=xp,
    )


def test_gradients_are_derivatives() -> None:
    rng = np.random.default_rng(0)
    x = rng.permuted(np.arange(60.0)).reshape(1, 2, 5, 6) / 7 - 4
    options = {"stride": (2, 1), "padding": 1, "dilation": (1, 2)}
    dy = rng.normal(size=cuconv.max_pool(x, (3, 2), **options).shape)
    for norm in (1, 1.5, 2, 3):
        y = cuconv.lp_pool(x, norm, (3, 2), **options)

        def total(x: Any, norm: float = norm) -> Any:
            return (cuconv.lp_pool(x, norm, (3, 2), **options) * dy).sum()

        wanted = testing.numerical_gradient(total, x)
        got = cuconv.lp_pool_backward(dy, x, y, norm, (3, 2), **options)
        close(got, wanted, rtol=1e-6, atol=1e-8)
    wanted = testing.numerical_gradient(
        lambda x: (cuconv.max_pool(x, (3, 2), **options) * dy).sum(), x
    )
    got = cuconv.max_pool_backward(dy, None, None, (3, 2), x=x, **options)
    close(got, wanted, rtol=1e-6, atol=1e-8)


def test_a_norm_has_a_finite_gradient_at_zero(xp) -> None:
    x = xp.asarray(np.array([[[0.0, 0.0, 0.0, -2.0]]]))
    for norm in (0.5, 1, 1.5, 2, 3):
        y = cuconv.lp_pool(x, norm, 2)
        back = to_host(cuconv.lp_pool_backward(xp.ones(y.shape), x, y, norm, 2))
        close(back, [[[0.0, 0.0, 0.0, -1.0]]], rtol=1e-12)


zeros = np.zeros
X, DY, ODD = zeros((2, 3, 6, 7), "f4"), zeros((2, 3, 3, 3)), zeros((2, 3, 3, 4))


def bad(words: str, name: str, *arguments: Any, **options: Any) -> tuple[Any, ...]:
    """What a public function says, and what it is given."""
    return words, name, arguments, options


REFUSED = [
    bad("4 spatial axes; pooling takes 3 at most", "max_pool", zeros((1,) * 6), 1),
    bad("divisor_override must not be 0", "avg_pool", X, 2, divisor_override=0),
    bad("norm_type must be positive and finite; got 0", "lp_pool", X, 0, 2),
    bad("axis 0: it spans 9 elements .* input has 8", "max_pool", X, 9, padding=1),
    bad(r"dy has shape \(2, 3, 3, 4\) and must", "avg_pool_backward", ODD, X.shape, 2),
    bad(
        *(r"indices has shape \(2, 3, 3, 4\) and must have \(2, 3, 3, 3\)",),
        *("max_pool_backward", DY, ODD.astype("i8"), X.shape, 2),
    ),
    bad(
        *(r"x has shape \(2, 3, 6, 7\) and x_shape is \(2, 3, 6, 8\)",),
        *("max_pool_backward", DY, None, (2, 3, 6, 8), 2),
        x=X,
    ),
    bad("output_size of spatial axis 1 is -1", "adaptive_avg_pool", X, (2, -1)),
    bad(
        "0 elements, too few for output_size 2",
        "adaptive_avg_pool",
        zeros((1, 1, 0)),
        2,
    ),
    bad(r"out has shape \(2, 3, 3, 4\) and the result", "max_pool", X, 2, out=ODD),
]
MISTYPED = [
    bad("complex numbers have no maximum", "max_pool", zeros((1, 1, 4), "c8"), 2),
    bad("real or complex dtype; got int32", "avg_pool", X, 2, dtype="int32"),
    bad(
        "type int8; lp_pool takes real floats", "lp_pool", zeros((1, 1, 4), "i1"), 2, 2
    ),
    bad("dy has type float64 and x has float32", "lp_pool_backward", DY, X, DY, 2, 2),
    bad(
        *("indices have type int32 and must have int64", "max_pool_backward"),
        *(DY, DY.astype("i4"), X.shape, 2),
    ),
    bad("one of them; got neither", "max_pool_backward", DY, None, X.shape, 2),
    bad("x_shape is None, and so is x", "max_pool_backward", DY, None, None, 2),
    bad("dy has type bool", "max_pool_backward", DY.astype("?"), None, None, 2, x=X),
    bad("list, of which numpy.asarray makes one", "max_pool", [[[1.0, 2.0]]], 2),
    bad("list, of which numpy.asarray makes one", "avg_pool1d", [[[1.0, 2.0]]], 2),
    bad("kernel_size must be made of integers; got None", "max_pool2d", X, None),
    bad("divisor_override .* got 2.5", "avg_pool2d", X, 2, divisor_override=2.5),
    bad("norm_type must be a number; got '2'", "lp_pool", X, "2", 2),
    bad("no option 'strides'", "max_pool", X, 2, strides=1),
    bad("no option 'count_include_pad'", "max_pool", X, 2, count_include_pad=False),
    bad("out has type float64 and the result has float32", "max_pool", X, 2, out=DY),
    bad("out must be a pair", "max_pool", X, 2, return_indices=True, out=DY),
]


@pytest.mark.parametrize(
    ("error", "words", "name", "arguments", "options"),
    [
        *((ValueError, *each) for each in REFUSED),
        *((TypeError, *each) for each in MISTYPED),
    ],
)
def test_refused(xp, error, words, name, arguments, options) -> None:
    def moved(value: Any) -> Any:
        return xp.asarray(value) if isinstance(value, np.ndarray) else value

    options = {key: moved(value) for key, value in options.items()}
    with pytest.raises(error, match=words):
        getattr(cuconv, name)(*map(moved, arguments), **options)


def test_nothing_is_allocated_before_a_refusal(xp) -> None:
    """Of arrays that would take terabytes."""
    x, y = large(xp, 2**10, 2**10, 2**10, 2**10), large(xp, 2**10, 2**10, 2**9, 2**10)
    index = large(xp, *y.shape, dtype="int32")
    refused = [
        (lambda: cuconv.max_pool(x, 1025), ValueError, "1025", "1024"),
        (lambda: cuconv.avg_pool(x, 2, dtype="int8"), TypeError, "int8"),
        (lambda: cuconv.avg_pool_backward(y, x.shape, 2), ValueError, "512", "1024"),
        (
            lambda: cuconv.max_pool_backward(y, index, x.shape, (2, 1)),
            TypeError,
            "int32",
        ),
        (lambda: cuconv.lp_pool(x, -1, 2), ValueError, "-1"),
        (lambda: cuconv.max_pool(x, 1, out=x), ValueError, "out"),
    ]
    if xp is np:
        limited = partial(cuconv.max_pool, x, 2, memory_limit=10)
        refused.append((limited, MemoryLimitError, "10 bytes", "smallest"))
    for call, error, *words in refused:
        assert_refused(xp, call, error, *words)


def test_out_that_overlaps(xp) -> None:
    x = xp.zeros((2, 3, 6, 7))
    with pytest.raises(ValueError, match="out may share memory with x"):
        cuconv.max_pool(x, 1, out=x)
    y = xp.zeros((2, 3, 3, 3))
    with pytest.raises(ValueError, match="out may share memory with out"):
        cuconv.max_pool(x, 2, return_indices=True, out=(y, y.view("int64")))
    with pytest.raises(ValueError, match="out may share memory with dy"):
        cuconv.avg_pool_backward(y, (2, 3, 3, 3), 1, out=y)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_places_of_maxima_are_added_up_alike_without_numba(dtype, monkeypatch) -> None:
    """The same bits: both loops add in the order of the windows."""
    x = np.random.default_rng(0).standard_normal((2, 3, 9, 8)).astype(dtype)
    y, indices = cuconv.max_pool(x, 3, stride=1, padding=1, return_indices=True)
    dy = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
    gradient = partial(cuconv.max_pool_backward, dy, indices, x.shape, 3, stride=1)
    found = gradient(padding=1)
    monkeypatch.setattr(host_maxima, "jit_is_installed", lambda: False)
    forget_plans()
    np.testing.assert_array_equal(found, gradient(padding=1))


@pytest.mark.parametrize("channels", [14, 15])
def test_channels_that_lie_last_are_summed_alike_by_any_number(channels) -> None:
    """Eight threads would have a channel each, which NumPy adds up in pairs."""
    x = np.random.default_rng(0).standard_normal((2, 134, 189, channels))
    found = []
    for threads in (1, 4, 8):
        with cuconv.config(num_threads=threads):
            found.append(cuconv.avg_pool(x, (118, 168), layout="channels_last"))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_parts_of_a_halves_array_keep_their_type() -> None:
    """NumPy's interface has no word for bfloat16."""
    x = integers((2, 9, 8, 10), "bfloat16")[..., ::2]
    for _ in range(2):  # recorded, then run
        y = cuconv.avg_pool(x, 2, layout="channels_last")
        equal(y, cuconv.avg_pool(x.copy(), 2, layout="channels_last"))


@pytest.mark.parametrize("padding", [0, 1])
def test_a_repeated_call_is_short(padding) -> None:
    """No more than some twenty calls of Python's."""
    x = integers((1, 3, 8, 8), "float32")
    calls = [
        lambda: cuconv.max_pool2d(x, 2, padding=padding),
        lambda: cuconv.avg_pool2d(x, 2, padding=padding),
        lambda: cuconv.global_avg_pool(x),
        lambda: cuconv.im2col(x, 3, padding=padding),
        lambda: cuconv.col2im(cuconv.im2col(x, 2, stride=2), x.shape, 2, stride=2),
    ]
    for call in calls:
        for _ in range(2):
            call()
        entered = frames(call)
        assert entered <= 35, entered


def frames(call) -> int:
    """How many functions of Python's a call enters."""
    count = 0

    def watch(frame, event, argument) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("dtype", ["float32", "int32", "complex64", "bool"])
def test_negative_zeros_are_sums_too(dtype) -> None:
    """One term is added to zero, though it could be copied."""
    columns = -np.zeros((4, 4), dtype) if dtype != "bool" else np.zeros((4, 4), dtype)
    x = cuconv.col2im(columns, (1, 1, 4, 4), 2, stride=2)
    assert x.tobytes() == bytes(x.nbytes)
    if dtype != "bool":
        dx = cuconv.avg_pool_backward(-np.zeros((1, 1, 2, 2), dtype), (1, 1, 4, 4), 2)
        assert dx.tobytes() == bytes(dx.nbytes)
