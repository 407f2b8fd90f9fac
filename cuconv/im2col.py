"""Columns: im2col, its adjoint col2im, and the lazy and the copy-free forms."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cuconv.arrays import (
    Array,
    DType,
    accumulator,
    base_array,
    check_out,
    check_overlap,
    check_type,
    grouped,
    module_of,
    stored,
)
from cuconv.backends import Backend, backend_of, refuse_capture
from cuconv.backends.sharing import Shared
from cuconv.engine.plan import NEEDS_OUT
from cuconv.engine.tile_search import largest_fitting
from cuconv.geometry import Block, Padding, Region, Sizes, Tile, WindowGeometry
from cuconv.memory import (
    Buffer,
    MemoryLimit,
    MemoryLimitError,
    allocated,
    parse_memory_limit,
    workspace_bytes,
)
from cuconv.profiling import stage

# Bytes of columns above which a second thread pays: on two AMD EPYC cores im2col took
# 0.96 times as long on one core as on both at 3.4 MiB, and 1.75 times at 7.0 MiB.
_WORTH_THREADS = 4 * 2**20


def im2col(
    x: Array,
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    layout: str = "channels_first",
    order: str = "rows",
    out: Array | None = None,
) -> Array:
    """Copy every window of an array into a matrix, one window a row or a column.

    Parameters
    ----------
    x
        (N, C, *spatial), or (N, *spatial, C) with ``layout="channels_last"``; any type.
        The batch axis may be missing if ``kernel_size`` names every axis.
    kernel_size
        Taps along each axis: one number for a batched ``x``, or one for each axis.
    stride, padding, dilation, layout
        As for `cuconv.conv`.
    order
        ``"rows"``: (N·positions, C·taps); ``"columns"``: (C·taps, N·positions);
        ``"batched"``: (N, C·taps, positions), or (C·taps, positions) without a batch.
        With channels last the patch axis runs taps first, then channels: (taps·C).
    out
        Array to write to, of that shape and the type of ``x``.

    Returns
    -------
    array
        The columns, in the type and the module of ``x``; zero where windows hang over.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.arange(9.0).reshape(1, 1, 3, 3)
    >>> cuconv.im2col(x, 2)
    array([[0., 1., 3., 4.],
           [1., 2., 4., 5.],
           [3., 4., 6., 7.],
           [4., 5., 7., 8.]])
    """
    geometry, xp = _checked(x, kernel_size, stride, padding, dilation, layout)
    x = base_array(x)
    shape = geometry.column_shape(order)
    if out is not None:
        module_of({"x": x, "out": out})
        check_out(out, shape, x.dtype)
        check_overlap(xp, out, {"x": x})
    backend = backend_of(xp, x)
    if out is None:
        refuse_capture(backend, NEEDS_OUT)
    with backend.device_of(x):
        columns = xp.empty(shape, dtype=x.dtype) if out is None else out
        cells = _column_cells(base_array(columns), geometry, geometry.out, order)
        _fill(backend, _single_group(x, geometry), cells, geometry)
    return columns


def col2im(
    cols: Array,
    x_shape: Sequence[int],
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    layout: str = "channels_first",
    order: str = "rows",
    out: Array | None = None,
    deterministic: bool | None = None,
) -> Array:
    """Sum columns back into the cells they came from: the adjoint of `im2col`.

    Where windows overlap their cells are summed; cells no window touches are zero.

    Parameters
    ----------
    cols
        Columns in the given ``order``, as `im2col` writes them.
    x_shape
        Shape of the array to build.
    kernel_size, stride, padding, dilation, layout, order
        As for `im2col`.
    out
        Array to write to, of shape ``x_shape`` and the type of ``cols``.
    deterministic
        False allows CUDA to add atomically, in any order; True and None do not.

    Returns
    -------
    array
        Of shape ``x_shape`` and the type of ``cols``; halves are summed in float32.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit, before anything is allocated.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.col2im(np.ones((4, 4)), (1, 1, 3, 3), 2)
    array([[[[1., 2., 1.],
             [2., 4., 2.],
             [1., 2., 1.]]]])
    """
    xp = module_of({"cols": cols})
    check_type("cols", cols.dtype)
    geometry = WindowGeometry.of(
        x_shape,
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        layout=layout,
    )
    if cols.shape != geometry.column_shape(order):
        raise ValueError(
            f"cols has shape {cols.shape} and must have {geometry.column_shape(order)}"
        )
    cols = base_array(cols)
    if out is not None:
        module_of({"cols": cols, "out": out})
        check_out(out, geometry.x_shape, cols.dtype)
        check_overlap(xp, out, {"cols": cols})
    backend = backend_of(xp, cols)
    if out is None:
        refuse_capture(backend, NEEDS_OUT)
    if accumulator(cols.dtype) != cols.dtype:
        refuse_capture(backend, f"sums of {cols.dtype} take memory")
    with backend.device_of(cols):
        x = xp.empty(geometry.x_shape, dtype=cols.dtype) if out is None else out
        cells = _column_cells(cols, geometry, geometry.out, order)
        target = _single_group(base_array(x), geometry)
        _sum(backend, cells, target, geometry, deterministic=deterministic is not False)
    return x


def iter_im2col(
    x: Array,
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    layout: str = "channels_first",
    order: str = "rows",
    memory_limit: MemoryLimit = None,
) -> Iterator[tuple[Block, Array]]:
    """The columns of an array block by block, each made when it is asked for.

    Parameters
    ----------
    x, kernel_size, stride, padding, dilation, layout, order
        As for `im2col`.
    memory_limit
        Upper bound on what one step allocates, its columns included (columns that you
        still hold from the step before come on top): bytes, or a word such as
        ``"64 MiB"``; by default 64 MiB with NumPy and 256 MiB with CuPy.

    Yields
    ------
    block
        Which images and output cells these are: ``block.images`` and
        ``block.output`` are half-open ranges.
    columns
        Their columns, in the given order; a new array for each block.

    Raises
    ------
    MemoryLimitError
        If not even one position fits; it names the smallest limit that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.zeros((2, 3, 64, 64), dtype=np.float32)
    >>> steps = cuconv.iter_im2col(x, 3, memory_limit="256 KiB")
    >>> [columns.shape for block, columns in steps]
    [(1922, 27), (1922, 27), (1922, 27), (1922, 27)]
    """
    geometry, xp = _checked(x, kernel_size, stride, padding, dilation, layout)
    geometry.column_shape(order)
    backend = backend_of(xp, x)
    refuse_capture(backend, "every block takes memory; im2col takes out=")
    default = backend.default_memory_limit
    limit = default if memory_limit is None else parse_memory_limit(memory_limit)
    tile = _lazy_tile(backend, geometry, x.dtype, limit)
    return _steps(backend, base_array(x), geometry, tile, order)


def patches(
    x: Array,
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    layout: str = "channels_first",
) -> Array:
    """Every window over an array, as a view: nothing is copied.

    Parameters
    ----------
    x, kernel_size, stride, dilation, layout
        As for `im2col`; there is no padding, which would need a copy.

    Returns
    -------
    array
        (N, C, *out, *kernel), in either layout; without N if ``x`` has no batch axis.
        Read-only with NumPy; CuPy has no such thing, so do not write to it.

    Raises
    ------
    ValueError, TypeError
        For shapes or options that do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.arange(16).reshape(1, 1, 4, 4)
    >>> cuconv.patches(x, 2, stride=2)[0, 0, 1, 0]
    array([[ 8,  9],
           [12, 13]])
    """
    geometry, xp = _checked(x, kernel_size, stride, 0, dilation, layout)
    cells = _single_group(base_array(x), geometry)[:, 0]
    head, spatial = cells.strides[:2], cells.strides[2:]
    steps = (s * axis.stride for s, axis in zip(spatial, geometry.axes, strict=True))
    taps = (s * axis.dilation for s, axis in zip(spatial, geometry.axes, strict=True))
    shape = (*cells.shape[:2], *geometry.out, *geometry.kernel)
    strides = (*head, *steps, *taps)
    view = xp.lib.stride_tricks.as_strided(cells, shape, strides)
    if xp is np:
        view.flags.writeable = False
    return view if geometry.batched else view[0]


def _checked(
    x: Array,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Padding,
    dilation: Sizes,
    layout: str,
) -> tuple[WindowGeometry, Any]:
    xp = module_of({"x": x})
    check_type("x", x.dtype)
    geometry = WindowGeometry.of(
        x.shape,
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        layout=layout,
    )
    return geometry, xp


def _single_group(x: Array, geometry: WindowGeometry) -> Array:
    first, batched = geometry.channels_first, geometry.batched
    return grouped(x, 1, geometry.rank, channels_first=first, batched=batched)


def _column_cells(
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


def _fill(backend: Backend, x: Array, cells: Array, geometry: WindowGeometry) -> None:
    """Gather every block of x into the cells of its columns."""
    if cells.size == 0:
        return
    itemsize = x.dtype.itemsize
    column = geometry.channels * geometry.taps * itemsize
    tile = geometry.tile(max(backend.block_bytes // column, 1))
    workers = backend.workers() if cells.size * itemsize > _WORTH_THREADS else 1
    buffers = backend.gather_buffers(geometry, tile, x.dtype, x.dtype)
    scratch = [allocated(backend.xp, buffers) for _ in range(workers)]
    blocks = Shared(enumerate(geometry.blocks(tile)))

    def body(worker: int) -> None:
        for chunk, block in blocks:
            images, place = x[slice(*block.images)], _output_slices(block, geometry)
            with stage("gather", "im2col", chunk):
                backend.gather(images, cells[place], geometry, block, scratch[worker])

    backend.parallel(body, workers)


def _output_slices(block: Block, geometry: WindowGeometry) -> tuple[slice, ...]:
    """Where a block lies in (N, 1, C, *kernel, *out)."""
    whole = (slice(None),) * (2 + geometry.rank)
    return (slice(*block.images), *whole, *(slice(*span) for span in block.output))


def _sum(
    backend: Backend,
    cells: Array,
    target: Array,
    geometry: WindowGeometry,
    *,
    deterministic: bool,
) -> None:
    """Sum the columns into every region of the target."""
    if target.size == 0:
        return
    sums = accumulator(cells.dtype)
    cell = geometry.channels * sums.itemsize
    tile = geometry.region_tile(max(backend.block_bytes // cell, 1))
    staged = sums != target.dtype
    buffers = (Buffer("sum", tile.positions * geometry.channels, sums),) * staged
    busy = cells.size * cells.dtype.itemsize > _WORTH_THREADS
    workers = backend.workers() if busy else 1
    scratch = [allocated(backend.xp, buffers) for _ in range(workers)]
    regions = Shared(enumerate(geometry.regions(tile)))

    def body(worker: int) -> None:
        for chunk, region in regions:
            spans = (slice(*span) for span in region.cells)
            into = target[slice(*region.images)][(..., *spans)]
            with stage("scatter", "col2im", chunk):
                _sum_region(
                    backend,
                    cells,
                    into,
                    geometry,
                    region,
                    scratch[worker],
                    deterministic=deterministic,
                )

    backend.parallel(body, workers)


def _sum_region(
    backend: Backend,
    cells: Array,
    into: Array,
    geometry: WindowGeometry,
    region: Region,
    scratch: dict[str, Array],
    *,
    deterministic: bool,
) -> None:
    """Sum the columns into one region, by way of the scratch buffer if there is one."""
    if not region.is_reached:
        into[...] = 0
        return
    sums = into
    if "sum" in scratch:
        head, inner, first = into.shape[:3], into.shape[3:], geometry.channels_first
        sums = stored(scratch["sum"], head, (), inner, channels_first=first).cells
    block = geometry.block(region.images, region.output)
    backend.scatter(
        cells[_output_slices(block, geometry)],
        sums,
        geometry,
        block,
        region.cells,
        add=False,
        deterministic=deterministic,
    )
    if sums is not into:
        backend.copy(sums, into)


def _lazy_bytes(
    backend: Backend, geometry: WindowGeometry, dtype: DType, tile: Tile
) -> int:
    cells = tile.positions * geometry.channels * geometry.taps
    columns = Buffer("columns", cells, dtype).nbytes
    buffers = backend.gather_buffers(geometry, tile, dtype, dtype)
    overhead = backend.overhead(1, dtype.itemsize)
    return overhead + columns + workspace_bytes(buffers)


def _lazy_tile(
    backend: Backend, geometry: WindowGeometry, dtype: DType, limit: int
) -> Tile:
    def needed(positions: int) -> int:
        return _lazy_bytes(backend, geometry, dtype, geometry.tile(positions))

    whole = geometry.images * geometry.positions
    positions = largest_fitting(lambda p: needed(p) <= limit, max(whole, 1))
    if not positions:
        raise MemoryLimitError(limit, needed(1), "one column")
    return geometry.tile(positions)


def _steps(
    backend: Backend, x: Array, geometry: WindowGeometry, tile: Tile, order: str
) -> Iterator[tuple[Block, Array]]:
    cells = _single_group(x, geometry)
    buffers = backend.gather_buffers(geometry, tile, x.dtype, x.dtype)
    for chunk, block in enumerate(geometry.blocks(tile)):
        refuse_capture(backend, "every block takes memory; im2col takes out=")
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
    columns = backend.xp.empty(shape, dtype=x.dtype)
    if columns.size:
        into = _column_cells(columns, geometry, block.shape, order)
        backend.gather(
            x[first:last], into, geometry, block, allocated(backend.xp, buffers)
        )
    return columns
