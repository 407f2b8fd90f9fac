"""Convolution layers with one bank of filters."""

import math
from collections.abc import Iterable
from typing import Any, Unpack

import numpy as np

from cuconv.arrays import Array
from cuconv.conv import conv, conv_backward
from cuconv.conv_transpose import conv_transpose, conv_transpose_backward
from cuconv.engine.call import ConvGradients
from cuconv.geometry import Sizes
from cuconv.layers.base import positive
from cuconv.layers.weighted import Filters
from cuconv.options import ConvOptions, Options


class Conv(Filters):
    """A convolution with weights and a bias, over any number of axes.

    Weights are initialised as in He et al. for rectified units: normal, with standard
    deviation √(2 / fan_in), where fan_in = in_channels / groups · taps.  Biases are
    zero.

    Parameters
    ----------
    in_channels, out_channels
        Channels C of the input and K of the output.
    kernel_size
        Taps along each spatial axis; their number gives the rank.  `Conv1d`,
        `Conv2d` and `Conv3d` have a fixed rank and take a single number too.
    bias
        Whether a bias is added.
    xp
        The array module of the parameters; by default
        `cuconv.default_array_module`.
    rng
        A NumPy generator or a seed.  Weights are drawn by NumPy, so that one seed means
        the same filters in both array modules and both layouts.
    **options
        As for `cuconv.conv`.  ``dtype`` is the type of parameters, results and
        gradients: a floating or complex type, float32 by default.

    Attributes
    ----------
    parameters
        ``"weight"``, (K, C / groups, *kernel) or with channels last (*kernel,
        C / groups, K), and ``"bias"``, (K,), if there is one.
    gradients
        The same names, once `backward` has run.

    Raises
    ------
    ValueError, TypeError
        For sizes, groups or types that do not fit, before anything is drawn.

    References
    ----------
    He, Zhang, Ren, Sun, "Delving deep into rectifiers", 2015, section 2.2.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import Conv
    >>> layer = Conv(3, 8, (3, 3), padding=1, xp=np, rng=0)
    >>> y = layer(np.ones((2, 3, 5, 7), dtype=np.float32))
    >>> dx = layer.backward(np.ones_like(y))
    >>> y.shape, dx.shape, layer.gradients["weight"].shape
    ((2, 8, 5, 7), (2, 3, 5, 7), (8, 3, 3, 3))
    """

    def _channels(
        self, in_channels: int, out_channels: int, groups: int
    ) -> tuple[int, int]:
        return out_channels, group_channels(in_channels, out_channels, groups)[0]

    def _check_options(
        self, options: Options, in_channels: int, w_shape: tuple[int, ...]
    ) -> None:
        x_shape = self._endless(in_channels, len(w_shape) - 2)
        options.geometry(x_shape, w_shape)

    def _convolve(self, x: Array) -> Array:
        weight, bias = self.parameters["weight"], self.parameters.get("bias")
        return conv(x, weight, bias, **self._options)

    def _gradients(self, dy: Array, x: Array, needs: Any) -> ConvGradients[Any]:
        weight = self.parameters["weight"]
        return conv_backward(dy, x, weight, needs=needs, **self._options)


class Conv1d(Conv, rank=1):
    """`Conv` over one spatial axis: x (N, C, L).

    >>> Conv1d(2, 4, 3, xp=np)(np.ones((1, 2, 10), dtype=np.float32)).shape
    (1, 4, 8)
    """


class Conv2d(Conv, rank=2):
    """`Conv` over two spatial axes: x (N, C, H, W).

    >>> depthwise = Conv2d(6, 6, 3, groups=6, stride=2, xp=np)
    >>> depthwise(np.ones((1, 6, 9, 9), dtype=np.float32)).shape
    (1, 6, 4, 4)
    """


class Conv3d(Conv, rank=3):
    """`Conv` over three spatial axes: x (N, C, D, H, W).

    >>> Conv3d(1, 2, (1, 3, 3), xp=np).parameters["weight"].shape
    (2, 1, 1, 3, 3)
    """


