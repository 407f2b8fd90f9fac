"""What a peer does, and how a call is timed and weighed on NumPy and CuPy."""

import ctypes
import importlib
import platform
import tracemalloc
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from benchmarks.cases import TOLERANCES, Array, Case, relative_error
from benchmarks.definitions import Host
from benchmarks.layers import Sizes
from benchmarks.peers.on_device import Maker, Prepared, prepared

Call = Callable[[], Array]

# A kernel that keeps the device busy, so that what is timed after it lies queued: each
# turn waits for the one before.
SPIN = """
extern "C" __global__ void spin(float *value, long long turns)
{
    float v = *value;
    for (long long i = 0; i < turns; ++i)
        v = v * 0.5f + 1.0f;
    *value = v;
}
"""
CALIBRATION_TURNS = 1_000_000
# Seconds by which the device may lag behind the host, at most.
LONGEST_LEAD = 0.01


class RefusedError(Exception):
    """A peer cannot run this case, or not in reasonable time and memory."""


class Wishes(NamedTuple):
    """What the command line asks of the peers."""

    device: str = "cpu"
    precision: str = "standard"
    memory_limit: str | None = None
    strategy: str = "auto"
    reuse_out: bool = False
    layout: str = "channels_first"


class Device(Protocol):
    """Moves arrays, times a call, and measures what it allocates."""

    weighed_by: str
    # Whether its calls only queue work, so that threads of ours never disturb a peer.
    is_remote: bool

    def put(self, array: Host) -> Array: ...

    def take(self, result: Array) -> Host: ...

    def seconds(self, call: Call) -> float: ...

    def extra_bytes(self, call: Call) -> int | None:
        """Peak memory of a call beyond its inputs and its result."""

    def is_lost(self) -> bool:
        """Whether nothing will run there any more in this process."""


class HostDevice:
    """NumPy's memory, which tracemalloc sees."""

    weighed_by = "tracemalloc"
    is_remote = False

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

    def is_lost(self) -> bool:
        return False


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


class QueueAhead:
    """Times on a device alone: the host queues a call while the device is still busy.

    Without that, a call whose launches take the host longer than the device its kernels
    would be timed by the host's clock.  How long the device is kept busy follows from
    how long the host took for the call before; a call that waits for the device itself
    shows its waiting.
    """

    _lead = 0.0

    def spin(self, seconds: float) -> None:
        """Keep the device busy for about so long."""
        raise NotImplementedError

    def event(self) -> Any:
        raise NotImplementedError

    def elapsed(self, start: Any, end: Any) -> float:
        """Milliseconds between two events."""
        raise NotImplementedError

    def seconds(self, call: Call) -> float:
        start, end = self.event(), self.event()
        self.spin(self._lead)
        start.record()
        begun = perf_counter()
        call()
        took = perf_counter() - begun
        end.record()
        end.synchronize()
        self._lead = min(1.5 * took + 2e-5, LONGEST_LEAD)
        return self.elapsed(start, end) * 1e-3


class CupyDevice(QueueAhead):
    """CuPy's memory pool, and times between two events on its stream."""

    weighed_by = "memory pool"
    is_remote = True

    def __init__(self) -> None:
        self.xp = importlib.import_module("cupy")
        self._spun = self.xp.zeros(1, dtype="float32")  # a missing driver shows here
        properties = self.xp.cuda.runtime.getDeviceProperties(0)
        self.l2_bytes = int(properties.get("l2CacheSize", 0))
        self._spin = self.xp.RawKernel(SPIN, "spin")
        self._turns_per_second = CALIBRATION_TURNS / self._calibration()

    def _calibration(self) -> float:
        """Seconds that the calibrating turns take."""

        def copy_transposed() -> None:
            arguments = (self._spun, np.int64(CALIBRATION_TURNS))
            self._spin((1,), (1,), arguments)

        copy_transposed()  # compiles it
        start, end = self.event(), self.event()
        start.record()
        copy_transposed()
        end.record()
        end.synchronize()
        return max(self.elapsed(start, end) * 1e-3, 1e-6)

    def spin(self, seconds: float) -> None:
        turns = np.int64(seconds * self._turns_per_second)
        self._spin((1,), (1,), (self._spun, turns))

    def event(self) -> Any:
        return self.xp.cuda.Event()

    def elapsed(self, start: Any, end: Any) -> float:
        return float(self.xp.cuda.get_elapsed_time(start, end))

    def put(self, array: Host) -> Array:
        return self.xp.asarray(array)

    def take(self, result: Array) -> Host:
        return np.asarray(self.xp.asnumpy(result))

    def join(self, arrays: list[Array]) -> Array:
        return self.xp.concatenate(arrays)

    def cast(self, array: Array, dtype: str) -> Array:
        if dtype == "bfloat16":
            importlib.import_module("ml_dtypes")  # NumPy learns the name
        if array.dtype.name == "bfloat16" and dtype == "float64":
            array = array.astype("float32")
        return array.astype(dtype)

    def zeros(self, shape: Sizes) -> Array:
        return self.xp.zeros(shape, dtype="float64")

    def is_lost(self) -> bool:
        try:
            self.xp.cuda.Device().synchronize()
        except self.xp.cuda.runtime.CUDARuntimeError:
            return True
        return False

    def extra_bytes(self, call: Call) -> int | None:
        live = peak = 0
        # The pool rounds up, and what it took for the result is the result's.
        sizes: dict[int, int] = {}

        class Hook(self.xp.cuda.MemoryHook):  # type: ignore[misc, name-defined]
            name = "benchmarks"

            def malloc_postprocess(self, **event: Any) -> None:
                nonlocal live, peak
                sizes[event["mem_ptr"]] = event["mem_size"]
                live += event["mem_size"]
                peak = max(peak, live)

            def free_postprocess(self, **event: Any) -> None:
                nonlocal live
                live -= event["mem_size"]

        with Hook():
            result = call()
        return peak - sizes.get(result.data.ptr, 0)


@cache
def cupy_device() -> CupyDevice:
    """One for the process: its peers share operands."""
    return CupyDevice()


class Peer:
    """Runs operations its own way, each a method, on arrays of its own device."""

    device: Device = HostDevice()

    def __init__(self, wishes: Wishes) -> None:
        self.wishes = wishes

    def tolerance(self, case: Case) -> float:
        """The error above which a result is wrong."""
        # Everything that "fast" allows, large tiles of Winograd's included.
        return 1e-2 if self.wishes.precision == "fast" else TOLERANCES[case.arithmetic]

    def prepare(self, case: Case) -> Prepared:
        """Operands on the device of this peer, and who checks the result."""
        if self.device.is_remote:
            return prepared(cast("Maker", self.device), case)
        operands = case.operands()
        return Prepared(
            [tuple(map(self.device.put, operands))],
            lambda result: relative_error(case, operands, self.device.take(result)),
        )

    def base_array(self, case: Case, result: Array) -> Array:
        """The result, channels first."""
        del case
        return result

    def versions(self) -> dict[str, str]:
        return {}

    def plan(self, case: Case) -> dict[str, Any]:
        """The way that was chosen and the memory it may take, where a peer tells."""
        del case
        return {"strategy": None}

    def call(self, case: Case, *operands: Array) -> Call:
        """A measurable call; what it needs beforehand is done here."""
        operation = getattr(self, case.operation, None)
        if operation is None:
            raise RefusedError(f"this peer has no {case.operation}")
        return partial(operation, case, *operands)


def python_versions() -> dict[str, str]:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}",
    }
