"""Convolution of a few channels with NumPy alone: all taps of many planes in one call.

The planes of some groups and images are copied to a scratch, one after another, with
gaps of zeros between rows and planes.  A gap is the padding behind one row and before
the next.  Every tap is then one shift of the whole:

    sums[p] = Σ over taps of weights[tap] · scratch[p + shift(tap)]

for all p, those in gaps too, which are never read.  One `numpy.einsum` over an
overlapping view of the scratch does it, in passes that NumPy multiplies and adds with
vector instructions.  Its innermost loop runs along p, or along p and the groups if
these are stored last.

An axis of stride s is s axes of stride 1: its phases, each with the taps that read it
(forward), or that write it (input gradient).  Arrays are (N, G, C/G, outer, rows, last)
and (G, K/G, C/G, outer, rows, last), with any strides.
"""

import math
from itertools import product
from typing import NamedTuple

import numpy as np

from cuconv.arrays import Array, strided
from cuconv.geometry import Axis

# Elements of a scratch: smaller ones keep two workers waiting for Python's lock (8
# images of 144×56×56, 3×3, a stride of 2, on an Intel Xeon with AVX-512 and 2 MiB of L2
# cache: 16 ns an output with 2^15, 7.4 with 2^17).
_BLOCK = 2**17
# Elements of the innermost loop at least: NumPy copies shorter ones to buffers.  The
# gradient of weights has so many sums for each tap, if groups are stored last.
_LOOP, _SUMS = 4096, 512
# Groups at least, where they are stored last: a cache line.
_LINE = 16
# Elements of the buffers that NumPy may use for three operands, and its iterators.
BUFFERED = 2**15
# The most pieces, and the elements of one at least.
_PIECES, _PIECE = 4, 2**15


class Phase(NamedTuple):
    """A phase of an axis: every ``every``-th tap from ``tap`` on.

    Position q of the result adds the elements q + first, q + first + step, … of the
    source, one for each of ``taps``; both have this many elements.
    """

    phase: int
    tap: int
    every: int
    taps: int
    first: int
    step: int
    source: int
    result: int


class Layout(NamedTuple):
    """The scratch: phases of three axes, and the elements from one to the next.

    ``before`` is the first element of a source, ``cells`` are those of ``images``
    planes, and ``reach`` is the largest shift.
    """

    phases: tuple[tuple[Phase, Phase, Phase], ...]
    stride: tuple[int, int, int]
    pitch: tuple[int, int, int]
    before: tuple[int, int, int]
    piece: int
    groups: int
    images: int
    cells: int
    reach: int
    adjoint: bool
    last: bool
    tile: int

    @property
    def sources(self) -> int:
        """The number of phases that the scratch has."""
        return 1 if self.adjoint else len(self.phases)

    @property
    def plane(self) -> int:
        """The elements of a plane with its gaps."""
        return math.prod(self.pitch)

    @property
    def has_long_loops(self) -> bool:
        """True if NumPy runs the innermost loop without buffers."""
        return self.last or self.cells >= _LOOP

    @property
    def steps(self) -> tuple[int, int, int]:
        """Elements from one position of an axis to the next."""
        _, height, width = self.pitch
        return height * width, width, 1


def phases_of(axis: Axis, *, adjoint: bool) -> list[Phase]:
    """The phases that have taps."""
    common = math.gcd(axis.stride, axis.dilation)
    every, step = axis.stride // common, axis.dilation // common
    found = []
    for tap in range(min(every, axis.kernel)):
        taps = len(range(tap, axis.kernel, every))
        first, phase = divmod(tap * axis.dilation - axis.before, axis.stride)
        size = len(range(phase, axis.size, axis.stride))
        if adjoint:
            first, ends = -(first + (taps - 1) * step), (axis.out, size)
        else:
            ends = size, axis.out
        found.append(Phase(phase, tap, every, taps, first, step, *ends))
    return found


