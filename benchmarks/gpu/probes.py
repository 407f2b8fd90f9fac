"""What a process of its own measures on a GPU: ``python -m benchmarks.gpu.probes``.

It takes the name of a probe and a pickled `Scale`, and prints a line of JSON for each
finding, so that what was found before a failure is not lost.
"""

import json
import os
import pickle
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
from benchmarks.internals import block_bytes, gemm, strategies
from benchmarks.layers import Layer, depthwise, layer
from benchmarks.peers.base import CupyDevice, cupy_device

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
    names = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={names}", "--format=csv,noheader"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    values = [word.strip() for word in done.stdout.partition("\n")[0].split(",")]
    found = dict(zip(names.split(","), values, strict=False))
    return {} if done.returncode or len(values) < 5 else {"smi": found}


def copy_rate(device: CupyDevice, scale: Scale) -> float:
    """GB/s read and written by copies within the device."""
    source = device.normal(scale.copied_bytes // 4)
    copy = partial(device.xp.copyto, device.xp.empty_like(source), source)
    return 2e-6 * int(source.nbytes) / milliseconds(device, [copy], scale.repeats)


def product_rate(device: CupyDevice, scale: Scale, arithmetic: str) -> float:
    """GFLOP/s of square matrix products by cuBLAS, from random numbers."""
    n, dtype = scale.matrix, "float32" if arithmetic == "tf32" else arithmetic
    shape = (1, 1, n, n)
    a, b = (
        device.cast(device.normal(n * n, seed), dtype).reshape(shape) for seed in (0, 1)
    )
    out = device.xp.empty_like(a)
    multiply = partial(gemm(), a, b, out, fast=arithmetic == "tf32")
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


def gather(scale: Scale) -> Findings:
    """im2col: every element of the columns written, every one of x read once."""
    device, orders = cupy_device(), ("columns", "batched", "rows")
    for each, dtype, order in product(scale.columns, HALF_AND_WHOLE, orders):
        x = device.operand(Case(each, "forward", scale.batch, dtype), "x")
        out = device.xp.empty(columns_of(each, scale.batch, order), dtype=dtype)
        keywords = {**window(each), "order": order, "out": out}
        call = partial(cuconv.im2col, x, each.kernel, **keywords)
        row = {"layer": each.name, "type": dtype, "order": order}
        moved = {"nbytes": int(x.nbytes + out.nbytes)}
        time = milliseconds(device, [call], scale.repeats)
        yield {"gather": [{**row, **moved, "milliseconds": time}]}


def col2im(scale: Scale) -> Findings:
    """The scatter by atomic additions against the gather that sums in order."""
    device = cupy_device()
    for each, dtype in product(scale.columns, HALF_AND_WHOLE):
        shape = columns_of(each, scale.batch, "batched")
        columns = device.cast(device.normal(prod(shape)), dtype).reshape(shape)
        out = device.xp.empty(each.shapes(scale.batch)["x"], dtype=dtype)
        keywords = {**window(each), "order": "batched", "out": out}
        call = partial(cuconv.col2im, columns, out.shape, each.kernel, **keywords)
        row = {"layer": each.name, "type": dtype}
        moved = {"nbytes": int(columns.nbytes + out.nbytes)}
        times = {}
        for way in ("gather", "scatter"):
            one = partial(call, deterministic=way == "gather")
            times[f"{way}_milliseconds"] = milliseconds(device, [one], scale.repeats)
        yield {"col2im": [{**row, **moved, **times}]}


def window(each: Layer) -> dict[str, Any]:
    return {name: getattr(each, name) for name in ("stride", "padding", "dilation")}


def blocks(scale: Scale) -> Findings:
    """The strategy im2col with columns cut in blocks of other sizes."""
    device = cupy_device()
    for each, dtype in product(scale.columns, HALF_AND_WHOLE):
        case = Case(each, "forward", scale.batch, dtype)
        options = {**each.options, "strategy": "im2col", "memory_limit": AMPLE}
        shapes = case.shapes["x"], case.shapes["w"]
        calls = [
            partial(cuconv.conv, *operands, **options)
            for operands in device.prepare(case)[0]
        ]
        for mib in scale.block_mib:
            with block_bytes(mib * 2**20):
                plan = cuconv.plan_conv(*shapes, dtype=dtype, device="cuda", **options)
                time = milliseconds(device, calls, scale.repeats)
            row = {"layer": each.name, "type": dtype, "mib": mib}
            found = {"chunks": plan.chunks, "milliseconds": time}
            yield {"blocks": [{**row, **found}]}


# Launches.


def launch(scale: Scale) -> Findings:
    """Small calls: as users make them, in a captured graph, and their kernels alone."""
    for each, strategy in product(SMALL, ("auto", *strategies())):
        row = {"layer": each.name, "strategy": strategy}
        yield {"launch": [{**row, **launch_row(each, strategy, scale)}]}


def launch_row(each: Layer, strategy: str, scale: Scale) -> dict[str, Any]:
    device, case = cupy_device(), Case(each, "forward", 1)
    operands = [device.operand(case, name) for name in case.operand_names]
    out = device.xp.empty(case.result_shape, dtype=case.dtype)
    options = {**each.options, "strategy": strategy, "out": out}
    call = partial(cuconv.conv, *operands, **options)
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

        ways: dict[str, Callable[[], Any]]
        ways = {"captured": replays, "kernel": partial(many.launch, stream)}
        return {
            f"{name}_microseconds": 1e3
            * milliseconds(device, [body], scale.repeats)
            / scale.captured
            for name, body in ways.items()
        }


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
    scale = pickle.loads(bytes.fromhex(words))  # noqa: S301 - of our own process
    for found in PROBES[name](scale):
        print(json.dumps(found), file=findings, flush=True)


if __name__ == "__main__":
    main()
