"""The shapes of one convolution: the only size formula of the project.

Along one axis, output cell ``o`` and kernel tap ``t`` read the input cell

    i = o * stride + t * dilation - before

where ``before`` is the padding in front of the axis (negative padding crops) and
cells outside ``0 <= i < size`` read as zero.  Everything below follows from this line;
a transposed convolution goes along it the other way, from ``o`` to ``i``.

A general convolution reads more into it: cells of x may lie ``spread`` apart (input
dilation), cells outside may repeat those inside (`PADDING_MODES`), and the batch may be
shared out to filters (`ConvGeometry.batch_groups`).  `ConvGeometry.phases`,
`Axis.runs` and `ConvGeometry.part` lead back to plain ones.
"""

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeAlias, TypeVar

LARGEST_PARAMETER = 2**31 - 1

PADDING_WORDS = ("valid", "same", "same_lower", "causal")
# What a cell outside the input reads as: zero, or the cell that it mirrors (the edge
# itself not repeated), the nearest one, or the one as far from the other end.
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

LAYOUTS = {
    "channels_first": True,
    "channels_last": False,
    **dict.fromkeys(("NCL", "NCW", "NCHW", "NCDHW"), True),
    **dict.fromkeys(("NLC", "NWC", "NHWC", "NDHWC"), False),
}

Sizes: TypeAlias = int | Sequence[int]
Padding: TypeAlias = int | str | Sequence[int | Sequence[int]]
Range: TypeAlias = tuple[int, int]
Ranges: TypeAlias = tuple[Range, ...]

