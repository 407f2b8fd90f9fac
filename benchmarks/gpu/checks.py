"""What is checked and measured on a GPU; each is a step of the run."""

import importlib.util
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from itertools import product
from time import monotonic
from typing import Any

from benchmarks.cases import Case
from benchmarks.gpu.scale import HALF_AND_WHOLE, Scale
from benchmarks.gpu.steps import Findings, StepError, child, last, merged
from benchmarks.internals import strategies
from benchmarks.records import Record
from benchmarks.runner import Effort, measure_case, new_record, workers

MOST_MISTAKES = 30
MOST_WORKERS = 8
# An answer that takes longer means that a kernel hangs.
PATIENCE = 60.0
WISHES = {"device": "cuda", "precision": "standard"}
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?|checked|wrong)\b")
# The last line of pytest, and of `benchmarks.gpu.exact`.
LAST = re.compile(r"^.*\d+ \w+ in \d.*$|^\d+ checked, \d+ wrong$", re.MULTILINE)
MISTAKES = re.compile(r"^(?:FAILED|ERROR|wrong:) .*", re.MULTILINE)


def probe(name: str, scale: Scale, limit: float) -> Findings:
    """What a probe found; `StepError` carries what a failed one had found before."""
    words = ["-m", "benchmarks.gpu.probes", name, pickle.dumps(scale).hex()]
    ended = child([sys.executable, *words], limit)
    return ended.checked(merged(ended.output))


def tests(scale: Scale, limit: float) -> Findings:
    """``pytest -m gpu`` with a GPU required: counts, and the tests that failed."""
    words = ["-m", "pytest", "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider"]
    words.append("--continue-on-collection-errors")
    if importlib.util.find_spec("xdist"):
        workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2))
        words += ["-n", str(workers)]
    command = [sys.executable, *words, *scale.tests]
    ended = child(command, limit, CUCONV_REQUIRE_GPU="1")
    found = counts(ended.output)
    if not ended.checked(found).get("passed"):
        raise StepError("failed", "no test ran", last(ended.output), found)
    return found


def counts(text: str) -> Findings:
    """The numbers in the last line of a check, and its lines about mistakes."""
    line = "".join(LAST.findall(text)[-1:])
    found: Findings = {name: int(number) for number, name in COUNTS.findall(line)}
    return {**found, "mistakes": MISTAKES.findall(text)[:MOST_MISTAKES]}


def exact(limit: float, tool: str = "") -> Findings:
    """Every strategy on small integers; under a tool of compute-sanitizer's, if any."""
    command = [sys.executable, "-m", "benchmarks.gpu.exact"]
    if tool:
        program = shutil.which("compute-sanitizer")
        if program is None:
            raise StepError("missing", "compute-sanitizer is not on the path")
        words = ["--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
        pool = ["--without-pool"] if tool == "memcheck" else []
        command = [program, *words, *command, *pool]
    ended = child(command, limit)
    summary = SUMMARY.search(ended.output + ended.errors)
    found = {**counts(ended.output), "errors": int(summary[1]) if summary else None}
    if ended.checked(found) and tool and summary is None:
        raise StepError("failed", f"{tool} gave no summary", last(ended.output), found)
    return found


# cuconv and PyTorch's cuDNN on the layers of networks, in every arithmetic.


def peers() -> tuple[str, ...]:
    """The library as it chooses, cuDNN, and each strategy of the library by name."""
    layouts = ("cuconv", "cudnn", "cudnn@channels_last", "cuconv@channels_last")
    named = (f"cuconv@{name}" for name in ("benchmark", *strategies()))
    return (*layouts, *named, "cupy_im2col")


def jobs(scale: Scale) -> list[tuple[str, list[Case]]]:
    """Suites, each with the cases of one operation and one arithmetic.

    What matters most comes first: forward before gradients, ResNet-50 first.
    """
    suites = {
        "resnet50": (scale.arithmetics, scale.layers),
        "mobilenetv2": (HALF_AND_WHOLE, scale.depthwise),
    }
    return [
        (suite, [Case(each, operation, scale.batch, arithmetic) for each in layers])
        for operations in (("forward",), ("input_grad", "weight_grad"))
        for suite, (arithmetics, layers) in suites.items()
        for arithmetic, operation in product(arithmetics, operations)
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
    origin = {"wishes": WISHES, "machine": where}
    with workers(peers(), WISHES, torch_python, PATIENCE) as asked:
        for suite, cases in jobs(scale):
            if suite not in found:
                found[suite] = new_record(suite, scale.batch, effort, asked, **origin)
            for case in cases:
                if monotonic() > end:
                    left += 1
                else:
                    found[suite]["cases"].append(measure_case(case, asked, effort))
            keep(found[suite])
    cases_of = (len(record["cases"]) for record in found.values())
    summary = {"cases": sum(cases_of), "unmeasured": left}
    if left:
        raise StepError("late", f"{left} cases are left", found=summary)
    return summary
