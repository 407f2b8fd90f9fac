"""Layers: their two passes, their options, and the ways to move and keep them."""

import importlib.util
from typing import Any

import numpy as np
import pytest
from support import LAYOUTS, integers, to_device, to_host

import cuconv
from cuconv import layers, testing
from cuconv.layers import (
    Conv,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Layer,
)

# A layer with its input, without and with another layout: every extent differs.
MADE: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "Conv": (Conv, (6, 4, (3, 2)), {"groups": 2, "stride": (2, 1), "padding": 1}),
    "Conv1d": (Conv1d, (6, 4, 3), {"dilation": 2, "padding": "full"}),
    "Conv2d": (
        Conv2d,
        (6, 4, (3, 2)),
        {"padding": ((1, 0), (2, 1)), "padding_mode": "symmetric"},
    ),
    "Conv3d": (Conv3d, (6, 4, (1, 3, 2)), {"stride": 2}),
    "ConvTranspose": (
        ConvTranspose,
        (6, 4, (3, 2)),
        {"groups": 2, "stride": (3, 2), "output_padding": (2, 1), "padding": 1},
    ),
    "ConvTranspose1d": (ConvTranspose1d, (6, 4, 3), {"stride": 2}),
    "ConvTranspose2d": (ConvTranspose2d, (6, 4, (3, 2)), {"padding": "same"}),
    "ConvTranspose3d": (ConvTranspose3d, (6, 4, (1, 3, 2)), {"stride": (1, 2, 3)}),
}
SIZES = (7, 5, 8)


def made(xp: Any, name: str, layout: str = "channels_first", **more: Any) -> Any:
    kind, sizes, options = MADE[name]
    return kind(*sizes, xp=xp, rng=3, layout=layout, **{**options, **more})


def rank_of(name: str) -> int:
    return int(name[-2]) if name.endswith("d") else 2


def input_of(xp: Any, layer: Any, name: str, layout: str, seed: int = 0) -> Any:
    size = SIZES[: rank_of(name)]
    shape = (2, 6, *size) if layout == "channels_first" else (2, *size, 6)
    return to_device(xp, integers(shape, layer.parameters["weight"].dtype, seed))


