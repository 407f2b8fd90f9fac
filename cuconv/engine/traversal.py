"""The pieces of a separable convolution's intermediate result.

A piece is some images, or a part of one: outputs of the first step, and the elements of
x that they read.  Results over outputs, and sums over them, are computed block by
block; a gradient for x is computed region by region, so that each element is written
once.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, product, starmap
from typing import NamedTuple

from cuconv.geometry import Axis, ConvGeometry, Range, Ranges, Tile
from cuconv.memory import Buffer


class Piece(NamedTuple):
    """Images, outputs of the first step, and the elements of x that they read.

    ``pads`` are the numbers of zeros before and after those; ``results`` are the names
    of the results that are computed from the piece.
    """

    images: Range
    outputs: Ranges
    cells: Ranges
    pads: Ranges
    results: frozenset[str]

    @property
    def kind(self) -> tuple[int, ...]:
        """The lengths of a piece: pieces of one kind have the same steps."""
        ranges = (self.images, *self.outputs, *self.cells)
        return (*(stop - start for start, stop in ranges), *chain(*self.pads))


class Traversal(NamedTuple):
    """An order of all pieces: blocks of the output, or regions of x."""

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
        """The largest number of outputs of a piece."""
        g, tile = self.geometry, self.tile
        if self.is_whole:
            return min(tile.images, g.images) * g.positions
        return g.reach(tile) if self.over_x else tile.positions

    @property
    def number(self) -> int:
        """The number of pieces, at least one, as results must be written."""
        if self.over_x:
            return self.geometry.count_regions(self.tile)
        return max(self.geometry.count_blocks(self.tile), 1)

    def pieces(self) -> Iterator[Piece]:
        return self._images() if self.is_whole else self.parts()

    def parts(self) -> Iterator[Piece]:
        """The pieces of a traversal that splits images."""
        geometry, results = self.geometry, self.results
        if self.over_x:
            for region in geometry.regions(self.tile):
                each = zip(geometry.axes, region.output, region.cells, strict=True)
                pads = tuple(starmap(pads_of, each))
                yield Piece(region.images, region.output, region.cells, pads, results)
        else:
            for block in geometry.pieces(self.tile):
                ranges = block.images, block.output, block.window, block.padding
                yield Piece(*ranges, results)

    def _images(self) -> Iterator[Piece]:
        g = self.geometry
        outputs, cells = (tuple((0, n) for n in sizes) for sizes in (g.out, g.size))
        pads = tuple((axis.before, axis.after) for axis in g.axes)
        each = -(-g.images // self.number)
        for index in range(self.number):
            images = index * each, min((index + 1) * each, g.images)
            yield Piece(images, outputs, cells, pads, self.results)

    def kinds(self) -> Iterator[Piece]:
        """A piece of every kind, without a list of all pieces."""
        if self.is_whole:
            yield from {piece.kind: piece for piece in self.pieces()}.values()
            return
        lines = []
        for axis, step in zip(self.geometry.axes, self.tile.cells, strict=True):
            line = replace(self.geometry, images=1, axes=(axis,))
            own = self._replace(geometry=line, tile=Tile(1, (step,)))
            lines.append({piece.kind: piece for piece in own.parts()}.values())
        for each in product(*lines):
            outputs = tuple(piece.outputs[0] for piece in each)
            cells = tuple(piece.cells[0] for piece in each)
            pads = tuple(piece.pads[0] for piece in each)
            yield Piece((0, 1), outputs, cells, pads, self.results)


def pads_of(axis: Axis, outputs: Range, cells: Range) -> Range:
    """The padding with which these elements have exactly these outputs."""
    count, size = outputs[1] - outputs[0], cells[1] - cells[0]
    before = axis.before + cells[0] - outputs[0] * axis.stride
    return before, (count - 1) * axis.stride + axis.extent - size - before


class Tiling(NamedTuple):
    """The traversals of a call, its buffers, and the memory left for its steps."""

    sweeps: tuple[Traversal, ...]
    buffers: tuple[Buffer, ...]
    limit: int

    def kinds(self) -> Iterator[Piece]:
        return chain.from_iterable(sweep.kinds() for sweep in self.sweeps)
