"""One matrix product for every tap, added up: columns of a single tap at a time.

With W_t the weights of tap t as a matrix (filters × channels) and X_t the elements that
it reads (channels × positions), group by group:

    forward        Y += W_t · X_t
    input_grad     dX at X_t's elements += W_tᴴ · dY
    weight_grad    dW_t += dY · X_tᴴ

Only positions where the tap reads the input are multiplied, never padding.  The buffer
is smaller than the columns of `cuconv.strategies.im2col` by the number of taps; every
tap reads and writes the sums once more.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice, product
from typing import NamedTuple

from cuconv.arrays import Array, Stored, stored
from cuconv.backends import Backend
from cuconv.engine.costs import Work
from cuconv.engine.problem import Problem, in_groups
from cuconv.geometry import Axis, Block, ConvGeometry, Range
from cuconv.memory import Buffer
from cuconv.strategies.base import (
    OVER_DY,
    Job,
    OneWay,
    Tiling,
    Tilings,
    Workspace,
    add_splits,
    bias_buffer,
    copy_transposed,
    filters_of,
    output_cells,
    take_bias,
)
from cuconv.strategies.im2col import run_cost

# Python's objects for the views of a tap, measured with tracemalloc.
_VIEW_BYTES = 1536


class TapMatmul(OneWay):
    """See `cuconv.strategies.Strategy`."""

    name = "tap_matmul"
    libraries: tuple[str, ...] = ("cublas",)
    capturable = False
    on_tensor_cores = True
    by_runs = True

    def supports(self, problem: Problem) -> tuple[bool, str]:
        if problem.geometry.taps == 1:
            return False, "the kernel has one tap: pointwise is the same"
        if problem.op == "input_grad" and problem.geometry.is_unit_stride:
            return False, OVER_DY
        if problem.op == "input_grad" and problem.operand != problem.types.accumulate:
            return False, f"sums in {problem.operand} would be rounded"
        return True, ""

    def tilings(self, problem: Problem, variant: None, backend: Backend) -> Tilings:
        del variant
        g = problem.geometry
        cell = (g.channels + 2 * g.filters) * problem.operand.itemsize
        positions = max(1, backend.block_bytes // max(cell, 1))
        if problem.op == "weight_grad":
            return Tilings(positions, g.tile, 2)
        if problem.op == "forward":
            return Tilings(positions, g.tile)
        # Blocks of one image would add to the same elements.
        whole = tuple(max(n, 1) for n in g.out)
        return Tilings(positions, lambda n: g.tile(n)._replace(cells=whole))

    def workspace(
        self, problem: Problem, tiling: Tiling, backend: Backend
    ) -> Workspace:
        del backend
        g, positions = problem.geometry, tiling.tile.positions
        views = g.taps * _VIEW_BYTES if problem.module == "numpy" else 0
        wide = problem.types.accumulate
        weights = Buffer("w", g.filters * g.patch, problem.operand)
        x = Buffer("x", positions * g.channels, problem.operand)
        if problem.op == "weight_grad":
            sums = Buffer("sums", tiling.splits * g.filters * g.patch, wide)
            dy = Buffer("dy", positions * g.filters, problem.operand)
            product = Buffer("product", g.filters * g.group_channels, wide)
            return Workspace((), (sums,), (x, dy, product), views)
        if problem.op == "input_grad":
            dy = Buffer("dy", positions * g.filters, problem.operand)
            product = Buffer("product", positions * g.channels, wide)
            dx = Buffer("dx", tiling.tile.images * g.channels * g.cells, wide)
            return Workspace((weights,), bias_buffer(problem), (dy, product, dx), views)
        product = Buffer("product", positions * g.filters, wide)
        y = Buffer("y", positions * g.filters, wide)
        return Workspace((weights,), bias_buffer(problem), (x, product, y), views)

    def work(self, problem: Problem, tiling: Tiling) -> Work:
        g = problem.geometry
        met = _share_met(g)
        positions = g.images * g.positions * g.taps * met
        blocks = g.count_blocks(tiling.tile)
        sums = 0.0 if problem.op == "weight_grad" else positions
        added = g.channels if problem.op == "input_grad" else g.filters
        return Work(
            multiply=g.multiplications * met,
            short_side=min(tiling.tile.positions, g.group_filters, g.group_channels),
            gather=positions * g.channels * run_cost(problem),
            scatter=sums * added,
            copy=blocks * g.taps * g.filters * g.group_channels
            if problem.op == "weight_grad"
            else g.images * g.positions * g.filters,
            transpose=g.filters * g.patch,
            blocks=blocks * g.taps,
            pieces=tiling.splits if problem.op == "weight_grad" else blocks,
        )

    def weights(self, job: Job, w: Array, kept: dict[str, Array]) -> Array:
        """(taps, G, K/G, C/G), conjugated for a gradient."""
        g = job.problem.geometry
        copy = kept["w"].reshape(*g.kernel, g.groups, g.group_filters, g.group_channels)
        copy_transposed(job, filters_of(w, job.problem), _taps_last(copy, g.rank))
        if job.problem.conjugates_weights:
            job.backend.do(job.backend.xp.conjugate, copy, copy)
        return copy

    def forward(
        self, job: Job, x: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        g = job.problem.geometry
        offset = _start(job, bias)
        x, y = in_groups(x, g), in_groups(out, g)

        def body(chunk: int, block: Block, buffers: dict[str, Array]) -> None:
            total = _staged(buffers["y"], g, block, g.group_filters, block.shape).cells
            _begin(job, total, offset)
            cells = x[slice(*block.images)]
            for met in _meetings(g, block):
                with job.backend.stage("gather", self.name, chunk):
                    source = cells[(..., *met.inputs)]
                    columns = _copied(job, buffers["x"], g, block, source)
                with job.backend.stage("gemm", self.name, chunk):
                    summand = _staged(
                        buffers["product"], g, block, g.group_filters, met.shape
                    )
                    fast = job.problem.fast
                    job.backend.gemm(
                        weights[met.tap][None],
                        columns.matrix,
                        summand.matrix,
                        fast=fast,
                    )
                    into = total[(..., *met.outputs)]
                    job.backend.do(job.backend.xp.add, into, summand.cells, into)
            job.backend.copy(total, output_cells(y, block))

        job.each(job.blocks, body)

    def input_grad(
        self, job: Job, dy: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        g = job.problem.geometry
        offset = _start(job, bias)
        dy, dx = in_groups(dy, g), in_groups(out, g)

        def body(chunk: int, block: Block, buffers: dict[str, Array]) -> None:
            cells = dx[slice(*block.images)]
            total = _staged(buffers["dx"], g, block, g.group_channels, g.size).cells
            _begin(job, total, offset)
            gradients = output_cells(dy, block)
            for met in _meetings(g, block):
                source = gradients[(..., *met.outputs)]
                columns = _copied(job, buffers["dy"], g, block, source)
                summand = _staged(
                    buffers["product"], g, block, g.group_channels, met.shape
                )
                with job.backend.stage("gemm", self.name, chunk):
                    transposed = weights[met.tap][None].swapaxes(-1, -2)
                    fast = job.problem.fast
                    job.backend.gemm(
                        transposed, columns.matrix, summand.matrix, fast=fast
                    )
                with job.backend.stage("scatter", self.name, chunk):
                    into = total[(..., *met.inputs)]
                    job.backend.do(job.backend.xp.add, into, summand.cells, into)
            job.backend.copy(total, cells)

        job.each(job.blocks, body)

    def weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        g, splits = job.problem.geometry, job.tiling.splits
        x, dy = in_groups(x, g), in_groups(dy, g)
        shape = (splits, *g.kernel, g.groups, g.group_filters, g.group_channels)
        sums = job.shared["sums"].reshape(shape)

        def body(number: int, split: int, buffers: dict[str, Array]) -> None:
            del number
            job.backend.fill(sums[split], 0)
            for chunk, block in islice(enumerate(job.blocks), split, None, splits):
                cells, gradients = x[slice(*block.images)], output_cells(dy, block)
                for met in _meetings(g, block):
                    with job.backend.stage("gather", self.name, chunk):
                        source = cells[(..., *met.inputs)]
                        columns = _copied(job, buffers["x"], g, block, source)
                        if columns.matrix.dtype.kind == "c":
                            job.backend.do(
                                job.backend.xp.conjugate,
                                columns.matrix,
                                columns.matrix,
                            )
                        source = gradients[(..., *met.outputs)]
                        rows = _copied(job, buffers["dy"], g, block, source)
                    with job.backend.stage("gemm", self.name, chunk):
                        job.backend.gemm(
                            rows.matrix,
                            columns.matrix.swapaxes(-1, -2),
                            sums[split][met.tap][None],
                            add=True,
                            partial=buffers["product"],
                            fast=job.problem.fast,
                        )

        job.each(range(splits), body)
        add_splits(job, list(sums))
        copy_transposed(job, _taps_last(sums[0], g.rank), filters_of(out, job.problem))


def _begin(job: Job, total: Array, offset: Array | None) -> None:
    """Initialise a sum with zero, or the bias."""
    if offset is None:
        job.backend.fill(total, 0)
    else:
        job.backend.copy(offset, total)


def _start(job: Job, bias: Array | None) -> Array | None:
    """The bias, broadcastable to (N, G, C, *spatial), if there is one."""
    offset = take_bias(job, bias)
    if offset is None:
        return None
    return offset.reshape(*offset.shape[:3], *(1,) * job.problem.geometry.rank)


class _Meeting(NamedTuple):
    """The elements of x that a tap reads, and the outputs within the block."""

    tap: tuple[int, ...]
    inputs: tuple[slice, ...]
    outputs: tuple[slice, ...]
    shape: tuple[int, ...]


def _meetings(geometry: ConvGeometry, block: Block) -> Iterator[_Meeting]:
    """Every tap that reads the input in a block, the last axis fastest."""
    for tap in product(*map(range, geometry.kernel)):
        found = [_met(geometry, i, t, block.output[i]) for i, t in enumerate(tap)]
        sizes = tuple(span[1] - span[0] for span, _ in found)
        if min(sizes) > 0:
            outputs = tuple(
                slice(span[0] - whole[0], span[1] - whole[0])
                for (span, _), whole in zip(found, block.output, strict=True)
            )
            yield _Meeting(tap, tuple(cells for _, cells in found), outputs, sizes)


def _met(
    geometry: ConvGeometry, index: int, tap: int, span: Range
) -> tuple[Range, slice]:
    """Outputs of a range whose tap is inside the input, and the elements it reads."""
    axis = geometry.axes[index]
    offset = tap * axis.dilation - axis.before
    start = max(span[0], -(offset // axis.stride))
    stop = max(start, min(span[1], (axis.size - 1 - offset) // axis.stride + 1))
    first = start * axis.stride + offset
    return (start, stop), slice(
        first, first + (stop - start - 1) * axis.stride + 1, axis.stride
    )


def _share_met(geometry: ConvGeometry) -> float:
    """The fraction of products with the input, not the padding."""
    return math.prod(map(_axis_share_met, geometry.axes), start=1.0)


@lru_cache(maxsize=1024)
def _axis_share_met(axis: Axis) -> float:
    inside, out = 0, axis.out
    for tap in range(axis.kernel):
        offset = tap * axis.dilation - axis.before
        start = max(0, -(offset // axis.stride))
        stop = min(out, (axis.size - 1 - offset) // axis.stride + 1)
        inside += max(0, stop - start)
    return inside / max(out * axis.kernel, 1)


def _staged(
    flat: Array,
    geometry: ConvGeometry,
    block: Block,
    channels: int,
    cells: tuple[int, ...],
) -> Stored:
    head = (block.images[1] - block.images[0], geometry.groups, channels)
    first = geometry.channels_first
    return stored(flat, head, (), cells, channels_first=first, wide=True)


def _copied(
    job: Job, flat: Array, geometry: ConvGeometry, block: Block, source: Array
) -> Stored:
    """A C-contiguous array (N, G, C, *spatial) in a buffer."""
    copy = _staged(flat, geometry, block, source.shape[2], source.shape[3:])
    job.backend.copy(source, copy.cells)
    return copy


def _taps_last(array: Array, rank: int) -> Array:
    """View (*kernel, G, K, C) as (G, K, C, *kernel)."""
    return array.transpose(rank, rank + 1, rank + 2, *range(rank))
