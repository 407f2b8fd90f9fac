"""Kernels, compiled when first needed and kept for each device."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, TypeAlias

import cupy
import numpy as np

from cuconv.arrays import DType, accumulator, check_type
from cuconv.backends.blocking import uses_tensor_cores
from cuconv.backends.cuda.elements import Variant
from cuconv.backends.cuda.pooling import pool_variants
from cuconv.backends.cuda.source import kernel_source
from cuconv.backends.cuda.tilings import parts_variant, usual_variants
from cuconv.backends.cuda.variants import (
    copy_variants,
    deform_variants,
    direct_variant,
    has_atomics,
    pad_adjoint_variant,
    pad_copy_variant,
    product_variant,
    sum_variant,
    tile_variants,
    transpose_variant,
)
from cuconv.engine.costs import MODERN

_SHARED_WITHOUT_ASKING = 48 * 1024
# Calls a function with operands, or records that. Functions of which `takes_addresses`
# is true receive the addresses of arrays.
Do: TypeAlias = Callable[..., None]


def launch(
    do: Do, variant: Variant, blocks: int, threads: int, *arguments: Any
) -> None:
    """Launch a kernel on the current stream, or record that."""
    run, grid, block, shared = kernel(variant), (blocks,), (threads,), variant.shared

    def step(*arguments: Any) -> None:
        run(grid, block, arguments, shared_mem=shared)

    step.takes_addresses = True  # type: ignore[attr-defined]
    do(step, *arguments)


def kernel(variant: Variant) -> Any:
    """The kernel of a variant on the current device."""
    return _loaded(variant, int(cupy.cuda.runtime.getDevice()))


@cache
def _loaded(variant: Variant, device: int) -> Any:
    del device  # a module belongs to the device that was current when it was loaded
    options = tuple(f"-D{macro}" for macro in variant.macros)
    module = cupy.RawModule(code=kernel_source(variant.kernel), options=options)
    function = module.get_function(variant.kernel)
    if variant.shared > _SHARED_WITHOUT_ASKING:
        function.max_dynamic_shared_size_bytes = variant.shared
    return function


def precompile(
    dtypes: Sequence[Any],
    ranks: Sequence[int],
    progress: Callable[[int, int], object] | None,
) -> int:
    """See `cuconv.precompile`."""
    variants: set[Variant] = set()
    modern = int(cupy.cuda.Device().compute_capability) >= MODERN
    for dtype in map(np.dtype, dtypes):
        check_type("dtype", dtype)
        variants.update(_products(dtype, modern=modern))
        variants.update(tile_variants(dtype, ranks, wide=False))
        variants.update(Variant(*named) for named in pool_variants([dtype], wide=False))
        if dtype.kind in "biu":
            variants.add(product_variant(dtype))
        else:
            for name in ("depthwise", "depthwise_weights"):
                variants.add(direct_variant(name, dtype, dtype, wide=False))
        for rank in ranks:
            variants.update(deform_variants(dtype, rank, wide=False))
        # In canonical form, a convolution may have fewer axes than were given.
        for rank in range(1, max(ranks, default=0) + 1):
            variants.update(_column_variants(dtype, rank))
    for done, variant in enumerate(variants, 1):
        kernel(variant)
        if progress is not None:
            progress(done, len(variants))
    return len(variants)


def _products(dtype: DType, *, modern: bool) -> Iterator[Variant]:
    """`implicit_gemm` in every precision, whole and in parts, and what goes with it."""
    for fast in (False, True)[: 1 + (modern and dtype == np.float32)]:
        for partial in (False, True):
            how = {"fast": fast, "modern": modern, "partial": partial}
            yield from usual_variants(dtype, **how)
    yield parts_variant(accumulator(dtype), dtype)
    if modern and uses_tensor_cores(dtype, fast=True):
        yield transpose_variant(dtype.itemsize)


def _column_variants(dtype: DType, rank: int) -> Iterator[Variant]:
    yield from copy_variants([dtype.itemsize], rank)
    yield pad_copy_variant(dtype.itemsize, rank, wide=False)
    yield pad_adjoint_variant(accumulator(dtype), rank, wide=False)
    for own in {dtype, accumulator(dtype)}:
        yield sum_variant("col2im_gather", own, rank, wide=False)
        if has_atomics(own):
            yield sum_variant("col2im_scatter", own, rank, wide=False)
