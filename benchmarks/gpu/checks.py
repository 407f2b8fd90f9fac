"""What is checked and measured on a GPU; each is a step of the run."""

import importlib.util
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

from benchmarks.cases import Case
from benchmarks.gpu.scale import HALF_AND_WHOLE, Scale
from benchmarks.gpu.steps import Findings, StepError, child, last, merged, python
from benchmarks.internals import strategies
from benchmarks.layers import Layer
from benchmarks.records import Record
from benchmarks.runner import Effort, measure_case, new_record, workers

MOST_FAILURES = 30
MOST_WORKERS = 8
# An answer that takes longer means that a kernel hangs.
PATIENCE = 60.0
WISHES = {"device": "cuda", "precision": "standard"}
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def probe(name: str, scale: Scale, limit: float) -> Findings:
    """What a probe found; `StepError` carries what a failed one had found before."""
    words = pickle.dumps(scale).hex()
    ended = child(python("-m", "benchmarks.gpu.probes", name, words), limit)
    return ended.checked(merged(ended.output))


def tests(scale: Scale, limit: float) -> Findings:
    """``pytest -m gpu`` with a GPU required; counts, and the ends of failures."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        words = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        words += ["--continue-on-collection-errors", f"--junitxml={report}"]
        if importlib.util.find_spec("xdist"):
            workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2))
            words += ["-n", str(workers)]
        command = python(*words, *scale.tests)
        ended = child(command, limit, {"CUCONV_REQUIRE_GPU": "1"})
        found = counts(report.read_text("utf-8")) if report.exists() else {}
    if not ended.checked(found).get("tests"):
        raise StepError("failed", "no test ran", last(ended.output), found)
    return found


def counts(junit: str) -> Findings:
    """Numbers of tests, and the ends of the texts of those that failed."""
    suites = [*ET.fromstring(junit).iter("testsuite")]  # noqa: S314 - pytest's own
    names = ("tests", "failures", "errors", "skipped")
    found: dict[str, Any] = {
        name: sum(int(suite.get(name, "0")) for suite in suites) for name in names
    }
    failed = [
        {
            "name": f"{case.get('classname')}::{case.get('name')}",
            "tail": last(trouble.text or str(trouble.get("message")))[-12:],
        }
        for suite in suites
        for case in suite.iter("testcase")
        for trouble in (*case.findall("failure"), *case.findall("error"))
    ]
    return {**found, "failed": failed[:MOST_FAILURES]}


def exact(limit: float, tool: str = "") -> Findings:
    """Every strategy on small integers; under a tool of compute-sanitizer's, if any."""
    command = python("-m", "benchmarks.gpu.exact")
    if tool:
        program = shutil.which("compute-sanitizer")
        if program is None:
            raise StepError("missing", "compute-sanitizer is not on the path")
        words = ["--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
        pool = ["--without-pool"] if tool == "memcheck" else []
        command = [program, *words, *command, *pool]
    ended = child(command, limit)
    text = ended.output + ended.errors
    summary = SUMMARY.search(text)
    counted = re.search(r"(\d+) checked, (\d+) wrong", text)
    wrong = [line for line in text.splitlines() if line.startswith("wrong: ")]
    found: Findings = {
        "errors": int(summary[1]) if summary else None,
        "checked": int(counted[1]) if counted else 0,
        "wrong": int(counted[2]) if counted else None,
        "mistakes": wrong[:MOST_FAILURES],
    }
    if ended.checked(found) and tool and summary is None:
        raise StepError("failed", f"{tool} gave no summary", last(ended.output), found)
    return found


# cuconv and PyTorch's cuDNN on the layers of networks, in every arithmetic.


class Job(NamedTuple):
    """Layers of a suite in one operation and one arithmetic."""

    suite: str
    operation: str
    arithmetic: str
    layers: tuple[Layer, ...]


def peers() -> tuple[str, ...]:
    """The library as it chooses, cuDNN, and each strategy of the library by name."""
    layouts = ("cuconv", "cudnn", "cudnn@channels_last", "cuconv@channels_last")
    named = (f"cuconv@{name}" for name in ("benchmark", *strategies()))
    return (*layouts, *named, "cupy_im2col")


def jobs(scale: Scale) -> list[Job]:
    """What matters most comes first: forward before gradients, ResNet-50 first."""
    suites = {
        "resnet50": (scale.arithmetics, scale.layers),
        "mobilenetv2": (HALF_AND_WHOLE, scale.depthwise),
    }
    return [
        Job(suite, operation, arithmetic, layers)
        for operations in (("forward",), ("input_grad", "weight_grad"))
        for suite, (arithmetics, layers) in suites.items()
        for arithmetic in arithmetics
        for operation in operations
    ]


def compare(
    scale: Scale,
    where: dict[str, Any],
    keep: Callable[[Record], None],
    torch_python: str,
    limit: float,
) -> Findings:
    """Measure every job until the limit; ``keep`` is told of a record after each."""
    end, left, effort = monotonic() + limit, 0, Effort(scale.rounds, scale.seconds)
    found: dict[str, Record] = {}
    with workers(peers(), WISHES, torch_python, PATIENCE) as asked:
        for suite, operation, arithmetic, layers in jobs(scale):
            if suite not in found:
                origin = {"wishes": WISHES, "machine": where}
                found[suite] = new_record(suite, scale.batch, effort, asked, **origin)
            for layer in layers:
                if monotonic() > end:
                    left += 1
                    continue
                case = Case(layer, operation, scale.batch, arithmetic)
                found[suite]["cases"].append(measure_case(case, asked, effort))
            keep(found[suite])
    cases = sum(len(record["cases"]) for record in found.values())
    summary = {"cases": cases, "unmeasured": left}
    if left:
        raise StepError("late", f"{left} cases are left", found=summary)
    return summary
