"""Every operation: what it takes and gives, and what is right, in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from benchmarks.layers import Layer, Pool, Sizes, Transposed

Host = np.ndarray[Any, np.dtype[Any]]
Indices = Host

SAMPLES = 64


@dataclass(frozen=True)
class Definition:
    """One operation.

    ``operands`` names what it takes, in the order of every peer's arguments, and
    ``result`` the array that has the shape of what it gives.  ``element`` computes one
    element of that, from the layer, the operands and a place; so many ``samples`` of
    them are compared.
    """

    layers: type[Layer]
    operands: tuple[str, ...]
    result: str
    element: Callable[..., float]
    samples: int = SAMPLES


# Convolutions.


def forward_element(layer: Layer, x: Host, w: Host, place: Indices) -> float:
    """y[n, k, o] = Σ over c, t of x[n, c, o · stride + t · dilation - padding] · w."""
    n, k, *o = place
    cells, taps = meetings(layer, o)
    return inner(x[n, channels_of(layer, k)], cells, w[k], taps)


def input_grad_element(layer: Layer, dy: Host, w: Host, place: Indices) -> float:
    """dx[n, c, i]: Σ over k, t of dy · w where tap t of some window lies on cell i."""
    n, c, *i = place
    each, per_group = layer.channels // layer.groups, layer.filters // layer.groups
    first = c // each * per_group
    windows, taps = windows_over(layer, i)
    filters = slice(first, first + per_group)
    return inner(dy[n, filters], windows, w[filters, c % each], taps)


def weight_grad_element(layer: Layer, dy: Host, x: Host, place: Indices) -> float:
    """dw[k, c, t]: Σ over n, o of dy[n, k, o] · x where window o has its tap t."""
    k, c, *t = place
    channel = channels_of(layer, k).start + c
    windows, cells = [], []
    for axis, tap in enumerate(t):
        window = np.arange(layer.out[axis])
        cell, inside = cells_under(layer, axis, window, np.array(tap))
        windows.append(window[inside])
        cells.append(cell[inside])
    return inner(dy[:, k], windows, x[:, channel], cells)


# Transposed convolutions: with `Transposed.back`, x is its dy and dy its x.


def transpose_element(layer: Transposed, x: Host, w: Host, place: Indices) -> float:
    return input_grad_element(layer.back, x, w, place)


def transpose_input_grad_element(
    layer: Transposed, dy: Host, w: Host, place: Indices
) -> float:
    return forward_element(layer.back, dy, w, place)


def transpose_weight_grad_element(
    layer: Transposed, dy: Host, x: Host, place: Indices
) -> float:
    return weight_grad_element(layer.back, x, dy, place)


# Pooling.


def max_pool_element(layer: Layer, x: Host, place: Indices) -> float:
    """y[n, c, o]: the largest cell under window o."""
    n, c, *o = place
    cells, _ = meetings(layer, o)
    return float(x[n, c][np.ix_(*cells)].max())


def max_pool_grad_element(
    layer: Layer, dy: Host, indices: Host, place: Indices
) -> float:
    """dx[n, c, i]: Σ of dy over the windows whose maximum lies on cell i."""
    n, c, *i = place
    here = indices[n, c] == np.ravel_multi_index(i, layer.size)
    return float(dy[n, c][here].sum(dtype=np.float64))


def avg_pool_element(layer: Layer, x: Host, place: Indices) -> float:
    """y[n, c, o]: Σ of the cells under window o ÷ its taps, padding among them."""
    n, c, *o = place
    cells, _ = meetings(layer, o)
    return float(x[n, c][np.ix_(*cells)].sum(dtype=np.float64)) / prod(layer.kernel)


def avg_pool_grad_element(layer: Layer, dy: Host, place: Indices) -> float:
    """dx[n, c, i]: Σ of dy over the windows that cell i lies under ÷ their taps."""
    n, c, *i = place
    windows, _ = windows_over(layer, i)
    return float(dy[n, c][np.ix_(*windows)].sum(dtype=np.float64)) / prod(layer.kernel)


def max_indices(layer: Layer, x: Host) -> Host:
    """The place of every maximum in its plane, counted row by row; the first of equals.

    Of shape (N, C, *out), int64.
    """
    around = ((0, 0), (0, 0), *((p, p) for p in layer.padding))
    frame: Any = np.pad(x, around, constant_values=-np.inf)
    places = np.pad(
        np.arange(prod(layer.size)).reshape(layer.size), around[2:], constant_values=-1
    )
    most = np.full(layer.y_shape(len(x)), -np.inf, x.dtype)
    found = np.full(most.shape, -1)
    for tap in np.ndindex(layer.kernel):
        cells = layer.under(tap)
        larger = frame[..., *cells] > most
        np.copyto(most, frame[..., *cells], where=larger)
        np.copyto(found, places[cells], where=larger)
    return found


# What each operation takes and gives.  A gradient of max pooling is mostly zeros.
DEFINITIONS = {
    "forward": Definition(Layer, ("x", "w"), "dy", forward_element),
    "input_grad": Definition(Layer, ("dy", "w"), "x", input_grad_element),
    "weight_grad": Definition(Layer, ("dy", "x"), "w", weight_grad_element),
    "transpose": Definition(Transposed, ("x", "w"), "dy", transpose_element),
    "transpose_input_grad": Definition(
        Transposed, ("dy", "w"), "x", transpose_input_grad_element
    ),
    "transpose_weight_grad": Definition(
        Transposed, ("dy", "x"), "w", transpose_weight_grad_element
    ),
    "max_pool": Definition(Pool, ("x",), "dy", max_pool_element),
    "max_pool_backward": Definition(
        Pool, ("dy", "indices"), "x", max_pool_grad_element, samples=16 * SAMPLES
    ),
    "avg_pool": Definition(Pool, ("x",), "dy", avg_pool_element),
    "avg_pool_backward": Definition(Pool, ("dy",), "x", avg_pool_grad_element),
}


def operations_on(layers: type[Layer]) -> tuple[str, ...]:
    """The operations of one kind of layer."""
    return tuple(name for name, each in DEFINITIONS.items() if each.layers is layers)


# What cells, windows and taps have to do with each other.


def channels_of(layer: Layer, k: int) -> slice:
    """The channels that filter k sees."""
    each = layer.channels // layer.groups
    first = k // (layer.filters // layer.groups) * each
    return slice(first, first + each)


def meetings(layer: Layer, o: list[int]) -> tuple[list[Indices], list[Indices]]:
    """Along each axis, the cells of the input under window o, and their taps."""
    cells, taps = [], []
    for axis, window in enumerate(o):
        tap = np.arange(layer.kernel[axis])
        cell, inside = cells_under(layer, axis, np.array(window), tap)
        cells.append(cell[inside])
        taps.append(tap[inside])
    return cells, taps


def windows_over(layer: Layer, i: list[int]) -> tuple[list[Indices], list[Indices]]:
    """Along each axis, the windows that cell i lies under, and under which tap."""
    windows, taps = [], []
    for axis, cell in enumerate(i):
        tap = np.arange(layer.kernel[axis])
        start = cell + layer.padding[axis] - tap * layer.dilation[axis]
        window, rest = np.divmod(start, layer.stride[axis])
        here = (rest == 0) & (window >= 0) & (window < layer.out[axis])
        windows.append(window[here])
        taps.append(tap[here])
    return windows, taps


def cells_under(
    layer: Layer, axis: int, window: Indices, tap: Indices
) -> tuple[Indices, Indices]:
    """The cells that taps of windows meet, and which of them the input has."""
    cell = window * layer.stride[axis] + tap * layer.dilation[axis]
    cell = cell - layer.padding[axis]
    return cell, (cell >= 0) & (cell < layer.size[axis])


def inner(a: Host, at_a: list[Indices], b: Host, at_b: list[Indices]) -> float:
    """Σ a · b over a whole first axis and the crossings of indices, in float64."""
    every = np.arange(len(a))
    left = a[np.ix_(every, *at_a)].astype(np.float64)
    return float((left * b[np.ix_(every, *at_b)]).sum())


def sample(shape: Sizes, count: int) -> Indices:
    """Places in an array, (count, axes): its two far corners, and random ones."""
    places = np.random.default_rng(3).integers(0, shape, (count, len(shape)))
    places[0], places[1] = 0, np.array(shape) - 1
    return places
