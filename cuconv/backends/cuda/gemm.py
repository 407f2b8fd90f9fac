"""Matrix products with ``out``: cuBLAS for floats, our kernel for integers."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from cupy.cuda import cublas, runtime
from cupy.cuda.device import get_cublas_handle

from cuconv.arrays import Array, is_half, strided
from cuconv.backends.cuda.compiler import Do, kernel, launch
from cuconv.backends.cuda.structs import PRODUCT, steps_of
from cuconv.backends.cuda.variants import product_variant

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
    """A matrix for cuBLAS, column-major: a C-ordered one is transposed."""

    dtype: int
    operation: int
    step: int
    batch: int

    @property
    def how(self) -> tuple[int, int, int]:
        """The arguments of cuBLAS after the address."""
        return self.dtype, self.step, self.batch


def gemm(
    do: Do, a: Array, b: Array, out: Array, *, add: bool = False, fast: bool = False
) -> None:
    """``out = a @ b``, or ``out += a @ b``, over (…, rows, columns).

    ``a`` or ``b`` may have one image, which is broadcast; integers and booleans have
    images and groups before the matrix, floats any number of axes.  Nothing is copied:
    each matrix needs one contiguous axis.
    """
    if out.dtype.kind in "biu":
        _integer_product(do, a, b, out, add=add)
        return
    if not _is_row_major(out):
        # Results stored by columns are the transposed product stored by rows.
        a, b, out = b.swapaxes(-1, -2), a.swapaxes(-1, -2), out.swapaxes(-1, -2)
    for left, right, into in _batches(*_merged(a, b, out)):
        _multiply(do, left, right, into, add=add, fast=fast)


def _merged(*matrices: Array) -> list[Array]:
    """Merge the axes before the last two as far as possible, the same for all matrices.

    Along an axis where one is broadcast, its stride is 0.  The last matrix has the
    sizes.
    """
    sizes = matrices[-1].shape[:-2]
    steps = (
        [0 if n == 1 else step for n, step in zip(m.shape, m.strides, strict=True)]
        for m in matrices
    )
    axes: list[tuple[int, list[int]]] = []
    for size, *outer in reversed(list(zip(sizes, *steps, strict=False))):
        if size == 1:
            continue
        count, inner = axes[-1] if axes else (0, [])
        if axes and outer == [count * step for step in inner] and _fit(matrices, inner):
            axes[-1] = size * count, inner
        else:
            axes.append((size, outer))
    axes = axes[::-1] or [(1, [0] * len(matrices))]
    return [
        strided(
            m,
            (*(size for size, _ in axes), *m.shape[-2:]),
            (*(step[i] for _, step in axes), *m.strides[-2:]),
        )
        for i, m in enumerate(matrices)
    ]


def _batches(a: Array, b: Array, out: Array) -> Iterator[tuple[Array, Array, Array]]:
    """Split the products into batches along one axis, as few as cuBLAS allows."""
    sizes = out.shape[:-2]
    axis = sizes.index(max(sizes))
    picks: list[list[int | slice]] = [list(range(size)) for size in sizes]
    if _fit((a, b, out), (m.strides[axis] for m in (a, b, out))):
        picks[axis] = [slice(None)]
    else:
        picks[axis] = [slice(i, i + 1) for i in range(sizes[axis])]
    for place in product(*picks):
        yield a[place], b[place], out[place]


def _is_row_major(matrix: Array) -> bool:
    return bool(matrix.shape[-1] == 1 or matrix.strides[-1] == matrix.dtype.itemsize)


def _fit(matrices: Sequence[Array], strides: Iterable[int]) -> bool:
    """True if matrices with these strides may be one batch.

    cuBLAS chooses a kernel by the alignment of the first pointer, so that every matrix
    of halves must be aligned as the first is.
    """
    return not is_half(matrices[0].dtype) or all(s % 16 == 0 for s in strides)


def _as_cublas(matrix: Array) -> _Matrix:
    """The transpose of a matrix, as cuBLAS reads memory, with its leading dimension."""
    rows, columns = matrix.shape[-2:]
    batch, row, column = steps_of(matrix)
    is_rows = column == 1 or columns == 1
    long, short = (row, columns) if is_rows else (column, rows)
    step = long if (rows if is_rows else columns) > 1 else max(short, 1)
    operation = cublas.CUBLAS_OP_N if is_rows else cublas.CUBLAS_OP_T
    dtype = _CUDA_TYPES[matrix.dtype.name]
    return _Matrix(dtype, operation, step, batch)


def _multiply(do: Do, a: Array, b: Array, out: Array, *, add: bool, fast: bool) -> None:
    """One call of cuBLAS: the product of every pair of (batch, rows, columns)."""
    # cuBLAS counts columns first: outᵀ = bᵀ · aᵀ.
    left, right, into = _as_cublas(b), _as_cublas(a), _as_cublas(out)
    scalar = _SCALARS.get(a.dtype.name, "float32")
    alpha, beta = np.array(1, dtype=scalar), np.array(add, dtype=scalar)
    mode = (
        _DISALLOW_REDUCED_PRECISION_REDUCTION
        if is_half(a.dtype)
        else cublas.CUBLAS_DEFAULT_MATH
    )
    sizes = left.operation, right.operation, *out.shape[:0:-1], a.shape[-1]
    product = _Product(
        mode,
        sizes,
        alpha,
        beta,
        left,
        right,
        into,
        len(out),
        _compute_type(a, fast=fast),
    )
    do(_run, product, b, a, out)


class _Product(NamedTuple):
    """All arguments of a call of cuBLAS beside addresses."""

    mode: int
    sizes: tuple[int, ...]
    alpha: Array
    beta: Array
    left: _Matrix
    right: _Matrix
    into: _Matrix
    batches: int
    compute_type: int


def _run(product: _Product, left: Any, right: Any, into: Any) -> None:
    """Call cuBLAS, with neither TF32 nor sums in half precision by accident."""
    left, right, into = map(_address, (left, right, into))
    handle = get_cublas_handle()
    before = cublas.getMathMode(handle)
    cublas.setMathMode(handle, product.mode)
    try:
        cublas.gemmStridedBatchedEx(
            handle,
            *product.sizes,
            product.alpha.ctypes.data,
            *(left, *product.left.how),
            *(right, *product.right.how),
            product.beta.ctypes.data,
            *(into, *product.into.how),
            *(product.batches, product.compute_type, cublas.CUBLAS_GEMM_DEFAULT),
        )
    finally:
        cublas.setMathMode(handle, before)


_run.takes_addresses = True  # type: ignore[attr-defined]


def _address(array: Any) -> int:
    return int(array if isinstance(array, np.uintp) else array.data.ptr)


def _compute_type(matrix: Array, *, fast: bool) -> int:
    name = matrix.dtype.name
    if name in ("float64", "complex128"):
        return int(cublas.CUBLAS_COMPUTE_64F)
    if fast and name in ("float32", "complex64"):
        return int(cublas.CUBLAS_COMPUTE_32F_FAST_TF32)
    return int(cublas.CUBLAS_COMPUTE_32F)


def _integer_product(do: Do, a: Array, b: Array, out: Array, *, add: bool) -> None:
    images, groups, rows, columns = out.shape
    tiles = images * groups * -(-rows // _TILE) * -(-columns // _TILE)
    steps = []
    for matrix in (a, b, out):
        image, *rest = steps_of(matrix)
        steps.append((0 if matrix.shape[0] == 1 else image, *rest))
    head = (groups, rows, columns, a.shape[-1], tiles, int(add))
    packed = np.array([(*head, *steps)], dtype=PRODUCT)
    run = kernel(product_variant(out.dtype))
    blocks = min(tiles, _MOST_BLOCKS)
    do(launch, run, blocks, _TILE * _TILE, 0, a, b, out, packed)
