"""Strings that identify the machine and its BLAS, and the test for Numba."""

import os
import platform
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np


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
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line
    return platform.platform()


@cache
def jit_is_installed() -> bool:
    """True if Numba is installed; it is imported when one of its loops first runs."""
    return find_spec("numba") is not None
