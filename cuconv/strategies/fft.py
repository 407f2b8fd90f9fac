"""Large kernels by the convolution theorem: products of spectra, summed over channels.

Correlation becomes, at every frequency f,

    forward        Y_f = X_f · conj(W_f)     summed over channels: a matrix product
    weight_grad    dW_f = X_f · conj(dY_f)   summed over images and blocks

The output is split into tiles; each reads a window of the input as long as the tile and
the kernel together (overlap and save), so that all tiles use the same spectra of the
weights.  A block has many tiles: their windows are overlapping views of the padded
input of the block, and one call transforms them all.  The input gradient is the forward
pass over dy with flipped weights.  With strides, the result is subsampled; with
dilation, zeros are inserted between taps.

Layout: spectra are (frequencies, G, windows or filters, channels), so that a frequency
is one matrix product.  Where a group has one channel there is nothing to sum: spectra
stay as they are transformed, (windows, G, channels or filters, frequencies), and are
multiplied element by element.

Rounding grows with the logarithm of the length, and so less than that of direct sums of
so many products: 10⁵ samples and 10³ taps in float32 err 2.4e-7 of the largest result,
and 4.2e-7 by im2col; with 10⁴ taps 3.1e-7 and 1.4e-6.

Source: T. Stockham, "High-speed convolution and correlation", 1966; M. Mathieu,
M. Henaff, Y. LeCun, "Fast training of convolutional networks through FFTs", 2013.
"""

import math
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import islice, product
from typing import Any, Literal, NamedTuple

import numpy as np

from cuconv.arrays import Array, DType, strided
from cuconv.backends import Backend
from cuconv.engine.costs import Work
from cuconv.engine.problem import Problem, in_groups
from cuconv.geometry import Axis, Block, ConvGeometry, Tile
from cuconv.memory import Buffer
from cuconv.strategies.base import (
    OVER_DY,
    ForwardOnly,
    Job,
    OneWay,
    Tiling,
    Tilings,
    Workspace,
    add_splits,
    bias_buffer,
    filters_of,
    output_cells,
    take_bias,
)

# Kernels of fewer taps are faster by im2col, whatever the channels.
_LEAST_TAPS = 25
_SMOOTH = (2, 3, 5)
# An element is copied, multiplied and added in as long as it takes to double the length
# of its transform so many times.
_OTHER_STEPS = 5
# Without scaling, NumPy 2.4 transforms float32 through whole copies in float64.
_NORM: Literal["ortho"] = "ortho"
# The order of the axes of matrices at each frequency, by their places among windows,
# groups and channels (of images), and among groups, filters and channels (of weights).
_IMAGES, _IMAGES_LAST, _WEIGHTS = (1, 0, 2), (1, 2, 0), (0, 2, 1)
_COMPLEX: dict[str, DType] = {"f": np.dtype(np.complex64), "d": np.dtype(np.complex128)}


@lru_cache(maxsize=1024)
def _smooth(length: int) -> int:
    """The smallest length, at least this, with a fast transform."""
    while True:
        rest = length
        for factor in _SMOOTH:
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 1


class _Windows(NamedTuple):
    """The windows of a block: how many along each axis, and their sizes.

    ``cells`` are the outputs of a window, ``lengths`` those of its transform.
    """

    counts: tuple[int, ...]
    cells: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def number(self) -> int:
        return math.prod(self.counts)


