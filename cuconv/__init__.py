"""Convolution for people who hold NumPy or CuPy arrays."""

from cuconv.arrays import array_module
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
from cuconv.memory import MemoryLimitError

__all__ = [
    "ConvGradients",
    "MemoryLimitError",
    "array_module",
    "conv",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_backward",
    "conv_input_grad",
    "conv_weight_grad",
]
__version__ = "0.1.0"