def fill(xp: Any, layer: Any) -> None:
    """Small integers for parameters, so that results are exact."""
    for seed, array in enumerate(layer.parameters.values()):
        array[...] = to_device(xp, integers(array.shape, array.dtype, seed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MADE)
def test_both_passes_are_those_of_the_functions(xp, name, layout) -> None:
    layer = made(xp, name, layout, precision="strict")
    fill(xp, layer)
    x = input_of(xp, layer, name, layout)
    options = {"precision": "strict", "layout": layout, **MADE[name][2]}
    weight, bias = layer.parameters["weight"], layer.parameters["bias"]
    transposed = name.startswith("ConvTranspose")
    call = cuconv.conv_transpose if transposed else cuconv.conv
    back = cuconv.conv_transpose_backward if transposed else cuconv.conv_backward
    y = layer(x)
    testing.assert_equal(y, to_host(call(x, weight, bias, **options)))
    dy = to_device(xp, integers(y.shape, y.dtype, 9))
    dx = layer.backward(dy)
    wanted = back(dy, x, weight, **options)
    testing.assert_equal(dx, to_host(wanted.x))
    testing.assert_equal(layer.gradients["weight"], to_host(wanted.w))
    testing.assert_equal(layer.gradients["bias"], to_host(wanted.bias))
    assert layer.backward(dy, needs_input=False) is None
    assert list(layer.gradients) == list(layer.parameters) == ["weight", "bias"]


def test_without_a_bias_there_is_no_gradient_of_one(xp) -> None:
    for name in ("Conv1d", "ConvTranspose1d"):
        layer = made(xp, name, bias=False)
        y = layer(input_of(xp, layer, name, "channels_first"))
        layer.backward(xp.ones_like(y))
        assert list(layer.gradients) == list(layer.parameters) == ["weight"]


def test_a_size_for_one_forward_call(xp) -> None:
    layer = ConvTranspose1d(2, 3, 3, stride=3, output_padding=1, xp=xp)
    x = xp.ones((1, 2, 4), "float32")
    assert layer(x).shape == (1, 3, 13)
    y = layer.forward(x, output_size=14)
    assert y.shape == (1, 3, 14)
    assert layer.backward(xp.ones_like(y)).shape == x.shape
    with pytest.raises(ValueError, match="12 … 14"):
        layer.forward(x, output_size=15)


def test_backward_needs_a_forward_call(xp) -> None:
    for name in ("Conv2d", "ConvTranspose2d"):
        layer = made(xp, name)
        with pytest.raises(RuntimeError, match="input of a forward call"):
            layer.backward(xp.ones((1, 4, 3, 3), "float32"))


# How weights begin


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
def test_weights_begin_as_he_draws_them(dtype) -> None:
    """A mean square of 2 / products of an output; the same for every layout."""
    layer = Conv2d(64, 48, (5, 3), groups=2, dtype=dtype, rng=0, xp=np)
    weight = layer.parameters["weight"].astype(complex)
    assert np.mean(np.abs(weight) ** 2) == pytest.approx(2 / (32 * 15), rel=0.05)
    other = ConvTranspose2d(64, 48, (5, 3), stride=(2, 1), dtype=dtype, rng=0, xp=np)
    weight = other.parameters["weight"].astype(complex)
    assert np.mean(np.abs(weight) ** 2) == pytest.approx(2 / (64 * 7.5), rel=0.05)
    assert not layer.parameters["bias"].any()
    assert layer.parameters["weight"].dtype == other.parameters["bias"].dtype == dtype


@pytest.mark.parametrize("name", MADE)
def test_one_seed_means_the_same_weights_everywhere(xp, name) -> None:
    first = made(np, name).state_dict()
    for layout in LAYOUTS:
        layer = made(xp, name, layout)
        assert layer.parameters["weight"].flags.c_contiguous
        for key, array in layer.state_dict().items():
            testing.assert_equal(array, first[key])
    again = made(np, name)
    again.parameters["weight"][...] = 0
    assert first["weight"].all(), "a state shares memory with its layer"


# Options


OPTIONS = {
    "stride": ({"stride": 0}, ValueError, "stride of spatial axis 0 is 0"),
    "values": ({"stride": (1, 1, 1)}, ValueError, "stride has 3 values for 2"),
    "dilation": ({"dilation": 1.5}, TypeError, "dilation must be made of integers"),
    "padding": ({"padding": "half"}, ValueError, "padding must be integers or one"),
    "pairs": ({"padding": ((1, 2, 3), 1)}, ValueError, r"\(before, after\) pairs"),
    "layout": ({"layout": "NCL"}, ValueError, "'NCL' has 1 spatial axes"),
    "layout word": ({"layout": "CN"}, ValueError, "layout must be one of"),
    "groups": ({"groups": 5}, ValueError, "groups 5 do not divide in_channels 6"),
    "no groups": ({"groups": 0}, ValueError, "groups must be at least 1"),
    "strategy": ({"strategy": "magic"}, ValueError, "'magic'"),
    "precision": ({"precision": "loose"}, ValueError, "'loose'"),
    "deterministic": ({"deterministic": "yes"}, TypeError, "deterministic"),
    "memory": ({"memory_limit": "much"}, ValueError, "'much'"),
    "dtype": ({"dtype": "int8"}, TypeError, "floating or complex dtype; got int8"),
    "wide dtype": ({"dtype": np.longdouble}, TypeError, "dtype has type"),
    "no dtype": ({"dtype": "f33"}, TypeError, "name, as 'float32'; got 'f33'"),
    "unknown": ({"strides": 2}, TypeError, "no option 'strides'; the options are"),
    "bias": ({"bias": np.ones(4)}, TypeError, "bias must be True or False"),
    "module": ({"xp": "numpy"}, TypeError, "module numpy or cupy; got 'numpy'"),
}


@pytest.mark.parametrize("kind", [Conv2d, ConvTranspose2d])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_checked_when_a_layer_is_made(name, kind) -> None:
    options, error, words = OPTIONS[name]
    with pytest.raises(error, match=words):
        kind(6, 4, 3, **{"xp": np, **options})


# A kind of layer, its sizes and options, and what is said.
OTHER_MISTAKES: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (layers.DepthwiseConv2d, (6, 3), {"groups": 6}, "no option 'groups'"),
    (layers.DepthwiseConv2d, (0, 3), {}, "channels must be at least 1; got 0"),
    (layers.DepthwiseConv2d, (6, 3), {"multiplier": 0}, "multiplier .* got 0"),
    (layers.DepthwiseConv2d, (6, 3), {"padding": "causal"}, "for one spatial axis"),
    (layers.DepthwiseConv2d, (6, (3, 3, 3)), {}, "kernel_size has 3 values"),
    (layers.SeparableConv2d, (3, 4, 3), {"groups": 3}, "no option 'groups'"),
    (layers.SeparableConv2d, (3, 4, 3), {"stride": 0}, "stride of spatial axis 0"),
    (layers.SeparableConv2d, (3, 4, 3), {"memory_limit": "much"}, "'much'"),
    (layers.SeparableConv2d, (3, 4, 3), {"strategy": "magic"}, "'magic'"),
    (layers.SeparableConv2d, (3, 4, 3), {"multiplier": 0}, "multiplier .* got 0"),
    (layers.SeparableConv2d, (3, 4, 3), {"dtype": "int8"}, "floating or complex"),
    (layers.SeparableConv2d, (3, 0, 3), {}, "out_channels must be at least 1"),
    (Conv2d, (6, 4, 3), {"output_padding": 2}, "no option 'output_padding'"),
    (layers.DeformConv2d, (6, 4, 3), {"padding_mode": "reflect"}, "'padding_mode'"),
    (layers.DeformConv2d, (6, 4, 3), {"dtype": "complex64"}, "takes real floats"),
    (
        *(ConvTranspose2d, (6, 4, 3), {"stride": (3, 2), "output_padding": 2}),
        "axis 1 is 2; it must be less than stride 2",
    ),
]


