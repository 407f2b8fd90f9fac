"""Chunked im2col and GEMM: any convolution, within any feasible memory limit.

With W the weights as a matrix (filters × patch) and X a block's columns (patch ×
positions), group by group:

    forward        Y  = W · X
    input_grad     dX = col2im(Wᴴ · dY)
    weight_grad    dW = Σ over blocks of dY · Xᴴ

The superscript H is the transpose, conjugated where the numbers are complex: gradients
are those of the real inner product Re⟨y, dy⟩, as in PyTorch.

Source: K. Chellapilla, S. Puri, P. Simard, "High performance convolutional neural
networks for document processing", 2006, section 3.
"""

from enum import Enum
from itertools import islice

from cuconv.arrays import Array, DType, Stored, flattened, stored
from cuconv.backends import Backend
from cuconv.engine.costs import Work
from cuconv.engine.problem import Problem, in_groups, taps_reversed
from cuconv.geometry import Block, Region, Tile
from cuconv.memory import Buffer
from cuconv.strategies.base import (
    Job,
    Tiling,
    Tilings,
    Workspace,
    add_splits,
    bias_buffer,
    copy_transposed,
    filters_of,
    output_buffer,
    output_cells,
    partial_cells,
    parts_of,
    read_again,
    staged_output,
    sums_in_place,
    take_bias,
    take_dy,
    take_weights,
    weight_buffer,
    weight_matrix,
    words_of,
)

# Sums of weight gradients are kept as (patch × filters) if the patch is the longer
# side: BLAS is a fifth faster then.  The transposed copy at the end pays off with this
# many positions.
_WORTH_TRANSPOSING = 1024
# The most bytes of sums in all splits, beyond the two that two workers need.
_SPLIT_BYTES = 4 * 2**20
# Below this many positions, workers compute different filters, not positions; and the
# least filters in a part.
FEW_POSITIONS, PART = 1024, 32
# The cost of starting a contiguous run, in elements: columns of 7×7 outputs take 0.46
# ns an element, of 14×14 0.15, of 56×56 0.11.  On a GPU it is not yet measured.
_RUN = {"numpy": 8, "cupy": 32}
# The cost of adding the columns of one tap, in products.
_ADD = 8
# A product for each image, or one for several side by side, which must be copied out;
# for the weight gradient, splits by blocks (each too), or by filters.


class Sharing(Enum):
    """The products and splits of a variant, as the phrases in a plan."""

    EACH = ""
    WIDE = "images side by side"
    FILTERS = "split by filters"


EACH, WIDE, FILTERS = Sharing
LONG_ROW = 512


