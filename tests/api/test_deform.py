"""Deformable convolution against loops, other libraries' values, and `conv`."""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from support import (
    HALVES,
    LAYOUTS,
    TESTS,
    integers,
    peak,
    smallest_limit,
    to_host,
)

import cuconv
from cuconv.backends import jit_is_installed
from cuconv.backends.cpu import deform as host

GRADIENTS = ("x", "offset", "w", "mask", "bias")


class Case(NamedTuple):
    """Shapes and options; kernel as for channels first."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    offset_groups: int
    options: dict[str, Any]
    mask: bool = True

    @property
    def rank(self) -> int:
        return len(self.w) - 2

    def axes(self) -> list[tuple[int, int, int, int, int]]:
        """Along every axis: taps, stride, dilation, padding before, outputs."""
        found = []
        for r, taps in enumerate(self.w[2:]):
            size = self.x[len(self.x) - self.rank + r]
            stride, dilation = (
                np.broadcast_to(self.options.get(name, 1), self.rank)[r]
                for name in ("stride", "dilation")
            )
            padding = self.options.get("padding", 0)
            pads = padding if isinstance(padding, int) else padding[r]
            before, after = (pads, pads) if isinstance(pads, int) else pads
            out = (size + before + after - dilation * (taps - 1) - 1) // stride + 1
            found.append((taps, int(stride), int(dilation), before, int(out)))
        return found


CASES = {
    "one axis": Case((2, 4, 9), (6, 2, 3), 2, {"groups": 2, "padding": 1}),
    "two axes": Case((2, 4, 6, 7), (3, 4, 3, 2), 1, {"padding": (1, 2)}),
    "three axes": Case((1, 2, 4, 3, 5), (2, 2, 2, 1, 3), 2, {"padding": (1, 0, 1)}),
    "no mask": Case((2, 3, 5, 6), (2, 3, 2, 3), 3, {}, mask=False),
    "steps": Case(
        (2, 6, 9, 8),
        (4, 3, 3, 2),
        3,
        {"groups": 2, "stride": (2, 3), "dilation": (2, 1), "padding": ((1, 2), (0, 1))},
    ),
    "depthwise": Case((1, 4, 5, 5), (8, 1, 3, 3), 2, {"groups": 4, "padding": 1}),
    "one image": Case((4, 5, 6), (4, 2, 2, 2), 1, {"groups": 2}),
    "far padding": Case((1, 2, 3, 3), (2, 2, 2, 2), 1, {"padding": 3}),
}


def quarters(shape: Any, seed: int, largest: int, parts: int = 2) -> np.ndarray:
    """Multiples of 1 / parts, which floats hold, as they do their products."""
    return integers(shape, seed=seed, largest=largest * parts) / parts


def arrays_of(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Operands with channels first, in float64."""
    batch, out = case.x[: -case.rank - 1], tuple(a[-1] for a in case.axes())
    taps = math.prod(case.w[2:])
    shapes = {
        "x": case.x,
        "w": case.w,
        "bias": (case.w[0],),
        "dy": (*batch, case.w[0], *out),
    }
    found = {n: integers(s, seed=seed + i) for i, (n, s) in enumerate(shapes.items())}
    moved = (*batch, case.offset_groups * taps * case.rank, *out)
    found["offset"] = quarters(moved, seed + 7, 3)
    if case.mask:
        found["mask"] = quarters((*batch, case.offset_groups * taps, *out), seed + 8, 1)
    return found


