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

from cuconv.arrays import Array, is_aligned, merged_stride, strided
from cuconv.backends.cpu.machine import jit_is_installed
from cuconv.backends.cpu.pool_sweeps import (
    MOST_NUMBERS,
    PoolWorker,
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
from cuconv.geometry import Block, Range, Ranges, Region
from cuconv.memory import Buffer

# Sums that a compiled loop adds up; NumPy's keeps other threads waiting.
_LOOPED = np.dtype(np.float32), np.dtype(np.float64)
_INDEX, _BOOL = np.dtype(np.int64), np.dtype(bool)


class MaxWorker(PoolWorker):
    """Maxima, and where they are."""

    @classmethod
    def _forward_buffers(
        cls, problem: PoolProblem, head: int, outputs: Sequence[int]
    ) -> Iterator[Buffer]:
        yield from super()._forward_buffers(problem, head, outputs)
        if not problem.with_indices:
            return
        index = np.dtype(np.int32) if problem.geometry.cells < 2**31 else _INDEX
        steps = pass_sizes(problem, head, outputs, inner_first=True)
        spans = span_of(problem, outputs)
        largest = max(*steps, head * math.prod(spans))
        for number, size in enumerate(steps):
            yield Buffer(f"places{number}", size, index)
        yield Buffer("places", max(spans), index)
        yield Buffer("met", largest, index)
        for name in ("mask", "nan"):
            yield Buffer(name, largest, _BOOL)

    @classmethod
    def _backward_buffers(
        cls, problem: PoolProblem, head: int, cells: Sequence[int]
    ) -> Iterator[Buffer]:
        reached = reach_of(problem, cells)
        outputs = head * math.prod(reached)
        yield Buffer("share", outputs, problem.accumulate)
        yield Buffer("sum", head * math.prod(cells), problem.accumulate)
        for name in ("at", "rest", "cell"):
            yield Buffer(name, outputs, _INDEX)
        for name in ("images", "channels", "heads"):
            yield Buffer(name, head, _INDEX)
        if problem.values is None:
            for name in ("mask", "nan"):
                yield Buffer(name, outputs, _BOOL)
        else:
            yield Buffer("indices", outputs, _INDEX)
            yield from cls._forward_buffers(problem.search, head, reached)

    def _reduce_to(
        self, block: Block, window: Array, target: Array, indices: Array | None
    ) -> None:
        to_maxima = Reduction.to_maxima(target.dtype)
        seen = self._sweep(to_maxima, block, window, target, indices)
        if indices is not None:
            self._find(block, seen, indices)

    def _find(self, block: Block, seen: list[Array], indices: Array) -> None:
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
        return super()._takes_sums(dx) and _runs_upward(dx)

    def _backward_to(
        self, region: Region, given: PoolInputs, span: Range, target: Array
    ) -> None:
        indices = self._indices(region, given, span)
        dy = given.dy[place_of(region.images, span, region.output)]
        is_whole = tuple(target.shape[2:]) == self._geometry.size
        if is_whole and dy.size and _is_looped(target, indices, dy):
            from cuconv.backends.cpu import loops  # noqa: PLC0415 - Numba, when first needed

            planes = math.prod(target.shape[:2])
            cells, places, values = (
                a.reshape(planes, -1) for a in (target, indices, dy)
            )
            self._do(loops.add_in_planes, cells, places.view(np.uint64), values)
            return
        self._do(np.ndarray.fill, target, 0)
        steps = [step // target.itemsize for step in target.strides]
        reach = zip(target.shape, steps, strict=True)
        length = 1 + sum((n - 1) * step for n, step in reach)
        names = ("at", "rest", "cell", "mask", "nan", "share")
        self._do(
            _add_at,
            *(region.cells, self._geometry.size, tuple(steps)),
            strided(target, (length,), (target.itemsize,)),
            *(indices, dy, self._flat(dy), self._heads(target.shape, steps)),
            *(self._view(name, indices.shape) for name in names),
            *(self._buffers[name][: dy.size] for name in ("at", "share")),
        )

    def _heads(self, shape: Sequence[int], steps: Sequence[int]) -> Array:
        """Where every plane of a piece begins."""
        images, channels = (
            self._numbers(self._buffers[name][: shape[axis]], 0, steps[axis])
            for axis, name in enumerate(("images", "channels"))
        )
        heads = self._buffers["heads"][: shape[0] * shape[1]].reshape(shape[:2])
        if heads.size > MOST_NUMBERS:
            self._do(np.add, images[:, None], channels, heads)
        else:
            heads = images[:, None] + channels
        return heads.reshape(*heads.shape, *(1,) * self._geometry.rank)

    def _flat(self, dy: Array) -> Array | None:
        """The cells of dy in the order of the buffers; None if it has another."""
        share = self._view("share", dy.shape)
        run = zip(dy.shape, dy.strides, share.strides, strict=True)
        same = all(n == 1 or one == two for n, one, two in run)
        if not (same and dy.dtype == share.dtype and is_aligned(dy)):
            return None
        return strided(dy, (dy.size,), (dy.itemsize,))

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
        worker.reduce(block, window, y, indices)
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


def _is_looped(dx: Array, indices: Array, dy: Array) -> bool:
    """Whether a compiled loop can add dy where the indices say.

    It takes whole planes that lie one after another, of one type.
    """
    arrays = dx, indices, dy
    lie = all(array.flags.c_contiguous and is_aligned(array) for array in arrays)
    return lie and dx.dtype == dy.dtype in _LOOPED and jit_is_installed()


def _add_at(
    region: Ranges,
    size: tuple[int, ...],
    steps: tuple[int, ...],
    cells: Array,
    indices: Array,
    dy: Array,
    values: Array | None,
    heads: Array,
    *buffers: Array,
) -> None:
    """Add dy to the cells of a region of planes where the indices say.

    ``values`` are those of dy in the order of ``flat_at``, if they lie so; planes begin
    at ``heads`` and their cells lie ``steps`` apart.
    """
    at, rest, cell, outside, beyond, share, flat_at, flat_share = buffers
    total, step = math.prod(size), merged_stride(size, steps[2:])
    is_whole = region == tuple((0, n) for n in size)
    # As unsigned numbers, those below zero are the largest.
    may_run = is_whole and step is not None
    if step is not None and may_run and indices.view(np.uint64).max() < total:
        if step != 1:
            indices = np.multiply(indices, step, at)
        np.add(indices, heads, at)
        if values is None:
            np.copyto(share, dy)
            values = flat_share
        np.add.at(cells, flat_at, values)
        return
    np.less(indices, 0, outside)
    np.copyto(rest, indices)
    np.copyto(at, heads)
    for axis in reversed(range(len(size))):
        start, stop = region[axis]
        np.remainder(rest, size[axis], cell)
        np.floor_divide(rest, size[axis], rest)
        np.logical_or(outside, np.less(cell, start, beyond), outside)
        np.logical_or(outside, np.greater_equal(cell, stop, beyond), outside)
        np.multiply(np.subtract(cell, start, cell), steps[2 + axis], cell)
        np.add(at, cell, at)
    np.logical_or(outside, np.not_equal(rest, 0, beyond), outside)
    np.copyto(at, 0, where=outside)
    np.copyto(share, dy)
    np.copyto(share, 0, where=outside)
    np.add.at(cells, flat_at, flat_share)


def _runs_upward(array: Array) -> bool:
    """Whether all cells lie at whole items after the first one."""
    steps = [s for n, s in zip(array.shape, array.strides, strict=True) if n > 1]
    whole = all(step > 0 and step % array.itemsize == 0 for step in steps)
    return whole and is_aligned(array)
