"""Loops over planes, compiled by Numba if it is installed.

`add_in_planes` replaces NumPy's ``add.at``, which does not release Python's lock.

All others are for depthwise convolution, which has too few multiplications for BLAS,
and for which NumPy passes over every output twice for each tap: at best 1.7 ns an
output on one core of an AMD EPYC (Zen 4), 3×3, where PyTorch takes 0.7.  These loops
keep the planes of one channel in cache.

The planes of a few images are stored one after another in ``scratch``, each with its
padding.  They are one contiguous array, and no loop tests where a plane or a row ends:

    sums[i] = Σ over taps of weights[tap] · scratch[i + offset(tap)]

for every i, as if the stride were 1; sums between outputs are never read.  A few more
elements cost less than loops that are too short for vector instructions.

Arrays are (N, G, C/G, outer, rows, last), with any strides.  ``axes`` has a row for
each of the three axes: taps, dilation, index of the first element in the scratch,
distance of neighbouring elements there, stride of the outputs.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a loop when it is first called."""
else:
    from numba import njit

    def compiled(function):  # noqa: D103 - as above
        # Sums may be reordered, for vector instructions; nothing else is relaxed.
        options = {"nogil": True, "fastmath": {"reassoc", "contract"}}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:
            # No folder for the cache: neither the package nor the home is writable.
            return njit(**options)(function)


Cells = Any


@compiled
def add_in_planes(
    cells: Cells, places: Cells, values: Cells, bounds: Cells, dilation: Cells
) -> Any:
    """Sum the values of every plane at their indices, in order; zero elsewhere.

    Return where an index is not of its window, nor -1, or -1.  Planes have three axes;
    ``bounds`` are the first elements under the windows along each, and how many.
    """
    first0, count0, first1, count1, first2, count2 = bounds
    apart0, apart1, apart2 = dilation
    is_dilated = apart0 * apart1 * apart2 > 1
    depth, height, width = cells.shape[1:]
    row = np.uint64(width)
    outputs = places.shape[1:]
    for p in range(cells.shape[0]):
        plane = cells[p].reshape(-1)
        plane[:] = 0
        for a in range(outputs[0]):
            for b in range(outputs[1]):
                start = (first0[a] * height + first1[b]) * width
                for c in range(outputs[2]):
                    index = places[p, a, b, c]
                    if index == -1:
                        continue
                    # Unsigned numbers: those below zero are the largest.
                    rest, i = np.uint64(index - start), np.uint64(0)
                    if depth > 1:
                        i = rest // np.uint64(height * width)
                        rest -= i * np.uint64(height * width)
                    j = rest // row
                    k = rest - j * row - np.uint64(first2[c])
                    is_beyond = (
                        i >= np.uint64(count0[a])
                        or j >= np.uint64(count1[b])
                        or k >= np.uint64(count2[c])
                    )
                    if is_beyond or (
                        is_dilated
                        and (
                            i % np.uint64(apart0)
                            or j % np.uint64(apart1)
                            or k % np.uint64(apart2)
                        )
                    ):
                        done = (p * outputs[0] + a) * outputs[1] + b
                        return done * outputs[2] + c
                    plane[np.uint64(index)] += values[p, a, b, c]
    return -1


