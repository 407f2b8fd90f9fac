"""Convolutions that hold their weights: forward, backward, gradients.

A layer is nothing but arrays and the two calls of `cuconv.conv`; training loops and
optimisers stay the caller's.
"""

import math
import operator
from collections.abc import Iterable
from typing import Any, Unpack

import numpy as np

from cuconv.arrays import Array, DType
from cuconv.calls import ConvOptions
from cuconv.conv import conv, conv_backward
from cuconv.geometry import Sizes, channels_are_first
from cuconv.leaves import default_array_module


class Conv:
    """A convolution with weights and a bias, over any number of axes.

    Weights begin as He et al. draw them for rectified units: normal, with standard
    deviation √(2 / fan_in), where fan_in = in_channels / groups · taps.  Biases begin
    as zeros.

    Parameters
    ----------
    in_channels, out_channels
        Channels C of the input and K of the output.
    kernel_size
        Taps along each spatial axis; how many there are gives the rank.  `Conv1d`,
        `Conv2d` and `Conv3d` know their rank and take a single number too.
    bias
        Whether a bias is added.
    xp
        The array module that holds the parameters; by default
        `cuconv.default_array_module`.
    rng
        A NumPy generator or a seed.  Weights are drawn by NumPy, so that one seed means
        the same filters in both array modules and both layouts.
    **options
        As for `cuconv.conv`.  ``dtype`` is the type of parameters, results and
        gradients alike: a floating or complex type, float32 by default.

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

    rank: int | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        *,
        bias: bool = True,
        xp: Any = None,
        rng: np.random.Generator | int | None = None,
        **options: Unpack[ConvOptions],
    ) -> None:
        _check_known(options)
        self._options: ConvOptions = {"dtype": np.float32, **options}
        dtype = _parameter_type(self._options["dtype"])
        self._options["dtype"] = dtype
        groups = _positive("groups", options.get("groups", 1))
        channels = _group_channels(in_channels, out_channels, groups)
        kernel = _kernel(kernel_size, self.rank)
        first = channels_are_first(options.get("layout", "channels_first"))
        xp = default_array_module() if xp is None else xp
        generator = np.random.default_rng(rng)
        weight = _he_weights((out_channels, channels, *kernel), dtype, generator)
        if not first:
            weight = weight.transpose(*range(2, weight.ndim), 1, 0)
        self.parameters: dict[str, Array] = {
            "weight": xp.asarray(np.ascontiguousarray(weight))
        }
        if bias:
            self.parameters["bias"] = xp.zeros(out_channels, dtype=dtype)
        self.gradients: dict[str, Array] = {}
        self._x: Array | None = None

    def forward(self, x: Array) -> Array:
        """Convolve, and keep ``x`` (not a copy of it) for `backward`.

        Parameters
        ----------
        x
            (N, C, *spatial), or (N, *spatial, C) with channels last; the batch axis may
            be missing.

        Returns
        -------
        array
            (N, K, *out) in the layout of ``x``.

        Raises
        ------
        ValueError, TypeError, MemoryLimitError
            As `cuconv.conv` does.
        """
        weight, bias = self.parameters["weight"], self.parameters.get("bias")
        y = conv(x, weight, bias, **self._options)
        self._x = x
        return y

    __call__ = forward

    def backward(self, dy: Array, *, needs_input: bool = True) -> Array | None:
        """Fill `gradients` from the last forward call.

        Parameters
        ----------
        dy
            Gradient for the output, in its shape.
        needs_input
            Whether to compute the gradient for the input; a first layer has no use for
            it.

        Returns
        -------
        array or None
            Gradient for the input, in its shape; None if it is not needed.

        Raises
        ------
        RuntimeError
            If there was no forward call.
        ValueError, TypeError, MemoryLimitError
            As `cuconv.conv_backward` does.
        """
        if self._x is None:
            raise RuntimeError(
                "backward needs the input of a forward call; there was none"
            )
        needs = ["w", *(["bias"] if "bias" in self.parameters else [])]
        found = conv_backward(
            dy,
            self._x,
            self.parameters["weight"],
            needs=["x", *needs] if needs_input else needs,
            **self._options,
        )
        pairs = {"weight": found.w, "bias": found.bias}
        self.gradients = {name: pairs[name] for name in self.parameters}
        return found.x


class Conv1d(Conv):
    """`Conv` over one spatial axis: x (N, C, L).

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import Conv1d
    >>> Conv1d(2, 4, 3, xp=np)(np.ones((1, 2, 10), dtype=np.float32)).shape
    (1, 4, 8)
    """

    rank = 1


class Conv2d(Conv):
    """`Conv` over two spatial axes: x (N, C, H, W).

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import Conv2d
    >>> depthwise = Conv2d(6, 6, 3, groups=6, stride=2, xp=np)
    >>> depthwise(np.ones((1, 6, 9, 9), dtype=np.float32)).shape
    (1, 6, 4, 4)
    """

    rank = 2


class Conv3d(Conv):
    """`Conv` over three spatial axes: x (N, C, D, H, W).

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import Conv3d
    >>> Conv3d(1, 2, (1, 3, 3), xp=np).parameters["weight"].shape
    (2, 1, 1, 3, 3)
    """

    rank = 3


def _check_known(options: Iterable[str]) -> None:
    unknown = set(options) - set(ConvOptions.__annotations__)
    if unknown:
        raise TypeError(
            f"a layer has no option {', '.join(map(repr, sorted(unknown)))}"
        )


def _he_weights(
    shape: tuple[int, ...], dtype: DType, rng: np.random.Generator
) -> Array:
    """Draw (K, C / groups, *kernel) with a mean square of 2 / fan_in."""
    deviation = math.sqrt(2 / math.prod(shape[1:]))
    if dtype.kind == "c":
        real, imaginary = rng.normal(scale=deviation / math.sqrt(2), size=(2, *shape))
        return (real + 1j * imaginary).astype(dtype)
    return rng.normal(scale=deviation, size=shape).astype(dtype)


def _parameter_type(dtype: Any) -> DType:
    resolved = np.dtype(np.float32 if dtype is None else dtype)
    # bfloat16 is no kind of NumPy's own: it calls itself "V".
    if resolved.kind not in "fc" and resolved.name != "bfloat16":
        raise TypeError(f"a layer needs a floating or complex dtype; got {resolved}")
    return resolved


def _positive(name: str, value: int) -> int:
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1; got {number}")
    return number


def _group_channels(in_channels: int, out_channels: int, groups: int) -> int:
    """C / groups, for channels that the groups divide."""
    sizes = {"in_channels": in_channels, "out_channels": out_channels}
    for name, channels in sizes.items():
        if _positive(name, channels) % groups:
            raise ValueError(f"groups {groups} do not divide {name} {channels}")
    return in_channels // groups


def _kernel(kernel_size: Sizes, rank: int | None) -> tuple[int, ...]:
    if not isinstance(kernel_size, Iterable):
        if rank is None:
            raise TypeError(
                "kernel_size must be one number for each spatial axis; got the single "
                f"number {kernel_size}, which only Conv1d, Conv2d and Conv3d take"
            )
        kernel_size = (kernel_size,) * rank
    kernel = tuple(_positive("kernel_size", taps) for taps in kernel_size)
    if len(kernel) != (rank or max(len(kernel), 1)):
        raise ValueError(f"kernel_size has {len(kernel)} values; needed: {rank or 1}")
    return kernel
