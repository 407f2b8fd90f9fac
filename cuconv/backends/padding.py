"""Padded copies of what windows read, and their adjoint, one contiguous run at a time.

Arrays are grouped: elements (N, G, C, *spatial), the copy (N, G, C, *window).
`cuconv.geometry.Axis.runs` says what is read outside the array.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cuconv.arrays import Array
from cuconv.geometry import Axis, Ranges, Run


class Reading(NamedTuple):
    """The windows along every axis, and the padding mode outside the array."""

    axes: Sequence[Axis]
    windows: Ranges
    mode: str


def pad_copy(
    backend: Any,
    cells: Array,
    copied: Array,
    reading: Reading,
) -> None:
    """Copy the padded input that the windows read, with a cast."""
    for runs in _runs(*reading):
        backend.copy(*_pair(runs, cells, copied))


def pad_adjoint(
    backend: Any,
    copied: Array,
    cells: Array,
    reading: Reading,
    *,
    add: bool,
) -> None:
    """Sum all copies of each element into it; with ``add``, to what is there."""
    picked = _runs(*reading, one_to_one=True)
    if not add and _reads_all(reading):
        inside, outside = _pair(next(picked), cells, copied)
        backend.copy(outside, inside)
    elif not add:
        backend.fill(cells, 0)
    for runs in picked:
        inside, outside = _pair(runs, cells, copied)
        backend.do(backend.xp.add, inside, outside, inside)


def _reads_all(reading: Reading) -> bool:
    """True if the first run of every axis, which repeats nothing, has all elements."""
    each = zip(reading.axes, reading.windows, strict=True)
    return all(start <= 0 and stop >= axis.size > 0 for axis, (start, stop) in each)


def _runs(
    axes: Sequence[Axis], windows: Ranges, mode: str, *, one_to_one: bool = False
) -> Iterator[tuple[Run, ...]]:
    """Runs along every axis, every combination, the last axis fastest.

    A generator, because wide padding can have more runs than fit into memory.
    """
    if not axes:
        yield ()
        return
    for run in axes[0].runs(windows[0], mode):
        for part in run.one_to_one() if one_to_one else (run,):
            for rest in _runs(axes[1:], windows[1:], mode, one_to_one=one_to_one):
                yield (part, *rest)


def _pair(runs: tuple[Run, ...], cells: Array, copied: Array) -> tuple[Array, Array]:
    inside = cells[(..., *(run.cells for run in runs))]
    return inside, copied[(..., *(run.window for run in runs))]
