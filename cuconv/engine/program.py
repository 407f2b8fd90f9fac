"""Programs: steps that are recorded once and run again by repeated calls.

A strategy is ordinary code that makes views of arrays and passes them to functions
through `Backend.do`.  The views and functions depend on shapes, strides and types
alone. So its second run is recorded on stubs (`ArrayStub`): every function with its
views becomes a `Step`.  Running the `Program` later builds the views of the caller's
arrays, reuses those of the workspace, and calls the functions.

Some sources of views are memory of the call: ``shared`` is the workspace that all
workers share, and every region of a `Recording` is the part of it that one worker uses.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from operator import itemgetter, methodcaller
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from cuconv import profiling
from cuconv.arrays import Array, ArrayStub, DType, offset_of, strided, stub_array

SHARED = "shared"
# Longer programs are not kept: they take memory, and save little time.
MOST_STEPS = 400
# What a step takes, with its views of a workspace: as many are recorded as the memory
# limit has room for, beside a few that are counted with each call.
STEP_BYTES, FREE_STEPS = 640, 160
MOST_BYTES = MOST_STEPS * STEP_BYTES
# The largest workspace of programs that set no buffer size: NumPy's buffers for arrays
# that fit into it are less than what `CpuBackend.overhead` counts, whatever their size.
_SMALL_BYTES = 2**16


Slots: TypeAlias = list[Any]


def takes_addresses(function: Callable[..., Any]) -> bool:
    """True if it takes the addresses of arrays."""
    return getattr(function, "takes_addresses", False)


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


# A function, and the getter of its operands from the slots: Python takes a tuple apart
# faster than a named one.
Step: TypeAlias = tuple[Callable[..., Any], Callable[[Slots], Iterable[Any]]]
Item: TypeAlias = tuple[Step, ...]


class Phase(NamedTuple):
    """Items that are independent of each other, for so many workers at most."""

    items: tuple[Item, ...]
    workers: int


class Program:
    """Steps over the arrays of a call and one workspace.

    ``phases`` run one after another.  ``slots`` contains the constants; ``views`` says
    what goes to the other slots.
    """

    def __init__(
        self,
        recording: "Recording",
        nbytes: int,
        workers: int,
        *,
        single_threaded: bool,
        buffered: int = 0,
    ) -> None:
        self.nbytes, self.workers = nbytes, workers
        self.single_threaded = single_threaded
        # Whether NumPy may read or write more than a few arrays by way of buffers.
        self.is_buffered = nbytes + buffered > _SMALL_BYTES
        self.slots = list(recording.slots)
        self.views = tuple(recording.views.items())
        each = (recording.phases_of(ranges=ranges) for ranges in (False, True))
        # One worker alone does everything in order.
        self.phases, self.phases_with_ranges = (
            _joined(phases) if workers == 1 else tuple(phases) for phases in each
        )
        self.regions = {SHARED: (0, 0, workers), **recording.regions}
        self.kept = [(s, v) for v, s in self.views if v.source in self.regions]
        # The arrays of the call of which there are views, and their places in it.
        viewed, names = {v.source for v, _ in self.views}, recording.stubs
        self.sources = {name: i for i, name in enumerate(names) if name in viewed}
        # Views of the caller's arrays: by a function of the array, or by the layout.
        self.made: list[tuple[int, int, Callable[[Array], Array] | None]] = []
        self.laid: list[tuple[int, int, tuple[Any, ...], tuple[Any, ...]]] = []
        for view, slot in self.views:
            if view.source in self.regions:
                continue
            stub, source = recording.stubs[view.source], self.sources[view.source]
            if _is_run(stub) and not _is_simple(view, stub):
                layout = (view.shape, view.dtype), (view.offset, view.strides)
                self.laid.append((slot, source, *layout))
            else:
                self.made.append((slot, source, _maker(view, stub)))

    @cached_property
    def addresses(self) -> list[tuple[int, str, int]]:
        """The slots of addresses, each with the source and the offset."""
        return [(slot, v.source, v.offset) for v, slot in self.views if v.is_address]

    @cached_property
    def arrays(self) -> list[tuple[int, View]]:
        """The slots of arrays."""
        return [(slot, view) for view, slot in self.views if not view.is_address]

    def bound(self, raw: Array) -> list[Slots]:
        """The slots of every worker, with views of an aligned NumPy workspace."""
        each = []
        for worker in range(self.workers):
            slots = self.slots.copy()
            for slot, view in self.kept:
                start, step, workers = self.regions[view.source]
                if worker >= workers:
                    continue
                place = view.offset + start + worker * step
                slots[slot] = np.ndarray(
                    view.shape, view.dtype, raw, place, view.strides
                )
            each.append(slots)
        return each

    def placed(self, arrays: Sequence[Array], slots: Slots) -> Slots:
        """A copy of the slots, with the views of the caller's arrays."""
        slots = slots.copy()
        for slot, source, make in self.made:
            array = arrays[source]
            slots[slot] = array if make is None else make(array)
        for slot, source, (shape, dtype), (offset, strides) in self.laid:
            slots[slot] = np.ndarray(shape, dtype, arrays[source], offset, strides)
        return slots

    def current_phases(self) -> tuple[Phase, ...]:
        """The phases, with ranges if a profiler receives them."""
        return self.phases if profiling.domain is None else self.phases_with_ranges


