"""The variants of each kernel: element type × index width × rank."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from cuconv.arrays import SUPPORTED_TYPES, DType, accumulator
from cuconv.backends.cuda.depthwise import DIRECT, images_at_once, taps_at_once
from cuconv.backends.cuda.elements import ELEMENTS, SUMS, Variant
from cuconv.backends.cuda.pooling import pool_variants
from cuconv.backends.cuda.structs import DEFORM, GEOMETRY, MATRICES, PRODUCT, TRANSFORM
from cuconv.backends.cuda.tilings import parts_variant, usual_variants
from cuconv.backends.cuda.vector_width import VectorWidth, vector_widths
from cuconv.engine.costs import MODERN

# The types of the depthwise kernels, and the type that each is summed in.
_DIRECT_SUMS = {
    **dict.fromkeys(("float16", "bfloat16"), "float32"),
    **{name: name for name in ("float32", "float64", "complex64", "complex128")},
}
DEFORM_KERNELS = (
    *("deform_im2col", "deform_scatter", "deform_gather", "deform_offsets"),
)
_DEFORMED = "float16", "bfloat16", "float32", "float64"
_SINGLE = VectorWidth()
_HAS_ATOMICS = {
    *("word4_t", "word8_t", "float16_t", "bfloat16_t"),
    *("float32_t", "float64_t", "complex64_t", "complex128_t"),
}


# The tiles of `cuconv.strategies.winograd`, and the types that it transforms.
TILE_SIZES = (4, 6, 8)
TILE_TYPES = ("float32", "float64")


def has_atomics(dtype: DType) -> bool:
    """True if the scatter kernel can add this type atomically."""
    return ELEMENTS[dtype.name] in _HAS_ATOMICS


def copy_variant(
    itemsize: int, rank: int, *, wide: bool, width: VectorWidth = _SINGLE
) -> Variant:
    """`im2col` for items of this many bytes, copied in vectors of this width."""
    size = itemsize * width.channels
    # An item of 16 bytes may be aligned to 8 bytes only.
    element = "quadword_t" if size > max(itemsize, 8) else f"word{size}_t"
    macros = f"ELEMENT={element}", f"VECTOR={width.positions}"
    return Variant("im2col", (*macros, *_index_macros(rank, wide=wide)))


def copy_variants(itemsizes: Iterable[int], rank: int) -> Iterable[Variant]:
    """`im2col` for items of these sizes, in every width and with a narrow index."""
    pairs = ((size, width) for size in itemsizes for width in vector_widths(size))
    each = (copy_variant(size, rank, wide=False, width=width) for size, width in pairs)
    return dict.fromkeys(each)


def sum_variant(kernel: str, dtype: DType, rank: int, *, wide: bool) -> Variant:
    """`col2im_gather` or `col2im_scatter` for columns of this type."""
    return _sum_variant(kernel, ELEMENTS[dtype.name], rank, wide=wide)


def pad_copy_variant(itemsize: int, rank: int, *, wide: bool) -> Variant:
    """`pad_copy` for items of this many bytes."""
    macros = f"ELEMENT=word{itemsize}_t", *_index_macros(rank, wide=wide)
    return Variant("pad_copy", macros)


def pad_adjoint_variant(dtype: DType, rank: int, *, wide: bool) -> Variant:
    """`pad_adjoint` for sums of this type."""
    return _pad_adjoint_variant(ELEMENTS[dtype.name], rank, wide=wide)


def product_variant(dtype: DType) -> Variant:
    """`matmul` for integers or booleans of this type."""
    macros = f"ELEMENT={ELEMENTS[dtype.name]}", f"PRODUCT_BYTES={PRODUCT.itemsize}"
    return Variant("matmul", macros)


def tile_variant(dtype: DType, rows: int, columns: int, *, wide: bool) -> Variant:
    """`transform_tiles` for tiles of rows × columns elements of this type."""
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


def transpose_variant(itemsize: int) -> Variant:
    """`transpose` for items of this many bytes."""
    size = f"MATRICES_BYTES={MATRICES.itemsize}"
    return Variant("transpose", (f"ELEMENT=word{itemsize}_t", size))


def deform_variant(
    kernel: str, dtypes: dict[str, DType], rank: int, *, wide: bool
) -> Variant:
    """A kernel of deformable convolution: the type of each macro by its name."""
    macros = (
        *(f"{name}={ELEMENTS[dtype.name]}" for name, dtype in dtypes.items()),
        *_index_macros(rank, wide=wide),
        f"DEFORM_BYTES={DEFORM(rank, wide=wide).itemsize}",
    )
    return Variant(kernel, macros)


def deform_variants(dtype: DType, rank: int, *, wide: bool) -> Iterator[Variant]:
    """Every kernel for arrays of one type, with a mask."""
    if dtype.kind not in "fV":
        return
    own, sums = dict.fromkeys(("OFFSET", "MASK"), dtype), accumulator(dtype)
    # The type of x, or of its gradient, and of the columns, or theirs.
    kinds = (dtype, dtype), (sums, sums), (sums, sums), (dtype, sums)
    for kernel, (x, columns) in zip(DEFORM_KERNELS, kinds, strict=True):
        dtypes = {"ELEMENT": x, "COLUMN": columns, "SUM": sums, **own}
        if kernel == "deform_offsets":
            dtypes["RESULT"] = dtype
        yield deform_variant(kernel, dtypes, rank, wide=wide)


def _pad_adjoint_variant(element: str, rank: int, *, wide: bool) -> Variant:
    return Variant(
        "pad_adjoint", (f"ELEMENT={element}", *_index_macros(rank, wide=wide))
    )


def _sum_variant(kernel: str, element: str, rank: int, *, wide: bool) -> Variant:
    macros = f"ELEMENT={element}", f"SUM={SUMS.get(element, element)}"
    return Variant(kernel, (*macros, *_index_macros(rank, wide=wide)))


def _index_macros(rank: int, *, wide: bool) -> tuple[str, ...]:
    size = GEOMETRY(rank, wide=wide).itemsize
    return f"RANK={rank}", f"WIDE_INDEX={int(wide)}", f"GEOMETRY_BYTES={size}"


# Nothing, for some time.
DELAY = Variant("delay", ())


def all_variants(architecture: int = 90) -> Iterator[Variant]:
    """Every variant that the library can use on a device.

    Of `implicit_gemm`, those that arrays without gaps lead to; of pooling, those
    whose results have the type that they have by default.
    """
    for rank in (1, 2, 3):
        yield from _column_variants(rank)
        for name in _DEFORMED:
            for wide in (False, True):
                yield from deform_variants(np.dtype(name), rank, wide=wide)
    for name in TILE_TYPES:
        for wide in (False, True):
            yield from tile_variants(np.dtype(name), (1, 2), wide=wide)
    yield from _direct_variants()
    types = [np.dtype(name) for name in SUPPORTED_TYPES]
    pools = (pool_variants(types, wide=wide) for wide in (False, True))
    yield from dict.fromkeys(Variant(*named) for each in pools for named in each)
    yield from map(transpose_variant, (2, 4))
    yield DELAY
    names = ("bool", "uint8", "uint16", "uint32", "uint64")
    yield from (product_variant(np.dtype(name)) for name in names)
    yield from _contractions(modern=architecture >= MODERN)


def _column_variants(rank: int) -> Iterator[Variant]:
    itemsizes = 1, 2, 4, 8, 16
    yield from copy_variants(itemsizes, rank)
    yield from (copy_variant(itemsize, rank, wide=True) for itemsize in itemsizes)
    for wide in (False, True):
        for itemsize in itemsizes:
            yield pad_copy_variant(itemsize, rank, wide=wide)
        for element in dict.fromkeys(ELEMENTS.values()):
            yield _sum_variant("col2im_gather", element, rank, wide=wide)
            if element not in SUMS:
                yield _pad_adjoint_variant(element, rank, wide=wide)
            if element in _HAS_ATOMICS:
                yield _sum_variant("col2im_scatter", element, rank, wide=wide)


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
