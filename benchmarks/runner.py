"""Peers in processes of their own, and rounds in which they take turns.

``python -m benchmarks.runner DESCRIPTOR`` is such a process: it receives requests over
a connection and answers each.  A request names a peer, since on a GPU several share a
process and the operands of the case, its wishes, what to do, and the case, which a
process that was started anew builds first.
"""

import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import cached_property
from math import inf
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from time import perf_counter, process_time, sleep
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import Case
from benchmarks.machine import ROOT, provenance
from benchmarks.peers import make_peer, needs_torch
from benchmarks.peers.base import Call, Peer, RefusedError
from benchmarks.records import CaseRecord, Finding, Record

Reply = dict[str, Any]

# In a process of its own.


class Session:
    """A peer, with the calls of the case that it measures: one for each operand set."""

    def __init__(self, name: str, wishes: dict[str, Any]) -> None:
        self._name, self._wishes = name, wishes
        self._case: Case | None = None
        self._calls: list[Call] = []
        self._turn = 0

    @cached_property
    def peer(self) -> Peer:
        return make_peer(self._name, self._wishes)

    def answer(self, do: str, case: Case | None = None, **words: Any) -> Reply:
        """Do one of open, build, time and weigh; the status says how it went."""
        try:
            if case and (case != self._case or do == "build"):
                reply = self.build(case)
                if do == "build" or reply["status"] != "ok":
                    return reply
            return {"status": "ok", **getattr(self, do)(**words)}
        except ImportError as error:
            return {"status": "missing", "reason": str(error)}
        except (RefusedError, MemoryError) as error:
            return {"status": "refused", "reason": str(error)}
        except Exception as error:  # noqa: BLE001 - a peer's failure is a finding
            reason = f"{type(error).__name__}: {error}"
            try:
                self.peer.device.synchronize()
            except Exception:  # noqa: BLE001 - nothing will succeed in this process
                return {"status": "failed", "reason": reason, "lost": True}
            return {"status": "failed", "reason": reason}

    def open(self) -> Reply:
        """Load the peer; its versions."""
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        versions = {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "blas": f"{blas['name']} {blas['version']}",
        }
        return {"versions": versions | self.peer.versions()}

    def build(self, case: Case) -> Reply:
        """Run once and check: only a peer that answers rightly is worth timing."""
        self._case, self._calls = None, []  # gives the last case's memory back
        sets, error_of = self.peer.device.prepare(case)
        calls = [self.peer.call(case, *operands) for operands in sets]
        error = error_of(self.peer.first_channels(case, calls[0]()))
        found = {"error": error if error < inf else None}
        if not error <= (most := self.peer.tolerance(case)):
            reason = f"relative error {error:.1e} above {most:.0e}"
            return {"status": "wrong", "reason": reason, **found}
        self._case, self._calls = case, calls
        return {"status": "ok", **found, **self.peer.plan(case)}

    def time(self, seconds: float) -> Reply:
        """Times of calls that fill these seconds, and of one at least."""
        begun = perf_counter()
        times = [self._seconds()]
        if times[0] < seconds:
            # The others have had the caches and the cores since our last call.
            times.clear()
        while not times or perf_counter() - begun < seconds:
            times.append(self._seconds())
        return {"times": times}

    def _seconds(self) -> float:
        """Of one call, with the next set of operands."""
        self._turn = (self._turn + 1) % len(self._calls)
        return self.peer.device.seconds(self._calls[self._turn])

    def weigh(self) -> Reply:
        """The peak memory of one call."""
        device = self.peer.device
        extra_bytes = device.extra_bytes(self._calls[0])
        return {"extra_bytes": extra_bytes, "weighed_by": device.weighed_by}


def settle() -> None:
    """Wait until this process takes no more processor time, a second at most.

    OpenBLAS's threads spin for a tenth of a second before they sleep (0.3.31, measured
    on AMD EPYC), and would slow the next peer: by two to ten times on two cores.
    """
    end = perf_counter() + 1
    while perf_counter() < end:
        used = process_time()
        sleep(0.01)
        if process_time() - used < 0.002:
            return


def serve(descriptor: int) -> None:
    sessions: dict[str, Session] = {}
    connection = Connection(descriptor)
    with suppress(EOFError):
        while True:
            name, wishes, words = connection.recv()
            session = sessions.setdefault(name, Session(name, wishes))
            reply = session.answer(**words)
            if wishes.get("device") != "cuda":
                settle()
            connection.send(reply)
            if "lost" in reply:
                return


# Where the peers are asked.


class Process:
    """A process that peers answer in, started by a request where there is none.

    It is killed where an answer takes longer than ``patience`` seconds.
    """

    def __init__(self, python: str, patience: float | None = None) -> None:
        self._python, self._patience = python, patience
        self.running: subprocess.Popen[bytes] | None = None
        self._connection: Connection
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115

    def ask(self, *request: Any) -> Reply:
        if self.running is None:
            self._connection, theirs = Pipe()
            descriptor = theirs.fileno()
            with theirs:
                self.running = subprocess.Popen(  # noqa: S603
                    [self._python, "-m", "benchmarks.runner", str(descriptor)],
                    cwd=ROOT,
                    pass_fds=[descriptor],
                    stdout=self._errors,
                    stderr=self._errors,
                )
        try:
            self._connection.send(request)
            if self._patience and not self._connection.poll(self._patience):
                self.running.kill()
            reply: Reply = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            status = f"its process ended with status {self.end()}"
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()[-1:]
            raise ConnectionError(": ".join([status, *said])) from error
        if reply.pop("lost", False):
            self.end()
        return reply

    def end(self) -> int | None:
        """Close the connection, at which it ends, and wait for it; its status."""
        process, self.running = self.running, None
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
        self.hello = self.ask("open")

    def ask(self, do: str, **words: Any) -> Reply:
        """Return the answer of the peer, or why there is none."""
        if do != "open":
            if self.hello["status"] == "ok" and not self._process.running:
                self.hello = self.ask("open")
            if self.hello["status"] != "ok":
                return dict(self.hello)
        try:
            return self._process.ask(*self._who, {"do": do, **words})
        except OSError as error:
            status = "missing" if do == "open" else "failed"
            return {"status": status, "reason": str(error)}


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
            python = torch_python if needs_torch(peer) else sys.executable
            key = needs_torch(peer) if wishes.get("device") == "cuda" else peer
            if key not in processes:
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
    suite: str, batch: int, effort: Effort, peers: dict[str, Worker], **more: Any
) -> Record:
    """A suite that is about to be measured; ``more`` are its wishes and machine."""
    hellos = {name: worker.hello for name, worker in peers.items()}
    found = {"suite": suite, "device": more["wishes"]["device"], "batch": batch}
    found |= {**effort._asdict(), "peers": hellos, **more, **provenance()}
    return {**found, "cases": []}


if __name__ == "__main__":
    serve(int(sys.argv[1]))
