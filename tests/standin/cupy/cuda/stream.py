"""Streams: everything runs at once, unless it is captured; the current one is known."""

import itertools
import threading
import time

from . import device, runtime

# One entry per synchronisation, by the name of what waited, for tests to look at.
synchronisations = []

_state = threading.local()
_tickets = itertools.count(1)
_finished = [0]


class _BaseStream:
    def __init__(self, ptr, device_id):
        self.ptr = ptr
        self.device_id = device_id
        self._recorded = None

    def __eq__(self, other):
        return isinstance(other, _BaseStream) and self.ptr == other.ptr

    def __hash__(self):
        return self.ptr

    def __enter__(self):
        now = device.current().id
        if self.device_id not in (-1, now):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id})"
                f" does not match with the current device ({now})"
            )
        _stacks().append((now, self))
        return self

    def __exit__(self, *_):
        _stacks().pop()

    def synchronize(self):
        waited("stream", self)

    def record(self, event=None):
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event):
        pass

    def begin_capture(self, mode=None):
        if self.ptr in (0, 1):
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self._recorded is not None:
            raise runtime.CUDARuntimeError("cudaErrorIllegalState")
        self._recorded = []

    def end_capture(self):
        from .graph import Graph

        if self._recorded is None:
            raise runtime.CUDARuntimeError("cudaErrorIllegalState")
        recorded, self._recorded = self._recorded, None
        return Graph._from_stream(recorded)

    def is_capturing(self):
        if self.ptr == 0 and _capturing_anywhere():
            raise runtime.CUDARuntimeError("cudaErrorStreamCaptureImplicit")
        return self._recorded is not None


_alive = []


class Stream(_BaseStream):
    null = None
    ptds = None
    _next = 3

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        if null or ptds:
            super().__init__(0 if null else 2, -1)
            return
        super().__init__(Stream._next, device.current().id)
        Stream._next += 1
        _alive.append(self)


Stream.null = Stream(null=True)
Stream.ptds = Stream(ptds=True)


class Event:
    """Done when something has waited for it or for what came later."""

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        if interprocess and not disable_timing:
            raise ValueError("Timing must be disabled for interprocess events")
        self._times = not disable_timing
        self._ticket = 0
        self._at = None

    @property
    def done(self):
        return self._ticket <= _finished[0]

    def record(self, stream=None):
        stream = get_current_stream() if stream is None else stream
        self._ticket = next(_tickets)
        self._at = None if stream.is_capturing() else time.perf_counter()

    def synchronize(self):
        waited("event", get_current_stream(), self._ticket)


def get_elapsed_time(start_event, end_event):
    for event in (start_event, end_event):
        if not event._times or event._at is None:
            raise runtime.CUDARuntimeError("cudaErrorInvalidResourceHandle")
        if not event.done:
            raise runtime.CUDARuntimeError("cudaErrorNotReady")
    return (end_event._at - start_event._at) * 1e3


def waited(name, stream, ticket=None):
    """Something waits for the device: noted, and refused in a capture."""
    if stream is not None and stream._recorded is not None:
        raise runtime.CUDARuntimeError("cudaErrorStreamCaptureUnsupported")
    synchronisations.append(name)
    _finished[0] = max(_finished[0], next(_tickets) if ticket is None else ticket)


def enqueue(action, arrays, addresses=()):
    """Do it now; or record it, with the addresses that must still be good later."""
    recorded = get_current_stream()._recorded
    if recorded is None:
        action()
    else:
        places = [a.__array_interface__["data"][0] for a in arrays if a.size]
        recorded.append((action, [*places, *addresses]))


def refuse(what, error=None):
    """Raise if the current stream is capturing."""
    if get_current_stream()._recorded is not None:
        raise (error or runtime.CUDARuntimeError)(what)


def _capturing_anywhere():
    return any(stream._recorded is not None for stream in _alive)


def _stacks():
    if not hasattr(_state, "stack"):
        _state.stack = []
    return _state.stack


def get_current_stream(device_id=-1):
    wanted = device.current().id if device_id == -1 else device_id
    mine = (stream for index, stream in reversed(_stacks()) if index == wanted)
    return next(mine, Stream.null)
