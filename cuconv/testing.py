"""Slow, independent reference implementations, and checks of results.

The references are scalar loops over Python numbers and share no code with the library:
they count windows where the library computes with a formula.  They take NumPy and CuPy
arrays and return NumPy arrays: complex128 if an array is complex, int64 if all are
integers (exact, wrapped modulo 2^64 as in NumPy), else float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, product
from typing import Any, NamedTuple, TypeAlias, TypedDict, Unpack

import numpy as np

from cuconv.arrays import Array, DType, array_module
from cuconv.options import spells_out

Host: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Index: TypeAlias = tuple[int, ...]
Sizes: TypeAlias = int | Sequence[int]
Padding: TypeAlias = int | str | Sequence[int | Sequence[int]]


class _ConvOptions(TypedDict, total=False):
    stride: Sizes
    padding: Padding
    dilation: Sizes
    groups: int
    layout: str
    padding_mode: str
    input_dilation: Sizes
    batch_groups: int
    flip_kernel: bool
    cover_all: bool


class _TransposedOptions(TypedDict, total=False):
    stride: Sizes
    padding: Padding
    output_padding: Sizes
    output_size: Sizes | None
    dilation: Sizes
    groups: int
    layout: str
    flip_kernel: bool


_DEFAULTS = {
    **dict.fromkeys(("stride", "dilation", "groups", "input_dilation"), 1),
    "padding": 0,
    "output_padding": 0,
    "output_size": None,
    "batch_groups": 1,
    "layout": "channels_first",
    "padding_mode": "zeros",
    "flip_kernel": False,
    "cover_all": False,
}
_CONV_DEFAULTS, _TRANSPOSED_DEFAULTS = (
    {name: _DEFAULTS[name] for name in options.__annotations__}
    for options in (_ConvOptions, _TransposedOptions)
)


@spells_out(_CONV_DEFAULTS)
def conv_reference(
    x: Array,
    w: Array,
    bias: Array | None = None,
    **options: Unpack[_ConvOptions],
) -> Host:
    """Convolve as `cuconv.conv` does, by seven loops over scalars.

    Parameters
    ----------
    x
        Input, (N, C, *spatial), or (C, *spatial).
    w
        Filters, (K, C / groups, *kernel).
    bias
        (K,).
    stride, padding, dilation, groups, layout
        As for `cuconv.conv`.
    padding_mode, input_dilation, batch_groups, flip_kernel, cover_all
        As for `cuconv.conv`.

    Returns
    -------
    numpy.ndarray
        (N, K, *out), in complex128, int64 or float64.

    Raises
    ------
    ValueError
        If the channels do not match.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.testing import conv_reference
    >>> conv_reference(np.arange(6).reshape(1, 1, 6), np.array([[[-1, 0, 1]]]))
    array([[[2, 2, 2, 2]]])
    """
    return _forward(_Loops.of, x, w, bias, {**_CONV_DEFAULTS, **options})


@spells_out(_CONV_DEFAULTS)
def conv_input_grad_reference(
    dy: Array,
    w: Array,
    x_shape: Sequence[int],
    **options: Unpack[_ConvOptions],
) -> Host:
    """The gradient of a convolution for its input, by loops over scalars.

    Parameters
    ----------
    dy
        Gradient for the output, (N, K, *out).
    w
        Filters, (K, C / groups, *kernel); conjugated where complex, as in PyTorch.
    x_shape
        Shape of the input.
    stride, padding, dilation, groups, layout
        As for `cuconv.conv`.
    padding_mode, input_dilation, batch_groups, flip_kernel, cover_all
        As for `cuconv.conv`.

    Returns
    -------
    numpy.ndarray
        Of shape ``x_shape``, in complex128, int64 or float64.

    Raises
    ------
    ValueError
        If the channels do not match, or ``dy`` has not the shape of the output.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.testing import conv_input_grad_reference
    >>> dy, w = np.ones((1, 1, 3)), np.ones((1, 1, 2))
    >>> conv_input_grad_reference(dy, w, (1, 1, 4))
    array([[[1., 2., 2., 1.]]])
    """
    return _input_grad(_Loops.of, dy, w, x_shape, {**_CONV_DEFAULTS, **options})


@spells_out(_CONV_DEFAULTS)
def conv_weight_grad_reference(
    dy: Array,
    x: Array,
    w_shape: Sequence[int],
    **options: Unpack[_ConvOptions],
) -> Host:
    """The gradient of a convolution for its weights, by loops over scalars.

    Parameters
    ----------
    dy
        Gradient for the output, (N, K, *out).
    x
        Input, (N, C, *spatial); conjugated where complex, as in PyTorch.
    w_shape
        Shape of the weights, (K, C / groups, *kernel).
    stride, padding, dilation, groups, layout
        As for `cuconv.conv`.
    padding_mode, input_dilation, batch_groups, flip_kernel, cover_all
        As for `cuconv.conv`.

    Returns
    -------
    numpy.ndarray
        Of shape ``w_shape``, in complex128, int64 or float64.

    Raises
    ------
    ValueError
        If the channels do not match, or ``dy`` has not the shape of the output.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.testing import conv_weight_grad_reference
    >>> dy, x = np.ones((1, 1, 3)), np.arange(4.0).reshape(1, 1, 4)
    >>> conv_weight_grad_reference(dy, x, (1, 1, 2))
    array([[[3., 6.]]])
    """
    return _weight_grad(_Loops.of, dy, x, w_shape, {**_CONV_DEFAULTS, **options})


@spells_out(_TRANSPOSED_DEFAULTS)
def conv_transpose_reference(
    x: Array,
    w: Array,
    bias: Array | None = None,
    **options: Unpack[_TransposedOptions],
) -> Host:
    """Convolve as `cuconv.conv_transpose` does, by loops over scalars.

    Every element of x, times every weight of its channel, is added to an unbounded
    array; padding and output_padding select the part of it that is the result.

    Parameters
    ----------
    x
        Input, (N, C, *spatial), or (C, *spatial).
    w
        Weights, (C, K / groups, *kernel).
    bias
        (K,).
    stride, padding, output_padding, output_size, dilation, groups, layout, flip_kernel
        As for `cuconv.conv_transpose`.

    Returns
    -------
    numpy.ndarray
        (N, K, *out), in complex128, int64 or float64.

    Raises
    ------
    ValueError
        If the channels do not match.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.testing import conv_transpose_reference
    >>> conv_transpose_reference(np.array([[[1, 2]]]), np.array([[[1, 10, 100]]]))
    array([[[  1,  12, 120, 200]]])
    """
    return _forward(_Spread.of, x, w, bias, {**_TRANSPOSED_DEFAULTS, **options})


@spells_out(_TRANSPOSED_DEFAULTS)
def conv_transpose_input_grad_reference(
    dy: Array,
    w: Array,
    x_shape: Sequence[int],
    **options: Unpack[_TransposedOptions],
) -> Host:
    """The gradient of `conv_transpose_reference` for its input, by the same loops.

    Parameters
    ----------
    dy
        Gradient for the result, (N, K, *out).
    w
        Weights, (C, K / groups, *kernel); conjugated where complex, as in PyTorch.
    x_shape
        Shape of the input.
    stride, padding, output_padding, output_size, dilation, groups, layout, flip_kernel
        As for `cuconv.conv_transpose`.

    Returns
    -------
    numpy.ndarray
        Of shape ``x_shape``, in complex128, int64 or float64.

    Raises
    ------
    ValueError
        If the channels do not match, or ``dy`` has not the shape of the result.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.testing import conv_transpose_input_grad_reference
    >>> dy, w = np.arange(4), np.array([[[1, 10, 100]]])
    >>> conv_transpose_input_grad_reference(dy.reshape(1, 1, 4), w, (1, 1, 2))
    array([[[210, 321]]])
    """
    return _input_grad(_Spread.of, dy, w, x_shape, {**_TRANSPOSED_DEFAULTS, **options})


@spells_out(_TRANSPOSED_DEFAULTS)
def conv_transpose_weight_grad_reference(
    dy: Array,
    x: Array,
    w_shape: Sequence[int],
    **options: Unpack[_TransposedOptions],
) -> Host:
    """The gradient of `conv_transpose_reference` for its weights, by the same loops.

    Parameters
    ----------
    dy
        Gradient for the result, (N, K, *out).
    x
        Input, (N, C, *spatial); conjugated where complex, as in PyTorch.
    w_shape
        Shape of the weights.
    stride, padding, output_padding, output_size, dilation, groups, layout, flip_kernel
        As for `cuconv.conv_transpose`.

    Returns
    -------
    numpy.ndarray
        Of shape ``w_shape``, in complex128, int64 or float64.

    Raises
    ------
    ValueError
        If the channels do not match, or ``dy`` has not the shape of the result.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.testing import conv_transpose_weight_grad_reference
    >>> dy, x = np.arange(4), np.array([[[1, 10]]])
    >>> conv_transpose_weight_grad_reference(dy.reshape(1, 1, 4), x, (1, 1, 3))
    array([[[10, 21, 32]]])
    """
    return _weight_grad(_Spread.of, dy, x, w_shape, {**_TRANSPOSED_DEFAULTS, **options})


# From shapes of x and w and the options to the products of a convolution.
_LoopsOf: TypeAlias = "Callable[..., _Loops | _Spread]"


def _forward(
    loops_of: _LoopsOf, x: Array, w: Array, bias: Array | None, options: Any
) -> Host:
    dtype, (inputs, weights, *offset) = _as_numbers(x, w, bias)
    view = _View.of(options, batched=x.ndim == w.ndim)
    images, filters = view.of_images(inputs), view.of_filters(weights)
    loops = loops_of(images.shape, filters.shape, **options)
    y = np.zeros(loops.y_shape, dtype=object)
    for each in offset:
        y += each.reshape(-1, *(1,) * len(loops.out))
    for at_y, at_w, at_x in loops:
        y[at_y] += images[at_x] * filters[at_w]
    return _settled(view.back(y), dtype)


def _input_grad(
    loops_of: _LoopsOf, dy: Array, w: Array, x_shape: Sequence[int], options: Any
) -> Host:
    dtype, (gradient, weights) = _as_numbers(dy, w)
    view = _View.of(options, batched=len(x_shape) == w.ndim)
    dx = np.zeros(x_shape, dtype=object)
    cells, filters = view.of_images(dx), view.of_filters(weights)
    loops = loops_of(cells.shape, filters.shape, **options)
    outputs = loops.checked(view.of_images(gradient))
    for at_y, at_w, at_x in loops:
        cells[at_x] += outputs[at_y] * filters[at_w].conjugate()
    return _settled(dx, dtype)


def _weight_grad(
    loops_of: _LoopsOf, dy: Array, x: Array, w_shape: Sequence[int], options: Any
) -> Host:
    dtype, (gradient, inputs) = _as_numbers(dy, x)
    view = _View.of(options, batched=x.ndim == len(w_shape))
    dw = np.zeros(tuple(w_shape), dtype=object)
    images, weights = view.of_images(inputs), view.of_filters(dw)
    loops = loops_of(images.shape, weights.shape, **options)
    outputs = loops.checked(view.of_images(gradient))
    for at_y, at_w, at_x in loops:
        weights[at_w] += outputs[at_y] * images[at_x].conjugate()
    return _settled(dw, dtype)


class _View(NamedTuple):
    """View any layout as (N, channels, *spatial) and (K, C / groups, *kernel)."""

    layout: str
    batched: bool
    flips: bool = False

    @classmethod
    def of(cls, options: dict[str, Any], *, batched: bool) -> "_View":
        """Take what it sees to out of the options."""
        return cls(options.pop("layout"), batched, options.pop("flip_kernel"))

    @property
    def _channels_last(self) -> bool:
        return self.layout.lower().endswith(("channels_last", "c"))

    def of_images(self, array: Host) -> Host:
        array = array if self.batched else array[np.newaxis]
        return np.moveaxis(array, -1, 1) if self._channels_last else array

    def of_filters(self, array: Host) -> Host:
        if self._channels_last:
            array = np.moveaxis(array, (-1, -2), (0, 1))
        return np.flip(array, tuple(range(2, array.ndim))) if self.flips else array

    def back(self, array: Host) -> Host:
        array = np.moveaxis(array, 1, -1) if self._channels_last else array
        return array if self.batched else array[0]


@dataclass(frozen=True)
class _Loops:
    """A convolution: iterating gives the indices of y, w and x of every product."""

    x_shape: Index
    w_shape: Index
    out: Index
    stride: Index
    before: Index
    dilation: Index
    groups: int
    input_dilation: Index
    mode: str
    batch_groups: int

    @classmethod
    def of(
        cls,
        x_shape: Index,
        w_shape: Index,
        *,
        stride: Sizes,
        padding: Padding,
        dilation: Sizes,
        groups: int,
        padding_mode: str,
        input_dilation: Sizes,
        batch_groups: int,
        cover_all: bool,
    ) -> "_Loops":
        if x_shape[1] != w_shape[1] * groups or w_shape[0] % groups:
            raise ValueError(
                f"x {x_shape}, w {w_shape} and groups {groups} do not match"
            )
        if x_shape[0] % batch_groups or w_shape[0] % batch_groups:
            raise ValueError(
                f"x {x_shape}, w {w_shape} and batch_groups {batch_groups} do not match"
            )
        rank = len(w_shape) - 2
        strides, dilations = _each(stride, rank), _each(dilation, rank)
        apart = _each(input_dilation, rank)
        spans = [d * (k - 1) + 1 for d, k in zip(dilations, w_shape[2:], strict=True)]
        sizes = [
            max((n - 1) * d + 1, 0) for n, d in zip(x_shape[2:], apart, strict=True)
        ]
        axes = list(zip(sizes, spans, strides, strict=True))
        if isinstance(padding, str):
            pads = [_word_pads(padding, *axis) for axis in axes]
        else:
            pads = [
                (p, p) if isinstance(p, int) else tuple(p) for p in _each(padding, rank)
            ]
        # Rounded up, a window may lack all elements but one step's first.
        out = tuple(
            len(_starts(size + sum(pad) + (step - 1) * cover_all, span, step))
            for (size, span, step), pad in zip(axes, pads, strict=True)
        )
        before = tuple(pad[0] for pad in pads)
        more = apart, padding_mode, batch_groups
        return cls(x_shape, w_shape, out, strides, before, dilations, groups, *more)

    @property
    def y_shape(self) -> Index:
        return (self.x_shape[0] // self.batch_groups, self.w_shape[0], *self.out)

    def checked(self, y: Host) -> Host:
        if y.shape != self.y_shape:
            raise ValueError(f"dy is {y.shape} and the output {self.y_shape}")
        return y

    def __iter__(self) -> Iterator[tuple[Index, Index, Index]]:
        filters, channels = self.w_shape[:2]
        meetings = list(self._meetings())
        for n in range(self.y_shape[0]):
            for k in range(filters):
                first = k // (filters // self.groups) * channels
                image = k // (filters // self.batch_groups) * self.y_shape[0] + n
                for c in range(channels):
                    for o, t, i in meetings:
                        yield (n, k, *o), (k, c, *t), (image, first + c, *i)

    def _meetings(self) -> Iterator[tuple[Index, Index, Index]]:
        """Output, tap and the input element under it, if there is one."""
        for o in np.ndindex(*self.out):
            for t in np.ndindex(*self.w_shape[2:]):
                each = zip(o, self.stride, t, self.dilation, self.before, strict=True)
                places = [a * s + b * d - before for a, s, b, d, before in each]
                axes = zip(places, self.x_shape[2:], self.input_dilation, strict=True)
                i = tuple(_read(*axis, self.mode) for axis in axes)
                if min(i) >= 0:
                    yield o, t, i


def _read(place: int, size: int, apart: int, mode: str) -> int:
    """The element of x that is read at a padded position; -1 if that is zero."""
    inside = range(size)
    if mode == "zeros":
        return place // apart if place in range(0, size * apart, apart) else -1
    if mode == "replicate":
        return min(max(place, 0), size - 1)
    while place not in inside:
        if mode == "circular":
            place += size if place < 0 else -size
        elif mode == "symmetric":
            place = -1 - place if place < 0 else 2 * size - 1 - place
        elif size == 1:
            place = 0
        else:
            place = -place if place < 0 else 2 * (size - 1) - place
    return place


@dataclass(frozen=True)
class _Spread:
    """A transposed convolution: the indices of y, w and x of every product."""

    x_shape: Index
    w_shape: Index
    stride: Index
    dilation: Index
    groups: int
    before: Index
    out: Index

    @classmethod
    def of(
        cls,
        x_shape: Index,
        w_shape: Index,
        *,
        stride: Sizes,
        padding: Any,
        output_padding: Sizes,
        output_size: Sizes | None,
        dilation: Sizes,
        groups: int,
    ) -> "_Spread":
        if x_shape[1] != w_shape[0] or x_shape[1] % groups:
            raise ValueError(
                f"x {x_shape}, w {w_shape} and groups {groups} do not match"
            )
        rank = len(w_shape) - 2
        steps, dilations = _each(stride, rank), _each(dilation, rank)
        # The part of the unbounded array that is the result.
        found = []
        for axis, extra in enumerate(_each(output_padding, rank)):
            step, cells = steps[axis], x_shape[2 + axis]
            span = dilations[axis] * (w_shape[2 + axis] - 1) + 1
            size = None if output_size is None else _each(output_size, rank)[axis]
            if padding in ("same", "same_lower", "causal"):
                size = cells * step if size is None else size
                # What is added at the end is split too.
                wide = size - extra, span, step
                found.append((_word_pads(padding, *wide, cells)[0], size))
                continue
            if isinstance(padding, str):
                pair = _word_pads(padding, cells, span, step)
            else:
                pair = _each(padding, rank)[axis]
            before, after = (pair, pair) if isinstance(pair, int) else pair
            left = (cells - 1) * step + span - before - after + extra
            found.append((before, left if size is None else size))
        firsts, out = zip(*found, strict=True)
        return cls(x_shape, w_shape, steps, dilations, groups, firsts, out)

    @property
    def y_shape(self) -> Index:
        return (self.x_shape[0], self.w_shape[1] * self.groups, *self.out)

    def checked(self, y: Host) -> Host:
        if y.shape != self.y_shape:
            raise ValueError(f"dy is {y.shape} and the result {self.y_shape}")
        return y

    def __iter__(self) -> Iterator[tuple[Index, Index, Index]]:
        images, channels, *size = self.x_shape
        _, filters, *kernel = self.w_shape
        cells = list(product(np.ndindex(*size), np.ndindex(*kernel)))
        for n, c, k in np.ndindex(images, channels, filters):
            first = c // (channels // self.groups) * filters
            for o, t in cells:
                each = zip(o, self.stride, t, self.dilation, self.before, strict=True)
                i = tuple(a * s + b * d - before for a, s, b, d, before in each)
                if all(0 <= j < size for j, size in zip(i, self.out, strict=True)):
                    yield (n, first + k, *i), (c, k, *t), (n, c, *o)


def _each(value: Any, rank: int) -> tuple[Any, ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank:
        raise ValueError(f"{value} are not {rank} values")
    return values


def _starts(size: int, span: int, step: int) -> range:
    """The positions of windows of ``span`` elements in ``size`` elements."""
    return range(0, size - span + 1, step)


def _word_pads(
    word: str, size: int, span: int, step: int, wanted: int | None = None
) -> tuple[int, int]:
    """The least padding with which the number of windows of a string option fit.

    ``wanted`` is that number, where it does not follow from the size.
    """
    if word == "valid":
        return 0, 0
    if word == "full":
        return span - 1, span - 1  # the outer windows have one element each
    if word == "causal":
        return span - 1, 0  # the first window ends at the first element
    if wanted is None:
        wanted = len(range(0, size, step))
    total = next(p for p in count() if len(_starts(size + p, span, step)) >= wanted)
    more, less = total - total // 2, total // 2
    return {"same": (less, more), "same_lower": (more, less)}[word]


def _as_numbers(*arrays: Array | None) -> tuple[DType, list[Host]]:
    """Arrays of Python's numbers, and the type of a sum of their products."""
    hosts = [_on_host(array) for array in arrays if array is not None]
    kinds = {host.dtype.kind for host in hosts}
    if "c" in kinds:
        wide, final = "complex128", "complex128"
    elif kinds <= set("biu"):
        # Python's integers have no bound; the result is wrapped to 64 bits at the end.
        wide, final = "object", "int64"
    else:
        wide, final = "float64", "float64"
    return np.dtype(final), [host.astype(wide).astype(object) for host in hosts]


