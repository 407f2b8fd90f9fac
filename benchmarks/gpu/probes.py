"""What a process of its own measures on a GPU: ``python -m benchmarks.gpu.probes``.

It takes the name of a probe, or ``compare``, and a pickled `Scale`, and prints a line
of JSON for each finding, so that what was found before a failure is not lost.
"""

import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle, product
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import cuconv
from benchmarks.cases import Case
from benchmarks.gpu.compare import compare
from benchmarks.gpu.scale import ARITHMETICS, HALF_AND_WHOLE, Scale
from benchmarks.internals import block_bytes, gemm, strategies
from benchmarks.layers import Layer, Sizes, layer
from benchmarks.machine import versions
from benchmarks.peers.base import CupyDevice, cupy_device

Finding = dict[str, Any]

# Blocks as large as anyone asks for must fit, workspace included.
AMPLE = "2 GiB"
SMALL = (layer(3, 8, 8, 3), layer(8, 8, 8, 3, groups=8))


def milliseconds(
    device: CupyDevice, calls: Sequence[Callable[[], Any]], repeats: int
) -> float:
    """The median of calls that take turns, after each has run once."""
    for call in calls:
        call()
    times = [device.seconds(call) for call, _ in zip(cycle(calls), range(repeats + 1))]
    return 1e3 * statistics.median(times[1:])


# The machine.


