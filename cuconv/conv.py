"""Convolution and its gradients: validate, plan, run."""

from collections.abc import Sequence
from typing import Any, Unpack, overload

from cuconv.arrays import Array, ArrayT, is_array
from cuconv.backends import backend_on
from cuconv.choices import Gradients, Operation, not_a_choice
from cuconv.engine.call import (
    GRADIENTS,
    ConvGradients,
    plan_convolution,
    plan_gradients,
    run,
)
from cuconv.engine.plan import Plan
from cuconv.engine.problem import ROLES
from cuconv.engine.request import ZERO_POINTS, chosen_options, request_of_shapes
from cuconv.geometry import Sizes
from cuconv.options import ConvOptions, check_bias, documented_as, shows_options

_BACKWARD_ALLOCATES = (
    "conv_backward allocates its results: call conv_input_grad and conv_weight_grad "
    "with out=, and sum dy for the bias"
)


_RANK_1, _RANK_2, _RANK_3 = ((f"conv{rank}d", rank) for rank in (1, 2, 3))


@shows_options()
def conv(
    x: ArrayT,
    w: ArrayT,
    bias: ArrayT | None = None,
    *,
    out: ArrayT | None = None,
    x_zero_point: Any = None,
    w_zero_point: Any = None,
    **options: Unpack[ConvOptions],
) -> ArrayT:
    """Convolve a batch of multi-channel arrays with a bank of filters.

    As usual in deep learning this is cross-correlation: the filters are not flipped,
    unless ``flip_kernel``.
    With ``o`` an output position, ``t`` a tap and ``i = o · stride + t · dilation -
    padding``,

        y[n, k, o] = bias[k] + Σ over c, t of x[n, c, i] · w[k, c, t]

    where ``i`` counts the zeros of ``input_dilation`` too.

    Parameters
    ----------
    x
        Input, (N, C, *spatial), or (C, *spatial) for a single image: a NumPy or CuPy
        array, or a Dask array of such blocks, for which the result is a Dask array too.
    w
        Filters, (K, C / groups, *kernel).  With ``layout="channels_last"``: x is
        (N, *spatial, C) and w is (*kernel, C / groups, K).
    bias
        (K,), added to every output position.
    out
        Array to write the result to; it must have its shape and type, and share no
        memory with the inputs.  Not with Dask arrays.
    x_zero_point, w_zero_point
        For x and w of int8 or uint8: the numbers that represent zero in them, which
        are subtracted from every element and weight before the product, without
        wrapping.  An integer in the range of the array's type, or an array of that
        type and size 1; for w also of shape (K,), one for each filter.  The padding is
        ``x_zero_point``, and so adds nothing.  The default of ``dtype`` is int32 then.
        None: zero.
    {options}

    Returns
    -------
    array
        (N / batch_groups, K, *out) in the module of the inputs; without the batch axis
        if ``x`` has none.  Along each axis, with n elements of x and size = (n - 1) ·
        input_dilation + 1, the output has (size + padding - dilation · (kernel - 1) -
        1) // stride + 1 elements.

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
    >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
    >>> w = np.ones((1, 1, 2, 2))
    >>> cuconv.conv(x, w, stride=2)
    array([[[[10., 18.],
             [42., 50.]]]])

    Padding modes, and input dilation:

    >>> x, one = np.array([[[1, 2, 3]]]), np.array([[[1]]])
    >>> for mode in ("zeros", "reflect", "symmetric", "replicate", "circular"):
    ...     print(cuconv.conv(x, one, padding=2, padding_mode=mode)[0, 0])
    [0 0 1 2 3 0 0]
    [3 2 1 2 3 2 1]
    [2 1 1 2 3 3 2]
    [1 1 1 2 3 3 3]
    [2 3 1 2 3 1 2]
    >>> cuconv.conv(x, np.array([[[1, 10]]]), padding=1, input_dilation=2)
    array([[[10,  1, 20,  2, 30,  3]]])

    Each image with a filter of its own:

    >>> x, w = np.array([[[1, 2]], [[3, 4]]]), np.array([[[1]], [[10]]])
    >>> cuconv.conv(x, w, batch_groups=2)
    array([[[ 1,  2],
            [30, 40]]])

    A zero point of 128, which is the padding too:

    >>> x, w = np.array([[[128, 130, 255]]], np.uint8), np.array([[[1, 100]]], np.int8)
    >>> cuconv.conv(x, w, padding=1, x_zero_point=128)
    array([[[    0,   200, 12702,   127]]], dtype=int32)
    """
    arrays = x, w, bias
    if x_zero_point is None and w_zero_point is None:
        return run(plan_convolution, "forward", arrays, out, options)
    zeros = x_zero_point, w_zero_point
    return _with_zero_points(arrays, out, options, None, *zeros)