def _settled(result: Host, dtype: DType) -> Host:
    """Python's numbers back in one type, integers modulo 2^64."""
    if dtype.kind == "i":
        return np.mod(result, 2**64).astype(np.uint64).view(np.int64)
    return result.astype(dtype, order="C")


def _on_host(array: Array) -> Host:
    if isinstance(array, np.generic):
        return np.asarray(array)
    host: Host = array if array_module(array) is np else array.get()
    return host


class PoolReference(NamedTuple):
    """The result of `pool_reference`: values, and flat indices of maxima."""

    y: Host
    indices: Host


def pool_reference(x: Array, kernel_size: Sequence[int] = (), **options: Any) -> Any:
    """Pool as `cuconv.max_pool` and similar functions do, by loops over scalars.

    Parameters
    ----------
    x
        Input, (N, C, *spatial), or (C, *spatial).
    kernel_size
        Taps along each axis; empty if ``output_size`` is given.
    **options
        ``kind``, one of ``"max"``, ``"mean"``, ``"norm"``; ``stride``, ``padding``,
        ``dilation``, ``ceil_mode``, ``cover_all``, ``count_include_pad``,
        ``divisor_override``, ``norm_type`` and ``layout`` as in the library; and
        ``output_size`` for adaptive pooling, one number for each axis.

    Returns
    -------
    PoolReference
        Values in complex128 or float64, for maxima of integers in int64, and the index
        of every maximum: the first of equal ones, -1 if there is none.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.testing import pool_reference
    >>> pool_reference(np.array([[[3, 1, 4, 1, 5]]]), (2,), stride=(1,)).y
    array([[[3, 4, 4, 5]]])
    """
    pool = _Pool(**options)
    images, axes = pool.of(x, kernel_size)
    shape = (*images.shape[:2], *map(len, axes))
    exact = pool.kind == "max" and x.dtype.kind in "biu"
    kind = "c" if x.dtype.kind == "c" else "i" if exact else "f"
    y, indices = np.zeros(shape, dtype=f"{kind}{16 if kind == 'c' else 8}"), []
    for at in np.ndindex(*shape):
        windows = [axis[o] for axis, o in zip(axes, at[2:], strict=True)]
        value, index = pool.value(images[at[:2]], windows)
        y[at] = value
        indices.append(index)
    places = np.array(indices, dtype=np.int64).reshape(shape)
    view = _View(pool.layout, batched=x.ndim == len(axes) + 2)
    return PoolReference(view.back(y), view.back(places))


