"""Depthwise and separable convolution: exact, in pieces, within their limit."""

import inspect
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from support import (
    cupy_slowly,
    forget_plans,
    integers,
    peak,
    slowly,
    smallest_limit,
    to_device,
    to_host,
)

import cuconv
from cuconv import testing
from cuconv.engine import separable
from cuconv.geometry import PADDING_MODES
from cuconv.memory import MemoryLimitError
from cuconv.options import SEPARABLE_OPTIONS


class Net(NamedTuple):
    """One separable convolution, channels first: x, (C, M, *kernel), K and options."""

    x_shape: tuple[int, ...]
    depthwise: tuple[int, ...]
    filters: int
    options: dict[str, Any]


NETS = {
    "one axis": Net((3, 4, 11), (4, 2, 3), 5, {"stride": 2, "padding": ((2, 1),)}),
    "causal": Net((2, 3, 9), (3, 1, 4), 2, {"padding": "causal", "dilation": 2}),
    "full": Net((2, 3, 4, 5), (3, 2, 2, 3), 4, {"padding": "full", "stride": (1, 2)}),
    "two axes": Net(
        (3, 2, 6, 5),
        (2, 3, 3, 2),
        5,
        {"stride": (1, 2), "padding": ((1, 2), (0, 3)), "dilation": (2, 1)},
    ),
    "cropped": Net((2, 3, 7, 8), (3, 2, 2, 3), 4, {"padding": ((-2, 1), (-1, -1))}),
    "strides jump": Net((2, 3, 9, 7), (3, 2, 1, 2), 4, {"stride": (3, 2)}),
    "windows in the padding": Net((2, 2, 3), (2, 2, 2), 3, {"padding": ((4, 5),)}),
    "three axes": Net((2, 2, 3, 4, 2), (2, 2, 2, 3, 1), 3, {"padding": "same"}),
    "no batch axis": Net((3, 7, 6), (3, 2, 2, 3), 4, {"padding": 1}),
    "one channel": Net((2, 1, 7), (1, 1, 3), 1, {}),
}
BIG = Net((2, 24, 5, 4), (24, 24, 3, 2), 6, {"padding": "same"})
SMALLER = Net((2, 6, 3, 4), (6, 4, 3, 2), 6, {"padding": "same"})
DEFAULT_NETS = ("one axis", "causal", "full", "strides jump")
IN_LAYOUTS = [
    *((name, "channels_first") for name in DEFAULT_NETS),
    ("two axes", "channels_last"),
    *slowly(*((n, "channels_first") for n in NETS if n not in DEFAULT_NETS)),
    *slowly(("causal", "channels_last"), ("no batch axis", "channels_last")),
]
GRADIENTS = ("x", "depthwise", "pointwise", "bias")


class Arrays(NamedTuple):
    """What a call takes, in the layout of its options."""

    x: Any
    depthwise: Any
    pointwise: Any
    bias: Any
    dy: Any
    options: dict[str, Any]

    @property
    def weights(self) -> tuple[Any, Any]:
        return self.depthwise, self.pointwise


def last(array: Any, batched: bool) -> Any:
    """An array of cells with its channels last."""
    return np.ascontiguousarray(np.moveaxis(array, int(batched), -1))


def composed(arrays: Arrays) -> Any:
    """The two steps by loops; channels first."""
    x, w, points, bias, _, options = arrays
    rank = w.ndim - 2
    h = testing.conv_reference(x, flat(w), groups=len(w), **options)
    return testing.conv_reference(h, points[(..., *(None,) * rank)], bias)


def flat(w: Any) -> Any:
    """(C, M, …) as the weights of a convolution with C groups."""
    return w.reshape(-1, 1, *w.shape[2:])


def made(net: Net, dtype: Any = "float64", seed: int = 0) -> Arrays:
    """Small integers, channels first."""
    filters = net.depthwise[0] * net.depthwise[1]
    shapes = net.x_shape, net.depthwise, (net.filters, filters), (net.filters,)
    host = [integers(s, dtype, seed + i, 2) for i, s in enumerate(shapes)]
    plain = Arrays(*host, None, {**net.options})
    zeros = plain._replace(x=np.zeros(net.x_shape))
    return plain._replace(dy=integers(composed(zeros).shape, dtype, seed + 9, 2))


