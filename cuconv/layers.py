"""Convolutions that hold their weights: forward, backward, gradients.

A layer is nothing but arrays and the calls of `cuconv.conv` or `cuconv.conv_transpose`;
training loops and optimisers stay the caller's.
"""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np

from cuconv.arrays import Array, DType, array_module
from cuconv.calls import ConvGradients, ConvOptions, chosen_options
from cuconv.conv import conv, conv_backward
from cuconv.geometry import Sizes, channels_are_first
from cuconv.interchange import asarray
from cuconv.leaves import default_array_module
from cuconv.plan import Options
from cuconv.planner import check_strategy_name
from cuconv.transpose import conv_transpose, conv_transpose_backward

# Longer than any kernel with its dilation, and than what padding may crop.
_ENDLESS = 2**70


class Layer(ABC):
    """What every layer has: parameters, their gradients, and ways to keep both.

    A layer without parameters adds `forward` and `backward` alone.

    Attributes
    ----------
    parameters
        Arrays by name, in the layout of the layer.  An optimiser may write to them.
    gradients
        The same names, once `backward` has run.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import Layer
    >>> class ReLU(Layer):
    ...     def forward(self, x):
    ...         self._x = x
    ...         return np.maximum(x, 0)
    ...
    ...     def backward(self, dy, *, needs_input=True):
    ...         return dy * (self._x > 0)
    >>> layer = ReLU()
    >>> layer(np.array([-1.0, 2.0]))
    array([0., 2.])
    >>> layer.backward(np.ones(2))
    array([0., 1.])
    """

    def __init__(self) -> None:
        self.parameters: dict[str, Array] = {}
        self.gradients: dict[str, Array] = {}
        self._x: Array | None = None

    @abstractmethod
    def forward(self, x: Array) -> Array:
        """Compute the output, and keep what `backward` needs."""

    @abstractmethod
    def backward(self, dy: Array, *, needs_input: bool = True) -> Array | None:
        """Fill `gradients`; answer the gradient for the input, if it is needed."""

    def __call__(self, x: Array) -> Array:
        return self.forward(x)

    def to(self, xp: Any) -> Self:
        """Move parameters and gradients to another array module, by copies.

        What the last forward call kept is forgotten.

        Parameters
        ----------
        xp
            ``numpy`` or ``cupy``; on CuPy, arrays go to its current device.

        Returns
        -------
        Layer
            This layer.

        Examples
        --------
        >>> import cuconv
        >>> from cuconv.layers import Conv1d
        >>> layer = Conv1d(2, 4, 3).to(np)
        >>> cuconv.array_module(layer.parameters["weight"]).__name__
        'numpy'
        """
        for arrays in (self.parameters, self.gradients):
            arrays.update({name: _moved(array, xp) for name, array in arrays.items()})
        self._x = None
        return self

    def state_dict(self) -> dict[str, Array]:
        """The parameters by PyTorch's names and in its layout.

        Returns
        -------
        dict
            Copies in NumPy, whatever module and layout the layer has;
            ``torch.from_numpy`` takes them as they are.

        Examples
        --------
        >>> from cuconv.layers import Conv2d
        >>> layer = Conv2d(3, 8, (5, 2), layout="channels_last")
        >>> {name: array.shape for name, array in layer.state_dict().items()}
        {'weight': (8, 3, 5, 2), 'bias': (8,)}
        """
        return {
            name: _moved(self._channels_first(name, array), np).copy(order="C")
            for name, array in self.parameters.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Write parameters that `state_dict`, or PyTorch's, gave.

        They are written into the arrays that are there, in the layer's own type.

        Parameters
        ----------
        state
            One array for each parameter, in PyTorch's layout: what `cuconv.asarray`
            takes, PyTorch's tensors among them.

        Raises
        ------
        ValueError, TypeError
            If names, shapes or types do not fit, before anything is written.

        Examples
        --------
        >>> from cuconv.layers import Conv1d
        >>> first, second = Conv1d(2, 4, 3, xp=np), Conv1d(2, 4, 3, xp=np)
        >>> second.load_state_dict(first.state_dict())
        >>> np.array_equal(*(each.parameters["weight"] for each in (first, second)))
        True
        """
        if set(state) != set(self.parameters):
            raise ValueError(
                f"the state has {sorted(state)} and the layer {sorted(self.parameters)}"
            )
        views = {n: self._channels_first(n, a) for n, a in self.parameters.items()}
        hosts = {n: _fitting(n, state[n], view) for n, view in views.items()}
        for name, view in views.items():
            view[...] = array_module(view).asarray(hosts[name])

    def save(self, path: str | Path) -> None:
        """Write `state_dict` to a file.

        Parameters
        ----------
        path
            Ends in ``.npz``, or in ``.safetensors`` if that library is installed.

        Raises
        ------
        ValueError
            For another ending.
        ImportError
            If safetensors is needed and not installed.
        """
        path = _checked_path(path)
        if path.suffix == ".npz":
            np.savez(path, **self.state_dict())
        else:
            _safetensors().save_file(self.state_dict(), path)

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote, or a file of PyTorch's for this layer alone.

        Parameters
        ----------
        path
            Ends in ``.npz`` or ``.safetensors``.

        Raises
        ------
        ValueError, TypeError
            As `load_state_dict` does, and for another ending.
        ImportError
            If safetensors is needed and not installed.
        """
        path = _checked_path(path)
        if path.suffix == ".npz":
            with np.load(path) as file:
                self.load_state_dict(dict(file))
        else:
            self.load_state_dict(_safetensors().load_file(path))

    def _channels_first(self, name: str, array: Array) -> Array:
        """A view of a parameter as PyTorch has it; or of such an array."""
        del name
        return array

    def _kept(self) -> Array:
        """The input of the last forward call."""
        if self._x is None:
            raise RuntimeError(
                "backward needs the input of a forward call; there was none"
            )
        return self._x


class _Filters(Layer):
    """A layer with weights and a bias, and the options of a convolution."""

    rank: int | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        *,
        bias: bool,
        xp: Any,
        rng: np.random.Generator | int | None,
        options: ConvOptions,
    ) -> None:
        super().__init__()
        _check_known(options)
        self._options: ConvOptions = {"dtype": np.float32, **options}
        dtype = _parameter_type(self._options["dtype"])
        self._options["dtype"] = dtype
        channels = self._channels(in_channels, out_channels, options.get("groups", 1))
        shape = (*channels, *_kernel(kernel_size, self.rank))
        chosen = chosen_options(self._options).settled()
        check_strategy_name(chosen.strategy)
        layout = options.get("layout", "channels_first")
        self._is_channels_first = channels_are_first(layout)
        self._check_options(chosen, in_channels, self._in_layout(shape))
        xp = default_array_module() if xp is None else xp
        terms = self._terms(chosen, in_channels, shape[2:])
        weight = _he_weights(shape, terms, dtype, np.random.default_rng(rng))
        if not self._is_channels_first:
            weight = np.moveaxis(weight, (0, 1), (-1, -2))
        self.parameters["weight"] = xp.asarray(np.ascontiguousarray(weight))
        if bias:
            self.parameters["bias"] = xp.zeros(out_channels, dtype=dtype)

    @abstractmethod
    def _channels(
        self, in_channels: int, out_channels: int, groups: int
    ) -> tuple[int, int]:
        """The two axes of the weights that are no taps, checked."""

    @abstractmethod
    def _check_options(
        self, options: Options, in_channels: int, w_shape: tuple[int, ...]
    ) -> None:
        """Refuse options that suit no input at all."""

    def _terms(
        self, options: Options, in_channels: int, kernel: tuple[int, ...]
    ) -> float:
        """How many products an output sums: He's fan_in."""
        return in_channels // options.groups * math.prod(kernel)

    def _in_layout(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of weights that PyTorch would have in this one."""
        if self._is_channels_first:
            return shape
        return (*shape[2:], shape[1], shape[0])

    def _endless(self, channels: int, rank: int) -> tuple[int, ...]:
        """The shape of an input to which no kernel is too long."""
        size = (_ENDLESS,) * rank
        return (channels, *size) if self._is_channels_first else (*size, channels)

    def _channels_first(self, name: str, array: Array) -> Array:
        if name == "bias" or self._is_channels_first:
            return array
        rank = array.ndim - 2
        return array.transpose(rank + 1, rank, *range(rank))

    def _take(self, found: ConvGradients) -> Array | None:
        """Fill `gradients`; what is left is the one for the input."""
        pairs = {"weight": found.w, "bias": found.bias}
        self.gradients = {name: pairs[name] for name in self.parameters}
        return found.x

    def _needs(self, *, needs_input: bool) -> tuple[str, ...]:
        bias = ("bias",) if "bias" in self.parameters else ()
        return (*(("x",) if needs_input else ()), "w", *bias)


class Conv(_Filters):
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
        super().__init__(
            *(in_channels, out_channels, kernel_size),
            bias=bias,
            xp=xp,
            rng=rng,
            options=options,
        )

    def _channels(
        self, in_channels: int, out_channels: int, groups: int
    ) -> tuple[int, int]:
        return out_channels, _group_channels(in_channels, out_channels, groups)[0]

    def _check_options(
        self, options: Options, in_channels: int, w_shape: tuple[int, ...]
    ) -> None:
        x_shape = self._endless(in_channels, len(w_shape) - 2)
        options.geometry(x_shape, w_shape)

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
        found = conv_backward(
            dy,
            self._kept(),
            self.parameters["weight"],
            needs=self._needs(needs_input=needs_input),
            **self._options,
        )
        return self._take(found)


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


class ConvTranspose(_Filters):
    """A transposed convolution with weights and a bias, over any number of axes.

    Weights begin as He et al. draw them for rectified units: normal, with standard
    deviation √(2 / fan_in), where fan_in = in_channels / groups · taps / strides is how
    many products an output cell sums, on average.  Biases begin as zeros.

    Parameters
    ----------
    in_channels, out_channels
        Channels C of the input and K of the output.
    kernel_size
        Taps along each spatial axis; how many there are gives the rank.
        `ConvTranspose1d`, `ConvTranspose2d` and `ConvTranspose3d` know their rank and
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
        super().__init__(
            *(in_channels, out_channels, kernel_size),
            bias=bias,
            xp=xp,
            rng=rng,
            options=options,
        )

    def _channels(
        self, in_channels: int, out_channels: int, groups: int
    ) -> tuple[int, int]:
        return in_channels, _group_channels(in_channels, out_channels, groups)[1]

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
        weight, bias = self.parameters["weight"], self.parameters.get("bias")
        y = conv_transpose(x, weight, bias, **self._sizes(output_size), **self._options)
        self._x, self._output_size = x, output_size
        return y

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
            As `cuconv.conv_transpose_backward` does.
        """
        found = conv_transpose_backward(
            dy,
            self._kept(),
            self.parameters["weight"],
            needs=self._needs(needs_input=needs_input),
            **self._sizes(self._output_size),
            **self._options,
        )
        return self._take(found)

    def _sizes(self, output_size: Sizes | None) -> dict[str, Any]:
        """The options that say how large the output is: one of two."""
        if output_size is None:
            return {"output_padding": self._output_padding}
        return {"output_size": output_size}


class ConvTranspose1d(ConvTranspose):
    """`ConvTranspose` over one spatial axis: x (N, C, L).

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import ConvTranspose1d
    >>> layer = ConvTranspose1d(2, 4, 3, stride=2, padding=1, xp=np)
    >>> x = np.ones((1, 2, 5), dtype=np.float32)
    >>> layer(x).shape, layer.forward(x, output_size=10).shape
    ((1, 4, 9), (1, 4, 10))
    """

    rank = 1


class ConvTranspose2d(ConvTranspose):
    """`ConvTranspose` over two spatial axes: x (N, C, H, W).

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import ConvTranspose2d
    >>> twice = ConvTranspose2d(16, 8, 4, stride=2, padding=1, xp=np)
    >>> twice(np.ones((1, 16, 7, 9), dtype=np.float32)).shape
    (1, 8, 14, 18)
    """

    rank = 2


class ConvTranspose3d(ConvTranspose):
    """`ConvTranspose` over three spatial axes: x (N, C, D, H, W).

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import ConvTranspose3d
    >>> ConvTranspose3d(4, 2, (1, 3, 3), groups=2, xp=np).parameters["weight"].shape
    (4, 1, 1, 3, 3)
    """

    rank = 3


def _check_known(options: Iterable[str]) -> None:
    unknown = set(options) - set(ConvOptions.__annotations__)
    if unknown:
        raise TypeError(
            f"a layer has no option {', '.join(map(repr, sorted(unknown)))}"
        )


def _he_weights(
    shape: tuple[int, ...], terms: float, dtype: DType, rng: np.random.Generator
) -> Array:
    """Draw weights with a mean square of 2 / terms."""
    deviation = math.sqrt(2 / terms)
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


def _group_channels(
    in_channels: int, out_channels: int, groups: int
) -> tuple[int, int]:
    """Channels of the input and of the output in a group, which the groups divide."""
    groups = _positive("groups", groups)
    sizes = {"in_channels": in_channels, "out_channels": out_channels}
    for name, channels in sizes.items():
        if _positive(name, channels) % groups:
            raise ValueError(f"groups {groups} do not divide {name} {channels}")
    return in_channels // groups, out_channels // groups


def _kernel(kernel_size: Sizes, rank: int | None) -> tuple[int, ...]:
    if not isinstance(kernel_size, Iterable):
        if rank is None:
            raise TypeError(
                "kernel_size must be one number for each spatial axis; got the single "
                f"number {kernel_size}, which only layers of a rank take, like Conv2d"
            )
        kernel_size = (kernel_size,) * rank
    kernel = tuple(_positive("kernel_size", taps) for taps in kernel_size)
    if len(kernel) != (rank or max(len(kernel), 1)):
        raise ValueError(f"kernel_size has {len(kernel)} values; needed: {rank or 1}")
    return kernel


def _moved(array: Array, xp: Any) -> Array:
    """The array in another module; itself if it is there already."""
    if array_module(array) is xp:
        return array
    host = array if isinstance(array, np.ndarray) else array.get()
    return host if xp is np else xp.asarray(host)


def _fitting(name: str, value: Any, into: Array) -> Array:
    """A value for a parameter, on the host; refused if it does not fit."""
    host = _moved(asarray(value), np)
    if host.dtype.kind == "V" and host.dtype.itemsize == into.dtype.itemsize:
        # A file of NumPy's does not say that it holds bfloat16.
        host = host.view(into.dtype)
    if host.shape != into.shape:
        raise ValueError(
            f"{name} has shape {host.shape} in the state and {into.shape} in the layer"
        )
    if not np.can_cast(host.dtype, into.dtype, "same_kind"):
        raise TypeError(
            f"{name} has type {host.dtype} in the state and {into.dtype} in the layer"
        )
    return host.astype(into.dtype, copy=False)


def _checked_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"the file must end in .npz or .safetensors; got {path}")
    return path


def _safetensors() -> Any:
    try:
        from safetensors import numpy  # noqa: PLC0415 - not everyone has it
    except ImportError as error:
        raise ImportError(
            "safetensors is not installed: pip install 'cuconv[safetensors]'"
        ) from error
    return numpy
