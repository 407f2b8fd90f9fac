"""Sliding windows over a batch of arrays, and their split into blocks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from cuconv.choices import check_flag, not_a_choice
from cuconv.geometry.axis import Axis, Range, Ranges, T
from cuconv.geometry.options import (
    Padding,
    Sizes,
    as_index,
    axes_of,
    channels_are_first,
    checked_shape,
    even_axis,
    frozen,
    frozen_padding,
    pads_of,
    per_axis,
    split_shape,
)


class Tile(NamedTuple):
    """The size of a block: images, and elements of every axis."""

    images: int
    cells: tuple[int, ...]

    @property
    def positions(self) -> int:
        return self.images * math.prod(self.cells)


class Block(NamedTuple):
    """A block of the output and the input that it needs.

    ``window`` are the elements inside the input; ``padding`` counts the zeros before
    and after them, so that along each axis window and padding together are ``(stop -
    start - 1) * stride + extent`` elements.
    """

    images: Range
    output: Ranges
    window: Ranges
    padding: Ranges

    @property
    def shape(self) -> tuple[int, ...]:
        """Output elements along every axis."""
        return tuple([stop - start for start, stop in self.output])


class Region(NamedTuple):
    """A block of the input and the outputs whose windows overlap it."""

    images: Range
    cells: Ranges
    output: Ranges

    @property
    def is_reached(self) -> bool:
        """True if any window overlaps it: strides may skip elements."""
        return all(stop > start for start, stop in self.output)


def tile_of(images: int, sizes: tuple[int, ...], cells: int) -> Tile:
    """The largest tile of at most ``cells`` elements (at least one).

    Inner axes are filled before outer ones, so that a tile is contiguous in each
    channel: only one axis is split, those outside it have one element, those inside are
    whole.  The split is balanced: 56 rows in tiles of at most 15 make 4 of 14.
    """
    budget = max(cells, 1)
    steps = []
    for size in (*sizes[::-1], images):
        if size <= budget:
            steps.append(size or 1)
            budget //= size or 1
        else:
            pieces = -(-size // budget)
            steps.append(-(-size // pieces))
            budget = 1
    return Tile(steps.pop(), tuple(steps[::-1]))


def _spans(ranges: Sequence[Range], steps: Sequence[int]) -> Iterator[Ranges]:
    """Split ranges into steps, every combination, the last axis fastest.

    A generator, because an image may have more blocks than fit into memory.
    """
    if not ranges:
        yield ()
        return
    start, stop = ranges[0]
    for low in range(start, stop, steps[0]):
        for rest in _spans(ranges[1:], steps[1:]):
            yield ((low, min(low + steps[0], stop)), *rest)


class _WindowSizes:
    """Numbers of a `WindowGeometry`, which are worked out once.

    ``size``, ``kernel`` and ``out`` are elements of the input, taps, and outputs along
    every axis; ``cells``, ``taps`` and ``positions`` are their products.
    """

    rank: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    out: tuple[int, ...]
    cells: int
    taps: int
    positions: int
    is_padded: bool
    x_shape: tuple[int, ...]


@dataclass(frozen=True)
class WindowGeometry(_WindowSizes):
    """Sliding windows over a batch of multi-channel arrays.

    Parameters
    ----------
    images, channels
        Batch size N and channels C.
    axes
        One `Axis` for each spatial axis, outermost first.
    channels_first
        (N, C, *spatial) if true, (N, *spatial, C) if not.
    batched
        Whether the arrays have the batch axis; without it, ``images`` is 1.
    """

    images: int
    channels: int
    axes: tuple[Axis, ...]
    channels_first: bool = True
    batched: bool = True

    def __post_init__(self) -> None:
        axes = self.axes
        size, kernel = tuple([a.size for a in axes]), tuple([a.kernel for a in axes])
        out = tuple([axis.out for axis in axes])
        self.__dict__.update(
            rank=len(axes),
            size=size,
            kernel=kernel,
            out=out,
            cells=math.prod(size),
            taps=math.prod(kernel),
            positions=math.prod(out),
            is_padded=any(axis.before > 0 or axis.after > 0 for axis in axes),
            x_shape=self.array_shape(self.channels, size),
        )

    @property
    def whole_region(self) -> Tile:
        """The whole input as a tile; axes without elements count as one."""
        return Tile(self.images, tuple([n or 1 for n in self.size]))

    @property
    def is_pointwise(self) -> bool:
        """True if the column matrix is the input itself."""
        return all(axis[1:6] == (1, 1, axis.dilation, 0, 0) for axis in self.axes)

    def array_shape(self, channels: int, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """The shape, in this layout, of an array with these channels and elements."""
        return self.arranged(self.images, channels, spatial)

    def arranged(self, images: T, channels: T, spatial: Sequence[T]) -> tuple[T, ...]:
        """Values for images, channels and spatial axes, in the order of this layout."""
        inner = (channels, *spatial) if self.channels_first else (*spatial, channels)
        return (images, *inner) if self.batched else inner

    def column_shape(
        self,
        order: str = "rows",
        images: int | None = None,
        out: tuple[int, ...] | None = None,
    ) -> tuple[int, ...]:
        """The shape of the column matrix, or of a block of it.

        ``order`` is one of those of `cuconv.im2col`.

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
            raise not_a_choice("order", order, shapes)
        return (
            shapes[order] if self.batched or order != "batched" else shapes[order][1:]
        )

    def column_bytes(self, itemsize: int) -> int:
        """The size of the whole column matrix, in bytes.

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
        """The largest input tile of at most this many elements."""
        return tile_of(self.images, self.size, cells)

    def count_blocks(self, tile: Tile) -> int:
        """The number of blocks of this tile in the output."""
        count = -(-self.images // tile.images)
        for out, step in zip(self.out, tile.cells, strict=True):
            count *= -(-out // step)
        return count

    def count_regions(self, tile: Tile) -> int:
        """The number of regions of this tile in the input."""
        sizes = (self.images, *self.size)
        steps = (tile.images, *tile.cells)
        return math.prod(-(-n // step) for n, step in zip(sizes, steps, strict=True))

    def reach(self, tile: Tile) -> int:
        """The most output positions whose windows overlap a region of this tile."""
        each = zip(self.axes, tile.cells, strict=True)
        return tile.images * math.prod(axis.reach(cells) for axis, cells in each)

    def block(self, images: Range, output: Ranges) -> Block:
        """The block that computes these images and output elements."""
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
        """Split the output (or the given part of it) into blocks, in memory order.

        Parameters
        ----------
        tile
            The largest block wanted; see `tile`.  The positions of a block are
            contiguous in each channel.
        images, output
            The part to split; all of it by default.
        """
        whole = tuple((0, out) for out in self.out)
        ranges = ((0, self.images) if images is None else images, *(output or whole))
        steps = self._run_steps(tile, ranges[1:])
        for picked, *spans in _spans(ranges, steps):
            yield self.block(picked, tuple(spans))

    def pieces(self, tile: Tile) -> Iterator[Block]:
        """Split the output into blocks that need not be contiguous."""
        whole = [(0, size) for size in (self.images, *self.out)]
        for picked, *spans in _spans(whole, (tile.images, *tile.cells)):
            yield self.block(picked, tuple(spans))

    def _run_steps(self, tile: Tile, ranges: Ranges) -> tuple[int, ...]:
        """Steps with which the positions of every block are contiguous.

        Outside an axis that is not whole, blocks have a single element.
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
        """Split the input into regions, each with the outputs that read it."""
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
        cover_all: bool = False,
        layout: str = "channels_first",
    ) -> "WindowGeometry":
        """Geometry of windows over an array of shape ``x_shape``.

        A ``kernel_size`` of several numbers fixes the rank, and ``x_shape`` may then
        lack the batch axis; a single number means a batched array.  ``ceil_mode`` adds
        a window along every axis that has elements left over (`Axis.rounded_up`), with
        ``cover_all`` also one for padding alone; ``cover_all`` without it adds padding
        instead, which completes the last window (`Axis.covered`).

        Raises
        ------
        ValueError, TypeError
            For every option that does not fit; the message names both numbers.
        """
        channels_are_first(layout)
        return _window_geometry(
            checked_shape("x", x_shape),
            frozen("kernel_size", kernel_size),
            frozen("stride", stride),
            frozen_padding(padding),
            frozen("dilation", dilation),
            layout,
            (ceil_mode, check_flag("cover_all", cover_all)),
        )

    @classmethod
    def of_even(
        cls,
        x_shape: Sequence[int],
        output_size: Sequence[int | None] | int | None,
        *,
        layout: str = "channels_first",
    ) -> "WindowGeometry":
        """Geometry of windows that divide every axis evenly: `EvenAxis`.

        ``output_size`` has one number for each spatial axis, and None to keep a size;
        a single one means a batched array.

        Examples
        --------
        >>> from cuconv.geometry import WindowGeometry
        >>> WindowGeometry.of_even((2, 3, 7, 9), (4, None)).out
        (4, 9)
        """
        shape = checked_shape("x", x_shape)
        if output_size is None or isinstance(output_size, int):
            output_size = (output_size,) * (len(shape) - 2)
        split = split_shape(shape, len(output_size), layout)
        wanted = [
            size if windows is None else as_index("output_size", windows)
            for size, windows in zip(split.sizes, output_size, strict=True)
        ]
        axes = map(even_axis, range(len(wanted)), split.sizes, wanted)
        return cls(
            split.images,
            split.channels,
            tuple(axes),
            split.channels_first,
            split.batched,
        )


