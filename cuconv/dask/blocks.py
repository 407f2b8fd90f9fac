"""The part of its arrays that each block of a result needs, and the tasks to slice it.

`Tiling` says, by the formulas of the geometry, which elements of an axis belong to
which outputs; `windows` builds the tasks.
"""

import itertools
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise, starmap
from typing import Any, NamedTuple, TypeAlias

import dask.array as da
from dask.array.utils import meta_from_array
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from cuconv.arrays import Array, is_dask, module_of
from cuconv.backends import backend_of
from cuconv.geometry import Axis, EvenAxis, Range, Ranges, WindowGeometry

Chunks: TypeAlias = tuple[int, ...]


def spans(chunks: Sequence[int]) -> Ranges:
    """The ranges of neighbouring chunks."""
    return tuple(pairwise((0, *accumulate(chunks))))


def lengths(ranges: Ranges) -> Chunks:
    """The length of every range."""
    return tuple(stop - start for start, stop in ranges)


def output_chunks(axis: Axis, chunks: Sequence[int]) -> Chunks:
    """The chunks of outputs for chunks of the input.

    Output ``o`` belongs to input element ``o * stride``: regular chunks stay regular,
    and those of a convolution that keeps sizes stay the same.
    """
    if isinstance(axis, EvenAxis):
        return (axis.out,)
    return _split_at((-(-end // axis.stride) for end in accumulate(chunks)), axis.out)


def input_chunks(axis: Axis, chunks: Sequence[int]) -> Chunks:
    """The chunks of the input for chunks of outputs: the inverse of `output_chunks`."""
    if isinstance(axis, EvenAxis):
        return (axis.size,)
    return _split_at((end * axis.stride for end in accumulate(chunks)), axis.size)


def _split_at(ends: Iterable[int], total: int) -> Chunks:
    """Chunks that stop at these ends; the last ones are split to the others' length."""
    stops = sorted({min(end, total) for end in ends} - {0})
    if len(stops) < 2:
        return (total,)
    longest = max(lengths(tuple(pairwise((0, *stops)))))
    stops = [*stops[:-1], *range(stops[-2] + longest, total, longest), total]
    return lengths(tuple(pairwise((0, *stops))))


class Tiling(NamedTuple):
    """One spatial axis in parts: the input range and the output range of each."""

    axis: Axis
    cells: Ranges
    outputs: Ranges

    @classmethod
    def by_outputs(cls, axis: Axis, chunks: Chunks) -> "Tiling":
        """Chunks of outputs, each with the elements under its windows."""
        outputs = spans(chunks)
        return cls(axis, tuple(axis.under(*span)[0] for span in outputs), outputs)

    @classmethod
    def by_cells(cls, axis: Axis, chunks: Chunks) -> "Tiling":
        """Chunks of elements, each with the outputs whose windows reach it."""
        cells = spans(chunks)
        return cls(axis, cells, tuple(axis.reached_from(*span) for span in cells))

    @property
    def with_whole_windows(self) -> "Tiling":
        """The same tiling, each part extended to all elements under its outputs."""
        return self._replace(cells=tuple(map(self._hull, self.cells, self.outputs)))

    def _hull(self, cells: Range, outputs: Range) -> Range:
        if outputs[0] == outputs[1]:
            return cells
        (low, high), _ = self.axis.under(*outputs)
        return min(cells[0], low), max(cells[1], high)

    def part(self, index: int) -> Axis:
        return self.axis.between(self.cells[index], self.outputs[index])

    @property
    def examples(self) -> set[int]:
        """The first part, the last, and the one with the most elements and outputs."""
        sizes = lengths(self.outputs)
        return {0, sizes.index(max(sizes)), len(sizes) - 1}


@dataclass(frozen=True)
class Blocks:
    """The blocks of one call: images, and parts of every spatial axis."""

    geometry: WindowGeometry
    images: Ranges
    tilings: tuple[Tiling, ...]

    def place(self, block_id: Sequence[int]) -> tuple[int, ...]:
        """The number of a block along every spatial axis."""
        first = self.geometry.batched + self.geometry.channels_first
        return tuple(block_id[first : first + self.geometry.rank])

    def part(self, block_id: Sequence[int]) -> Any:
        """The geometry of one block."""
        start, stop = self.images[block_id[0] if self.geometry.batched else 0]
        parts = zip(self.tilings, self.place(block_id), strict=True)
        axes = tuple(tiling.part(index) for tiling, index in parts)
        return replace(self.geometry, images=stop - start, axes=axes)

    def origin(self, block_id: Sequence[int]) -> tuple[int, ...]:
        """The first element of a block along every axis."""
        parts = zip(self.tilings, self.place(block_id), strict=True)
        return tuple(tiling.cells[index][0] for tiling, index in parts)

    def examples(self) -> list[Any]:
        """Geometries of blocks at the ends and of the largest one."""
        sizes = lengths(self.images)
        largest = sizes.index(max(sizes))
        each = itertools.product(*(sorted(tiling.examples) for tiling in self.tilings))
        ids = (self.geometry.arranged(largest, 0, place) for place in each)
        return [self.part(block_id) for block_id in ids]

    def cell_chunks(self, channels: Chunks) -> tuple[Chunks, ...]:
        """The chunks of x, one for each block, where those do not overlap."""
        return tuple(map(lengths, self.cells(spans(channels))))

    def output_chunks(self, channels: Chunks) -> tuple[Chunks, ...]:
        """The chunks of y, one for each block, where those do not overlap."""
        return tuple(map(lengths, self.outputs(spans(channels))))

    def cells(self, channels: Ranges) -> tuple[Ranges, ...]:
        """The elements of every block, for each axis of x."""
        return self._along([tiling.cells for tiling in self.tilings], channels)

    def outputs(self, channels: Ranges) -> tuple[Ranges, ...]:
        """The outputs of every block, for each axis of y."""
        return self._along([tiling.outputs for tiling in self.tilings], channels)

    def _along(self, spatial: list[Ranges], channels: Ranges) -> tuple[Ranges, ...]:
        return self.geometry.arranged(self.images, channels, spatial)


class _Piece(NamedTuple):
    """The part of a range in one chunk."""

    chunk: int
    cells: slice
    size: int
    is_whole: bool


def _pieces(chunks: Chunks, ranges: Ranges) -> list[list[_Piece]]:
    """The parts of every range in the chunks that it overlaps."""
    edges = (0, *accumulate(chunks))
    found = []
    for start, stop in ranges:
        met = []
        index = bisect_right(edges, start) - 1
        while index < len(chunks) and edges[index] < stop:
            low, high = max(start, edges[index]), min(stop, edges[index + 1])
            cells = slice(low - edges[index], high - edges[index])
            whole = high - low == chunks[index]
            if high > low:
                met.append(_Piece(index, cells, high - low, whole))
            index += 1
        found.append(met)
    return found


def windows(array: Array, ranges: tuple[Ranges, ...]) -> Array:
    """An array whose blocks are these ranges of another one, which may overlap.

    A block depends only on its parts of the chunks that it overlaps.

    Parameters
    ----------
    array
        A Dask array.
    ranges
        For each of its axes, the range of every block.

    Examples
    --------
    >>> import dask.array as da
    >>> from cuconv.dask.blocks import windows
    >>> windows(da.arange(6, chunks=3), (((0, 4), (2, 6)),)).compute()
    array([0, 1, 2, 3, 2, 3, 4, 5])
    """
    if ranges == tuple(map(spans, array.chunks)):
        return array
    token = tokenize(array.name, ranges)
    name, tiling = f"cuconv-window-{token}", f"cuconv-cut-{token}"
    along = list(map(_pieces, array.chunks, ranges))
    tasks: dict[Any, Any] = {}
    for index in itertools.product(*(range(len(each)) for each in ranges)):
        met = [each[i] for each, i in zip(along, index, strict=True)]
        taken = []
        for pieces in itertools.product(*met):
            source = (array.name, *(piece.chunk for piece in pieces))
            if not all(piece.is_whole for piece in pieces):
                key = (tiling, *index, *source[1:])
                cells = tuple(piece.cells for piece in pieces)
                tasks[key] = (operator.getitem, source, cells)
                source = key
            taken.append(source)
        sizes = tuple(tuple(piece.size for piece in pieces) for pieces in met)
        join = partial(_joined, sizes, meta_from_array(array))
        tasks[name, *index] = taken[0] if len(taken) == 1 else (join, taken)
    graph = HighLevelGraph.from_collections(name, tasks, dependencies=[array])
    chunks = tuple(map(lengths, ranges))
    return da.Array(graph, name, chunks, meta=meta_from_array(array))


def _joined(sizes: tuple[Chunks, ...], sample: Array, pieces: list[Array]) -> Array:
    """Concatenate pieces of these sizes along every axis, given in order."""
    like = pieces[0] if pieces else sample
    backend = backend_of(module_of({"a block": like}), like)
    with backend.device_of(like):
        whole = backend.xp.empty(tuple(map(sum, sizes)), dtype=like.dtype)
        places = itertools.product(*(starmap(slice, spans(each)) for each in sizes))
        for place, piece in zip(places, pieces, strict=True):
            whole[place] = piece
    return whole


def each_block(
    name: str,
    how: object,
    work: Callable[[tuple[int, ...]], Callable[..., Any]],
    parts: Sequence[Array],
    shared: Sequence[Array],
    chunks: tuple[Chunks, ...],
    meta: Array,
) -> Array:
    """An array whose blocks are computed from one block of every part.

    Parameters
    ----------
    name, how
        The beginning of its name, and what the rest of it depends on beside the arrays.
    work
        From the index of a block, the function that computes it: a task refers to its
        own block alone.
    parts
        Dask arrays with a block for each.
    shared
        Dask arrays of one block, which every block of the result needs.
    chunks, meta
        Of the result.
    """
    sources = [*parts, *shared]
    token = tokenize(how, chunks, [source.name for source in sources])
    name = f"{name}-{token}"
    common = [(array.name, *(0,) * array.ndim) for array in shared]
    tasks: dict[Any, Any] = {
        (name, *index): (work(index), *((p.name, *index) for p in parts), *common)
        for index in itertools.product(*(range(len(each)) for each in chunks))
    }
    graph = HighLevelGraph.from_collections(name, tasks, dependencies=sources)
    return da.Array(graph, name, chunks, meta=meta)


class DaskPlan(NamedTuple):
    """A call that has been checked; `run` builds a graph and computes nothing."""

    build: Callable[[], Array]
    threads: int = 0
    names: tuple[str, ...] = ()

    def run(self, arrays: object, out: object) -> Array:
        """Build the graph of the arrays that were checked."""
        del arrays, out
        return self.build()


def as_lazy(array: Array, chunks: Any) -> Array:
    """The array as a Dask array; a NumPy or CuPy array is split into these chunks."""
    return array if is_dask(array) else da.from_array(array, chunks=chunks)


class AxisChunks(NamedTuple):
    """The chunks of an array: images, channels, spatial axes."""

    images: Chunks
    channels: Chunks
    spatial: tuple[Chunks, ...]

    @classmethod
    def of(cls, array: Array, geometry: WindowGeometry) -> "AxisChunks":
        chunks = list(array.chunks)
        images = chunks.pop(0) if geometry.batched else (1,)
        channels = chunks.pop(0 if geometry.channels_first else -1)
        return cls(images, channels, tuple(chunks))


def blocks_of_outputs(geometry: WindowGeometry, x: Array) -> Blocks:
    """Blocks of y for the chunks of x."""
    own = AxisChunks.of(x, geometry)
    chunks = map(output_chunks, geometry.axes, own.spatial)
    return blocks_of(Tiling.by_outputs, geometry, own.images, chunks)


def blocks_of_cells(geometry: WindowGeometry, dy: Array, x: Array | None) -> Blocks:
    """Blocks of dx for the chunks of x, if that is a Dask array, else of dy."""
    own = AxisChunks.of(x if is_dask(x) else dy, geometry)
    chunks = own.spatial
    if not is_dask(x):
        chunks = tuple(map(input_chunks, geometry.axes, chunks))
    whole = map(_uncut_where_even, geometry.axes, chunks)
    return blocks_of(Tiling.by_cells, geometry, own.images, whole)


def _uncut_where_even(axis: Axis, chunks: Chunks) -> Chunks:
    return (axis.size,) if isinstance(axis, EvenAxis) else chunks


def blocks_of(
    tiling: Callable[[Axis, Chunks], Tiling],
    geometry: WindowGeometry,
    images: Chunks,
    chunks: Iterable[Chunks],
) -> Blocks:
    """Blocks of these images and these chunks of every spatial axis."""
    return Blocks(geometry, spans(images), tuple(map(tiling, geometry.axes, chunks)))


def matched(
    x: Array, dy: Array, geometry: WindowGeometry, channels: tuple[Chunks, Chunks]
) -> tuple[Array, Array]:
    """Both as Dask arrays with matching chunks.

    ``channels`` are the chunks of channels that each is then given.
    """
    if not is_dask(dy):
        x = as_lazy(x, -1)
        chunks = blocks_of_outputs(geometry, x).output_chunks(channels[1])
        return x, as_lazy(dy, chunks)
    chunks = blocks_of_cells(geometry, dy, None).cell_chunks(channels[0])
    return as_lazy(x, chunks), dy


def refuse_out(out: object) -> None:
    """Raise for an ``out``: the result is computed later."""
    if out is not None:
        raise TypeError("out cannot be given with Dask arrays: they are computed later")
