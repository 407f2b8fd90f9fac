"""The struct of ``direct.cuh``, packed on the host, and the sizes of launches.

Arrays come grouped, with three spatial axes: x (N, G, C/G, …), y (N, G, K/G, …), and w
(G, own, inner, …): own channels are those of the result, inner ones of the source.
Everything here, and so the order of a sum, depends on shapes, strides and types alone.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cuconv.arrays import Array, DType
from cuconv.backends.cuda.structs import (
    MOST_THREADS,
    axis_type,
    divisor,
    divisor_type,
    packed_axis,
    reach_of,
    spans_of,
    steps_of,
    struct,
)
from cuconv.geometry import Axis

RANK = 3
_THREADS = 256
_WARP, _MOST_IN_BLOCK = 32, 512
MOST_BLOCKS = 2**20
_SECTOR = 32
# Threads and blocks that occupy a large GPU; not yet measured on one.
_BUSY_THREADS, _BUSY_BLOCKS = 2**17, 264
# The least items of a sum for a block of its own; not yet measured either.
_WORTH_A_BLOCK = 2**12


def images_at_once(sums: DType) -> int:
    """``IMAGES``: images that a thread computes at once."""
    return 16 // sums.itemsize


def taps_at_once(sums: DType) -> int:
    """``TAPS``: sums of weights that a thread keeps in registers."""
    return 9 if sums.itemsize <= 8 else 3


class Share(NamedTuple):
    """The items, blocks and threads of a launch; see ``struct Direct``."""

    each: int
    items: int
    blocks: int
    threads: int
    block_filters: int = 1
    taps_each: int = 1


class DirectLaunch(NamedTuple):
    """The arguments of a direct kernel."""

    packed: Array
    wide: bool
    share: Share


@lru_cache(maxsize=2)
def DIRECT(*, wide: bool) -> DType:  # noqa: N802 - names the C struct
    """The type of ``struct Direct``."""
    index = "i8" if wide else "i4"
    cells = (
        *("images", "groups", "own", "inner"),
        *("each", "fastest", "adjoint", "conjugated", "taps_each", "block_filters"),
    )
    steps = (
        *("source_image", "source_group", "source_channel"),
        *("w_group", "w_own", "w_inner", "out_image", "out_group", "out_channel"),
        *("bias_step", "items", "blocks"),
    )
    return np.dtype(
        [
            *((name, "i4") for name in cells),
            *((name, divisor_type("i4")) for name in ("by_channels", "by_own")),
            *((name, index) for name in steps),
            ("axis", axis_type(index, "i4"), (RANK,)),
        ],
        align=True,
    )


def share_cells(images: int, cells: int, at_once: int) -> Share:
    """Divide the elements of a result, of all channels together, among blocks.

    A thread computes several images if enough threads remain.
    """
    several = images >= at_once and images * cells >= at_once * _BUSY_THREADS
    each = at_once if several else 1
    items = -(-images // each) * cells
    blocks = -(-min(items, MOST_THREADS) // _THREADS)
    return Share(each, items, blocks, _THREADS)


def share_sums(
    filters: int,
    channels: int,
    taps: int,
    images: int,
    positions: int,
    *,
    at_once: int,
    most_taps: int,
    block_filters: int,
) -> Share:
    """Divide the gradient of filters × channels × taps weights among blocks.

    A block computes as many taps as it can; for long sums of few filters fewer taps,
    down to one, with more threads.
    """
    several = images >= at_once and images * positions >= at_once * _WORTH_A_BLOCK
    each = at_once if several else 1
    items = -(-images // each) * positions
    groups = -(-filters // block_filters) * channels
    taps_each = min(taps, most_taps)
    while (
        items >= _WORTH_A_BLOCK
        and taps_each > 1
        and groups * -(-taps // taps_each) < _BUSY_BLOCKS
    ):
        taps_each = -(-taps_each // 3)
    blocks = groups * -(-taps // taps_each)
    most = _MOST_IN_BLOCK if blocks < 2 * _BUSY_BLOCKS else _THREADS
    threads = _WARP
    while threads < most and threads < items * block_filters:
        threads *= 2
    return Share(each, items, blocks, threads, block_filters, taps_each)


def pack_cells(
    source: Array,
    w: Array,
    out: Array,
    axes: tuple[Axis, ...],
    sums: DType,
    bias_step: int = 0,
    *,
    adjoint: bool,
    conjugated: bool = False,
) -> DirectLaunch:
    """For `depthwise.cu`: y from x or, adjoint, dx from dy."""
    images, groups, own, *cells = out.shape
    channels = groups * own
    share = share_cells(images, channels * math.prod(cells), images_at_once(sums))
    flags = _channels_are_closer(out), adjoint, conjugated
    by = divisor(channels), divisor(own)
    return _packed((source, w, out), axes, share, flags, by, bias_step)


def pack_sums(
    x: Array, w: Array, dy: Array, axes: tuple[Axis, ...], sums: DType
) -> DirectLaunch:
    """For `depthwise_weights.cu`: w from x and dy."""
    groups, filters, channels, *kernel = w.shape
    images, _, _, *cells = dy.shape
    block_filters = _SECTOR // dy.dtype.itemsize if _channels_are_closer(dy) else 1
    share = share_sums(
        groups * filters,
        channels,
        math.prod(kernel),
        images,
        math.prod(cells),
        at_once=images_at_once(sums),
        most_taps=taps_at_once(sums),
        block_filters=block_filters,
    )
    by = divisor(1), divisor(1)
    return _packed((x, w, dy), axes, share, (block_filters > 1, False, False), by)


def _channels_are_closer(array: Array) -> bool:
    """True if channels, of all groups, have a smaller stride than spatial axes."""
    channel = array.strides[2] if array.shape[2] > 1 else array.strides[1]
    pairs = zip(array.shape[3:], array.strides[3:], strict=True)
    cells = [abs(stride) for size, stride in pairs if size > 1]
    return bool(abs(channel) < min(cells, default=0))


def _packed(
    arrays: tuple[Array, Array, Array],
    axes: tuple[Axis, ...],
    share: Share,
    flags: tuple[bool, bool, bool],
    by: tuple[tuple[int, int, int], tuple[int, int, int]],
    bias_step: int = 0,
) -> DirectLaunch:
    """Source, weights and result (or dy) with the windows between them."""
    source, _, out = arrays
    steps = list(map(steps_of, arrays))
    lengths = [(axis.size, axis.out, -axis.before) for axis in axes]
    wide = _reach(arrays, axes, share, bias_step) >= 2**31
    spatial = zip(*(each[3:] for each in steps), strict=True)
    packed_axes = list(map(packed_axis, axes, lengths, spatial))
    counts = (*out.shape[:3], source.shape[2], share.each, *map(int, flags))
    heads = [step for each in steps for step in each[:3]]
    value = (
        *(*counts, share.taps_each, share.block_filters, *by),
        *(*heads, bias_step, share.items, share.blocks, packed_axes),
    )
    return DirectLaunch(struct(value, DIRECT(wide=wide)), wide, share)


def _reach(
    arrays: tuple[Array, Array, Array],
    axes: tuple[Axis, ...],
    share: Share,
    bias_step: int,
) -> int:
    """The largest offset or count of items that a kernel computes."""
    firsts, sizes, outs = zip(*((-a.before, a.size, a.out) for a in axes), strict=True)
    spans = spans_of(axes, firsts, sizes, outs)
    offsets = (
        reach_of((*array.shape[:3], *map(max, array.shape[3:], spans)), steps_of(array))
        for array in arrays
    )
    channels = arrays[2].shape[1] * arrays[2].shape[2]
    counts = share.items + MOST_THREADS, share.blocks + MOST_BLOCKS
    largest: int = max(*offsets, *counts, channels * abs(bias_step))
    return largest
