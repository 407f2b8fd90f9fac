"""One measurement: its operands, and what is right, from the definition in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, prod
from typing import Any

import numpy as np

from benchmarks.suites import Layer, Sizes

Array = Any  # of NumPy, CuPy or PyTorch
Host = np.ndarray[Any, np.dtype[Any]]
Indices = Host

SAMPLES = 64
# How products are formed, each with the largest error that is not a mistake: TF32 and
# float16 keep ten bits of a factor, bfloat16 seven; all of them are summed in float32.
TOLERANCES = {"float32": 1e-4, "tf32": 2e-3, "float16": 5e-3, "bfloat16": 2e-2}
# What each operation takes, in the order of every peer's arguments.
OPERANDS = {
    "forward": ("x", "w"),
    "input_grad": ("dy", "w"),
    "weight_grad": ("dy", "x"),
}


@dataclass(frozen=True)
class Case:
    """A layer, an operation, a batch, and an arithmetic of `TOLERANCES`."""

    layer: Layer
    operation: str
    batch: int
    arithmetic: str = "float32"

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Case":
        return cls(
            Layer.from_json(found["layer"]),
            found["operation"],
            found["batch"],
            found.get("arithmetic", "float32"),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer.to_json(),
            "operation": self.operation,
            "batch": self.batch,
            "arithmetic": self.arithmetic,
        }

    @property
    def dtype(self) -> str:
        """The type of the arrays."""
        return "float32" if self.arithmetic == "tf32" else self.arithmetic

    @property
    def nbytes(self) -> int:
        """Of the two operands and the result, each moved once."""
        itemsize = 4 if self.dtype == "float32" else 2
        return itemsize * sum(map(prod, self.shapes.values()))

    @cached_property
    def shapes(self) -> dict[str, Sizes]:
        layer = self.layer
        return {
            "x": layer.x_shape(self.batch),
            "w": layer.w_shape,
            "dy": layer.y_shape(self.batch),
        }

    @property
    def result_shape(self) -> Sizes:
        name = {"forward": "dy", "input_grad": "x", "weight_grad": "w"}[self.operation]
        return self.shapes[name]

    @cached_property
    def options(self) -> dict[str, Any]:
        """Keywords that cuconv and PyTorch share."""
        layer = self.layer
        return {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
        }

    def operands(self) -> tuple[Host, Host]:
        """Standard normal float32, the same in every process; weights are scaled."""
        first, second = (self._random(name) for name in OPERANDS[self.operation])
        return first, second

    def _random(self, name: str) -> Host:
        seed = tuple(OPERANDS["forward"] + ("dy",)).index(name)
        rng = np.random.default_rng(seed)
        array = rng.standard_normal(self.shapes[name], dtype=np.float32)
        if name == "w":
            array /= np.float32(self.layer.patch**0.5)
        return array


def relative_error(case: Case, operands: tuple[Host, Host], result: Host) -> float:
    """Of a sample of the result, against its largest true value; inf if it has NaN."""
    if result.shape != case.result_shape:
        raise ValueError(f"the result is {result.shape}, not {case.result_shape}")
    element = ELEMENTS[case.operation]
    places = sample(case.result_shape)
    true = np.array([element(case.layer, *operands, place) for place in places])
    got = np.array([result[tuple(place)] for place in places], dtype=np.float64)
    error = float(abs(got - true).max() / abs(true).max())
    return error if isfinite(error) else float("inf")


def sample(shape: Sizes) -> Indices:
    """Places in an array, (SAMPLES, axes): its two far corners, and random ones."""
    places = np.random.default_rng(3).integers(0, shape, (SAMPLES, len(shape)))
    places[0], places[1] = 0, np.array(shape) - 1
    return places


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
    windows, taps = [], []
    for axis, cell in enumerate(i):
        tap = np.arange(layer.kernel[axis])
        start = cell + layer.padding[axis] - tap * layer.dilation[axis]
        window, rest = np.divmod(start, layer.stride[axis])
        here = (rest == 0) & (window >= 0) & (window < layer.out[axis])
        windows.append(window[here])
        taps.append(tap[here])
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


ELEMENTS: dict[str, Callable[[Layer, Host, Host, Indices], float]] = {
    "forward": forward_element,
    "input_grad": input_grad_element,
    "weight_grad": weight_grad_element,
}


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
