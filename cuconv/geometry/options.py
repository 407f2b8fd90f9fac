"""Checks of sizes, strides, padding and layout: all errors about shapes."""

import operator
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from cuconv.choices import PaddingWord, check_choice
from cuconv.geometry.axis import Axis, EvenAxis, Range, Ranges, dilated_size

LARGEST_PARAMETER = 2**31 - 1

# With these the output has ceil(size / stride) elements along every axis.
SIZED_WORDS = ("same", "same_lower", "causal")
PADDING_WORDS = ("valid", "full", *SIZED_WORDS)
# ONNX's word for "same".
_SAME_UPPER = "same_upper"

# The value of padding: zero, the element at the mirrored position (without and with the
# edge repeated), the edge, or the element that follows when the input is repeated.
PADDING_MODES = ("zeros", "reflect", "symmetric", "replicate", "circular")

LAYOUTS = {
    "channels_first": True,
    "channels_last": False,
    **dict.fromkeys(("NCL", "NCW", "NCHW", "NCDHW"), True),
    **dict.fromkeys(("NLC", "NWC", "NHWC", "NDHWC"), False),
}

Sizes: TypeAlias = int | Sequence[int]

Padding: TypeAlias = int | PaddingWord | Sequence[int | Sequence[int]]


def as_index(name: str, value: object) -> int:
    """An integer of any library as Python's int."""
    if type(value) is int:
        return value
    try:
        if not isinstance(value, np.bool_):  # NumPy 2.0 takes it for 0 or 1
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    kind = type(value).__name__
    raise TypeError(f"{name} must be made of integers; got {value!r} ({kind})")


def frozen(name: str, value: object) -> object:
    """An option as a hashable value of Python's ints, for cache keys."""
    if type(value) is int or isinstance(value, str):
        return value
    if isinstance(value, (tuple, list)) or getattr(value, "ndim", 0) > 0:
        return tuple(frozen(name, item) for item in value)  # type: ignore[attr-defined]
    return as_index(name, value)


def frozen_padding(padding: object) -> object:
    """``padding`` for cache keys; words are those of `PADDING_WORDS`."""
    if not isinstance(padding, str):
        return frozen("padding", padding)
    known = (*PADDING_WORDS, _SAME_UPPER)
    word = check_choice("padding", padding, known, also="integers or ")
    return "same" if word == _SAME_UPPER else word


def checked_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """A shape as Python's ints, none of them negative."""
    try:
        sizes = tuple(map(operator.index, shape))
    except TypeError:
        own = getattr(shape, "shape", None)
        got = repr(shape) if own is None else f"an array, whose shape is {tuple(own)}"
        raise TypeError(
            f"the shape of {name} must be made of integers; got {got}"
        ) from None
    if min(sizes, default=0) < 0:
        raise ValueError(f"the shape of {name} is {sizes}; sizes cannot be negative")
    return sizes


def per_axis(name: str, value: object, rank: int, least: int) -> tuple[int, ...]:
    """One integer for each spatial axis, each at least ``least``."""
    if isinstance(value, int):
        values: tuple[int, ...] = (value,) * rank
    elif isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        values = value
    else:
        raise TypeError(f"{name} must be an integer or one per axis; got {value!r}")
    if len(values) != rank:
        raise ValueError(f"{name} has {len(values)} values for {rank} spatial axes")
    for axis, item in enumerate(values):
        if not least <= item <= LARGEST_PARAMETER:
            raise ValueError(
                f"{name} of spatial axis {axis} is {item}; "
                f"it must be in {least} … {LARGEST_PARAMETER}"
            )
    return values


def kernel_of_rank(kernel_size: Sizes, rank: int) -> tuple[int, ...]:
    """The taps along each axis, from one number or from one for each."""
    return per_axis("kernel_size", frozen("kernel_size", kernel_size), rank, 1)


def channels_are_first(layout: str) -> bool:
    """True if a layout has the channels before the spatial axes."""
    return LAYOUTS[check_choice("layout", layout, LAYOUTS)]


def _check_layout_rank(layout: str, rank: int) -> None:
    if not layout.casefold().startswith("channels") and len(layout) != rank + 2:
        raise ValueError(
            f"layout {layout!r} has {len(layout) - 2} spatial axes "
            f"and the kernel has {rank}"
        )


def check_axes(axes: int, rank: int) -> None:
    """Raise if x does not have one or two axes beside the spatial ones."""
    if axes not in (rank + 1, rank + 2):
        need = "axis needs" if rank == 1 else "axes need"
        raise ValueError(
            f"x has {axes} axes; {rank} spatial {need} {rank + 2}, "
            f"or {rank + 1} without the batch axis"
        )


class Split(NamedTuple):
    """The shape of x by the meaning of its axes."""

    images: int
    channels: int
    sizes: tuple[int, ...]
    channels_first: bool
    batched: bool


def split_shape(x_shape: tuple[int, ...], rank: int, layout: str) -> Split:
    """The meaning of the axes of x in this layout."""
    channels_first = channels_are_first(layout)
    _check_layout_rank(layout, rank)
    check_axes(len(x_shape), rank)
    batched = len(x_shape) == rank + 2
    images, inner = (x_shape[0], x_shape[1:]) if batched else (1, x_shape)
    channels, sizes = (
        (inner[0], inner[1:]) if channels_first else (inner[-1], inner[:-1])
    )
    return Split(images, channels, sizes, channels_first, batched)


def _check_word_rank(word: object, rank: int) -> None:
    if word == "causal" and rank != 1:
        raise ValueError(f"padding 'causal' is for one spatial axis; there are {rank}")