@pytest.mark.parametrize(("kind", "sizes", "options", "words"), OTHER_MISTAKES)
def test_what_one_kind_refuses(kind, sizes, options, words) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        kind(*sizes, xp=np, **options)


@pytest.mark.parametrize("kind", [Conv, ConvTranspose])
def test_sizes_are_checked_when_a_layer_is_made(kind) -> None:
    for channels in ((0, 4), (6, -1)):
        with pytest.raises(ValueError, match="at least 1"):
            kind(*channels, (3, 3), xp=np)
    with pytest.raises(TypeError, match="single number 3"):
        kind(6, 4, 3, xp=np)
    two = Conv2d if kind is Conv else ConvTranspose2d
    with pytest.raises(ValueError, match="kernel_size has 3 values; needed: 2"):
        two(6, 4, (3, 3, 3), xp=np)


def test_cropping_is_no_mistake() -> None:
    """Options that suit a large input alone are checked against one."""
    layer = Conv1d(1, 1, 3, padding=-4, dilation=5, xp=np)
    assert layer(np.ones((1, 1, 30), "float32")).shape == (1, 1, 12)


# Moving and keeping


@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_moves_parameters_and_gradients_by_copies(layout) -> None:
    cupy = pytest.importorskip("cupy")
    layer = made(np, "ConvTranspose2d", layout)
    y = layer(input_of(np, layer, "ConvTranspose2d", layout))
    layer.backward(np.ones_like(y))
    before = {**layer.parameters}, {**layer.gradients}
    assert layer.to(cupy) is layer
    for arrays, old in zip((layer.parameters, layer.gradients), before, strict=True):
        assert list(arrays) == ["weight", "bias"]
        for name, array in arrays.items():
            assert cuconv.array_module(array) is cupy
            testing.assert_equal(array, old[name])
    with pytest.raises(RuntimeError, match="forward call"):
        layer.backward(cupy.ones(y.shape, y.dtype))
    x = input_of(cupy, layer, "ConvTranspose2d", layout)
    testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    layer.to(np)
    for name, array in layer.parameters.items():
        assert cuconv.array_module(array) is np
        assert not np.shares_memory(array, before[0][name])
    kept = layer.parameters["weight"]
    assert layer.to(np).parameters["weight"] is kept


