"""Loops against columns: the same sums, by loops over scalars and by one product.

    python docs/tutorials/loops.py --plot loops.png

Times are taken on the machine that runs this, for images of 8 × 8 to 256 × 256
elements.  Loops stop where one run would take longer than a second.
"""

import argparse
import statistics
import time

import numpy as np
from matplotlib.figure import Figure

import cuconv
from cuconv.testing import assert_equal

SIZES = (8, 16, 32, 64, 128, 256)
CHANNELS, FILTERS, KERNEL = 3, 8, 3
LONGEST = 1.0  # seconds that one run of the loops may take
LEAST = 0.05  # seconds over which the others are repeated


def by_loops(x, w):
    """Six loops: over filters and positions, and over the terms of each sum."""
    c, rows, columns = x.shape
    filters, _, height, width = w.shape
    y = np.zeros((filters, rows - height + 1, columns - width + 1), dtype=x.dtype)
    for k, i, j in np.ndindex(y.shape):
        total = 0.0
        for channel, row, column in np.ndindex(c, height, width):
            total += x[channel, i + row, j + column] * w[k, channel, row, column]
        y[k, i, j] = total
    return y


def by_columns(x, w):
    """Copy every window into a column, and multiply once."""
    columns = cuconv.im2col(x, w.shape[2:], order="batched")
    out = [n - size + 1 for n, size in zip(x.shape[1:], w.shape[2:], strict=True)]
    return (w.reshape(len(w), -1) @ columns).reshape(len(w), *out)


def by_cuconv(x, w):
    return cuconv.conv2d(x, w)


def arrays(size):
    """Small integers held as floats: every sum is exact, in whatever order."""
    rng = np.random.default_rng(size)
    x = rng.integers(-3, 4, size=(CHANNELS, size, size)).astype(np.float32)
    w = rng.integers(-3, 4, size=(FILTERS, CHANNELS, KERNEL, KERNEL))
    return x, w.astype(np.float32)


def check():
    x, w = arrays(12)
    wanted = by_loops(x, w)
    assert_equal(by_columns(x, w), wanted)
    assert_equal(cuconv.conv2d(x, w, precision="strict"), wanted)


def seconds(function, x, w):
    """The median of runs that take ``LEAST`` together, and of one run at least."""
    taken = []
    while sum(taken) < LEAST:
        start = time.perf_counter()
        function(x, w)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure():
    """Seconds by name and size; the loops are left out where they would take long."""
    times = {"loops": {}, "columns and @": {}, "cuconv.conv2d": {}}
    for size in SIZES:
        x, w = arrays(size)
        times["columns and @"][size] = seconds(by_columns, x, w)
        times["cuconv.conv2d"][size] = seconds(by_cuconv, x, w)
        before = times["loops"].get(size // 2, 0.0 if size == SIZES[0] else np.inf)
        if 4 * before <= LONGEST:
            times["loops"][size] = seconds(by_loops, x, w)
    return times


def draw(figure, times=None):
    """Times on the left; on the right, the loops' time divided by each other's."""
    times = measure() if times is None else times
    left, right = figure.subplots(1, 2)
    loops = times["loops"]
    for name, taken in times.items():
        left.loglog(taken.keys(), [t * 1e3 for t in taken.values()], "o-", label=name)
        if name != "loops":
            ratios = [loops[size] / taken[size] for size in loops]
            right.loglog(loops.keys(), ratios, "o-", label=name)
    left.set(title="time", xlabel="elements along an axis", ylabel="milliseconds")
    right.set(title="speed-up over loops", xlabel="elements along an axis")
    for panel in (left, right):
        panel.set_xticks(SIZES, SIZES)
        panel.minorticks_off()
        panel.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", help="file to draw the times to")
    chosen = parser.parse_args()
    check()
    print("loops, columns and cuconv.conv2d agree")
    times = measure()
    for name, taken in times.items():
        row = "  ".join(f"{size}: {t * 1e3:.3g} ms" for size, t in taken.items())
        print(f"{name:<15}{row}")
    if chosen.plot:
        figure = Figure(figsize=(9, 4), layout="constrained")
        draw(figure, times)
        figure.savefig(chosen.plot)


if __name__ == "__main__":
    main()
