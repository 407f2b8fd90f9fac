"""Elements of planes by their indices: to find them, to read them, to add to them.

An index counts the elements of its plane row by row, or of the whole array.  It must be
that of an element under its own window, or -1 for none.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from cuconv.arrays import Array, is_aligned, strided
from cuconv.backends.cpu.pool_sweeps import (
    MOST_NUMBERS,
    PoolWorker,
    in_strips,
    run_now,
    span_of,
)
from cuconv.engine.pool_problem import PoolProblem
from cuconv.geometry import Axis, Block, Range, Ranges, Region
from cuconv.memory import Buffer

INDEX, BOOL = np.dtype(np.int64), np.dtype(bool)
# Buffers of the size of the outputs.
_NUMBERS = "at", "rest", "other", "cell"
_MASKS = "outside", "wrong", "test"


class PlacesWorker(PoolWorker):
    """A worker that is given indices."""

    @classmethod
    def _place_buffers(
        cls, problem: PoolProblem, head: int, outputs: Sequence[int]
    ) -> Iterator[Buffer]:
        """Buffers to locate so many elements of ``head`` planes."""
        count = head * math.prod(outputs)
        yield Buffer("share", count, problem.accumulate)
        for name in _NUMBERS:
            yield Buffer(name, count, INDEX)
        for name in _MASKS:
            yield Buffer(name, count, BOOL)
        yield Buffer("heads", head, INDEX)
        yield from cls._base_buffers(head)
        for axis, windows in enumerate(outputs):
            yield Buffer(f"starts{axis}", windows, INDEX)
            yield Buffer(f"lengths{axis}", windows, INDEX)

    @staticmethod
    def _base_buffers(head: int) -> Iterator[Buffer]:
        """Buffers for the first indices of so many planes."""
        for name in ("images", "channels", "bases"):
            yield Buffer(name, head, INDEX)

    def _bases(self, images: Range, span: Range) -> Array | None:
        """The index of the first element of every plane, if that is not 0."""
        steps = self._problem.index_steps[1:]
        return self._heads("bases", (images, span), steps) if any(steps) else None

    def _locate(
        self, block: Block | Region, span: Range, indices: Array, stored: Array
    ) -> tuple[Array, ...]:
        """Find the elements with these indices among ``stored`` ones.

        Returns `_flat_cells`, the places in them as a flat array, and which indices are
        of none of them; and a buffer for values, as a flat array too.
        """
        cells = block.window if isinstance(block, Block) else block.cells
        apart = tuple(step // stored.itemsize for step in stored.strides)
        numbered = _Numbered(
            self._geometry.size,
            tuple(axis.dilation for axis in self._geometry.axes),
            cells,
            apart[2:],
            self._problem.index_steps[0],
        )
        bases = self._bases(block.images, span)
        heads = self._heads("heads", ((0, n) for n in stored.shape[:2]), apart)
        bounds = (b for both in self._bounds(block.output) for b in both)
        views = [self._view(n, indices.shape) for n in (*_NUMBERS, *_MASKS)]
        self._do(_locate, numbered, indices, bases, heads, *views, *bounds)
        flat = (self._buffers[name][: indices.size] for name in ("at", "share"))
        return _flat_cells(stored), views[len(_NUMBERS)], *flat

    def _bounds(self, outputs: Ranges) -> Iterator[tuple[Array, Array]]:
        """The first element under every window along each axis, and how many."""
        for axis, (start, stop) in enumerate(outputs):
            names = f"starts{axis}", f"lengths{axis}"
            both = [self._buffers[name][: stop - start] for name in names]
            do = self._do
            if stop - start <= MOST_NUMBERS:
                both, do = [np.empty(stop - start, INDEX) for _ in names], run_now
            do(_write_bounds, self._geometry.axes[axis], start, *both)
            inner = (1,) * (len(outputs) - 1 - axis)
            starts, lengths = (b.reshape(*(1,) * (2 + axis), -1, *inner) for b in both)
            yield starts, lengths

    def _heads(self, name: str, planes: Iterable[Range], steps: Sequence[int]) -> Array:
        """A number for every plane, of so many steps along images and channels."""
        each = zip(("images", "channels"), planes, steps[:2], strict=True)
        images, channels = (
            self._numbers(self._buffers[axis][: stop - start], start, step)
            for axis, (start, stop), step in each
        )
        sizes = len(images), len(channels)
        heads = self._buffers[name][: math.prod(sizes)].reshape(sizes)
        if heads.size > MOST_NUMBERS:
            self._do(np.add, images[:, None], channels, heads)
        else:
            heads = images[:, None] + channels
        return heads.reshape(*sizes, *(1,) * self._geometry.rank)


class TakeWorker(PlacesWorker):
    """The elements that indices name."""

    @classmethod
    def _forward_buffers(
        cls, problem: PoolProblem, head: int, outputs: Sequence[int]
    ) -> Iterator[Buffer]:
        yield from cls._place_buffers(problem, head, outputs)
        cells = head * math.prod(span_of(problem, outputs))
        yield Buffer("window", cells, problem.result)

    def reduce(
        self, block: Block, span: Range, window: Array, y: Array, indices: Array | None
    ) -> None:
        """Copy the elements, and zeros where there are none."""
        stored, share = window, self._view("share", y.shape)
        if window.dtype != y.dtype or not runs_upward(window):
            stored = self._view("window", window.shape)
            self._copy(window, stored)
        found = self._locate(block, span, cast("Array", indices), stored)
        if window.size:
            self._do(_take, *found, share)
        else:
            self._do(np.ndarray.fill, share, 0)
        self._copy(share, y)


class _Numbered(NamedTuple):
    """How elements are numbered, and which are stored, so many items apart."""

    size: tuple[int, ...]
    dilation: tuple[int, ...]
    cells: Ranges
    apart: tuple[int, ...]
    step: int


def _locate(
    numbered: _Numbered,
    indices: Array,
    bases: Array | None,
    heads: Array,
    at: Array,
    rest: Array,
    other: Array,
    cell: Array,
    outside: Array,
    wrong: Array,
    test: Array,
    *bounds: Array,
) -> None:
    """Write to ``at`` where elements are stored, and to ``outside`` which are not.

    Raise for indices of elements that are not under their windows.
    """
    source = indices
    np.equal(indices, -1, outside)
    np.ndarray.fill(wrong, 0)
    np.copyto(at, heads)
    if bases is not None:
        source = np.subtract(indices, bases, rest)
    if numbered.step > 1:
        np.floor_divide(source, numbered.step, other)
        np.multiply(other, numbered.step, cell)
        np.not_equal(cell, source, wrong)
        source = other
    for axis in reversed(range(len(numbered.size))):
        own, free = source, rest if source is not rest else other
        if axis:
            # Faster than a remainder.
            source = np.floor_divide(own, numbered.size[axis], free)
            np.multiply(source, numbered.size[axis], cell)
            own, free = np.subtract(own, cell, cell), own
            free = (other if source is rest else rest) if free is indices else free
        starts, lengths = bounds[2 * axis : 2 * axis + 2]
        # As unsigned numbers, those below zero are the largest.
        np.subtract(own, starts, free)
        np.greater_equal(free.view(np.uint64), lengths.view(np.uint64), test)
        np.logical_or(wrong, test, wrong)
        if numbered.dilation[axis] > 1:
            np.remainder(free, numbered.dilation[axis], free)
            np.logical_or(wrong, np.not_equal(free, 0, test), wrong)
        first, end = numbered.cells[axis]
        if (first, end) != (0, numbered.size[axis]):
            np.logical_or(outside, np.less(own, first, test), outside)
            np.logical_or(outside, np.greater_equal(own, end, test), outside)
            own = np.subtract(own, first, free)
        if numbered.apart[axis] != 1:
            own = np.multiply(own, numbered.apart[axis], free)
        np.add(at, own, at)
    np.logical_and(wrong, np.not_equal(indices, -1, test), wrong)
    if wrong.any():
        worst: Any = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        flat = [b.reshape(-1) for b in bounds]
        windows = zip(numbered.dilation, flat[::2], flat[1::2], worst[2:], strict=True)
        raise refused(indices[worst], numbered.size, windows)
    np.copyto(at, 0, where=outside)


def refused(
    index: int, size: Sequence[int], windows: Iterable[tuple[Any, ...]]
) -> ValueError:
    """The error of an index that is not of its window.

    For each axis, the distance of taps, the bounds of all windows, and which it is.
    """
    under = (
        list(range(starts[o], starts[o] + lengths[o], apart))
        for apart, starts, lengths, o in windows
    )
    return ValueError(
        f"indices has {index} for a window over the elements "
        f"{' × '.join(map(str, under))} of {' × '.join(map(str, size))}: it must be "
        "the index of one of them, or -1 for none, as max_pool returns it with "
        "return_indices=True and the same options"
    )


def _write_bounds(axis: Axis, start: int, starts: Array, lengths: Array) -> None:
    """Write the first element under each window from ``start`` on, and the length."""
    for part in in_strips(len(starts)):
        outputs: Any = np.arange(start + part.start, start + part.stop)
        first = axis.first(outputs)
        starts[part] = first + np.maximum(-(first // axis.dilation), 0) * axis.dilation
        end = np.minimum(axis.window(outputs, outputs + 1)[1], axis.end)
        lengths[part] = np.maximum(end - starts[part], 0)


def _take(cells: Array, outside: Array, at: Array, values: Array, share: Array) -> None:
    """Copy the elements at places, and zeros where they are not stored."""
    np.take(cells, at, None, values, "clip")
    np.copyto(share, np.zeros((), share.dtype), where=outside)


def add_at(
    cells: Array, outside: Array, at: Array, values: Array, dy: Array, share: Array
) -> None:
    """Add dy at places, where they are stored."""
    np.copyto(share, dy)
    np.copyto(share, 0, where=outside)
    np.add.at(cells, at, values)


def runs_upward(array: Array) -> bool:
    """Whether all elements lie at whole items after the first one."""
    steps = [s for n, s in zip(array.shape, array.strides, strict=True) if n > 1]
    whole = all(step > 0 and step % array.itemsize == 0 for step in steps)
    return whole and is_aligned(array)


def _flat_cells(stored: Array) -> Array:
    """The memory from the first element to the last one, in items."""
    each = zip(stored.shape, stored.strides, strict=True)
    length = 1 + sum((n - 1) * (step // stored.itemsize) for n, step in each)
    return strided(stored, (max(length, 0),), (stored.itemsize,))
