"""The structs of the kernels, packed on the host.

A kernel takes its geometry as one value: a NumPy array of one structured item, which
CuPy passes by value.  ``GEOMETRY_BYTES`` lets the compiler check that both sides agree.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuconv.arrays import Array, DType, alignment_of, strided
from cuconv.backends.cuda.vector_width import VectorWidth
from cuconv.backends.padding import Reading
from cuconv.geometry import Axis

# The most threads of a launch: an index plus the grid stride must stay below 2^31.
MOST_THREADS = 2**24
# Images, groups, channels, planes, and tiles along two axes.
DIGITS = 6
_SINGLE = VectorWidth()

_MATRIX = np.dtype([(name, "i8") for name in ("image", "group", "row", "column")])
PRODUCT = np.dtype(
    [(name, "i8") for name in ("groups", "rows", "columns", "inner", "tiles", "add")]
    + [(name, _MATRIX) for name in ("a", "b", "out")]
)
_COUNTS_OF_MATRICES = "groups", "rows", "columns", "tiles"
_STEPS_OF_MATRICES = tuple(
    f"{side}_{step}" for side in ("in", "out") for step in ("image", "group", "row")
)
MATRICES = np.dtype(
    [(name, "i8") for name in (*_COUNTS_OF_MATRICES, *_STEPS_OF_MATRICES)]
)
_MIXED_RADIX = np.dtype(
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
_TAPS = np.dtype(
    [(name, "i4") for name in ("size", "taps", "bit", "dilation")]
    + [(name, "u4") for name in ("multiplier", "shift")]
)
CONTRACTION = np.dtype(
    [
        *[("p", _MIXED_RADIX), ("r", _MIXED_RADIX)],
        *[(name, "i8") for name in _STEPS],
        *[(name, "u4") for name in _COUNTS],
        *[("along_filters", "i4"), ("is_packed", "i4")],
        *[("axis", _TAPS, 3), ("reserved", "i4")],
    ]
)


def struct(value: Any, dtype: DType) -> Array:
    """Pack a kernel's argument of this type, as bytes.

    At each launch CuPy asks for the ``__array_interface__``, in which NumPy would list
    the fields: 20 µs for most structs of ours on a Xeon, where plain bytes take 0.8.
    """
    return np.array([value], dtype).view(f"V{dtype.itemsize}")


def divisor_type(index: str) -> DType:
    """The type of ``struct Divisor``."""
    fields = [("value", index), ("multiplier", "u4"), ("shift", "u4")]
    return np.dtype(fields, align=True)


def axis_type(index: str, cell: str) -> DType:
    """The type of ``struct Axis``."""
    divisor = divisor_type(cell)
    lengths = ("size", "out", "kernel", "stride", "dilation", "first")
    steps = ("x_step", "tap_step", "out_step")
    apart = ("by_dilation", "by_common", "by_tap_apart", "by_out_apart")
    return np.dtype(
        [
            *((name, cell) for name in lengths),
            *((name, index) for name in steps),
            ("inverse", cell),
            *((name, divisor) for name in ("by_size", "by_out", *apart)),
        ],
        align=True,
    )


@lru_cache(maxsize=64)
def GEOMETRY(rank: int, *, wide: bool) -> DType:  # noqa: N802 - names the C struct
    """The type of ``struct Geometry``."""
    index = "i8" if wide else "i4"
    divisor, axis = divisor_type(index), axis_type(index, index)
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
    index = "i8" if wide else "i4"
    divisor = divisor_type(index)
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


@lru_cache(maxsize=8)
def DEFORM(rank: int, *, wide: bool) -> DType:  # noqa: N802 - names the C struct
    """The type of ``struct Deform``."""
    index = "i8" if wide else "i4"
    names = "image", "group", "tap", "axis"
    fields = [*((name, index) for name in names), ("out", index, (rank,))]
    steps = np.dtype(fields, align=True)
    numbers = "each", "x_channel", "c_channel", "group_channels", "offset_channels"
    return np.dtype(
        [
            ("g", GEOMETRY(rank, wide=wide)),
            *((name, index) for name in (*numbers, "last")),
            ("taps", index, (rank,)),
            ("by_offset_channels", divisor_type(index)),
            *((name, steps) for name in ("offset", "mask", "doffset", "dmask")),
        ],
        align=True,
    )


class Launch(NamedTuple):
    """The arguments of a kernel between x and its columns."""

    geometry: Array
    items: int
    wide: bool
    width: VectorWidth


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
    width: VectorWidth = _SINGLE,
    largest: int = 0,
) -> Launch:
    """Pack the geometry of x (N, G, C, *spatial) and columns (N, G, C, *kernel, *out).

    ``firsts`` is, along each axis, the element of ``x`` under tap 0 of the first output
    of ``columns``.  One item per vector of channels and output positions, or per
    element of x.  With a wide index there are no vectors; ``largest`` is a number that
    the kernel computes beside those of the geometry.
    """
    rank = len(axes)
    cells, out = x.shape[3:], columns.shape[3 + rank :]
    x_steps, c_steps = steps_of(x), steps_of(columns)
    items = math.prod((*x.shape[:3], *(out if over_output else cells)))
    largest = max(largest, items + MOST_THREADS, _reach(x, columns, axes, firsts))
    wide = largest >= 2**31
    fastest = (
        abs(c_steps[2]) < abs(c_steps[-1])
        if over_output
        else (abs(x_steps[2]) < abs(x_steps[-1]))
    )
    if wide:
        width = _SINGLE
    channels = x.shape[2] // width.channels
    x_steps, c_steps = (_in_vectors(s, width.channels) for s in (x_steps, c_steps))
    items //= width.channels * width.positions
    lengths = zip(cells, out, firsts, strict=True)
    steps = zip(x_steps[3:], c_steps[3 : 3 + rank], c_steps[3 + rank :], strict=True)
    at_once = (*(1,) * (rank - 1), width.positions)
    packed_axes = list(map(packed_axis, axes, lengths, steps, at_once))
    head = (*x.shape[:2], channels, *x_steps[:3], *c_steps[:3], items, int(fastest))
    by = divisor(x.shape[1]), divisor(channels)
    packed = struct((*head, *by, packed_axes), GEOMETRY(rank, wide=wide))
    return Launch(packed, items, wide, width)


def pack_windows(
    cells: Array,
    copied: Array,
    reading: Reading,
    *,
    over_output: bool,
) -> Launch:
    """Pack an array (N, G, C, *spatial) and the padded copy that windows read.

    One item per element of the copy, or of the array.
    """
    each = tuple(Axis(axis.size, 1, 1, 1, 0, 0) for axis in reading.axes)
    firsts = tuple(start for start, _ in reading.windows)
    columns = copied[(slice(None),) * 3 + (None,) * len(each)]
    # Reflection has a period of up to two axes.
    spans = zip(reading.axes, reading.windows, strict=True)
    largest = max(2 * axis.size + max(map(abs, span)) for axis, span in spans)
    return pack(cells, columns, each, firsts, over_output=over_output, largest=largest)


def copied_as_columns(source: Array, target: Array) -> tuple[Array, Array] | None:
    """View arrays as x (N, G, C, *spatial) and its columns under a single tap.

    Axes that are contiguous in both are merged.  The innermost axis of the target is
    the last, or the channels if it is contiguous in both: vectors are read then too.
    None for arrays that the kernel cannot copy: of two types, at odd addresses, or with
    more axes than it has.
    """
    item, arrays = target.itemsize, (source, target)
    odd = any(
        alignment_of(a) % min(item, 8) or any(s % item for s in a.strides)
        for a in arrays
    )
    if source.dtype != target.dtype or odd:
        return None
    pairs = zip(source.shape, source.strides, strict=True)
    moves = [0 if size == 1 else step for size, step in pairs]
    moves = [0] * (target.ndim - source.ndim) + moves
    axes = zip(target.shape, moves, target.strides, strict=True)
    merged: list[tuple[int, ...]] = []
    for size, *steps in sorted(axes, key=lambda axis: -abs(axis[2])):
        if merged and merged[-1][1:] == tuple(size * step for step in steps):
            merged[-1] = size * merged[-1][0], *steps
        elif size != 1:
            merged.append((size, *steps))
    channel = merged.pop() if merged and merged[-1][1:] == (item,) * 2 else (1, 0, 0)
    outer = [(1, 0, 0)] * (3 - len(merged)) + merged
    shape, *strides = zip(*outer[:2], channel, *outer[2:], strict=True)
    if len(shape) > 6:
        return None
    x, columns = (strided(a, shape, s) for a, s in zip(arrays, strides, strict=True))
    return x, columns[(slice(None),) * 3 + (None,) * (len(outer) - 2)]


def _in_vectors(steps: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Steps in vectors of several channels, which are contiguous."""
    if channels == 1:
        return steps
    return (*(s // channels for s in steps[:2]), 1, *(s // channels for s in steps[3:]))


def packed_axis(
    axis: Axis,
    lengths: tuple[int, int, int],
    steps: tuple[int, int, int],
    at_once: int = 1,
) -> tuple[Any, ...]:
    """``struct Axis`` for these lengths: input, output, index of the first element.

    An item is several outputs ``at_once``.
    """
    size, out, first = lengths
    stride, dilation = _strides(axis, out)
    common = math.gcd(stride, dilation)
    apart = stride // common, dilation // common
    inverse = pow(apart[1], -1, apart[0])
    by = size, out // at_once, dilation, common, *apart
    numbers = size, out, axis.kernel, stride, dilation, first, *steps, inverse
    return (*numbers, *map(divisor, by))


def _strides(axis: Axis, out: int) -> tuple[int, int]:
    """Stride and dilation; 1 where they move nothing: one output, one tap."""
    return axis.stride if out > 1 else 1, axis.dilation if axis.kernel > 1 else 1


def spans_of(
    axes: tuple[Axis, ...],
    firsts: Sequence[int],
    sizes: Sequence[int],
    outs: Sequence[int],
) -> list[int]:
    """The largest coordinate of x along each axis that a kernel computes.

    Coordinates include the padding on either side; a residue of the stride is
    multiplied by an inverse below the stride.
    """
    spans = []
    for axis, first, size, out in zip(axes, firsts, sizes, outs, strict=True):
        stride, dilation = _strides(axis, out)
        reach = max(size, out * stride + axis.extent)
        spans.append(max(abs(first) + reach, stride**2 if dilation > 1 else 0))
    return spans


def reach_of(shape: Sequence[int], steps: Sequence[int]) -> int:
    """The largest offset into an array of this shape."""
    return sum(n * max(abs(s), 1) for n, s in zip(shape, steps, strict=True))


def _reach(
    x: Array, columns: Array, axes: tuple[Axis, ...], firsts: tuple[int, ...]
) -> int:
    """The largest number that a kernel computes for an address."""
    outs = columns.shape[3 + len(axes) :]
    spans = spans_of(axes, firsts, x.shape[3:], outs)
    return max(
        reach_of((*x.shape[:3], *spans), steps_of(x)),
        reach_of(columns.shape, steps_of(columns)),
    )
