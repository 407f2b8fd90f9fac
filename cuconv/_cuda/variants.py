"""Which variants of each kernel exist: element type × index width × rank."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cuconv._cuda.direct import DIRECT, images_at_once, taps_at_once
from cuconv._cuda.structs import GEOMETRY, PRODUCT
from cuconv._cuda.words import Words
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


class Variant(NamedTuple):
    """One kernel, specialised: a name and the macros that it is compiled with."""

    kernel: str
    macros: tuple[str, ...]


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


def all_variants(ranks: tuple[int, ...] = (1, 2, 3)) -> Iterator[Variant]:
    """Every variant that the library can ask for."""
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
    yield from _direct_variants()
    for name in ("bool", "uint8", "uint16", "uint32", "uint64"):
        yield product_variant(np.dtype(name))


def _direct_variants() -> Iterator[Variant]:
    for operand, sums in _DIRECT_SUMS.items():
        for result in dict.fromkeys((operand, sums)):
            for wide in (False, True):
                yield _direct_variant("depthwise", operand, result, wide=wide)
                yield _direct_variant("depthwise_weights", operand, result, wide=wide)
