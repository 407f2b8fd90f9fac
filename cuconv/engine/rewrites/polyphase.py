"""Parts of a result that lie between each other, and share no sum.

Where strides or input dilation make a window meet zeros, or every cell of x only some
of the taps, the cells of the result that have the same taps are a plain convolution
with those taps.
"""

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from cuconv.arrays import Array
from cuconv.backends import Backend
from cuconv.engine.plan import (
    Plan,
    Planner,
    fill,
    plain_plan,
    problem_of,
    shapes_of,
    stub_array,
)
from cuconv.engine.planner import floor
from cuconv.engine.rewrites.base import Composed, Index, Request, held, run_part, within
from cuconv.geometry import ConvGeometry, Phase
from cuconv.memory import MemoryLimitError
from cuconv.options import Options
from cuconv.strategies import Problem

# An input gradient goes by phases where that is estimated to take less than this part
# of the time of the whole, with so much for the call of every phase.
_WORTH_PHASES, _MOST_PHASES, _CALL_NANOSECONDS = 0.9, 64, 30_000


class _Step(NamedTuple):
    """A part of the result, its plan, and the parts of the operands that it takes.

    Without a plan, the part is zero or the bias.
    """

    plan: Plan | None
    first: Index
    second: Index
    out: Index


class Phased(Composed):
    """See `ConvGeometry.phases` and `ConvGeometry.input_phases`."""

    def __init__(self, request: Request, planner: Planner, steps: list[_Step]) -> None:
        plans = [step.plan for step in steps if step.plan is not None]
        super().__init__(request, planner, plans or [_nothing(request)])
        self._steps = steps
        # What the phases were chosen over, and why.
        self.instead_of: dict[str, str] = {}

    @property
    def passed_over(self) -> dict[str, str]:
        return {**self.instead_of, **super().passed_over}

    @property
    def chunks(self) -> int:
        return sum(part.chunks for part in self._parts)

    @property
    def workspace_bytes(self) -> int:
        return held(self._parts)

    @property
    def flops(self) -> int:
        return sum(part.flops for part in self._parts)

    @property
    def nanoseconds(self) -> float:
        return sum(part.nanoseconds for part in self._parts)

    @property
    def rank(self) -> float:
        """What decides whether it runs, whoever runs it: `Choice.rank` of all parts."""
        return sum(part.candidate.rank for part in self._parts)

    @property
    def is_capturable(self) -> bool:
        return all(part.is_capturable for part in self._parts)

    def _prepare(self, w: Array) -> None:
        self._steps = [
            step
            if step.plan is None
            else step._replace(plan=step.plan.with_weights(w[step.second]))
            for step in self._steps
        ]

    def _composition(self) -> str:
        count = len(self._parts)
        return "one phase" if count == 1 else f"{count} phases"

    def _carry_out(
        self, first: Array, second: Array, bias: Array | None, result: Array
    ) -> None:
        for step in self._steps:
            part = result[step.out]
            if step.plan is None:
                fill(part, bias, geometry=self.problem.geometry)
            else:
                operands = first[step.first], second[step.second]
                run_part(step.plan, *operands, bias, part)


def phased(request: Request, planner: Planner) -> Phased:
    """The plan by phases: of x for an input gradient, else of y."""
    geometry = request.geometry
    by_input = request.is_input_grad
    phases = list(geometry.input_phases() if by_input else geometry.phases())
    places = [_step(request, phase) for phase in phases]
    calls = {
        number: partial(_plan_of, request, phase.geometry, place)
        for number, (phase, place) in enumerate(zip(phases, places, strict=True))
    }
    plans = within(calls, request.options.memory_limit)
    steps = [place._replace(plan=plans[n]) for n, place in enumerate(places)]
    if not _is_covered(request, phases):
        steps.insert(0, _Step(None, (), (), (...,)))
    return Phased(request, planner, steps)