T = TypeVar("T")


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
    spread: int = 1

    @property
    def extent(self) -> int:
        """Input cells from the first tap to the last, both counted."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def padded(self) -> int:
        return self.spread_size + self.before + self.after + self.overhang

    @property
    def spread_size(self) -> int:
        """Cells from the first to the last of the input, zeros between them counted."""
        return (self.size - 1) * self.spread + 1 if self.size else 0

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
        return _clip(*self.window(start, stop), self.end)

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


class Tile(NamedTuple):
    """How much of an array one block spans: images, and cells of every axis."""

    images: int
    cells: tuple[int, ...]

    @property
    def positions(self) -> int:
        return self.images * math.prod(self.cells)


class Block(NamedTuple):
    """A block of the output and the input that it needs.

    ``window`` are the input cells that exist; ``padding`` counts the cells of zeros
    before and after them, so that along each axis window and padding together are
    ``(stop - start - 1) * stride + extent`` cells.
    """

    images: Range
    output: Ranges
    window: Ranges
    padding: Ranges

    @property
    def shape(self) -> tuple[int, ...]:
        """Output cells along every axis."""
        return tuple(stop - start for start, stop in self.output)


_AxisPhase: TypeAlias = tuple[slice, slice, Axis]


class Phase(NamedTuple):
    """Cells of a result that lie some steps apart, and the convolution that gives them.

    ``results`` picks them along every axis, ``taps`` the taps that they need.  Cells
    that need none are in no phase: they are zero.
    """

    results: tuple[slice, ...]
    taps: tuple[slice, ...]
    geometry: "ConvGeometry"


class Region(NamedTuple):
    """A block of the input and the output cells whose windows meet it."""

    images: Range
    cells: Ranges
    output: Ranges

    @property
    def is_reached(self) -> bool:
        """Whether any window meets it: strides may jump over cells."""
        return all(stop > start for start, stop in self.output)


def tile_of(images: int, sizes: tuple[int, ...], cells: int) -> Tile:
    """The largest tile of at most ``cells`` cells (at least one).

    Inner axes fill up before outer ones, so that a tile is one run of memory in each
    channel: only one axis is cut, those outside it have one cell, those inside are
    whole.  The cut is balanced: 56 rows in tiles of at most 15 make 4 of 14.
    """
    budget = max(cells, 1)
    steps = []
    for size in (*reversed(sizes), images):
        pieces = math.ceil(size / min(size, budget)) if size else 1
        steps.append(max(math.ceil(size / pieces), 1))
        budget = budget // max(size, 1) if pieces == 1 else 1
    return Tile(steps[-1], tuple(reversed(steps[:-1])))


def _spans(ranges: Sequence[Range], steps: Sequence[int]) -> Iterator[Ranges]:
    """Cut ranges into steps, every combination, the last axis fastest.

    One at a time: an image may have more blocks than there is memory for their list.
    """
    if not ranges:
        yield ()
        return
    start, stop = ranges[0]
    for low in range(start, stop, steps[0]):
        for rest in _spans(ranges[1:], steps[1:]):
            yield ((low, min(low + steps[0], stop)), *rest)


def _clip(start: int, stop: int, size: int) -> tuple[Range, Range]:
    """The part of [start, stop) inside [0, size), and what hangs over each end."""
    low = min(max(start, 0), size)
    high = max(low, min(stop, size))
    before = low - start if high > low else stop - start
    return (low, high), (before, stop - start - (high - low) - before)


@dataclass(frozen=True)
class WindowGeometry:
    """How windows slide over a batch of multi-channel arrays.

    Parameters
    ----------
    images, channels
        Batch size N and channels C.
    axes
        One `Axis` for each spatial axis, outermost first.
    channels_first
        (N, C, *spatial) if true, (N, *spatial, C) if not.
    batched
        Whether the arrays carry the batch axis; without it, ``images`` is 1.
    """

    images: int
    channels: int
    axes: tuple[Axis, ...]
    channels_first: bool = True
    batched: bool = True

    @property
    def rank(self) -> int:
        return len(self.axes)

    @cached_property
    def size(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @cached_property
    def kernel(self) -> tuple[int, ...]:
        return tuple(axis.kernel for axis in self.axes)

    @cached_property
    def out(self) -> tuple[int, ...]:
        return tuple(axis.out for axis in self.axes)

    @cached_property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @cached_property
    def positions(self) -> int:
        """Output positions in one image."""
        return math.prod(self.out)

    @cached_property
    def cells(self) -> int:
        """Input cells in one channel of one image."""
        return math.prod(self.size)

    @cached_property
    def is_padded(self) -> bool:
        return any(axis.before > 0 or axis.after > 0 for axis in self.axes)

    @cached_property
    def is_pointwise(self) -> bool:
        """Whether the column matrix is the input itself."""
        return all(axis[1:6] == (1, 1, axis.dilation, 0, 0) for axis in self.axes)

    @cached_property
    def x_shape(self) -> tuple[int, ...]:
        return self.array_shape(self.channels, self.size)

    def array_shape(self, channels: int, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """The shape, in this layout, of an array with these channels and cells."""
        return self.arranged(self.images, channels, spatial)

    def arranged(self, images: T, channels: T, spatial: Sequence[T]) -> tuple[T, ...]:
        """What belongs to every axis of an array, in the order of this layout."""
        inner = (channels, *spatial) if self.channels_first else (*spatial, channels)
        return (images, *inner) if self.batched else inner

    def column_shape(
        self,
        order: str = "rows",
        images: int | None = None,
        out: tuple[int, ...] | None = None,
    ) -> tuple[int, ...]:
        """The shape of the column matrix, or of a block of it.

        ``order`` is one of those that `cuconv.im2col` knows.

        Examples
        --------
        >>> from cuconv.geometry import WindowGeometry
        >>> WindowGeometry.of((32, 64, 56, 56), (3, 3), padding=1).column_shape()
        (100352, 576)
        """
        patch = self.channels * self.taps
        images = self.images if images is None else images
        positions = self.positions if out is None else math.prod(out)
        shapes = {
            "rows": (images * positions, patch),
            "columns": (patch, images * positions),
            "batched": (images, patch, positions),
        }
        if not isinstance(order, str) or order not in shapes:
            words = ", ".join(map(repr, shapes))
            raise ValueError(f"order must be one of {words}; got {order!r}")
        return (
            shapes[order] if self.batched or order != "batched" else shapes[order][1:]
        )

    def column_bytes(self, itemsize: int) -> int:
        """How many bytes the whole column matrix would take.

        Examples
        --------
        >>> from cuconv.geometry import WindowGeometry
        >>> WindowGeometry.of((32, 64, 56, 56), (3, 3), padding=1).column_bytes(4)
        231211008
        """
        return math.prod(self.column_shape()) * itemsize

    def tile(self, positions: int) -> Tile:
        """The largest output tile of at most this many positions."""
        return tile_of(self.images, self.out, positions)

    def region_tile(self, cells: int) -> Tile:
        """The largest input tile of at most this many cells."""
        return tile_of(self.images, self.size, cells)

    def count_blocks(self, tile: Tile) -> int:
        """How many blocks of this tile cover the output."""
        sizes = (self.images, *self.out)
        steps = (tile.images, *tile.cells)
        return math.prod(-(-n // step) for n, step in zip(sizes, steps, strict=True))

    def count_regions(self, tile: Tile) -> int:
        """How many regions of this tile cover the input."""
        sizes = (self.images, *self.size)
        steps = (tile.images, *tile.cells)
        return math.prod(-(-n // step) for n, step in zip(sizes, steps, strict=True))

    def reach(self, tile: Tile) -> int:
        """Output positions whose windows meet a region of this tile, at most."""
        each = zip(self.axes, tile.cells, strict=True)
        return tile.images * math.prod(axis.reach(cells) for axis, cells in each)

    def block(self, images: Range, output: Ranges) -> Block:
        """The block that computes these images and output cells."""
        clipped = [
            axis.under(start, stop)
            for axis, (start, stop) in zip(self.axes, output, strict=True)
        ]
        window, padding = zip(*clipped, strict=True) if clipped else ((), ())
        return Block(images, output, window, padding)

    def blocks(
        self,
        tile: Tile,
        images: Range | None = None,
        output: Ranges | None = None,
    ) -> Iterator[Block]:
        """Cut the output (or the given part of it) into blocks, in memory order.

        Parameters
        ----------
        tile
            The largest block wanted; see `tile`.  In memory, the positions of a block
            are one run in each channel.
        images, output
            The part to cut; all of it by default.
        """
        whole = tuple((0, out) for out in self.out)
        ranges = ((0, self.images) if images is None else images, *(output or whole))
        steps = self._run_steps(tile, ranges[1:])
        for picked, *spans in _spans(ranges, steps):
            yield self.block(picked, tuple(spans))

    def pieces(self, tile: Tile) -> Iterator[Block]:
        """Cut the output into blocks that need not be one run of memory."""
        whole = [(0, size) for size in (self.images, *self.out)]
        for picked, *spans in _spans(whole, (tile.images, *tile.cells)):
            yield self.block(picked, tuple(spans))

    def _run_steps(self, tile: Tile, ranges: Ranges) -> tuple[int, ...]:
        """Steps that make every block one run of positions in memory.

        Outside an axis that is not taken whole, blocks have a single cell.
        """
        steps: list[int] = []
        is_whole = True
        for step, span, out in zip(
            reversed(tile.cells), reversed(ranges), reversed(self.out), strict=True
        ):
            steps.append(max(step, 1) if is_whole else 1)
            is_whole = is_whole and span == (0, out) and step >= out
        steps.append(max(tile.images, 1) if is_whole else 1)
        return tuple(reversed(steps))

    def regions(self, tile: Tile) -> Iterator[Region]:
        """Cut the input into regions, each with the output cells that reach it."""
        whole = [(0, size) for size in (self.images, *self.size)]
        for picked, *cells in _spans(whole, (tile.images, *tile.cells)):
            reached = tuple(
                axis.reached_from(*span)
                for axis, span in zip(self.axes, cells, strict=True)
            )
            yield Region(picked, tuple(cells), reached)

    @classmethod
    def of(
        cls,
        x_shape: Sequence[int],
        kernel_size: Sizes,
        *,
        stride: Sizes = 1,
        padding: Padding = 0,
        dilation: Sizes = 1,
        ceil_mode: bool = False,
        layout: str = "channels_first",
    ) -> "WindowGeometry":
        """Geometry of windows over an array of shape ``x_shape``.

        A ``kernel_size`` of several numbers fixes the rank, and ``x_shape`` may then
        lack the batch axis; a single number means a batched array.  ``ceil_mode`` adds
        a window along every axis that has cells left over (`Axis.rounded_up`).

        Raises
        ------
        ValueError, TypeError
            For every option that does not fit; the message names both numbers.
        """
        channels_are_first(layout)
        return _window_geometry(
            _shape("x", x_shape),
            _frozen("kernel_size", kernel_size),
            _frozen("stride", stride),
            _frozen("padding", padding),
            _frozen("dilation", dilation),
            layout,
            ceil_mode,
        )

    @classmethod
    def of_even(
        cls,
        x_shape: Sequence[int],
        output_size: Sequence[int | None] | int | None,
        *,
        layout: str = "channels_first",
    ) -> "WindowGeometry":
        """Geometry of windows that share every axis out evenly: `EvenAxis`.

        ``output_size`` has one number for each spatial axis, and None to keep a size;
        a single one means a batched array.

        Examples
        --------
        >>> from cuconv.geometry import WindowGeometry
        >>> WindowGeometry.of_even((2, 3, 7, 9), (4, None)).out
        (4, 9)
        """
        shape = _shape("x", x_shape)
        if output_size is None or isinstance(output_size, int):
            output_size = (output_size,) * (len(shape) - 2)
        split = _split_shape(shape, len(output_size), layout)
        wanted = [
            size if windows is None else _index("output_size", windows)
            for size, windows in zip(split.sizes, output_size, strict=True)
        ]
        axes = map(_even_axis, range(len(wanted)), split.sizes, wanted)
        return cls(
            split.images,
            split.channels,
            tuple(axes),
            split.channels_first,
            split.batched,
        )


def _even_axis(index: int, size: int, windows: int) -> Axis:
    if not 0 <= windows <= LARGEST_PARAMETER:
        raise ValueError(
            f"output_size of spatial axis {index} is {windows}; "
            f"it must lie in 0 … {LARGEST_PARAMETER}"
        )
    if windows and not size:
        raise ValueError(
            f"spatial axis {index} has 0 cells, too few for output_size {windows}"
        )
    return EvenAxis.of(size, windows)


@dataclass(frozen=True)
class ConvGeometry(WindowGeometry):
    """The shapes of one convolution: windows over the input, filters over windows.

    ``filters`` is K, ``groups`` is G; group g maps channels [g·C/G, (g+1)·C/G) to
    filters [g·K/G, (g+1)·K/G).  With ``batch_groups`` B, images [b·N/B, (b+1)·N/B) are
    mapped to filters [b·K/B, (b+1)·K/B), and y has N/B images.  ``padding_mode`` is one
    of `PADDING_MODES`.
    """

    filters: int = 1
    groups: int = 1
    batch_groups: int = 1
    padding_mode: str = "zeros"

    @cached_property
    def results(self) -> int:
        """Images of y."""
        return self.images // self.batch_groups

    @cached_property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @cached_property
    def group_filters(self) -> int:
        return self.filters // self.groups

    @cached_property
    def patch(self) -> int:
        """Cells under one window in one group: the length of a dot product."""
        return self.group_channels * self.taps

    @cached_property
    def multiplications(self) -> int:
        """Multiply-adds of one pass, padding counted as if it were data."""
        return self.results * self.positions * self.filters * self.patch

    @cached_property
    def is_empty(self) -> bool:
        """Whether nothing is multiplied: no cell, or none under any window."""
        if self.multiplications == 0 or self.cells == 0:
            return True
        if self.is_spread or self.padding_mode != "zeros":
            return False
        spans = (axis.window(0, axis.out) for axis in self.axes)
        return any(
            min(stop, axis.size) <= max(start, 0)
            for axis, (start, stop) in zip(self.axes, spans, strict=True)
        )

    @cached_property
    def y_shape(self) -> tuple[int, ...]:
        shape = self.array_shape(self.filters, self.out)
        return (self.results, *shape[1:]) if self.batch_groups > 1 else shape

    @cached_property
    def w_shape(self) -> tuple[int, ...]:
        if self.channels_first:
            return (self.filters, self.group_channels, *self.kernel)
        return (*self.kernel, self.group_channels, self.filters)

    @cached_property
    def is_unit_stride(self) -> bool:
        return all(axis.stride == 1 for axis in self.axes)

    @cached_property
    def adjoint(self) -> "ConvGeometry":
        """The convolution of dy, with flipped weights, that gives dx.

        With stride 1, ``i = o + t · dilation - before`` turned round is ``o = i +
        (kernel - 1 - t) · dilation - (extent - 1 - before)``: a convolution again.
        """
        axes = tuple(
            axis._replace(
                size=axis.out,
                before=axis.extent - 1 - axis.before,
                after=axis.extent - 1 - axis.after,
            )
            for axis in self.axes
        )
        return replace(self, axes=axes, channels=self.filters, filters=self.channels)

    @cached_property
    def is_spread(self) -> bool:
        """Whether cells of the input lie apart."""
        return any(axis.spread > 1 for axis in self.axes)

    @cached_property
    def is_copied(self) -> bool:
        """Whether a plain one would need a copy of the input, padded or regrouped."""
        is_wrapped = self.padding_mode != "zeros" and self.is_padded
        return is_wrapped or self.batch_groups > 1

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is a convolution that strategies know."""
        return not (self.is_spread or self.is_copied)

    def phases(self) -> Iterator[Phase]:
        """Cut the output so that no zero between cells of x is multiplied.

        In ``j * spread = o * stride + t * dilation - before``, an output fixes
        ``t * dilation`` modulo the spread.  The taps of a phase are therefore evenly
        spaced, and so are the cells that they meet.  No two phases share a tap.
        """
        return self._phases(map(_outputs, self.axes), self)

    def input_phases(self) -> Iterator[Phase]:
        """Cut the input so that its gradient is plain convolutions over dy.

        The same line, the other way: a cell fixes ``t * dilation`` modulo the stride.
        Filters and channels are exchanged, and taps come in reverse.
        """
        backward = replace(self, channels=self.filters, filters=self.channels)
        return self._phases(map(_inputs, self.axes), backward)

    def _phases(
        self, axes: Iterable[Iterable[_AxisPhase]], like: "ConvGeometry"
    ) -> Iterator[Phase]:
        for picked in itertools.product(*axes):
            results, taps, each = zip(*picked, strict=True)
            yield Phase(results, taps, replace(like, axes=each))

    def rows(self, images: Range, rows: Range) -> Block:
        """The block that computes these rows along the first axis, whole in the others.

        ``images`` are those of the output.  Where cells outside the input are not zero,
        its windows go beyond the input, and nothing is left of the padding.
        """
        output = (rows, *((0, out) for out in self.out[1:]))
        if self.is_spread:
            window = tuple((0, size) for size in self.size)
            pads = tuple((axis.before, axis.after) for axis in self.axes)
            return Block(images, output, window, pads)
        if self.padding_mode == "zeros":
            return self.block(images, output)
        each = zip(self.axes, output, strict=True)
        window = tuple(axis.window(*span) for axis, span in each)
        return Block(images, output, window, ((0, 0),) * self.rank)

    def part(self, block: Block) -> "ConvGeometry":
        """The convolution that computes a block from a copy of what it reads.

        Its padding is zeros, and it shares no batch out: that is the copy's affair.
        """
        axes = tuple(
            axis._replace(size=stop - start, before=before, after=after)
            for axis, (start, stop), (before, after) in zip(
                self.axes, block.window, block.padding, strict=True
            )
        )
        return replace(
            self,
            images=block.images[1] - block.images[0],
            channels=self.channels * self.batch_groups,
            groups=self.groups * self.batch_groups,
            axes=axes,
            batched=True,
            padding_mode="zeros",
            batch_groups=1,
        )

    @classmethod
    def of_transposed(
        cls,
        x_shape: Sequence[int],
        w_shape: Sequence[int],
        *,
        stride: Sizes = 1,
        padding: Padding = 0,
        output_padding: Sizes = 0,
        output_size: Sizes | None = None,
        dilation: Sizes = 1,
        groups: int = 1,
        layout: str = "channels_first",
    ) -> "ConvGeometry":
        """Geometry of the convolution whose input gradient is ``conv_transpose(x, w)``.

        Its ``y_shape`` is ``x_shape``, and its ``x_shape`` is that of the result; see
        `cuconv.conv_transpose`.

        Examples
        --------
        >>> from cuconv.geometry import ConvGeometry
        >>> g = ConvGeometry.of_transposed((8, 64, 28, 28), (64, 3, 4, 4), stride=2)
        >>> g.x_shape
        (8, 3, 58, 58)
        """
        channels_are_first(layout)
        return _transposed_geometry(
            _shape("x", x_shape),
            _shape("w", w_shape),
            _frozen("stride", stride),
            _Ends(
                _frozen("padding", padding),
                _frozen("output_padding", output_padding),
                None if output_size is None else _frozen("output_size", output_size),
            ),
            _frozen("dilation", dilation),
            _index("groups", groups),
            layout,
        )

    @classmethod
    def of_weights(
        cls,
        x_shape: Sequence[int],
        w_shape: Sequence[int],
        *,
        stride: Sizes = 1,
        padding: Padding = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        layout: str = "channels_first",
        padding_mode: str = "zeros",
        input_dilation: Sizes = 1,
        batch_groups: int = 1,
    ) -> "ConvGeometry":
        """Geometry of ``conv(x, w)`` from the two shapes; see `cuconv.conv`.

        Examples
        --------
        >>> from cuconv.geometry import ConvGeometry
        >>> g = ConvGeometry.of_weights((8, 3, 224, 224), (64, 3, 7, 7), stride=2)
        >>> g.y_shape
        (8, 64, 109, 109)
        """
        channels_are_first(layout)
        _check_padding_mode(padding_mode)
        return _conv_geometry(
            _shape("x", x_shape),
            _shape("w", w_shape),
            _frozen("stride", stride),
            _frozen("padding", padding),
            _frozen("dilation", dilation),
            layout,
            _Sharing(
                _index("groups", groups),
                _index("batch_groups", batch_groups),
                padding_mode,
                _frozen("input_dilation", input_dilation),
            ),
        )


