"""One kernel that gathers columns while it multiplies them, and never writes them.

The sums of `cuconv.strategies.im2col` without its buffer, on CUDA: a tile of the
columns lives in the memory of a multiprocessor while it is needed there.  Nothing is
allocated, unless a sum is cut into parts because there are too few results to keep the
device busy.

    forward        Y  = W · X
    input_grad     a forward pass over dy for each phase of the strides
    weight_grad    dW = dY · Xᴴ

The kernel's text, ``implicit_gemm.cu``, says how one product serves all three.
"""

import math
from collections.abc import Iterator
from typing import Any

from cuconv._cuda.variants import tile_sizes
from cuconv.arrays import Array
from cuconv.geometry import Axis, Block, Tile
from cuconv.leaves import Leaves
from cuconv.memory import Buffer
from cuconv.profiling import stage
from cuconv.strategies.base import (
    Cut,
    Job,
    Needs,
    Problem,
    Work,
    filters_of,
    in_groups,
    verdict,
)

# The kernel counts cells along an axis in 32 bits, with room to add two of them.
_LARGEST_REACH = 2**29
# Of a grid, along its first axis.
_MOST_BLOCKS = 2**31 - 1
# Into how many parts a sum may be cut, how many blocks are enough without, and the
# least terms of a part; not yet measured on a GPU.
_PARTS = (1, 4, 16, 64)
_ENOUGH_BLOCKS, _LEAST_TERMS = 512, 256
# Cells of the halo of a tile: what its operands cost beside its product.
_HALO = 16


