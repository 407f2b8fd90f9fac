"""Deformable convolution: what the engine samples, multiplies and runs."""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from cuconv.arrays import ArrayT
from cuconv.engine.call import run
from cuconv.engine.deform import (
    DEFORM_GRADIENTS,
    DeformGradients,
    plan_deform,
    plan_deform_gradients,
)
from cuconv.options import (
    DEFORM_OPTIONS,
    DeformOptions,
    documented_as,
    shows_options,
)

_RANK_2: Mapping[str, Any] = {"rank": 2}


@shows_options(DEFORM_OPTIONS)
def deform_conv(
    x: ArrayT,
    offset: ArrayT,
    w: ArrayT,
    bias: ArrayT | None = None,
    *,
    mask: ArrayT | None = None,
    out: ArrayT | None = None,
    **options: Unpack[DeformOptions],
) -> ArrayT:
    """Convolve with taps that are moved, at every output, by offsets.

    With ``o`` an output position, ``t`` a tap, ``d`` the offset group of channel c and

        p = o · stride + t · dilation - padding + offset[n, d, t, o]

    it is

        y[n, k, o] = bias[k] + Σ over c, t of mask[n, d, t, o] · x[n, c, p] · w[k, c, t]

    where x between elements is interpolated linearly along every axis, and zero from
    one element outside on.  With offsets of zero and no mask it is `conv`.

    Parameters
    ----------
    x
        Input, (N, C, *spatial), or (C, *spatial) for a single image; one to three
        spatial axes.  Real floats, as all arrays.
    offset
        (N, D · taps · axes, *out): for each of D offset groups of C / D channels and
        each tap, how far it is moved along every axis, in elements; (dy, dx) of one tap
        are neighbours, as in torchvision and ONNX.  D follows from the shape.
    w
        Filters, (K, C / groups, *kernel).  With ``layout="channels_last"``: x and
        offset are (N, *spatial, channels) and w is (*kernel, C / groups, K).
    bias
        (K,), added to every output position.
    mask
        (N, D · taps, *out): what each sample is multiplied by; None for ones.
    out
        Array to write the result to; it must have its shape and type, and share no
        memory with the inputs.
    {options}

    Returns
    -------
    array
        (N, K, *out) in the layout of ``x``, of the size that `conv` gives; without the
        batch axis if ``x`` has none.

    Raises
    ------
    ValueError, TypeError
        If shapes, types, devices or options do not fit, before anything is allocated,
        and while a CUDA graph is captured.
    MemoryLimitError
        If nothing fits under ``memory_limit``; it has the smallest possible limit.

    Notes
    -----
    Coordinates are computed, and samples summed, in the type that products are summed
    in: float32 for float16 and bfloat16.  A sample whose offset is NaN is NaN.  A
    sample is a sum over all elements around it, so that 0 · ∞ of an element beside a
    whole position makes it NaN, as in torchvision.

    References
    ----------
    Dai et al., "Deformable convolutional networks", 2017, and, with the mask, Zhu et
    al., "Deformable ConvNets v2: More deformable, better results", 2019.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, w = np.array([[[0.0, 10.0, 20.0, 30.0]]]), np.ones((1, 1, 1))
    >>> offset = np.array([[[1.0, 0.5, -0.25, 0.5]]])
    >>> cuconv.deform_conv(x, offset, w)
    array([[[10. , 15. , 17.5, 15. ]]])
    >>> cuconv.deform_conv(x, offset, w, mask=np.array([[[1.0, 1.0, 0.0, 2.0]]]))
    array([[[10., 15.,  0., 30.]]])
    """
    arrays = x, offset, w, bias, mask
    return run(plan_deform, "deform_conv", arrays, out, options)


@shows_options(DEFORM_OPTIONS)
@documented_as(deform_conv, 2)
def deform_conv2d(
    x: ArrayT,
    offset: ArrayT,
    w: ArrayT,
    bias: ArrayT | None = None,
    *,
    mask: ArrayT | None = None,
    out: ArrayT | None = None,
    **options: Unpack[DeformOptions],
) -> ArrayT:
    """Convolve over two spatial axes with moved taps, as `deform_conv` does.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, w = np.ones((1, 4, 7, 9)), np.ones((6, 4, 3, 3))
    >>> offset = np.zeros((1, 2 * 3 * 3, 7, 9))
    >>> cuconv.deform_conv2d(x, offset, w, padding=1).shape
    (1, 6, 7, 9)
    """
    arrays = x, offset, w, bias, mask
    return run(plan_deform, "deform_conv", arrays, out, options, _RANK_2)


@shows_options(DEFORM_OPTIONS)
def deform_conv_backward(
    dy: ArrayT,
    x: ArrayT,
    offset: ArrayT,
    w: ArrayT,
    *,
    mask: ArrayT | None = None,
    needs: Sequence[str] = DEFORM_GRADIENTS,
    **options: Unpack[DeformOptions],
) -> DeformGradients:
    """All gradients of `deform_conv`, or those that are needed.

    At a whole position, where interpolation has a kink, the gradient for the offset is
    that towards the next element, as in torchvision.

    Parameters
    ----------
    dy
        Gradient for the output, (N, K, *out).
    x, offset, w, mask
        The arrays of the forward call.
    needs
        Which of ``"x"``, ``"offset"``, ``"w"``, ``"mask"``, ``"bias"`` to compute; the
        others are not computed.
    **options
        As for `deform_conv`, the same as in the forward call.  On CUDA, the gradient
        for x is computed without atomic additions unless ``deterministic=False``, which
        is faster.

    Returns
    -------
    DeformGradients
        Named tuple ``(x, offset, w, mask, bias)`` with the shapes of the five, None for
        a gradient that was not asked for, and for the mask if there is none.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `deform_conv` does, before the first gradient is computed.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, w = np.array([[[0.0, 10.0, 20.0, 30.0]]]), np.ones((1, 1, 1))
    >>> offset = np.array([[[1.0, 0.5, -0.25, 0.5]]])
    >>> found = cuconv.deform_conv_backward(np.ones((1, 1, 4)), x, offset, w)
    >>> found.x
    array([[[0.  , 1.75, 1.25, 0.5 ]]])
    >>> found.offset, found.w, found.mask, found.bias
    (array([[[ 10.,  10.,  10., -30.]]]), array([[[57.5]]]), None, array([4.]))
    """
    arrays, more = (dy, x, offset, w, mask), {"needs": needs}
    name = "deform_conv_backward"
    found: DeformGradients = run(
        plan_deform_gradients, name, arrays, None, options, more
    )
    return found
