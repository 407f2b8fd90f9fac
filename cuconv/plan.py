"""Which strategy runs, and how its work is cut to fit the memory limit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from cuconv.arrays import Array
from cuconv.geometry import Tile
from cuconv.leaves import Leaves, leaves_of
from cuconv.memory import (
    MemoryLimit,
    MemoryLimitError,
    parse_memory_limit,
    workspace_bytes,
)
from cuconv.profiling import stage
from cuconv.strategies import Cut, Job, Problem, Strategy, strategies

# Below this many multiply-adds a second thread costs more than it saves: 3×3 layers of
# 16 channels took 0.94 times as long on one core of two AMD EPYC as on both at 10.6
# million, and 1.15 times at 14.5 million.
_WORTH_THREADS = 12_000_000

_NAMES = {
    "forward": "the forward pass",
    "input_grad": "the gradient of the input",
    "weight_grad": "the gradient of the weights",
}


@dataclass(frozen=True)
class Plan:
    """A strategy, and a cut of its work that fits the limit.

    ``workspace_bytes`` is everything that a run allocates beyond inputs and result.
    """

    problem: Problem
    strategy: str
    cut: Cut
    workspace_bytes: int

    def run(self, xp: Any, *arrays: Array | None) -> None:
        """Carry it out: ``(x, w, bias, out)`` or two operands and ``out``."""
        strategy = strategies()[self.strategy]
        operation = getattr(strategy, self.problem.op)
        operation(Job(self.problem, self.cut, leaves_of(xp)), *arrays)


def make_plan(
    problem: Problem, xp: Any, strategy: str = "auto", limit: MemoryLimit = None
) -> Plan:
    """The plan for a problem.

    Without a limit of the user's, the default of the array module holds, and is lifted
    to the smallest that will do where even that is larger.

    Raises
    ------
    MemoryLimitError
        If nothing fits under the user's limit.
    ValueError
        If the strategy does not exist or cannot solve this problem.
    """
    leaves = leaves_of(xp)
    given = None if limit is None else parse_memory_limit(limit)
    with stage("plan"):
        return _plan(problem, leaves, strategy, given, leaves.workers())


@lru_cache(maxsize=1024)
def _plan(
    problem: Problem, leaves: Leaves, name: str, limit: int | None, workers: int
) -> Plan:
    strategy = _choose(problem, name)
    fit = _Fit(strategy, problem, leaves, workers)
    try:
        cut = fit.within(leaves.default_memory_limit if limit is None else limit)
    except MemoryLimitError as error:
        if limit is not None:
            raise
        cut = fit.within(error.smallest)
    return Plan(problem, strategy.name, cut, fit.bytes(cut))


def _choose(problem: Problem, name: str) -> Strategy:
    known = strategies()
    if name != "auto":
        if name not in known:
            words = ", ".join(map(repr, ("auto", *known)))
            raise ValueError(f"strategy must be one of {words}; got {name!r}")
        able, reason = known[name].supports(problem)
        if not able:
            raise ValueError(
                f"strategy {name!r} cannot run {_NAMES[problem.op]} here: {reason}"
            )
        return known[name]
    # The last one, im2col, runs everything.
    return next(s for s in known.values() if s.supports(problem)[0])


class _Fit:
    """The search for a cut that fits."""

    def __init__(
        self, strategy: Strategy, problem: Problem, leaves: Leaves, workers: int
    ) -> None:
        self._strategy = strategy
        self._problem = problem
        self._leaves = leaves
        geometry = problem.geometry
        column = geometry.groups * geometry.patch * problem.operand.itemsize
        self._preferred = max(1, leaves.block_bytes // max(column, 1))
        busy = geometry.multiplications >= _WORTH_THREADS
        self._most_workers = workers if busy else 1

    def bytes(self, cut: Cut) -> int:
        needs = self._strategy.needs(self._problem, cut, self._leaves)
        own = cut.workers * workspace_bytes(needs.worker)
        itemsize = self._problem.types.accumulate.itemsize
        overhead = self._leaves.overhead(cut.workers, itemsize)
        return overhead + workspace_bytes(needs.shared) + own

    def within(self, limit: int) -> Cut:
        """The cut with the most workers and the largest blocks up to the preferred."""
        smallest = min(map(self.bytes, self._extremes()))
        if smallest > limit:
            raise MemoryLimitError(limit, smallest, _NAMES[self._problem.op])
        for workers in range(self._most_workers, 1, -1):
            cut = self._largest(workers, limit)
            if cut and self._is_busy(cut) and self._is_roomy(cut):
                return cut
        fitting = (cut for cut in self._extremes() if self.bytes(cut) <= limit)
        return self._largest(1, limit) or next(fitting)

    def _extremes(self) -> tuple[Cut, Cut]:
        """One position at a time; and everything at once, which saves partial sums."""
        geometry = self._problem.geometry
        everything = geometry.images * geometry.positions
        return self._cut(1, 1, 1), self._cut(everything, geometry.cells, 1)

    def _cut(self, positions: int, cells: int, workers: int) -> Cut:
        geometry = self._problem.geometry
        tile = self._strategy.tile(self._problem, positions)
        whole = Tile(tile.images, tuple(max(n, 1) for n in geometry.size))
        region = whole if cells >= geometry.cells else geometry.region_tile(cells)
        return Cut(tile, region, workers)

    def _is_busy(self, cut: Cut) -> bool:
        """Whether there is something to do for every worker."""
        return self._strategy.pieces(self._problem, cut) >= cut.workers

    def _is_roomy(self, cut: Cut) -> bool:
        """Whether the blocks are still large enough for a good matrix product."""
        whole = self._problem.geometry.images * self._problem.geometry.positions
        return 8 * cut.tile.positions >= min(self._preferred, whole)

    def _largest(self, workers: int, limit: int) -> Cut | None:
        """The best cut for this many workers, or None."""

        def fits(positions: int, cells: int) -> bool:
            return self.bytes(self._cut(positions, cells, workers)) <= limit

        geometry = self._problem.geometry
        share = -(-workers // max(geometry.images, 1))
        whole = -(-geometry.cells // share)
        each = -(-geometry.images * geometry.positions // workers)
        preferred = max(min(self._preferred, each), 1)
        positions = most(lambda p: fits(p, whole), preferred)
        if positions:
            return self._cut(positions, whole, workers)
        halves = (preferred >> i for i in range(preferred.bit_length()))
        pairs = ((p, most(partial(fits, p), whole)) for p in halves)
        cuts = [self._cut(p, cells, workers) for p, cells in pairs if cells]
        return min(cuts, key=self._cost, default=None)

    def _cost(self, cut: Cut) -> float:
        # Fewer positions leave room for a larger region, and so for fewer windows that
        # two regions both compute; but short matrices multiply slowly.
        geometry = self._problem.geometry
        region = max(cut.region.positions, 1)
        return geometry.reach(cut.region) / region * (1 + 64 / cut.tile.positions)


def most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to ``limit`` that fits, 0 if none does."""
    if fits(limit):
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
