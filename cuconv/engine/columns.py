"""The calls of im2col and col2im: checked, planned, and block by block."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cuconv.arrays import (
    Array,
    DType,
    accumulator,
    base_array,
    check_type,
    module_of,
    native,
)
from cuconv.backends import Backend, backend_of, refuse_capture
from cuconv.backends.columns import (
    GatherSteps,
    ScatterSteps,
    column_cells,
    single_group,
)
from cuconv.config import check_deterministic
from cuconv.engine.pool_plan import warn_of_sums
from cuconv.engine.recorded import RecordedPlan, Result, Workspace, check_results
from cuconv.engine.tile_search import largest_fitting
from cuconv.geometry import Block, Tile, WindowGeometry
from cuconv.memory import (
    Buffer,
    MemoryLimit,
    MemoryLimitError,
    allocated,
    least_of,
    parse_memory_limit,
    workspace_bytes,
)
from cuconv.profiling import stage

# Bytes of columns above which a second thread pays: on two AMD EPYC cores im2col took
# 0.96 times as long on one core as on both at 3.4 MiB, and 1.75 times at 7.0 MiB.
_WORTH_THREADS = 4 * 2**20
_EACH_TAKES_MEMORY = "every block takes memory; im2col takes out="


def _gather(
    backend: Backend, geometry: WindowGeometry, order: str, dtype: DType
) -> RecordedPlan:
    """Plan `im2col`."""
    result = native(dtype)
    column = max(geometry.channels * geometry.taps * dtype.itemsize, 1)
    tile = geometry.tile(max(backend.block_bytes // column, 1))
    workers, threads = _workers(backend, geometry.column_bytes(dtype.itemsize))
    buffers = backend.gather_buffers(geometry, tile, dtype, result)
    return RecordedPlan(
        backend,
        GatherSteps(geometry, order, tile),
        ("x",),
        (Result("out", geometry.column_shape(order), result),),
        Workspace(buffers, workers, geometry.count_blocks(tile)),
        threads=threads,
    )


def _scatter(
    backend: Backend,
    geometry: WindowGeometry,
    order: str,
    dtype: DType,
    *,
    deterministic: bool,
) -> RecordedPlan:
    """Plan `col2im`; halves are summed in a buffer."""
    result = native(dtype)
    sums = accumulator(result)
    cell = max(geometry.channels * sums.itemsize, 1)
    tile = geometry.region_tile(max(backend.block_bytes // cell, 1))
    is_cast = sums != result
    if is_cast:
        refuse_capture(backend, f"sums of {dtype} take memory")
    cells = tile.positions * geometry.channels
    buffers = (Buffer("sum", cells, sums),) if is_cast else ()
    workers, threads = _workers(backend, geometry.column_bytes(dtype.itemsize))
    return RecordedPlan(
        backend,
        ScatterSteps(geometry, order, tile, deterministic),
        ("cols",),
        (Result("out", geometry.x_shape, result),),
        Workspace(buffers, workers, geometry.count_regions(tile)),
        threads=threads,
    )


def _workers(backend: Backend, nbytes: int) -> tuple[int, int]:
    """The number of workers for this many bytes, and of threads for the plan."""
    if nbytes <= _WORTH_THREADS:
        return 1, 0
    workers = backend.workers()
    return workers, workers if backend.xp is np else 0


def plan_columns(
    call: str,
    arrays: tuple[Array, ...],
    out: Array | None,
    options: Mapping[str, Any],
    more: Mapping[str, Any],
) -> RecordedPlan:
    """Check ``"im2col"`` or ``"col2im"``, and plan it.

    ``options`` are those of the windows and the ``order``; for col2im, ``more`` has
    ``x_shape`` and ``deterministic``.
    """
    windows = dict(options)
    (array,), order = arrays, windows.pop("order")
    if call == "im2col":
        geometry, xp = checked_windows(array, windows)
        geometry.column_shape(order)
        backend = backend_of(xp, array)
        plan = _gather(backend, geometry, order, array.dtype)
    else:
        xp = module_of({"cols": array})
        check_type("cols", array.dtype)
        geometry = WindowGeometry.of(more["x_shape"], **windows)
        shape = geometry.column_shape(order)
        if array.shape != shape:
            raise ValueError(f"cols has shape {array.shape} and must have {shape}")
        backend = backend_of(xp, array)
        warn_of_sums("cols", array.dtype, geometry)
        asked = more["deterministic"]
        deterministic = asked is None or check_deterministic(asked)
        plan = _scatter(
            backend, geometry, order, array.dtype, deterministic=deterministic
        )
    check_results(
        backend, dict(zip(plan.names, arrays, strict=True)), plan.results, (out,)
    )
    return plan


def checked_windows(x: Array, options: Mapping[str, Any]) -> tuple[WindowGeometry, Any]:
    """The windows over an array, and its module."""
    xp = module_of({"x": x})
    check_type("x", x.dtype)
    return WindowGeometry.of(x.shape, **options), xp


def column_steps(
    x: Array, options: Mapping[str, Any], order: str, memory_limit: MemoryLimit
) -> Iterator[tuple[Block, Array]]:
    """Check `iter_im2col`, and return the blocks and their columns one at a time."""
    geometry, xp = checked_windows(x, options)
    geometry.column_shape(order)
    backend = backend_of(xp, x)
    refuse_capture(backend, _EACH_TAKES_MEMORY)
    default = backend.default_memory_limit
    limit = default if memory_limit is None else parse_memory_limit(memory_limit)
    tile = _tile_within(backend, geometry, x.dtype, limit)
    return _steps(backend, base_array(x), geometry, tile, order)


def _step_bytes(
    backend: Backend, geometry: WindowGeometry, dtype: DType, tile: Tile
) -> int:
    """Everything that one step allocates."""
    cells = tile.positions * geometry.channels * geometry.taps
    columns = Buffer("columns", cells, dtype).nbytes
    buffers = backend.gather_buffers(geometry, tile, dtype, native(dtype))
    overhead = backend.overhead(1, dtype.itemsize)
    return overhead + columns + workspace_bytes(buffers)


def _tile_within(
    backend: Backend, geometry: WindowGeometry, dtype: DType, limit: int
) -> Tile:
    def needed(positions: int) -> int:
        return _step_bytes(backend, geometry, dtype, geometry.tile(positions))

    whole = max(geometry.images * geometry.positions, 1)
    least = least_of(needed(whole), needed(1))
    if limit < least:
        raise MemoryLimitError(limit, least, "some columns")
    positions = largest_fitting(lambda p: needed(p) <= limit, whole)
    return geometry.tile(positions)


def _steps(
    backend: Backend, x: Array, geometry: WindowGeometry, tile: Tile, order: str
) -> Iterator[tuple[Block, Array]]:
    cells = single_group(x, geometry)
    buffers = backend.gather_buffers(geometry, tile, x.dtype, native(x.dtype))
    for chunk, block in enumerate(geometry.blocks(tile)):
        refuse_capture(backend, _EACH_TAKES_MEMORY)
        with backend.device_of(x), stage("gather", "im2col", chunk):
            step = block, _step(backend, cells, geometry, block, order, buffers)
        yield step
        del step  # or these columns would live on while the next ones are made


def _step(
    backend: Backend,
    x: Array,
    geometry: WindowGeometry,
    block: Block,
    order: str,
    buffers: tuple[Buffer, ...],
) -> Array:
    """The columns of one block, in an array of their own."""
    first, last = block.images
    shape = geometry.column_shape(order, last - first, block.shape)
    columns = backend.xp.empty(shape, dtype=native(x.dtype))
    if columns.size:
        into = column_cells(columns, geometry, block.shape, order)
        backend.gather(
            x[first:last], into, geometry, block, allocated(backend.xp, buffers)
        )
    return columns
