"""Pooling and its gradients: validate, cut, run."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any, ParamSpec, TypeAlias, TypedDict, TypeVar, Unpack

import numpy as np

from cuconv.arrays import (
    Array,
    DType,
    accumulator,
    any_dask,
    as_dtype,
    base_array,
    check_out,
    check_overlap,
    check_type,
    grouped,
    is_dask,
    module_of,
    module_of_blocks,
    resolve_types,
    sample_of,
)
from cuconv.backends import Backend, backend_of, refuse_capture
from cuconv.config import settings
from cuconv.engine.plan import NEEDS_OUT
from cuconv.engine.pool import MAXIMUM, MEAN, NORM, PoolInputs, PoolProblem, PoolTiling
from cuconv.engine.problem import check_shape
from cuconv.geometry import (
    Padding,
    Sizes,
    WindowGeometry,
    as_index,
    check_axes,
    kernel_of_rank,
)
from cuconv.memory import MemoryLimit, MemoryLimitError, parse_memory_limit
from cuconv.options import spells_out
from cuconv.profiling import stage

OutputSize: TypeAlias = int | Sequence[int | None] | None

_INDEX = np.dtype(np.int64)
MOST_AXES = 3

P = ParamSpec("P")
R = TypeVar("R")


class PoolOptions(TypedDict, total=False):
    """The keyword options of every pooling with a kernel; see `max_pool`."""

    stride: Sizes | None
    padding: Padding
    dilation: Sizes
    ceil_mode: bool
    layout: str


class MeanOptions(PoolOptions, total=False):
    """Those of `avg_pool` beside them."""

    count_include_pad: bool
    divisor_override: int | None


_DEFAULTS: dict[str, Any] = {
    "stride": None,
    "padding": 0,
    "dilation": 1,
    "ceil_mode": False,
    "layout": "channels_first",
    "count_include_pad": True,
    "divisor_override": None,
}


def _shows_options(function: Callable[P, R]) -> Callable[P, R]:
    """Spell ``**options`` out in the signature that `help` and editors show."""
    last = [*inspect.signature(function).parameters.values()][-1]
    names = last.annotation.__args__[0].__annotations__
    return spells_out({name: _DEFAULTS[name] for name in names})(function)


@_shows_options
def max_pool(
    x: Array,
    kernel_size: Sizes,
    *,
    return_indices: bool = False,
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
    **options: Unpack[PoolOptions],
) -> Array:
    """The largest value under every window.

    Parameters
    ----------
    x
        (N, C, *spatial), or (N, *spatial, C) with ``layout="channels_last"``, of one to
        three spatial axes.  The batch axis may be missing if ``kernel_size`` names
        every axis.  Any real type.
    kernel_size
        Taps along each axis: one number for a batched ``x``, or one for each axis.
    return_indices
        Whether to say where each maximum lies too.
    out
        Array to write to, of the result's shape and type; with ``return_indices`` a
        pair of them, the second of int64.
    memory_limit
        Upper bound on what is allocated beyond the arrays and the result: bytes, or a
        word such as ``"64 MiB"``.  Kernels on CUDA need none.
    stride
        Step between windows: an integer, or one for each axis; None is the kernel size,
        so that windows lie side by side.
    padding
        Cells around the input that count as the least value: an integer, one for each
        axis, (before, after) pairs, or one of the words of `cuconv.conv`.  Negative
        numbers crop.  More than half a kernel is allowed.
    dilation
        Step between taps.
    ceil_mode
        Whether cells that strides leave over at the end get a window of their own,
        which hangs over; none starts in the padding after the input.
    layout
        As for `cuconv.conv`.

    Returns
    -------
    array
        (N, C, *out) in the type and layout of ``x``.  A NaN under a window is its
        maximum.  A window over padding alone gives the least value of the type: minus
        infinity, the smallest integer, or False.
    indices
        With ``return_indices``, as the second of a pair: int64, of the same shape.  The
        cell of each maximum, counted in its plane as if that lay row by row; the first
        of several that are equal, or of several NaN; -1 for a window over padding
        alone.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.
    MemoryLimitError
        If ``memory_limit`` is too small; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[1.0, 5.0, 5.0, 2.0, 0.0]]])
    >>> cuconv.max_pool(x, 2)
    array([[[5., 5.]]])
    >>> cuconv.max_pool(x, 3, stride=2, padding=1, return_indices=True)
    (array([[[5., 5., 2.]]]), array([[[1, 1, 3]]]))
    """
    geometry = window_geometry(_shape_of(x), kernel_size, options)
    return _maximum(x, geometry, return_indices, out, memory_limit)


@_shows_options
def max_pool_backward(
    dy: Array,
    indices: Array | None,
    x_shape: Sequence[int] | None,
    kernel_size: Sizes,
    *,
    x: Array | None = None,
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
    **options: Unpack[PoolOptions],
) -> Array:
    """The gradient of `max_pool` for its input: dy goes where the maxima were.

    Parameters
    ----------
    dy
        Gradient for the output, of its shape.
    indices
        What ``max_pool(..., return_indices=True)`` returned for the same options; an
        index outside the plane, such as -1, gives its share to no cell.  Or None.
    x_shape
        Shape of the input; None where ``x`` is given.
    kernel_size
        As for `max_pool`.
    x
        The input, where ``indices`` are None: the cells are then found once more.
    out
        Array to write to, of the input's shape and the type of ``dy``.
    memory_limit
        Upper bound on what is allocated beyond the arrays and the result: bytes, or a
        word such as ``"64 MiB"``.  Kernels on CUDA need none.
    stride, padding, dilation, ceil_mode, layout
        As for `max_pool`.

    Returns
    -------
    array
        Of the input's shape and the type of ``dy``: what several windows give to one
        cell is added up, in float32 for half types.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.
    MemoryLimitError
        If ``memory_limit`` is too small; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[1.0, 5.0, 5.0, 2.0, 0.0]]])
    >>> y, indices = cuconv.max_pool(x, 3, stride=1, return_indices=True)
    >>> cuconv.max_pool_backward(np.ones(y.shape), indices, x.shape, 3, stride=1)
    array([[[0., 2., 1., 0., 0.]]])
    """
    geometry = window_geometry(_source_shape(x, x_shape), kernel_size, options)
    return _maximum_gradient(dy, indices, x, geometry, out, memory_limit)


@_shows_options
def avg_pool(
    x: Array,
    kernel_size: Sizes,
    *,
    dtype: Any = None,
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
    **options: Unpack[MeanOptions],
) -> Array:
    """The mean of the cells under every window.

    Parameters
    ----------
    x
        (N, C, *spatial), or (N, *spatial, C) with ``layout="channels_last"``, of one to
        three spatial axes.  The batch axis may be missing if ``kernel_size`` names
        every axis.  Any type.
    kernel_size
        Taps along each axis: one number for a batched ``x``, or one for each axis.
    dtype
        Type of the result, real or complex; by default that of ``x``, and float64 for
        integers and booleans, as for `numpy.mean`.  Half types are summed in float32.
    out
        Array to write to, of the result's shape and type.
    memory_limit
        Upper bound on what is allocated beyond the arrays and the result: bytes, or a
        word such as ``"64 MiB"``.  Kernels on CUDA need none.
    stride
        Step between windows: an integer, or one for each axis; None is the kernel size,
        so that windows lie side by side.
    padding
        Cells around the input that count as zero: an integer, one for each axis,
        (before, after) pairs, or one of the words of `cuconv.conv`.  Negative numbers
        crop.  More than half a kernel is allowed.
    dilation
        Step between taps.
    ceil_mode
        Whether cells that strides leave over at the end get a window of their own,
        which hangs over; none starts in the padding after the input.
    count_include_pad
        Whether a mean divides by the cells of the padding too.  What hangs over beyond
        it (``ceil_mode``) is never counted.
    divisor_override
        A number to divide every sum by instead.
    layout
        As for `cuconv.conv`.

    Returns
    -------
    array
        (N, C, *out) in the layout of ``x``.  A window over padding alone gives 0.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.
    MemoryLimitError
        If ``memory_limit`` is too small; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[2.0, 4.0, 6.0, 8.0]]])
    >>> cuconv.avg_pool(x, 2)
    array([[[3., 7.]]])
    >>> cuconv.avg_pool(x, 2, padding=1)
    array([[[1., 5., 4.]]])
    >>> cuconv.avg_pool(x, 2, padding=1, count_include_pad=False)
    array([[[2., 5., 8.]]])
    """
    geometry = window_geometry(_shape_of(x), kernel_size, options, MeanOptions)
    return _mean(x, geometry, divided_by(options), dtype, out, memory_limit)


@_shows_options
def avg_pool_backward(
    dy: Array,
    x_shape: Sequence[int],
    kernel_size: Sizes,
    *,
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
    **options: Unpack[MeanOptions],
) -> Array:
    """The gradient of `avg_pool` for its input.

    Parameters
    ----------
    dy
        Gradient for the output, of its shape.
    x_shape
        Shape of the input.
    kernel_size
        As for `avg_pool`.
    out
        Array to write to, of shape ``x_shape`` and the result's type.
    memory_limit
        Upper bound on what is allocated beyond the arrays and the result: bytes, or a
        word such as ``"64 MiB"``.  Kernels on CUDA need none.
    stride, padding, dilation, ceil_mode, count_include_pad, divisor_override, layout
        As for `avg_pool`.

    Returns
    -------
    array
        Of shape ``x_shape`` and the type of ``dy``, or float64 for integers.  Half
        types are summed in float32.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.
    MemoryLimitError
        If ``memory_limit`` is too small; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.avg_pool_backward(np.ones((1, 1, 2)), (1, 1, 5), 2)
    array([[[0.5, 0.5, 0.5, 0.5, 0. ]]])
    """
    geometry = window_geometry(x_shape, kernel_size, options, MeanOptions)
    return _mean_gradient(dy, geometry, divided_by(options), out, memory_limit)


@_shows_options
def lp_pool(
    x: Array,
    norm_type: float,
    kernel_size: Sizes,
    *,
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
    **options: Unpack[PoolOptions],
) -> Array:
    """The p-norm of the cells under every window, ``(Σ |x|^p)^(1/p)``.

    PyTorch sums ``x^p`` without the absolute value, which differs for odd p where x is
    negative (and is NaN where such a sum is), and it scales what hangs over
    (``ceil_mode``) up to a whole window.  Here it is the norm of the cells there are.

    Parameters
    ----------
    x
        (N, C, *spatial), or (N, *spatial, C) with ``layout="channels_last"``, of one to
        three spatial axes.  The batch axis may be missing if ``kernel_size`` names
        every axis.  float16, bfloat16, float32 or float64.
    norm_type
        The power p, positive and finite: 1 gives sums, 2 Euclidean norms.
    kernel_size
        Taps along each axis: one number for a batched ``x``, or one for each axis.
    out
        Array to write to, of the result's shape and type.
    memory_limit
        Upper bound on what is allocated beyond the arrays and the result: bytes, or a
        word such as ``"64 MiB"``.  Kernels on CUDA need none.
    stride
        Step between windows: an integer, or one for each axis; None is the kernel size,
        so that windows lie side by side.
    padding
        Cells around the input that count as zero: an integer, one for each axis,
        (before, after) pairs, or one of the words of `cuconv.conv`.  Negative numbers
        crop.  More than half a kernel is allowed.
    dilation
        Step between taps.
    ceil_mode
        Whether cells that strides leave over at the end get a window of their own,
        which hangs over; none starts in the padding after the input.
    layout
        As for `cuconv.conv`.

    Returns
    -------
    array
        (N, C, *out) in the type and layout of ``x``; half types are summed in float32.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.
    MemoryLimitError
        If ``memory_limit`` is too small; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.lp_pool(np.array([[[3.0, -4.0, 5.0, 12.0]]]), 2, 2)
    array([[[ 5., 13.]]])
    """
    geometry = window_geometry(_shape_of(x), kernel_size, options)
    named = _named(x=x)
    pooling = _norm_of(named, geometry, norm_type)
    return _reduced(pooling, named["x"], out, memory_limit)


@_shows_options
def lp_pool_backward(
    dy: Array,
    x: Array,
    y: Array,
    norm_type: float,
    kernel_size: Sizes,
    *,
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
    **options: Unpack[PoolOptions],
) -> Array:
    """The gradient of `lp_pool`: ``dy · y^(1 - p) · |x|^(p - 1) · sign(x)``.

    Parameters
    ----------
    dy
        Gradient for the output, of its shape.
    x, y
        Input and output of `lp_pool`, of the type of ``dy``.
    norm_type, kernel_size
        As for `lp_pool`.
    out
        Array to write to, of the shape and type of ``x``.
    memory_limit
        Upper bound on what is allocated beyond the arrays and the result: bytes, or a
        word such as ``"64 MiB"``.  Kernels on CUDA need none.
    stride, padding, dilation, ceil_mode, layout
        As for `lp_pool`.

    Returns
    -------
    array
        Of the shape and type of ``x``.  Zero where x is zero, and under windows whose
        norm is zero, where there is no derivative.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.
    MemoryLimitError
        If ``memory_limit`` is too small; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[3.0, -4.0, 0.0, 0.0]]])
    >>> y = cuconv.lp_pool(x, 2, 2)
    >>> cuconv.lp_pool_backward(np.ones(y.shape), x, y, 2, 2)
    array([[[ 0.6, -0.8,  0. ,  0. ]]])
    """
    geometry = window_geometry(_shape_of(x), kernel_size, options)
    named = _named(dy=dy, x=x, y=y)
    pooling = replace(_norm_of(named, geometry, norm_type), is_gradient=True)
    check_shape("y", y, _y_shape(geometry))
    return _backward(pooling, named, out, memory_limit)


def adaptive_max_pool(
    x: Array,
    output_size: OutputSize,
    *,
    return_indices: bool = False,
    layout: str = "channels_first",
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
) -> Array:
    """The largest values of as many windows as are asked for.

    Of ``m`` windows over ``n`` cells, number ``i`` goes from ``floor(i n / m)`` up to
    ``ceil((i + 1) n / m)``.

    Parameters
    ----------
    x
        (N, C, *spatial), or (N, *spatial, C) with ``layout="channels_last"``, of one to
        three spatial axes.  The batch axis may be missing if ``output_size`` names
        every axis.  Any real type.
    output_size
        Windows along each axis: one number for a batched ``x``, or one for each axis;
        None keeps the size of an axis.
    return_indices, layout, out, memory_limit
        As for `max_pool`.

    Returns
    -------
    array, or a pair of them
        As for `max_pool`.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.
    MemoryLimitError
        If ``memory_limit`` is too small; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.adaptive_max_pool(np.arange(7.0).reshape(1, 1, 7), 3)
    array([[[2., 4., 6.]]])
    """
    geometry = WindowGeometry.of_even(_shape_of(x), output_size, layout=layout)
    return _maximum(x, geometry, return_indices, out, memory_limit)


def adaptive_max_pool_backward(
    dy: Array,
    indices: Array | None,
    x_shape: Sequence[int] | None,
    output_size: OutputSize,
    *,
    x: Array | None = None,
    layout: str = "channels_first",
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
) -> Array:
    """The gradient of `adaptive_max_pool` for its input.

    Parameters
    ----------
    dy, indices, x_shape, x, layout, out, memory_limit
        As for `max_pool_backward`.
    output_size
        As for `adaptive_max_pool`.

    Returns
    -------
    array
        As for `max_pool_backward`.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.
    MemoryLimitError
        If ``memory_limit`` is too small; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.arange(7.0).reshape(1, 1, 7)
    >>> cuconv.adaptive_max_pool_backward(np.ones((1, 1, 3)), None, None, 3, x=x)
    array([[[0., 0., 1., 0., 1., 0., 1.]]])
    """
    shape = _source_shape(x, x_shape)
    geometry = WindowGeometry.of_even(shape, output_size, layout=layout)
    return _maximum_gradient(dy, indices, x, geometry, out, memory_limit)


def adaptive_avg_pool(
    x: Array,
    output_size: OutputSize,
    *,
    layout: str = "channels_first",
    dtype: Any = None,
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
) -> Array:
    """The means of as many windows as are asked for.

    Parameters
    ----------
    x, output_size, layout
        As for `adaptive_max_pool`; any type.
    dtype, out, memory_limit
        As for `avg_pool`.

    Returns
    -------
    array
        As for `avg_pool`.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.
    MemoryLimitError
        If ``memory_limit`` is too small; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.adaptive_avg_pool(np.arange(7.0).reshape(1, 1, 7), 3)
    array([[[1., 3., 5.]]])
    """
    geometry = WindowGeometry.of_even(_shape_of(x), output_size, layout=layout)
    return _mean(x, geometry, {}, dtype, out, memory_limit)


def adaptive_avg_pool_backward(
    dy: Array,
    x_shape: Sequence[int],
    output_size: OutputSize,
    *,
    layout: str = "channels_first",
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
) -> Array:
    """The gradient of `adaptive_avg_pool` for its input.

    Parameters
    ----------
    dy, x_shape, layout, out, memory_limit
        As for `avg_pool_backward`.
    output_size
        As for `adaptive_max_pool`.

    Returns
    -------
    array
        As for `avg_pool_backward`.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.
    MemoryLimitError
        If ``memory_limit`` is too small; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.adaptive_avg_pool_backward(np.ones((1, 1, 2)), (1, 1, 3), 2)
    array([[[0.5, 1. , 0.5]]])
    """
    geometry = WindowGeometry.of_even(x_shape, output_size, layout=layout)
    return _mean_gradient(dy, geometry, {}, out, memory_limit)


def global_max_pool(
    x: Array,
    *,
    batched: bool = True,
    return_indices: bool = False,
    layout: str = "channels_first",
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
) -> Array:
    """The largest value of every plane: `adaptive_max_pool` to one cell an axis.

    Parameters
    ----------
    x
        As for `adaptive_max_pool`.
    batched
        Whether ``x`` has a batch axis.
    return_indices, layout, out, memory_limit
        As for `max_pool`.

    Returns
    -------
    array, or a pair of them
        (N, C, 1, …), as for `max_pool`.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.
    MemoryLimitError
        If ``memory_limit`` is too small; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.arange(12.0).reshape(1, 2, 2, 3)
    >>> cuconv.global_max_pool(x, return_indices=True)
    (array([[[[ 5.]],
    <BLANKLINE>
            [[11.]]]]), array([[[[5]],
    <BLANKLINE>
            [[5]]]]))
    """
    geometry = _whole(_shape_of(x), layout, batched=batched)
    return _maximum(x, geometry, return_indices, out, memory_limit)


def global_max_pool_backward(
    dy: Array,
    indices: Array | None,
    x_shape: Sequence[int] | None,
    *,
    x: Array | None = None,
    batched: bool = True,
    layout: str = "channels_first",
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
) -> Array:
    """The gradient of `global_max_pool` for its input.

    Parameters
    ----------
    dy, indices, x_shape, x, layout, out, memory_limit
        As for `max_pool_backward`.
    batched
        Whether the input has a batch axis.

    Returns
    -------
    array
        As for `max_pool_backward`.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.
    MemoryLimitError
        If ``memory_limit`` is too small; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> dy, indices = np.ones((1, 1, 1)), np.full((1, 1, 1), 2)
    >>> cuconv.global_max_pool_backward(dy, indices, (1, 1, 4))
    array([[[0., 0., 1., 0.]]])
    """
    geometry = _whole(_source_shape(x, x_shape), layout, batched=batched)
    return _maximum_gradient(dy, indices, x, geometry, out, memory_limit)


def global_avg_pool(
    x: Array,
    *,
    batched: bool = True,
    layout: str = "channels_first",
    dtype: Any = None,
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
) -> Array:
    """The mean of every plane: `adaptive_avg_pool` to one cell an axis.

    Parameters
    ----------
    x
        As for `adaptive_avg_pool`.
    batched
        Whether ``x`` has a batch axis.
    layout, dtype, out, memory_limit
        As for `avg_pool`.

    Returns
    -------
    array
        (N, C, 1, …), as for `avg_pool`.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.
    MemoryLimitError
        If ``memory_limit`` is too small; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.global_avg_pool(np.arange(12.0).reshape(1, 2, 6))
    array([[[2.5],
            [8.5]]])
    """
    geometry = _whole(_shape_of(x), layout, batched=batched)
    return _mean(x, geometry, {}, dtype, out, memory_limit)


def global_avg_pool_backward(
    dy: Array,
    x_shape: Sequence[int],
    *,
    batched: bool = True,
    layout: str = "channels_first",
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
) -> Array:
    """The gradient of `global_avg_pool` for its input.

    Parameters
    ----------
    dy, x_shape, layout, out, memory_limit
        As for `avg_pool_backward`.
    batched
        Whether the input has a batch axis.

    Returns
    -------
    array
        As for `avg_pool_backward`.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.
    MemoryLimitError
        If ``memory_limit`` is too small; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.global_avg_pool_backward(np.ones((1, 1, 1)), (1, 1, 4))
    array([[[0.25, 0.25, 0.25, 0.25]]])
    """
    geometry = _whole(x_shape, layout, batched=batched)
    return _mean_gradient(dy, geometry, {}, out, memory_limit)


@_shows_options
def max_pool1d(
    x: Array,
    kernel_size: Sizes,
    *,
    return_indices: bool = False,
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
    **options: Unpack[PoolOptions],
) -> Array:
    """`max_pool` over one spatial axis: x (N, C, L), or without N.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.max_pool1d(np.zeros((1, 2, 8)), 2).shape
    (1, 2, 4)
    """
    kernel = _of_rank(1, x, kernel_size)
    geometry = window_geometry(x.shape, kernel, options)
    return _maximum(x, geometry, return_indices, out, memory_limit)


@_shows_options
def max_pool2d(
    x: Array,
    kernel_size: Sizes,
    *,
    return_indices: bool = False,
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
    **options: Unpack[PoolOptions],
) -> Array:
    """`max_pool` over two spatial axes: x (N, C, H, W), or without N.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.max_pool2d(np.zeros((1, 2, 8, 6)), 2).shape
    (1, 2, 4, 3)
    """
    kernel = _of_rank(2, x, kernel_size)
    geometry = window_geometry(x.shape, kernel, options)
    return _maximum(x, geometry, return_indices, out, memory_limit)


@_shows_options
def max_pool3d(
    x: Array,
    kernel_size: Sizes,
    *,
    return_indices: bool = False,
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
    **options: Unpack[PoolOptions],
) -> Array:
    """`max_pool` over three spatial axes: x (N, C, D, H, W), or without N.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.max_pool3d(np.zeros((1, 2, 4, 8, 6)), 2).shape
    (1, 2, 2, 4, 3)
    """
    kernel = _of_rank(3, x, kernel_size)
    geometry = window_geometry(x.shape, kernel, options)
    return _maximum(x, geometry, return_indices, out, memory_limit)


@_shows_options
def avg_pool1d(
    x: Array,
    kernel_size: Sizes,
    *,
    dtype: Any = None,
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
    **options: Unpack[MeanOptions],
) -> Array:
    """`avg_pool` over one spatial axis: x (N, C, L), or without N.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.avg_pool1d(np.zeros((1, 2, 8)), 2).shape
    (1, 2, 4)
    """
    geometry = window_geometry(
        _shape_of(x), _of_rank(1, x, kernel_size), options, MeanOptions
    )
    return _mean(x, geometry, divided_by(options), dtype, out, memory_limit)


@_shows_options
def avg_pool2d(
    x: Array,
    kernel_size: Sizes,
    *,
    dtype: Any = None,
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
    **options: Unpack[MeanOptions],
) -> Array:
    """`avg_pool` over two spatial axes: x (N, C, H, W), or without N.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.avg_pool2d(np.zeros((1, 2, 8, 6)), 2).shape
    (1, 2, 4, 3)
    """
    geometry = window_geometry(
        _shape_of(x), _of_rank(2, x, kernel_size), options, MeanOptions
    )
    return _mean(x, geometry, divided_by(options), dtype, out, memory_limit)


@_shows_options
def avg_pool3d(
    x: Array,
    kernel_size: Sizes,
    *,
    dtype: Any = None,
    out: Array | None = None,
    memory_limit: MemoryLimit = None,
    **options: Unpack[MeanOptions],
) -> Array:
    """`avg_pool` over three spatial axes: x (N, C, D, H, W), or without N.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.avg_pool3d(np.zeros((1, 2, 4, 8, 6)), 2).shape
    (1, 2, 2, 4, 3)
    """
    geometry = window_geometry(
        _shape_of(x), _of_rank(3, x, kernel_size), options, MeanOptions
    )
    return _mean(x, geometry, divided_by(options), dtype, out, memory_limit)


def _of_rank(rank: int, x: Array, kernel_size: Sizes) -> Sizes:
    """The kernel with a number for each of so many axes."""
    kernel = kernel_of_rank(kernel_size, rank)
    check_axes(len(_shape_of(x)), rank)
    return kernel


def _shape_of(x: Array) -> tuple[int, ...]:
    """The shape of an input; what is no array is refused."""
    module_of_blocks({"x": x})
    shape: tuple[int, ...] = x.shape
    return shape


def window_geometry(
    shape: Sequence[int], kernel_size: Sizes, options: Any, kind: type = PoolOptions
) -> WindowGeometry:
    """The windows over an array of this shape."""
    names = list(kind.__annotations__)
    unknown = sorted(set(options) - set(names))
    if unknown:
        known = ", ".join(names)
        raise TypeError(f"there is no option {unknown[0]!r}; the options are {known}")
    chosen = {**_DEFAULTS, **options}
    stride = chosen["stride"]
    return WindowGeometry.of(
        shape,
        kernel_size,
        stride=kernel_size if stride is None else stride,
        padding=chosen["padding"],
        dilation=chosen["dilation"],
        ceil_mode=bool(chosen["ceil_mode"]),
        layout=chosen["layout"],
    )


def _whole(shape: Sequence[int], layout: str, *, batched: bool) -> WindowGeometry:
    """One window over everything."""
    return WindowGeometry.of_even(
        shape, (1,) * (len(shape) - 1 - batched), layout=layout
    )


def divided_by(options: Any) -> dict[str, Any]:
    """What a mean divides by, as fields of `Pooling`."""
    chosen = {**_DEFAULTS, **options}
    divisor = chosen["divisor_override"]
    if divisor is not None:
        divisor = as_index("divisor_override", divisor)
        if not divisor:
            raise ValueError("divisor_override must not be 0")
    counts_padding = bool(chosen["count_include_pad"])
    return {"counts_padding": counts_padding, "divisor": divisor}


def _source_shape(x: Array | None, x_shape: Sequence[int] | None) -> Sequence[int]:
    if x is not None and x_shape is not None and tuple(x_shape) != x.shape:
        raise ValueError(f"x has shape {x.shape} and x_shape is {tuple(x_shape)}")
    shape = x_shape if x is None else x.shape
    if shape is None:
        raise TypeError("x_shape is None, and so is x: one of them must be given")
    return shape


def _named(**arrays: Array | None) -> dict[str, Array]:
    """Arrays by their names: of one module and one device, and of types we know."""
    named = {name: array for name, array in arrays.items() if array is not None}
    if any_dask(named.values()):
        module_of_blocks(named)
    else:
        module_of(named)
    for name, array in named.items():
        check_type(name, array.dtype)
    return {name: base_array(array) for name, array in named.items()}


def _maximum(
    x: Array,
    geometry: WindowGeometry,
    return_indices: bool,  # noqa: FBT001 - as the caller has it
    out: Array | None,
    memory_limit: MemoryLimit,
) -> Array:
    named = _named(x=x)
    _check_ordered("x", x.dtype)
    dtypes = (_native(x.dtype),) * 3
    pooling = PoolProblem(MAXIMUM, geometry, *dtypes, with_indices=bool(return_indices))
    return _reduced(pooling, named["x"], out, memory_limit)


def _maximum_gradient(
    dy: Array,
    indices: Array | None,
    x: Array | None,
    geometry: WindowGeometry,
    out: Array | None,
    memory_limit: MemoryLimit,
) -> Array:
    named = _named(dy=dy, indices=indices, x=x)
    if (indices is None) == (x is None):
        both = "both" if x is not None else "neither"
        raise TypeError(f"indices or x must be given, one of them; got {both}")
    if dy.dtype == bool:
        raise TypeError("dy has type bool, which cannot be summed")
    if indices is not None:
        check_shape("indices", indices, _y_shape(geometry))
        if indices.dtype != _INDEX:
            raise TypeError(f"indices have type {indices.dtype} and must have int64")
    if x is not None:
        _check_ordered("x", x.dtype)
    dtype = _native(dy.dtype)
    pooling = PoolProblem(
        MAXIMUM,
        geometry,
        dtype,
        accumulator(dtype),
        dtype,
        is_gradient=True,
        values=None if x is None else _native(x.dtype),
    )
    return _backward(pooling, named, out, memory_limit)


def _mean(
    x: Array,
    geometry: WindowGeometry,
    divided: dict[str, Any],
    dtype: Any,
    out: Array | None,
    memory_limit: MemoryLimit,
) -> Array:
    named = _named(x=x)
    result = _mean_type(x.dtype) if dtype is None else as_dtype(dtype)
    if result.kind in "biu":
        raise TypeError(f"a mean needs a real or complex dtype; got {result}")
    types = resolve_types(named, result)
    pooling = PoolProblem(
        MEAN, geometry, x.dtype, types.accumulate, types.result, **divided
    )
    return _reduced(pooling, named["x"], out, memory_limit)


def _mean_gradient(
    dy: Array,
    geometry: WindowGeometry,
    divided: dict[str, Any],
    out: Array | None,
    memory_limit: MemoryLimit,
) -> Array:
    named = _named(dy=dy)
    types = resolve_types(named, _mean_type(dy.dtype))
    pooling = PoolProblem(
        MEAN,
        geometry,
        dy.dtype,
        types.accumulate,
        types.result,
        is_gradient=True,
        **divided,
    )
    return _backward(pooling, named, out, memory_limit)


def _mean_type(dtype: DType) -> DType:
    return np.dtype(np.float64) if dtype.kind in "biu" else _native(dtype)


def _native(dtype: DType) -> DType:
    """A type in the machine's own byte order, which results have."""
    return dtype.newbyteorder("=")


