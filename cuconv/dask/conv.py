"""Convolution of Dask arrays and its gradients."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import dask.array as da

from cuconv.arrays import (
    Array,
    DType,
    Types,
    base_array,
    is_dask,
    module_of,
    module_of_blocks,
    resolve_types,
    sample_of,
    stub_array,
)
from cuconv.backends import backend_of
from cuconv.config import config, settings
from cuconv.dask.blocks import (
    AxisChunks,
    Blocks,
    Chunks,
    DaskPlan,
    Tiling,
    as_lazy,
    blocks_of,
    blocks_of_cells,
    blocks_of_outputs,
    each_block,
    lengths,
    matched,
    refuse_out,
    spans,
    windows,
)
from cuconv.dask.borders import border_adjoint, bordered, without_border
from cuconv.engine.plan import Plan
from cuconv.engine.problem import CONVOLUTION, ROLES, shapes_of
from cuconv.engine.request import Request
from cuconv.geometry import ConvGeometry, Ranges, WindowGeometry
from cuconv.options import Options


def plan(request: Request, like: Array | None = None) -> DaskPlan:
    """Check a convolution, or a gradient of one, and split it into blocks.

    A gradient for x has the blocks of ``like``, where that is a Dask array.
    """
    call, geometry, arrays, out, options, _ = request
    refuse_out(out)
    if geometry.batch_groups > 1 or any(
        axis.input_dilation > 1 for axis in geometry.axes
    ):
        raise ValueError("Dask arrays take no batch_groups and no input_dilation")
    xp = module_of_blocks(arrays)
    types = resolve_types(arrays, options.dtype)
    options = options.settled()
    dtypes = {name: array.dtype for name, array in arrays.items()}
    filters = _filter_chunks(call, geometry, arrays)
    if len(filters) > 1:
        each = [
            plan(request._replace(geometry=part, arrays=own))
            for part, own in _by_filters(geometry, arrays, spans(filters))
        ]
        axis = _channel_axis(geometry)
        return DaskPlan(lambda: da.concatenate([p.build() for p in each], axis=axis))
    conv = _SPLITS[CONVOLUTION.get(call, call)](call, geometry, arrays, like)
    if conv.finish is not None:
        # Blocks that are still to be summed.
        options = options._replace(dtype=types.accumulate)
    backend = backend_of(xp, sample_of(next(iter(arrays.values()))))
    for part in conv.blocks.examples():
        shapes = shapes_of(call, part)
        stubs = {n: stub_array(shapes[n], dtype) for n, dtype in dtypes.items()}
        Plan(Request(call, part, stubs, None, options, backend))
    return DaskPlan(partial(conv.build, options, types, xp))


def _filter_chunks(
    call: str, geometry: ConvGeometry, arrays: dict[str, Array]
) -> Chunks:
    """The chunks of filters: those of w, unless there are groups."""
    if call != "forward" or geometry.groups > 1 or not is_dask(arrays["w"]):
        return (geometry.filters,)
    chunks: Chunks = arrays["w"].chunks[0 if geometry.channels_first else -1]
    return tuple(count for count in chunks if count) or (geometry.filters,)


def _by_filters(
    geometry: ConvGeometry, arrays: dict[str, Array], ranges: Ranges
) -> Iterator[tuple[ConvGeometry, dict[str, Array]]]:
    """The convolution for some of the filters at a time."""
    for start, stop in ranges:
        some = slice(start, stop)
        axes = (some, ...) if geometry.channels_first else (..., some)
        own = {**arrays, "w": arrays["w"][axes]}
        if "bias" in arrays:
            own["bias"] = arrays["bias"][some]
        yield replace(geometry, filters=stop - start), own


def _channel_axis(geometry: WindowGeometry) -> int:
    return geometry.arranged(0, 1, (0,) * geometry.rank).index(1)


def _uncut(array: Array) -> Array:
    """A Dask array of one block."""
    return as_lazy(array, -1).rechunk(-1)


class _Conv(NamedTuple):
    """A convolution or gradient that has been split into blocks.

    ``tiling`` are the arrays of which every block of the result needs a part, with the
    ranges of those parts; every block needs all of the others, ``shared``.
    """

    call: str
    blocks: Blocks
    tiling: dict[str, tuple[Array, tuple[Ranges, ...]]]
    shared: dict[str, Array]
    # The chunks of every axis of the blocks' results.
    chunks: tuple[Chunks, ...]
    # The function that sums the blocks' results; None if they are the result.
    finish: Callable[[Array], Array] | None = None

    def build(self, options: Options, types: Types, xp: Any) -> Array:
        """The result: a graph."""
        dtype = types.accumulate if self.finish else types.result
        names = *self.tiling, *self.shared
        threads = settings().num_threads

        def work(index: tuple[int, ...]) -> Callable[..., Array]:
            part = self.blocks.part(index)
            return partial(_conv_block, self.call, part, options, threads, names)

        result = each_block(
            f"cuconv-{self.call}",
            (self.blocks, options, threads, names),
            work,
            [windows(*given) for given in self.tiling.values()],
            [_uncut(array) for array in self.shared.values()],
            self.chunks,
            xp.empty((0,) * len(self.chunks), dtype=dtype),
        )
        return self.finish(result).astype(types.result) if self.finish else result


def _conv_block(
    call: str,
    geometry: ConvGeometry,
    options: Options,
    threads: int | None,
    names: tuple[str, ...],
    *given: Array,
) -> Array:
    """Compute one block of a result from its parts."""
    arrays = dict(zip(names, given, strict=True))
    with config(num_threads=threads):
        xp = module_of(arrays)
        backend = backend_of(xp, next(iter(arrays.values())))
        arrays = {name: base_array(array) for name, array in arrays.items()}
        request = Request(call, geometry, arrays, None, options, backend)
        result = Plan(request).run(tuple(arrays.values()), None)
    if CONVOLUTION.get(call, call) != "weight_grad":
        return result
    # Along the channel axis, so that the axes are those of the blocks.
    return result.reshape(geometry.arranged(1, -1, (1,) * geometry.rank))


def _sum_over_blocks(
    array: Array, geometry: WindowGeometry, dtype: DType | None = None
) -> Array:
    """The sum over images and positions, as a tree of Dask tasks."""
    channels = _channel_axis(geometry)
    axes = tuple(axis for axis in range(array.ndim) if axis != channels)
    return array.sum(axis=axes, dtype=array.dtype if dtype is None else dtype)


def plan_bias_grad(geometry: WindowGeometry, dy: Array, options: Options) -> DaskPlan:
    """Plan the gradient for a bias."""
    types = resolve_types({"dy": dy}, options.dtype)
    return DaskPlan(
        lambda: _sum_over_blocks(dy, geometry, types.accumulate).astype(types.result)
    )


def alike_operands(
    arrays: dict[str, Array], geometry: ConvGeometry, *, transposed: bool
) -> dict[str, Array]:
    """The operands of gradients, with dy and x as Dask arrays."""
    # The names of x and dy of the convolution that runs.
    x, dy = ("dy", "x") if transposed else ("x", "dy")
    both = alike(arrays[x], arrays[dy], geometry)
    return {**arrays, **dict(zip((x, dy), both, strict=True))}


def _whole_weights(shares: Array, geometry: ConvGeometry) -> Array:
    """The gradient for w: the sum of the blocks' gradients."""
    return _sum_over_blocks(shares, geometry).reshape(geometry.w_shape)