@pytest.mark.parametrize("name", MADE)
def test_a_state_is_pytorchs_in_names_and_layout(xp, name) -> None:
    state = made(xp, name, "channels_last").state_dict()
    rank = rank_of(name)
    groups = MADE[name][2].get("groups", 1)
    channels = (6, 4 // groups) if "Transpose" in name else (4, 6 // groups)
    kernel = {1: (3,), 2: (3, 2), 3: (1, 3, 2)}[rank]
    assert {key: array.shape for key, array in state.items()} == {
        "weight": (*channels, *kernel),
        "bias": (4,),
    }
    assert all(type(array) is np.ndarray for array in state.values())
    assert all(array.flags.c_contiguous for array in state.values())
    layer = made(xp, name, "channels_last")
    taps = to_host(layer.parameters["weight"])
    place = (slice(None),) * (taps.ndim - 2)
    testing.assert_equal(state["weight"][1, 0], taps[(*place, 0, 1)])


@pytest.mark.parametrize("layouts", [LAYOUTS, LAYOUTS[::-1]])
def test_a_state_goes_into_a_layer_of_another_layout_and_type(xp, layouts) -> None:
    for name in MADE:
        first = made(np, name, layouts[0], dtype="float64")
        fill(np, first)
        second = made(xp, name, layouts[1])
        arrays = dict(second.parameters)
        second.load_state_dict(first.state_dict())
        for key, array in second.state_dict().items():
            testing.assert_equal(array, first.state_dict()[key], dtype="float32")
            assert second.parameters[key] is arrays[key], "not written in place"
    device_state = {k: to_device(xp, a) for k, a in first.state_dict().items()}
    second.load_state_dict(device_state)


def test_a_state_that_does_not_fit_changes_nothing(xp) -> None:
    layer = made(xp, "Conv2d")
    fill(xp, layer)
    good = layer.state_dict()
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"weight": good["weight"] + 1}, ValueError, r"\['weight'\] and the layer"),
        ({**good, "scale": good["bias"]}, ValueError, "'scale'"),
        (
            {"weight": good["weight"] + 1, "bias": np.ones(5)},
            ValueError,
            r"bias has shape \(5,\) in the state and \(4,\)",
        ),
        (
            {"weight": good["weight"] + 1, "bias": np.ones(4, complex)},
            TypeError,
            "bias has type complex128 in the state and float32",
        ),
    ]
    for state, error, words in bad:
        with pytest.raises(error, match=words):
            layer.load_state_dict(state)
    for key, array in layer.state_dict().items():
        testing.assert_equal(array, good[key])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "complex64"])
def test_npz_files(xp, tmp_path, dtype) -> None:
    path = tmp_path / "layer.npz"
    first = made(xp, "ConvTranspose2d", "channels_last", dtype=dtype)
    fill(xp, first)
    first.save(path)
    second = made(xp, "ConvTranspose2d", dtype=dtype)
    second.load(str(path))
    for key, array in second.state_dict().items():
        testing.assert_equal(array, first.state_dict()[key], dtype=dtype)
    assert [file.name for file in tmp_path.iterdir()] == ["layer.npz"]
    if dtype != "bfloat16":
        with np.load(path) as file:
            assert file["weight"].shape == (6, 4, 3, 2)


def test_safetensors_files(tmp_path) -> None:
    path = tmp_path / "layer.safetensors"
    first, second = made(np, "Conv2d", "channels_last"), made(np, "Conv2d")
    if importlib.util.find_spec("safetensors") is None:
        with pytest.raises(ImportError, match=r"cuconv\[safetensors\]"):
            first.save(path)
        with pytest.raises(ImportError, match=r"cuconv\[safetensors\]"):
            first.load(path)
        return
    fill(np, first)
    first.save(path)
    second.load(path)
    for key, array in second.state_dict().items():
        testing.assert_equal(array, first.state_dict()[key])


def test_files_of_other_kinds_are_refused(tmp_path) -> None:
    layer = made(np, "Conv1d")
    for name in ("layer", "layer.pt", "layer.npy"):
        for call in (layer.save, layer.load):
            with pytest.raises(ValueError, match=r"\.npz or \.safetensors"):
                call(tmp_path / name)
    assert not list(tmp_path.iterdir())


