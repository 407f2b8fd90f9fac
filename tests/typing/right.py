"""A program whose types are right: type checkers must find nothing in it."""

from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import cuconv
from cuconv import ConvGradients, MemoryLimitError, Plan
from cuconv.layers import Conv2d, MaxPool2d

x: NDArray[np.float32] = np.ones((2, 3, 8, 8), dtype=np.float32)
w: NDArray[np.float32] = np.ones((4, 3, 3, 3), dtype=np.float32)
bias: NDArray[np.float32] = np.zeros(4, dtype=np.float32)

y = cuconv.conv2d(x, w, bias, stride=(1, 2), padding="same", layout="NCHW")
assert_type(y, np.ndarray[Any, Any])
print(y.mean(axis=0).shape, y.dtype)

gradients = cuconv.conv_backward(y, x, w, stride=(1, 2), padding=((1, 1), 1))
assert_type(gradients, ConvGradients[np.ndarray[Any, Any]])
dx, dw, dbias = gradients
print(gradients.x.shape, dw.sum(), dbias.dtype)
some = cuconv.conv_backward(y, x, w, needs=("x",), stride=(1, 2), padding=1)
print(some.x.shape)

up = cuconv.conv_transpose2d(x, np.ones((3, 4, 2, 2), dtype=np.float32), stride=2)
print(up.shape)
pooled, indices = cuconv.max_pool2d(x, 2, return_indices=True)
print(pooled.shape, indices.shape, cuconv.avg_pool2d(x, 2, ceil_mode=True).shape)
columns = cuconv.im2col(x, 3, padding=1, order="batched")
images, patch, positions = columns.shape
print(cuconv.col2im(columns, x.shape, 3, padding=1, order="batched").shape)

plan = cuconv.plan_conv(x.shape, w.shape, precision="fast", memory_limit="1 MiB")
assert_type(plan, Plan)
print(plan.strategy, plan.prepare(w)(x).shape)

layer = Conv2d(3, 8, 3, padding=1, padding_mode="reflect", xp=np)
out = MaxPool2d(2)(layer(x))
print(layer.backward(np.ones_like(x)).shape, out.shape)
try:
    cuconv.conv(x, w, memory_limit=1024)
except MemoryLimitError as error:
    print(error.smallest)
with cuconv.config(num_threads=1, precision="strict"):
    print(cuconv.global_avg_pool(x).shape)
