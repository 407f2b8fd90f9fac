"""Pooling of Dask arrays and its gradients."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import starmap
from typing import Any

import dask.array as da
import numpy as np

from cuconv.arrays import Array, DType, is_dask, module_of, module_of_blocks
from cuconv.backends import backend_of
from cuconv.config import config, settings
from cuconv.dask.blocks import (
    AxisChunks,
    Blocks,
    Chunks,
    as_lazy,
    blocks_of_cells,
    blocks_of_outputs,
    each_block,
    matched,
    refuse_out,
    spans,
    windows,
)
from cuconv.engine.pool import PoolProblem
from cuconv.geometry import WindowGeometry

_INDEX = np.dtype(np.int64)


def reduced(
    pooling: PoolProblem,
    x: Array,
    out: object,
    run: Callable[..., Any],
    check: Callable[[PoolProblem], object],
) -> Any:
    """A forward pass: ``run(pooling, x)`` for every block.

    ``check`` raises the errors of the call of a block.
    """
    refuse_out(out)
    blocks = blocks_of_outputs(pooling.geometry, x)
    channels = AxisChunks.of(x, pooling.geometry).channels
    _check_examples(pooling, blocks, max(channels), check)
    threads, sizes = settings().num_threads, pooling.geometry.size
    chunks = blocks.output_chunks(channels)

    def work(index: tuple[int, ...]) -> Callable[..., Any]:
        own = _of_block(pooling, blocks, channels, index)
        return partial(_reduce_block, run, own, threads, blocks.origin(index), sizes)

    meta = partial(_meta, module_of_blocks({"x": x}), x.ndim)
    part = windows(x, blocks.cells(spans(channels)))
    how = f"cuconv-{pooling.kind}-pool", (run, pooling, blocks, threads)
    y = each_block(*how, work, [part], [], chunks, meta(pooling.result))
    if not pooling.with_indices:
        return y
    both = zip((0, 1), (pooling.result, _INDEX), strict=True)
    return tuple(
        da.map_blocks(
            operator.itemgetter(which), y, chunks=chunks, dtype=dtype, meta=meta(dtype)
        )
        for which, dtype in both
    )


def backward(
    pooling: PoolProblem,
    named: dict[str, Array],
    out: object,
    run: Callable[..., Array],
    check: Callable[[PoolProblem], object],
) -> Array:
    """A gradient: ``run(pooling, arrays)`` for every block; the arrays by their names.

    Windows that reach a block are taken whole, for their divisors and the indices of
    their maxima; gradients for elements of other blocks are dropped.
    """
    refuse_out(out)
    geometry = pooling.geometry
    xp = module_of_blocks(named)
    arrays, blocks, channels = _cut(geometry, named)
    whole = replace(
        blocks, tilings=tuple(tiling.with_whole_windows for tiling in blocks.tilings)
    )
    _check_examples(pooling, whole, max(channels), check)
    threads, sizes = settings().num_threads, geometry.size

    def work(index: tuple[int, ...]) -> Callable[..., Array]:
        own = _of_block(pooling, whole, channels, index)
        start, place = whole.origin(index), blocks.place(index)
        each = zip(blocks.tilings, place, start, strict=True)
        mine = [[cell - low for cell in tiling.cells[i]] for tiling, i, low in each]
        how = tuple(arrays), start, sizes, geometry.arranged((None,), (None,), mine)
        return partial(_gradient_block, run, own, threads, *how)

    ranges = whole.outputs(spans(channels)), whole.cells(spans(channels))
    return each_block(
        f"cuconv-{pooling.kind}-pool-grad",
        (run, pooling, blocks, threads, tuple(arrays)),
        work,
        [windows(array, ranges[name == "x"]) for name, array in arrays.items()],
        [],
        blocks.cell_chunks(channels),
        _meta(xp, len(geometry.x_shape), pooling.result),
    )


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
    pooling: PoolProblem,
    blocks: Blocks,
    channels: int,
    check: Callable[[PoolProblem], object],
) -> None:
    for part in blocks.examples():
        check(replace(pooling, geometry=replace(part, channels=channels)))


def _meta(xp: Any, axes: int, dtype: DType) -> Array:
    return xp.empty((0,) * axes, dtype=dtype)


def _of_block(
    pooling: PoolProblem, blocks: Blocks, channels: Chunks, index: tuple[int, ...]
) -> PoolProblem:
    """The pooling of one block, with the channels that its arrays have."""
    part = blocks.part(index)
    place = part.arranged(0, 1, (0,) * part.rank).index(1)
    return replace(pooling, geometry=replace(part, channels=channels[index[place]]))


def _reduce_block(
    run: Callable[..., Any],
    pooling: PoolProblem,
    threads: int | None,
    start: tuple[int, ...],
    sizes: tuple[int, ...],
    x: Array,
) -> Any:
    """One block, whose first element is ``start`` in planes of these sizes."""
    with config(num_threads=threads):
        result = run(pooling, x)
    if not pooling.with_indices:
        return result
    y, indices = result
    return y, _moved(indices, pooling.geometry.size, start, sizes)


def _gradient_block(
    run: Callable[..., Array],
    pooling: PoolProblem,
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
        back = tuple(-cell for cell in start)
        named["indices"] = _moved(named["indices"], sizes, back, pooling.geometry.size)
    with config(num_threads=threads):
        dx = run(pooling, named)
    return dx[tuple(starmap(slice, mine))]


def _moved(
    indices: Array,
    sizes: tuple[int, ...],
    shift: tuple[int, ...],
    wanted: tuple[int, ...],
) -> Array:
    """Convert flat indices in one plane to those in another, shifted; -1 if outside.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.dask.pooling import _moved
    >>> _moved(np.array([0, 5, -1]), (2, 3), (1, 0), (4, 4))
    array([ 4, 10, -1])
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
        return xp.where(valid & (rest == 0), result, -1)
