"""The relation of elements, taps and outputs along one axis."""

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias, TypeVar

Range: TypeAlias = tuple[int, int]

Ranges: TypeAlias = tuple[Range, ...]

T = TypeVar("T")


def dilated_size(size: int, apart: int) -> int:
    """The length of this many elements with the zeros between them."""
    return (size - 1) * apart + 1 if size else 0


def clip(start: int, stop: int, size: int) -> tuple[Range, Range]:
    """The part of [start, stop) inside [0, size), and its lengths outside."""
    low = min(max(start, 0), size)
    high = max(low, min(stop, size))
    before = low - start if high > low else stop - start
    return (low, high), (before, stop - start - (high - low) - before)


class Meeting(NamedTuple):
    """Elements of an input interval and the outputs of an interval that read them.

    The same number of each, or one output that reads all the elements.
    """

    cells: slice
    outputs: slice


class Run(NamedTuple):
    """Neighbouring elements of a window, and the elements of the input that they read.

    The same number of each, in this order or reversed, or one element that all read.
    """

    window: slice
    cells: slice

    @property
    def bounds(self) -> Range:
        """The interval of the input that it reads, in whichever order."""
        first, stop, step = self.cells.indices(2**62)
        return (first, stop) if step > 0 else (stop + 1, first + 1)

    def one_to_one(self) -> "Iterator[Run]":
        """The same elements as runs that repeat none."""
        first, stop = self.bounds
        if stop - first > 1:
            yield self
            return
        for cell in range(self.window.start, self.window.stop):
            yield Run(slice(cell, cell + 1), self.cells)


