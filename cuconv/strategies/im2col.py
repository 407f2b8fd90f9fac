"""Chunked im2col and GEMM: runs every convolution, in as little memory as asked.

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

from itertools import islice

from cuconv.arrays import Array, DType, Stored, flattened, stored
from cuconv.geometry import Block, Region, Tile
from cuconv.leaves import Leaves
from cuconv.memory import Buffer
from cuconv.profiling import stage
from cuconv.strategies.base import (
    Cut,
    Job,
    Needs,
    Problem,
    Shared,
    bias_buffer,
    in_groups,
    output_buffer,
    output_cells,
    staged_output,
    sums_in_place,
    take_bias,
    take_dy,
    take_weights,
    weight_buffer,
    weight_matrix,
    workspaces,
)


class Im2col:
    """See `cuconv.strategies.Strategy`."""

    name = "im2col"

    def supports(self, problem: Problem) -> tuple[bool, str]:
        del problem
        return True, ""

    def tile(self, problem: Problem, positions: int) -> Tile:
        return problem.geometry.tile(positions)

    def needs(self, problem: Problem, cut: Cut, leaves: Leaves) -> Needs:
        tile = cut.tile
        if problem.op == "input_grad":
            columns = _column_buffer(problem, tile, problem.types.accumulate)
            own = (*_dy_buffer(problem, tile), *_dx_buffer(problem, cut.region))
            return Needs(weight_buffer(problem), (columns, *own))
        gathered = self.column_buffers(problem, tile, leaves)
        if problem.op == "weight_grad":
            sums, own = _sum_buffers(problem, cut, leaves)
            return Needs(sums, (*gathered, *_dy_buffer(problem, tile), *own))
        shared = (*weight_buffer(problem), *bias_buffer(problem))
        staged = () if "out" in problem.direct else (output_buffer(problem, "y", tile),)
        return Needs(shared, (*gathered, *staged))

    def pieces(self, problem: Problem, cut: Cut) -> int:
        if problem.op == "input_grad":
            return problem.geometry.count_regions(cut.region)
        return problem.geometry.count_blocks(cut.tile)

    def column_buffers(
        self, problem: Problem, tile: Tile, leaves: Leaves
    ) -> tuple[Buffer, ...]:
        """What `columns` needs."""
        types = problem.source, problem.operand
        gather = leaves.gather_buffers(problem.geometry, tile, *types)
        return (_column_buffer(problem, tile, problem.operand), *gather)

    def columns(
        self, job: Job, x: Array, block: Block, buffers: dict[str, Array], chunk: int
    ) -> Array:
        """The column matrix of one block of a grouped ``x``."""
        wide = job.problem.op == "weight_grad"
        columns = _stored_columns(job, buffers["columns"], block, wide=wide)
        with stage("gather", self.name, chunk):
            images = x[slice(*block.images)]
            geometry = job.problem.geometry
            job.leaves.gather(images, columns.cells, geometry, block, buffers)
        if wide and columns.matrix.dtype.kind == "c":
            job.leaves.xp.conjugate(columns.matrix, out=columns.matrix)
        return columns.matrix

    def forward(
        self, job: Job, x: Array, w: Array, bias: Array | None, out: Array
    ) -> None:
        geometry = job.problem.geometry
        shared, workers = workspaces(self, job)
        weights = take_weights(job, w, shared)
        offset = take_bias(job, bias, shared)
        x, y = in_groups(x, geometry), in_groups(out, geometry)
        blocks = Shared(enumerate(geometry.blocks(job.cut.tile)))

        def body(worker: int) -> None:
            buffers = workers[worker]
            for chunk, block in blocks:
                columns = self.columns(job, x, block, buffers, chunk)
                with stage("gemm", self.name, chunk):
                    _write_block(job, weights, columns, offset, y, block, buffers)

        job.leaves.parallel(body, job.cut.workers)

    def input_grad(self, job: Job, dy: Array, w: Array, out: Array) -> None:
        geometry = job.problem.geometry
        shared, workers = workspaces(self, job)
        weights = take_weights(job, w, shared, conjugate=True).swapaxes(-1, -2)
        dy, dx = in_groups(dy, geometry), in_groups(out, geometry)
        regions = Shared(geometry.regions(job.cut.region))

        def body(worker: int) -> None:
            for region in regions:
                _write_region(job, weights, dy, dx, region, workers[worker])

        job.leaves.parallel(body, job.cut.workers)

    def weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        geometry, leaves = job.problem.geometry, job.leaves
        shared, workers = workspaces(self, job)
        x, dy = in_groups(x, geometry), in_groups(dy, geometry)
        sums = _sums(job, shared, out)

        def body(worker: int) -> None:
            # Worker i sums blocks i, i + workers, …: the same sums on every run.
            blocks = islice(
                enumerate(geometry.blocks(job.cut.tile)), worker, None, job.cut.workers
            )
            total = weight_matrix(sums[worker], geometry)
            buffers, add = workers[worker], False
            for chunk, block in blocks:
                columns = self.columns(job, x, block, buffers, chunk)
                cells = output_cells(dy, block)
                with stage("gemm", self.name, chunk):
                    _add_block(job, columns, cells, total, block, buffers, add=add)
                add = True

        leaves.parallel(body, job.cut.workers)
        for other in sums[1:]:
            leaves.xp.add(sums[0], other, out=sums[0])
        if not sums_in_place(job.problem):
            leaves.copy(sums[0], out)


def _column_buffer(problem: Problem, tile: Tile, dtype: DType) -> Buffer:
    geometry = problem.geometry
    return Buffer("columns", tile.positions * geometry.groups * geometry.patch, dtype)


def _stored_columns(
    job: Job, flat: Array, block: Block, *, wide: bool = False
) -> Stored:
    geometry = job.problem.geometry
    first, last = block.images
    return stored(
        flat,
        (last - first, geometry.groups, geometry.group_channels),
        geometry.kernel,
        block.shape,
        channels_first=geometry.channels_first,
        wide=wide,
    )


def _dy_buffer(problem: Problem, tile: Tile) -> tuple[Buffer, ...]:
    # The weight gradient sums over images too: several of them make one wide matrix
    # only after a copy.
    wide = problem.op == "weight_grad" and tile.images > 1
    if "dy" in problem.direct and not wide:
        return ()
    return (output_buffer(problem, "dy", tile),)


def _dx_buffer(problem: Problem, region: Tile) -> tuple[Buffer, ...]:
    if sums_in_place(problem):
        return ()
    cells = region.positions * problem.geometry.channels
    return (Buffer("dx", cells, problem.types.accumulate),)


def _sum_buffers(
    problem: Problem, cut: Cut, leaves: Leaves
) -> tuple[tuple[Buffer, ...], tuple[Buffer, ...]]:
    """One running sum for each worker, the first in the result where it can be."""
    geometry = problem.geometry
    cells = geometry.filters * geometry.patch
    sums = cut.workers - sums_in_place(problem)
    shared = Buffer("sums", sums * cells, problem.types.accumulate)
    several = geometry.count_blocks(cut.tile) > cut.workers
    if not (leaves.needs_partial and several):
        return (shared,), ()
    return (shared,), (Buffer("partial", cells, problem.types.accumulate),)


def _sums(job: Job, shared: dict[str, Array], out: Array) -> list[Array]:
    own = [out] if sums_in_place(job.problem) else []
    flat = shared["sums"].reshape(-1, *out.shape) if "sums" in shared else ()
    return [*own, *flat]


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
        job.leaves.gemm(weights, columns, matrix, bias=bias, fast=fast)
        return
    staged = staged_output(buffers["y"], geometry, block)
    job.leaves.gemm(weights, columns, staged.matrix, bias=bias, fast=fast)
    job.leaves.copy(staged.cells, cells)


def _write_region(
    job: Job,
    weights: Array,
    dy: Array,
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
        target[...] = 0
    blocks = geometry.blocks(job.cut.tile, region.images, region.output)
    images = None
    for chunk, block in enumerate(blocks):
        columns = _stored_columns(job, buffers["columns"], block)
        matrix = take_dy(job, output_cells(dy, block), buffers, block)
        with stage("gemm", Im2col.name, chunk):
            job.leaves.gemm(weights, matrix, columns.matrix, fast=job.problem.fast)
        with stage("scatter", Im2col.name, chunk):
            job.leaves.scatter(
                columns.cells,
                target[slice(*(i - region.images[0] for i in block.images))],
                geometry,
                block,
                region.cells,
                add=block.images == images,
                deterministic=job.problem.deterministic,
            )
        images = block.images
    if target is not cells:
        job.leaves.copy(target, cells)


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
    job.leaves.gemm(
        take_dy(job, dy, buffers, block, wide=True),
        columns.swapaxes(-1, -2),
        total,
        add=add,
        partial=buffers.get("partial"),
        fast=job.problem.fast,
    )
