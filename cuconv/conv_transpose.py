"""Transposed convolution and its gradients: validate, plan, run.

With g the geometry of the adjoint convolution, from y to x,

    y = conv_transpose(x, w)       the input gradient of g, for a gradient x
    dx                             the forward pass of g over dy
    dw                             the weight gradient of g, dy and x exchanged

so that the strategies of `cuconv.conv` run all three.  For complex numbers, conjugation
is the other way round: nothing in the first line, w and x in the others.
"""

from collections.abc import Sequence
from typing import Any, Unpack, overload

from cuconv.arrays import ArrayT
from cuconv.choices import Gradients
from cuconv.engine.call import (
    GRADIENTS,
    ConvGradients,
    plan_convolution,
    plan_gradients,
    run,
)
from cuconv.geometry import Sizes
from cuconv.options import (
    FORWARD_ALONE,
    ConvOptions,
    Options,
    documented_as,
    shows_options,
)

# The options of `conv` that a transposed convolution has too.
_OPTIONS = tuple(name for name in Options._fields if name not in FORWARD_ALONE)
_BACKWARD_ALLOCATES = (
    "conv_transpose_backward allocates its results: call conv_transpose_input_grad and "
    "conv_transpose_weight_grad with out=, and sum dy for the bias"
)


@shows_options(_OPTIONS)
def conv_transpose(
    x: ArrayT,
    w: ArrayT,
    bias: ArrayT | None = None,
    *,
    output_padding: Sizes = 0,
    output_size: Sizes | None = None,
    out: ArrayT | None = None,
    **options: Unpack[ConvOptions],
) -> ArrayT:
    """Convolve, transposed: add each element of x, times w, to the window of `conv`.

    It is the adjoint of ``y ↦ conv(y, w)``, with the same array of weights and the same
    options.  With ``o`` a position of x, ``t`` a tap and ``i = o ·
    stride + t · dilation - padding``,

        y[n, k, i] = bias[k] + Σ over c and all o, t with this i of
                     x[n, c, o] · w[c, k, t]

    Parameters
    ----------
    x
        Input, (N, C, *spatial), or (C, *spatial) for a single image.
    w
        Weights, (C, K / groups, *kernel): those of the adjoint convolution, from K
        channels to C.  With ``layout="channels_last"``: x is (N, *spatial, C) and w is
        (*kernel, K / groups, C).
    bias
        (K,), added to every position of the result.
    output_padding
        Elements added at the end of every axis of the result, to choose one of the
        sizes that belong to the same x with a stride: an integer, or one for each
        spatial axis, less than the larger of stride and dilation.  Taps are added to
        these elements as to all others.
    output_size
        The spatial size of the result, in place of ``output_padding``: an integer, or
        one for each spatial axis.  With ``"same"`` and ``"same_lower"`` any size, which
        determines what is cropped, elements of ``output_padding`` included.
    out
        Array to write the result to; it must have its shape and type, and share no
        memory with the inputs.  Not with Dask arrays.
    stride, dilation
        Step between the windows of neighbouring elements of x, and between taps, in
        elements: an integer, or one for each spatial axis.
    padding
        Elements cropped at both ends of the result: an integer, one for each spatial
        axis, or (before, after) pairs; negative numbers add elements.  Or a string:
        ``"valid"`` crops nothing; ``"full"`` crops dilation · (kernel - 1) elements at
        both ends; ``"same"`` (ONNX's ``"SAME_UPPER"``), ``"same_lower"`` and, for one
        spatial axis, ``"causal"`` make the result size · stride long, or
        ``output_size``; of an odd number ``"same"`` crops one more at the end.  All are
        those of the adjoint convolution.
    {options}

    Returns
    -------
    array
        (N, K, *out) in the module of the inputs; without the batch axis if ``x`` has
        none.  Along each axis out = (size - 1) · stride - before - after + dilation ·
        (kernel - 1) + output_padding + 1.

    Raises
    ------
    ValueError, TypeError
        If shapes, types, devices or options do not fit, before anything is allocated;
        the message has the numbers.
    MemoryLimitError
        If nothing fits under ``memory_limit``; it has the smallest possible limit.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[1.0, 2.0, 3.0]]])
    >>> w = np.array([[[1.0, 10.0, 100.0]]])
    >>> cuconv.conv_transpose(x, w, stride=2)
    array([[[  1.,  10., 102.,  20., 203.,  30., 300.]]])
    >>> cuconv.conv_transpose(x, w, stride=2, padding=1, output_size=6)
    array([[[ 10., 102.,  20., 203.,  30., 300.]]])
    """
    more = {"output_padding": output_padding, "output_size": output_size}
    return run(plan_convolution, "transpose", (x, w, bias), out, options, more)


