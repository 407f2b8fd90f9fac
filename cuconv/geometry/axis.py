"""How the cells, taps and outputs along one axis meet."""

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias, TypeVar

Range: TypeAlias = tuple[int, int]

Ranges: TypeAlias = tuple[Range, ...]

T = TypeVar("T")


def dilated_size(size: int, apart: int) -> int:
    """Cells from the first to the last of so many, zeros between them counted."""
    return (size - 1) * apart + 1 if size else 0


def clip(start: int, stop: int, size: int) -> tuple[Range, Range]:
    """The part of [start, stop) inside [0, size), and what hangs over each end."""
    low = min(max(start, 0), size)
    high = max(low, min(stop, size))
    before = low - start if high > low else stop - start
    return (low, high), (before, stop - start - (high - low) - before)


class Meeting(NamedTuple):
    """Cells of an input interval and the outputs of an interval that they are under.

    As many of each, or one output over all the cells.
    """

    cells: slice
    outputs: slice


class Run(NamedTuple):
    """Neighbouring cells of a window, and the cells of the input that they read.

    As many of each, in this order or in reverse, or one cell that all of them read.
    """

    window: slice
    cells: slice

    def one_to_one(self) -> "Iterator[Run]":
        """The same cells as runs that do not repeat any."""
        first, last, _ = self.cells.indices(2**62)
        if abs(last - first) > 1:
            yield self
            return
        for cell in range(self.window.start, self.window.stop):
            yield Run(slice(cell, cell + 1), self.cells)