def word_pads(word: str, size: int, kernel: int, stride: int, dilation: int) -> Range:
    """The padding of a string option, one of `PADDING_WORDS`."""
    reach = dilation * (kernel - 1)
    if word == "valid":
        return 0, 0
    if word == "full":
        return reach, reach
    if word == "causal":
        return reach, 0
    out = -(-size // stride)
    total = max(0, (out - 1) * stride + reach + 1 - size)
    less = total // 2
    return (less, total - less) if word == "same" else (total - less, less)


def pads_of(
    padding: object,
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> Ranges:
    """The padding before and after each axis, from any form of ``padding``."""
    rank = len(sizes)
    if isinstance(padding, str):
        _check_word_rank(padding, rank)
        each = zip(sizes, kernel, strides, dilations, strict=True)
        return tuple(word_pads(padding, *axis) for axis in each)
    if isinstance(padding, tuple) and any(isinstance(p, tuple) for p in padding):
        pairs = tuple(p if isinstance(p, tuple) else (p, p) for p in padding)
        if len(pairs) != rank:
            raise ValueError(f"padding has {len(pairs)} values for {rank} spatial axes")
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"padding must be (before, after) pairs; got {padding!r}")
        befores = per_axis(
            "padding", tuple(p[0] for p in pairs), rank, -LARGEST_PARAMETER
        )
        afters = per_axis(
            "padding", tuple(p[1] for p in pairs), rank, -LARGEST_PARAMETER
        )
        return tuple(zip(befores, afters, strict=True))
    _check_not_flat(padding, rank)
    each_side = per_axis("padding", padding, rank, -LARGEST_PARAMETER)
    return tuple((p, p) for p in each_side)


def _check_not_flat(padding: object, rank: int) -> None:
    """Raise for ONNX's list of all begins, then all ends."""
    is_flat = isinstance(padding, tuple) and len(padding) == 2 * rank
    if is_flat and all(isinstance(p, int) for p in padding):  # type: ignore[attr-defined]
        pairs = tuple(zip(padding[:rank], padding[rank:], strict=True))  # type: ignore[index]
        raise ValueError(
            f"padding has {2 * rank} values for {rank} spatial axes; if they are "
            f"ONNX's pads, begins and then ends, write the pairs: padding={pairs}"
        )


def _check_fits(index: int, axis: Axis, padding: object) -> None:
    # Over an empty axis, words but "valid" give an empty output, which is no mistake.
    if axis.padded >= axis.extent or (axis.size == 0 and padding in PADDING_WORDS[1:]):
        return
    raise ValueError(
        f"the kernel is larger than the padded input on spatial axis {index}: it spans "
        f"{axis.extent} elements (kernel {axis.kernel}, dilation {axis.dilation}) and "
        f"the input has {axis.padded} "
        f"({_cells_text(axis)} + padding {axis.before} + {axis.after})"
    )


def _cells_text(axis: Axis) -> str:
    if axis.input_dilation == 1:
        return f"{axis.size}"
    return f"{axis.dilated_size}: {axis.size} with input_dilation {axis.input_dilation}"


def axes_of(
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: object,
    padding: object,
    dilation: object,
    *,
    ceil_mode: bool = False,
    cover_all: bool = False,
    input_dilation: object = 1,
) -> tuple[Axis, ...]:
    """One `Axis` for each spatial axis; raise if a kernel does not fit."""
    rank = len(sizes)
    per_axis("kernel_size", kernel, rank, 1)
    strides = per_axis("stride", stride, rank, 1)
    dilations = per_axis("dilation", dilation, rank, 1)
    spreads = per_axis("input_dilation", input_dilation, rank, 1)
    dilated = sizes
    if max(spreads, default=1) > 1:
        dilated = tuple(map(dilated_size, sizes, spreads))
    pads = pads_of(padding, dilated, kernel, strides, dilations)
    each = zip(sizes, kernel, strides, dilations, pads, spreads, strict=True)
    axes = tuple(
        Axis(n, k, s, d, before, after, input_dilation=apart)
        for n, k, s, d, (before, after), apart in each
    )
    if ceil_mode:
        axes = tuple(axis.rounded_up(cover_all=cover_all) for axis in axes)
    elif cover_all:
        axes = tuple(axis.covered for axis in axes)
    for index, axis in enumerate(axes):
        _check_fits(index, axis, padding)
    return axes


def even_axis(index: int, size: int, windows: int) -> Axis:
    """The axis of adaptive pooling."""
    if not 0 <= windows <= LARGEST_PARAMETER:
        raise ValueError(
            f"output_size of spatial axis {index} is {windows}; "
            f"it must be in 0 … {LARGEST_PARAMETER}"
        )
    if windows and not size:
        raise ValueError(
            f"spatial axis {index} has 0 elements, too few for output_size {windows}"
        )
    return EvenAxis.of(size, windows)


def checked_padding_mode(padding_mode: str) -> str:
    """The padding mode that a string is; raise if it is none."""
    return check_choice("padding_mode", padding_mode, PADDING_MODES)


def check_repeats(padding_mode: str, axes: tuple[Axis, ...]) -> None:
    """Raise if a padding mode has no elements to repeat, or zeros between them."""
    if padding_mode == "zeros":
        return
    for index, axis in enumerate(axes):
        if axis.input_dilation > 1:
            raise ValueError(
                f"padding_mode {padding_mode!r} and input_dilation "
                f"{axis.input_dilation} of spatial axis {index} exclude each other: "
                "use padding_mode 'zeros'"
            )
        if not axis.size and (axis.before > 0 or axis.after > 0):
            raise ValueError(
                f"padding_mode {padding_mode!r} needs elements to repeat; spatial axis "
                f"{index} has 0 and padding {axis.before} + {axis.after}"
            )
