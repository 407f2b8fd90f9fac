"""Pooling layers: no parameters, but arrays that gradients need."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Unpack

from cuconv.arrays import Array
from cuconv.engine.pool import (
    MeanOptions,
    OutputSize,
    PoolOptions,
    divided_by,
    window_geometry,
)
from cuconv.engine.pool_plan import MOST_AXES
from cuconv.geometry import Sizes, WindowGeometry, channels_are_first
from cuconv.layers.base import ENDLESS, Layer, Ranked, kernel_of
from cuconv.memory import MemoryLimit, parse_memory_limit
from cuconv.pooling import (
    adaptive_avg_pool,
    adaptive_avg_pool_backward,
    adaptive_max_pool,
    adaptive_max_pool_backward,
    avg_pool,
    avg_pool_backward,
    global_avg_pool,
    global_avg_pool_backward,
    global_max_pool,
    global_max_pool_backward,
    max_pool,
    max_pool_backward,
)


class _Pool(Layer):
    """A function of `cuconv.pooling`, its gradient, and the options of both."""

    _pool: ClassVar[Callable[..., Any]]
    _backward: ClassVar[Callable[..., Any]]

    def __init__(self, *sizes: Any, memory_limit: MemoryLimit, **options: Any) -> None:
        super().__init__()
        if memory_limit is not None:
            parse_memory_limit(memory_limit)
        self._sizes = sizes
        self._options = {"memory_limit": memory_limit, **options}

    @abstractmethod
    def _results(self, x: Array) -> tuple[Array, ...]:
        """The result, and the arrays that the gradient needs."""

    def forward(self, x: Array) -> Array:
        """Pool, and keep what `backward` needs, which is not ``x``.

        For maxima these are their indices, for means the shape of ``x``.

        Parameters
        ----------
        x
            (N, C, *spatial), or (N, *spatial, C) with channels last.

        Returns
        -------
        array
            (N, C, *out) in the layout and the type of ``x``; means of integers are
            float64.

        Raises
        ------
        ValueError, TypeError, MemoryLimitError
            As the function of this name does.
        """
        y, *needed = self._results(x)
        self._x = (*needed, x.shape)
        return y

    def backward(self, dy: Array, *, needs_input: bool = True) -> Any:
        """Compute the gradient for the input of the last forward call.

        Parameters
        ----------
        dy
            Gradient for the output, in its shape.
        needs_input
            Whether to compute anything: there are no other gradients.

        Returns
        -------
        array or None
            Gradient for the input, in its shape and the type of ``dy``; None if it is
            not needed.

        Raises
        ------
        RuntimeError
            If there was no forward call.
        ValueError, TypeError, MemoryLimitError
            As the gradient of the function does.
        """
        kept = self._kept()
        if not needs_input:
            return None
        return self._backward(dy, *kept, *self._sizes, **self._options)


class _Maxima(_Pool):
    """Maxima: the gradient is added at their indices."""

    def _results(self, x: Array) -> tuple[Array, ...]:
        options = {"return_indices": True, **self._options}
        y, indices = self._pool(x, *self._sizes, **options)
        return y, indices

    @property
    def indices(self) -> Array:
        """The indices of the maxima of the last forward call."""
        indices: Array = self._kept()[0]
        return indices

    def take(self, x: Array, indices: Array) -> Array:
        """Take the elements with these indices."""
        y: Array = self._pool(x, *self._sizes, indices=indices, **self._options)
        return y


class _Means(_Pool):
    """Means: the gradient is divided among the elements of the window."""

    def _results(self, x: Array) -> tuple[Array, ...]:
        return (self._pool(x, *self._sizes, **self._options),)


class MaxPool(_Maxima, Ranked):
    """`cuconv.max_pool` as a layer, over one to three spatial axes.

    Parameters
    ----------
    kernel_size
        Taps along each spatial axis; their number gives the rank.  `MaxPool1d`,
        `MaxPool2d` and `MaxPool3d` have a fixed rank and take a single number too.
    memory_limit, **options
        As for `cuconv.max_pool`: stride, which is the kernel size by default, padding,
        dilation, ceil_mode and layout.

    Raises
    ------
    ValueError, TypeError
        For sizes or options that are valid for no input.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import MaxPool
    >>> layer = MaxPool((2, 2))
    >>> y = layer(np.arange(16.0).reshape(1, 1, 4, 4))
    >>> layer.backward(np.ones_like(y))[0, 0]
    array([[0., 0., 0., 0.],
           [0., 1., 0., 1.],
           [0., 0., 0., 0.],
           [0., 1., 0., 1.]])
    """

    _pool = staticmethod(max_pool)
    _backward = staticmethod(max_pool_backward)

    def __init__(
        self,
        kernel_size: Sizes,
        *,
        memory_limit: MemoryLimit = None,
        **options: Unpack[PoolOptions],
    ) -> None:
        kernel = kernel_of(kernel_size, self.rank)
        _check_windows(kernel, options, PoolOptions)
        super().__init__(kernel, memory_limit=memory_limit, **options)


class MaxPool1d(MaxPool, rank=1):
    """`MaxPool` over one spatial axis: x (N, C, L).

    >>> MaxPool1d(2)(np.zeros((1, 2, 8))).shape
    (1, 2, 4)
    """


class MaxPool2d(MaxPool, rank=2):
    """`MaxPool` over two spatial axes: x (N, C, H, W).

    >>> MaxPool2d(2)(np.zeros((1, 2, 8, 6))).shape
    (1, 2, 4, 3)
    """


class MaxPool3d(MaxPool, rank=3):
    """`MaxPool` over three spatial axes: x (N, C, D, H, W).

    >>> MaxPool3d((1, 2, 2))(np.zeros((1, 2, 4, 8, 6))).shape
    (1, 2, 4, 4, 3)
    """


class AvgPool(_Means, Ranked):
    """`cuconv.avg_pool` as a layer, over one to three spatial axes.

    Parameters
    ----------
    kernel_size
        Taps along each spatial axis; their number gives the rank.  `AvgPool1d`,
        `AvgPool2d` and `AvgPool3d` have a fixed rank and take a single number too.
    memory_limit, **options
        As for `cuconv.avg_pool`: stride, which is the kernel size by default, padding,
        dilation, ceil_mode, count_include_pad, divisor_override and layout.

    Raises
    ------
    ValueError, TypeError
        For sizes or options that are valid for no input.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import AvgPool
    >>> layer = AvgPool((3,), stride=2, padding=1, count_include_pad=False)
    >>> y = layer(np.array([[[1.0, 2.0, 3.0, 4.0]]]))
    >>> y, layer.backward(np.ones_like(y))
    (array([[[1.5, 3. ]]]), array([[[0.5       , 0.83333333, 0.33333333, 0.33333333]]]))
    """

    _pool = staticmethod(avg_pool)
    _backward = staticmethod(avg_pool_backward)

    def __init__(
        self,
        kernel_size: Sizes,
        *,
        memory_limit: MemoryLimit = None,
        **options: Unpack[MeanOptions],
    ) -> None:
        kernel = kernel_of(kernel_size, self.rank)
        _check_windows(kernel, options, MeanOptions)
        divided_by(options)
        super().__init__(kernel, memory_limit=memory_limit, **options)


class AvgPool1d(AvgPool, rank=1):
    """`AvgPool` over one spatial axis: x (N, C, L).

    >>> AvgPool1d(2)(np.zeros((1, 2, 8))).shape
    (1, 2, 4)
    """


class AvgPool2d(AvgPool, rank=2):
    """`AvgPool` over two spatial axes: x (N, C, H, W).

    >>> AvgPool2d(2)(np.zeros((1, 2, 8, 6))).shape
    (1, 2, 4, 3)
    """


class AvgPool3d(AvgPool, rank=3):
    """`AvgPool` over three spatial axes: x (N, C, D, H, W).

    >>> AvgPool3d((1, 2, 2))(np.zeros((1, 2, 4, 8, 6))).shape
    (1, 2, 4, 4, 3)
    """


class _Adaptive(_Pool):
    """The options of adaptive pooling."""

    def __init__(
        self,
        output_size: OutputSize,
        *,
        layout: str = "channels_first",
        memory_limit: MemoryLimit = None,
    ) -> None:
        _check_even(output_size, layout)
        super().__init__(output_size, layout=layout, memory_limit=memory_limit)


class AdaptiveMaxPool(_Maxima, _Adaptive):
    """`cuconv.adaptive_max_pool` as a layer: maxima of a given number of windows.

    Parameters
    ----------
    output_size
        Windows along each axis: one number for a batched input, or one for each axis;
        None keeps the size of an axis.
    layout, memory_limit
        As for `cuconv.adaptive_max_pool`.

    Raises
    ------
    ValueError, TypeError
        For sizes or options that are valid for no input.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import AdaptiveMaxPool
    >>> AdaptiveMaxPool((2, None))(np.zeros((1, 3, 7, 9))).shape
    (1, 3, 2, 9)
    """

    _pool = staticmethod(adaptive_max_pool)
    _backward = staticmethod(adaptive_max_pool_backward)


class AdaptiveAvgPool(_Means, _Adaptive):
    """`cuconv.adaptive_avg_pool` as a layer: means of a given number of windows.

    Parameters
    ----------
    output_size
        Windows along each axis: one number for a batched input, or one for each axis;
        None keeps the size of an axis.
    layout, memory_limit
        As for `cuconv.adaptive_avg_pool`.

    Raises
    ------
    ValueError, TypeError
        For sizes or options that are valid for no input.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import AdaptiveAvgPool
    >>> AdaptiveAvgPool(3)(np.arange(7.0).reshape(1, 1, 7))
    array([[[1., 3., 5.]]])
    """

    _pool = staticmethod(adaptive_avg_pool)
    _backward = staticmethod(adaptive_avg_pool_backward)


class _Global(_Pool):
    """The options of global pooling."""

    def __init__(
        self,
        *,
        batched: bool = True,
        layout: str = "channels_first",
        memory_limit: MemoryLimit = None,
    ) -> None:
        channels_are_first(layout)
        super().__init__(batched=batched, layout=layout, memory_limit=memory_limit)


class GlobalMaxPool(_Maxima, _Global):
    """`cuconv.global_max_pool` as a layer: the largest value of every plane.

    Parameters
    ----------
    batched
        Whether inputs have a batch axis.
    layout, memory_limit
        As for `cuconv.global_max_pool`.

    Raises
    ------
    ValueError, TypeError
        For options that are valid for no input.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import GlobalMaxPool
    >>> GlobalMaxPool()(np.arange(12.0).reshape(1, 2, 6))
    array([[[ 5.],
            [11.]]])
    """

    _pool = staticmethod(global_max_pool)
    _backward = staticmethod(global_max_pool_backward)


class GlobalAvgPool(_Means, _Global):
    """`cuconv.global_avg_pool` as a layer: the mean of every plane.

    Parameters
    ----------
    batched
        Whether inputs have a batch axis.
    layout, memory_limit
        As for `cuconv.global_avg_pool`.

    Raises
    ------
    ValueError, TypeError
        For options that are valid for no input.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import GlobalAvgPool
    >>> layer = GlobalAvgPool()
    >>> layer(np.array([[[1.0, 2.0, 3.0, 6.0]]])), layer.backward(np.ones((1, 1, 1)))
    (array([[[3.]]]), array([[[0.25, 0.25, 0.25, 0.25]]]))
    """

    _pool = staticmethod(global_avg_pool)
    _backward = staticmethod(global_avg_pool_backward)


class MaxUnpool(Layer):
    """The reverse of a layer of maxima: put values where they were, zeros elsewhere.

    Where windows overlap, values for one element are added up; see `cuconv.max_unpool`.

    Parameters
    ----------
    pool
        A layer of maxima.  Its last forward call gives the indices and the size.

    Raises
    ------
    TypeError
        If ``pool`` is no such layer.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.layers import MaxPool1d, MaxUnpool
    >>> pool = MaxPool1d(2)
    >>> up = MaxUnpool(pool)
    >>> up(pool(np.array([[[1.0, 5.0, 4.0, 2.0, 3.0]]])))
    array([[[0., 5., 4., 0., 0.]]])
    >>> up.backward(np.array([[[1.0, 2.0, 3.0, 4.0, 5.0]]]))
    array([[[2., 3.]]])
    """

    def __init__(self, pool: Layer) -> None:
        if not isinstance(pool, _Maxima):
            raise TypeError(f"pool must be a layer of maxima, as MaxPool; got {pool!r}")
        super().__init__()
        self._pool = pool
        self._sizes = (pool,)

    def forward(self, x: Array) -> Array:
        """Put values where the maxima of the last call of the pooling layer were.

        Parameters
        ----------
        x
            In the shape of the output of that call.

        Returns
        -------
        array
            In the shape of its input, and of the type of ``x``.

        Raises
        ------
        RuntimeError
            If there was no such call.
        ValueError, TypeError, MemoryLimitError
            As `cuconv.max_unpool` does.
        """
        y = self._pool.backward(x)
        self._x = self._pool.indices
        return y

    def backward(self, dy: Array, *, needs_input: bool = True) -> Any:
        """Compute the gradient for the input of the last forward call.

        Parameters
        ----------
        dy
            Gradient for the output, in its shape.
        needs_input
            Whether to compute anything: there are no other gradients.

        Returns
        -------
        array or None
            The elements of ``dy`` where the values were put; None if not needed.

        Raises
        ------
        RuntimeError
            If there was no forward call.
        ValueError, TypeError, MemoryLimitError
            As `cuconv.max_pool` does.
        """
        indices = self._kept()
        return self._pool.take(dy, indices) if needs_input else None


def _check_windows(kernel: tuple[int, ...], options: Any, kind: type) -> None:
    """Raise if windows fit into no input, however large it is."""
    _check_rank("kernel_size", kernel)
    window_geometry((ENDLESS,) * (len(kernel) + 1), kernel, options, kind)


def _check_even(output_size: OutputSize, layout: str) -> None:
    first = channels_are_first(layout)
    sizes: tuple[Any, ...] = (output_size,)
    if isinstance(output_size, Iterable):
        sizes = tuple(output_size)
    elif not layout.startswith("channels"):
        sizes *= len(layout) - 2
    _check_rank("output_size", sizes)
    cells = tuple(1 if windows is None else ENDLESS for windows in sizes)
    shape = (1, *cells) if first else (*cells, 1)
    WindowGeometry.of_even(shape, sizes, layout=layout)


def _check_rank(name: str, sizes: tuple[Any, ...]) -> None:
    if not 1 <= len(sizes) <= MOST_AXES:
        raise ValueError(
            f"{name} has {len(sizes)} values; pooling takes 1 … {MOST_AXES} axes"
        )
