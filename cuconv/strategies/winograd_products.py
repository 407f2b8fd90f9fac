"""Winograd's transforms as small matrix products, over NumPy.

Layout, with i and j the frequencies along the two axes, tw and th the tiles, d the
elements of the outer axis:

    Q (a; n, th, g, d, c, w)      rows of x: th-th tile's a-th, copied in whole runs
    R (i; n, th, g, d, c, w)      transformed along the rows' axis: one product
    V (j, i; tw, n, th, g, d, c)  transformed along the last axis: one for each i, tw
    M (j, i; tw, n, th, g, d, k)  the products
    Z (i; n, th, g, d, k, w)      the way back, in the opposite order
    Y (a; n, th, g, d, k, w)
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from cuconv.arrays import Array, strided
from cuconv.engine.problem import Problem
from cuconv.memory import Buffer
from cuconv.strategies.base import (
    Job,
    Tiling,
    copy_transposed,
    filters_of,
    outer_view,
    partial_cells,
    read_again,
)
from cuconv.strategies.winograd_tiles import Piece, Shape

# BLAS transforms this many columns at a time without packing them.
_COLUMNS = 24_576


class Products:
    """See `cuconv.strategies.winograd_tiles.Transforms`."""

    def shared(self, problem: Problem) -> tuple[Buffer, ...]:
        g = problem.geometry
        return (Buffer("transposed", g.filters * g.patch, problem.operand),)

    def own(self, problem: Problem, tiling: Tiling, shape: Shape) -> tuple[Buffer, ...]:
        g, dtype = problem.geometry, problem.operand
        cells = _sizes(problem, tiling, shape)
        cells["bands"] = _band_cells(shape)
        if problem.op == "weight_grad":
            kept, positions = shape.weight_cells, tiling.tile.positions
            cells["partial"] = partial_cells(kept, g.group_filters, positions)
        return tuple([Buffer(name, count, dtype) for name, count in cells.items()])

    def weights(self, job: Job, w: Array, flat: Array, shape: Shape) -> Array:
        problem, g = job.problem, job.problem.geometry
        view = outer_view(filters_of(w, problem), len(job.tiling.variant))
        # (G, K, C, outer, rows, last) becomes (last, rows, G, outer, C, K).
        transposed = job.shared["transposed"].reshape(
            [view.shape[i] for i in (5, 4, 0, 3, 2, 1)]
        )
        copy_transposed(job, view, transposed.transpose(2, 5, 4, 3, 1, 0))
        u = flat.reshape(shape.frequencies, -1)
        last, rows = transposed.shape[:2]
        _bands(job, transposed.reshape(last, rows, -1), u, shape)
        outer = shape.axes[0].kernel * g.group_channels
        return u.reshape(shape.frequencies, g.groups, outer, g.group_filters)

    def inputs(
        self, job: Job, x: Array, piece: Piece, buffers: dict[str, Array]
    ) -> Array:
        return _stacked(job, _inputs(job, x, piece, buffers), piece)

    def gradients(
        self, job: Job, dy: Array, piece: Piece, buffers: dict[str, Array]
    ) -> Array:
        return _matrices_of(job, _gradients(job, dy, piece, buffers), piece)

    def room(
        self, job: Job, y: Array, piece: Piece, buffers: dict[str, Array]
    ) -> Array:
        del y
        return _matrices_of(job, _room(job, piece, buffers), piece)

    def outputs(
        self,
        job: Job,
        bias: Array | None,
        y: Array,
        piece: Piece,
        buffers: dict[str, Array],
    ) -> None:
        into = outer_view(y, len(job.tiling.variant))
        _outputs(job, bias, into, piece, buffers)

    def sums(self, job: Job, flat: Array, out: Array, shape: Shape) -> Array:
        del out
        g = job.problem.geometry
        outer = shape.axes[0].kernel * g.group_channels
        return flat.reshape(shape.frequencies, g.groups, outer, g.group_filters)

    def taps(self, job: Job, flat: Array, out: Array, shape: Shape) -> None:
        _finish(job, flat, out, shape)


def products_work(
    problem: Problem, tiling: Tiling, shape: Shape, blocks: int
) -> dict[str, Any]:
    """The cost of these transforms, as fields of `cuconv.engine.costs.Work`."""
    g, grad, kept = problem.geometry, problem.op == "weight_grad", shape.weight_cells
    sizes, ways = _sizes(problem, tiling, shape), 1 + grad
    rows = blocks * (sizes["q"] + sizes["y"])
    tiles = g.images * math.prod(shape.counts)
    # Sums over one tiled axis are many short products: x of 8 × 64 × 56 × 56 takes 1.3
    # and 8 × 256 × 14 × 14 2.1 times as long as their size says (Intel Xeon).
    slower = 1.6 if grad and len(tiling.variant) == 1 else 1.0
    # A block of a gradient reads the sum and the product, and writes the sum.
    times = 3 * (blocks + tiling.splits) if grad else blocks
    return {
        "multiply": tiles * kept * slower,
        "reread": read_again(problem, kept, times),
        "copy": rows,
        "transform": rows + shape.weight_cells * 1.5,
        "last_transform": blocks * (sizes["v"] + sizes["z"] * ways),
        "transpose": g.filters * g.patch,
        # Dozens of short steps each, which compete for the interpreter's lock.
        "blocks": blocks * (1 + len(tiling.variant)) * ways,
    }


def _sizes(problem: Problem, tiling: Tiling, shape: Shape) -> dict[str, int]:
    """The number of elements of every buffer of a worker, for the largest block."""
    g, (images, cells) = problem.geometry, tiling.tile
    (rows_out, last_out), (rows_in, last_in) = shape.outputs, shape.inputs
    tiled = len(tiling.variant)
    outer_out = cells[0] if g.rank > tiled else 1
    axis = shape.axes[0]
    outer_in = (outer_out - 1) * axis.stride + axis.extent
    rows = cells[-2] if tiled == 2 else 1
    runs, wide = images * -(-rows // rows_out), -(-cells[-1] // last_out)
    inputs = rows_in * runs * outer_in * g.channels
    outputs = runs * outer_out * g.filters * wide
    q = inputs * (wide * last_out + last_in - last_out)
    return {
        "q": q,
        "r": q if rows_in > 1 else 0,
        "v": last_in * wide * inputs,
        "z": rows_in * outputs * last_out,
        "y": rows_out * outputs * last_out if rows_in > 1 else 0,
        "m": rows_in * last_in * outputs,
    }


def _band_cells(shape: Shape) -> int:
    """The buffer for a strip of weights transformed along rows."""
    taps = shape.tiles[1].filter.shape[1]
    cells: int = shape.inputs[0] * taps * (_COLUMNS // shape.frequencies)
    return cells


def _within(first: int, step: int, count: int, size: int) -> tuple[int, int]:
    """The range of i < count for which ``first + step · i`` is in [0, size)."""
    start = min(max(-(first // step), 0), count)
    stop = min(max(-((first - size) // step), start), count)
    return start, stop


def _inputs(job: Job, x: Array, piece: Piece, buffers: dict[str, Array]) -> Array:
    """V: the input tiles under a block, transformed."""
    x, shape = outer_view(x, len(job.tiling.variant)), piece.shape
    steps, sizes = shape.outputs, shape.inputs
    width = (piece.wide - 1) * steps[1] + sizes[1]
    shown = _rows_shape(piece, x, piece.outer_in, sizes[0], width)
    q = buffers["q"][: math.prod(shown)].reshape(shown)
    firsts = [a.first(s[0]) for a, s in zip(shape.axes, piece.spans, strict=True)]
    _copy_rows(job, x, q, firsts, steps[0])
    rows = None if shape.tiles[0] is None else shape.tiles[0].input
    last = shape.tiles[1].input
    both = buffers["r"], buffers["v"]
    return _transformed(job, q, (rows, last), steps[1], piece.wide, both)


def _gradients(job: Job, dy: Array, piece: Piece, buffers: dict[str, Array]) -> Array:
    """D: the tiles of dy in a block, transformed by the adjoint of the outputs'."""
    dy, shape = outer_view(dy, len(job.tiling.variant)), piece.shape
    height, width = shape.outputs
    sizes = _rows_shape(piece, dy, piece.outer_out, height, piece.wide * width)
    flat = buffers["y"] if shape.tiles[0] is not None else buffers["z"]
    q = flat[: math.prod(sizes)].reshape(sizes)
    _copy_rows(job, dy, q, [0, 0, 0], height)
    rows = None if shape.tiles[0] is None else shape.tiles[0].output.T
    last = shape.tiles[1].output.T
    both = buffers["z"], buffers["m"]
    return _transformed(job, q, (rows, last), width, piece.wide, both)