class Im2col:
    """See `cuconv.strategies.Strategy`."""

    name = "im2col"
    libraries: tuple[str, ...] = ("cublas",)
    capturable = False
    on_tensor_cores = True
    gains_from_size = True
    by_runs = True

    def supports(self, problem: Problem) -> tuple[bool, str]:
        del problem
        return True, ""

    def variants(self, problem: Problem, backend: Backend) -> tuple[Sharing, ...]:
        del backend
        g = problem.geometry
        if problem.op == "weight_grad":
            several = g.group_filters >= 2 * PART and problem.module == "numpy"
            return (EACH, FILTERS) if several else (EACH,)
        short = problem.op == "forward" and g.images > 1 and g.positions < LONG_ROW
        return (EACH, WIDE) if short and problem.module == "numpy" else (EACH,)

    def describe(self, variant: Sharing) -> str:
        return variant.value

    def tilings(self, problem: Problem, variant: Sharing, backend: Backend) -> Tilings:
        g = problem.geometry
        column = g.groups * g.patch * problem.operand.itemsize
        positions = max(1, backend.block_bytes // max(column, 1))
        return Tilings(positions, g.tile, _most_splits(problem, variant))

    def workspace(
        self, problem: Problem, tiling: Tiling, backend: Backend
    ) -> Workspace:
        tile = tiling.tile
        if problem.op == "input_grad":
            columns = _column_buffer(problem, tile, problem.types.accumulate)
            own = (*_dy_buffer(problem, tile), *_dx_buffer(problem, tiling.region))
            shared = bias_buffer(problem)
            return Workspace(_weight_buffer(problem), shared, (columns, *own))
        gathered = self.column_buffers(problem, tiling, backend)
        if problem.op == "weight_grad":
            sums, own = _sum_buffers(problem, tiling, backend)
            return Workspace((), sums, (*gathered, *_dy_buffer(problem, tile), *own))
        direct = "out" in problem.zero_copy and tiling.variant == EACH
        staged = () if direct else (output_buffer(problem, "y", tile),)
        return Workspace(
            _weight_buffer(problem), bias_buffer(problem), (*gathered, *staged)
        )

    def work(self, problem: Problem, tiling: Tiling) -> Work:
        g, splits, positions = problem.geometry, tiling.splits, tiling.tile.positions
        columns = g.images * g.positions * g.groups * g.patch * run_cost(problem)
        blocks = g.count_blocks(tiling.tile)
        products = g.groups * blocks * tiling.tile.images
        transposed = sum(buffer.cells for buffer in _weight_buffer(problem))
        # Columns stay in a cache.
        moved = words_of(problem, g.filters * (g.images * g.positions + g.patch))
        if problem.op == "input_grad":
            regions = g.count_regions(tiling.region)
            again = g.reach(tiling.region) * regions / max(g.images * g.positions, 1)
            return Work(
                multiply=g.multiplications * max(again, 1),
                short_side=min(positions, g.group_filters, g.patch),
                scatter=columns,
                transpose=transposed,
                moved=moved,
                products=products + _ADD * g.taps * blocks,
                blocks=blocks,
                pieces=regions,
            )
        if problem.op == "weight_grad":
            # Splits are of filters, each with all columns, or of blocks, each with a
            # sum.
            apart = splits if tiling.variant == FILTERS else 1
            return Work(
                multiply=g.multiplications,
                short_side=min(positions, g.group_filters // apart, g.patch),
                gather=columns * apart,
                copy=0 if tiling.variant == FILTERS else splits * g.filters * g.patch,
                moved=moved,
                products=products,
                blocks=blocks * apart,
                pieces=splits,
            )
        direct = "out" in problem.zero_copy and tiling.variant == EACH
        images = 1 if tiling.variant == WIDE else max(tiling.tile.images, 1)
        return Work(
            multiply=g.multiplications,
            short_side=min(positions // images, g.group_filters // splits, g.patch),
            gather=columns * splits,
            copy=0 if direct else g.images * g.positions * g.filters,
            transpose=transposed,
            reread=read_again(problem, g.filters * g.patch, blocks * images),
            moved=moved,
            products=products,
            blocks=blocks * splits,
            pieces=blocks * splits,
        )

    def column_buffers(
        self, problem: Problem, tiling: Tiling, backend: Backend
    ) -> tuple[Buffer, ...]:
        """The buffers that `columns` needs."""
        tile = tiling.tile
        types = problem.source, problem.operand
        gather = backend.gather_buffers(problem.geometry, tile, *types)
        return (_column_buffer(problem, tile, problem.operand), *gather)

    def columns(
        self, job: Job, x: Array, block: Block, buffers: dict[str, Array], chunk: int
    ) -> Array:
        """The column matrix of one block of a grouped ``x``."""
        wide = job.problem.op == "weight_grad" or job.tiling.variant == WIDE
        columns = _stored_columns(job, buffers["columns"], block, wide=wide)
        with job.backend.stage("gather", self.name, chunk):
            images = x[slice(*block.images)]
            geometry = job.problem.geometry
            job.backend.gather(images, columns.cells, geometry, block, buffers)
        if job.problem.op == "weight_grad" and columns.matrix.dtype.kind == "c":
            job.backend.do(job.backend.xp.conjugate, columns.matrix, columns.matrix)
        return columns.matrix

    def weights(self, job: Job, w: Array, kept: dict[str, Array]) -> Array:
        if _reverses(job.problem):
            geometry = job.problem.geometry
            return weight_matrix(taps_reversed(w, geometry), geometry)
        return take_weights(job, w, kept)

    def forward(
        self, job: Job, x: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        geometry = job.problem.geometry
        offset = take_bias(job, bias)
        x, y = in_groups(x, geometry), in_groups(out, geometry)

        def body(
            chunk: int, item: tuple[Block, slice], buffers: dict[str, Array]
        ) -> None:
            block, part = item
            columns = self.columns(job, x, block, buffers, chunk)
            with job.backend.stage("gemm", self.name, chunk):
                some = weights[:, :, part]
                bias = offset if offset is None else offset[:, :, part]
                _write_block(job, some, columns, bias, y[:, :, part], block, buffers)

        parts = parts_of(geometry.group_filters, job.tiling.splits)
        job.each(((block, part) for block in job.blocks for part in parts), body)

    def input_grad(
        self, job: Job, dy: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        geometry = job.problem.geometry
        offset = take_bias(job, bias)
        if offset is not None:
            offset = offset.reshape(*offset.shape[:3], *(1,) * geometry.rank)
        dy, dx = in_groups(dy, geometry), in_groups(out, geometry)

        def body(number: int, region: Region, buffers: dict[str, Array]) -> None:
            del number
            transposed = weights.swapaxes(-1, -2)
            _write_region(job, transposed, dy, offset, dx, region, buffers)

        job.each(geometry.regions(job.tiling.region), body)

    def weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        geometry = job.problem.geometry
        x, dy = in_groups(x, geometry), in_groups(dy, geometry)
        if _reverses(job.problem):
            out = taps_reversed(out, geometry)
        sums, totals = _sums(job, out)
        splits, own_filters = job.tiling.splits, job.tiling.variant == FILTERS
        parts = parts_of(geometry.group_filters, splits if own_filters else 1)

        def body(number: int, split: int, buffers: dict[str, Array]) -> None:
            del number
            # Split i sums blocks i, i + splits, …, or all blocks for its own filters:
            # the same sums for every number of workers.
            first, step = (0, 1) if own_filters else (split, splits)
            part = parts[split] if own_filters else parts[0]
            total, add = totals[0 if own_filters else split][:, :, part], False
            for chunk, block in islice(enumerate(job.blocks), first, None, step):
                columns = self.columns(job, x, block, buffers, chunk)
                cells = output_cells(dy, block)[:, :, part]
                with job.backend.stage("gemm", self.name, chunk):
                    _add_block(job, columns, cells, total, block, buffers, add=add)
                add = True
            if not add:
                job.backend.fill(total, 0)

        job.each(range(len(parts) if own_filters else splits), body)
        add_splits(job, sums)
        if sums[0] is not out:
            _finish(job, sums[0], out)


def _reverses(problem: Problem) -> bool:
    """True if columns have their taps in reverse: so do the weights in memory."""
    return "reversed" in problem.zero_copy


def _weight_buffer(problem: Problem) -> tuple[Buffer, ...]:
    return () if _reverses(problem) else weight_buffer(problem)


def run_cost(problem: Problem) -> float:
    """The relative cost of a gathered element, higher for short contiguous runs."""
    g = problem.geometry
    run = g.out[-1] if g.channels_first else g.group_channels
    return 1 + _RUN[problem.module] / max(run, 1)


def filters_apart(problem: Problem, channels: int) -> int:
    """Parts of the result's channels where positions are too few to share out."""
    few = problem.geometry.images * problem.geometry.positions < FEW_POSITIONS
    return max(1, channels // PART) if few else 1


def _most_splits(problem: Problem, variant: Sharing) -> int:
    g = problem.geometry
    if problem.op == "forward":
        return filters_apart(problem, g.group_filters)
    if problem.op == "input_grad":
        return 1
    if variant == FILTERS:
        return max(1, g.group_filters // PART)
    cells = g.filters * g.patch * problem.types.accumulate.itemsize
    room = _SPLIT_BYTES // max(cells, 1)
    return int(2 ** min(max(room, 2).bit_length() - 1, 3))


def _column_buffer(problem: Problem, tile: Tile, dtype: DType) -> Buffer:
    geometry = problem.geometry
    return Buffer("columns", tile.positions * geometry.groups * geometry.patch, dtype)


def _stored_columns(
    job: Job, flat: Array, block: Block, *, wide: bool = False
) -> Stored:
    geometry = job.problem.geometry
    first, last = block.images
    columns = stored(
        flat,
        (last - first, geometry.groups, geometry.group_channels),
        geometry.kernel,
        block.shape,
        channels_first=geometry.channels_first,
        wide=wide,
    )
    if not _reverses(job.problem):
        return columns
    taps = (slice(None, None, -1),) * geometry.rank
    return columns._replace(cells=columns.cells[(slice(None),) * 3 + taps])


def _dy_buffer(problem: Problem, tile: Tile) -> tuple[Buffer, ...]:
    # The weight gradient sums over images too: several images are one wide matrix
    # only after a copy.
    wide = problem.op == "weight_grad" and tile.images > 1
    if "dy" in problem.zero_copy and not wide:
        return ()
    return (output_buffer(problem, "dy", tile),)


def _dx_buffer(problem: Problem, region: Tile) -> tuple[Buffer, ...]:
    if sums_in_place(problem):
        return ()
    cells = region.positions * problem.geometry.channels
    return (Buffer("dx", cells, problem.types.accumulate),)


def _is_transposed(problem: Problem) -> bool:
    """True if sums are kept as (patch × filters)."""
    g = problem.geometry
    long = g.images * g.positions >= _WORTH_TRANSPOSING
    return (
        g.channels_first
        and problem.module == "numpy"
        and long
        and (g.patch > g.group_filters)
    )


def _sums_in_place(problem: Problem) -> bool:
    """True if the gradient of weights is a running sum, whatever order of its taps."""
    is_whole = problem.types.result == problem.types.accumulate
    return sums_in_place(problem) or (_reverses(problem) and is_whole)


def _sum_buffers(
    problem: Problem, tiling: Tiling, backend: Backend
) -> tuple[tuple[Buffer, ...], tuple[Buffer, ...]]:
    """One running sum for each split, the first in the result where it can be."""
    geometry = problem.geometry
    cells = geometry.filters * geometry.patch
    in_place = _sums_in_place(problem) and not _is_transposed(problem)
    splits, filters = tiling.splits, geometry.group_filters
    if tiling.variant == FILTERS:
        splits, filters = 1, -(-filters // tiling.splits)
    shared = Buffer("sums", (splits - in_place) * cells, problem.types.accumulate)
    if not (backend.needs_partial and geometry.count_blocks(tiling.tile) > splits):
        return (shared,), ()
    by_filters = _is_transposed(problem) or not geometry.channels_first
    row = filters if by_filters else geometry.patch
    own = geometry.groups * filters * geometry.patch
    partial = partial_cells(own, row, tiling.tile.positions)
    return (shared,), (Buffer("partial", partial, problem.types.accumulate),)


def _sums(job: Job, out: Array) -> tuple[list[Array], list[Array]]:
    """Each split's running sum: as an array, and as the (1, G, K/G, patch) it is."""
    problem, geometry = job.problem, job.problem.geometry
    flat = job.shared["sums"]
    if _is_transposed(problem):
        shape = (geometry.groups, geometry.patch, geometry.group_filters)
        sums = list(flat.reshape(-1, *shape))
        return sums, [total[None].swapaxes(-1, -2) for total in sums]
    own = [out] if _sums_in_place(problem) else []
    sums = [*own, *flat.reshape(-1, *out.shape)]
    return sums, [weight_matrix(total, geometry) for total in sums]


def _finish(job: Job, total: Array, out: Array) -> None:
    """Copy the finished sum to the result."""
    problem, geometry = job.problem, job.problem.geometry
    if not _is_transposed(problem):
        job.backend.copy(total, out)
        return
    channels, kernel = geometry.group_channels, geometry.kernel
    source = total.reshape(geometry.groups, channels, *kernel, geometry.group_filters)
    axes = (0, geometry.rank + 2, 1, *range(2, geometry.rank + 2))
    copy_transposed(job, source.transpose(axes), filters_of(out, problem))


def _write_block(
    job: Job,
    weights: Array,
    columns: Array,
    bias: Array | None,
    y: Array,
    block: Block,
    buffers: dict[str, Array],
) -> None:
    """Compute one block of y."""
    geometry, fast = job.problem.geometry, job.problem.fast
    cells = output_cells(y, block)
    if "y" not in buffers:
        matrix = flattened(cells, geometry.rank)
        job.backend.gemm(weights, columns, matrix, bias=bias, fast=fast)
        return
    wide = job.tiling.variant == WIDE
    filters = cells.shape[2]
    staged = staged_output(buffers["y"], geometry, block, filters, wide=wide)
    job.backend.gemm(weights, columns, staged.matrix, bias=bias, fast=fast)
    job.backend.copy(staged.cells, cells)


def _write_region(
    job: Job,
    weights: Array,
    dy: Array,
    bias: Array | None,
    dx: Array,
    region: Region,
    buffers: dict[str, Array],
) -> None:
    """Compute one region of dx from every block of dy whose windows meet it."""
    geometry = job.problem.geometry
    cells = dx[slice(*region.images)][(..., *(slice(*span) for span in region.cells))]
    target = cells
    if "dx" in buffers:
        head, spatial = cells.shape[:3], cells.shape[3:]
        first = geometry.channels_first
        target = stored(buffers["dx"], head, (), spatial, channels_first=first).cells
    if not region.is_reached:
        job.backend.fill(target, 0)
    blocks = geometry.blocks(job.tiling.tile, region.images, region.output)
    images = None
    for chunk, block in enumerate(blocks):
        columns = _stored_columns(job, buffers["columns"], block)
        matrix = take_dy(job, output_cells(dy, block), buffers, block)
        with job.backend.stage("gemm", Im2col.name, chunk):
            job.backend.gemm(weights, matrix, columns.matrix, fast=job.problem.fast)
        with job.backend.stage("scatter", Im2col.name, chunk):
            job.backend.scatter(
                columns.cells,
                target[slice(*(i - region.images[0] for i in block.images))],
                geometry,
                block,
                region.cells,
                add=block.images == images,
                deterministic=job.problem.deterministic,
            )
        images = block.images
    if bias is not None:
        job.backend.do(job.backend.xp.add, target, bias, target)
    if target is not cells:
        job.backend.copy(target, cells)


def _add_block(
    job: Job,
    columns: Array,
    dy: Array,
    total: Array,
    block: Block,
    buffers: dict[str, Array],
    *,
    add: bool,
) -> None:
    """Add dY · Xᴴ of one block to ``total``."""
    job.backend.gemm(
        take_dy(job, dy, buffers, block, wide=True),
        columns.swapaxes(-1, -2),
        total,
        add=add,
        partial=buffers.get("partial"),
        fast=job.problem.fast,
    )
