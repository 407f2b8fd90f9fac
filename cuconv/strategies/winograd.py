"""Winograd's minimal filtering: small kernels of stride 1 with fewer multiplications.

Along one axis, a tile of n = m + r - 1 input elements d gives the m outputs of a filter
g of r taps as

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

On NumPy the transforms are small matrix products (`winograd_products`), on CUDA kernels
(`winograd_kernels`).

Source: A. Lavin, S. Gray, "Fast algorithms for convolutional neural networks", 2016;
the matrices are those of Toom and Cook (S. Winograd, "Arithmetic complexity of
computations", 1980, chapter IV).
"""

import math
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import islice

import numpy as np

from cuconv.arrays import Array, DType
from cuconv.backends import Backend
from cuconv.engine.costs import Work
from cuconv.engine.problem import Problem, in_groups
from cuconv.geometry import Block, ConvGeometry, Tile, tile_of
from cuconv.memory import Buffer
from cuconv.strategies.base import (
    OVER_DY,
    ForwardOnly,
    Job,
    Tiling,
    Tilings,
    Workspace,
    add_splits,
    bias_buffer,
    output_cells,
    take_bias,
    three_axes,
)
from cuconv.strategies.winograd_kernels import TileKernels, kernels_work
from cuconv.strategies.winograd_products import Products, products_work
from cuconv.strategies.winograd_tiles import Matrices, Shape, Transforms, piece_of

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
# The most bytes of sums of weight gradients in all splits.
_SPLIT_BYTES = 24 * 2**20


