"""Deformable convolution against loops, other libraries' values, and `conv`."""

import itertools
import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from support import (
    HALVES,
    LAYOUTS,
    PLACES,
    TESTS,
    captured,
    forget_plans,
    integers,
    outs,
    peak,
    smallest_limit,
    to_host,
    unaligned,
)

import cuconv
from cuconv.backends.cpu import deform as host
from cuconv.engine import deform as engine
from cuconv.memory import MemoryLimitError

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
        {
            "groups": 2,
            "stride": (2, 3),
            "dilation": (2, 1),
            "padding": ((1, 2), (0, 1)),
        },
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
            sides = [1 - abs(p - i) for p, i in zip(place, cell, strict=True)]
            element = x[(n, c, *cell)]
            value += math.prod(sides) * element
            found["dx"][(n, c, *cell)] += math.prod(sides) * scale * given
            for r in range(rank):
                slope = (1 if corner[r] else -1) * math.prod(sides[:r] + sides[r + 1 :])
                found["doffset"][(n, at * rank + r, *o)] += (
                    slope * element * scale * given
                )
        if mask is not None:
            found["dmask"][(n, at, *o)] += value * given
        y[(n, some, *o)] += value * scale * weights
        found["dw"][(some, c % w.shape[1], *tap)] += value * scale * dy[(n, some, *o)]
    found = {"y": y, **found}
    found["dbias"] = dy.sum(axis=(0, *range(2, 2 + rank)))
    one = len(case.x) == rank + 1
    return {
        n: a[0] if one and n not in ("dw", "dbias") else a for n, a in found.items()
    }


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
    xp: Any,
    case: Case,
    layout: str = "channels_first",
    dtype: Any = "float32",
    **more: Any,
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
        own = to_host(array)
        if layout == "channels_last" and name == "dw":
            own = np.moveaxis(own, (-1, -2), (0, 1))
        elif layout == "channels_last" and name != "dbias":
            own = np.moveaxis(own, -1, len(case.x) - case.rank - 1)
        back[name] = own
    return back


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name].astype(array.dtype), name)


@pytest.fixture
def by_numpy(monkeypatch):
    """NumPy's functions in place of compiled loops."""
    monkeypatch.setattr(host, "_has_loops", lambda problem: False)
    forget_plans()
    yield
    forget_plans()


@pytest.fixture
def pieces_of(monkeypatch):
    """Let pieces have as many positions as a test says."""

    def choose(positions: int) -> None:
        forget_plans()
        counts = [positions]
        monkeypatch.setattr(engine.DeformRequest, "counts", lambda self: counts)

    yield choose
    forget_plans()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients(xp, name, layout):
    assert_same(call_on(xp, CASES[name], layout), wanted_of(name))


@pytest.mark.parametrize("name", CASES)
def test_numpy_alone(by_numpy, name):
    layout = LAYOUTS[list(CASES).index(name) % 2]
    assert_same(call_on(np, CASES[name], layout), wanted_of(name))


@pytest.mark.parametrize("name", ["steps", "three axes", "one axis"])
def test_adding_in_any_order(xp, name):
    """On CUDA by atomic additions; sums of these numbers are exact."""
    found = call_on(xp, CASES[name], deterministic=False)
    assert_same(found, wanted_of(name))


def test_the_gradient_for_x_is_gathered_unless_it_need_not(xp):
    if not getattr(xp, "IS_STAND_IN", False):
        pytest.skip("counts launches, which only the stand-in notes")
    launches, names = xp._kernels.launches, {}
    for asked in (None, True, False):
        before = len(launches)
        call_on(xp, CASES["no mask"], deterministic=asked)
        ran = {name for name, *_ in launches[before:]}
        names[asked] = sorted(n for n in ran if n.startswith("deform"))
    same = ["deform_gather", "deform_im2col", "deform_offsets"]
    free = ["deform_im2col", "deform_offsets", "deform_scatter"]
    assert names == {None: same, True: same, False: free}


@pytest.mark.parametrize("dtype", ["float64", *HALVES])
def test_types(xp, dtype, by_numpy):
    """Halves hold these samples; larger sums are rounded once, from float32."""
    case = CASES["steps"]
    found = call_on(xp, case, dtype=dtype)
    assert_same(found, wanted_of("steps"))


