"""Steps with limits: one that fails, hangs or has no tool does not stop the others."""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, NamedTuple

from benchmarks.machine import ROOT

TAIL = 25
# What is left of a step's limit for it to end in order when it is asked to.
GRACE = 0.1
LONGEST_GRACE = 10.0
# Less than this is not worth a start.
LEAST_SECONDS = 1.0
BEGUN = monotonic()

Findings = dict[str, Any]
# How a step ended: its ``status`` (ok, failed, late, missing or skipped), ``seconds``,
# its ``limit`` and what it ``found``; where it did not end well, the ``reason`` and the
# ``tail`` of its output.  One that failed or was late may have found something before.
Outcome = dict[str, Any]


class StepError(Exception):
    """A step that did not end well, with what it found and the end of its output."""

    def __init__(
        self, status: str, reason: str, tail: Sequence[str] = (), found: Any = None
    ) -> None:
        super().__init__(reason)
        self.outcome: Outcome = {"status": status, "reason": reason, "tail": [*tail]}
        self.outcome["found"] = found or {}


class Step(NamedTuple):
    """Something to do within so many seconds: its share of all that are left."""

    name: str
    share: float
    run: Callable[[float], Findings]


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
            ended = pool.map(outcome, stage, [limit] * len(stage))
            outcomes |= {step.name: one for step, one in zip(stage, ended, strict=True)}
        yield outcomes


def outcome(step: Step, limit: float) -> Outcome:
    """How a step ends, whatever happens in it."""
    begun = monotonic()
    try:
        if limit < LEAST_SECONDS:
            raise StepError("skipped", f"{limit:.1f} s were left")  # noqa: TRY301
        ended = {"status": "ok", "found": step.run(limit)}
    except StepError as error:
        ended = error.outcome
    except Exception as error:  # noqa: BLE001 - any failure is an outcome
        tail, reason = last(traceback.format_exc()), f"{type(error).__name__}: {error}"
        ended = StepError("failed", reason, tail).outcome
    took = monotonic() - begun
    say(f"{step.name}: {ended['status']} after {took:.1f} s {ended.get('reason', '')}")
    return {**ended, "seconds": took, "limit": limit}


def last(text: str) -> list[str]:
    return text.rstrip().splitlines()[-TAIL:]


class Ended(NamedTuple):
    """What a process printed, and its status; None if it took too long."""

    output: str
    errors: str
    status: int | None

    def checked(self, found: Findings) -> Findings:
        """Return what it found; `StepError` if it did not end well."""
        if self.status == 0:
            return found
        tail = [*last(self.output), *last(self.errors)]
        if self.status is None:
            raise StepError("late", "it was stopped at its limit", tail, found)
        raise StepError("failed", f"it ended with status {self.status}", tail, found)


def child(command: Sequence[str], limit: float, **environment: str) -> Ended:
    """Run a process with its children; interrupt, and at last kill, what is late."""
    grace = min(GRACE * limit, LONGEST_GRACE)
    stop = ("timeout", "--signal=INT", f"--kill-after={grace}", f"{limit - grace}")
    done = subprocess.run(  # noqa: S603
        [*stop, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    # After a SIGINT, and after a SIGKILL, which ends `timeout` with the others.
    is_late = done.returncode in (124, -signal.SIGKILL)
    return Ended(done.stdout, done.stderr, None if is_late else done.returncode)


def merged(lines: str) -> Findings:
    """One object from lines of JSON; one that was cut short counts for nothing."""
    whole = (line for line in lines.splitlines(keepends=True) if line.endswith("\n"))
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