def pool_grad_reference(
    dy: Array, x: Array, kernel_size: Sequence[int] = (), **options: Any
) -> Host:
    """The gradient of pooling for its input, by loops over scalars.

    Parameters
    ----------
    dy
        Gradient for the output.
    x
        The input.
    kernel_size, **options
        As for `pool_reference`.

    Returns
    -------
    numpy.ndarray
        Of the shape of ``x``, in complex128 or float64.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.testing import pool_grad_reference
    >>> dy, x = np.ones((1, 1, 4)), np.array([[[3, 1, 4, 1, 5]]])
    >>> pool_grad_reference(dy, x, (2,), stride=(1,))
    array([[[1., 0., 2., 0., 1.]]])
    """
    pool = _Pool(**options)
    images, axes = pool.of(x, kernel_size)
    view = _View(pool.layout, batched=x.ndim == len(axes) + 2)
    outputs = view.of_images(_wide(_on_host(dy)))
    dx = np.zeros(images.shape, dtype=outputs.dtype)
    for at in np.ndindex(*outputs.shape):
        windows = [axis[o] for axis, o in zip(axes, at[2:], strict=True)]
        for cell, slope in pool.slopes(images[at[:2]], windows):
            dx[(*at[:2], *cell)] += outputs[at] * slope
    return view.back(dx)


