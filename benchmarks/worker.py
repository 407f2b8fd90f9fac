"""Peers in a process of their own: ``python -m benchmarks.worker``.

It reads a request from each line of its standard input and answers with a line of JSON.
Each request names its peer, such as ``"peer": "cuconv@4MiB"``; on a GPU several of them
share a process, and with it the operands of the case that is measured:

- ``{"do": "open", "wishes": {...}}``: load the peer; its versions, or why it is missing
- ``{"do": "build", "case": {...}}``: make operands, run once, check
- ``{"do": "time", "seconds": 0.2}``: call again and again; the time of each call
- ``{"do": "weigh"}``: the peak memory of one call

A process that has no request waits, and takes no processor time.  One whose GPU failed,
after which no call of it can succeed, says ``"lost": true`` and ends.
"""

import json
import os
import sys
from collections.abc import Callable
from math import inf
from time import perf_counter, process_time, sleep
from typing import Any, TextIO

from benchmarks.cases import Case
from benchmarks.peers import kind_of, wishes_of
from benchmarks.peers.base import Call, Peer, RefusedError, python_versions

Reply = dict[str, Any]


class Session:
    """The requests, each a method."""

    peer: Peer | None = None
    # One for each set of operands.
    calls: tuple[Call, ...] = ()

    def __init__(self, name: str) -> None:
        self.name = name
        self._turn = 0

    def open(self, wishes: dict[str, Any]) -> Reply:
        kind, chosen = kind_of(self.name), wishes_of(self.name, wishes)
        try:
            self.peer = kind.make(chosen)
        except ImportError as error:
            return {"status": "missing", "reason": str(error)}
        return {"status": "ok", "versions": python_versions() | self.peer.versions()}

    def build(self, case: dict[str, Any]) -> Reply:
        """Only a peer that answers rightly is worth timing."""
        assert self.peer is not None  # noqa: S101
        self.calls = ()  # gives the last case's memory back
        this = Case.from_json(case)
        operands, judge = self.peer.prepare(this)
        calls = tuple(self.peer.call(this, *each) for each in operands)
        error = judge(self.peer.base_array(this, calls[0]()))
        found = {"error": error if error < inf else None}
        if not error <= (most := self.peer.tolerance(this)):
            reason = f"relative error {error:.1e} above {most:.0e}"
            return {"status": "wrong", "reason": reason, **found}
        self.calls = calls
        return {"status": "ok", **found, **self.peer.plan(this)}

    def time(self, seconds: float) -> Reply:
        """Times of calls that fill these seconds, and of one at least."""
        begun = perf_counter()
        times = [self._seconds()]
        if times[0] < seconds:
            # The others have had the caches and the cores since our last call.
            times.clear()
        while not times or perf_counter() - begun < seconds:
            times.append(self._seconds())
        return {"status": "ok", "times": times}

    def _seconds(self) -> float:
        """Of one call, with the next set of operands."""
        assert self.peer is not None  # noqa: S101
        self._turn = (self._turn + 1) % len(self.calls)
        return self.peer.device.seconds(self.calls[self._turn])

    def weigh(self) -> Reply:
        assert self.peer is not None  # noqa: S101
        device = self.peer.device
        found = {"extra_bytes": device.extra_bytes(self.calls[0])}
        return {"status": "ok", **found, "weighed_by": device.weighed_by}

    def answer(self, do: str, **words: Any) -> Reply:
        requests: dict[str, Callable[..., Reply]] = {
            "open": self.open,
            "build": self.build,
            "time": self.time,
            "weigh": self.weigh,
        }
        try:
            return requests[do](**words)
        except (RefusedError, MemoryError) as error:
            return {"status": "refused", "reason": str(error)}
        except Exception as error:  # noqa: BLE001 - a peer's failure is a finding
            reason = f"{type(error).__name__}: {error}"
            lost = {"lost": True} if self._is_lost() else {}
            return {"status": "failed", "reason": reason, **lost}

    def _is_lost(self) -> bool:
        return self.peer is not None and self.peer.device.is_lost()

    def disturbs(self) -> bool:
        """Whether threads of this process may still be running after an answer."""
        return self.peer is None or not self.peer.device.is_remote


def private_output() -> TextIO:
    """Standard output for us alone; what libraries print goes to standard error."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return ours


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


def main() -> None:
    sessions: dict[str, Session] = {}
    output = private_output()
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("peer")
        session = sessions.setdefault(name, Session(name))
        reply = session.answer(**request)
        if session.disturbs():
            settle()
        print(json.dumps(reply), file=output, flush=True)
        if reply.get("lost"):
            return


if __name__ == "__main__":
    main()
