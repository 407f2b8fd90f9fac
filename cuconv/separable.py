"""Depthwise and separable convolution: what the engine lowers and runs."""

from collections.abc import Sequence
from typing import Any, Unpack, overload

from cuconv.arrays import ArrayT
from cuconv.choices import Gradients
from cuconv.engine.call import GRADIENTS, ConvGradients, run
from cuconv.engine.depthwise import plan_depthwise, plan_depthwise_gradients
from cuconv.engine.separable import (
    SEPARABLE_GRADIENTS,
    SeparableGradients,
    plan_separable,
    plan_separable_gradients,
)
from cuconv.options import (
    DEPTHWISE_OPTIONS,
    SEPARABLE_OPTIONS,
    ConvOptions,
    SeparableOptions,
    shows_options,
)

_BACKWARD_ALLOCATES = (
    "depthwise_conv_backward allocates its results: call conv_input_grad and "
    "conv_weight_grad with out=, and sum dy for the bias"
)


@shows_options(DEPTHWISE_OPTIONS)
def depthwise_conv(
    x: ArrayT,
    w: ArrayT,
    bias: ArrayT | None = None,
    *,
    out: ArrayT | None = None,
    **options: Unpack[ConvOptions],
) -> ArrayT:
    """Convolve every channel with filters of its own.

    It is `conv` with as many groups as channels.  With m below M,

        y[n, c · M + m, o] = bias[c · M + m] + Σ over t of x[n, c, i] · w[c, m, t]

    Parameters
    ----------
    x
        Input, (N, C, *spatial), or (C, *spatial) for a single image.
    w
        Filters, (C, M, *kernel): M for each channel.  With ``layout="channels_last"``:
        x is (N, *spatial, C) and w is (*kernel, C, M).  Where the axes C and M do not
        lie in one run of memory, w is copied, which counts to ``memory_limit``.
    bias
        (C · M,), added to every output position.
    out
        Array to write the result to; it must have its shape and type, and share no
        memory with the inputs.
    **options
        As for `conv`, which are all but ``groups``.

    Returns
    -------
    array
        (N, C · M, *out) in the layout of ``x``: the M results of a channel side by
        side.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `conv` does.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]])
    >>> w = np.array([[[1.0, 1.0], [1.0, -1.0]], [[1.0, 1.0], [1.0, -1.0]]])
    >>> cuconv.depthwise_conv(x, w)
    array([[[  3.,   5.],
            [ -1.,  -1.],
            [ 30.,  50.],
            [-10., -10.]]])
    """
    arrays = x, w, bias
    return run(plan_depthwise, "depthwise_conv", arrays, out, options)


@overload
def depthwise_conv_backward(
    dy: ArrayT,
    x: ArrayT,
    w: ArrayT,
    **options: Unpack[ConvOptions],
) -> ConvGradients[ArrayT]: ...
@overload
def depthwise_conv_backward(
    dy: ArrayT,
    x: ArrayT,
    w: ArrayT,
    *,
    needs: Gradients,
    **options: Unpack[ConvOptions],
) -> ConvGradients[Any]: ...
@shows_options(DEPTHWISE_OPTIONS)
def depthwise_conv_backward(
    dy: ArrayT,
    x: ArrayT,
    w: ArrayT,
    *,
    needs: Gradients = GRADIENTS,
    **options: Unpack[ConvOptions],
) -> ConvGradients[Any]:
    """All gradients of `depthwise_conv`, or those that are needed.

    Parameters
    ----------
    dy
        Gradient for the output, (N, C · M, *out).
    x, w
        Input and weights of the forward call.
    needs
        Which of ``"x"``, ``"w"``, ``"bias"`` to compute; the others cost nothing.
    **options
        As for `depthwise_conv`, the same as in the forward call.

    Returns
    -------
    ConvGradients
        Named tuple ``(x, w, bias)`` with the shapes of the three, None for a gradient
        that was not asked for.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `depthwise_conv` does, before the first gradient is computed.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, w = np.ones((1, 2, 3)), np.ones((2, 1, 2))
    >>> cuconv.depthwise_conv_backward(np.ones((1, 2, 2)), x, w).w
    array([[[2., 2.]],
    <BLANKLINE>
           [[2., 2.]]])
    """
    more = {"needs": needs, "allocates": _BACKWARD_ALLOCATES}
    name, arrays = "depthwise_conv_backward", (dy, x, w)
    found: ConvGradients[Any] = run(
        plan_depthwise_gradients, name, arrays, None, options, more
    )
    return found