def _with_zero_points(
    arrays: tuple[Array | None, ...],
    out: Array | None,
    options: ConvOptions,
    function: tuple[str, int] | None,
    *zero_points: Any,
) -> Array:
    """Convolve; zero points that are arrays are operands, numbers are options."""
    given = dict(zip(ZERO_POINTS, zero_points, strict=True))
    arrays += tuple(zero if is_array(zero) else None for zero in zero_points)
    more = {n: zero for n, zero in given.items() if not is_array(zero)}
    return run(plan_convolution, "forward", arrays, out, options, more, function)


@shows_options()
@documented_as(conv, 1)
def conv1d(
    x: ArrayT,
    w: ArrayT,
    bias: ArrayT | None = None,
    *,
    out: ArrayT | None = None,
    x_zero_point: Any = None,
    w_zero_point: Any = None,
    **options: Unpack[ConvOptions],
) -> ArrayT:
    """Convolve over one spatial axis, as `conv` does for any number of them.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.arange(6.0).reshape(1, 1, 6)
    >>> cuconv.conv1d(x, np.array([[[-1.0, 0.0, 1.0]]]))
    array([[[2., 2., 2., 2.]]])
    """
    arrays = x, w, bias
    if x_zero_point is None and w_zero_point is None:
        return run(plan_convolution, "forward", arrays, out, options, None, _RANK_1)
    zeros = x_zero_point, w_zero_point
    return _with_zero_points(arrays, out, options, _RANK_1, *zeros)


@shows_options()
@documented_as(conv, 2)
def conv2d(
    x: ArrayT,
    w: ArrayT,
    bias: ArrayT | None = None,
    *,
    out: ArrayT | None = None,
    x_zero_point: Any = None,
    w_zero_point: Any = None,
    **options: Unpack[ConvOptions],
) -> ArrayT:
    """Convolve over two spatial axes, as `conv` does for any number of them.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.zeros((8, 64, 56, 56), dtype=np.float32)
    >>> w = np.zeros((64, 64, 3, 3), dtype=np.float32)
    >>> cuconv.conv2d(x, w, padding=1).shape
    (8, 64, 56, 56)
    """
    arrays = x, w, bias
    if x_zero_point is None and w_zero_point is None:
        return run(plan_convolution, "forward", arrays, out, options, None, _RANK_2)
    zeros = x_zero_point, w_zero_point
    return _with_zero_points(arrays, out, options, _RANK_2, *zeros)


@shows_options()
@documented_as(conv, 3)
def conv3d(
    x: ArrayT,
    w: ArrayT,
    bias: ArrayT | None = None,
    *,
    out: ArrayT | None = None,
    x_zero_point: Any = None,
    w_zero_point: Any = None,
    **options: Unpack[ConvOptions],
) -> ArrayT:
    """Convolve over three spatial axes, as `conv` does for any number of them.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, w = np.ones((1, 2, 3, 4, 5)), np.ones((1, 2, 3, 3, 3))
    >>> cuconv.conv3d(x, w)
    array([[[[[54., 54., 54.],
              [54., 54., 54.]]]]])
    """
    arrays = x, w, bias
    if x_zero_point is None and w_zero_point is None:
        return run(plan_convolution, "forward", arrays, out, options, None, _RANK_3)
    zeros = x_zero_point, w_zero_point
    return _with_zero_points(arrays, out, options, _RANK_3, *zeros)


