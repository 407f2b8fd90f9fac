"""The choice of a strategy.

The result depends on shapes, types and settings alone, and is cached.  For every
strategy that supports a problem, `cuconv.engine.tile_search` finds tiles that fit, and
`cuconv.engine.costs` estimates their time with the rates of the backend; the cheapest
is chosen.  The reasons against the others are computed when they are asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from cuconv.backends import Backend
from cuconv.choices import not_a_choice
from cuconv.engine.problem import NAMES, Problem
from cuconv.engine.tile_search import Candidate, TileSearch, over
from cuconv.memory import MemoryLimit, MemoryLimitError, least_of
from cuconv.strategies import STRATEGIES, Strategy, strategies

_NO_ENGINE = "none of its engines computes this with this precision and determinism"
# More than 1 by the rounding error of a sum of prices.
_ROUNDED = 1 + 1e-9
# A strategy that takes so many times as long as another, both at best, is not what a
# smaller limit is for.
_USELESS = 4


@dataclass(frozen=True)
class PlanningResult:
    """The best candidate; the others, and the reasons against them, on demand."""

    best: Candidate
    limit: int
    _problem: Problem
    _backend: Backend
    _name: str
    _workers: int

    @cached_property
    def _every(self) -> tuple[tuple[Candidate, ...], dict[str, str]]:
        what = self._problem, self._backend, self._name, self.limit
        return _every(*what, self._workers)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every strategy and variant that fits, the best first."""
        return self._every[0]

    @cached_property
    def passed_over(self) -> tuple[tuple[str, str], ...]:
        """Every other strategy, and why it does not run."""
        (best, *others), reasons = self._every
        lost: dict[str, str] = {}
        for candidate in others:
            slower = candidate.rank / max(best.rank, 1)
            word = f"estimated {slower:.2f} times as long"
            lost.setdefault(candidate.label, word)
        seen = {candidate.strategy.name for candidate in self.candidates}
        never = {name: why for name, why in reasons.items() if name not in seen}
        return (*lost.items(), *never.items())


@lru_cache(maxsize=1024)
def decide(
    problem: Problem, backend: Backend, name: str, limit: int | None, workers: int
) -> PlanningResult:
    """Choose the candidate for a problem.

    Without a limit of the user's, the default of the backend applies, or the smallest
    possible if that is larger.  While a CUDA graph is captured, whatever the limit,
    nothing that needs a workspace fits.

    Raises
    ------
    MemoryLimitError
        If nothing fits under the user's limit.
    ValueError
        If the strategy does not exist or cannot solve this problem, or none can be
        captured.
    """
    if name != "auto":
        _check_strategy(problem, name, backend)
    allowed = backend.default_memory_limit if limit is None else limit
    try:
        best = _best(problem, backend, name, allowed, workers)
    except MemoryLimitError as error:
        if limit is not None:
            raise
        allowed = error.smallest
        best = _best(problem, backend, name, allowed, workers)
    return PlanningResult(best, allowed, problem, backend, name, workers)


def floor(problem: Problem, backend: Backend, limit: MemoryLimit) -> float:
    """A lower bound for the rank of the best candidate of all strategies."""
    allowed = limit if isinstance(limit, int) else backend.default_memory_limit
    searches = _searches(problem, backend, "auto", allowed)
    return min(search.floor for search in searches) / _ROUNDED


def check_strategy_name(name: str) -> None:
    """Raise if a string is not the name of a strategy, "auto" or "benchmark"."""
    words = "auto", "benchmark", *strategies()
    if name not in words:
        raise not_a_choice("strategy", name, words)


def _check_strategy(problem: Problem, name: str, backend: Backend) -> None:
    check_strategy_name(name)
    reason = _refusal(strategies()[name], problem, backend)
    if reason:
        what = NAMES[problem.call]
        raise ValueError(f"strategy {name!r} cannot run {what} here: {reason}")


def _best(
    problem: Problem, backend: Backend, name: str, limit: int, workers: int
) -> Candidate:
    """The candidate of the lowest rank, the first of several.

    Searches run in the order of their lower bounds, and stop once those are too high.
    """
    searches = _searches(problem, backend, name, limit)
    if searches and not problem.captured:
        _check_limit(searches, problem, limit)
    found: list[tuple[float, int, Candidate]] = []
    for number, search in sorted(enumerate(searches), key=lambda pair: pair[1].floor):
        if found and search.floor > min(found)[0] * _ROUNDED:
            break
        try:
            candidate = search.candidate(workers)
        except MemoryLimitError:
            continue
        found.append((candidate.rank, number, candidate))
    if found:
        return min(found)[-1]
    _, reasons = _every(problem, backend, name, limit, workers)
    words = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if problem.captured:
        raise ValueError(_nothing_to_capture(problem, backend, words))
    raise ValueError(f"nothing can run {NAMES[problem.call]} here: {words}")


