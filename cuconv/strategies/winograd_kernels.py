"""Winograd's transforms as kernels, which read and write arrays of any strides.

One launch transforms all tiles of a block, so that V and M are the only buffers.  Their
axes have the order of the arrays', so that memory accesses are coalesced on both sides:

    spatial axes innermost     V (f; g, d, c, tile)   M (f; g, o, k, tile)
    channels innermost  V (f; g, tile, d, c)   M (f; g, tile, o, k)

with the tiles of all images in one row.  U is the same with filters for tiles.  In
either order the taps and channels that a product sums over are one axis, and the
frequencies of all groups are one batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any, NamedTuple

from cuconv.arrays import Array, stored, strided
from cuconv.backends import TileTransforms
from cuconv.engine.costs import LAUNCHES
from cuconv.engine.problem import Problem
from cuconv.memory import Buffer
from cuconv.strategies.base import (
    Job,
    Tiling,
    filters_of,
    outer_view,
    output_buffer,
)
from cuconv.strategies.winograd_tiles import Matrices, Piece, Shape, three_ranges


@dataclass(frozen=True)
class TileKernels:
    """See `cuconv.strategies.winograd_tiles.Transforms`."""

    kernels: TileTransforms

    def shared(self, problem: Problem) -> tuple[Buffer, ...]:
        if problem.op == "forward":
            is_cast = "w" in problem.needs_cast
        else:
            is_cast = problem.types.result != problem.operand
        cells = problem.geometry.filters * problem.geometry.patch
        return (Buffer("taps", cells, problem.operand),) if is_cast else ()

    def own(self, problem: Problem, tiling: Tiling, shape: Shape) -> tuple[Buffer, ...]:
        dtype, tile = problem.operand, tiling.tile
        sizes = _sizes(problem, tiling, shape)
        buffers = [Buffer(name, sizes[name], dtype) for name in ("v", "m")]
        if "x" in problem.needs_cast:
            buffers.append(Buffer("x", _window_cells(problem, tiling), dtype))
        if "dy" in problem.needs_cast:
            buffers.append(output_buffer(problem, "dy", tile))
        if problem.op == "forward" and problem.types.result != dtype:
            buffers.append(output_buffer(problem, "y", tile))
        return tuple(buffers)

    def weights(self, job: Job, w: Array, flat: Array, shape: Shape) -> Array:
        view = filters_of(w, job.problem)
        if "taps" in job.shared:
            view = _staged_filters(job)
            job.backend.copy(filters_of(w, job.problem), view)
        u, taps = _filters(job, view, flat, shape)
        self.kernels.split(
            taps, u.tiles, _both(shape, lambda t: t.filter), (0, 0, 0), (1, 1)
        )
        return _weights_of(u)

    def inputs(
        self, job: Job, x: Array, piece: Piece, buffers: dict[str, Array]
    ) -> Array:
        shape, tiled, block = piece.shape, len(job.tiling.variant), piece.block
        x = x[(..., *(slice(*span) for span in block.window))]
        cells = outer_view(_cast(job, x, buffers.get("x")), tiled)
        windows = three_ranges(block.window, tiled)
        outer, rows, last = (
            axis.first(span[0]) - window[0]
            for axis, span, window in zip(shape.axes, piece.spans, windows, strict=True)
        )
        v = _laid(
            buffers["v"],
            shape,
            (*cells.shape[:3], piece.outer_in, piece.tall, piece.wide),
            window=(shape.axes[0].kernel, shape.axes[0].stride),
            by_channel=_is_by_channel(cells),
        )
        firsts = outer, rows, last
        self.kernels.split(
            cells, v.tiles, _both(shape, lambda t: t.input), firsts, shape.outputs
        )
        return v.matrices

    def gradients(
        self, job: Job, dy: Array, piece: Piece, buffers: dict[str, Array]
    ) -> Array:
        shape = piece.shape
        cells = outer_view(_cast(job, dy, buffers.get("dy")), len(job.tiling.variant))
        d = _outputs(cells, piece, buffers)
        self.kernels.split(
            cells, d.tiles, _both(shape, lambda t: t.output.T), (0, 0, 0), shape.outputs
        )
        return d.matrices

    def room(
        self, job: Job, y: Array, piece: Piece, buffers: dict[str, Array]
    ) -> Array:
        cells = outer_view(y, len(job.tiling.variant))
        return _outputs(cells, piece, buffers).matrices

    def outputs(
        self,
        job: Job,
        bias: Array | None,
        y: Array,
        piece: Piece,
        buffers: dict[str, Array],
    ) -> None:
        shape, tiled = piece.shape, len(job.tiling.variant)
        m = _outputs(outer_view(y, tiled), piece, buffers)
        target = _staged(job, y, buffers["y"]) if "y" in buffers else y
        cells = outer_view(target, tiled)
        self.kernels.join(
            m.tiles, cells, _both(shape, lambda t: t.output), shape.outputs, bias
        )
        if target is not y:
            job.backend.copy(target, y)

    def sums(self, job: Job, flat: Array, out: Array, shape: Shape) -> Array:
        u, _ = _filters(job, filters_of(out, job.problem), flat.reshape(-1), shape)
        return _weights_of(u)

    def taps(self, job: Job, flat: Array, out: Array, shape: Shape) -> None:
        view = filters_of(out, job.problem)
        u, taps = _filters(job, view, flat.reshape(-1), shape)
        if "taps" in job.shared:
            staged = _staged_filters(job)
            taps = outer_view(staged.swapaxes(0, 1), len(job.tiling.variant))
        self.kernels.join(
            u.tiles, taps, _both(shape, lambda t: t.filter.T), (1, 1), None
        )
        if "taps" in job.shared:
            job.backend.copy(staged, view)


def kernels_work(
    problem: Problem, tiling: Tiling, shape: Shape, blocks: int
) -> dict[str, Any]:
    """The cost of these transforms, in elements read and written."""
    g, sizes = problem.geometry, _sizes(problem, tiling, shape)
    cells = g.images * (g.channels * g.cells + g.filters * g.positions)
    weights = shape.weight_cells + g.filters * g.patch
    products = tiling.tile.cells[0] if g.rank > len(tiling.variant) else 1
    if problem.op == "forward":
        # A batch along the longer of the outer axis, and frequencies and groups.
        products = min(products, shape.frequencies * g.groups)
    return {
        "transform": (blocks * (sizes["v"] + sizes["m"]) + cells + weights) / 2,
        "blocks": (blocks * (2 + products) + 1) / LAUNCHES,
    }


class _Laid(NamedTuple):
    """Frequencies in a buffer, in two views.

    ``tiles`` is (i, j, n, g, c, d, th, tw), and ``matrices`` (f, g, o, tile, taps·c)
    where a window of so many taps slides over d.
    """

    tiles: Array
    matrices: Array


def _laid(
    flat: Array,
    shape: Shape,
    sizes: tuple[int, int, int, int, int, int],
    *,
    by_channel: bool,
    window: tuple[int, int] = (1, 1),
) -> _Laid:
    """View a buffer as frequencies; ``sizes`` are (n, g, c, d, th, tw)."""
    images, groups, channels, planes, tall, wide = sizes
    count = images * tall * wide
    plane, channel, tile = channels * count, count, 1
    if by_channel:
        plane, channel, tile = channels, 1, planes * channels
    group = planes * channels * count
    frequency, (rows, columns) = groups * group, shape.inputs
    taps, stride = window
    places = tall * wide * tile, group, channel, plane, wide * tile, tile
    rolled = frequency, group, stride * plane, tile, channel
    outer = (planes - taps) // stride + 1
    return _Laid(
        _strided(
            flat,
            (rows, columns, *sizes),
            (columns * frequency, frequency, *places),
        ),
        _strided(flat, (rows * columns, groups, outer, count, taps * channels), rolled),
    )


def _strided(flat: Array, shape: tuple[int, ...], steps: tuple[int, ...]) -> Array:
    strides = tuple(step * flat.dtype.itemsize for step in steps)
    view: Array = strided(flat, shape, strides)
    return view


def _is_by_channel(cells: Array) -> bool:
    """True if channels of (n, g, c, d, h, w) have a smaller stride than columns."""
    return bool(abs(cells.strides[2]) < abs(cells.strides[5]))


def _outputs(cells: Array, piece: Piece, buffers: dict[str, Array]) -> _Laid:
    """M, for a block of y or dy (n, g, k, o, h, w)."""
    sizes = (*cells.shape[:3], piece.outer_out, piece.tall, piece.wide)
    by_channel = _is_by_channel(cells)
    return _laid(buffers["m"], piece.shape, sizes, by_channel=by_channel)


def _filters(job: Job, view: Array, flat: Array, shape: Shape) -> tuple[_Laid, Array]:
    """U for weights (G, K, C, *kernel), and their view (K, G, C, outer, h, w)."""
    taps = outer_view(view.swapaxes(0, 1), len(job.tiling.variant))
    sizes = (*taps.shape[:4], 1, 1)
    by_channel = abs(taps.strides[2]) < abs(taps.strides[0])
    window = taps.shape[3], 1
    return _laid(flat, shape, sizes, by_channel=by_channel, window=window), taps


def _both(
    shape: Shape, pick: Callable[[Matrices], Array]
) -> tuple[Array | None, Array]:
    """A transform along the rows' axis, if that is tiled, and along the last."""
    rows, last = shape.tiles
    return None if rows is None else pick(rows), pick(last)