def on(xp: Any, arrays: Arrays, layout: str) -> Arrays:
    """The same in a layout and a module."""
    x, w, points, bias, dy, options = arrays
    if layout == "channels_last":
        batched = x.ndim == w.ndim
        x, dy = last(x, batched), last(dy, batched)
        w, points = np.moveaxis(w, (0, 1), (-2, -1)), points.T
        w, points = np.ascontiguousarray(w), np.ascontiguousarray(points)
    moved = (to_device(xp, array) for array in (x, w, points, bias, dy))
    return Arrays(*moved, {"precision": "strict", "layout": layout, **options})


def gradients(arrays: Arrays) -> cuconv.SeparableGradients:
    """By loops over the composition; channels first."""
    x, w, points, _, dy, options = arrays
    rank = w.ndim - 2
    p = points[(..., *(None,) * rank)]
    own = {**options, "groups": len(w)}
    h = testing.conv_reference(x, flat(w), **own)
    dh = testing.conv_input_grad_reference(dy, p, h.shape)
    dw = testing.conv_weight_grad_reference(dh, x, flat(w).shape, **own)
    channels = x.ndim - rank - 1
    return cuconv.SeparableGradients(
        testing.conv_input_grad_reference(dh, flat(w), x.shape, **own),
        dw.reshape(w.shape),
        testing.conv_weight_grad_reference(dy, h, p.shape).reshape(points.shape),
        dy.sum(axis=tuple(a for a in range(dy.ndim) if a != channels)),
    )


@cache
def known(name: str) -> tuple[Arrays, Any, Any]:
    """Arrays of a net, its result and its gradients by loops."""
    host = made(NETS[name])
    return host, composed(host), gradients(host)


def in_layout(found: Any, layout: str, batched: bool) -> Any:
    """Gradients of loops in a layout."""
    if layout == "channels_first":
        return found
    x, w, points, bias = found
    return type(found)(
        last(x, batched), np.moveaxis(w, (0, 1), (-2, -1)), points.T, bias
    )


# Depthwise convolution


@pytest.mark.parametrize(("name", "layout"), IN_LAYOUTS)
def test_depthwise_is_a_convolution_with_as_many_groups(xp, name, layout) -> None:
    host = made(NETS[name])
    x, w, _, _, _, options = on(xp, host, layout)
    groups = {**host.options, "groups": len(host.depthwise)}
    wide = flat(host.depthwise)
    bias = integers((len(wide),), seed=5)
    wanted = testing.conv_reference(host.x, wide, bias, **groups)
    dy = integers(wanted.shape, seed=6)
    batched = host.x.ndim == host.depthwise.ndim
    y = cuconv.depthwise_conv(x, w, to_device(xp, bias), **options)
    first = layout == "channels_first"
    testing.assert_equal(y, wanted if first else last(wanted, batched))
    out = xp.empty_like(y)
    assert cuconv.depthwise_conv(x, w, to_device(xp, bias), out=out, **options) is out
    testing.assert_equal(out, to_host(y))
    mine = to_device(xp, dy if first else last(dy, batched))
    found = cuconv.depthwise_conv_backward(mine, x, w, **options)
    dx = testing.conv_input_grad_reference(dy, wide, host.x.shape, **groups)
    dw = testing.conv_weight_grad_reference(dy, host.x, wide.shape, **groups)
    dw = dw.reshape(host.depthwise.shape)
    testing.assert_equal(found.x, dx if first else last(dx, batched))
    testing.assert_equal(found.w, dw if first else np.moveaxis(dw, (0, 1), (-2, -1)))
    axes = tuple(a for a in range(dy.ndim) if a != int(batched))
    testing.assert_equal(found.bias, dy.sum(axis=axes))
    assert cuconv.depthwise_conv_backward(mine, x, w, needs=(), **options) == (
        cuconv.ConvGradients()
    )


