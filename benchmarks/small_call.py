"""What a call costs before it computes anything, and what an import costs.

The times of conv2d on (1, 3, 8, 8) with 8 filters of 3×3 and padding 1: as users call
it, without the NVTX ranges in it, and with a plan and its weights prepared once.
"""

import os
import subprocess
import sys
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from timeit import timeit
from typing import Any

import numpy as np

import cuconv
from benchmarks.internals import without_ranges
from benchmarks.machine import ROOT, apart

IMPORT = """
import numpy
from time import perf_counter
start = perf_counter()
import cuconv
print((perf_counter() - start) * 1e3)
"""


def measure(rounds: int = 9, calls: int = 1000) -> dict[str, float]:
    """Medians over rounds in which the kinds of call take turns."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 3, 8, 8), dtype=np.float32)
    w = rng.standard_normal((8, 3, 3, 3), dtype=np.float32)
    plan = cuconv.plan_conv(x.shape, w.shape, dtype="float32", padding=1)
    call, prepared = partial(cuconv.conv2d, x, w, padding=1), plan.prepare(w)
    np.testing.assert_allclose(prepared(x), call(), rtol=1e-4, atol=1e-5)
    # As users have it, with the garbage collector.
    seconds = partial(timeit, setup="gc.enable()", number=calls)
    rows = []
    for _ in range(rounds + 1):
        row = seconds(call), seconds(partial(prepared, x))
        with without_ranges():
            rows.append((*row, seconds(call)))
    # The first round warms up.
    whole, planned, bare = (
        1e6 / calls * median(each) for each in zip(*rows[1:], strict=True)
    )
    return {
        "call_microseconds": whole,
        "prepared_microseconds": planned,
        "ranges_microseconds": whole - bare,
    }


def import_milliseconds(repeats: int = 15) -> float:
    """``import cuconv`` beyond ``import numpy``, each time in a new process.

    Modules are compiled before the first, as those of an installed package are.
    """
    with TemporaryDirectory() as folder:
        keep = {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        options: Any = {"cwd": ROOT, "env": {**os.environ, **keep}}
        command = [sys.executable, "-c", IMPORT]
        times = [
            float(subprocess.check_output(command, **options))  # noqa: S603
            for _ in range(repeats + 1)
        ]
    return median(times[1:])


def run(*, quick: bool) -> dict[str, float]:
    found: dict[str, float] = apart(
        measure, **{"rounds": 2, "calls": 20} if quick else {}
    )
    return {**found, "import_milliseconds": import_milliseconds(1 if quick else 15)}