def _with_border(x: Array, blocks: Blocks) -> tuple[Array, Blocks]:
    """The input with the border that ``padding_mode`` gives it, and the same blocks."""
    geometry: Any = blocks.geometry
    if geometry.padding_mode == "zeros":
        return x, blocks
    unpadded = without_border(geometry)
    chunks = [lengths(tiling.outputs) for tiling in blocks.tilings]
    images = lengths(blocks.images)
    return bordered(x, geometry), blocks_of(Tiling.by_outputs, unpadded, images, chunks)


def _by_role(call: str, arrays: dict[str, Array]) -> tuple[dict[str, str], Any]:
    """The names of x, w, dy and bias of the convolution in a call."""
    roles = {role: name for name, role in ROLES[call].items() if name in arrays}
    shared = {name: arrays[name] for name in arrays if ROLES[call][name] in _SHARED}
    return roles, shared


_SHARED = ("w", "bias")


def _split_forward(
    call: str, geometry: ConvGeometry, arrays: dict[str, Array], like: Array | None
) -> _Conv:
    del like
    roles, shared = _by_role(call, arrays)
    x = as_lazy(arrays[roles["x"]], -1)
    x, blocks = _with_border(x, blocks_of_outputs(geometry, x))
    tiling = {roles["x"]: (x, blocks.cells(((0, geometry.channels),)))}
    chunks = blocks.output_chunks((geometry.filters,))
    return _Conv(call, blocks, tiling, shared, chunks)


