"""Shared code of layers with weights: options, initialisation, `backward`."""

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Unpack

import numpy as np

from cuconv.arrays import Array, DType, as_dtype, check_type
from cuconv.backends import default_array_module
from cuconv.choices import check_options
from cuconv.engine.planner import check_strategy_name
from cuconv.engine.request import chosen_options
from cuconv.geometry import Sizes, channels_are_first
from cuconv.layers.base import ENDLESS, Ranked, check_module, kernel_of
from cuconv.options import ConvOptions, Options, check_bias


class Weighted(Ranked):
    """A layer with weights, and the options of a convolution."""

    # The field of each parameter's gradient in the function's result.
    _found: ClassVar[dict[str, str]] = {"weight": "w", "bias": "bias"}
    _known: ClassVar[Iterable[str]] = tuple(ConvOptions.__annotations__)

    def __init__(self, options: Any) -> None:
        super().__init__()
        check_options(options, self._known)
        self._options: Any = {"dtype": np.float32, **options}
        self._dtype = _parameter_type(self._options["dtype"])
        self._options["dtype"] = self._dtype

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
            As the function does, `cuconv.conv` for `Conv`.
        """
        y = self._convolve(x)
        self._x = x
        return y

    @abstractmethod
    def _convolve(self, x: Array) -> Array:
        """The function itself, with the parameters and options of the layer."""

    @abstractmethod
    def _gradients(self, dy: Array, x: Array, needs: tuple[str, ...]) -> Any:
        """A named tuple of gradients: ``x`` for the input, the others by `_found`."""

    def backward(self, dy: Array, *, needs_input: bool = True) -> Any:
        """Fill `gradients` from the last forward call.

        Parameters
        ----------
        dy
            Gradient for the output, in its shape.
        needs_input
            Whether to compute the gradient for the input; a first layer does not need
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
            As the function of the gradients does, `cuconv.conv_backward` for `Conv`.
        """
        names = {name: self._found[name] for name in self.parameters}
        needs = (*(("x",) if needs_input else ()), *names.values())
        found = self._gradients(dy, self._kept(), needs)
        self.gradients = {name: getattr(found, other) for name, other in names.items()}
        return found.x

    def _settled(self) -> Options:
        """All options; strings are checked."""
        chosen = chosen_options(self._options).settled()
        check_strategy_name(chosen.strategy)
        self._is_channels_first = channels_are_first(chosen.layout)
        return chosen

    def _endless(self, channels: int, rank: int) -> tuple[int, ...]:
        """The shape of an input that is longer than any kernel."""
        size = (ENDLESS,) * rank
        return (channels, *size) if self._is_channels_first else (*size, channels)

    def _add_bias(self, channels: int, xp: Any) -> None:
        self.parameters["bias"] = xp.zeros(channels, dtype=self._dtype)


class Filters(Weighted):
    """A layer with one bank of filters."""

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
        super().__init__(options)
        check_bias(bias)
        channels = self._channels(in_channels, out_channels, options.get("groups", 1))
        shape = (*channels, *kernel_of(kernel_size, self.rank))
        chosen = self._settled()
        self._check_options(chosen, in_channels, self._in_layout(shape))
        xp = default_array_module() if xp is None else xp
        check_module(xp)
        terms = self._terms(chosen, in_channels, shape[2:])
        weight = drawn(shape, 2 / terms, self._dtype, np.random.default_rng(rng))
        if not self._is_channels_first:
            weight = np.moveaxis(weight, (0, 1), (-1, -2))
        self.parameters["weight"] = xp.asarray(np.ascontiguousarray(weight))
        if bias:
            self._add_bias(out_channels, xp)

    @abstractmethod
    def _channels(
        self, in_channels: int, out_channels: int, groups: int
    ) -> tuple[int, int]:
        """The two axes of the weights that are not spatial, checked."""

    @abstractmethod
    def _check_options(
        self, options: Options, in_channels: int, w_shape: tuple[int, ...]
    ) -> None:
        """Raise for options that are valid for no input."""

    def _terms(
        self, options: Options, in_channels: int, kernel: tuple[int, ...]
    ) -> float:
        """The number of products that an output sums: fan_in of He et al."""
        return in_channels // options.groups * math.prod(kernel)

    def _in_layout(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of PyTorch's weights for this layer."""
        if self._is_channels_first:
            return shape
        return (*shape[2:], shape[1], shape[0])

    def _channels_first(self, name: str, array: Array) -> Array:
        if name == "bias" or self._is_channels_first:
            return array
        rank = array.ndim - 2
        return array.transpose(rank + 1, rank, *range(rank))


def drawn(
    shape: tuple[int, ...], square: float, dtype: DType, rng: np.random.Generator
) -> Array:
    """Draw weights with this mean square."""
    deviation = math.sqrt(square)
    if dtype.kind == "c":
        real, imaginary = rng.normal(scale=deviation / math.sqrt(2), size=(2, *shape))
        return (real + 1j * imaginary).astype(dtype)
    return rng.normal(scale=deviation, size=shape).astype(dtype)


def _parameter_type(dtype: Any) -> DType:
    resolved = as_dtype(np.float32 if dtype is None else dtype)
    # bfloat16 is not one of NumPy's own types: its kind is "V".
    if resolved.kind not in "fc" and resolved.name != "bfloat16":
        raise TypeError(f"a layer needs a floating or complex dtype; got {resolved}")
    check_type("dtype", resolved)
    return resolved