def layout_of(
    axes: tuple[Axis, Axis, Axis],
    groups: int,
    images: int,
    op: str,
    *,
    last: bool,
) -> Layout:
    """The layout for an operation, with groups stored last or not."""
    adjoint = op == "input_grad"
    each = [phases_of(axis, adjoint=adjoint) for axis in axes]
    before = [max(0, *(-p.first for p in phases), 0) for phases in each]
    far = [max(p.first + (p.taps - 1) * p.step for p in phases) for phases in each]
    pitch = []
    for phases, left in zip(each, before, strict=True):
        right = (p.result + p.first + (p.taps - 1) * p.step - p.source for p in phases)
        gap = max(left, *right)
        longest = max(p.source for p in phases) + gap
        pitch.append(max(longest, *(p.result for p in phases), 1))
    plane = math.prod(pitch)
    steps = pitch[1] * pitch[2], pitch[2], 1
    shifts = zip(before, far, steps, strict=True)
    reach = sum(max(b, b + f) * step for b, f, step in shifts)
    work = images * groups * plane // _PIECE
    least = _LINE if last else 1
    piece = -(-groups // max(1, min(_PIECES, work, groups // least)))
    if last:
        some = min(max(_BLOCK // plane, least), piece)
        several = max(1, min(_BLOCK // (plane * some), images))
    else:
        several = max(1, min(_LOOP // plane, images))
        some = max(1, min(_BLOCK // (several * plane), piece))
    loop = _SUMS if op == "weight_grad" else _LOOP
    # Weights are copied once for each position of a tile.
    tile = min(-(-loop // some), max(1, several * plane // 32)) if last else 1
    return Layout(
        tuple(product(*each)),  # type: ignore[arg-type]
        tuple(axis.stride for axis in axes),  # type: ignore[arg-type]
        tuple(pitch),  # type: ignore[arg-type]
        tuple(before),  # type: ignore[arg-type]
        piece,
        some,
        several,
        -(-several * plane // tile) * tile,
        reach,
        adjoint,
        last,
        tile,
    )


def sizes_of(
    layout: Layout, op: str, channels: int, filters: int
) -> tuple[int, int, int, int]:
    """The elements of the buffers: source, sums, further sums, tiles.

    ``channels`` are those of a group's source, ``filters`` those of its result; of x
    and y for the gradient of weights.
    """
    scratch = layout.sources * channels * (layout.cells + layout.reach)
    sums = filters * layout.cells
    several = op == "forward" and len(layout.phases) > 1
    taps = sum(math.prod(p.taps for p in phases) for phases in layout.phases)
    tiles = filters * channels * taps * layout.tile
    if op != "weight_grad" and not layout.last:
        tiles = 0
    each = scratch, sums, sums * several, tiles
    one, two, three, four = (layout.groups * size for size in each)
    return one, two, three, four


def convolve(
    x: Array,
    w: Array,
    bias: Array | None,
    out: Array,
    layout: Layout,
    scratch: Array,
    sums: Array,
    more: Array,
    tiles: Array,
    begin: int,
    end: int,
) -> None:
    """Compute groups begin … end of the result."""
    filters, channels = w.shape[1:3]
    if layout.adjoint:
        # Elements that no tap writes.
        np.copyto(out[:, begin:end], 0 if bias is None else bias[begin:end])
    for at in range(begin, end, layout.groups):
        groups = slice(at, min(at + layout.groups, end))
        count = groups.stop - at
        kernels = _kernels(w[groups], layout, tiles)
        scratch.fill(0)
        for first in range(0, x.shape[0], layout.images):
            images = slice(first, first + layout.images)
            result = out[images, groups]
            cells = _place_all(x[images, groups], scratch, channels, count, layout)
            total = _sums(sums, filters, count, layout)
            for i, phases in enumerate(layout.phases):
                if layout.adjoint:
                    _add_taps(cells[0], kernels[i], phases, total, layout)
                    _take(total, bias, groups, result, phases, layout)
                elif i == 0:
                    _add_taps(cells[0], kernels[0], phases, total, layout)
                else:
                    other = _sums(more, filters, count, layout)
                    _add_taps(cells[i], kernels[i], phases, other, layout)
                    np.add(total, other, total)
            if not layout.adjoint:
                _take(total, bias, groups, result, layout.phases[0], layout)


def correlate(
    dy: Array,
    x: Array,
    out: Array,
    layout: Layout,
    scratch: Array,
    sums: Array,
    more: Array,
    tiles: Array,
    begin: int,
    end: int,
) -> None:
    """Compute the weight gradients of groups begin … end, in ``out``.

    ``dw[t] = Σ dy[o] · conj(x[o · stride + t])``, with dy in ``sums`` as x is in the
    scratch, and zeros in the gaps.
    """
    del more
    filters, channels = out.shape[1:3]
    out[begin:end] = 0
    for at in range(begin, end, layout.groups):
        groups = slice(at, min(at + layout.groups, end))
        count = groups.stop - at
        scratch.fill(0)
        sums.fill(0)
        for first in range(0, x.shape[0], layout.images):
            images = slice(first, first + layout.images)
            if first + layout.images > x.shape[0]:
                sums.fill(0)
            cells = _place_all(x[images, groups], scratch, channels, count, layout)
            gradient = _sums(sums, filters, count, layout)
            source = dy[images, groups]
            view = _planes(gradient, source.shape, (0, 0, 0), layout)
            np.copyto(view, source, casting="unsafe")
            for some, phases in zip(cells, layout.phases, strict=True):
                into = out[groups][(..., *_taps(phases))]
                _sum_products(some, gradient, phases, tiles, into, layout)
    with np.errstate(all="ignore"):
        total = out[begin:end].sum()
    if not np.isfinite(total):
        # Zeros in the gaps were multiplied by a NaN or an infinity.
        _correlate_exactly(dy, x, out, layout, begin, end)


def _planes(
    lanes: Array, shape: tuple[int, ...], start: tuple[int, int, int], layout: Layout
) -> Array:
    """View lanes (G, C, cells), or (C, cells, G), as (N, G, C, outer, rows, last)."""
    steps, plane = layout.steps, layout.plane
    g, c, p = (2, 0, 1) if layout.last else (0, 1, 2)
    each = lanes.strides
    offset = sum(a * b for a, b in zip(start, steps, strict=True)) * each[p]
    inner = (step * each[p] for step in steps)
    strides = plane * each[p], each[g], each[c], *inner
    return strided(lanes, shape, strides, offset)


def _lanes(flat: Array, channels: int, groups: int, cells: int, *, last: bool) -> Array:
    """View a buffer as lanes (G, C, cells), or (C, cells, G)."""
    shape = (channels, cells, groups) if last else (groups, channels, cells)
    return flat[: math.prod(shape)].reshape(shape)


def _sums(flat: Array, filters: int, groups: int, layout: Layout) -> Array:
    return _lanes(flat, filters, groups, layout.cells, last=layout.last)


def _place_all(
    x: Array, scratch: Array, channels: int, groups: int, layout: Layout
) -> list[Array]:
    """Copy a source to the scratch, every phase to lanes of its own."""
    each = scratch.reshape(layout.sources, -1)
    cells = layout.cells + layout.reach
    found = [_lanes(one, channels, groups, cells, last=layout.last) for one in each]
    for lanes, phases in zip(found, layout.phases, strict=False):
        source = x if layout.adjoint else x[(..., *_every(phases, layout))]
        view = _planes(lanes, source.shape, layout.before, layout)
        np.copyto(view, source, casting="unsafe")
    return found


def _every(phases: tuple[Phase, ...], layout: Layout) -> tuple[slice, ...]:
    """The elements of these phases."""
    pairs = zip(phases, layout.stride, strict=True)
    return tuple(slice(p.phase, None, stride) for p, stride in pairs)


def _taps(phases: tuple[Phase, ...]) -> tuple[slice, ...]:
    """The taps of these phases."""
    return tuple(slice(p.tap, None, p.every) for p in phases)


def _kernels(w: Array, layout: Layout, tiles: Array) -> list[Array]:
    """The weights of all phases, for several positions if groups are stored last."""
    found, start = [], 0
    for phases in layout.phases:
        kernel = w[(..., *_taps(phases))]
        if layout.adjoint:
            kernel = kernel[..., ::-1, ::-1, ::-1]
        if layout.last:
            shape = *kernel.shape[1:], layout.tile, kernel.shape[0]
            copy = tiles[start : start + math.prod(shape)].reshape(shape)
            np.copyto(copy, kernel.transpose(1, 2, 3, 4, 5, 0)[..., None, :])
            start += copy.size
            kernel = copy.reshape(*shape[:5], -1)
        found.append(kernel)
    return found


def _windows(lanes: Array, phases: tuple[Phase, ...], layout: Layout) -> Array:
    """View the scratch as (G, C, *taps, cells), or (C, *taps, rows, tile · G)."""
    item, cell = lanes.itemsize, lanes.strides[1 if layout.last else 2]
    places = zip(phases, layout.before, layout.steps, strict=True)
    start = sum((p.first + b) * step for p, b, step in places) * cell
    taps = tuple(p.taps for p in phases)
    shifts = [
        p.step * step * cell for p, step in zip(phases, layout.steps, strict=True)
    ]
    if not layout.last:
        shape, strides = (*lanes.shape[:2], *taps, layout.cells), lanes.strides[:2]
        return strided(lanes, shape, (*strides, *shifts, item), start)
    row, rows = layout.tile * lanes.shape[2], layout.cells // layout.tile
    shape, strides = (lanes.shape[0], *taps, rows, row), lanes.strides[:1]
    return strided(lanes, shape, (*strides, *shifts, row * item, item), start)


def _add_taps(
    lanes: Array,
    kernel: Array,
    phases: tuple[Phase, ...],
    sums: Array,
    layout: Layout,
) -> None:
    """Write the sums over the taps of these phases."""
    view = _windows(lanes, phases, layout)
    # In this order the first letter of the result is the innermost loop.
    if layout.last:
        into = sums.reshape(sums.shape[0], *view.shape[-2:])
        np.einsum("cdhwpl,kcdhwl->lpk", view, kernel, out=into.T, order="F")
    else:
        np.einsum("gcdhwp,gkcdhw->pkg", view, kernel, out=sums.T, order="F")


def _take(
    sums: Array,
    bias: Array | None,
    groups: slice,
    out: Array,
    phases: tuple[Phase, ...],
    layout: Layout,
) -> None:
    """Copy the results out of the sums, plus the bias (G, K/G, 1, 1, 1)."""
    into = out[(..., *_every(phases, layout))] if layout.adjoint else out
    view = _planes(sums, into.shape, (0, 0, 0), layout)
    if bias is None:
        np.copyto(into, view, casting="unsafe")
    else:
        np.add(view, bias[groups], out=into, casting="unsafe")


def _sum_products(
    lanes: Array,
    gradient: Array,
    phases: tuple[Phase, ...],
    tiles: Array,
    out: Array,
    layout: Layout,
) -> None:
    """Add the weight gradients of one run of planes to ``out``."""
    view = _windows(lanes, phases, layout)
    groups, filters, channels, *taps = out.shape
    if not layout.last:
        part = tiles[: out.size].reshape(out.shape)
        with np.errstate(invalid="ignore"):
            np.vecdot(view[:, None], gradient[:, :, None, None, None, None], out=part)
        np.add(out, part, out)
        return
    if view.dtype.kind == "c":
        np.conjugate(lanes, lanes)
    *_, rows, row = view.shape
    part = tiles[: filters * channels * math.prod(taps) * row]
    part = part.reshape(filters, channels, *taps, row)
    dy = gradient.reshape(filters, rows, row)
    np.einsum("cdhwpl,kpl->lwhdck", view, dy, out=part.T, order="F")
    for one in np.moveaxis(part.reshape(*part.shape[:-1], layout.tile, groups), -2, 0):
        total = out.transpose(1, 2, 3, 4, 5, 0)
        np.add(total, one, total)


def _correlate_exactly(
    dy: Array, x: Array, out: Array, layout: Layout, begin: int, end: int
) -> None:
    """The weight gradients without elements in gaps, tap by tap."""
    dy, x, out = dy[:, begin:end], x[:, begin:end], out[begin:end]
    out[...] = 0
    for phases in layout.phases:
        source = x[(..., *_every(phases, layout))]
        into = out[(..., *_taps(phases))]
        for tap in np.ndindex(into.shape[3:]):
            met = [_met(p, t) for p, t in zip(phases, tap, strict=True)]
            read = source[(..., *(cells for cells, _ in met))]
            by = dy[(..., *(places for _, places in met))]
            into[(..., *tap)] = _inner(read, by)


def _inner(x: Array, dy: Array) -> Array:
    """``Σ dy · conj(x)`` for all pairs of channels in a group, without copies."""
    if x.dtype.kind == "c":
        real = _inner(x.real, dy.real) + _inner(x.imag, dy.imag)
        return real + 1j * (_inner(x.real, dy.imag) - _inner(x.imag, dy.real))
    found: Array = np.einsum("ngcdhw,ngkdhw->gkc", x, dy)
    return found


def _met(phase: Phase, tap: int) -> tuple[slice, slice]:
    """The elements of a source that a tap reads, and the positions of their result."""
    shift = phase.first + tap * phase.step
    start = max(0, -shift)
    stop = max(start, min(phase.result, phase.source - shift))
    return slice(start + shift, stop + shift), slice(start, stop)
