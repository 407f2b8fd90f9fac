"""Winograd's minimal filtering: small kernels of stride 1 with fewer multiplications.

Along one axis, a tile of n = m + r - 1 input cells d gives the m outputs of a filter g
of r taps as

    y = Aᵀ [(G g) ⊙ (Bᵀ d)]

with n multiplications in place of m · r; over two axes the transforms nest.  Summed
over channels, the elementwise product becomes one matrix product for each of the n × n
frequencies:

    forward        M_f = V_f · U_f          V = Bᵀ d B,  U = G g Gᵀ,  Y = Aᵀ M A
    weight_grad    dU_f = V_fᵀ · D_f        D = A dY Aᵀ,  dg = Gᵀ dU G

The second line is the adjoint of the first in g.  The input gradient is the forward
pass over dy with flipped weights.

The transform runs over the last axis, and over the one before it where that kernel has
stride 1 and several taps too.  One axis further out may have any kernel and stride: its
taps lengthen the dot products, as in im2col.

Layout, with i and j the frequencies along the two axes, tw and th the tiles, d the
cells of the outer axis:

    Q (a; n, th, g, d, c, w)      rows of x: th-th tile's a-th, copied in whole runs
    R (i; n, th, g, d, c, w)      transformed along the rows' axis: one product
    V (j, i; tw, n, th, g, d, c)  transformed along the last axis: one for each i, tw
    M (j, i; tw, n, th, g, d, k)  the products
    Z (i; n, th, g, d, k, w)      the way back, in the opposite order
    Y (a; n, th, g, d, k, w)

Source: A. Lavin, S. Gray, "Fast algorithms for convolutional neural networks", 2016;
the matrices are those of Toom and Cook (S. Winograd, "Arithmetic complexity of
computations", 1980, chapter IV).
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from cuconv.arrays import Array, DType
from cuconv.geometry import Axis, Block, ConvGeometry, Range, Tile, tile_of
from cuconv.leaves import Leaves
from cuconv.memory import Buffer
from cuconv.profiling import stage
from cuconv.strategies.base import (
    OVER_DY,
    Cut,
    Job,
    Needs,
    Problem,
    Work,
    add_lanes,
    bias_buffer,
    filters_of,
    in_groups,
    outer_view,
    output_cells,
    partial_cells,
    take_bias,
    three_axes,
    turn,
    verdict,
)

# Tile sizes n, by precision.  The error grows about tenfold with each step.
_TILES = {"strict": (), "standard": (4, 6), "fast": (4, 6, 8)}
# The points where the polynomials are evaluated, besides infinity.
_POINTS = {
    4: (0, 1, -1),
    6: (0, 0.625, -0.625, 1.5, -1.5),
    8: (0, 1, -1, 2, -2, 0.5, -0.5),
}
_KERNELS = range(2, 6)
_LEAST_CHANNELS = 8
# BLAS transforms this many columns at a time without packing them.
_COLUMNS = 24_576
# Bytes of V and M in one block, and of sums of weight gradients in all lanes.
_BLOCK_BYTES = 4 * 2**20
_LANE_BYTES = 24 * 2**20


class Matrices(NamedTuple):
    """The three transforms of F(m, r): ``input`` is Bᵀ, ``filter`` G, ``output`` Aᵀ."""

    input: Array
    filter: Array
    output: Array


@lru_cache(maxsize=64)
def matrices(m: int, r: int, dtype: DType) -> Matrices:
    """The transforms of F(m, r) after Toom and Cook, in exact small fractions.

    With points p_0 … p_{n-2} and infinity, Aᵀ evaluates the powers up to m - 1 at the
    points; G those up to r - 1, divided by Π (p_i - p_l); and Bᵀ holds the
    coefficients of the Lagrange numerators, so that Aᵀ [(G g) ⊙ (Bᵀ d)] is the
    correlation.
    """
    n = m + r - 1
    points = _POINTS[n]
    powers = np.array([[p**k for k in range(n)] for p in points], dtype=np.float64)
    output, taps = np.zeros((m, n)), np.zeros((n, r))
    lines = np.zeros((n, n))
    output[:, :-1], output[m - 1, -1] = powers[:, :m].T, 1
    for i, p in enumerate(points):
        others = [q for q in points if q != p]
        scale = math.prod(p - q for q in others)
        taps[i] = powers[i, :r] / scale
        lines[i, : n - 1] = _coefficients(others)
    taps[-1, -1] = 1
    lines[-1] = _coefficients(points)
    return Matrices(*(np.ascontiguousarray(a, dtype) for a in (lines, taps, output)))


def _coefficients(roots: tuple[float, ...] | list[float]) -> Array:
    """Coefficients of Π (x - root), the constant first."""
    return np.poly(roots)[::-1] if len(roots) else np.ones(1)


class _Shape(NamedTuple):
    """One convolution seen by the transforms: an outer axis, and one or two tiled.

    ``axes`` are always three (outer, rows, last); one that the convolution lacks has a
    single cell and a single tap, and so has the tile along it.
    """

    axes: tuple[Axis, Axis, Axis]
    tiles: tuple[Matrices | None, Matrices]

    @property
    def outputs(self) -> tuple[int, int]:
        """m, along rows and along the last axis."""
        rows, last = self.tiles
        return (1 if rows is None else rows.output.shape[0]), last.output.shape[0]

    @property
    def inputs(self) -> tuple[int, int]:
        """n, likewise."""
        rows, last = self.tiles
        return (1 if rows is None else rows.input.shape[0]), last.input.shape[0]

    @property
    def frequencies(self) -> int:
        return math.prod(self.inputs)


def _tiled_axes(geometry: ConvGeometry) -> int:
    """How many of the last axes can be transformed: 0, 1 or 2."""
    count = 0
    for axis in reversed(geometry.axes[-2:]):
        if axis.kernel not in _KERNELS or axis.stride != 1 or axis.dilation != 1:
            break
        count += 1
    return count


@lru_cache(maxsize=256)
def _shape(geometry: ConvGeometry, variant: tuple[int, ...], dtype: DType) -> _Shape:
    tiled = len(variant)
    sizes = [
        matrices(n - axis.kernel + 1, axis.kernel, dtype)
        for n, axis in zip(variant, geometry.axes[-tiled:], strict=True)
    ]
    axes = three_axes(geometry, tiled)
    return _Shape(axes, (None if tiled == 1 else sizes[0], sizes[-1]))


class _Piece(NamedTuple):
    """One block, with its sizes: images, tiles and the cells of the outer axis."""

    block: Block
    spans: tuple[Range, Range, Range]
    images: int
    tall: int
    wide: int
    outer_in: int
    outer_out: int


def _three(ranges: tuple[Range, ...], tiled: int, default: Range) -> tuple[Range, ...]:
    """Ranges of every spatial axis as those of (outer, rows, last)."""
    if tiled == 1:
        outer = ranges[0] if len(ranges) == 2 else default
        return outer, default, ranges[-1]
    outer = ranges[0] if len(ranges) == 3 else default
    return outer, *ranges[-2:]


def _piece(shape: _Shape, block: Block, tiled: int) -> _Piece:
    outer, rows, last = spans = _three(block.output, tiled, (0, 1))
    height, width = shape.outputs
    count = outer[1] - outer[0]
    axis = shape.axes[0]
    return _Piece(
        block,
        (outer, rows, last),
        block.images[1] - block.images[0],
        -(-(rows[1] - rows[0]) // height),
        -(-(last[1] - last[0]) // width),
        (count - 1) * axis.stride + axis.extent,
        spans[0][1] - spans[0][0],
    )


class Winograd:
    """See `cuconv.strategies.Strategy`."""

    name = "winograd"
    capturable = False

    def supports(self, problem: Problem) -> tuple[bool, str]:
        g = problem.geometry
        tiled = _tiled_axes(g)
        outer = g.axes[: g.rank - tiled]
        return verdict(
            (
                problem.op == "input_grad",
                OVER_DY,
            ),
            (
                problem.precision == "strict",
                "precision='strict' allows plain sums of products alone",
            ),
            (
                problem.module != "numpy",
                "its transforms are written for NumPy so far",
            ),
            (
                problem.operand.char not in "fd",
                f"its transforms would round {problem.operand}",
            ),
            (
                not tiled,
                "the last axis needs 2 to 5 taps, stride 1 and dilation 1",
            ),
            (len(outer) > 1, "only one axis may stay outside the transforms"),
            (
                any(axis.kernel > 1 and axis.dilation > 1 for axis in outer),
                "the outer axis needs dilation 1",
            ),
            (
                min(g.group_channels, g.group_filters) < _LEAST_CHANNELS,
                f"fewer than {_LEAST_CHANNELS} channels or filters in a group",
            ),
        )

    def variants(self, problem: Problem) -> tuple[tuple[int, ...], ...]:
        geometry = problem.geometry
        tiled = _tiled_axes(geometry)
        sizes = _TILES[problem.precision]
        found = []
        for n in sizes:
            for axes in range(1, tiled + 1):
                kernels = geometry.kernel[-axes:]
                if all(n > kernel for kernel in kernels) and geometry.rank - axes <= 1:
                    found.append((n,) * axes)
        return tuple(found)

    def describe(self, variant: tuple[int, ...]) -> str:
        return "tiles of " + "×".join(map(str, variant))

    def preferred(self, problem: Problem, leaves: Leaves) -> int:
        del leaves
        g = problem.geometry
        # A frequency has about 16 outputs; two of its cells for each are held.
        cells = (g.channels + g.filters) * 36 / 16
        return max(1, int(_BLOCK_BYTES / (cells * problem.operand.itemsize)))

    def tile(self, problem: Problem, positions: int, variant: tuple[int, ...]) -> Tile:
        geometry = problem.geometry
        shape = _shape(geometry, variant, problem.operand)
        steps = (
            *(1,) * (geometry.rank - len(variant)),
            *shape.outputs[-len(variant) :],
        )
        counts = tuple(
            -(-out // step) for out, step in zip(geometry.out, steps, strict=True)
        )
        share = positions * math.prod(counts) // max(geometry.positions, 1)
        tiles = tile_of(geometry.images, counts, share)
        cells = tuple(n * step for n, step in zip(tiles.cells, steps, strict=True))
        return Tile(tiles.images, cells)

    def lanes(self, problem: Problem, variant: tuple[int, ...]) -> int:
        del variant
        if problem.op != "weight_grad":
            return 1
        cells = 4 * problem.geometry.filters * problem.geometry.patch
        room = _LANE_BYTES // max(cells * problem.operand.itemsize, 1)
        return int(2 ** min(max(room, 1).bit_length() - 1, 3))

    def blocks(self, problem: Problem, cut: Cut) -> Iterator[Block]:
        return problem.geometry.pieces(cut.tile)

    def needs(self, problem: Problem, cut: Cut, leaves: Leaves) -> Needs:
        del leaves
        g, dtype = problem.geometry, problem.operand
        shape = _shape(g, cut.variant, dtype)
        kept = shape.frequencies * g.filters * g.group_channels * shape.axes[0].kernel
        own = [
            Buffer(n, cells, dtype) for n, cells in _sizes(problem, cut, shape).items()
        ]
        own.append(Buffer("bands", _band_cells(shape), dtype))
        turned = Buffer("turned", g.filters * g.patch, dtype)
        if problem.op == "forward":
            weights = (Buffer("w", kept, dtype),)
            return Needs(weights, (turned, *bias_buffer(problem)), tuple(own))
        cells = partial_cells(kept, g.group_filters, cut.tile.positions)
        own.append(Buffer("partial", cells, dtype))
        sums = Buffer("sums", cut.lanes * kept, dtype)
        return Needs((), (sums, turned), tuple(own))

    def pieces(self, problem: Problem, cut: Cut) -> int:
        if problem.op == "weight_grad":
            return cut.lanes
        return problem.geometry.count_blocks(cut.tile)

    def work(self, problem: Problem, cut: Cut) -> Work:
        g = problem.geometry
        shape = _shape(g, cut.variant, problem.operand)
        blocks = g.count_blocks(cut.tile)
        sizes = _sizes(problem, cut, shape)
        height, width = shape.outputs
        tall = -(-shape.axes[1].out // height)
        wide = -(-shape.axes[2].out // width)
        tiles = g.images * shape.axes[0].out * tall * wide
        kept = shape.frequencies * g.filters * g.group_channels * shape.axes[0].kernel
        outer = math.prod(cut.tile.cells[: g.rank - len(cut.variant)])
        rows_in_block = -(-tiles // max(blocks * outer, 1))
        grad = problem.op == "weight_grad"
        return Work(
            multiply=float(tiles) * kept,
            short_side=min(rows_in_block, g.group_filters, g.group_channels),
            copy=blocks * (sizes["q"] + sizes["y"]),
            transform=blocks * (sizes["q"] + sizes["y"]) + (kept * 1.5),
            last_transform=blocks * (sizes["v"] + sizes["z"] * (2 if grad else 1)),
            transpose=g.filters * g.patch,
            reread=(blocks if not grad else blocks + cut.lanes) * kept,
            # Dozens of short steps each, which workers contend for.
            blocks=blocks * (1 + len(cut.variant)) * (2 if grad else 1),
        )

    def weights(self, job: Job, w: Array, kept: dict[str, Array]) -> Array:
        """U as (frequencies, G, outer taps · C/G, K/G)."""
        problem, g = job.problem, job.problem.geometry
        shape = _shape(g, job.cut.variant, problem.operand)
        view = outer_view(filters_of(w, problem), len(job.cut.variant))
        # (G, K, C, outer, rows, last) becomes (last, rows, G, outer, C, K).
        turned = job.shared["turned"].reshape(
            [view.shape[i] for i in (5, 4, 0, 3, 2, 1)]
        )
        with stage("weights", self.name):
            turn(job, view, turned.transpose(2, 5, 4, 3, 1, 0))
            u = kept["w"].reshape(shape.frequencies, -1)
            last, rows = turned.shape[:2]
            _bands(job, turned.reshape(last, rows, -1), u, shape)
        outer = shape.axes[0].kernel * g.group_channels
        return u.reshape(shape.frequencies, g.groups, outer, g.group_filters)

    def forward(
        self, job: Job, x: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        geometry, tiled = job.problem.geometry, len(job.cut.variant)
        shape = _shape(geometry, job.cut.variant, job.problem.operand)
        offset = take_bias(job, bias)
        x, y = in_groups(x, geometry), in_groups(out, geometry)

        def body(chunk: int, block: Block, buffers: dict[str, Array]) -> None:
            piece = _piece(shape, block, tiled)
            with stage("gather", self.name, chunk):
                cells = x[slice(*block.images)]
                v = _inputs(job, cells, piece, shape, buffers)
            with stage("gemm", self.name, chunk):
                m = _products(job, v, weights, piece, shape, buffers)
            with stage("scatter", self.name, chunk):
                into = outer_view(output_cells(y, block), tiled)
                _outputs(job, m, offset, into, piece, shape, buffers)

        job.each(job.blocks, body)

    def input_grad(self, job: Job, dy: Array, weights: Array, out: Array) -> None:
        raise NotImplementedError  # refused by `supports`

    def weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        geometry, tiled = job.problem.geometry, len(job.cut.variant)
        shape = _shape(geometry, job.cut.variant, job.problem.operand)
        x, dy = in_groups(x, geometry), in_groups(dy, geometry)
        outer = shape.axes[0].kernel * geometry.group_channels
        sums = job.shared["sums"].reshape(
            job.cut.lanes, shape.frequencies, geometry.groups, outer, -1
        )

        def body(number: int, lane: int, buffers: dict[str, Array]) -> None:
            del number
            sums[lane] = 0
            lanes = job.cut.lanes
            for chunk, block in islice(enumerate(job.blocks), lane, None, lanes):
                piece = _piece(shape, block, tiled)
                with stage("gather", self.name, chunk):
                    cells = x[slice(*block.images)]
                    v = _inputs(job, cells, piece, shape, buffers)
                    d = _gradients(job, output_cells(dy, block), piece, shape, buffers)
                with stage("gemm", self.name, chunk):
                    _add_products(job, v, d, sums[lane], piece, shape, buffers)

        job.each(range(job.cut.lanes), body)
        add_lanes(job, list(sums))
        with stage("weights", self.name):
            _finish(job, sums[0], out, shape)


def _sizes(problem: Problem, cut: Cut, shape: _Shape) -> dict[str, int]:
    """Cells of every buffer of a worker, for the largest block."""
    g, tile = problem.geometry, cut.tile
    (rows_out, last_out), (rows_in, last_in) = shape.outputs, shape.inputs
    tiled = len(cut.variant)
    outer_out = math.prod(tile.cells[: g.rank - tiled])
    axis = shape.axes[0]
    outer_in = (outer_out - 1) * axis.stride + axis.extent
    rows = tile.cells[-2] if tiled == 2 else 1
    tall, wide = -(-rows // rows_out), -(-tile.cells[-1] // last_out)
    runs = tile.images * tall
    width = wide * last_out + last_in - last_out
    inputs = runs * outer_in * g.channels
    outputs = runs * outer_out * g.filters
    return {
        "q": rows_in * inputs * width,
        "r": rows_in * inputs * width if rows_in > 1 else 0,
        "v": rows_in * last_in * wide * inputs,
        "z": rows_in * outputs * wide * last_out,
        "y": rows_out * outputs * wide * last_out if rows_in > 1 else 0,
        "m": rows_in * last_in * wide * outputs,
    }


def _band_cells(shape: _Shape) -> int:
    """Room for a strip of weights transformed along rows."""
    taps = shape.tiles[1].filter.shape[1]
    cells: int = shape.inputs[0] * taps * (_COLUMNS // shape.frequencies)
    return cells


def _within(first: int, step: int, count: int, size: int) -> tuple[int, int]:
    """Which of ``first + step · i``, i < count, lie in [0, size)."""
    start = min(max(-(first // step), 0), count)
    stop = min(max(-((first - size) // step), start), count)
    return start, stop


def _inputs(
    job: Job, x: Array, piece: _Piece, shape: _Shape, buffers: dict[str, Array]
) -> Array:
    """V: the input tiles under a block, transformed."""
    x = outer_view(x, len(job.cut.variant))
    steps, sizes = shape.outputs, shape.inputs
    width = (piece.wide - 1) * steps[1] + sizes[1]
    shown = _rows_shape(piece, x, piece.outer_in, sizes[0], width)
    q = buffers["q"][: math.prod(shown)].reshape(shown)
    firsts = [a.first(s[0]) for a, s in zip(shape.axes, piece.spans, strict=True)]
    _copy_rows(job, x, q, firsts, steps[0])
    rows = None if shape.tiles[0] is None else shape.tiles[0].input
    last = shape.tiles[1].input
    both = buffers["r"], buffers["v"]
    return _transformed(job, q, (rows, last), steps[1], piece.wide, both)


def _gradients(
    job: Job, dy: Array, piece: _Piece, shape: _Shape, buffers: dict[str, Array]
) -> Array:
    """D: the tiles of dy in a block, transformed by the adjoint of the outputs'."""
    dy = outer_view(dy, len(job.cut.variant))
    height, width = shape.outputs
    sizes = _rows_shape(piece, dy, piece.outer_out, height, piece.wide * width)
    flat = buffers["y"] if shape.tiles[0] is not None else buffers["z"]
    q = flat[: math.prod(sizes)].reshape(sizes)
    _copy_rows(job, dy, q, [0, 0, 0], height)
    rows = None if shape.tiles[0] is None else shape.tiles[0].output.T
    last = shape.tiles[1].output.T
    both = buffers["z"], buffers["m"]
    return _transformed(job, q, (rows, last), width, piece.wide, both)


