"""Plans of pooling: tiles that fit the limit, and the arrays of a call as planes."""

import math
from typing import Any

import numpy as np

from cuconv.arrays import Array, DType, is_aligned, module_of
from cuconv.backends import Backend, backend_of
from cuconv.backends.pools import INDICES, RESULT, PoolSteps
from cuconv.config import settings
from cuconv.engine.pool_problem import PoolProblem, PoolTiling
from cuconv.engine.program import MOST_BYTES
from cuconv.engine.recorded import RecordedPlan, Result, Workspace, check_results
from cuconv.geometry import WindowGeometry
from cuconv.memory import (
    MemoryLimit,
    MemoryLimitError,
    parse_memory_limit,
    workspace_bytes,
)
from cuconv.overflow import magnitude, may_wrap, warn_of_wrapping

INDEX = np.dtype(np.int64)
MOST_AXES = 3
# NumPy sums more elements than this in blocks of this size, if it casts them.
_ONE_RUN = 1024
_ALWAYS = 2**62


def plan_of(
    problem: PoolProblem,
    arrays: dict[str, Array],
    out: Any = None,
    memory_limit: MemoryLimit = None,
    names: tuple[str, ...] | None = None,
) -> RecordedPlan:
    """Plan a problem; its inputs have been checked, its results are checked here.

    Parameters
    ----------
    problem
        The problem.
    arrays
        Its inputs by their names, of which the layout matters.
    out
        What the results are written to: an array, a pair with indices, or None.
    memory_limit
        As the caller gave it.
    names
        The names of the arrays of a run, in order; by default those of ``arrays``.
    """
    outs = out if problem.with_indices else (out,)
    if out is None:
        outs = (None,) * (1 + problem.with_indices)
    if not (isinstance(outs, tuple) and len(outs) == 1 + problem.with_indices):
        raise TypeError("with return_indices, out must be a pair of arrays")
    backend, results = pool_backend(problem, arrays), results_of(problem)
    check_results(backend, arrays, results, outs)
    limit = limit_of(memory_limit)
    tiling = tiling_within(problem, backend, limit)
    buffers = backend.pools.buffers(problem, tiling)
    own = tiling.workers * workspace_bytes(buffers)
    item = max(problem.accumulate.itemsize, INDEX.itemsize)
    own += backend.overhead(tiling.workers, item)
    return RecordedPlan(
        backend,
        PoolSteps(problem, tiling),
        names or tuple(arrays),
        results,
        Workspace(buffers, tiling.workers, tiling.pieces),
        threads=tiling.threads,
        buffered=_buffered(problem, next(iter(arrays.values()))),
        spare=MOST_BYTES if limit is None else limit - own,
    )


def results_of(problem: PoolProblem) -> tuple[Result, ...]:
    """The results of a call: y and where its maxima are, or dx."""
    g = problem.geometry
    if problem.is_gradient:
        return (Result(RESULT, g.x_shape, problem.result),)
    shape = y_shape(g)
    y = Result(RESULT, shape, problem.result)
    return (y, Result(INDICES, shape, INDEX))[: 1 + problem.with_indices]


def y_shape(geometry: WindowGeometry) -> tuple[int, ...]:
    """The shape of what is pooled."""
    return geometry.array_shape(geometry.channels, geometry.out)


def pool_backend(problem: PoolProblem, arrays: dict[str, Array]) -> Backend:
    """The backend of these arrays; more axes than pooling takes are refused."""
    rank = problem.geometry.rank
    if rank > MOST_AXES:
        raise ValueError(
            f"x has {rank} spatial axes; pooling takes {MOST_AXES} at most"
        )
    return backend_of(module_of(arrays), next(iter(arrays.values())))


def tiling_within(
    problem: PoolProblem, backend: Backend, limit: int | None
) -> PoolTiling:
    """Tiles of a call within a limit; without one, the least that will do."""
    if limit is not None:
        return backend.pools.tiling(problem, limit)
    try:
        return backend.pools.tiling(problem, backend.default_memory_limit)
    except MemoryLimitError as error:
        return backend.pools.tiling(problem, error.smallest)


def limit_of(memory_limit: MemoryLimit) -> int | None:
    """The limit of a call in bytes: its own, or the one that is set."""
    limit = settings().memory_limit
    return limit if memory_limit is None else parse_memory_limit(memory_limit)


def warn_of_sums(name: str, dtype: DType, geometry: WindowGeometry) -> None:
    """Warn if sums of what overlapping windows give to one element may wrap around."""
    terms = math.prod(axis.reach(1) for axis in geometry.axes)
    if terms > 1 and may_wrap(dtype):
        what = f"a sum of {terms} {dtype} of {name}"
        bound = terms * magnitude(dtype)
        warn_of_wrapping(dtype, bound, what, f"pass {name}.astype('{{}}')")


def _buffered(problem: PoolProblem, array: Array) -> int:
    """Bytes that NumPy may take buffers for; very many where their size matters."""
    g = problem.geometry
    cells = g.images * g.channels * max(g.cells, g.positions)
    if cells > _ONE_RUN and not _is_read_in_place(array, problem.accumulate):
        return _ALWAYS
    return cells * max(problem.accumulate.itemsize, INDEX.itemsize)


def _is_read_in_place(array: Array, dtype: DType) -> bool:
    return array.dtype == dtype and is_aligned(array)
