"""Padded copies of what windows read, and their adjoint, one contiguous run at a time.

Arrays are grouped: elements (N, G, C, *spatial), the copy (N, G, C, *window).
`cuconv.geometry.Axis.runs` says what is read outside the array.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cuconv.arrays import Array
from cuconv.geometry import Axis, Ranges, Run


class Reading(NamedTuple):
    """The windows along every axis, and the padding mode outside the array."""

    axes: Sequence[Axis]
    windows: Ranges
    mode: str


def copies(
    cells: Array, copied: Array, reading: Reading
) -> Iterator[tuple[Array, Array]]:
    """Parts of the input, and those of the padded copy that they are copied to."""
    for runs in _runs(*reading):
        yield _pair(runs, cells, copied)


def sums(
    copied: Array, cells: Array, reading: Reading
) -> Iterator[tuple[Array, Array, bool]]:
    """Parts of the input, those of its copy that are added, and if each is the first.

    The first part is all of the input, or nothing is the first.
    """
    first = _reads_all(reading)
    for runs in _runs(*reading, one_to_one=True):
        yield (*_pair(runs, cells, copied), first)
        first = False


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
