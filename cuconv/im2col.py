"""Columns: im2col, its adjoint col2im, and the lazy and the copy-free forms."""

from collections.abc import Iterator, Sequence

import numpy as np

from cuconv.arrays import Array, SupportsArray, base_array
from cuconv.backends.columns import single_group
from cuconv.choices import Layout, Order
from cuconv.engine.call import run
from cuconv.engine.columns import (
    checked_windows,
    column_steps,
    plan_columns,
)
from cuconv.geometry import Block, Padding, Sizes
from cuconv.memory import MemoryLimit


def im2col(
    x: SupportsArray,
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    cover_all: bool = False,
    layout: Layout = "channels_first",
    order: Order = "rows",
    out: SupportsArray | None = None,
) -> Array:
    """Copy every window of an array into a matrix, one window a row or a column.

    Parameters
    ----------
    x
        (N, C, *spatial), or (N, *spatial, C) with ``layout="channels_last"``; any type.
        The batch axis may be missing if ``kernel_size`` names every axis.
    kernel_size
        Taps along each axis: one number for a batched ``x``, or one for each axis.
    stride, padding, dilation, cover_all, layout
        As for `cuconv.conv`.
    order
        ``"rows"``: (N·positions, C·taps); ``"columns"``: (C·taps, N·positions);
        ``"batched"``: (N, C·taps, positions), or (C·taps, positions) without a batch.
        With channels last the patch axis runs taps first, then channels: (taps·C).
    out
        Array to write to, of that shape and the type of ``x``, in the machine's own
        byte order.

    Returns
    -------
    array
        The columns, in the type and the module of ``x``, and the machine's own byte
        order; zero where windows hang over.

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
    options = {
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "cover_all": cover_all,
        "layout": layout,
        "order": order,
    }
    return run(plan_columns, "im2col", (x,), out, options)


def col2im(
    cols: SupportsArray,
    x_shape: Sequence[int],
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    cover_all: bool = False,
    layout: Layout = "channels_first",
    order: Order = "rows",
    out: SupportsArray | None = None,
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
    kernel_size, stride, padding, dilation, cover_all, layout, order
        As for `im2col`.
    out
        Array to write to, of shape ``x_shape`` and the type of ``cols``, in the
        machine's own byte order.
    deterministic
        False allows CUDA to add atomically, in any order; True and None do not.

    Returns
    -------
    array
        Of shape ``x_shape`` and the type of ``cols``, in the machine's own byte order;
        halves are summed in float32.

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
    options = {
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "cover_all": cover_all,
        "layout": layout,
        "order": order,
    }
    more = {"x_shape": x_shape, "deterministic": deterministic}
    return run(plan_columns, "col2im", (cols,), out, options, more)


def iter_im2col(
    x: SupportsArray,
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    cover_all: bool = False,
    layout: Layout = "channels_first",
    order: Order = "rows",
    memory_limit: MemoryLimit = None,
) -> Iterator[tuple[Block, Array]]:
    """The columns of an array block by block, each made when it is asked for.

    Parameters
    ----------
    x, kernel_size, stride, padding, dilation, cover_all, layout, order
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
        If nothing fits; it names the smallest limit that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.zeros((2, 3, 64, 64), dtype=np.float32)
    >>> steps = cuconv.iter_im2col(x, 3, memory_limit="320 KiB")
    >>> [columns.shape for block, columns in steps]
    [(1922, 27), (1922, 27), (1922, 27), (1922, 27)]
    """
    options = {
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "cover_all": cover_all,
        "layout": layout,
    }
    return column_steps(x, options, order, memory_limit)


def patches(
    x: SupportsArray,
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    layout: Layout = "channels_first",
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
        Of the type and the byte order of ``x``.
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
    options = {
        "kernel_size": kernel_size,
        "stride": stride,
        "dilation": dilation,
        "layout": layout,
    }
    geometry, xp = checked_windows(x, options)
    cells = single_group(base_array(x), geometry)[:, 0]
    head, spatial = cells.strides[:2], cells.strides[2:]
    steps = (s * axis.stride for s, axis in zip(spatial, geometry.axes, strict=True))
    taps = (s * axis.dilation for s, axis in zip(spatial, geometry.axes, strict=True))
    shape = (*cells.shape[:2], *geometry.out, *geometry.kernel)
    strides = (*head, *steps, *taps)
    view = xp.lib.stride_tricks.as_strided(cells, shape, strides)
    if xp is np:
        view.flags.writeable = False
    return view if geometry.batched else view[0]