def _rows_shape(
    piece: Piece, cells: Array, outer: int, rows: int, width: int
) -> tuple[int, ...]:
    """The shape of Q or Y: (a, n, th, g, d, c, w)."""
    return rows, piece.images, piece.tall, cells.shape[1], outer, cells.shape[2], width


def _copy_rows(job: Job, x: Array, q: Array, firsts: list[int], step: int) -> None:
    """Copy x (N, G, C, outer, rows, last) to Q, with zeros outside x."""
    rows, _, tall, _, outer, _, width = q.shape
    height = x.shape[4]
    d0, d1 = _within(firsts[0], 1, outer, x.shape[3])
    w0, w1 = _within(firsts[2], 1, width, x.shape[5])
    for axis, start, stop in ((4, d0, d1), (6, w0, w1)):
        for gap in (slice(0, start), slice(stop, q.shape[axis])):
            if gap.start < gap.stop:
                job.backend.fill(q[(slice(None),) * axis + (gap,)], 0)
    x = x[:, :, :, firsts[0] + d0 : firsts[0] + d1]
    x = x[..., firsts[2] + w0 : firsts[2] + w1].transpose(0, 4, 1, 3, 2, 5)
    into = q[:, :, :, :, d0:d1, :, w0:w1]
    # Tiles inside x are one copy; each tile that crosses its border is another.
    t0 = min(max(-(firsts[1] // step), 0), tall)
    t1 = min(max((height - rows - firsts[1]) // step + 1, t0), tall)
    if t1 > t0 and into.size:
        tiles = _tiles_of(x[:, firsts[1] + step * t0 :], t1 - t0, rows, step)
        job.backend.copy(tiles, into[:, :, t0:t1])
    for t in (*range(t0), *range(t1, tall)):
        first = firsts[1] + step * t
        a0, a1 = _within(first, 1, rows, height)
        job.backend.fill(q[:a0, :, t], 0)
        job.backend.fill(q[a1:, :, t], 0)
        if a1 > a0 and into.size:
            part = x[:, first + a0 : first + a1].swapaxes(0, 1)
            job.backend.copy(part, into[a0:a1, :, t])


def _tiles_of(x: Array, tall: int, rows: int, step: int) -> Array:
    """View x (n, rows, …) as (a, n, th, …): row a of every tile."""
    image, row, *rest = x.strides
    shape = (rows, x.shape[0], tall, *x.shape[2:])
    strides = (row, image, step * row, *rest)
    tiles: Array = strided(x, shape, strides)
    return tiles


def _transformed(
    job: Job,
    q: Array,
    matrices: tuple[Array | None, Array],
    step: int,
    wide: int,
    buffers: tuple[Array, Array],
) -> Array:
    """Transform (a, …, w) to (j, i, tw, …): from the first buffer to the second."""
    (rows, last), (between, into) = matrices, buffers
    width, lines = q.shape[-1], q[0].size // q.shape[-1]
    if rows is not None:
        q = _product_of(job, rows, q.reshape(q.shape[0], -1), between)
    count = q.shape[0]
    q = q.reshape(count, lines, width)
    windows = _windows_of(q, wide, last.shape[1], step)
    v = into[: last.shape[0] * count * wide * lines]
    v = v.reshape(last.shape[0], count, wide, lines)
    job.backend.do(np.matmul, last, windows, v.transpose(1, 2, 0, 3))
    return v


def _windows_of(rows: Array, wide: int, size: int, step: int) -> Array:
    """View (i, lines, w) as (i, tw, size, lines): the tiles of every line."""
    i, line, cell = rows.strides
    shape = (rows.shape[0], wide, size, rows.shape[1])
    windows: Array = strided(rows, shape, (i, step * cell, cell, line))
    return windows


def _product_of(job: Job, matrix: Array, cells: Array, into: Array) -> Array:
    """``matrix @ cells``, in blocks of columns that BLAS multiplies without packing.

    In one call if the columns can be split evenly: each call takes the interpreter's
    lock, for which workers wait.
    """
    columns = cells.shape[1]
    out = into[: matrix.shape[0] * columns].reshape(-1, columns)
    least = -(-columns // _COLUMNS)
    even = [n for n in range(least, 2 * least + 8) if n and columns % n == 0]
    if even:
        apart = cells.reshape(cells.shape[0], even[0], -1).swapaxes(0, 1)
        target = out.reshape(out.shape[0], even[0], -1).swapaxes(0, 1)
        job.backend.do(np.matmul, matrix, apart, target)
        return out
    for start in range(0, columns, _COLUMNS):
        part = slice(start, start + _COLUMNS)
        job.backend.do(np.matmul, matrix, cells[:, part], out[:, part])
    return out


def _stacked(job: Job, v: Array, piece: Piece) -> Array:
    """View V as (frequency, g, outer output, tile, outer taps · c)."""
    shape, groups = piece.shape, job.problem.geometry.groups
    axis = shape.axes[0]
    tiles = piece.wide * piece.images * piece.tall
    cells = v.reshape(shape.frequencies, tiles, groups, piece.outer_in, -1)
    frequency, tile, group, outer, channel = cells.strides
    sizes = (
        shape.frequencies,
        groups,
        piece.outer_out,
        tiles,
        axis.kernel * cells.shape[-1],
    )
    strides = (frequency, group, outer * axis.stride, tile, channel)
    stacked: Array = strided(cells, sizes, strides)
    return stacked


def _room(job: Job, piece: Piece, buffers: dict[str, Array]) -> Array:
    """The part of the buffer for M that a block needs."""
    tiles = piece.wide * piece.images * piece.tall
    cells = piece.shape.frequencies * tiles * piece.outer_out
    return buffers["m"][: cells * job.problem.geometry.filters]


def _matrices_of(job: Job, flat: Array, piece: Piece) -> Array:
    """View M or D as (frequency, g, outer output, tile, k)."""
    tiles = piece.wide * piece.images * piece.tall
    groups = job.problem.geometry.groups
    cells = flat.reshape(piece.shape.frequencies, tiles, groups, piece.outer_out, -1)
    return cells.transpose(0, 2, 3, 1, 4)


def _outputs(
    job: Job, bias: Array | None, y: Array, piece: Piece, buffers: dict[str, Array]
) -> None:
    """Transform M back, and write the block of y (N, G, K, outer, rows, last)."""
    do, shape = job.backend.do, piece.shape
    rows, last = shape.tiles
    (count, size), (height, width) = shape.inputs, shape.outputs
    m = _room(job, piece, buffers).reshape(size, count, piece.wide, -1)
    z = buffers["z"][: count * m.shape[3] * piece.wide * width]
    z = z.reshape(count, m.shape[3], piece.wide, width)
    do(np.matmul, m.transpose(1, 2, 3, 0), last.output.T, z.swapaxes(1, 2))
    cells = z.reshape(count, -1)
    if rows is not None:
        cells = _product_of(job, rows.output, cells, buffers["y"])
    sizes = _rows_shape(piece, y, piece.outer_out, height, piece.wide * width)
    cells = cells.reshape(sizes)
    if bias is not None:
        # (1, G, K, 1), broadcast to (a, n, th, g, d, k, w).
        do(np.add, cells, bias[0][:, None], cells)
    cells = cells[..., : y.shape[5]]
    whole = y.shape[4] // height
    if whole:
        # Whole tiles are one copy: (N, G, K, outer, th, a, last).
        tiles = y[..., : whole * height, :]
        tiles = tiles.reshape(*y.shape[:4], whole, height, y.shape[5])
        job.backend.copy(cells[:, :, :whole], tiles.transpose(5, 0, 4, 1, 3, 2, 6))
    rest = y[..., whole * height :, :].transpose(4, 0, 1, 3, 2, 5)
    if rest.size:
        job.backend.copy(cells[: len(rest), :, whole], rest)


def _strips(cells: int, shape: Shape) -> Iterator[slice]:
    step = _COLUMNS // shape.frequencies
    return (slice(i, i + step) for i in range(0, cells, step))


def _bands(job: Job, taps: Array, u: Array, shape: Shape) -> None:
    """U from weights (last taps, row taps, elements): two small products a strip."""
    do = job.backend.do
    rows, last = shape.tiles
    (count, size) = shape.inputs
    out = u.reshape(size, count, -1)

    def body(number: int, strip: slice, own: dict[str, Array]) -> None:
        del number
        part = taps[..., strip]
        if rows is not None:
            band = own["bands"][: part.shape[0] * count * part.shape[2]]
            band = band.reshape(part.shape[0], count, part.shape[2])
            do(np.matmul, rows.filter, part, band)
            part = band
        into = out[..., strip].swapaxes(0, 1)
        do(np.matmul, last.filter, part.swapaxes(0, 1), into)

    job.each(_strips(taps.shape[2], shape), body, u.size)


def _finish(job: Job, total: Array, out: Array, shape: Shape) -> None:
    """Write Gᵀ dU G, every filter, to the gradient for the weights."""
    do, problem = job.backend.do, job.problem
    rows, last = shape.tiles
    count, size = shape.inputs
    view = outer_view(filters_of(out, problem), len(job.tiling.variant))
    taps = job.shared["transposed"].reshape([view.shape[i] for i in (5, 4, 0, 3, 2, 1)])
    flat = taps.reshape(*taps.shape[:2], -1)
    source = total.reshape(size, count, -1)

    def body(number: int, strip: slice, own: dict[str, Array]) -> None:
        del number
        part = source[..., strip]
        band = own["bands"][: count * flat.shape[0] * part.shape[2]]
        band = band.reshape(count, flat.shape[0], part.shape[2])
        do(np.matmul, last.filter.T, part.swapaxes(0, 1), band)
        across = band.swapaxes(0, 1)
        if rows is None:
            job.backend.copy(across, flat[..., strip])
        else:
            do(np.matmul, rows.filter.T, across, flat[..., strip])

    job.each(_strips(flat.shape[2], shape), body, total.size)
    copy_transposed(job, taps.transpose(2, 5, 4, 3, 1, 0), view)