def _outputs(axis: Axis) -> Iterator[_AxisPhase]:
    """The phases of an axis of y."""
    steps = axis.stride, axis.spread
    yield from _axis_phases(axis, axis.out, axis.size, steps, -axis.before)


def _inputs(axis: Axis) -> Iterator[_AxisPhase]:
    """The phases of an axis of x: ``i + before = o * stride + t * dilation``."""
    steps, last = (axis.spread, axis.stride), axis.kernel - 1
    offset = axis.before - axis.dilation * last
    for cells, taps, other in _axis_phases(axis, axis.size, axis.out, steps, offset):
        first, apart = last - taps.start, taps.step
        yield cells, slice(first % apart, first + 1, apart), other


def _axis_phases(
    axis: Axis, results: int, sources: int, steps: tuple[int, int], offset: int
) -> Iterator[_AxisPhase]:
    """The phases of ``source * spread = result * step + t * dilation + offset``.

    By their first taps, of which there may be far fewer than places for a phase.
    """
    step, spread = steps
    common, shared = math.gcd(step, spread), math.gcd(axis.dilation, spread)
    period, apart = spread // common, spread // shared
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
            before=-((first * step + offset + tap * axis.dilation) // spread),
            after=0,
        )
        # As many cells as the windows of these results reach: no more, no less.
        after = (len(picked) - 1) * other.stride + other.extent - other.padded
        yield _slice(picked), _slice(taps), other._replace(after=after)


