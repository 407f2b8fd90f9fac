"""Which strategy runs, and how its work is cut to fit the memory limit.

Pure: a plan follows from shapes, types and settings alone, and is cached.  Every
strategy that can run a problem is cut to fit and priced with the rates of the array
module (`cuconv.engine.costs`); the cheapest is chosen, and the others keep the reason
why they were not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

from cuconv.backends import Backend
from cuconv.engine.costs import Rates
from cuconv.engine.problem import NAMES, Problem
from cuconv.geometry import Tile
from cuconv.memory import MemoryLimitError, workspace_bytes
from cuconv.strategies import (
    Blocks,
    Strategy,
    Tiling,
    Work,
    Workspace,
    strategies,
)

# A job that is worth several workers is cut into one of these numbers of pieces, the
# one that is cheapest for two workers: how many there really are must not matter, or
# the bits of the result would depend on it.  Fewer pieces must save a twentieth.
_PIECES = (8, 4, 2)
_NOTIONAL_WORKERS = 2
_WORTH_FEWER = 0.95

# Steps that workers share out evenly, and those that wait for memory together.
_SHARED_OUT = ("gather", "scatter", "fourier", "direct", "products")
_CROWDED = ("copy", "transform", "last_transform", "transpose", "reread")


@dataclass(frozen=True)
class Candidate:
    """A strategy, the problem as it runs it, and a cut that fits the limit.

    ``workspace_bytes`` is everything that a run allocates beyond inputs and result;
    ``nanoseconds`` is what the rates say it takes with its workers, ``rank`` with as
    many as everyone has: the number of threads must not decide which strategy runs.
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
        """The blocks of the cut."""
        make = partial(self.strategy.blocks, self.problem, self.tiling)
        return Blocks(make, self.problem.geometry.count_blocks(self.tiling.tile))

    @property
    def chunks(self) -> int:
        """How many blocks the work is cut into."""
        return self.problem.geometry.count_blocks(self.tiling.tile)

    @property
    def flops(self) -> int:
        """Operations of the basic sum of products; a multiply-add counts as two."""
        g = self.problem.geometry
        return 0 if g.is_empty else 2 * g.multiplications

    @property
    def memory_bytes(self) -> int:
        """Bytes of the buffers; 0 where nothing is multiplied."""
        workspace = self.workspace
        own = workspace.per_worker * self.tiling.workers
        buffers = (*workspace.weights, *workspace.shared, *own)
        return workspace_bytes(buffers) if self.flops else 0

    @property
    def overhead_bytes(self) -> int:
        """What a run allocates beside its buffers."""
        return self.workspace_bytes - self.memory_bytes if self.flops else 0

    @property
    def label(self) -> str:
        """The strategy's name, with what the name leaves open."""
        words = self.strategy.describe(self.tiling.variant)
        name = self.strategy.name + (f" ({words})" if words else "")
        return f"{name} {_over(self.problem)}" if self.problem.flipped else name


@dataclass(frozen=True)
class PlanningResult:
    """The best choice, and why every other strategy was passed over."""

    best: Candidate
    limit: int
    passed_over: tuple[tuple[str, str], ...]
    candidates: tuple[Candidate, ...]


@lru_cache(maxsize=1024)
def decide(
    problem: Problem, backend: Backend, name: str, limit: int | None, workers: int
) -> PlanningResult:
    """The decision for a problem.

    Without a limit of the user's, the default of the array module holds, and is lifted
    to the smallest that will do where even that is larger.  While a CUDA graph is
    captured, whatever the limit, nothing that needs a workspace fits.

    Raises
    ------
    MemoryLimitError
        If nothing fits under the user's limit.
    ValueError
        If the strategy does not exist or cannot solve this problem, or none can be
        captured.
    """
    _check_strategy(problem, name)
    allowed = backend.default_memory_limit if limit is None else limit
    try:
        return _decision(problem, backend, name, allowed, workers)
    except MemoryLimitError as error:
        if limit is not None:
            raise
        return _decision(problem, backend, name, error.smallest, workers)


def check_strategy_name(name: str) -> None:
    """Refuse a word that names no strategy, and is none of the others."""
    words = "auto", "benchmark", *strategies()
    if name not in words:
        quoted = ", ".join(map(repr, words))
        raise ValueError(f"strategy must be one of {quoted}; got {name!r}")


def _check_strategy(problem: Problem, name: str) -> None:
    check_strategy_name(name)
    if name == "auto":
        return
    reason = _refusal(strategies()[name], problem)
    if reason:
        what = NAMES[problem.call]
        raise ValueError(f"strategy {name!r} cannot run {what} here: {reason}")


def _forms(problem: Problem) -> list[Problem]:
    """The problem as it was put, and as the convolution that it also is."""
    other = problem.as_forward
    return [problem] if other is None else [problem, other]


def _over(problem: Problem) -> str:
    """What a forward pass for an input gradient goes over."""
    return "over x" if problem.transposed else "over dy"