class _Window(NamedTuple):
    """The elements under one window along one axis, and the divisor of a mean."""

    cells: list[int]
    counted: int


@dataclass(frozen=True)
class _Pool:
    """Options of a pooling, and its result for one window."""

    kind: str = "max"
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: bool = False
    cover_all: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None
    norm_type: float = 2
    layout: str = "channels_first"
    output_size: Sequence[int] = ()

    def of(self, x: Array, kernel: Sequence[int]) -> tuple[Host, list[list[_Window]]]:
        """The images of an array, and the windows along every axis of them."""
        rank = len(kernel or self.output_size)
        host = _on_host(x)
        images = _View(self.layout, batched=x.ndim == rank + 2).of_images(host)
        sizes = images.shape[2:]
        if self.output_size:
            pairs = zip(sizes, self.output_size, strict=True)
            return images, [_even_windows(*pair) for pair in pairs]
        steps = _each(kernel if self.stride is None else self.stride, rank)
        dilations = _each(self.dilation, rank)
        spans = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
        if isinstance(self.padding, str):
            each = zip(sizes, spans, steps, strict=True)
            pads = [_word_pads(self.padding, *axis) for axis in each]
        else:
            given = _each(self.padding, rank)
            pads = [(p, p) if isinstance(p, int) else p for p in given]
        whole = zip(sizes, kernel, steps, dilations, pads, strict=True)
        return images, [self._windows(*axis) for axis in whole]

    def _windows(
        self, size: int, taps: int, step: int, apart: int, pads: tuple[int, int]
    ) -> list[_Window]:
        """Slide a window along an axis until its end."""
        found: list[_Window] = []
        end, start = size + pads[1], -pads[0]
        while True:
            under = [start + tap * apart for tap in range(taps)]
            left_over = under[-1] - step < end - 1
            rounds = self.cover_all or (self.ceil_mode and start < size)
            if under[-1] >= end and not (left_over and rounds):
                return found
            cells = [i for i in under if 0 <= i < min(size, end)]
            padded = [i for i in under if i < end]
            found.append(
                _Window(cells, len(padded if self.count_include_pad else cells))
            )
            start += step

    def value(self, plane: Host, windows: list[_Window]) -> tuple[Any, int]:
        """The value of one window, and the index of its maximum."""
        cells = list(product(*(window.cells for window in windows)))
        values = [plane[cell].item() for cell in cells]
        if self.kind == "mean":
            return sum(values) / self._divisor(windows), -1
        if self.kind == "norm":
            # Of numbers below 2, whose powers do not overflow; the division is exact.
            scale = 2.0 ** (math.frexp(max(map(abs, values), default=0))[1] - 1)
            powers = [(abs(value) / scale) ** self.norm_type for value in values]
            return scale * sum(powers) ** (1 / self.norm_type), -1
        best = self._best(values)
        if best is None:
            return _least(plane.dtype), -1
        return values[best], int(np.ravel_multi_index(cells[best], plane.shape))

    def slopes(
        self, plane: Host, windows: list[_Window]
    ) -> Iterator[tuple[Index, float]]:
        """The elements of one window, and the derivatives of its value for them."""
        cells = list(product(*(window.cells for window in windows)))
        values = [plane[cell].item() for cell in cells]
        if self.kind == "max":
            best = self._best(values)
            yield from [] if best is None else [(cells[best], 1.0)]
            return
        norm = self.value(plane, windows)[0]
        for cell, value in zip(cells, values, strict=True):
            if self.kind == "mean":
                yield cell, 1 / self._divisor(windows)
            elif value:
                slope = (abs(value) / norm) ** (self.norm_type - 1)
                yield cell, slope if value > 0 else -slope

    def _best(self, values: list[Any]) -> int | None:
        for index, value in enumerate(values):
            if value != value:  # noqa: PLR0124 - a NaN
                return index
        return values.index(max(values)) if values else None

    def _divisor(self, windows: list[_Window]) -> int:
        if self.divisor_override is not None:
            return self.divisor_override
        counted = 1
        for window in windows:
            counted *= window.counted
        return counted or 1