@shows_options()
def conv_input_grad(
    dy: ArrayT,
    w: ArrayT,
    x_shape: Sequence[int],
    *,
    out: ArrayT | None = None,
    **options: Unpack[ConvOptions],
) -> ArrayT:
    """The gradient of `conv` for its input.

    Each element of the input receives, from every window over it, ``dy`` times the
    weight that it was multiplied by (conjugated if complex): the adjoint of ``x ↦
    conv(x, w)``. With a ``padding_mode``, the gradients of its copies in the padding
    are added.

    It is a convolution itself.  With p and q elements of zeros before and after, e =
    dilation · (kernel - 1) + 1 and r the elements left over at the end,

        dx = conv(dy, w flipped, channels and filters exchanged, conjugated,
                  stride=input_dilation, input_dilation=stride, dilation=dilation,
                  padding=((e - 1 - p, e - 1 - q + r),), groups=groups)

    It is linear in ``dy`` and in ``w``.  For a gradient ``v`` for its result, the
    gradient for ``dy`` is ``conv(v, w)``, and that for ``w`` is ``conv_weight_grad(dy,
    v, w_shape)``.

    Parameters
    ----------
    dy
        Gradient for the output, (N, K, *out).
    w
        Filters, (K, C / groups, *kernel).
    x_shape
        Shape of the input, which is ambiguous with strides.
    out, **options
        As for `conv`; ``dtype`` defaults to the common type of ``dy`` and ``w``.

    Returns
    -------
    array
        Of shape ``x_shape``.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `conv` does, and if ``dy`` does not have the shape of its output.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> dy, w = np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2))
    >>> cuconv.conv_input_grad(dy, w, (1, 1, 3, 3))
    array([[[[1., 2., 1.],
             [2., 4., 2.],
             [1., 2., 1.]]]])
    """
    more = {"x_shape": x_shape}
    return run(plan_convolution, "input_grad", (dy, w), out, options, more)


@shows_options()
def conv_weight_grad(
    dy: ArrayT,
    x: ArrayT,
    w_shape: Sequence[int],
    *,
    out: ArrayT | None = None,
    **options: Unpack[ConvOptions],
) -> ArrayT:
    """The gradient of `conv` for its weights.

    Each weight receives the sum, over images and output positions, of ``dy`` times the
    input that it was multiplied by (conjugated if complex): the adjoint of ``w ↦
    conv(x, w)``.

    It is a convolution itself.  With p and q elements of padding before and after, and
    r the elements left over at the end,

        dw = conv(x conjugated, dy, images and channels exchanged in both,
                  stride=dilation, dilation=stride, input_dilation=input_dilation,
                  padding=((p, q - r),), padding_mode=padding_mode,
                  groups=batch_groups, batch_groups=groups)

    with filters and channels of the result exchanged back.  It is linear in ``dy`` and
    in ``x``.  For a gradient ``u`` for its result, the gradient for ``dy`` is ``conv(x,
    u)``, and that for ``x`` is ``conv_input_grad(dy, u, x_shape)``.

    Parameters
    ----------
    dy
        Gradient for the output, (N, K, *out).
    x
        Input, (N, C, *spatial).
    w_shape
        Shape of the weights, (K, C / groups, *kernel).
    out, **options
        As for `conv`; ``dtype`` defaults to the common type of ``dy`` and ``x``.

    Returns
    -------
    array
        Of shape ``w_shape``.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `conv` does, and if ``dy`` does not have the shape of its output.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, dy = np.arange(9.0).reshape(1, 1, 3, 3), np.ones((1, 1, 2, 2))
    >>> cuconv.conv_weight_grad(dy, x, (1, 1, 2, 2))
    array([[[[ 8., 12.],
             [20., 24.]]]])
    """
    more = {"w_shape": w_shape}
    return run(plan_convolution, "weight_grad", (dy, x), out, options, more)