class Twice(Layer):
    """A layer without parameters."""

    def forward(self, x: Any) -> Any:
        self._x = x
        return 2 * x

    def backward(self, dy: Any, *, needs_input: bool = True) -> Any:
        self._kept()
        return 2 * dy if needs_input else None


def test_a_layer_may_have_no_parameters(xp, tmp_path) -> None:
    layer = Twice()
    assert float(layer(xp.ones(1))[0]) == float(layer.backward(xp.ones(1))[0]) == 2
    assert layer.state_dict() == layer.to(np).gradients == {}
    layer.save(tmp_path / "twice.npz")
    layer.load(tmp_path / "twice.npz")
    layer.load_state_dict({})


# Depthwise and separable convolutions


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [layers.DepthwiseConv, layers.DepthwiseConv2d])
def test_a_depthwise_layer_is_the_function(xp, kind, layout) -> None:
    options = {"padding": 1, "stride": (1, 2), "layout": layout, "precision": "strict"}
    layer = kind(6, (3, 2), multiplier=2, xp=xp, rng=3, **options)
    fill(xp, layer)
    x = to_device(xp, integers((2, 6, 5, 4), "float32"))
    w = layer.parameters["weight"].reshape(6, 2, 3, 2)
    if layout == "channels_last":
        x = xp.ascontiguousarray(x.transpose(0, 2, 3, 1))
        w = layer.parameters["weight"].reshape(3, 2, 6, 2)
    y = layer(x)
    wanted = cuconv.depthwise_conv(x, w, layer.parameters["bias"], **options)
    testing.assert_equal(y, to_host(wanted))
    dx = layer.backward(y)
    found = cuconv.depthwise_conv_backward(y, x, w, **options)
    testing.assert_equal(dx, to_host(found.x))
    weight = layer.gradients["weight"]
    testing.assert_equal(weight.reshape(w.shape), to_host(found.w))
    state = layer.state_dict()
    assert {k: a.shape for k, a in state.items()} == {
        "weight": (12, 1, 3, 2),
        "bias": (12,),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [layers.DeformConv, layers.DeformConv2d])
