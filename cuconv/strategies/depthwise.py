"""Few channels in a group: direct loops over one plane at a time, compiled.

The sums of the definition, without columns and without BLAS.  For NumPy arrays, the
planes are copied with their padding: loops of `cuconv.backends.cpu.loops` run over
them where Numba is installed, else NumPy's own (`cuconv.backends.cpu.planes`).  For
CuPy arrays, kernels without copies (`cuconv.backends.DirectConv`).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cuconv.arrays import Array
from cuconv.backends import Backend, jit_is_installed
from cuconv.backends.cpu import planes
from cuconv.engine.costs import LAUNCHES, Work
from cuconv.engine.problem import Problem, in_groups
from cuconv.geometry import Axis, ConvGeometry, Tile
from cuconv.memory import Buffer
from cuconv.strategies.base import (
    Job,
    OneWay,
    Tiling,
    Tilings,
    Workspace,
    bias_buffer,
    filters_of,
    outer_view,
    take_bias,
    three_axes,
    words_of,
)

_OPERANDS = {
    "forward": ("x", "out"),
    "input_grad": ("dy", "out"),
    "weight_grad": ("dy", "x"),
}
_MOST_CHANNELS = 4
_TASKS = 8
# Elements of the planes that are taken together: with their sums, half of an L1 cache.
_RUN = 8192
# The buffers of `planes.convolve` and `planes.correlate`.
_PLANES = "scratch", "sums", "more", "tiles"
# How much longer than an element of `Rates.einsum` others take: those of loops that
# NumPy buffers, those of a dot product, and each dot product.
_BUFFERED, _DOT, _SHORT_DOT = 2.4, 0.5, 130


class Depthwise(OneWay):
    """See `cuconv.strategies.Strategy`."""

    name = "depthwise"
    libraries: tuple[str, ...] = ()
    capturable = True
    on_tensor_cores = False

    def supports(self, problem: Problem) -> tuple[bool, str]:
        reason = next(_refusals(problem), "")
        return not reason, reason

    def tilings(self, problem: Problem, variant: None, backend: Backend) -> Tilings:
        del variant, backend
        # Planes are never split; channels are distributed to workers.  On CUDA one
        # launch computes all images.
        g = problem.geometry
        images = 1 if problem.module == "numpy" else max(g.images, 1)
        tile = Tile(images, tuple(max(n, 1) for n in g.out))
        return Tilings(g.images * g.positions, lambda _: tile)

    def workspace(
        self, problem: Problem, tiling: Tiling, backend: Backend
    ) -> Workspace:
        del tiling
        if backend.direct is not None:
            return Workspace()
        g, dtype = problem.geometry, problem.operand
        if not _is_compiled(problem):
            return _buffers_of_planes(problem)
        cells = math.prod(_scratch_shape(problem))
        own = (Buffer("scratch", cells, dtype), Buffer("sums", cells, dtype))
        weights = Buffer("w", g.filters * g.patch, dtype)
        if problem.op == "weight_grad":
            return Workspace((), (weights,), own)
        return Workspace(
            (weights,), (Buffer("bias", problem.result_channels, dtype),), own
        )

    def work(self, problem: Problem, tiling: Tiling) -> Work:
        del tiling
        g = problem.geometry
        if problem.module != "numpy":
            arrays = g.images * (g.channels * g.cells + g.filters * g.positions)
            pieces = min(_channels(problem), _TASKS)
            return Work(
                direct=g.multiplications,
                moved=words_of(problem, arrays),
                blocks=1 / LAUNCHES,
                pieces=pieces,
            )
        if not _is_compiled(problem):
            return _work_of_planes(problem)
        cells = g.images * math.prod(_scratch_shape(problem)[1:])
        return Work(
            direct=cells * g.filters * g.patch,
            copy=cells * max(g.filters, g.channels),
            pieces=min(_channels(problem), _TASKS),
        )

    def weights(self, job: Job, w: Array, kept: dict[str, Array]) -> Array:
        view = outer_view(filters_of(w, job.problem), job.problem.geometry.rank)
        if job.backend.direct is not None:
            return view
        copy = kept["w"].reshape(view.shape)
        job.backend.copy(view, copy)
        if job.problem.conjugates_weights:
            job.backend.do(job.backend.xp.conjugate, copy, copy)
        return copy

    def forward(
        self, job: Job, x: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        g, direct = job.problem.geometry, job.backend.direct
        x, y = _planes_of(x, g), _planes_of(out, g)
        if direct is not None:
            conjugated = job.problem.conjugates_weights
            with job.backend.stage("direct", self.name):
                direct.convolve(
                    x, weights, bias, y, three_axes(g), conjugated=conjugated
                )
            return
        if not _is_compiled(job.problem):
            self._run_planes(job, planes.convolve, (x, weights, *_bias(job, bias), y))
            return
        offset = _offset(job, bias)
        self._run(job, "convolve", (x, weights, offset, y, _input_axes(g)))

    def input_grad(
        self, job: Job, dy: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        g, direct = job.problem.geometry, job.backend.direct
        dy, dx = _planes_of(dy, g), _planes_of(out, g)
        transposed = weights.swapaxes(1, 2)
        if direct is not None:
            how = {"adjoint": True, "conjugated": job.problem.conjugates_weights}
            with job.backend.stage("direct", self.name):
                direct.convolve(dy, transposed, bias, dx, three_axes(g), **how)
            return
        if not _is_compiled(job.problem):
            operands = dy, transposed, *_bias(job, bias), dx
            self._run_planes(job, planes.convolve, operands)
            return
        flipped, offset = transposed[..., ::-1, ::-1, ::-1], _offset(job, bias)
        self._run(job, "convolve", (dy, flipped, offset, dx, _adjoint_axes(g)))

    def weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        g, direct = job.problem.geometry, job.backend.direct
        x, dy = _planes_of(x, g), _planes_of(dy, g)
        view = outer_view(filters_of(out, job.problem), g.rank)
        if direct is not None:
            with job.backend.stage("direct", self.name):
                direct.correlate(x, dy, view, three_axes(g))
            return
        sums = job.shared["w"].reshape(view.shape)
        if _is_compiled(job.problem):
            axes = _input_axes(g), _strided_axes(g)
            self._run(job, "correlate", (dy, x, sums, *axes))
        else:
            self._run_planes(job, planes.correlate, (dy, x, sums))
        job.backend.copy(sums, view)

    def _run(self, job: Job, name: str, arguments: tuple[Any, ...]) -> None:
        """Distribute the channels to workers, a range of them at a time."""
        from cuconv.backends.cpu import loops as jit  # noqa: PLC0415 - Numba, when first needed

        loop = getattr(jit, name)
        channels = _channels(job.problem)
        step = -(-channels // min(channels, _TASKS))
        tasks = [(i, min(i + step, channels)) for i in range(0, channels, step)]
        shape = _scratch_shape(job.problem)

        def body(number: int, task: tuple[int, int], own: dict[str, Array]) -> None:
            scratch, sums = own["scratch"].reshape(shape), own["sums"].reshape(shape)
            with job.backend.stage("direct", self.name, number):
                job.backend.do(loop, *arguments, scratch, sums, *task)

        job.each(tasks, body)

    def _run_planes(
        self, job: Job, function: Callable[..., None], arguments: tuple[Any, ...]
    ) -> None:
        """Distribute the groups to workers, a range of them at a time."""
        layout, groups = _layout(job.problem), job.problem.geometry.groups
        pieces = range(0, groups, layout.piece)

        def body(number: int, begin: int, own: dict[str, Array]) -> None:
            buffers = [own[name] for name in _PLANES]
            end = min(begin + layout.piece, groups)
            with job.backend.stage("direct", self.name, number):
                job.backend.do(function, *arguments, layout, *buffers, begin, end)

        job.each(pieces, body)


def _refusals(problem: Problem) -> Iterator[str]:
    g = problem.geometry
    if g.rank > 3:
        yield f"{g.rank} axes, 3 at most"
    if g.groups == 1:
        yield "there is one group"
    if g.group_channels > _MOST_CHANNELS:
        yield f"{g.group_channels} channels in a group, {_MOST_CHANNELS} at most"
    own = _planes_refuse if problem.module == "numpy" else _kernels_refuse
    yield from own(problem)
    if problem.flipped:
        yield "it would insert zeros into dy for a stride"


def _planes_refuse(problem: Problem) -> Iterator[str]:
    """The reasons against sums over NumPy arrays."""
    if problem.operand.kind not in "iufc":
        yield f"it does not add {problem.operand}"


def _is_compiled(problem: Problem) -> bool:
    """True if loops that Numba compiles run: for floats that need no cast."""
    zero_copy = problem.zero_copy.issuperset(_OPERANDS[problem.op])
    return problem.operand.char in "fd" and zero_copy and jit_is_installed()


def _kernels_refuse(problem: Problem) -> Iterator[str]:
    """The reasons against the kernels over CuPy arrays."""
    g = problem.geometry
    # A kernel adds up a few such lengths; products of strides are the longest.
    far = max(
        *(abs(a.before) + a.size + a.stride * max(a.out, a.dilation) for a in g.axes),
        *(axis.extent + axis.stride**2 * (axis.out > 1) for axis in g.axes),
        *(g.images, g.channels, g.filters, g.taps),
    )
    if problem.operand.kind in "biu":
        yield f"its kernels do not add {problem.operand}"
    if not problem.uniform:
        yield "the arrays have several types"
    if far >= 2**30:
        yield f"lengths of {far} elements, less than 2^30 at most"


def _channels(problem: Problem) -> int:
    """The number of independent pieces."""
    g = problem.geometry
    if problem.op == "weight_grad":
        return g.filters * g.group_channels
    return g.filters if problem.op == "forward" else g.channels


def _layout(problem: Problem) -> planes.Layout:
    """The planes of a problem that is not compiled."""
    g, last = problem.geometry, not problem.geometry.channels_first
    return planes.layout_of(three_axes(g), g.groups, g.images, problem.op, last=last)


def _buffers_of_planes(problem: Problem) -> Workspace:
    g, layout = problem.geometry, _layout(problem)
    ends = g.group_channels, g.group_filters
    if problem.op == "input_grad":
        ends = g.group_filters, g.group_channels
    sizes = planes.sizes_of(layout, problem.op, *ends)
    pairs = zip(_PLANES, sizes, strict=True)
    own = tuple(Buffer(name, size, problem.operand) for name, size in pairs)
    unseen = planes.BUFFERED * problem.operand.itemsize
    weights = Buffer("w", g.filters * g.patch, problem.operand)
    if problem.op == "weight_grad":
        return Workspace((), (weights,), own, unseen)
    return Workspace((weights,), bias_buffer(problem), own, unseen)


def _work_of_planes(problem: Problem) -> Work:
    g, layout = problem.geometry, _layout(problem)
    cells, copies = g.images * layout.plane, g.images * g.channels * g.cells
    if problem.op != "weight_grad":
        factor = 1 if layout.has_long_loops else _BUFFERED
    elif layout.last:
        factor = _BUFFERED
    else:
        factor = _DOT + _SHORT_DOT / layout.cells
    strided = g.channels_first and layout.stride[2] > 1
    runs = -(-g.groups // layout.groups) * -(-g.images // layout.images)
    return Work(
        einsum=cells * g.filters * g.patch * factor,
        copy=2 * (copies * (1 + strided) + g.images * g.filters * g.positions),
        blocks=runs * (4 + 4 * len(layout.phases)),
        pieces=-(-g.groups // layout.piece),
    )


def _bias(job: Job, bias: Array | None) -> tuple[Array | None]:
    """The bias as (G, K/G, 1, 1, 1), in the type of the sums."""
    offset = take_bias(job, bias)
    if offset is None:
        return (None,)
    return (offset.reshape(job.problem.geometry.groups, -1, 1, 1, 1),)


def _offset(job: Job, bias: Array | None) -> Array:
    """The initial value of sums: (G, K/G), or (G, C/G) for the input gradient."""
    offset = job.shared["bias"]
    if bias is None:
        job.backend.fill(offset, 0)
    else:
        job.backend.copy(bias, offset)
    return offset.reshape(job.problem.geometry.groups, -1)


def _planes_of(array: Array, geometry: ConvGeometry) -> Array:
    """View x or y as (N, G, C/G, outer, rows, last)."""
    return outer_view(in_groups(array, geometry), geometry.rank)


def _scratch_shape(problem: Problem) -> tuple[int, int, int, int]:
    """(planes taken together, outer, rows, last), padding included."""
    axes: tuple[Axis, ...] = three_axes(problem.geometry)
    adjoint = problem.op == "input_grad"
    lengths = (a.size + a.extent - 1 if adjoint else a.padded for a in axes)
    # An axis without elements has none, and nothing is computed then.
    depth, height, width = (max(length, 1) for length in lengths)
    several = max(1, _RUN // (depth * height * width))
    return min(several, problem.geometry.images), depth, height, width


def _rows(geometry: ConvGeometry, row: Callable[[Axis], tuple[int, ...]]) -> Any:
    return np.array([row(axis) for axis in three_axes(geometry)])


def _input_axes(geometry: ConvGeometry) -> Any:
    """Positions of x in the scratch, in padded coordinates."""
    return _rows(geometry, lambda a: (a.kernel, a.dilation, a.before, 1, a.stride))


def _adjoint_axes(geometry: ConvGeometry) -> Any:
    """Positions of dy, a stride apart, in padded coordinates of the flipped kernel."""
    return _rows(
        geometry,
        lambda a: (a.kernel, a.dilation, a.extent - 1 - a.before, a.stride, 1),
    )


def _strided_axes(geometry: ConvGeometry) -> Any:
    """Positions of dy, every element at the first element of its window over x."""
    return _rows(geometry, lambda a: (1, 1, 0, a.stride, 1))
