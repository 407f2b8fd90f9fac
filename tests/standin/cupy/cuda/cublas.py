"""cuBLAS over host memory: matrices columns first, read through bare pointers."""

import ctypes

import numpy as np

from . import memory, runtime, stream

CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_OP_C = 0, 1, 2
CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_COMPUTE_64F = 68, 77, 70
CUBLAS_GEMM_DEFAULT = -1
CUBLAS_DEFAULT_MATH = 0

# One entry per call: (m, n, k, batch, compute type, math mode), for tests to look at.
calls = []

_mode = {}


def getMathMode(handle):
    return _mode.get(handle, CUBLAS_DEFAULT_MATH)


def setMathMode(handle, mode):
    _mode[handle] = mode


def _dtype(code):
    if code == runtime.CUDA_R_16BF:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(
        {
            runtime.CUDA_R_16F: "f2",
            runtime.CUDA_R_32F: "f4",
            runtime.CUDA_R_64F: "f8",
            runtime.CUDA_C_32F: "c8",
            runtime.CUDA_C_64F: "c16",
        }[code]
    )


def _matrices(pointer, code, rows, columns, ld, step, batch):
    """View (batch, rows, columns) stored columns first, after checking every byte."""
    dtype = _dtype(code)
    for name, number in (("ld", ld), ("rows", rows), ("columns", columns)):
        if not 0 <= number < 2**31:
            raise RuntimeError(f"CUBLAS_STATUS_INVALID_VALUE: {name} = {number}")
    if ld < max(1, rows):
        raise RuntimeError(f"CUBLAS_STATUS_INVALID_VALUE: ld {ld} < rows {rows}")
    if 0 in (batch, rows, columns):
        return np.empty((batch, rows, columns), dtype)
    ends = (0, (batch - 1) * step)
    low = min(ends) * dtype.itemsize
    high = (max(ends) + (columns - 1) * ld + rows) * dtype.itemsize
    memory.check_inside(pointer + low, pointer + high)
    raw = (ctypes.c_char * (high - low)).from_address(pointer + low)
    first = np.frombuffer(raw, dtype=dtype)[-low // dtype.itemsize :]
    strides = tuple(s * dtype.itemsize for s in (step, 1, ld))
    return np.lib.stride_tricks.as_strided(first, (batch, rows, columns), strides)


def _check_types(a, b, c, compute):
    """The combinations in NVIDIA's table of gemmEx that the library uses."""
    halves = runtime.CUDA_R_16F, runtime.CUDA_R_16BF
    double = runtime.CUDA_R_64F, runtime.CUDA_C_64F
    fits = a == b and (c == a or (a in halves and c == runtime.CUDA_R_32F))
    fits = fits and (compute == CUBLAS_COMPUTE_64F) == (a in double)
    if compute == CUBLAS_COMPUTE_32F_FAST_TF32:
        fits = fits and a in (runtime.CUDA_R_32F, runtime.CUDA_C_32F)
    if not fits:
        raise RuntimeError(f"CUBLAS_STATUS_NOT_SUPPORTED: {a}, {b}, {c}, {compute}")


def gemmStridedBatchedEx(
    handle, transa, transb, m, n, k,
    alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB,
    beta, C, Ctype, ldc, strideC, batchCount, computeType, algo,
):  # fmt: skip
    stream.refuse(
        "calling cuBLAS API during stream capture is currently unsupported",
        NotImplementedError,
    )
    calls.append((m, n, k, batchCount, computeType, getMathMode(handle)))
    _check_types(Atype, Btype, Ctype, computeType)
    shape_a, shape_b = (m, k), (k, n)
    a = _matrices(A, Atype, *shape_a[:: -1 if transa else 1], lda, strideA, batchCount)
    b = _matrices(B, Btype, *shape_b[:: -1 if transb else 1], ldb, strideB, batchCount)
    c = _matrices(C, Ctype, m, n, ldc, strideC, batchCount)
    wide = np.float64 if computeType == CUBLAS_COMPUTE_64F else np.float32
    scalar = np.result_type(wide, a.dtype) if a.dtype.kind == "c" else np.dtype(wide)
    scale, keep = (
        np.frombuffer((ctypes.c_char * scalar.itemsize).from_address(p), scalar)[0]
        for p in (alpha, beta)
    )
    a = (a.swapaxes(1, 2) if transa else a).astype(scalar)
    b = (b.swapaxes(1, 2) if transb else b).astype(scalar)
    with np.errstate(all="ignore"):
        product = scale * (a @ b)
        product = product if keep == 0 else product + keep * c.astype(scalar)
        c[...] = product.astype(c.dtype)
