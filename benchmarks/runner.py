"""Peers in processes of their own, and rounds in which they take turns."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any, cast

from benchmarks.cases import Case
from benchmarks.peers import kind_of
from benchmarks.records import CaseRecord, Finding
from benchmarks.worker import Reply

ROOT = Path(__file__).parent.parent


class WorkerDiedError(Exception):
    """The process of a peer ended before it answered."""


class Process:
    """A process that peers answer in; it is started when the first of them is asked.

    It is killed where an answer takes longer than ``patience`` seconds.
    """

    def __init__(self, python: str, patience: float | None = None) -> None:
        self._command = [python, "-m", "benchmarks.worker"]
        self._patience = patience
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        # How often it was started: what an earlier one was told, it does not know.
        self.lives = 0

    def start(self) -> None:
        if self._process is None:
            self._process = self._started()
            self.lives += 1

    def _started(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(  # noqa: S603
            self._command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
        )

    def is_alive(self) -> bool:
        return self._process is not None

    def ask(self, **words: Any) -> Reply:
        process = cast("subprocess.Popen[str]", self._process)
        requests, replies = cast("Any", process.stdin), cast("Any", process.stdout)
        try:
            print(json.dumps(words), file=requests, flush=True)
            with self._impatience(process):
                line = replies.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerDiedError(self._last_words())
        reply = cast("Reply", json.loads(line))
        if reply.pop("lost", False):
            self._end()
        return reply

    @contextmanager
    def _impatience(self, process: "subprocess.Popen[str]") -> Iterator[None]:
        """Kill the process where the block takes too long."""
        if self._patience is None:
            yield
            return
        timer = Timer(self._patience, process.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _last_words(self) -> str:
        process = self._end()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        status = f"its process ended with status {process.returncode}"
        return f"{status}: {said[-1]}" if said else status

    def _end(self) -> "subprocess.Popen[str]":
        """Let it read the end of its input, and wait for it."""
        process = cast("subprocess.Popen[str]", self._process)
        process.communicate()
        self._process = None
        return process

    def close(self) -> None:
        if self._process is not None:
            self._end()
        self._errors.close()


class Worker:
    """A peer in a process, which it may share with others."""

    def __init__(self, peer: str, process: Process, wishes: dict[str, Any]) -> None:
        self._peer = peer
        self._process = process
        self._wishes = wishes
        self._opened_in = self._built_in = 0
        self._case: dict[str, Any] = {}
        self.hello: Reply = {}

    def open(self) -> Reply:
        """Start it, or start it again; what it says of itself."""
        known = self._process.is_alive() and self._opened_in == self._process.lives
        if not known and self.hello.get("status") != "missing":
            try:
                self._process.start()
                self._opened_in = self._process.lives
                self.hello = self._send("open", wishes=self._wishes)
            except (OSError, WorkerDiedError) as error:
                self.hello = {"status": "missing", "reason": str(error)}
        return self.hello

    def ask(self, do: str, **words: Any) -> Reply:
        """An answer; a process that has been started anew builds the case again."""
        if do == "build":
            self._case, self._built_in = words, self._process.lives
        elif self._built_in != self._process.lives:
            reply = self.ask("build", **self._case)
            if reply["status"] != "ok":
                return reply
        return self._send(do, **words)

    def _send(self, do: str, **words: Any) -> Reply:
        return self._process.ask(peer=self._peer, do=do, **words)


@contextmanager
def workers(
    peers: Sequence[str],
    wishes: dict[str, Any],
    torch_python: str = sys.executable,
    patience: float | None = None,
) -> Iterator[dict[str, Worker]]:
    """A worker for each peer, opened; all end with the block.

    On a CPU each has a process of its own, since two BLAS or OpenMP libraries in one
    disturb each other.  On a GPU those that need PyTorch share one and the others
    another, and with it their operands.
    """
    with ExitStack() as stack:
        shared: dict[bool, Process] = {}
        found = {}
        for peer in peers:
            needs_torch = kind_of(peer).needs_torch
            process = shared.get(needs_torch)
            if process is None or wishes.get("device") != "cuda":
                python = torch_python if needs_torch else sys.executable
                process = shared[needs_torch] = Process(python, patience)
                stack.callback(process.close)
            found[peer] = worker = Worker(peer, process, wishes)
            worker.open()
        yield found


@dataclass(frozen=True)
class Effort:
    """How long each peer is timed on each case."""

    rounds: int = 4
    seconds: float = 0.6


def measure_case(
    case: Case,
    peers: dict[str, Worker],
    effort: Effort,
    step: Callable[[], None] = lambda: None,
) -> CaseRecord:
    """Check every peer, then time those that are right, in turns."""
    findings: dict[str, Finding] = {}
    for name, worker in peers.items():
        findings[name] = asked(worker, "build", case=case.to_json())
        step()
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(effort.rounds):
        for name in right(findings):
            share = effort.seconds / effort.rounds
            reply = asked(peers[name], "time", seconds=share)
            if reply["status"] == "ok":
                times[name] += cast("Any", reply).pop("times")
            findings[name] |= reply
        step()
    for name in right(findings):
        findings[name] |= asked(peers[name], "weigh")
        findings[name] |= summary(times[name])
    return {
        "layer": case.layer.to_json(),
        "operation": case.operation,
        "batch": case.batch,
        "arithmetic": case.arithmetic,
        "name": case.layer.name,
        "kind": case.layer.kind,
        "multiplications": case.layer.multiplications(case.batch),
        "moved_bytes": case.nbytes,
        "findings": findings,
    }


def right(findings: dict[str, Finding]) -> list[str]:
    return [name for name, found in findings.items() if found["status"] == "ok"]


def asked(worker: Worker, do: str, **words: Any) -> Finding:
    """The answer of a peer, or why there is none."""
    hello = worker.open()
    if hello["status"] != "ok":
        return {"status": hello["status"], "reason": hello["reason"]}
    try:
        return cast("Finding", worker.ask(do, **words))
    except WorkerDiedError as death:
        return {"status": "failed", "reason": str(death)}


def summary(seconds: list[float]) -> Finding:
    """Median and quartiles, in milliseconds, of all calls of all rounds."""
    each = sorted(1e3 * time for time in seconds)
    low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return {
        "calls": len(each),
        "milliseconds": statistics.median(each),
        "quartiles": [low, high],
    }
