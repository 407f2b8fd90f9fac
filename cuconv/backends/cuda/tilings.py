"""The variants of `implicit_gemm`: the tile of a block, and its loads."""

from collections.abc import Iterator
from typing import NamedTuple

from cuconv.arrays import DType, accumulator
from cuconv.backends.blocking import block_sizes, uses_tensor_cores
from cuconv.backends.cuda.elements import ELEMENTS, SUMS, Variant
from cuconv.backends.cuda.structs import CONTRACTION

# Of `struct Digits` and `struct BlockOfResults` in `implicit_gemm.cu`.
_DIGITS_BYTES, _BLOCK_BYTES = 16, 24
# Bits of a mask, of which the last belongs to no tap.
MOST_TAPS = 31
# A block of so few threads has many copies for each of them.
_FEW_THREADS = 64


class Operand(NamedTuple):
    """The loads of an operand's tiles: along the sum or not, and elements in a copy."""

    along_terms: bool
    vector: int


class Addressing(NamedTuple):
    """The offsets of an index in `implicit_gemm`, and its test against sizes of x.

    ``masked``: every tap of every axis has a bit, and offsets have 32 bits; otherwise
    there are coordinates, and 64 bits.  ``sums_terms``: the sum is over terms, not over
    positions.
    """

    masked: bool = True
    sums_terms: bool = True

    @classmethod
    def of(cls, taps: int, reach: int, *, sums_terms: bool) -> "Addressing":
        """The one for this number of taps along all axes, and these offsets."""
        return cls(taps <= MOST_TAPS and reach < 2**31, sums_terms)

    def table_bytes(self, terms: int, columns: int) -> int:
        """Bytes of digits, of two steps of a ring, and of a column of each result."""
        element, own, offset = (8, 8, 4) if self.masked else (24, 16, 8)
        ring = terms * (_DIGITS_BYTES + 2 * (element + own))
        return ring + columns * (element + offset) + _BLOCK_BYTES


