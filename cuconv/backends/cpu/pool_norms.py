"""Norms over NumPy arrays: sums of powers, and of scaled ones where those overflow."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, TypeAlias, cast

import numpy as np

from cuconv.arrays import Array
from cuconv.backends.cpu.pool_sweeps import (
    SUM,
    PoolWorker,
    Reduction,
    along,
    pass_sizes,
    place_of,
    reach_of,
    run_now,
    span_of,
)
from cuconv.engine.pool_problem import PoolInputs, PoolProblem
from cuconv.geometry import Block, Range, Region
from cuconv.memory import Buffer

Limits: TypeAlias = tuple[float, float]
_BOOL = np.dtype(bool)


class NormWorker(PoolWorker):
    """Norms: roots of sums of powers."""

    @classmethod
    def _forward_buffers(
        cls, problem: PoolProblem, head: int, outputs: Sequence[int]
    ) -> Iterator[Buffer]:
        yield from super()._forward_buffers(problem, head, outputs)
        cells, sums = head * math.prod(span_of(problem, outputs)), problem.accumulate
        yield Buffer("power", cells, sums)
        if problem.norm > 1:
            steps = pass_sizes(problem, head, outputs, inner_first=False)
            yield Buffer("norms", steps[-1], sums)
            yield Buffer("largest", max(steps), sums)
            yield Buffer("scaled", max(*steps, cells), sums)
            yield Buffer("mask", max(*steps, cells), _BOOL)

    @classmethod
    def _backward_buffers(
        cls, problem: PoolProblem, head: int, cells: Sequence[int]
    ) -> Iterator[Buffer]:
        yield from super()._backward_buffers(problem, head, cells)
        own, outputs = (head * math.prod(n) for n in (cells, reach_of(problem, cells)))
        for name in ("power", "scaled"):
            yield Buffer(name, own, problem.accumulate)
        for name in ("nonzero", "mask"):
            yield Buffer(name, max(own, outputs), _BOOL)
        yield Buffer("norms", outputs, problem.accumulate)

    @property
    def _state(self) -> tuple[Any, ...]:
        """What makes this worker again, inside a step."""
        return self._problem, tuple(self._buffers), *self._buffers.values()

    def _reduce_to(
        self, block: Block, span: Range, x: Array, y: Array, indices: Array | None
    ) -> None:
        del span, indices
        norm, powers = self._problem.norm, self._view("power", x.shape)
        low, most = _safe_sums(self._problem)
        self._do(_powers, norm, most, x, powers)
        self._sweep(SUM, block, powers, y)
        self._do(_raise, y, 1 / norm)
        if norm > 1:
            limits = low ** (1 / norm), 0.99 * most ** (1 / norm)
            masks = (self._view("mask", a.shape) for a in (y, x))
            operands = block, x, powers, y, *masks
            self._do(_check_norms, limits, *operands, *self._state)

    def _backward_to(
        self, region: Region, given: PoolInputs, span: Range, target: Array
    ) -> None:
        outputs = place_of(region.images, span, region.output)
        dy, y = given.dy[outputs], cast("Array", given.y)[outputs]
        x = cast("Array", given.x)[place_of(region.images, span, region.cells)]
        share, norm = self._view("share", dy.shape), self._problem.norm
        most = float(np.finfo(share.dtype).max) / (4 * self._geometry.taps)
        views = (self._view(n, dy.shape) for n in ("norms", "nonzero", "mask"))
        self._do(_norm_shares, norm, most, dy, y, share, *views)
        self._sweep_back(region, share, target)
        views = (self._view(name, x.shape) for name in ("power", "nonzero", "mask"))
        operands = norm, region, dy, y, x, target, *views
        self._do(_multiply_by_slopes, *operands, *self._state)

    def scale_norms(
        self, limits: Limits, block: Block, window: Array, norms: Array, mask: Array
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
        largest_of = Reduction.to_maxima(target.dtype)
        for axis, into in self._stages(source, block.shape, target, inner_first=False):
            largest = self._view("largest", into.shape)
            self._reduce(largest_of, source, largest, axis, block)
            np.clip(largest, limits.smallest_subnormal, limits.max, out=largest)
            into.fill(0)
            windows, outputs = self._geometry.axes[axis], block.output[axis]
            by_tap = windows.goes_by_tap(outputs[1] - outputs[0])
            for meeting in windows.meetings(outputs, block.window[axis]):
                part = source[along(axis, meeting.cells)]
                at = along(axis, meeting.outputs)
                scaled = self._view("scaled", part.shape)
                _raise(np.divide(part, largest[at], scaled), norm)
                if by_tap:
                    np.add(into[at], scaled, into[at])
                else:
                    np.add.reduce(scaled, 2 + axis, None, into[at], keepdims=True)
            _raise(into, 1 / norm)
            np.multiply(into, largest, into)
            source = into

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


def _raise(values: Array, power: float) -> None:
    """Raise values to a power, in place."""
    if power == 2:
        np.multiply(values, values, values)
    elif power == 0.5:
        np.sqrt(values, values)
    elif power != 1:
        np.power(values, power, values)


def _safe_sums(problem: PoolProblem) -> Limits:
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
    limits: Limits,
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


def _worker(
    problem: PoolProblem, names: tuple[str, ...], *buffers: Array
) -> NormWorker:
    """A worker whose steps are run at once."""
    return NormWorker(problem, dict(zip(names, buffers, strict=True)), run_now)


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
