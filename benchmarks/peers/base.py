"""What a peer does, and how a call is timed and weighed on NumPy and CuPy."""

import ctypes
import importlib
import platform
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np

from benchmarks.cases import Array, Case, Host

Call = Callable[[], Array]


class RefusedError(Exception):
    """A peer cannot run this case, or not in reasonable time and memory."""


class Wishes(NamedTuple):
    """What the command line asks of the peers."""

    device: str = "cpu"
    precision: str = "standard"
    memory_limit: str | None = None
    strategy: str = "auto"
    reuse_out: bool = False


class Device(Protocol):
    """Moves arrays, times a call, and measures what it allocates."""

    weighed_by: str

    def put(self, array: Host) -> Array: ...

    def take(self, result: Array) -> Host: ...

    def seconds(self, call: Call) -> float: ...

    def extra_bytes(self, call: Call) -> int | None:
        """Peak memory of a call beyond its inputs and its result."""


class HostDevice:
    """NumPy's memory, which tracemalloc sees."""

    weighed_by = "tracemalloc"

    def put(self, array: Host) -> Array:
        return array

    def take(self, result: Array) -> Host:
        return np.asarray(result)

    def seconds(self, call: Call) -> float:
        start = perf_counter()
        call()
        return perf_counter() - start

    def extra_bytes(self, call: Call) -> int | None:
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        result = call()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return int(peak - before - result.nbytes)


class ResidentDevice(HostDevice):
    """Memory that tracemalloc does not see: the process's resident set, on Linux."""

    weighed_by = "resident set"

    def extra_bytes(self, call: Call) -> int | None:
        forget_peak = Path("/proc/self/clear_refs")
        if not forget_peak.exists():
            return None
        # Freed memory that the process still holds would hide what a call takes.
        ctypes.CDLL(None).malloc_trim(0)
        forget_peak.write_text("5")
        before = resident("VmRSS")
        result = call()
        return max(0, resident("VmHWM") - before - int(result.nbytes))


def resident(label: str) -> int:
    """Bytes on a line of the process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(label):
            return int(line.split()[1]) * 1024
    raise KeyError(label)


class CupyDevice:
    """CuPy's memory pool, and times between two events on its stream."""

    weighed_by = "memory pool"

    def __init__(self) -> None:
        self.xp = importlib.import_module("cupy")
        self.xp.zeros(1)  # a missing driver shows here

    def put(self, array: Host) -> Array:
        return self.xp.asarray(array)

    def take(self, result: Array) -> Host:
        return np.asarray(self.xp.asnumpy(result))

    def seconds(self, call: Call) -> float:
        start, end = self.xp.cuda.Event(), self.xp.cuda.Event()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(self.xp.cuda.get_elapsed_time(start, end)) * 1e-3

    def extra_bytes(self, call: Call) -> int | None:
        live = peak = 0

        class Hook(self.xp.cuda.MemoryHook):  # type: ignore[misc, name-defined]
            name = "benchmarks"

            def malloc_postprocess(self, **event: Any) -> None:
                nonlocal live, peak
                live += event["mem_size"]
                peak = max(peak, live)

            def free_postprocess(self, **event: Any) -> None:
                nonlocal live
                live -= event["mem_size"]

        with Hook():
            result = call()
        return int(peak - result.nbytes)


class Peer:
    """Runs the three operations its own way, on arrays of its own device."""

    device: Device = HostDevice()
    tolerance = 1e-4

    def __init__(self, wishes: Wishes) -> None:
        self.wishes = wishes
        if wishes.precision == "fast":
            self.tolerance = 1e-2  # TF32 keeps ten bits

    def versions(self) -> dict[str, str]:
        return {}

    def strategy(self, case: Case) -> str | None:
        """The name of the way that was chosen, where a peer tells."""
        del case
        return None

    def call(self, case: Case, first: Array, second: Array) -> Call:
        """A measurable call; what it needs beforehand is done here."""
        return partial(getattr(self, case.operation), case, first, second)


def python_versions() -> dict[str, str]:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}",
    }
