"""Maxima over NumPy arrays, their places, and the gradient that is added there.

The element of a maximum is found in a second round, innermost axis first: along each
axis, elements that equal the maximum pass on the place that they have found so far, and
the earliest place wins.  Places are counted down from the end of the plane, so that the
earliest is the largest number, and zero is no place at all.
"""

import math
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from cuconv.arrays import Array, is_aligned
from cuconv.backends.cpu.machine import jit_is_installed
from cuconv.backends.cpu.pool_places import (
    BOOL,
    INDEX,
    PlacesWorker,
    add_at,
    refused,
    runs_upward,
)
from cuconv.backends.cpu.pool_sweeps import (
    Reduction,
    along,
    comparing,
    pass_sizes,
    passes_of,
    place_of,
    reach_of,
    span_of,
)
from cuconv.engine.pool_problem import PoolInputs, PoolProblem
from cuconv.geometry import Block, Range, Region
from cuconv.memory import Buffer

# Sums that a compiled loop adds up; NumPy's keeps other threads waiting.
_LOOPED = np.dtype(np.float32), np.dtype(np.float64)
# The axes of its planes.
_LOOP_AXES = 3


class MaxWorker(PlacesWorker):
    """Maxima, and where they are."""

    @classmethod
    def _forward_buffers(
        cls, problem: PoolProblem, head: int, outputs: Sequence[int]
    ) -> Iterator[Buffer]:
        yield from super()._forward_buffers(problem, head, outputs)
        if not problem.with_indices:
            return
        index = np.dtype(np.int32) if problem.geometry.cells < 2**31 else INDEX
        steps = pass_sizes(problem, head, outputs, inner_first=True)
        spans = span_of(problem, outputs)
        largest = max(*steps, head * math.prod(spans))
        for number, size in enumerate(steps):
            yield Buffer(f"places{number}", size, index)
        yield Buffer("places", max(spans), index)
        yield Buffer("met", largest, index)
        for name in ("mask", "nan"):
            yield Buffer(name, largest, BOOL)
        if not problem.is_search:
            yield from cls._base_buffers(head)

    @classmethod
    def _backward_buffers(
        cls, problem: PoolProblem, head: int, cells: Sequence[int]
    ) -> Iterator[Buffer]:
        reached = reach_of(problem, cells)
        yield Buffer("sum", head * math.prod(cells), problem.accumulate)
        yield from cls._place_buffers(problem, head, reached)
        if problem.values is not None:
            yield Buffer("indices", head * math.prod(reached), INDEX)
            yield from cls._forward_buffers(problem.search, head, reached)

    def _reduce_to(
        self, block: Block, span: Range, x: Array, y: Array, indices: Array | None
    ) -> None:
        seen = self._sweep(Reduction.to_maxima(y.dtype), block, x, y, indices)
        if indices is not None:
            self._find(block, span, seen, indices)

    def _find(
        self, block: Block, span: Range, seen: list[Array], indices: Array
    ) -> None:
        """Find the first cell of every maximum in its plane; -1 where there is none."""
        geometry = self._geometry
        total = geometry.cells
        flag = None
        if seen[-1].dtype.kind not in "biu":
            # Kept where a NaN would be marked: those are marked only where there are
            # some.
            flag = self._buffers["nan"][:1]
            note = comparing(_note_nan, seen[-1].dtype)
            self._do(note, seen[-1], self._view("mask", seen[-1].shape), flag)
        passes = passes_of(geometry, inner_first=True)
        found = self._places(block, passes[0], total)
        is_reached = True
        for number, axis in enumerate(passes):
            if number:
                self._do(np.subtract, found, self._places(block, axis), found)
            best = seen[number + 1]
            into = self._view(f"places{number}", best.shape)
            is_reached = self._pass_on(
                seen[number], best, found, into, axis, block, flag, is_reached
            )
            found = into
        self._do(np.subtract, total, found, indices)
        for axis in set(range(geometry.rank)) - set(passes):
            self._do(np.add, indices, self._places(block, axis), indices)
        bases = self._bases(block.images, span)
        if bases is not None:
            self._do(np.multiply, indices, self._problem.index_steps[0], indices)
            self._do(np.add, indices, bases, indices)
        if not is_reached:
            self._do(_mark_empty, found, indices, self._view("mask", found.shape))

    def _pass_on(
        self,
        source: Array,
        best: Array,
        found: Array,
        into: Array,
        axis: int,
        block: Block,
        flag: Array | None,
        is_found: bool,  # noqa: FBT001
    ) -> bool:
        """Pass on, along one axis, the first place of those cells that are the best.

        Return whether every window is known to have one, as ``is_found`` says that all
        of the pass before have.
        """
        windows, outputs = self._geometry.axes[axis], block.output[axis]
        everywhere = slice(0, outputs[1] - outputs[0])
        by_tap = windows.goes_by_tap(everywhere.stop)
        is_reached, is_written = False, False
        for meeting in windows.meetings(outputs, block.window[axis]):
            cells = along(axis, meeting.cells)
            part, place = source[cells], into[along(axis, meeting.outputs)]
            at = along(axis, meeting.outputs)
            is_whole = by_tap and meeting.outputs == everywhere
            mask, nan = (self._view(name, part.shape) for name in ("mask", "nan"))
            operands = flag, mask, nan, part, best[at], found[cells]
            keep = comparing(_keep_best, part.dtype)
            if is_whole and is_found and not is_written:
                self._do(keep, *operands, into)
            else:
                if not is_written:
                    self._do(np.ndarray.fill, into, 0)
                met = self._view("met", part.shape)
                self._do(keep, *operands, met, place, *(() if by_tap else (2 + axis,)))
            is_written, is_reached = True, is_reached or is_whole
        if not is_written:
            self._do(np.ndarray.fill, into, 0)
        return is_found and is_reached

    def _places(self, block: Block, axis: int, total: int = 0) -> Array:
        """The cells of a block along an axis, counted in the plane, or up to its end.

        With a ``total`` they are counted down from there.
        """
        start, stop = block.window[axis]
        step = math.prod(self._geometry.size[axis + 1 :])
        buffer = self._buffers["places"][: stop - start]
        places = self._numbers(buffer, start, step, total)
        inner = (1,) * (self._geometry.rank - 1 - axis)
        return places.reshape(*(1,) * (2 + axis), -1, *inner)

    def _takes_sums(self, dx: Array) -> bool:
        return super()._takes_sums(dx) and runs_upward(dx)

    def _backward_to(
        self, region: Region, given: PoolInputs, span: Range, target: Array
    ) -> None:
        indices = self._indices(region, given, span)
        dy = given.dy[place_of(region.images, span, region.output)]
        if self._is_looped(target, indices, dy):
            self._loop(region, target, indices, dy)
            return
        self._do(np.ndarray.fill, target, 0)
        found = self._locate(region, span, indices, target)
        self._do(add_at, *found, dy, self._view("share", dy.shape))

    def _is_looped(self, dx: Array, indices: Array, dy: Array) -> bool:
        """Whether a compiled loop can add dy where the indices say.

        It takes whole planes that lie one after another, of one type.
        """
        arrays = dx, indices, dy
        lie = all(array.flags.c_contiguous and is_aligned(array) for array in arrays)
        is_whole = tuple(dx.shape[2:]) == self._geometry.size and dy.size > 0
        is_plain = is_whole and lie and not any(self._problem.index_steps[1:])
        return is_plain and dx.dtype == dy.dtype in _LOOPED and jit_is_installed()

    def _loop(self, region: Region, dx: Array, indices: Array, dy: Array) -> None:
        """Add dy in a compiled loop."""
        axes, missing = self._geometry.axes, _LOOP_AXES - self._geometry.rank
        head = math.prod(dx.shape[:2]), *(1,) * missing
        planes = (a.reshape(*head, *a.shape[2:]) for a in (dx, indices, dy))
        bounds = [np.zeros(1, INDEX), np.ones(1, INDEX)] * missing
        bounds += (b.reshape(-1) for both in self._bounds(region.output) for b in both)
        dilation = (*(1,) * missing, *(axis.dilation for axis in axes))
        self._do(_add_in_planes, missing, dilation, *planes, *bounds)

    def _indices(self, region: Region, given: PoolInputs, span: Range) -> Array:
        """The indices of the windows over a region, given or found in x."""
        outputs = place_of(region.images, span, region.output)
        if given.x is None:
            return cast("Array", given.indices)[outputs]
        block = self._geometry.block(region.images, region.output)
        shape = given.dy[outputs].shape
        y, indices = self._view("y", shape), self._view("indices", shape)
        window = given.x[place_of(region.images, span, block.window)]
        worker = MaxWorker(self._problem.search, self._buffers, self._do)
        worker.reduce(block, span, window, y, indices)
        return indices


