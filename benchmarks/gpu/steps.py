"""Steps with limits: one that fails, hangs or has no tool does not stop the others."""

import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, NotRequired, TypedDict

ROOT = Path(__file__).parent.parent.parent
TAIL = 25
# What is left of a step's limit for it to end in order when it is asked to.
GRACE = 0.1
LONGEST_GRACE = 10.0
# Less than this is not worth a start.
LEAST_SECONDS = 1.0

Findings = dict[str, Any]


class Outcome(TypedDict):
    """How a step ended: ok, failed, late, missing or skipped; and what it found.

    One that failed or was late may have found something before.
    """

    status: str
    seconds: float
    limit: float
    reason: NotRequired[str]
    tail: NotRequired[list[str]]
    found: Findings


class StepError(Exception):
    """A step that did not end well, with what it found and the end of its output."""

    def __init__(
        self,
        status: str,
        reason: str,
        tail: Sequence[str] = (),
        found: Findings | None = None,
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.tail = [*tail]
        self.found = found or {}


@dataclass(frozen=True)
class Step:
    """Something to do within so many seconds: its share of all that are left."""

    name: str
    share: float
    run: Callable[[float], Findings]


# Steps that may run at the same time: none of them measures times.
Stage = tuple[Step, ...]


def limits(stages: Sequence[Stage], seconds: float) -> list[float]:
    """The limit of each stage if all before it take theirs."""
    shares = [share_of(stage) for stage in stages]
    return [seconds * share / sum(shares) for share in shares]


def share_of(stage: Stage) -> float:
    return max(step.share for step in stage)


def carry_out(
    stages: Sequence[Stage],
    seconds: float,
    keep: Callable[[dict[str, Outcome]], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Outcome]:
    """Run the stages in order; what one leaves of its time, the later ones share.

    ``keep`` is told of all outcomes after each stage, so that nothing is lost.
    """
    end = monotonic() + seconds
    outcomes: dict[str, Outcome] = {}
    for place, stage in enumerate(stages):
        limit = limits(stages[place:], max(end - monotonic(), 0))[0]
        say(f"{', '.join(step.name for step in stage)}: {limit:.0f} s at most")
        with ThreadPoolExecutor(len(stage)) as pool:
            ended = pool.map(lambda step: outcome(step, limit), stage)  # noqa: B023
            outcomes |= {step.name: one for step, one in zip(stage, ended, strict=True)}
        for step in stage:
            say(f"{step.name}: {words(outcomes[step.name])}")
        keep(outcomes)
    return outcomes


def words(one: Outcome) -> str:
    reason = f": {one['reason']}" if "reason" in one else ""
    return f"{one['status']} after {one['seconds']:.1f} s{reason}"


def outcome(step: Step, limit: float) -> Outcome:
    """How a step ends, whatever happens in it."""
    begun = monotonic()
    if limit < LEAST_SECONDS:
        reason = f"{limit:.1f} s were left"
        return Outcome(
            status="skipped", seconds=0.0, limit=limit, reason=reason, found={}
        )
    try:
        found = step.run(limit)
    except StepError as error:
        return Outcome(
            status=error.status,
            seconds=monotonic() - begun,
            limit=limit,
            reason=str(error),
            tail=error.tail,
            found=error.found,
        )
    except Exception as error:  # noqa: BLE001 - any failure is an outcome
        return Outcome(
            status="failed",
            seconds=monotonic() - begun,
            limit=limit,
            reason=f"{type(error).__name__}: {error}",
            tail=last(traceback.format_exc()),
            found={},
        )
    return Outcome(status="ok", seconds=monotonic() - begun, limit=limit, found=found)


def last(text: str) -> list[str]:
    return text.rstrip().splitlines()[-TAIL:]


class Ended(NamedTuple):
    """What a process printed, and its status; None if it took too long."""

    output: str
    errors: str
    status: int | None

    @property
    def tail(self) -> list[str]:
        return [*last(self.output), *last(self.errors)][-2 * TAIL :]


def child(
    command: Sequence[str], limit: float, environment: dict[str, str] | None = None
) -> Ended:
    """Run a process with its children; interrupt, and at last kill, what is late."""
    grace = min(GRACE * limit, LONGEST_GRACE)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(  # noqa: S603
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        is_late = not waited(process, limit - grace)
        if is_late:
            os.killpg(process.pid, signal.SIGINT)
            if not waited(process, grace):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        texts = [text_of(file) for file in (output, errors)]
    return Ended(texts[0], texts[1], None if is_late else process.returncode)


def text_of(file: Any) -> str:
    file.seek(0)
    return str(file.read())


def waited(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Whether a process ended in time."""
    try:
        process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return False
    return True


def python(*words: str) -> list[str]:
    return [sys.executable, *words]
