"""Which machine this is, and how fast it multiplies and copies.

``python -m benchmarks.machine`` prints the two rates of a CPU, so that they come from a
process of their own; those of a GPU come from `benchmarks.gpu.probes`.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.findings import merged
from benchmarks.gpu.scale import FULL, QUICK
from benchmarks.peers.base import HostDevice

ROOT = Path(__file__).parent.parent
MATRIX = 2048
COPIED_BYTES = 256 * 2**20
REPEATS = 12


def cores() -> int:
    """Those that this process may use."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cpu() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return round(pages / 2**30, 1)


def best_seconds(call: Callable[[], Any], repeats: int) -> float:
    call()
    return min((HostDevice().seconds(call) for _ in range(repeats)), default=inf)


def product_rate(size: int, repeats: int) -> float:
    """GFLOP/s of a large float32 matrix product, the best of several."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    return 2e-9 * size**3 / best_seconds(lambda: a @ b, repeats)


def copy_rate(nbytes: int, repeats: int) -> float:
    """GB/s read and written by copies on all cores."""
    source = np.ones(nbytes // 4, np.float32)
    target = np.empty_like(source)
    parts = [np.array_split(array, cores()) for array in (target, source)]
    with ThreadPoolExecutor(cores()) as pool:

        def copy() -> None:
            list(pool.map(np.copyto, *parts))

        return 2e-9 * nbytes / best_seconds(copy, repeats)


def rates(*, quick: bool) -> dict[str, float]:
    size, nbytes, repeats = MATRIX, COPIED_BYTES, REPEATS
    if quick:
        size, nbytes, repeats = 256, 2**20, 2
    return {
        "gemm_gflops": product_rate(size, repeats),
        "copy_gbytes": copy_rate(nbytes, repeats),
    }


def describe(device: str, *, quick: bool = False) -> dict[str, Any]:
    """The machine of a record; it measures for some seconds."""
    if device == "cuda":
        scale = json.dumps((QUICK if quick else FULL).to_json())
        measured = run_python("-m", "benchmarks.gpu.probes", "machine", scale)
    else:
        measured = run_python("-m", "benchmarks.machine", *["quick"] * quick)
    return {**host(), **merged(measured)}


def host() -> dict[str, Any]:
    return {"cpu": cpu(), "cores": cores(), "memory_gib": memory_gib()}


def provenance() -> dict[str, Any]:
    """The commit, whether what was measured differs from it, and the day."""
    measured = ("cuconv", "kernels", "benchmarks", ":!benchmarks/results")
    status = git("status", "--porcelain", "--", *measured)
    return {
        "commit": git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": bool(status),
        "date": datetime.now(UTC).date().isoformat(),
    }


def git(*words: str) -> str:
    command = ("git", "-C", str(ROOT), *words)
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    return done.stdout.strip()


def run_python(*arguments: str, **variables: str) -> str:
    """What a program prints in a process of its own, with these variables set."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


if __name__ == "__main__":
    print(json.dumps(rates(quick="quick" in sys.argv)))