@lru_cache(maxsize=4096)
def _window_geometry(
    x_shape: tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    stride: object,
    padding: object,
    dilation: object,
    layout: str,
    rounds_up: tuple[bool, bool],
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
    split = split_shape(x_shape, len(kernel_size), layout)
    axes = axes_of(
        *(split.sizes, kernel_size, stride, padding, dilation),
        ceil_mode=rounds_up[0],
        cover_all=rounds_up[1],
    )
    return WindowGeometry(
        split.images, split.channels, axes, split.channels_first, split.batched
    )


def unpooled_shape(
    x_shape: Sequence[int],
    kernel_size: Sizes,
    *,
    stride: Sizes | None,
    padding: Padding,
    dilation: Sizes,
    output_size: Sizes | None,
    layout: str,
) -> tuple[int, ...]:
    """The shape of the array from which windows leave an array of this shape.

    Of those with ``padding`` and nothing left over, unless there is an ``output_size``.

    Examples
    --------
    >>> from cuconv.geometry.windows import unpooled_shape
    >>> options = {"stride": None, "padding": 0, "dilation": 1, "layout": "NCL"}
    >>> unpooled_shape((2, 3, 4), 2, output_size=None, **options)
    (2, 3, 8)
    """
    shape, kernel = checked_shape("x", x_shape), frozen("kernel_size", kernel_size)
    rank = len(kernel) if isinstance(kernel, tuple) else len(shape) - 2
    split = split_shape(shape, rank, layout)
    taps = per_axis("kernel_size", kernel, rank, 1)
    step = kernel_size if stride is None else stride
    strides = per_axis("stride", frozen("stride", step), rank, 1)
    apart = per_axis("dilation", frozen("dilation", dilation), rank, 1)
    if output_size is None:
        most = tuple(n * s for n, s in zip(split.sizes, strides, strict=True))
        pads = pads_of(frozen_padding(padding), most, taps, strides, apart)
        sizes = tuple(
            (n - 1) * s + d * (k - 1) + 1 - before - after if n else 0
            for n, k, s, d, (before, after) in zip(
                split.sizes, taps, strides, apart, pads, strict=True
            )
        )
    else:
        sizes = per_axis("output_size", frozen("output_size", output_size), rank, 0)
    inner = (
        (split.channels, *sizes) if split.channels_first else (*sizes, split.channels)
    )
    return (split.images, *inner) if split.batched else inner
