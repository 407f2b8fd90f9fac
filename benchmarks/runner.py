"""Peers in processes of their own, and rounds in which they take turns."""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from benchmarks.cases import Case
from benchmarks.machine import ROOT, provenance
from benchmarks.peers import needs_torch
from benchmarks.records import CaseRecord, Finding, Record
from benchmarks.worker import Reply


class WorkerDiedError(Exception):
    """The process of a peer ended before it answered."""


class Process:
    """A process that peers answer in, started by a request where there is none.

    It is killed where an answer takes longer than ``patience`` seconds.
    """

    def __init__(self, python: str, patience: float | None = None) -> None:
        self._python, self._patience = python, patience
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115

    def is_alive(self) -> bool:
        return self._process is not None

    def ask(self, *request: Any) -> Reply:
        if self._process is None:
            self._connection, theirs = Pipe()
            descriptor = theirs.fileno()
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603
                    [self._python, "-m", "benchmarks.worker", str(descriptor)],
                    cwd=ROOT,
                    pass_fds=[descriptor],
                    stdout=self._errors,
                    stderr=self._errors,
                )
        try:
            self._connection.send(request)
            if self._patience and not self._connection.poll(self._patience):
                self._process.kill()
            reply: Reply = self._connection.recv()
        except (EOFError, ConnectionError):
            self._errors.seek(0)
            status = f"its process ended with status {self.end()}"
            said = self._errors.read().strip().splitlines()[-1:]
            raise WorkerDiedError(": ".join([status, *said])) from None
        if reply.pop("lost", False):
            self.end()
        return reply

    def end(self) -> int | None:
        """Close the connection, at which it ends, and wait for it; its status."""
        process, self._process = self._process, None
        if process is None:
            return None
        self._connection.close()
        return process.wait()

    def close(self) -> None:
        self.end()
        self._errors.close()


class Worker:
    """A peer in a process, which it may share with others."""

    def __init__(self, peer: str, wishes: dict[str, Any], process: Process) -> None:
        self._who, self._process = (peer, wishes), process
        self.hello = self._open()

    def _open(self) -> Reply:
        """Return what the peer says of itself, or why it is missing."""
        try:
            return self._process.ask(*self._who, {"do": "open"})
        except (OSError, WorkerDiedError) as error:
            return {"status": "missing", "reason": str(error)}

    def ask(self, do: str, **words: Any) -> Reply:
        """Return the answer of the peer, or why there is none."""
        if self.hello["status"] == "ok" and not self._process.is_alive():
            self.hello = self._open()
        if self.hello["status"] != "ok":
            return dict(self.hello)
        try:
            return self._process.ask(*self._who, {"do": do, **words})
        except WorkerDiedError as death:
            return {"status": "failed", "reason": str(death)}


@contextmanager
def workers(
    peers: Sequence[str],
    wishes: dict[str, Any],
    torch_python: str = sys.executable,
    patience: float | None = None,
) -> Iterator[dict[str, Worker]]:
    """Open a worker for each peer; all end with the block.

    On a CPU each has a process of its own, since two BLAS or OpenMP libraries in one
    disturb each other.  On a GPU those that need PyTorch share one and the others
    another, and with it their operands.
    """
    with ExitStack() as stack:
        processes: dict[Any, Process] = {}
        found = {}
        for peer in peers:
            torch = needs_torch(peer)
            key = torch if wishes.get("device") == "cuda" else peer
            if key not in processes:
                python = torch_python if torch else sys.executable
                processes[key] = Process(python, patience)
                stack.callback(processes[key].close)
            found[peer] = Worker(peer, wishes, processes[key])
        yield found


class Effort(NamedTuple):
    """How long each peer is timed on each case."""

    rounds: int = 4
    seconds: float = 0.6


def measure_case(case: Case, peers: dict[str, Worker], effort: Effort) -> CaseRecord:
    """Check every peer, then time those that are right, in turns."""
    findings: dict[str, Finding] = {
        name: worker.ask("build", case=case) for name, worker in peers.items()
    }
    times: dict[str, list[float]] = {name: [] for name in peers}
    share = effort.seconds / effort.rounds
    for _ in range(effort.rounds):
        for name in right(findings):
            reply = peers[name].ask("time", case=case, seconds=share)
            times[name] += reply.pop("times", [])
            findings[name] |= reply
    for name in right(findings):
        findings[name] |= peers[name].ask("weigh", case=case) | summary(times[name])
    return {
        "layer": asdict(case.layer),
        "operation": case.operation,
        "batch": case.batch,
        "arithmetic": case.arithmetic,
        "name": case.layer.name,
        "kind": case.layer.kind,
        "multiplications": case.layer.multiplications(case.batch),
        "moved_bytes": case.nbytes(),
        "findings": findings,
    }


def right(findings: dict[str, Finding]) -> list[str]:
    return [name for name, found in findings.items() if found["status"] == "ok"]


def summary(seconds: list[float]) -> Finding:
    """Median and quartiles, in milliseconds, of all calls of all rounds."""
    each = sorted(1e3 * time for time in seconds)
    low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return {"calls": len(each), "milliseconds": middle, "quartiles": [low, high]}


def new_record(
    suite: str,
    batch: int,
    wishes: dict[str, Any],
    effort: Effort,
    peers: dict[str, Worker],
    where: dict[str, Any],
) -> Record:
    """A suite that is about to be measured, without cases."""
    return {
        "suite": suite,
        "device": wishes["device"],
        "batch": batch,
        "wishes": wishes,
        **effort._asdict(),
        "peers": {name: worker.hello for name, worker in peers.items()},
        "machine": where,
        **provenance(),
        "cases": [],
    }