@compiled
def place(x: Cells, axes: Cells, scratch: Cells) -> None:
    """Copy a plane (outer, rows, last) to its elements of a scratch, likewise."""
    depth, height, width = scratch.shape
    first, apart = axes[2, 2], axes[2, 3]
    begin = max(0, -(first // apart))
    end = min(x.shape[2], -((first - width) // apart))
    for d in range(x.shape[0]):
        at_d = axes[0, 2] + d * axes[0, 3]
        if at_d < 0 or at_d >= depth:
            continue
        for h in range(x.shape[1]):
            at_h = axes[1, 2] + h * axes[1, 3]
            if at_h < 0 or at_h >= height or end <= begin:
                continue
            # Slices first: an index that may be negative prevents vector instructions.
            row = x[d, h][begin:end]
            into = scratch[at_d, at_h][first + begin * apart :]
            if apart == 1:
                for w in range(row.shape[0]):
                    into[w] = row[w]
            else:
                spaced = into[::apart]
                for w in range(row.shape[0]):
                    spaced[w] = row[w]


@compiled
def add_taps(flat: Cells, start: int, weights: Cells, step: int, sums: Cells) -> None:
    """``sums[i] += Σ over taps of weights[tap] · flat[start + tap · step + i]``."""
    length, taps = sums.shape[0], weights.shape[0]
    done = 0
    while done + 3 <= taps:
        a, b, c = weights[done], weights[done + 1], weights[done + 2]
        at = start + done * step
        one = flat[at : at + length]
        two = flat[at + step : at + step + length]
        three = flat[at + 2 * step : at + 2 * step + length]
        for i in range(length):
            sums[i] += a * one[i] + b * two[i] + c * three[i]
        done += 3
    for tap in range(done, taps):
        a = weights[tap]
        one = flat[start + tap * step : start + tap * step + length]
        for i in range(length):
            sums[i] += a * one[i]


@compiled
def add_nine(
    flat: Cells, start: int, weights: Cells, line: int, step: int, sums: Cells
) -> None:
    """The same for 3 × 3 taps, in one pass."""
    length = sums.shape[0]
    a0, a1, a2 = weights[0, 0], weights[0, 1], weights[0, 2]
    b0, b1, b2 = weights[1, 0], weights[1, 1], weights[1, 2]
    c0, c1, c2 = weights[2, 0], weights[2, 1], weights[2, 2]
    a = flat[start : start + 2 * step + length]
    b = flat[start + line : start + line + 2 * step + length]
    c = flat[start + 2 * line : start + 2 * line + 2 * step + length]
    d, e = a[step:], a[2 * step :]
    f, h = b[step:], b[2 * step :]
    p, q = c[step:], c[2 * step :]
    for i in range(length):
        total = a0 * a[i] + a1 * d[i] + a2 * e[i]
        total += b0 * b[i] + b1 * f[i] + b2 * h[i]
        sums[i] += total + (c0 * c[i] + c1 * p[i] + c2 * q[i])


@compiled
def take(sums: Cells, axes: Cells, out: Cells) -> None:
    """Copy the outputs out of a plane of sums (outer, rows, last)."""
    apart = axes[2, 4]
    for d in range(out.shape[0]):
        for h in range(out.shape[1]):
            row = out[d, h]
            run = sums[d * axes[0, 4], h * axes[1, 4]]
            if apart == 1:
                for w in range(row.shape[0]):
                    row[w] = run[w]
            else:
                spaced = run[::apart]
                for w in range(row.shape[0]):
                    row[w] = spaced[w]


@compiled
def convolve(
    x: Cells,
    w: Cells,
    bias: Cells,
    out: Cells,
    axes: Cells,
    scratch: Cells,
    sums: Cells,
    begin: int,
    end: int,
) -> None:
    """Compute filters begin … end of the result; ``scratch`` has several planes."""
    images, filters = scratch.shape[0], out.shape[2]
    height, width = scratch.shape[2], scratch.shape[3]
    flat, totals = scratch.reshape(-1), sums.reshape(-1)
    reach = 0
    for axis, step in ((0, height * width), (1, width), (2, 1)):
        reach += (axes[axis, 0] - 1) * axes[axis, 1] * step
    scratch[...] = 0
    for index in range(begin, end):
        g, k = index // filters, index % filters
        for first in range(0, x.shape[0], images):
            count = min(images, x.shape[0] - first)
            length = count * (flat.shape[0] // images) - reach
            run = totals[:length]
            run[:] = bias[g, k]
            for c in range(x.shape[2]):
                for n in range(count):
                    place(x[first + n, g, c], axes, scratch[n])
                for i in range(axes[0, 0]):
                    if axes[1, 0] == 3 and axes[2, 0] == 3:
                        start, line = (
                            i * axes[0, 1] * height * width,
                            axes[1, 1] * width,
                        )
                        add_nine(flat, start, w[g, k, c, i], line, axes[2, 1], run)
                        continue
                    for j in range(axes[1, 0]):
                        start = (i * axes[0, 1] * height + j * axes[1, 1]) * width
                        add_taps(flat, start, w[g, k, c, i, j], axes[2, 1], run)
            for n in range(count):
                take(sums[n], axes, out[first + n, g, k])


@compiled
def correlate_exactly(
    dy: Cells, x: Cells, into: Cells, x_axes: Cells, dy_axes: Cells
) -> None:
    """``into[t] = Σ dy[o] · x[o · stride + t]``, element by element."""
    into[...] = 0
    size = x.shape
    for n in range(dy.shape[0]):
        for o in np.ndindex(dy.shape[1:]):
            value = dy[n, o[0], o[1], o[2]]
            for t in np.ndindex(into.shape):
                d = o[0] * dy_axes[0, 3] + t[0] * x_axes[0, 1] - x_axes[0, 2]
                h = o[1] * dy_axes[1, 3] + t[1] * x_axes[1, 1] - x_axes[1, 2]
                w = o[2] * dy_axes[2, 3] + t[2] * x_axes[2, 1] - x_axes[2, 2]
                inside = 0 <= d < size[1] and 0 <= h < size[2]
                if inside and 0 <= w < size[3]:
                    into[t] += value * x[n, d, h, w]


@compiled
def correlate(
    dy: Cells,
    x: Cells,
    out: Cells,
    x_axes: Cells,
    dy_axes: Cells,
    scratch: Cells,
    sums: Cells,
    begin: int,
    end: int,
) -> None:
    """Weight gradients begin … end, counted over groups, filters, channels.

    ``dw[t] = Σ dy[o] · x[o · stride + t]``, with dy laid out in ``sums`` as x is in
    ``scratch``, its elements a stride apart with zeros in between.
    """
    images, filters, channels = scratch.shape[0], out.shape[1], out.shape[2]
    height, width = scratch.shape[2], scratch.shape[3]
    flat, gradients = scratch.reshape(-1), sums.reshape(-1)
    scratch[...] = 0
    sums[...] = 0
    for index in range(begin, end):
        g, k = index // (filters * channels), index // channels % filters
        c = index % channels
        into = out[g, k, c]
        into[...] = 0
        for first in range(0, x.shape[0], images):
            count = min(images, x.shape[0] - first)
            for n in range(count):
                place(x[first + n, g, c], x_axes, scratch[n])
                place(dy[first + n, g, k], dy_axes, sums[n])
            cells = count * (flat.shape[0] // images)
            for i in range(x_axes[0, 0]):
                for j in range(x_axes[1, 0]):
                    for t in range(x_axes[2, 0]):
                        at = (i * x_axes[0, 1] * height + j * x_axes[1, 1]) * width
                        at += t * x_axes[2, 1]
                        one, two = gradients[: cells - at], flat[at:cells]
                        total = into[i, j, t]
                        for p in range(one.shape[0]):
                            total += one[p] * two[p]
                        into[i, j, t] = total
        if not np.isfinite(into.sum()):
            # Zeros in between were multiplied by a NaN or an infinity: sum without
            # them.
            correlate_exactly(dy[:, g, k], x[:, g, c], into, x_axes, dy_axes)