def _even_windows(size: int, windows: int) -> list[_Window]:
    """Window i has the elements that overlap the i-th of equal parts of the axis."""
    found = []
    for i in range(windows):
        low, high = i * size, (i + 1) * size  # in units of 1 / windows of an element
        cells = [
            c for c in range(size) if c * windows < high and (c + 1) * windows > low
        ]
        found.append(_Window(cells, len(cells)))
    return found


def _least(dtype: DType) -> Any:
    if dtype.kind in "iu":
        return int(np.iinfo(dtype).min)
    return 0 if dtype.kind == "b" else -np.inf


def numerical_gradient(
    function: Callable[[Array], Any], array: Array, *, step: float = 2.0**-17
) -> Array:
    """The gradient of a scalar function by central differences.

    Parameters
    ----------
    function
        Takes a float64 or complex128 array like ``array``, returns a real number.
    array
        The point of differentiation, of any shape; it is not changed.
    step
        The step to each side.  The default is near the cube root of float64's
        spacing at 1, where truncation and rounding balance.

    Returns
    -------
    array
        Of the shape and module of ``array``, in float64; for complex arrays in
        complex128, the derivative along the real axis plus i times the one along the
        imaginary axis, which is PyTorch's convention.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.testing import numerical_gradient
    >>> numerical_gradient(lambda a: (a**2).sum(), np.array([1.0, -3.0])).round(6)
    array([ 2., -6.])
    """
    xp = array_module(array)
    is_complex = array.dtype.kind == "c"
    point = array.astype(np.complex128 if is_complex else np.float64)
    gradient = np.zeros(point.shape, dtype=point.dtype)
    directions = (1.0, 1.0j) if is_complex else (1.0,)
    for index in np.ndindex(point.shape):
        here = point[index].item()
        for direction in directions:
            point[index] = here + step * direction
            above = float(function(point))
            point[index] = here - step * direction
            below = float(function(point))
            gradient[index] += direction * (above - below) / (2 * step)
        point[index] = here
    return xp.asarray(gradient)


