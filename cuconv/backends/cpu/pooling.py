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
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from cuconv.arrays import (
    Array,
    ArrayStub,
    DType,
    is_aligned,
    is_half,
    merged_stride,
    stored,
    strided,
)
from cuconv.backends.cpu.machine import call_overhead, jit_is_installed
from cuconv.engine.pool_problem import (
    MAXIMUM,
    MEAN,
    NORM,
    PoolInputs,
    PoolProblem,
    PoolTiling,
)
from cuconv.geometry import Block, Range, Ranges, Region, WindowGeometry
from cuconv.memory import Buffer, MemoryLimitError, is_little, workspace_bytes

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


# The most numbers that a step takes as an array of its own, made beforehand.
_MOST_NUMBERS = 512

# Windows of fewer cells along the last axis are slower than two passes, where there are
# more cells than this: (1, 64, 112, 112), 2×2, 1.6 ms and 1.1.
_RUN, _WHOLE = 4, 2**14

Do: TypeAlias = Callable[..., None]
Buffers: TypeAlias = dict[str, Array]
_Limits: TypeAlias = tuple[float, float]


class CpuPools:
    """See `cuconv.backends.PoolBackend`; ``do`` and ``each`` are a backend's."""

    def __init__(self, do: Do, each: Callable[..., None], workers: int) -> None:
        self._do, self._each, self._workers = do, each, workers

    def tiling(self, problem: PoolProblem, limit: int) -> PoolTiling:
        geometry = problem.geometry
        cells = geometry.images * geometry.channels * max(geometry.cells, 1)
        is_large = cells > _WORTH_WORKERS
        workers = self._workers if is_large else 1
        for count in sorted({workers, 1}, reverse=True):
            budget = _PIECE if count == 1 else min(_PIECE, cells // (2 * count))
            while budget:
                tiling = _tiling(problem, budget, count)
                if _call_bytes(problem, tiling) <= limit:
                    return tiling._replace(threads=self._workers if is_large else 0)
                if is_little(_buffers(problem, tiling)):
                    break
                budget //= 2
        raise MemoryLimitError(limit, _call_bytes(problem, tiling), "a piece")

    def buffers(self, problem: PoolProblem, tiling: PoolTiling) -> tuple[Buffer, ...]:
        return _buffers(problem, tiling)

    def reduce(
        self,
        problem: PoolProblem,
        tiling: PoolTiling,
        scratch: tuple[Buffers, ...],
        x: Array,
        y: Array,
        indices: Array | None,
    ) -> None:
        def body(number: int, piece: tuple[Range, Block], worker: "_Worker") -> None:
            del number
            span, block = piece
            place = _place(block.images, span, block.output)
            window = x[_place(block.images, span, block.window)]
            found = None if indices is None else indices[place]
            worker.reduce(block, window, y[place], found)

        blocks = problem.geometry.blocks(tiling.tile)
        self._run(problem, tiling, scratch, blocks, body)

    def backward(
        self,
        problem: PoolProblem,
        tiling: PoolTiling,
        scratch: tuple[Buffers, ...],
        given: PoolInputs,
        dx: Array,
    ) -> None:
        def body(number: int, piece: tuple[Range, Region], worker: "_Worker") -> None:
            del number
            span, region = piece
            into = dx[_place(region.images, span, region.cells)]
            if not region.is_reached:
                self._do(np.ndarray.fill, into, 0)
                return
            worker.backward(region, given, span, into)

        regions = problem.geometry.regions(tiling.tile)
        self._run(problem, tiling, scratch, regions, body)

    def _run(
        self,
        problem: PoolProblem,
        tiling: PoolTiling,
        scratch: tuple[Buffers, ...],
        pieces: Iterable[Any],
        body: Callable[..., None],
    ) -> None:
        """Share out the pieces, each with some of the channels."""
        channels, step = problem.geometry.channels, tiling.channels
        items = (
            ((start, min(start + step, channels)), piece)
            for piece in pieces
            for start in range(0, channels, step)
        )
        workers = tuple(_Worker(problem, buffers, self._do) for buffers in scratch)
        self._each(items, body, workers, single_threaded=tiling.workers == 1)


def _call_bytes(problem: PoolProblem, tiling: PoolTiling) -> int:
    """Everything that a call takes beyond its arrays."""
    buffers = workspace_bytes(_buffers(problem, tiling)) * tiling.workers
    item = problem.accumulate.itemsize
    return buffers + call_overhead(tiling.workers, max(item, 8))


def _call(function: Callable[..., Any], *operands: Any) -> None:
    function(*operands)


def _maximum(one: Array, two: Array, out: Array) -> None:
    np.maximum(one, two, out=out)


def _quiet(function: Callable[..., Any]) -> Callable[..., None]:
    """A function of halves: bfloat16 takes it for a mistake to compare with a NaN."""

    def call(*operands: Any) -> None:
        with np.errstate(invalid="ignore"):
            function(*operands)

    return call


def _comparing(function: Callable[..., Any], dtype: DType) -> Callable[..., Any]:
    """A function that compares values of this type."""
    return _quiet(function) if is_half(dtype) else function


class _Reduction(NamedTuple):
    """What is made of two arrays, of an axis, and what of none."""

    pair: Callable[..., Any]
    axis: Callable[..., Any]
    start: Any

    @classmethod
    def to_maxima(cls, dtype: DType) -> "_Reduction":
        pair, axis = (_comparing(f, dtype) for f in (_maximum, np.maximum.reduce))
        return cls(pair, axis, _least(dtype))


_SUM = _Reduction(np.add, np.add.reduce, 0)


def _least(dtype: DType) -> Any:
    """What every value of a type is at least."""
    if dtype.kind in "iu":
        return np.iinfo(dtype).min
    return False if dtype.kind == "b" else -np.inf


class _Worker:
    """One worker: its buffers, and the divisors that it has worked out last.

    Everything that is done with arrays goes through ``do``, on stubs too: what depends
    on their values is inside one function.
    """

    def __init__(self, problem: PoolProblem, buffers: Buffers, do: Do) -> None:
        self._problem = problem
        self._geometry = problem.geometry
        self._buffers = buffers
        self._do = do
        self._divisors: tuple[Ranges, Array] | None = None

    @property
    def _state(self) -> tuple[Any, ...]:
        """What makes this worker again, inside a step."""
        return self._problem, tuple(self._buffers), *self._buffers.values()

    def reduce(
        self, block: Block, window: Array, y: Array, indices: Array | None
    ) -> None:
        """Reduce one block of windows, to ``y`` and its places to ``indices``."""
        problem = self._problem
        target = y if y.dtype == problem.accumulate else self._view("y", y.shape)
        if problem.kind == MAXIMUM:
            to_maxima = _Reduction.to_maxima(y.dtype)
            seen = self._sweep(to_maxima, block, window, target, indices)
            if indices is not None:
                self._find(block, seen, indices)
        elif problem.kind == MEAN:
            self._sweep(_SUM, block, window, target)
            divisor = self._divisor(block.output, window)
            self._do(np.divide, target, divisor, target)
        else:
            powers = self._view("power", window.shape)
            low, most = _safe_sums(problem)
            self._do(_powers, problem.norm, most, window, powers)
            self._sweep(_SUM, block, powers, target)
            self._do(_raise, target, 1 / problem.norm)
            if problem.norm > 1:
                limits = low ** (1 / problem.norm), 0.99 * most ** (1 / problem.norm)
                masks = (self._view("mask", a.shape) for a in (target, window))
                operands = block, window, powers, target, *masks
                self._do(_check_norms, limits, *operands, *self._state)
        if target is not y:
            self._copy(target, y)

    def scale_norms(
        self, limits: _Limits, block: Block, window: Array, norms: Array, mask: Array
    ) -> None:
        """Compute those norms anew that are not within the limits."""
        scaled = self._view("norms", norms.shape)
        self._add_scaled(block, window, scaled)
        for outside, limit in zip((np.less, np.greater_equal), limits, strict=True):
            np.copyto(norms, scaled, where=outside(norms, limit, mask))

    def _add_scaled(self, block: Block, window: Array, target: Array) -> None:
        """Norms axis by axis, each divided by its largest element before the power."""
        norm, limits = self._problem.norm, np.finfo(target.dtype)
        source = self._view("power", window.shape)
        _powers(1, math.inf, window, source)
        largest_of = _Reduction.to_maxima(target.dtype)
        for axis, into in self._stages(source, block.shape, target, inner_first=False):
            largest = self._view("largest", into.shape)
            self._reduce(largest_of, source, largest, axis, block)
            np.clip(largest, limits.smallest_subnormal, limits.max, out=largest)
            into.fill(0)
            windows, outputs = self._geometry.axes[axis], block.output[axis]
            by_tap = windows.goes_by_tap(outputs[1] - outputs[0])
            for meeting in windows.meetings(outputs, block.window[axis]):
                part = source[_along(axis, meeting.cells)]
                at = _along(axis, meeting.outputs)
                scaled = self._view("scaled", part.shape)
                _raise(np.divide(part, largest[at], scaled), norm)
                if by_tap:
                    np.add(into[at], scaled, into[at])
                else:
                    np.add.reduce(scaled, 2 + axis, None, into[at], keepdims=True)
            _raise(into, 1 / norm)
            np.multiply(into, largest, into)
            source = into

    def _copy(self, source: Any, target: Array) -> None:
        """Copy with a cast."""
        self._do(np.ndarray.__setitem__, target, ..., source)

    def _sweep(
        self,
        step: _Reduction,
        block: Block,
        source: Array,
        target: Array,
        indices: Array | None = None,
    ) -> list[Array]:
        """Reduce axis by axis, the last time to ``target``; what each pass has read.

        And the target, last.
        """
        cells = None
        if indices is None and (step is not _SUM or self._sums_alike(source)):
            cells = self._single(block.output, block.window)
        if cells is not None:
            axes, part = tuple(range(2, source.ndim)), source[(..., *cells)]
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
        *passes, last = _passes(self._geometry, inner_first=inner_first)
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
        step: _Reduction,
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
        seed = None if first is None else source[_along(axis, first.cells)]
        if seed is None:
            self._do(np.ndarray.fill, into, step.start)
        for meeting in windows.meetings(outputs, block.window[axis]):
            part = source[_along(axis, meeting.cells)]
            place = into[_along(axis, meeting.outputs)]
            if not by_tap:
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

    def _find(self, block: Block, seen: list[Array], indices: Array) -> None:
        """Find the first cell of every maximum in its plane; -1 where there is none."""
        geometry = self._geometry
        total = geometry.cells
        flag = None
        if seen[-1].dtype.kind not in "biu":
            # Kept where a NaN would be marked: those are marked only where there are
            # some.
            flag = self._buffers["nan"][:1]
            note = _comparing(_note_nan, seen[-1].dtype)
            self._do(note, seen[-1], self._view("mask", seen[-1].shape), flag)
        passes = _passes(geometry, inner_first=True)
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
            cells = _along(axis, meeting.cells)
            part, place = source[cells], into[_along(axis, meeting.outputs)]
            at = _along(axis, meeting.outputs)
            is_whole = by_tap and meeting.outputs == everywhere
            mask, nan = (self._view(name, part.shape) for name in ("mask", "nan"))
            operands = flag, mask, nan, part, best[at], found[cells]
            keep = _comparing(_keep_best, part.dtype)
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

    def _numbers(self, buffer: Array, start: int, step: int, total: int = 0) -> Array:
        """Count up in a buffer, or in an array made now where that is short."""
        count = buffer.shape[0]
        if count > _MOST_NUMBERS:
            self._do(_count_up, buffer, start, step, total)
            return buffer
        numbers = np.empty(count, buffer.dtype)
        _count_up(numbers, start, step, total)
        return numbers

    def backward(
        self, region: Region, given: PoolInputs, span: Range, dx: Array
    ) -> None:
        """Write the gradient of one region of cells."""
        problem = self._problem
        outputs = _place(region.images, span, region.output)
        if problem.kind == MAXIMUM:
            self._add_at(region, given, span, dx)
            return
        target = dx if dx.dtype == problem.accumulate else self._view("sum", dx.shape)
        dy = given.dy[outputs]
        share = self._view("share", dy.shape)
        x, y = given.x, given.y
        if problem.kind == MEAN:
            by = self._divisor(region.output, dy)
            self._do(
                _divide_cast if dy.dtype != share.dtype else np.divide, dy, by, share
            )
        else:
            x = cast("Array", x)[_place(region.images, span, region.cells)]
            y = cast("Array", y)[outputs]
            size, zero, mask = (
                self._view(n, dy.shape) for n in ("norms", "nonzero", "mask")
            )
            most = float(np.finfo(share.dtype).max) / (4 * self._geometry.taps)
            self._do(_norm_shares, problem.norm, most, dy, y, share, size, zero, mask)
        self._sweep_back(region, share, target)
        if x is not None and y is not None:
            names = "power", "nonzero", "mask"
            views = (self._view(name, x.shape) for name in names)
            operands = problem.norm, region, dy, y, x, target, *views
            self._do(_multiply_by_slopes, *operands, *self._state)
        if target is not dx:
            self._copy(target, dx)

    def scale_gradient(
        self, region: Region, dy: Array, y: Array, x: Array, dx: Array
    ) -> None:
        """Compute anew what is not finite, as ``dy · (|x| / y)^(p - 1) · sign(x)``.

        By the squares of their roots, none of which overflows or underflows.
        """
        view, power = self._view, self._problem.norm - 1
        bad = np.logical_not(
            np.isfinite(dx, view("mask", x.shape)), view("mask", x.shape)
        )
        root_x, root_y = view("power", x.shape), view("norms", y.shape)
        root_dy = view("share", dy.shape)
        for values, root in ((dy, root_dy), (y, root_y), (x, root_x)):
            zero = view("nonzero", values.shape)
            _powers(0.5, math.inf, values, root)
            np.equal(root, 0, zero)
            if values is y:
                # Where there is no norm, there is no derivative.
                np.copyto(root_y, 1, where=zero)
                np.multiply(root_dy, 0, root_dy, where=zero)
        np.copyto(dx, 0, where=bad)
        axes, cells = self._geometry.axes, self._readable(region)
        # In one order, by tap or by output: a sum must not depend on the region.
        each = (
            sorted(axis.meetings(*ranges), key=lambda meeting: -meeting.outputs.start)
            for axis, *ranges in zip(axes, region.output, cells, strict=True)
        )
        for meetings in product(*each):
            at = (..., *(meeting.cells for meeting in meetings))
            under = (..., *(meeting.outputs for meeting in meetings))
            root, where = view("scaled", root_x[at].shape), bad[at]
            np.divide(root_x[at], root_y[under], root, where=where)
            np.copyto(root, 1, where=zero[at])
            np.power(root, power, root, where=where)
            np.multiply(root, root_dy[under], root, where=where)
            np.multiply(root, root, root, where=where)
            np.copysign(root, dy[under], out=root, dtype=root.dtype, where=where)
            np.add(dx[at], root, dx[at], where=where)
        np.copyto(root_x, x)
        np.multiply(dx, np.sign(root_x, root_x), dx, where=bad)

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
                place = into[_along(axis, meeting.cells)]
                part = source[_along(axis, meeting.outputs)]
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

    def _add_at(
        self, region: Region, given: PoolInputs, span: Range, dx: Array
    ) -> None:
        """Add dy where the indices say; an index out of the plane names no cell."""
        indices = self._indices(region, given, span)
        dy = given.dy[_place(region.images, span, region.output)]
        is_whole = tuple(dx.shape[2:]) == self._geometry.size
        if is_whole and dy.size and _is_looped(dx, indices, dy):
            from cuconv.backends.cpu import loops  # noqa: PLC0415 - Numba, when first needed

            planes = math.prod(dx.shape[:2])
            cells, places, values = (a.reshape(planes, -1) for a in (dx, indices, dy))
            self._do(loops.add_in_planes, cells, places.view(np.uint64), values)
            return
        target = dx
        if dx.dtype != self._problem.accumulate or not _runs_upward(dx):
            target = self._view("sum", dx.shape)
        self._do(np.ndarray.fill, target, 0)
        steps = [step // target.itemsize for step in target.strides]
        reach = zip(target.shape, steps, strict=True)
        length = 1 + sum((n - 1) * step for n, step in reach)
        names = ("at", "rest", "cell", "mask", "nan", "share")
        self._do(
            _add_at,
            *(region.cells, self._geometry.size, tuple(steps)),
            strided(target, (length,), (target.itemsize,)),
            *(indices, dy, self._flat(dy), self._heads(dx.shape, steps)),
            *(self._view(name, indices.shape) for name in names),
            *(self._buffers[name][: dy.size] for name in ("at", "share")),
        )
        if target is not dx:
            self._copy(target, dx)

    def _heads(self, shape: Sequence[int], steps: Sequence[int]) -> Array:
        """Where every plane of a piece begins."""
        images, channels = (
            self._numbers(self._buffers[name][: shape[axis]], 0, steps[axis])
            for axis, name in enumerate(("images", "channels"))
        )
        heads = self._buffers["heads"][: shape[0] * shape[1]].reshape(shape[:2])
        if heads.size > _MOST_NUMBERS:
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
        outputs = _place(region.images, span, region.output)
        if given.x is None:
            return cast("Array", given.indices)[outputs]
        block = self._geometry.block(region.images, region.output)
        shape = given.dy[outputs].shape
        y, indices = self._view("y", shape), self._view("indices", shape)
        window = given.x[_place(region.images, span, block.window)]
        worker = _Worker(self._problem.search, self._buffers, self._do)
        worker.reduce(block, window, y, indices)
        return indices

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
        if divisor.size <= _MOST_NUMBERS:
            divisor, do = np.empty(sizes, divisor.dtype), _call
        do(np.ndarray.fill, divisor, 1)
        for axis, (start, _) in enumerate(outputs):
            counts = self._buffers["counts"][: sizes[axis]]
            operands = self._problem, axis, start
            if counts.size <= _MOST_NUMBERS:
                counts = np.empty(counts.size, counts.dtype)
                _count_taps(*operands, counts)
            else:
                self._do(_count_taps, *operands, counts)
            counts = counts.reshape(-1, *(1,) * (len(sizes) - 1 - axis))
            do(np.multiply, divisor, counts, divisor)
        return divisor

    def _view(self, name: str, shape: Sequence[int]) -> Array:
        """A buffer as (N, C, *spatial), in the axis order of the layout."""
        head = (shape[0], 1, shape[1])
        first = self._geometry.channels_first
        return stored(
            self._buffers[name], head, (), tuple(shape[2:]), channels_first=first
        ).cells[:, 0]


def _divide_cast(values: Array, by: Any, out: Array) -> None:
    np.divide(values, by, out=out, dtype=out.dtype)


def _raise(values: Array, power: float) -> None:
    """Raise values to a power, in place."""
    if power == 2:
        np.multiply(values, values, values)
    elif power == 0.5:
        np.sqrt(values, values)
    elif power != 1:
        np.power(values, power, values)


def _safe_sums(problem: PoolProblem) -> _Limits:
    """The least sum of powers that has full accuracy, and the largest power.

    The powers that underflow are less than eps² of such a sum; four times as many
    elements as a window has do not overflow.
    """
    limits = np.finfo(problem.accumulate)
    if problem.norm <= 1:
        return 0.0, math.inf
    most = float(limits.max) / (4 * problem.geometry.taps)
    return float(limits.tiny) / float(limits.eps) ** 2, most


def _powers(power: float, most: float, values: Array, out: Array) -> None:
    """``|values| ** power``, and ``most`` where that is more."""
    with np.errstate(over="ignore"):
        if power == 2 and values.dtype == out.dtype:
            np.multiply(values, values, out)
        else:
            np.absolute(values, out=out, dtype=out.dtype)
            _raise(out, power)
    if power > 1 and not out.max(initial=0) <= most:
        np.minimum(out, most, out=out)


def _check_norms(
    limits: _Limits,
    block: Block,
    window: Array,
    powers: Array,
    norms: Array,
    mask: Array,
    cells: Array,
    *state: Any,
) -> None:
    """Compute norms anew where their sums of powers overflow or underflow."""
    low, high = limits
    most = norms.max()
    if low <= norms.min() and most < high:
        return
    # Windows of zeros are usual: all is well if no other norm is small, and no other
    # power 0.
    if not (
        most < high
        and _count(np.less, norms, low, mask) == _count(np.equal, norms, 0, mask)
        and _count(np.equal, powers, 0, cells) == _count(np.equal, window, 0, cells)
    ):
        _worker(*state).scale_norms(limits, block, window, norms, mask)


def _worker(problem: PoolProblem, names: tuple[str, ...], *buffers: Array) -> _Worker:
    """A worker whose steps are run at once."""
    return _Worker(problem, dict(zip(names, buffers, strict=True)), _call)


def _count(test: Callable[..., Any], values: Array, limit: float, mask: Array) -> int:
    return int(np.count_nonzero(test(values, limit, mask)))


def _slopes(values: Array, power: float, nonzero: Array, mask: Array) -> None:
    """Raise to a power: 0 stays 0, and what is not a normal number becomes NaN."""
    np.not_equal(values, 0, nonzero)
    has_zeros = not nonzero.all()
    if has_zeros:
        # Far faster than masked copies where zeros are scattered.
        np.add(values, np.logical_not(nonzero, nonzero), values)
        np.logical_not(nonzero, nonzero)
    _raise(values, power)
    tiny = np.finfo(values.dtype).tiny
    if not (0 <= power <= 1 or values.min() >= tiny):
        np.copyto(values, np.nan, where=np.less(values, tiny, mask))
    if has_zeros:
        np.multiply(values, nonzero, values)


def _norm_shares(
    norm: float,
    most: float,
    dy: Array,
    y: Array,
    share: Array,
    size: Array,
    nonzero: Array,
    mask: Array,
) -> None:
    """``dy · y^(1 - p)``, and NaN where that overflows or underflows."""
    tiny = np.finfo(share.dtype).tiny
    np.copyto(share, y)
    with np.errstate(over="ignore", invalid="ignore"):
        _slopes(share, 1 - norm, nonzero, mask)
        np.multiply(share, dy, share)
    np.absolute(share, size)
    if tiny <= size.min() and size.max() <= most:
        return
    np.logical_and(nonzero, np.not_equal(dy, 0, mask), nonzero)
    for outside, limit in ((np.less, tiny), (np.greater, most)):
        np.logical_and(nonzero, outside(size, limit, mask), mask)
        np.copyto(share, np.nan, where=mask)


def _multiply_by_slopes(
    norm: float,
    region: Region,
    dy: Array,
    y: Array,
    x: Array,
    dx: Array,
    slopes: Array,
    nonzero: Array,
    mask: Array,
    *state: Any,
) -> None:
    """Multiply by ``|x|^(p - 1) · sign(x)``; compute anew what is not finite."""
    np.absolute(x, out=slopes, dtype=slopes.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        _slopes(slopes, norm - 1, nonzero, mask)
        np.copysign(slopes, x, out=slopes, dtype=slopes.dtype)
        np.multiply(dx, slopes, dx)
        is_finite = np.isfinite(dx.sum())
    if not is_finite:
        _worker(*state).scale_gradient(region, dy, y, x, dx)


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


def _count_up(numbers: Array, start: int, step: int, total: int) -> None:
    """Write (start + i) · step, or ``total`` less it, with little memory for it."""
    for first in range(0, len(numbers), _STRIP):
        part = numbers[first : first + _STRIP]
        part[...] = np.arange(start + first, start + first + len(part))
    np.multiply(numbers, step, out=numbers)
    if total:
        np.subtract(total, numbers, out=numbers)


def _count_taps(problem: PoolProblem, axis: int, start: int, counts: Array) -> None:
    """Write how many cells the divisors of outputs count along an axis."""
    for index in range(len(counts)):
        counts[index] = problem.count(axis, start + index)


def _runs_upward(array: Array) -> bool:
    """Whether all cells lie at whole items after the first one."""
    steps = [s for n, s in zip(array.shape, array.strides, strict=True) if n > 1]
    whole = all(step > 0 and step % array.itemsize == 0 for step in steps)
    return whole and is_aligned(array)


def _tiling(problem: PoolProblem, budget: int, workers: int) -> PoolTiling:
    """Pieces of about so many cells: whole planes of some channels where they fit.

    With the channels last, all channels of some cells.
    """
    g = problem.geometry
    cells = max(g.cells, 1)
    own = cells if problem.is_gradient else max(g.positions, 1)
    several = max(budget * own // cells, 1)
    fitting = several // own if g.channels_first else several
    channels = max(min(g.channels, fitting), 1)
    if not g.channels_first:
        # One channel alone NumPy would sum in another order than several.
        while channels < g.channels and (channels == 1 or g.channels % channels == 1):
            channels += 1
    if problem.is_gradient:
        tile = g.region_tile(several // channels)
        count = g.count_regions(tile)
    else:
        tile = g.tile(several // channels)
        count = g.count_blocks(tile)
    return PoolTiling(tile, channels, workers, count * -(-g.channels // channels))


def _buffers(problem: PoolProblem, tiling: PoolTiling) -> tuple[Buffer, ...]:
    """What one worker needs for a piece."""
    g, tile = problem.geometry, tiling.tile
    head = tile.images * tiling.channels
    if not problem.is_gradient:
        return _forward_buffers(problem, head, tile.cells)
    cells = head * math.prod(tile.cells)
    reached = [axis.reach(n) for axis, n in zip(g.axes, tile.cells, strict=True)]
    outputs, sums = head * math.prod(reached), problem.accumulate
    found = [Buffer("share", outputs, sums)]
    if problem.kind == MAXIMUM or problem.result != sums:
        found.append(Buffer("sum", cells, sums))
    if problem.kind == MAXIMUM:
        found += (Buffer(name, outputs, _INDEX) for name in ("at", "rest", "cell"))
        heads = {"images": tile.images, "channels": tiling.channels, "heads": head}
        found += (Buffer(name, count, _INDEX) for name, count in heads.items())
        if problem.values is None:
            return (*found, *(Buffer(name, outputs, _BOOL) for name in ("mask", "nan")))
        found.append(Buffer("indices", outputs, _INDEX))
        return (*found, *_forward_buffers(problem.search, head, reached))
    found += _stages(problem, head, reached, tile.cells, inner_first=True)
    if problem.kind == MEAN:
        return (*found, *_divisor_buffers(problem, reached))
    most = max(outputs, cells)
    found += (Buffer(name, cells, sums) for name in ("power", "scaled"))
    found += (Buffer(name, most, _BOOL) for name in ("nonzero", "mask"))
    return (*found, Buffer("norms", outputs, sums))


def _forward_buffers(
    problem: PoolProblem, head: int, outputs: Sequence[int]
) -> tuple[Buffer, ...]:
    g, sums = problem.geometry, problem.accumulate
    spans = [axis.span(n) for axis, n in zip(g.axes, outputs, strict=True)]
    inner_first = problem.with_indices
    found = list(_stages(problem, head, spans, outputs, inner_first=inner_first))
    if problem.result != sums or problem.is_search:
        found.append(Buffer("y", head * math.prod(outputs), sums))
    if problem.kind == MEAN:
        found += _divisor_buffers(problem, outputs)
    elif problem.kind == NORM:
        cells = head * math.prod(spans)
        found.append(Buffer("power", cells, sums))
        if problem.norm > 1:
            steps = list(_sizes(g, head, spans, outputs, inner_first=False))
            found.append(Buffer("norms", steps[-1], sums))
            found.append(Buffer("largest", max(steps), sums))
            found.append(Buffer("scaled", max(*steps, cells), sums))
            found.append(Buffer("mask", max(*steps, cells), _BOOL))
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
    problem: PoolProblem,
    head: int,
    before: Sequence[int],
    after: Sequence[int],
    *,
    inner_first: bool,
) -> Iterator[Buffer]:
    """What all passes but the last one leave."""
    g = problem.geometry
    *sizes, _ = _sizes(g, head, before, after, inner_first=inner_first)
    for number, size in enumerate(sizes):
        yield Buffer(f"stage{number}", size, problem.accumulate)


def _divisor_buffers(problem: PoolProblem, outputs: Sequence[int]) -> Iterator[Buffer]:
    if problem.common_divisor is None:
        real = np.empty(0, problem.accumulate).real.dtype
        yield Buffer("divisor", math.prod(outputs), real)
        yield Buffer("counts", max(outputs), real)
