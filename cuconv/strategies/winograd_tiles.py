"""The protocol of Winograd's transforms, and the sizes of tiles.

Along one axis a tile is n elements of x and m = n - r + 1 of y.  There are two
implementations of the transforms between elements and frequencies: products of matrices
(`winograd_products`), and kernels (`winograd_kernels`).  Both use

    V  (f, g, o, tile, taps·c)  frequencies of x under output o of the outer axis
    U  (f, g, taps·c, k)        frequencies of the weights, or of their gradient
    M  (f, g, o, tile, k)       frequencies of y, or of dy

as views in a layout of their own; f counts the frequencies of a tile.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

from cuconv.arrays import Array
from cuconv.engine.problem import Problem
from cuconv.geometry import Axis, Block, Range, Ranges
from cuconv.memory import Buffer
from cuconv.strategies.base import Job, Tiling


class Matrices(NamedTuple):
    """The three transforms of F(m, r): ``input`` is Bᵀ, ``filter`` G, ``output`` Aᵀ."""

    input: Array
    filter: Array
    output: Array


@dataclass(frozen=True)
class Shape:
    """One convolution for the transforms: an outer axis, and one or two tiled axes.

    ``axes`` are always three (outer, rows, last); one that the convolution lacks has a
    single element and a single tap, and so has the tile along it.
    """

    axes: tuple[Axis, Axis, Axis]
    tiles: tuple[Matrices | None, Matrices]
    # Weights, without the taps that are transformed.
    lines: int

    @cached_property
    def outputs(self) -> tuple[int, int]:
        """m, along rows and along the last axis."""
        rows, last = self.tiles
        return (1 if rows is None else rows.output.shape[0]), last.output.shape[0]

    @cached_property
    def inputs(self) -> tuple[int, int]:
        """n, likewise."""
        rows, last = self.tiles
        return (1 if rows is None else rows.input.shape[0]), last.input.shape[0]

    @cached_property
    def frequencies(self) -> int:
        return math.prod(self.inputs)

    @cached_property
    def counts(self) -> tuple[int, int, int]:
        """Elements along the outer axis, and tiles along the two others."""
        outer, rows, last = (axis.out for axis in self.axes)
        height, width = self.outputs
        return outer, -(-rows // height), -(-last // width)

    @cached_property
    def weight_cells(self) -> int:
        """Elements of U."""
        return self.frequencies * self.lines


class Piece(NamedTuple):
    """One block, with its sizes: images, tiles and the elements of the outer axis."""

    shape: Shape
    block: Block
    spans: tuple[Range, Range, Range]
    images: int
    tall: int
    wide: int
    outer_in: int
    outer_out: int


def three_ranges(ranges: Ranges, tiled: int) -> tuple[Range, Range, Range]:
    """Ranges of every spatial axis as those of (outer, rows, last)."""
    outer = ranges[0] if len(ranges) > tiled else (0, 1)
    return outer, ranges[-2] if tiled == 2 else (0, 1), ranges[-1]


def piece_of(shape: Shape, block: Block, tiled: int) -> Piece:
    """A block for the transforms."""
    outer, rows, last = spans = three_ranges(block.output, tiled)
    height, width = shape.outputs
    count = outer[1] - outer[0]
    axis = shape.axes[0]
    return Piece(
        shape,
        block,
        spans,
        block.images[1] - block.images[0],
        -(-(rows[1] - rows[0]) // height),
        -(-(last[1] - last[0]) // width),
        (count - 1) * axis.stride + axis.extent,
        count,
    )


class Transforms(Protocol):
    """The transforms from elements to frequencies and back, a block at a time."""

    def shared(self, problem: Problem) -> tuple[Buffer, ...]:
        """The buffers of a call, except those for bias and sums."""

    def own(self, problem: Problem, tiling: Tiling, shape: Shape) -> tuple[Buffer, ...]:
        """The buffers of a worker."""

    def weights(self, job: Job, w: Array, flat: Array, shape: Shape) -> Array:
        """U of the weights, in ``flat``."""

    def inputs(
        self, job: Job, x: Array, piece: Piece, buffers: dict[str, Array]
    ) -> Array:
        """V of the tiles of x (N, G, C, *spatial) under a block of its images."""

    def gradients(
        self, job: Job, dy: Array, piece: Piece, buffers: dict[str, Array]
    ) -> Array:
        """M of a block of dy (N, G, K, *spatial), by the adjoint of `outputs`."""

    def room(
        self, job: Job, y: Array, piece: Piece, buffers: dict[str, Array]
    ) -> Array:
        """The buffer for the products of a block of y: M."""

    def outputs(
        self,
        job: Job,
        bias: Array | None,
        y: Array,
        piece: Piece,
        buffers: dict[str, Array],
    ) -> None:
        """Transform that buffer to the block of y (N, G, K, *spatial)."""

    def sums(self, job: Job, flat: Array, out: Array, shape: Shape) -> Array:
        """A running sum of U for the gradient ``out``: a view of ``flat``."""

    def taps(self, job: Job, flat: Array, out: Array, shape: Shape) -> None:
        """Transform such a sum, and write the gradient for the weights."""
