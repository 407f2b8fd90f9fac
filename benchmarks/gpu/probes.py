"""What a process of its own measures on a GPU: ``python -m benchmarks.gpu.probes``.

It takes the name of a probe and a `Scale` in JSON, and prints a line of JSON for each
finding, so that what was found before a failure is not lost.
"""

import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle, product
from math import prod
from time import perf_counter
from typing import Any

import numpy as np

import cuconv
from benchmarks.cases import Case
from benchmarks.gpu.scale import ARITHMETICS, HALF_AND_WHOLE, Scale
from benchmarks.layers import Layer
from benchmarks.peers.base import CupyDevice, cupy_device
from benchmarks.peers.on_device import normal, operand, prepared
from benchmarks.suites import depthwise, layer

Findings = Iterator[dict[str, Any]]

# Blocks as large as anyone asks for must fit, workspace included.
AMPLE = "2 GiB"
SMALL = (layer(3, 8, 8, 3), depthwise(8, 8, 3))


def milliseconds(
    device: CupyDevice, calls: Sequence[Callable[[], Any]], repeats: int
) -> float:
    """The median of calls that take turns, after each has run once."""
    for call in calls:
        call()
    times = [device.seconds(call) for call, _ in zip(cycle(calls), range(repeats + 1))]
    return 1e3 * statistics.median(times[1:])


# The machine.


def machine(scale: Scale) -> Findings:
    """Which GPU this is, how fast it copies and how fast cuBLAS multiplies."""
    device = cupy_device()
    yield identity(device.xp)
    yield {"copy_gbytes": copy_rate(device, scale)}
    for arithmetic in ARITHMETICS:
        rate = product_rate(device, scale, arithmetic)
        yield {"rates": {arithmetic: rate}}
        if arithmetic == "float32":
            yield {"gemm_gflops": rate}


def identity(xp: Any) -> dict[str, Any]:
    runtime = xp.cuda.runtime
    properties = runtime.getDeviceProperties(0)
    return {
        "gpu": properties["name"].decode(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "cupy": xp.__version__,
            "cuconv": cuconv.__version__,
        },
        "capability": str(xp.cuda.Device().compute_capability),
        "multiprocessors": int(properties["multiProcessorCount"]),
        "l2_bytes": int(properties.get("l2CacheSize", 0)),
        "memory_bytes": int(properties["totalGlobalMem"]),
        "cuda_driver": int(runtime.driverGetVersion()),
        "cuda_runtime": int(runtime.runtimeGetVersion()),
        **clocks(),
    }


def clocks() -> dict[str, Any]:
    """The driver and the clocks as they are found, where nvidia-smi tells."""
    names = (
        "driver_version",
        "clocks.sm",
        "clocks.mem",
        "clocks.max.sm",
        "power.limit",
    )
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    values = [word.strip() for word in done.stdout.partition("\n")[0].split(",")]
    if done.returncode or len(values) != len(names):
        return {}
    return {"smi": dict(zip(names, values, strict=True))}