def _joined(phases: Iterable[Phase]) -> tuple[Phase, ...]:
    """One phase of one item, of all steps."""
    steps = tuple(step for items, _ in phases for item in items for step in item)
    return (Phase((steps,), 1),)


def _is_run(stub: ArrayStub) -> bool:
    """True if NumPy accepts an array of this layout as the memory of another."""
    return bool(stub.flags.c_contiguous and stub.dtype.kind != "V" and stub.size)


def _is_simple(view: View, stub: ArrayStub) -> bool:
    """The kind of a view: the array itself, a part of it, or another shape."""
    make = _maker(view, stub)
    return make is None or isinstance(make, (itemgetter, methodcaller))


def _maker(view: View, stub: ArrayStub) -> Callable[[Array], Array] | None:
    """The function that makes a view of an array; None if the view is the array."""
    if view.is_address:
        return None
    if not view.offset and (view.shape, view.strides) == (stub.shape, stub.strides):
        return None
    part = _part(view, stub)
    if part is not None:
        return itemgetter(part)
    is_whole = stub.flags.c_contiguous and stub.size == math.prod(view.shape)
    shaped: Any = stub.reshape(view.shape) if is_whole else stub
    if is_whole and view == View.of(shaped, is_address=False):
        return methodcaller("reshape", view.shape)
    _, offset, shape, strides, dtype, _ = view
    return partial(strided, shape=shape, strides=strides, offset=offset, dtype=dtype)


def _part(view: View, stub: ArrayStub) -> tuple[slice, ...] | None:
    """The slices of an array that are a view, which is the quickest way to make it."""
    if view.dtype != stub.dtype or len(view.shape) != stub.ndim or not stub.size:
        return None
    slices, rest = [slice(None)] * stub.ndim, view.offset
    for axis in sorted(range(stub.ndim), key=lambda i: -stub.strides[i]):
        size, stride = stub.shape[axis], stub.strides[axis]
        count, step = view.shape[axis], 1
        if count > 1 and stride > 0:
            step = view.strides[axis] // stride
        reach = (count - 1) * step + 1
        if step < 1 or count < 1 or reach > size:
            return None
        start = min(rest // stride, size - reach) if stride > 0 else 0
        rest -= start * stride
        slices[axis] = slice(start, start + reach, step)
    part = tuple(slices)
    found: Any = stub[part]
    made = View.of(found, is_address=False)
    same = (made.offset, made.shape) == (view.offset, view.shape) and all(
        n == 1 or one == two
        for n, one, two in zip(view.shape, made.strides, view.strides, strict=True)
    )
    return part if same else None


class Recording:
    """Replaces `do`, `each` and `stage` of a backend, and records the calls."""

    def __init__(
        self, backend: Any, stubs: dict[str, ArrayStub], spare: int = MOST_BYTES
    ) -> None:
        self.stubs = stubs
        self._most = min(MOST_STEPS, FREE_STEPS + max(spare, 0) // STEP_BYTES)
        self.backend = copy.copy(backend)
        self.backend.do, self.backend.each = self.do, self.each
        self.backend.stage = self.stage
        self.slots: Slots = []
        self.views: dict[View, int] = {}
        # Of each region: where the first worker's begins, how far apart they are, and
        # for how many workers there is one.
        self.regions: dict[str, tuple[int, int, int]] = {}
        self._constants: dict[int, int] = {}
        self._phases: list[tuple[list[list[Step]], int]] = []
        self._steps: list[Step] | None = None
        self._count = 0

    def do(self, function: Callable[..., Any], *operands: Any) -> None:
        """Record a step."""
        self._count += 1
        if self._count > self._most:
            raise TooManySteps
        if self._steps is None:
            self._steps = []
            self._phases.append(([self._steps], 1))
        by_address = takes_addresses(function)
        slots = [self._slot(o, is_address=by_address) for o in operands]
        self._steps.append((function, _picker(slots)))

    @contextmanager
    def stage(self, name: str, strategy: str = "", chunk: int = 0) -> Iterator[None]:
        """Record a range."""
        recorded = profiling.stage(name, strategy, chunk)
        self.do(profiling.push, recorded.message, recorded.chunk)
        yield
        self.do(profiling.pop)

    def each(
        self,
        items: Iterable[Any],
        body: Callable[..., None],
        scratch: tuple[Any, ...],
        *,
        single_threaded: bool,
    ) -> None:
        """Record a phase: the steps of every item, as by the first worker."""
        del single_threaded
        phase: list[list[Step]] = []
        self._phases.append((phase, len(scratch)))
        for number, item in enumerate(items):
            self._steps = []
            phase.append(self._steps)
            body(number, item, scratch[0])
        self._steps = None

    def region(self, name: str, start: int, nbytes: int, workers: int) -> ArrayStub:
        """Stand in for the memory of a worker's own in a workspace."""
        self.regions[name] = start, nbytes, workers
        return stub_array((nbytes,), np.dtype(np.uint8), name=name)

    def phases_of(self, *, ranges: bool) -> Iterable[Phase]:
        """The phases, with or without the ranges that a profiler shows."""
        marks = () if ranges else (profiling.push, profiling.pop)
        for phase, workers in self._phases:
            items = (
                tuple(step for step in item if step[0] not in marks) for item in phase
            )
            yield Phase(tuple(item for item in items if item), workers)

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
