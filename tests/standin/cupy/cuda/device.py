"""Devices: two of them, so that the wrong one can be current."""

import threading

COUNT = 2
_state = threading.local()


class Device:
    def __init__(self, device=None):
        self.id = current().id if device is None else int(device)

    @property
    def compute_capability(self):
        return ("90", "80")[self.id]

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return self.id

    def __enter__(self):
        _stack().append(self)
        return self

    def __exit__(self, *_):
        _stack().pop()

    def __repr__(self):
        return f"<CUDA Device {self.id}>"

    def synchronize(self):
        from .stream import get_current_stream, waited

        waited("device", get_current_stream(self.id))


def _stack():
    if not hasattr(_state, "stack"):
        _state.stack = []
    return _state.stack


_FIRST = object.__new__(Device)
_FIRST.id = 0


def current():
    return _stack()[-1] if _stack() else _FIRST


def get_cublas_handle():
    return 1000 + current().id