def _slice(cells: range) -> slice:
    return slice(cells.start, cells.stop, cells.step)


def _index(name: str, value: object) -> int:
    if type(value) is int:
        return value
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        kind = type(value).__name__
        raise TypeError(
            f"{name} must be made of integers; got {value!r} ({kind})"
        ) from None


def _frozen(name: str, value: object) -> object:
    """An option as a hashable value of plain integers: the key of the caches."""
    if type(value) is int or isinstance(value, str):
        return value
    if isinstance(value, (tuple, list)) or getattr(value, "ndim", 0) > 0:
        return tuple(_frozen(name, item) for item in value)  # type: ignore[attr-defined]
    return _index(name, value)


def _shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(map(operator.index, shape))
    except TypeError:
        raise TypeError(
            f"the shape of {name} must be made of integers; got {shape!r}"
        ) from None
    if min(sizes, default=0) < 0:
        raise ValueError(f"the shape of {name} is {sizes}; sizes cannot be negative")
    return sizes


def _per_axis(name: str, value: object, rank: int, least: int) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else value
    if not isinstance(values, tuple) or not all(isinstance(v, int) for v in values):
        raise TypeError(f"{name} must be an integer or one per axis; got {value!r}")
    if len(values) != rank:
        raise ValueError(f"{name} has {len(values)} values for {rank} spatial axes")
    for axis, item in enumerate(values):
        if not least <= item <= LARGEST_PARAMETER:
            raise ValueError(
                f"{name} of spatial axis {axis} is {item}; "
                f"it must lie in {least} … {LARGEST_PARAMETER}"
            )
    return values


