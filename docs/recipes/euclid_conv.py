"""The convolution of a framework written on NumPy or CuPy, replaced by cuconv.

euclid-ml 0.9.9 builds the whole matrix of columns, and sums its gradient tap by tap.  Its
layers are nodes of its automatic differentiation; this is one node that calls cuconv.
"""

from time import perf_counter

import euclid.settings

euclid.settings.dtype = "float64"  # small integers are exact either way

import numpy as np
from euclid.core.tensor import Tensor
from euclid.neural_network.layers import Conv2D

import cuconv


def accumulate(tensor, gradient):
    tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient


def forward(layer, x):
    """Replace ``Conv2D.forward``."""
    options = {"stride": layer.stride, "padding": layer.padding}
    inputs = x, layer.weights, layer.bias
    y = Tensor(cuconv.conv2d(*(each.data for each in inputs), **options))
    y.requires_grad = any(each.requires_grad for each in inputs)

    def backward():
        needs = [
            name
            for name, each in zip(("x", "w", "bias"), inputs, strict=True)
            if each.requires_grad
        ]
        gradients = cuconv.conv_backward(
            y.grad, x.data, layer.weights.data, needs=needs, **options
        )
        for each, gradient in zip(inputs, gradients, strict=True):
            if gradient is not None:
                accumulate(each, gradient)

    y._backward = backward
    y._prev = set(inputs)
    return y


def outputs_and_gradients(function, layer, values, dy):
    x = Tensor(values, requires_grad=True)
    for each in layer.parameters():
        each.zero_grad()
    y = function(layer, x)
    (y * Tensor(dy)).sum().backward()
    return [y.data, x.grad, *(each.grad for each in layer.parameters())]


def seconds(function, layer, values, dy):
    best = 1e9
    for _ in range(3):
        start = perf_counter()
        outputs_and_gradients(function, layer, values, dy)
        best = min(best, perf_counter() - start)
    return best


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    own, arrays = Conv2D.forward, 0
    for stride, padding in ((1, 0), (1, 1), (2, 1), (3, 2)):
        layer = Conv2D(3, 4, 3, stride=stride, padding=padding)
        for each in layer.parameters():
            each.data = rng.integers(-4, 5, each.data.shape).astype("f8")
        x = rng.integers(-4, 5, (2, 3, 10, 10)).astype("f8")
        dy = rng.integers(-4, 5, own(layer, Tensor(x)).data.shape).astype("f8")
        theirs = outputs_and_gradients(own, layer, x, dy)
        ours = outputs_and_gradients(forward, layer, x, dy)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
            arrays += 1
    assert arrays == 16
    print(f"{arrays} outputs and gradients are equal")
    layer = Conv2D(64, 64, 3, padding=1)
    x, dy = rng.standard_normal((2, 2, 64, 56, 56))
    theirs, ours = (seconds(f, layer, x, dy) for f in (own, forward))
    print(f"forward and backward: {theirs * 1e3:.0f} ms, with cuconv {ours * 1e3:.0f}")