def check_adjoint(
    forward: Callable[[Array], Array],
    adjoint: Callable[[Array], Array],
    x_shape: Sequence[int],
    y_shape: Sequence[int],
    *,
    dtype: Any = np.float64,
    xp: Any = np,
    rtol: float = 0.0,
    seed: int = 0,
) -> None:
    """Check that ⟨forward(x), y⟩ = ⟨x, adjoint(y)⟩ for random x and y.

    The arrays contain small integers, so a convolution satisfies the identity exactly.
    For complex numbers, ⟨a, b⟩ = Σ a · b̄.

    Parameters
    ----------
    forward, adjoint
        Linear functions from arrays of ``x_shape`` to arrays of ``y_shape``, and back.
    x_shape, y_shape
        The two shapes.
    dtype
        Type of the arrays that they are given.
    xp
        Module of the arrays.
    rtol
        Allowed difference, relative to ‖forward(x)‖ · ‖y‖.
    seed
        For the random numbers; five pairs (x, y) are tried.

    Raises
    ------
    AssertionError
        If the two sides differ, or a result has the wrong shape; the message has both
        numbers.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> from cuconv.testing import check_adjoint
    >>> w, x_shape = np.ones((2, 3, 2)), (1, 3, 8)
    >>> check_adjoint(
    ...     lambda x: cuconv.conv(x, w, stride=3),
    ...     lambda dy: cuconv.conv_input_grad(dy, w, x_shape, stride=3),
    ...     x_shape,
    ...     (1, 2, 3),
    ... )
    """
    rng = np.random.default_rng(seed)
    for _ in range(5):
        x = _small_integers(rng, x_shape, dtype)
        y = _small_integers(rng, y_shape, dtype)
        ahead = _checked(forward(xp.asarray(x)), y.shape)
        back = _checked(adjoint(xp.asarray(y)), x.shape)
        left = complex(np.vdot(_wide(y), ahead))
        right = complex(np.vdot(back, _wide(x)))
        size = float(np.linalg.norm(ahead) * np.linalg.norm(_wide(y).ravel()))
        # Written so that NaN fails.
        if not abs(left - right) <= rtol * size:
            raise AssertionError(
                f"⟨forward(x), y⟩ is {left} and ⟨x, adjoint(y)⟩ is {right}"
            )


