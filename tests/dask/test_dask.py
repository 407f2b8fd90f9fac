"""Dask arrays: equal to eager calls, and no block pulls more than its windows.

Everything runs in one thread, on NumPy blocks and on CuPy's.
"""

import itertools
import math
import pickle
from collections.abc import Sequence
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from cases import Pool, cases, invalid_cases, pools, transposed_cases
from dask.array.core import concatenate_lookup
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import LAYOUTS, Case, cupy_slowly, integers, on_blocks, operands, to_host

import cuconv
from cuconv import testing
from cuconv.config import settings as settings_now
from cuconv.dask import blocks as lazy_blocks
from cuconv.dask.blocks import input_chunks, output_chunks, windows
from cuconv.geometry import PADDING_MODES, Axis, ConvGeometry
from cuconv.memory import MemoryLimitError


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    with dask.config.set(scheduler="sync"):
        yield


def lazy(xp: Any, array: np.ndarray, chunks: Any) -> Any:
    if xp is not np:
        # Dask would look for more in CuPy than the stand-in has.
        concatenate_lookup.register(xp.ndarray, xp.concatenate)
    return da.from_array(xp.asarray(array), chunks=chunks, asarray=False)


def equal(actual: Any, wanted: Any) -> None:
    """The same as the eager result, once computed, and as was said before."""
    computed = actual.compute()
    assert type(computed) is type(actual._meta)
    testing.assert_equal(to_host(computed), to_host(wanted), dtype=actual.dtype)
    assert computed.shape == actual.shape


def equal_each(gradients: Any, wanted: Any) -> None:
    for mine, eager in zip(gradients, wanted, strict=True):
        equal(mine, eager)


