"""A peer, and the device it runs on: how a call is timed and its memory measured."""

import ctypes
import importlib
import tracemalloc
from collections.abc import Callable
from functools import cache, cached_property, lru_cache, partial
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import RANDOM, TOLERANCES, Case, Host, largest_error
from benchmarks.layers import Sizes
from benchmarks.taps import Array, maxima, norm_error, reference

Call = Callable[[], Array]
# Sets of operands of a case, and the error of the result of the first.
Prepared = tuple[list[tuple[Array, ...]], Callable[[Array], float]]

# Random numbers: to draw hundreds of millions would take longer than all that is to be
# measured, so these are drawn once and laid out again and again.  Their number is a
# prime: no axis repeats them in step.
POOL = 4_000_037
# Inputs take turns until they are this many times what the L2 cache holds.
TIMES_CACHE = 2
MOST_SETS = 16
# A kernel that keeps the device busy, so that what is timed after it lies queued: each
# turn waits for the one before, four cycles.
SPIN = """
extern "C" __global__ void spin(float *value, long long turns)
{
    float v = *value;
    for (long long i = 0; i < turns; ++i)
        v = v * 0.5f + 1.0f;
    *value = v;
}
"""
# At most: a lead may last longer than it need, never shorter.
CYCLES_PER_SECOND = 3e9
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


class Device:
    """NumPy's memory, which tracemalloc sees."""

    weighed_by = "tracemalloc"
    join: Any = staticmethod(np.concatenate)

    def put(self, array: Host) -> Array:
        return array

    def take(self, result: Array) -> Host:
        return np.asarray(result)

    def cast(self, array: Array, _dtype: str) -> Array:
        """In another type: on a CPU all is float32."""
        return array

    def prepare(self, case: Case) -> Prepared:
        own = self.operands(case)
        return [own], partial(largest_error, case, [*map(np.asarray, own)])

    def operands(self, case: Case, place: int = 0) -> tuple[Array, ...]:
        """Standard normal numbers, the same in every process; weights are scaled.

        Indices are those of the maxima of x.
        """
        return tuple(self.operand(case, name, place) for name in case.operand_names)

    def operand(self, case: Case, name: str, place: int = 0) -> Array:
        if name == "indices":
            x = np.asarray(self.operand(case, "x", place))
            return self.put(maxima(case.layer, x)[1])
        shape = case.shapes[name]
        numbers = self.normal(prod(shape), 1 + 4 * place + RANDOM.index(name))
        if name == "w":
            numbers = numbers * float(case.layer.patch**-0.5)
        return self.cast(numbers.reshape(shape), case.dtype)

    def normal(self, count: int, seed: int = 0) -> Array:
        """Standard normal float32 numbers, from a place that the seed chooses."""
        start = seed * 999_983 % POOL
        more = range(POOL - start, count, POOL)
        pieces = [self.pool[: count - done] for done in more]
        return self.join([self.pool[start : start + count], *pieces])

    @cached_property
    def pool(self) -> Array:
        return self.put(np.random.default_rng(0).standard_normal(POOL, np.float32))

    def seconds(self, call: Call) -> float:
        start = perf_counter()
        call()
        return perf_counter() - start

    def extra_bytes(self, call: Call) -> int | None:
        """Peak memory of a call beyond its inputs and its result."""
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        result = call()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak - before - nbytes_of(result)

    def synchronize(self) -> None: ...


class ResidentDevice(Device):
    """Memory that tracemalloc does not see: the process's resident set, on Linux."""

    weighed_by = "resident set"

    def extra_bytes(self, call: Call) -> int | None:
        forget_peak, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
        if not forget_peak.exists():
            return None

        def resident(label: str) -> int:
            lines = status.read_text().splitlines()
            return next(int(s.split()[1]) * 1024 for s in lines if s.startswith(label))

        # Freed memory that the process still holds would hide what a call takes.
        ctypes.CDLL(None).malloc_trim(0)
        forget_peak.write_text("5")
        before = resident("VmRSS")
        result = call()
        return max(0, resident("VmHWM") - before - nbytes_of(result))


def nbytes_of(result: Any) -> int:
    """Of an array, or of several and None for those that there are not."""
    several = result if isinstance(result, tuple) else (result,)
    return sum(int(array.nbytes) for array in several if array is not None)