class Axis(NamedTuple):
    """One spatial axis: input size, kernel, stride, dilation and padding.

    ``overhang`` are elements under the last window beyond the padding (`rounded_up`),
    ``windows`` is the number of windows of an `EvenAxis`, and ``input_dilation`` the
    distance of neighbouring elements of the input; if that is not 1, only sizes are
    correct (see `phases`).
    """

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    overhang: int = 0
    windows: int = 0
    input_dilation: int = 1

    @property
    def extent(self) -> int:
        """Input elements from the first tap to the last, both included."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def padded(self) -> int:
        return self.dilated_size + self.before + self.after + self.overhang

    @property
    def dilated_size(self) -> int:
        """The length of the input, zeros between elements included."""
        return dilated_size(self.size, self.input_dilation)

    @property
    def end(self) -> int:
        """The end of the elements that windows may read: negative padding crops."""
        return max(self.size + min(self.after, 0), 0)

    def rounded_up(self, *, cover_all: bool) -> "Axis":
        """The axis with one more window for the elements left over at the end.

        Unless ``cover_all``, there is none that starts in the padding after the input.
        """
        rest = (self.padded - self.extent) % self.stride
        starts = self.out * self.stride < self.size + self.before
        if not rest or not (starts or cover_all):
            return self
        return self._replace(overhang=self.stride - rest)

    @property
    def covered(self) -> "Axis":
        """The axis with more padding at its end, to complete a last partial window."""
        rest = (self.padded - self.extent) % self.stride
        return self._replace(after=self.after + self.stride - rest) if rest else self

    @property
    def is_identity(self) -> bool:
        """True if every window is the one element at its own position."""
        single = self.kernel == self.stride == 1 and not self.windows
        return single and self.before == self.after == 0

    @property
    def out(self) -> int:
        size, kernel, stride, dilation, before, after, overhang, _, apart = self
        if apart != 1:
            size = dilated_size(size, apart)
        padded = size + before + after + overhang
        return (padded - dilation * (kernel - 1) - 1) // stride + 1

    def first(self, output: int) -> int:
        """The input index under tap 0 of an output; it may be in the padding."""
        return output * self.stride - self.before

    def window(self, start: int, stop: int) -> Range:
        """The input interval under output elements [start, stop), padding included."""
        _, kernel, stride, dilation, before, *_ = self
        last = (stop - 1) * stride - before
        return start * stride - before, last + dilation * (kernel - 1) + 1

    def under(self, start: int, stop: int) -> tuple[Range, Range]:
        """The input elements under these outputs, and the padding at either end."""
        return clip(*self.window(start, stop), self.end)

    def between(self, cells: Range, outputs: Range) -> "Axis":
        """An axis of these elements and these outputs alone.

        Other elements become padding, or negative padding if elements are beyond the
        windows.
        """
        start, stop = self.first(outputs[0]), self.first(outputs[1] - 1) + self.extent
        counted = min(stop, self.size + self.after)
        return self._replace(
            size=cells[1] - cells[0],
            before=cells[0] - start,
            after=counted - cells[1],
            overhang=stop - counted,
        )

    def reached_from(self, start: int, stop: int) -> Range:
        """The outputs whose windows overlap the input interval."""
        lowest = -((self.extent - 1 - self.before - start) // self.stride)
        highest = (stop - 1 + self.before) // self.stride
        first = min(max(lowest, 0), self.out)
        return first, max(first, min(highest + 1, self.out))

    def reach(self, cells: int) -> int:
        """The most windows that overlap this many neighbouring elements."""
        return min(self.out, (cells + self.extent - 2) // self.stride + 1)

    def span(self, outputs: int) -> int:
        """The largest number of elements under this many neighbouring outputs."""
        return min(self.size, (outputs - 1) * self.stride + self.extent)

    def counted(self, *, padding: bool) -> Range:
        """The positions that a mean counts in its divisor."""
        if not padding:
            return 0, self.end
        return -max(self.before, 0), self.size + self.after

    def taps_of(self, output: int, *, padding: bool) -> int:
        """The number of taps of an output that are `counted`."""
        low, high = self.counted(padding=padding)
        first, d = self.first(output), self.dilation
        below = max(-((first - low) // d), 0)
        return max(min((high - 1 - first) // d + 1, self.kernel) - below, 0)

    def goes_by_tap(self, outputs: int) -> bool:
        """True if `meetings` iterates over taps, as they are fewer than outputs."""
        return self.kernel <= outputs

    def meetings(self, outputs: Range, cells: Range) -> Iterator[Meeting]:
        """The pairs of outputs and elements of two intervals, by tap or by output."""
        if self.goes_by_tap(outputs[1] - outputs[0]):
            for tap in range(self.kernel):
                meeting = self.hits(tap, outputs, cells)
                if meeting.cells.stop > meeting.cells.start:
                    yield meeting
            return
        for index, output in enumerate(range(*outputs)):
            under = self.cells_under(output, cells)
            if under.stop > under.start:
                yield Meeting(under, slice(index, index + 1))

    def apart(self, outputs: Range, cells: Range) -> Range | None:
        """The part of an interval of cells that is under windows which share none.

        None where windows of these outputs share cells, or do not lie within it.
        """
        start = self.first(outputs[0]) - cells[0]
        stop = start + (outputs[1] - outputs[0] - 1) * self.stride + self.kernel
        is_apart = self.dilation == 1 and self.kernel <= self.stride
        fits = start >= 0 and stop <= cells[1] - cells[0]
        if self.windows or not is_apart or not fits or outputs[1] <= outputs[0]:
            return None
        return start, stop

    def hits(self, tap: int, outputs: Range, cells: Range) -> Meeting:
        """The outputs for which a tap is within ``cells``, and those elements."""
        offset = tap * self.dilation - self.before
        start = max(outputs[0], -((offset - cells[0]) // self.stride))
        stop = max(start, min(outputs[1], (cells[1] - 1 - offset) // self.stride + 1))
        first = start * self.stride + offset - cells[0]
        last = first + (stop - start - 1) * self.stride
        inside = slice(first, last + 1, self.stride) if stop > start else slice(0, 0)
        return Meeting(inside, slice(start - outputs[0], stop - outputs[0]))

    def runs(self, window: Range, mode: str) -> Iterator[Run]:
        """The elements of the input that a window reads, outside according to ``mode``.

        Those inside come first, if there are any.
        """
        start, stop = window
        low, high = max(start, 0), min(stop, self.size)
        if low < high:
            yield Run(slice(low - start, high - start), slice(low, high))
        if mode == "zeros":
            return
        for low, high in ((start, min(stop, 0)), (max(start, self.size), stop)):
            first = low - start
            for cells, count in _repeated(low, high, self.size, mode):
                yield Run(slice(first, first + count), cells)
                first += count

    def cells_under(self, output: int, cells: Range) -> slice:
        """The elements of an interval under the taps of one output."""
        first, step = self.first(output) - cells[0], self.dilation
        start = first + max(-(first // step), 0) * step
        stop = min(first + self.extent, cells[1] - cells[0])
        return slice(start, max(start, stop), step)


def _repeated(
    start: int, stop: int, size: int, mode: str
) -> Iterator[tuple[slice, int]]:
    """The elements that [start, stop) outside an axis reads, as contiguous runs."""
    if mode == "replicate" or size == 1:
        if start < stop:
            edge = 0 if start < 0 else size - 1
            yield slice(edge, edge + 1), stop - start
        return
    # Reflection is periodic: the axis forwards, then backwards.
    length = size - 1 if mode == "reflect" else size
    while start < stop:
        index, first = divmod(start, length)
        count = min(stop - start, length - first)
        if mode == "circular" or index % 2 == 0:
            yield slice(first, first + count), count
        else:
            last = size - 1 - first
            # A stop of -1 would be the last element, not the one before the first.
            yield slice(last, last - count if last >= count else None, -1), count
        start += count


class EvenAxis(Axis):
    """Windows that divide an axis as evenly as possible: adaptive pooling.

    Window ``o`` of ``m`` over ``n`` elements goes from ``floor(o n / m)`` up to
    ``ceil((o + 1) n / m)``; neighbours may share an element.  ``kernel`` is the
    longest.
    """

    __slots__ = ()

    @classmethod
    def of(cls, size: int, windows: int) -> Axis:
        """Windows with a stride, if those are equal: 12 / 6, or 13 / 6, which share."""
        if not windows:
            return Axis(size, 1, 1, 1, 0, -size)
        each, rest = divmod(size, windows)
        if rest <= 1 and each:
            return Axis(size, each + rest, each, 1, 0, 0)
        # floor(o n / m) has a remainder of at most m - gcd(n, m), in some window.
        longest = -(-(size + windows - math.gcd(size, windows)) // windows)
        return cls(size, longest, 1, 1, 0, 0, 0, windows)

    @property
    def out(self) -> int:
        return self.windows

    def first(self, output: int) -> int:
        return output * self.size // self.windows

    def last(self, output: int) -> int:
        """One past the last element of a window."""
        return -(-(output + 1) * self.size // self.windows)

    def window(self, start: int, stop: int) -> Range:
        return self.first(start), self.last(stop - 1)

    def between(self, cells: Range, outputs: Range) -> Axis:
        """The whole axis: a part of it has no evenly divided windows."""
        if (cells, outputs) != ((0, self.size), (0, self.windows)):
            raise ValueError("windows of adaptive pooling cannot be split")
        return self

    def reached_from(self, start: int, stop: int) -> Range:
        high = -(-stop * self.windows // self.size)
        return start * self.windows // self.size, high

    def reach(self, cells: int) -> int:
        return min(self.windows, -(-cells * self.windows // self.size) + 1)

    def span(self, outputs: int) -> int:
        return min(self.size, -(-outputs * self.size // self.windows) + 1)

    def taps_of(self, output: int, *, padding: bool) -> int:
        del padding
        return self.last(output) - self.first(output)

    def goes_by_tap(self, outputs: int) -> bool:
        del outputs
        return False

    def cells_under(self, output: int, cells: Range) -> slice:
        start = max(self.first(output) - cells[0], 0)
        return slice(start, max(start, min(self.last(output), cells[1]) - cells[0]))


AxisPhase: TypeAlias = tuple[slice, slice, Axis]


def phases_of_outputs(axis: Axis) -> Iterator[AxisPhase]:
    """The phases of an axis of y."""
    steps = axis.stride, axis.input_dilation
    yield from _axis_phases(axis, axis.out, axis.size, steps, -axis.before)


def phases_of_inputs(axis: Axis) -> Iterator[AxisPhase]:
    """The phases of an axis of x: ``i + before = o * stride + t * dilation``."""
    steps, last = (axis.input_dilation, axis.stride), axis.kernel - 1
    offset = axis.before - axis.dilation * last
    for cells, taps, other in _axis_phases(axis, axis.size, axis.out, steps, offset):
        first, apart = last - taps.start, taps.step
        yield cells, slice(first % apart, first + 1, apart), other


def _axis_phases(
    axis: Axis, results: int, sources: int, steps: tuple[int, int], offset: int
) -> Iterator[AxisPhase]:
    """The phases of ``source * apart = result * step + t * dilation + offset``.

    Found by their first taps, of which there may be far fewer than possible phases.
    """
    step, input_dilation = steps
    common, shared = (
        math.gcd(step, input_dilation),
        math.gcd(axis.dilation, input_dilation),
    )
    period, apart = input_dilation // common, input_dilation // shared
    inverse = pow(step // common, -1, period)
    for tap in range(min(axis.kernel, apart)):
        rest, missed = divmod(-offset - tap * axis.dilation, common)
        first = rest * inverse % period
        if missed or first >= results:
            continue
        picked, taps = range(first, results, period), range(tap, axis.kernel, apart)
        other = Axis(
            size=sources,
            kernel=len(taps),
            stride=step // common,
            dilation=axis.dilation // shared,
            before=-((first * step + offset + tap * axis.dilation) // input_dilation),
            after=0,
        )
        # Exactly as many elements as the windows of these results reach.
        after = (len(picked) - 1) * other.stride + other.extent - other.padded
        yield _slice(picked), _slice(taps), other._replace(after=after)


def _slice(cells: range) -> slice:
    return slice(cells.start, cells.stop, cells.step)
