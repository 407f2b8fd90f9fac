"""``cupy.cuda``."""

from . import cublas, device, memory, runtime, stream
from .device import Device
from .memory import MemoryHook
from .stream import Event, Stream, get_current_stream, get_elapsed_time


def is_available():
    return True