def _check_ordered(name: str, dtype: DType) -> None:
    if dtype.kind == "c":
        raise TypeError(f"{name} has type {dtype}, and complex numbers have no maximum")


def _norm_of(
    named: dict[str, Array], geometry: WindowGeometry, norm_type: float
) -> PoolProblem:
    dtype = _native(named["x"].dtype)
    for name, array in named.items():
        if array.dtype.kind not in "fV":
            raise TypeError(f"{name} has type {array.dtype}; lp_pool takes real floats")
        if _native(array.dtype) != dtype:
            raise TypeError(f"{name} has type {array.dtype} and x has {dtype}")
    if not isinstance(norm_type, Real):
        raise TypeError(f"norm_type must be a number; got {norm_type!r}")
    power = float(norm_type)
    if not 0 < power < math.inf:
        raise ValueError(f"norm_type must be positive and finite; got {norm_type}")
    return PoolProblem(NORM, geometry, dtype, accumulator(dtype), dtype, norm=power)


def _y_shape(geometry: WindowGeometry) -> tuple[int, ...]:
    return geometry.array_shape(geometry.channels, geometry.out)


def _cells(array: Array, geometry: WindowGeometry) -> Array:
    """View an array as (N, C, *spatial)."""
    first, batched = geometry.channels_first, geometry.batched
    rank = geometry.rank
    return grouped(array, 1, rank, channels_first=first, batched=batched)[:, 0]


