"""The steps of pooling: those of a backend, on arrays seen as planes."""

from typing import Any, NamedTuple

from cuconv.arrays import Array, grouped
from cuconv.engine.pool_problem import PoolInputs, PoolProblem, PoolTiling
from cuconv.geometry import WindowGeometry

# The names of results, for messages too.
RESULT, INDICES = "out", "the indices of out"


class PoolSteps(NamedTuple):
    """The steps of a call: those of a backend's pools."""

    problem: PoolProblem
    tiling: PoolTiling

    def run(
        self,
        backend: Any,
        arrays: dict[str, Array],
        scratch: tuple[dict[str, Array], ...],
    ) -> None:
        """Do them, or record them; ``scratch`` are the buffers of every worker."""
        problem, tiling = self
        planes = {
            name: _planes(array, problem.geometry)
            for name, array in arrays.items()
            if array is not None
        }
        result = planes.pop(RESULT)
        indices = planes.pop(INDICES, planes.get("indices"))
        with backend.stage("pool", problem.kind):
            if not problem.is_gradient:
                if result.size:
                    x = planes["x"]
                    backend.pools.reduce(problem, tiling, scratch, x, result, indices)
            elif planes["dy"].size:
                given = PoolInputs(**planes)
                backend.pools.backward(problem, tiling, scratch, given, result)
            else:
                backend.fill(result, 0)


def _planes(array: Array, geometry: WindowGeometry) -> Array:
    """View an array as (N, C, *spatial)."""
    first, batched = geometry.channels_first, geometry.batched
    rank = geometry.rank
    return grouped(array, 1, rank, channels_first=first, batched=batched)[:, 0]