@pytest.mark.parametrize("size", [1, 7, 10**4])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["two axes", "steps"])
def test_pieces_of_any_size(xp, pieces_of, name, dtype, size):
    if xp is not np and size == 1:
        pytest.skip("a launch for each position takes long")
    pieces_of(size)
    assert_same(call_on(xp, CASES[name], dtype=dtype), wanted_of(name))


@pytest.mark.parametrize("name", ["steps", "three axes"])
def test_indices_of_64_bits(xp, name, monkeypatch):
    if xp is np:
        pytest.skip("about kernels")
    from cuconv.backends.cuda import structs

    monkeypatch.setattr(structs, "MOST_THREADS", 2**31)  # as if launches were huge
    for deterministic in (True, False):
        forget_plans()
        found = call_on(xp, CASES[name], deterministic=deterministic)
        assert_same(found, wanted_of(name))
    forget_plans()


def test_several_workers(monkeypatch, by_numpy):
    monkeypatch.setattr(engine, "_WORTH_WORKERS", 0)
    monkeypatch.setattr(host, "_SAMPLES", 8)
    with cuconv.config(num_threads=3):
        for name in ("one axis", "steps", "three axes"):
            assert_same(call_on(np, CASES[name]), wanted_of(name))


@pytest.mark.parametrize("needs", [(n,) for n in GRADIENTS] + [("x", "w"), ()])
def test_gradients_that_are_needed(xp, needs):
    case, wanted = CASES["two axes"], wanted_of("two axes")
    own = {n: xp.asarray(a) for n, a in arrays_of(case).items() if n != "bias"}
    found = cuconv.deform_conv_backward(**own, needs=needs, **case.options)
    for name, array in found._asdict().items():
        assert (array is not None) == (name in needs)
        if array is not None:
            np.testing.assert_array_equal(to_host(array), wanted[f"d{name}"])


# Other libraries


def cases_of(file: str) -> dict[str, dict[str, np.ndarray]]:
    """Arrays by the case that they belong to, and their names."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(TESTS / "data" / file) as arrays:
        for key, array in arrays.items():
            case, name = key.split("/")
            cases.setdefault(case, {})[name] = array
    return cases


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_values_of_torchvision(xp, layout, by_numpy):
    """0.28.0, in float64: some samples are on elements, on edges, and far outside."""
    cases = cases_of("deform_conv2d_torchvision.npz")
    assert len(cases) == 4
    for own in cases.values():
        keys = "stride", "padding", "dilation"
        options = dict(zip(keys, own.pop("options").tolist(), strict=True))
        options |= {"groups": int(own.pop("groups")), "layout": layout}
        shape = Case(own["x"].shape, own["w"].shape, 1, {})
        given = {
            n: xp.asarray(in_layout(n, a, shape, layout).astype("float64"))
            for n, a in own.items()
            if n in ("x", "w", "offset", "mask", "dy")
        }
        dy = given.pop("dy")
        y = cuconv.deform_conv2d(**given, bias=xp.asarray(own["bias"], "f8"), **options)
        found = cuconv.deform_conv_backward(dy, **given, **options)._asdict()
        assert (found["mask"] is None) == ("mask" not in own)
        for name, array in {"y": y, **{f"d{n}": a for n, a in found.items()}}.items():
            if array is None:
                continue
            wanted = in_layout(name, own[name], shape, layout)
            np.testing.assert_allclose(to_host(array), wanted, rtol=1e-12, atol=1e-13)


def test_the_cases_of_onnx(xp):
    """Those of ONNX 1.23's operator tests: padding, bias and mask, offset groups."""
    cases = cases_of("deform_conv_onnx.npz")
    assert len(cases) == 4
    for own in cases.values():
        first, second = own.pop("pads").reshape(2, 2).tolist()
        pads = tuple(zip(first, second, strict=True))
        options = {"padding": pads, "groups": int(own.pop("groups"))}
        wanted = own.pop("y")
        given = {n: xp.asarray(a) for n, a in own.items()}
        y = cuconv.deform_conv2d(**given, **options)
        np.testing.assert_allclose(to_host(y), wanted, rtol=1e-6)