def test_a_deformable_layer_is_the_function(xp, kind, layout) -> None:
    options = {"padding": 1, "stride": (1, 2), "groups": 2, "layout": layout}
    layer = kind(6, 4, (3, 2), xp=xp, rng=3, **options)
    twin = Conv2d(6, 4, (3, 2), xp=xp, rng=3, **options)
    for name, array in layer.state_dict().items():
        testing.assert_equal(array, twin.state_dict()[name])
    fill(xp, layer)
    shapes = (2, 6, 5, 4), (2, 2 * 12, 5, 3), (2, 12, 5, 3)
    given = [to_device(xp, integers(shape, "float32")) for shape in shapes]
    if layout == "channels_last":
        given = [xp.ascontiguousarray(a.transpose(0, 2, 3, 1)) for a in given]
    with pytest.raises(RuntimeError, match="there was none"):
        layer.backward(given[0])
    x, offset, mask = given
    w, bias = layer.parameters["weight"], layer.parameters["bias"]
    for weighed in (mask, None):
        y = layer(x, offset, weighed)
        wanted = cuconv.deform_conv(x, offset, w, bias, mask=weighed, **options)
        testing.assert_equal(y, to_host(wanted))
        loops = cuconv.deform_conv_backward(y, x, offset, w, mask=weighed, **options)
        found = layer.backward(y)
        for mine, other in zip(found, loops, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                testing.assert_equal(mine, to_host(other))
        assert layer.gradients == {"weight": found.w, "bias": found.bias}
        assert layer.backward(y, needs_input=False).x is None


SEPARABLE = {
    "SeparableConv": (layers.SeparableConv, (3, 2), {"padding": 1, "stride": (1, 2)}),
    "SeparableConv1d": (layers.SeparableConv1d, 3, {"padding": "causal"}),
    "SeparableConv2d": (layers.SeparableConv2d, (3, 2), {"dilation": 2}),
    "SeparableConv3d": (layers.SeparableConv3d, (1, 3, 2), {}),
}


def separable(xp: Any, name: str, layout: str, **more: Any) -> Any:
    kind, kernel, options = SEPARABLE[name]
    options = {"multiplier": 2, "layout": layout, "rng": 3, **options, **more}
    return kind(3, 4, kernel, xp=xp, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SEPARABLE)
def test_a_separable_layer_is_the_function(xp, name, layout) -> None:
    layer = separable(xp, name, layout, precision="strict")
    fill(xp, layer)
    size = SIZES[: rank_of(name)]
    shape = (2, 3, *size) if layout == "channels_first" else (2, *size, 3)
    x = to_device(xp, integers(shape, "float32"))
    weights = layer.parameters["depthwise"], layer.parameters["pointwise"]
    options = {"layout": layout, "precision": "strict", **SEPARABLE[name][2]}
    y = layer(x)
    bias = layer.parameters["bias"]
    wanted = cuconv.separable_conv(x, *weights, bias, **options)
    testing.assert_equal(y, to_host(wanted))
    dy = to_device(xp, integers(y.shape, "float32", seed=4))
    dx = layer.backward(dy)
    found = cuconv.separable_conv_backward(dy, x, *weights, **options)
    testing.assert_equal(dx, to_host(found.x))
    for key in ("depthwise", "pointwise", "bias"):
        testing.assert_equal(layer.gradients[key], to_host(getattr(found, key)))
    assert list(layer.parameters) == list(layer.gradients)
    assert layer.backward(dy, needs_input=False) is None


@pytest.mark.parametrize("layouts", [LAYOUTS, LAYOUTS[::-1]])
def test_a_separable_state_is_that_of_two_convolutions(xp, layouts, tmp_path) -> None:
    """A state goes into layers of the other layout, and into two of `Conv`."""
    for name in SEPARABLE:
        first, second = separable(np, name, layouts[0]), separable(xp, name, layouts[1])
        drawn = first.state_dict()
        for key, array in second.state_dict().items():
            testing.assert_equal(array, drawn[key])
        fill(np, first)
        state = first.state_dict()
        second.load_state_dict(state)
        first.save(tmp_path / "layer.npz")
        third = separable(xp, name, layouts[1], bias=True, rng=9)
        third.load(tmp_path / "layer.npz")
        for layer in (second, third):
            for key, array in layer.state_dict().items():
                testing.assert_equal(array, state[key])
        rank = rank_of(name)
        kernel = {1: (3,), 2: (3, 2), 3: (1, 3, 2)}[rank]
        assert state["depthwise"].shape == (6, 1, *kernel)
        assert state["pointwise"].shape == (4, 6, *(1,) * rank)
    two = Conv(3, 6, kernel, groups=3, bias=False, xp=np)
    one = Conv(6, 4, (1,) * rank, xp=np)
    two.load_state_dict({"weight": state["depthwise"]})
    one.load_state_dict({"weight": state["pointwise"], "bias": state["bias"]})
    x = integers((2, 3, *SIZES), "float32")
    y = separable(np, name, "channels_first")
    y.load_state_dict(state)
    testing.assert_close(y(x), one(two(x)), rtol=1e-5, atol=1e-5)


def test_separable_weights_keep_the_spread_of_rectified_inputs() -> None:
    layer = layers.SeparableConv2d(96, 64, (5, 3), multiplier=2, rng=0, xp=np)
    weights = layer.parameters["depthwise"], layer.parameters["pointwise"]
    for weight, square in zip(weights, (2 / 15, 1 / 192), strict=True):
        assert np.mean(weight**2) == pytest.approx(square, rel=0.05)
    bare = layers.SeparableConv2d(3, 4, 3, bias=False, xp=np)
    y = bare(np.ones((1, 3, 5, 5), "float32"))
    bare.backward(y)
    assert list(bare.gradients) == ["depthwise", "pointwise"]


# Pooling

WINDOWS = {"stride": 2, "padding": ((1, 0),), "dilation": 2, "ceil_mode": True}
PLANES = {"stride": (2, 1), "padding": (1, 0)}
MEANS = {"count_include_pad": False, "stride": (1, 2), "padding": 1}
POOLED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], int]] = {
    "MaxPool": ("max_pool", ((3, 2),), PLANES, 2),
    "MaxPool1d": ("max_pool", (3,), WINDOWS, 1),
    "MaxPool2d": ("max_pool", (2,), {}, 2),
    "MaxPool3d": ("max_pool", (2,), {"stride": 1}, 3),
    "AvgPool": ("avg_pool", ((3, 2),), MEANS, 2),
    "AvgPool1d": ("avg_pool", (3,), WINDOWS, 1),
    "AvgPool2d": ("avg_pool", (2,), {"divisor_override": 3}, 2),
    "AvgPool3d": ("avg_pool", (2,), {"padding": "same"}, 3),
    "AdaptiveMaxPool": ("adaptive_max_pool", ((3, None),), {}, 2),
    "AdaptiveAvgPool": ("adaptive_avg_pool", (2,), {"memory_limit": "1 MiB"}, 2),
    "GlobalMaxPool": ("global_max_pool", (), {}, 3),
    "GlobalAvgPool": ("global_avg_pool", (), {"batched": True}, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", POOLED)
def test_pooling_layers_are_the_functions(xp, name, layout, tmp_path) -> None:
    call, sizes, options, rank = POOLED[name]
    layer = getattr(layers, name)(*sizes, layout=layout, **options)
    shape = (2, 3, *SIZES[:rank]) if layout == "channels_first" else (2, *SIZES, 3)
    x = to_device(xp, integers(shape[: rank + 1] + shape[-1:], "float32"))
    options = {"layout": layout, **options}
    y = layer(x)
    testing.assert_equal(y, to_host(getattr(cuconv, call)(x, *sizes, **options)))
    dy = to_device(xp, integers(y.shape, "float32", seed=1))
    places = (None, None) if "max" in call else (x.shape,)
    more = {"x": x} if "max" in call else {}
    gradient = getattr(cuconv, f"{call}_backward")
    dx = gradient(dy, *places, *sizes, **more, **options)
    testing.assert_equal(layer.backward(dy), to_host(dx))
    assert layer.backward(dy, needs_input=False) is None
    assert layer.parameters == layer.gradients == layer.state_dict() == {}
    layer.save(tmp_path / "pool.npz")
    layer.load(tmp_path / "pool.npz")
    assert not any(kept is x for kept in layer._x), "x need not be kept"
    assert layer.to(np) is layer
    with pytest.raises(RuntimeError, match="forward call"):
        layer.backward(dy)


POOL_MISTAKES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], str]] = {
    "no kernel": ("MaxPool2d", (0,), {}, "kernel_size must be at least 1; got 0"),
    "values": ("AvgPool2d", ((2, 2, 2),), {}, "kernel_size has 3 values; needed: 2"),
    "a single number": ("MaxPool", (2,), {}, "single number 2"),
    "axes": ("AvgPool", ((2,) * 4,), {}, "has 4 values; pooling takes 1 … 3"),
    "stride": ("MaxPool1d", (2,), {"stride": 0}, "stride of spatial axis 0 is 0"),
    "strides": ("MaxPool2d", (2,), {"stride": (1,) * 3}, "stride has 3 values for 2"),
    "padding": ("AvgPool3d", (2,), {"padding": "half"}, "padding must be integers"),
    "causal": ("MaxPool2d", (2,), {"padding": "causal"}, "one spatial axis"),
    "layout": ("MaxPool2d", (2,), {"layout": "NCL"}, "'NCL' has 1 spatial axes"),
    "divisor": ("AvgPool2d", (2,), {"divisor_override": 0}, "must not be 0"),
    "mean": ("MaxPool2d", (2,), {"divisor_override": 3}, "no option 'divisor_over"),
    "unknown": ("AvgPool2d", (2,), {"strides": 3}, "no option 'strides'"),
    "limit": ("MaxPool2d", (2,), {"memory_limit": "much"}, "'much'"),
    "windows": ("AdaptiveAvgPool", ((2, -1),), {}, "axis 1 is -1"),
    "fractions": ("AdaptiveMaxPool", (2.5,), {}, "output_size must be made of int"),
    "no windows": ("AdaptiveMaxPool", ((),), {}, "output_size has 0 values"),
    "layout's rank": ("AdaptiveAvgPool", ((2, 2),), {"layout": "NWC"}, "'NWC' has 1"),
    "whole": ("GlobalAvgPool", (), {"layout": "CN"}, "layout must be one of"),
}


