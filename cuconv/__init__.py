"""Convolution for people who hold NumPy or CuPy arrays."""

from cuconv.arrays import array_module
from cuconv.columns import col2im, im2col, iter_im2col, patches
from cuconv.conv import (
    ConvGradients,
    conv,
    conv1d,
    conv2d,
    conv3d,
    conv_backward,
    conv_input_grad,
    conv_weight_grad,
)
from cuconv.leaves import default_array_module, precompile
from cuconv.memory import MemoryLimitError

__all__ = [
    "ConvGradients",
    "MemoryLimitError",
    "array_module",
    "col2im",
    "conv",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_backward",
    "conv_input_grad",
    "conv_weight_grad",
    "default_array_module",
    "im2col",
    "iter_im2col",
    "patches",
    "precompile",
]
__version__ = "0.1.0"
