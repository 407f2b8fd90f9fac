"""Separable convolution: two steps, each of basic convolutions over pieces.

    h = depthwise_conv(x, depthwise)        y = conv(h, pointwise) + bias

h may be larger than x or y.  A piece is some images, or a part of one: outputs of the
first step, and the elements of x that they read.  Results over outputs, and sums over
them, are computed block by block; a gradient for x is computed region by region, so
that each element is written once.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, product, starmap
from typing import Any, NamedTuple, TypeAlias

from cuconv.arrays import (
    Array,
    Types,
    check_out,
    check_overlap,
    module_of,
    resolve_types,
    stub_array,
    stub_of,
)
from cuconv.backends import Backend, backend_of, refuse_capture
from cuconv.engine.bias_grad import BiasGrad
from cuconv.engine.call import Runnable, check_needs
from cuconv.engine.depthwise import FlatWeights
from cuconv.engine.execute import Run
from cuconv.engine.lower import lower
from cuconv.engine.lowering import Lowering
from cuconv.engine.pieces import Pieces, Step, Tiling
from cuconv.engine.problem import check_shape
from cuconv.engine.recorded import PiecesPlan
from cuconv.engine.request import Request, chosen_options, named_inputs
from cuconv.engine.tile_search import largest_fitting
from cuconv.geometry import Axis, ConvGeometry, Range, Ranges, Tile
from cuconv.memory import Buffer, workspace_bytes
from cuconv.options import SEPARABLE_OPTIONS, Options

# About as many parts as a plan has: several steps, over a few kinds of pieces.
_MOST_PARTS = 8
SEPARABLE_GRADIENTS = ("x", "depthwise", "pointwise", "bias")
_FORWARD = "x", "depthwise", "pointwise", "bias"
_BACKWARD = "dy", "x", "depthwise", "pointwise"
# Gradients that are summed over pieces.
_SUMMED = "ddepthwise", "dpointwise"
_TAKES_MEMORY = (
    "a separable convolution takes memory for the array between its steps: call "
    "depthwise_conv and conv, both with out="
)


class SeparableGradients(NamedTuple):
    """The gradients of a separable convolution; None where one was not asked for.

    Examples
    --------
    >>> import cuconv
    >>> cuconv.SeparableGradients(bias=0.5)
    SeparableGradients(x=None, depthwise=None, pointwise=None, bias=0.5)
    """

    x: Any = None
    depthwise: Any = None
    pointwise: Any = None
    bias: Any = None


class Piece(NamedTuple):
    """Images, outputs of the first step, and the elements of x that they read.

    ``pads`` are the numbers of zeros before and after those; ``results`` are
    computed from it, by their names.
    """

    images: Range
    outputs: Ranges
    cells: Ranges
    pads: Ranges
    results: frozenset[str]


# Outputs, elements and pads of a piece along one axis.
Spans: TypeAlias = tuple[Range, Range, Range]


class Traversal(NamedTuple):
    """A way through all pieces: blocks of the output, or regions of x."""

    geometry: ConvGeometry
    tile: Tile
    results: frozenset[str]
    over_x: bool = False

    @property
    def is_whole(self) -> bool:
        """True if its pieces are whole images, which are both blocks and regions."""
        pairs = zip(self.tile.cells, self.geometry.out, strict=True)
        return not self.over_x and all(cells >= out for cells, out in pairs)

    @property
    def positions(self) -> int:
        """The most outputs of a piece."""
        g, tile = self.geometry, self.tile
        if self.is_whole:
            return min(tile.images, g.images) * g.positions
        return g.reach(tile) if self.over_x else tile.positions

    @property
    def number(self) -> int:
        """The number of pieces, at least one, as results must be written."""
        return math.prod(map(len, self._lines()))

    def pieces(self) -> Iterator[Piece]:
        return self._pieces(self._lines())

    def kinds(self) -> Iterator[Piece]:
        """A piece of every kind, those of a kind taking the same steps."""
        return self._pieces(
            [{_kind(*s): s for s in line}.values() for line in self._lines()]
        )

    def _lines(self) -> list[list[Spans]]:
        """Along the images, and along every axis, what follows each other."""
        steps = zip(self.geometry.axes, self.tile.cells, strict=True)
        images = _in_steps(self.geometry.images, self.tile.images)
        return [[(n, n, (0, 0)) for n in images], *starmap(self._line, steps)]

    def _line(self, axis: Axis, step: int) -> list[Spans]:
        if self.is_whole:
            return [((0, axis.out), (0, axis.size), (axis.before, axis.after))]
        if not self.over_x:
            return [(span, *axis.under(*span)) for span in _in_steps(axis.out, step)]
        regions = [(axis.reached_from(*n), n) for n in _in_steps(axis.size, step)]
        return [(outputs, n, _pads(axis, outputs, n)) for outputs, n in regions]

    def _pieces(self, lines: Iterable[Iterable[Spans]]) -> Iterator[Piece]:
        for (images, *_), *each in product(*lines):
            outputs, cells, pads = zip(*each, strict=True)
            yield Piece(images, outputs, cells, pads, self.results)


def _in_steps(whole: int, step: int) -> list[Range]:
    starts = range(0, whole, step) or (0,)
    return [(start, min(start + step, whole)) for start in starts]


def _pads(axis: Axis, outputs: Range, cells: Range) -> Range:
    """The padding with which these elements have exactly these outputs."""
    count, size = outputs[1] - outputs[0], cells[1] - cells[0]
    before = axis.before + cells[0] - outputs[0] * axis.stride
    return before, (count - 1) * axis.stride + axis.extent - size - before


def _kind(outputs: Range, cells: Range, pads: Range) -> tuple[int, ...]:
    return outputs[1] - outputs[0], cells[1] - cells[0], *pads


class SeparableRequest(NamedTuple):
    """A separable convolution, or gradients of one, that is to be planned.

    ``geometry`` is that of the first step.  Of ``arrays`` and ``results``, by their
    names, only shapes, strides and types are read.
    """

    geometry: ConvGeometry
    filters: int
    flat: FlatWeights
    arrays: dict[str, Array]
    results: dict[str, Array]
    types: Types
    options: Options
    backend: Backend

    @classmethod
    def of(cls, arrays: dict[str, Array], options: Options) -> "SeparableRequest":
        """Check shapes and types."""
        x, w, points = (arrays[name] for name in ("x", "depthwise", "pointwise"))
        backend = backend_of(module_of(arrays), x)
        refuse_capture(backend, _TAKES_MEMORY)
        flat = FlatWeights.of("depthwise", arrays, options.layout)
        options = options._replace(groups=flat.groups).settled()
        geometry = options.geometry(x.shape, flat.shape)
        filters = _filters_of(points, w, geometry)
        types = resolve_types(arrays, options.dtype)
        options = options._replace(dtype=types.result)
        stubs = {name: stub_of(name, array) for name, array in arrays.items()}
        return cls(geometry, filters, flat, stubs, {}, types, options, backend)

    @property
    def what(self) -> str:
        return "a separable convolution"

    @property
    def y_shape(self) -> tuple[int, ...]:
        return second_step(self.geometry, self.filters).y_shape

    def counts(self) -> list[int]:
        """The numbers of positions that a piece may have, from one to all."""
        images, positions = self.geometry.images, self.geometry.positions
        if not images * positions:
            return [max(images, positions, 1)]
        halves = (1 << i for i in range((images * positions - 1).bit_length()))
        return [*halves, images * positions]

    def tiling(self, positions: int, limit: int) -> Tiling:
        """Cut into pieces of at most so many positions."""
        if not self.results:
            return Tiling((), 0, (), limit)
        traversals = self._traversals(positions)
        buffers = tuple(self._buffers(traversals))
        parts = _MOST_PARTS * self.backend.part_bytes
        left = limit - parts - workspace_bytes(buffers)
        return Tiling(traversals, sum(t.number for t in traversals), buffers, left)

    def _traversals(self, positions: int) -> tuple[Traversal, ...]:
        g, results = self.geometry, frozenset(self.results)
        blocks = Traversal(g, g.tile(positions), results)
        if blocks.is_whole or "dx" not in results:
            return (blocks,)
        # The gradients of several outputs for an element of x are summed in one piece.
        cells = largest_fitting(
            lambda n: g.reach(g.region_tile(n)) <= positions, g.cells
        )
        regions = Traversal(g, g.region_tile(cells), results & {"dx"}, over_x=True)
        if results == {"dx"}:
            return (regions,)
        return blocks._replace(results=results - {"dx"}), regions

    def _buffers(self, traversals: tuple[Traversal, ...]) -> Iterator[Buffer]:
        types = self.types
        cells = self.geometry.filters * max(each.positions for each in traversals)
        yield Buffer("between", cells, types.result)
        yield from self.flat.buffers
        sizes = {n: self.results[n].size for n in _SUMMED if n in self.results}
        if not sizes or traversals[0].number < 2:
            return
        yield Buffer("part", max(sizes.values()), types.accumulate)
        if types.accumulate != types.result:
            for name, size in sizes.items():
                yield Buffer(f"sum of {name}", size, types.accumulate)

    def kinds(self, tiling: Tiling) -> Iterator[Step]:
        """The steps of a piece of every kind, of arrays that are not there yet."""
        stubs = {b.name: stub_array((b.cells,), b.dtype) for b in tiling.buffers}
        arrays = {**self.arrays, **self.results, **stubs}
        for piece in chain.from_iterable(t.kinds() for t in tiling.way):
            for step in self.steps(piece, arrays):
                yield step
                yield step.later(arrays)

    def steps(self, piece: Piece, arrays: dict[str, Array]) -> Iterator[Step]:
        """The steps for a piece, in order: buffers are reused."""
        one, results = self._first(piece), piece.results
        two = second_step(one, self.filters)
        sums: Any = {n: arrays.get(f"sum of {n}", arrays.get(n)) for n in _SUMMED}
        x = self._at(arrays["x"], piece.images, piece.cells)
        w = self.flat.view(arrays["depthwise"], arrays)
        axes = (None,) * one.rank
        points = arrays["pointwise"][(..., *axes) if one.channels_first else axes]
        h = arrays["between"][: math.prod(one.y_shape)].reshape(one.y_shape)
        if results & {"y", "dpointwise"}:
            yield Step(1, "forward", one, {"x": x, "w": w}, h)
        if "y" in results:
            y = self._at(arrays["y"], piece.images, piece.outputs)
            bias = {"bias": arrays["bias"]} if "bias" in self.arrays else {}
            yield Step(2, "forward", two, {"x": h, "w": points, **bias}, y)
            return
        dy = self._at(arrays["dy"], piece.images, piece.outputs)
        if "dpointwise" in results:
            total = sums["dpointwise"].reshape(two.w_shape)
            yield Step(2, "weight_grad", two, {"dy": dy, "x": h}, total)
        if results & {"dx", "ddepthwise"}:
            yield Step(2, "input_grad", two, {"dy": dy, "w": points}, h)
        if "ddepthwise" in results:
            total = sums["ddepthwise"].reshape(one.w_shape)
            yield Step(1, "weight_grad", one, {"dy": h, "x": x}, total)
        if "dx" in results:
            dx = self._at(arrays["dx"], piece.images, piece.cells)
            yield Step(1, "input_grad", one, {"dy": h, "w": w}, dx)

    def lowered(self, step: Step, limit: int) -> Lowering:
        """Lower a step; a strategy that is named is the first step's."""
        options = self.options._replace(dtype=step.out.dtype, memory_limit=limit)
        if step.number == 2 and options.strategy != "benchmark":
            options = options._replace(strategy="auto")
        given = step.call, step.geometry, step.operands, step.out
        return lower(Request(*given, options, self.backend))

    def _first(self, piece: Piece) -> ConvGeometry:
        """The geometry of the first step of a piece."""
        each = zip(self.geometry.axes, piece.cells, piece.pads, strict=True)
        axes = tuple(
            axis._replace(size=stop - start, before=before, after=after)
            for axis, (start, stop), (before, after) in each
        )
        start, stop = piece.images
        return replace(self.geometry, images=stop - start, axes=axes)

    def _at(self, array: Array, images: Range, ranges: Ranges) -> Array:
        """A part of an array of all channels."""
        cells = [slice(*span) for span in ranges]
        return array[self.geometry.arranged(slice(*images), slice(None), cells)]


