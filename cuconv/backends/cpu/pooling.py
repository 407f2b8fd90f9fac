"""Pooling over NumPy arrays, in pieces that stay in cache; see `pool_sweeps`."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from cuconv.arrays import Array
from cuconv.backends.cpu.machine import call_overhead
from cuconv.backends.cpu.pool_maxima import MaxWorker
from cuconv.backends.cpu.pool_norms import NormWorker
from cuconv.backends.cpu.pool_places import TakeWorker
from cuconv.backends.cpu.pool_sweeps import (
    Buffers,
    Do,
    MeanWorker,
    PoolWorker,
    place_of,
)
from cuconv.engine.pool_problem import (
    MAXIMUM,
    MEAN,
    NORM,
    TAKE,
    PoolInputs,
    PoolProblem,
    PoolTiling,
)
from cuconv.geometry import Block, Range, Region
from cuconv.memory import Buffer, MemoryLimitError, is_little, workspace_bytes

# Cells of x in a piece.  (8, 64, 112, 112), float32, 3×3 of stride 2, one core of an
# AMD EPYC with 32 MiB of L3 and other work to do: pieces of 2^16, 2^17, 2^18 and 2^19
# took 10.8, 9.0, 8.2 and 7.5 ms for maxima, 8.3, 6.4, 5.4 and 4.8 for their gradient.
_PIECE = 2**19
# Below this many cells a second worker costs more than it saves.
_WORTH_WORKERS = 2**17

_WORKERS: dict[str, Any] = {
    MAXIMUM: MaxWorker,
    MEAN: MeanWorker,
    NORM: NormWorker,
    TAKE: TakeWorker,
}


class CpuPools:
    """See `cuconv.backends.PoolBackend`; ``do`` and ``each`` are a backend's."""

    def __init__(self, do: Do, each: Callable[..., None], workers: int) -> None:
        self._do, self._each, self._workers = do, each, workers

    def tiling(self, problem: PoolProblem, limit: int) -> PoolTiling:
        geometry = problem.geometry
        cells = geometry.images * geometry.channels * max(geometry.cells, 1)
        is_large = cells > _WORTH_WORKERS
        workers = self._workers if is_large else 1
        for count in sorted({workers, 1}, reverse=True):
            budget = _PIECE if count == 1 else min(_PIECE, cells // (2 * count))
            while budget:
                tiling = _tiling(problem, budget, count)
                if _call_bytes(problem, tiling) <= limit:
                    return tiling._replace(threads=self._workers if is_large else 0)
                if is_little(self.buffers(problem, tiling)):
                    break
                budget //= 2
        raise MemoryLimitError(limit, _call_bytes(problem, tiling), "a piece")

    def buffers(self, problem: PoolProblem, tiling: PoolTiling) -> tuple[Buffer, ...]:
        needed: tuple[Buffer, ...] = _WORKERS[problem.kind].buffers(problem, tiling)
        return needed

    def reduce(
        self,
        problem: PoolProblem,
        tiling: PoolTiling,
        scratch: tuple[Buffers, ...],
        x: Array,
        y: Array,
        indices: Array | None,
    ) -> None:
        def body(number: int, piece: tuple[Range, Block], worker: PoolWorker) -> None:
            del number
            span, block = piece
            place = place_of(block.images, span, block.output)
            window = x[place_of(block.images, span, block.window)]
            found = None if indices is None else indices[place]
            worker.reduce(block, span, window, y[place], found)

        blocks = problem.geometry.blocks(tiling.tile)
        self._run(problem, tiling, scratch, blocks, body)

    def backward(
        self,
        problem: PoolProblem,
        tiling: PoolTiling,
        scratch: tuple[Buffers, ...],
        given: PoolInputs,
        dx: Array,
    ) -> None:
        def body(number: int, piece: tuple[Range, Region], worker: PoolWorker) -> None:
            del number
            span, region = piece
            into = dx[place_of(region.images, span, region.cells)]
            if not region.is_reached:
                self._do(np.ndarray.fill, into, 0)
                return
            worker.backward(region, given, span, into)

        regions = problem.geometry.regions(tiling.tile)
        self._run(problem, tiling, scratch, regions, body)

    def _run(
        self,
        problem: PoolProblem,
        tiling: PoolTiling,
        scratch: tuple[Buffers, ...],
        pieces: Iterable[Any],
        body: Callable[..., None],
    ) -> None:
        """Share out the pieces, each with some of the channels."""
        channels, step = problem.geometry.channels, tiling.channels
        items = (
            ((start, min(start + step, channels)), piece)
            for piece in pieces
            for start in range(0, channels, step)
        )
        worker = _WORKERS[problem.kind]
        workers = tuple(worker(problem, buffers, self._do) for buffers in scratch)
        self._each(items, body, workers, single_threaded=tiling.workers == 1)


def _call_bytes(problem: PoolProblem, tiling: PoolTiling) -> int:
    """Everything that a call takes beyond its arrays."""
    buffers = _WORKERS[problem.kind].buffers(problem, tiling)
    item = problem.accumulate.itemsize
    own = workspace_bytes(buffers) * tiling.workers
    return own + call_overhead(tiling.workers, max(item, 8))


def _tiling(problem: PoolProblem, budget: int, workers: int) -> PoolTiling:
    """Pieces of about so many cells: whole planes of some channels where they fit.

    With the channels last, all channels of some cells.
    """
    g = problem.geometry
    cells = max(g.cells, 1)
    own = cells if problem.is_gradient else max(g.positions, 1)
    several = max(budget * own // cells, 1)
    fitting = several // own if g.channels_first else several
    channels = max(min(g.channels, fitting), 1)
    if not g.channels_first:
        # One channel alone NumPy would sum in another order than several.
        while channels < g.channels and (channels == 1 or g.channels % channels == 1):
            channels += 1
    if problem.is_gradient:
        tile = g.region_tile(several // channels)
        count = g.count_regions(tile)
    else:
        tile = g.tile(several // channels)
        count = g.count_blocks(tile)
    return PoolTiling(tile, channels, workers, count * -(-g.channels // channels))