@shows_options(SEPARABLE_OPTIONS)
def separable_conv(
    x: ArrayT,
    depthwise: ArrayT,
    pointwise: ArrayT,
    bias: ArrayT | None = None,
    *,
    out: ArrayT | None = None,
    **options: Unpack[SeparableOptions],
) -> ArrayT:
    """Convolve every channel alone, then mix the channels cell by cell.

    With h the result of `depthwise_conv`,

        y[n, k, o] = bias[k] + Σ over c of h[n, c, o] · pointwise[k, c]

    h exists whole where the limit has room for it, and else in pieces: some images, or
    a part of one.

    Parameters
    ----------
    x
        Input, (N, C, *spatial), or (C, *spatial) for a single image.
    depthwise
        Filters of the first step, (C, M, *kernel), as for `depthwise_conv`.
    pointwise
        Weights of the second step, (K, C · M).  With ``layout="channels_last"``: x is
        (N, *spatial, C), depthwise (*kernel, C, M) and pointwise (C · M, K).
    bias
        (K,), added to every output position.
    out
        Array to write the result to; it must have its shape and type, and share no
        memory with the inputs.
    stride, padding, dilation, flip_kernel, cover_all
        As for `conv`; they are those of the first step.
    layout, precision, deterministic
        As for `conv`.
    dtype
        Type of h and of the result; by default NumPy's common type of the arrays.
    strategy
        As for `conv`; the name of a strategy is for the first step alone.
    memory_limit
        As for `conv`; what there is of h counts too.

    Returns
    -------
    array
        (N, K, *out) in the layout of ``x``; without the batch axis if ``x`` has none.

    Raises
    ------
    ValueError, TypeError
        For shapes, types, devices or options that do not fit, before anything is
        allocated, and while a CUDA graph is captured.
    MemoryLimitError
        If nothing fits under ``memory_limit``; it names the smallest that would do.

    References
    ----------
    Chollet, "Xception: Deep learning with depthwise separable convolutions", 2017.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]])
    >>> depthwise, pointwise = np.ones((2, 1, 2)), np.array([[1.0, 1.0], [0.0, 1.0]])
    >>> cuconv.separable_conv(x, depthwise, pointwise)
    array([[[33., 55.],
            [30., 50.]]])
    """
    arrays = x, depthwise, pointwise, bias
    return run(plan_separable, "separable_conv", arrays, out, options)


@shows_options(SEPARABLE_OPTIONS)
def separable_conv_backward(
    dy: ArrayT,
    x: ArrayT,
    depthwise: ArrayT,
    pointwise: ArrayT,
    *,
    needs: Sequence[str] = SEPARABLE_GRADIENTS,
    **options: Unpack[SeparableOptions],
) -> SeparableGradients:
    """All gradients of `separable_conv`, or those that are needed.

    What lay between its steps is computed once more, piece by piece, for the gradient
    of ``pointwise``; nothing else needs it.

    Parameters
    ----------
    dy
        Gradient for the output, (N, K, *out).
    x, depthwise, pointwise
        Input and weights of the forward call.
    needs
        Which of ``"x"``, ``"depthwise"``, ``"pointwise"``, ``"bias"`` to compute; the
        others cost nothing.
    **options
        As for `separable_conv`, the same as in the forward call.

    Returns
    -------
    SeparableGradients
        Named tuple ``(x, depthwise, pointwise, bias)`` with the shapes of the four,
        None for a gradient that was not asked for.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `separable_conv` does, before the first gradient is computed.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, dy = np.ones((1, 2, 4)), np.ones((1, 5, 3))
    >>> depthwise, pointwise = np.ones((2, 3, 2)), np.ones((5, 6))
    >>> found = cuconv.separable_conv_backward(dy, x, depthwise, pointwise)
    >>> found.x
    array([[[15., 30., 30., 15.],
            [15., 30., 30., 15.]]])
    >>> found.depthwise.shape, found.pointwise.shape, found.bias
    ((2, 3, 2), (5, 6), array([3., 3., 3., 3., 3.]))
    """
    arrays, more = (dy, x, depthwise, pointwise), {"needs": needs}
    name = "separable_conv_backward"
    found: SeparableGradients = run(
        plan_separable_gradients, name, arrays, None, options, more
    )
    return found
