"""``cupy.cuda``."""

from . import cublas, device, graph, memory, runtime, stream
from .device import Device
from .graph import Graph
from .memory import MemoryHook
from .stream import Event, Stream, get_current_stream, get_elapsed_time


def alloc(size):
    """Memory of the current pool, as a pointer."""
    from cupy import empty

    return empty(size, "uint8").data


def is_available():
    return True
