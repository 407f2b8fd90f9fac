"""Peers in processes of their own, and rounds in which they take turns.

``python -m benchmarks.runner DESCRIPTOR`` is such a process: it receives requests over
a connection and answers each.  A request names a peer, since on a GPU several share a
process and the operands of the case, its wishes, what to do, and the case, which a
process that was started anew builds first.
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from math import inf
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from time import perf_counter, process_time, sleep
from typing import Any, NamedTuple

from benchmarks.cases import Case
from benchmarks.machine import ROOT, provenance, versions
from benchmarks.networks import Pass
from benchmarks.peers import is_elsewhere, make_peer
from benchmarks.peers.base import Call, Peer, RefusedError
from benchmarks.records import CaseRecord, Finding, Record

Reply = dict[str, Any]
# Seconds that a network sleeps before each pass, as programs do between two inputs.
PAUSE = 0.05

# In a process of its own.


class Session:
    """A peer, with the calls of the case that it measures.

    They take turns: one for each set of operands, or for each layer of a network.
    """

    def __init__(self, name: str, wishes: dict[str, Any]) -> None:
        self._name, self._wishes = name, wishes
        self._case: Case | Pass | None = None
        self._calls: list[Call] = []

    @cached_property
    def peer(self) -> Peer:
        return make_peer(self._name, self._wishes)

    def answer(self, do: str, case: Case | Pass | None = None, **words: Any) -> Reply:
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
        return {"versions": versions() | self.peer.versions()}

    def build(self, case: Case | Pass) -> Reply:
        """Run once and check: only a peer that answers rightly is worth timing.

        The first pass through a network is timed, before anything is checked.
        """
        self._case, self._calls = None, []  # gives the last case's memory back
        device, cases = self.peer.device, case.cases
        prepared = [device.prepare(each) for each in cases]
        found = {} if isinstance(case, Pass) else self.peer.plan(case)
        self._calls = [
            self.peer.call(each, *operands)
            for each, (sets, _) in zip(cases, prepared, strict=True)
            for operands in sets
        ]
        if isinstance(case, Pass):
            found["first_milliseconds"] = 1e3 * sum(map(device.seconds, self._calls))
        checks = zip(cases, prepared, self._calls, strict=False)
        error, most = 0.0, self.peer.tolerance(cases[0])
        for each, (_, error_of), call in checks:
            error = max(error, error_of(self.peer.first_channels(each, call())))
            if not error <= most:
                where = f"{each.layer.name}: " if isinstance(case, Pass) else ""
                reason = f"{where}relative error {error:.1e} above {most:.0e}"
                known = error if error < inf else None
                return {"status": "wrong", "reason": reason, "error": known}
        self._case = case
        return {"status": "ok", **found, "error": error}

    def time(self, seconds: float) -> Reply:
        """Times of calls that fill these seconds: of one at least, or of one pass."""
        begun = perf_counter()
        times = self._turn()
        if times[0] < seconds and not isinstance(self._case, Pass):
            # The others have had the caches and the cores since our last call.
            times.clear()
        while not times or perf_counter() - begun < seconds:
            times += self._turn()
        return {"times": times}

    def _turn(self) -> list[float]:
        """Seconds of a call with the next set of operands, or of a pass's calls."""
        device = self.peer.device
        if isinstance(self._case, Pass):
            sleep(PAUSE)
            return [device.seconds(call) for call in self._calls]
        self._calls.append(self._calls.pop(0))
        return [device.seconds(self._calls[0])]

    def weigh(self) -> Reply:
        """The peak memory of one call: the largest of a network's."""
        device = self.peer.device
        calls = self._calls if isinstance(self._case, Pass) else self._calls[:1]
        peaks = [*map(device.extra_bytes, calls)]
        most = max((peak for peak in peaks if peak is not None), default=None)
        return {"extra_bytes": most, "weighed_by": device.weighed_by}


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

    def end(self) -> None:
        """End the process; the next request starts another."""
        self._process.end()

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
            python = torch_python if is_elsewhere(peer) else sys.executable
            key = is_elsewhere(peer) if wishes.get("device") == "cuda" else peer
            if key not in processes:
                processes[key] = Process(python, patience)
                stack.callback(processes[key].close)
            found[peer] = Worker(peer, wishes, processes[key])
        yield found


class Effort(NamedTuple):
    """How long each peer is timed on each case."""

    rounds: int = 4
    seconds: float = 0.6


def measure_case(
    case: Case | Pass, peers: dict[str, Worker], effort: Effort
) -> CaseRecord:
    """Check every peer, then time those that are right, in turns.

    A network finds a process that has computed nothing before.
    """
    if isinstance(case, Pass):
        for worker in peers.values():
            worker.end()
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
        findings[name] |= peers[name].ask("weigh", case=case)
        findings[name] |= summary(times[name], len(case.cases))
    return {**case.described, "findings": findings}


def right(findings: dict[str, Finding]) -> list[str]:
    return [name for name, found in findings.items() if found["status"] == "ok"]


def summary(seconds: list[float], layers: int = 1) -> Finding:
    """Median and quartiles, in milliseconds, of all calls of all rounds.

    Those of a network are passes, and each of its layers has a median too.
    """
    calls = [*zip(*[iter(seconds)] * layers, strict=True)]
    each = [1e3 * sum(times) for times in calls]
    low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    found = {"calls": len(each), "milliseconds": middle, "quartiles": [low, high]}
    if layers > 1:
        columns = zip(*calls, strict=True)
        found["layers"] = [1e3 * statistics.median(column) for column in columns]
    return found


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
