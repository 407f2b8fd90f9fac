"""The shapes of one convolution: windows over the input, filters over windows."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from cuconv.choices import check_flag
from cuconv.geometry.axis import AxisPhase, Range, phases_of_inputs, phases_of_outputs
from cuconv.geometry.options import (
    Padding,
    Sizes,
    Split,
    as_index,
    axes_of,
    channels_are_first,
    check_repeats,
    checked_padding_mode,
    checked_shape,
    frozen,
    frozen_padding,
    per_axis,
    split_shape,
)
from cuconv.geometry.transposed import Ends, Source, transposed_axes
from cuconv.geometry.windows import Block, WindowGeometry


class Phase(NamedTuple):
    """A strided subset of a result, and the basic convolution that computes it.

    ``results`` selects it along every axis, ``taps`` its taps.  Elements without taps
    are in no phase: they are zero.
    """

    results: tuple[slice, ...]
    taps: tuple[slice, ...]
    geometry: "ConvGeometry"


class _ConvSizes:
    """Numbers of a `ConvGeometry`, which are worked out once.

    ``results`` are the images of y.  ``patch`` are the elements under one window in one
    group, the length of a dot product; ``multiplications`` the multiply-adds of one
    pass, padding counted as if it were data.  ``has_input_dilation``: there are zeros
    between elements of the input.  ``is_copied``: it needs a copy of the input, padded
    or regrouped.
    """

    results: int
    group_channels: int
    group_filters: int
    patch: int
    multiplications: int
    y_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    is_unit_stride: bool
    has_input_dilation: bool
    is_copied: bool
    _hash: int


@dataclass(frozen=True)
class ConvGeometry(WindowGeometry, _ConvSizes):
    """The shapes of one convolution: windows over the input, filters over windows.

    ``filters`` is K, ``groups`` is G; group g maps channels [g·C/G, (g+1)·C/G) to
    filters [g·K/G, (g+1)·K/G).  With ``batch_groups`` B, images [b·N/B, (b+1)·N/B) are
    mapped to filters [b·K/B, (b+1)·K/B), and y has N/B images.  ``padding_mode`` is one
    of `PADDING_MODES`.
    """

    filters: int = 1
    groups: int = 1
    batch_groups: int = 1
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        super().__post_init__()
        axes, filters, shared = self.axes, self.filters, self.batch_groups
        results, channels = self.images // shared, self.channels // self.groups
        patch, y_shape = channels * self.taps, self.array_shape(filters, self.out)
        w_shape = (*self.kernel, channels, filters)
        if self.channels_first:
            w_shape = (filters, channels, *self.kernel)
        self.__dict__.update(
            results=results,
            group_channels=channels,
            group_filters=filters // self.groups,
            patch=patch,
            multiplications=results * self.positions * filters * patch,
            y_shape=(results, *y_shape[1:]) if shared > 1 else y_shape,
            w_shape=w_shape,
            is_unit_stride=all(axis.stride == 1 for axis in axes),
            has_input_dilation=any(axis.input_dilation > 1 for axis in axes),
            is_copied=shared > 1 or (self.padding_mode != "zeros" and self.is_padded),
            _hash=hash((self.images, self.channels, axes, filters, self.groups)),
        )

    def __hash__(self) -> int:
        return self._hash  # asked for often

    @cached_property
    def is_empty(self) -> bool:
        """True if nothing is multiplied: no element, or none under any window."""
        if self.multiplications == 0 or self.cells == 0:
            return True
        if self.has_input_dilation or self.padding_mode != "zeros":
            return False
        spans = (axis.window(0, axis.out) for axis in self.axes)
        return any(
            min(stop, axis.size) <= max(start, 0)
            for axis, (start, stop) in zip(self.axes, spans, strict=True)
        )

    @cached_property
    def adjoint(self) -> "ConvGeometry":
        """The convolution of dy, with flipped weights, that gives dx.

        With stride 1, ``i = o + t · dilation - before`` solved for o is ``o = i +
        (kernel - 1 - t) · dilation - (extent - 1 - before)``: a convolution again.
        """
        axes = tuple(
            axis._replace(
                size=axis.out,
                before=axis.extent - 1 - axis.before,
                after=axis.extent - 1 - axis.after,
            )
            for axis in self.axes
        )
        return replace(self, axes=axes, channels=self.filters, filters=self.channels)

    @property
    def is_basic(self) -> bool:
        """True if it is a basic convolution, which strategies support."""
        return not (self.has_input_dilation or self.is_copied)

    @cached_property
    def padded_last(self) -> "ConvGeometry":
        """The same with axes reversed so that more of the padding is at the end."""
        axes = tuple(
            axis._replace(before=min(pads), after=max(pads))
            for axis in self.axes
            for pads in [(axis.before, axis.after)]
        )
        return replace(self, axes=axes)

    def phases(self) -> Iterator[Phase]:
        """Split the output so that no zero between elements of x is multiplied.

        In ``j * input_dilation = o * stride + t * dilation - before``, an output
        determines ``t * dilation`` modulo the input dilation.  The taps of a phase are
        therefore evenly spaced, and so are the elements that they read.  No two phases
        share a tap.
        """
        return self._phases(map(phases_of_outputs, self.axes), self)

    def input_phases(self) -> Iterator[Phase]:
        """Split the input so that its gradient is basic convolutions over dy.

        The same equation, solved for o: an element determines ``t * dilation`` modulo
        the stride.  Filters and channels are exchanged, and taps are reversed.
        """
        backward = replace(self, channels=self.filters, filters=self.channels)
        return self._phases(map(phases_of_inputs, self.axes), backward)

    def _phases(
        self, axes: Iterable[Iterable[AxisPhase]], like: "ConvGeometry"
    ) -> Iterator[Phase]:
        for picked in itertools.product(*axes):
            results, taps, each = zip(*picked, strict=True)
            yield Phase(results, taps, replace(like, axes=each))

    def rows(self, images: Range, rows: Range) -> Block:
        """The block that computes these rows along the first axis, whole in the others.

        ``images`` are those of the output.  With a padding mode, windows include the
        padding, and the block's own padding is zero.
        """
        output = (rows, *((0, out) for out in self.out[1:]))
        if self.has_input_dilation:
            window = tuple((0, size) for size in self.size)
            pads = tuple((axis.before, axis.after) for axis in self.axes)
            return Block(images, output, window, pads)
        if self.padding_mode == "zeros":
            return self.block(images, output)
        each = zip(self.axes, output, strict=True)
        window = tuple(axis.window(*span) for axis, span in each)
        return Block(images, output, window, ((0, 0),) * self.rank)

    def part(self, block: Block) -> "ConvGeometry":
        """The convolution that computes a block from a copy of what it reads.

        It has no padding mode and no batch groups: the copy takes care of them.
        """
        axes = tuple(
            axis._replace(size=stop - start, before=before, after=after)
            for axis, (start, stop), (before, after) in zip(
                self.axes, block.window, block.padding, strict=True
            )
        )
        return replace(
            self,
            images=block.images[1] - block.images[0],
            channels=self.channels * self.batch_groups,
            groups=self.groups * self.batch_groups,
            axes=axes,
            batched=True,
            padding_mode="zeros",
            batch_groups=1,
        )

    @classmethod
    def of_transposed(
        cls,
        x_shape: Sequence[int],
        w_shape: Sequence[int],
        *,
        stride: Sizes = 1,
        padding: Padding = 0,
        output_padding: Sizes = 0,
        output_size: Sizes | None = None,
        dilation: Sizes = 1,
        groups: int = 1,
        layout: str = "channels_first",
    ) -> "ConvGeometry":
        """Geometry of the convolution whose input gradient is ``conv_transpose(x, w)``.

        Its ``y_shape`` is ``x_shape``, and its ``x_shape`` is that of the result; see
        `cuconv.conv_transpose`.

        Examples
        --------
        >>> from cuconv.geometry import ConvGeometry
        >>> g = ConvGeometry.of_transposed((8, 64, 28, 28), (64, 3, 4, 4), stride=2)
        >>> g.x_shape
        (8, 3, 58, 58)
        """
        channels_are_first(layout)
        return _transposed_geometry(
            checked_shape("x", x_shape),
            checked_shape("w", w_shape),
            frozen("stride", stride),
            Ends(
                frozen_padding(padding),
                frozen("output_padding", output_padding),
                None if output_size is None else frozen("output_size", output_size),
            ),
            frozen("dilation", dilation),
            as_index("groups", groups),
            layout,
        )

    @classmethod
    def of_weights(
        cls,
        x_shape: Sequence[int],
        w_shape: Sequence[int],
        *,
        stride: Sizes = 1,
        padding: Padding = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        layout: str = "channels_first",
        padding_mode: str = "zeros",
        input_dilation: Sizes = 1,
        batch_groups: int = 1,
        cover_all: bool = False,
    ) -> "ConvGeometry":
        """Geometry of ``conv(x, w)`` from the two shapes; see `cuconv.conv`.

        Examples
        --------
        >>> from cuconv.geometry import ConvGeometry
        >>> g = ConvGeometry.of_weights((8, 3, 224, 224), (64, 3, 7, 7), stride=2)
        >>> g.y_shape
        (8, 64, 109, 109)
        """
        channels_are_first(layout)
        padding_mode = checked_padding_mode(padding_mode)
        return _conv_geometry(
            checked_shape("x", x_shape),
            checked_shape("w", w_shape),
            frozen("stride", stride),
            frozen_padding(padding),
            frozen("dilation", dilation),
            layout,
            _Sharing(
                as_index("groups", groups),
                as_index("batch_groups", batch_groups),
                padding_mode,
                frozen("input_dilation", input_dilation),
                check_flag("cover_all", cover_all),
            ),
        )


class _Sharing(NamedTuple):
    """Groups, batch groups, padding mode, input dilation, and rounding up."""

    groups: int
    batch_groups: int
    padding_mode: str
    input_dilation: object
    cover_all: bool


@lru_cache(maxsize=4096)
def _conv_geometry(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    stride: object,
    padding: object,
    dilation: object,
    layout: str,
    sharing: _Sharing,
) -> ConvGeometry:
    split = split_shape(x_shape, _rank_of(w_shape), layout)
    filters, channels, kernel = _split_weights(
        w_shape, channels_first=split.channels_first
    )
    groups, batch_groups, padding_mode, input_dilation, cover_all = sharing
    _check_channels(split, channels, groups, w_shape)
    if filters % groups:
        raise ValueError(f"groups {groups} do not divide the {filters} filters of w")
    _check_batch_groups(split, filters, groups, batch_groups)
    axes = axes_of(
        *(split.sizes, kernel, stride, padding, dilation),
        cover_all=cover_all,
        input_dilation=input_dilation,
    )
    check_repeats(padding_mode, axes)
    return ConvGeometry(
        split.images,
        split.channels,
        axes,
        split.channels_first,
        split.batched,
        filters,
        groups,
        batch_groups,
        padding_mode,
    )


def _check_channels(
    split: Split, expected: int, groups: int, w_shape: tuple[int, ...]
) -> None:
    if groups < 1:
        raise ValueError(f"groups must be at least 1; got {groups}")
    if expected * groups != split.channels:
        raise ValueError(
            f"channels do not match: x has {split.channels} and w expects "
            f"{expected} × groups {groups} = {expected * groups}"
            f"{_channels_hint(split, expected * groups, groups, w_shape)}"
        )


def _channels_hint(
    split: Split, expected: int, groups: int, w_shape: tuple[int, ...]
) -> str:
    """The likely mistake where channels do not match."""
    if not split.channels_first and w_shape[1] * groups == split.channels:
        return (
            "; with channels last w is (*kernel, C / groups, K), and here its second "
            f"axis has {w_shape[1]}"
        )
    if split.channels_first and split.sizes[-1] == expected:
        return f"; its last axis has {expected}: layout='channels_last'?"
    if len(w_shape) == 3 and split.batched:
        return (
            "; if they are images (T, H, W) and kernels (K, h, w), give both a channel "
            "axis: x[:, None], w[:, None]"
        )
    return ""


def _check_batch_groups(
    split: Split, filters: int, groups: int, batch_groups: int
) -> None:
    if batch_groups < 1:
        raise ValueError(f"batch_groups must be at least 1; got {batch_groups}")
    if batch_groups == 1:
        return
    if groups > 1:
        raise ValueError(
            f"groups {groups} and batch_groups {batch_groups} both share out filters: "
            "one of them must be 1"
        )
    if not split.batched:
        raise ValueError(f"batch_groups {batch_groups} need x with a batch axis")
    if split.images % batch_groups:
        raise ValueError(
            f"batch_groups {batch_groups} do not divide the {split.images} images of x"
        )
    if filters % batch_groups:
        raise ValueError(
            f"batch_groups {batch_groups} do not divide the {filters} filters of w"
        )


def _rank_of(w_shape: tuple[int, ...]) -> int:
    rank = len(w_shape) - 2
    if rank < 1:
        raise ValueError(
            f"w has {len(w_shape)} axes; it needs at least 3: filters, channels, space"
        )
    return rank


class _Weights(NamedTuple):
    filters: int
    channels: int
    kernel: tuple[int, ...]


def _split_weights(w_shape: tuple[int, ...], *, channels_first: bool) -> _Weights:
    """Filters, channels of a group and taps, from either layout."""
    if channels_first:
        return _Weights(w_shape[0], w_shape[1], w_shape[2:])
    return _Weights(w_shape[-1], w_shape[-2], w_shape[:-2])


@lru_cache(maxsize=4096)
def _transposed_geometry(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    stride: object,
    ends: Ends,
    dilation: object,
    groups: int,
    layout: str,
) -> ConvGeometry:
    rank = _rank_of(w_shape)
    split = split_shape(x_shape, rank, layout)
    weights = _split_weights(w_shape, channels_first=split.channels_first)
    _check_transposed_channels(split.channels, weights.filters, groups)
    per_axis("kernel_size", weights.kernel, rank, 1)
    strides = per_axis("stride", stride, rank, 1)
    dilations = per_axis("dilation", dilation, rank, 1)
    each = zip(split.sizes, weights.kernel, strides, dilations, strict=True)
    return ConvGeometry(
        split.images,
        weights.channels * groups,
        transposed_axes([Source(i, *axis) for i, axis in enumerate(each)], ends),
        split.channels_first,
        split.batched,
        weights.filters,
        groups,
    )


def _check_transposed_channels(channels: int, expected: int, groups: int) -> None:
    if groups < 1:
        raise ValueError(f"groups must be at least 1; got {groups}")
    if expected != channels:
        raise ValueError(
            f"channels do not match: x has {channels} and w expects {expected}"
        )
    if channels % groups:
        raise ValueError(f"groups {groups} do not divide the {channels} channels of x")
