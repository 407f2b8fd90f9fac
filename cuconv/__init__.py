"""Convolution for NumPy and CuPy arrays, as deep learning defines it."""

import importlib
from typing import TYPE_CHECKING, Any

from cuconv.arrays import array_module
from cuconv.backends import default_array_module, precompile, release_memory
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
from cuconv.conv_transpose import (
    conv_transpose,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    conv_transpose_backward,
    conv_transpose_input_grad,
    conv_transpose_weight_grad,
)
from cuconv.deform import deform_conv, deform_conv2d, deform_conv_backward
from cuconv.devices import asarray
from cuconv.engine.call import ConvGradients
from cuconv.engine.deform import DeformGradients
from cuconv.engine.plan import Plan
from cuconv.engine.separable import SeparableGradients
from cuconv.im2col import col2im, im2col, iter_im2col, patches
from cuconv.memory import MemoryLimitError
from cuconv.overflow import IntegerOverflowWarning
from cuconv.pooling import (
    adaptive_avg_pool,
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_avg_pool_backward,
    adaptive_max_pool,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    adaptive_max_pool_backward,
    avg_pool,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    avg_pool_backward,
    global_avg_pool,
    global_avg_pool1d,
    global_avg_pool2d,
    global_avg_pool3d,
    global_avg_pool_backward,
    global_max_pool,
    global_max_pool1d,
    global_max_pool2d,
    global_max_pool3d,
    global_max_pool_backward,
    lp_pool,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    lp_pool_backward,
    max_pool,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    max_pool_backward,
    max_unpool,
    max_unpool1d,
    max_unpool2d,
    max_unpool3d,
)
from cuconv.separable import (
    depthwise_conv,
    depthwise_conv_backward,
    separable_conv,
    separable_conv_backward,
)
from cuconv.version import __version__ as __version__

__all__ = [
    "ConvGradients",
    "DeformGradients",
    "IntegerOverflowWarning",
    "MemoryLimitError",
    "Plan",
    "SeparableGradients",
    "adaptive_avg_pool",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_avg_pool_backward",
    "adaptive_max_pool",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "adaptive_max_pool_backward",
    "array_module",
    "asarray",
    "avg_pool",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "avg_pool_backward",
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
    "deform_conv",
    "deform_conv2d",
    "deform_conv_backward",
    "depthwise_conv",
    "depthwise_conv_backward",
    "global_avg_pool",
    "global_avg_pool1d",
    "global_avg_pool2d",
    "global_avg_pool3d",
    "global_avg_pool_backward",
    "global_max_pool",
    "global_max_pool1d",
    "global_max_pool2d",
    "global_max_pool3d",
    "global_max_pool_backward",
    "im2col",
    "iter_im2col",
    "lp_pool",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "lp_pool_backward",
    "max_pool",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_pool_backward",
    "max_unpool",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
    "patches",
    "plan_conv",
    "precompile",
    "release_memory",
    "separable_conv",
    "separable_conv_backward",
]

# Modules that are imported when they are first asked for.
_LATER = ("layers", "testing")

if TYPE_CHECKING:
    from cuconv import layers as layers
    from cuconv import testing as testing
else:

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            return importlib.import_module(f"cuconv.{name}")
        raise AttributeError(f"module 'cuconv' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATER})
