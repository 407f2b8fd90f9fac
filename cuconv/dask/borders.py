"""Borders that repeat the input (``padding_mode``), and their adjoint, lazily.

A convolution with such a border is one without padding over the input with the border
around it.  Along every axis the border is runs of the input's elements (`Axis.runs`),
so that inner blocks are not changed.
"""

from dataclasses import replace

import dask.array as da

from cuconv.arrays import Array
from cuconv.dask.blocks import Chunks
from cuconv.geometry import Axis, ConvGeometry, Run


def without_border(geometry: ConvGeometry) -> ConvGeometry:
    """The convolution without padding over the input with its border."""
    axes = tuple(
        axis._replace(
            size=sum(_ends(axis)) + axis.size,
            before=min(axis.before, 0),
            after=min(axis.after, 0),
        )
        for axis in geometry.axes
    )
    return replace(geometry, axes=axes, padding_mode="zeros")


def bordered(x: Array, geometry: ConvGeometry) -> Array:
    """The input with its border.

    Examples
    --------
    >>> import dask.array as da
    >>> from cuconv.geometry import ConvGeometry
    >>> from cuconv.dask.borders import bordered
    >>> x = da.arange(5, chunks=2).reshape(1, 5)
    >>> options = {"padding": 2, "padding_mode": "reflect"}
    >>> bordered(x, ConvGeometry.of_weights((1, 5), (1, 1, 3), **options)).compute()
    array([[2, 1, 0, 1, 2, 3, 4, 3, 2]])
    """
    x = _without_empty_chunks(x)
    for place, axis in _placed(geometry):
        parts = []
        for run in sorted(_runs(axis, geometry), key=lambda run: run.window.start):
            part = x[*_at(place), run.cells]
            count = run.window.stop - run.window.start
            parts.append(da.repeat(part, count, place) if _repeats(run) else part)
        x = da.concatenate(parts, axis=place)
    return x


def border_adjoint(
    dx: Array, geometry: ConvGeometry, chunks: tuple[Chunks, ...]
) -> Array:
    """The adjoint of `bordered`: add the border to the elements it was copied from."""
    dx = _without_empty_chunks(dx)
    for place, axis in _placed(geometry):
        inner, *border = _runs(axis, geometry)
        total = dx[*_at(place), inner.window]
        for run in border:
            total = _added(total, dx[*_at(place), run.window], run, place)
        dx = total
    return dx.rechunk(chunks)


def _added(total: Array, part: Array, run: Run, place: int) -> Array:
    """Add a part of the border to the elements that it was copied from."""
    if _repeats(run):
        part = part.sum(axis=place, keepdims=True, dtype=part.dtype)
    elif run.cells.step == -1:
        part = part[*_at(place), ::-1]
    first, stop = run.bounds
    cells = (slice(0, first), slice(first, stop), slice(stop, None))
    low, met, high = (total[*_at(place), some] for some in cells)
    return da.concatenate([low, met + part, high], axis=place)


def _without_empty_chunks(array: Array) -> Array:
    """Drop empty chunks: Dask repeats, reverses and joins them wrongly."""
    kept = (tuple(n for n in own if n) or (0,) for own in array.chunks)
    return array.rechunk(tuple(kept))


def _runs(axis: Axis, geometry: ConvGeometry) -> list[Run]:
    """The input, and the part of it that every part of the border reads."""
    before, after = _ends(axis)
    return list(axis.runs((-before, axis.size + after), geometry.padding_mode))


def _repeats(run: Run) -> bool:
    """True if all elements of a run read the same one."""
    first, stop = run.bounds
    return bool(run.window.stop - run.window.start > stop - first)


def _ends(axis: Axis) -> tuple[int, int]:
    return max(axis.before, 0), max(axis.after, 0)


def _at(place: int) -> tuple[slice, ...]:
    return (slice(None),) * place


def _placed(geometry: ConvGeometry) -> list[tuple[int, Axis]]:
    """Every spatial axis that has a border, with its index in an array."""
    first = geometry.batched + geometry.channels_first
    each = enumerate(geometry.axes, start=first)
    return [(place, axis) for place, axis in each if any(_ends(axis))]
