"""A peer in a process of its own: ``python -m benchmarks.worker cuconv@4MiB``.

It reads a request from each line of its standard input and answers with a line of JSON:

- ``{"do": "open", "wishes": {...}}``: load the peer; its versions, or why it is missing
- ``{"do": "build", "case": {...}}``: make operands, run once, check
- ``{"do": "time", "seconds": 0.2}``: call again and again; the time of each call
- ``{"do": "weigh"}``: the peak memory of one call

A process that has no request waits, and takes no processor time.
"""

import json
import os
import sys
from collections.abc import Callable
from math import inf
from time import perf_counter, process_time, sleep
from typing import Any, TextIO

from benchmarks.cases import Case, relative_error
from benchmarks.peers import kind_of, wishes_of
from benchmarks.peers.base import Call, Peer, RefusedError, python_versions

Reply = dict[str, Any]


class Session:
    """The requests, each a method."""

    peer: Peer
    call: Call | None = None

    def __init__(self, name: str) -> None:
        self.name = name

    def open(self, wishes: dict[str, Any]) -> Reply:
        kind, chosen = kind_of(self.name), wishes_of(self.name, wishes)
        try:
            self.peer = kind.make(chosen)
        except ImportError as error:
            return {"status": "missing", "reason": str(error)}
        return {"status": "ok", "versions": python_versions() | self.peer.versions()}

    def build(self, case: dict[str, Any]) -> Reply:
        """Only a peer that answers rightly is worth timing."""
        self.call = None  # gives the last case's memory back
        this = Case.from_json(case)
        operands = this.operands()
        on_device = (self.peer.device.put(array) for array in operands)
        call = self.peer.call(this, *on_device)
        result = self.peer.device.take(call())
        error = relative_error(this, operands, result)
        found = {"error": error if error < inf else None}
        if error > self.peer.tolerance:
            reason = f"relative error {error:.1e} above {self.peer.tolerance:.0e}"
            return {"status": "wrong", "reason": reason, **found}
        self.call = call
        return {"status": "ok", **found, "strategy": self.peer.strategy(this)}

    def time(self, seconds: float) -> Reply:
        """Times of calls that fill these seconds, and of one at least."""
        assert self.call is not None  # noqa: S101
        times = [self.peer.device.seconds(self.call)]
        if times[0] < seconds:
            # The others have had the caches and the cores since our last call.
            times.clear()
        while not times or sum(times) < seconds:
            times.append(self.peer.device.seconds(self.call))
        return {"status": "ok", "times": times}

    def weigh(self) -> Reply:
        assert self.call is not None  # noqa: S101
        device = self.peer.device
        found = {"extra_bytes": device.extra_bytes(self.call)}
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
            return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}


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
    session, output = Session(sys.argv[1]), private_output()
    for line in sys.stdin:
        reply = session.answer(**json.loads(line))
        settle()
        print(json.dumps(reply), file=output, flush=True)


if __name__ == "__main__":
    main()
