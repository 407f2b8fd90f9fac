"""Find the largest tiles whose workspace fits the limit, and the best of their splits.

A search is of one strategy in one variant.  Its tilings are priced for a fixed number
of workers, so that neither the choice nor the bits of a result depend on the number of
threads.  The number of workers is then as large as threads and memory limit allow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

from cuconv.arrays import is_half
from cuconv.backends import Backend
from cuconv.engine.costs import Price, Work, price
from cuconv.engine.problem import NAMES, Problem
from cuconv.geometry import Tile
from cuconv.memory import (
    MemoryLimitError,
    buffer_bytes,
    least_of,
    with_start,
    workspace_bytes,
)
from cuconv.strategies import Blocks, Strategy, Tiling, Variant, Workspace

# A job for several workers is split into one of these numbers of pieces, the one that
# is cheapest for two workers: the real number of threads must not matter, or the bits
# of the result would depend on it.  Fewer pieces must save a twentieth.
_PIECES = (8, 4, 2)
_NOTIONAL_WORKERS = 2
_WORTH_FEWER = 0.95
# Blocks with fewer positions than this, and than a quarter of the preferred number, are
# too small for a second worker.
_LEAST_POSITIONS = 64
# Less than 1 by the rounding error of a sum of prices.
_ALMOST = 1 - 1e-9


@dataclass(frozen=True)
class Candidate:
    """A strategy, the problem in the form that it runs, and a tiling that fits.

    ``workspace_bytes`` is everything that a run allocates beyond inputs and result;
    ``nanoseconds`` is the estimated time with its workers; ``rank`` is that with a
    fixed number of workers, because the number of threads must not decide which
    strategy runs.
    """

    strategy: Strategy
    problem: Problem
    tiling: Tiling
    workspace: Workspace
    workspace_bytes: int
    nanoseconds: float
    rank: float

    @cached_property
    def blocks(self) -> Blocks:
        """The blocks of the tiling."""
        geometry, tile = self.problem.geometry, self.tiling.tile
        make = geometry.blocks if self.strategy.by_runs else geometry.pieces
        return Blocks(partial(make, tile), geometry.count_blocks(tile))

    @property
    def chunks(self) -> int:
        """The number of blocks that the work is split into."""
        return self.problem.geometry.count_blocks(self.tiling.tile)

    @property
    def flops(self) -> int:
        """Operations of the basic sum of products; a multiply-add counts as two."""
        g = self.problem.geometry
        return 0 if g.is_empty else 2 * g.multiplications

    @cached_property
    def memory_bytes(self) -> int:
        """Bytes of the buffers; 0 if nothing is multiplied."""
        workspace = self.workspace
        own = workspace.per_worker * self.tiling.workers
        buffers = (*workspace.weights, *workspace.shared, *own)
        return workspace_bytes(buffers) if self.flops else 0

    @property
    def overhead_bytes(self) -> int:
        """The bytes that a run allocates beside its buffers."""
        return self.workspace_bytes - self.memory_bytes if self.flops else 0

    @property
    def label(self) -> str:
        """The strategy's name, with its variant."""
        words = self.strategy.describe(self.tiling.variant)
        name = self.strategy.name + (f" ({words})" if words else "")
        return f"{name} {over(self.problem)}" if self.problem.flipped else name


def over(problem: Problem) -> str:
    """The phrase for a forward pass that computes an input gradient."""
    return "over x" if problem.transposed else "over dy"