@shows_options(_OPTIONS)
@documented_as(conv_transpose, 1)
def conv_transpose1d(
    x: ArrayT,
    w: ArrayT,
    bias: ArrayT | None = None,
    *,
    output_padding: Sizes = 0,
    output_size: Sizes | None = None,
    out: ArrayT | None = None,
    **options: Unpack[ConvOptions],
) -> ArrayT:
    """Convolve transposed over one spatial axis; see `conv_transpose`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[1.0, 2.0]]])
    >>> cuconv.conv_transpose1d(x, np.ones((1, 1, 2)), stride=3, output_padding=1)
    array([[[1., 1., 0., 2., 2., 0.]]])
    """
    more: Any = {"output_padding": output_padding, "output_size": output_size}
    more["function"] = "conv_transpose1d", 1
    return run(plan_convolution, "transpose", (x, w, bias), out, options, more)


@shows_options(_OPTIONS)
@documented_as(conv_transpose, 2)
def conv_transpose2d(
    x: ArrayT,
    w: ArrayT,
    bias: ArrayT | None = None,
    *,
    output_padding: Sizes = 0,
    output_size: Sizes | None = None,
    out: ArrayT | None = None,
    **options: Unpack[ConvOptions],
) -> ArrayT:
    """Convolve transposed over two spatial axes; see `conv_transpose`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.zeros((8, 128, 28, 28), dtype=np.float32)
    >>> w = np.zeros((128, 64, 4, 4), dtype=np.float32)
    >>> cuconv.conv_transpose2d(x, w, stride=2, padding=1).shape
    (8, 64, 56, 56)
    """
    more: Any = {"output_padding": output_padding, "output_size": output_size}
    more["function"] = "conv_transpose2d", 2
    return run(plan_convolution, "transpose", (x, w, bias), out, options, more)


@shows_options(_OPTIONS)
@documented_as(conv_transpose, 3)
def conv_transpose3d(
    x: ArrayT,
    w: ArrayT,
    bias: ArrayT | None = None,
    *,
    output_padding: Sizes = 0,
    output_size: Sizes | None = None,
    out: ArrayT | None = None,
    **options: Unpack[ConvOptions],
) -> ArrayT:
    """Convolve transposed over three spatial axes; see `conv_transpose`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, w = np.ones((1, 2, 1, 2, 2)), np.ones((2, 1, 1, 2, 2))
    >>> cuconv.conv_transpose3d(x, w)
    array([[[[[2., 4., 2.],
              [4., 8., 4.],
              [2., 4., 2.]]]]])
    """
    more: Any = {"output_padding": output_padding, "output_size": output_size}
    more["function"] = "conv_transpose3d", 3
    return run(plan_convolution, "transpose", (x, w, bias), out, options, more)


@shows_options(_OPTIONS)
def conv_transpose_input_grad(
    dy: ArrayT,
    w: ArrayT,
    x_shape: Sequence[int],
    *,
    output_padding: Sizes = 0,
    output_size: Sizes | None = None,
    out: ArrayT | None = None,
    **options: Unpack[ConvOptions],
) -> ArrayT:
    """The gradient of `conv_transpose` for its input: ``conv(dy, w)``, w conjugated.

    Parameters
    ----------
    dy
        Gradient for the result, (N, K, *out).
    w
        Weights, (C, K / groups, *kernel).
    x_shape
        Shape of the input.
    output_padding, output_size, out, **options
        As for `conv_transpose`; ``dtype`` defaults to the common type of ``dy`` and
        ``w``.

    Returns
    -------
    array
        Of shape ``x_shape``.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `conv_transpose` does, and if ``dy`` does not have the shape of its result.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> dy, w = np.arange(7.0).reshape(1, 1, 7), np.array([[[1.0, 10.0, 100.0]]])
    >>> cuconv.conv_transpose_input_grad(dy, w, (1, 1, 3), stride=2)
    array([[[210., 432., 654.]]])
    """
    more: Any = {"output_padding": output_padding, "output_size": output_size}
    more["x_shape"] = x_shape
    return run(plan_convolution, "transpose_input_grad", (dy, w), out, options, more)


