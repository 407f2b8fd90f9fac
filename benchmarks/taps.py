"""Every operation in float64, a tap of the kernel at a time, for any array module.

A convolution is a sum of matrix products over shifted views: short, independent of the
library, and fast enough to check whole results on a GPU.  Arrays of NumPy, CuPy and
PyTorch will do; pooling has NumPy alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite, prod
from typing import Any

import numpy as np

from benchmarks.layers import Layer, Sizes, Transposed

Array = Any  # of NumPy, CuPy or PyTorch
Operands = Sequence[Array]
Zeros = Callable[[Sizes], Array]  # in float64

# The same operation of the adjoint convolution; a weight gradient swaps its operands.
ADJOINT = {
    "transpose": "input_grad",
    "transpose_input_grad": "forward",
    "transpose_weight_grad": "weight_grad",
}


def reference(
    layer: Layer, operation: str, operands: Operands, zeros: Zeros = np.zeros
) -> Array:
    """The true result, from operands in float64, channels first, and maybe a bias."""
    count = len(layer.operations[operation]) - 1
    bias = [each.reshape(-1, *(1 for _ in layer.size)) for each in operands[count:]]
    layer, operation, operands = as_convolution(layer, operation, operands[:count])
    return REFERENCES[operation](layer, *operands, zeros) + sum(bias)


def as_convolution(
    layer: Layer, operation: str, operands: Operands
) -> tuple[Layer, str, Operands]:
    """A transposed convolution by its adjoint; everything else as it is."""
    if not isinstance(layer, Transposed):
        return layer, operation, operands
    name = ADJOINT[operation]
    return layer.adjoint, name, operands[:: -1 if name == "weight_grad" else 1]


def plane(layer: Layer, operation: str, operands: Operands, a: int, b: int) -> Array:
    """Compute ``reference(...)[a, b]`` from the parts of NumPy arrays that it needs."""
    layer, operation, operands = as_convolution(layer, operation, operands)
    channels, filters = layer.channels // layer.groups, layer.filters // layer.groups
    group = (a if operation == "weight_grad" else b) // filters
    if operation == "input_grad":
        group = b // channels
    first = group * channels
    n, c = slice(a, a + 1), slice(first, first + channels)
    k = slice(group * filters, (group + 1) * filters)
    if operation == "forward":
        k = slice(b, b + 1)
    elif operation == "input_grad":
        c = slice(b, b + 1)
    elif operation == "weight_grad":
        n, k, c = slice(None), n, slice(first + b, first + b + 1)
    parts: dict[str, tuple[slice, ...]] = {"x": (n, c), "bias": (slice(b, b + 1),)}
    parts["w"] = k, slice(c.start - first, c.stop - first)
    names = (*layer.operations[operation][:-1], "bias")
    cut = [
        array[parts.get(name, (n, k))].astype(int if name == "indices" else float)
        for name, array in zip(names, operands, strict=False)
    ]
    part = replace(layer, channels=c.stop - c.start, filters=k.stop - k.start, groups=1)
    return reference(part, operation, cut)[0, 0]


def norm_error(result: Array, true: Array) -> float:
    """‖result - true‖ / ‖true‖; inf where either has a NaN."""
    apart = result - true
    error = float((apart * apart).sum()) ** 0.5 / float((true * true).sum()) ** 0.5
    return error if isfinite(error) else float("inf")


def forward(layer: Layer, x: Array, w: Array, zeros: Zeros) -> Array:
    """y[n, k, o] = Σ over c, t of x[n, c, o · stride + t · dilation - padding] · w."""
    padded, filters = pad(layer, x, zeros), split(layer, w)
    y = zeros((len(x), layer.groups, filters.shape[1], prod(layer.out)))
    for tap in np.ndindex(layer.kernel):
        window = padded[(..., *layer.under(tap))]
        y += filters[(..., *tap)] @ window.reshape(*window.shape[:3], -1)
    return y.reshape(len(x), layer.filters, *layer.out)


def input_grad(layer: Layer, dy: Array, w: Array, zeros: Zeros) -> Array:
    """dx[n, c, i]: Σ over k, t of dy · w where tap t of a window lies on element i."""
    filters = split(layer, w)
    dy = dy.reshape(len(dy), layer.groups, filters.shape[1], -1)
    dx = zeros((len(dy), layer.groups, w.shape[1], *layer.padded))
    for tap in np.ndindex(layer.kernel):
        window = dx[(..., *layer.under(tap))]
        window += (filters[(..., *tap)].swapaxes(-1, -2) @ dy).reshape(window.shape)
    return dx[(..., *layer.inside)].reshape(len(dy), layer.channels, *layer.size)


def weight_grad(layer: Layer, dy: Array, x: Array, zeros: Zeros) -> Array:
    """dw[k, c, t]: Σ over n, o of dy[n, k, o] · x where window o has its tap t."""
    padded = pad(layer, x, zeros)
    dy = dy.reshape(len(dy), layer.groups, layer.filters // layer.groups, -1)
    dw = zeros((layer.groups, dy.shape[2], padded.shape[2], *layer.kernel))
    for tap in np.ndindex(layer.kernel):
        window = padded[(..., *layer.under(tap))]
        columns = window.reshape(*window.shape[:3], -1).swapaxes(-1, -2)
        dw[(..., *tap)] = (dy @ columns).sum(0)
    return dw.reshape(layer.filters, -1, *layer.kernel)


def max_pool_backward(layer: Layer, dy: Array, indices: Array, zeros: Zeros) -> Array:
    """dx[n, c, i]: Σ of dy over the windows whose maximum lies on element i."""
    planes = prod(dy.shape[:2])
    dx = zeros((planes, prod(layer.size)))
    places = np.arange(planes)[:, None], indices.reshape(planes, -1)
    np.add.at(dx, places, dy.reshape(planes, -1))
    return dx.reshape(*dy.shape[:2], *layer.size)


def mean_filters(layer: Layer) -> Array:
    """A mean is a depthwise convolution; padding counts as elements."""
    return np.full((layer.filters, 1, *layer.kernel), 1 / prod(layer.kernel))


def avg_pool(layer: Layer, x: Array, zeros: Zeros) -> Array:
    return forward(layer, x, mean_filters(layer), zeros)


REFERENCES: dict[str, Callable[..., Array]] = {
    "forward": forward,
    "input_grad": input_grad,
    "weight_grad": weight_grad,
    "max_pool": lambda layer, x, _: maxima(layer, x)[0],
    "max_pool_backward": max_pool_backward,
    "avg_pool": avg_pool,
    "global_avg_pool": avg_pool,
    "avg_pool_backward": lambda p, dy, zeros: input_grad(p, dy, mean_filters(p), zeros),
}


def maxima(layer: Layer, x: Array) -> tuple[Array, Array]:
    """The maximum of each window, and its place in its plane, counted row by row.

    The first of equals; -1 where a window lies on padding alone.
    """
    padded: Any = np.pad(x, layer.around, constant_values=-np.inf)
    places = np.arange(prod(layer.size)).reshape(layer.size)
    places = np.pad(places, layer.around[2:], constant_values=-1)
    most = np.full((*x.shape[:2], *layer.out), -np.inf, x.dtype)
    found = np.full(most.shape, -1)
    for tap in np.ndindex(layer.kernel):
        window = layer.under(tap)
        larger = padded[..., *window] > most
        np.copyto(most, padded[..., *window], where=larger)
        np.copyto(found, places[window], where=larger)
    return most, found


def split(layer: Layer, w: Array) -> Array:
    """The filters by group, (G, K / G, C / G, *kernel)."""
    return w.reshape(layer.groups, -1, *w.shape[1:])


def pad(layer: Layer, x: Array, zeros: Zeros) -> Array:
    """The padded input by group, (N, G, C / G, *padded)."""
    heads = (len(x), layer.groups, layer.channels // layer.groups)
    padded = zeros((*heads, *layer.padded))
    padded[(..., *layer.inside)] = x.reshape(*heads, *layer.size)
    return padded
