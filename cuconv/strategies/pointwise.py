"""1×1 convolutions with stride 1 and no padding: the input is its own column matrix.

The sums of `cuconv.strategies.im2col`, with nothing gathered and nothing scattered; the
input gradient is the forward pass with the weights transposed.
"""

from cuconv.arrays import Array, flattened
from cuconv.geometry import Block, Tile
from cuconv.leaves import Leaves
from cuconv.memory import Buffer
from cuconv.profiling import stage
from cuconv.strategies.base import (
    Cut,
    Job,
    Needs,
    Problem,
    Shared,
    in_groups,
    output_cells,
    take_weights,
    weight_buffer,
    workspaces,
)
from cuconv.strategies.im2col import Im2col

_OPERANDS = {
    "forward": ("x", "out"),
    "input_grad": ("dy", "out"),
    "weight_grad": ("x", "dy"),
}


class Pointwise(Im2col):
    """See `cuconv.strategies.Strategy`."""

    name = "pointwise"

    def supports(self, problem: Problem) -> tuple[bool, str]:
        if not problem.geometry.is_pointwise:
            return False, "the kernel has more than one tap, a stride or padding"
        for name in _OPERANDS[problem.op]:
            if name not in problem.direct:
                return False, f"{name} cannot be multiplied where it lies"
        if problem.op == "weight_grad" and problem.operand.kind == "c":
            return False, "complex x would have to be conjugated where it lies"
        return True, ""

    def tile(self, problem: Problem, positions: int) -> Tile:
        tile = super().tile(problem, positions)
        # Images are apart in memory, and the weight gradient sums over them.
        return tile._replace(images=1) if problem.op == "weight_grad" else tile

    def needs(self, problem: Problem, cut: Cut, leaves: Leaves) -> Needs:
        if problem.op == "input_grad":
            return Needs(weight_buffer(problem), ())
        return super().needs(problem, cut, leaves)

    def pieces(self, problem: Problem, cut: Cut) -> int:
        return problem.geometry.count_blocks(cut.tile)

    def column_buffers(
        self, problem: Problem, tile: Tile, leaves: Leaves
    ) -> tuple[Buffer, ...]:
        del problem, tile, leaves
        return ()

    def columns(
        self, job: Job, x: Array, block: Block, buffers: dict[str, Array], chunk: int
    ) -> Array:
        del buffers, chunk
        return flattened(output_cells(x, block), job.problem.geometry.rank)

    def input_grad(self, job: Job, dy: Array, w: Array, out: Array) -> None:
        geometry = job.problem.geometry
        shared, _ = workspaces(self, job)
        weights = take_weights(job, w, shared, conjugate=True).swapaxes(-1, -2)
        dy, dx = in_groups(dy, geometry), in_groups(out, geometry)
        blocks = Shared(enumerate(geometry.blocks(job.cut.tile)))

        def body(worker: int) -> None:
            del worker
            for chunk, block in blocks:
                cells = flattened(output_cells(dx, block), geometry.rank)
                with stage("gemm", self.name, chunk):
                    columns = self.columns(job, dy, block, {}, chunk)
                    job.leaves.gemm(weights, columns, cells, fast=job.problem.fast)

        job.leaves.parallel(body, job.cut.workers)
