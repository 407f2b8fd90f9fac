"""The split of a product into blocks of results, one for each block of threads."""

from typing import NamedTuple

import numpy as np

from cuconv.arrays import DType, accumulator, is_half


class Blocking(NamedTuple):
    """Filters and columns of a block, and the number of parts of each sum (split-K).

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
    """True if products of this type run on tensor cores, if the device has them."""
    return is_half(dtype) or (fast and dtype == np.float32)
