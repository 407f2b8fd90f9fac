"""Check, measure and compare everything on a GPU: ``python -m benchmarks.gpu``.

Whatever fails, hangs or is missing is recorded with the end of its output, and the rest
goes on.  JSON is kept after each step; the targets are printed last.
"""

import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, records
from benchmarks.gpu.probes import command
from benchmarks.gpu.scale import FULL, QUICK, Scale
from benchmarks.gpu.steps import Stage, Step, limits, run_stages, say
from benchmarks.gpu.tables import findings_of, tables

# Seconds for what is no step: tables and pictures.
FINISH = 15.0
MOST_WORKERS = 8
EXACT = [sys.executable, "-m", "benchmarks.gpu.exact"]
SANITIZER = ("compute-sanitizer", "--error-exitcode", "86", "--print-limit", "20")


def stages(scale: Scale, *more: str) -> list[Stage]:
    """What there is to do, the most important first; more are words of `compare`."""
    tests = ["-m", "pytest", "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider"]
    tests.append("--continue-on-collection-errors")
    if importlib.util.find_spec("xdist"):
        count = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2))
        tests += ["-n", str(count)]
    memcheck = [*SANITIZER, "--tool", "memcheck", *EXACT, "--without-pool"]
    racecheck = [*SANITIZER, "--tool", "racecheck", *EXACT]
    shares = {"gather": 15, "col2im": 15, "blocks": 20, "launch": 20}
    return [
        (Step("machine", 20, command("machine", scale)),),
        (
            Step("exact", 60, EXACT, "checked"),
            Step("tests", 120, [sys.executable, *tests, *scale.tests], "passed"),
            Step("memcheck", 120, memcheck, "errors"),
            Step("racecheck", 120, racecheck, "errors"),
        ),
        (Step("comparisons", 250, command("compare", scale, *more)),),
        *((Step(name, n, command(name, scale)),) for name, n in shares.items()),
    ]


def run(todo: Sequence[Stage], folder: Path, seconds: float) -> bool:
    """Run the steps, show what they found, and say whether none has failed."""
    found = {**machine.provenance(), "machine": machine.host()}
    # Without what earlier runs remember of tuned calls.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["CUCONV_CACHE_DIR"] = cache
        for outcomes in run_stages(todo, seconds):
            found["steps"] = outcomes
            found["machine"] |= outcomes["machine"]["found"]
            records.write(found, records.GPU, folder)
    names = dict.fromkeys(findings_of(found).get("suites", []))
    suites = [
        record for name in names if (record := records.read(f"{name}-cuda", folder))
    ]
    draw(found, suites, folder)
    for table in tables(found, suites):
        table.show()
    return all(one["status"] != "failed" for one in found["steps"].values())


def draw(found: Any, suites: Sequence[records.Record], folder: Path) -> None:
    """Pictures of what was measured, where Matplotlib is installed."""
    try:
        figures = importlib.import_module("benchmarks.figures")
        drawn = figures.draw_gpu(found, suites, folder)
        say(f"drawn: {', '.join(path.name for path in drawn)}")
    except Exception as error:  # noqa: BLE001 - the numbers are kept already
        say(f"no pictures: {type(error).__name__}: {error}")
        say("`python -m benchmarks.figures` draws them from the JSON later")


def main(arguments: Sequence[str] | None = None) -> None:
    words = records.parser("benchmarks.gpu", __doc__, Path("gpu-run"))
    add = words.add_argument
    add("--minutes", type=float, default=8.0, help="for all of it")
    add("--quick", action="store_true", help="a smoke test")
    add("--plan", action="store_true", help="show the steps; run none")
    add("--torch-python", **records.TORCH_PYTHON)
    chosen = words.parse_args(arguments)
    if chosen.out == records.RESULTS and chosen.quick:
        words.error("--save keeps whole runs: no --quick")
    seconds = 60 * chosen.minutes - FINISH
    if seconds <= 0:
        words.error(f"--minutes must be more than {FINISH / 60}")
    folder, scale = chosen.out.absolute(), QUICK if chosen.quick else FULL
    todo = stages(scale, str(folder), chosen.torch_python)
    if chosen.plan:
        for stage, limit in zip(todo, limits(todo, seconds), strict=True):
            print(f"{limit:4.0f} s  {', '.join(step.name for step in stage)}")
        return
    sys.exit(not run(todo, folder, seconds))


if __name__ == "__main__":
    main()
