"""The kernels themselves, against loops: every type, width, rank and order.

On a machine without a GPU this is the kernels' own text on the CPU; see `standin`.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from support import integers, to_host

from cuconv.arrays import SUPPORTED_TYPES, grouped, stored
from cuconv.backends.cuda import cuda_backend, structs
from cuconv.backends.cuda.backend import _layout
from cuconv.backends.cuda.gemm import gemm
from cuconv.backends.cuda.structs import divisor, pack
from cuconv.backends.cuda.variants import all_variants, has_atomics
from cuconv.backends.cuda.vector_width import vector_width
from cuconv.backends.padding import Reading
from cuconv.geometry import PADDING_MODES, Axis, ConvGeometry

pytestmark = pytest.mark.parametrize("xp", ["cupy"], indirect=True)

# Sizes, kernels, strides, dilations and pads: they differ along every axis.
SPATIAL: dict[int, tuple[Any, ...]] = {
    1: ((9,), (3,), (2,), (2,), ((1, 3),)),
    2: ((7, 10), (3, 2), (2, 3), (2, 1), ((1, 2), (3, -1))),
    3: ((4, 5, 7), (1, 3, 2), (1, 2, 3), (1, 1, 4), ((1, 0), (0, 2), (2, 1))),
}


def geometry_of(rank: int, *, channels_first: bool = True) -> ConvGeometry:
    size, kernel, *windows = SPATIAL[rank]
    x = (2, 6, *size) if channels_first else (2, *size, 6)
    w = (4, 3, *kernel) if channels_first else (*kernel, 3, 4)
    options = dict(zip(("stride", "dilation", "padding"), windows, strict=True))
    layout = "channels_first" if channels_first else "channels_last"
    return ConvGeometry.of_weights(x, w, groups=2, layout=layout, **options)


def pairs(geometry: ConvGeometry):
    """Every (tap, output, cell) with the cell inside the input."""
    taps = itertools.product(*map(range, geometry.kernel))
    outputs = list(itertools.product(*map(range, geometry.out)))
    for tap, output in itertools.product(taps, outputs):
        cell = tuple(
            o * a.stride + t * a.dilation - a.before
            for o, t, a in zip(output, tap, geometry.axes, strict=True)
        )
        if all(0 <= i < n for i, n in zip(cell, geometry.size, strict=True)):
            yield tap, output, cell


def columns_by_loops(x: np.ndarray, geometry: ConvGeometry) -> np.ndarray:
    shape = (*x.shape[:3], *geometry.kernel, *geometry.out)
    columns = np.zeros(shape, dtype=x.dtype)
    for tap, output, cell in pairs(geometry):
        columns[(..., *tap, *output)] = x[(..., *cell)]
    return columns


def sums_by_loops(columns: np.ndarray, geometry: ConvGeometry) -> np.ndarray:
    total = np.zeros((*columns.shape[:3], *geometry.size), dtype=columns.dtype)
    for tap, output, cell in pairs(geometry):
        total[(..., *cell)] += columns[(..., *tap, *output)]
    return total


def whole(geometry: ConvGeometry):
    (block,) = geometry.blocks(geometry.tile(geometry.images * geometry.positions))
    return block


def empty_columns(xp, geometry, dtype, *, wide: bool):
    head = geometry.images, geometry.groups, geometry.group_channels
    cells = np.prod((*head, *geometry.kernel, *geometry.out))
    flat = xp.empty(int(cells), dtype=dtype)
    first = geometry.channels_first
    return stored(
        flat, head, geometry.kernel, geometry.out, channels_first=first, wide=wide
    ).cells


@pytest.fixture(params=[False, True], ids=["int32", "int64"])
def wide_index(request, monkeypatch):
    """Both index widths, the wide one by pretending that launches are huge."""
    if request.param:
        monkeypatch.setattr(structs, "MOST_THREADS", 2**31)
    return request.param


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "dtype", ["int8", "float16", "float32", "float64", "complex128"]
)
@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("joined", [False, True])
def test_im2col(xp, rank, dtype, channels_first, joined, wide_index):
    geometry = geometry_of(rank, channels_first=channels_first)
    host = integers((2, 2, 3, *geometry.size), dtype)
    x = xp.asarray(host)
    columns = empty_columns(xp, geometry, dtype, wide=joined)
    assert (
        pack(x, columns, geometry.axes, (0,) * rank, over_output=True).wide
        is wide_index
    )
    cuda_backend().gather(x, columns, geometry, whole(geometry), {})
    np.testing.assert_array_equal(to_host(columns), columns_by_loops(host, geometry))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dtype", SUPPORTED_TYPES)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("add", [False, True])
def test_col2im(xp, rank, dtype, deterministic, add, wide_index):
    geometry = geometry_of(rank, channels_first=rank != 2)
    columns = empty_columns(xp, geometry, dtype, wide=False)
    host = integers(columns.shape, dtype)
    columns[...] = xp.asarray(host)
    sums = "float32" if dtype in ("float16", "bfloat16") else dtype
    before = integers((*columns.shape[:3], *geometry.size), sums, seed=1)
    target = xp.asarray(before)
    cuda_backend().scatter(
        columns,
        target,
        geometry,
        whole(geometry),
        tuple((0, n) for n in geometry.size),
        add=add,
        deterministic=deterministic,
    )
    expected = sums_by_loops(host.astype(sums), geometry)
    np.testing.assert_array_equal(
        to_host(target), expected + before if add else expected
    )


@pytest.mark.parametrize("dtype", [t for t in SUPPORTED_TYPES if "bfloat" not in t])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("transposed", [*itertools.product([False, True], repeat=3)])
@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 4, 6), (3, 2, 1, 7, 1), (1, 1, 17, 33, 18)]
)
def test_gemm(xp, dtype, add, transposed, shape):
    images, groups, rows, inner, columns = shape
    host_a = integers((1, groups, rows, inner), dtype, largest=2)
    host_b = integers((images, groups, inner, columns), dtype, seed=1, largest=2)
    before = integers((images, groups, rows, columns), dtype, seed=2)

    def placed(host, by_columns):
        order = host.swapaxes(-1, -2) if by_columns else host
        made = xp.asarray(np.ascontiguousarray(order))
        return made.swapaxes(-1, -2) if by_columns else made

    a, b, out = map(placed, (host_a, host_b, before), transposed)
    gemm(cuda_backend().do, a, b, out, add=add)
    with np.errstate(over="ignore"):
        expected = np.matmul(host_a, host_b).astype(dtype)
        expected = expected + before if add else expected
    np.testing.assert_array_equal(to_host(out), expected)


# Columns that are written in words

WORDS = {
    # channels, sizes, kernel, stride: the last output axis has 8, 6 or 7 positions.
    "sixteen bytes of positions": (3, (4, 10), (2, 3), (1, 1), 8),
    "eight bytes of positions": (3, (4, 8), (2, 3), (1, 1), 6),
    "one by one": (3, (4, 9), (2, 3), (1, 1), 7),
    "strides": (3, (4, 17), (2, 3), (2, 2), 8),
}


def columns_in_words(xp, dtype, channels, size, kernel, stride, *, first, shift=0):
    """Columns of two images, and what loops give; ``shift`` items off alignment."""
    groups = 2
    x_shape = (2, groups * channels, *size) if first else (2, *size, groups * channels)
    w_shape = (groups, channels, *kernel) if first else (*kernel, channels, groups)
    geometry = ConvGeometry.of_weights(
        *(x_shape, w_shape),
        stride=stride,
        padding=((0, 0), (1, -1)),
        groups=groups,
        layout="channels_first" if first else "channels_last",
    )
    whole_x = xp.asarray(integers((math.prod(x_shape) + 16,), dtype))
    flat = whole_x[shift : shift + math.prod(x_shape)].reshape(x_shape)
    x = grouped(flat, groups, len(size), channels_first=first, batched=True)
    cells = 2 * geometry.positions * groups * channels * geometry.taps
    columns = stored(
        xp.empty(cells + 16, dtype=dtype)[shift:],
        (2, groups, channels),
        *(geometry.kernel, geometry.out),
        channels_first=first,
    ).cells
    words = vector_width(_layout(x), _layout(columns), np.dtype(dtype).itemsize)
    cuda_backend().gather(x, columns, geometry, whole(geometry), {})
    expected = columns_by_loops(to_host(x), geometry)
    np.testing.assert_array_equal(to_host(columns), expected)
    return words


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32", "float64", "c16"])
@pytest.mark.parametrize("name", WORDS)
def test_im2col_in_words_of_positions(xp, dtype, name):
    *shape, last = WORDS[name]
    size = np.dtype(dtype).itemsize
    wanted = next(
        (w // size for w in (16, 8) if size in (2, 4, 8) and last % (w // size) == 0), 1
    )
    words = columns_in_words(xp, dtype, *shape, first=True)
    assert words == (1, wanted)
    # One item off: nothing is aligned, except 8 bytes of a word of 16.
    words = columns_in_words(xp, dtype, *shape, first=True, shift=1)
    assert words == (1, 1)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32", "float64", "c16"])
@pytest.mark.parametrize("channels", [1, 2, 4, 6, 8, 16])
def test_im2col_in_words_of_channels(xp, dtype, channels):
    size = np.dtype(dtype).itemsize
    shape = channels, (5, 6), (2, 3), (1, 2)
    fits = (w // size for w in (16, 8) if w > size and channels % (w // size) == 0)
    words = columns_in_words(xp, dtype, *shape, first=False)
    assert words == (next(fits, 1), 1)
    assert columns_in_words(xp, dtype, *shape, first=False, shift=1) == (1, 1)


def test_im2col_with_a_wide_index_moves_items_one_by_one(xp, monkeypatch):
    monkeypatch.setattr(structs, "MOST_THREADS", 2**31)
    for first in (True, False):
        words = columns_in_words(xp, "f4", 4, (4, 10), (2, 3), (1, 1), first=first)
        assert words == ((1, 4) if first else (4, 1))


def test_products_of_halves_with_odd_strides_go_one_by_one(xp):
    if not getattr(xp, "IS_STAND_IN", False):
        pytest.skip("counts calls, which only the stand-in notes")
    host = integers((4, 1, 3, 5), "float16")
    calls = xp.cuda.cublas.calls
    before = len(calls)
    out = xp.empty((4, 1, 3, 3), dtype="float16")
    a = xp.asarray(host)
    gemm(cuda_backend().do, a, a.swapaxes(-1, -2), out)
    assert [batch for *_, batch, _, _ in calls[before:]] == [1, 1, 1, 1]
    assert all(mode == 16 for *_, mode in calls[before:])
    np.testing.assert_array_equal(to_host(out), host @ host.swapaxes(-1, -2))


def test_offsets_past_31_bits(xp):
    far = 2**30 + 8
    buffer = xp.zeros(2 * far + 16, dtype="uint8")
    geometry = ConvGeometry.of_weights((3, 1, 2, 3), (1, 1, 2, 2))
    item = xp.lib.stride_tricks.as_strided(buffer, (3, 1, 1, 2, 3), (far, 1, 1, 3, 1))
    host = integers((3, 1, 1, 2, 3), "uint8", largest=200)
    item[...] = xp.asarray(host)
    columns = empty_columns(xp, geometry, "uint8", wide=False)
    assert pack(item, columns, geometry.axes, (0, 0), over_output=True).wide
    cuda_backend().gather(item, columns, geometry, whole(geometry), {})
    np.testing.assert_array_equal(to_host(columns), columns_by_loops(host, geometry))
    sums = xp.lib.stride_tricks.as_strided(buffer, (3, 1, 1, 2, 3), (far, 1, 1, 3, 1))
    cells = ((0, 2), (0, 3))
    block = whole(geometry)
    cuda_backend().scatter(
        columns, sums, geometry, block, cells, add=False, deterministic=True
    )
    expected = sums_by_loops(columns_by_loops(host, geometry), geometry)
    np.testing.assert_array_equal(to_host(sums), expected)


def test_strides_that_split_an_item_are_refused(xp):
    raw = xp.zeros(64, dtype="uint8")
    odd = xp.lib.stride_tricks.as_strided(raw.view("float32"), (2, 2), (6, 4))
    with pytest.raises(ValueError, match=r"\(6, 4\) are not multiples .* 4"):
        structs.steps_of(odd)


def test_divisors_divide(xp):
    rng = np.random.default_rng(0)
    values = [*range(1, 300), 2**31 - 1, 2**31 - 2, *(2**i for i in range(31))]
    values += [2**i + 1 for i in range(2, 30)] + rng.integers(1, 2**31, 500).tolist()
    checked = 0
    for value in values:
        _, multiplier, shift = divisor(value)
        assert 0 <= multiplier < 2**32
        multiples = [q * value for q in (1, 2, (2**31 - 1) // value)]
        numbers = [0, 2**31 - 1, *multiples, *(m - 1 for m in multiples)]
        for n in (*numbers, *rng.integers(0, 2**31, 20).tolist()):
            if n >= 2**31:
                continue
            assert (n if value == 1 else (n * multiplier >> 32) >> shift) == n // value
            checked += 1
    assert checked > 20_000


def test_every_type_that_adds_atomically_has_a_kernel(xp):
    kernels = {v.macros[0] for v in all_variants() if v.kernel == "col2im_scatter"}
    assert len(kernels) == 8
    assert sum(has_atomics(np.dtype(t)) for t in SUPPORTED_TYPES) == 10


# Cells around an array

NUMPY_MODES = {
    "reflect": "reflect",
    "symmetric": "symmetric",
    "replicate": "edge",
    "circular": "wrap",
}
SIZES = {1: (4,), 2: (4, 3), 3: (2, 3, 1)}
WINDOWS = {1: ((-7, 9),), 2: ((-3, 5), (1, 6)), 3: ((0, 2), (-1, 4), (-2, 3))}


def window_of(x: np.ndarray, rank: int, mode: str) -> np.ndarray:
    """What a window reads of an array (N, G, C, *cells), by NumPy's padding."""
    each = zip(SIZES[rank], WINDOWS[rank], strict=True)
    pads = [(max(-a, 0), max(b - n, 0)) for n, (a, b) in each]
    padded = np.pad(x, [(0, 0)] * 3 + pads, mode=NUMPY_MODES[mode])
    tiling = (slice(max(a, 0), max(a, 0) + b - a) for a, b in WINDOWS[rank])
    return padded[(..., *tiling)]