def machine(scale: Scale) -> Iterator[Finding]:
    """Which GPU this is, how fast it copies and how fast cuBLAS multiplies."""
    device = cupy_device()
    xp, runtime = device.xp, device.xp.cuda.runtime
    properties = runtime.getDeviceProperties(0)
    ours = {"cupy": xp.__version__, "cuconv": cuconv.__version__}
    yield {
        "gpu": properties["name"].decode(),
        "versions": versions() | ours,
        "capability": str(xp.cuda.Device().compute_capability),
        "multiprocessors": int(properties["multiProcessorCount"]),
        "l2_bytes": device.l2_bytes,
        "memory_bytes": int(properties["totalGlobalMem"]),
        "cuda_driver": int(runtime.driverGetVersion()),
        "cuda_runtime": int(runtime.runtimeGetVersion()),
        **clocks(),
    }
    source = device.normal(scale.copied_bytes // 4)
    copy = partial(xp.copyto, xp.empty_like(source), source)
    time = milliseconds(device, [copy], scale.repeats)
    yield {"copy_gbytes": 2e-6 * int(source.nbytes) / time}
    n = scale.matrix
    for arithmetic in ARITHMETICS:
        fast = arithmetic == "tf32"
        dtype = "float32" if fast else arithmetic
        a, b = (
            device.cast(device.normal(n * n, seed), dtype).reshape(1, 1, n, n)
            for seed in (0, 1)
        )
        multiply = partial(gemm(), a, b, xp.empty_like(a), fast=fast)
        rate = 2e-6 * n**3 / milliseconds(device, [multiply], scale.repeats)
        yield {"rates": {arithmetic: rate}}
        if arithmetic == "float32":
            yield {"gemm_gflops": rate}


def clocks() -> Finding:
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


# Candidates, whose defaults await a measurement.


def columns_of(each: Layer, batch: int, order: str) -> tuple[Sizes, Finding]:
    """The shape of the columns of a layer without groups, and the options for them."""
    positions = prod(each.out)
    shape = {
        "rows": (batch * positions, each.patch),
        "columns": (each.patch, batch * positions),
        "batched": (batch, each.patch, positions),
    }[order]
    options = {name: each.options[name] for name in ("stride", "padding", "dilation")}
    return shape, {"order": order, **options}


def gather(scale: Scale) -> Iterator[Finding]:
    """im2col: every element of the columns written, every one of x read once."""
    device, orders = cupy_device(), ("columns", "batched", "rows")
    for each, dtype, order in product(scale.columns, HALF_AND_WHOLE, orders):
        x = device.operand(Case(each, "forward", scale.batch, dtype), "x")
        shape, options = columns_of(each, scale.batch, order)
        out = device.xp.empty(shape, dtype=dtype)
        call = partial(cuconv.im2col, x, each.kernel, out=out, **options)
        yield {
            "layer": each.name,
            "type": dtype,
            "order": order,
            "nbytes": int(x.nbytes + out.nbytes),
            "milliseconds": milliseconds(device, [call], scale.repeats),
        }


def col2im(scale: Scale) -> Iterator[Finding]:
    """The scatter by atomic additions against the gather that sums in order."""
    device = cupy_device()
    for each, dtype in product(scale.columns, HALF_AND_WHOLE):
        shape, options = columns_of(each, scale.batch, "batched")
        columns = device.cast(device.normal(prod(shape)), dtype).reshape(shape)
        out = device.xp.empty(each.shapes(scale.batch)["x"], dtype=dtype)
        call = partial(cuconv.col2im, columns, out.shape, each.kernel, out=out)
        ways = {"gather": True, "scatter": False}
        yield {
            "layer": each.name,
            "type": dtype,
            "nbytes": int(columns.nbytes + out.nbytes),
            **{
                f"{way}_milliseconds": milliseconds(
                    device,
                    [partial(call, deterministic=in_order, **options)],
                    scale.repeats,
                )
                for way, in_order in ways.items()
            },
        }


def blocks(scale: Scale) -> Iterator[Finding]:
    """The strategy im2col with columns cut in blocks of other sizes."""
    device = cupy_device()
    for each, dtype in product(scale.columns, HALF_AND_WHOLE):
        case = Case(each, "forward", scale.batch, dtype)
        options = {**each.options, "strategy": "im2col", "memory_limit": AMPLE}
        shapes = case.shapes["x"], case.shapes["w"]
        sets, _ = device.prepare(case)
        calls = [partial(cuconv.conv, *operands, **options) for operands in sets]
        for mib in scale.block_mib:
            with block_bytes(mib * 2**20):
                plan = cuconv.plan_conv(*shapes, dtype=dtype, device="cuda", **options)
                time = milliseconds(device, calls, scale.repeats)
            row = {"layer": each.name, "type": dtype, "mib": mib}
            yield {**row, "chunks": plan.chunks, "milliseconds": time}


# Launches.


def launch(scale: Scale) -> Iterator[Finding]:
    """Small calls: as users make them, in a captured graph, and their kernels alone."""
    device = cupy_device()
    for each, strategy in product(SMALL, ("auto", *strategies())):
        case, found = Case(each, "forward", 1), {"layer": each.name}
        operands = [device.operand(case, name) for name in case.operand_names]
        out = device.xp.empty(case.result_shape, dtype=case.dtype)
        options = {**each.options, "strategy": strategy, "out": out}
        found["strategy"] = strategy
        call = partial(cuconv.conv, *operands, **options)
        try:
            call()
        except ValueError as error:
            yield {**found, "refused": str(error)}
            continue
        more: Finding = {"eager_microseconds": eager(device, call, scale.calls)}
        try:
            more |= captured(device, call, scale)
        except Exception as error:  # noqa: BLE001 - what cannot be captured says so
            more["not_captured"] = f"{type(error).__name__}: {error}"
        yield {**found, **more}


def eager(device: CupyDevice, call: Callable[[], Any], calls: int) -> float:
    """Microseconds from one call to the next, by the host's clock."""
    device.synchronize()
    start = perf_counter()
    for _ in range(calls):
        call()
    device.synchronize()
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

        bodies = {"captured": replays, "kernel": lambda: many.launch(stream)}
        share = 1e3 / scale.captured
        return {
            f"{name}_microseconds": share * milliseconds(device, [body], scale.repeats)
            for name, body in bodies.items()
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


PROBES = {each.__name__: each for each in (machine, gather, col2im, blocks, launch)}


def command(name: str, scale: Scale, *more: str) -> list[str]:
    """The command that prints what a probe finds."""
    words = (name, pickle.dumps(scale).hex(), *more)
    return [sys.executable, "-m", "benchmarks.gpu.probes", *words]


def main() -> None:
    name, words, *more = sys.argv[1:]
    findings = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no finding
    scale = pickle.loads(bytes.fromhex(words))  # noqa: S301 - of our own process
    if name == "compare":
        folder, torch_python = more
        found = compare(scale, Path(folder), torch_python)
    else:
        found = PROBES[name](scale)
    for each in found:
        line = each if name in ("machine", "compare") else {name: [each]}
        print(json.dumps(line), file=findings, flush=True)


if __name__ == "__main__":
    main()
