"""One image, one matrix: a graph of columns, product and pooling, both ways.

    python docs/tutorials/graph.py --plot graph.png

Each node keeps what its backward pass needs.  The maximum is taken over columns too,
with windows that extend beyond the end (`ceil_mode`), so that no element is left out.
"""

import argparse

import numpy as np
from matplotlib.figure import Figure

import cuconv
from cuconv.testing import assert_equal


class Columns:
    """(C, H, W) to (C·taps, positions), zeros around; back by col2im."""

    def __init__(self, kernel, **options):
        self.kernel, self.options = kernel, {**options, "order": "batched"}

    def forward(self, x):
        self.x_shape = x.shape
        return cuconv.im2col(x, self.kernel, **self.options)

    def backward(self, d_columns):
        return cuconv.col2im(d_columns, self.x_shape, self.kernel, **self.options)


class Product:
    """(C·taps, positions) to (K, positions): one matrix product and a bias."""

    def __init__(self, w, bias):
        self.w, self.bias = w.reshape(len(w), -1), bias

    def forward(self, columns):
        self.columns = columns
        return self.w @ columns + self.bias[:, None]

    def backward(self, dy):
        self.dw, self.dbias = dy @ self.columns.T, dy.sum(axis=1)
        return self.w.T @ dy


class Reshape:
    """Positions back to the two axes of an image."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def forward(self, y):
        return y.reshape(len(y), *self.sizes)

    def backward(self, dy):
        return dy.reshape(len(dy), -1)


class MaxPool:
    """(K, H, W) to (K, ⌈…⌉, ⌈…⌉): the maximum over the taps of each column."""

    def __init__(self, kernel, stride):
        self.kernel, self.stride = kernel, stride

    def _overhang(self, size):
        """Elements that the last window needs beyond the end; none begins there."""
        windows = -(-(size - self.kernel) // self.stride) + 1
        windows -= (windows - 1) * self.stride >= size
        return max((windows - 1) * self.stride + self.kernel - size, 0)

    def forward(self, y):
        self.shape = y.shape
        ends = [(0, self._overhang(size)) for size in y.shape[1:]]
        wide = np.pad(y, [(0, 0), *ends], constant_values=-np.inf)
        self.wide_shape = wide.shape
        kernel = (self.kernel, self.kernel)
        columns = cuconv.im2col(wide, kernel, stride=self.stride, order="batched")
        columns = columns.reshape(len(y), self.kernel**2, -1)
        self.best = columns.argmax(axis=1, keepdims=True)
        out = [(n - self.kernel) // self.stride + 1 for n in wide.shape[1:]]
        return np.take_along_axis(columns, self.best, axis=1).reshape(len(y), *out)

    def backward(self, dz):
        """Add the gradient of each maximum to the element it came from."""
        d_columns = np.zeros((len(dz), self.kernel**2, dz[0].size))
        dz = dz.reshape(len(dz), 1, -1)
        np.put_along_axis(d_columns, self.best, dz, axis=1)
        d_columns = d_columns.reshape(-1, dz.shape[-1])
        options = {"stride": self.stride, "order": "batched"}
        kernel = (self.kernel, self.kernel)
        dy = cuconv.col2im(d_columns, self.wide_shape, kernel, **options)
        return dy[:, : self.shape[1], : self.shape[2]]


def run(nodes, value):
    """All values that pass through the graph, the first and the last included."""
    values = [value]
    for node in nodes:
        values.append(node.forward(values[-1]))
    return values


def run_back(nodes, gradient):
    gradients = [gradient]
    for node in reversed(nodes):
        gradients.append(node.backward(gradients[-1]))
    return gradients


def arrays():
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, size=(3, 10, 9)).astype(np.float64)
    w = rng.integers(-3, 4, size=(4, 3, 3, 3)).astype(np.float64)
    return x, w, np.arange(4.0)


def graph(w, bias, *, pool, stride):
    options = {"stride": 1, "padding": 1}
    return [
        Columns((3, 3), **options),
        Product(w, bias),
        Reshape(10, 9),
        MaxPool(pool, stride),
    ]


def check(*, pool, stride):
    x, w, bias = arrays()
    nodes = graph(w, bias, pool=pool, stride=stride)
    y, z = run(nodes, x)[-2:]
    wanted = cuconv.conv2d(x, w, bias, padding=1, precision="strict")
    assert_equal(y, wanted)
    rounded_up = {"stride": stride, "ceil_mode": True}
    pooled, places = cuconv.max_pool2d(wanted, pool, return_indices=True, **rounded_up)
    assert_equal(z, pooled)
    dx = run_back(nodes, z)[-1]
    dy = cuconv.max_pool_backward(z, places, y.shape, (pool, pool), **rounded_up)
    gradients = cuconv.conv_backward(dy, x, w, padding=1, precision="strict")
    assert_equal(dx, gradients.x)
    assert_equal(nodes[1].dw.reshape(w.shape), gradients.w)
    assert_equal(nodes[1].dbias, gradients.bias)


def draw(figure):
    """The nodes, the shapes between them, and the gradients that go back."""
    x, w, bias = arrays()
    nodes = graph(w, bias, pool=2, stride=2)
    values = run(nodes, x)
    gradients = run_back(nodes, values[-1])[::-1]
    panel = figure.subplots()
    panel.set(xlim=(-0.9, 2 * len(nodes) + 0.9), ylim=(-1, 1))
    panel.axis("off")
    box = {"boxstyle": "round,pad=0.4", "facecolor": "#cfe3f3", "edgecolor": "0.3"}
    for place, node in enumerate(nodes):
        name = type(node).__name__
        panel.text(2 * place + 1, 0, name, ha="center", va="center", bbox=box)
    for place, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        ends = 2 * place - 0.6, 2 * place + 0.6
        for height, text, (start, stop) in (
            (0.35, f"{value.shape}", ends),
            (-0.35, f"{gradient.shape}", ends[::-1]),
        ):
            arrow = {"arrowstyle": "->", "color": "0.3"}
            panel.annotate("", (stop, height), (start, height), arrowprops=arrow)
            panel.text(2 * place, height * 1.35, text, ha="center", va="center", size=8)
    panel.text(-0.8, 0.85, "forward: values")
    panel.text(-0.8, -0.9, "backward: gradients")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", help="file to draw the graph to")
    chosen = parser.parse_args()
    settings = [(2, 2), (3, 2), (2, 3), (3, 3), (4, 3)]
    for pool, stride in settings:
        check(pool=pool, stride=stride)
    print(f"{len(settings)} graphs agree with cuconv, forward and backward")
    if chosen.plot:
        figure = Figure(figsize=(11, 3), layout="constrained")
        draw(figure)
        figure.savefig(chosen.plot)


if __name__ == "__main__":
    main()