def _checked(array: Array, shape: Index) -> Host:
    """The array, flattened, on the host and in a wide type."""
    host = _on_host(array)
    _check_shape(host, shape)
    return _wide(host).ravel()


def _small_integers(rng: np.random.Generator, shape: Sequence[int], dtype: Any) -> Host:
    kind = np.dtype(dtype).kind
    values = rng.integers(
        0 if kind in "bu" else -3, 2 if kind == "b" else 4, tuple(shape)
    )
    if kind == "c":
        return (values + 1j * rng.integers(-3, 4, values.shape)).astype(dtype)
    return values.astype(dtype)


def _wide(array: Host) -> Host:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def assert_close(
    actual: Array,
    expected: Array,
    *,
    rtol: float = 1e-7,
    atol: float = 0.0,
    equal_nan: bool = False,
    dtype: Any = None,
) -> None:
    """Check that |actual - expected| <= atol + rtol · |expected| in every element.

    Shapes must be equal: nothing is broadcast.  A NaN is close to no number, and an
    infinity only to itself.

    Parameters
    ----------
    actual, expected
        NumPy or CuPy arrays, also one of each.
    rtol, atol
        Relative and absolute tolerance.
    equal_nan
        Whether a NaN is close to a NaN.
    dtype
        The type that ``actual`` must have, if it matters.

    Raises
    ------
    AssertionError
        Naming the worst index, both numbers, and ‖actual - expected‖ / ‖expected‖.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.testing import assert_close
    >>> assert_close(np.float32([1, 2]), np.array([1.0, 2.0 + 1e-9]))
    >>> assert_close(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    Traceback (most recent call last):
    AssertionError: 1 of 2 elements differ, most at (1,): actual 2.0, expected 4.0; \
relative error 0.485
    """
    a, b = _comparable(actual, expected, dtype)
    error = _distance(a, b)
    with np.errstate(all="ignore"):
        close = np.isfinite(b) & (error <= atol + rtol * np.abs(_wide(b)))
    close |= a == b
    if equal_nan:
        close |= np.isnan(a) & np.isnan(b)
    _demand(close, error, a, b)