def _prepare(
    pooling: PoolProblem,
    named: dict[str, Array],
    results: dict[str, tuple[Array | None, tuple[int, ...], DType]],
    memory_limit: MemoryLimit,
) -> tuple[Backend, PoolTiling]:
    """Check everything that can be wrong, before anything is allocated."""
    if pooling.geometry.rank > MOST_AXES:
        raise ValueError(
            f"x has {pooling.geometry.rank} spatial axes; pooling takes {MOST_AXES} "
            "at most"
        )
    xp = module_of(named)
    backend = backend_of(xp, next(iter(named.values())))
    inputs = dict(named)
    for name, (array, shape, dtype) in results.items():
        if array is None:
            refuse_capture(backend, NEEDS_OUT)
            continue
        module_of({**named, name: array})
        check_out(array, shape, dtype)
        check_overlap(xp, array, inputs)
        inputs[name] = array
    limit = settings().memory_limit
    if memory_limit is not None:
        limit = parse_memory_limit(memory_limit)
    if limit is not None:
        return backend, backend.pools.tiling(pooling, limit)
    try:
        tiling = backend.pools.tiling(pooling, backend.default_memory_limit)
    except MemoryLimitError as error:
        # Without a limit of the caller's, the least that will do.
        tiling = backend.pools.tiling(pooling, error.smallest)
    return backend, tiling


