"""Large kernels by the convolution theorem: products of spectra, summed over channels.

Correlation becomes, at every frequency f,

    forward        Y_f = X_f · conj(W_f)     summed over channels: a matrix product
    weight_grad    dW_f = X_f · conj(dY_f)   summed over images and blocks

The output is split into tiles; each reads a window of the input as long as the tile and
the kernel together (overlap and save), so that all tiles use the same spectra of the
weights.  The input gradient is the forward pass over dy with flipped weights.  With
strides, the result is subsampled; with dilation, zeros are inserted between taps.

Layout: spectra are (frequencies, G, images or filters, channels), so that a frequency
is one matrix product.

Source: T. Stockham, "High-speed convolution and correlation", 1966; M. Mathieu,
M. Henaff, Y. LeCun, "Fast training of convolutional networks through FFTs", 2013.
"""

import math
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Literal

import numpy as np

from cuconv.arrays import Array, DType
from cuconv.backends import Backend
from cuconv.engine.costs import Work
from cuconv.engine.problem import Problem, in_groups
from cuconv.geometry import Block, ConvGeometry, Tile
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
# The least output elements of a tile along each axis, if the output is that long.
_LEAST_TILE = 32
# Without scaling, NumPy 2.4 transforms float32 through whole copies in float64.
_NORM: Literal["ortho"] = "ortho"
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


def _lengths(geometry: ConvGeometry, tile: Tile) -> tuple[int, ...]:
    """The length of the transforms: the input window of a tile, rounded up."""
    return tuple(
        _smooth((cells - 1) * axis.stride + axis.extent)
        for axis, cells in zip(geometry.axes, tile.cells, strict=True)
    )