def copy_rate(device: CupyDevice, scale: Scale) -> float:
    """GB/s read and written by copies within the device."""
    source = normal(device, scale.copied_bytes // 4)
    target = device.xp.empty_like(source)

    def copy() -> None:
        device.xp.copyto(target, source)

    nbytes = int(source.nbytes)
    return 2e-6 * nbytes / milliseconds(device, [copy], scale.repeats)


def product_rate(device: CupyDevice, scale: Scale, arithmetic: str) -> float:
    """GFLOP/s of square matrix products by cuBLAS, from random numbers."""
    gemm = importlib.import_module("cuconv.backends.cuda.gemm").gemm
    n, dtype = scale.matrix, "float32" if arithmetic == "tf32" else arithmetic
    a, b = (
        device.cast(normal(device, n * n, seed), dtype).reshape(1, 1, n, n)
        for seed in (0, 1)
    )
    out = device.xp.empty_like(a)

    def multiply() -> None:
        gemm(a, b, out, fast=arithmetic == "tf32")

    return 2e-6 * n**3 / milliseconds(device, [multiply], scale.repeats)


# Candidates, whose defaults await a measurement.


def columns_of(each: Layer, batch: int, order: str) -> tuple[int, ...]:
    """The shape of the columns of a layer without groups."""
    positions = prod(each.out)
    return {
        "rows": (batch * positions, each.patch),
        "columns": (each.patch, batch * positions),
        "batched": (batch, each.patch, positions),
    }[order]


def window(each: Layer) -> dict[str, Any]:
    names = ("stride", "padding", "dilation")
    return {name: getattr(each, name) for name in names}


def gather(scale: Scale) -> Findings:
    """im2col: every cell of the columns written, every cell of x read once."""
    device, orders = cupy_device(), ("columns", "batched", "rows")
    for each, dtype, order in product(scale.columns, HALF_AND_WHOLE, orders):
        x = operand(device, Case(each, "forward", scale.batch, dtype), "x", 0)
        out = device.xp.empty(columns_of(each, scale.batch, order), dtype=dtype)
        keywords = {**window(each), "order": order, "out": out}
        call = partial(cuconv.im2col, x, each.kernel, **keywords)
        row = {
            "layer": each.name,
            "type": dtype,
            "order": order,
            "nbytes": int(x.nbytes + out.nbytes),
            "milliseconds": milliseconds(device, [call], scale.repeats),
        }
        yield {"gather": [row]}


def col2im(scale: Scale) -> Findings:
    """The scatter by atomic additions against the gather that sums in order."""
    device = cupy_device()
    for each, dtype in product(scale.columns, HALF_AND_WHOLE):
        shape = columns_of(each, scale.batch, "batched")
        columns = device.cast(normal(device, prod(shape)), dtype).reshape(shape)
        out = device.xp.empty(each.x_shape(scale.batch), dtype=dtype)
        keywords = {**window(each), "order": "batched", "out": out}
        call = partial(cuconv.col2im, columns, out.shape, each.kernel, **keywords)
        ways = {
            way: partial(call, deterministic=way == "gather")
            for way in ("gather", "scatter")
        }
        row = {
            "layer": each.name,
            "type": dtype,
            "nbytes": int(columns.nbytes + out.nbytes),
            **{
                f"{way}_milliseconds": milliseconds(device, [one], scale.repeats)
                for way, one in ways.items()
            },
        }
        yield {"col2im": [row]}


def blocks(scale: Scale) -> Findings:
    """The strategy im2col with columns cut in blocks of other sizes."""
    backend = importlib.import_module("cuconv.backends.cuda").cuda_backend()
    usual = backend.block_bytes
    for each, dtype in product(scale.columns, HALF_AND_WHOLE):
        case = Case(each, "forward", scale.batch, dtype)
        for mib in scale.block_mib:
            backend.block_bytes = mib * 2**20
            forget_plans()
            row = {"layer": each.name, "type": dtype, "mib": mib}
            yield {"blocks": [{**row, **block_row(case, scale)}]}
    backend.block_bytes = usual
    forget_plans()


def forget_plans() -> None:
    """Plan every call anew: no key of a plan knows of the size of blocks."""
    importlib.import_module("cuconv.engine.planner").decide.cache_clear()
    importlib.import_module("cuconv.engine.call")._SEEN.clear()  # noqa: SLF001


def block_row(case: Case, scale: Scale) -> dict[str, Any]:
    device = cupy_device()
    options = {**case.options, "strategy": "im2col", "memory_limit": AMPLE}
    shapes = case.shapes["x"], case.shapes["w"]
    plan = cuconv.plan_conv(*shapes, dtype=case.dtype, device="cuda", **options)
    calls = [
        partial(cuconv.conv, *each, **options) for each in prepared(device, case).sets
    ]
    return {
        "chunks": plan.chunks,
        "milliseconds": milliseconds(device, calls, scale.repeats),
    }


# Launches.


def launch(scale: Scale) -> Findings:
    """Small calls: as users make them, in a captured graph, and their kernels alone."""
    names = importlib.import_module("cuconv.strategies").strategies()
    for each, strategy in product(SMALL, ("auto", *names)):
        row = {"layer": each.name, "strategy": strategy}
        yield {"launch": [{**row, **launch_row(each, strategy, scale)}]}


def launch_row(each: Layer, strategy: str, scale: Scale) -> dict[str, Any]:
    device, case = cupy_device(), Case(each, "forward", 1)
    x, w = (operand(device, case, name, 0) for name in ("x", "w"))
    out = device.xp.empty(case.result_shape, dtype=case.dtype)
    options = {**case.options, "strategy": strategy}

    def call() -> Any:
        return cuconv.conv(x, w, out=out, **options)

    try:
        call()
    except ValueError as error:
        return {"refused": str(error)}
    found = {"eager_microseconds": eager(device, call, scale.calls)}
    try:
        return {**found, **captured(device, call, scale)}
    except Exception as error:  # noqa: BLE001 - what cannot be captured says so
        return {**found, "not_captured": f"{type(error).__name__}: {error}"}


def eager(device: CupyDevice, call: Callable[[], Any], calls: int) -> float:
    """Microseconds from one call to the next, by the host's clock."""
    device.xp.cuda.Device().synchronize()
    start = perf_counter()
    for _ in range(calls):
        call()
    device.xp.cuda.Device().synchronize()
    return (perf_counter() - start) / calls * 1e6


def captured(
    device: CupyDevice, call: Callable[[], Any], scale: Scale
) -> dict[str, float]:
    """Replays of a graph of one call, and a share of a graph of many: the kernels."""
    stream = device.xp.cuda.Stream(non_blocking=True)
    with stream:
        call()  # the pool keeps what it takes on this stream
        stream.synchronize()
        one, many = (graph(stream, call, n) for n in (1, scale.captured))

        def replays() -> None:
            for _ in range(scale.captured):
                one.launch(stream)

        def together() -> None:
            many.launch(stream)

        times = {
            name: 1e3 * milliseconds(device, [body], scale.repeats) / scale.captured
            for name, body in (("captured", replays), ("kernel", together))
        }
    return {f"{name}_microseconds": each for name, each in times.items()}


def graph(stream: Any, call: Callable[[], Any], times: int) -> Any:
    """A graph of so many calls, one after the other."""
    stream.begin_capture()
    try:
        for _ in range(times):
            call()
    except Exception:
        # A stream that is left in capture fails everything after it.
        with suppress(Exception):
            stream.end_capture()
        raise
    return stream.end_capture()


PROBES: dict[str, Callable[[Scale], Findings]] = {
    probe.__name__: probe for probe in (machine, gather, col2im, blocks, launch)
}


def main() -> None:
    name, words = sys.argv[1:]
    findings = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no finding
    for found in PROBES[name](Scale.from_json(json.loads(words))):
        print(json.dumps(found), file=findings, flush=True)


if __name__ == "__main__":
    main()
