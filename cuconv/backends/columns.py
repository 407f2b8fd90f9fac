"""Columns of whole arrays, block by block; and their sums, region by region.

Arrays are grouped: cells (N, 1, C, *spatial), columns (N, 1, C, *kernel, *out).
"""

import math
from typing import Any

from cuconv.arrays import Array, stored
from cuconv.geometry import Block, Region, Tile, WindowGeometry

Scratch = tuple[dict[str, Array], ...]


def column_cells(
    columns: Array, geometry: WindowGeometry, out: tuple[int, ...], order: str
) -> Array:
    """View a column matrix as (N, 1, C, *kernel, *out)."""
    channels, kernel, rank = (geometry.channels,), geometry.kernel, geometry.rank
    first = geometry.channels_first
    patch = {"c": channels, "k": kernel} if first else {"k": kernel, "c": channels}
    images = (
        columns.size // max(geometry.channels * geometry.taps * math.prod(out), 1),
    )
    position = {"o": out}
    axes = {
        "rows": {"n": images, **position, **patch},
        "columns": {**patch, "n": images, **position},
        "batched": {"n": images, **patch, **position},
    }[order]
    cells = columns.reshape(tuple(size for sizes in axes.values() for size in sizes))
    starts, start = {}, 0
    for name, sizes in axes.items():
        starts[name] = start
        start += len(sizes)
    inner = (starts[name] + i for name in ("k", "o") for i in range(rank))
    return cells.transpose(starts["n"], starts["c"], *inner)[:, None]


def gather_blocks(
    backend: Any,
    geometry: WindowGeometry,
    tile: Tile,
    scratch: Scratch,
    x: Array,
    columns: Array,
) -> None:
    """Gather every block of x into its columns."""

    def body(number: int, block: Block, buffers: dict[str, Array]) -> None:
        images, place = x[slice(*block.images)], _place(block, geometry)
        with backend.stage("gather", "im2col", number):
            backend.gather(images, columns[place], geometry, block, buffers)

    single = len(scratch) == 1
    backend.each(geometry.blocks(tile), body, scratch, single_threaded=single)


def scatter_regions(
    backend: Any,
    geometry: WindowGeometry,
    tile: Tile,
    scratch: Scratch,
    columns: Array,
    x: Array,
    *,
    deterministic: bool,
) -> None:
    """Sum the columns into every region of x, by way of a buffer if there is one."""

    def body(number: int, region: Region, buffers: dict[str, Array]) -> None:
        spans = (slice(*span) for span in region.cells)
        into = x[slice(*region.images)][(..., *spans)]
        with backend.stage("scatter", "col2im", number):
            if not region.is_reached:
                backend.fill(into, 0)
                return
            sums = into
            if "sum" in buffers:
                head, inner = into.shape[:3], into.shape[3:]
                first = geometry.channels_first
                flat = buffers["sum"]
                sums = stored(flat, head, (), inner, channels_first=first).cells
            block = geometry.block(region.images, region.output)
            backend.scatter(
                columns[_place(block, geometry)],
                sums,
                geometry,
                block,
                region.cells,
                add=False,
                deterministic=deterministic,
            )
            if sums is not into:
                backend.copy(sums, into)

    single = len(scratch) == 1
    backend.each(geometry.regions(tile), body, scratch, single_threaded=single)


def _place(block: Block, geometry: WindowGeometry) -> tuple[slice, ...]:
    """Where a block lies in (N, 1, C, *kernel, *out)."""
    whole = (slice(None),) * (2 + geometry.rank)
    return (slice(*block.images), *whole, *(slice(*span) for span in block.output))
