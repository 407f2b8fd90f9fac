"""Separable convolution layers, with the weights of both steps."""

import math
from typing import Any, ClassVar, Unpack

import numpy as np

from cuconv.arrays import Array
from cuconv.backends import default_array_module
from cuconv.engine.separable import SeparableGradients
from cuconv.geometry import Sizes
from cuconv.layers.base import check_module, kernel_of, positive
from cuconv.layers.weighted import Weighted, drawn
from cuconv.options import (
    SEPARABLE_OPTIONS,
    SeparableOptions,
    check_bias,
)
from cuconv.separable import separable_conv, separable_conv_backward


class SeparableConv(Weighted):
    """A separable convolution: depthwise, then pointwise.

    Weights are initialised normal: those of the first step with standard deviation √(2
    / taps), as in He et al. for rectified inputs, and those of the second, whose inputs
    are not rectified, with √(1 / (in_channels · multiplier)).  Biases are zero.

    Parameters
    ----------
    in_channels, out_channels
        Channels C of the input and K of the output.
    kernel_size
        Taps along each spatial axis; their number gives the rank.
        `SeparableConv1d`, `SeparableConv2d` and `SeparableConv3d` have a fixed rank and
        take a single number too.
    multiplier
        Filters M of each channel in the first step.
    bias
        Whether a bias is added at the end.
    xp, rng
        As for `Conv`.
    **options
        As for `cuconv.separable_conv`; ``dtype`` as for `Conv`.

    Attributes
    ----------
    parameters
        ``"depthwise"``, (C, M, *kernel), ``"pointwise"``, (K, C · M), and ``"bias"``,
        (K,), if there is one; with channels last (*kernel, C, M) and (C · M, K).  In a
        state they are the weights of two convolutions as PyTorch has them, (C · M, 1,
        *kernel) and (K, C · M, 1, …).
    gradients
        The same names, once `backward` has run.

    Raises
    ------
    ValueError, TypeError
        For sizes, types or options that do not fit, before anything is drawn.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import SeparableConv
    >>> layer = SeparableConv(3, 8, (3, 3), multiplier=2, padding=1, xp=np, rng=0)
    >>> y = layer(np.ones((2, 3, 5, 7), dtype=np.float32))
    >>> dx = layer.backward(np.ones_like(y))
    >>> y.shape, layer.gradients["depthwise"].shape, layer.gradients["pointwise"].shape
    ((2, 8, 5, 7), (3, 2, 3, 3), (8, 6))
    """

    _found: ClassVar[dict[str, str]] = {
        name: name for name in ("depthwise", "pointwise", "bias")
    }
    _known = SEPARABLE_OPTIONS

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        *,
        multiplier: int = 1,
        bias: bool = True,
        xp: Any = None,
        rng: np.random.Generator | int | None = None,
        **options: Unpack[SeparableOptions],
    ) -> None:
        super().__init__(options)
        check_bias(bias)
        channels = positive("in_channels", in_channels)
        filters = positive("out_channels", out_channels)
        each = positive("multiplier", multiplier)
        kernel = kernel_of(kernel_size, self.rank)
        chosen = self._settled()._replace(groups=channels)
        first = (channels * each, 1, *kernel)
        shape = first if self._is_channels_first else (*kernel, 1, channels * each)
        chosen.geometry(self._endless(channels, len(kernel)), shape)
        xp = default_array_module() if xp is None else xp
        check_module(xp)
        numbers = np.random.default_rng(rng)
        taps = channels, each, *kernel
        depthwise = drawn(taps, 2 / math.prod(kernel), self._dtype, numbers)
        pointwise = drawn(
            (filters, channels * each), 1 / (channels * each), self._dtype, numbers
        )
        if not self._is_channels_first:
            depthwise, pointwise = np.moveaxis(depthwise, (0, 1), (-2, -1)), pointwise.T
        self.parameters["depthwise"] = xp.asarray(np.ascontiguousarray(depthwise))
        self.parameters["pointwise"] = xp.asarray(np.ascontiguousarray(pointwise))
        if bias:
            self._add_bias(filters, xp)

    def _convolve(self, x: Array) -> Array:
        weights = self.parameters["depthwise"], self.parameters["pointwise"]
        bias = self.parameters.get("bias")
        return separable_conv(x, *weights, bias, **self._options)

    def _gradients(
        self, dy: Array, x: Array, needs: tuple[str, ...]
    ) -> SeparableGradients:
        weights = self.parameters["depthwise"], self.parameters["pointwise"]
        return separable_conv_backward(dy, x, *weights, needs=needs, **self._options)

    def _channels_first(self, name: str, array: Array) -> Array:
        if name == "bias":
            return array
        rank = self.parameters["depthwise"].ndim - 2
        if name == "pointwise":
            own = array if self._is_channels_first else array.T
            return own[(..., *(None,) * rank)]
        if not self._is_channels_first:
            array = array.transpose(rank, rank + 1, *range(rank))
        return array.reshape(-1, 1, *array.shape[2:])


class SeparableConv1d(SeparableConv, rank=1):
    """`SeparableConv` over one spatial axis: x (N, C, L).

    >>> layer = SeparableConv1d(2, 4, 3, padding="causal", xp=np)
    >>> layer(np.ones((1, 2, 10), dtype=np.float32)).shape
    (1, 4, 10)
    """


class SeparableConv2d(SeparableConv, rank=2):
    """`SeparableConv` over two spatial axes: x (N, C, H, W).

    >>> layer = SeparableConv2d(6, 4, 3, stride=2, memory_limit="1 MiB", xp=np)
    >>> layer(np.ones((1, 6, 9, 9), dtype=np.float32)).shape
    (1, 4, 4, 4)
    """


class SeparableConv3d(SeparableConv, rank=3):
    """`SeparableConv` over three spatial axes: x (N, C, D, H, W).

    >>> SeparableConv3d(2, 4, (1, 3, 3), xp=np).parameters["depthwise"].shape
    (2, 1, 1, 3, 3)
    """
