"""The machine that NumPy runs on, what a call costs there, and whether Numba is."""

import os
import platform
from contextlib import suppress
from functools import cache
from importlib.util import find_spec

import numpy as np

# NumPy adds strided arrays by way of three buffers of this many items; a thousand are
# as fast as its default of 8192.
BUFFER_ITEMS = 1024
_CALL_BYTES = 72 * 1024
_WORKER_BYTES = 8 * 1024
# A part of a plan: its problem, its candidate, and what the planner keeps of it.
PART_BYTES = 6 * 1024


def call_overhead(workers: int, itemsize: int) -> int:
    """Bytes that a call takes beyond its buffers, sums having this item size."""
    # Measured with tracemalloc on CPython 3.11: at most 15 KiB of views, slices and
    # closures for one worker and 9 KiB for each more; in a first call the plan and a
    # program of `FREE_STEPS` steps, together 110 KiB; and NumPy's own buffers.
    return _CALL_BYTES + workers * (_WORKER_BYTES + 3 * BUFFER_ITEMS * itemsize)


@cache
def cpu_machine() -> tuple[str, ...]:
    """The version of NumPy, its BLAS, and the processors.

    Times that were measured on another machine must not be used.
    """
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return (
        np.__version__,
        str(blas),
        platform.machine(),
        platform.processor(),
        _processor(),
        str(os.cpu_count()),
    )


def _processor() -> str:
    # Importing pathlib takes 2 ms.
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
        for line in lines:
            if line.startswith("model name"):
                return line.rstrip("\n")
    return platform.platform()


@cache
def jit_is_installed() -> bool:
    """True if Numba is installed; it is imported when one of its loops first runs."""
    return find_spec("numba") is not None
