"""One product for each kernel offset: channels last, and no columns at all.

    python docs/tutorials/offsets.py --plot offsets.png

With the layout NHWC and weights HWIO, all pixels that one offset of the kernel reads
are a strided slice of the input, and its weights are a matrix (I, O).  A convolution is
the sum of one product for each offset.
"""

import argparse
from itertools import product

import numpy as np
from matplotlib.figure import Figure

import cuconv
from cuconv.testing import assert_equal


def out_size(size, kernel, stride, dilation):
    return (size - dilation * (kernel - 1) - 1) // stride + 1


def slices(x_shape, w_shape, stride, dilation):
    """For each offset of the kernel: the offset, and the pixels of x that it reads."""
    sizes, kernel = x_shape[1:3], w_shape[:2]
    out = [out_size(n, k, stride, dilation) for n, k in zip(sizes, kernel, strict=True)]
    for offset in product(*map(range, kernel)):
        starts = [tap * dilation for tap in offset]
        spans = (
            slice(start, start + (count - 1) * stride + 1, stride)
            for start, count in zip(starts, out, strict=True)
        )
        yield offset, (slice(None), *spans)


def padded(x, padding):
    return np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def forward(x, w, *, stride=1, padding=0, dilation=1):
    x = padded(x, padding)
    return sum(
        x[cells] @ w[offset]
        for offset, cells in slices(x.shape, w.shape, stride, dilation)
    )


def backward(dy, x, w, *, stride=1, padding=0, dilation=1):
    """Each product transposed: with wᵀ for x, with xᵀ for the weights."""
    x = padded(x, padding)
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for offset, cells in slices(x.shape, w.shape, stride, dilation):
        dx[cells] += dy @ w[offset].T
        dw[offset] = np.tensordot(x[cells], dy, axes=((0, 1, 2), (0, 1, 2)))
    inner = slice(padding, -padding or None)
    return dx[:, inner, inner], dw


def arrays(rng):
    x = rng.integers(-3, 4, size=(2, 11, 10, 3)).astype(np.float64)
    return x, rng.integers(-3, 4, size=(3, 2, 3, 5)).astype(np.float64)


def check():
    x, w = arrays(np.random.default_rng(0))
    cases = 0
    for stride, padding, dilation in product((1, 2, 3), (0, 1, 2), (1, 2)):
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        y = forward(x, w, **options)
        ours = {**options, "layout": "NHWC", "precision": "strict"}
        assert_equal(y, cuconv.conv2d(x, w, **ours))
        for strategy in ("tap_matmul", "im2col"):
            assert_equal(y, cuconv.conv2d(x, w, strategy=strategy, **ours))
        dx, dw = backward(y, x, w, **options)
        wanted = cuconv.conv_backward(y, x, w, needs=("x", "w"), **ours)
        assert_equal(dx, wanted.x)
        assert_equal(dw, wanted.w)
        cases += 1
    return cases


def draw(figure):
    """The pixels that each offset of a 3 × 3 kernel reads at stride 2."""
    x_shape, w_shape = (1, 9, 9, 1), (3, 3, 1, 1)
    panels = figure.subplots(3, 3)
    for offset, cells in slices(x_shape, w_shape, stride=2, dilation=1):
        read = np.zeros(x_shape)
        read[cells] = 1
        panel = panels[offset]
        panel.imshow(read[0, :, :, 0], cmap="Blues", vmin=0, vmax=1.5)
        panel.set(title=f"offset {offset}", xticks=[], yticks=[])
        panel.set_xticks(np.arange(-0.5, 9), minor=True)
        panel.set_yticks(np.arange(-0.5, 9), minor=True)
        panel.grid(which="minor", color="0.8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", help="file to draw the slices to")
    chosen = parser.parse_args()
    print(f"{check()} settings agree with cuconv, forward and backward")
    if chosen.plot:
        figure = Figure(figsize=(6, 6), layout="constrained")
        draw(figure)
        figure.savefig(chosen.plot)


if __name__ == "__main__":
    main()
