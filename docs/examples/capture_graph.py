"""Capture a training step's convolutions into a CUDA graph, and launch it again.

    python docs/examples/capture_graph.py

It needs CuPy and a GPU.  Without one, the stand-in for CuPy runs it, from a checkout:

    PYTHONPATH=tests/standin python docs/examples/capture_graph.py
"""

from functools import partial

import cupy
import numpy as np

import cuconv
from cuconv.testing import assert_equal


def integers(rng, shape):
    """Small integers held as floats: every sum is exact."""
    return rng.integers(-3, 4, size=shape).astype(np.float32)


def main():
    rng = np.random.default_rng(0)
    x, w = integers(rng, (2, 8, 9, 9)), integers(rng, (16, 8, 3, 3))
    x, w = cupy.asarray(x), cupy.asarray(w)
    y, dy = cupy.empty((2, 16, 9, 9), "float32"), cupy.empty((2, 16, 9, 9), "float32")
    dx, dw = cupy.empty(x.shape, "float32"), cupy.empty(w.shape, "float32")

    options = {"padding": 1, "strategy": "implicit_gemm"}
    calls = [
        partial(cuconv.conv2d, x, w, out=y, **options),
        partial(cuconv.conv_input_grad, dy, w, x.shape, out=dx, **options),
        partial(cuconv.conv_weight_grad, dy, x, w.shape, out=dw, **options),
    ]
    dy[...] = 0
    for call in calls:
        call()  # once before, by the same strategy: its kernels are compiled and loaded
    stream = cupy.cuda.Stream(non_blocking=True)
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with stream:
        stream.begin_capture()
        for call in calls:
            call()
        graph = stream.end_capture()

    # The same buffers, other numbers, one launch.
    new_x, new_dy = integers(rng, x.shape), integers(rng, dy.shape)
    with stream:
        x[...] = cupy.asarray(new_x)
        dy[...] = cupy.asarray(new_dy)
        graph.launch()
    stream.synchronize()

    host_w = w.get()
    plain = {"padding": 1, "precision": "strict"}
    assert_equal(y, cuconv.conv2d(new_x, host_w, **plain))
    assert_equal(dx, cuconv.conv_input_grad(new_dy, host_w, x.shape, **plain))
    assert_equal(dw, cuconv.conv_weight_grad(new_dy, new_x, w.shape, **plain))
    print("a graph of", len(calls), "calls gives what NumPy gives")


if __name__ == "__main__":
    main()