def second_step(geometry: ConvGeometry, filters: int) -> ConvGeometry:
    """The geometry of the second step, over what the first one gives."""
    axes = tuple(Axis(n, 1, 1, 1, 0, 0) for n in geometry.out)
    return replace(
        geometry, axes=axes, channels=geometry.filters, filters=filters, groups=1
    )


def _filters_of(points: Array, w: Array, geometry: ConvGeometry) -> int:
    """K, if the weights of the second step fit what the first one gives."""
    if points.ndim != 2:
        raise ValueError(
            f"pointwise has {points.ndim} axes and must have 2: filters and channels"
        )
    filters, taken = points.shape
    channels, multiplier = w.shape[:2]
    if not geometry.channels_first:
        filters, taken = taken, filters
        channels, multiplier = w.shape[-2:]
    if taken != channels * multiplier:
        raise ValueError(
            f"channels do not match: pointwise takes {taken} and depthwise gives "
            f"{channels} × {multiplier} = {channels * multiplier}"
        )
    return int(filters)


class Separable(Pieces):
    """The steps of every piece."""

    def steps(self, run: Run) -> None:
        request, arrays = self.request, run.arrays
        request.flat.copy(arrays["depthwise"], run)
        pieces = chain.from_iterable(t.pieces() for t in self.tiling.way)
        for number, piece in enumerate(pieces):
            for step in request.steps(piece, arrays):
                self._convolve(step.later(arrays) if number else step, run)
        for name in _SUMMED:
            if f"sum of {name}" in arrays:
                sums = arrays[f"sum of {name}"].reshape(arrays[name].shape)
                run.backend.copy(sums, arrays[name])