def axes_of(rank: int) -> tuple[Axis, ...]:
    return tuple(Axis(n, 1, 1, 1, 0, 0) for n in SIZES[rank])


@pytest.mark.parametrize("mode", NUMPY_MODES)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["int16", "complex128"])
def test_pad_copy(xp, rank, dtype, mode, wide_index):
    x = integers((2, 2, 3, *SIZES[rank]), dtype, seed=rank)
    expected = window_of(x, rank, mode)
    copied = xp.empty(expected.shape, dtype=dtype)
    place = Reading(axes_of(rank), WINDOWS[rank], mode)
    cuda_backend().pad_copy(xp.asarray(x), copied, place)
    np.testing.assert_array_equal(to_host(copied), expected)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("mode", NUMPY_MODES)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["int16", "complex64"])
def test_pad_adjoint_sums_what_has_read_a_cell(xp, rank, dtype, mode, add, wide_index):
    shape = (2, 2, 3, *SIZES[rank])
    readers = window_of(np.arange(np.prod(shape)).reshape(shape), rank, mode)
    copied = integers(readers.shape, dtype, seed=rank)
    x = integers(shape, dtype, seed=7)
    expected = x.copy() if add else np.zeros_like(x)
    np.add.at(expected.reshape(-1), readers, copied)
    target = xp.asarray(x)
    place = Reading(axes_of(rank), WINDOWS[rank], mode)
    cuda_backend().pad_adjoint(xp.asarray(copied), target, place, add=add)
    np.testing.assert_array_equal(to_host(target), expected)


def test_every_padding_mode_is_tested(xp):
    assert ("zeros", *NUMPY_MODES) == PADDING_MODES


@pytest.mark.parametrize("mode", ["reflect", "symmetric"])
def test_twice_a_long_axis_needs_a_wide_index(xp, mode):
    """Coordinates before the first element are taken modulo 2^31 and more."""
    size = 2**30 + 2
    x = xp.zeros(size, dtype="int8")[None, None, None]
    x[..., :4] = xp.asarray(np.array([1, 2, 3, 4], np.int8))
    copied = xp.empty((1, 1, 1, 5), dtype="int8")
    place = Reading((Axis(size, 1, 1, 1, 0, 0),), ((-3, 2),), mode)
    packed = structs.pack_windows(x, copied, place, over_output=True)
    assert packed.wide
    cuda_backend().pad_copy(x, copied, place)
    wanted = {"reflect": [4, 3, 2, 1, 2], "symmetric": [3, 2, 1, 1, 2]}[mode]
    assert to_host(copied).ravel().tolist() == wanted