@shows_options(_OPTIONS)
def conv_transpose_weight_grad(
    dy: ArrayT,
    x: ArrayT,
    w_shape: Sequence[int],
    *,
    output_padding: Sizes = 0,
    output_size: Sizes | None = None,
    out: ArrayT | None = None,
    **options: Unpack[ConvOptions],
) -> ArrayT:
    """The gradient of `conv_transpose` for its weights.

    Each weight receives the sum, over images and elements of x, of ``dy`` at the
    position it was added to, times the element (conjugated if complex).

    Parameters
    ----------
    dy
        Gradient for the result, (N, K, *out).
    x
        Input, (N, C, *spatial).
    w_shape
        Shape of the weights, (C, K / groups, *kernel).
    output_padding, output_size, out, **options
        As for `conv_transpose`; ``dtype`` defaults to the common type of ``dy`` and
        ``x``.

    Returns
    -------
    array
        Of shape ``w_shape``.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `conv_transpose` does, and if ``dy`` does not have the shape of its result.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> dy, x = np.arange(7.0).reshape(1, 1, 7), np.array([[[1.0, 10.0, 100.0]]])
    >>> cuconv.conv_transpose_weight_grad(dy, x, (1, 1, 3), stride=2)
    array([[[420., 531., 642.]]])
    """
    more: Any = {"output_padding": output_padding, "output_size": output_size}
    more["w_shape"] = w_shape
    return run(plan_convolution, "transpose_weight_grad", (dy, x), out, options, more)


@overload
def conv_transpose_backward(
    dy: ArrayT,
    x: ArrayT,
    w: ArrayT,
    *,
    output_padding: Sizes = 0,
    output_size: Sizes | None = None,
    **options: Unpack[ConvOptions],
) -> ConvGradients[ArrayT]: ...
@overload
def conv_transpose_backward(
    dy: ArrayT,
    x: ArrayT,
    w: ArrayT,
    *,
    needs: Gradients,
    output_padding: Sizes = 0,
    output_size: Sizes | None = None,
    **options: Unpack[ConvOptions],
) -> ConvGradients[Any]: ...
@shows_options(_OPTIONS)
def conv_transpose_backward(
    dy: ArrayT,
    x: ArrayT,
    w: ArrayT,
    *,
    needs: Gradients = GRADIENTS,
    output_padding: Sizes = 0,
    output_size: Sizes | None = None,
    **options: Unpack[ConvOptions],
) -> ConvGradients[Any]:
    """All gradients of `conv_transpose`, or those that are needed.

    Parameters
    ----------
    dy
        Gradient for the result, (N, K, *out).
    x, w
        Input and weights of the forward call.
    needs
        Which of ``"x"``, ``"w"``, ``"bias"`` to compute; the others are not computed.
    output_padding, output_size, **options
        As for `conv_transpose`, the same as in the forward call.

    Returns
    -------
    ConvGradients
        Named tuple ``(x, w, bias)`` with the shapes of the three, None for a gradient
        that was not asked for.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `conv_transpose` does, before the first gradient is computed.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, w, dy = np.ones((1, 1, 2)), np.ones((1, 1, 3)), np.ones((1, 1, 5))
    >>> cuconv.conv_transpose_backward(dy, x, w, stride=2)
    ConvGradients(x=array([[[3., 3.]]]), w=array([[[2., 2., 2.]]]), bias=array([5.]))
    """
    more: Any = {"output_padding": output_padding, "output_size": output_size}
    more |= {"needs": needs, "allocates": _BACKWARD_ALLOCATES}
    arrays = dy, x, w
    found: ConvGradients[Any] = run(
        plan_gradients, "transpose_", arrays, None, options, more
    )
    return found
