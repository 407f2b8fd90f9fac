"""The functions of `cuconv.backends.cpu.deform` as loops that Numba compiles.

They read and write rows in place, where NumPy copies and weighs each: one pass over the
channels in place of three for every element around a sample.

Whatever the layout of offsets and mask, a loop is compiled once for each type.

In the loops, arrays have three spatial axes: rows are (parts, elements, channels of a
part), offsets (D, taps, axes, *out), a mask (D, taps, *out) or without elements,
columns (*out, G, taps, C/G).  ``table`` is `Grid.table`, of as many axes as there are.
"""

from threading import Lock
from typing import Any

import numpy as np

from cuconv.arrays import Array
from cuconv.backends.cpu.loops import Cells, compiled

# The types that loops are compiled for, by one thread at a time.
_READY: set[str] = set()
_LOCK = Lock()


@compiled
def begin(table: Cells, tap: int, firsts: Cells) -> None:
    """Write where a tap of the first output is along every axis."""
    for r in range(table.shape[0] - 1, -1, -1):
        firsts[r] = table[r, 4] + tap % table[r, 1] * table[r, 3]
        tap //= table[r, 1]


@compiled
def locate(
    table: Cells,
    firsts: Cells,
    offset: Cells,
    at: Cells,
    scale: float,
    weights: Cells,
    places: Cells,
    fractions: Cells,
) -> None:
    """Write the rows around a sample and their weights, the last axis fastest.

    And how far behind the first of them it is, along every axis.
    """
    rank, one = table.shape[0], weights.dtype.type(1)
    weights[0], places[0] = scale, 0
    for r in range(rank):
        size, pitch = table[r, 0], table[r, 5]
        step = firsts[r] + at[3 - rank + r] * table[r, 2]
        p = weights.dtype.type(step) + offset[r]
        if p < -1 or p > size:
            p = weights.dtype.type(size)  # where both elements are zeros
        floor = np.floor(p)
        part, low = p - floor, 0
        if p == p:  # noqa: PLR0124 - what is not a number weighs nothing else
            low = (int(floor) + 1) * pitch
        fractions[r] = part
        for c in range(1 << r, 0, -1):
            weight, place = weights[c - 1], places[c - 1] + low
            places[2 * c - 2], places[2 * c - 1] = place, place + pitch
            weights[2 * c - 2], weights[2 * c - 1] = (
                weight * (one - part),
                weight * part,
            )


