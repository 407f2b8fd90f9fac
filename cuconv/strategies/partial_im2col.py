"""im2col of all axes but the first, whose taps read overlapping rows of it.

L has the columns of the lowered axes and, with a stride s along the first axis, its
rows in s phases: row r of phase p is row r · s + p of the padded input.  Tap t reads
rows q, q + 1, … of phase p, where q · s + p = t · dilation.  With W_q the weights of
the taps that share q, group by group:

    forward        Y  = Σ over q of W_q · L[q : q + out]
    weight_grad    dW_q = dY · L[q : q + out]ᴴ

L is smaller than all columns by the number of q, and BLAS reads it in place.  Where its
rows are the outermost axis, all taps of one output row are one matrix, and the sum over
q is a part of the product.

Source: M. Cho, D. Brand, "MEC: memory-efficient convolution for deep neural network",
2017, section 3.
"""

import math
from collections.abc import Iterator, Sequence
from enum import Enum
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from cuconv.arrays import Array, flattened, strided
from cuconv.backends import Backend
from cuconv.engine.costs import SMALL_PRODUCT, Work
from cuconv.engine.problem import Problem, in_groups
from cuconv.geometry import Block, ConvGeometry, Tile, WindowGeometry
from cuconv.memory import Buffer
from cuconv.strategies.base import (
    OVER_DY,
    ForwardOnly,
    Job,
    Tiling,
    Tilings,
    Workspace,
    add_splits,
    bias_buffer,
    copy_transposed,
    filters_of,
    output_cells,
    partial_cells,
    parts_of,
    read_again,
    sums_in_place,
    take_bias,
    take_weights,
    weight_buffer,
    weight_matrix,
)
from cuconv.strategies.im2col import LONG_ROW, filters_apart, run_cost


class Order(Enum):
    """The positions of a product, as the phrases in a plan."""

    EACH = ""
    WIDE = "images side by side"
    ROWS = "row by row"


EACH, WIDE, ROWS = Order
# Rows of fewer positions are not multiplied one by one.
_LEAST_ROW = 16
# The cost of one more product and sum, relative to that of a block.
_TAP = 0.25
# The cost of packing a weight, relative to reading it from memory.
_PACKED = 5
# Products of few results over many positions are slower, in time per multiply-add of
# large ones on an Intel Xeon (AVX-512): 64 × 192 1.1, 64 × 42 1.5, 1 × 3 4.
_FEW_RESULTS, _LEAST_RESULTS = 1500, 500


class Taps(NamedTuple):
    """Taps along the first axis that read the same rows of L, in these phases."""

    row: int
    phases: slice
    taps: slice


class Lowered(NamedTuple):
    """The geometry of L, and the taps that read it."""

    geometry: WindowGeometry
    taps: tuple[Taps, ...]

    @property
    def halo(self) -> int:
        """Rows of L beyond those of the output."""
        return self.taps[-1].row

    @property
    def window(self) -> int:
        """Elements of L for one position of one channel."""
        return self.geometry.taps

    def tile(self, tile: Tile) -> Tile:
        """The tile of L for a tile of the output."""
        rows, *rest = tile.cells
        return Tile(tile.images, (rows + self.halo, *rest))

    def block(self, block: Block) -> Block:
        """The block of L for a block of the output."""
        (start, stop), *rest = block.output
        return self.geometry.block(block.images, ((start, stop + self.halo), *rest))