@pytest.mark.parametrize("mode", PADDING_MODES[1:])
def test_depthwise_with_a_padding_mode(xp, mode) -> None:
    options = {"padding": ((5, 2), (1, 7)), "padding_mode": mode}
    x, w = integers((2, 3, 4, 5)), integers((3, 2, 3, 2), seed=1)
    wanted = testing.conv_reference(x, flat(w), groups=3, **options)
    options["precision"] = "strict"
    mine = to_device(xp, x), to_device(xp, w)
    y = cuconv.depthwise_conv(*mine, **options)
    testing.assert_equal(y, wanted)
    found = cuconv.depthwise_conv_backward(y, *mine, needs=("x", "w"), **options)
    wide = to_device(xp, flat(w))
    whole = cuconv.conv_backward(
        y, mine[0], wide, needs=("x", "w"), groups=3, **options
    )
    testing.assert_equal(found.x, to_host(whole.x))
    testing.assert_equal(found.w, to_host(whole.w).reshape(w.shape))


def strided(xp: Any, w: np.ndarray) -> Any:
    """(C, M, …) of which the first two axes do not lie in one run of memory."""
    wide = xp.zeros((w.shape[0], 1 + w.shape[1], *w.shape[2:]), w.dtype)
    wide[:, 1:] = to_device(xp, w)
    return wide[:, 1:]


def test_depthwise_weights_are_copied_where_strides_ask_for_it(xp) -> None:
    """And the copy is counted, exactly."""
    host = made(NETS["two axes"], "float32")
    x, w, _, _, _, options = on(xp, host, "channels_first")
    far = strided(xp, host.depthwise)
    y = cuconv.depthwise_conv(x, w, **options)
    dy = xp.ones_like(y)
    calls = {
        "forward": lambda w, **more: cuconv.depthwise_conv(x, w, **options, **more),
        "all": lambda w, **more: cuconv.depthwise_conv_backward(
            dy, x, w, **options, **more
        ),
        "bias": lambda w, **more: cuconv.depthwise_conv_backward(
            dy, x, w, needs=("x", "bias"), **options, **more
        ),
    }
    for name, call in calls.items():
        wanted, found = call(w), call(far)
        pairs = zip(found, wanted, strict=True)
        for mine, other in pairs if name != "forward" else [(found, wanted)]:
            assert (mine is None) == (other is None)
            if mine is not None:
                testing.assert_equal(mine, to_host(other))
        least = smallest_limit(partial(call, far))
        call(far, memory_limit=least)
        with pytest.raises(MemoryLimitError, match=f"is {least} bytes"):
            call(far, memory_limit=least - 1)
        assert least >= w.nbytes
    more = {"needs": ("w",), "memory_limit": "1 MB", **options}
    mine = cuconv.depthwise_conv_backward(dy, x, far, **more)
    assert mine.w.shape == w.shape


def test_the_limit_of_a_depthwise_call_has_room_for_the_copy(xp) -> None:
    host = made(BIG if xp is np else SMALLER, "float32")
    x, far = to_device(xp, host.x), strided(xp, host.depthwise)
    call = partial(cuconv.depthwise_conv, x, far, strategy="im2col", padding="same")
    copy_transposed = partial(
        cuconv.depthwise_conv_backward, call(), x, far, strategy="im2col"
    )
    for each in (call, partial(copy_transposed, padding="same", needs=("x",))):
        least = smallest_limit(each)
        for limit in (least, least + 4 * far.nbytes):
            assert peak(xp, partial(each, memory_limit=limit), limit) <= limit


# Separable convolution


@pytest.mark.parametrize(("name", "layout"), IN_LAYOUTS)
def test_separable_is_the_composition_in_any_pieces(xp, name, layout) -> None:
    host, wanted, back = known(name)
    arrays = on(xp, host, layout)
    batched = host.x.ndim == host.depthwise.ndim
    wanted = wanted if layout == "channels_first" else last(wanted, batched)
    back = in_layout(back, layout, batched)
    call = partial(cuconv.separable_conv, arrays.x, *arrays.weights, arrays.bias)
    call = partial(call, **arrays.options)
    copy_transposed = partial(
        cuconv.separable_conv_backward, arrays.dy, arrays.x, *arrays.weights
    )
    copy_transposed = partial(copy_transposed, **arrays.options)
    for factor in (1, None):
        own, other = (
            {} if factor is None else {"memory_limit": int(factor * smallest_limit(f))}
            for f in (call, copy_transposed)
        )
        testing.assert_equal(call(**own), wanted)
        found = copy_transposed(**other)
        for mine, loops in zip(found, back, strict=True):
            testing.assert_equal(mine, loops)


