"""Pooling of Dask arrays and its gradients."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import starmap
from typing import Any

import dask.array as da

from cuconv.arrays import (
    Array,
    DType,
    base_array,
    is_dask,
    module_of,
    module_of_blocks,
    sample_of,
)
from cuconv.backends import backend_of
from cuconv.config import config, settings
from cuconv.dask.blocks import (
    AxisChunks,
    Blocks,
    Chunks,
    DaskPlan,
    as_lazy,
    blocks_of_cells,
    blocks_of_outputs,
    each_block,
    matched,
    refuse_out,
    spans,
    windows,
)
from cuconv.engine.pool_plan import INDEX, plan_of, pool_backend, tiling_within
from cuconv.engine.pool_problem import PoolProblem
from cuconv.geometry import WindowGeometry


def plan(
    problem: PoolProblem, arrays: dict[str, Array], out: object, limit: int | None
) -> DaskPlan:
    """Check a pooling, or a gradient of one, and split it into blocks."""
    refuse_out(out)
    if problem.over_array:
        raise TypeError("indices_over='array' is not for Dask arrays: use 'plane'")
    if problem.is_gradient:
        return _plan_backward(problem, arrays, limit)
    return _plan_reduce(problem, arrays, limit)


def _plan_reduce(
    problem: PoolProblem, arrays: dict[str, Array], limit: int | None
) -> DaskPlan:
    x = as_lazy(arrays["x"], arrays["x"].shape)
    indices = arrays.get("indices")
    blocks = blocks_of_outputs(problem.geometry, x)
    channels = AxisChunks.of(x, problem.geometry).channels
    _check_examples(problem, blocks, max(channels), arrays, limit)

    def build() -> Any:
        threads, sizes = settings().num_threads, problem.geometry.size
        chunks = blocks.output_chunks(channels)

        def work(index: tuple[int, ...]) -> Callable[..., Any]:
            how = _of_block(problem, blocks, channels, index), limit, threads
            return partial(_reduce_block, *how, blocks.origin(index), sizes)

        meta = partial(_meta, module_of_blocks({"x": x}), x.ndim)
        parts = [windows(x, blocks.cells(spans(channels)))]
        if indices is not None:
            own = as_lazy(indices, chunks)
            parts.append(windows(own, blocks.outputs(spans(channels))))
        how = f"cuconv-{problem.kind}-pool", (limit, problem, blocks, threads)
        y = each_block(*how, work, parts, [], chunks, meta(problem.result))
        if not problem.with_indices:
            return y
        return tuple(
            da.map_blocks(
                operator.itemgetter(which),
                y,
                chunks=chunks,
                dtype=dtype,
                meta=meta(dtype),
            )
            for which, dtype in enumerate((problem.result, INDEX))
        )

    return DaskPlan(build)


def _plan_backward(
    problem: PoolProblem, named: dict[str, Array], limit: int | None
) -> DaskPlan:
    """Cut a gradient into blocks.

    Windows that reach a block are taken whole, for their divisors and the indices of
    their maxima; gradients for elements of other blocks are dropped.
    """
    geometry = problem.geometry
    arrays, blocks, channels = _cut(geometry, named)
    whole = replace(
        blocks, tilings=tuple(tiling.with_whole_windows for tiling in blocks.tilings)
    )
    _check_examples(problem, whole, max(channels), named, limit)

    def build() -> Array:
        threads, sizes = settings().num_threads, geometry.size

        def work(index: tuple[int, ...]) -> Callable[..., Array]:
            own = _of_block(problem, whole, channels, index)
            start, place = whole.origin(index), blocks.place(index)
            each = zip(blocks.tilings, place, start, strict=True)
            mine = [[cell - low for cell in tiling.cells[i]] for tiling, i, low in each]
            how = tuple(arrays), start, sizes, geometry.arranged((None,), (None,), mine)
            return partial(_gradient_block, own, limit, threads, *how)

        ranges = whole.outputs(spans(channels)), whole.cells(spans(channels))
        return each_block(
            f"cuconv-{problem.kind}-pool-grad",
            (limit, problem, blocks, threads, tuple(arrays)),
            work,
            [windows(array, ranges[name == "x"]) for name, array in arrays.items()],
            [],
            blocks.cell_chunks(channels),
            _meta(module_of_blocks(arrays), len(geometry.x_shape), problem.result),
        )

    return DaskPlan(build)


def _cut(
    geometry: WindowGeometry, named: dict[str, Array]
) -> tuple[dict[str, Array], Blocks, tuple[int, ...]]:
    """All arrays as Dask arrays, and the blocks and chunks of channels of dx."""
    first = next(array for array in named.values() if is_dask(array))
    channels = AxisChunks.of(first, geometry).channels
    arrays = dict(named)
    dy = next((a for name, a in named.items() if name != "x" and is_dask(a)), None)
    if dy is not None:
        arrays["dy"] = as_lazy(named["dy"], dy.chunks)
    if "x" in named:
        both = named["x"], arrays["dy"]
        arrays["x"], arrays["dy"] = matched(*both, geometry, (channels, channels))
    rest = {name: as_lazy(a, arrays["dy"].chunks) for name, a in arrays.items()}
    return rest, blocks_of_cells(geometry, arrays["dy"], named.get("x")), channels


def _check_examples(
    problem: PoolProblem,
    blocks: Blocks,
    channels: int,
    arrays: dict[str, Array],
    limit: int | None,
) -> None:
    """Raise what is wrong with the call of a block, before there is any."""
    samples = {name: sample_of(array) for name, array in arrays.items()}
    for part in blocks.examples():
        own = replace(problem, geometry=replace(part, channels=channels))
        tiling_within(own, pool_backend(own, samples), limit)


def _meta(xp: Any, axes: int, dtype: DType) -> Array:
    return xp.empty((0,) * axes, dtype=dtype)


def _of_block(
    problem: PoolProblem, blocks: Blocks, channels: Chunks, index: tuple[int, ...]
) -> PoolProblem:
    """The pooling of one block, with the channels that its arrays have."""
    part = blocks.part(index)
    place = part.arranged(0, 1, (0,) * part.rank).index(1)
    return replace(problem, geometry=replace(part, channels=channels[index[place]]))


def _reduce_block(
    problem: PoolProblem,
    limit: int | None,
    threads: int | None,
    start: tuple[int, ...],
    sizes: tuple[int, ...],
    *parts: Array,
) -> Any:
    """One block, whose first element is ``start`` in planes of these sizes."""
    named = dict(zip(("x", "indices"), parts, strict=False))
    if "indices" in named:
        named["indices"] = _moved_to(named["indices"], sizes, start, problem)
    result = _run(problem, named, limit, threads)
    if not problem.with_indices:
        return result
    y, indices = result
    return y, _moved(indices, problem.geometry.size, start, sizes)


def _gradient_block(
    problem: PoolProblem,
    limit: int | None,
    threads: int | None,
    names: tuple[str, ...],
    start: tuple[int, ...],
    sizes: tuple[int, ...],
    mine: tuple[Sequence[int | None], ...],
    *parts: Array,
) -> Array:
    """One block of a gradient: its own elements out of those under whole windows."""
    named = dict(zip(names, parts, strict=True))
    if "indices" in named:
        named["indices"] = _moved_to(named["indices"], sizes, start, problem)
    dx: Array = _run(problem, named, limit, threads)
    return dx[tuple(starmap(slice, mine))]


def _run(
    problem: PoolProblem,
    arrays: dict[str, Array],
    limit: int | None,
    threads: int | None,
) -> Any:
    """Pool the arrays of one block."""
    with config(num_threads=threads):
        given = {name: base_array(array) for name, array in arrays.items()}
        return plan_of(problem, given, None, limit).run(tuple(given.values()), None)


def _moved_to(
    indices: Array, sizes: tuple[int, ...], start: tuple[int, ...], problem: PoolProblem
) -> Array:
    """Indices in the planes of a block, whose first element is ``start``."""
    back = tuple(-cell for cell in start)
    return _moved(indices, sizes, back, problem.geometry.size)


def _moved(
    indices: Array,
    sizes: tuple[int, ...],
    shift: tuple[int, ...],
    wanted: tuple[int, ...],
) -> Array:
    """Convert flat indices in one plane to those in another, shifted.

    -1 stays; others outside become -2, which no window has.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.dask.pooling import _moved
    >>> _moved(np.array([0, 5, -1, 6]), (2, 3), (1, 0), (4, 4))
    array([ 4, 10, -1, -2])
    """
    backend = backend_of(module_of({"indices": indices}), indices)
    xp = backend.xp
    with backend.device_of(indices):
        rest, result, step = indices, xp.zeros_like(indices), 1
        valid = xp.ones(indices.shape, dtype=bool)
        for size, by, wide in zip(sizes[::-1], shift[::-1], wanted[::-1], strict=True):
            cells = rest % max(size, 1) + by
            rest = rest // max(size, 1)
            valid &= (cells >= 0) & (cells < wide)
            result += cells * step
            step *= wide
        # The rest is 0 inside, -1 for -1, and above 0 for an index beyond the plane.
        return xp.where(valid & (rest == 0), result, xp.where(indices == -1, -1, -2))
