"""Every use of cuconv's private parts.  CuPy is imported when a function needs it."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from cuconv import profiling
from cuconv.backends.cuda.elements import Variant
from cuconv.backends.cuda.source import kernel_source
from cuconv.backends.cuda.tilings import Addressing, Operand, contraction_variant
from cuconv.backends.cuda.tilings import Tiling as ContractionTiling
from cuconv.backends.cuda.variants import all_variants
from cuconv.geometry import PADDING_MODES
from cuconv.strategies import strategies

__all__ = [
    "PADDING_MODES",
    "Addressing",
    "ContractionTiling",
    "Operand",
    "Variant",
    "all_variants",
    "contraction_variant",
    "kernel_source",
    "strategies",
]


@contextmanager
def without_ranges() -> Iterator[None]:
    """Calls without their NVTX ranges."""
    domain, profiling.domain = profiling.domain, None
    try:
        yield
    finally:
        profiling.domain = domain


@contextmanager
def block_bytes(nbytes: int) -> Iterator[None]:
    """Calls on a GPU that cut their columns in blocks of this size."""
    backend = importlib.import_module("cuconv.backends.cuda").cuda_backend()
    usual, backend.block_bytes = backend.block_bytes, nbytes
    forget_plans()
    try:
        yield
    finally:
        backend.block_bytes = usual
        forget_plans()


def forget_plans() -> None:
    """Plan every call anew: no key of a plan knows of the size of blocks."""
    importlib.import_module("cuconv.engine.call").forget_plans()


def gemm() -> Callable[..., None]:
    """Matrix products as the library asks cuBLAS: ``gemm(a, b, out, fast=...)``."""
    backend = importlib.import_module("cuconv.backends.cuda").cuda_backend()
    return cast("Callable[..., None]", backend.gemm)