def _rows_shape(
    piece: _Piece, cells: Array, outer: int, rows: int, width: int
) -> tuple[int, ...]:
    """The shape of Q or Y: (a, n, th, g, d, c, w)."""
    return rows, piece.images, piece.tall, cells.shape[1], outer, cells.shape[2], width


def _copy_rows(job: Job, x: Array, q: Array, firsts: list[int], step: int) -> None:
    """Copy x (N, G, C, outer, rows, last) to Q, zeros where tiles leave it."""
    rows, _, tall, _, outer, _, width = q.shape
    height = x.shape[4]
    d0, d1 = _within(firsts[0], 1, outer, x.shape[3])
    w0, w1 = _within(firsts[2], 1, width, x.shape[5])
    for axis, start, stop in ((4, d0, d1), (6, w0, w1)):
        for gap in (slice(0, start), slice(stop, q.shape[axis])):
            if gap.start < gap.stop:
                q[(slice(None),) * axis + (gap,)] = 0
    x = x[:, :, :, firsts[0] + d0 : firsts[0] + d1]
    x = x[..., firsts[2] + w0 : firsts[2] + w1].transpose(0, 4, 1, 3, 2, 5)
    into = q[:, :, :, :, d0:d1, :, w0:w1]
    # Tiles whose rows all exist are one copy; one that leaves x is a copy of its own.
    t0 = min(max(-(firsts[1] // step), 0), tall)
    t1 = min(max((height - rows - firsts[1]) // step + 1, t0), tall)
    if t1 > t0 and into.size:
        tiles = _tiles_of(job, x[:, firsts[1] + step * t0 :], t1 - t0, rows, step)
        job.leaves.copy(tiles, into[:, :, t0:t1])
    for t in (*range(t0), *range(t1, tall)):
        first = firsts[1] + step * t
        a0, a1 = _within(first, 1, rows, height)
        q[:a0, :, t] = 0
        q[a1:, :, t] = 0
        if a1 > a0 and into.size:
            part = x[:, first + a0 : first + a1].swapaxes(0, 1)
            job.leaves.copy(part, into[a0:a1, :, t])


def _tiles_of(job: Job, x: Array, tall: int, rows: int, step: int) -> Array:
    """View x (n, rows, …) as (a, n, th, …): row a of every tile."""
    image, row, *rest = x.strides
    shape = (rows, x.shape[0], tall, *x.shape[2:])
    strides = (row, image, step * row, *rest)
    strided: Any = job.leaves.xp.lib.stride_tricks.as_strided
    tiles: Array = strided(x, shape, strides)
    return tiles


def _transformed(
    job: Job,
    q: Array,
    matrices: tuple[Array | None, Array],
    step: int,
    wide: int,
    buffers: tuple[Array, Array],
) -> Array:
    """Transform (a, …, w) to (j, i, tw, …): from the first buffer to the second."""
    (rows, last), (between, into) = matrices, buffers
    width, lines = q.shape[-1], q[0].size // q.shape[-1]
    if rows is not None:
        q = _product_of(job, rows, q.reshape(q.shape[0], -1), between)
    count = q.shape[0]
    q = q.reshape(count, lines, width)
    windows = _windows_of(job, q, wide, last.shape[1], step)
    v = into[: last.shape[0] * count * wide * lines]
    v = v.reshape(last.shape[0], count, wide, lines)
    job.leaves.xp.matmul(last, windows, out=v.transpose(1, 2, 0, 3))
    return v


def _windows_of(job: Job, rows: Array, wide: int, size: int, step: int) -> Array:
    """View (i, lines, w) as (i, tw, size, lines): the tiles of every line."""
    i, line, cell = rows.strides
    shape = (rows.shape[0], wide, size, rows.shape[1])
    strided: Any = job.leaves.xp.lib.stride_tricks.as_strided
    windows: Array = strided(rows, shape, (i, step * cell, cell, line))
    return windows


def _product_of(job: Job, matrix: Array, cells: Array, into: Array) -> Array:
    """``matrix @ cells``, so many columns at a time that BLAS need not pack them.

    In one call if the columns can be parted evenly: each call takes the interpreter's
    lock, for which workers wait.
    """
    columns, matmul = cells.shape[1], job.leaves.xp.matmul
    out = into[: matrix.shape[0] * columns].reshape(-1, columns)
    least = -(-columns // _COLUMNS)
    even = [n for n in range(least, 2 * least + 8) if n and columns % n == 0]
    if even:
        apart = cells.reshape(cells.shape[0], even[0], -1).swapaxes(0, 1)
        target = out.reshape(out.shape[0], even[0], -1).swapaxes(0, 1)
        matmul(matrix, apart, out=target)
        return out
    for start in range(0, columns, _COLUMNS):
        part = slice(start, start + _COLUMNS)
        matmul(matrix, cells[:, part], out=out[:, part])
    return out


def _stacked(job: Job, v: Array, piece: _Piece, shape: _Shape, groups: int) -> Array:
    """View V as (frequency, g, outer output, tile, outer taps · c)."""
    axis = shape.axes[0]
    tiles = piece.wide * piece.images * piece.tall
    cells = v.reshape(shape.frequencies, tiles, groups, piece.outer_in, -1)
    frequency, tile, group, outer, channel = cells.strides
    sizes = (
        shape.frequencies,
        groups,
        piece.outer_out,
        tiles,
        axis.kernel * cells.shape[-1],
    )
    strides = (frequency, group, outer * axis.stride, tile, channel)
    strided: Any = job.leaves.xp.lib.stride_tricks.as_strided
    stacked: Array = strided(cells, sizes, strides)
    return stacked


def _matrices_of(flat: Array, piece: _Piece, shape: _Shape, groups: int) -> Array:
    """View M or D as (frequency, g, outer output, tile, k)."""
    tiles = piece.wide * piece.images * piece.tall
    cells = flat.reshape(shape.frequencies, tiles, groups, piece.outer_out, -1)
    return cells.transpose(0, 2, 3, 1, 4)


def _products(
    job: Job,
    v: Array,
    weights: Array,
    piece: _Piece,
    shape: _Shape,
    buffers: dict[str, Array],
) -> Array:
    """M = V · U, every frequency."""
    g = job.problem.geometry
    tiles = piece.wide * piece.images * piece.tall
    flat = buffers["m"][: shape.frequencies * tiles * piece.outer_out * g.filters]
    m = _matrices_of(flat, piece, shape, g.groups)
    job.leaves.gemm(_stacked(job, v, piece, shape, g.groups), weights[:, :, None], m)
    return flat


def _outputs(
    job: Job,
    m: Array,
    bias: Array | None,
    y: Array,
    piece: _Piece,
    shape: _Shape,
    buffers: dict[str, Array],
) -> None:
    """Transform M back, and write the block of y (N, G, K, outer, rows, last)."""
    xp = job.leaves.xp
    rows, last = shape.tiles
    (count, size), (height, width) = shape.inputs, shape.outputs
    m = m.reshape(size, count, piece.wide, -1)
    z = buffers["z"][: count * m.shape[3] * piece.wide * width]
    z = z.reshape(count, m.shape[3], piece.wide, width)
    xp.matmul(m.transpose(1, 2, 3, 0), last.output.T, out=z.swapaxes(1, 2))
    cells = z.reshape(count, -1)
    if rows is not None:
        cells = _product_of(job, rows.output, cells, buffers["y"])
    sizes = _rows_shape(piece, y, piece.outer_out, height, piece.wide * width)
    cells = cells.reshape(sizes)
    if bias is not None:
        # (1, G, K, 1) beside (a, n, th, g, d, k, w).
        xp.add(cells, bias[0][:, None], out=cells)
    cells = cells[..., : y.shape[5]]
    whole = y.shape[4] // height
    if whole:
        # Whole tiles are one copy: (N, G, K, outer, th, a, last).
        tiles = y[..., : whole * height, :]
        tiles = tiles.reshape(*y.shape[:4], whole, height, y.shape[5])
        job.leaves.copy(cells[:, :, :whole], tiles.transpose(5, 0, 4, 1, 3, 2, 6))
    rest = y[..., whole * height :, :].transpose(4, 0, 1, 3, 2, 5)
    if rest.size:
        job.leaves.copy(cells[: len(rest), :, whole], rest)


def _add_products(
    job: Job,
    v: Array,
    d: Array,
    total: Array,
    piece: _Piece,
    shape: _Shape,
    buffers: dict[str, Array],
) -> None:
    """``total += Vᵀ · D``, every frequency, summed over the outer axis."""
    groups = job.problem.geometry.groups
    stacked = _stacked(job, v, piece, shape, groups).swapaxes(-1, -2)
    gradients = _matrices_of(d, piece, shape, groups)
    for outer in range(piece.outer_out):
        job.leaves.gemm(
            stacked[:, :, outer],
            gradients[:, :, outer],
            total,
            add=True,
            partial=buffers["partial"],
        )


def _strips(cells: int, shape: _Shape) -> Iterator[slice]:
    step = _COLUMNS // shape.frequencies
    return (slice(i, i + step) for i in range(0, cells, step))


def _bands(job: Job, taps: Array, u: Array, shape: _Shape) -> None:
    """U from weights (last taps, row taps, cells): two small products a strip."""
    xp = job.leaves.xp
    rows, last = shape.tiles
    (count, size) = shape.inputs
    out = u.reshape(size, count, -1)

    def body(number: int, strip: slice, own: dict[str, Array]) -> None:
        del number
        part = taps[..., strip]
        if rows is not None:
            band = own["bands"][: part.shape[0] * count * part.shape[2]]
            band = band.reshape(part.shape[0], count, part.shape[2])
            xp.matmul(rows.filter, part, out=band)
            part = band
        xp.matmul(last.filter, part.swapaxes(0, 1), out=out[..., strip].swapaxes(0, 1))

    job.each(_strips(taps.shape[2], shape), body)


def _finish(job: Job, total: Array, out: Array, shape: _Shape) -> None:
    """Write Gᵀ dU G, every filter, to the gradient for the weights."""
    xp, problem = job.leaves.xp, job.problem
    rows, last = shape.tiles
    count, size = shape.inputs
    view = outer_view(filters_of(out, problem), len(job.cut.variant))
    taps = job.shared["turned"].reshape([view.shape[i] for i in (5, 4, 0, 3, 2, 1)])
    flat = taps.reshape(*taps.shape[:2], -1)
    source = total.reshape(size, count, -1)

    def body(number: int, strip: slice, own: dict[str, Array]) -> None:
        del number
        part = source[..., strip]
        band = own["bands"][: count * flat.shape[0] * part.shape[2]]
        band = band.reshape(count, flat.shape[0], part.shape[2])
        xp.matmul(last.filter.T, part.swapaxes(0, 1), out=band)
        across = band.swapaxes(0, 1)
        if rows is None:
            flat[..., strip] = across
        else:
            xp.matmul(rows.filter.T, across, out=flat[..., strip])

    job.each(_strips(flat.shape[2], shape), body)
    turn(job, taps.transpose(2, 5, 4, 3, 1, 0), view)
