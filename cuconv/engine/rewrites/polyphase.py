"""Phases: subsets of a result with the same taps, each a basic convolution.

With input dilation, a window reads zeros for some taps; with a stride, every element of
x is read by some of the taps.  The elements of the result that have the same taps are a
basic convolution with those taps.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

from cuconv.arrays import Array, stub_array
from cuconv.config import config, settings
from cuconv.engine.execute import Run, fill
from cuconv.engine.lowering import Basic, Lowering, basic_part, fits, held
from cuconv.engine.planner import PlanningResult, floor
from cuconv.engine.problem import NAMES, shapes_of
from cuconv.engine.request import Request
from cuconv.geometry import ConvGeometry, Phase
from cuconv.memory import MemoryLimitError, Shortage

Index: TypeAlias = tuple[Any, ...]

# An input gradient is computed by phases if that is estimated to take less than this
# fraction of the time of the whole; each phase has this overhead.
_WORTH_PHASES, _MOST_PHASES, _CALL_NANOSECONDS = 0.9, 64, 30_000


class _Place(NamedTuple):
    """The indices of a phase in the operands and in the result."""

    first: Index
    second: Index
    out: Index


@dataclass
class Polyphase(Lowering):
    """See `ConvGeometry.phases` and `ConvGeometry.input_phases`."""

    geometry: ConvGeometry
    parts: tuple[PlanningResult, ...]
    places: tuple[_Place, ...]
    is_covered: bool
    # What the parts themselves take.
    parts_bytes: int
    instead_of: dict[str, str] = field(default_factory=dict)

    @property
    def workspace_bytes(self) -> int:
        return held(self.parts) + self.parts_bytes

    @property
    def memory_limit(self) -> int:
        return self.parts[0].limit + self.parts_bytes

    @property
    def rank(self) -> float:
        """The sum of all `Candidate.rank`, independent of the number of threads."""
        return sum(part.best.rank for part in self.parts)

    @property
    def composition(self) -> str:
        count = len(self.parts)
        return "one phase" if count == 1 else f"{count} phases"

    def weights_of(self, w: Array) -> Iterable[Array]:
        return (w[place.second] for place in self.places)

    def steps(self, run: Run) -> None:
        first, second, bias, out = run.operands
        if not self.is_covered:
            fill(run.backend, out, bias, self.geometry)
        for number, place in enumerate(self.places):
            weights = None if second is None else second[place.second]
            run.convolve(number, first[place.first], weights, bias, out[place.out])


def lower(request: Request) -> Lowering:
    """The convolution itself, or by phases if it must be or that is faster."""
    if request.geometry.is_empty:
        return Basic(basic_part(request), request.geometry)
    if request.geometry.has_input_dilation:
        return _by_phases(request)
    whole = basic_part(request)
    return _faster_by_phases(request, whole) or Basic(whole, request.geometry)


def _by_phases(request: Request) -> Polyphase:
    """Lower by phases: of x for an input gradient, else of y."""
    geometry, limit = request.geometry, request.options.memory_limit
    by_input = request.is_input_grad
    phases = list(geometry.input_phases() if by_input else geometry.phases())
    taken, given = len(phases) * request.backend.part_bytes, 0
    if isinstance(limit, int):
        given = limit
        options = request.options._replace(memory_limit=max(limit - taken, 0))
        request = request._replace(options=options)
    places = [_place(request, phase) for phase in phases]
    try:
        found = _planned(request, phases, places)
    except MemoryLimitError as error:
        smallest = error.smallest + taken
        raise MemoryLimitError(given, smallest, NAMES[request.call]) from None
    parts = [part for each in found for part in each.parts]
    covered = _is_covered(request, phases)
    if not parts:
        parts = [_nothing(request)]
    return Polyphase(geometry, tuple(parts), tuple(places), covered, taken)


def _planned(
    request: Request, phases: list[Phase], places: list[_Place]
) -> list[Basic]:
    """Plan every phase; they run one after another."""
    found, shortage = list[Basic](), Shortage()
    for phase, place in zip(phases, places, strict=True):
        with shortage:
            own = _request_of(request, phase.geometry, place)
            result = basic_part(own, flipped=request.is_input_grad)
            found.append(Basic(result, phase.geometry))
    shortage.check()
    if fits(found, request.options.memory_limit) or settings().num_threads == 1:
        return found
    with config(num_threads=1):
        return _planned(request, phases, places)


def _is_covered(request: Request, phases: list[Phase]) -> bool:
    """True if the phases compute all of the result; the rest is zero."""
    geometry, parts = request.geometry, [phase.geometry for phase in phases]
    if request.is_weight_grad:
        return sum(part.taps for part in parts) == geometry.taps
    whole = geometry.cells if request.is_input_grad else geometry.positions
    return sum(part.positions for part in parts) == whole


def _faster_by_phases(request: Request, whole: PlanningResult) -> Polyphase | None:
    """The phases of a strided input gradient, if they are faster."""
    geometry, options, best = request.geometry, request.options, whole.best
    apart = request.is_input_grad and not geometry.is_unit_stride
    count = math.prod(axis.stride for axis in geometry.axes)
    if not (apart and count <= _MOST_PHASES and options.strategy == "auto"):
        return None
    if best.problem.single_threaded or best.problem.captured:
        return None
    most = _WORTH_PHASES * best.rank - count * _CALL_NANOSECONDS
    if not _may_take_less(request, most):
        return None
    try:
        found = _by_phases(request)
    except MemoryLimitError:
        return None
    if found.rank >= most:
        return None
    slower = f"estimated {best.rank / max(found.rank, 1):.2f} times as long"
    found.instead_of = {f"all phases at once, {best.label}": slower}
    return found


def _may_take_less(request: Request, most: float) -> bool:
    """True if the phases of an input gradient may take less, by lower bounds.

    Phases that differ only in the padded end of an axis cost the same.
    """
    alike: dict[ConvGeometry, list[Phase]] = {}
    for phase in request.geometry.input_phases():
        alike.setdefault(phase.geometry.padded_last, []).append(phase)
    least, limit = 0.0, request.options.memory_limit
    for phase, *others in alike.values():
        own = _request_of(request, phase.geometry, _place(request, phase))
        problem = own.problem(flipped=True)
        least += (1 + len(others)) * floor(problem, request.backend, limit)
        if least >= most:
            return False
    return True


def _place(request: Request, phase: Phase) -> _Place:
    """The indices of a phase."""
    geometry, everything = request.geometry, (...,)
    results = _index(geometry, phase.results)
    taps = _index(geometry, phase.taps, of_weights=True)
    if request.is_weight_grad:
        return _Place(results, everything, taps)
    return _Place(everything, taps, results)


def _request_of(request: Request, geometry: ConvGeometry, place: _Place) -> Request:
    """The request of a phase."""
    arrays = request.arrays.copy()
    first, second, *_ = arrays
    arrays[first] = arrays[first][place.first]
    arrays[second] = arrays[second][place.second]
    out = request.result[place.out]
    return request._replace(geometry=geometry, arrays=arrays, out=out)


def _index(
    geometry: ConvGeometry, cells: tuple[slice, ...], *, of_weights: bool = False
) -> Index:
    """An index along the spatial axes of an array, or of the weights."""
    if geometry.channels_first:
        return (..., *cells)
    return cells if of_weights else (..., *cells, slice(None))


def _nothing(request: Request) -> PlanningResult:
    """A part without multiplications, if no tap reads an element."""
    axes = tuple(
        axis._replace(size=axis.dilated_size, input_dilation=1)
        for axis in request.geometry.axes
    )
    geometry = replace(request.geometry, images=0, axes=axes, batched=True)
    shapes = shapes_of(request.call, geometry)
    arrays = {n: stub_array(shapes[n], a.dtype) for n, a in request.arrays.items()}
    return basic_part(request._replace(geometry=geometry, arrays=arrays, out=None))