def assert_equal(actual: Array, expected: Array, *, dtype: Any = None) -> None:
    """Check that two arrays have the same shape and equal elements.

    Parameters
    ----------
    actual, expected
        NumPy or CuPy arrays, also one of each, of any types: numbers are compared.
    dtype
        The type that ``actual`` must have, if it matters.

    Raises
    ------
    AssertionError
        As `assert_close` does.  NaN equals nothing.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.testing import assert_equal
    >>> assert_equal(np.float32([1, 2]), np.array([1, 2]))
    """
    a, b = _comparable(actual, expected, dtype)
    _demand(np.equal(a, b), _distance(a, b), a, b)


def relative_error(actual: Array, expected: Array) -> float:
    """‖actual - expected‖ / ‖expected‖ over all elements, NaN if either has one.

    Parameters
    ----------
    actual, expected
        NumPy or CuPy arrays of one shape, also one of each.

    Returns
    -------
    float
        0 where both norms are, infinite where only the expected one is.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.testing import relative_error
    >>> relative_error(np.array([3.0, 4.5]), np.array([3.0, 4.0]))
    0.1
    """
    a, b = _comparable(actual, expected, None)
    with np.errstate(all="ignore"):
        error = float(np.linalg.norm((_wide(a) - _wide(b)).ravel()))
        size = float(np.linalg.norm(_wide(b).ravel()))
        return error / size if size else error and error * np.inf


def _comparable(actual: Array, expected: Array, dtype: Any) -> tuple[Host, Host]:
    a, b = _on_host(actual), _on_host(expected)
    _check_shape(a, b.shape)
    if dtype is not None and a.dtype != np.dtype(dtype):
        raise AssertionError(f"actual has type {a.dtype}, not {np.dtype(dtype)}")
    # bfloat16 is not one of NumPy's own types.
    a, b = (c.astype(np.float64) if c.dtype.kind == "V" else c for c in (a, b))
    return a, b


def _check_shape(actual: Host, shape: Index) -> None:
    if actual.shape != shape:
        raise AssertionError(f"actual has shape {actual.shape}, not {shape}")


def _distance(a: Host, b: Host) -> Host:
    """|a - b|, infinite where it is NaN."""
    with np.errstate(all="ignore"):
        distance: Host = np.abs(_wide(a) - _wide(b))
    return np.where(np.isnan(distance), np.inf, distance)


def _demand(fine: Host, error: Host, a: Host, b: Host) -> None:
    if fine.all():
        return
    worst = np.unravel_index(np.argmax(np.where(fine, -1.0, error)), fine.shape)
    where = tuple(int(i) for i in worst)
    raise AssertionError(
        f"{fine.size - int(fine.sum())} of {fine.size} elements differ, "
        f"most at {where}: actual {a[where]}, expected {b[where]}; "
        f"relative error {relative_error(a, b):.3g}"
    )


__all__ = [
    "assert_close",
    "assert_equal",
    "check_adjoint",
    "conv_input_grad_reference",
    "conv_reference",
    "conv_transpose_input_grad_reference",
    "conv_transpose_reference",
    "conv_transpose_weight_grad_reference",
    "conv_weight_grad_reference",
    "numerical_gradient",
    "pool_grad_reference",
    "pool_reference",
    "relative_error",
]
