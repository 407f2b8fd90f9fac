"""A peer in a process of its own: ``python -m benchmarks.worker DESCRIPTOR``.

It receives requests over a connection and answers each.  A request names a peer, since
on a GPU several share a process and the operands of the case, its wishes, what to do,
and the case, which a process that was started anew builds first.
"""

import platform
import sys
from contextlib import suppress
from functools import cached_property
from math import inf
from multiprocessing.connection import Connection
from time import perf_counter, process_time, sleep
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.peers import make_peer
from benchmarks.peers.base import Call, Peer, RefusedError

Reply = dict[str, Any]


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
            # Where a GPU has failed, nothing will succeed in this process.
            lost = "peer" in vars(self) and self.peer.device.is_lost()
            reason = f"{type(error).__name__}: {error}"
            return {
                "status": "failed",
                "reason": reason,
                **({"lost": True} if lost else {}),
            }

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


def main() -> None:
    sessions: dict[str, Session] = {}
    connection = Connection(int(sys.argv[1]))
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


if __name__ == "__main__":
    main()