@pytest.fixture
def pieces_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Let pieces have as many positions as a test says."""

    def choose(positions: int) -> None:
        forget_plans()
        counts = [positions]
        monkeypatch.setattr(separable.SeparableRequest, "counts", lambda self: counts)

    yield choose
    forget_plans()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every step that ran, or was recorded to run."""
    ran: list[str] = []
    convolve = separable.Separable._convolve
    monkeypatch.setattr(
        separable.Separable,
        "_convolve",
        lambda self, step, run: (ran.append(step.call), convolve(self, step, run)),
    )
    return ran


@pytest.mark.parametrize("name", ["two axes", "three axes"])
def test_pieces_of_any_size(xp, name, pieces_of, steps) -> None:
    """From one position to all of them: the same results, and several pieces."""
    host, wanted, back = known(name)
    x, w, points, bias, dy, options = on(xp, host, "channels_first")
    for size in (1, 13, 10**4)[xp is not np :]:
        pieces_of(size)
        steps.clear()
        y = cuconv.separable_conv(x, w, points, bias, **options)
        testing.assert_equal(y, wanted)
        assert len(steps) == {1: 2 * y.size // len(bias), 10**4: 2}.get(
            size, len(steps)
        )
        for needs in (GRADIENTS, ("x",), ("depthwise", "bias"), ("pointwise",)):
            found = cuconv.separable_conv_backward(
                dy, x, w, points, needs=needs, **options
            )
            for key, loops in back._asdict().items():
                mine = getattr(found, key)
                assert (mine is not None) == (key in needs)
                if mine is not None:
                    testing.assert_equal(mine, loops)