class DepthwiseConv(Conv):
    """A depthwise convolution: every channel has filters of its own.

    It is `Conv` with as many groups as channels, and is initialised like that.

    Parameters
    ----------
    channels
        Channels C of the input.
    kernel_size
        As for `Conv`.
    multiplier
        Filters M of each channel.
    bias, xp, rng
        As for `Conv`.
    **options
        As for `cuconv.depthwise_conv`; ``dtype`` as for `Conv`.

    Attributes
    ----------
    parameters
        ``"weight"``, as `Conv` and PyTorch have it: (C · M, 1, *kernel) or with
        channels last (*kernel, 1, C · M).  And ``"bias"``, (C · M,), if there is one.
    gradients
        The same names, once `backward` has run.

    Raises
    ------
    ValueError, TypeError
        For sizes, types or options that do not fit, before anything is drawn.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import DepthwiseConv
    >>> layer = DepthwiseConv(3, (3, 3), multiplier=2, padding=1, xp=np)
    >>> layer(np.ones((2, 3, 5, 7), dtype=np.float32)).shape
    (2, 6, 5, 7)
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Sizes,
        *,
        multiplier: int = 1,
        bias: bool = True,
        xp: Any = None,
        rng: np.random.Generator | int | None = None,
        **options: Unpack[ConvOptions],
    ) -> None:
        if "groups" in options:
            raise TypeError(
                "a depthwise layer has no option 'groups': each channel is one"
            )
        groups = positive("channels", channels)
        filters = groups * positive("multiplier", multiplier)
        own: ConvOptions = {**options, "groups": groups}
        super().__init__(groups, filters, kernel_size, bias=bias, xp=xp, rng=rng, **own)


class DepthwiseConv1d(DepthwiseConv, rank=1):
    """`DepthwiseConv` over one spatial axis: x (N, C, L).

    >>> layer = DepthwiseConv1d(4, 3, padding="causal", xp=np)
    >>> layer(np.ones((1, 4, 9), dtype=np.float32)).shape
    (1, 4, 9)
    """


class DepthwiseConv2d(DepthwiseConv, rank=2):
    """`DepthwiseConv` over two spatial axes: x (N, C, H, W).

    >>> DepthwiseConv2d(6, 3, xp=np).parameters["weight"].shape
    (6, 1, 3, 3)
    """


class DepthwiseConv3d(DepthwiseConv, rank=3):
    """`DepthwiseConv` over three spatial axes: x (N, C, D, H, W).

    >>> DepthwiseConv3d(6, (1, 3, 3), multiplier=2, xp=np).parameters["weight"].shape
    (12, 1, 1, 3, 3)
    """


class ConvTranspose(Filters):
    """A transposed convolution with weights and a bias, over any number of axes.

    Weights are initialised as in He et al. for rectified units: normal, with standard
    deviation √(2 / fan_in), where fan_in = in_channels / groups · taps / strides is the
    average number of products that an output sums.  Biases are zero.

    Parameters
    ----------
    in_channels, out_channels
        Channels C of the input and K of the output.
    kernel_size
        Taps along each spatial axis; their number gives the rank.
        `ConvTranspose1d`, `ConvTranspose2d` and `ConvTranspose3d` have a fixed rank and
        take a single number too.
    bias
        Whether a bias is added.
    output_padding
        As for `cuconv.conv_transpose`.
    xp, rng
        As for `Conv`.
    **options
        As for `cuconv.conv_transpose`; ``dtype`` as for `Conv`.

    Attributes
    ----------
    parameters
        ``"weight"``, (C, K / groups, *kernel) or with channels last (*kernel,
        K / groups, C), and ``"bias"``, (K,), if there is one.
    gradients
        The same names, once `backward` has run.

    Raises
    ------
    ValueError, TypeError
        For sizes, groups, types or options that do not fit, before anything is drawn.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import ConvTranspose
    >>> layer = ConvTranspose(8, 3, (4, 4), stride=2, padding=1, xp=np, rng=0)
    >>> y = layer(np.ones((2, 8, 5, 7), dtype=np.float32))
    >>> dx = layer.backward(np.ones_like(y))
    >>> y.shape, dx.shape, layer.gradients["weight"].shape
    ((2, 3, 10, 14), (2, 8, 5, 7), (8, 3, 4, 4))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        *,
        bias: bool = True,
        output_padding: Sizes = 0,
        xp: Any = None,
        rng: np.random.Generator | int | None = None,
        **options: Unpack[ConvOptions],
    ) -> None:
        self._output_padding = output_padding
        self._output_size: Sizes | None = None
        sizes = in_channels, out_channels, kernel_size
        super().__init__(*sizes, bias=bias, xp=xp, rng=rng, **options)

    def _channels(
        self, in_channels: int, out_channels: int, groups: int
    ) -> tuple[int, int]:
        return in_channels, group_channels(in_channels, out_channels, groups)[1]

    def _check_options(
        self, options: Options, in_channels: int, w_shape: tuple[int, ...]
    ) -> None:
        x_shape = self._endless(in_channels, len(w_shape) - 2)
        more = self._output_padding, None
        options.transposed_geometry(x_shape, w_shape, *more)

    def _terms(
        self, options: Options, in_channels: int, kernel: tuple[int, ...]
    ) -> float:
        stride = options.stride
        each = (stride,) * len(kernel) if not isinstance(stride, Iterable) else stride
        return super()._terms(options, in_channels, kernel) / math.prod(each)

    def forward(self, x: Array, *, output_size: Sizes | None = None) -> Array:
        """Convolve, and keep ``x`` (not a copy of it) for `backward`.

        Parameters
        ----------
        x
            (N, C, *spatial), or (N, *spatial, C) with channels last; the batch axis may
            be missing.
        output_size
            The spatial size of the output, in place of ``output_padding``.

        Returns
        -------
        array
            (N, K, *out) in the layout of ``x``.

        Raises
        ------
        ValueError, TypeError, MemoryLimitError
            As `cuconv.conv_transpose` does.
        """
        y = self._convolve(x, output_size)
        self._x, self._output_size = x, output_size
        return y

    def _convolve(self, x: Array, output_size: Sizes | None = None) -> Array:
        weight, bias = self.parameters["weight"], self.parameters.get("bias")
        return conv_transpose(x, weight, bias, **self._all_options(output_size))

    def _gradients(self, dy: Array, x: Array, needs: Any) -> ConvGradients[Any]:
        options = self._all_options(self._output_size)
        weight = self.parameters["weight"]
        return conv_transpose_backward(dy, x, weight, needs=needs, **options)

    def _all_options(self, output_size: Sizes | None) -> dict[str, Any]:
        """The options with one of the two for the size of the output."""
        if output_size is None:
            return {"output_padding": self._output_padding, **self._options}
        return {"output_size": output_size, **self._options}


