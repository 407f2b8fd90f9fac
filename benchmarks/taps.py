"""Convolutions in float64, a tap of the kernel at a time, for any array module.

A sum of matrix products over shifted views: short, independent of the library, and fast
enough to check whole results on a GPU.  Arrays of NumPy, CuPy and PyTorch will do.
"""

from collections.abc import Callable
from math import isfinite

import numpy as np

from benchmarks.cases import Array, Case
from benchmarks.layers import Layer, Sizes, Transposed

Zeros = Callable[[Sizes], Array]


def reference(case: Case, first: Array, second: Array, zeros: Zeros) -> Array:
    """The true result of a case, from its operands in float64, channels first.

    ``zeros`` makes an array of that module, type and shape.
    """
    compute = REFERENCES[case.operation]
    return compute(case.layer, first, second, zeros).reshape(case.result_shape)


def norm_error(result: Array, true: Array) -> float:
    """‖result - true‖ / ‖true‖; inf where either has a NaN."""
    apart = result - true
    error = float((apart * apart).sum()) ** 0.5 / float((true * true).sum()) ** 0.5
    return error if isfinite(error) else float("inf")


def _forward(layer: Layer, x: Array, w: Array, zeros: Zeros) -> Array:
    cells, filters = _framed(layer, x, zeros), _split(layer, w)
    y = zeros((*_heads(layer, len(x))[1], int(np.prod(layer.out))))
    for tap in np.ndindex(layer.kernel):
        window = cells[(..., *layer.under(tap))]
        y += filters[(..., *tap)] @ window.reshape(*window.shape[:3], -1)
    return y


def _input_grad(layer: Layer, dy: Array, w: Array, zeros: Zeros) -> Array:
    heads, into = _heads(layer, len(dy))
    dy, filters = dy.reshape(*into, -1), _split(layer, w)
    dx = zeros((*heads, *_frame(layer)))
    for tap in np.ndindex(layer.kernel):
        window = dx[(..., *layer.under(tap))]
        window += (filters[(..., *tap)].swapaxes(-1, -2) @ dy).reshape(window.shape)
    return dx[(..., *_inner(layer))]


def _weight_grad(layer: Layer, dy: Array, x: Array, zeros: Zeros) -> Array:
    cells = _framed(layer, x, zeros)
    dy = dy.reshape(*_heads(layer, len(x))[1], -1)
    each, channels = layer.filters // layer.groups, layer.channels // layer.groups
    dw = zeros((layer.groups, each, channels, *layer.kernel))
    for tap in np.ndindex(layer.kernel):
        window = cells[(..., *layer.under(tap))]
        columns = window.reshape(*window.shape[:3], -1).swapaxes(-1, -2)
        dw[(..., *tap)] = (dy @ columns).sum(0)
    return dw


def _transpose(layer: Transposed, x: Array, w: Array, zeros: Zeros) -> Array:
    return _input_grad(layer.back, x, w, zeros)


def _transpose_input_grad(
    layer: Transposed, dy: Array, w: Array, zeros: Zeros
) -> Array:
    return _forward(layer.back, dy, w, zeros)


def _transpose_weight_grad(
    layer: Transposed, dy: Array, x: Array, zeros: Zeros
) -> Array:
    return _weight_grad(layer.back, x, dy, zeros)


# What is checked as a whole; everything else is not measured on a GPU.
REFERENCES: dict[str, Callable[..., Array]] = {
    "forward": _forward,
    "input_grad": _input_grad,
    "weight_grad": _weight_grad,
    "transpose": _transpose,
    "transpose_input_grad": _transpose_input_grad,
    "transpose_weight_grad": _transpose_weight_grad,
}


def _heads(layer: Layer, batch: int) -> tuple[Sizes, Sizes]:
    """(N, G, C / G) and (N, G, K / G)."""
    g = layer.groups
    return (batch, g, layer.channels // g), (batch, g, layer.filters // g)


def _split(layer: Layer, w: Array) -> Array:
    return w.reshape(layer.groups, -1, *w.shape[1:])


def _frame(layer: Layer) -> Sizes:
    pairs = zip(layer.size, layer.padding, strict=True)
    return tuple(n + 2 * p for n, p in pairs)


def _inner(layer: Layer) -> tuple[slice, ...]:
    pairs = zip(layer.size, layer.padding, strict=True)
    return tuple(slice(p, p + n) for n, p in pairs)


def _framed(layer: Layer, x: Array, zeros: Zeros) -> Array:
    """The input in its frame of zeros, (N, G, C / G, *cells)."""
    heads, _ = _heads(layer, len(x))
    cells = zeros((*heads, *_frame(layer)))
    cells[(..., *_inner(layer))] = x.reshape(*heads, *layer.size)
    return cells