class Tiling(NamedTuple):
    """The tile of a block of `implicit_gemm`, and the tiles of its warps."""

    filters: int
    columns: int
    terms: int
    warp_filters: int
    warp_columns: int
    tensor: bool

    @classmethod
    def of(cls, dtype: DType, filters: int, columns: int, *, tensor: bool) -> "Tiling":
        """The tiling for this many results at a time."""
        if tensor:
            tall = 64 if columns == 128 and filters >= 64 else 32
            terms = 64 // dtype.itemsize
            return cls(filters, columns, terms, tall, 32, tensor)
        if accumulator(dtype).itemsize > 4:
            return cls(filters, columns, 8, 16, 32, tensor)
        return cls(filters, columns, 16, 32, 64, tensor)

    @property
    def threads(self) -> int:
        across = self.columns // self.warp_columns
        return 32 * (self.filters // self.warp_filters) * across

    def threads_at_once(self, *, alone: bool) -> int:
        """Threads on a multiprocessor: as many as registers allow without spills.

        An asynchronous copy (``alone``) needs no registers for its data.
        """
        if not alone:
            return 256
        few = _FEW_THREADS if self.tensor else 2 * _FEW_THREADS
        return 512 if self.threads > few else 384

    def stages(self, dtype: DType, *, modern: bool) -> int:
        """Tiles in flight: two that are 16 terms of float32 deep, else three.

        Older devices have no asynchronous copies to wait for.
        """
        return 3 if modern and (self.tensor or self.terms * dtype.itemsize < 64) else 2

    def shared(
        self,
        dtype: DType,
        sides: tuple[Operand, Operand],
        stages: int,
        addressing: Addressing,
    ) -> int:
        """Bytes of shared memory: all stages of both tiles, biases, tables."""
        item, tiles = dtype.itemsize, 0
        for free, side in zip((self.filters, self.columns), sides, strict=True):
            is_along = self.tensor and side.along_terms
            input_dilation = self.tensor and item == 4 and not side.along_terms
            padding = 8 if input_dilation else max(16 // item, 1)
            line, lines = (self.terms, free) if is_along else (free, self.terms)
            tiles += (line + padding) * lines
        whole = -(-stages * tiles * item // 16) * 16
        biases = self.filters * accumulator(dtype).itemsize
        return whole + biases + addressing.table_bytes(self.terms, self.columns)


def _is_alone(dtype: DType, side: Operand) -> bool:
    """True if the hardware copies an operand into shared memory without registers."""
    return side.vector * dtype.itemsize in (4, 8, 16) and dtype.itemsize < 16


def contraction_variant(
    dtype: DType,
    result: DType,
    tiling: Tiling,
    dense: Operand,
    x: Operand,
    *,
    addressing: Addressing,
    is_partial: bool = False,
    conjugated: int = 0,
    modern: bool = True,
) -> Variant:
    """`implicit_gemm` for arrays of this type; ``modern`` devices copy alone."""
    element = ELEMENTS[dtype.name]
    sums = SUMS.get(element, element)
    stored = sums if is_partial else ELEMENTS[result.name]
    stages = tiling.stages(dtype, modern=modern)
    shared = tiling.shared(dtype, (dense, x), stages, addressing)
    alone = modern and all(_is_alone(dtype, side) for side in (dense, x))
    blocks = max(tiling.threads_at_once(alone=alone) // tiling.threads, 1)
    values = {
        "ELEMENT": element,
        "SUM": sums,
        "RESULT": stored,
        "CORE": int(tiling.tensor),
        "TILE_F": tiling.filters,
        "TILE_P": tiling.columns,
        "TILE_R": tiling.terms,
        "WARP_F": tiling.warp_filters,
        "WARP_P": tiling.warp_columns,
        "STAGES": stages,
        "BLOCKS": blocks,
        "CONJUGATED": conjugated if dtype.kind == "c" else 0,
        "DENSE_ALONG_R": int(dense.along_terms),
        "DENSE_VECTOR": dense.vector,
        "X_ALONG_R": int(x.along_terms),
        "X_VECTOR": x.vector,
        "MASKED": int(addressing.masked),
        "SUMS_TERMS": int(addressing.sums_terms),
        "SHARED_BYTES": shared,
        "CONTRACTION_BYTES": CONTRACTION.itemsize,
    }
    macros = tuple(f"{name}={value}" for name, value in values.items())
    return Variant("implicit_gemm", macros, shared)


def usual_variants(
    dtype: DType, *, fast: bool = False, modern: bool = True, partial: bool = False
) -> Iterator[Variant]:
    """`implicit_gemm` for C-contiguous arrays: every operation, layout and block size.

    ``modern`` devices copy asynchronously; ``partial``: sums in parts.
    """
    tensor = modern and uses_tensor_cores(dtype, fast=fast)
    seen = set()
    for size in block_sizes(dtype):
        tiling = Tiling.of(dtype, *size, tensor=tensor)
        for op, sides in _usual_operands(dtype, tensor=tensor):
            variant = contraction_variant(
                *(dtype, dtype, tiling, *sides),
                is_partial=partial,
                addressing=Addressing(sums_terms=op != 2),
                conjugated=op,
                modern=modern,
            )
            if variant not in seen:
                seen.add(variant)
                yield variant


def _usual_operands(
    dtype: DType, *, tensor: bool
) -> Iterator[tuple[int, tuple[Operand, Operand]]]:
    """The conjugated operand, and the loads of both operands."""
    wide = max(16 // dtype.itemsize, 1)
    by_terms = Operand(along_terms=True, vector=wide if tensor else 1)
    by_rows, single = (
        Operand(along_terms=False, vector=wide),
        by_terms._replace(vector=1),
    )
    across = by_rows._replace(vector=1)
    yield 0, (by_terms, across)  # channels first: forward,
    yield 1, (single, across)  # the gradient of x, with taps in reverse,
    yield 2, (by_terms, single)  # the gradient of w, along positions
    yield 0, (by_rows, by_terms)  # channels last, likewise
    yield 1, (by_terms, by_terms)
    yield 2, (by_rows, by_rows)


def parts_variant(sums: DType, result: DType) -> Variant:
    """`sum_parts` for sums and results of these types."""
    macros = f"SUM={ELEMENTS[sums.name]}", f"RESULT={ELEMENTS[result.name]}"
    return Variant("sum_parts", macros)