def _around(blocks: Blocks) -> Blocks:
    """The blocks of a gradient for the input, the outer ones extended by the border."""
    geometry: Any = blocks.geometry
    unpadded = without_border(geometry)
    chunks = []
    for tiling, wide in zip(blocks.tilings, unpadded.axes, strict=True):
        own = list(lengths(tiling.cells))
        own[0] += max(tiling.axis.before, 0)
        own[-1] += wide.size - sum(own)
        chunks.append(tuple(own))
    return blocks_of(Tiling.by_cells, unpadded, lengths(blocks.images), chunks)


def _split_input_grad(
    call: str, geometry: ConvGeometry, arrays: dict[str, Array], like: Array | None
) -> _Conv:
    roles, shared = _by_role(call, arrays)
    dy = as_lazy(arrays[roles["dy"]], -1)
    blocks = blocks_of_cells(geometry, dy, like)
    chunks = blocks.cell_chunks((geometry.channels,))
    finish = None
    if geometry.padding_mode != "zeros":
        finish = partial(border_adjoint, geometry=geometry, chunks=chunks)
        blocks = _around(blocks)
        chunks = blocks.cell_chunks((geometry.channels,))
    tiling = {roles["dy"]: (dy, blocks.outputs(((0, geometry.filters),)))}
    return _Conv(call, blocks, tiling, shared, chunks, finish)


def _split_weight_grad(
    call: str, geometry: ConvGeometry, arrays: dict[str, Array], like: Array | None
) -> _Conv:
    del like
    roles, shared = _by_role(call, arrays)
    x, dy = alike(arrays[roles["x"]], arrays[roles["dy"]], geometry)
    own = AxisChunks.of(dy, geometry)
    blocks = blocks_of(Tiling.by_outputs, geometry, own.images, own.spatial)
    x, blocks = _with_border(x, blocks)
    ranges = {
        roles["x"]: (x, blocks.cells(((0, geometry.channels),))),
        roles["dy"]: (dy, blocks.outputs(((0, geometry.filters),))),
    }
    tiling = {name: ranges[name] for name in arrays}
    taps = geometry.filters * geometry.patch
    ones = [(1,) * len(each) for each in own.spatial]
    sums = geometry.arranged((1,) * len(blocks.images), (taps,), ones)
    finish = partial(_whole_weights, geometry=geometry)
    return _Conv(call, blocks, tiling, shared, sums, finish)


_SPLITS = {
    "forward": _split_forward,
    "input_grad": _split_input_grad,
    "weight_grad": _split_weight_grad,
}


def alike(x: Array, dy: Array, geometry: ConvGeometry) -> tuple[Array, Array]:
    """Input and gradient as Dask arrays with matching chunks."""
    return matched(x, dy, geometry, ((geometry.channels,), (geometry.filters,)))
