"""Which variants of each kernel exist: element type × index width × rank."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cuconv._cuda.structs import GEOMETRY, PRODUCT, TRANSFORM
from cuconv.arrays import SUPPORTED_TYPES, DType

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
_HAS_ATOMICS = {
    *("word4_t", "word8_t", "float16_t", "bfloat16_t"),
    *("float32_t", "float64_t", "complex64_t", "complex128_t"),
}


# The tiles of `cuconv.strategies.winograd`, and the types that it transforms.
TILE_SIZES = (4, 6, 8)
TILE_TYPES = ("float32", "float64")


class Variant(NamedTuple):
    """One kernel, specialised: a name and the macros that it is compiled with."""

    kernel: str
    macros: tuple[str, ...]


def has_atomics(dtype: DType) -> bool:
    return _ELEMENTS[dtype.name] in _HAS_ATOMICS


def copy_variant(itemsize: int, rank: int, *, wide: bool) -> Variant:
    """`im2col` for items of this many bytes."""
    return Variant(
        "im2col", (f"ELEMENT=word{itemsize}_t", *_index_macros(rank, wide=wide))
    )


def sum_variant(kernel: str, dtype: DType, rank: int, *, wide: bool) -> Variant:
    """`col2im_gather` or `col2im_scatter` for columns of this type."""
    return _sum_variant(kernel, _ELEMENTS[dtype.name], rank, wide=wide)


def product_variant(dtype: DType) -> Variant:
    """`matmul` for integers or booleans of this type."""
    macros = f"ELEMENT={_ELEMENTS[dtype.name]}", f"PRODUCT_BYTES={PRODUCT.itemsize}"
    return Variant("matmul", macros)


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


def _sum_variant(kernel: str, element: str, rank: int, *, wide: bool) -> Variant:
    macros = f"ELEMENT={element}", f"SUM={_SUMS.get(element, element)}"
    return Variant(kernel, (*macros, *_index_macros(rank, wide=wide)))


def _index_macros(rank: int, *, wide: bool) -> tuple[str, ...]:
    size = GEOMETRY(rank, wide=wide).itemsize
    return f"RANK={rank}", f"WIDE_INDEX={int(wide)}", f"GEOMETRY_BYTES={size}"


def all_variants(ranks: tuple[int, ...] = (1, 2, 3)) -> Iterator[Variant]:
    """Every variant that the library can ask for."""
    elements = dict.fromkeys(_ELEMENTS.values())
    for rank in ranks:
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
    for name in ("bool", "uint8", "uint16", "uint32", "uint64"):
        yield product_variant(np.dtype(name))
