"""Copies of what windows read, and their adjoint, run by run of neighbouring cells.

Arrays are grouped: cells (N, G, C, *spatial), the copy (N, G, C, *window).  What cells
outside the array read is said by `cuconv.geometry.Axis.runs`.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

from cuconv.arrays import Array
from cuconv.geometry import Axis, Ranges, Run


def extend(
    copy: Callable[[Array, Array], None],
    cells: Array,
    copied: Array,
    axes: Sequence[Axis],
    windows: Ranges,
    mode: str,
) -> None:
    """Copy what the windows read, with a cast."""
    for runs in product(*_runs(axes, windows, mode)):
        copy(*_pair(runs, cells, copied))


def fold(
    xp: Any,
    copied: Array,
    cells: Array,
    axes: Sequence[Axis],
    windows: Ranges,
    mode: str,
    *,
    add: bool,
) -> None:
    """Sum in every cell what its copies hold, on top of what is there with ``add``."""
    each = _runs(axes, windows, mode)
    single = ([one for run in runs for one in run.one_to_one()] for runs in each)
    picked = product(*single)
    if not add and _reads_all(axes, windows):
        inside, outside = _pair(next(picked), cells, copied)
        inside[...] = outside
    elif not add:
        cells[...] = 0
    for runs in picked:
        inside, outside = _pair(runs, cells, copied)
        xp.add(inside, outside, out=inside)


def _reads_all(axes: Sequence[Axis], windows: Ranges) -> bool:
    """Whether all cells are in the first run of every axis: those that repeat none."""
    each = zip(axes, windows, strict=True)
    return all(start <= 0 and stop >= axis.size > 0 for axis, (start, stop) in each)


def _runs(axes: Sequence[Axis], windows: Ranges, mode: str) -> Iterator[list[Run]]:
    for axis, window in zip(axes, windows, strict=True):
        yield list(axis.runs(window, mode))


def _pair(runs: tuple[Run, ...], cells: Array, copied: Array) -> tuple[Array, Array]:
    inside = cells[(..., *(run.cells for run in runs))]
    return inside, copied[(..., *(run.window for run in runs))]
