"""The base class of layers: parameters, gradients, moving and saving them."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from cuconv.arrays import Array, array_module
from cuconv.devices import asarray
from cuconv.geometry import Sizes, as_index
from cuconv.options import documented_as

# Longer than any dilated kernel, and than any cropping by padding.
ENDLESS = 2**70


class Layer(ABC):
    """Base class of layers: parameters, their gradients, moving and saving both.

    A layer without parameters adds `forward` and `backward` alone.  Layers with weights
    keep their input for `backward`, not a copy, which would double the memory: it must
    not change between the two calls.  Pooling layers keep none.

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

    # Positional arguments and options, which `repr` shows beside the parameters.
    _sizes: tuple[Any, ...] = ()
    _options: Mapping[str, Any] = MappingProxyType({})

    def __init__(self) -> None:
        self.parameters: dict[str, Array] = {}
        self.gradients: dict[str, Array] = {}
        self._x: Any = None

    @abstractmethod
    def forward(self, x: Array) -> Array:
        """Compute the output, and keep what `backward` needs."""

    @abstractmethod
    def backward(self, dy: Array, *, needs_input: bool = True) -> Any:
        """Fill `gradients`; return the gradient for the input, if it is needed."""

    def __repr__(self) -> str:
        shapes = (f"{name} {array.shape}" for name, array in self.parameters.items())
        options = (
            f"{name}={value if name == 'dtype' else repr(value)}"
            for name, value in self._options.items()
            if value is not None
        )
        shown = ", ".join((*shapes, *map(repr, self._sizes), *options))
        return f"{type(self).__name__}({shown})"

    def __call__(self, x: Array) -> Array:
        return self.forward(x)

    def to(self, xp: Any) -> Self:
        """Move parameters and gradients to another array module, by copies.

        The input of the last forward call is dropped.

        Parameters
        ----------
        xp
            ``numpy`` or ``cupy``; on CuPy, arrays go to its current device.

        Returns
        -------
        Layer
            This layer.

        Raises
        ------
        TypeError
            If ``xp`` is neither module.

        Examples
        --------
        >>> import cuconv
        >>> from cuconv.layers import Conv1d
        >>> layer = Conv1d(2, 4, 3).to(np)
        >>> cuconv.array_module(layer.parameters["weight"]).__name__
        'numpy'
        """
        check_module(xp)
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
        """View a parameter in PyTorch's layout, or the reverse."""
        del name
        return array

    def _kept(self) -> Any:
        """The input of the last forward call."""
        if self._x is None:
            raise RuntimeError(
                "backward needs the input of a forward call; there was none"
            )
        return self._x


class Ranked(Layer):
    """A layer over any number of axes, and its subclasses over ``rank`` axes alone."""

    rank: int | None = None

    def __init_subclass__(cls, rank: int | None = None) -> None:
        """Complete the docstring of a class of one rank from that of its base."""
        super().__init_subclass__()
        if rank is not None:
            cls.rank = rank
            summary, gap, example = (cls.__doc__ or "").partition("\n\n")
            imports = f"numpy as np\n    >>> from cuconv.layers import {cls.__name__}"
            heading = f"    Examples\n    --------\n    >>> import {imports}\n"
            cls.__doc__ = f"{summary}{gap}{heading}{example}"
            documented_as(cls.__base__, rank)(cls)


def positive(name: str, value: int) -> int:
    """A size; raise if it is below one."""
    number = as_index(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1; got {number}")
    return number


def kernel_of(kernel_size: Sizes, rank: int | None) -> tuple[int, ...]:
    """Taps for each axis; only layers with a fixed rank take a single number."""
    if not isinstance(kernel_size, Iterable):
        if rank is None:
            raise TypeError(
                "kernel_size must be one number for each spatial axis; got the single "
                f"number {kernel_size}, which only layers of a rank take, like Conv2d"
            )
        kernel_size = (kernel_size,) * rank
    kernel = tuple(positive("kernel_size", taps) for taps in kernel_size)
    if len(kernel) != (rank or max(len(kernel), 1)):
        raise ValueError(f"kernel_size has {len(kernel)} values; needed: {rank or 1}")
    return kernel


def check_module(xp: Any) -> None:
    """Raise if ``xp`` is neither NumPy nor CuPy."""
    # A caller that passes CuPy has imported it.
    if xp is None or (xp is not np and xp is not sys.modules.get("cupy")):
        raise TypeError(f"xp must be the module numpy or cupy; got {xp!r}")


def _moved(array: Array, xp: Any) -> Array:
    """Copy an array to another module; the array itself if it is there already."""
    if array_module(array) is xp:
        return array
    host = array if isinstance(array, np.ndarray) else array.get()
    return host if xp is np else xp.asarray(host)


def _fitting(name: str, value: Any, into: Array) -> Array:
    """A value for a parameter, on the host; raise if it does not fit."""
    host = _moved(asarray(value), np)
    if host.dtype.kind == "V" and host.dtype.itemsize == into.dtype.itemsize:
        # NumPy's files do not store that a type is bfloat16.
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
        from safetensors import numpy  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError(
            "safetensors is not installed: pip install 'cuconv[safetensors]'"
        ) from error
    return numpy
