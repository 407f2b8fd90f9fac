"""The structs of the kernels, packed on the host.

A kernel takes its geometry as one value: a NumPy array of one structured item, which
CuPy passes by value.  ``GEOMETRY_BYTES`` lets the compiler check that both sides agree.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuconv.arrays import Array, DType
from cuconv.geometry import Axis

# Threads of a launch at most: the grid stride must not carry an index past 2^31.
MOST_THREADS = 2**24
# Images, groups, channels, planes, and tiles along two axes.
DIGITS = 6

_MATRIX = np.dtype([(name, "i8") for name in ("image", "group", "row", "column")])
PRODUCT = np.dtype(
    [(name, "i8") for name in ("groups", "rows", "columns", "inner", "tiles", "add")]
    + [(name, _MATRIX) for name in ("a", "b", "out")]
)
_WALK = np.dtype(
    [
        *[
            ("count", "i8"),
            ("x_base", "i8"),
            ("x_step", "i8", 4),
            ("own_step", "i8", 4),
        ],
        *[("radix", "i4", 4), ("advance", "i4", 4)],
        *[("scale", "i4", 3), ("first", "i4", 3)],
        *[("first_fastest", "i4"), ("reserved", "i4")],
    ]
)
_STEPS = (
    *("part_length", "part_step", "x_group", "dense_group", "out_group"),
    *("dense_step", "out_step", "bias_step"),
)
_COUNTS = "tiles_f", "tiles_p", "groups", "filters", "has_bias"
CONTRACTION = np.dtype(
    [
        *[("p", _WALK), ("r", _WALK)],
        *[(name, "i8") for name in _STEPS],
        *[(name, "u4") for name in _COUNTS],
        *[("size", "i4", 3), ("along_filters", "i4"), ("reserved", "i4")],
    ]
)


@lru_cache(maxsize=64)
def GEOMETRY(rank: int, *, wide: bool) -> DType:  # noqa: N802 - names the C struct
    """The type of ``struct Geometry``."""
    index, divisor = _index_types(wide=wide)
    lengths = ("size", "out", "kernel", "stride", "dilation", "first")
    steps = ("x_step", "tap_step", "out_step")
    axis = np.dtype(
        [(name, index) for name in (*lengths, *steps)]
        + [(name, divisor) for name in ("by_size", "by_out", "by_stride")],
        align=True,
    )
    heads = ("images", "groups", "channels")
    x_steps = ("x_image", "x_group", "x_channel")
    c_steps = ("c_image", "c_group", "c_channel")
    return np.dtype(
        [(name, index) for name in (*heads, *x_steps, *c_steps, "items", "fastest")]
        + [("by_groups", divisor), ("by_channels", divisor), ("axis", axis, (rank,))],
        align=True,
    )


@lru_cache(maxsize=64)
def TRANSFORM(element: DType, rows: int, columns: int, *, wide: bool) -> DType:  # noqa: N802 - names the C struct
    """The type of ``struct Transform``."""
    index, divisor = _index_types(wide=wide)
    steps = ("source", "target", "bias", "plane", "row", "column")
    digit = np.dtype([*((name, index) for name in steps), ("by", divisor)], align=True)
    names = ("first", "row_step", "column_step", "tall", "wide", "is_array")
    side = np.dtype([(name, index) for name in names], align=True)
    places = ("plane", "row", "column", "planes", "rows", "columns")
    return np.dtype(
        [
            *((name, index) for name in ("items", "adds_bias", *places)),
            *((name, side) for name in ("source", "target")),
            ("digit", digit, (DIGITS,)),
            ("left", element, (rows, rows)),
            ("right", element, (columns, columns)),
        ],
        align=True,
    )


def _index_types(*, wide: bool) -> tuple[str, DType]:
    """The types of an index and of ``struct Divisor``."""
    index = "i8" if wide else "i4"
    fields = [("value", index), ("multiplier", "u4"), ("shift", "u4")]
    return index, np.dtype(fields, align=True)


class Launch(NamedTuple):
    """What a kernel between x and its columns is launched with."""

    geometry: Array
    items: int
    wide: bool


def divisor(value: int) -> tuple[int, int, int]:
    """A divisor with its multiplier and shift; see ``struct Divisor``."""
    shift = max((value - 1).bit_length() - 1, 0)
    if not 1 < value < 2**31:
        return value, 0, 0
    return value, -(-(2 ** (32 + shift)) // value), shift


def steps_of(array: Array) -> tuple[int, ...]:
    """Strides in elements."""
    size = array.dtype.itemsize
    if any(stride % size for stride in array.strides):
        raise ValueError(
            f"strides {array.strides} are not multiples of the item size {size}"
        )
    return tuple(stride // size for stride in array.strides)


def pack(
    x: Array,
    columns: Array,
    axes: tuple[Axis, ...],
    firsts: tuple[int, ...],
    *,
    over_output: bool,
) -> Launch:
    """Pack the geometry of x (N, G, C, *cells) and columns (N, G, C, *kernel, *out).

    ``firsts`` is, along each axis, the cell of ``x`` under tap 0 of the first output
    of ``columns``.  One item per channel and output position, or per cell of x.
    """
    rank = len(axes)
    cells, out = x.shape[3:], columns.shape[3 + rank :]
    x_steps, c_steps = steps_of(x), steps_of(columns)
    items = math.prod((*x.shape[:3], *(out if over_output else cells)))
    wide = items + MOST_THREADS >= 2**31 or _reach(x, columns, axes, firsts) >= 2**31
    fastest = (
        abs(c_steps[2]) < abs(c_steps[-1])
        if over_output
        else (abs(x_steps[2]) < abs(x_steps[-1]))
    )
    packed_axes = [
        (
            *(cells[i], out[i], axis.kernel, axis.stride, axis.dilation, firsts[i]),
            *(x_steps[3 + i], c_steps[3 + i], c_steps[3 + rank + i]),
            *(divisor(cells[i]), divisor(out[i]), divisor(axis.stride)),
        )
        for i, axis in enumerate(axes)
    ]
    head = (*x.shape[:3], *x_steps[:3], *c_steps[:3], items, int(fastest))
    by = divisor(x.shape[1]), divisor(x.shape[2])
    value: Any = (*head, *by, packed_axes)
    return Launch(np.array([value], dtype=GEOMETRY(rank, wide=wide)), items, wide)


def _reach(
    x: Array, columns: Array, axes: tuple[Axis, ...], firsts: tuple[int, ...]
) -> int:
    """The largest number that a kernel computes on the way to an address."""
    rank = len(axes)
    x_steps, c_steps = steps_of(x), steps_of(columns)
    out = columns.shape[3 + rank :]
    spans = [
        # Coordinates run through the padding, on either side of the cells.
        max(abs(first), abs(first) + outs * axis.stride + axis.extent, size)
        for axis, first, outs, size in zip(axes, firsts, out, x.shape[3:], strict=True)
    ]
    x_sizes = (*x.shape[:3], *spans)
    reach: int = max(
        sum(n * max(abs(s), 1) for n, s in zip(x_sizes, x_steps, strict=True)),
        sum(n * max(abs(s), 1) for n, s in zip(columns.shape, c_steps, strict=True)),
    )
    return reach
