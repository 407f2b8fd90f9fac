"""Which machine and commit this is, and how fast the CPU multiplies and copies."""

import os
import platform
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from timeit import repeat
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent


def host() -> dict[str, Any]:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = (s.partition(":")[2].strip() for s in lines if s.startswith("model name"))
    cpu = next(names, platform.processor() or platform.machine())
    nbytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cpu": cpu, "cores": cores(), "memory_gib": round(nbytes / 2**30, 1)}


def cores() -> int:
    """Those that this process may use."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def rates(*, quick: bool) -> dict[str, float]:
    """GFLOP/s of a large float32 product, and GB/s read and written by copies.

    On all cores, the best of several.
    """
    size, nbytes, repeats = (256, 2**20, 2) if quick else (2048, 256 * 2**20, 12)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    source = np.ones(nbytes // 4, np.float32)
    parts = [np.array_split(each, cores()) for each in (np.empty_like(source), source)]
    with ThreadPoolExecutor(cores()) as pool:
        calls = (lambda: a @ b), (lambda: list(pool.map(np.copyto, *parts)))
        # The first of each warms up.
        multiply, copy = (
            min(repeat(f, repeat=repeats + 1, number=1)[1:]) for f in calls
        )
    return {
        "gemm_gflops": 2e-9 * size**3 / multiply,
        "copy_gbytes": 2e-9 * nbytes / copy,
    }


def versions() -> dict[str, str]:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}",
    }


def apart(function: Callable[..., Any], **arguments: Any) -> Any:
    """Return what a function does in a new process, where nothing else has run."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, **arguments).result()


def provenance() -> dict[str, Any]:
    """The commit, whether what was measured differs from it, and the day."""
    measured = ("cuconv", "kernels", "benchmarks", ":!benchmarks/results")
    return {
        "commit": git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--", *measured)),
        "date": datetime.now(UTC).date().isoformat(),
    }


def git(*words: str) -> str:
    command = ("git", "-C", str(ROOT), *words)
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    return done.stdout.strip()
