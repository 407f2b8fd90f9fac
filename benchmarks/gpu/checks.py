"""What a process of its own checks or measures on a GPU; each is a step of the run."""

import importlib.util
import os
import pickle
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from benchmarks.gpu.scale import Scale
from benchmarks.gpu.steps import Findings, StepError, child, last, merged, python

MOST_FAILURES = 30
MOST_WORKERS = 8
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
    found = ended.checked(verdict(ended.output + ended.errors))
    if tool and found["errors"] is None:
        raise StepError("failed", f"{tool} gave no summary", last(ended.output), found)
    return found


def verdict(text: str) -> Findings:
    """Errors by the checker's summary, and how many results were compared."""
    summary = SUMMARY.search(text)
    checked = re.search(r"(\d+) checked, (\d+) wrong", text)
    wrong = [line for line in text.splitlines() if line.startswith("wrong: ")]
    return {
        "errors": int(summary[1]) if summary else None,
        "checked": int(checked[1]) if checked else 0,
        "wrong": int(checked[2]) if checked else None,
        "mistakes": wrong[:MOST_FAILURES],
    }