@pytest.mark.parametrize("name", POOL_MISTAKES)
def test_pooling_options_are_checked_when_a_layer_is_made(name) -> None:
    kind, sizes, options, words = POOL_MISTAKES[name]
    with pytest.raises((ValueError, TypeError), match=words):
        getattr(layers, kind)(*sizes, **options)


def test_pooling_layers_without_a_batch_axis() -> None:
    x = np.arange(24.0).reshape(2, 3, 4)
    assert layers.MaxPool2d(2)(x).shape == (2, 1, 2)
    assert layers.AdaptiveAvgPool((1, 2))(x).shape == (2, 1, 2)
    assert layers.GlobalMaxPool(batched=False)(x).shape == (2, 1, 1)
    assert layers.AdaptiveAvgPool(10**6, layout="NHWC")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "sizes", "options", "call"),
    [
        ("MaxPool2d", (2,), {"ceil_mode": True}, "max_pool"),
        ("AdaptiveMaxPool", ((3, 2),), {}, "adaptive_max_pool"),
        ("GlobalMaxPool", (), {}, "global_max_pool"),
    ],
)
def test_unpooling_reverses_a_layer(xp, layout, name, sizes, options, call) -> None:
    """Of a later call too: its indices are those of the last one."""
    options = {"layout": layout, **options}
    pool = getattr(layers, name)(*sizes, **options)
    up = layers.MaxUnpool(pool)
    shape = (2, 3, 7, 5) if layout == "channels_first" else (2, 7, 5, 3)
    for seed in range(2):
        x = to_device(xp, integers(shape, "float32", seed=seed))
        y = pool(x)
        values = to_device(xp, integers(y.shape, "float32", seed=2))
        back = getattr(cuconv, f"{call}_backward")
        wanted = back(values, None, None, *sizes, x=x, **options)
        testing.assert_equal(up(values), to_host(wanted))
        testing.assert_equal(up.backward(x), to_host(y))
        assert up.backward(x, needs_input=False) is None
    assert repr(up) == f"MaxUnpool({pool!r})"