def _weights_of(u: _Laid) -> Array:
    """(f, g, taps·c, k)."""
    return u.matrices[:, :, 0].swapaxes(-1, -2)


def _cast(job: Job, cells: Array, flat: Array | None) -> Array:
    """The array, copied to a buffer of the operands' type if there is one."""
    if flat is None:
        return cells
    copy = _staged(job, cells, flat)
    job.backend.copy(cells, copy)
    return copy


def _staged(job: Job, cells: Array, flat: Array) -> Array:
    """A buffer in the shape of (N, G, C, *spatial), in the axis order of the layout."""
    head, spatial = cells.shape[:3], cells.shape[3:]
    first = job.problem.geometry.channels_first
    return stored(flat, head, (), spatial, channels_first=first).cells


def _staged_filters(job: Job) -> Array:
    """A buffer for weights, as (G, K, C, *kernel)."""
    flat = job.shared["taps"].reshape(job.problem.geometry.w_shape)
    return filters_of(flat, changed(job.problem, flipped=False))


def _sizes(problem: Problem, tiling: Tiling, shape: Shape) -> dict[str, int]:
    """Elements of V and M for the largest block."""
    g, tiled = problem.geometry, len(tiling.variant)
    height, width = shape.outputs
    rows = tiling.tile.cells[-2] if tiled == 2 else 1
    tiles = tiling.tile.images * -(-rows // height) * -(-tiling.tile.cells[-1] // width)
    outer = tiling.tile.cells[0] if g.rank > tiled else 1
    axis = shape.axes[0]
    reach = (outer - 1) * axis.stride + axis.extent
    each = shape.frequencies * tiles
    return {"v": each * reach * g.channels, "m": each * outer * g.filters}


def _window_cells(problem: Problem, tiling: Tiling) -> int:
    """Elements of x under the largest block."""
    g = problem.geometry
    under = (
        (min(cells, axis.out) - 1) * axis.stride + axis.extent
        for axis, cells in zip(g.axes, tiling.tile.cells, strict=True)
    )
    return tiling.tile.images * g.channels * math.prod(under)