@overload
def conv_backward(
    dy: ArrayT,
    x: ArrayT,
    w: ArrayT,
    **options: Unpack[ConvOptions],
) -> ConvGradients[ArrayT]: ...
@overload
def conv_backward(
    dy: ArrayT,
    x: ArrayT,
    w: ArrayT,
    *,
    needs: Gradients,
    **options: Unpack[ConvOptions],
) -> ConvGradients[Any]: ...
@shows_options()
def conv_backward(
    dy: ArrayT,
    x: ArrayT,
    w: ArrayT,
    *,
    needs: Gradients = GRADIENTS,
    **options: Unpack[ConvOptions],
) -> ConvGradients[Any]:
    """All gradients of `conv`, or those that are needed.

    They are linear in ``dy``, and each in ``w`` or in ``x``: gradients of gradients are
    computed by `conv` and these same functions, see `conv_input_grad` and
    `conv_weight_grad`.

    Parameters
    ----------
    dy
        Gradient for the output, (N, K, *out).
    x, w
        Input and weights of the forward call.
    needs
        Which of ``"x"``, ``"w"``, ``"bias"`` to compute; the others are not computed.
    **options
        As for `conv`, the same as in the forward call.

    Returns
    -------
    ConvGradients
        Named tuple ``(x, w, bias)`` with the shapes of the three, None for a gradient
        that was not asked for.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `conv` does, before the first gradient is computed.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, w = np.ones((1, 1, 3, 3)), np.ones((1, 1, 2, 2))
    >>> dy = np.ones((1, 1, 2, 2))
    >>> gradients = cuconv.conv_backward(dy, x, w, needs=("w", "bias"))
    >>> gradients.w, gradients.bias, gradients.x
    (array([[[[4., 4.],
             [4., 4.]]]]), array([4.]), None)
    """
    more = {"needs": needs, "allocates": _BACKWARD_ALLOCATES}
    found: ConvGradients[Any] = run(plan_gradients, "", (dy, x, w), None, options, more)
    return found


@shows_options()
def plan_conv(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    *,
    op: Operation = "forward",
    bias: bool = False,
    device: str = "cpu",
    output_padding: Sizes = 0,
    output_size: Sizes | None = None,
    **options: Unpack[ConvOptions],
) -> Plan:
    """Plan a convolution without running it: the strategy, the reasons, the cost.

    Parameters
    ----------
    x_shape, w_shape
        Shapes of input and weights, as for `conv`.
    op
        ``"forward"``, ``"input_grad"`` or ``"weight_grad"``; or, with the shapes of
        `conv_transpose`, ``"transpose"``, ``"transpose_input_grad"`` or
        ``"transpose_weight_grad"``.
    bias
        Whether there is a bias.
    device
        ``"cpu"`` for NumPy; for CuPy ``"cuda"``, the current device, or one by its
        number: ``"cuda:1"``.
    output_padding, output_size
        As for `conv_transpose`; only for its operations.
    **options
        As for `conv`; ``dtype`` is the type of all arrays, float32 by default.

    Returns
    -------
    Plan
        Print it to read it; call it with arrays to run it; ``plan.prepare(w)`` gives
        the same plan with the weights transformed once.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `conv` does.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> plan = cuconv.plan_conv((8, 64, 56, 56), (64, 64, 3, 3), padding=1)
    >>> plan.strategy
    'winograd'
    >>> x = np.ones((8, 64, 56, 56), dtype=np.float32)
    >>> w = np.ones((64, 64, 3, 3), dtype=np.float32)
    >>> plan(x, w).shape
    (8, 64, 56, 56)
    >>> prepared = plan.prepare(w)
    >>> prepared(x).shape
    (8, 64, 56, 56)
    """
    chosen = chosen_options({"dtype": "float32", **options})
    check_bias(bias)
    if not isinstance(op, str) or op not in ROLES:
        raise not_a_choice("op", op, ROLES)
    more: dict[str, Any] = {"x_shape": x_shape, "w_shape": w_shape}
    if op.startswith("transpose"):
        more |= {"output_padding": output_padding, "output_size": output_size}
    elif output_size is not None or output_padding != 0:
        raise ValueError(
            f"output_padding and output_size are for op='transpose'; got op={op!r}"
        )
    return Plan(request_of_shapes(op, chosen, more, backend_on(device), bias=bias))