class Axis(NamedTuple):
    """One spatial axis: input size, kernel taps, and how they meet.

    ``overhang`` are cells under the last window beyond the padding (`rounded_up`),
    ``windows`` is how many windows an `EvenAxis` has, and ``spread`` how far apart the
    cells of the input lie; only sizes are right where that is not 1 (`phases`).
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
        """Input cells from the first tap to the last, both counted."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def padded(self) -> int:
        return self.dilated_size + self.before + self.after + self.overhang

    @property
    def dilated_size(self) -> int:
        """Cells from the first to the last of the input, zeros between them counted."""
        return dilated_size(self.size, self.input_dilation)

    @property
    def end(self) -> int:
        """Where the cells that windows may read end: negative padding crops."""
        return max(self.size + min(self.after, 0), 0)

    @property
    def rounded_up(self) -> "Axis":
        """With a window more for the cells that strides leave over at the end.

        There is none where it would start in the padding after the input.
        """
        rest = (self.padded - self.extent) % self.stride
        if not rest or self.out * self.stride >= self.size + self.before:
            return self
        return self._replace(overhang=self.stride - rest)

    @property
    def is_identity(self) -> bool:
        """Whether every window is the one cell of its own place."""
        plain = self.kernel == self.stride == 1 and not self.windows
        return plain and self.before == self.after == 0

    @property
    def out(self) -> int:
        return (self.padded - self.extent) // self.stride + 1

    def first(self, output: int) -> int:
        """The input cell under tap 0 of an output cell; may lie in the padding."""
        return output * self.stride - self.before

    def window(self, start: int, stop: int) -> Range:
        """The input interval under output cells [start, stop), padding included."""
        return self.first(start), self.first(stop - 1) + self.extent

    def under(self, start: int, stop: int) -> tuple[Range, Range]:
        """The cells that exist under these outputs, and the padding at either end."""
        return clip(*self.window(start, stop), self.end)

    def between(self, cells: Range, outputs: Range) -> "Axis":
        """An axis of these cells and these outputs alone.

        Other cells become padding, or negative padding where cells lie beyond the
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
        """The output cells with a window that meets the input interval."""
        lowest = -((self.extent - 1 - self.before - start) // self.stride)
        highest = (stop - 1 + self.before) // self.stride
        first = min(max(lowest, 0), self.out)
        return first, max(first, min(highest + 1, self.out))

    def reach(self, cells: int) -> int:
        """How many windows meet so many neighbouring cells, at most."""
        return min(self.out, (cells + self.extent - 2) // self.stride + 1)

    def span(self, outputs: int) -> int:
        """How many cells lie under so many neighbouring outputs, at most."""
        return min(self.size, (outputs - 1) * self.stride + self.extent)

    def counted(self, *, padding: bool) -> Range:
        """The cells that a mean divides by, and the padding if that counts."""
        if not padding:
            return 0, self.end
        return -max(self.before, 0), self.size + self.after

    def taps_of(self, output: int, *, padding: bool) -> int:
        """Taps of an output that meet what is `counted`."""
        low, high = self.counted(padding=padding)
        first, d = self.first(output), self.dilation
        below = max(-((first - low) // d), 0)
        return max(min((high - 1 - first) // d + 1, self.kernel) - below, 0)

    def goes_by_tap(self, outputs: int) -> bool:
        """Whether `meetings` takes tap by tap, or output by output: what is fewer."""
        return self.kernel <= outputs

    def meetings(self, outputs: Range, cells: Range) -> Iterator[Meeting]:
        """Who meets whom between an interval of outputs and one of cells."""
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
        """Where a tap of these outputs falls within ``cells``."""
        offset = tap * self.dilation - self.before
        start = max(outputs[0], -((offset - cells[0]) // self.stride))
        stop = max(start, min(outputs[1], (cells[1] - 1 - offset) // self.stride + 1))
        first = start * self.stride + offset - cells[0]
        last = first + (stop - start - 1) * self.stride
        inside = slice(first, last + 1, self.stride) if stop > start else slice(0, 0)
        return Meeting(inside, slice(start - outputs[0], stop - outputs[0]))

    def runs(self, window: Range, mode: str) -> Iterator[Run]:
        """Which cells of the input a window reads, cells outside as ``mode`` says.

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
        """The cells of an interval that the taps of one output meet."""
        first, step = self.first(output) - cells[0], self.dilation
        start = first + max(-(first // step), 0) * step
        stop = min(first + self.extent, cells[1] - cells[0])
        return slice(start, max(start, stop), step)


def _repeated(
    start: int, stop: int, size: int, mode: str
) -> Iterator[tuple[slice, int]]:
    """What cells [start, stop) outside an axis read, and how many in a row do."""
    if mode == "replicate" or size == 1:
        if start < stop:
            edge = 0 if start < 0 else size - 1
            yield slice(edge, edge + 1), stop - start
        return
    # Mirrors stand a period apart, at the first cell and at the last.
    period = size if mode == "circular" else size - 1
    while start < stop:
        index, first = divmod(start, period)
        count = min(stop - start, period - first)
        if mode == "reflect" and index % 2:
            yield slice(period - first, period - first - count, -1), count
        else:
            yield slice(first, first + count), count
        start += count


class EvenAxis(Axis):
    """Windows that share an axis out as evenly as can be: adaptive pooling.

    Window ``o`` of ``m`` over ``n`` cells goes from ``floor(o n / m)`` up to
    ``ceil((o + 1) n / m)``; neighbours may share a cell.  ``kernel`` is the longest.
    """

    __slots__ = ()

    @classmethod
    def of(cls, size: int, windows: int) -> Axis:
        """Windows with a stride where the axis can be shared out in equal parts."""
        if not windows:
            return Axis(size, 1, 1, 1, 0, -size)
        if size % windows == 0:
            each = size // windows
            return Axis(size, each, each, 1, 0, 0)
        # floor(o n / m) leaves a rest of at most m - gcd(n, m), in some window.
        longest = -(-(size + windows - math.gcd(size, windows)) // windows)
        return cls(size, longest, 1, 1, 0, 0, 0, windows)

    @property
    def out(self) -> int:
        return self.windows

    def first(self, output: int) -> int:
        return output * self.size // self.windows

    def last(self, output: int) -> int:
        """One past the last cell of a window."""
        return -(-(output + 1) * self.size // self.windows)

    def window(self, start: int, stop: int) -> Range:
        return self.first(start), self.last(stop - 1)

    def between(self, cells: Range, outputs: Range) -> Axis:
        """The whole axis: a part of evenly shared windows is not evenly shared."""
        if (cells, outputs) != ((0, self.size), (0, self.windows)):
            raise ValueError("windows that share an axis out evenly cannot be cut")
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
    """The phases of ``source * spread = result * step + t * dilation + offset``.

    By their first taps, of which there may be far fewer than places for a phase.
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
        # As many cells as the windows of these results reach: no more, no less.
        after = (len(picked) - 1) * other.stride + other.extent - other.padded
        yield _slice(picked), _slice(taps), other._replace(after=after)


def _slice(cells: range) -> slice:
    return slice(cells.start, cells.stop, cells.step)
