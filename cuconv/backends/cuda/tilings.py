"""The variants of `implicit_gemm`: the tile of a block, and its loads."""

from collections.abc import Iterator
from typing import NamedTuple

from cuconv.arrays import DType, accumulator
from cuconv.backends.blocking import block_sizes, uses_tensor_cores
from cuconv.backends.cuda.elements import ELEMENTS, SUMS, Variant
from cuconv.backends.cuda.structs import CONTRACTION

# Of `struct Place` and `struct Digits` in `implicit_gemm.cu`.
_PLACE_BYTES, _DIGITS_BYTES = 32, 16
# A block of so few threads has many copies for each of them.
_FEW_THREADS = 64


class Operand(NamedTuple):
    """The loads of an operand's tiles: along the sum or not, and elements in a copy."""

    along_terms: bool
    vector: int


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
        tall, wide = (16, 32) if accumulator(dtype).itemsize > 4 else (32, 64)
        return cls(filters, columns, 8, tall, wide, tensor)

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

    def shared(self, dtype: DType, sides: tuple[Operand, Operand], stages: int) -> int:
        """Bytes of shared memory: all stages of both operands' tiles, offset tables."""
        item, tiles = dtype.itemsize, 0
        for free, side in zip((self.filters, self.columns), sides, strict=True):
            is_along = self.tensor and side.along_terms
            input_dilation = self.tensor and item == 4 and not side.along_terms
            padding = 8 if input_dilation else max(16 // item, 1)
            line, lines = (self.terms, free) if is_along else (free, self.terms)
            tiles += (line + padding) * lines
        whole = -(-stages * tiles * item // 16) * 16
        places = (2 * self.terms + self.columns) * _PLACE_BYTES
        return whole + places + self.terms * _DIGITS_BYTES


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
    is_partial: bool = False,
    conjugated: int = 0,
    stages: int = 3,
) -> Variant:
    """`implicit_gemm` for arrays of this type."""
    element = ELEMENTS[dtype.name]
    sums = SUMS.get(element, element)
    stored = sums if is_partial else ELEMENTS[result.name]
    shared = tiling.shared(dtype, (dense, x), stages)
    alone = stages > 2 and all(_is_alone(dtype, side) for side in (dense, x))
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
    stages = 3 if modern else 2
    seen = set()
    for size in block_sizes(dtype):
        tiling = Tiling.of(dtype, *size, tensor=tensor)
        for op, sides in _usual_operands(dtype, tensor=tensor):
            variant = contraction_variant(
                *(dtype, dtype, tiling, *sides),
                is_partial=partial,
                conjugated=op,
                stages=stages,
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