# What it must equal


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_offsets_of_zero_are_a_convolution(xp, rank):
    size, kernel = (7, 6, 5)[:rank], (3, 2, 2)[:rank]
    options = {"stride": 2, "padding": 1, "groups": 2}
    x = xp.asarray(integers((2, 4, *size), "float32"))
    w = xp.asarray(integers((6, 2, *kernel), "float32"))
    y = cuconv.conv(x, w, precision="strict", **options)
    taps, out = math.prod(kernel), y.shape[2:]
    offset = xp.zeros((2, taps * rank, *out), "float32")
    ones = xp.ones((2, taps, *out), "float32")
    for mask in (None, ones):
        found = cuconv.deform_conv(x, offset, w, mask=mask, **options)
        np.testing.assert_array_equal(to_host(found), to_host(y))
    gradients = cuconv.conv_backward(y, x, w, precision="strict", **options)
    found = cuconv.deform_conv_backward(y, x, offset, w, **options)
    for name, wanted in gradients._asdict().items():
        np.testing.assert_array_equal(to_host(getattr(found, name)), to_host(wanted))


def test_whole_offsets_read_other_elements(xp):
    x, w = integers((1, 3, 6, 7), "float32"), integers((2, 3, 2, 2), "float32")
    offset = integers((1, 8, 5, 6), "float32", seed=5)
    wanted = np.zeros((1, 2, 5, 6), "float32")
    padded = np.pad(x, ((0, 0), (0, 0), (9, 9), (9, 9)))
    for (i, (a, b)), o, q in itertools.product(
        enumerate(itertools.product((0, 1), repeat=2)), range(5), range(6)
    ):
        at = [
            9 + o + a + offset[0, 2 * i, o, q],
            9 + q + b + offset[0, 2 * i + 1, o, q],
        ]
        wanted[0, :, o, q] += w[:, :, a, b] @ padded[0, :, int(at[0]), int(at[1])]
    y = cuconv.deform_conv2d(*map(xp.asarray, (x, offset, w)))
    np.testing.assert_array_equal(to_host(y), wanted)


@pytest.mark.parametrize("name", ["one axis", "steps"])
def test_gradients_are_the_numerical_ones(name):
    case = CASES[name]
    own = arrays_of(case)
    dy, bias = own.pop("dy"), own.pop("bias")
    # Away from whole numbers, where there are two slopes.
    own["offset"] = own["offset"] + np.random.default_rng(0).uniform(0.1, 0.4)
    found = cuconv.deform_conv_backward(dy, **own, **case.options)
    for key, array in own.items():

        def loss(values: Any, key: str = key) -> float:
            y = cuconv.deform_conv(**{**own, key: values}, bias=bias, **case.options)
            return float(np.vdot(y, dy))

        rng = np.random.default_rng(1)
        for _ in range(4):
            step = 1e-6 * rng.standard_normal(array.shape)
            slope = (loss(array + step) - loss(array - step)) / 2
            wanted = np.vdot(step, getattr(found, key))
            np.testing.assert_allclose(slope, wanted, rtol=1e-5, atol=1e-9)


def test_what_is_not_a_number_or_far_away(xp):
    """A sample at NaN is NaN, one at infinity is zero; x takes no gradient of them."""
    x, w = xp.ones((1, 2, 4), "float32"), xp.ones((1, 2, 1), "float32")
    places = [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e9, 0.0, 1.0]
    offset = xp.asarray(np.array([[places]], "float32"))
    x = xp.ones((1, 2, 8), "float32")
    y = cuconv.deform_conv(x, offset, w)
    wanted = [math.nan, 0, 0, 0, 0, 0, 2, 0]
    np.testing.assert_array_equal(to_host(y).ravel(), np.array(wanted, "f4"))
    for same in (True, False):
        dx = cuconv.deform_conv_backward(
            xp.ones_like(y), x, offset, w, needs=("x",), deterministic=same
        ).x
        np.testing.assert_array_equal(to_host(dx)[0, 0], [0] * 6 + [1, 0])


def test_numpy_alone_takes_them_too(by_numpy):
    test_what_is_not_a_number_or_far_away(np)


# Memory, arrays and errors


