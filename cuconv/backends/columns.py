"""Columns of whole arrays, block by block; and their sums, region by region.

Arrays are grouped: x (N, 1, C, *spatial), columns (N, 1, C, *kernel, *out).
"""

import math
from typing import Any, NamedTuple, TypeAlias

from cuconv.arrays import Array, grouped, stored
from cuconv.geometry import Block, Region, Tile, WindowGeometry

Scratch: TypeAlias = tuple[dict[str, Array], ...]


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


class GatherSteps(NamedTuple):
    """Gather ``x`` into the columns ``out``."""

    geometry: WindowGeometry
    order: str
    tile: Tile

    def run(self, backend: Any, arrays: dict[str, Array], scratch: Scratch) -> None:
        """Gather every block, or record it."""
        geometry, order, tile = self
        x = single_group(arrays["x"], geometry)
        columns = column_cells(arrays["out"], geometry, geometry.out, order)
        if not columns.size:
            return

        def body(number: int, block: Block, buffers: dict[str, Array]) -> None:
            images, place = x[slice(*block.images)], _place(block, geometry)
            with backend.stage("gather", "im2col", number):
                backend.gather(images, columns[place], geometry, block, buffers)

        single = len(scratch) == 1
        backend.each(geometry.blocks(tile), body, scratch, single_threaded=single)


class ScatterSteps(NamedTuple):
    """Sum the columns ``cols`` in ``out``."""

    geometry: WindowGeometry
    order: str
    tile: Tile
    deterministic: bool

    def run(self, backend: Any, arrays: dict[str, Array], scratch: Scratch) -> None:
        """Sum them in every region, or record it."""
        geometry, order, tile, _ = self
        columns = column_cells(arrays["cols"], geometry, geometry.out, order)
        x = single_group(arrays["out"], geometry)
        if not x.size:
            return

        def body(number: int, region: Region, buffers: dict[str, Array]) -> None:
            spans = (slice(*span) for span in region.cells)
            into = x[slice(*region.images)][(..., *spans)]
            with backend.stage("scatter", "col2im", number):
                if region.is_reached:
                    self._scatter(backend, columns, into, region, buffers)
                else:
                    backend.fill(into, 0)

        single = len(scratch) == 1
        backend.each(geometry.regions(tile), body, scratch, single_threaded=single)

    def _scatter(
        self,
        backend: Any,
        columns: Array,
        into: Array,
        region: Region,
        buffers: dict[str, Array],
    ) -> None:
        """Sum the columns in one region, by way of a buffer if there is one."""
        geometry, sums = self.geometry, into
        if "sum" in buffers:
            head, inner, first = into.shape[:3], into.shape[3:], geometry.channels_first
            sums = stored(buffers["sum"], head, (), inner, channels_first=first).cells
        block = geometry.block(region.images, region.output)
        backend.scatter(
            columns[_place(block, geometry)],
            sums,
            geometry,
            block,
            region.cells,
            add=False,
            deterministic=self.deterministic,
        )
        if sums is not into:
            backend.copy(sums, into)


def single_group(x: Array, geometry: WindowGeometry) -> Array:
    """View an array as (N, 1, C, *spatial)."""
    first, batched = geometry.channels_first, geometry.batched
    return grouped(x, 1, geometry.rank, channels_first=first, batched=batched)


def _place(block: Block, geometry: WindowGeometry) -> tuple[slice, ...]:
    """The index of a block in (N, 1, C, *kernel, *out)."""
    whole = (slice(None),) * (2 + geometry.rank)
    return (slice(*block.images), *whole, *(slice(*span) for span in block.output))