def _is_covered(request: Request, phases: list[Phase]) -> bool:
    """Whether the phases give all of the result; what they leave out is zero."""
    geometry, parts = request.geometry, [phase.geometry for phase in phases]
    if request.is_weight_grad:
        return sum(part.taps for part in parts) == geometry.taps
    whole = geometry.cells if request.is_input_grad else geometry.positions
    return sum(part.positions for part in parts) == whole


def faster_by_phases(request: Request, planner: Planner, whole: Plan) -> Plan | None:
    """The phases of a strided input gradient, where they are worth it."""
    geometry, options = request.geometry, request.options
    apart = request.is_input_grad and not geometry.is_unit_stride
    count = math.prod(axis.stride for axis in geometry.axes)
    if not (apart and count <= _MOST_PHASES and options.strategy == "auto"):
        return None
    if whole.is_single_threaded or whole.problem.captured:
        return None
    most = _WORTH_PHASES * whole.candidate.rank - count * _CALL_NANOSECONDS
    if not _may_take_less(request, most):
        return None
    try:
        found = phased(request, planner)
    except MemoryLimitError:
        return None
    if found.rank >= most:
        return None
    slower = f"estimated {whole.candidate.rank / found.rank:.2f} times as long"
    found.instead_of = {f"all phases at once, {whole.candidate.label}": slower}
    return found


def _may_take_less(request: Request, most: float) -> bool:
    """Whether the phases of an input gradient may take less, before they are planned.

    Those that are alike but for which end of an axis is padded cost the same.
    """
    alike: dict[ConvGeometry, list[Phase]] = {}
    for phase in request.geometry.input_phases():
        alike.setdefault(phase.geometry.padded_last, []).append(phase)
    least = 0.0
    for phase, *others in alike.values():
        problem = _problem_of(request, phase.geometry, _step(request, phase))
        limit = request.options.memory_limit
        least += (1 + len(others)) * floor(problem, request.backend, limit)
        if least >= most:
            return False
    return True


def _step(request: Request, phase: Phase) -> _Step:
    """What of the arrays a phase takes."""
    geometry, everything = request.geometry, (...,)
    results = _index(geometry, phase.results)
    taps = _index(geometry, phase.taps, of_weights=True)
    if request.is_weight_grad:
        return _Step(None, results, everything, taps)
    return _Step(None, everything, taps, results)


def _plan_of(request: Request, geometry: ConvGeometry, step: _Step) -> Plan:
    return plain_plan(
        *_parts_of(request, geometry, step), flipped=request.is_input_grad
    )


def _problem_of(request: Request, geometry: ConvGeometry, step: _Step) -> Problem:
    return problem_of(
        *_parts_of(request, geometry, step), flipped=request.is_input_grad
    )


def _parts_of(
    request: Request, geometry: ConvGeometry, step: _Step
) -> tuple[str, ConvGeometry, dict[str, Array], Array, Options, Backend]:
    """The arguments of a phase's plan."""
    arrays = request.arrays.copy()
    first, second, *_ = arrays
    arrays[first] = arrays[first][step.first]
    arrays[second] = arrays[second][step.second]
    result = request.result[step.out]
    return request.call, geometry, arrays, result, request.options, request.backend


def _index(
    geometry: ConvGeometry, cells: tuple[slice, ...], *, of_weights: bool = False
) -> Index:
    """An index along the spatial axes of an array, or of the weights."""
    if geometry.channels_first:
        return (..., *cells)
    return cells if of_weights else (..., *cells, slice(None))


def _nothing(request: Request) -> Plan:
    """A plan that multiplies nothing, where no tap meets a cell."""
    axes = tuple(
        axis._replace(size=axis.dilated_size, input_dilation=1)
        for axis in request.geometry.axes
    )
    geometry = replace(request.geometry, images=0, axes=axes, batched=True)
    shapes = shapes_of(request.call, geometry)
    arrays = {n: stub_array(shapes[n], a.dtype) for n, a in request.arrays.items()}
    more = request.options, request.backend
    return plain_plan(request.call, geometry, arrays, None, *more)