class TileSearch:
    """The search over tilings of one strategy in one variant.

    ``floor`` is a lower bound for `Candidate.rank`, and ``floor_alone`` for the cost of
    a tiling with one worker.
    """

    def __init__(
        self,
        strategy: Strategy,
        problem: Problem,
        backend: Backend,
        variant: Variant,
        limit: int,
    ) -> None:
        geometry = problem.geometry
        self.strategy, self._problem, self._backend = strategy, problem, backend
        self._variant, self._limit, self._rates = variant, limit, backend.rates
        if problem.is_for_tensor_cores and strategy.on_tensor_cores:
            halves = is_half(problem.operand)
            self._rates = self._rates.on_tensor_cores(halves=halves)
        self._everything = geometry.images * geometry.positions
        self._tilings = strategy.tilings(problem, variant, backend)
        self._region = geometry.whole_region
        self._fits: dict[tuple[int, int, int], _Fit] = {}
        self._overheads: dict[int, int] = {}
        # One block of everything.
        self._whole = self._fit(self._everything, geometry.cells, 1)
        self._blocks = geometry.count_blocks(self._whole.tiling.tile)
        self.floor_alone = self.floor = 0.0
        if strategy.gains_from_size:
            self.floor_alone = self._cost(self._whole, 1)
            shared = self._shared_at_least(2, min(2, self._tilings.splits))
            self.floor = min(self.floor_alone, shared)

    @cached_property
    def _alone(self) -> "_Fit | None":
        """The best tiling for one worker, if any fits."""
        return self._largest(1, 1, 1) if self._limit >= self._least else None

    @cached_property
    def _least(self) -> int:
        """The smallest limit under which work is split: blocks have some room."""
        most = self._fit(self._preferred(1), self._problem.geometry.cells, 1)
        least = self._bytes(most, 1)
        if least <= self._limit:
            return least
        return least_of(least, self._bytes(self._fit(1, 1, 1), 1))

    @cached_property
    def _is_busy(self) -> bool:
        """True if the job is long enough for several workers."""
        alone, worth = self._alone, self._rates.worth_workers
        if alone is None:
            return False
        return self.floor_alone >= worth or self._cost(alone, 1) >= worth

    def candidate(self, workers: int) -> Candidate:
        """The candidate with the largest blocks up to the preferred size.

        Raises
        ------
        MemoryLimitError
            If none fits.
        """
        found = self._cheapest() or self._alone or self._extreme()
        count = 1
        if self._is_busy:
            available = min(workers, max(found.price.pieces, 1))
            fits = partial(self._has_room, found)
            count = max(largest_fitting(fits, available), 1)
        return Candidate(
            self.strategy,
            self._problem,
            found.tiling._replace(workers=count),
            self._workspace(found),
            self._bytes(found, count),
            self._cost(found, count),
            self._rank(found),
        )

    def _cheapest(self) -> "_Fit | None":
        """The best tiling for several workers; None for a job with one worker."""
        if not self._is_busy:
            return None
        most = self._tilings.splits
        choices = [(n, m) for n in _PIECES for m in dict.fromkeys((min(most, n), 1))]
        floors = [self._shared_at_least(*choice) for choice in choices]
        likely = _last_worthwhile(floors)
        found = self._shared(*choices[likely])
        if found is not None:
            # A cost below all lower bounds is below all costs.
            cost = self._rank(found)
            before = min(floors[:likely], default=math.inf)
            after = min(floors[likely + 1 :], default=math.inf)
            wins = cost < before * _WORTH_FEWER * _ALMOST
            if wins and cost * _WORTH_FEWER < after * _ALMOST:
                return found
        best, least = None, math.inf
        for choice, floor in zip(choices, floors, strict=True):
            if floor * _ALMOST < least * _WORTH_FEWER:
                found = self._shared(*choice)
                cost = math.inf if found is None else self._rank(found)
                if cost < least * _WORTH_FEWER:
                    best, least = found, cost
        return best

    def _shared_at_least(self, pieces: int, splits: int) -> float:
        """A lower bound for `_shared`: all of the work, and the overhead of each block.

        Every sum of a weight gradient has one worker; splits by filters may share
        blocks.
        """
        if not self.strategy.gains_from_size:
            return 0.0
        is_sum = self._problem.op == "weight_grad"
        even, crowded, parts = self._whole.price
        if parts == splits == 1 and is_sum:
            return self.floor_alone
        if parts == self._blocks == 1 and (splits == 1 or is_sum):
            tile = self._tilings.tile(self._preferred(pieces))
            more = self._problem.geometry.count_blocks(tile) - 1
            even += more * self._whole.work.blocks * self._rates.block
        # A tiling of one piece has one worker; others may share evenly.
        balanced = Price(even, crowded, _NOTIONAL_WORKERS)
        return min(even + crowded, balanced.of(_NOTIONAL_WORKERS, self._rates))

    def _shared(self, pieces: int, splits: int) -> "_Fit | None":
        """A tiling with room for a second worker, if its blocks are not too small."""
        while True:
            # Splits by filters are pieces already: each of them has all positions.
            apart = splits if self._problem.op != "weight_grad" else 1
            blocks = -(-pieces // apart)
            found = self._largest(2, splits, blocks)
            if found is not None:
                least = min(self._preferred(blocks), 4 * _LEAST_POSITIONS)
                if 4 * found.tiling.tile.positions >= least:
                    return found
            if splits == 1:
                return None
            splits //= 2

    def _largest(self, workers: int, splits: int, pieces: int) -> "_Fit | None":
        """The best tiling with room for this number of workers, or None."""

        def fits(positions: int, cells: int) -> bool:
            return self._has_room(self._fit(positions, cells, splits), workers)

        geometry = self._problem.geometry
        share = -(-pieces // max(geometry.images, 1))
        whole = max(1, -(-geometry.cells // share))
        preferred = self._preferred(pieces)
        positions = largest_fitting(lambda p: fits(p, whole), preferred)
        if positions:
            return self._fit(positions, whole, splits)
        if self._problem.op != "input_grad":
            return None
        halves = (preferred >> i for i in range(preferred.bit_length()))
        pairs = ((p, largest_fitting(partial(fits, p), whole)) for p in halves)
        found = [self._fit(p, cells, splits) for p, cells in pairs if cells]
        return min(found, key=self._overlap, default=None)

    def _preferred(self, pieces: int) -> int:
        whole, largest = max(self._everything, 1), self._tilings.positions
        if pieces > 1 and pieces * largest < whole:
            # A multiple of the pieces, so that all workers have the same number of
            # blocks.
            pieces *= -(-whole // (largest * pieces))
        return max(1, min(largest, -(-whole // pieces)))

    def _extreme(self) -> "_Fit":
        """Everything at once, without partial sums."""
        if self._has_room(self._whole, 1):
            return self._whole
        raise MemoryLimitError(self._limit, self.smallest, NAMES[self._problem.call])

    @property
    def smallest(self) -> int:
        """The smallest limit that would do."""
        return min(self._least, self._bytes(self._whole, 1))

    def _fit(self, positions: int, cells: int, splits: int) -> "_Fit":
        """A tiling; only an input gradient has regions of so many ``cells``."""
        problem, geometry = self._problem, self._problem.geometry
        has_regions = problem.op == "input_grad"
        key = positions, cells if has_regions else 0, splits
        found = self._fits.get(key)
        if found is None:
            tile, region = self._tilings.tile(positions), self._region
            if has_regions and cells < geometry.cells:
                region = geometry.region_tile(cells)
            elif has_regions:
                region = Tile(tile.images, region.cells)
            tiling = Tiling(tile, region, splits, self._variant)
            work = self.strategy.work(problem, tiling)
            found = self._fits[key] = _Fit(tiling, work, price(work, self._rates))
        return found

    def _has_room(self, found: "_Fit", workers: int) -> bool:
        return self._bytes(found, workers) <= self._limit

    def _bytes(self, found: "_Fit", workers: int) -> int:
        needs = self._workspace(found)
        shared, own = found.nbytes
        overhead = self._overheads.get(workers)
        if overhead is None:
            itemsize = self._problem.types.accumulate.itemsize
            overhead = self._backend.overhead(workers, itemsize)
            self._overheads[workers] = overhead
        return overhead + needs.unseen * workers + with_start(shared + own * workers)

    def _workspace(self, found: "_Fit") -> Workspace:
        needs = found.workspace
        if needs is None:
            work = self._problem, found.tiling, self._backend
            needs = found.workspace = self.strategy.workspace(*work)
            shared = buffer_bytes((*needs.weights, *needs.shared))
            found.nbytes = shared, buffer_bytes(needs.per_worker)
        return needs

    def _rank(self, found: "_Fit") -> float:
        """The cost of a tiling for the fixed number of workers."""
        several = _NOTIONAL_WORKERS if self._is_busy else 1
        workers = max(min(found.price.pieces, several), 1)
        return self._cost(found, workers if self._has_room(found, workers) else 1)

    def _cost(self, found: "_Fit", workers: int) -> float:
        return found.price.of(workers, self._rates)

    def _overlap(self, found: "_Fit") -> float:
        # Fewer positions leave room for a larger region, and so for fewer windows that
        # two regions both compute; but products of short matrices are slow.
        tiling, geometry = found.tiling, self._problem.geometry
        region = max(tiling.region.positions, 1)
        return geometry.reach(tiling.region) / region * (1 + 64 / tiling.tile.positions)


class _Fit:
    """A tiling, with its price, and its workspace once that has been asked for."""

    __slots__ = ("nbytes", "price", "tiling", "work", "workspace")

    def __init__(self, tiling: Tiling, work: Work, price: Price) -> None:
        self.tiling, self.work, self.price = tiling, work, price
        self.workspace: Workspace | None = None
        # Of the buffers that workers share, and of those of each.
        self.nbytes = 0, 0


def _last_worthwhile(costs: list[float]) -> int:
    """The index of the best cost, if each must save a twentieth over those before."""
    best = 0
    for index, cost in enumerate(costs):
        if cost < costs[best] * _WORTH_FEWER:
            best = index
    return best


def largest_fitting(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to ``limit`` that fits, 0 if none does."""
    if fits(limit):
        return limit
    if limit < 1 or not fits(1):
        return 0
    low, high = 1, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
