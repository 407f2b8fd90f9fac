"""A strided view, columns that are built when asked for, gradients as convolutions.

    python docs/tutorials/lazy.py --plot lazy.png

Forward: a product with a view that copies nothing, or with a block of columns at a
time.  Backward: both gradients are convolutions once more, for every stride: dy is
dilated by the stride, and for the input's gradient the weights are flipped.
"""

import argparse

import numpy as np
from matplotlib.figure import Figure

import cuconv
from cuconv.geometry import WindowGeometry
from cuconv.testing import assert_equal


def by_view(x, w, *, stride=1):
    """Contract (N, C, rows, columns, taps, taps): no columns are written."""
    windows = cuconv.patches(x, w.shape[2:], stride=stride)
    return np.einsum("ncijab,kcab->nkij", windows, w)


def by_blocks(x, w, *, stride=1, memory_limit="256 KiB"):
    """A product for each block of columns; no more of them exist at a time."""
    out = cuconv.patches(x, w.shape[2:], stride=stride).shape[2:4]
    y = np.empty((len(x), len(w), *out))
    flat = w.reshape(len(w), -1)
    options = {"stride": stride, "order": "batched", "memory_limit": memory_limit}
    for block, columns in cuconv.iter_im2col(x, w.shape[2:], **options):
        place = (slice(*block.images), slice(None), *(slice(*s) for s in block.output))
        y[place] = (flat @ columns).reshape(y[place].shape)
    return y


def input_dilation(dy, stride, tails):
    """Zeros between elements, and one for each element left over at the end."""
    *head, rows, columns = dy.shape
    inner = [(n - 1) * stride + 1 for n in (rows, columns)]
    wide = np.zeros((*head, *(n + tail for n, tail in zip(inner, tails, strict=True))))
    wide[:, :, : inner[0] : stride, : inner[1] : stride] = dy
    return wide


def input_gradient(dy, w, x_shape, *, stride=1):
    """Convolve the dilated dy, padded by k - 1, with flipped weights (C, K, k, k)."""
    sizes = zip(x_shape[2:], w.shape[2:], strict=True)
    tails = [(size - kernel) % stride for size, kernel in sizes]
    flipped = w[:, :, ::-1, ::-1].swapaxes(0, 1)
    padding = tuple(kernel - 1 for kernel in w.shape[2:])
    return cuconv.conv2d(
        input_dilation(dy, stride, tails), flipped, padding=padding, precision="strict"
    )


def weight_gradient(dy, x, w_shape, *, stride=1):
    """Convolve x with dy, dilated by the stride; the sum is over images."""
    x, dy = x.swapaxes(0, 1), dy.swapaxes(0, 1)
    dw = cuconv.conv2d(x, dy, dilation=stride, precision="strict")
    return dw.swapaxes(0, 1)[:, :, : w_shape[2], : w_shape[3]]


def check(stride):
    rng = np.random.default_rng(stride)
    x = rng.integers(-3, 4, size=(2, 3, 17, 15)).astype(np.float64)
    w = rng.integers(-3, 4, size=(5, 3, 4, 3)).astype(np.float64)
    y = cuconv.conv2d(x, w, stride=stride, precision="strict")
    assert_equal(by_view(x, w, stride=stride), y)
    assert_equal(by_blocks(x, w, stride=stride), y)
    options = {"stride": stride, "needs": ("x", "w"), "precision": "strict"}
    wanted = cuconv.conv_backward(y, x, w, **options)
    assert_equal(input_gradient(y, w, x.shape, stride=stride), wanted.x)
    assert_equal(weight_gradient(y, x, w.shape, stride=stride), wanted.w)


def draw(figure):
    """The largest block of columns under each limit, and all columns in one piece."""
    shape, kernel = (4, 16, 64, 64), (3, 3)
    x = np.zeros(shape, dtype=np.float32)
    limits = [2**power for power in range(19, 25)]
    largest = [
        max(
            columns.nbytes
            for _, columns in cuconv.iter_im2col(x, kernel, memory_limit=limit)
        )
        for limit in limits
    ]
    whole = WindowGeometry.of(shape, kernel).column_bytes(itemsize=4)
    panel = figure.subplots()
    panel.loglog(limits, largest, "o-", base=2, label="the largest block of columns")
    panel.loglog(limits, limits, "--", color="0.5", base=2, label="the limit")
    panel.axhline(whole, color="#D55E00", label="all columns in one piece")
    panel.set(xlabel="memory_limit, bytes", ylabel="bytes", title=f"{shape}, 3×3")
    panel.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", help="file to draw the blocks to")
    chosen = parser.parse_args()
    strides = range(1, 7)
    for stride in strides:
        check(stride)
    print(f"strides 1 to {max(strides)} agree with cuconv, forward and backward")
    if chosen.plot:
        figure = Figure(figsize=(6, 4), layout="constrained")
        draw(figure)
        figure.savefig(chosen.plot)


if __name__ == "__main__":
    main()
