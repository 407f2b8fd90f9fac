"""Convolution for people who hold NumPy or CuPy arrays."""

from cuconv.arrays import array_module
from cuconv.calls import ConvGradients
from cuconv.columns import col2im, im2col, iter_im2col, patches
from cuconv.config import config
from cuconv.conv import (
    conv,
    conv1d,
    conv2d,
    conv3d,
    conv_backward,
    conv_input_grad,
    conv_weight_grad,
    plan_conv,
)
from cuconv.interchange import asarray
from cuconv.leaves import default_array_module, precompile, release_memory
from cuconv.memory import MemoryLimitError
from cuconv.plan import Plan
from cuconv.transpose import (
    conv_transpose,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    conv_transpose_backward,
    conv_transpose_input_grad,
    conv_transpose_weight_grad,
)
from cuconv.version import __version__ as __version__

__all__ = [
    "ConvGradients",
    "MemoryLimitError",
    "Plan",
    "array_module",
    "asarray",
    "col2im",
    "config",
    "conv",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_backward",
    "conv_input_grad",
    "conv_transpose",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "conv_transpose_backward",
    "conv_transpose_input_grad",
    "conv_transpose_weight_grad",
    "conv_weight_grad",
    "default_array_module",
    "im2col",
    "iter_im2col",
    "patches",
    "plan_conv",
    "precompile",
    "release_memory",
]
