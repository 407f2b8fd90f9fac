"""The stand-in's ``cupy``; see the package above it."""

from types import SimpleNamespace

import numpy as _np

from . import cuda
from ._arrays import (
    array,
    arange,
    asarray,
    asnumpy,
    copyto,
    empty,
    from_dlpack,
    full,
    may_share_memory,
    ndarray,
    ones,
    wrapped,
    zeros,
)
from ._kernels import RawKernel, RawModule

IS_STAND_IN = True
__version__ = "14.2.0"

for _name in (
    *(
        "bool_",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
    ),
    *("float16", "float32", "float64", "complex64", "complex128"),
):
    globals()[_name] = getattr(_np, _name)
for _name in (
    *("abs", "add", "all", "any", "argmax", "array_equal", "ascontiguousarray", "clip"),
    *("concatenate", "conjugate", "empty_like", "exp", "isnan", "log", "matmul", "max"),
    *("maximum", "mean", "minimum", "moveaxis", "multiply", "negative", "pad"),
    *("sqrt", "square", "stack", "subtract", "sum", "tanh", "tensordot", "transpose"),
    *("where", "zeros_like", "ones_like", "linalg", "einsum"),
):
    if _name != "linalg":
        globals()[_name] = wrapped(getattr(_np, _name))
lib = SimpleNamespace(
    stride_tricks=SimpleNamespace(
        as_strided=wrapped(_np.lib.stride_tricks.as_strided),
        sliding_window_view=wrapped(_np.lib.stride_tricks.sliding_window_view),
    )
)
linalg = SimpleNamespace(norm=wrapped(_np.linalg.norm))
newaxis = None
float_ = _np.float64


def get_default_memory_pool():
    return cuda.memory.pool
