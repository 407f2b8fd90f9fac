"""Canonical form: the same convolution over fewer axes, by other views of its arrays.

    units       an axis of one element and one tap vanishes
    spanned     an axis that the kernel spans runs as channels: one output, no sum moves
    runs        neighbours without windows (kernel 1, stride 1, no padding) are one axis
    joined      where no window is left, images are positions of one matrix product

Nothing is copied: a simplification is made only where the strides of every array allow
such a view.  One rule serves fully connected layers, kernels as large as the image,
text networks, (1, k) kernels, and one axis under the names of two.

With x (N, C, H, W), w (K, C, h, w) and w = W, for instance, the sum over c and w runs
over channels (c, w):

    y[n, k, o, 0] = Σ over (c, w), t of x[n, (c, w), o + t] · w[k, (c, w), t]
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from cuconv.arrays import Array, merged_stride
from cuconv.engine.lowering import Lowering, Viewed
from cuconv.engine.problem import ROLES, in_groups
from cuconv.engine.request import Request
from cuconv.geometry import Axis, ConvGeometry

# Of (N, G, C / G, *spatial) and of (K, C / G, *kernel), the axes before the last ones.
_BEFORE_CELLS, _BEFORE_TAPS = 3, 2
_UNIT = Axis(size=1, kernel=1, stride=1, dilation=1, before=0, after=0)
# Where NumPy multiplies image by image as fast, or faster.  Products of so many
# positions gain nothing from more: 8 images of 28×28, 64 channels last to 64, took 0.47
# ms so and 0.60 as one.  A forward pass x · Wᵀ over a few images is slow in OpenBLAS
# unless the weights stay in a cache: 512 to 1000 channels took 1.3 to 1.7 times as long
# as W · xᵀ, copied there and back, for 2 to 32 images; 480 to 120 took 0.7 times as
# long for 5, 1.3 for 16, 0.7 for 64 (Intel Xeon, two cores).
_LONG_ROW, _CACHED_WEIGHTS, _FEW, _MANY = 512, 2**16, 8, 64
# What a geometry works out is kept with it.
_geometry = lru_cache(maxsize=4096)(ConvGeometry)


@dataclass(frozen=True)
class Form:
    """A convolution in other axes: the spatial axes of ``source``, by their numbers.

    ``channels`` run as channels, outermost first, where -1 stands for the channels of a
    group themselves; each of ``runs`` is an axis.  ``is_joined``: images are outermost
    in the only run.
    """

    source: ConvGeometry
    channels: tuple[int, ...]
    runs: tuple[tuple[int, ...], ...]
    is_joined: bool
    channels_first: bool

    @cached_property
    def geometry(self) -> ConvGeometry:
        """The convolution that remains."""
        g = self.source
        spanned = math.prod(g.axes[i].size for i in self.channels if i >= 0)
        axes = [_axis([g.axes[i] for i in run]) for run in self.runs]
        if self.is_joined:
            axes = [_UNIT._replace(size=g.images * math.prod(a.size for a in axes))]
        return _geometry(
            images=1 if self.is_joined else g.images,
            channels=g.channels * spanned,
            axes=tuple(axes) or (_UNIT,),
            channels_first=self.channels_first,
            filters=g.filters,
            groups=g.groups,
            batch_groups=g.batch_groups,
            padding_mode=g.padding_mode,
        )

    @property
    def is_changed(self) -> bool:
        """Whether it is not the source itself."""
        own, other = self.source, self.geometry
        return (own.images, own.axes) != (other.images, other.axes)

    def cells(self, array: Array) -> Array:
        """View x, y, or their gradients."""
        g = self.source
        grouped = in_groups(array, g)
        # In y, nothing is left of an axis that channels take: it has one element.
        images = grouped.shape[0]
        channels = (1, *(_BEFORE_CELLS + i for i in self.channels))
        runs = [tuple(_BEFORE_CELLS + i for i in run) for run in self.runs]
        if self.is_joined:
            images, runs = 1, [(0, *itertools.chain(*runs))]
        spatial = [math.prod(grouped.shape[i] for i in run) for run in runs] or [1]
        channel_count = math.prod(grouped.shape[i] for i in channels)
        order = (*channels, *itertools.chain(*runs))
        order = order if self.is_joined else (0, *order)
        shape = (images, channel_count, *spatial)
        view = _viewed(grouped, order, shape)
        if self.channels_first:
            return view
        return view.transpose(0, *range(2, view.ndim), 1)

    def weights(self, w: Array) -> Array:
        """View weights, or their gradient."""
        g = self.source
        if not g.channels_first:
            w = w.transpose(g.rank + 1, g.rank, *range(g.rank))
        channels = tuple(_BEFORE_TAPS + i for i in self.channels)
        runs = [tuple(_BEFORE_TAPS + i for i in run) for run in self.runs]
        channel_count = math.prod(w.shape[i] for i in channels)
        taps = [math.prod(w.shape[i] for i in run) for run in runs]
        taps = [1] if self.is_joined else taps or [1]
        order = (0, *channels, *itertools.chain(*runs))
        view = _viewed(w, order, (w.shape[0], channel_count, *taps))
        if self.channels_first:
            return view
        return view.transpose(*range(2, view.ndim), 1, 0)

    def view(self, role: str, array: Array) -> Array:
        """View the array that has this role in the convolution."""
        return self.weights(array) if role == "w" else self.cells(array)


class Canonical(Viewed):
    """A convolution run as the one that ``form`` is."""

    def __init__(self, form: Form, roles: dict[str, str], inner: Lowering) -> None:
        super().__init__(inner)
        self.form, self.roles = form, roles

    def views(self, arrays: dict[str, Array]) -> dict[str, Array]:
        return {
            name: self.form.view(role, arrays[name])
            for name, role in self.roles.items()
            if arrays.get(name) is not None
        }

    def weights_of(self, w: Array) -> Iterable[Array]:
        return self.inner.weights_of(self.form.weights(w))


def lower(
    request: Request, lower_other: Callable[[Request], Lowering]
) -> Canonical | None:
    """Lower in canonical form; None for a convolution that has it already.

    Raises
    ------
    ValueError, MemoryLimitError
        As ``lower_other`` does, which lowers the convolution that remains.
    """
    geometry, result = request.geometry, request.result
    if geometry.is_empty or not any(map(_is_simple, geometry.axes)):
        return None
    if result.shape != request.result_shape:
        return None  # it is refused later
    roles = {n: role for n, role in ROLES[request.call].items() if role != "bias"}
    gradient = "x" if request.is_input_grad else "dy"
    roles["out"] = "w" if request.is_weight_grad else gradient
    arrays = {**request.arrays, "out": result}
    form = _form_of(request, {role: arrays[name] for name, role in roles.items()})
    if form is None:
        return None
    views = {name: form.view(role, arrays[name]) for name, role in roles.items()}
    out = views.pop("out")
    other = request._replace(
        geometry=form.geometry, arrays={**request.arrays, **views}, out=out
    )
    return Canonical(form, roles, lower_other(other))


def _form_of(request: Request, arrays: dict[str, Array]) -> Form | None:
    """The canonical form of a convolution, whose arrays come by their roles."""
    geometry = request.geometry
    x, y = (in_groups(arrays[role], geometry) for role in ("x", "dy"))
    w = arrays["w"]
    if not geometry.channels_first:
        rank = geometry.rank
        w = w.transpose(rank + 1, rank, *range(rank))
    channels = next(order for order in _orders(geometry, x, w))
    kept = [i for i in range(geometry.rank) if i not in channels]
    kept = [i for i in kept if not _is_unit(geometry.axes[i])]
    runs, joins = _runs(geometry, kept, x, y), _joins(request, kept, x, y)
    first = geometry.channels_first
    if len(channels) > 1 and runs and not joins:
        # The gather then copies long runs; strides of other weights are unchanged.
        inner, last = (_BEFORE_CELLS + i for i in (runs[-1][-1], channels[-1]))
        first = x.strides[inner] < x.strides[last]
    form = Form(geometry, channels, runs, joins, first)
    return form if form.is_changed else None


def _axis(axes: Sequence[Axis]) -> Axis:
    """One axis, or several without windows as one."""
    if len(axes) == 1:
        return axes[0]
    return _UNIT._replace(size=math.prod(axis.size for axis in axes))


def _is_spanned(axis: Axis) -> bool:
    """Whether the only window is the whole axis."""
    whole = axis.size == axis.kernel == axis.extent
    apart = axis.input_dilation > 1 and axis.size > 1
    return whole and not (axis.before or axis.after or axis.overhang or apart)


def _is_unit(axis: Axis) -> bool:
    return axis.size == 1 and _is_spanned(axis)


def _is_identity(axis: Axis) -> bool:
    return axis.is_identity and axis.input_dilation == 1


def _is_simple(axis: Axis) -> bool:
    return _is_spanned(axis) or _is_identity(axis)


def _orders(geometry: ConvGeometry, x: Array, w: Array) -> Iterator[tuple[int, ...]]:
    """The axes that can run as channels, as many as can be, in the order in x."""
    spanned = [
        i
        for i, axis in enumerate(geometry.axes)
        if _is_spanned(axis) and not _is_unit(axis)
    ]
    for count in range(len(spanned), 0, -1):
        for some in itertools.combinations(spanned, count):
            parts = [i for i in (-1, *some) if x.shape[_BEFORE_CELLS + i] > 1]
            parts.sort(key=lambda i: -x.strides[_BEFORE_CELLS + i])
            in_x = (1, *(_BEFORE_CELLS + i for i in parts))
            in_w = [_BEFORE_TAPS + i for i in parts]
            if _merge(x, in_x) and _merge(w, in_w):
                # The channels themselves are there even if they are one.
                yield tuple(parts) if -1 in parts else (-1, *parts)
    yield (-1,)


def _runs(
    geometry: ConvGeometry, kept: Sequence[int], x: Array, y: Array
) -> tuple[tuple[int, ...], ...]:
    """Neighbouring axes without windows that are one run in x and in y."""
    runs: list[tuple[int, ...]] = []
    for i in kept:
        if runs and all(_is_identity(geometry.axes[j]) for j in (runs[-1][-1], i)):
            longer = tuple(_BEFORE_CELLS + j for j in (*runs[-1], i))
            if _merge(x, longer) and _merge(y, longer):
                runs[-1] += (i,)
                continue
        runs.append((i,))
    return tuple(runs)


def _joins(request: Request, kept: Sequence[int], x: Array, y: Array) -> bool:
    """Whether the layer is one matrix product over the positions of all images."""
    geometry = request.geometry
    if geometry.batch_groups > 1:
        return False
    if not all(_is_identity(geometry.axes[i]) for i in kept):
        return False
    if geometry.images * geometry.positions > request.backend.largest_step:
        return False
    if request.backend.xp is np and not _is_faster_joined(request):
        return False
    run = (0, *(_BEFORE_CELLS + i for i in kept))
    return _merge(x, run) and _merge(y, run)


def _is_faster_joined(request: Request) -> bool:
    """Whether NumPy should multiply all images at once."""
    geometry = request.geometry
    if request.is_weight_grad or geometry.images == 1:
        return True
    if geometry.positions >= _LONG_ROW:
        return False
    is_transposed = not request.is_input_grad and geometry.channels_first
    if geometry.positions > 1 or not is_transposed:
        return True
    is_cached = geometry.filters * geometry.patch <= _CACHED_WEIGHTS
    return is_cached and not _FEW <= geometry.images < _MANY


def _merge(array: Array, axes: Sequence[int]) -> bool:
    """Whether these axes of an array run as one."""
    shape = [array.shape[i] for i in axes]
    return merged_stride(shape, [array.strides[i] for i in axes]) is not None


def _viewed(array: Array, order: Sequence[int], shape: tuple[int, ...]) -> Array:
    """View the axes in this order, then merged; axes that it lacks are of length 1."""
    rest = [i for i in range(array.ndim) if i not in order]
    return array.transpose(*order, *rest).reshape(shape)