def _note_nan(values: Array, mask: Array, flag: Array) -> None:
    """Write to ``flag`` whether there is a NaN among the values."""
    np.not_equal(values, values, mask)
    flag[0] = mask.any()


def _mark_empty(found: Array, indices: Array, mask: Array) -> None:
    """Write -1 where nothing was found."""
    np.equal(found, 0, mask)
    if mask.any():
        np.copyto(indices, -1, where=mask)


def _keep_best(
    flag: Array | None,
    mask: Array,
    nan: Array,
    part: Array,
    best: Array,
    found: Array,
    met: Array,
    place: Array | None = None,
    axis: int | None = None,
) -> None:
    """Write to ``met`` the places of cells that are the best, zero for the others.

    They go on to ``place`` if none is earlier there; with an axis, the first along it.
    """
    np.equal(part, best, mask)
    if flag is not None and flag[0]:
        np.not_equal(part, part, nan)
        np.logical_or(mask, nan, mask)
        flag[0] = True  # it lies where the first NaN is marked
    np.multiply(mask, found, met)
    if axis is not None:
        np.maximum.reduce(met, axis, None, place, keepdims=True, initial=0)
    elif place is not None:
        np.maximum(place, met, out=place)


def _add_in_planes(
    missing: int,
    dilation: tuple[int, ...],
    dx: Array,
    indices: Array,
    dy: Array,
    *bounds: Array,
) -> None:
    """Add dy in a loop, which checks the indices; the first axes may be missing."""
    from cuconv.backends.cpu import loops  # noqa: PLC0415 - Numba, when first needed

    wrong = loops.add_in_planes(dx, indices, dy, bounds, dilation)
    if wrong >= 0:
        at = np.unravel_index(wrong, indices.shape)
        both = bounds[2 * missing :: 2], bounds[2 * missing + 1 :: 2]
        windows = zip(dilation[missing:], *both, at[1 + missing :], strict=True)
        raise refused(indices[at], dx.shape[1 + missing :], windows)