@lru_cache(maxsize=1024)
def lowered(g: ConvGeometry) -> Lowered:
    """Lower all axes of a convolution but the first."""
    axis, taps = g.axes[0], list[Taps]()
    for tap in range(axis.kernel):
        row, phase = divmod(tap * axis.dilation, axis.stride)
        last = taps[-1] if taps else None
        if last is not None and last.row == row and axis.dilation == 1:
            more = slice(0, phase + 1), slice(last.taps.start, tap + 1)
            taps[-1] = Taps(row, *more)
        else:
            taps.append(Taps(row, slice(phase, phase + 1), slice(tap, tap + 1)))
    phases = max(each.phases.stop for each in taps)
    end = (axis.out + taps[-1].row - 1) * axis.stride + phases
    first = axis._replace(
        kernel=phases, dilation=1, after=end - axis.size - axis.before, overhang=0
    )
    own = g.images, g.channels, (first, *g.axes[1:]), g.channels_first, g.batched
    return Lowered(WindowGeometry(*own), tuple(taps))


class PartialIm2col(ForwardOnly):
    """See `cuconv.strategies.Strategy`."""

    name = "partial_im2col"
    libraries: tuple[str, ...] = ("cublas",)
    capturable = False
    on_tensor_cores = True
    gains_from_size = True
    by_runs = True

    def supports(self, problem: Problem) -> tuple[bool, str]:
        if problem.op == "input_grad":
            return False, OVER_DY
        axes = problem.geometry.axes
        if not axes or len(lowered(problem.geometry).taps) == 1:
            return False, "windows do not overlap along the first axis"
        return True, ""

    def variants(self, problem: Problem, backend: Backend) -> tuple[Order, ...]:
        del backend
        g, axis = problem.geometry, problem.geometry.axes[0]
        if problem.module != "numpy":
            return (EACH,)
        found = [EACH]
        if g.images > 1 and g.positions < LONG_ROW:
            found.append(WIDE)
        if problem.op == "forward" and g.channels_first and axis.dilation == 1:
            found += [ROWS] * (g.positions >= _LEAST_ROW * axis.out)
        return tuple(found)

    def describe(self, variant: Order) -> str:
        return variant.value

    def tilings(self, problem: Problem, variant: Order, backend: Backend) -> Tilings:
        g = problem.geometry
        cell = g.channels * lowered(g).window + 2 * g.filters
        most = max(1, backend.block_bytes // max(cell * problem.operand.itemsize, 1))
        if problem.op == "forward":
            return Tilings(most, g.tile, filters_apart(problem, g.group_filters))
        if variant == WIDE:
            return Tilings(most, g.tile, 2)
        # The sum over images needs one matrix for each, or a copy of dy.
        return Tilings(most, lambda n: g.tile(n)._replace(images=1), 2)

    def workspace(
        self, problem: Problem, tiling: Tiling, backend: Backend
    ) -> Workspace:
        g, tile, wide = problem.geometry, tiling.tile, problem.types.accumulate
        low, results = lowered(g), tiling.tile.positions * g.filters
        types, part = (problem.source, problem.operand), low.tile(tile)
        rows = Buffer("rows", part.positions * g.channels * low.window, problem.operand)
        own = [rows, *backend.gather_buffers(low.geometry, part, *types)]
        forward = problem.op == "forward"
        if not _in_place(problem, tiling):
            name, dtype = ("y", wide) if forward else ("dy", problem.operand)
            own.append(Buffer(name, results, dtype))
        if backend.needs_partial and tiling.variant != ROWS:
            patch = g.group_channels * low.window
            cells, row = (
                (results, tile.positions) if forward else (g.filters * patch, patch)
            )
            own.append(Buffer("partial", partial_cells(cells, row, row), wide))
        if not forward:
            sums = Buffer("sums", tiling.splits * g.filters * g.patch, wide)
            return Workspace((), (sums,), tuple(own))
        weights = weight_buffer(problem)
        if g.channels_first:
            weights = (Buffer("w", g.filters * g.patch, problem.operand),)
        return Workspace(weights, bias_buffer(problem), tuple(own))

    def work(self, problem: Problem, tiling: Tiling) -> Work:
        g, tile, splits = problem.geometry, tiling.tile, tiling.splits
        low, blocks = lowered(g), g.count_blocks(tiling.tile)
        taps, results = len(low.taps), g.images * g.positions * g.filters
        images = 1 if tiling.variant == WIDE else max(tile.images, 1)
        weights, products = g.filters * g.patch, g.groups * blocks * images
        columns = blocks * low.tile(tile).positions * g.channels * low.window
        copied = 0 if _in_place(problem, tiling) else results
        steps = 1 if tiling.variant == ROWS else 1 + _TAP * (taps - 1)
        work = Work(
            multiply=g.multiplications,
            short_side=min(
                tile.positions // images, g.group_filters // splits, g.patch // taps
            ),
            gather=columns * run_cost(problem) * splits,
            scatter=(taps - 1) * results,
            copy=copied,
            transpose=_runs_of_weights(problem),
            reread=read_again(problem, weights, blocks * images),
            products=products * taps * splits,
            blocks=blocks * splits * steps,
            pieces=blocks * splits,
        )
        if problem.op == "weight_grad":
            cells = g.group_filters * (g.patch // taps)
            slower = 1 + _FEW_RESULTS / (cells + _LEAST_RESULTS)
            return work._replace(
                multiply=g.multiplications * slower,
                short_side=min(tile.positions, g.group_filters, g.patch // taps),
                gather=columns * run_cost(problem),
                scatter=max(blocks * images - splits, 0) * weights,
                copy=copied + splits * weights,
                reread=0,
                products=products * taps,
                blocks=blocks * steps,
                pieces=splits,
            )
        if tiling.variant != ROWS:
            return work
        rows, row = tile.cells[0], math.prod(tile.cells[1:])
        packed = g.group_filters // splits * g.patch * row > SMALL_PRODUCT
        return work._replace(
            short_side=min(row, g.group_filters // splits, g.patch),
            scatter=0,
            products=products * rows * splits,
            reread=_PACKED * products * rows * weights if packed else 0,
        )

    def weights(self, job: Job, w: Array, kept: dict[str, Array]) -> Array:
        problem, g = job.problem, job.problem.geometry
        if not g.channels_first:
            return take_weights(job, w, kept)
        matrix, filters = _weights_in(kept["w"], g)
        copy_transposed(job, filters_of(w, problem), filters)
        if problem.conjugates_weights:
            job.backend.do(job.backend.xp.conjugate, matrix, matrix)
        return matrix

    def forward(
        self, job: Job, x: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        g, variant = job.problem.geometry, job.tiling.variant
        offset = take_bias(job, bias)
        x, y = in_groups(x, g), in_groups(out, g)

        def body(
            chunk: int, item: tuple[Block, slice], buffers: dict[str, Array]
        ) -> None:
            block, part = item
            rows = self._lower(job, x, block, buffers, chunk)
            cells = output_cells(y, block)[:, :, part]
            staged = cells
            if "y" in buffers:
                staged = _staged(buffers["y"], g, cells.shape, variant)
            some = weights[:, :, part]
            own = offset if offset is None else offset[:, :, part]
            with job.backend.stage("gemm", self.name, chunk):
                if variant == ROWS:
                    _multiply_rows(job, some, rows, own, staged)
                else:
                    total = _matrix(staged, g, variant)
                    _add_products(job, some, rows, own, total, block, buffers)
            if staged is not cells:
                job.backend.copy(staged, cells)

        parts = parts_of(g.group_filters, job.tiling.splits)
        job.each(((block, part) for block in job.blocks for part in parts), body)

    def weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        g, splits, variant = job.problem.geometry, job.tiling.splits, job.tiling.variant
        x, dy = in_groups(x, g), in_groups(dy, g)
        sums = job.shared["sums"].reshape(splits, -1)

        def body(number: int, split: int, buffers: dict[str, Array]) -> None:
            del number
            total, add = _weights_in(sums[split], g)[0], False
            for chunk, block in islice(enumerate(job.blocks), split, None, splits):
                rows = self._lower(job, x, block, buffers, chunk)
                if rows.dtype.kind == "c":
                    job.backend.do(job.backend.xp.conjugate, rows, rows)
                cells = output_cells(dy, block)
                if "dy" in buffers:
                    staged = _staged(buffers["dy"], g, cells.shape, variant)
                    job.backend.copy(cells, staged)
                    cells = staged
                with job.backend.stage("gemm", self.name, chunk):
                    for taps, columns in _products(rows, g, block, variant):
                        job.backend.gemm(
                            _matrix(cells, g, variant),
                            columns.swapaxes(-1, -2),
                            total[..., taps],
                            add=add,
                            partial=buffers.get("partial"),
                            fast=job.problem.fast,
                        )
                add = True
            if not add:
                job.backend.fill(total, 0)

        job.each(range(splits), body)
        add_splits(job, list(sums))
        copy_transposed(job, _weights_in(sums[0], g)[1], filters_of(out, job.problem))

    def _lower(
        self, job: Job, x: Array, block: Block, buffers: dict[str, Array], chunk: int
    ) -> Array:
        """The rows of L for a block: (N, G, C/G, phases, *kernel, rows, *out)."""
        g, variant = job.problem.geometry, job.tiling.variant
        low = lowered(g)
        part = low.block(block)
        images = block.images[1] - block.images[0]
        shape = (images, g.groups, g.group_channels, *low.geometry.kernel, *part.shape)
        with job.backend.stage("gather", self.name, chunk):
            rows = _ordered(buffers["rows"], shape, _order(g, variant))
            source = x[slice(*block.images)]
            job.backend.gather(source, rows, low.geometry, part, buffers)
        return rows


def _order(g: ConvGeometry, variant: Order) -> list[int]:
    """The axes of L, (N, G, C/G, phases, *kernel, rows, *out), as they are stored."""
    first = 3 + g.rank
    taps, (row, *out) = [*range(3, first)], [*range(first, first + g.rank)]
    if variant == ROWS:
        return [0, 1, row, 3, 2, *taps[1:], *out]
    patch = [3, 2, *taps[1:]] if g.channels_first else [*taps, 2]
    places = [row, 0, *out] if variant == WIDE else [row, *out]
    outer = [1] if variant == WIDE else [0, 1]
    return [*outer, *patch, *places] if g.channels_first else [*outer, *places, *patch]


def _ordered(flat: Array, shape: Sequence[int], order: Sequence[int]) -> Array:
    """View a flat buffer as an array of this shape, its axes stored in this order."""
    cells = flat[: math.prod(shape)].reshape([shape[axis] for axis in order])
    return cells.transpose([order.index(axis) for axis in range(len(order))])


def _staged(
    flat: Array, g: ConvGeometry, shape: Sequence[int], variant: Order
) -> Array:
    """A block of y or dy, (N, G, K/G, *out), in a buffer."""
    row, *out = range(3, 3 + g.rank)
    places = [row, 0, *out] if variant == WIDE else [row, *out]
    outer = [1] if variant == WIDE else [0, 1]
    order = [*outer, 2, *places] if g.channels_first else [*outer, *places, 2]
    return _ordered(flat, shape, order)


def _images_inside(cells: Array, rank: int, variant: Order) -> Array:
    """View images side by side: the axis of images after that of the rows."""
    if variant != WIDE:
        return cells
    after = cells.ndim - rank + 1
    return cells.transpose(*range(1, after), 0, *range(after, cells.ndim))[None]


def _matrix(cells: Array, g: ConvGeometry, variant: Order) -> Array:
    """View a block of y or dy as (N, G, K/G, positions), N = 1 if side by side."""
    return flattened(_images_inside(cells, g.rank, variant), g.rank + (variant == WIDE))


def _products(
    rows: Array, g: ConvGeometry, block: Block, variant: Order
) -> Iterator[tuple[slice, Array]]:
    """Columns of W and the rows of L that they multiply: (N, G, terms, positions)."""
    each = g.group_channels * math.prod(g.kernel[1:])
    inner, row_axis = [2, *range(4, 3 + g.rank)], 3 + g.rank
    if not g.channels_first:
        inner = [*inner[1:], 2]
    for taps in lowered(g).taps:
        place: list[slice] = [slice(None)] * rows.ndim
        place[3] = taps.phases
        place[row_axis] = slice(taps.row, taps.row + block.shape[0])
        view = _images_inside(rows[tuple(place)], g.rank, variant)
        view = flattened(view, g.rank + (variant == WIDE))
        view = flattened(view.transpose(0, 1, row_axis, 3, *inner), 1 + len(inner))
        columns = slice(taps.taps.start * each, taps.taps.stop * each)
        yield columns, view.swapaxes(-1, -2)


def _add_products(
    job: Job,
    weights: Array,
    rows: Array,
    bias: Array | None,
    total: Array,
    block: Block,
    buffers: dict[str, Array],
) -> None:
    """Write the sum of all products of a block, plus a bias."""
    g, variant = job.problem.geometry, job.tiling.variant
    for number, (taps, columns) in enumerate(_products(rows, g, block, variant)):
        job.backend.gemm(
            weights[..., taps],
            columns,
            total,
            bias=None if number else bias,
            add=number > 0,
            partial=buffers.get("partial"),
            fast=job.problem.fast,
        )


def _multiply_rows(
    job: Job, weights: Array, rows: Array, bias: Array | None, cells: Array
) -> None:
    """Write one product for each row of y: all taps of a row are contiguous in L."""
    g = job.problem.geometry
    images, groups, _, *_ = rows.shape
    step = math.prod(cells.shape[4:]) * rows.itemsize
    shape = images, groups, cells.shape[3], g.patch, math.prod(cells.shape[4:])
    strides = *rows.strides[:2], rows.strides[3 + g.rank], step, rows.itemsize
    columns = strided(rows, shape, strides)
    by_rows = cells.transpose(0, 1, 3, 2, *range(4, cells.ndim))
    total = flattened(by_rows, g.rank - 1)
    offset = bias if bias is None else bias[:, :, None]
    job.backend.gemm(
        weights[:, :, None], columns, total, bias=offset, fast=job.problem.fast
    )


def _weights_in(flat: Array, g: ConvGeometry) -> tuple[Array, Array]:
    """A buffer for weights: (1, G, K/G, patch), and (G, K/G, C/G, *kernel).

    The patch is taps along the first axis, channels, other taps; with channels last,
    all taps, then channels.
    """
    if g.channels_first:
        first, *others = g.kernel
        cells = flat.reshape(g.groups, -1, first, g.group_channels, *others)
        return cells.reshape(1, g.groups, -1, g.patch), cells.swapaxes(2, 3)
    cells = flat.reshape(*g.kernel, g.group_channels, g.groups, -1)
    order = g.rank + 1, g.rank + 2, g.rank, *range(g.rank)
    return weight_matrix(flat.reshape(g.w_shape), g), cells.transpose(order)


def _in_place(problem: Problem, tiling: Tiling) -> bool:
    """True if the products read dy or write y in place."""
    if tiling.variant == WIDE:
        return False
    if problem.op == "weight_grad":
        return "dy" in problem.zero_copy
    # Sums of several products are not rounded between them.
    whole = tiling.variant == ROWS and "out" in problem.zero_copy
    return whole or sums_in_place(problem)


def _runs_of_weights(problem: Problem) -> float:
    """The number of contiguous runs that are copied to reorder the weights."""
    g = problem.geometry
    if not g.channels_first:
        return 0 if "w" in problem.zero_copy else g.filters * g.patch
    run = 1 if problem.flipped else math.prod(g.kernel[1:])
    return g.filters * g.patch / run
