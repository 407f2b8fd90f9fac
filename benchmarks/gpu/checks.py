"""Is it right on this GPU: the tests, and a memory and a race checker."""

import importlib.util
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from benchmarks.gpu.findings import merged
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.steps import Ended, Findings, StepError, child, last, python

MOST_FAILURES = 30
MOST_WORKERS = 8
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def probe(name: str, scale: Scale, limit: float) -> Findings:
    """What a probe found; `StepError` carries what a failed one had found before."""
    words = json.dumps(scale.to_json())
    ended = child(python("-m", "benchmarks.gpu.probes", name, words), limit)
    found = merged(ended.output)
    if ended.status != 0:
        raise failure(ended, found, last(ended.errors))
    return found


def failure(ended: Ended, found: Findings, tail: list[str]) -> StepError:
    if ended.status is None:
        return StepError("late", "it was stopped at its limit", tail, found)
    return StepError("failed", f"it ended with status {ended.status}", tail, found)


def tests(scale: Scale, limit: float) -> Findings:
    """``pytest -m gpu`` with a GPU required; counts, and the ends of failures."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        ended = child(pytest_command(scale, report), limit, {"CUCONV_REQUIRE_GPU": "1"})
        found = counts(report.read_text("utf-8")) if report.exists() else {}
    if ended.status != 0:
        raise failure(ended, found, ended.tail)
    if not found.get("tests"):
        raise StepError("failed", "no test ran", ended.tail, found)
    return found


def pytest_command(scale: Scale, report: Path) -> list[str]:
    words = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    words += ["--continue-on-collection-errors", f"--junitxml={report}"]
    if importlib.util.find_spec("xdist"):
        workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2))
        words += ["-n", str(workers)]
    return python(*words, *scale.tests)


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


def sanitizer(tool: str, limit: float) -> Findings:
    """compute-sanitizer over every strategy on small integers."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise StepError("missing", "compute-sanitizer is not on the path")
    pool = ["--without-pool"] if tool == "memcheck" else []
    command = [program, "--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
    ended = child([*command, *python("-m", "benchmarks.gpu.exact", *pool)], limit)
    found = verdict(ended)
    if ended.status != 0:
        raise failure(ended, found, ended.tail)
    if found["errors"] is None:
        raise StepError("failed", f"{tool} gave no summary", ended.tail, found)
    return found


def exact(limit: float) -> Findings:
    """The same program without a checker."""
    ended = child(python("-m", "benchmarks.gpu.exact"), limit)
    found = verdict(ended)
    if ended.status != 0:
        raise failure(ended, found, ended.tail)
    return found


def verdict(ended: Ended) -> Findings:
    """Errors by the checker's summary, and how many results were compared."""
    text = ended.output + ended.errors
    summary = SUMMARY.search(text)
    checked = re.search(r"(\d+) checked, (\d+) wrong", text)
    wrong = [line for line in text.splitlines() if line.startswith("wrong: ")]
    return {
        "errors": int(summary[1]) if summary else None,
        "checked": int(checked[1]) if checked else 0,
        "wrong": int(checked[2]) if checked else None,
        "mistakes": wrong[:MOST_FAILURES],
    }