def _refusal(strategy: Strategy, problem: Problem) -> str:
    """Why a strategy runs the problem in none of its forms; empty if it can."""
    if problem.captured and not strategy.capturable:
        return "a CUDA graph is being captured, which cannot hold cuBLAS or cuFFT"
    answers = [strategy.supports(form) for form in _forms(problem)]
    if any(able for able, _ in answers):
        return ""
    return f"; {_over(problem)}: ".join(reason for _, reason in answers)


def _decision(
    problem: Problem, backend: Backend, name: str, limit: int, workers: int
) -> PlanningResult:
    found: list[Candidate] = []
    reasons: dict[str, str] = {}
    errors: dict[str, list[MemoryLimitError]] = {}
    wanted = strategies() if name == "auto" else {name: strategies()[name]}
    for strategy in wanted.values():
        if reason := _refusal(strategy, problem):
            reasons[strategy.name] = reason
            continue
        for form in _forms(problem):
            if not strategy.supports(form)[0]:
                continue
            for variant in strategy.variants(form):
                try:
                    room = 0 if problem.captured else limit
                    fit = TileSearch(strategy, form, backend, variant, room)
                    found.append(fit.candidate(workers))
                except MemoryLimitError as error:
                    errors.setdefault(strategy.name, []).append(error)
    least = {name: min(e.smallest for e in each) for name, each in errors.items()}
    reasons |= {name: _too_large(size, problem) for name, size in least.items()}
    if not found:
        if problem.captured:
            raise ValueError(_nothing_to_capture(problem, reasons))
        raise MemoryLimitError(limit, min(least.values()), NAMES[problem.call])
    found.sort(key=lambda candidate: candidate.rank)
    return PlanningResult(found[0], limit, _passed_over(found, reasons), tuple(found))


def _too_large(size: int, problem: Problem) -> str:
    if problem.captured:
        return f"needs {size} bytes of workspace, which a CUDA graph cannot hold"
    return f"needs {size} bytes at least"


def _nothing_to_capture(problem: Problem, reasons: dict[str, str]) -> str:
    able = (repr(s.name) for s in strategies().values() if s.capturable)
    words = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return (
        f"{NAMES[problem.call]} cannot be captured in a CUDA graph here ({words}): "
        f"call it outside the capture, or so that {' or '.join(able)} can run it "
        "without workspace"
    )


def _passed_over(
    found: list[Candidate], reasons: dict[str, str]
) -> tuple[tuple[str, str], ...]:
    best, *others = found
    lost: dict[str, str] = {}
    for candidate in others:
        slower = candidate.rank / max(best.rank, 1)
        word = f"estimated {slower:.2f} times as long"
        lost.setdefault(candidate.label, word)
    seen = {candidate.strategy.name for candidate in found}
    never = {name: why for name, why in reasons.items() if name not in seen}
    return (*lost.items(), *never.items())


