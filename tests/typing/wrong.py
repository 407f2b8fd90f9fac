"""A program with a mistake on each marked line: type checkers must find all of them."""

import numpy as np

import cuconv
from cuconv.layers import Conv2d

x = np.ones((2, 3, 8, 8), dtype=np.float32)
w = np.ones((4, 3, 3, 3), dtype=np.float32)

cuconv.conv2d(x, w, layout="NHCW")  # error
cuconv.conv2d(x, w, padding="sane")  # error
cuconv.conv2d(x, w, padding_mode="mirror")  # error
cuconv.conv2d(x, w, strategy="im2row")  # error
cuconv.conv2d(x, w, precision="exact")  # error
cuconv.conv2d(x, w, strides=2)  # error
cuconv.conv2d(x, w, None, 2)  # error
cuconv.conv2d([1.0], w)  # error
cuconv.conv_backward(x, x, w, needs=("y",))  # error
cuconv.plan_conv(x.shape, w.shape, op="backward")  # error
cuconv.im2col(x, 3, order="row")  # error
cuconv.max_pool2d(x, 2, layout="NHCW")  # error
Conv2d(3, 8, 3, padding_mode="mirror")  # error
with cuconv.config(precision="exact"):  # error
    pass