def _of_blocks(
    call: Callable[..., R], named: dict[str, Array], memory_limit: MemoryLimit
) -> tuple[Callable[..., R], Callable[[PoolProblem], object]]:
    """What runs a block of Dask arrays, and what checks one before there is any."""
    limit = settings().memory_limit
    if memory_limit is not None:
        limit = parse_memory_limit(memory_limit)
    samples = {name: sample_of(array) for name, array in named.items()}

    def check(pooling: PoolProblem) -> object:
        return _prepare(pooling, samples, {}, limit)

    return partial(_at_once, call, limit), check


def _at_once(
    call: Callable[..., R], limit: MemoryLimit, pooling: PoolProblem, given: Any
) -> R:
    return call(pooling, given, None, limit)


def _reduced(
    pooling: PoolProblem, x: Array, out: Any, memory_limit: MemoryLimit
) -> Array:
    """Run a forward pass."""
    if is_dask(x):
        from cuconv.dask import pooling as lazy  # noqa: PLC0415 - it imports Dask

        run, check = _of_blocks(_reduced, {"x": x}, memory_limit)
        return lazy.reduced(pooling, x, out, run, check)
    g, named = pooling.geometry, {"x": x}
    shape = _y_shape(g)
    pair = pooling.with_indices
    given = (None, None) if out is None else out if pair else (out, None)
    if pair and not (isinstance(given, tuple) and len(given) == 2):
        raise TypeError("with return_indices, out must be a pair of arrays")
    results = {"out": (given[0], shape, pooling.result)}
    if pair:
        results["the indices of out"] = given[1], shape, _INDEX
    backend, tiling = _prepare(pooling, named, results, memory_limit)
    with backend.device_of(x):
        y, *indices = (
            backend.xp.empty(shape, dtype=dtype) if array is None else array
            for array, _, dtype in results.values()
        )
        found = _cells(base_array(indices[0]), g) if pair else None
        with stage("pool", pooling.kind):
            if y.size:
                backend.pools.reduce(
                    pooling, tiling, _cells(x, g), _cells(base_array(y), g), found
                )
    return (y, *indices) if pair else y


def _backward(
    pooling: PoolProblem, named: dict[str, Array], out: Array | None, limit: MemoryLimit
) -> Array:
    """Run a gradient."""
    g, dy = pooling.geometry, named["dy"]
    check_shape("dy", dy, _y_shape(g))
    if any_dask(named.values()):
        from cuconv.dask import pooling as lazy  # noqa: PLC0415 - it imports Dask

        run, check = _of_blocks(_backward, named, limit)
        return lazy.backward(pooling, named, out, run, check)
    results = {"out": (out, g.x_shape, pooling.result)}
    backend, tiling = _prepare(pooling, named, results, limit)
    with backend.device_of(dy):
        dx = backend.xp.empty(g.x_shape, dtype=pooling.result) if out is None else out
        given = PoolInputs(**{name: _cells(array, g) for name, array in named.items()})
        with stage("pool", pooling.kind):
            if dy.size:
                backend.pools.backward(
                    pooling, tiling, given, _cells(base_array(dx), g)
                )
            else:
                dx[...] = 0
    return dx