class TileSearch:
    """The search for a cut that fits."""

    def __init__(
        self,
        strategy: Strategy,
        problem: Problem,
        backend: Backend,
        variant: tuple[int, ...],
        limit: int,
    ) -> None:
        self._strategy = strategy
        self._problem = problem
        self._backend = backend
        self._variant = variant
        self._limit = limit
        self._alone = self._largest(1, 1, 1)
        self._is_busy = (
            self._alone is not None
            and self._price(self._alone, 1) >= backend.rates.worth_workers
        )

    def candidate(self, workers: int) -> Candidate:
        """The cut with the largest blocks up to the preferred, and what it costs."""
        self._check()
        tiling = self._cheapest() or self._alone or self._fitting_extreme()
        pieces = self._strategy.pieces(self._problem, tiling)
        available = max(1, min(workers if self._is_busy else 1, pieces))
        count = most(lambda n: self._fits(tiling._replace(workers=n)), available)
        tiling = tiling._replace(workers=max(count, 1))
        return Candidate(
            self._strategy,
            self._problem,
            tiling,
            self._strategy.workspace(self._problem, tiling, self._backend),
            self._bytes(tiling),
            self._price(tiling, tiling.workers),
            self._rank(tiling),
        )

    def _price(self, tiling: Tiling, workers: int) -> float:
        work, rates = self._strategy.work(self._problem, tiling), self._backend.rates
        if self._problem.is_for_tensor_cores:
            rates = rates._replace(multiply=rates.multiply / rates.tensor)
        return price(work, rates, workers)

    def _rank(self, tiling: Tiling) -> float:
        """What a cut costs, whoever runs it."""
        several = _NOTIONAL_WORKERS if self._is_busy else 1
        workers = min(self._strategy.pieces(self._problem, tiling), several)
        alone = self._bytes(tiling._replace(workers=1))
        if alone <= self._limit < self._bytes(tiling._replace(workers=max(workers, 1))):
            workers = 1
        return self._price(tiling, max(workers, 1))

    def _cheapest(self) -> Tiling | None:
        """The best cut for several workers."""
        best, least = None, float("inf")
        most_splits = self._strategy.splits(self._problem, self._variant)
        for pieces in _PIECES if self._is_busy else ():
            for splits in dict.fromkeys((min(most_splits, pieces), 1)):
                tiling = self._shared(pieces, splits)
                if tiling is None:
                    continue
                cost = self._rank(tiling)
                if cost < least * _WORTH_FEWER:
                    best, least = tiling, cost
        return best

    def _bytes(self, tiling: Tiling) -> int:
        workspace = self._strategy.workspace(self._problem, tiling, self._backend)
        itemsize = self._problem.types.accumulate.itemsize
        overhead = self._backend.overhead(tiling.workers, itemsize)
        own = workspace.per_worker * tiling.workers
        return overhead + workspace_bytes((*workspace.weights, *workspace.shared, *own))

    def _fits(self, tiling: Tiling) -> bool:
        return self._bytes(tiling) <= self._limit

    def _check(self) -> None:
        smallest = min(map(self._bytes, self._extremes()))
        if smallest > self._limit:
            raise MemoryLimitError(self._limit, smallest, NAMES[self._problem.call])

    def _shared(self, pieces: int, splits: int) -> Tiling | None:
        """A cut that leaves room for a second worker, if its blocks are not tiny."""
        while True:
            # Filters apart are pieces already: each of them sees all positions.
            apart = splits if self._problem.op != "weight_grad" else 1
            blocks = -(-pieces // apart)
            tiling = self._largest(2, splits, blocks)
            if tiling and 4 * tiling.tile.positions >= min(
                self._preferred(blocks), 256
            ):
                return tiling
            if splits == 1:
                return None
            splits //= 2

    def _preferred(self, pieces: int) -> int:
        geometry = self._problem.geometry
        whole = max(geometry.images * geometry.positions, 1)
        most = self._strategy.preferred(self._problem, self._backend)
        if pieces > 1 and pieces * most < whole:
            # A multiple of the pieces, so that no worker waits for the last one.
            pieces *= -(-whole // (most * pieces))
        return max(1, min(most, -(-whole // pieces)))

    def _extremes(self) -> tuple[Tiling, Tiling]:
        """One position at a time; and everything at once, which saves partial sums."""
        geometry = self._problem.geometry
        everything = geometry.images * geometry.positions
        return self._cut(1, 1, 1, 1), self._cut(everything, geometry.cells, 1, 1)

    def _fitting_extreme(self) -> Tiling:
        return next(filter(self._fits, self._extremes()))

    def _cut(self, positions: int, cells: int, splits: int, workers: int) -> Tiling:
        geometry = self._problem.geometry
        tile = self._strategy.tile(self._problem, positions, self._variant)
        whole = Tile(geometry.images, tuple(max(n, 1) for n in geometry.size))
        if self._problem.op != "input_grad":
            region = whole
        elif cells >= geometry.cells:
            region = whole._replace(images=tile.images)
        else:
            region = geometry.region_tile(cells)
        return Tiling(tile, region, splits, self._variant, workers)

    def _largest(self, workers: int, splits: int, pieces: int) -> Tiling | None:
        """The best cut that leaves room for this many workers, or None."""

        def fits(positions: int, cells: int) -> bool:
            return self._fits(self._cut(positions, cells, splits, workers))

        geometry = self._problem.geometry
        share = -(-pieces // max(geometry.images, 1))
        whole = max(1, -(-geometry.cells // share))
        preferred = self._preferred(pieces)
        positions = most(lambda p: fits(p, whole), preferred)
        if positions:
            return self._cut(positions, whole, splits, 1)
        if self._problem.op != "input_grad":
            return None
        halves = (preferred >> i for i in range(preferred.bit_length()))
        pairs = ((p, most(partial(fits, p), whole)) for p in halves)
        tilings = [self._cut(p, cells, splits, 1) for p, cells in pairs if cells]
        return min(tilings, key=self._overlap, default=None)

    def _overlap(self, tiling: Tiling) -> float:
        # Fewer positions leave room for a larger region, and so for fewer windows that
        # two regions both compute; but short matrices multiply slowly.
        geometry = self._problem.geometry
        region = max(tiling.region.positions, 1)
        return geometry.reach(tiling.region) / region * (1 + 64 / tiling.tile.positions)


def price(work: Work, rates: Rates, workers: int) -> float:
    """Nanoseconds that the rates give for this work."""
    short = 1 + rates.short / max(work.short_side, 1)
    product = work.multiply * rates.multiply * short + work.loads * rates.loads
    product *= _rounded(work, rates)
    alone = sum(getattr(work, name) * getattr(rates, name) for name in _SHARED_OUT)
    together = sum(getattr(work, name) * getattr(rates, name) for name in _CROWDED)
    own = (product + alone + work.blocks * rates.block) / workers
    crowd = 1 + rates.crowding * (workers - 1)
    return float(own + together / crowd + (workers - 1) * rates.worker)


def _rounded(work: Work, rates: Rates) -> float:
    """How much longer it takes because the last round of tiles is not full."""
    if not (work.tiles and rates.processors):
        return 1
    rounds = math.ceil(work.tiles / rates.processors)
    return rounds * rates.processors / work.tiles


def most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to ``limit`` that fits, 0 if none does."""
    if fits(limit):
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
