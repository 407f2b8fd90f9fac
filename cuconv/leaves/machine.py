"""Words for the machine that NumPy runs on: what was timed on another says nothing."""

import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np


@cache
def host_machine() -> tuple[str, ...]:
    """The version of NumPy, its BLAS, and the processors."""
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
