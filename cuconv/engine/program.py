"""Programs: steps that are recorded once and run again by repeated calls.

A strategy is ordinary code that makes views of arrays and passes them to functions
through `Backend.do`.  The views and functions depend on shapes, strides and types
alone. So its first run is a recording on stubs (`ArrayStub`): every function with its
views becomes a `Step`.  Running the `Program` later builds the views of the caller's
arrays, reuses those of the workspace, and calls the functions.

Some sources of views are memory of the call: ``shared`` is the workspace that all
workers share, and every region of a `Recording` is the part of it that one worker uses.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter, methodcaller
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from cuconv import profiling
from cuconv.arrays import Array, ArrayStub, DType, offset_of, strided, stub_array

SHARED = "shared"
# Longer programs are not kept: they take memory, and save little time.
MOST_STEPS = 400

Slots: TypeAlias = list[Any]


class TooManySteps(Exception):  # noqa: N818 - a signal, no error
    """A recording has more steps than a program may have."""


class View(NamedTuple):
    """A view of a caller's array or of the workspace; ``is_address``: its address."""

    source: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    is_address: bool = False

    @classmethod
    def of(cls, stub: ArrayStub, *, is_address: bool) -> "View":
        source = stub.source.name  # type: ignore[union-attr]
        offset = offset_of(stub)
        if is_address:
            return cls(source, offset, (), (), stub.dtype, is_address)
        return cls(source, offset, stub.shape, stub.strides, stub.dtype)


class Step(NamedTuple):
    """A function, and the getter of its operands from the slots."""

    function: Callable[..., Any]
    operands: Callable[[Slots], Iterable[Any]]


Item: TypeAlias = tuple[Step, ...]


class Program:
    """Steps over the arrays of a call and one workspace.

    ``phases`` run one after another; the items of a phase are independent.  ``slots``
    contains the constants; ``views`` are those of the other slots.
    """

    def __init__(
        self,
        recording: "Recording",
        nbytes: int,
        workers: int,
        *,
        single_threaded: bool,
    ) -> None:
        self.nbytes, self.workers = nbytes, workers
        self.single_threaded = single_threaded
        self.slots = list(recording.slots)
        self.views = tuple(recording.views.items())
        self.phases = tuple(recording.phases_of(ranges=False))
        self.phases_with_ranges = tuple(recording.phases_of(ranges=True))
        self.regions = {SHARED: (0, 0), **recording.regions}
        self.kept = [(s, v) for v, s in self.views if v.source in self.regions]
        self.given = [
            (slot, view.source, _maker(view, recording.stubs[view.source]))
            for view, slot in self.views
            if view.source not in self.regions
        ]

    def bound(self, raw: Array) -> list[Slots]:
        """The slots of every worker, with views of an aligned NumPy workspace."""
        each = []
        for worker in range(self.workers):
            slots = self.slots.copy()
            for slot, view in self.kept:
                start, step = self.regions[view.source]
                place = view.offset + start + worker * step
                slots[slot] = np.ndarray(
                    view.shape, view.dtype, raw, place, view.strides
                )
            each.append(slots)
        return each

    def current_phases(self) -> tuple[tuple[Item, ...], ...]:
        """The phases, with ranges if a profiler receives them."""
        return self.phases_with_ranges if profiling.is_listening() else self.phases


def _maker(view: View, stub: ArrayStub) -> Callable[[Array], Array] | None:
    """The function that makes a view of an array; None if the view is the array."""
    if view.is_address:
        return None
    if not view.offset and (view.shape, view.strides) == (stub.shape, stub.strides):
        return None
    is_run = stub.flags.c_contiguous and stub.dtype.kind != "V"
    if (
        is_run
        and not view.offset
        and view
        == View.of(
            stub.reshape(view.shape) if stub.size == np.prod(view.shape) else stub,
            is_address=False,
        )
    ):
        return methodcaller("reshape", view.shape)
    if is_run:
        more = {"offset": view.offset, "strides": view.strides}
        return partial(np.ndarray, view.shape, view.dtype, **more)
    return partial(strided, shape=view.shape, strides=view.strides, offset=view.offset)


class Recording:
    """Replaces `do` and `each` of a backend, and records the calls."""

    def __init__(self, backend: Any, stubs: dict[str, ArrayStub]) -> None:
        self.stubs = stubs
        self.backend = copy.copy(backend)
        self.backend.do, self.backend.each = self.do, self.each
        self.slots: Slots = []
        self.views: dict[View, int] = {}
        # The offsets of the first worker's regions, and the distance to the next
        # worker's.
        self.regions: dict[str, tuple[int, int]] = {}
        self._constants: dict[int, int] = {}
        self._phases: list[list[list[Step]]] = []
        self._steps: list[Step] | None = None
        self._count = 0

    def do(self, function: Callable[..., Any], *operands: Any) -> None:
        """Record a step."""
        self._count += 1
        if self._count > MOST_STEPS:
            raise TooManySteps
        if self._steps is None:
            self._steps = []
            self._phases.append([self._steps])
        takes_addresses = getattr(function, "takes_addresses", False)
        slots = [self._slot(o, is_address=takes_addresses) for o in operands]
        self._steps.append(Step(function, _picker(slots)))

    def each(
        self,
        items: Iterable[Any],
        body: Callable[..., None],
        scratch: tuple[Any, ...],
        *,
        single_threaded: bool,
    ) -> None:
        """Record a phase: the steps of every item, with the first worker's buffers."""
        del single_threaded
        phase: list[list[Step]] = []
        self._phases.append(phase)
        for number, item in enumerate(items):
            self._steps = []
            phase.append(self._steps)
            body(number, item, scratch[0])
        self._steps = None

    def region(self, name: str, start: int, nbytes: int) -> ArrayStub:
        """A stub of one worker's memory in the workspace."""
        self.regions[name] = start, nbytes
        return stub_array((nbytes,), np.dtype(np.uint8), name=name)

    def phases_of(self, *, ranges: bool) -> Iterable[tuple[Item, ...]]:
        """The phases, with or without the ranges that a profiler shows."""
        marks = () if ranges else (profiling.push, profiling.pop)
        for phase in self._phases:
            items = (
                tuple(s for s in item if s.function not in marks) for item in phase
            )
            yield tuple(item for item in items if item)

    def _slot(self, operand: Any, *, is_address: bool) -> int:
        if isinstance(operand, ArrayStub):
            view = View.of(operand, is_address=is_address)
            if view not in self.views:
                self.views[view] = len(self.slots)
                self.slots.append(None)
            return self.views[view]
        found = self._constants.get(id(operand))
        if found is None:
            found = self._constants[id(operand)] = len(self.slots)
            self.slots.append(operand)
        return found


def _picker(slots: list[int]) -> Callable[[Slots], Iterable[Any]]:
    """A fast getter of these slots."""
    if len(slots) > 1:
        return itemgetter(*slots)
    first = slots[0] if slots else 0
    return itemgetter(slice(first, first + len(slots)))
