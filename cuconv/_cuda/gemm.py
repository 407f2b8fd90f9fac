"""Matrix products into place: cuBLAS for floats, a kernel of ours for integers."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import numpy as np
from cupy.cuda import cublas, runtime
from cupy.cuda.device import get_cublas_handle

from cuconv._cuda.compiler import kernel
from cuconv._cuda.structs import PRODUCT, steps_of
from cuconv._cuda.variants import product_variant
from cuconv.arrays import Array, is_half

_TILE = 16
_MOST_BLOCKS = 2**20

_CUDA_TYPES = {
    "float16": runtime.CUDA_R_16F,
    "bfloat16": runtime.CUDA_R_16BF,
    "float32": runtime.CUDA_R_32F,
    "float64": runtime.CUDA_R_64F,
    "complex64": runtime.CUDA_C_32F,
    "complex128": runtime.CUDA_C_64F,
}
# Types of alpha and beta; float32 for all others.
_SCALARS = {name: name for name in ("float64", "complex64", "complex128")}
# cublasMath_t: half products must not be reduced in half precision.
_DISALLOW_REDUCED_PRECISION_REDUCTION = 16


class _Matrix(NamedTuple):
    """A matrix as cuBLAS takes it: columns first, so a C-ordered one is transposed."""

    pointer: int
    dtype: int
    operation: int
    step: int


def gemm(
    a: Array, b: Array, out: Array, *, add: bool = False, fast: bool = False
) -> None:
    """``out = a @ b``, or ``out += a @ b``, over (N, G, rows, columns).

    ``a`` or ``b`` may have one image, which then serves all.  Nothing is copied: each
    matrix needs one contiguous axis.
    """
    if out.dtype.kind in "biu":
        _integer_product(a, b, out, add=add)
        return
    if not _is_row_major(out):
        # Results stored by columns are the transposed product stored by rows.
        a, b, out = b.swapaxes(-1, -2), a.swapaxes(-1, -2), out.swapaxes(-1, -2)
    for left, right, into, axis in _batches(a, b, out):
        _multiply(left, right, into, axis, add=add, fast=fast)


def _batches(
    a: Array, b: Array, out: Array
) -> Iterator[tuple[Array, Array, Array, int]]:
    """Cut the products into batches along one axis, as few as cuBLAS allows."""
    matrices = a, b, out
    axis = 0 if out.shape[0] >= out.shape[1] else 1
    if is_half(a.dtype) and not all(_is_aligned(m, axis) for m in matrices):
        for image, group in product(*map(range, out.shape[:2])):
            one, two, three = (_at(_at(m, 0, image), 1, group) for m in matrices)
            yield one, two, three, axis
        return
    for other in range(out.shape[1 - axis]):
        one, two, three = (_at(m, 1 - axis, other) for m in matrices)
        yield one, two, three, axis


def _at(matrix: Array, axis: int, index: int) -> Array:
    """One image or group; where there is only one, it serves for all."""
    if matrix.shape[axis] == 1:
        return matrix
    return matrix[index : index + 1] if axis == 0 else matrix[:, index : index + 1]


def _is_row_major(matrix: Array) -> bool:
    return bool(matrix.shape[-1] == 1 or matrix.strides[-1] == matrix.dtype.itemsize)


def _is_aligned(matrix: Array, axis: int) -> bool:
    """Whether every matrix of a batch is aligned as the first is.

    cuBLAS chooses a kernel by the alignment of the first pointer.
    """
    return bool(matrix.shape[axis] == 1 or matrix.strides[axis] % 16 == 0)


def _as_cublas(matrix: Array) -> _Matrix:
    """The transpose of a matrix, as cuBLAS reads memory, with its leading dimension."""
    rows, columns = matrix.shape[-2:]
    row, column = steps_of(matrix)[-2:]
    plain = column == 1 or columns == 1
    long, short = (row, columns) if plain else (column, rows)
    step = long if (rows if plain else columns) > 1 else max(short, 1)
    operation = cublas.CUBLAS_OP_N if plain else cublas.CUBLAS_OP_T
    return _Matrix(matrix.data.ptr, _CUDA_TYPES[matrix.dtype.name], operation, step)


def _batch_step(matrix: Array, axis: int) -> int:
    return 0 if matrix.shape[axis] == 1 else steps_of(matrix)[axis]


def _multiply(
    a: Array, b: Array, out: Array, axis: int, *, add: bool, fast: bool
) -> None:
    """One call of cuBLAS: the product of every pair along ``axis``."""
    # cuBLAS counts columns first: outᵀ = bᵀ · aᵀ.
    left, right, into = _as_cublas(b), _as_cublas(a), _as_cublas(out)
    scalar = _SCALARS.get(a.dtype.name, "float32")
    alpha, beta = np.array(1, dtype=scalar), np.array(add, dtype=scalar)
    handle = get_cublas_handle()
    with _full_precision(handle, half=is_half(a.dtype)):
        cublas.gemmStridedBatchedEx(
            handle,
            *(left.operation, right.operation, *out.shape[:1:-1], a.shape[-1]),
            alpha.ctypes.data,
            *(left.pointer, left.dtype, left.step, _batch_step(b, axis)),
            *(right.pointer, right.dtype, right.step, _batch_step(a, axis)),
            beta.ctypes.data,
            *(into.pointer, into.dtype, into.step, _batch_step(out, axis)),
            *(out.shape[axis], _compute_type(a, fast=fast), cublas.CUBLAS_GEMM_DEFAULT),
        )


def _compute_type(matrix: Array, *, fast: bool) -> int:
    name = matrix.dtype.name
    if name in ("float64", "complex128"):
        return int(cublas.CUBLAS_COMPUTE_64F)
    if fast and name in ("float32", "complex64"):
        return int(cublas.CUBLAS_COMPUTE_32F_FAST_TF32)
    return int(cublas.CUBLAS_COMPUTE_32F)


@contextmanager
def _full_precision(handle: int, *, half: bool) -> Iterator[None]:
    """Whatever mode the handle is in, neither TF32 nor sums in half precision."""
    before = cublas.getMathMode(handle)
    mode = _DISALLOW_REDUCED_PRECISION_REDUCTION if half else cublas.CUBLAS_DEFAULT_MATH
    cublas.setMathMode(handle, mode)
    try:
        yield
    finally:
        cublas.setMathMode(handle, before)


def _integer_product(a: Array, b: Array, out: Array, *, add: bool) -> None:
    images, groups, rows, columns = out.shape
    tiles = images * groups * -(-rows // _TILE) * -(-columns // _TILE)
    steps = []
    for matrix in (a, b, out):
        image, *rest = steps_of(matrix)
        steps.append((0 if matrix.shape[0] == 1 else image, *rest))
    head = (groups, rows, columns, a.shape[-1], tiles, int(add))
    packed = np.array([(*head, *steps)], dtype=PRODUCT)
    launch = kernel(product_variant(out.dtype))
    launch((min(tiles, _MOST_BLOCKS),), (_TILE * _TILE,), (a, b, out, packed))
