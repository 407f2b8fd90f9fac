"""What a call costs before it computes anything, and what an import costs.

``python -m benchmarks.small_call`` prints the times of conv2d on (1, 3, 8, 8) with 8
filters of 3×3 and padding 1: as users call it, without the NVTX ranges in it, and with
a prepared plan in versions that have one.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

import cuconv
from benchmarks.machine import run_python
from cuconv import profiling

Call = Callable[[], Any]

IMPORT = """
import numpy
from time import perf_counter
start = perf_counter()
import cuconv
print((perf_counter() - start) * 1e3)
"""


def operands() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    shapes = (1, 3, 8, 8), (8, 3, 3, 3)
    x, w = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    return x, w


def plain_call() -> Call:
    x, w = operands()
    return partial(cuconv.conv2d, x, w, padding=1)


def prepared_call() -> Call:
    """Planned and with its weights prepared once."""
    x, w = operands()
    prepared = cuconv.plan_conv(x.shape, w.shape, dtype="float32", padding=1).prepare(w)
    np.testing.assert_allclose(prepared(x), plain_call()(), rtol=1e-4, atol=1e-5)
    return partial(prepared, x)


@contextmanager
def without_ranges() -> Iterator[None]:
    domain = profiling._domain  # noqa: SLF001
    profiling._domain = None  # noqa: SLF001
    try:
        yield
    finally:
        profiling._domain = domain  # noqa: SLF001


def microseconds(call: Call, calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - start) / calls * 1e6


def measure(rounds: int = 9, calls: int = 1000) -> dict[str, float]:
    """Medians over rounds in which the kinds of call take turns."""
    kinds = {
        "call_microseconds": plain_call(),
        "prepared_microseconds": prepared_call(),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    bare: list[float] = []
    for _ in range(rounds + 1):
        for name, call in kinds.items():
            times[name].append(microseconds(call, calls))
        with without_ranges():
            bare.append(microseconds(kinds["call_microseconds"], calls))
    # The first round warms up.
    found = {name: statistics.median(each[1:]) for name, each in times.items()}
    whole = found["call_microseconds"]
    return {**found, "ranges_microseconds": whole - statistics.median(bare[1:])}


def import_milliseconds(repeats: int = 15) -> float:
    """``import cuconv`` beyond ``import numpy``, each time in a new process.

    Modules are compiled before the first, as those of an installed package are.
    """
    with TemporaryDirectory() as folder:
        keep = {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        times = [float(run_python("-c", IMPORT, **keep)) for _ in range(repeats + 1)]
    return statistics.median(times[1:])


def run(*, quick: bool) -> dict[str, float]:
    words = ["quick"] if quick else []
    found = json.loads(run_python("-m", "benchmarks.small_call", *words))
    return {**found, "import_milliseconds": import_milliseconds(1 if quick else 15)}


if __name__ == "__main__":
    print(json.dumps(measure(2, 20) if "quick" in sys.argv else measure()))