def test_the_limit_holds_by_measurement(xp) -> None:
    """What lies between the steps is the largest array, and need not be whole."""
    arrays = on(xp, made(BIG if xp is np else SMALLER, "float32"), "channels_first")
    x, w, points, bias, dy, options = arrays
    between = w.shape[1] * x.nbytes
    call = partial(cuconv.separable_conv, x, w, points, bias, **options)
    copy_transposed = partial(
        cuconv.separable_conv_backward, dy, x, w, points, **options
    )
    far = strided(xp, to_host(w))
    copied = partial(cuconv.separable_conv, x, far, points, **options)
    for each in (
        (call, copy_transposed, copied) if xp is np else (call, copy_transposed)
    ):
        wanted, least = each(), smallest_limit(each)
        # What lies between, and what Python's own objects take.
        objects = 2**17 if xp is np else 0
        assert 0 < least < (between if each is call else 2 * between) + objects
        for limit in (least, least + between // 3):
            took = peak(xp, partial(each, memory_limit=limit), limit)
            assert took <= limit, f"{took} bytes at the peak, of {limit}"
        found = each(memory_limit=least)
        for mine, other in zip(tuple(found), tuple(wanted), strict=True):
            testing.assert_equal(mine, to_host(other))
        with pytest.raises(MemoryLimitError, match=f"smallest .* is {least} bytes"):
            each(memory_limit=least - 1)
    assert peak(xp, partial(call, memory_limit=8 * between), between) > between


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_summed_in_float32_over_pieces(xp, dtype, pieces_of) -> None:
    """Three thousand ones, by hundreds: halves would stop at 256, or at 2048."""
    pieces_of(100)
    x, dy = xp.ones((1, 1, 3072), dtype), xp.ones((1, 1, 3072), dtype)
    ones = xp.ones((1, 1, 1), dtype), xp.ones((1, 1), dtype)
    found = cuconv.separable_conv_backward(dy, x, *ones)
    assert [float(to_host(a).ravel()[0]) for a in found[1:]] == [3072] * 3
    assert {array.dtype.name for array in found} == {dtype}


@cupy_slowly
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_gradients_are_the_numerical_ones(xp, dtype) -> None:
    line = Net((2, 2, 5), (2, 2, 2), 3, {"stride": 2, "padding": ((1, 0),)})
    plane = Net((1, 2, 3, 4), (2, 1, 2, 3), 2, {"padding": 1, "dilation": (2, 1)})
    for net in (line, plane):
        host = made(net, dtype)
        x, w, points, bias, dy, options = on(xp, host, "channels_first")
        values = [a / 4 for a in (x, w, points, bias)]

        def loss(*given: Any, dy: Any = dy, options: Any = options) -> Any:
            return (cuconv.separable_conv(*given, **options) * dy.conj()).real.sum()

        got = cuconv.separable_conv_backward(dy, *values[:3], **options)
        for place, mine in enumerate(got):
            numerical = testing.numerical_gradient(
                lambda a, i=place, v=values, f=loss: f(*v[:i], a, *v[i + 1 :]),
                values[place],
            )
            testing.assert_close(mine, numerical, rtol=1e-6, atol=1e-6, dtype=dtype)


def test_types_are_those_of_the_result(xp) -> None:
    arrays = on(xp, made(NETS["one axis"], "int8"), "channels_first")
    x, w, points, bias, _, options = arrays
    y = cuconv.separable_conv(x, w, points, bias, dtype="int32", **options)
    assert y.dtype == "int32"
    testing.assert_equal(y, composed(made(NETS["one axis"], "int8")), dtype="int32")
    mixed = cuconv.separable_conv(x.astype("float32"), w, points.astype("float64"))
    assert mixed.dtype == "float64"


@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7), (2, 3, 1)])
def test_nothing_to_convolve(xp, shape) -> None:
    """No images, no channels, and no positions."""
    x, channels = xp.ones(shape), shape[1]
    w, points = xp.ones((channels, 2, 2)), xp.ones((5, 2 * channels))
    bias = xp.arange(5.0)
    pads = {"padding": ((0, 0),)} if shape[2] > 1 else {"padding": ((0, 1),)}
    if shape == (2, 3, 1):
        x, pads = x[:, :, :0], {"padding": "same"}
    y = cuconv.separable_conv(x, w, points, bias, **pads)
    assert y.shape == (shape[0], 5, 0 if shape[2] == 1 else 6)
    testing.assert_equal(y, np.broadcast_to(np.arange(5.0)[:, None], y.shape))
    found = cuconv.separable_conv_backward(xp.ones_like(y), x, w, points, **pads)
    wanted = {"x": x, "depthwise": w, "pointwise": points}
    for name, array in wanted.items():
        testing.assert_equal(getattr(found, name), np.zeros(array.shape))
    assert float(to_host(found.bias).sum()) == y.size
    middle = cuconv.depthwise_conv(x, w, **pads)
    assert middle.shape == (shape[0], 2 * channels, y.shape[2])
    back = cuconv.depthwise_conv_backward(middle, x, w, **pads)
    assert (back.x.shape, back.w.shape) == (x.shape, w.shape)


def test_strategies_are_those_of_the_first_step(xp, choices) -> None:
    arrays = on(xp, made(NETS["one axis"], "float32"), "channels_first")
    x, w, points, bias, _, options = arrays
    wanted = to_host(cuconv.separable_conv(x, w, points, bias, **options))
    names = ("im2col", "tap_matmul", "benchmark")
    for name in names:
        y = cuconv.separable_conv(x, w, points, bias, strategy=name, **options)
        testing.assert_equal(y, wanted)
        if name != "benchmark":
            assert choices[-1].strategy.name == name
    with pytest.raises(ValueError, match="'magic'"):
        cuconv.separable_conv(x, w, points, strategy="magic")


