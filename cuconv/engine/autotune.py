"""Measured times of candidates: the fastest is remembered between runs.

One JSON file for each version of the library and each machine (`Backend.machine`):
times that were measured on another machine are never used.  If a file cannot be read or
written, candidates are measured again.
"""

import json
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cuconv.backends import Backend
from cuconv.engine.tile_search import Candidate
from cuconv.version import __version__

_ROUNDS = 5
# How a winner is written down: another number where that changes.
_RECORDS = "2"
_lock = threading.Lock()


class Winner(NamedTuple):
    """A candidate: strategy, variant in words, and whether it runs over dy."""

    strategy: str
    variant: str
    flipped: bool

    @classmethod
    def of(cls, candidate: Candidate) -> "Winner":
        """The name of a candidate."""
        words = candidate.strategy.describe(candidate.tiling.variant)
        return cls(candidate.strategy.name, words, candidate.problem.flipped)


def fastest(backend: Backend, calls: Sequence[Callable[[], object]]) -> int:
    """The index of the call with the smallest median time, in alternation."""
    rounds = [backend.times(calls) for _ in range(_ROUNDS + 1)]
    # The first one compiles kernels and fills pools.
    return int(np.argmin(np.median(rounds[1:], axis=0)))


def recall(
    machine: tuple[str, ...], key: Hashable, candidates: Sequence[Winner]
) -> Winner | None:
    """The winner in the file, if it is still a candidate."""
    with _lock:
        known = _known(machine).get(_digest(key))
    return next((winner for winner in candidates if list(winner) == known), None)


def remember(machine: tuple[str, ...], key: Hashable, winner: Winner) -> None:
    """Save a winner, for this process and later ones."""
    with _lock:
        known = _known(machine)
        known[_digest(key)] = list(winner)
        with suppress(OSError, RuntimeError):
            # Keep winners that other processes have saved since.
            found = {**_read(machine), **known}
            _write(_path(machine), json.dumps(found, indent=1))


@cache
def _known(machine: tuple[str, ...]) -> dict[str, Any]:
    return _read(machine)


def _read(machine: tuple[str, ...]) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError, RuntimeError):
        found = json.loads(_path(machine).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _write(path: Path, text: str) -> None:
    """Replace the file in one step: another process may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    import tempfile  # noqa: PLC0415 - needed for records alone

    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, delete=False
    ) as file:
        file.write(text)
    try:
        Path(file.name).replace(path)
    except OSError:
        Path(file.name).unlink(missing_ok=True)
        raise


def _path(machine: tuple[str, ...]) -> Path:
    own = os.environ.get("CUCONV_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(own) if own else Path(base) / "cuconv"
    words = "\n".join((__version__, _RECORDS, *machine))
    return folder / f"winners-{_sha256(words)[:12]}.json"


def _digest(key: Hashable) -> str:
    return _sha256(repr(key))[:24]


def _sha256(text: str) -> str:
    import hashlib  # noqa: PLC0415 - needed for records alone

    return hashlib.sha256(text.encode()).hexdigest()