class GpuDevice(Device):
    """A GPU through a library, which gives these functions."""

    weighed_by = "memory pool"
    l2_bytes: int
    spin: Callable[[float], None]  # keeps the device busy for about so long
    event: Callable[[], Any]
    elapsed: Callable[[Any, Any], float]  # milliseconds between two events
    zeros: Callable[[Sizes], Array]  # in float64
    _lead = 0.0

    def seconds(self, call: Call) -> float:
        """Time a call on the device alone: it is queued while the device is busy.

        Else a call whose launches take longer than its kernels would be timed by the
        host's clock.  How long the device is kept busy follows from how long the host
        took for the call before; a call that waits for the device shows its waiting.
        """
        start, end = self.event(), self.event()
        self.spin(self._lead)
        start.record()
        took = super().seconds(call)
        end.record()
        end.synchronize()
        self._lead = min(1.5 * took + 2e-5, LONGEST_LEAD)
        return self.elapsed(start, end) * 1e-3

    # All peers of a process measure one case at a time, on the same operands.
    @lru_cache(maxsize=1)  # noqa: B019 - there is one device in a process
    def prepare(self, case: Case) -> Prepared:
        """Operands that outgrow the cache, and a whole result to compare with."""
        nbytes = case.nbytes(*case.operand_names)
        wanted = -(-TIMES_CACHE * self.l2_bytes // nbytes)
        places = range(max(1, min(wanted, MOST_SETS)))
        sets = [self.operands(case, place) for place in places]
        wide = [self.cast(array, "float64") for array in sets[0]]
        true = reference(case.layer, case.operation, wide, self.zeros)

        def error(result: Array) -> float:
            if tuple(result.shape) != tuple(true.shape):
                raise ValueError(f"the result is {result.shape}, not {true.shape}")
            return norm_error(self.cast(result, "float64"), true)

        return sets, error


class CupyDevice(GpuDevice):
    """CuPy's memory pool, and times between two events on its stream."""

    def __init__(self) -> None:
        self.xp = xp = importlib.import_module("cupy")
        self._spun = xp.zeros(1, dtype="float32")  # a missing driver shows here
        self._spin = xp.RawKernel(SPIN, "spin")
        properties = xp.cuda.runtime.getDeviceProperties(0)
        self.l2_bytes = int(properties.get("l2CacheSize", 0))
        self.event, self.elapsed = xp.cuda.Event, xp.cuda.get_elapsed_time
        self.join, self.zeros = xp.concatenate, partial(xp.zeros, dtype="float64")

    def spin(self, seconds: float) -> None:
        turns = np.int64(seconds * CYCLES_PER_SECOND / 4)
        self._spin((1,), (1,), (self._spun, turns))

    def synchronize(self) -> None:
        self.xp.cuda.Device().synchronize()

    def put(self, array: Host) -> Array:
        return self.xp.asarray(array)

    def take(self, result: Array) -> Host:
        return np.asarray(self.xp.asnumpy(result))

    def cast(self, array: Array, dtype: str) -> Array:
        if dtype == "bfloat16":
            importlib.import_module("ml_dtypes")  # NumPy learns the name
        if array.dtype.name == "bfloat16" and dtype == "float64":
            array = array.astype("float32")
        return array.astype(dtype)

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


# One for the process: its peers share operands.
cupy_device = cache(CupyDevice)


class Peer:
    """Runs operations its own way, each a method, on arrays of its own device."""

    device: Device = Device()

    def __init__(self, wishes: Wishes) -> None:
        self.wishes = wishes

    def versions(self) -> dict[str, str]:
        return {}

    def plan(self, _case: Case) -> dict[str, Any]:
        """The strategy and the memory it may take, where a peer tells."""
        return {"strategy": None}

    def call(self, case: Case, *operands: Array) -> Call:
        """A measurable call; what it needs beforehand is done here."""
        if not hasattr(self, case.operation) or case.has_bias:
            bias = " with a bias" * case.has_bias
            raise RefusedError(f"this peer has no {case.operation}{bias}")
        return partial(getattr(self, case.operation), case, *operands)

    def first_channels(self, _case: Case, result: Array) -> Array:
        """The result, channels first."""
        return result

    def tolerance(self, case: Case) -> float:
        """The error above which a result is wrong."""
        # Everything that "fast" allows, large tiles of Winograd's included.
        return 1e-2 if self.wishes.precision == "fast" else TOLERANCES[case.arithmetic]
