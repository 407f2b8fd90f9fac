"""Steps with limits: one that fails, hangs or has no tool does not stop the others.

A step is a command.  What it found are the lines of JSON that it printed, or where it
is a check, the numbers in its last line and its mistakes.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, NamedTuple

from benchmarks.machine import ROOT

TAIL = 25
MOST_MISTAKES = 30
# What is left of a step's limit for it to end in order when it is asked to.
GRACE = 0.1
LONGEST_GRACE = 10.0
# Less than this is not worth a start.
LEAST_SECONDS = 1.0
BEGUN = monotonic()
# The last line of pytest and of `benchmarks.gpu.exact`, and one of compute-sanitizer.
LAST = re.compile(r"^.*\d+ \w+ in \d.*$|^\d+ checked, \d+ wrong$", re.MULTILINE)
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?|checked|wrong)\b")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
MISTAKES = re.compile(r"^(?:FAILED|ERROR|wrong:) .*", re.MULTILINE)

Findings = dict[str, Any]
# How a step ended: its ``status`` (ok, failed, late, missing or skipped), ``seconds``,
# its ``limit`` and what it ``found``; where it did not end well, the ``reason`` and the
# ``tail`` of its output.  One that failed or was late may have found something before.
Outcome = dict[str, Any]


class Step(NamedTuple):
    """A command within so many seconds: its share of all that are left.

    A check has a number that it must give.
    """

    name: str
    share: float
    command: Sequence[str]
    number: str = ""


# Steps that may run at the same time: none of them measures times.
Stage = tuple[Step, ...]


def say(words: str) -> None:
    print(f"[{monotonic() - BEGUN:4.0f} s] {words}", file=sys.stderr)


def limits(stages: Sequence[Stage], seconds: float) -> list[float]:
    """The limit of each stage if all before it take theirs."""
    shares = [max(step.share for step in stage) for stage in stages]
    return [seconds * share / sum(shares) for share in shares]


def run_stages(stages: Sequence[Stage], seconds: float) -> Iterator[dict[str, Outcome]]:
    """Run the stages in order; what one leaves of its time, the later ones share.

    After each it gives the outcomes so far, so that nothing is lost.
    """
    end = monotonic() + seconds
    outcomes: dict[str, Outcome] = {}
    for place, stage in enumerate(stages):
        limit = limits(stages[place:], max(end - monotonic(), 0))[0]
        say(f"{', '.join(step.name for step in stage)}: {limit:.0f} s at most")
        with ThreadPoolExecutor(len(stage)) as pool:
            ended = pool.map(run_step, stage, [limit] * len(stage))
            outcomes |= {step.name: one for step, one in zip(stage, ended, strict=True)}
        yield outcomes


def run_step(step: Step, limit: float) -> Outcome:
    """Run the command of a step; interrupt, and at last kill, what is late."""
    begun, program = monotonic(), step.command[0]
    ended: Outcome = {"status": "ok", "found": {}}
    if shutil.which(program) is None:
        ended |= {"status": "missing", "reason": f"{program} is not on the path"}
    elif limit < LEAST_SECONDS:
        ended |= {"status": "skipped", "reason": f"{limit:.1f} s were left"}
    else:
        grace = min(GRACE * limit, LONGEST_GRACE)
        stop = ("timeout", "--signal=INT", f"--kill-after={grace}", f"{limit - grace}")
        done = subprocess.run(  # noqa: S603
            [*stop, *step.command],
            cwd=ROOT,
            env={**os.environ, "CUCONV_REQUIRE_GPU": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        reads = counts if step.number else merged
        ended["found"] = found = reads(done.stdout, done.stderr)
        # After a SIGINT, and after a SIGKILL, which ends `timeout` with the others.
        if done.returncode in (124, -signal.SIGKILL):
            ended |= {"status": "late", "reason": "it was stopped at its limit"}
        elif done.returncode:
            reason = f"it ended with status {done.returncode}"
            ended |= {"status": "failed", "reason": reason}
        elif step.number and step.number not in found:
            ended |= {"status": "failed", "reason": f"it gave no number {step.number}"}
        if "reason" in ended:
            ended["tail"] = [*last(done.stdout), *last(done.stderr)]
    took = monotonic() - begun
    say(f"{step.name}: {ended['status']} after {took:.1f} s {ended.get('reason', '')}")
    return {**ended, "seconds": took, "limit": limit}


def last(text: str) -> list[str]:
    return text.rstrip().splitlines()[-TAIL:]


def counts(output: str, errors: str) -> Findings:
    """The numbers in the last line of a check, and its lines about mistakes."""
    line = "".join(LAST.findall(output)[-1:])
    found: Findings = {name: int(number) for number, name in COUNTS.findall(line)}
    if summary := SUMMARY.search(output + errors):
        found["errors"] = int(summary[1])
    return {**found, "mistakes": MISTAKES.findall(output)[:MOST_MISTAKES]}


def merged(output: str, _errors: str = "") -> Findings:
    """One object from lines of JSON; one that was cut short counts for nothing."""
    whole = (line for line in output.splitlines(keepends=True) if line.endswith("\n"))
    return join(map(json.loads, whole))


def join(parts: Iterable[Findings]) -> Findings:
    """One object: lists and objects of a name are joined, others replaced."""
    found: Findings = {}
    for name, value in (item for part in parts for item in part.items()):
        if isinstance(value, list):
            found[name] = [*found.get(name, ()), *value]
        elif isinstance(value, dict):
            found[name] = {**found.get(name, {}), **value}
        else:
            found[name] = value
    return found
