"""Pooling by `pool.cu` and `pool_gradient.cu`: their struct, variants and launches."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cuconv.arrays import Array, DType, accumulator
from cuconv.backends.cuda.structs import (
    MOST_THREADS,
    axis_type,
    divisor,
    divisor_type,
    packed_axis,
    reach_of,
    spans_of,
    steps_of,
    struct,
)
from cuconv.engine.pool_problem import MAXIMUM, MEAN, NORM, TAKE, PoolProblem
from cuconv.geometry import Axis

RANK = 3
_KINDS = {MAXIMUM: 0, MEAN: 1, NORM: 2, TAKE: 3}
_NO_AXIS = Axis(size=1, kernel=1, stride=1, dilation=1, before=0, after=0)
_WORDS = {"b": "word", "u": "word", "i": "signed"}
# What a gradient that is given indices reads of x.
_NO_VALUE = np.dtype(np.uint8)


@lru_cache(maxsize=2)
def POOL(*, wide: bool) -> DType:  # noqa: N802 - names the C struct
    """The type of ``struct Pool``."""
    index = "i8" if wide else "i4"
    own = ("end", "low", "high", "is_even", "other_x", "other_y")
    axis = np.dtype(
        [("windows", axis_type(index, index)), *((name, index) for name in own)],
        align=True,
    )
    counts = ("images", "channels", "items", "channels_fastest")
    steps = ("x_image", "x_channel", "y_image", "y_channel")
    others = ("other_x_image", "other_x_channel", "other_y_image", "other_y_channel")
    return np.dtype(
        [
            *((name, index) for name in (*counts, *steps, *others)),
            ("by_channels", divisor_type(index)),
            *((f"index_{name}", "i8") for name in ("step", "image", "channel")),
            *((name, "f8") for name in ("divisor", "norm", "least")),
            ("axis", axis, (RANK,)),
        ],
        align=True,
    )


class PoolLaunch(NamedTuple):
    """What a pooling kernel is launched with."""

    packed: Array
    items: int
    wide: bool


def pack_pool(
    problem: PoolProblem,
    x: Array,
    y: Array,
    other_x: Array | None = None,
    other_y: Array | None = None,
) -> PoolLaunch:
    """Pack x and y, or dx and dy, with up to one other array like either."""
    axes = (_NO_AXIS,) * (RANK - problem.geometry.rank) + problem.geometry.axes
    own = problem.is_gradient
    x_steps, y_steps, *others = (_steps(a) for a in (x, y, other_x, other_y))
    sizes, outs = (
        tuple(getattr(a, "out" if i else "size") for a in axes) for i in (0, 1)
    )
    items = x.size if own else y.size
    firsts = tuple(-axis.before for axis in axes)
    spans = spans_of(axes, firsts, sizes, outs)
    far = max(
        *(reach_of((*x.shape[:2], *spans), s) for s in (x_steps, others[0])),
        *(reach_of((*y.shape[:2], *outs), s) for s in (y_steps, others[1])),
        *(items + MOST_THREADS, problem.geometry.cells),
        *(abs(end) for axis in axes for end in axis.counted(padding=True)),
    )
    wide = far >= 2**31
    planes, packed_axes = 1, []
    for r in reversed(range(RANK)):
        axis, steps = axes[r], (x_steps[2 + r], planes, y_steps[2 + r])
        lengths = axis.size, axis.out, -axis.before
        counted = axis.counted(padding=problem.counts_padding)
        more = axis.end, *counted, int(axis.windows > 0), *(s[2 + r] for s in others)
        packed_axes.append((packed_axis(axis, lengths, steps), *more))
        planes *= axis.size
    fastest = _channels_are_closer(x if own else y)
    value = (
        *(*y.shape[:2], items, int(fastest)),
        *(step for s in (x_steps, y_steps, *others) for step in s[:2]),
        divisor(y.shape[1]),
        *problem.index_steps,
        *(problem.divisor or 0, problem.norm, _least(problem.result)),
        packed_axes[::-1],
    )
    return PoolLaunch(struct(value, POOL(wide=wide)), items, wide)


def _steps(array: Array | None) -> tuple[int, ...]:
    """Steps in elements along images, channels and three axes."""
    if array is None:
        return (0,) * (2 + RANK)
    steps = steps_of(array)
    return (*steps[:2], *(0,) * (2 + RANK - len(steps)), *steps[2:])


def _channels_are_closer(array: Array) -> bool:
    pairs = zip(array.shape[2:], array.strides[2:], strict=True)
    cells = [abs(stride) for size, stride in pairs if size > 1]
    step = abs(array.strides[1])
    return bool(array.shape[1] > 1 and step < min(cells, default=0))


def _least(dtype: DType) -> float:
    if dtype.kind in "iu":
        return float(np.iinfo(dtype).min)
    return 0.0 if dtype.kind == "b" else -np.inf


class PoolTypes(NamedTuple):
    """The types of x or dy, of sums, of the result, and of what a kernel compares."""

    source: DType
    sums: DType
    result: DType
    values: DType = _NO_VALUE

    @classmethod
    def of(cls, problem: PoolProblem) -> "PoolTypes":
        if problem.kind == TAKE:
            return cls.of_words(problem.result)
        sums = accumulator(problem.accumulate)
        values = problem.values if problem.is_gradient else problem.source
        return cls(problem.source, sums, problem.result, values or _NO_VALUE)

    @classmethod
    def of_words(cls, dtype: DType) -> "PoolTypes":
        """Elements that are copied, of whichever type."""
        return cls(*(np.dtype(f"V{dtype.itemsize}"),) * 3)


def pool_macros(kind: str, types: PoolTypes, *, wide: bool) -> tuple[str, ...]:
    """The macros of `pool` or `pool_gradient` for these types."""
    values = types.values if kind == MAXIMUM else types.source
    return (
        f"KIND={_KINDS[kind]}",
        *(f"ELEMENT={_name(types.source)}", f"SUM={_name(types.sums)}"),
        *(f"RESULT={_name(types.result)}", f"VALUE={_name(values)}"),
        *(f"WIDE_INDEX={int(wide)}", f"POOL_BYTES={POOL(wide=wide).itemsize}"),
    )


def _name(dtype: DType) -> str:
    is_word = dtype.kind == "V" and dtype.type is np.void
    word = "word" if is_word else _WORDS.get(dtype.kind)
    return f"{dtype.name}_t" if word is None else f"{word}{dtype.itemsize}_t"


def pool_variants(
    dtypes: Sequence[DType], *, wide: bool
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Kernel and macros for results of the type that they have by default."""
    for kernel, kind, types in _usual(dtypes):
        yield kernel, pool_macros(kind, types, wide=wide)
    for dtype in dtypes:
        yield "pool", pool_macros(TAKE, PoolTypes.of_words(dtype), wide=wide)


def _usual(dtypes: Iterable[DType]) -> Iterator[tuple[str, str, PoolTypes]]:
    for dtype in dtypes:
        mean = np.dtype(np.float64) if dtype.kind in "biu" else dtype
        own = PoolTypes(dtype, accumulator(dtype), dtype)
        yield "pool", MEAN, PoolTypes(dtype, accumulator(mean), mean)
        if dtype.kind != "b":
            yield "pool_gradient", MAXIMUM, own
        if dtype.kind != "c":
            yield "pool", MAXIMUM, own._replace(values=dtype)
        if dtype.kind in "fcV":
            yield "pool_gradient", MEAN, own
        if dtype.kind in "fV":
            yield "pool_gradient", MAXIMUM, own._replace(values=dtype)
            for kernel in ("pool", "pool_gradient"):
                yield kernel, NORM, own