@lru_cache(maxsize=64)
def matrices(m: int, r: int, dtype: DType) -> Matrices:
    """The transforms of F(m, r) after Toom and Cook, in exact small fractions.

    With points p_0 … p_{n-2} and infinity, Aᵀ evaluates the powers up to m - 1 at the
    points; G those up to r - 1, divided by Π (p_i - p_l); and Bᵀ has the coefficients
    of the Lagrange numerators, so that Aᵀ [(G g) ⊙ (Bᵀ d)] is the correlation.
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


def _tiled_axes(geometry: ConvGeometry) -> int:
    """The number of last axes that can be transformed: 0, 1 or 2."""
    count = 0
    for axis in reversed(geometry.axes[-2:]):
        if axis.kernel not in _KERNELS or axis.stride != 1 or axis.dilation != 1:
            break
        count += 1
    return count


@lru_cache(maxsize=256)
def _shape(geometry: ConvGeometry, variant: tuple[int, ...], dtype: DType) -> Shape:
    tiled = len(variant)
    sizes = [
        matrices(n - axis.kernel + 1, axis.kernel, dtype)
        for n, axis in zip(variant, geometry.axes[-tiled:], strict=True)
    ]
    axes = three_axes(geometry, tiled)
    lines = geometry.filters * geometry.group_channels * axes[0].kernel
    return Shape(axes, (None if tiled == 1 else sizes[0], sizes[-1]), lines)


class Winograd(ForwardOnly):
    """See `cuconv.strategies.Strategy`."""

    name = "winograd"
    libraries: tuple[str, ...] = ("cublas",)
    capturable = False
    on_tensor_cores = False
    gains_from_size = True
    by_runs = False

    def supports(self, problem: Problem) -> tuple[bool, str]:
        reason = next(_refusals(problem), "")
        return not reason, reason

    def variants(
        self, problem: Problem, backend: Backend
    ) -> tuple[tuple[int, ...], ...]:
        """Tile sizes along the axes that are transformed."""
        del backend
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

    def tilings(
        self, problem: Problem, variant: tuple[int, ...], backend: Backend
    ) -> Tilings:
        g, itemsize = problem.geometry, problem.operand.itemsize
        # A frequency has about 16 outputs, with two elements for each in buffers.
        cells = (g.channels + g.filters) * 36 / 16
        positions = max(1, int(backend.block_bytes / (cells * itemsize)))
        tile = partial(_tile, g, _shape(g, variant, problem.operand), len(variant))
        if problem.op != "weight_grad":
            return Tilings(positions, tile)
        room = _SPLIT_BYTES // max(4 * g.filters * g.patch * itemsize, 1)
        splits = int(2 ** min(max(room, 1).bit_length() - 1, 3))
        return Tilings(positions, tile, splits)

    def workspace(
        self, problem: Problem, tiling: Tiling, backend: Backend
    ) -> Workspace:
        g, dtype = problem.geometry, problem.operand
        shape = _shape(g, tiling.variant, dtype)
        way = _transforms(backend)
        shared, own = way.shared(problem), way.own(problem, tiling, shape)
        kept = shape.weight_cells
        if problem.op == "forward":
            weights = (Buffer("w", kept, dtype),)
            return Workspace(weights, (*shared, *bias_buffer(problem)), own)
        return Workspace(
            (), (Buffer("sums", tiling.splits * kept, dtype), *shared), own
        )

    def work(self, problem: Problem, tiling: Tiling) -> Work:
        g = problem.geometry
        shape = _shape(g, tiling.variant, problem.operand)
        blocks = g.count_blocks(tiling.tile)
        tiles = g.images * math.prod(shape.counts)
        kept = shape.weight_cells
        outer = tiling.tile.cells[0] if g.rank > len(tiling.variant) else 1
        rows_in_block = -(-tiles // max(blocks * outer, 1))
        grad = problem.op == "weight_grad"
        count = products_work if problem.module == "numpy" else kernels_work
        work = {
            "multiply": float(tiles) * kept,
            "short_side": min(rows_in_block, g.group_filters, g.group_channels),
            "reread": (blocks if not grad else blocks + tiling.splits) * kept,
            "pieces": tiling.splits if grad else blocks,
        }
        return Work(**{**work, **count(problem, tiling, shape, blocks)})

    def weights(self, job: Job, w: Array, kept: dict[str, Array]) -> Array:
        """U as (frequencies, G, outer taps · C/G, K/G)."""
        shape = _shape(job.problem.geometry, job.tiling.variant, job.problem.operand)
        with job.backend.stage("weights", self.name):
            return _transforms(job.backend).weights(job, w, kept["w"], shape)

    def forward(
        self, job: Job, x: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        geometry, tiled = job.problem.geometry, len(job.tiling.variant)
        shape = _shape(geometry, job.tiling.variant, job.problem.operand)
        way, offset = _transforms(job.backend), take_bias(job, bias)
        x, y = in_groups(x, geometry), in_groups(out, geometry)

        def body(chunk: int, block: Block, buffers: dict[str, Array]) -> None:
            piece = piece_of(shape, block, tiled)
            into = output_cells(y, block)
            with job.backend.stage("gather", self.name, chunk):
                v = way.inputs(job, x[slice(*block.images)], piece, buffers)
            with job.backend.stage("gemm", self.name, chunk):
                m = way.room(job, into, piece, buffers)
                job.backend.gemm(v, weights[:, :, None], m)
            with job.backend.stage("scatter", self.name, chunk):
                way.outputs(job, offset, into, piece, buffers)

        job.each(job.blocks, body)

    def weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        geometry, tiled = job.problem.geometry, len(job.tiling.variant)
        shape = _shape(geometry, job.tiling.variant, job.problem.operand)
        way = _transforms(job.backend)
        x, dy = in_groups(x, geometry), in_groups(dy, geometry)
        sums = job.shared["sums"].reshape(job.tiling.splits, shape.frequencies, -1)

        def body(number: int, split: int, buffers: dict[str, Array]) -> None:
            del number
            job.backend.fill(sums[split], 0)
            total = way.sums(job, sums[split], out, shape)
            splits = job.tiling.splits
            for chunk, block in islice(enumerate(job.blocks), split, None, splits):
                piece = piece_of(shape, block, tiled)
                with job.backend.stage("gather", self.name, chunk):
                    v = way.inputs(job, x[slice(*block.images)], piece, buffers)
                    d = way.gradients(job, output_cells(dy, block), piece, buffers)
                with job.backend.stage("gemm", self.name, chunk):
                    _add_products(job, v, d, total, buffers)

        job.each(range(job.tiling.splits), body)
        add_splits(job, list(sums))
        with job.backend.stage("weights", self.name):
            way.taps(job, sums[0], out, shape)


def _tile(geometry: ConvGeometry, shape: Shape, tiled: int, positions: int) -> Tile:
    """Tiles of the transforms with at most so many positions; one at least."""
    counts, (height, width) = shape.counts, shape.outputs
    share = positions * math.prod(counts) // max(geometry.positions, 1)
    images, (outer, tall, wide) = tile_of(geometry.images, counts, share)
    cells = outer, tall * height, wide * width
    # Of (outer, rows, last), those that there are.
    if geometry.rank == 2 and tiled == 1:
        return Tile(images, cells[::2])
    return Tile(images, cells[-geometry.rank :])


def _refusals(problem: Problem) -> Iterator[str]:
    g = problem.geometry
    tiled = _tiled_axes(g)
    outer = g.axes[: g.rank - tiled]
    if problem.op == "input_grad":
        yield OVER_DY
    if problem.precision == "strict":
        yield "precision='strict' allows only direct sums of products"
    if problem.operand.char not in "fd":
        yield f"its transforms would round {problem.operand}"
    if not tiled:
        yield "the last axis needs 2 to 5 taps, stride 1 and dilation 1"
    if len(outer) > 1:
        yield "only one axis may be outside the transforms"
    if any(axis.kernel > 1 and axis.dilation > 1 for axis in outer):
        yield "the outer axis needs dilation 1"
    if min(g.group_channels, g.group_filters) < _LEAST_CHANNELS:
        yield f"fewer than {_LEAST_CHANNELS} channels or filters in a group"


def _transforms(backend: Backend) -> Transforms:
    """Transforms by kernels if the backend has them, else by products."""
    return Products() if backend.tiles is None else TileKernels(backend.tiles)


def _add_products(
    job: Job, v: Array, d: Array, total: Array, buffers: dict[str, Array]
) -> None:
    """``total += Vᵀ · D``, every frequency, summed over the outer axis."""
    for outer in range(v.shape[2]):
        job.backend.gemm(
            v[:, :, outer].swapaxes(-1, -2),
            d[:, :, outer],
            total,
            add=True,
            partial=buffers.get("partial"),
        )
