"""Pooling over NumPy arrays axis by axis: sums, means, and what all poolings share.

A maximum or a sum over a box of elements is one over each of its sides in turn: 3 + 3
passes in place of 9.  Every pass goes tap by tap over strided views, all outputs at
once, so that nothing is padded and no column is made; where windows are longer than
there are outputs, it goes output by output.  Gradients of sums go the same way back.

The outermost axis comes first, while the elements of a row are still neighbours.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from cuconv.arrays import (
    Array,
    ArrayStub,
    DType,
    is_half,
    merged_stride,
    stored,
    strided,
)
from cuconv.engine.pool_problem import PoolInputs, PoolProblem, PoolTiling
from cuconv.geometry import Block, Range, Ranges, Region, WindowGeometry
from cuconv.memory import Buffer

# Numbers that are counted up at a time.
_STRIP = 1024
# The most numbers that a step takes as an array of its own, made beforehand.
MOST_NUMBERS = 512

# Windows of fewer cells along the last axis are slower than two passes, where there are
# more cells than this: (1, 64, 112, 112), 2×2, 1.6 ms and 1.1.
_RUN, _WHOLE = 4, 2**14

# Adding so few cells one by one is faster than a sum over an axis, and in its order:
# NumPy sums eight and more by pairs.  Windows of 13 cells to 6: 4.6 ms and 0.9.
_SHORT, _FEW_OUTPUTS = 8, 16
# `numpy.einsum` sums runs of 49 floats in a third of the time, and longer ones less
# exactly.
_SHORT_RUN = 1024

Do: TypeAlias = Callable[..., None]
Buffers: TypeAlias = dict[str, Array]


def run_now(function: Callable[..., Any], *operands: Any) -> None:
    """Do what others record: see `PoolWorker`."""
    function(*operands)


def _maximum(one: Array, two: Array, out: Array) -> None:
    np.maximum(one, two, out=out)  # NumPy warns of three positional arguments


def _quiet(function: Callable[..., Any]) -> Callable[..., None]:
    """A function of halves: bfloat16 takes it for a mistake to compare with a NaN."""

    def call(*operands: Any) -> None:
        with np.errstate(invalid="ignore"):
            function(*operands)

    return call


def comparing(function: Callable[..., Any], dtype: DType) -> Callable[..., Any]:
    """A function that compares values of this type."""
    return _quiet(function) if is_half(dtype) else function


class Reduction(NamedTuple):
    """What is made of two arrays, of an axis, and what of none."""

    pair: Callable[..., Any]
    axis: Callable[..., Any]
    start: Any

    @classmethod
    def to_maxima(cls, dtype: DType) -> "Reduction":
        pair, axis = (comparing(f, dtype) for f in (_maximum, np.maximum.reduce))
        return cls(pair, axis, _least(dtype))


SUM = Reduction(np.add, np.add.reduce, 0)


def _least(dtype: DType) -> Any:
    """What every value of a type is at least."""
    if dtype.kind in "iu":
        return np.iinfo(dtype).min
    return False if dtype.kind == "b" else -np.inf


class PoolWorker:
    """One worker of a pooling: its problem and its buffers.

    Everything that is done with arrays goes through ``do``, on stubs too: what depends
    on their values is inside one function.
    """

    def __init__(self, problem: PoolProblem, buffers: Buffers, do: Do) -> None:
        self._problem = problem
        self._geometry = problem.geometry
        self._buffers = buffers
        self._do = do

    @classmethod
    def buffers(cls, problem: PoolProblem, tiling: PoolTiling) -> tuple[Buffer, ...]:
        """What one worker needs for a piece."""
        head = tiling.tile.images * tiling.channels
        needed = cls._backward_buffers if problem.is_gradient else cls._forward_buffers
        return tuple(needed(problem, head, tiling.tile.cells))

    @classmethod
    def _forward_buffers(
        cls, problem: PoolProblem, head: int, outputs: Sequence[int]
    ) -> Iterator[Buffer]:
        """Buffers for so many outputs of ``head`` planes."""
        inner_first = problem.with_indices
        *sizes, _ = pass_sizes(problem, head, outputs, inner_first=inner_first)
        yield from _stages(problem, sizes)
        if problem.result != problem.accumulate or problem.is_search:
            yield Buffer("y", head * math.prod(outputs), problem.accumulate)

    @classmethod
    def _backward_buffers(
        cls, problem: PoolProblem, head: int, cells: Sequence[int]
    ) -> Iterator[Buffer]:
        """Buffers for the gradient of so many elements of ``head`` planes."""
        reached = reach_of(problem, cells)
        sizes = list(_sizes(problem.geometry, head, reached, cells, inner_first=True))
        yield from _stages(problem, sizes[:-1])
        yield Buffer("share", head * math.prod(reached), problem.accumulate)
        if problem.result != problem.accumulate:
            yield Buffer("sum", head * math.prod(cells), problem.accumulate)

    def reduce(
        self, block: Block, span: Range, window: Array, y: Array, indices: Array | None
    ) -> None:
        """Reduce one block of windows of some channels, to ``y`` and ``indices``."""
        target = y if y.dtype == self._problem.accumulate else self._view("y", y.shape)
        self._reduce_to(block, span, window, target, indices)
        if target is not y:
            self._copy(target, y)

    def _reduce_to(
        self, block: Block, span: Range, x: Array, y: Array, indices: Array | None
    ) -> None:
        """Reduce to an array of the type of sums."""
        raise NotImplementedError

    def backward(
        self, region: Region, given: PoolInputs, span: Range, dx: Array
    ) -> None:
        """Write the gradient of one region of elements."""
        target = dx if self._takes_sums(dx) else self._view("sum", dx.shape)
        self._backward_to(region, given, span, target)
        if target is not dx:
            self._copy(target, dx)

    def _takes_sums(self, dx: Array) -> bool:
        """Whether sums can be written to this array in place."""
        return bool(dx.dtype == self._problem.accumulate)

    def _backward_to(
        self, region: Region, given: PoolInputs, span: Range, target: Array
    ) -> None:
        """Write the gradient to an array of the type of sums."""
        raise NotImplementedError

    def _copy(self, source: Any, target: Array) -> None:
        """Copy with a cast."""
        self._do(np.ndarray.__setitem__, target, ..., source)

    def _sweep(
        self,
        step: Reduction,
        block: Block,
        source: Array,
        target: Array,
        indices: Array | None = None,
    ) -> list[Array]:
        """Reduce axis by axis, the last time to ``target``; what each pass has read.

        And the target, last.
        """
        cells = None
        if indices is None and (step is not SUM or self._sums_alike(source)):
            cells = self._single(block.output, block.window)
        if cells is not None:
            axes, part = tuple(range(2, source.ndim)), source[(..., *cells)]
            if step is SUM and _is_short_run(source, part, target):
                flat = part.reshape(*part.shape[:2], -1)
                self._do(_sum_runs, flat, target.reshape(target.shape[:2]))
                return [source, target]
            how = axes, target.dtype, target, True, step.start
            self._do(step.axis, part, *how)
            return [source, target]
        seen, order = [source], {"inner_first": indices is not None}
        for axis, into in self._stages(source, block.shape, target, **order):
            self._reduce(step, seen[-1], into, axis, block)
            seen.append(into)
        return seen

    def _stages(
        self,
        source: Array,
        shape: Sequence[int],
        target: Array,
        *,
        inner_first: bool,
    ) -> Iterator[tuple[int, Array]]:
        """The axis of every pass, and what it writes: the last one the target."""
        *passes, last = passes_of(self._geometry, inner_first=inner_first)
        sizes = list(source.shape)
        for number, axis in enumerate(passes):
            sizes[2 + axis] = shape[axis]
            yield axis, self._view(f"stage{number}", sizes)
        yield last, target

    def _sums_alike(self, source: Array) -> bool:
        """Whether pieces of any size take sums over all axes in one order.

        They do where the whole call has one output in a plane, and planes are runs of
        memory; elsewhere NumPy's order depends on how many channels a piece has.
        """
        rank = self._geometry.rank
        run = merged_stride(source.shape[-rank:], source.strides[-rank:])
        return self._geometry.positions == 1 and run == source.itemsize

    def _single(self, outputs: Ranges, cells: Ranges) -> tuple[slice, ...] | None:
        """The cells under the only output of each axis; None if there are more."""
        if any(stop - start != 1 for start, stop in outputs):
            return None
        each = zip(self._geometry.axes, outputs, cells, strict=True)
        return tuple(axis.cells_under(first, span) for axis, (first, _), span in each)

    def _reduce(
        self,
        step: Reduction,
        source: Array,
        into: Array,
        axis: int,
        block: Block,
    ) -> None:
        """Reduce one axis."""
        windows, outputs = self._geometry.axes[axis], block.output[axis]
        everywhere = slice(0, outputs[1] - outputs[0])
        by_tap = windows.goes_by_tap(everywhere.stop)
        first = None
        if by_tap:
            meetings = windows.meetings(outputs, block.window[axis])
            first = next((m for m in meetings if m.outputs == everywhere), None)
        # What the result begins with, as long as it has not been written.
        seed = None if first is None else source[along(axis, first.cells)]
        if seed is None:
            self._do(np.ndarray.fill, into, step.start)
        for meeting in windows.meetings(outputs, block.window[axis]):
            part = source[along(axis, meeting.cells)]
            place = into[along(axis, meeting.outputs)]
            if (
                not by_tap
                and everywhere.stop <= _FEW_OUTPUTS
                and (1 < part.shape[2 + axis] < _SHORT and part.dtype == into.dtype)
            ):
                self._reduce_short(step, part, place, axis)
            elif not by_tap:
                self._do(step.axis, part, 2 + axis, into.dtype, place, True)  # noqa: FBT003
            elif meeting != first:
                both = meeting.outputs == everywhere and part.dtype == into.dtype
                if seed is not None and both:
                    self._do(step.pair, seed, part, into)
                else:
                    if seed is not None:
                        self._copy(seed, into)
                    self._do(step.pair, place, part, place)
                seed = None
        if seed is not None:
            self._copy(seed, into)

    def _reduce_short(
        self, step: Reduction, part: Array, place: Array, axis: int
    ) -> None:
        """Reduce few cells along an axis, in the order in which NumPy would."""
        cells = (slice(i, i + 1) for i in range(part.shape[2 + axis]))
        first, second, *others = (part[along(axis, cell)] for cell in cells)
        self._do(step.pair, first, second, place)
        for other in others:
            self._do(step.pair, place, other, place)

    def _numbers(self, buffer: Array, start: int, step: int, total: int = 0) -> Array:
        """Count up in a buffer, or in an array made now where that is short."""
        count = buffer.shape[0]
        if count > MOST_NUMBERS:
            self._do(_count_up, buffer, start, step, total)
            return buffer
        numbers = np.empty(count, buffer.dtype)
        _count_up(numbers, start, step, total)
        return numbers

    def _readable(self, region: Region) -> Ranges:
        """The cells of a region that windows may read: negative padding crops."""
        each = zip(self._geometry.axes, region.cells, strict=True)
        return tuple((a, max(a, min(b, axis.end))) for axis, (a, b) in each)

    def _sweep_back(self, region: Region, source: Array, target: Array) -> None:
        """Give to every cell what the windows over it hold, axis by axis."""
        readable = self._readable(region)
        single = self._single(region.output, readable)
        if single is not None:
            place = target[(..., *single)]
            if place.shape != target.shape:
                self._do(np.ndarray.fill, target, 0)
            self._copy(source, place)
            return
        if self._give_apart(region, readable, source, target):
            return
        sizes = [stop - start for start, stop in region.cells]
        for axis, into in self._stages(source, sizes, target, inner_first=True):
            self._do(np.ndarray.fill, into, 0)
            windows = self._geometry.axes[axis]
            for meeting in windows.meetings(region.output[axis], readable[axis]):
                place = into[along(axis, meeting.cells)]
                part = source[along(axis, meeting.outputs)]
                self._do(np.add, place, part, place)
            source = into

    def _give_apart(
        self, region: Region, readable: Ranges, source: Array, target: Array
    ) -> bool:
        """Give at once what windows hold that share no cell; false where some do."""
        axes = self._geometry.axes
        inside = [
            axis.apart(*both)
            for axis, *both in zip(axes, region.output, readable, strict=True)
        ]
        is_short = self._geometry.kernel[-1] < _RUN and self._geometry.channels_first
        is_slow = is_short and target.size > _WHOLE
        if source.dtype.kind == "V" or is_slow or not all(inside):
            return False
        under = target[(..., *(slice(*each) for each in inside if each))]
        head, spatial = under.strides[:2], under.strides[2:]
        steps = [s * axis.stride for s, axis in zip(spatial, axes, strict=True)]
        shape = (*source.shape, *self._geometry.kernel)
        cells = strided(under, shape, (*head, *steps, *spatial))
        apart = (*source.strides, *(0,) * len(axes))
        given = strided(source, shape, apart)
        if cells.size < target.size:
            self._do(np.ndarray.fill, target, 0)
        # A sum, of which there is no other term: -0 becomes 0.
        self._do(np.add, given, np.zeros((), source.dtype), cells)
        return True

    def _view(self, name: str, shape: Sequence[int]) -> Array:
        """A buffer as (N, C, *spatial), in the axis order of the layout."""
        head = (shape[0], 1, shape[1])
        first = self._geometry.channels_first
        return stored(
            self._buffers[name], head, (), tuple(shape[2:]), channels_first=first
        ).cells[:, 0]


def _is_short_run(source: Array, part: Array, target: Array) -> bool:
    """True if planes are sums of few floats that follow each other in memory."""
    same = source.dtype == target.dtype and target.dtype.char in "fd"
    size = math.prod(part.shape[2:])
    return same and part.shape == source.shape and 1 < size <= _SHORT_RUN


def _sum_runs(runs: Array, sums: Array) -> None:
    np.einsum("ncp->nc", runs, out=sums)


class MeanWorker(PoolWorker):
    """Means: sums, divided by what their windows count."""

    # The divisors that were computed last, and for which outputs.
    _divisors: tuple[Ranges, Array] | None = None

    @classmethod
    def _forward_buffers(
        cls, problem: PoolProblem, head: int, outputs: Sequence[int]
    ) -> Iterator[Buffer]:
        yield from super()._forward_buffers(problem, head, outputs)
        yield from _divisor_buffers(problem, outputs)

    @classmethod
    def _backward_buffers(
        cls, problem: PoolProblem, head: int, cells: Sequence[int]
    ) -> Iterator[Buffer]:
        yield from super()._backward_buffers(problem, head, cells)
        yield from _divisor_buffers(problem, reach_of(problem, cells))

    def _reduce_to(
        self, block: Block, span: Range, x: Array, y: Array, indices: Array | None
    ) -> None:
        del span, indices
        self._sweep(SUM, block, x, y)
        self._do(np.divide, y, self._divisor(block.output, x), y)

    def _backward_to(
        self, region: Region, given: PoolInputs, span: Range, target: Array
    ) -> None:
        dy = given.dy[place_of(region.images, span, region.output)]
        share = self._view("share", dy.shape)
        self._do(np.divide, dy, self._divisor(region.output, dy), share)
        self._sweep_back(region, share, target)

    def _divisor(self, outputs: Ranges, like: Array) -> Any:
        """What the sums of these outputs are divided by: a number, or one for each."""
        common = self._problem.common_divisor
        if common is not None:
            return np.array(common, self._problem.accumulate)
        if self._divisors is None or self._divisors[0] != outputs:
            divisor = self._product_of_counts(outputs)
            if isinstance(like, ArrayStub):
                # Another worker may run what is recorded next.
                return divisor
            self._divisors = outputs, divisor
        return self._divisors[1]

    def _product_of_counts(self, outputs: Ranges) -> Array:
        """The cells that every output counts: a product over the axes."""
        sizes = [stop - start for start, stop in outputs]
        divisor = self._buffers["divisor"][: math.prod(sizes)].reshape(sizes)
        do = self._do
        if divisor.size <= MOST_NUMBERS:
            divisor, do = np.empty(sizes, divisor.dtype), run_now
        do(np.ndarray.fill, divisor, 1)
        for axis, (start, _) in enumerate(outputs):
            counts = self._buffers["counts"][: sizes[axis]]
            operands = self._problem, axis, start
            if counts.size <= MOST_NUMBERS:
                counts = np.empty(counts.size, counts.dtype)
                _count_taps(*operands, counts)
            else:
                self._do(_count_taps, *operands, counts)
            counts = counts.reshape(-1, *(1,) * (len(sizes) - 1 - axis))
            do(np.multiply, divisor, counts, divisor)
        return divisor


def passes_of(geometry: WindowGeometry, *, inner_first: bool) -> list[int]:
    """The axes along which there is something to reduce, in the order of passes."""
    axes = range(geometry.rank)
    wanted = [axis for axis in axes if not geometry.axes[axis].is_identity]
    return sorted(wanted or [geometry.rank - 1], reverse=inner_first)


def place_of(images: Range, channels: Range, spans: Ranges) -> tuple[slice, ...]:
    """A part of (N, C, *spatial)."""
    return (slice(*images), slice(*channels), *(slice(*span) for span in spans))


def along(axis: int, part: slice) -> tuple[slice, ...]:
    """A part of (N, C, *spatial) along one spatial axis."""
    return (*(slice(None),) * (2 + axis), part)


def in_strips(count: int) -> Iterator[slice]:
    """Divide so many numbers, which then take little memory."""
    for first in range(0, count, _STRIP):
        yield slice(first, min(first + _STRIP, count))


def _count_up(numbers: Array, start: int, step: int, total: int) -> None:
    """Write (start + i) · step, or ``total`` less it."""
    for part in in_strips(len(numbers)):
        numbers[part] = np.arange(start + part.start, start + part.stop)
    np.multiply(numbers, step, out=numbers)
    if total:
        np.subtract(total, numbers, out=numbers)


def _count_taps(problem: PoolProblem, axis: int, start: int, counts: Array) -> None:
    """Write how many cells the divisors of outputs count along an axis."""
    for index in range(len(counts)):
        counts[index] = problem.count(axis, start + index)


def reach_of(problem: PoolProblem, cells: Sequence[int]) -> list[int]:
    """The most windows along each axis that overlap so many elements."""
    each = zip(problem.geometry.axes, cells, strict=True)
    return [axis.reach(n) for axis, n in each]


def span_of(problem: PoolProblem, outputs: Sequence[int]) -> list[int]:
    """The most elements along each axis under so many windows."""
    each = zip(problem.geometry.axes, outputs, strict=True)
    return [axis.span(n) for axis, n in each]


def pass_sizes(
    problem: PoolProblem, head: int, outputs: Sequence[int], *, inner_first: bool
) -> list[int]:
    """How many elements every pass of a reduction leaves."""
    spans = span_of(problem, outputs)
    order = {"inner_first": inner_first}
    return list(_sizes(problem.geometry, head, spans, outputs, **order))


def _sizes(
    geometry: WindowGeometry,
    head: int,
    before: Sequence[int],
    after: Sequence[int],
    *,
    inner_first: bool,
) -> Iterator[int]:
    """How many cells every pass leaves of so many ``before``."""
    sizes = list(before)
    for axis in passes_of(geometry, inner_first=inner_first):
        sizes[axis] = after[axis]
        yield head * math.prod(sizes)


def _stages(problem: PoolProblem, sizes: Iterable[int]) -> Iterator[Buffer]:
    """What all passes but the last one leave."""
    for number, size in enumerate(sizes):
        yield Buffer(f"stage{number}", size, problem.accumulate)


def _divisor_buffers(problem: PoolProblem, outputs: Sequence[int]) -> Iterator[Buffer]:
    if problem.common_divisor is None:
        real = np.empty(0, problem.accumulate).real.dtype
        yield Buffer("divisor", math.prod(outputs), real)
        yield Buffer("counts", max(outputs), real)
