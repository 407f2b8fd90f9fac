"""The core's figures: ``python -m benchmarks.core`` measures, prints and keeps them.

Times of `conv2d` and its gradients on (8, 64, 56, 56) with 64 filters of 3×3, against
the whole-buffer im2col of the tutorials (a strided view, copied, and one GEMM), which
comes in two forms: positions by rows and one GEMM for the batch, or patches by rows and
one GEMM for each image.  Then the cost of an import, of a small call, and of the NVTX
ranges in it.  Every subject runs in a process of its own, in alternation, so that two
BLAS libraries never share one and a slow minute falls on all alike.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

RESULTS = Path(__file__).parent / "results" / "core.json"
README = Path(__file__).parent.parent / "README.md"
MARKS = ("<!-- figures: benchmarks/results/core.json -->", "<!-- end of figures -->")

N, C, H, K = 8, 64, 56, 64
OPERATIONS = ("forward", "input_grad", "weight_grad")
SUBJECTS = ("cuconv", "rows", "columns")
ROUNDS = 5
CALLS = 15


def operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = (N, C, H, H), (K, C, 3, 3), (N, K, H, H)
    return tuple(rng.standard_normal(shape, dtype=np.float32) for shape in shapes)


def windows(x: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return sliding_window_view(padded, (3, 3), (2, 3))


def folded(patches: np.ndarray) -> np.ndarray:
    """Sum (N, C, 3, 3, H, W) into the images they came from."""
    total = np.zeros((N, C, H + 2, H + 2), dtype=np.float32)
    for i, j in np.ndindex(3, 3):
        total[:, :, i : i + H, j : j + H] += patches[:, :, i, j]
    return total[:, :, 1:-1, 1:-1]


def by_rows(x: np.ndarray) -> np.ndarray:
    return windows(x).transpose(0, 2, 3, 1, 4, 5).reshape(N * H * H, C * 9)


def by_columns(x: np.ndarray) -> np.ndarray:
    return windows(x).transpose(0, 1, 4, 5, 2, 3).reshape(N, C * 9, H * H)


def row_calls() -> dict[str, Callable[[], np.ndarray]]:
    x, w, dy = operands()
    matrix = w.reshape(K, -1)

    def forward() -> np.ndarray:
        return (by_rows(x) @ matrix.T).reshape(N, H, H, K).transpose(0, 3, 1, 2)

    def input_grad() -> np.ndarray:
        columns = dy.transpose(0, 2, 3, 1).reshape(-1, K) @ matrix
        return folded(columns.reshape(N, H, H, C, 3, 3).transpose(0, 3, 4, 5, 1, 2))

    def weight_grad() -> np.ndarray:
        flat = dy.transpose(0, 2, 3, 1).reshape(-1, K)
        return (flat.T @ by_rows(x)).reshape(w.shape)

    return {f.__name__: f for f in (forward, input_grad, weight_grad)}


def column_calls() -> dict[str, Callable[[], np.ndarray]]:
    x, w, dy = operands()
    matrix = w.reshape(K, -1)
    flat = dy.reshape(N, K, -1)

    def forward() -> np.ndarray:
        return (matrix @ by_columns(x)).reshape(N, K, H, H)

    def input_grad() -> np.ndarray:
        return folded((matrix.T @ flat).reshape(N, C, 3, 3, H, H))

    def weight_grad() -> np.ndarray:
        return (flat @ by_columns(x).swapaxes(1, 2)).sum(0).reshape(w.shape)

    return {f.__name__: f for f in (forward, input_grad, weight_grad)}


def library_calls() -> dict[str, Callable[[], np.ndarray]]:
    import cuconv  # noqa: PLC0415 - peers must not load it

    x, w, dy = operands()
    return {
        "forward": lambda: cuconv.conv2d(x, w, padding=1),
        "input_grad": lambda: cuconv.conv_input_grad(dy, w, x.shape, padding=1),
        "weight_grad": lambda: cuconv.conv_weight_grad(dy, x, w.shape, padding=1),
    }


CALLS_OF = {"cuconv": library_calls, "rows": row_calls, "columns": column_calls}


def milliseconds(call: Callable[[], Any], count: int = CALLS) -> float:
    """Median time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(count):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return statistics.median(times) * 1e3


def extra_bytes(call: Callable[[], np.ndarray]) -> int:
    """Peak memory beyond inputs and result."""
    call()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    result = call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak - before - result.nbytes


def measure_subject(name: str) -> dict[str, Any]:
    """What one process reports: a time, memory and a checksum for each operation."""
    report = {}
    for operation, call in CALLS_OF[name]().items():
        report[operation] = {
            "milliseconds": milliseconds(call),
            "extra_bytes": extra_bytes(call),
            "norm": float(np.linalg.norm(call().astype(np.float64))),
        }
    return report


