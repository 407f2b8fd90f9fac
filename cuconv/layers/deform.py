"""Deformable convolution layers: weights of their own, offsets of another layer."""

from typing import Any

import numpy as np

from cuconv.arrays import Array
from cuconv.deform import deform_conv, deform_conv_backward
from cuconv.engine.deform import DeformGradients
from cuconv.layers.filters import Conv
from cuconv.options import DEFORM_OPTIONS, Options


class DeformConv(Conv):
    """A deformable convolution; its offsets, and its mask if any, come with each call.

    Weights are initialised as those of `Conv`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, bias, xp, rng
        As for `Conv`.
    **options
        As for `cuconv.deform_conv`; ``dtype`` is a real floating type, float32 by
        default.

    Attributes
    ----------
    parameters, gradients
        As for `Conv`.

    Raises
    ------
    ValueError, TypeError
        For sizes, groups or types that do not fit, before anything is drawn.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import Conv, DeformConv
    >>> x = np.ones((2, 3, 5, 7), dtype=np.float32)
    >>> offsets = Conv(3, 2 * 9, (3, 3), padding=1, xp=np, rng=0)
    >>> layer = DeformConv(3, 8, (3, 3), padding=1, xp=np, rng=1)
    >>> y = layer(x, offsets(x))
    >>> found = layer.backward(np.ones_like(y))
    >>> dx = found.x + offsets.backward(found.offset)
    >>> y.shape, dx.shape, layer.gradients["weight"].shape
    ((2, 8, 5, 7), (2, 3, 5, 7), (8, 3, 3, 3))
    """

    _known = DEFORM_OPTIONS

    def _check_options(
        self, options: Options, in_channels: int, w_shape: tuple[int, ...]
    ) -> None:
        super()._check_options(options, in_channels, w_shape)
        if np.dtype(options.dtype).kind == "c":
            raise TypeError(
                f"a deformable convolution takes real floats; dtype is {options.dtype}"
            )

    def __call__(self, x: Array, offset: Array = None, mask: Array = None) -> Array:
        return self.forward(x, offset, mask)

    def forward(self, x: Array, offset: Array = None, mask: Array = None) -> Array:
        """Convolve, and keep the arrays (not copies of them) for `backward`.

        Parameters
        ----------
        x, offset, mask
            As for `cuconv.deform_conv`.

        Returns
        -------
        array
            (N, K, *out) in the layout of ``x``.

        Raises
        ------
        ValueError, TypeError, MemoryLimitError
            As `cuconv.deform_conv` does.
        """
        weight, bias = self.parameters["weight"], self.parameters.get("bias")
        y = deform_conv(x, offset, weight, bias, mask=mask, **self._options)
        self._x = x, offset, mask
        return y

    def backward(self, dy: Array, *, needs_input: bool = True) -> DeformGradients:
        """Fill `gradients` from the last forward call.

        Parameters
        ----------
        dy
            Gradient for the output, in its shape.
        needs_input
            Whether to compute the gradient for x; those for offset and mask always are.

        Returns
        -------
        DeformGradients
            The gradients for x, offset and mask, and those of the parameters.

        Raises
        ------
        RuntimeError
            If there was no forward call.
        ValueError, TypeError, MemoryLimitError
            As `cuconv.deform_conv_backward` does.
        """
        x, offset, mask = self._kept()
        names = {name: self._found[name] for name in self.parameters}
        needs = *(("x",) if needs_input else ()), "offset", "mask", *names.values()
        weight, more = self.parameters["weight"], {"mask": mask, "needs": needs}
        found = deform_conv_backward(dy, x, offset, weight, **more, **self._options)
        self.gradients = {name: getattr(found, other) for name, other in names.items()}
        return found

    def _convolve(self, x: Any) -> Array:
        raise NotImplementedError("forward takes offsets too")


class DeformConv2d(DeformConv, rank=2):
    """`DeformConv` over two spatial axes: x (N, C, H, W).

    >>> x = np.ones((1, 4, 9, 9), dtype=np.float32)
    >>> offset = np.zeros((1, 2 * 9, 4, 4), dtype=np.float32)
    >>> DeformConv2d(4, 6, 3, stride=2, xp=np)(x, offset).shape
    (1, 6, 4, 4)
    """
