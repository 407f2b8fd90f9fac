"""Pooling over NumPy arrays: axis by axis, in pieces that stay in cache.

A maximum or a sum over a box of cells is one over each of its sides in turn: 3 + 3
passes in place of 9.  Every pass goes tap by tap over strided views, all outputs at
once, so that nothing is padded and no column is made; where windows are longer than
there are outputs, it goes output by output.

The outermost axis comes first, while the cells of a row are still neighbours.  The cell
of a maximum is found in a second round, innermost axis first: along each axis, cells
that equal the maximum pass on the place that they have found so far, and the earliest
place wins.  Places are counted down from the end of the plane, so that the earliest is
the largest number, and zero is no place at all.

Gradients of sums go the same way back.  The gradient of a maximum is added where its
index says.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.lib.stride_tricks import as_strided

from cuconv.arrays import Array, DType, is_aligned, merged_stride, stored
from cuconv.backends.cpu.machine import jit_is_installed
from cuconv.backends.sharing import Shared
from cuconv.engine.pool import MAXIMUM, MEAN, NORM, PoolInputs, PoolProblem, PoolTiling
from cuconv.geometry import Block, Range, Ranges, Region, WindowGeometry
from cuconv.memory import (
    Buffer,
    MemoryLimitError,
    aligned_start,
    carve,
    workspace_bytes,
)

if TYPE_CHECKING:
    from cuconv.backends.cpu.backend import CpuBackend

# Cells of x in a piece.  (8, 64, 112, 112), float32, 3×3 of stride 2, one core of an
# AMD EPYC with 32 MiB of L3 and other work to do: pieces of 2^16, 2^17, 2^18 and 2^19
# took 10.8, 9.0, 8.2 and 7.5 ms for maxima, 8.3, 6.4, 5.4 and 4.8 for their gradient.
_PIECE = 2**19
# Below this many cells a second worker costs more than it saves.
_WORTH_WORKERS = 2**17
# Sums that a compiled loop adds up; NumPy's keeps other threads waiting.
_LOOPED = np.dtype(np.float32), np.dtype(np.float64)
_INDEX, _BOOL = np.dtype(np.int64), np.dtype(bool)
# Numbers that are counted up at a time.
_STRIP = 1024


class CpuPools:
    """See `cuconv.backends.Pools`."""

    def __init__(self, backend: "CpuBackend", check: Callable[[], None]) -> None:
        self._backend = backend
        self._check = check

    def tiling(self, pooling: PoolProblem, limit: int) -> PoolTiling:
        geometry = pooling.geometry
        cells = geometry.images * geometry.channels * max(geometry.cells, 1)
        workers = self._backend.workers() if cells > _WORTH_WORKERS else 1
        for count in sorted({workers, 1}, reverse=True):
            budget = _PIECE if count == 1 else min(_PIECE, cells // (2 * count))
            while budget:
                tiling = _cut(pooling, budget, count)
                if self._bytes(pooling, tiling) <= limit:
                    return tiling
                budget //= 2
        raise MemoryLimitError(limit, self._bytes(pooling, tiling), "one cell")

    def reduce(
        self,
        pooling: PoolProblem,
        tiling: PoolTiling,
        x: Array,
        y: Array,
        indices: Array | None,
    ) -> None:
        geometry = pooling.geometry

        def work(worker: "_Worker", span: Range, block: Block) -> None:
            place = _place(block.images, span, block.output)
            window = x[_place(block.images, span, block.window)]
            found = None if indices is None else indices[place]
            worker.reduce(block, window, y[place], found)

        self._run(pooling, tiling, geometry.blocks(tiling.tile), work)

    def backward(
        self, pooling: PoolProblem, tiling: PoolTiling, given: PoolInputs, dx: Array
    ) -> None:
        geometry = pooling.geometry

        def work(worker: "_Worker", span: Range, region: Region) -> None:
            into = dx[_place(region.images, span, region.cells)]
            if not region.is_reached:
                into[...] = 0
                return
            worker.backward(region, given, span, into)

        self._run(pooling, tiling, geometry.regions(tiling.tile), work)

    def _bytes(self, pooling: PoolProblem, tiling: PoolTiling) -> int:
        buffers = workspace_bytes(_buffers(pooling, tiling)) * tiling.workers
        item = pooling.accumulate.itemsize
        return buffers + self._backend.overhead(tiling.workers, max(item, 8))

    def _run(
        self,
        pooling: PoolProblem,
        tiling: PoolTiling,
        pieces: Iterator[Any],
        work: Callable[["_Worker", Range, Any], None],
    ) -> None:
        channels = pooling.geometry.channels
        buffers = _buffers(pooling, tiling)
        each = workspace_bytes(buffers)
        items = Shared(
            ((start, min(start + tiling.channels, channels)), piece)
            for piece in pieces
            for start in range(0, channels, tiling.channels)
        )

        with self._backend.memory(each * tiling.workers) as raw:

            def body(index: int) -> None:
                own = raw[index * each : (index + 1) * each]
                # Buffers of no cells are there too: an axis of x may be empty.
                views = carve(own, aligned_start(own) if each else 0, buffers)
                worker = _Worker(pooling, views)
                for span, piece in items:
                    self._check()
                    work(worker, span, piece)

            self._backend.parallel(
                body, tiling.workers, single_threaded=tiling.workers == 1
            )


class _Worker:
    """One worker: its buffers, and the divisors that it has worked out last."""

    def __init__(self, pooling: PoolProblem, buffers: dict[str, Array]) -> None:
        self._pooling = pooling
        self._geometry = pooling.geometry
        self._buffers = buffers
        self._divisors: tuple[Ranges, Array] | None = None

    def reduce(
        self, block: Block, window: Array, y: Array, indices: Array | None
    ) -> None:
        """Reduce one block of windows, to ``y`` and its places to ``indices``."""
        pooling = self._pooling
        target = y if y.dtype == pooling.accumulate else self._view("y", y.shape)
        if pooling.kind == MAXIMUM:
            # To compare with a NaN is no mistake, though bfloat16 says that it is one.
            with np.errstate(invalid="ignore"):
                least = _least(y.dtype)
                seen = self._sweep(np.maximum, block, window, target, least, indices)
                if indices is not None:
                    self._find(block, seen, indices)
        elif pooling.kind == MEAN:
            self._sweep(np.add, block, window, target, 0)
            np.divide(target, self._divisor(block.output), out=target)
        else:
            cells = self._view("power", window.shape)
            np.absolute(window, out=cells, dtype=cells.dtype)
            _raise(cells, pooling.norm)
            self._sweep(np.add, block, cells, target, 0)
            _raise(target, 1 / pooling.norm)
        if target is not y:
            np.copyto(y, target, casting="unsafe")

    def _sweep(
        self,
        step: np.ufunc,
        block: Block,
        source: Array,
        target: Array,
        start: Any,
        indices: Array | None = None,
    ) -> list[Array]:
        """Reduce axis by axis, the last time to ``target``; what each pass has read.

        And the target, last.
        """
        cells = None
        if indices is None and (step is np.maximum or self._sums_alike(source)):
            cells = self._single(block.output, block.window)
        if cells is not None:
            axes = tuple(range(2, source.ndim))
            how = {"out": target, "keepdims": True, "initial": start}
            step.reduce(source[(..., *cells)], axes, target.dtype, **how)
            return [source, target]
        passes = _passes(self._geometry, inner_first=indices is not None)
        seen = [source]
        for number, axis in enumerate(passes):
            shape = list(source.shape)
            shape[2 + axis] = block.shape[axis]
            is_last = number == len(passes) - 1
            into = target if is_last else self._view(f"stage{number}", shape)
            self._reduce(step, source, into, axis, block, start)
            source = into
            seen.append(into)
        return seen

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
        step: np.ufunc,
        source: Array,
        into: Array,
        axis: int,
        block: Block,
        start: Any,
    ) -> None:
        """Reduce one axis."""
        windows, outputs = self._geometry.axes[axis], block.output[axis]
        by_tap = windows.goes_by_tap(outputs[1] - outputs[0])
        first = None
        if by_tap:
            everywhere = slice(0, outputs[1] - outputs[0])
            meetings = windows.meetings(outputs, block.window[axis])
            first = next((m for m in meetings if m.outputs == everywhere), None)
        if first is None:
            into[...] = start
        else:
            np.copyto(into, source[_along(axis, first.cells)])
        for meeting in windows.meetings(outputs, block.window[axis]):
            part = source[_along(axis, meeting.cells)]
            place = into[_along(axis, meeting.outputs)]
            if not by_tap:
                step.reduce(part, 2 + axis, into.dtype, place, keepdims=True)
            elif meeting != first:
                step(place, part, out=place)

    def _find(self, block: Block, seen: list[Array], indices: Array) -> None:
        """Find the first cell of every maximum in its plane; -1 where there is none."""
        geometry = self._geometry
        total = geometry.cells
        has_nan = self._has_nan(seen[-1])
        passes = _passes(geometry, inner_first=True)
        found = self._places(block, passes[0])
        np.subtract(total, found, out=found)
        for number, axis in enumerate(passes):
            if number:
                np.subtract(found, self._places(block, axis), out=found)
            best = seen[number + 1]
            into = self._view(f"places{number}", best.shape)
            self._pass_on(seen[number], best, found, into, axis, block, has_nan=has_nan)
            found = into
        np.subtract(total, found, out=indices)
        for axis in set(range(geometry.rank)) - set(passes):
            np.add(indices, self._places(block, axis), out=indices)
        nowhere = np.equal(found, 0, out=self._view("mask", found.shape))
        if nowhere.any():
            np.copyto(indices, -1, where=nowhere)

    def _pass_on(
        self,
        source: Array,
        best: Array,
        found: Array,
        into: Array,
        axis: int,
        block: Block,
        *,
        has_nan: bool,
    ) -> None:
        """Pass on, along one axis, the first place of those cells that are the best."""
        windows, outputs = self._geometry.axes[axis], block.output[axis]
        by_tap = windows.goes_by_tap(outputs[1] - outputs[0])
        into[...] = 0
        for meeting in windows.meetings(outputs, block.window[axis]):
            cells = _along(axis, meeting.cells)
            part, place = source[cells], into[_along(axis, meeting.outputs)]
            mask = self._view("mask", part.shape)
            np.equal(part, best[_along(axis, meeting.outputs)], out=mask)
            if has_nan:
                other = np.not_equal(part, part, out=self._view("nan", part.shape))
                np.logical_or(mask, other, out=mask)
            places = np.multiply(mask, found[cells], out=self._view("met", part.shape))
            if by_tap:
                np.maximum(place, places, out=place)
            else:
                np.maximum.reduce(
                    places, 2 + axis, None, place, keepdims=True, initial=0
                )

    def _has_nan(self, values: Array) -> bool:
        if values.dtype.kind in "biu":
            return False
        mask = self._view("mask", values.shape)
        return bool(np.not_equal(values, values, out=mask).any())

    def _places(self, block: Block, axis: int) -> Array:
        """The cells of a block along an axis, counted in the plane."""
        start, stop = block.window[axis]
        step = math.prod(self._geometry.size[axis + 1 :])
        places = self._buffers["places"][: stop - start]
        _count_up(places, start, step)
        inner = (1,) * (self._geometry.rank - 1 - axis)
        return places.reshape(*(1,) * (2 + axis), -1, *inner)

    def backward(
        self, region: Region, given: PoolInputs, span: Range, dx: Array
    ) -> None:
        """Write the gradient of one region of cells."""
        pooling = self._pooling
        outputs = _place(region.images, span, region.output)
        target = dx if dx.dtype == pooling.accumulate else self._view("sum", dx.shape)
        if pooling.kind == MAXIMUM:
            self._add_at(region, given, span, dx)
            return
        dy = given.dy[outputs]
        share = self._view("share", dy.shape)
        if pooling.kind == MEAN:
            by = self._divisor(region.output)
            np.divide(dy, by, out=share, dtype=share.dtype)
        elif given.y is not None:
            self._slopes(given.y[outputs], share)
            np.multiply(share, dy, out=share)
        self._sweep_back(region, share, target)
        if pooling.kind == NORM and given.x is not None:
            x = given.x[_place(region.images, span, region.cells)]
            slopes = self._view("power", x.shape)
            np.absolute(x, out=slopes, dtype=slopes.dtype)
            self._slopes(slopes, slopes, sign=-1)
            np.copysign(slopes, x, out=slopes, dtype=slopes.dtype)
            np.multiply(target, slopes, out=target)
        if target is not dx:
            np.copyto(dx, target, casting="unsafe")

    def _slopes(self, values: Array, out: Array, *, sign: int = 1) -> None:
        """``values ** (sign · (1 - p))``, and zero where the value is."""
        zero = np.equal(values, 0, out=self._view("mask", values.shape))
        np.copyto(out, values)
        np.copyto(out, 1, where=zero)
        _raise(out, sign * (1 - self._pooling.norm))
        np.copyto(out, 0, where=zero)

    def _sweep_back(self, region: Region, source: Array, target: Array) -> None:
        """Give to every cell what the windows over it hold, axis by axis."""
        readable = tuple(
            (start, max(start, min(stop, axis.end)))
            for axis, (start, stop) in zip(
                self._geometry.axes, region.cells, strict=True
            )
        )
        single = self._single(region.output, readable)
        if single is not None:
            target[...] = 0
            target[(..., *single)] = source
            return
        passes = _passes(self._geometry, inner_first=True)
        for number, axis in enumerate(passes):
            shape = list(source.shape)
            start, stop = region.cells[axis]
            shape[2 + axis] = stop - start
            is_last = number == len(passes) - 1
            into = target if is_last else self._view(f"stage{number}", shape)
            into[...] = 0
            windows = self._geometry.axes[axis]
            for meeting in windows.meetings(region.output[axis], readable[axis]):
                place = into[_along(axis, meeting.cells)]
                np.add(place, source[_along(axis, meeting.outputs)], out=place)
            source = into

    def _add_at(
        self, region: Region, given: PoolInputs, span: Range, dx: Array
    ) -> None:
        """Add dy where the indices say; an index out of the plane names no cell."""
        indices = self._indices(region, given, span)
        dy = given.dy[_place(region.images, span, region.output)]
        whole = dx.shape[2:] == self._geometry.size
        if whole and dy.size and _add_in_planes(dx, indices, dy):
            return
        target = dx
        if dx.dtype != self._pooling.accumulate or not _runs_upward(dx):
            target = self._view("sum", dx.shape)
        target[...] = 0
        steps = [step // target.itemsize for step in target.strides]
        outside = self._locate(region, indices, dx.shape, steps)
        what = self._shares(dy, outside)
        reach = zip(target.shape, steps, strict=True)
        length = 1 + sum((n - 1) * step for n, step in reach)
        cells = as_strided(target, (length,), (target.itemsize,))
        np.add.at(cells, self._buffers["at"][: dy.size], what)
        if target is not dx:
            np.copyto(dx, target, casting="unsafe")

    def _locate(
        self, region: Region, indices: Array, shape: Sequence[int], steps: list[int]
    ) -> Array | None:
        """Write to the buffer ``at`` where in a region the cells of indices lie.

        And which of them lie elsewhere, if any do.
        """
        places, heads = self._view("at", indices.shape), self._heads(shape, steps)
        size = self._geometry.size
        step = merged_stride(size, steps[2:])
        # As unsigned numbers, those below zero are the largest.
        inside = indices.view(np.uint64).max() < self._geometry.cells
        if inside and tuple(shape[2:]) == size and step is not None:
            if step != 1:
                indices = np.multiply(indices, step, out=places)
            np.add(indices, heads, out=places)
            return None
        rest, cell = (self._view(name, places.shape) for name in ("rest", "cell"))
        outside = np.less(indices, 0, out=self._view("mask", places.shape))
        beyond = self._view("nan", places.shape)
        np.copyto(rest, indices)
        np.copyto(places, heads)
        for axis in reversed(range(len(size))):
            start, stop = region.cells[axis]
            np.remainder(rest, size[axis], out=cell)
            np.floor_divide(rest, size[axis], out=rest)
            np.logical_or(outside, np.less(cell, start, out=beyond), out=outside)
            np.logical_or(outside, np.greater_equal(cell, stop, out=beyond), outside)
            np.multiply(np.subtract(cell, start, out=cell), steps[2 + axis], out=cell)
            np.add(places, cell, out=places)
        np.logical_or(outside, np.not_equal(rest, 0, out=beyond), out=outside)
        np.copyto(places, 0, where=outside)
        return outside

    def _heads(self, shape: Sequence[int], steps: Sequence[int]) -> Array:
        """Where every plane of a piece begins."""
        images, channels = (self._buffers[name] for name in ("images", "channels"))
        for axis, numbers in enumerate((images, channels)):
            _count_up(numbers[: shape[axis]], 0, steps[axis])
        heads = self._buffers["heads"][: shape[0] * shape[1]].reshape(shape[:2])
        np.add(images[: shape[0], None], channels[: shape[1]], out=heads)
        return heads.reshape(*heads.shape, *(1,) * self._geometry.rank)

    def _shares(self, dy: Array, outside: Array | None) -> Array:
        """What is given, in the order of the buffers; nothing to what lies outside."""
        share = self._view("share", dy.shape)
        run = zip(dy.shape, dy.strides, share.strides, strict=True)
        same = all(n == 1 or one == two for n, one, two in run)
        if same and outside is None and dy.dtype == share.dtype and is_aligned(dy):
            return as_strided(dy, (dy.size,), (dy.itemsize,))
        np.copyto(share, dy)
        if outside is not None:
            np.copyto(share, 0, where=outside)
        return cast("Array", self._buffers["share"][: dy.size])

    def _indices(self, region: Region, given: PoolInputs, span: Range) -> Array:
        """The indices of the windows over a region, given or found in x."""
        outputs = _place(region.images, span, region.output)
        if given.x is None:
            return cast("Array", given.indices)[outputs]
        block = self._geometry.block(region.images, region.output)
        shape = given.dy[outputs].shape
        y, indices = self._view("y", shape), self._view("indices", shape)
        window = given.x[_place(region.images, span, block.window)]
        _Worker(self._pooling.search, self._buffers).reduce(block, window, y, indices)
        return indices

    def _divisor(self, outputs: Ranges) -> Any:
        """What the sums of these outputs are divided by: a number, or one for each."""
        common = self._pooling.common_divisor
        if common is not None:
            return common
        if self._divisors is None or self._divisors[0] != outputs:
            sizes = [stop - start for start, stop in outputs]
            divisor = self._buffers["divisor"][: math.prod(sizes)].reshape(sizes)
            divisor[...] = 1
            for axis, span in enumerate(outputs):
                counts = self._buffers["counts"][: sizes[axis]]
                for index, output in enumerate(range(*span)):
                    counts[index] = self._pooling.count(axis, output)
                counts = counts.reshape(-1, *(1,) * (len(sizes) - 1 - axis))
                np.multiply(divisor, counts, out=divisor)
            self._divisors = outputs, divisor
        return self._divisors[1]

    def _view(self, name: str, shape: Sequence[int]) -> Array:
        """A buffer as (N, C, *spatial), in the axis order of the layout."""
        head = (shape[0], 1, shape[1])
        first = self._geometry.channels_first
        return stored(
            self._buffers[name], head, (), tuple(shape[2:]), channels_first=first
        ).cells[:, 0]


def _add_in_planes(dx: Array, indices: Array, dy: Array) -> bool:
    """Add dy where the indices say by a compiled loop; false where it cannot.

    It takes whole planes that lie one after another, of one type.
    """
    arrays = dx, indices, dy
    lie = all(array.flags.c_contiguous and is_aligned(array) for array in arrays)
    if not (lie and dx.dtype == dy.dtype in _LOOPED and jit_is_installed()):
        return False
    from cuconv.backends.cpu import loops as jit  # noqa: PLC0415 - Numba, when first needed

    planes = math.prod(dx.shape[:2])
    cells, places, values = (array.reshape(planes, -1) for array in arrays)
    jit.add_in_planes(cells, places.view(np.uint64), values)
    return True


def _passes(geometry: WindowGeometry, *, inner_first: bool) -> list[int]:
    """The axes along which there is something to reduce, in the order of passes."""
    axes = range(geometry.rank)
    wanted = [axis for axis in axes if not geometry.axes[axis].is_identity]
    return sorted(wanted or [geometry.rank - 1], reverse=inner_first)


def _place(images: Range, channels: Range, spans: Ranges) -> tuple[slice, ...]:
    return (slice(*images), slice(*channels), *(slice(*span) for span in spans))


def _along(axis: int, part: slice) -> tuple[slice, ...]:
    """A part of (N, C, *spatial) along one spatial axis."""
    return (*(slice(None),) * (2 + axis), part)


def _least(dtype: DType) -> Any:
    """What every value of a type is at least."""
    if dtype.kind in "iu":
        return np.iinfo(dtype).min
    return False if dtype.kind == "b" else -np.inf


def _raise(values: Array, power: float) -> None:
    """Raise values to a power, in place."""
    if power == 2:
        np.multiply(values, values, out=values)
    elif power == 0.5:
        np.sqrt(values, out=values)
    elif power != 1:
        np.power(values, power, out=values)


def _count_up(numbers: Array, start: int, step: int) -> None:
    """Write (start + i) · step, with little memory for it."""
    for first in range(0, len(numbers), _STRIP):
        part = numbers[first : first + _STRIP]
        part[...] = np.arange(start + first, start + first + len(part))
    np.multiply(numbers, step, out=numbers)


def _runs_upward(array: Array) -> bool:
    """Whether all cells lie at whole items after the first one."""
    steps = [s for n, s in zip(array.shape, array.strides, strict=True) if n > 1]
    whole = all(step > 0 and step % array.itemsize == 0 for step in steps)
    return whole and is_aligned(array)


def _cut(pooling: PoolProblem, budget: int, workers: int) -> PoolTiling:
    """Pieces of about so many cells: whole planes of some channels where they fit.

    With the channels last, all channels of some cells.
    """
    g = pooling.geometry
    cells = max(g.cells, 1)
    own = cells if pooling.is_gradient else max(g.positions, 1)
    several = max(budget * own // cells, 1)
    fitting = several // own if g.channels_first else several
    channels = max(min(g.channels, fitting), 1)
    if not g.channels_first:
        # One channel alone NumPy would sum in another order than several.
        while channels < g.channels and (channels == 1 or g.channels % channels == 1):
            channels += 1
    tile = g.region_tile if pooling.is_gradient else g.tile
    return PoolTiling(tile(several // channels), channels, workers)


def _buffers(pooling: PoolProblem, tiling: PoolTiling) -> tuple[Buffer, ...]:
    """What one worker needs for a piece."""
    g, tile = pooling.geometry, tiling.tile
    head = tile.images * tiling.channels
    if not pooling.is_gradient:
        return _forward_buffers(pooling, head, tile.cells)
    cells = head * math.prod(tile.cells)
    reached = [axis.reach(n) for axis, n in zip(g.axes, tile.cells, strict=True)]
    outputs, sums = head * math.prod(reached), pooling.accumulate
    found = [Buffer("share", outputs, sums)]
    if pooling.kind == MAXIMUM or pooling.result != sums:
        found.append(Buffer("sum", cells, sums))
    if pooling.kind == MAXIMUM:
        found += (Buffer(name, outputs, _INDEX) for name in ("at", "rest", "cell"))
        heads = {"images": tile.images, "channels": tiling.channels, "heads": head}
        found += (Buffer(name, count, _INDEX) for name, count in heads.items())
        if pooling.values is None:
            return (*found, *(Buffer(name, outputs, _BOOL) for name in ("mask", "nan")))
        found.append(Buffer("indices", outputs, _INDEX))
        return (*found, *_forward_buffers(pooling.search, head, reached))
    found += _stages(pooling, head, reached, tile.cells, inner_first=True)
    if pooling.kind == MEAN:
        return (*found, *_divisor_buffers(pooling, reached))
    most = max(outputs, cells)
    return (*found, Buffer("power", cells, sums), Buffer("mask", most, _BOOL))


def _forward_buffers(
    pooling: PoolProblem, head: int, outputs: Sequence[int]
) -> tuple[Buffer, ...]:
    g, sums = pooling.geometry, pooling.accumulate
    spans = [axis.span(n) for axis, n in zip(g.axes, outputs, strict=True)]
    inner_first = pooling.with_indices
    found = list(_stages(pooling, head, spans, outputs, inner_first=inner_first))
    if pooling.result != sums or pooling.is_search:
        found.append(Buffer("y", head * math.prod(outputs), sums))
    if pooling.kind == MEAN:
        found += _divisor_buffers(pooling, outputs)
    elif pooling.kind == NORM:
        found.append(Buffer("power", head * math.prod(spans), sums))
    elif inner_first:
        small = g.cells < 2**31
        index = np.dtype(np.int32) if small else _INDEX
        steps = list(_sizes(g, head, spans, outputs, inner_first=True))
        largest = max(*steps, head * math.prod(spans))
        found += (Buffer(f"places{i}", n, index) for i, n in enumerate(steps))
        found.append(Buffer("places", max(spans), index))
        found.append(Buffer("met", largest, index))
        found += (Buffer(name, largest, _BOOL) for name in ("mask", "nan"))
    return tuple(found)


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
    for axis in _passes(geometry, inner_first=inner_first):
        sizes[axis] = after[axis]
        yield head * math.prod(sizes)


def _stages(
    pooling: PoolProblem,
    head: int,
    before: Sequence[int],
    after: Sequence[int],
    *,
    inner_first: bool,
) -> Iterator[Buffer]:
    """What all passes but the last one leave."""
    g = pooling.geometry
    *sizes, _ = _sizes(g, head, before, after, inner_first=inner_first)
    for number, size in enumerate(sizes):
        yield Buffer(f"stage{number}", size, pooling.accumulate)


def _divisor_buffers(pooling: PoolProblem, outputs: Sequence[int]) -> Iterator[Buffer]:
    if pooling.common_divisor is None:
        real = np.empty(0, pooling.accumulate).real.dtype
        yield Buffer("divisor", math.prod(outputs), real)
        yield Buffer("counts", max(outputs), real)