class SeparablePlan(PiecesPlan):
    """The plan of a separable convolution, or of gradients of one."""

    gradients = SeparableGradients

    def __init__(
        self, request: SeparableRequest, names: tuple[str, ...], bias: BiasGrad | None
    ) -> None:
        least = 0 if bias is None else bias.workspace_bytes
        lowering = Separable.of(request, least)
        super().__init__(lowering, request, names, request.results, bias)


def plan_separable(
    call: str,
    arrays: tuple[Array | None, ...],
    out: Array | None,
    options: Mapping[str, Any],
    more: Mapping[str, Any],
) -> Runnable:
    """Check a separable convolution, and plan it."""
    del call, more
    chosen = chosen_options(options, SEPARABLE_OPTIONS)
    named = named_inputs(dict(zip(_FORWARD, arrays, strict=True)))
    request = SeparableRequest.of(named, chosen)
    if "bias" in named:
        check_shape("bias", named["bias"], (request.filters,))
    y = stub_array(request.y_shape, request.types.result)
    if out is not None:
        xp = module_of({**named, "out": out})
        check_out(out, y.shape, y.dtype)
        check_overlap(xp, out, named)
        y = stub_of("y", out)
    return SeparablePlan(request._replace(results={"y": y}), _FORWARD, None)


def plan_separable_gradients(
    call: str,
    arrays: tuple[Array | None, ...],
    out: None,
    options: Mapping[str, Any],
    more: Mapping[str, Any],
) -> Runnable:
    """Plan the gradients of a separable convolution that are needed."""
    del call, out
    chosen = chosen_options(options, SEPARABLE_OPTIONS)
    named = named_inputs(dict(zip(_BACKWARD, arrays, strict=True)))
    needs = check_needs(more["needs"], named, _TAKES_MEMORY, SEPARABLE_GRADIENTS)
    request = SeparableRequest.of(named, chosen)
    check_shape("dy", named["dy"], request.y_shape)
    dtype, bias = request.types.result, None
    results = {
        f"d{name}": stub_array(named[name].shape, dtype)
        for name in _BACKWARD[1:]
        if name in needs
    }
    if "bias" in needs:
        own, backend = request.options._replace(memory_limit=None), request.backend
        bias = BiasGrad(named["dy"], request.geometry, request.filters, own, backend)
    return SeparablePlan(request._replace(results=results), _BACKWARD, bias)