@st.composite
def chunked(draw: st.DrawFn, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Uneven chunks of a shape, down to single cells; two or three along an axis."""
    found = []
    most = 2 if len(shape) < 4 else 1
    for size in shape:
        inner = st.integers(1, max(size - 1, 1))
        tilings = sorted({0, *draw(st.sets(inner, min_size=1, max_size=most)), size})
        found.append(tuple(b - a for a, b in itertools.pairwise(tilings)) or (0,))
    return tuple(found)


def check_conv(xp: Any, case: Case, data: Any) -> None:
    x, w, dy = arrays = operands(case, "float32")
    X, DY = (lazy(xp, a, data.draw(chunked(a.shape))) for a in (x, dy))
    w, options = xp.asarray(w), {"precision": "strict", **case.options}
    bias = integers((case.filters(),), "float32", 7)
    y = cuconv.conv(X, w, xp.asarray(bias), **options)
    equal(y, cuconv.conv(x, arrays.w, bias, **options))
    got = cuconv.conv_backward(DY, X, w, **options)
    wanted = cuconv.conv_backward(dy, x, arrays.w, **options)
    equal_each(got, wanted)
    equal(cuconv.conv_input_grad(DY, w, x.shape, **options), wanted.x)


# Chunks of two cells under kernels of five, and pads larger than the kernel.
SMALL = Case(
    (2, 2, 7, 9),
    (4, 1, 5, 2),
    {"padding": ((6, 1), (-1, 3)), "stride": (1, 2), "groups": 2},
)
# Strides that jump over whole chunks.
SPARSE = Case((1, 1, 23), (2, 1, 2), {"stride": (7,), "dilation": (2,)})


@cupy_slowly
@settings(max_examples=12)
@given(case=cases(), data=st.data())
def test_convolution_and_gradients_equal_eager_ones(xp, case, data) -> None:
    check_conv(xp, case, data)


@pytest.mark.parametrize("case", [SMALL, SPARSE])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_smaller_than_kernels_and_strides(case, chunk) -> None:
    x, w, dy = operands(case)
    X, DY = da.from_array(x, chunks=chunk), da.from_array(dy, chunks=chunk)
    equal(cuconv.conv(X, w, **case.options), cuconv.conv(x, w, **case.options))
    wanted = cuconv.conv_backward(dy, x, w, **case.options)
    equal_each(cuconv.conv_backward(DY, X, w, **case.options), wanted)


@pytest.mark.parametrize("mode", PADDING_MODES[1:])
@pytest.mark.parametrize(
    "pads", [((1, 2), (2, 0)), ((9, 0), (-1, 8)), ((0, 0), (0, 0))]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_borders_that_repeat_the_input(mode, pads, layout) -> None:
    """Some of them longer than the input."""
    options = {"stride": (2, 1), "padding": pads, "padding_mode": mode}
    case = Case((2, 2, 5, 7), (4, 1, 3, 2), {**options, "groups": 2}).in_layout(layout)
    x, w = integers(case.x_shape, "float16"), integers(case.w_shape, "float16")
    X = da.from_array(x, chunks=2)
    y = cuconv.conv(x, w, **case.options)
    Y = cuconv.conv(X, w, **case.options)
    equal(Y, y)
    dy = integers(y.shape, "float16", seed=2)
    DY = da.from_array(dy, chunks=3)
    wanted = cuconv.conv_backward(dy, x, w, **case.options)
    equal_each(cuconv.conv_backward(DY, X, w, **case.options), wanted)


@pytest.mark.parametrize("mode", PADDING_MODES[1:])
def test_a_border_of_arrays_with_empty_chunks(mode) -> None:
    options = {"padding": ((2, 1), (1, 0)), "padding_mode": mode}
    x, w = integers((2, 2, 4, 3)), integers((1, 2, 3, 2))
    X = da.from_array(x, chunks=((0, 2), (2,), (2, 0, 1, 0, 1), (0, 3)))
    y = cuconv.conv(x, w, **options)
    equal(cuconv.conv(X, w, **options), y)
    wanted = cuconv.conv_backward(y, x, w, **options)
    equal_each(cuconv.conv_backward(y, X, w, **options), wanted)


def test_a_border_leaves_chunks_as_they_are() -> None:
    x, w = da.zeros((1, 1, 40), chunks=(1, 1, 10)), np.ones((1, 1, 5))
    options = {"padding": 2, "padding_mode": "circular"}
    y = cuconv.conv(x, w, **options)
    assert y.chunks == x.chunks
    assert cuconv.conv_backward(y, x, w, **options).x.chunks == x.chunks
    many = [
        cuconv.conv(da.zeros((1, 1, n), chunks=10), w, **options) for n in (400, 800)
    ]
    assert len(many[1].dask) < 2.2 * len(many[0].dask)


@settings(max_examples=8)
@given(case=transposed_cases(), data=st.data())
def test_transposed_convolution_equals_the_eager_one(case, data) -> None:
    options = {"precision": "strict", **case.options}
    x, w = integers(case.x_shape), integers(case.w_shape, seed=1)
    y = cuconv.conv_transpose(x, w, **options)
    dy = integers(y.shape, seed=2)
    X, DY = (da.from_array(a, chunks=data.draw(chunked(a.shape))) for a in (x, dy))
    equal(cuconv.conv_transpose(X, w, **options), y)
    wanted = cuconv.conv_transpose_backward(dy, x, w, **options)
    equal_each(cuconv.conv_transpose_backward(DY, X, w, **options), wanted)


@pytest.mark.parametrize("lazily", ["x", "dy"])
def test_an_eager_partner_is_cut_as_the_lazy_one(lazily) -> None:
    case = Case((4, 2, 12, 10), (3, 2, 3, 3), {"padding": 1, "stride": 2})
    x, w, dy = operands(case)
    named = {"x": x, "dy": dy}
    chunks = {"x": (2, 2, 6, 5), "dy": (2, 3, 3, 5)}[lazily]
    named[lazily] = da.from_array(named[lazily], chunks=chunks)
    got = cuconv.conv_backward(named["dy"], named["x"], w, **case.options)
    wanted = cuconv.conv_backward(dy, x, w, **case.options)
    equal_each(got, wanted)
    assert max(got.x.chunks[2]) == 6
    grad = cuconv.conv_weight_grad(named["dy"], named["x"], w.shape, **case.options)
    equal(grad, wanted.w)


def test_filters_are_cut_as_those_of_lazy_weights() -> None:
    x, w, bias = integers((2, 4, 9)), integers((6, 4, 3)), integers((6,))
    W, B = da.from_array(w, chunks=(4, 3, 2)), da.from_array(bias, chunks=5)
    for X in (x, da.from_array(x, chunks=(1, 2, 4))):
        y = cuconv.conv(X, W, B, padding=1)
        assert y.chunks[1] == (4, 2)
        equal(y, cuconv.conv(x, w, bias, padding=1))
    empty = da.from_array(w, chunks=((2, 0, 4, 0), 4, 3))
    assert cuconv.conv(x, empty, B).chunks[1] == (2, 4)
    equal(cuconv.conv(x, empty, B), cuconv.conv(x, w, bias))
    grouped = cuconv.conv(np.concatenate([x, x], 1), W, groups=2)
    assert grouped.chunks[1] == (6,)
    equal(grouped, cuconv.conv(np.concatenate([x, x], 1), w, groups=2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_a_depthwise_convolution(layout) -> None:
    """Lazy ones, and those that must be copied."""
    x, w = integers((2, 3, 9)), np.asfortranarray(integers((3, 2, 3)))
    if layout == "channels_last":
        x, w = np.moveaxis(x, 1, -1), np.moveaxis(w, -1, 0)
    options = {"padding": 1, "layout": layout}
    y = cuconv.depthwise_conv(x, w, **options)
    wanted = cuconv.depthwise_conv_backward(y, x, w, **options)
    X, W = da.from_array(x, chunks=2), da.from_array(w, chunks=2)
    for given_x, given_w in ((X, W), (x, W), (X, w)):
        equal(cuconv.depthwise_conv(given_x, given_w, **options), y)
        found = cuconv.depthwise_conv_backward(y, given_x, given_w, **options)
        equal(found.x, wanted.x)
        for mine, his in ((found.w, wanted.w), (found.bias, wanted.bias)):
            testing.assert_equal(np.asarray(mine), his)


@pytest.mark.parametrize("word", ["same", "full"])
@pytest.mark.parametrize("shape", [(0, 2, 6), (2, 2, 0), (2, 0, 6)])
def test_nothing_in_a_batch_an_axis_or_the_channels(shape, word) -> None:
    x, w = np.zeros(shape), np.ones((3, shape[1], 3))
    X = da.from_array(x, chunks=(1, 1, 4))
    y = cuconv.conv(x, w, padding=word)
    equal(cuconv.conv(X, w, padding=word), y)
    DY = da.from_array(y, chunks=(1, 3, 4))
    wanted = cuconv.conv_backward(y, x, w, padding=word)
    equal_each(cuconv.conv_backward(DY, X, w, padding=word), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_padding_equals_the_eager_one(layout) -> None:
    options = {"padding": "full", "stride": (1, 2), "dilation": (2, 1)}
    case = Case((2, 2, 9, 7), (4, 2, 3, 2), options).in_layout(layout)
    x, w, dy = operands(case)
    X, DY = da.from_array(x, chunks=3), da.from_array(dy, chunks=4)
    equal(cuconv.conv(X, w, **case.options), cuconv.conv(x, w, **case.options))
    wanted = cuconv.conv_backward(dy, x, w, **case.options)
    equal_each(cuconv.conv_backward(DY, X, w, **case.options), wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "complex64", "bool"])
@pytest.mark.parametrize("wide", [False, True])
def test_types_are_those_of_eager_calls(dtype, wide) -> None:
    options = {"padding": 1, "precision": "strict"}
    if wide:
        options["dtype"] = {"int8": "int32", "complex64": "complex128"}.get(
            dtype, "float32"
        )
    x, w, dy = (integers(s, dtype) for s in [(2, 2, 9), (3, 2, 3), (2, 3, 9)])
    X, DY = da.from_array(x, chunks=(1, 2, 4)), da.from_array(dy, chunks=(1, 3, 4))
    equal(cuconv.conv(X, w, **options), cuconv.conv(x, w, **options))
    wanted = cuconv.conv_backward(dy, x, w, **options)
    equal_each(cuconv.conv_backward(DY, X, w, **options), wanted)


# --- pooling


def reduce(kind: str, x: Any, pool: Pool, **more: Any) -> Any:
    options = {**pool.options, **more}
    if kind == "norm":
        return cuconv.lp_pool(x, 1, pool.kernel, **options)
    function = {"max": cuconv.max_pool, "mean": cuconv.avg_pool}[kind]
    return function(x, pool.kernel, **options)


def of_taps(x: np.ndarray, pool: Pool) -> np.ndarray:
    """Multiples of every number that a mean may divide by: exact in any order."""
    most = math.prod(pool.kernel)
    return x * math.lcm(*range(1, most + 1))


def of_padding(y: np.ndarray) -> np.ndarray:
    """Maxima with 0 for windows over padding alone."""
    return np.where(np.isfinite(y), y, 0)


@settings(max_examples=12)
@given(pool=pools(), data=st.data())
@example(pool=Pool((1, 2, 5), (3,), {"padding": ((9, 9),), "stride": 2}), data=None)
def test_pooling_and_gradients_equal_eager_ones(xp, pool, data) -> None:
    x = of_taps(integers(pool.x_shape), pool)

    def tiling(array: np.ndarray) -> Any:
        chunks = 2 if data is None else data.draw(chunked(array.shape))
        return lazy(xp, array, chunks)

    X, options = tiling(x), pool.options
    y, places = reduce("max", x, pool, return_indices=True)
    Y, P = reduce("max", X, pool, return_indices=True)
    equal(Y, y)
    equal(P, places)
    dy = integers(y.shape, seed=1)
    DY = tiling(dy)
    wanted = cuconv.max_pool_backward(dy, places, x.shape, pool.kernel, **options)
    given_places = tiling(places), x.shape
    back = cuconv.max_pool_backward(DY, *given_places, pool.kernel, **options)
    equal(back, wanted)
    back = cuconv.max_pool_backward(DY, None, None, pool.kernel, x=X, **options)
    equal(back, wanted)
    at = xp.asarray(places) if data is None else tiling(places)
    equal(cuconv.max_pool(X, pool.kernel, indices=at, **options), of_padding(y))


def test_unpooling_equals_eager_one(xp) -> None:
    x = integers((2, 3, 8, 9))
    y, places = cuconv.max_pool(x, 2, return_indices=True)
    options = {"output_size": (8, 9)}
    wanted = cuconv.max_unpool(y, places, 2, **options)
    Y, P = (da.from_array(xp.asarray(a), (1, 2, 3, 2)) for a in (y, places))
    equal(cuconv.max_unpool(Y, P, 2, **options), wanted)
    places[1, 2, 3, 1] = 0
    wrong = da.from_array(places, (1, 2, 3, 2))
    with pytest.raises(ValueError, match="indices has"):
        cuconv.max_unpool(da.from_array(y), wrong, 2, **options).compute()
    with pytest.raises(TypeError, match="not for Dask arrays"):
        cuconv.max_pool(da.from_array(x), 2, return_indices=True, indices_over="array")


@settings(max_examples=8)
@given(pool=pools(), data=st.data(), counted=st.booleans())
def test_means_and_norms_equal_eager_ones(pool, data, counted) -> None:
    x = of_taps(integers(pool.x_shape), pool)
    X = da.from_array(x, chunks=data.draw(chunked(x.shape)))
    more = {"count_include_pad": counted}
    y = reduce("mean", x, pool, **more)
    equal(reduce("mean", X, pool, **more), y)
    dy = of_taps(integers(y.shape, seed=1), pool)
    DY = da.from_array(dy, chunks=data.draw(chunked(y.shape)))
    options = {**pool.options, **more}
    got = cuconv.avg_pool_backward(DY, x.shape, pool.kernel, **options)
    wanted = cuconv.avg_pool_backward(dy, x.shape, pool.kernel, **options)
    testing.assert_close(got.compute(), wanted, rtol=1e-14, atol=1e-9)
    norm = reduce("norm", x, pool)
    N = reduce("norm", X, pool)
    equal(N, norm)
    got = cuconv.lp_pool_backward(DY, X, N, 1, pool.kernel, **pool.options)
    wanted = cuconv.lp_pool_backward(dy, x, norm, 1, pool.kernel, **pool.options)
    testing.assert_close(got.compute(), wanted, rtol=1e-14)


def test_evenly_shared_windows_leave_their_axes_whole() -> None:
    x = integers((4, 6, 8, 9)) * 12  # 8 elements: windows of 3, 4 and 3
    X = da.from_array(x, chunks=(2, 3, 3, 3))
    y = cuconv.adaptive_max_pool(X, (3, 3))
    assert y.chunks == ((2, 2), (3, 3), (3,), (1, 1, 1))
    equal(y, cuconv.adaptive_max_pool(x, (3, 3)))
    dy = integers(y.shape)
    DY = da.from_array(dy, chunks=2)
    back = cuconv.adaptive_max_pool_backward(DY, None, None, (3, 3), x=X)
    equal(back, cuconv.adaptive_max_pool_backward(dy, None, None, (3, 3), x=x))
    equal(cuconv.global_max_pool(X), cuconv.global_max_pool(x))


# --- chunks, and what is pulled


@pytest.mark.parametrize(
    ("axis", "chunks", "wanted"),
    [
        (Axis(12, 3, 1, 1, 1, 1), (4, 4, 4), (4, 4, 4)),
        (Axis(12, 3, 1, 1, 0, 0), (4, 4, 4), (4, 4, 2)),
        (Axis(12, 3, 2, 1, 1, 1), (4, 4, 4), (2, 2, 2)),
        (Axis(12, 3, 1, 1, 2, 2), (4, 4, 4), (4, 4, 4, 2)),
        (Axis(12, 3, 1, 1, 9, 1), (4, 4, 4), (4, 4, 4, 4, 4)),
        (Axis(12, 3, 1, 1, -5, 0), (4, 4, 4), (4, 1)),
        (Axis(12, 1, 5, 1, 0, 0), (1,) * 12, (1, 1, 1)),
        (Axis(12, 3, 1, 1, 9, 9), (12,), (28,)),
        (Axis(2, 5, 1, 1, 1, 1), (1, 1), (0,)),
    ],
)
def test_outputs_go_with_the_cell_at_their_number_times_the_stride(
    axis, chunks, wanted
) -> None:
    assert sum(wanted) == axis.out
    assert output_chunks(axis, chunks) == wanted


def test_regular_chunks_come_back_from_a_gradient() -> None:
    axis = Axis(224, 7, 2, 1, 3, 3)
    chunks = output_chunks(axis, (64, 64, 64, 32))
    assert chunks == (32, 32, 32, 16)
    assert input_chunks(axis, chunks) == (64, 64, 64, 32)


class Read:
    """A Dask array that notes which of its chunks are computed."""

    def __init__(self, shape: tuple[int, ...], chunks: Any) -> None:
        self.seen: set[tuple[int, ...]] = set()
        source = da.zeros(shape, chunks=chunks)
        self.array = source.map_blocks(self._note, dtype=float, meta=np.empty((0,) * 4))

    def _note(self, block: np.ndarray, block_id: Any = None) -> np.ndarray:
        self.seen.add(tuple(block_id))
        return block

    def meeting(self, ranges: Sequence[tuple[int, int]]) -> set[tuple[int, ...]]:
        """The chunks that a box of cells meets."""
        each = [
            [
                index
                for index, (low, high) in enumerate(lazy_blocks.spans(chunks))
                if max(low, start) < min(high, stop)
            ]
            for chunks, (start, stop) in zip(self.array.chunks, ranges, strict=True)
        ]
        return set(itertools.product(*each))


PULLED = {
    "stride": (2, 1),
    "padding": ((2, 0), (1, 4)),
    "dilation": (1, 3),
}


def test_a_block_pulls_its_window_and_nothing_else(monkeypatch) -> None:
    read = Read((4, 2, 30, 24), (3, 2, 6, 5))
    w = np.ones((1, 2, 3, 3))
    geometry = ConvGeometry.of_weights(read.array.shape, w.shape, **PULLED)
    shapes: list[tuple[int, ...]] = []
    on_blocks(monkeypatch, lambda arrays, _: shapes.append(arrays["x"].shape))
    y = cuconv.conv(read.array, w, **PULLED)
    images, _, *spatial = map(lazy_blocks.spans, y.chunks)
    count = 0
    for place in itertools.product(*(range(n) for n in y.numblocks)):
        read.seen.clear()
        shapes.clear()
        y.blocks[place].compute()
        output = tuple(each[i] for each, i in zip(spatial, place[2:], strict=True))
        block = geometry.block(images[place[0]], output)
        assert read.seen == read.meeting([block.images, (0, 2), *block.window])
        sizes = [stop - start for start, stop in (block.images, *block.window)]
        assert shapes == [(sizes[0], 2, *sizes[1:])]
        count += 1
    assert count == math.prod(y.numblocks) == 2 * 5 * 5


def test_a_block_of_the_gradient_pulls_the_windows_that_reach_it() -> None:
    w = np.ones((3, 1, 3, 3))
    x_shape = (4, 1, 30, 24)
    geometry = ConvGeometry.of_weights(x_shape, w.shape, **PULLED)
    read = Read(geometry.y_shape, (2, 3, 4, 5))
    dx = cuconv.conv_input_grad(read.array, w, x_shape, **PULLED)
    images, _, *spatial = map(lazy_blocks.spans, dx.chunks)
    for place in itertools.product(*(range(n) for n in dx.numblocks)):
        read.seen.clear()
        dx.blocks[place].compute()
        cells = [each[i] for each, i in zip(spatial, place[2:], strict=True)]
        reached = map(Axis.reached_from, geometry.axes, *zip(*cells, strict=True))
        assert read.seen == read.meeting([images[place[0]], (0, 3), *reached])
    assert math.prod(dx.numblocks) == 2 * 4 * 5


def test_what_a_window_takes_of_a_chunk_travels_alone() -> None:
    """Not the whole neighbour: the tasks of a window depend on slices of it."""
    x = da.zeros((10, 10), chunks=5)
    pulled = windows(x, (((0, 6), (4, 10)), ((0, 5), (5, 10))))
    graph = dict(pulled.dask)
    joins = [key for key in graph if key[0] == pulled.name]
    tilings = [key for key in graph if key[0].startswith("cuconv-cut")]
    assert len(joins) == len(tilings) == 4
    shapes = {value.shape for value in dask.get(graph, tilings)}
    # Each window is a whole chunk and one row of the next.
    assert shapes == {(1, 5)}


def test_the_graph_grows_with_the_blocks() -> None:
    w = np.ones((4, 3, 3, 3))
    tasks = []
    for size in (12, 24):
        x = da.zeros((1, 3, size * 8, size * 8), chunks=(1, 3, 8, 8))
        y = cuconv.conv(x, w, padding=1)
        tasks.append(len(y.dask) / size**2)
    assert tasks[1] < 1.1 * tasks[0] < 16


# --- before anything is computed


def broken(shape: tuple[int, ...], chunks: Any) -> Any:
    """A Dask array that cannot be computed."""

    def fail(block_id: Any = None) -> None:
        raise AssertionError("computed")

    chunks = da.core.normalize_chunks(chunks, shape)
    return da.map_blocks(fail, chunks=chunks, dtype="f4", meta=np.empty((0,) * 4, "f4"))


def test_nothing_is_computed_by_a_call() -> None:
    side = 2**18
    x = broken((2, 3, side, side), (1, 3, 2**14, 2**14))
    w = np.ones((8, 3, 3, 3), np.float32)
    y = cuconv.conv2d(x, w, stride=2, padding=1)
    assert y.shape == (2, 8, side // 2, side // 2)
    assert y.dtype == np.float32
    assert type(y._meta) is np.ndarray
    gradients = cuconv.conv_backward(y, x, w, stride=2, padding=1)
    assert gradients.x.chunks == x.chunks
    assert gradients.w.shape == w.shape
    assert gradients.bias.shape == (8,)
    pooled, places = cuconv.max_pool2d(x, 2, return_indices=True)
    assert pooled.shape == places.shape == (2, 3, side // 2, side // 2)
    assert places.dtype == np.int64
    assert cuconv.avg_pool2d(x, 2, dtype="float64").dtype == np.float64
    with pytest.raises(AssertionError, match="computed"):
        y.blocks[0, 0, 0, 0].compute()


@settings(max_examples=20)
@given(invalid=invalid_cases())
def test_refusals_are_those_of_eager_calls(invalid) -> None:
    (x_shape, w_shape, options), error, _ = invalid
    said = []
    for zeros in (np.zeros, da.zeros):
        with pytest.raises(error) as caught:
            cuconv.conv(zeros(x_shape), np.zeros(w_shape), **options)
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "magic"},
        {"strategy": "pointwise"},
        {"precision": "vague"},
        {"memory_limit": "much"},
        {"layout": "NHCW"},
        {"colour": 1},
        {"dtype": "int8"},
    ],
)
def test_options_are_refused_by_the_call(options) -> None:
    x, w = np.zeros((1, 1, 8, 8)), np.zeros((1, 1, 3, 3))
    said = []
    for given_x in (x, da.from_array(x, chunks=4)):
        with pytest.raises((ValueError, TypeError)) as caught:
            cuconv.conv(given_x, w, **options)
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]


def test_a_limit_too_small_for_a_block_is_refused_by_the_call() -> None:
    x, w = broken((1, 4, 64, 64), 32), np.ones((4, 4, 3, 3), np.float32)
    calls = [
        lambda **limit: cuconv.conv(x, w, strategy="im2col", **limit),
        lambda **limit: cuconv.max_pool(x, 3, dilation=2, **limit),
    ]
    for call in calls:
        with pytest.raises(MemoryLimitError) as caught:
            call(memory_limit=0)
        call(memory_limit=caught.value.smallest)


def test_wrong_shapes_and_modules_are_refused(xp) -> None:
    x, w = lazy(xp, np.zeros((1, 1, 8)), 4), xp.zeros((1, 1, 3))
    with pytest.raises(ValueError, match="dy has shape"):
        cuconv.conv_backward(x, x, w)
    with pytest.raises(ValueError, match="bias has shape"):
        cuconv.conv(x, w, xp.zeros(2))
    with pytest.raises(TypeError, match="out cannot be given"):
        cuconv.conv(x, w, out=xp.zeros((1, 1, 6)))
    with pytest.raises(TypeError, match="out cannot be given"):
        cuconv.max_pool(x, 2, out=xp.zeros((1, 1, 4)))
    with pytest.raises(TypeError, match="w must be a NumPy or CuPy array"):
        cuconv.conv(x, [[[1.0]]])
    with pytest.raises(TypeError, match="must be a NumPy or CuPy array"):
        cuconv.im2col(x, 3)
    for option in ({"input_dilation": 2}, {"batch_groups": 1, "input_dilation": (3,)}):
        with pytest.raises(ValueError, match="take no batch_groups"):
            cuconv.conv(x, w, **option)
    if xp is not np:
        with pytest.raises(TypeError, match="host and device arrays are mixed"):
            cuconv.conv(x, np.zeros((1, 1, 3)))


# --- how blocks run


def test_settings_of_the_call_hold_in_its_blocks(monkeypatch) -> None:
    seen: list[Any] = []
    x = da.zeros((2, 1, 8), chunks=(1, 1, 8))
    with cuconv.config(num_threads=1, memory_limit="1 MiB", precision="strict"):
        y = cuconv.conv(x, np.ones((1, 1, 3)))
    on_blocks(monkeypatch, lambda _, o: seen.append((settings_now().num_threads, o)))
    y.compute()
    assert len(seen) == 2
    for threads, options in seen:
        assert threads == 1
        assert (options.memory_limit, options.precision) == (2**20, "strict")


def test_a_weight_gradient_is_summed_as_a_tree_and_always_alike() -> None:
    rng = np.random.default_rng(0)
    x = da.from_array(rng.standard_normal((1, 2, 80)), chunks=(1, 2, 5))
    dy = da.from_array(rng.standard_normal((1, 3, 78)), chunks=(1, 3, 5))
    grad = cuconv.conv_weight_grad(dy, x, (3, 2, 3))
    sums = {name for name in grad.dask.layers if name.startswith("sum-")}
    assert len(sums) >= 3
    with dask.config.set(scheduler="threads", num_workers=4):
        runs = [grad.compute().tobytes() for _ in range(5)]
    assert len(set(runs)) == 1
    wanted = cuconv.conv_weight_grad(dy.compute(), x.compute(), (3, 2, 3))
    testing.assert_close(grad.compute(), wanted, rtol=1e-12)


def test_halves_are_added_up_in_float32() -> None:
    """Each block counts to 2049, which as a half would be 2048."""
    x = da.ones((1, 1, 6 * 2049), chunks=(1, 1, 2049), dtype=np.float16)
    gradients = cuconv.conv_backward(x, x, np.ones((1, 1, 1), np.float16))
    wanted = np.float16(6 * 2049)
    assert wanted != 6 * 2048
    assert gradients.w.compute().item() == gradients.bias.compute().item() == wanted


def test_names_differ_where_only_what_the_last_block_is_divided_by_does() -> None:
    x = da.ones((1, 1, 7), chunks=(1, 1, 4))
    beyond = cuconv.avg_pool(x, 2, ceil_mode=True)
    padded = cuconv.avg_pool(x, 2, padding=((0, 1),))
    assert beyond.name != padded.name
    assert beyond.compute()[0, 0, -1] == 2 * padded.compute()[0, 0, -1] == 1


def test_a_task_carries_what_it_needs_of_its_own_block() -> None:
    """Not the cuts of the whole axis: a graph would grow with their square."""
    x, w = da.zeros((1, 1, 4000), chunks=(1, 1, 4)), np.ones((1, 1, 3))
    y = cuconv.conv(x, w, padding=1)
    graph = dict(y.dask)
    sizes = [len(pickle.dumps(graph[y.name, 0, 0, i])) for i in (0, 500, 999)]
    pooled = cuconv.avg_pool_backward(y, x.shape, 3, stride=1, padding=1)
    sizes.append(len(pickle.dumps(dict(pooled.dask)[pooled.name, 0, 0, 500])))
    assert max(sizes) < 3000


def test_graphs_can_be_sent_and_have_the_same_names_again() -> None:
    x, w = integers((2, 2, 12)), integers((3, 2, 3))
    made = []
    for _ in range(2):
        X = da.from_array(x, chunks=(1, 2, 4))
        y = cuconv.conv(X, w, padding=1)
        pooled, places = cuconv.max_pool(y, 2, return_indices=True)
        back = cuconv.max_pool_backward(pooled, places, y.shape, 2)
        made.append(cuconv.conv_input_grad(back, w, x.shape, padding=1))
    assert made[0].name == made[1].name
    graph = pickle.loads(pickle.dumps(dict(made[0].dask)))
    result = dask.get(graph, (made[0].name, 1, 0, 2))
    testing.assert_equal(result, made[1].compute()[1:, :, 8:])