def large_case(xp: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    size = 24 if xp is np else 10
    case = Case((3, 16, size, size), (8, 16, 3, 3), 2, {"padding": 1})
    own = {n: xp.asarray(a.astype("float32")) for n, a in arrays_of(case).items()}
    return own, case.options


@pytest.mark.parametrize("alone", [False, True])
def test_the_limit_holds_by_measurement(xp, alone, monkeypatch):
    if alone:
        monkeypatch.setattr(host, "_has_loops", lambda problem: False)
    forget_plans()
    own, options = large_case(xp)
    dy, bias = own.pop("dy"), own.pop("bias")

    def forward(**more):
        return cuconv.deform_conv2d(**own, bias=bias, **options, **more)

    def backward(**more):
        return cuconv.deform_conv_backward(dy, **own, **options, **more)

    for call in (forward, backward):
        wanted, least = call(), smallest_limit(call)
        columns = own["x"].nbytes * 9
        assert 0 < least < columns
        for limit in (least, least + columns // 3):
            took = peak(xp, partial(call, memory_limit=limit), limit)
            assert took <= limit, f"{took} bytes at the peak, of {limit}"
        found = call(memory_limit=least)
        for mine, other in zip(tuple(found), tuple(wanted), strict=True):
            np.testing.assert_array_equal(to_host(mine), to_host(other))
        with pytest.raises(MemoryLimitError, match=f"smallest .* is {least} bytes"):
            call(memory_limit=least - 1)
    forget_plans()


@pytest.mark.parametrize("place", PLACES)
def test_arrays_of_any_strides(xp, place):
    case = CASES["steps"]
    own = {
        n: PLACES[place](xp, a.astype("float32")) for n, a in arrays_of(case).items()
    }
    wanted = wanted_of("steps")
    dy, bias = own.pop("dy"), own.pop("bias")
    for out in outs(xp, wanted["y"].shape):
        y = cuconv.deform_conv(**own, bias=bias, out=out, **case.options)
        assert y is out
        np.testing.assert_array_equal(to_host(y), wanted["y"].astype("float32"))
    found = cuconv.deform_conv_backward(dy, **own, **case.options)
    for name, array in found._asdict().items():
        np.testing.assert_array_equal(
            to_host(array), wanted[f"d{name}"].astype("float32")
        )


def test_mixed_types(xp):
    """Offsets of another type than x: the result has the common one."""
    case, wanted = CASES["two axes"], wanted_of("two axes")
    own = {n: a.astype("float32") for n, a in arrays_of(case).items()}
    own = {n: xp.asarray(a) for n, a in own.items()}
    own["offset"] = own["offset"].astype("float64")
    own["x"] = own["x"].astype("float16")
    dy, bias = own.pop("dy"), own.pop("bias")
    y = cuconv.deform_conv(**own, bias=bias, **case.options)
    assert y.dtype == "float64"
    np.testing.assert_array_equal(to_host(y), wanted["y"])
    found = cuconv.deform_conv_backward(dy, **own, dtype="float32", **case.options)
    for name, array in found._asdict().items():
        assert array.dtype == "float32"
        np.testing.assert_array_equal(to_host(array), wanted[f"d{name}"])


@pytest.mark.parametrize(
    ("shape", "w", "out"),
    [((0, 4, 6), (2, 4, 3), 4), ((2, 4, 6), (0, 4, 3), 4), ((2, 4, 0), (2, 4, 3), 2)],
)
def test_nothing_to_sample(xp, shape, w, out):
    """No images, no filters, no elements."""
    x, padding = xp.ones(shape), 0 if shape[2] else ((2, 2),)
    offset = xp.zeros((shape[0], 3, out))
    bias = xp.arange(float(w[0]))
    y = cuconv.deform_conv(x, offset, xp.ones(w), bias, padding=padding)
    assert y.shape == (shape[0], w[0], out)
    wanted = np.broadcast_to(np.arange(w[0])[:, None], y.shape)
    np.testing.assert_array_equal(to_host(y), wanted)
    found = cuconv.deform_conv_backward(
        xp.ones(y.shape), x, offset, xp.ones(w), padding=padding
    )
    for array in found[:3]:
        assert not to_host(array).any()


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "offset channels": (
        {"offset": (1, 17, 4, 4)},
        ValueError,
        "offset has 17 channels and must have offset groups × taps 9 × axes 2 = 18",
    ),
    "offset groups": ({"offset": (1, 54, 4, 4)}, ValueError, "divide the 4 channels"),
    "offset axes": ({"offset": (18, 4, 4)}, ValueError, "3 axes and must have 4, as x"),
    "offset size": ({"offset": (1, 18, 4, 5)}, ValueError, r"\(1, 18, 4, 4\)"),
    "mask": ({"mask": (1, 18, 4, 4)}, ValueError, r"mask has shape .*\(1, 9, 4, 4\)"),
    "rank": ({"w": (2, 4, 3)}, ValueError, "deform_conv2d needs weights of 4 axes"),
    "channels": ({"w": (2, 3, 3, 3)}, ValueError, "channels do not match: x has 4"),
    "bias": ({"bias": (3,)}, ValueError, "bias has shape"),
    "padding": ({"padding": ((-1, 3), (1, 1))}, ValueError, "crops nothing: slice x"),
    "option": ({"strategy": "im2col"}, TypeError, "no option 'strategy'"),
    "limit": ({"memory_limit": 99}, MemoryLimitError, "for a deformable convolution"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(xp, name):
    change, error, words = MISTAKES[name]
    shapes = {"x": (1, 4, 4, 4), "offset": (1, 18, 4, 4), "w": (2, 4, 3, 3)}
    options = {"padding": 1}
    for key, value in change.items():
        (shapes if key in ("offset", "mask", "w", "bias") else options)[key] = value
    arrays = {key: xp.zeros(shape) for key, shape in shapes.items()}
    with pytest.raises(error, match=words):
        cuconv.deform_conv2d(**arrays, **options)


def test_types_that_cannot_be_interpolated(xp):
    x, offset, w = xp.ones((1, 1, 4)), xp.zeros((1, 1, 4)), xp.ones((1, 1, 1))
    for dtype in ("int32", "complex64", "bool"):
        with pytest.raises(TypeError, match=rf"x has type {dtype}; .* real floats"):
            cuconv.deform_conv(x.astype(dtype), offset, w)
    four = [xp.ones((1, 1, *(1,) * 4)) for _ in range(2)]
    offset = xp.zeros((1, 4, *(1,) * 4))
    with pytest.raises(ValueError, match=r"4 spatial axes; .* takes 3 at most"):
        cuconv.deform_conv(four[0], offset, four[1])
    with pytest.raises(ValueError, match="needs must be"):
        cuconv.deform_conv_backward(x, x, xp.zeros((1, 1, 4)), w, needs=("dx",))
    with pytest.raises(ValueError, match="out may share memory with x"):
        cuconv.deform_conv(x, xp.zeros((1, 1, 4)), w, out=x)


def test_a_capture_is_refused(xp):
    if xp is np:
        pytest.skip("NumPy has no graphs")
    x, offset, w = xp.ones((1, 1, 4)), xp.zeros((1, 1, 4)), xp.ones((1, 1, 1))
    out = xp.empty((1, 1, 4))
    with captured(xp):
        with pytest.raises(ValueError, match="memory for its columns"):
            cuconv.deform_conv(x, offset, w, out=out)
        with pytest.raises(ValueError, match="memory for its columns"):
            cuconv.deform_conv_backward(out, x, offset, w)


def test_dask_arrays_are_refused():
    arrays = pytest.importorskip("dask.array")
    x = arrays.ones((1, 1, 4))
    with pytest.raises(TypeError, match="takes no Dask arrays"):
        cuconv.deform_conv(x, np.zeros((1, 1, 4)), np.ones((1, 1, 1)))


def test_read_only_and_unaligned_offsets(xp):
    if xp is not np:
        pytest.skip("about NumPy's arrays")
    case, wanted = CASES["two axes"], wanted_of("two axes")
    own = {n: a.astype("float32") for n, a in arrays_of(case).items()}
    dy, bias = own.pop("dy"), own.pop("bias")
    for change in (unaligned, lambda a: np.broadcast_to(a, a.shape)):
        given = {n: change(a) for n, a in own.items()}
        y = cuconv.deform_conv(**given, bias=bias, **case.options)
        np.testing.assert_array_equal(y, wanted["y"])
        found = cuconv.deform_conv_backward(dy, **given, **case.options)
        np.testing.assert_array_equal(found.offset, wanted["doffset"])
    swapped = {n: a.astype(a.dtype.newbyteorder()) for n, a in own.items()}
    y = cuconv.deform_conv(**swapped, bias=bias, **case.options)
    np.testing.assert_array_equal(y, wanted["y"])
    assert y.dtype.isnative