def _check_limit(searches: list[TileSearch], problem: Problem, limit: int) -> None:
    """Raise if the fastest strategy does not fit, and others save too little memory.

    What takes none at all, as kernels may, is never refused.
    """
    floors = [search.floor_alone for search in searches]
    least = min(filter(None, floors), default=0)
    needed = searches[floors.index(least)].smallest
    if needed > limit:
        pairs = zip(searches, floors, strict=True)
        sizes = [(s.smallest, floor <= least * _USELESS) for s, floor in pairs]
        smallest = min(size for size, is_useful in sizes if is_useful or not size)
        smallest = least_of(needed, smallest) if smallest else 0
        if limit < smallest:
            raise MemoryLimitError(limit, smallest, NAMES[problem.call])


def _every(
    problem: Problem, backend: Backend, name: str, limit: int, workers: int
) -> tuple[tuple[Candidate, ...], dict[str, str]]:
    """All candidates by rank; and why strategies, by name, have none or one less."""
    found: list[Candidate] = []
    sizes: dict[str, list[int]] = {}
    for search in _searches(problem, backend, name, limit):
        try:
            found.append(search.candidate(workers))
        except MemoryLimitError as error:
            sizes.setdefault(search.strategy.name, []).append(error.smallest)
    refusals = {s.name: _refusal(s, problem, backend) for s in _named(name)}
    reasons = {name: reason for name, reason in refusals.items() if reason}
    reasons |= {name: _too_large(min(each), problem) for name, each in sizes.items()}
    return tuple(sorted(found, key=lambda candidate: candidate.rank)), reasons


def _searches(
    problem: Problem, backend: Backend, name: str, limit: int
) -> list[TileSearch]:
    """A search for every strategy that supports the problem, by form and variant."""
    room, forms = 0 if problem.captured else limit, _forms(problem)
    return [
        TileSearch(strategy, form, backend, variant, room)
        for strategy in _named(name)
        if strategy.capturable or not problem.captured
        for form in forms
        if strategy.supports(form)[0] and not _missing(strategy, problem, backend)
        for variant in strategy.variants(form, backend)
    ]


def _named(name: str) -> Iterable[Strategy]:
    return STRATEGIES if name == "auto" else (strategies()[name],)


def _forms(problem: Problem) -> list[Problem]:
    """The problem, and the forward pass that it also is, if any."""
    other = problem.as_forward
    return [problem] if other is None else [problem, other]


def _missing(strategy: Strategy, problem: Problem, backend: Backend) -> str:
    """The reason why a library that a strategy calls cannot be used; empty if all can.

    Integers are multiplied by kernels of our own.
    """
    names = () if problem.operand.kind in "biu" else strategy.libraries
    return next(filter(None, map(backend.missing, names)), "")


def _refusal(strategy: Strategy, problem: Problem, backend: Backend) -> str:
    """The reason why a strategy cannot run the problem in any form; empty if it can."""
    if problem.captured and not strategy.capturable:
        return "a CUDA graph is being captured, which cannot contain cuBLAS or cuFFT"
    forms = _forms(problem)
    answers = [strategy.supports(form) for form in forms]
    able = [f for f, (ok, _) in zip(forms, answers, strict=True) if ok]
    if able and not (missing := _missing(strategy, problem, backend)):
        found = any(strategy.variants(form, backend) for form in able)
        return "" if found else _NO_ENGINE
    if able:
        return missing
    return f"; {over(problem)}: ".join(reason for _, reason in answers)


def _too_large(size: int, problem: Problem) -> str:
    if problem.captured:
        return f"needs {size} bytes of workspace, which a CUDA graph cannot allocate"
    return f"needs {size} bytes at least"


def _nothing_to_capture(problem: Problem, backend: Backend, words: str) -> str:
    able = (
        repr(s.name)
        for s in strategies().values()
        if s.capturable and not _missing(s, problem, backend)
    )
    return (
        f"{NAMES[problem.call]} cannot be captured in a CUDA graph here ({words}): "
        f"call it outside the capture, or so that {' or '.join(able)} can run it "
        "without workspace"
    )
