"""Check, measure and compare everything on a GPU: ``python -m benchmarks.gpu``.

Whatever fails, hangs or is missing is recorded with the end of its output, and the rest
goes on.  JSON is kept after each step; the targets are printed last.
"""

import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import machine, records
from benchmarks.gpu import checks
from benchmarks.gpu.scale import FULL, QUICK, Scale
from benchmarks.gpu.steps import Stage, Step, limits, run_stages, say
from benchmarks.gpu.tables import tables
from benchmarks.records import Record

# Seconds for what is no step: tables and pictures.
FINISH = 15.0


class GpuRun:
    """One run: its steps, and what it keeps in its folder."""

    def __init__(self, scale: Scale, folder: Path, torch_python: str) -> None:
        self.scale, self.folder, self.torch_python = scale, folder, torch_python
        self.found = {**machine.provenance(), "machine": machine.host(), "steps": {}}
        self.suites: dict[str, Record] = {}

    def stages(self) -> list[Stage]:
        """What there is to do, the most important first."""

        def probe(name: str, share: float) -> Stage:
            return (Step(name, share, partial(checks.probe, name, self.scale)),)

        return [
            probe("machine", 20),
            (
                Step("exact", 60, checks.exact),
                Step("tests", 120, partial(checks.tests, self.scale)),
                Step("memcheck", 120, partial(checks.exact, tool="memcheck")),
                Step("racecheck", 120, partial(checks.exact, tool="racecheck")),
            ),
            (Step("comparisons", 250, self.compare),),
            *(probe("gather", 15), probe("col2im", 15)),
            *(probe("blocks", 20), probe("launch", 20)),
        ]

    def compare(self, limit: float) -> dict[str, Any]:
        what = (self.scale, self.found["machine"], self.keep_suite)
        return checks.compare(*what, self.torch_python, limit)

    def keep_suite(self, record: Record) -> None:
        self.suites[record["suite"]] = record
        records.write(record, records.stem_of(record), self.folder)
        say(f"  {record['suite']}: {len(record['cases'])} cases")

    def run(self, seconds: float) -> bool:
        """Run the steps, show what they found, and say whether none has failed."""
        # Without what earlier runs remember of tuned calls.
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CUCONV_CACHE_DIR"] = folder
            for outcomes in run_stages(self.stages(), seconds):
                self.found["steps"] = outcomes
                self.found["machine"] |= outcomes["machine"]["found"]
                records.write(self.found, records.GPU, self.folder)
        self.draw()
        for table in tables(self.found, self.suites.values()):
            table.show()
        ended = self.found["steps"].values()
        return all(one["status"] != "failed" for one in ended)

    def draw(self) -> None:
        """Pictures of what was measured, where Matplotlib is installed."""
        try:
            figures = importlib.import_module("benchmarks.figures")
            drawn = figures.draw_gpu(self.found, self.suites.values(), self.folder)
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
    run = GpuRun(QUICK if chosen.quick else FULL, chosen.out, chosen.torch_python)
    if chosen.plan:
        stages = run.stages()
        for stage, limit in zip(stages, limits(stages, seconds), strict=True):
            print(f"{limit:4.0f} s  {', '.join(step.name for step in stage)}")
        return
    sys.exit(not run.run(seconds))


if __name__ == "__main__":
    main()
