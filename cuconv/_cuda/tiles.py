"""Winograd's transforms on CUDA: one kernel, told which side are the cells."""

import math
from typing import Any, NamedTuple

import numpy as np

from cuconv._cuda.compiler import kernel
from cuconv._cuda.structs import MOST_THREADS, TRANSFORM, divisor, steps_of
from cuconv._cuda.variants import tile_variant
from cuconv.arrays import Array

_THREADS = 256


class _Side(NamedTuple):
    """``struct Side``, and a step for each digit: n, g, c, d, th, tw."""

    first: int
    row_step: int
    column_step: int
    digits: tuple[int, ...]
    is_array: bool


class CudaTiles:
    """See `cuconv.leaves.TileTransforms`."""

    def split(
        self,
        cells: Array,
        tiles: Array,
        matrices: tuple[Array | None, Array],
        firsts: tuple[int, int, int],
        steps: tuple[int, int],
    ) -> None:
        sides = _cells(cells, firsts, steps), _frequencies(tiles)
        launch = _Launch(cells.shape[3:], tiles.shape[2:], firsts, steps, None)
        launch(cells, tiles, sides, matrices)

    def join(
        self,
        tiles: Array,
        cells: Array,
        matrices: tuple[Array | None, Array],
        steps: tuple[int, int],
        bias: Array | None,
    ) -> None:
        firsts = 0, 0, 0
        sides = _frequencies(tiles), _cells(cells, firsts, steps)
        launch = _Launch(cells.shape[3:], tiles.shape[2:], firsts, steps, bias)
        launch(tiles, cells, sides, matrices)


def _cells(cells: Array, firsts: tuple[int, int, int], steps: tuple[int, int]) -> _Side:
    *head, plane, row, column = steps_of(cells)
    first = firsts[0] * plane + firsts[1] * row + firsts[2] * column
    digits = (*head, plane, steps[0] * row, steps[1] * column)
    return _Side(first, row, column, digits, is_array=True)


def _frequencies(tiles: Array) -> _Side:
    row, column, *digits = steps_of(tiles)
    return _Side(0, row, column, tuple(digits), is_array=False)


class _Launch(NamedTuple):
    """What both directions share."""

    sizes: tuple[int, int, int]  # of the array: planes, rows, columns
    counts: tuple[int, ...]  # of the digits
    firsts: tuple[int, int, int]
    steps: tuple[int, int]
    bias: Array | None

    def __call__(
        self,
        source: Array,
        target: Array,
        sides: tuple[_Side, _Side],
        matrices: tuple[Array | None, Array],
    ) -> None:
        left, right = matrices
        left = np.ones((1, 1), right.dtype) if left is None else left
        extents = max(left.shape), max(right.shape)
        items = math.prod(self.counts)
        wide = items + MOST_THREADS >= 2**31 or self._reach(sides, extents) >= 2**31
        packed = self._packed(items, sides, (left, right), extents, wide=wide)
        bias = source if self.bias is None else self.bias
        blocks = -(-min(items, MOST_THREADS) // _THREADS)
        launch = kernel(tile_variant(source.dtype, *extents, wide=wide))
        launch((blocks,), (_THREADS,), (source, target, bias, packed))

    def _packed(
        self,
        items: int,
        sides: tuple[_Side, _Side],
        matrices: tuple[Array, Array],
        extents: tuple[int, int],
        *,
        wide: bool,
    ) -> Array:
        left, right = matrices
        lengths = zip(left.shape[::-1], right.shape[::-1], strict=True)
        packed_sides = [
            (side.first, side.row_step, side.column_step, *length, side.is_array)
            for side, length in zip(sides, lengths, strict=True)
        ]
        squares = [
            np.pad(m, [(0, n - have) for have in m.shape])
            for m, n in zip(matrices, extents, strict=True)
        ]
        head = items, self.bias is not None, *self.firsts, *self.sizes
        value: Any = (*head, *packed_sides, self._digits(sides), *squares)
        dtype = TRANSFORM(matrices[1].dtype, *extents, wide=wide)
        return np.array([value], dtype=dtype)

    def _digits(self, sides: tuple[_Side, _Side]) -> list[tuple[Any, ...]]:
        """``struct Digit`` for each, in the order in which the frequencies lie."""
        rows, columns = self.steps
        bias = 0, self.counts[2], 1, 0, 0, 0
        moves = [(0, 0, 0)] * 3 + [(1, 0, 0), (0, rows, 0), (0, 0, columns)]
        source, target = (side.digits for side in sides)
        near = target if sides[0].is_array else source
        order = sorted(range(6), key=lambda i: (self.counts[i] == 1, abs(near[i])))
        return [
            (source[i], target[i], bias[i], *moves[i], divisor(self.counts[i]))
            for i in order
        ]

    def _reach(self, sides: tuple[_Side, _Side], extents: tuple[int, int]) -> int:
        """The largest number that the kernel computes on the way to an address."""
        tall, wide = extents
        addresses = [
            abs(side.first)
            + tall * abs(side.row_step)
            + wide * abs(side.column_step)
            + sum(n * abs(s) for n, s in zip(self.counts, side.digits, strict=True))
            for side in sides
        ]
        pitches = (1, *self.steps)
        coordinates = [
            abs(first) + n * pitch + max(extents)
            for first, n, pitch in zip(
                self.firsts, self.counts[3:], pitches, strict=True
            )
        ]
        return max(*addresses, *coordinates, *self.sizes)