X, W, P = np.ones((2, 3, 6, 5)), np.ones((3, 2, 3, 2)), np.ones((4, 6))
# What is said, and the call.
MISTAKES: dict[type[Exception], dict[str, Any]] = {
    TypeError: {
        "no option 'groups'": lambda: cuconv.depthwise_conv(X, W, groups=3),
        "no option 'groups'; the options are stride": lambda: cuconv.separable_conv(
            X, W, P, groups=3
        ),
        "x must be a NumPy or CuPy array": lambda: cuconv.depthwise_conv([1.0], W),
        "cannot be cast to dtype int32": lambda: cuconv.separable_conv(
            X, W, P, dtype="int32"
        ),
    },
    ValueError: {
        "x has 2 and w 3": lambda: cuconv.depthwise_conv(X[:, :2], W),
        "x has 5 and w 3": lambda: cuconv.depthwise_conv(X, W, layout="channels_last"),
        "x has 2 and depthwise 3": lambda: cuconv.separable_conv(X[:, :2], W, P),
        "pointwise takes 5 and depthwise gives 3 × 2 = 6": lambda: (
            cuconv.separable_conv(X, W, P[:, :5])
        ),
        "pointwise has 3 axes and must have 2": lambda: cuconv.separable_conv(
            X, W, P[:, :, None]
        ),
        "w has 2 axes; it needs at least 3": lambda: cuconv.depthwise_conv(
            X, W[:, :, 0, 0]
        ),
        "x has 2 axes; 2 spatial axes need 4": lambda: cuconv.depthwise_conv(
            X[0, 0], W
        ),
        r"bias has shape \(6,\) and must have \(4,\)": lambda: cuconv.separable_conv(
            X, W, P, np.ones(6)
        ),
        r"dy has shape \(2, 3, 6, 5\) and must have \(2, 4, 4, 4\)": lambda: (
            cuconv.separable_conv_backward(X, X, W, P)
        ),
        r"dy has shape \(2, 3, 6, 5\) and must have \(2, 6, 4, 4\)": lambda: (
            cuconv.depthwise_conv_backward(X, X, W)
        ),
        "needs must be a tuple": lambda: cuconv.separable_conv_backward(
            X, X, W, P, needs=("w",)
        ),
        r"out has shape \(2, 4, 4, 5\) and the result has \(2, 4, 4, 4\)": lambda: (
            cuconv.separable_conv(X, W, P, out=np.empty((2, 4, 4, 5)))
        ),
    },
}


@pytest.mark.parametrize(
    ("error", "words"),
    [(error, words) for error in MISTAKES for words in MISTAKES[error]],
)
def test_mistakes_are_named(error, words) -> None:
    with pytest.raises(error, match=words):
        MISTAKES[error][words]()


def test_out_may_not_be_an_input(xp) -> None:
    x = xp.ones((2, 4, 6, 6))
    w, points = xp.ones((4, 1, 1, 1)), xp.ones((4, 4))
    with pytest.raises(ValueError, match="out may share memory with x"):
        cuconv.separable_conv(x, w, points, out=x)
    out = xp.zeros((2, 8, 6, 6))[:, ::2]
    call = partial(cuconv.separable_conv, x, w, points, out=out)
    assert call(memory_limit=smallest_limit(call)) is out
    testing.assert_equal(out, np.full((2, 4, 6, 6), 4.0))


@pytest.mark.parametrize("xp", ["cupy"], indirect=True)
def test_a_graph_cannot_hold_what_lies_between(xp) -> None:
    x, w, points = xp.ones((1, 2, 5)), xp.ones((2, 2, 2)), xp.ones((3, 4))
    out, between = xp.empty((1, 3, 4)), xp.empty((1, 4, 4))
    far = strided(xp, np.ones((2, 2, 2)))
    cuconv.depthwise_conv(x, w, out=between)
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(ValueError, match="call depthwise_conv and conv"):
                cuconv.separable_conv(x, w, points, out=out)
            with pytest.raises(ValueError, match="w must be copied"):
                cuconv.depthwise_conv(x, far, out=between)
            cuconv.depthwise_conv(x, w, out=between)
        finally:
            stream.end_capture()


def test_signatures_show_the_options() -> None:
    shown = inspect.signature(cuconv.separable_conv).parameters
    assert set(SEPARABLE_OPTIONS) < set(shown)
    for call in (cuconv.depthwise_conv, cuconv.depthwise_conv_backward):
        names = set(inspect.signature(call).parameters)
        assert {"stride", "memory_limit"} < names
        assert "groups" not in names
