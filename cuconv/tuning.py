"""Which candidate was the fastest, remembered between runs.

One JSON file for each machine, array module, BLAS and version of the library: what was
measured elsewhere is never believed.  A file that cannot be read or written costs
nothing but the time to measure again.
"""

import hashlib
import json
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from cuconv.version import __version__

_ROUNDS = 5
_lock = threading.Lock()


class Winner(NamedTuple):
    """A candidate by name: strategy, variant, and whether it runs over dy."""

    strategy: str
    variant: tuple[int, ...]
    flipped: bool


def fastest(xp: Any, calls: Sequence[Callable[[], object]]) -> int:
    """The index of the call with the smallest median time, in alternation."""
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(_ROUNDS + 1):
        for own, call in zip(times, calls, strict=True):
            start = perf_counter()
            call()
            _finish(xp)
            if round_:
                own.append(perf_counter() - start)
    return min(range(len(calls)), key=lambda i: float(np.median(times[i])))


def _finish(xp: Any) -> None:
    """Wait until the device has done what it was asked."""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def recall(key: Hashable, candidates: Sequence[Winner]) -> Winner | None:
    """The winner that is on record, if it still is a candidate."""
    with _lock:
        known = _known().get(_digest(key))
    if not isinstance(known, list) or len(known) != 3:
        return None
    return next((c for c in candidates if [c[0], list(c[1]), c[2]] == known), None)


def remember(key: Hashable, winner: Winner) -> None:
    """Put a winner on record, for this process and the next."""
    with _lock:
        known = _known()
        known[_digest(key)] = [winner.strategy, list(winner.variant), winner.flipped]
        with suppress(OSError, RuntimeError):
            # What other processes have found since stays on record too.
            _write(_path(), json.dumps({**_read(), **known}, indent=1))


@cache
def _known() -> dict[str, Any]:
    return _read()


def _read() -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError, RuntimeError):
        found = json.loads(_path().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _write(path: Path, text: str) -> None:
    """Replace the file at once: another process may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, delete=False
    ) as file:
        file.write(text)
    try:
        Path(file.name).replace(path)
    except OSError:
        Path(file.name).unlink(missing_ok=True)
        raise


def _path() -> Path:
    own = os.environ.get("CUCONV_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(own) if own else Path(base) / "cuconv"
    return folder / f"winners-{_machine()}.json"


@cache
def _machine() -> str:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    words = (
        __version__,
        np.__version__,
        str(blas),
        platform.machine(),
        platform.processor(),
        _processor(),
        str(os.cpu_count()),
    )
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line
    return platform.platform()


def _digest(key: Hashable) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:24]