def by_loops(case: Case, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The result and all gradients, sample by sample."""
    own = {n: a if n in ("w", "bias") else a[None] for n, a in arrays.items()}
    if len(case.x) == case.rank + 2:
        own = arrays
    x, w, dy = own["x"], own["w"], own["dy"]
    mask, rank, axes = own.get("mask"), case.rank, case.axes()
    groups, each = case.options.get("groups", 1), x.shape[1] // case.offset_groups
    y = np.zeros_like(dy) + own["bias"].reshape(-1, *(1,) * rank)
    found = {f"d{n}": np.zeros_like(own[n]) for n in own if n not in ("dy", "bias")}
    taps = list(itertools.product(*(range(a[0]) for a in axes)))
    outs = list(itertools.product(*(range(a[-1]) for a in axes)))
    filters = w.shape[0] // groups
    for n, c, (number, tap), o in itertools.product(
        range(x.shape[0]), range(x.shape[1]), enumerate(taps), outs
    ):
        g, d = c // w.shape[1], c // each
        at = d * len(taps) + number
        place = [
            o[r] * a[1] + tap[r] * a[2] - a[3] + own["offset"][(n, at * rank + r, *o)]
            for r, a in enumerate(axes)
        ]
        scale = 1.0 if mask is None else mask[(n, at, *o)]
        some = slice(g * filters, (g + 1) * filters)
        weights = w[(some, c % w.shape[1], *tap)]
        given = float(dy[(n, some, *o)] @ weights)
        value = 0.0
        for corner in itertools.product((0, 1), repeat=rank):
            cell = [math.floor(p) + high for p, high in zip(place, corner, strict=True)]
            if not all(0 <= i < s for i, s in zip(cell, x.shape[2:], strict=True)):
                continue
            sides = [
                1 - abs(p - i) for p, i in zip(place, cell, strict=True)
            ]
            element = x[(n, c, *cell)]
            value += math.prod(sides) * element
            found["dx"][(n, c, *cell)] += math.prod(sides) * scale * given
            for r in range(rank):
                slope = (1 if corner[r] else -1) * math.prod(sides[:r] + sides[r + 1 :])
                found["doffset"][(n, at * rank + r, *o)] += slope * element * scale * given
        if mask is not None:
            found["dmask"][(n, at, *o)] += value * given
        y[(n, some, *o)] += value * scale * weights
        found["dw"][(some, c % w.shape[1], *tap)] += value * scale * dy[(n, some, *o)]
    found = {"y": y, **found}
    found["dbias"] = dy.sum(axis=(0, *range(2, 2 + rank)))
    one = len(case.x) == rank + 1
    return {n: a[0] if one and n not in ("dw", "dbias") else a for n, a in found.items()}


_KNOWN: dict[str, dict[str, np.ndarray]] = {}


def wanted_of(name: str) -> dict[str, np.ndarray]:
    if name not in _KNOWN:
        _KNOWN[name] = by_loops(CASES[name], arrays_of(CASES[name]))
    return _KNOWN[name]


def in_layout(name: str, array: Any, case: Case, layout: str) -> Any:
    """An array of channels first in another layout."""
    if layout == "channels_first" or name.endswith("bias"):
        return array
    if name in ("w", "dw"):
        return np.moveaxis(array, (0, 1), (-1, -2))
    return np.moveaxis(array, len(case.x) - case.rank - 1, -1)


def call_on(
    xp: Any, case: Case, layout: str = "channels_first", dtype: Any = "float32", **more: Any
) -> dict[str, np.ndarray]:
    """The library's result and gradients, on the host, with channels first."""
    own = {
        n: xp.asarray(np.ascontiguousarray(in_layout(n, a, case, layout)).astype(dtype))
        for n, a in arrays_of(case).items()
    }
    options = {**case.options, "layout": layout, **more}
    dy, bias = own.pop("dy"), own.pop("bias")
    y = cuconv.deform_conv(**own, bias=bias, **options)
    gradients = cuconv.deform_conv_backward(dy, **own, **options)
    found = {"y": y, **{f"d{n}": a for n, a in gradients._asdict().items()}}
    back = {}
    for name, array in found.items():
        if array is None:
            assert name == "dmask"
            continue
        assert array.dtype == dtype
        array = to_host(array)
        if layout == "channels_last" and name in ("w", "dw"):
            array = np.moveaxis(array, (-1, -2), (0, 1))
        elif layout == "channels_last" and name != "dbias":
            array = np.moveaxis(array, -1, len(case.x) - case.rank - 1)
        back[name] = array
    return back


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name].astype(array.dtype), name)


@pytest.fixture(params=["loops", "numpy"])
def loops(request, monkeypatch):
    """Numba's loops, and NumPy's functions in their place."""
    if request.param == "loops" and not jit_is_installed():
        pytest.skip("Numba is not installed")
    if request.param == "numpy":
        monkeypatch.setattr(host, "_has_loops", lambda problem: False)
    cuconv.engine.call.forget_plans()
    yield request.param
    cuconv.engine.call.forget_plans()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients(xp, name, layout):
    assert_same(call_on(xp, CASES[name], layout), wanted_of(name))
