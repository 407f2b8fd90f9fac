"""One kernel that gathers columns while it multiplies them, and never writes them.

The sums of `cuconv.strategies.im2col` without its buffer, on CUDA: tiles of the columns
are gathered to shared memory only.

    forward        Y  = W · X
    input_grad     a forward pass over dy for each phase of the strides
    weight_grad    dW = dY · Xᴴ

Nothing is allocated, unless a sum is split into parts because there are too few results
to occupy the device (split-K), or operands are copied to channels last: tensor cores
need vectors of eight halves, which are contiguous along channels.  Results are written
in place in either case.

``implicit_gemm.cu`` documents how one kernel computes all three.
"""

import itertools
import math
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from cuconv.arrays import Array, flattened
from cuconv.backends import Backend, Contraction
from cuconv.backends.blocking import Blocking, block_sizes
from cuconv.engine.costs import LAUNCHES, Work
from cuconv.engine.problem import Problem, in_groups, taps_reversed
from cuconv.geometry import Axis, Tile
from cuconv.memory import Buffer
from cuconv.strategies.base import (
    Job,
    Tiling,
    Tilings,
    Workspace,
    filters_of,
    words_of,
)

# The kernel counts elements along an axis in 32 bits, with room to add two of them; and
# images, channels and filters, with room for a block of results.
_LARGEST_REACH = 2**29
_LARGEST_COUNT = 2**30
# It counts the tiles of a sum in 32 bits, each of 8 terms at least.
_MOST_TERMS = 2**33
# Of a grid, along its first axis.
_MOST_BLOCKS = 2**31 - 1
# The parts of a sum, each a quarter more, so that some number of them fills processors;
# the blocks between which sums are split, and the least terms of a part.  Not yet
# measured on a GPU.
_PARTS = (2, 3, 4, 5, 6, 7, 9, 11, 13, 16, 20, 26, 32, 40, 51, 64)
_FEW_BLOCKS, _ENOUGH_BLOCKS, _LEAST_TERMS = 64, 512, 256
# The launches that copy two operands.
_COPYING = 2
_WORD = 16  # bytes of the widest copy


class Operands(IntEnum):
    """Operands where they are stored, or copied so that channels come last."""

    IN_PLACE = 0
    CHANNELS_LAST = 1


IN_PLACE, CHANNELS_LAST = Operands


class KernelVariant(NamedTuple):
    """Filters and columns of a block, parts of its sum, and how operands are read."""

    filters: int
    columns: int
    parts: int
    operands: Operands