def channels_are_first(layout: str) -> bool:
    """Whether a layout word puts the channels before the spatial axes."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        words = ", ".join(map(repr, LAYOUTS))
        raise ValueError(f"layout must be one of {words}; got {layout!r}")
    return LAYOUTS[layout]


def _check_layout_rank(layout: str, rank: int) -> None:
    if not layout.startswith("channels") and len(layout) != rank + 2:
        raise ValueError(
            f"layout {layout!r} has {len(layout) - 2} spatial axes "
            f"and the kernel has {rank}"
        )


def _check_word_rank(word: object, rank: int) -> None:
    if word == "causal" and rank != 1:
        raise ValueError(f"padding 'causal' is for one spatial axis; there are {rank}")


def _word_pads(word: str, size: int, kernel: int, stride: int, dilation: int) -> Range:
    """Padding that makes the output ceil(size / stride) cells long, or none."""
    if word == "valid":
        return 0, 0
    if word == "causal":
        return dilation * (kernel - 1), 0
    out = -(-size // stride)
    total = max(0, (out - 1) * stride + dilation * (kernel - 1) + 1 - size)
    less = total // 2
    return (less, total - less) if word == "same" else (total - less, less)


def _pads(
    padding: object,
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> Ranges:
    rank = len(sizes)
    if isinstance(padding, str):
        if padding not in PADDING_WORDS:
            words = ", ".join(map(repr, PADDING_WORDS))
            raise ValueError(
                f"padding must be integers or one of {words}; got {padding!r}"
            )
        _check_word_rank(padding, rank)
        each = zip(sizes, kernel, strides, dilations, strict=True)
        return tuple(_word_pads(padding, *axis) for axis in each)
    if isinstance(padding, tuple) and any(isinstance(p, tuple) for p in padding):
        pairs = tuple(p if isinstance(p, tuple) else (p, p) for p in padding)
        if len(pairs) != rank:
            raise ValueError(f"padding has {len(pairs)} values for {rank} spatial axes")
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"padding must be (before, after) pairs; got {padding!r}")
        befores = _per_axis(
            "padding", tuple(p[0] for p in pairs), rank, -LARGEST_PARAMETER
        )
        afters = _per_axis(
            "padding", tuple(p[1] for p in pairs), rank, -LARGEST_PARAMETER
        )
        return tuple(zip(befores, afters, strict=True))
    each_side = _per_axis("padding", padding, rank, -LARGEST_PARAMETER)
    return tuple((p, p) for p in each_side)


def _check_fits(index: int, axis: Axis, padding: object) -> None:
    # "same" or "causal" over an empty axis gives an empty output, which is no mistake.
    if axis.padded >= axis.extent or (axis.size == 0 and padding in PADDING_WORDS[1:]):
        return
    raise ValueError(
        f"the kernel is larger than the padded input on spatial axis {index}: it spans "
        f"{axis.extent} cells (kernel {axis.kernel}, dilation {axis.dilation}) and "
        f"the input has {axis.padded} "
        f"({_cells_text(axis)} + padding {axis.before} + {axis.after})"
    )


def _cells_text(axis: Axis) -> str:
    if axis.spread == 1:
        return f"{axis.size}"
    return f"{axis.spread_size}: {axis.size} with input_dilation {axis.spread}"


def _axes(
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: object,
    padding: object,
    dilation: object,
    *,
    ceil_mode: bool = False,
    input_dilation: object = 1,
) -> tuple[Axis, ...]:
    rank = len(sizes)
    _per_axis("kernel_size", kernel, rank, 1)
    strides = _per_axis("stride", stride, rank, 1)
    dilations = _per_axis("dilation", dilation, rank, 1)
    spreads = _per_axis("input_dilation", input_dilation, rank, 1)
    each = zip(sizes, kernel, strides, dilations, spreads, strict=True)
    axes = tuple(Axis(n, k, s, d, 0, 0, spread=apart) for n, k, s, d, apart in each)
    spread_sizes = tuple(axis.spread_size for axis in axes)
    pads = _pads(padding, spread_sizes, kernel, strides, dilations)
    axes = tuple(
        axis._replace(before=before, after=after)
        for axis, (before, after) in zip(axes, pads, strict=True)
    )
    if ceil_mode:
        axes = tuple(axis.rounded_up for axis in axes)
    for index, axis in enumerate(axes):
        _check_fits(index, axis, padding)
    return axes


class _Split(NamedTuple):
    images: int
    channels: int
    sizes: tuple[int, ...]
    channels_first: bool
    batched: bool


def _split_shape(x_shape: tuple[int, ...], rank: int, layout: str) -> _Split:
    channels_first = channels_are_first(layout)
    _check_layout_rank(layout, rank)
    if len(x_shape) not in (rank + 1, rank + 2):
        raise ValueError(
            f"x has {len(x_shape)} axes; {rank} spatial axes need {rank + 2}, "
            f"or {rank + 1} without the batch axis"
        )
    batched = len(x_shape) == rank + 2
    images, inner = (x_shape[0], x_shape[1:]) if batched else (1, x_shape)
    channels, sizes = (
        (inner[0], inner[1:]) if channels_first else (inner[-1], inner[:-1])
    )
    return _Split(images, channels, sizes, channels_first, batched)


@lru_cache(maxsize=4096)
def _window_geometry(
    x_shape: tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    stride: object,
    padding: object,
    dilation: object,
    layout: str,
    ceil_mode: bool,  # noqa: FBT001 - the key of a cache
) -> WindowGeometry:
    if isinstance(kernel_size, str):
        raise TypeError(f"kernel_size must be integers; got {kernel_size!r}")
    if isinstance(kernel_size, int):
        kernel_size = (kernel_size,) * (len(x_shape) - 2)
    if not kernel_size:
        raise ValueError(
            f"x has {len(x_shape)} axes, which leaves no spatial axis; "
            "a kernel_size of one number needs a batch and a channel axis beside them"
        )
    split = _split_shape(x_shape, len(kernel_size), layout)
    axes = _axes(
        split.sizes, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode
    )
    return WindowGeometry(
        split.images, split.channels, axes, split.channels_first, split.batched
    )


def _check_channels(split: _Split, expected: int, filters: int, groups: int) -> None:
    if groups < 1:
        raise ValueError(f"groups must be at least 1; got {groups}")
    if expected * groups != split.channels:
        last = split.sizes[-1]
        fits_last = split.channels_first and last == expected * groups
        hint = f"; its last axis has {last}: layout='channels_last'?"
        raise ValueError(
            f"channels do not match: x has {split.channels} and w expects "
            f"{expected} × groups {groups} = {expected * groups}"
            f"{hint if fits_last else ''}"
        )
    if filters % groups:
        raise ValueError(f"groups {groups} do not divide the {filters} filters of w")


def _rank_of(w_shape: tuple[int, ...]) -> int:
    rank = len(w_shape) - 2
    if rank < 1:
        raise ValueError(
            f"w has {len(w_shape)} axes; it needs at least 3: filters, channels, space"
        )
    return rank


class _Weights(NamedTuple):
    filters: int
    channels: int
    kernel: tuple[int, ...]


def _split_weights(w_shape: tuple[int, ...], *, channels_first: bool) -> _Weights:
    """Filters, channels of a group and taps, from either layout."""
    if channels_first:
        return _Weights(w_shape[0], w_shape[1], w_shape[2:])
    return _Weights(w_shape[-1], w_shape[-2], w_shape[:-2])


class _Sharing(NamedTuple):
    """Who sees whom, and what lies between and around the cells of the input."""

    groups: int
    batch_groups: int
    padding_mode: str
    input_dilation: object


@lru_cache(maxsize=4096)
def _conv_geometry(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    stride: object,
    padding: object,
    dilation: object,
    layout: str,
    sharing: _Sharing,
) -> ConvGeometry:
    split = _split_shape(x_shape, _rank_of(w_shape), layout)
    filters, channels, kernel = _split_weights(
        w_shape, channels_first=split.channels_first
    )
    groups, batch_groups, padding_mode, input_dilation = sharing
    _check_channels(split, channels, filters, groups)
    _check_batch_groups(split, filters, groups, batch_groups)
    axes = _axes(
        *(split.sizes, kernel, stride, padding, dilation),
        input_dilation=input_dilation,
    )
    _check_repeats(padding_mode, axes)
    return ConvGeometry(
        split.images,
        split.channels,
        axes,
        split.channels_first,
        split.batched,
        filters,
        groups,
        batch_groups,
        padding_mode,
    )


def _check_batch_groups(
    split: _Split, filters: int, groups: int, batch_groups: int
) -> None:
    if batch_groups < 1:
        raise ValueError(f"batch_groups must be at least 1; got {batch_groups}")
    if batch_groups == 1:
        return
    if groups > 1:
        raise ValueError(
            f"groups {groups} and batch_groups {batch_groups} both share out filters: "
            "one of them must be 1"
        )
    if not split.batched:
        raise ValueError(f"batch_groups {batch_groups} need x with a batch axis")
    if split.images % batch_groups:
        raise ValueError(
            f"batch_groups {batch_groups} do not divide the {split.images} images of x"
        )
    if filters % batch_groups:
        raise ValueError(
            f"batch_groups {batch_groups} do not divide the {filters} filters of w"
        )


def _check_padding_mode(padding_mode: str) -> None:
    if not isinstance(padding_mode, str) or padding_mode not in PADDING_MODES:
        words = ", ".join(map(repr, PADDING_MODES))
        raise ValueError(f"padding_mode must be one of {words}; got {padding_mode!r}")


def _check_repeats(padding_mode: str, axes: tuple[Axis, ...]) -> None:
    """Refuse what leaves cells outside the input nothing to repeat."""
    if padding_mode == "zeros":
        return
    for index, axis in enumerate(axes):
        if axis.spread > 1:
            raise ValueError(
                f"padding_mode {padding_mode!r} and input_dilation {axis.spread} of "
                f"spatial axis {index} do not go together: zeros lie between the cells"
            )
        if not axis.size and (axis.before > 0 or axis.after > 0):
            raise ValueError(
                f"padding_mode {padding_mode!r} needs cells to repeat; spatial axis "
                f"{index} has 0 and padding {axis.before} + {axis.after}"
            )


def _check_transposed_channels(channels: int, expected: int, groups: int) -> None:
    if groups < 1:
        raise ValueError(f"groups must be at least 1; got {groups}")
    if expected != channels:
        raise ValueError(
            f"channels do not match: x has {channels} and w expects {expected}"
        )
    if channels % groups:
        raise ValueError(f"groups {groups} do not divide the {channels} channels of x")


class _Ends(NamedTuple):
    """What says how large the result of a transposed convolution is."""

    padding: object
    output_padding: object
    output_size: object

    @property
    def word(self) -> str | None:
        """The padding, if it is a word that says how large the result is."""
        is_word = isinstance(self.padding, str) and self.padding in PADDING_WORDS[1:]
        return str(self.padding) if is_word else None


class _Source(NamedTuple):
    """One axis of the input of a transposed convolution, and how it is spread."""

    axis: int
    size: int
    kernel: int
    stride: int
    dilation: int

    @property
    def reach(self) -> int:
        """Cells from the first one that a tap writes to the last, both counted."""
        return (self.size - 1) * self.stride + self.dilation * (self.kernel - 1) + 1

    @property
    def most_more(self) -> int:
        """The largest output_padding."""
        return max(self.stride, self.dilation) - 1

    def checked(self, more: int) -> int:
        """An output_padding that is not too large."""
        if more > self.most_more:
            raise ValueError(
                f"output_padding of spatial axis {self.axis} is {more}; it must be "
                f"less than stride {self.stride} or dilation {self.dilation}, "
                "whichever is larger"
            )
        return more

    def padded(self, pads: Range, more: int) -> Axis:
        """The axis of the convolution that leads back here."""
        before, after = pads
        size = self.reach - before - after + more
        if size < 0:
            raise ValueError(
                f"the result has {size} cells on spatial axis {self.axis}: x has "
                f"{self.size}, which reach {self.reach} (kernel {self.kernel}, stride "
                f"{self.stride}, dilation {self.dilation}), less padding {before} and "
                f"{after}, plus output_padding {more}"
            )
        # A whole stride more would be room for another window: it is cropped.
        after -= more - more % self.stride
        return Axis(size, self.kernel, self.stride, self.dilation, before, after)

    def of_word(self, word: str, wanted: int | None) -> Axis:
        """The axis whose padding a word names: ``wanted`` cells, or size · stride."""
        most = self.size * self.stride
        least = max(most - self.stride + 1, 0)
        size = most if wanted is None else wanted
        self._check_size(size, least, most)
        pads = _word_pads(word, size, self.kernel, self.stride, self.dilation)
        return Axis(size, self.kernel, self.stride, self.dilation, *pads)

    def of_size(self, pads: Range, wanted: int) -> Axis:
        """The axis with the output_padding that makes ``wanted`` cells."""
        least = self.reach - sum(pads)
        self._check_size(wanted, least, least + self.most_more)
        return self.padded(pads, wanted - least)

    def _check_size(self, size: int, least: int, most: int) -> None:
        if not least <= size <= most:
            raise ValueError(
                f"output_size of spatial axis {self.axis} is {size}; it can be "
                f"{least} … {most}"
            )


def _transposed_axes(sources: list[_Source], ends: _Ends) -> tuple[Axis, ...]:
    rank, word = len(sources), ends.word
    more = _per_axis("output_padding", ends.output_padding, rank, 0)
    sized = word is not None or ends.output_size is not None
    if any(more) and sized:
        other = f"padding {word!r}" if word else f"output_size {ends.output_size}"
        raise ValueError(
            f"output_padding {ends.output_padding} and {other} both say how large the "
            "result is: give one of them"
        )
    more = tuple(s.checked(cells) for s, cells in zip(sources, more, strict=True))
    wanted: tuple[int | None, ...] = (None,) * rank
    if ends.output_size is not None:
        wanted = _per_axis("output_size", ends.output_size, rank, 0)
    if word is not None:
        _check_word_rank(word, rank)
        pairs = zip(sources, wanted, strict=True)
        return tuple(source.of_word(word, size) for source, size in pairs)
    _, sizes, kernel, strides, dilations = zip(*sources, strict=True)
    pads = _pads(ends.padding, sizes, kernel, strides, dilations)
    return tuple(
        source.padded(pair, cells) if size is None else source.of_size(pair, size)
        for source, pair, cells, size in zip(sources, pads, more, wanted, strict=True)
    )


@lru_cache(maxsize=4096)
def _transposed_geometry(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    stride: object,
    ends: _Ends,
    dilation: object,
    groups: int,
    layout: str,
) -> ConvGeometry:
    rank = _rank_of(w_shape)
    split = _split_shape(x_shape, rank, layout)
    weights = _split_weights(w_shape, channels_first=split.channels_first)
    _check_transposed_channels(split.channels, weights.filters, groups)
    _per_axis("kernel_size", weights.kernel, rank, 1)
    strides = _per_axis("stride", stride, rank, 1)
    dilations = _per_axis("dilation", dilation, rank, 1)
    each = zip(split.sizes, weights.kernel, strides, dilations, strict=True)
    return ConvGeometry(
        split.images,
        weights.channels * groups,
        _transposed_axes([_Source(i, *axis) for i, axis in enumerate(each)], ends),
        split.channels_first,
        split.batched,
        weights.filters,
        groups,
    )
