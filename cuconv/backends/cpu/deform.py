"""Samples between the elements of NumPy arrays: rows of channels, gathered and summed.

x is copied once with its channels last and one zero around every axis, so that each of
the 2^rank elements around a sample is a row of channels, also outside x.  A block of
samples takes those rows, weighted; the gradient for x adds them back in the order of
the samples.  Numba's loops do the same without copies of rows, if it is installed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from cuconv.arrays import Array, grouped
from cuconv.backends.cpu.machine import jit_is_installed
from cuconv.backends.deform import DeformProblem, Samples
from cuconv.geometry import Axis, Block, Tile, tile_of
from cuconv.memory import Buffer

# Samples at a time, and elements of the rows that they take: their buffers stay in the
# L2 cache.
_SAMPLES, _ROWS = 2**13, 2**16
_INDEX, _BOOL = np.dtype(np.int64), np.dtype(bool)


class Grid(NamedTuple):
    """Everything about a block of samples that is no array.

    Rows are (parts, elements, channels of a part), ``shape`` are the elements along
    every axis with the zeros around them, and ``firsts`` as `DeformProblem.firsts`.
    """

    axes: tuple[Axis, ...]
    shape: tuple[int, ...]
    firsts: tuple[int, ...]
    offset_groups: int
    group_channels: int

    @property
    def pitches(self) -> list[int]:
        """Elements from one position of an axis to the next."""
        return [math.prod(self.shape[r + 1 :]) for r in range(len(self.shape))]

    @property
    def table(self) -> Array:
        """Along every axis: size, taps, stride, dilation, first element, pitch."""
        each = zip(self.axes, self.firsts, self.pitches, strict=True)
        return np.array([(*a[:4], first, pitch) for a, first, pitch in each])


class CpuDeform:
    """See `cuconv.backends.DeformBackend`."""

    patch_last = True

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def shared(
        self, problem: DeformProblem, images: int, dx: Array | None, *, reads: bool
    ) -> Iterator[Buffer]:
        g = problem.geometry
        cells = images * g.channels * math.prod(_shape(problem))
        if reads:
            yield Buffer("rows", cells, problem.sums)
        if dx is not None:
            yield Buffer("drows", cells, problem.sums)

    def buffers(
        self, problem: DeformProblem, positions: int, *, gradients: bool
    ) -> tuple[Buffer, ...]:
        if _has_loops(problem):
            return ()
        at_once = min(
            _SAMPLES, _ROWS // problem.part, positions * problem.geometry.taps
        )
        samples = max(at_once, 1)
        rows, rank = samples * problem.part, problem.geometry.rank
        found = (
            Buffer("numbers", (2 * rank + 6) * samples, problem.sums),
            Buffer("indices", 2 * samples, _INDEX),
            Buffer("flags", samples, _BOOL),
            Buffer("values", rows, problem.sums),
        )
        return (*found, Buffer("places", rows, _INDEX)) if gradients else found

    def load(self, problem: DeformProblem, x: Array, space: dict[str, Array]) -> None:
        rows = _rows(space["rows"], problem, x.shape[0])
        self._backend.fill(rows, 0)
        self._backend.copy(_in_parts(x, problem), _inside(rows, problem))

    def clear(self, problem: DeformProblem, dx: Array, space: dict[str, Array]) -> None:
        self._backend.fill(_rows(space["drows"], problem, dx.shape[0]), 0)

    def store(self, problem: DeformProblem, dx: Array, space: dict[str, Array]) -> None:
        rows = _rows(space["drows"], problem, dx.shape[0])
        self._backend.copy(_inside(rows, problem), _in_parts(dx, problem))

    def sample(
        self,
        x: Array,
        samples: Samples,
        columns: Array,
        space: dict[str, Array],
        own: tuple[dict[str, Array], ...],
    ) -> None:
        # Rows have been copied from x.
        self._run(sample, x.shape[0], samples, columns, space["rows"], (), own)

    def gradients(
        self,
        x: Array,
        samples: Samples,
        columns: Array,
        doffset: Array | None,
        dmask: Array | None,
        space: dict[str, Array],
        own: tuple[dict[str, Array], ...],
    ) -> None:
        more = doffset, dmask
        self._run(gradients, x.shape[0], samples, columns, space["rows"], more, own)

    def scatter(
        self,
        columns: Array,
        samples: Samples,
        dx: Array,
        space: dict[str, Array],
        own: tuple[dict[str, Array], ...],
        *,
        deterministic: bool,
    ) -> None:
        del deterministic  # rows are added in the order of the samples, always
        rows, images = space["drows"], dx.shape[0]
        self._run(scatter, images, samples, columns, rows, (), own, together=True)

    def _run(
        self,
        function: Any,
        images: int,
        samples: Samples,
        columns: Array,
        rows: Array,
        more: tuple[Array | None, ...],
        own: tuple[dict[str, Array], ...],
        *,
        together: bool = False,
    ) -> None:
        """Share out blocks of samples, or ``together`` all those of an image."""
        problem, g = samples.problem, samples.problem.geometry
        if _has_loops(problem):
            from cuconv.backends.cpu import deform_loops  # noqa: PLC0415 - imports Numba

            function = getattr(deform_loops, function.__name__)
        rows = _rows(rows, problem, images)
        most = own[0]["flags"].size if "flags" in own[0] else _SAMPLES
        sizes = tuple(stop - start for start, stop in samples.outputs)
        tile = Tile(1, tile_of(1, sizes, most).cells)
        blocks = list(g.blocks(tile, (0, 1), samples.outputs))
        items = product(range(images), [blocks] if together else [[b] for b in blocks])
        # To (N, *out, G, taps, C/G).
        columns = columns.transpose(0, *range(4, columns.ndim), 1, 3, 2)

        def body(number: int, item: tuple[int, list[Block]], buffers: Any) -> None:
            del number
            image, several = item
            for block in several:
                place = _place(block, samples)
                operands = (
                    rows[image].reshape(rows.shape[1], -1, rows.shape[-1]),
                    samples.offset[image][(..., *place)],
                    None
                    if samples.mask is None
                    else samples.mask[image][(..., *place)],
                    columns[image][place],
                    *(None if a is None else a[image][(..., *place)] for a in more),
                )
                grid = Grid(
                    g.axes,
                    _shape(problem),
                    problem.firsts(block.output),
                    problem.offset_groups,
                    g.group_channels,
                )
                self._backend.do(function, grid, *operands, *buffers.values())

        single = len(own) == 1
        self._backend.each(items, body, own, single_threaded=single)


def _has_loops(problem: DeformProblem) -> bool:
    """True if loops that Numba compiles run: for floats that need no cast."""
    return problem.uniform and problem.sums.char in "fd" and jit_is_installed()


def _place(block: Block, samples: Samples) -> tuple[slice, ...]:
    """The index of the outputs of a block among those of the samples."""
    each = zip(block.output, samples.outputs, strict=True)
    return tuple(
        slice(start - first, stop - first) for (start, stop), (first, _) in each
    )


def _shape(problem: DeformProblem) -> tuple[int, ...]:
    return tuple(size + 2 for size in problem.geometry.size)


def _rows(flat: Array, problem: DeformProblem, images: int) -> Array:
    """View a buffer as (N, parts, *elements with zeros around, channels of a part)."""
    parts, part = problem.geometry.channels // problem.part, problem.part
    shape = images, parts, *_shape(problem), part
    return flat[: math.prod(shape)].reshape(shape)


def _inside(rows: Array, problem: DeformProblem) -> Array:
    """The elements of rows that are x."""
    return rows[
        (..., *(slice(1, size + 1) for size in problem.geometry.size), slice(None))
    ]


def _in_parts(x: Array, problem: DeformProblem) -> Array:
    """View x as (N, parts, *spatial, channels of a part)."""
    g, part = problem.geometry, problem.part
    cells = grouped(
        x, g.channels // part, g.rank, channels_first=g.channels_first, batched=True
    )
    return cells.transpose(0, 1, *range(3, cells.ndim), 2)


class _Chunk(NamedTuple):
    """Samples of some taps of an offset group, (taps, *out).

    ``low`` is the row before each sample along every axis, ``fractions`` are the
    distances from it, and ``place`` is for another row.
    """

    group: int
    taps: slice
    low: Array
    place: Array
    fractions: list[Array]


class _Work(NamedTuple):
    """The buffers of a worker; see `CpuDeform.buffers`."""

    floats: Array
    indices: Array
    flags: Array
    values: Array
    whole: Array | None = None

    def numbers(self, chunk: _Chunk, count: int) -> list[Array]:
        """Arrays of a number for each sample."""
        rank = len(chunk.fractions)
        return self._views(chunk.low.shape)[rank + 1 : rank + 1 + count]

    def _views(self, shape: tuple[int, ...]) -> list[Array]:
        each = self.floats.reshape(-1, self.flags.size)
        return [a[: math.prod(shape)].reshape(shape) for a in each]

    def rows(self, chunk: _Chunk, part: int) -> Array:
        """An array of a row for each sample."""
        shape = *chunk.low.shape, part
        return self.values[: math.prod(shape)].reshape(shape)

    def places(self, chunk: _Chunk, part: int) -> Array:
        """An array of an index for each element of a row of each sample."""
        shape = *chunk.low.shape, part
        return self.whole[: math.prod(shape)].reshape(shape)  # type: ignore[index]

    def chunks(
        self, grid: Grid, offset: Array, *, drops_nan: bool = False
    ) -> Iterator[_Chunk]:
        """Locate the samples, as many taps at a time as there is room for.

        Samples outside x are moved to where both their elements are zeros; with
        ``drops_nan`` those that are not a number too.
        """
        groups, taps, rank, *out = offset.shape
        at_once = max(self.flags.size // max(math.prod(out), 1), 1)
        for group, first in product(range(groups), range(0, taps, at_once)):
            some = slice(first, min(first + at_once, taps))
            shape = some.stop - first, *out
            count = math.prod(shape)
            flag = self.flags[:count].reshape(shape)
            low, place = (a[:count].reshape(shape) for a in np.split(self.indices, 2))
            views = self._views(shape)
            fractions, floor, line = views[:rank], views[rank], views[rank + 1]
            low.fill(0)
            for r, p in enumerate(fractions):
                _positions(grid, r, some, p, line)
                np.add(p, offset[group, some, r], out=p)
                if drops_nan:
                    np.logical_not(np.greater_equal(p, -1, out=flag), out=flag)
                else:
                    np.less(p, -1, out=flag)
                size = grid.axes[r].size
                np.copyto(p, size, where=flag)
                np.minimum(p, size, out=p)
                np.subtract(p, np.floor(p, out=floor), out=p)
                np.copyto(place, floor, casting="unsafe")
                np.multiply(np.add(place, 1, out=place), grid.pitches[r], out=place)
                np.add(low, place, out=low)
            yield _Chunk(group, some, low, place, fractions)


def _positions(grid: Grid, r: int, taps: slice, into: Array, line: Array) -> None:
    """Write the positions along an axis of the taps, without their offsets."""
    axis, kernel = grid.axes[r], tuple(axis.kernel for axis in grid.axes)
    line = line.reshape(-1)[: into.shape[1 + r]]
    line.fill(axis.stride)
    line[0] = grid.firsts[r]
    np.add.accumulate(line, out=line)
    along = [1] * (into.ndim - 1)
    along[r] = line.size
    for part, tap in zip(into, range(taps.start, taps.stop), strict=True):
        moved = int(np.unravel_index(tap, kernel)[r]) * axis.dilation
        np.add(line.reshape(along), moved, out=part)


def _parts(grid: Grid, group: int, rows: Array) -> Iterator[tuple[int, int, slice]]:
    """The parts of an offset group, each with its group and channels there."""
    count, part = rows.shape[0] // grid.offset_groups, rows.shape[-1]
    for number in range(group * count, (group + 1) * count):
        g, first = divmod(number * part, grid.group_channels)
        yield number, g, slice(first, first + part)


def _corners(grid: Grid) -> Iterator[tuple[tuple[int, ...], int]]:
    """The elements around a sample, by their side of it, and their distance in rows."""
    for corner in product((0, 1), repeat=len(grid.axes)):
        each = zip(corner, grid.pitches, strict=True)
        yield corner, sum(high * pitch for high, pitch in each)


def _weigh(
    fractions: list[Array], corner: Sequence[int], into: Array, one: Array
) -> None:
    """The product along these axes of fractions, or of what they leave of 1."""
    into.fill(1)
    for high, fraction in zip(corner, fractions, strict=True):
        np.multiply(into, fraction if high else np.subtract(1, fraction, one), into)


def _quiet(function: Callable[..., None]) -> Callable[..., None]:
    """Let infinities and NaN pass, which offsets may be."""

    @wraps(function)
    def call(*operands: Any) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            function(*operands)

    return call


@_quiet
def sample(
    grid: Grid,
    rows: Array,
    offset: Array,
    mask: Array | None,
    columns: Array,
    *buffers: Array,
) -> None:
    """Write the columns (*out, G, taps, C/G) of one image."""
    work = _Work(*buffers)
    for chunk in work.chunks(grid, offset):
        weight, one = work.numbers(chunk, 2)
        taken = work.rows(chunk, rows.shape[-1])
        for corner, shift in _corners(grid):
            _weigh(chunk.fractions, corner, weight, one)
            if mask is not None:
                np.multiply(weight, mask[chunk.group, chunk.taps], out=weight)
            np.add(chunk.low, shift, out=chunk.place)
            for number, g, channels in _parts(grid, chunk.group, rows):
                into = np.moveaxis(columns[..., g, chunk.taps, channels], -2, 0)
                np.take(rows[number], chunk.place, 0, taken, "clip")
                np.multiply(
                    taken, weight[..., None], out=taken if any(corner) else into
                )
                if any(corner):
                    np.add(into, taken, out=into)


@_quiet
def gradients(
    grid: Grid,
    rows: Array,
    offset: Array,
    mask: Array | None,
    columns: Array,
    doffset: Array | None,
    dmask: Array | None,
    *buffers: Array,
) -> None:
    """Write the gradients for offsets and mask, from those of the columns."""
    work, rank = _Work(*buffers), len(grid.axes)
    for chunk in work.chunks(grid, offset):
        dot, more, weight, one, of_mask, *of_offset = work.numbers(chunk, 5 + rank)
        taken = work.rows(chunk, rows.shape[-1])
        for total in (of_mask, *of_offset):
            total.fill(0)
        for corner, shift in _corners(grid):
            np.add(chunk.low, shift, out=chunk.place)
            dot.fill(0)
            for number, g, channels in _parts(grid, chunk.group, rows):
                given = np.moveaxis(columns[..., g, chunk.taps, channels], -2, 0)
                np.take(rows[number], chunk.place, 0, taken, "clip")
                np.einsum("...c,...c->...", taken, given, out=more)
                np.add(dot, more, out=dot)
            _weigh(chunk.fractions, corner, weight, one)
            np.add(of_mask, np.multiply(weight, dot, out=weight), out=of_mask)
            for r, total in enumerate(of_offset):
                others = chunk.fractions[:r] + chunk.fractions[r + 1 :]
                _weigh(others, corner[:r] + corner[r + 1 :], weight, one)
                np.multiply(weight, dot, out=weight)
                (np.add if corner[r] else np.subtract)(total, weight, total)
        place = chunk.group, chunk.taps
        if dmask is not None:
            dmask[place] = of_mask
        if doffset is not None:
            for r, total in enumerate(of_offset):
                if mask is not None:
                    np.multiply(total, mask[place], out=total)
                doffset[(*place, r)] = total


@_quiet
def scatter(
    grid: Grid,
    rows: Array,
    offset: Array,
    mask: Array | None,
    columns: Array,
    *buffers: Array,
) -> None:
    """Add the gradients of the columns to the rows that they were sampled from."""
    work, part = _Work(*buffers), rows.shape[-1]
    for chunk in work.chunks(grid, offset, drops_nan=True):
        weight, one = work.numbers(chunk, 2)
        values, places = work.rows(chunk, part), work.places(chunk, part)
        for corner, shift in _corners(grid):
            _weigh(chunk.fractions, corner, weight, one)
            if mask is not None:
                np.multiply(weight, mask[chunk.group, chunk.taps], out=weight)
            np.add(chunk.low, shift, out=chunk.place)
            # Beyond the last row there is only what weighs nothing.
            np.minimum(chunk.place, rows.shape[1] - 1, out=chunk.place)
            np.multiply(chunk.place[..., None], part, out=places)
            for channel in range(part):
                places[..., channel] += channel
            for number, g, channels in _parts(grid, chunk.group, rows):
                given = np.moveaxis(columns[..., g, chunk.taps, channels], -2, 0)
                np.multiply(given, weight[..., None], out=values)
                # Ten times as fast as with an index for each row.
                flat = rows[number].reshape(-1)
                np.add.at(flat, places.reshape(-1), values.reshape(-1))