class ImplicitGemm:
    """See `cuconv.strategies.Strategy`."""

    name = "implicit_gemm"
    capturable = True

    def supports(self, problem: Problem) -> tuple[bool, str]:
        g = problem.geometry
        return verdict(
            (problem.module == "numpy", "it is a CUDA kernel"),
            (g.rank > 3, f"{g.rank} axes, 3 at most"),
            (problem.flipped, "its input gradient goes phase by phase"),
            (
                not problem.uniform,
                f"not all arrays are {problem.operand}, and it casts none",
            ),
            (
                max(map(_reach, g.axes)) >= _LARGEST_REACH,
                f"an axis spans more than {_LARGEST_REACH} cells",
            ),
            (
                _count_blocks(problem, tile_sizes(problem.operand)[-1]) > _MOST_BLOCKS,
                f"its grid would have more than {_MOST_BLOCKS} blocks",
            ),
        )

    def variants(self, problem: Problem) -> tuple[tuple[int, ...], ...]:
        """Filters and columns of a block of results, and the parts of its sum."""
        sizes = tile_sizes(problem.operand)
        rows, _, _ = _extents(problem)
        wide = [size for size in sizes if size[0] < 2 * rows] or sizes[-1:]
        return tuple(
            (*size, parts)
            for size in wide
            for parts in _PARTS
            if parts == 1 or self._is_worth_cutting(problem, size, parts)
        )

    def _is_worth_cutting(
        self, problem: Problem, size: tuple[int, int], parts: int
    ) -> bool:
        g = problem.geometry
        terms, blocks = _extents(problem)[-1], _count_blocks(problem, size)
        strided = problem.op == "input_grad" and not g.is_unit_stride
        few = blocks * parts <= _ENOUGH_BLOCKS and terms >= parts * _LEAST_TERMS
        return few and "out" in problem.direct and not strided

    def describe(self, variant: tuple[int, ...]) -> str:
        filters, columns, parts = variant
        words = f"blocks of {filters}×{columns}"
        return words if parts == 1 else f"{words}, sums in {parts} parts"

    def preferred(self, problem: Problem, leaves: Leaves) -> int:
        del leaves
        return max(problem.geometry.images * problem.geometry.positions, 1)

    def tile(self, problem: Problem, positions: int, variant: tuple[int, ...]) -> Tile:
        del positions, variant
        g = problem.geometry
        return Tile(max(g.images, 1), tuple(max(n, 1) for n in g.out))

    def lanes(self, problem: Problem, variant: tuple[int, ...]) -> int:
        del problem, variant
        return 1

    def blocks(self, problem: Problem, cut: Cut) -> Iterator[Block]:
        return problem.geometry.pieces(cut.tile)

    def needs(self, problem: Problem, cut: Cut, leaves: Leaves) -> Needs:
        del leaves
        *_, parts = cut.variant
        cells = 0 if parts == 1 else parts * _results(problem)
        return Needs((), (Buffer("parts", cells, problem.types.accumulate),))

    def pieces(self, problem: Problem, cut: Cut) -> int:
        del problem, cut
        return 1

    def work(self, problem: Problem, cut: Cut) -> Work:
        g = problem.geometry
        tall, wide, parts = cut.variant
        terms, tiles = _extents(problem)[-1], _count_blocks(problem, (tall, wide))
        phases = math.prod(axis.stride for axis in g.axes)
        launches = phases if problem.op == "input_grad" else 1 + (parts > 1)
        sizes = g.images * (g.channels * g.cells + g.filters * g.positions)
        halo = 1 + _HALO / tall + _HALO / wide
        return Work(
            multiply=float(tiles) * tall * wide * terms * halo,
            copy=sizes + (2 * parts * _results(problem) if parts > 1 else 0),
            tiles=tiles * parts,
            blocks=launches,
        )

    def weights(self, job: Job, w: Array, kept: dict[str, Array]) -> Array:
        del job, kept
        return w

    def forward(
        self, job: Job, x: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        g = job.problem.geometry
        views = filters_of(weights, job.problem), in_groups(x, g)
        how = _how(job, conjugated=int(job.problem.conjugates_weights))
        with stage("product", self.name):
            _kernels().convolve(
                *views, bias, in_groups(out, g), g.axes, how, job.shared["parts"]
            )

    def input_grad(
        self, job: Job, dy: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        g = job.problem.geometry
        w = filters_of(weights, job.problem).swapaxes(1, 2)
        dy, dx = in_groups(dy, g), in_groups(out, g)
        how = _how(job, conjugated=int(job.problem.conjugates_weights))
        # Where no tap reaches, a sum is its beginning: channels beside their cells.
        start = 0 if bias is None else bias.reshape(g.groups, -1, *(1,) * g.rank)
        for number, phase in enumerate(g.phases()):
            cells = dx[(..., *phase.cells)]
            with stage("product", self.name, number):
                if phase.geometry is None:
                    cells[...] = start
                    continue
                taps = w[(..., *phase.taps)]
                _kernels().convolve(
                    *(taps, dy, bias, cells, phase.geometry.axes, how),
                    job.shared["parts"],
                )

    def weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        g = job.problem.geometry
        how = _how(job, conjugated=2 if job.problem.operand.kind == "c" else 0)
        views = in_groups(dy, g), in_groups(x, g), filters_of(out, job.problem)
        with stage("product", self.name):
            _kernels().correlate(*views, g.axes, how, job.shared["parts"])


def _kernels() -> Any:
    """The launches; CuPy is imported when one is first made."""
    from cuconv._cuda import contraction  # noqa: PLC0415

    return contraction


def _how(job: Job, conjugated: int = 0) -> Any:
    filters, columns, parts = job.cut.variant
    fast = job.problem.fast
    return _kernels().How(filters, columns, parts, fast=fast, conjugated=conjugated)


def _reach(axis: Axis) -> int:
    """The largest coordinate that the kernel forms, padding and gradients included."""
    pads = abs(axis.before) + abs(axis.after)
    return int(axis.size + pads + axis.extent + axis.stride)


def _extents(problem: Problem) -> tuple[int, int, int]:
    """Rows and columns of the product in one group, and the terms of each sum."""
    g = problem.geometry
    positions = g.images * g.positions
    if problem.op == "forward":
        return g.group_filters, positions, g.patch
    if problem.op == "weight_grad":
        return g.group_filters, g.patch, positions
    # Over all phases: as many columns as cells, each with its share of the taps.
    jumps = math.prod(axis.stride for axis in g.axes)
    return (
        g.group_channels,
        g.images * g.cells,
        max(g.group_filters * g.taps // jumps, 1),
    )


def _count_blocks(problem: Problem, size: tuple[int, int]) -> int:
    """Blocks of results of this size, in all groups."""
    rows, columns, _ = _extents(problem)
    return problem.geometry.groups * -(-rows // size[0]) * -(-columns // size[1])


def _results(problem: Problem) -> int:
    g = problem.geometry
    return {
        "forward": g.images * g.filters * g.positions,
        "input_grad": g.images * g.channels * g.cells,
        "weight_grad": g.filters * g.patch,
    }[problem.op]