class ImplicitGemm:
    """See `cuconv.strategies.Strategy`."""

    name = "implicit_gemm"
    libraries: tuple[str, ...] = ()
    capturable = True
    on_tensor_cores = True
    gains_from_size = True
    by_runs = False

    def supports(self, problem: Problem) -> tuple[bool, str]:
        reason = next(_refusals(problem), "")
        return not reason, reason

    def variants(self, problem: Problem, backend: Backend) -> tuple[KernelVariant, ...]:
        del backend
        sizes = block_sizes(problem.operand)
        rows, _, _ = _extents(problem)
        wide = [size for size in sizes if size[0] < 2 * rows] or sizes[-1:]
        layouts = (IN_PLACE, CHANNELS_LAST) if _can_copy(problem) else (IN_PLACE,)
        return tuple(
            KernelVariant(*size, parts, layout)
            for size, layout in itertools.product(wide, layouts)
            for parts in _splits(problem, size)
        )

    def describe(self, variant: KernelVariant) -> str:
        filters, columns, parts, layout = variant
        words = [f"blocks of {filters}×{columns}"]
        if parts > 1:
            words.append(f"sums in {parts} parts")
        if layout == CHANNELS_LAST:
            words.append("operands copied to channels last")
        return ", ".join(words)

    def tilings(
        self, problem: Problem, variant: KernelVariant, backend: Backend
    ) -> Tilings:
        del variant, backend
        g = problem.geometry
        tile = Tile(max(g.images, 1), tuple(max(n, 1) for n in g.out))
        return Tilings(max(g.images * g.positions, 1), lambda _: tile)

    def workspace(
        self, problem: Problem, tiling: Tiling, backend: Backend
    ) -> Workspace:
        del backend
        *_, parts, layout = tiling.variant
        g, own = problem.geometry, problem.operand
        cells = 0 if parts == 1 else parts * _results(problem)
        shared = [Buffer("parts", cells, problem.types.accumulate)]
        if layout == IN_PLACE:
            return Workspace((), tuple(shared))
        y = Buffer("dy", g.images * g.filters * g.positions, own)
        if problem.op == "input_grad":
            shared.append(y)
        else:
            shared.append(Buffer("x", g.images * g.channels * g.cells, own))
        if problem.op == "weight_grad":
            return Workspace((), (*shared, y))
        return Workspace((Buffer("w", g.filters * g.patch, own),), tuple(shared))

    def work(self, problem: Problem, tiling: Tiling) -> Work:
        g = problem.geometry
        tall, wide, parts, layout = tiling.variant
        terms, tiles = _extents(problem)[-1], _count_blocks(problem, (tall, wide))
        phases = math.prod(min(axis.stride, max(axis.size, 1)) for axis in g.axes)
        launches = (phases if problem.op == "input_grad" else 1) + (parts > 1)
        sizes = g.images * (g.channels * g.cells + g.filters * g.positions)
        unread = g.images * g.channels * max(g.cells - g.positions * g.taps, 0)
        by_dense, by_x = _vectors(problem, layout)
        # A result costs as many instructions as a copy, whichever part it is of.
        results = float(tiles) * parts * tall * wide
        return Work(
            multiply=float(tiles) * tall * wide * terms,
            loads=float(tiles) * terms * (tall / by_dense + wide / by_x) + results,
            moved=words_of(problem, sizes - unread + g.filters * g.patch),
            copy=sizes * layout + parts * _results(problem) * (parts > 1),
            tiles=tiles * parts,
            blocks=(launches + _COPYING * layout) / LAUNCHES,
        )

    def weights(self, job: Job, w: Array, kept: dict[str, Array]) -> Array:
        """(G, K/G, C/G, *kernel); the channels that are summed are the third axis."""
        g, reverse = job.problem.geometry, "reversed" in job.problem.zero_copy
        view = filters_of(w, job.problem)
        if job.problem.op == "input_grad":
            view = view.swapaxes(1, 2)
        if job.tiling.variant[-1] == IN_PLACE:
            return view
        # Copied as it is in memory, and reversed again when it is read.
        w = taps_reversed(w, g) if reverse else w
        flat = w.reshape(g.groups, g.group_filters, g.group_channels, g.taps)
        kernel_last = kept["w"].reshape(
            *(g.groups, view.shape[1], *g.kernel, view.shape[2])
        )
        if job.problem.op == "input_grad":
            # (G, K/G, C/G · taps) becomes (G, C/G · taps, K/G).
            flat = flat.reshape(1, g.groups, g.group_filters, g.patch)
        with job.backend.stage("weights", self.name):
            exchanged = kept["w"].reshape(*flat.shape[:2], flat.shape[3], flat.shape[2])
            _kernels(job).transpose(flat, exchanged)
        copy = kernel_last.transpose(0, 1, g.rank + 2, *range(2, g.rank + 2))
        taps = (slice(None, None, -1),) * g.rank
        return copy[(..., *taps)] if reverse else copy

    def forward(
        self, job: Job, x: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        g = job.problem.geometry
        x, y = _operand(job, "x", in_groups(x, g)), in_groups(out, g)
        how = _how(job, conjugated=int(job.problem.conjugates_weights))
        with job.backend.stage("product", self.name):
            _kernels(job).convolve(
                *(weights, x, bias, y, g.axes, how), job.shared["parts"]
            )

    def input_grad(
        self, job: Job, dy: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        g = job.problem.geometry
        dy, dx = _operand(job, "dy", in_groups(dy, g)), in_groups(out, g)
        how = _how(job, conjugated=int(job.problem.conjugates_weights))
        reverse = (slice(None, None, -1),) * g.rank
        phases = list(g.input_phases())
        if sum(phase.geometry.positions for phase in phases) < g.cells:
            # The initial value for results without taps, with an axis of channels.
            ones = (1,) * g.rank
            if bias is None:
                job.backend.fill(dx, 0)
            else:
                job.backend.copy(bias.reshape(g.groups, -1, *ones), dx)
        for number, phase in enumerate(phases):
            cells = dx[(..., *phase.results)]
            with job.backend.stage("product", self.name, number):
                taps = weights[(..., *phase.taps)][(..., *reverse)]
                _kernels(job).convolve(
                    *(taps, dy, bias, cells, phase.geometry.axes, how),
                    job.shared["parts"],
                )

    def weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        g = job.problem.geometry
        x = _operand(job, "x", in_groups(x, g))
        dy = _operand(job, "dy", in_groups(dy, g))
        is_complex = job.problem.operand.kind == "c"
        dw, how = filters_of(out, job.problem), _how(job, conjugated=2 * is_complex)
        with job.backend.stage("product", self.name):
            _kernels(job).correlate(dy, x, dw, g.axes, how, job.shared["parts"])


def _splits(problem: Problem, size: tuple[int, int]) -> tuple[int, ...]:
    """The numbers of parts that are worth a try: 1, and some that fill a device."""
    strided = problem.op == "input_grad" and not problem.geometry.is_unit_stride
    if strided or "run" not in problem.zero_copy:
        return (1,)
    terms, blocks = _extents(problem)[-1], _count_blocks(problem, size)
    most = min(_ENOUGH_BLOCKS // max(blocks, 1), terms // _LEAST_TERMS)
    allowed = [parts for parts in _PARTS if parts <= most]
    fills = (n for n in allowed if n * blocks >= _FEW_BLOCKS or n == allowed[-1])
    return (1, *fills)


def _refusals(problem: Problem) -> Iterator[str]:
    g = problem.geometry
    if problem.module == "numpy":
        yield "it is a CUDA kernel"
    if g.rank > 3:
        yield f"{g.rank} axes, 3 at most"
    if problem.flipped and g.is_unit_stride:
        yield "its input gradient runs phase by phase"
    if not problem.uniform:
        yield f"not all arrays are {problem.operand}, and it casts none"
    reach, count = max(map(_reach, g.axes)), max(g.images, g.channels, g.filters)
    if reach >= _LARGEST_REACH:
        yield f"an axis spans {reach} elements, {_LARGEST_REACH} are too many"
    if count >= _LARGEST_COUNT:
        yield f"{count} images, channels or filters, {_LARGEST_COUNT} are too many"
    terms = _extents(problem)[-1]
    if terms > _MOST_TERMS:
        yield f"sums of {terms} terms, {_MOST_TERMS} at most"
    blocks = _count_blocks(problem, block_sizes(problem.operand)[-1])
    if blocks > _MOST_BLOCKS:
        yield f"its grid would have {blocks} blocks, {_MOST_BLOCKS} at most"


def _kernels(job: Job) -> Contraction:
    found = job.backend.contraction
    if found is None:
        raise RuntimeError(f"{job.backend.device} has no kernel for implicit_gemm")
    return found


def _operand(job: Job, name: str, array: Array) -> Array:
    """The array (N, G, C, *spatial), or a copy of it with channels last."""
    if job.tiling.variant[-1] == IN_PLACE:
        return array
    images, groups, channels, *cells = array.shape
    source = flattened(array, len(cells))
    if source.shape[-1] > 1 and source.strides[-1] != source.itemsize:
        return array  # channels are last already
    copy = job.shared[name].reshape(images, groups, *cells, channels)
    with job.backend.stage("gather", ImplicitGemm.name):
        _kernels(job).transpose(source, _rows_of(copy))
    return copy.transpose(0, 1, len(cells) + 2, *range(2, len(cells) + 2))


def _rows_of(array: Array) -> Array:
    """View (N, G, *spatial, C) as (N, G, positions, C)."""
    images, groups, *cells, channels = array.shape
    return array.reshape(images, groups, math.prod(cells), channels)


def _can_copy(problem: Problem) -> bool:
    """True if a copy to channels last allows vector loads for tensor cores."""
    g = problem.geometry
    needed = {"forward": {"x", "w"}, "input_grad": {"dy", "w"}}
    ready = problem.zero_copy | ({"w"} if "reversed" in problem.zero_copy else set())
    direct = needed.get(problem.op, {"dy", "x"}) <= ready
    terms = {"input_grad": g.group_filters}.get(problem.op, g.group_channels)
    whole = terms % (_WORD // problem.operand.itemsize) == 0
    return problem.is_for_tensor_cores and g.channels_first and direct and whole


def _vectors(problem: Problem, layout: int) -> tuple[int, int]:
    """Elements in one copy of the dense operand, and of ``x``."""
    wide = max(_WORD // problem.operand.itemsize, 1)
    last = layout == CHANNELS_LAST or not problem.geometry.channels_first
    if problem.is_for_tensor_cores:
        return wide, wide if last else 1
    by_rows = last and problem.op != "input_grad"
    return wide if by_rows else 1, wide if last and problem.op == "weight_grad" else 1


def _how(job: Job, conjugated: int = 0) -> Blocking:
    filters, columns, parts, _ = job.tiling.variant
    fast = job.problem.fast
    return Blocking(filters, columns, parts, fast=fast, conjugated=conjugated)


def _reach(axis: Axis) -> int:
    """The largest coordinate that the kernel computes, padding included."""
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
    # Over all phases: one column for each element, each with some of the taps.
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