@lru_cache(maxsize=1024)
def _outputs(axis: Axis) -> int:
    """The outputs of a window along an axis for which transforms take least."""

    def cost(cells: int) -> float:
        length = _smooth((cells - 1) * axis.stride + axis.extent)
        return -(-out // cells) * length * (math.log2(length) + _OTHER_STEPS)

    out = max(axis.out, 1)
    shares = (-(-out // 2 ** (i / 2)) for i in range(2 * out.bit_length()))
    return min(dict.fromkeys(max(int(share), 1) for share in shares), key=cost)


@lru_cache(maxsize=1024)
def _windows(geometry: ConvGeometry, tile: Tile) -> _Windows:
    """The windows of a tile, all of one size, as even as possible."""
    axes = geometry.axes
    pairs = [*zip(axes, tile.cells, strict=True)]
    counts = tuple(-(-cells // _outputs(axis)) for axis, cells in pairs)
    cells = tuple(-(-n // count) for n, count in zip(tile.cells, counts, strict=True))
    lengths = (
        _smooth((n - 1) * axis.stride + axis.extent)
        for axis, n in zip(axes, cells, strict=True)
    )
    return _Windows(counts, cells, tuple(lengths))


def _frequencies(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return (*lengths[:-1], lengths[-1] // 2 + 1)


# The cost of reading a spectrum of a weight again, relative to a weight.
_SPECTRA = 7


class Fft(ForwardOnly, OneWay):
    """See `cuconv.strategies.Strategy`."""

    name = "fft"
    libraries: tuple[str, ...] = ()
    capturable = False
    on_tensor_cores = False
    gains_from_size = False  # the cost of an element grows with the transform's length

    def supports(self, problem: Problem) -> tuple[bool, str]:
        reason = next(_refusals(problem), "")
        return not reason, reason

    def tilings(self, problem: Problem, variant: None, backend: Backend) -> Tilings:
        del variant
        g = problem.geometry
        window = math.prod(map(_outputs, g.axes))
        lengths = _windows(g, Tile(1, tuple(map(_outputs, g.axes)))).lengths
        spectrum = 2 * max(g.channels, g.filters) * problem.operand.itemsize
        several = backend.block_bytes // max(spectrum * math.prod(lengths), 1)
        positions = window * max(several, 1)
        splits = 2 if problem.op == "weight_grad" else 1
        return Tilings(positions, partial(_square_tile, g), splits)

    def workspace(
        self, problem: Problem, tiling: Tiling, backend: Backend
    ) -> Workspace:
        del backend
        g, dtype = problem.geometry, problem.operand
        wide = _COMPLEX[dtype.char]
        found = _windows(g, tiling.tile)
        cells, spectrum = (
            math.prod(found.lengths),
            math.prod(_frequencies(found.lengths)),
        )
        images = tiling.tile.images
        windows = images * found.number
        weights = g.filters * g.group_channels
        most = max(windows * g.filters, _strip(problem))
        read = images * g.channels * math.prod(_lengths_read(g, found.counts, found))
        real = Buffer("real", max(most * cells, read), dtype)
        # Two buffers, used in turn: NumPy copies operands of transforms in place.
        pair = 2 if g.rank > 1 else 1
        most = max(most, windows * g.channels)
        between = Buffer("between", pair * most * spectrum, wide)
        x = Buffer("x", windows * g.channels * spectrum, wide)
        y = Buffer("y", windows * g.filters * spectrum, wide)
        if problem.op == "weight_grad":
            sums = Buffer("sums", tiling.splits * weights * spectrum, wide)
            product = Buffer("product", weights * spectrum, wide)
            return Workspace((), (sums,), (real, between, x, y, product))
        kept = Buffer("w", weights * spectrum, wide)
        return Workspace((kept,), bias_buffer(problem), (real, between, x, y))

    def work(self, problem: Problem, tiling: Tiling) -> Work:
        g = problem.geometry
        found = _windows(g, tiling.tile)
        cells = math.prod(found.lengths)
        blocks = g.count_blocks(tiling.tile)
        windows, weights = (
            tiling.tile.images * found.number,
            g.filters * g.group_channels,
        )
        adds, single = problem.op == "weight_grad", g.group_channels == 1
        spectra = blocks * windows * (g.channels + g.filters) + weights
        products = blocks * windows * weights * cells
        return Work(
            multiply=0 if single else 2 * products,
            short_side=min(windows, g.group_filters, g.group_channels),
            fourier=spectra * cells * math.log2(max(cells, 2)),
            copy=2 * spectra * cells
            + (3 * blocks * weights * cells if adds else 0)
            + (2 * products if single else 0),
            products=0 if single else blocks * g.groups * cells / 2,
            reread=0 if single else _SPECTRA * blocks * weights * cells,
            blocks=blocks,
            pieces=tiling.splits if adds else blocks,
        )

    def weights(self, job: Job, w: Array, kept: dict[str, Array]) -> Array:
        """Conjugate spectra (G, K/G, C/G, *frequencies)."""
        problem, g = job.problem, job.problem.geometry
        lengths = _windows(g, job.tiling.tile).lengths
        view = filters_of(w, problem)
        spectra = _spectra(kept["w"], view.shape[:3], g, lengths, _WEIGHTS)
        places = _tap_slices(g)
        step = max(1, _strip(problem) // max(g.groups * g.group_channels, 1))

        def body(number: int, start: int, own: dict[str, Array]) -> None:
            del number
            part = view[:, start : start + step]
            cells = _cells(own["real"], part.shape[:3], lengths)
            job.backend.fill(cells, 0)
            job.backend.copy(part, cells[places])
            into, between = spectra[:, start : start + step], own["between"]
            job.backend.do(_transform, cells, into, between, g.rank, _scale(lengths))

        with job.backend.stage("weights", self.name):
            job.each(range(0, g.group_filters, step), body)
        return spectra

    def forward(
        self, job: Job, x: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        g = job.problem.geometry
        found = _windows(g, job.tiling.tile)
        offset = take_bias(job, bias)
        x, y = in_groups(x, g), in_groups(out, g)

        def body(chunk: int, block: Block, own: dict[str, Array]) -> None:
            with job.backend.stage("transform", self.name, chunk):
                spectra = _spectra_of_input(job, x, block, found, own)
            with job.backend.stage("gemm", self.name, chunk):
                head = *spectra.shape[:2], g.group_filters
                products = _spectra(own["y"], head, g, found.lengths)
                if g.group_channels == 1:
                    factor = weights[:, :, 0][None]
                    job.backend.do(np.multiply, spectra, factor, products)
                else:
                    pairs = (spectra, _IMAGES), (weights, _WEIGHTS), (products, _IMAGES)
                    _multiply(job, *pairs)
            with job.backend.stage("transform", self.name, chunk):
                cells = _cells(own["real"], head, found.lengths)
                job.backend.do(_transform_back, products, own["between"], cells, g.rank)
                if offset is not None:
                    own_bias = offset.reshape(*offset.shape[:3], *(1,) * g.rank)
                    job.backend.do(np.add, cells, own_bias, cells)
                for place, part in _pieces(
                    g, block, found, cells, output_cells(y, block)
                ):
                    job.backend.copy(place, part)

        job.each(job.blocks, body)

    def weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        g, splits = job.problem.geometry, job.tiling.splits
        found = _windows(g, job.tiling.tile)
        x, dy = in_groups(x, g), in_groups(dy, g)
        view = filters_of(out, job.problem)
        sums = job.shared["sums"].reshape(splits, -1)

        def body(number: int, split: int, own: dict[str, Array]) -> None:
            del number
            job.backend.fill(sums[split], 0)
            product = _spectra(
                own["product"], view.shape[:3], g, found.lengths, _WEIGHTS
            )
            for chunk, block in islice(enumerate(job.blocks), split, None, splits):
                with job.backend.stage("transform", self.name, chunk):
                    spectra = _spectra_of_input(job, x, block, found, own)
                    gradients = _spectra_of_dy(job, dy, block, found, own)
                with job.backend.stage("gemm", self.name, chunk):
                    if g.group_channels == 1:
                        job.backend.do(np.multiply, spectra, gradients, gradients)
                        job.backend.do(_sum_windows, gradients, product[:, :, 0])
                    else:
                        pairs = (spectra, _IMAGES_LAST), (gradients, _IMAGES)
                        _multiply(job, *pairs, (product, _WEIGHTS))
                    total = sums[split]
                    job.backend.do(np.add, total, own["product"][: total.size], total)

        job.each(range(splits), body)
        add_splits(job, list(sums))
        spectra = _spectra(sums[0], view.shape[:3], g, found.lengths, _WEIGHTS)
        places = _tap_slices(g)
        step = max(1, _strip(job.problem) // max(g.groups * g.group_channels, 1))

        def finish(number: int, start: int, own: dict[str, Array]) -> None:
            del number
            part = spectra[:, start : start + step]
            cells = _cells(own["real"], part.shape[:3], found.lengths)
            job.backend.do(_transform_back, part, own["between"], cells, g.rank)
            job.backend.copy(cells[places], view[:, start : start + step])

        with job.backend.stage("weights", self.name):
            job.each(range(0, g.group_filters, step), finish)


def _square_tile(geometry: ConvGeometry, positions: int) -> Tile:
    """Tiles as square as the output, images last."""
    cells = [max(out, 1) for out in geometry.out]
    while math.prod(cells) > positions and max(cells) > 1:
        longest = max(range(geometry.rank), key=lambda i: cells[i])
        cells[longest] = -(-cells[longest] // 2)
    images = min(max(positions // math.prod(cells), 1), max(geometry.images, 1))
    return Tile(images, tuple(cells))


def _refusals(problem: Problem) -> Iterator[str]:
    taps = problem.geometry.taps
    if problem.op == "input_grad":
        yield OVER_DY
    if problem.precision == "strict":
        yield "it needs precision='standard' or 'fast'"
    if problem.module != "numpy":
        yield "it is for NumPy arrays"
    if problem.operand.char not in _COMPLEX:
        yield f"there is no transform of {problem.operand}"
    if taps < _LEAST_TAPS:
        yield f"the kernel has {taps} taps, fewer than {_LEAST_TAPS}"


def _strip(problem: Problem) -> int:
    """The number of weights to transform at once: at most the planes of a block."""
    g = problem.geometry
    return max(g.channels, min(g.filters * g.group_channels, g.filters + g.channels))


def _tap_slices(geometry: ConvGeometry) -> tuple[Any, ...]:
    """The positions of the taps in a transform."""
    return (..., *(slice(0, axis.extent, axis.dilation) for axis in geometry.axes))


def _cells(flat: Array, head: tuple[int, ...], lengths: tuple[int, ...]) -> Array:
    shape = (*head, *lengths)
    return flat[: math.prod(shape)].reshape(shape)


def _spectra(
    flat: Array,
    head: tuple[int, ...],
    geometry: ConvGeometry,
    lengths: tuple[int, ...],
    order: tuple[int, ...] = _IMAGES,
) -> Array:
    """Spectra (*head, *frequencies) in a buffer, stored as matrices in this order."""
    rank, shape = geometry.rank, (*head, *_frequencies(lengths))
    flat = flat[: math.prod(shape)]
    if geometry.group_channels == 1:
        return flat.reshape(shape)
    cells = flat.reshape(*shape[3:], *(head[i] for i in order))
    axes = *(rank + order.index(i) for i in range(3)), *range(rank)
    return cells.transpose(axes)


def _multiply(job: Job, *operands: tuple[Array, tuple[int, ...]]) -> None:
    """A matrix product at every frequency: two factors and the result."""
    rank = job.problem.geometry.rank
    views = (a.transpose(*range(3, 3 + rank), *order) for a, order in operands)
    job.backend.do(np.matmul, *views)


def _sum_windows(products: Array, sums: Array) -> None:
    np.sum(products, axis=0, out=sums)


def _counts(block: Block, found: _Windows) -> tuple[int, ...]:
    """The number of windows of a block along each axis."""
    pairs = zip(block.shape, found.cells, strict=True)
    return tuple(-(-size // cells) for size, cells in pairs)


def _lengths_read(
    geometry: ConvGeometry, counts: tuple[int, ...], found: _Windows
) -> tuple[int, ...]:
    """The input elements of so many windows along each axis."""
    several = zip(geometry.axes, counts, found.cells, found.lengths, strict=True)
    return tuple(
        (n - 1) * cells * axis.stride + length for axis, n, cells, length in several
    )


def _spectra_of_input(
    job: Job, x: Array, block: Block, found: _Windows, own: dict[str, Array]
) -> Array:
    """Spectra of the windows of a block: (windows, G, C/G, *frequencies)."""
    g, rank = job.problem.geometry, job.problem.geometry.rank
    images, counts = block.images[1] - block.images[0], _counts(block, found)
    head = g.groups, g.group_channels
    shape = images, *head, *_lengths_read(g, counts, found)
    cells = own["real"][: math.prod(shape)].reshape(shape)
    job.backend.fill(cells, 0)
    inside = tuple(
        slice(before, before + stop - start)
        for (before, _), (start, stop) in zip(block.padding, block.window, strict=True)
    )
    source = x[slice(*block.images)][(..., *(slice(*span) for span in block.window))]
    job.backend.copy(source, cells[(..., *inside)])
    steps = zip(cells.strides[3:], found.cells, g.axes, strict=True)
    apart = (step * outputs * axis.stride for step, outputs, axis in steps)
    windows = strided(
        cells,
        (images, *counts, *head, *found.lengths),
        (cells.strides[0], *apart, *cells.strides[1:]),
    )
    spectra = _spectra(own["x"], (images * math.prod(counts), *head), g, found.lengths)
    job.backend.do(_transform, windows, spectra, own["between"], rank, None)
    return spectra


def _spectra_of_dy(
    job: Job, dy: Array, block: Block, found: _Windows, own: dict[str, Array]
) -> Array:
    """Conjugate spectra of dy, a stride apart: (windows, G, K/G, *frequencies)."""
    g = job.problem.geometry
    windows = (block.images[1] - block.images[0]) * math.prod(_counts(block, found))
    head = windows, g.groups, g.group_filters
    cells = _cells(own["real"], head, found.lengths)
    job.backend.fill(cells, 0)
    for place, part in _pieces(g, block, found, cells, output_cells(dy, block)):
        job.backend.copy(part, place)
    spectra = _spectra(own["y"], head, g, found.lengths)
    scale = _scale(found.lengths)
    job.backend.do(_transform, cells, spectra, own["between"], g.rank, scale)
    return spectra


def _pieces(
    geometry: ConvGeometry, block: Block, found: _Windows, cells: Array, y: Array
) -> Iterator[tuple[Array, Array]]:
    """The outputs of windows (windows, G, K/G, *lengths), and their places in a block.

    Both as (N, G, K/G, windows and outputs of each axis): the last windows along an
    axis may have fewer outputs than the others.
    """
    rank, counts = geometry.rank, _counts(block, found)
    cells = cells.reshape(len(y), *counts, *cells.shape[1:])
    inner = [axis for i in range(rank) for axis in (1 + i, rank + 3 + i)]
    choices = []
    for size, count, each in zip(block.shape, counts, found.cells, strict=True):
        whole = size // each
        parts = (0, whole, each), (whole, count, size - whole * each)
        choices.append([part for part in parts if part[0] < part[1] and part[2]])
    for chosen in product(*choices):
        windows, outputs, spans, shape = [], [], [], []
        for (begin, end, n), each, axis in zip(
            chosen, found.cells, geometry.axes, strict=True
        ):
            windows.append(slice(begin, end))
            outputs.append(slice(0, (n - 1) * axis.stride + 1, axis.stride))
            spans.append(slice(begin * each, begin * each + (end - begin) * n))
            shape += [end - begin, n]
        picked = cells[(slice(None), *windows, slice(None), slice(None), *outputs)]
        part = y[(..., *spans)]
        place = picked.transpose(0, rank + 1, rank + 2, *inner)
        yield place, part.reshape(*part.shape[:3], *shape)


def _scale(lengths: tuple[int, ...]) -> float:
    """Three transforms, each divided by √n; the product must be divided by n."""
    return math.sqrt(math.prod(lengths))


def _transform(
    cells: Array, spectra: Array, between: Array, rank: int, scale: float | None
) -> None:
    """Spectra (*head, *frequencies) of real elements (*head, *lengths).

    With a scale, their conjugates times that.
    """
    part, other = _pair(between, spectra.shape)
    if rank == 1 and spectra.flags.c_contiguous:
        part = spectra
    first = part.reshape(*cells.shape[:-1], part.shape[-1])
    np.fft.rfft(cells, axis=-1, norm=_NORM, out=first)
    for axis in range(3, 2 + rank):
        np.fft.fft(part, axis=axis, norm=_NORM, out=other)
        part, other = other, part
    if scale is not None:
        np.conjugate(part, out=part)
        np.multiply(part, part.real.dtype.type(scale), out=part)
    if part is not spectra:
        np.copyto(spectra, part)


def _transform_back(spectra: Array, between: Array, cells: Array, rank: int) -> None:
    """Real elements (*head, *lengths) of spectra (*head, *frequencies)."""
    part, other = spectra, between
    if not spectra.flags.c_contiguous or rank > 1:
        part, other = _pair(between, spectra.shape)
        np.copyto(part, spectra)
    for axis in range(3, 2 + rank):
        np.fft.ifft(part, axis=axis, norm=_NORM, out=other)
        part, other = other, part
    np.fft.irfft(part, n=cells.shape[-1], axis=-1, norm=_NORM, out=cells)


def _pair(flat: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Two arrays of this shape in one buffer; with one axis the second is empty."""
    size = math.prod(shape)
    second = flat[size : 2 * size]
    return flat[:size].reshape(shape), (
        second.reshape(shape) if second.size == size else second
    )
