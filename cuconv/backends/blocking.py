"""How a product is cut into blocks of results, one for each block of threads."""

from typing import NamedTuple

import numpy as np

from cuconv.arrays import DType, accumulator, is_half


class Blocking(NamedTuple):
    """Filters and columns of a block, and into how many parts each sum is cut.

    ``conjugated`` is 1 where the dense operand is, 2 where ``x`` is; ``fast`` allows
    TF32.
    """

    filters: int
    columns: int
    parts: int = 1
    fast: bool = False
    conjugated: int = 0


def block_sizes(dtype: DType) -> tuple[tuple[int, int], ...]:
    """Filters and columns of the blocks of `implicit_gemm.cu`, the largest first."""
    if accumulator(dtype).itemsize > 4:
        return (64, 64), (32, 64), (16, 32)
    return (128, 128), (64, 128), (64, 64), (32, 64)


def uses_tensor_cores(dtype: DType, *, fast: bool) -> bool:
    """Whether products of this type run on tensor cores, where there are some."""
    return is_half(dtype) or (fast and dtype == np.float32)
