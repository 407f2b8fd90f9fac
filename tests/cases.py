"""Hypothesis strategies that construct convolutions, valid ones and invalid ones.

A valid geometry is built backwards: from the output that is wanted to the input that
gives it, so that nothing is drawn in vain.  Along the axes, kernels, strides, dilations
and pads all differ where their range allows.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import hypothesis.strategies as st
from support import LAYOUTS, Case

from cuconv.geometry import PADDING_MODES

# Every extent differs from every other of its case, and each case has its reason.
CASES = {
    "one axis, a tail of two": Case(
        (2, 3, 11), (4, 3, 2), {"stride": 4, "dilation": 3}
    ),
    "two axes, all different": Case(
        (3, 2, 9, 7),
        (5, 2, 3, 2),
        {"stride": (2, 3), "padding": ((1, 2), (0, 3)), "dilation": (2, 1)},
    ),
    "three axes, uneven pads": Case(
        (2, 2, 4, 5, 6),
        (3, 2, 1, 2, 3),
        {
            "stride": (1, 3, 2),
            "padding": ((0, 1), (2, 0), (-1, 3)),
            "dilation": (3, 2, 1),
        },
    ),
    "groups with stride": Case(
        (2, 6, 8, 7), (9, 2, 2, 3), {"groups": 3, "stride": (3, 2), "padding": (1, 2)}
    ),
    "depthwise": Case((2, 4, 6, 5), (4, 1, 3, 2), {"groups": 4, "padding": "same"}),
    "depthwise with a multiplier": Case(
        (1, 3, 9), (6, 1, 4), {"groups": 3, "stride": 2}
    ),
    "pointwise": Case((3, 4, 5, 6), (2, 4, 1, 1), {}),
    "pointwise in groups": Case((2, 6, 7), (4, 3, 1), {"groups": 2}),
    "one tap with a stride": Case((2, 3, 7, 8), (4, 3, 1, 1), {"stride": (3, 2)}),
    "one tap, padded": Case((2, 3, 4), (2, 3, 1), {"padding": ((1, 2),)}),
    "cropped": Case((2, 2, 9, 8), (3, 2, 2, 3), {"padding": ((-2, -1), (-3, 0))}),
    "pads larger than the kernel": Case((2, 2, 3), (3, 2, 2), {"padding": ((5, 7),)}),
    "same, even kernel": Case((1, 2, 7, 6), (3, 2, 4, 2), {"padding": "same"}),
    "same_lower with stride": Case(
        (1, 2, 7, 8), (3, 2, 4, 3), {"padding": "same_lower", "stride": (2, 3)}
    ),
    "full, stride and dilation": Case(
        (2, 2, 4, 5),
        (3, 2, 3, 2),
        {"padding": "full", "stride": (2, 1), "dilation": (1, 3)},
    ),
    "no batch axis": Case(
        (3, 6, 7), (4, 3, 2, 3), {"stride": (1, 2), "padding": (0, 1)}
    ),
    "no batch axis, pointwise": Case((3, 6, 7), (4, 3, 1, 1), {}),
    "all is covered": Case(
        (2, 3, 8, 6),
        (2, 3, 3, 2),
        {"cover_all": True, "stride": (3, 4), "padding": (0, 1), "dilation": (1, 3)},
    ),
    "one long axis": Case((1, 1, 97), (2, 1, 5), {"stride": 3, "padding": ((4, 1),)}),
    "window of the whole input": Case((3, 2, 4, 5), (4, 2, 4, 5), {}),
}


EMPTY = [
    Case((0, 2, 5, 6), (3, 2, 2, 3), {}),
    Case((2, 0, 5, 6), (3, 0, 2, 3), {}),
    Case((2, 2, 5, 6), (0, 2, 2, 3), {}),
    Case((0, 0, 5), (0, 0, 2), {}),
    Case((0, 2, 5), (3, 2, 1), {}),
    Case((2, 4, 0), (2, 2, 3), {"padding": "same", "groups": 2}),
    Case((2, 2, 0), (3, 2, 1), {"padding": "full"}),
    Case((2, 2, 0, 4), (3, 2, 2, 3), {"padding": "full"}),
    Case((2, 2, 0, 4), (3, 2, 2, 3), {"padding": ((2, 1), 0)}),
    Case((0, 4, 5), (4, 1, 3), {"groups": 4}),
    Case((2, 2, 4), (3, 2, 2), {"padding": ((6, -7),)}),
    Case((2, 3, 4), (2, 3, 2), {"padding": ((-4, 5),)}),
]


EXTREMES = {
    "a stride past the input": Case(
        (1, 2, 7), (2, 1, 2), {"groups": 2, "stride": 10**6}
    ),
    "a dilation past the input": Case(
        (2, 2, 5), (2, 1, 3), {"groups": 2, "dilation": 40, "padding": 60}
    ),
    "one cell": Case((2, 3, 1, 1), (3, 1, 1, 1), {"groups": 3}),
    "pads alone": Case((1, 2, 1, 2), (2, 1, 3, 3), {"groups": 2, "padding": 9}),
    "cropped to one cell": Case(
        (1, 2, 9), (2, 1, 1), {"groups": 2, "padding": ((-5, -3),)}
    ),
    "kernel of the whole input": Case((2, 2, 4, 5), (2, 1, 4, 5), {"groups": 2}),
    "a long line": Case((1, 2, 20_003), (2, 1, 3), {"groups": 2, "padding": 1}),
}


# Large enough for several workers, and for the columns to be megabytes.
LARGE = {
    "square": Case((3, 16, 23, 25), (24, 16, 3, 3), {"padding": 1}),
    "strided": Case((2, 8, 31, 29), (16, 8, 5, 3), {"padding": 2, "stride": (2, 3)}),
    "depthwise": Case((3, 18, 21, 19), (18, 1, 3, 3), {"groups": 18, "padding": 1}),
    "pointwise": Case((5, 32, 13, 19), (48, 32, 1, 1), {}),
    "many taps": Case((2, 6, 37, 33), (8, 6, 7, 9), {"padding": 3}),
    "one axis": Case((2, 16, 801), (16, 16, 5), {"padding": 2}),
}


def each_in(layout: str, cases: Iterable[Case] = CASES.values()) -> list[Case]:
    return [case.in_layout(layout) for case in cases]


def _distinct(draw: st.DrawFn, least: int, most: int, rank: int) -> list[int]:
    values = st.integers(least, most)
    return draw(st.lists(values, min_size=rank, max_size=rank, unique=True))


def _window(draw: st.DrawFn, rank: int) -> tuple[list[Any], ...]:
    kernel = _distinct(draw, 1, 4 if rank == 1 else 3, rank)
    stride = _distinct(draw, 1, 4, rank)
    dilation = _distinct(draw, 1, 3, rank)
    pads = [draw(st.tuples(st.integers(-2, 4), st.integers(-2, 4))) for _ in kernel]
    return kernel, stride, dilation, pads


def _size(out: int, span: int, stride: int, pads: tuple[int, int], tail: int) -> int:
    """An input size of at least one with ``out`` or a few more outputs."""
    size = (out - 1) * stride + span + tail - sum(pads)
    return size if size >= 1 else size + -(-(1 - size) // stride) * stride


@st.composite
def cases(draw: st.DrawFn, ranks: tuple[int, ...] = (1, 2, 3)) -> Case:
    """A valid convolution, small enough for seven loops in Python."""
    rank = draw(st.sampled_from(ranks))
    kernel, stride, dilation, pads = _window(draw, rank)
    out = _distinct(draw, 1, 6 if rank == 1 else 4 if rank == 2 else 3, rank)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    tails = [draw(st.integers(0, s - 1)) for s in stride]
    size = map(_size, out, spans, stride, pads, tails)
    groups = draw(st.integers(1, 3))
    channels, filters = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    images = draw(st.sampled_from([(), (1,), (2,), (3,)]))
    case = Case(
        (*images, channels * groups, *size),
        (filters * groups, channels, *kernel),
        {
            "stride": tuple(stride),
            "padding": tuple(pads),
            "dilation": tuple(dilation),
            "groups": groups,
        },
    )
    return case.in_layout(_layout(draw))


@st.composite
def general_cases(draw: st.DrawFn, ranks: tuple[int, ...] = (1, 2, 3)) -> Case:
    """A convolution with a padding mode, input dilation, batch groups, or several."""
    case = draw(cases(ranks).filter(lambda c: c.layout == "channels_first"))
    rank, options = len(case.w_shape) - 2, dict(case.options)
    size, (filters, channels) = list(case.x_shape[-rank:]), case.w_shape[:2]
    batch_groups = draw(st.integers(1, 3))
    options["padding_mode"] = draw(st.sampled_from(PADDING_MODES))
    if options["padding_mode"] == "zeros":
        apart = _distinct(draw, 1, 4, rank)
        options["input_dilation"] = tuple(apart)
        # Spread over as many cells as before, or a few more.
        size = [-(-(n - 1) // d) + 1 for n, d in zip(size, apart, strict=True)]
    if batch_groups == 1:
        start = case.x_shape[:-rank]
        return Case((*start, *size), case.w_shape, options).in_layout(_layout(draw))
    images = batch_groups * draw(st.integers(1, 2))
    filters = batch_groups * filters // options["groups"]
    options.update(groups=1, batch_groups=batch_groups)
    kernel = case.w_shape[2:]
    case = Case((images, channels, *size), (filters, channels, *kernel), options)
    return case.in_layout(_layout(draw))


def _layout(draw: st.DrawFn) -> str:
    return draw(st.sampled_from(LAYOUTS))


@st.composite
def transposed_cases(draw: st.DrawFn, ranks: tuple[int, ...] = (1, 2, 3)) -> Case:
    """A valid transposed convolution: x spread over a result of at least one cell."""
    rank = draw(st.sampled_from(ranks))
    kernel, stride, dilation, _ = _window(draw, rank)
    size = _distinct(draw, 1, 5 if rank < 3 else 3, rank)
    pads, more = [], []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        extra = draw(st.integers(0, max(s, d) - 1))
        # So much is left out at the end that a cell remains.
        before = draw(st.integers(-2, 4))
        most = (n - 1) * s + d * (k - 1) + extra - before
        pads.append((before, draw(st.integers(min(-2, most), min(4, most)))))
        more.append(extra)
    groups = draw(st.integers(1, 3))
    channels, filters = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    images = draw(st.sampled_from([(), (1,), (2,), (3,)]))
    case = Case(
        (*images, channels * groups, *size),
        (channels * groups, filters, *kernel),
        {
            "stride": tuple(stride),
            "padding": tuple(pads),
            "output_padding": tuple(more),
            "dilation": tuple(dilation),
            "groups": groups,
        },
    )
    return case.in_layout(_layout(draw))


@st.composite
def tiled_cases(draw: st.DrawFn, most: int = 7) -> Case:
    """A convolution that Winograd's tiles can take, or whose tails they hardly can.

    One or two axes of stride 1 inside at most one axis of any stride.
    """
    tiled = draw(st.sampled_from((1, 2)))
    rank = tiled + draw(st.sampled_from((0, 1)))
    outer = rank - tiled
    kernel = [draw(st.integers(2, 5)) for _ in range(tiled)]
    kernel = [draw(st.integers(1, 3)) for _ in range(outer)] + kernel
    stride = [draw(st.integers(1, 3)) for _ in range(outer)] + [1] * tiled
    pads = [draw(st.tuples(st.integers(-2, 4), st.integers(-2, 4))) for _ in kernel]
    out = [draw(st.integers(1, most)) for _ in kernel]
    tails = [draw(st.integers(0, s - 1)) for s in stride]
    size = map(_size, out, kernel, stride, pads, tails)
    groups = draw(st.sampled_from((1, 1, 2)))
    channels, filters = draw(st.integers(8, 10)), draw(st.integers(8, 10))
    images = draw(st.sampled_from([(), (1,), (3,)]))
    options = {"stride": tuple(stride), "padding": tuple(pads), "groups": groups}
    x_shape = (*images, channels * groups, *size)
    case = Case(x_shape, (filters * groups, channels, *kernel), options)
    return case.in_layout(_layout(draw))


@st.composite
def grouped_cases(draw: st.DrawFn, ranks: tuple[int, ...] = (1, 2, 3)) -> Case:
    """Few channels in each of several groups: what depthwise loops are for."""
    case = draw(cases(ranks).filter(lambda c: c.layout == "channels_first"))
    groups = draw(st.integers(2, 10))
    filters, channels, *kernel = case.w_shape
    each = max(1, filters // case.options["groups"])
    batched = len(case.x_shape) == len(case.w_shape)
    shape = list(case.x_shape)
    shape[batched] = channels * groups
    wide = Case(tuple(shape), (each * groups, channels, *kernel), case.options)
    wide = _changed(wide, groups=groups)
    return wide.in_layout(_layout(draw))


class Pool(NamedTuple):
    """One pooling by its shape, its kernel and its options."""

    x_shape: tuple[int, ...]
    kernel: tuple[int, ...]
    options: dict[str, Any]


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    """A valid pooling: windows that hang over, that overlap, that lie in padding."""
    rank = draw(st.integers(1, 3))
    kernel, stride, dilation, pads = _window(draw, rank)
    out = _distinct(draw, 1, 6 if rank == 1 else 4 if rank == 2 else 3, rank)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    tails = [draw(st.integers(0, s - 1)) for s in stride]
    size = map(_size, out, spans, stride, pads, tails)
    images = draw(st.sampled_from([(), (1,), (2,), (3,)]))
    options = {
        "stride": tuple(stride),
        "padding": tuple(pads),
        "dilation": tuple(dilation),
        "ceil_mode": draw(st.booleans()),
        "cover_all": draw(st.booleans()),
    }
    return _in_layout(draw, (*images, draw(st.integers(1, 3)), *size), kernel, options)


@st.composite
def even_pools(draw: st.DrawFn) -> Pool:
    """An adaptive pooling; ``kernel`` is its output size."""
    rank = draw(st.integers(1, 3))
    most = (14, 9, 5)[rank - 1]
    size, out = (_distinct(draw, 1, most, rank) for _ in range(2))
    images = draw(st.sampled_from([(), (1,), (2,)]))
    return _in_layout(draw, (*images, draw(st.integers(1, 3)), *size), out, {})


def _in_layout(
    draw: st.DrawFn, shape: tuple[int, ...], kernel: list[int], options: dict[str, Any]
) -> Pool:
    layout = _layout(draw)
    if layout == "channels_last":
        batch = len(shape) - len(kernel) - 1
        shape = (*shape[:batch], *shape[batch + 1 :], shape[batch])
    return Pool(shape, tuple(kernel), {**options, "layout": layout})


class Invalid(NamedTuple):
    """A convolution that must be refused, and what the message must say."""

    case: Case
    error: type[Exception]
    words: tuple[str, ...]


def _changed(case: Case, **options: Any) -> Case:
    return case._replace(options={**case.options, **options})


@st.composite
def invalid_cases(draw: st.DrawFn) -> Invalid:
    """A valid convolution with exactly one thing wrong."""
    case = draw(cases().filter(lambda c: c.layout == "channels_first"))
    return draw(st.sampled_from(_FAULTS))(draw, case)


def _bad_positive(draw: st.DrawFn, case: Case) -> Invalid:
    """A stride or dilation below 1, or past 2^31, on one axis."""
    name = draw(st.sampled_from(["stride", "dilation"]))
    values = list(case.options[name])
    axis = draw(st.integers(0, len(values) - 1))
    values[axis] = draw(st.one_of(st.integers(-(2**70), 0), st.integers(2**31, 2**70)))
    words = (name, f"axis {axis}", str(values[axis]))
    return Invalid(_changed(case, **{name: tuple(values)}), ValueError, words)


def _bad_count(draw: st.DrawFn, case: Case) -> Invalid:
    """One value too many for the axes."""
    name = draw(st.sampled_from(["stride", "dilation", "padding"]))
    values = (*case.options[name], case.options[name][0])
    words = (name, f"{len(values)} values", f"{len(values) - 1} spatial axes")
    return Invalid(_changed(case, **{name: values}), ValueError, words)


def _bad_padding(draw: st.DrawFn, case: Case) -> Invalid:
    """So much cropping that a kernel no longer fits."""
    pads = list(case.options["padding"])
    axis = draw(st.integers(0, len(pads) - 1))
    size, kernel = case.x_shape[-len(pads) :][axis], case.w_shape[2:][axis]
    span = case.options["dilation"][axis] * (kernel - 1) + 1
    before = pads[axis][0]
    less = draw(st.integers(1, 20))
    pads[axis] = (before, span - less - size - before)
    words = (
        "kernel is larger",
        f"axis {axis}",
        f"{span} elements",
        f"has {span - less} ",
    )
    return Invalid(_changed(case, padding=tuple(pads)), ValueError, words)


def _bad_channels(draw: st.DrawFn, case: Case) -> Invalid:
    filters, channels, *kernel = case.w_shape
    wrong = draw(st.integers(0, 9).filter(lambda c: c != channels))
    groups = case.options["groups"]
    have = channels * groups
    words = (
        "channels",
        f"x has {have}",
        f"{wrong} × groups {groups} = {wrong * groups}",
    )
    changed = case._replace(w_shape=(filters, wrong, *kernel))
    return Invalid(changed, ValueError, words)


def _bad_filters(draw: st.DrawFn, case: Case) -> Invalid:
    """More groups than divide the filters."""
    channels = case.w_shape[1]
    filters, groups = draw(
        st.tuples(st.integers(1, 9), st.integers(2, 9)).filter(lambda p: p[0] % p[1])
    )
    batched = len(case.x_shape) == len(case.w_shape)
    x_shape = list(case.x_shape)
    x_shape[batched] = channels * groups
    changed = Case(tuple(x_shape), (filters, *case.w_shape[1:]), case.options)
    words = (f"groups {groups}", f"{filters} filters")
    return Invalid(_changed(changed, groups=groups), ValueError, words)


def _bad_groups(draw: st.DrawFn, case: Case) -> Invalid:
    groups = draw(st.integers(-9, 0))
    return Invalid(_changed(case, groups=groups), ValueError, ("groups", str(groups)))


def _bad_rank(draw: st.DrawFn, case: Case) -> Invalid:
    """x has an axis too many or two too few."""
    axes = len(case.w_shape)
    more = draw(st.booleans())
    batched = len(case.x_shape) == axes
    shape = (
        (1,) * (1 + (not batched)) + case.x_shape
        if more
        else case.x_shape[batched + 1 :]
    )
    words = (f"x has {len(shape)} axes", str(axes))
    return Invalid(case._replace(x_shape=shape), ValueError, words)


_FAULTS = (
    _bad_positive,
    _bad_count,
    _bad_padding,
    _bad_channels,
    _bad_filters,
    _bad_groups,
    _bad_rank,
)
