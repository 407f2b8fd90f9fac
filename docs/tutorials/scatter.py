"""Columns by an index, and the adjoint by adding: stride, padding, dilation and groups.

    python docs/tutorials/scatter.py --plot scatter.png

Three arrays of indices say which element of the padded input every element of the
columns came from.  Reading by them is im2col; adding by them, with `numpy.add.at`, is
col2im.
"""

import argparse
from itertools import product

import numpy as np
from matplotlib.figure import Figure

import cuconv
from cuconv.testing import assert_equal


def out_size(size, kernel, stride, padding, dilation):
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def sources(x_shape, kernel, *, stride=1, padding=0, dilation=1):
    """Channel, row and column of the source of each element of (C·taps, positions)."""
    c, *sizes = x_shape[1:]
    out = [
        out_size(n, k, stride, padding, dilation)
        for n, k in zip(sizes, kernel, strict=True)
    ]
    channel, tap_row, tap_column = np.indices((c, *kernel)).reshape(3, -1, 1)
    row, column = np.indices(out).reshape(2, 1, -1)
    rows = row * stride + tap_row * dilation
    columns = column * stride + tap_column * dilation
    return channel, rows, columns


def padded(x, padding):
    return np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))


def im2col(x, kernel, *, padding=0, **options):
    where = sources(x.shape, kernel, padding=padding, **options)
    return padded(x, padding)[(slice(None), *where)]


def col2im(columns, x_shape, kernel, *, padding=0, **options):
    """Add every element of the columns to the element that it came from."""
    x = padded(np.zeros(x_shape, dtype=columns.dtype), padding)
    where = sources(x_shape, kernel, padding=padding, **options)
    np.add.at(x, (slice(None), *where), columns)
    inner = slice(padding, -padding or None)
    return x[:, :, inner, inner]


def in_groups(columns, groups):
    """(N, groups, C·taps / groups, positions): a patch begins with its channels."""
    return columns.reshape(len(columns), groups, -1, columns.shape[-1])


def forward(x, w, *, groups=1, **options):
    columns = in_groups(im2col(x, w.shape[2:], **options), groups)
    weights = w.reshape(groups, len(w) // groups, -1)
    return (weights @ columns).reshape(len(x), len(w), -1)


def backward(dy, x, w, *, groups=1, **options):
    """``dy`` is (N, K, positions)."""
    columns = in_groups(im2col(x, w.shape[2:], **options), groups)
    weights = w.reshape(groups, len(w) // groups, -1)
    dy = dy.reshape(len(x), groups, -1, dy.shape[-1])
    dw = (dy @ columns.swapaxes(-1, -2)).sum(axis=0).reshape(w.shape)
    dcolumns = (weights.swapaxes(-1, -2) @ dy).reshape(len(x), -1, dy.shape[-1])
    return col2im(dcolumns, x.shape, w.shape[2:], **options), dw


def check():
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, size=(2, 4, 9, 8)).astype(np.float64)
    cases = 0
    for stride, padding, dilation, groups in product((1, 2, 3), (0, 2), (1, 2), (1, 2)):
        w = rng.integers(-3, 4, size=(6, 4 // groups, 3, 2)).astype(np.float64)
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        columns = im2col(x, (3, 2), **options)
        assert_equal(columns, cuconv.im2col(x, (3, 2), order="batched", **options))
        back = cuconv.col2im(columns, x.shape, (3, 2), order="batched", **options)
        assert_equal(col2im(columns, x.shape, (3, 2), **options), back)
        options["groups"] = groups
        y = cuconv.conv2d(x, w, precision="strict", **options)
        assert_equal(forward(x, w, **options).reshape(y.shape), y)
        dx, dw = backward(y.reshape(2, 6, -1), x, w, **options)
        wanted = cuconv.conv_backward(y, x, w, needs=("x", "w"), **options)
        assert_equal(dx, wanted.x)
        assert_equal(dw, wanted.w)
        cases += 1
    return cases


def draw(figure):
    """How often each of 12 × 12 elements is read by windows of 3 × 3."""
    settings = [
        {"stride": 1, "dilation": 1},
        {"stride": 2, "dilation": 1},
        {"stride": 1, "dilation": 2},
        {"stride": 3, "dilation": 2},
    ]
    for panel, options in zip(figure.subplots(1, 4), settings, strict=True):
        ones = np.ones((1, 1, 12, 12))
        counts = col2im(im2col(ones, (3, 3), **options), ones.shape, (3, 3), **options)
        panel.imshow(counts[0, 0], cmap="Blues", vmin=0, vmax=12)
        for (row, column), count in np.ndenumerate(counts[0, 0]):
            panel.text(column, row, f"{count:.0f}", ha="center", va="center", size=6)
        title = ", ".join(f"{word} {number}" for word, number in options.items())
        panel.set(title=title, xticks=[], yticks=[])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", help="file to draw the counts to")
    chosen = parser.parse_args()
    print(f"{check()} settings agree with cuconv, forward and backward")
    if chosen.plot:
        figure = Figure(figsize=(12, 3.4), layout="constrained")
        draw(figure)
        figure.savefig(chosen.plot)


if __name__ == "__main__":
    main()