class ConvTranspose1d(ConvTranspose, rank=1):
    """`ConvTranspose` over one spatial axis: x (N, C, L).

    >>> layer = ConvTranspose1d(2, 4, 3, stride=2, padding=1, xp=np)
    >>> x = np.ones((1, 2, 5), dtype=np.float32)
    >>> layer(x).shape, layer.forward(x, output_size=10).shape
    ((1, 4, 9), (1, 4, 10))
    """


class ConvTranspose2d(ConvTranspose, rank=2):
    """`ConvTranspose` over two spatial axes: x (N, C, H, W).

    >>> twice = ConvTranspose2d(16, 8, 4, stride=2, padding=1, xp=np)
    >>> twice(np.ones((1, 16, 7, 9), dtype=np.float32)).shape
    (1, 8, 14, 18)
    """


class ConvTranspose3d(ConvTranspose, rank=3):
    """`ConvTranspose` over three spatial axes: x (N, C, D, H, W).

    >>> ConvTranspose3d(4, 2, (1, 3, 3), groups=2, xp=np).parameters["weight"].shape
    (4, 1, 1, 3, 3)
    """


def group_channels(in_channels: int, out_channels: int, groups: int) -> tuple[int, int]:
    """Channels of the input and of the output in a group."""
    groups = positive("groups", groups)
    sizes = {"in_channels": in_channels, "out_channels": out_channels}
    for name, channels in sizes.items():
        if positive(name, channels) % groups:
            raise ValueError(f"groups {groups} do not divide {name} {channels}")
    return in_channels // groups, out_channels // groups
