"""Pooling of Dask arrays and its gradients."""

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize

from cuconv.arrays import Array, DType, is_lazy, module_of, module_of_blocks
from cuconv.config import config, settings
from cuconv.geometry import WindowGeometry
from cuconv.lazy.blocks import (
    AxisChunks,
    Blocks,
    as_lazy,
    blocks_of_cells,
    blocks_of_outputs,
    matched,
    refuse_out,
    spans,
    windows,
)
from cuconv.reduction import Pooling

_INDEX = np.dtype(np.int64)


def reduced(
    pooling: Pooling,
    x: Array,
    out: object,
    run: Callable[..., Any],
    check: Callable[[Pooling], object],
) -> Any:
    """A forward pass: ``run(pooling, x)`` for every block.

    ``check`` raises what is wrong with the call of a block.
    """
    refuse_out(out)
    blocks = blocks_of_outputs(pooling.geometry, x)
    channels = AxisChunks.of(x, pooling.geometry).channels
    _check_examples(pooling, blocks, max(channels), check)
    part = windows(x, blocks.cells(spans(channels)))
    how = run, pooling, blocks, settings().num_threads
    chunks = blocks.output_chunks(channels)
    meta = partial(_meta, module_of_blocks({"x": x}), x.ndim)
    y = da.map_blocks(
        partial(_reduce_block, *how),
        part,
        name=f"cuconv-{pooling.kind}-pool-{tokenize(how, part.name)}",
        chunks=chunks,
        dtype=pooling.result,
        meta=meta(pooling.result),
    )
    if not pooling.with_indices:
        return y
    both = zip((0, 1), (pooling.result, _INDEX), strict=True)
    return tuple(
        da.map_blocks(
            operator.itemgetter(which), y, chunks=chunks, dtype=dtype, meta=meta(dtype)
        )
        for which, dtype in both
    )


def spread(
    pooling: Pooling,
    named: dict[str, Array],
    out: object,
    run: Callable[..., Array],
    check: Callable[[Pooling], object],
) -> Array:
    """A gradient: ``run(pooling, arrays)`` for every block; the arrays by their names.

    The windows that reach a block are taken whole, for what they divide by and where
    their maxima lie; what they give to cells of other blocks is left out.
    """
    refuse_out(out)
    geometry = pooling.geometry
    xp = module_of_blocks(named)
    arrays, blocks, channels = _cut(geometry, named)
    whole = replace(blocks, cuts=tuple(cut.with_whole_windows for cut in blocks.cuts))
    _check_examples(pooling, whole, max(channels), check)
    ranges = whole.outputs(spans(channels)), whole.cells(spans(channels))
    parts = [windows(arrays[name], ranges[name == "x"]) for name in arrays]
    how = run, tuple(arrays), pooling, blocks, whole, settings().num_threads
    names = [part.name for part in parts]
    return da.map_blocks(
        partial(_spread_block, *how),
        *parts,
        name=f"cuconv-{pooling.kind}-pool-grad-{tokenize(how, names)}",
        chunks=blocks.cell_chunks(channels),
        dtype=pooling.result,
        meta=_meta(xp, len(geometry.x_shape), pooling.result),
    )


def _cut(
    geometry: WindowGeometry, named: dict[str, Array]
) -> tuple[dict[str, Array], Blocks, tuple[int, ...]]:
    """All arrays as Dask arrays, and the blocks and chunks of channels of dx."""
    first = next(array for array in named.values() if is_lazy(array))
    channels = AxisChunks.of(first, geometry).channels
    arrays = dict(named)
    dy = next((a for name, a in named.items() if name != "x" and is_lazy(a)), None)
    if dy is not None:
        arrays["dy"] = as_lazy(named["dy"], dy.chunks)
    if "x" in named:
        both = named["x"], arrays["dy"]
        arrays["x"], arrays["dy"] = matched(*both, geometry, (channels, channels))
    rest = {name: as_lazy(a, arrays["dy"].chunks) for name, a in arrays.items()}
    return rest, blocks_of_cells(geometry, arrays["dy"], named.get("x")), channels


def _check_examples(
    pooling: Pooling, blocks: Blocks, channels: int, check: Callable[[Pooling], object]
) -> None:
    for part in blocks.examples():
        check(replace(pooling, geometry=replace(part, channels=channels)))


def _meta(xp: Any, axes: int, dtype: DType) -> Array:
    return xp.empty((0,) * axes, dtype=dtype)


def _of_block(pooling: Pooling, part: WindowGeometry, array: Array) -> Pooling:
    """The pooling of one block, with the channels that its arrays have."""
    channels = array.shape[part.arranged(0, 1, (0,) * part.rank).index(1)]
    return replace(pooling, geometry=replace(part, channels=channels))


def _reduce_block(
    run: Callable[..., Any],
    pooling: Pooling,
    blocks: Blocks,
    threads: int | None,
    x: Array,
    *,
    block_id: tuple[int, ...],
) -> Any:
    own = _of_block(pooling, blocks.part(block_id), x)
    with config(num_threads=threads):
        result = run(own, x)
    if not pooling.with_indices:
        return result
    y, indices = result
    start = _origin(blocks, block_id)
    return y, _moved(indices, own.geometry.size, start, pooling.geometry.size)


def _spread_block(
    run: Callable[..., Array],
    names: tuple[str, ...],
    pooling: Pooling,
    blocks: Blocks,
    whole: Blocks,
    threads: int | None,
    *parts: Array,
    block_id: tuple[int, ...],
) -> Array:
    named = dict(zip(names, parts, strict=True))
    own = _of_block(pooling, whole.part(block_id), named["dy"])
    g, start = own.geometry, _origin(whole, block_id)
    if "indices" in named:
        back = tuple(-cell for cell in start)
        sizes = pooling.geometry.size
        named["indices"] = _moved(named["indices"], sizes, back, g.size)
    with config(num_threads=threads):
        dx = run(own, named)
    place = zip(blocks.cuts, blocks.place(block_id), start, strict=True)
    ranges = ((*cut.cells[index], low) for cut, index, low in place)
    mine = [slice(first - low, last - low) for first, last, low in ranges]
    return dx[g.arranged(slice(None), slice(None), mine)]


def _origin(blocks: Blocks, block_id: tuple[int, ...]) -> tuple[int, ...]:
    """The first cell of a block along every axis."""
    place = zip(blocks.cuts, blocks.place(block_id), strict=True)
    return tuple(cut.cells[index][0] for cut, index in place)


def _moved(
    indices: Array,
    sizes: tuple[int, ...],
    shift: tuple[int, ...],
    wanted: tuple[int, ...],
) -> Array:
    """Indices in one plane as those in another, with cells so far on; -1 if not there.

    Examples
    --------
    >>> import numpy as np
    >>> from cuconv.lazy.pooling import _moved
    >>> _moved(np.array([0, 5, -1]), (2, 3), (1, 0), (4, 4))
    array([ 4, 10, -1])
    """
    xp = module_of({"indices": indices})
    rest, result, step = indices, xp.zeros_like(indices), 1
    valid = xp.ones(indices.shape, dtype=bool)
    for size, by, wide in zip(sizes[::-1], shift[::-1], wanted[::-1], strict=True):
        cells = rest % max(size, 1) + by
        rest = rest // max(size, 1)
        valid &= (cells >= 0) & (cells < wide)
        result += cells * step
        step *= wide
    # What is left is 0, or -1 for -1 and more for an index beyond the plane.
    return xp.where(valid & (rest == 0), result, -1)