def test_unpooling_needs_a_layer_of_maxima_that_has_run() -> None:
    with pytest.raises(TypeError, match="layer of maxima, as MaxPool; got"):
        layers.MaxUnpool(layers.AvgPool2d(2))
    with pytest.raises(RuntimeError, match="forward call"):
        layers.MaxUnpool(layers.MaxPool2d(2))(np.ones((1, 1, 2, 2)))


def test_every_layer_has_an_example() -> None:
    kinds = [k for k in vars(layers).values() if isinstance(k, type)]
    named = {k.__name__: k for k in kinds if issubclass(k, Layer)}
    public = {name: k for name, k in named.items() if not name.startswith("_")}
    depthwise = {f"DepthwiseConv{rank}" for rank in ("", "1d", "2d", "3d")}
    deform = {"DeformConv", "DeformConv2d"}
    tested = {*MADE, *depthwise, *SEPARABLE, *POOLED, *deform, "MaxUnpool"}
    assert set(public) == {"Layer", *tested} == set(layers.__all__)
    assert all(">>> " in public[name].__doc__ for name in tested)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            lambda: layers.Conv1d(2, 4, 3, bias=False, groups=2, dtype="float64"),
            "Conv1d(weight (4, 1, 3), dtype=float64, groups=2)",
        ),
        (
            lambda: layers.SeparableConv2d(2, 4, 3, layout="NHWC"),
            (
                "SeparableConv2d(depthwise (3, 3, 2, 1), pointwise (2, 4), bias (4,), "
                "dtype=float32, layout='NHWC')"
            ),
        ),
        (lambda: layers.MaxPool2d(3, stride=2), "MaxPool2d((3, 3), stride=2)"),
        (
            lambda: layers.AdaptiveAvgPool((1, 2)),
            "AdaptiveAvgPool((1, 2), layout='channels_first')",
        ),
    ],
)
def test_a_layer_shows_parameters_and_options(layer, text):
    assert repr(layer()) == text
