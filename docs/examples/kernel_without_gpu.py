"""Run a CUDA kernel, and cuconv's own, on a machine without a GPU.

From a checkout, with a C++ compiler:

    PYTHONPATH=tests/standin python docs/examples/kernel_without_gpu.py

The module ``cupy`` is the stand-in there; the rest is an ordinary CuPy program.
"""

import cupy
import numpy as np

import cuconv
from cuconv.testing import assert_equal

# Each block turns its 64 numbers around, by way of shared memory.
REVERSE = r"""
extern "C" __global__ void reverse(const float *x, float *y)
{
    __shared__ float tile[64];
    tile[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
    __syncthreads();
    y[blockIdx.x * 64 + threadIdx.x] = tile[63 - threadIdx.x];
}
"""


def run_a_kernel():
    host = np.arange(192, dtype=np.float32)
    x, y = cupy.asarray(host), cupy.empty(192, dtype="float32")
    cupy.RawKernel(REVERSE, "reverse")((3,), (64,), (x, y))
    assert_equal(y, host.reshape(3, 64)[:, ::-1].ravel())
    print("the kernel reverses each block")


def refuse_what_cupy_refuses():
    x = cupy.ones((1, 3, 8, 8), dtype="float32")
    for mistake in (lambda: np.asarray(x), lambda: x + np.ones(x.shape)):
        try:
            mistake()
        except TypeError as error:
            print("refused:", error)
        else:
            raise AssertionError("a device array became a host array")


def convolve():
    """The whole CUDA path of cuconv: plan, kernels, streams."""
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, size=(2, 3, 9, 8)).astype(np.float32)
    w = rng.integers(-3, 4, size=(4, 3, 3, 2)).astype(np.float32)
    wanted = cuconv.conv2d(x, w, stride=2, precision="strict")
    on_device = cupy.asarray(x), cupy.asarray(w)
    for strategy in ("implicit_gemm", "im2col"):
        y = cuconv.conv2d(*on_device, stride=2, strategy=strategy)
        assert_equal(y.get(), wanted)  # which a NumPy array would not have
        print(strategy, "agrees with NumPy")


if __name__ == "__main__":
    run_a_kernel()
    refuse_what_cupy_refuses()
    convolve()
