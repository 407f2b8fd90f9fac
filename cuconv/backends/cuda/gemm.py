"""Matrix products with ``out``: cuBLAS for floats, our kernel for integers."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from cupy.cuda import runtime
from cupy.cuda.device import get_cublas_handle

from cuconv.arrays import Array, DType, is_half, strided
from cuconv.backends.cuda.compiler import Do, launch
from cuconv.backends.cuda.structs import PRODUCT, steps_of, struct
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
_DEFAULT_MATH, _DISALLOW_REDUCED_PRECISION_REDUCTION = 0, 16
# cublasOperation_t, cublasComputeType_t and cublasGemmAlgo_t, by their numbers, so that
# a plan can be made where cuBLAS is not installed.
_NOT_TRANSPOSED, _TRANSPOSED = 0, 1
_COMPUTE_32F, _COMPUTE_TF32, _COMPUTE_64F = 68, 77, 70
_GEMM_DEFAULT = -1


@cache
def _cublas() -> Any:
    """CuPy's binding to cuBLAS, which need not be installed."""
    from cupy.cuda import cublas

    return cublas


class Cublas(threading.local):
    """cuBLAS for the products of a call, set up by the first of them.

    Each product has its own mode, so that neither TF32 nor sums in half precision occur
    by accident; the mode before the call is restored.
    """

    is_open = False
    _handle = _mode = _before = 0

    def __enter__(self) -> None:
        self.is_open = True

    def __exit__(self, *error: object) -> None:
        if self._handle:
            self._set(self._before)
        self.is_open, self._handle = False, 0

    def _set(self, mode: int) -> None:
        if mode != self._mode:
            _cublas().setMathMode(self._handle, mode)
            self._mode = mode

    def multiply(self, product: "_Product", left: int, right: int, into: int) -> None:
        """Multiply matrices at these addresses."""
        if not self._handle:
            self._handle = get_cublas_handle()
            self._mode = self._before = _cublas().getMathMode(self._handle)
        self._set(product.mode)
        cublas = _cublas()
        cublas.gemmStridedBatchedEx(
            *(self._handle, *product.sizes, product.alpha, left, *product.left),
            *(right, *product.right, product.beta, into, *product.into),
            *(product.batches, product.compute_type, _GEMM_DEFAULT),
        )


CUBLAS = Cublas()


class _Matrix(NamedTuple):
    """The arguments of cuBLAS after the address of a matrix."""

    dtype: int
    step: int
    batch: int


class _Product(NamedTuple):
    """The arguments of cuBLAS beside the addresses of matrices."""

    mode: int
    sizes: tuple[int, ...]
    alpha: int
    beta: int
    left: _Matrix
    right: _Matrix
    into: _Matrix
    batches: int
    compute_type: int


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


def _as_cublas(matrix: Array) -> tuple[int, _Matrix]:
    """The transpose of a matrix, as cuBLAS reads memory, with its leading dimension.

    Before it comes the operation of cuBLAS: a C-ordered matrix is transposed already.
    """
    rows, columns = matrix.shape[-2:]
    batch, row, column = steps_of(matrix)
    is_rows = column == 1 or columns == 1
    long, short = (row, columns) if is_rows else (column, rows)
    step = long if (rows if is_rows else columns) > 1 else max(short, 1)
    operation = _NOT_TRANSPOSED if is_rows else _TRANSPOSED
    dtype = _CUDA_TYPES[matrix.dtype.name]
    return operation, _Matrix(dtype, step, batch)


def _multiply(do: Do, a: Array, b: Array, out: Array, *, add: bool, fast: bool) -> None:
    """One call of cuBLAS: the product of every pair of (batch, rows, columns)."""
    # cuBLAS counts columns first: outᵀ = bᵀ · aᵀ.
    matrices = _as_cublas(b), _as_cublas(a), _as_cublas(out)
    (turn_left, left), (turn_right, right), (_, into) = matrices
    mode = _DEFAULT_MATH
    if is_half(a.dtype):
        mode = _DISALLOW_REDUCED_PRECISION_REDUCTION
    product = _Product(
        mode,
        (turn_left, turn_right, *out.shape[:0:-1], a.shape[-1]),
        _scalar(a.dtype, 1).ctypes.data,
        _scalar(a.dtype, int(add)).ctypes.data,
        left,
        right,
        into,
        len(out),
        _compute_type(a, fast=fast),
    )
    do(multiply, product, b, a, out)


def multiply(product: _Product, left: int, right: int, into: int) -> None:
    """Call cuBLAS: a step of a call, or a call of its own."""
    if CUBLAS.is_open:
        CUBLAS.multiply(product, left, right, into)
    else:
        with CUBLAS:
            CUBLAS.multiply(product, left, right, into)


multiply.takes_addresses = True  # type: ignore[attr-defined]


@cache
def _scalar(dtype: DType, value: int) -> Array:
    """Alpha or beta, of which cuBLAS takes the address: it stays where it is."""
    return np.array(value, dtype=_SCALARS.get(dtype.name, "float32"))


def _compute_type(matrix: Array, *, fast: bool) -> int:
    name = matrix.dtype.name
    if name in ("float64", "complex128"):
        return _COMPUTE_64F
    if fast and name in ("float32", "complex64"):
        return _COMPUTE_TF32
    return _COMPUTE_32F


def _integer_product(do: Do, a: Array, b: Array, out: Array, *, add: bool) -> None:
    images, groups, rows, columns = out.shape
    tiles = images * groups * -(-rows // _TILE) * -(-columns // _TILE)
    steps = []
    for matrix in (a, b, out):
        image, *rest = steps_of(matrix)
        steps.append((0 if matrix.shape[0] == 1 else image, *rest))
    head = (groups, rows, columns, a.shape[-1], tiles, int(add))
    packed, variant = struct((*head, *steps), PRODUCT), product_variant(out.dtype)
    launch(do, variant, min(tiles, _MOST_BLOCKS), _TILE * _TILE, a, b, out, packed)
