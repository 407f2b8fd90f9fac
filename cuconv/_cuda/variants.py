"""Which variants of each kernel exist: element type × index width × rank."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cuconv._cuda.direct import DIRECT, images_at_once, taps_at_once
from cuconv._cuda.pools import pool_variants
from cuconv._cuda.structs import CONTRACTION, GEOMETRY, PRODUCT, TRANSFORM
from cuconv._cuda.words import Words
from cuconv.arrays import SUPPORTED_TYPES, DType, accumulator, is_half

# Signed and unsigned integers of one width add and multiply alike.
_ELEMENTS = {
    "bool": "boolean_t",
    **{
        name: f"word{np.dtype(name).itemsize}_t"
        for name in SUPPORTED_TYPES
        if "int" in name
    },
    **{
        name: f"{name}_t"
        for name in SUPPORTED_TYPES
        if name.startswith(("float", "bfloat", "complex"))
    },
}
_SUMS = {"float16_t": "float32_t", "bfloat16_t": "float32_t"}
# The first architecture whose tensor cores and asynchronous copies are used.
MODERN = 80
# Of `struct Place` and `struct Digits` in `implicit_gemm.cu`.
_PLACE_BYTES, _DIGITS_BYTES = 32, 16
# Such a block has many copies for each thread.
_FEW_THREADS = 64
# What the depthwise kernels take, and what they sum it in.
_DIRECT_SUMS = {
    **dict.fromkeys(("float16", "bfloat16"), "float32"),
    **{name: name for name in ("float32", "float64", "complex64", "complex128")},
}
# Item sizes, and words of several items for which there are kernels of their own.
_SEVERAL = (
    *((8, Words(channels=2)), (8, Words(positions=2)), (4, Words(positions=4))),
    *((4, Words(positions=2)), (2, Words(positions=8)), (2, Words(positions=4))),
)
_SINGLE = Words()
_HAS_ATOMICS = {
    *("word4_t", "word8_t", "float16_t", "bfloat16_t"),
    *("float32_t", "float64_t", "complex64_t", "complex128_t"),
}


# The tiles of `cuconv.strategies.winograd`, and the types that it transforms.
TILE_SIZES = (4, 6, 8)
TILE_TYPES = ("float32", "float64")


class Variant(NamedTuple):
    """One kernel, specialised: a name and the macros that it is compiled with.

    ``shared`` are the bytes of shared memory that a launch asks for.
    """

    kernel: str
    macros: tuple[str, ...]
    shared: int = 0


def has_atomics(dtype: DType) -> bool:
    return _ELEMENTS[dtype.name] in _HAS_ATOMICS


def copy_variant(
    itemsize: int, rank: int, *, wide: bool, words: Words = _SINGLE
) -> Variant:
    """`im2col` for items of this many bytes, moved in such words."""
    size = itemsize * words.channels
    # An item of 16 bytes may lie at any multiple of 8.
    element = "quadword_t" if size > max(itemsize, 8) else f"word{size}_t"
    macros = f"ELEMENT={element}", f"VECTOR={words.positions}"
    return Variant("im2col", (*macros, *_index_macros(rank, wide=wide)))


def sum_variant(kernel: str, dtype: DType, rank: int, *, wide: bool) -> Variant:
    """`col2im_gather` or `col2im_scatter` for columns of this type."""
    return _sum_variant(kernel, _ELEMENTS[dtype.name], rank, wide=wide)


def product_variant(dtype: DType) -> Variant:
    """`matmul` for integers or booleans of this type."""
    macros = f"ELEMENT={_ELEMENTS[dtype.name]}", f"PRODUCT_BYTES={PRODUCT.itemsize}"
    return Variant("matmul", macros)


class Operand(NamedTuple):
    """How tiles of an operand are loaded: along the sum or not, elements by a copy."""

    along_terms: bool
    vector: int


class Tiling(NamedTuple):
    """What a block of `implicit_gemm` computes, and how its warps share it."""

    filters: int
    columns: int
    terms: int
    warp_filters: int
    warp_columns: int
    tensor: bool

    @classmethod
    def of(cls, dtype: DType, filters: int, columns: int, *, tensor: bool) -> "Tiling":
        """The way to compute this many results at a time."""
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
        """Threads that share a multiprocessor: as many as registers allow unspilled.

        A copy that runs by itself needs none for what it copies.
        """
        if not alone:
            return 256
        few = _FEW_THREADS if self.tensor else 2 * _FEW_THREADS
        return 512 if self.threads > few else 384

    def shared(self, dtype: DType, sides: tuple[Operand, Operand], stages: int) -> int:
        """Bytes of shared memory: tiles of both operands, the ring, the places."""
        item, tiles = dtype.itemsize, 0
        for free, side in zip((self.filters, self.columns), sides, strict=True):
            lies_along = self.tensor and side.along_terms
            spread = self.tensor and item == 4 and not side.along_terms
            padding = 8 if spread else max(16 // item, 1)
            line, lines = (self.terms, free) if lies_along else (free, self.terms)
            tiles += (line + padding) * lines
        whole = -(-stages * tiles * item // 16) * 16
        places = (2 * self.terms + self.columns) * _PLACE_BYTES
        return whole + places + self.terms * _DIGITS_BYTES


def uses_tensor_cores(dtype: DType, *, fast: bool) -> bool:
    """Whether products of this type run on tensor cores, where there are some."""
    return is_half(dtype) or (fast and dtype == np.float32)


def _is_alone(dtype: DType, side: Operand) -> bool:
    """Whether the hardware copies an operand into shared memory without registers."""
    return side.vector * dtype.itemsize in (4, 8, 16) and dtype.itemsize < 16


def tile_sizes(dtype: DType) -> tuple[tuple[int, int], ...]:
    """Filters and columns of the blocks of `implicit_gemm`, the largest first."""
    if accumulator(dtype).itemsize > 4:
        return (64, 64), (32, 64), (16, 32)
    return (128, 128), (64, 128), (64, 64), (32, 64)


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
    element = _ELEMENTS[dtype.name]
    sums = _SUMS.get(element, element)
    stored = sums if is_partial else _ELEMENTS[result.name]
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
        "CONJUGATED": conjugated,
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
    dtype: DType, *, fast: bool = False, modern: bool = True
) -> Iterator[Variant]:
    """`implicit_gemm` for C-contiguous arrays: every operation, layout and block size.

    ``modern`` devices copy asynchronously.
    """
    tensor = modern and uses_tensor_cores(dtype, fast=fast)
    stages = 3 if modern else 2
    seen = set()
    for size in tile_sizes(dtype):
        tiling = Tiling.of(dtype, *size, tensor=tensor)
        for op, sides in _usual_operands(dtype, tensor=tensor):
            conjugated = op if dtype.kind == "c" else 0
            variant = contraction_variant(
                *(dtype, dtype, tiling, *sides), conjugated=conjugated, stages=stages
            )
            if variant not in seen:
                seen.add(variant)
                yield variant


def _usual_operands(
    dtype: DType, *, tensor: bool
) -> Iterator[tuple[int, tuple[Operand, Operand]]]:
    """What is conjugated, and how both operands are loaded."""
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
    macros = f"SUM={_ELEMENTS[sums.name]}", f"RESULT={_ELEMENTS[result.name]}"
    return Variant("sum_parts", macros)


def tile_variant(dtype: DType, rows: int, columns: int, *, wide: bool) -> Variant:
    """`transform_tiles` for tiles of rows × columns cells of this type."""
    macros = (
        *(f"ELEMENT={dtype.name}_t", f"ROWS={rows}", f"COLUMNS={columns}"),
        f"WIDE_INDEX={int(wide)}",
        f"TRANSFORM_BYTES={TRANSFORM(dtype, rows, columns, wide=wide).itemsize}",
    )
    return Variant("transform_tiles", macros)


def tile_variants(
    dtype: DType, ranks: Sequence[int], *, wide: bool
) -> Iterator[Variant]:
    """`transform_tiles` for convolutions of this type and these ranks."""
    if dtype.name not in TILE_TYPES:
        return
    for columns in TILE_SIZES:
        for rows in (1, columns)[: max(ranks, default=0)]:
            yield tile_variant(dtype, rows, columns, wide=wide)


def direct_variant(
    kernel: str, operand: DType, result: DType, *, wide: bool
) -> Variant:
    """`depthwise` or `depthwise_weights` for arrays and a result of these types."""
    return _direct_variant(kernel, operand.name, result.name, wide=wide)


def _direct_variant(kernel: str, operand: str, result: str, *, wide: bool) -> Variant:
    name = _DIRECT_SUMS[operand]
    sums = np.dtype(name)
    types = f"ELEMENT={operand}_t", f"SUM={name}_t", f"RESULT={result}_t"
    at_once = f"IMAGES={images_at_once(sums)}", f"TAPS={taps_at_once(sums)}"
    size = f"DIRECT_BYTES={DIRECT(wide=wide).itemsize}"
    return Variant(kernel, (*types, *at_once, f"WIDE_INDEX={int(wide)}", size))


def _sum_variant(kernel: str, element: str, rank: int, *, wide: bool) -> Variant:
    macros = f"ELEMENT={element}", f"SUM={_SUMS.get(element, element)}"
    return Variant(kernel, (*macros, *_index_macros(rank, wide=wide)))


def _index_macros(rank: int, *, wide: bool) -> tuple[str, ...]:
    size = GEOMETRY(rank, wide=wide).itemsize
    return f"RANK={rank}", f"WIDE_INDEX={int(wide)}", f"GEOMETRY_BYTES={size}"


def all_variants(architecture: int = 90) -> Iterator[Variant]:
    """Every variant that the library can ask for on a device.

    Of `implicit_gemm`, those that arrays without gaps lead to; of pooling, those
    whose results have the type that they have by default.
    """
    ranks = (1, 2, 3)
    elements = dict.fromkeys(_ELEMENTS.values())
    for rank in ranks:
        for itemsize, words in _SEVERAL:
            yield copy_variant(itemsize, rank, wide=False, words=words)
        for wide in (False, True):
            for itemsize in (1, 2, 4, 8, 16):
                yield copy_variant(itemsize, rank, wide=wide)
            for element in elements:
                yield _sum_variant("col2im_gather", element, rank, wide=wide)
                if element in _HAS_ATOMICS:
                    yield _sum_variant("col2im_scatter", element, rank, wide=wide)
    for name in TILE_TYPES:
        for wide in (False, True):
            yield from tile_variants(np.dtype(name), (1, 2), wide=wide)
    yield from _direct_variants()
    yield from (Variant(*named) for named in pool_variants())
    for name in ("bool", "uint8", "uint16", "uint32", "uint64"):
        yield product_variant(np.dtype(name))
    yield from _contractions(modern=architecture >= MODERN)


def _contractions(*, modern: bool) -> Iterator[Variant]:
    """`implicit_gemm` by `usual_variants`, one integer for each width; `sum_parts`."""
    signed = {"int8", "int16", "int32", "int64"}
    added: dict[Variant, None] = {}
    for dtype in (np.dtype(name) for name in SUPPORTED_TYPES if name not in signed):
        yield from usual_variants(dtype, modern=modern)
        sums = accumulator(dtype)
        added |= dict.fromkeys(parts_variant(sums, stored) for stored in (dtype, sums))
    yield from added
    if modern:
        yield from usual_variants(np.dtype("float32"), fast=True)


def _direct_variants() -> Iterator[Variant]:
    for operand, sums in _DIRECT_SUMS.items():
        for result in dict.fromkeys((operand, sums)):
            for wide in (False, True):
                yield _direct_variant("depthwise", operand, result, wide=wide)
                yield _direct_variant("depthwise_weights", operand, result, wide=wide)
