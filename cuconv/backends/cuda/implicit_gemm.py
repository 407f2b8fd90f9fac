"""Convolutions as products whose columns are never written: `implicit_gemm.cu`.

A launch depends on shapes, strides, types and the alignment of the pointers, and is
computed once for all calls that share them.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuconv.arrays import Array, DType, accumulator, alignment_of, strided
from cuconv.backends.blocking import Blocking, uses_tensor_cores
from cuconv.backends.cuda.compiler import Do, launch
from cuconv.backends.cuda.elements import Variant
from cuconv.backends.cuda.structs import (
    CONTRACTION,
    MATRICES,
    divisor,
    reach_of,
    steps_of,
    struct,
)
from cuconv.backends.cuda.tilings import (
    Addressing,
    Operand,
    Tiling,
    contraction_variant,
    parts_variant,
)
from cuconv.backends.cuda.variants import transpose_variant
from cuconv.engine.costs import MODERN
from cuconv.geometry import Axis

_THREADS = 256
_TILE, _MOST_BLOCKS = 32, 2**20
_WORD = 16  # bytes of the widest copy
_MOST_TERMS = 32  # of a tile

Steps = tuple[int, ...]


class _View(NamedTuple):
    """An array without its memory."""

    shape: tuple[int, ...]
    steps: Steps
    dtype: DType
    is_aligned: bool


class _MixedRadix(NamedTuple):
    """One index of the product; see ``struct MixedRadix``."""

    radix: Steps
    x_step: Steps
    own_step: Steps
    scale: Steps
    first: Steps
    x_base: int
    first_fastest: bool

    @property
    def length(self) -> int:
        return math.prod(self.radix)

    def in_order(self, values: Steps) -> Steps:
        """Values of the digits, the slowest first."""
        return (*values[1:], values[0]) if self.first_fastest else values

    def advance(self, more: int) -> Steps:
        """The digits of a number, the slowest without a bound."""
        digits = []
        for radix in reversed(self.in_order(self.radix)[1:]):
            digits.append(more % radix)
            more //= radix
        slowest_first = (more, *reversed(digits))
        if not self.first_fastest:
            return slowest_first
        return (slowest_first[-1], *slowest_first[:-1])

    @property
    def reach(self) -> int:
        """The largest offset that a kernel computes, some steps past the end too."""
        ends = [
            radix + 4 * _MOST_TERMS * (i == 0) for i, radix in enumerate(self.radix)
        ]
        return max(
            abs(self.x_base) + reach_of(ends, self.x_step),
            reach_of(ends, self.own_step),
        )

    def packed(self, terms: int) -> tuple[Any, ...]:
        return (
            *(self.length, self.x_base, self.x_step, self.own_step, self.radix),
            *(self.advance(terms), self.scale, self.first, self.first_fastest, 0),
        )


class _Indices(NamedTuple):
    """Both indices: ``p`` is that of the results, ``r`` that of the sum."""

    positions: _MixedRadix
    terms: _MixedRadix
    sums_terms: bool

    @property
    def p(self) -> _MixedRadix:
        return self.positions if self.sums_terms else self.terms

    @property
    def r(self) -> _MixedRadix:
        return self.terms if self.sums_terms else self.positions

    @property
    def addressing(self) -> Addressing:
        taps = sum(self.terms.radix[1:])
        reach = max(self.terms.reach, self.positions.reach)
        return Addressing.of(taps, reach, sums_terms=self.sums_terms)


class _Sides(NamedTuple):
    """The arrays of a product; the steps of groups (x, dense, out) and of rows."""

    dense: _View
    x: _View
    out: _View
    groups: Steps
    rows: Steps
    has_bias: bool

    @property
    def size(self) -> Steps:
        return self.x.shape[3:]


class _Launch(NamedTuple):
    variant: Variant
    packed: Array
    blocks: int
    threads: int
    parts: int


class CudaContraction:
    """See `cuconv.backends.Contraction`."""

    def __init__(self, do: Do, architecture: int) -> None:
        self._do = do
        self._architecture = architecture

    def convolve(
        self,
        w: Array,
        x: Array,
        bias: Array | None,
        out: Array,
        axes: tuple[Axis, ...],
        how: Blocking,
        parts: Array,
    ) -> None:
        views = (_view(w), _view(x), _view(out), None if bias is None else _view(bias))
        product = _forward(*views, axes, how, self._architecture)
        _run(self._do, product, w, x, bias, out, parts)

    def correlate(
        self,
        dy: Array,
        x: Array,
        out: Array,
        axes: tuple[Axis, ...],
        how: Blocking,
        parts: Array,
    ) -> None:
        views = _view(dy), _view(x), _view(out)
        product = _backward(*views, axes, how, self._architecture)
        _run(self._do, product, dy, x, None, out, parts)

    def transpose(self, source: Array, target: Array) -> None:
        images, groups, rows, columns = source.shape
        tiles = images * groups * -(-rows // _TILE) * -(-columns // _TILE)
        steps = (*steps_of(source)[:3], *steps_of(target)[:3])
        packed = struct((groups, rows, columns, tiles, *steps), MATRICES)
        variant, blocks = transpose_variant(source.itemsize), min(tiles, _MOST_BLOCKS)
        launch(self._do, variant, blocks, _THREADS, source, target, packed)


def _run(
    do: Do,
    product: _Launch,
    dense: Array,
    x: Array,
    bias: Array | None,
    out: Array,
    parts: Array,
) -> None:
    into = out
    if product.parts > 1:
        # Parts lie as the results do, of which some axes may be in reverse.
        places = (slice(None, None, -1 if s < 0 else 1) for s in out.strides)
        reverse = tuple(places)
        out = out[reverse]
        steps = (step * parts.itemsize for step in steps_of(out))
        into = strided(parts, out.shape, tuple(steps))[reverse]
    arrays = dense, x, x if bias is None else bias, into
    sizes = product.blocks, product.threads
    launch(do, product.variant, *sizes, *arrays, product.packed)
    if product.parts > 1:
        _sum_parts(do, parts, out, product.parts)


def _sum_parts(do: Do, parts: Array, out: Array, number: int) -> None:
    variant = parts_variant(parts.dtype, out.dtype)
    blocks = max(1, min(-(-out.size // _THREADS), 2**16))
    numbers = np.int64(out.size), np.int64(number)
    launch(do, variant, blocks, _THREADS, parts, out, *numbers)


def _view(array: Array) -> _View:
    aligned = alignment_of(array) % _WORD == 0
    return _View(array.shape, steps_of(array), array.dtype, aligned)


@lru_cache(maxsize=4096)
def _forward(
    w: _View,
    x: _View,
    out: _View,
    bias: _View | None,
    axes: tuple[Axis, ...],
    how: Blocking,
    architecture: int,
) -> _Launch:
    indices = _Indices(_positions(x, out, axes), _terms(x, w, axes), sums_terms=True)
    groups = (x.steps[1], w.steps[0], out.steps[1])
    rows = (w.steps[1], out.steps[2], 0 if bias is None else bias.steps[0])
    sides = _Sides(w, x, out, groups, rows, bias is not None)
    return _launch(indices, sides, w.shape[:2], how, architecture)


@lru_cache(maxsize=4096)
def _backward(
    dy: _View,
    x: _View,
    out: _View,
    axes: tuple[Axis, ...],
    how: Blocking,
    architecture: int,
) -> _Launch:
    indices = _Indices(_positions(x, dy, axes), _terms(x, out, axes), sums_terms=False)
    groups = (x.steps[1], dy.steps[1], out.steps[0])
    rows = (dy.steps[2], out.steps[1], 0)
    sides = _Sides(dy, x, out, groups, rows, has_bias=False)
    return _launch(indices, sides, out.shape[:2], how, architecture)


def _three(values: Steps, missing: int) -> Steps:
    """One value for each of three axes; those that are not there come first."""
    return (*(missing,) * (3 - len(values)), *values)


def _positions(x: _View, y: _View, axes: tuple[Axis, ...]) -> _MixedRadix:
    steps = x.steps[3:]
    strided = tuple(a.stride * s for a, s in zip(axes, steps, strict=True))
    base = sum(-a.before * s for a, s in zip(axes, steps, strict=True))
    return _MixedRadix(
        (y.shape[0], *_three(y.shape[3:], 1)),
        (x.steps[0], *_three(strided, 0)),
        (y.steps[0], *_three(y.steps[3:], 0)),
        _three(tuple(a.stride for a in axes), 0),
        _three(tuple(-a.before for a in axes), 0),
        base,
        first_fastest=False,
    )


def _terms(x: _View, w: _View, axes: tuple[Axis, ...]) -> _MixedRadix:
    steps = x.steps[3:]
    dilated = tuple(a.dilation * s for a, s in zip(axes, steps, strict=True))
    return _MixedRadix(
        (w.shape[2], *_three(w.shape[3:], 1)),
        (x.steps[2], *_three(dilated, 0)),
        (w.steps[2], *_three(w.steps[3:], 0)),
        _three(tuple(a.dilation for a in axes), 0),
        (0, 0, 0),
        0,
        first_fastest=abs(x.steps[2]) < abs(x.steps[-1]),
    )


def _launch(
    indices: _Indices,
    sides: _Sides,
    rows: tuple[int, ...],
    how: Blocking,
    architecture: int,
) -> _Launch:
    p, r, dtype = indices.p, indices.r, sides.x.dtype
    groups, filters = rows
    modern = architecture >= MODERN
    addressing = indices.addressing
    tensor = modern and uses_tensor_cores(dtype, fast=how.fast)
    tiling = Tiling.of(dtype, how.filters, how.columns, tensor=tensor)
    parts, length = _cut(r.length, how.parts, tiling.terms, sides.out)
    tiles_p, tiles_f = -(-p.length // how.columns), -(-filters // how.filters)
    tiles = tiles_p * tiles_f * groups * parts
    # Neighbours along p differ by one in its fastest digit.
    by_filters = abs(sides.rows[1]) < abs(p.in_order(p.own_step)[-1])
    result = accumulator(dtype) if parts > 1 else sides.out.dtype
    packed = (
        *(p.packed(tiling.terms), r.packed(tiling.terms)),
        *(length, math.prod(sides.out.shape), *sides.groups, *sides.rows),
        *(tiles_f, tiles_p, groups, filters, sides.has_bias, by_filters),
        _is_packed(p, sides, filters, result, parts, by_filters=by_filters),
        *(_packed_taps(indices.terms, sides.size), 0),
    )
    variant = contraction_variant(
        *(dtype, sides.out.dtype, tiling),
        _dense_operand(indices, sides, filters, tensor=tensor),
        _x_operand(indices, sides, tensor=tensor),
        addressing=addressing,
        is_partial=parts > 1,
        conjugated=how.conjugated,
        modern=modern,
    )
    value = struct(packed, CONTRACTION)
    return _Launch(variant, value, tiles, tiling.threads, parts)


def _packed_taps(terms: _MixedRadix, sizes: Steps) -> list[tuple[int, ...]]:
    """``struct Axis`` for each of three axes."""
    taps, bit = terms.radix[1:], 0
    packed: list[tuple[int, ...]] = []
    for size, number, scale in zip(_three(sizes, 1), taps, terms.scale, strict=True):
        packed.append((size, number, bit, *divisor(max(scale, 1))))
        bit += number
    return packed


def _is_packed(
    p: _MixedRadix,
    sides: _Sides,
    filters: int,
    result: DType,
    parts: int,
    *,
    by_filters: bool,
) -> bool:
    """True if neighbouring results can be written several at a time."""
    out, (group, row) = sides.out, (sides.groups[2], sides.rows[1])
    if by_filters:
        run, others = (filters if row == 1 else 1), p.own_step
    else:
        run, inner = _run_of(p)
        others = (row, *inner)
    whole = math.prod(out.shape) if parts > 1 else 0
    # As many as the kernel writes: WIDE.
    wide = min(4, max(_WORD // result.itemsize, 1))
    return out.is_aligned and not any(n % wide for n in (run, group, whole, *others))


def _cut(terms: int, parts: int, tile: int, out: _View) -> tuple[int, int]:
    """The number of parts and their length; several only for contiguous results."""
    if not _is_dense(out):
        parts = 1
    length = -(-terms // (parts * tile)) * tile
    return -(-terms // length), length


def _is_dense(view: _View) -> bool:
    """True if the elements are contiguous, in any order and direction of axes."""
    reach = 1
    pairs = zip(view.steps, view.shape, strict=True)
    for step, size in sorted((abs(s), n) for s, n in pairs if n > 1):
        if step != reach:
            return False
        reach *= size
    return True


def _x_operand(indices: _Indices, sides: _Sides, *, tensor: bool) -> Operand:
    """The loads of tiles of ``x``: along its channels if those are contiguous."""
    terms, positions = indices.terms, indices.positions
    along_r = terms.first_fastest == indices.sums_terms
    fits = terms.first_fastest and terms.x_step[0] == 1 and sides.x.is_aligned
    if not fits or (along_r and not tensor):
        return Operand(along_r, 1)
    steps = (*terms.x_step[1:], *positions.x_step, positions.x_base, sides.groups[0])
    return Operand(along_r, _vector(sides.x.dtype, terms.radix[0], *steps))


def _dense_operand(
    indices: _Indices, sides: _Sides, filters: int, *, tensor: bool
) -> Operand:
    """The loads of tiles of the dense operand: along filters, or along the sum."""
    r, group, step, dtype = indices.r, sides.groups[1], sides.rows[0], sides.dense.dtype
    if step == 1 and filters > 1:
        if not sides.dense.is_aligned:
            return Operand(along_terms=False, vector=1)
        return Operand(
            along_terms=False, vector=_vector(dtype, filters, group, *r.own_step)
        )
    if not (tensor and sides.dense.is_aligned):
        return Operand(along_terms=True, vector=1)
    run, others = _run_of(r)
    return Operand(along_terms=True, vector=_vector(dtype, run, group, step, *others))


def _run_of(index: _MixedRadix) -> tuple[int, Steps]:
    """The number of contiguous elements, and the steps of the outer digits."""
    radix, steps = index.in_order(index.radix), index.in_order(index.own_step)
    run = 1
    for i in reversed(range(4)):
        if radix[i] > 1 and steps[i] != run:
            return run, steps[: i + 1]
        run *= radix[i]
    return run, ()


def _vector(dtype: DType, *divided: int) -> int:
    """The largest power of two, up to a copy's elements, that divides all of these."""
    vector = max(_WORD // dtype.itemsize, 1)
    while any(number % vector for number in divided):
        vector //= 2
    return vector
