"""Winograd's transforms on CUDA: one kernel for both directions."""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuconv.arrays import Array, DType
from cuconv.backends.cuda.compiler import Do, launch
from cuconv.backends.cuda.elements import Variant
from cuconv.backends.cuda.structs import (
    MOST_THREADS,
    TRANSFORM,
    divisor,
    steps_of,
    struct,
)
from cuconv.backends.cuda.variants import tile_variant

_THREADS = 256


class CudaTiles:
    """See `cuconv.backends.TileTransforms`."""

    def __init__(self, do: Do) -> None:
        self._do = do

    def split(
        self,
        cells: Array,
        tiles: Array,
        matrices: tuple[Array | None, Array],
        firsts: tuple[int, int, int],
        steps: tuple[int, int],
    ) -> None:
        sides = _cells(cells, firsts, steps), _frequencies(tiles)
        packed = _launch_of(cells, tiles, matrices, firsts, steps, sides)
        _run(self._do, packed, cells, tiles, None)

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
        packed = _launch_of(cells, tiles, matrices, firsts, steps, sides)
        packed = packed._replace(adds_bias=bias is not None)
        _run(self._do, packed, tiles, cells, bias)


class _Side(NamedTuple):
    """``struct Side``, and a step for each digit: n, g, c, d, th, tw."""

    first: int
    row_step: int
    column_step: int
    digits: tuple[int, ...]
    is_array: bool


class _Matrix(NamedTuple):
    """A hashable matrix."""

    shape: tuple[int, int]
    dtype: DType
    cells: bytes

    @property
    def extent(self) -> int:
        return max(self.shape)

    def square(self) -> Array:
        """The matrix as a square one, padded with zeros."""
        whole = np.zeros((self.extent, self.extent), self.dtype)
        rows, columns = self.shape
        whole[:rows, :columns] = np.frombuffer(self.cells, self.dtype).reshape(
            self.shape
        )
        return whole


class _Launch(NamedTuple):
    """All that ``struct Transform`` depends on."""

    sizes: tuple[int, int, int]  # of the array: planes, rows, columns
    counts: tuple[int, ...]  # of the digits
    firsts: tuple[int, int, int]
    steps: tuple[int, int]
    sides: tuple[_Side, _Side]  # source and target
    left: _Matrix
    right: _Matrix
    adds_bias: bool = False

    @property
    def items(self) -> int:
        return math.prod(self.counts)

    def digits(self) -> list[tuple[Any, ...]]:
        """``struct Digit`` for each, in the memory order of the frequencies."""
        rows, columns = self.steps
        bias = 0, self.counts[2], 1, 0, 0, 0
        moves = [(0, 0, 0)] * 3 + [(1, 0, 0), (0, rows, 0), (0, 0, columns)]
        source, target = (side.digits for side in self.sides)
        near = target if self.sides[0].is_array else source
        order = sorted(range(6), key=lambda i: (self.counts[i] == 1, abs(near[i])))
        return [
            (source[i], target[i], bias[i], *moves[i], divisor(self.counts[i]))
            for i in order
        ]

    def reach(self) -> int:
        """The largest number that the kernel computes for an address."""
        tall, wide = self.left.extent, self.right.extent
        addresses = [
            abs(side.first)
            + tall * abs(side.row_step)
            + wide * abs(side.column_step)
            + sum(n * abs(s) for n, s in zip(self.counts, side.digits, strict=True))
            for side in self.sides
        ]
        # Coordinates, padding included, are compared with the array's sizes.
        pitches = 1, *self.steps
        spans = zip(self.sizes, self.firsts, self.counts[3:], pitches, strict=True)
        coordinates = [
            size + abs(first) + count * pitch + max(tall, wide)
            for size, first, count, pitch in spans
        ]
        return max(*addresses, *coordinates)


def _cells(cells: Array, firsts: tuple[int, int, int], steps: tuple[int, int]) -> _Side:
    *head, plane, row, column = steps_of(cells)
    first = firsts[0] * plane + firsts[1] * row + firsts[2] * column
    digits = (*head, plane, steps[0] * row, steps[1] * column)
    return _Side(first, row, column, digits, is_array=True)


def _frequencies(tiles: Array) -> _Side:
    row, column, *digits = steps_of(tiles)
    return _Side(0, row, column, tuple(digits), is_array=False)


def _launch_of(
    cells: Array,
    tiles: Array,
    matrices: tuple[Array | None, Array],
    firsts: tuple[int, int, int],
    steps: tuple[int, int],
    sides: tuple[_Side, _Side],
) -> _Launch:
    left, right = (
        _Matrix(m.shape, m.dtype, m.tobytes())
        for m in (np.ones((1, 1), cells.dtype) if m is None else m for m in matrices)
    )
    shapes = cells.shape[3:], tiles.shape[2:]
    return _Launch(*shapes, firsts, steps, sides, left, right)


def _run(
    do: Do, transform: _Launch, source: Array, target: Array, bias: Array | None
) -> None:
    variant, packed = _packed(transform)
    blocks = -(-min(transform.items, MOST_THREADS) // _THREADS)
    arrays = source, target, source if bias is None else bias
    launch(do, variant, blocks, _THREADS, *arrays, packed)


@lru_cache(maxsize=1024)
def _packed(launch: _Launch) -> tuple[Variant, Array]:
    """The kernel of a launch, and its ``struct Transform``."""
    wide = max(launch.items + MOST_THREADS, launch.reach()) >= 2**31
    (tall_to, tall_from), (wide_to, wide_from) = launch.left.shape, launch.right.shape
    extents = (tall_from, wide_from), (tall_to, wide_to)
    sides = [
        (side.first, side.row_step, side.column_step, *extent, side.is_array)
        for side, extent in zip(launch.sides, extents, strict=True)
    ]
    head = launch.items, launch.adds_bias, *launch.firsts, *launch.sizes
    squares = launch.left.square(), launch.right.square()
    value = (*head, *sides, launch.digits(), *squares)
    key = launch.right.dtype, launch.left.extent, launch.right.extent
    packed = struct(value, TRANSFORM(*key, wide=wide))
    return tile_variant(*key, wide=wide), packed
