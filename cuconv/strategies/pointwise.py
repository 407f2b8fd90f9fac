"""Kernels of one tap: the input, or a strided view of it, is the column matrix.

The sums of `cuconv.strategies.im2col`, without gathering if stride is 1 and there is no
padding; the input gradient is then the forward pass with the weights transposed.
"""

from cuconv.arrays import Array, flattened
from cuconv.backends import Backend
from cuconv.engine.costs import LAUNCHES, Work
from cuconv.engine.problem import Problem, in_groups
from cuconv.geometry import Block
from cuconv.memory import Buffer
from cuconv.strategies.base import (
    Job,
    Tiling,
    Tilings,
    Workspace,
    bias_buffer,
    output_cells,
    parts_of,
    take_bias,
    weight_buffer,
    words_of,
)
from cuconv.strategies.im2col import (
    EACH,
    LONG_ROW,
    WIDE,
    Im2col,
    Sharing,
    filters_apart,
)

_OPERANDS = {
    "forward": ("x", "out"),
    "input_grad": ("dy", "out"),
    "weight_grad": ("x", "dy"),
}


def _lies_ready(problem: Problem, variant: Sharing = EACH) -> bool:
    """True if nothing needs to be gathered or scattered."""
    if variant != EACH:
        return False
    if problem.op == "weight_grad" and problem.operand.kind == "c":
        return False  # x would have to be conjugated in place
    ready = all(name in problem.zero_copy for name in _OPERANDS[problem.op])
    return problem.geometry.is_pointwise and ready


class Pointwise(Im2col):
    """See `cuconv.strategies.Strategy`."""

    name = "pointwise"

    def supports(self, problem: Problem) -> tuple[bool, str]:
        if problem.geometry.taps != 1:
            return False, f"the kernel has {problem.geometry.taps} taps"
        if problem.flipped:
            return False, "its input gradient multiplies by the weights transposed"
        return True, ""

    def variants(self, problem: Problem, backend: Backend) -> tuple[Sharing, ...]:
        if not _lies_ready(problem) or problem.geometry.images == 1:
            return super().variants(problem, backend)
        short = problem.op != "input_grad" and problem.geometry.positions < LONG_ROW
        both = (EACH, WIDE) if short and problem.module == "numpy" else (EACH,)
        more = super().variants(problem, backend) if problem.op == "weight_grad" else ()
        return tuple(dict.fromkeys((*both, *more)))

    def tilings(self, problem: Problem, variant: Sharing, backend: Backend) -> Tilings:
        found, g = super().tilings(problem, variant, backend), problem.geometry
        if not _lies_ready(problem):
            return found
        found = found._replace(positions=g.images * g.positions)
        if problem.op == "input_grad":
            return found._replace(splits=filters_apart(problem, g.group_channels))
        if problem.op == "weight_grad" and _lies_ready(problem, variant):
            # Images are not contiguous, and the gradient sums over them: several make
            # one wide matrix only if they are copied, which pays for small ones.
            return found._replace(tile=lambda n: g.tile(n)._replace(images=1))
        return found

    def workspace(
        self, problem: Problem, tiling: Tiling, backend: Backend
    ) -> Workspace:
        if problem.op == "input_grad" and _lies_ready(problem):
            return Workspace(weight_buffer(problem), bias_buffer(problem))
        return super().workspace(problem, tiling, backend)

    def work(self, problem: Problem, tiling: Tiling) -> Work:
        work = super().work(problem, tiling)
        if not _lies_ready(problem, tiling.variant):
            return work
        pieces = work.pieces
        if problem.op == "input_grad":
            pieces = problem.geometry.count_blocks(tiling.tile) * tiling.splits
        g = problem.geometry
        moved = work.moved + words_of(problem, g.images * g.positions * g.channels)
        work = work._replace(gather=0, scatter=0, moved=moved, pieces=pieces)
        if problem.module != "numpy":
            # One launch, which gathers nothing.
            work = work._replace(blocks=work.blocks / LAUNCHES)
        return work._replace(multiply=g.multiplications)

    def column_buffers(
        self, problem: Problem, tiling: Tiling, backend: Backend
    ) -> tuple[Buffer, ...]:
        if _lies_ready(problem, tiling.variant):
            return ()
        return super().column_buffers(problem, tiling, backend)

    def columns(
        self, job: Job, x: Array, block: Block, buffers: dict[str, Array], chunk: int
    ) -> Array:
        if not _lies_ready(job.problem, job.tiling.variant):
            return super().columns(job, x, block, buffers, chunk)
        return flattened(output_cells(x, block), job.problem.geometry.rank)

    def input_grad(
        self, job: Job, dy: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        if not _lies_ready(job.problem):
            super().input_grad(job, dy, weights, bias, out)
            return
        geometry, fast = job.problem.geometry, job.problem.fast
        offset = take_bias(job, bias)
        dy, dx = in_groups(dy, geometry), in_groups(out, geometry)

        def body(
            chunk: int, item: tuple[Block, slice], buffers: dict[str, Array]
        ) -> None:
            del buffers
            block, part = item
            cells = flattened(output_cells(dx, block)[:, :, part], geometry.rank)
            columns = flattened(output_cells(dy, block), geometry.rank)
            with job.backend.stage("gemm", self.name, chunk):
                some = weights.swapaxes(-1, -2)[:, :, part]
                own = offset if offset is None else offset[:, :, part]
                job.backend.gemm(some, columns, cells, bias=own, fast=fast)

        parts = parts_of(geometry.group_channels, job.tiling.splits)
        job.each(((block, part) for block in job.blocks for part in parts), body)