def _frequencies(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return (*lengths[:-1], lengths[-1] // 2 + 1)


# The cost of reading a spectrum of a weight again, relative to a weight.
_SPECTRA = 7


class Fft(ForwardOnly, OneWay):
    """See `cuconv.strategies.Strategy`."""

    name = "fft"
    libraries: tuple[str, ...] = ()
    capturable = False
    gains_from_size = False  # the cost of an element grows with the transform's length

    def supports(self, problem: Problem) -> tuple[bool, str]:
        reason = next(_refusals(problem), "")
        return not reason, reason

    def tilings(self, problem: Problem, variant: None, backend: Backend) -> Tilings:
        del variant
        g = problem.geometry
        # Tiles as long as the kernel waste half of every transform.
        cells = (max(3 * axis.extent, _LEAST_TILE) // axis.stride for axis in g.axes)
        tile = math.prod(
            min(c, axis.out) for c, axis in zip(cells, g.axes, strict=True)
        )
        spectrum = 8 * max(g.channels, g.filters) * problem.operand.itemsize
        images = backend.block_bytes // max(spectrum * tile, 1)
        positions = tile * min(max(images, 1), g.images)
        splits = 2 if problem.op == "weight_grad" else 1
        return Tilings(positions, partial(_square_tile, g), splits)

    def workspace(
        self, problem: Problem, tiling: Tiling, backend: Backend
    ) -> Workspace:
        del backend
        g, dtype = problem.geometry, problem.operand
        wide = _COMPLEX[dtype.char]
        lengths = _lengths(g, tiling.tile)
        cells, spectrum = math.prod(lengths), math.prod(_frequencies(lengths))
        images = tiling.tile.images
        weights = g.filters * g.group_channels
        most = max(images * g.channels, images * g.filters, _strip(problem))
        real = Buffer("real", most * cells, dtype)
        # Two buffers, used in turn: NumPy copies operands of transforms in place.
        pair = 2 if g.rank > 1 else 1
        between = Buffer("between", pair * most * spectrum, wide)
        x = Buffer("x", images * g.channels * spectrum, wide)
        y = Buffer("y", images * g.filters * spectrum, wide)
        if problem.op == "weight_grad":
            sums = Buffer("sums", tiling.splits * weights * spectrum, wide)
            product = Buffer("product", weights * spectrum, wide)
            return Workspace((), (sums,), (real, between, x, y, product))
        kept = Buffer("w", weights * spectrum, wide)
        return Workspace((kept,), bias_buffer(problem), (real, between, x, y))

    def work(self, problem: Problem, tiling: Tiling) -> Work:
        g = problem.geometry
        lengths = _lengths(g, tiling.tile)
        cells = math.prod(lengths)
        blocks = g.count_blocks(tiling.tile)
        images, weights = tiling.tile.images, g.filters * g.group_channels
        adds = problem.op == "weight_grad"
        spectra = blocks * images * (g.channels + g.filters) + weights
        return Work(
            multiply=2 * blocks * images * weights * cells,
            short_side=min(images, g.group_filters, g.group_channels),
            fourier=spectra * cells * math.log2(max(cells, 2)),
            copy=2 * spectra * cells + (3 * blocks * weights * cells if adds else 0),
            reread=_SPECTRA * blocks * weights * cells,
            blocks=blocks,
            pieces=tiling.splits if adds else blocks,
        )

    def weights(self, job: Job, w: Array, kept: dict[str, Array]) -> Array:
        """Conjugate spectra as (frequencies, G, C, K)."""
        problem, g = job.problem, job.problem.geometry
        lengths = _lengths(g, job.tiling.tile)
        view = filters_of(w, problem)
        shape = (*_frequencies(lengths), g.groups, g.group_channels, g.group_filters)
        spectra = kept["w"].reshape(shape)
        places = _tap_slices(g)
        step = max(1, _strip(problem) // max(g.groups * g.group_channels, 1))

        def body(number: int, start: int, own: dict[str, Array]) -> None:
            del number
            part = view[:, start : start + step]
            cells = _cells(own["real"], part.shape[:3], lengths)
            job.backend.fill(cells, 0)
            job.backend.copy(part, cells[places])
            into = spectra[..., start : start + step]
            into = into.swapaxes(-1, -2)
            job.backend.do(_transform, cells, into, own["between"], _scale(lengths))

        with job.backend.stage("weights", self.name):
            job.each(range(0, g.group_filters, step), body)
        return spectra

    def forward(
        self, job: Job, x: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        g = job.problem.geometry
        lengths = _lengths(g, job.tiling.tile)
        offset = take_bias(job, bias)
        x, y = in_groups(x, g), in_groups(out, g)
        strides = tuple(axis.stride for axis in g.axes)

        def body(chunk: int, block: Block, own: dict[str, Array]) -> None:
            with job.backend.stage("transform", self.name, chunk):
                spectra = _window_spectra(job, x, block, lengths, own)
            with job.backend.stage("gemm", self.name, chunk):
                count = block.images[1] - block.images[0]
                shape = (*_frequencies(lengths), g.groups, count, g.group_filters)
                product = own["y"][: math.prod(shape)].reshape(shape)
                job.backend.do(np.matmul, spectra, weights, product)
            with job.backend.stage("transform", self.name, chunk):
                head = (count, g.groups, g.group_filters)
                cells = _back(job, product, own, head, lengths)
                picked = tuple(
                    slice(0, (size - 1) * stride + 1, stride)
                    for size, stride in zip(block.shape, strides, strict=True)
                )
                into = output_cells(y, block)
                result = cells[(..., *picked)]
                if offset is not None:
                    ones = (1,) * g.rank
                    own_bias = offset.reshape(*offset.shape[:3], *ones)
                    job.backend.do(np.add, result, own_bias, result)
                job.backend.copy(result, into)

        job.each(job.blocks, body)

    def weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        g, splits = job.problem.geometry, job.tiling.splits
        lengths = _lengths(g, job.tiling.tile)
        frequencies = _frequencies(lengths)
        x, dy = in_groups(x, g), in_groups(dy, g)
        shape = (*frequencies, g.groups, g.group_channels, g.group_filters)
        sums = job.shared["sums"].reshape(splits, *shape)
        strides = tuple(axis.stride for axis in g.axes)

        def body(number: int, split: int, own: dict[str, Array]) -> None:
            del number
            job.backend.fill(sums[split], 0)
            for chunk, block in islice(enumerate(job.blocks), split, None, splits):
                with job.backend.stage("transform", self.name, chunk):
                    spectra = _window_spectra(job, x, block, lengths, own)
                    gradients = _dilated_spectra(job, dy, block, lengths, strides, own)
                with job.backend.stage("gemm", self.name, chunk):
                    product = own["product"].reshape(shape)
                    job.backend.do(
                        np.matmul, spectra.swapaxes(-1, -2), gradients, product
                    )
                    job.backend.do(np.add, sums[split], product, sums[split])

        job.each(range(splits), body)
        add_splits(job, list(sums))
        view = filters_of(out, job.problem)
        places = _tap_slices(g)
        step = max(1, _strip(job.problem) // max(g.groups * g.group_channels, 1))

        def finish(number: int, start: int, own: dict[str, Array]) -> None:
            del number
            part = sums[0][..., start : start + step].swapaxes(-1, -2)
            head = (part.shape[g.rank], *part.shape[g.rank + 1 :])
            cells = _back(job, part, own, head, lengths, swap=False)
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
    if problem.precision != "fast":
        yield "it needs precision='fast'"
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


def _window_spectra(
    job: Job, x: Array, block: Block, lengths: tuple[int, ...], own: dict[str, Array]
) -> Array:
    """Spectra of the input under a block: (frequencies, G, images, C)."""
    g = job.problem.geometry
    cells = _cells(
        own["real"], (block.images[1] - block.images[0], *x.shape[1:3]), lengths
    )
    job.backend.fill(cells, 0)
    inside = tuple(
        slice(before, before + stop - start)
        for (before, _), (start, stop) in zip(block.padding, block.window, strict=True)
    )
    source = x[slice(*block.images)][(..., *(slice(*span) for span in block.window))]
    job.backend.copy(source, cells[(..., *inside)])
    count = cells.shape[0]
    shape = (*_frequencies(lengths), g.groups, count, g.group_channels)
    spectra = own["x"][: math.prod(shape)].reshape(shape)
    job.backend.do(_transform, cells.swapaxes(0, 1), spectra, own["between"], None)
    return spectra


def _dilated_spectra(
    job: Job,
    dy: Array,
    block: Block,
    lengths: tuple[int, ...],
    strides: tuple[int, ...],
    own: dict[str, Array],
) -> Array:
    """Conjugate spectra of dy, a stride apart: (frequencies, G, images, K)."""
    g = job.problem.geometry
    part = output_cells(dy, block)
    cells = _cells(own["real"], part.shape[:3], lengths)
    job.backend.fill(cells, 0)
    places = tuple(
        slice(0, (size - 1) * stride + 1, stride)
        for size, stride in zip(block.shape, strides, strict=True)
    )
    job.backend.copy(part, cells[(..., *places)])
    shape = (*_frequencies(lengths), g.groups, cells.shape[0], g.group_filters)
    spectra = own["y"][: math.prod(shape)].reshape(shape)
    job.backend.do(
        _transform, cells.swapaxes(0, 1), spectra, own["between"], _scale(lengths)
    )
    return spectra


def _scale(lengths: tuple[int, ...]) -> float:
    """Three transforms, each divided by √n; the product must be divided by n."""
    return math.sqrt(math.prod(lengths))


def _transform(
    cells: Array,
    spectra: Array,
    between: Array,
    scale: float | None,
) -> None:
    """Spectra (frequencies, a, b, c) of real elements (a, b, c, *lengths).

    With a scale, their conjugates times that.
    """
    rank = cells.ndim - 3
    frequencies = _frequencies(cells.shape[3:])
    part, other = _pair(between, (*cells.shape[:3], *frequencies))
    np.fft.rfft(cells, axis=-1, norm=_NORM, out=part)
    for axis in range(3, 2 + rank):
        np.fft.fft(part, axis=axis, norm=_NORM, out=other)
        part, other = other, part
    if scale is not None:
        np.conjugate(part, out=part)
        np.multiply(part, part.real.dtype.type(scale), out=part)
    np.copyto(spectra, part.transpose(*range(3, 3 + rank), 0, 1, 2))


def _back(
    job: Job,
    spectra: Array,
    own: dict[str, Array],
    head: tuple[int, ...],
    lengths: tuple[int, ...],
    *,
    swap: bool = True,
) -> Array:
    """Real elements (a, b, c, *lengths) of spectra (frequencies, b, a, c)."""
    rank = len(lengths)
    order = (rank + 1, rank, rank + 2) if swap else (rank, rank + 1, rank + 2)
    cells = _cells(own["real"], head, lengths)
    spectra = spectra.transpose(*order, *range(rank))
    job.backend.do(_transform_back, spectra, own["between"], cells)
    return cells


def _transform_back(spectra: Array, between: Array, cells: Array) -> None:
    """Real elements (a, b, c, *lengths) of spectra (a, b, c, *frequencies)."""
    part, other = _pair(between, spectra.shape)
    np.copyto(part, spectra)
    for axis in range(3, cells.ndim - 1):
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