@compiled
def sample_rows(
    rows: Cells, table: Cells, offset: Cells, mask: Cells, columns: Cells
) -> None:
    """Write the columns."""
    parts, cells, channels = rows.shape
    groups, taps, each = offset.shape[0], offset.shape[1], columns.shape[5]
    corners, at = 1 << table.shape[0], np.zeros(3, np.int64)
    fractions = np.empty(table.shape[0], rows.dtype)
    firsts, unit = np.empty(table.shape[0], np.int64), rows.dtype.type(1)
    weights, places = np.empty(corners, rows.dtype), np.empty(corners, np.int64)
    for d in range(groups):
        for t in range(taps):
            begin(table, t, firsts)
            for o in np.ndindex(columns.shape[:3]):
                at[0], at[1], at[2] = o
                scale = mask[d, t, o[0], o[1], o[2]] if mask.size else unit
                moved = offset[d, t, :, o[0], o[1], o[2]]
                locate(table, firsts, moved, at, scale, weights, places, fractions)
                for part in range(d * parts // groups, (d + 1) * parts // groups):
                    g, first = part * channels // each, part * channels % each
                    into = columns[o[0], o[1], o[2], g, t][first : first + channels]
                    for c in range(0, corners, 2):
                        one = rows[part, min(places[c], cells - 1)]
                        two = rows[part, min(places[c + 1], cells - 1)]
                        v, w = weights[c], weights[c + 1]
                        if c == 0:
                            for i in range(channels):
                                into[i] = v * one[i] + w * two[i]
                        else:
                            for i in range(channels):
                                into[i] += v * one[i] + w * two[i]


@compiled
def add_dots(
    rows: Cells,
    d: int,
    groups: int,
    columns: Cells,
    t: int,
    places: Cells,
    dots: Cells,
) -> None:
    """Write sums over channels of columns (G, taps, C/G) times rows around a sample."""
    parts, cells, channels = rows.shape
    dots[:] = 0
    for part in range(d * parts // groups, (d + 1) * parts // groups):
        g, first = divmod(part * channels, columns.shape[2])
        given = columns[g, t][first : first + channels]
        for c in range(0, dots.shape[0], 2):
            one = rows[part, min(places[c], cells - 1)]
            two = rows[part, min(places[c + 1], cells - 1)]
            v, w = dots[c], dots[c + 1]
            for i in range(channels):
                v += given[i] * one[i]
                w += given[i] * two[i]
            dots[c], dots[c + 1] = v, w


@compiled
def slope(dots: Cells, fractions: Cells, along: int, unit: float) -> float:
    """The difference along an axis, interpolated along the others."""
    rank, total = fractions.shape[0], unit - unit
    for c in range(dots.shape[0]):
        term = dots[c] if c >> (rank - 1 - along) & 1 else -dots[c]
        for r in range(rank):
            if r != along:
                behind = c >> (rank - 1 - r) & 1
                term *= fractions[r] if behind else unit - fractions[r]
        total += term
    return total


@compiled
def differentiate(
    rows: Cells,
    table: Cells,
    offset: Cells,
    mask: Cells,
    columns: Cells,
    doffset: Cells,
    dmask: Cells,
) -> None:
    """Write the gradients for offsets and mask, unless they have no elements."""
    groups, taps = offset.shape[0], offset.shape[1]
    rank, at = table.shape[0], np.zeros(3, np.int64)
    corners, fractions = 1 << rank, np.empty(rank, rows.dtype)
    firsts, unit = np.empty(rank, np.int64), rows.dtype.type(1)
    weights, places = np.empty(corners, rows.dtype), np.empty(corners, np.int64)
    dots = np.empty(corners, rows.dtype)
    for d in range(groups):
        for t in range(taps):
            begin(table, t, firsts)
            for o in np.ndindex(columns.shape[:3]):
                at[0], at[1], at[2] = o
                moved = offset[d, t, :, o[0], o[1], o[2]]
                locate(table, firsts, moved, at, unit, weights, places, fractions)
                add_dots(rows, d, groups, columns[o[0], o[1], o[2]], t, places, dots)
                if dmask.size:
                    total = rows.dtype.type(0)
                    for c in range(corners):
                        total += dots[c] * weights[c]
                    dmask[d, t, o[0], o[1], o[2]] = total
                if not doffset.size:
                    continue
                scale = mask[d, t, o[0], o[1], o[2]] if mask.size else unit
                into = doffset[d, t, :, o[0], o[1], o[2]]
                for r in range(rank):
                    into[r] = scale * slope(dots, fractions, r, unit)


@compiled
def scatter_rows(
    rows: Cells, table: Cells, offset: Cells, mask: Cells, columns: Cells
) -> None:
    """Add the gradients of the columns to their rows, in the order of the samples."""
    parts, cells, channels = rows.shape
    groups, taps, each = offset.shape[0], offset.shape[1], columns.shape[5]
    corners, at = 1 << table.shape[0], np.zeros(3, np.int64)
    fractions = np.empty(table.shape[0], rows.dtype)
    firsts, unit = np.empty(table.shape[0], np.int64), rows.dtype.type(1)
    weights, places = np.empty(corners, rows.dtype), np.empty(corners, np.int64)
    for d in range(groups):
        for t in range(taps):
            begin(table, t, firsts)
            for o in np.ndindex(columns.shape[:3]):
                at[0], at[1], at[2] = o
                scale = mask[d, t, o[0], o[1], o[2]] if mask.size else unit
                moved = offset[d, t, :, o[0], o[1], o[2]]
                if np.isnan(moved).any():
                    continue
                locate(table, firsts, moved, at, scale, weights, places, fractions)
                for part in range(d * parts // groups, (d + 1) * parts // groups):
                    g, first = part * channels // each, part * channels % each
                    given = columns[o[0], o[1], o[2], g, t][first : first + channels]
                    for c in range(0, corners, 2):
                        one = rows[part, min(places[c], cells - 1)]
                        two = rows[part, min(places[c + 1], cells - 1)]
                        v, w = weights[c], weights[c + 1]
                        for i in range(channels):
                            one[i] += v * given[i]
                        for i in range(channels):
                            two[i] += w * given[i]


def compile_for(char: str) -> None:
    """Compile the loops for a type, unless they are in Numba's cache."""
    if char in _READY:
        return
    from numba import from_dtype, types  # noqa: PLC0415 - no name is imported above

    real = from_dtype(np.dtype(char))
    rows, columns = types.Array(real, 3, "C"), types.Array(real, 6, "C")
    table = types.Array(types.int64, 2, "C")
    given = [types.Array(real, n, "A", readonly=True, aligned=False) for n in (6, 5)]
    written = [types.Array(real, n, "A") for n in (6, 5)]
    loops: list[tuple[Any, list[Any]]] = [
        (sample_rows, []),
        (scatter_rows, []),
        (differentiate, written),
    ]
    with _LOCK:
        for loop, more in loops if char not in _READY else ():
            loop.disable_compile(val=False)
            loop.compile((rows, table, *given, columns, *more))
            loop.disable_compile()
        _READY.add(char)


def sample(
    grid: Any, rows: Array, offset: Array, mask: Array | None, columns: Array
) -> None:
    """See `cuconv.backends.cpu.deform.sample`."""
    compile_for(rows.dtype.char)
    sample_rows(rows, grid.table, *_in_three(grid, offset, mask, columns))


def gradients(
    grid: Any,
    rows: Array,
    offset: Array,
    mask: Array | None,
    columns: Array,
    doffset: Array | None,
    dmask: Array | None,
) -> None:
    """See `cuconv.backends.cpu.deform.gradients`."""
    compile_for(rows.dtype.char)
    operands = _in_three(grid, offset, mask, columns)
    rank, none = len(grid.axes), rows[:0, 0, 0]
    of_offset, of_mask = (
        none.reshape((0,) * (n + 3)) if a is None else _three(a, n, rank)
        for a, n in ((doffset, 3), (dmask, 2))
    )
    differentiate(rows, grid.table, *operands, of_offset, of_mask)


def scatter(
    grid: Any, rows: Array, offset: Array, mask: Array | None, columns: Array
) -> None:
    """See `cuconv.backends.cpu.deform.scatter`."""
    compile_for(rows.dtype.char)
    scatter_rows(rows, grid.table, *_in_three(grid, offset, mask, columns))


def _in_three(
    grid: Any, offset: Array, mask: Array | None, columns: Array
) -> tuple[Array, Array, Array]:
    """The operands of a loop, with three spatial axes."""
    rank = len(grid.axes)
    if mask is None:
        weighed = np.empty((0,) * 5, offset.dtype)
    else:
        weighed = _three(mask, 2, rank)
    return _three(offset, 3, rank), weighed, _three(columns, 0, rank)


def _three(array: Array, head: int, rank: int) -> Array:
    """View an array of ``head`` axes and spatial ones with three of those."""
    return array[(*(slice(None),) * head, *(None,) * (3 - rank))]