def measure_call() -> dict[str, float]:
    """A small call, with and without NVTX ranges, in microseconds."""
    import cuconv  # noqa: PLC0415
    from cuconv import profiling  # noqa: PLC0415

    x = np.zeros((1, 3, 8, 8), dtype=np.float32)
    w = np.zeros((8, 3, 3, 3), dtype=np.float32)
    listening = profiling._domain  # noqa: SLF001

    def thousand() -> None:
        for _ in range(1000):
            cuconv.conv2d(x, w)

    with_ranges, without = [], []
    for _ in range(7):
        with_ranges.append(milliseconds(thousand, 3))
        profiling._domain = None  # noqa: SLF001
        without.append(milliseconds(thousand, 3))
        profiling._domain = listening  # noqa: SLF001
    return {
        "call_microseconds": statistics.median(with_ranges),
        "without_ranges_microseconds": statistics.median(without),
    }


def measure_import() -> dict[str, float]:
    """Time of ``import cuconv`` beyond ``import numpy``, in milliseconds."""
    program = (
        "import numpy\nfrom time import perf_counter\nstart = perf_counter()\n"
        "import cuconv\nprint((perf_counter() - start) * 1e3)"
    )
    times = [float(run_python("-c", program)) for _ in range(15)]
    return {"import_milliseconds": statistics.median(times)}


def run_python(*arguments: str) -> str:
    return subprocess.run(  # noqa: S603
        [sys.executable, *arguments], check=True, capture_output=True, text=True
    ).stdout


def measure_all() -> dict[str, Any]:
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in SUBJECTS}
    for _ in range(ROUNDS):
        for name in SUBJECTS:
            report = run_python("-m", "benchmarks.core", "--subject", name)
            rounds[name].append(json.loads(report))
    check_norms(rounds)
    small = json.loads(run_python("-m", "benchmarks.core", "--subject", "call"))
    return {
        "what": f"conv2d on ({N}, {C}, {H}, {H}), {K} filters 3x3, padding 1, float32",
        "subjects": {name: medians(reports) for name, reports in rounds.items()},
        "small_call_1x3x8x8": small,
        **measure_import(),
        **machine(),
    }


def check_norms(rounds: dict[str, list[dict[str, Any]]]) -> None:
    """Subjects that disagree are not worth timing."""
    for operation in OPERATIONS:
        norms = [r[operation]["norm"] for reports in rounds.values() for r in reports]
        if not max(norms) - min(norms) <= 1e-5 * max(norms):
            raise RuntimeError(f"results of {operation} differ: {norms}")


def medians(reports: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        operation: {
            key: statistics.median(report[operation][key] for report in reports)
            for key in ("milliseconds", "extra_bytes")
        }
        for operation in OPERATIONS
    }


def machine() -> dict[str, Any]:
    import cuconv  # noqa: PLC0415

    words = ("git", "describe", "--always", "--dirty", "--abbrev=12")
    commit = subprocess.run(words, check=False, capture_output=True, text=True)  # noqa: S603
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": {
            "cuconv": cuconv.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "blas": f"{blas['name']} {blas['version']}",
        },
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def table(found: dict[str, Any]) -> str:
    """The README's table, from a result file."""
    ours, rows, columns = (found["subjects"][name] for name in SUBJECTS)
    versions, machine = found["versions"], found["machine"]
    lines = [
        f"`{found['what']}`; {machine['cpu']}, {machine['cores']} cores,",
        f"NumPy {versions['numpy']} with {versions['blas']}; medians, {found['date']}.",
        "The whole-buffer im2col of the tutorials comes in two forms: a row for each",
        "position, or a row for each cell of a patch.",
        "",
        "| | cuconv | positions by rows | ratio | patches by rows | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for operation in OPERATIONS:
        mine = ours[operation]["milliseconds"]
        cells = [f"{mine:.1f} ms"]
        for peer in (rows, columns):
            theirs = peer[operation]["milliseconds"]
            cells += [f"{theirs:.1f} ms", f"{theirs / mine:.2f}"]
        lines.append(f"| {operation} | {' | '.join(cells)} |")
    memory = [
        f"{max(s[o]['extra_bytes'] for o in OPERATIONS) / 2**20:.1f} MiB"
        for s in (ours, rows, columns)
    ]
    lines.append(f"| most extra memory | {memory[0]} | {memory[1]} | | {memory[2]} | |")
    small = found["small_call_1x3x8x8"]
    whole = small["call_microseconds"]
    ranges = whole - small["without_ranges_microseconds"]
    lines += [
        "",
        f"`import cuconv` takes {found['import_milliseconds']:.0f} ms beyond NumPy's.",
        f"A call on (1, 3, 8, 8) with 8 filters of 3×3 takes {whole:.0f} µs,",
        f"{ranges:.1f} µs of them NVTX ranges that nobody listens to.",
        "Nothing here has been measured on a GPU yet.",
    ]
    return "\n".join(lines)


def write_readme(found: dict[str, Any]) -> None:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    figures = f"{MARKS[0]}\n\n{table(found)}\n\n{MARKS[1]}"
    README.write_text(before + figures + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", choices=(*SUBJECTS, "call"), help="measure one")
    parser.add_argument(
        "--keep", action="store_true", help="write the result file and the README"
    )
    chosen = parser.parse_args()
    if chosen.subject == "call":
        print(json.dumps(measure_call()))
    elif chosen.subject:
        print(json.dumps(measure_subject(chosen.subject)))
    else:
        found = measure_all()
        print(table(found))
        if chosen.keep:
            RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            write_readme(found)


if __name__ == "__main__":
    main()
