"""What is refused: clearly, with both numbers, before anything is allocated.

Arrays are broadcast from one element to shapes of gigabytes, so that a single
allocation or a single pass over them would not go unseen.
"""

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import CASES, invalid_cases
from hypothesis import given
from support import (
    OPERATIONS,
    Operands,
    assert_refused,
    integers,
    large,
    operands,
    run,
    to_host,
)

import cuconv
from cuconv import arrays as array_rules
from cuconv import testing
from cuconv.memory import MemoryLimitError, parse_memory_limit

HUGE = 2**20


X = (64, 6, HUGE, 9)
W = (8, 6, 5, 3)


def bad(
    *words: str,
    x: Any = X,
    w: Any = W,
    error: type[Exception] = ValueError,
    **options: Any,
) -> tuple[Any, ...]:
    """Shapes and options that are refused, and what the message says."""
    return x, w, options, error, words


SHAPES = {
    "padding like same": bad("got 'smae': did you mean 'same'?", padding="smae"),
    "pads of ONNX": bad(
        "4 values for 2", "padding=((1, 3), (2, 4))", padding=(1, 2, 3, 4)
    ),
    "a layout like another": bad("'NWHC': did you mean", layout="NWHC"),
    "a mode like another": bad("did you mean 'reflect'?", padding_mode="reflct"),
    "a strategy like another": bad("did you mean 'im2col'?", strategy="im2cl"),
    "a precision like another": bad("did you mean 'fast'?", precision="fats"),
    "an option like another": bad(
        "no option 'pading'", "did you mean 'padding'?", error=TypeError, pading=1
    ),
    "channels": bad("x has 5", "expects 6 × groups 1 = 6", x=(64, 5, 99, 9)),
    "channels of a group": bad("x has 6", "6 × groups 2 = 12", groups=2),
    "filters": bad("groups 3", "the 8 filters", w=(8, 2, 5, 3), groups=3),
    "no groups": bad("groups", "at least 1", "got 0", groups=0),
    "fewer than no groups": bad("groups", "got -2", groups=-2),
    "too many axes": bad("x has 5 axes", "2 spatial", "need 4", "3", x=(2, *X)),
    "too few axes": bad("x has 2 axes", "2 spatial axes need 4", x=(9, 9)),
    "weights without space": bad("w has 2 axes", "at least 3", w=(8, 6)),
    "kernel": bad("axis 0", "5 elements", "has 4 (4 + padding 0 + 0)", x=(1, 6, 4, 9)),
    "kernel, dilated": bad(
        "axis 1",
        "11 elements (kernel 3, dilation 5)",
        "has 9 (9 + padding 0 + 0)",
        dilation=(1, 5),
    ),
    "kernel, cropped": bad(
        "axis 1", "3 elements", "has 2 (9 + padding -4 + -3)", padding=(0, (-4, -3))
    ),
    "cropped away": bad("3 elements", "has -1 ", padding=(0, -5)),
    "an empty axis": bad("axis 0", "5 elements", "has 0 (0 + padding", x=(2, 6, 0, 9)),
    "no taps": bad("kernel_size", "axis 0 is 0", "1 …", w=(8, 6, 0, 3)),
    "stride 0": bad("stride", "axis 0 is 0", "1 …", stride=0),
    "a negative stride": bad("stride", "axis 1 is -2", stride=(1, -2)),
    "dilation 0": bad("dilation", "axis 1 is 0", dilation=(1, 0)),
    "a long stride": bad("2147483648", "2147483647", stride=2**31),
    "a long dilation": bad(str(2**63), "2147483647", dilation=2**63),
    "a long padding": bad("padding", "2147483648", padding=2**31),
    "a long cropping": bad("padding", "-2147483647", padding=-(2**64)),
    "a long pair": bad(str(2**40), "axis 1", padding=(0, (0, 2**40))),
    "strides": bad("stride has 3 values", "2 spatial", stride=(1, 2, 3)),
    "dilations": bad("dilation has 1 values for 2", dilation=(1,)),
    "paddings": bad("padding has 3 values for 2", padding=(1, 2, 3)),
    "pairs": bad("padding has 1 values for 2", padding=((1, 2),)),
    "triples": bad("pairs", "(1, 2, 3)", padding=((1, 2, 3), 0)),
    "a fraction": bad("stride", "1.5", error=TypeError, stride=1.5),
    "half a pad": bad("padding", "0.5", error=TypeError, padding=(0, 0.5)),
    "no stride": bad("stride", "None", error=TypeError, stride=None),
    "a stride in words": bad("stride", "'two'", error=TypeError, stride="two"),
    "groups in words": bad("groups", "'two'", error=TypeError, groups="two"),
    "a padding word": bad("'full'", "'same_lower'", "'half'", padding="half"),
    "a padding case": bad("'same'", "'SAME'", padding="SAME"),
    "a layout word": bad("layout", "'NHWC'", "'NCWH'", layout="NCWH"),
    "no layout": bad("layout", "None", layout=None),
    "a layout's rank": bad("'NCDHW' has 3", "has 2", layout="NCDHW"),
    "a strategy": bad("'im2col'", "'magic'", strategy="magic"),
    "a strategy's reach": bad("pointwise", "tap", strategy="pointwise"),
    "a precision": bad("'strict'", "'exact'", precision="exact"),
    "a limit in words": bad("64 MiB", "'lots'", memory_limit="lots"),
    "a negative limit": bad("memory_limit", "-1", memory_limit=-1),
    "half a limit": bad("memory_limit", "1.5", error=TypeError, memory_limit=1.5),
    "a small limit": bad(
        "of 7 bytes",
        "smallest",
        error=MemoryLimitError,
        memory_limit=7,
        strategy="im2col",
    ),
    "a narrower kind": bad("float32", "int32", error=TypeError, dtype=np.int32),
    "a type of text": bad("dtype", "supported: bool", error=TypeError, dtype="U3"),
    "a type of objects": bad("dtype", "object", error=TypeError, dtype=object),
}


@pytest.mark.parametrize("name", SHAPES)
def test_bad_options_are_named_with_their_numbers(xp, name) -> None:
    x_shape, w_shape, options, error, words = SHAPES[name]
    x, w, dy = large(xp, *x_shape), large(xp, *w_shape), large(xp, 64, 8, HUGE - 4, 7)
    assert_refused(xp, lambda: cuconv.conv(x, w, **options), error, *words)
    for call in (
        lambda: cuconv.conv_input_grad(dy, w, x_shape, **options),
        lambda: cuconv.conv_weight_grad(dy, x, w_shape, **options),
        lambda: cuconv.conv_backward(dy, x, w, **options),
    ):
        assert_refused(xp, call, error, *words[: 1 if "reach" in name else None])


@pytest.mark.parametrize("op", OPERATIONS)
@given(invalid=invalid_cases())
def test_any_invalid_geometry_is_refused(xp, op, invalid) -> None:
    case, error, words = invalid
    x, w = large(xp, *case.x_shape), large(xp, *case.w_shape)
    arrays = Operands(x, w, large(xp, 1, 1, 1))
    assert_refused(xp, lambda: run(op, arrays, case), error, *words)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_functions_of_a_rank_refuse_another(xp, rank) -> None:
    function = getattr(cuconv, f"conv{rank}d")
    for axes in {3, 4, 5, 6} - {rank + 2}:
        x, w = large(xp, *(9,) * axes), large(xp, *(3,) * axes)
        words = (f"conv{rank}d", f"weights of {rank + 2} axes", f"w has {axes}")
        assert_refused(xp, lambda x=x, w=w: function(x, w), ValueError, *words)


def test_bias_must_be_one_number_for_each_filter(xp) -> None:
    x, w = large(xp, *X), large(xp, *W)
    for shape in ((7,), (1,), (), (8, 1), (1, 8, 1, 1)):
        bias = large(xp, *shape)
        words = ("bias", str(shape), "(8,)")
        assert_refused(xp, lambda b=bias: cuconv.conv(x, w, b), ValueError, *words)


def test_dy_must_have_the_shape_of_the_output(xp) -> None:
    x, w = large(xp, *X), large(xp, *W)
    good = (64, 8, HUGE - 4, 7)
    for shape in (
        (64, 8, HUGE - 5, 7),
        (1, 8, HUGE - 4, 7),
        (8, HUGE - 4, 7),
        (1, 1, 1, 1),
    ):
        dy = large(xp, *shape)
        calls: list[Callable[..., Any]] = [
            lambda dy: cuconv.conv_input_grad(dy, w, X),
            lambda dy: cuconv.conv_weight_grad(dy, x, W),
            lambda dy: cuconv.conv_backward(dy, x, w),
            lambda dy: cuconv.conv_backward(dy, x, w, needs=("bias",)),
            lambda dy: cuconv.conv_backward(dy, x, w, needs=()),
        ]
        for call in calls:
            words = ("dy", str(shape), str(good))
            assert_refused(xp, lambda f=call, dy=dy: f(dy), ValueError, *words)


@pytest.mark.parametrize(
    ("size", "error"), [(-3, ValueError), (1.5, TypeError), ("6", TypeError)]
)
def test_shapes_must_be_integers_and_not_negative(xp, size, error) -> None:
    x, w, dy = large(xp, *X), large(xp, *W), large(xp, 64, 8, HUGE - 4, 7)
    call = lambda: cuconv.conv_input_grad(dy, w, (64, 6, size, 9))  # noqa: E731
    assert_refused(xp, call, error, "x", repr(size))
    call = lambda: cuconv.conv_weight_grad(dy, x, (8, size, 5, 3))  # noqa: E731
    assert_refused(xp, call, error, "w", repr(size))


@pytest.mark.parametrize("needs", ["x", "bias", ("x", "y"), ("weights",)])
def test_needs_are_the_names_of_gradients(xp, needs) -> None:
    x, w, dy = large(xp, *X), large(xp, *W), large(xp, 64, 8, HUGE - 4, 7)
    words = ("needs", repr(needs), "'bias'")
    call = lambda: cuconv.conv_backward(dy, x, w, needs=needs)  # noqa: E731
    assert_refused(xp, call, ValueError, *words)


def test_unknown_options_are_refused(xp) -> None:
    x, w = large(xp, *X), large(xp, *W)
    call = lambda: cuconv.conv(x, w, strides=2)  # noqa: E731
    assert_refused(xp, call, TypeError, "strides")
    with pytest.raises(TypeError, match="positional"):
        cuconv.conv(x, w, None, 2)


# The result array


@pytest.fixture(params=OPERATIONS)
def op(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["two axes, all different", "pointwise"])
def call(request: pytest.FixtureRequest, xp: Any, op: str) -> SimpleNamespace:
    """A good call that lacks its ``out``, with its arrays as attributes."""
    case = CASES[request.param]
    arrays = operands(case, "float32").on(xp)
    result = run(op, arrays, case)
    used = {"forward": "xw", "input_grad": ("dy", "w"), "weight_grad": ("dy", "x")}[op]

    def function(out: Any, **others: Any) -> Any:
        return run(op, arrays._replace(**others), case, out=out)

    return SimpleNamespace(
        run=function, arrays=arrays, shape=result.shape, used=used, xp=xp
    )


def test_out_that_will_not_do(call) -> None:
    """Of another shape or type, no array, of overlapping elements, or read-only."""
    xp, shape = call.xp, call.shape
    wrong: list[tuple[Any, type[Exception], str]] = [
        *((xp.full(s, 77, "f4"), ValueError, str(s)) for s in ((*shape, 1), shape[1:])),
        *((xp.full(shape, 77, t), TypeError, t) for t in ("float64", "int32")),
        *((o, TypeError, type(o).__name__) for o in ([1.0], 3.0, memoryview(b"12"))),
        (large(xp, *shape), ValueError, "overlap"),
    ]
    if xp is np:
        wrong.append((np.full(shape, 77, "f4"), ValueError, "read-only"))
        wrong[-1][0].flags.writeable = False
    for out, error, words in wrong:
        assert_refused(xp, lambda out=out: call.run(out), error, "out", words)
        if hasattr(out, "dtype") and words != "overlap":
            assert (to_host(out) == 77).all()


def test_out_in_foreign_byte_order_is_the_wrong_type() -> None:
    x, w = np.ones((1, 1, 3), np.float32), np.ones((1, 1, 2), np.float32)
    out = np.zeros((1, 1, 2), np.dtype(np.float32).newbyteorder())
    with pytest.raises(TypeError, match="out has type"):
        cuconv.conv(x, w, out=out)


def test_out_whose_rows_overlap() -> None:
    """No zero stride, and yet two cells in one place."""
    x, w = np.ones((1, 1, 4, 4), np.float32), np.ones((1, 1, 1, 1), np.float32)
    out = np.lib.stride_tricks.as_strided(
        np.zeros(7, np.float32), (1, 1, 4, 4), (4,) * 4
    )
    with pytest.raises(ValueError, match="overlap"):
        cuconv.conv(x, w, out=out)


def test_out_that_overlaps_an_input(call) -> None:
    """The result placed over each input in turn, from its first cell and its last."""
    checked = 0
    for name in call.used:
        array = getattr(call.arrays, name)
        cells = int(np.prod(call.shape))
        for start in (0, array.size - 1):
            pool = call.xp.zeros(start + cells + array.size, dtype=np.float32)
            inside = pool[: array.size].reshape(array.shape)
            inside[...] = array
            out = pool[start : start + cells].reshape(call.shape)
            before = to_host(pool).copy()
            again = partial(call.run, out, **{name: inside})
            assert_refused(
                call.xp, again, ValueError, f"out may share memory with {name}"
            )
            assert (to_host(pool) == before).all()
            checked += 1
    assert checked == 4


def test_out_between_the_cells_of_an_input() -> None:
    """Interleaved memory is shared by nobody; NumPy can tell."""
    pool = np.zeros((2, 3, 8, 2), dtype=np.float32)
    x, out = pool[..., 0], pool[..., 1]
    x[...] = integers(x.shape)
    w = integers((3, 3, 1)).astype(np.float32)
    wanted = cuconv.conv(x, w)
    assert (cuconv.conv(x, w, out=out) == wanted).all()


# Modules, devices and types


def _other(array: Any) -> Any:
    """The same array in the other module."""
    return np.zeros(array.shape, array.dtype)


def test_host_and_device_arrays_are_not_mixed(xp) -> None:
    if xp is np:
        pytest.skip("takes both modules")
    x, w, dy = operands(CASES["pointwise"], "float32").on(xp)
    bias, out = xp.zeros(2, np.float32), xp.zeros(dy.shape, np.float32)
    good = {"x": x, "w": w, "bias": bias, "out": out}

    def forward(x: Any, w: Any, bias: Any, out: Any) -> Any:
        return cuconv.conv(x, w, bias, out=out)

    forward(**good)
    for name, array in good.items():
        bad = {**good, name: _other(array)}
        words = ("mixed", f"{name} in NumPy", "in CuPy")
        assert_refused(xp, partial(forward, **bad), TypeError, *words)
        host = {other: _other(array) for other, array in good.items()}
        words = ("mixed", "in NumPy", f"{name} in CuPy")
        bad = {**host, name: array}
        assert_refused(xp, partial(forward, **bad), TypeError, *words)
    calls = [
        lambda: cuconv.conv_input_grad(_other(dy), w, x.shape),
        lambda: cuconv.conv_weight_grad(dy, _other(x), w.shape),
        lambda: cuconv.conv_backward(dy, x, _other(w)),
        lambda: cuconv.conv_backward(_other(dy), x, w, needs=()),
    ]
    for call in calls:
        assert_refused(xp, call, TypeError, "mixed", "in NumPy", "in CuPy")


def test_what_is_no_array_is_named(xp) -> None:
    x, w, _ = operands(CASES["pointwise"], "float32").on(xp)
    for thing in ([1.0, 2.0], 3.0, "x", object(), range(3)):
        kind = type(thing).__name__
        calls = {
            "x": partial(cuconv.conv, thing, w),
            "w": partial(cuconv.conv, x, thing),
            "bias": partial(cuconv.conv, x, w, thing),
            "dy": partial(cuconv.conv_backward, thing, x, w),
        }
        for name, call in calls.items():
            assert_refused(xp, call, TypeError, f"{name} must be", kind)


def test_none_is_no_array(xp) -> None:
    x, w, dy = operands(CASES["pointwise"], "float32").on(xp)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("x", partial(cuconv.conv, None, w)),
        ("w", partial(cuconv.conv, x, None)),
        ("dy", partial(cuconv.conv_backward, None, x, w)),
        ("x", partial(cuconv.conv_weight_grad, dy, None, (2, 4, 1, 1))),
    ]
    for name, call in calls:
        assert_refused(xp, call, TypeError, f"{name} must be", "NoneType")


def test_masked_arrays_are_refused() -> None:
    x, w = np.ma.ones((1, 1, 3)), np.ones((1, 1, 2))
    with pytest.raises(TypeError, match=r"x must be.*MaskedArray"):
        cuconv.conv(x, w)


@pytest.mark.parametrize(
    "dtype", ["O", "U3", "S3", "M8[s]", "m8[s]", "V4", "longdouble", [("a", "f4")]]
)
def test_types_without_arithmetic_are_refused(dtype) -> None:
    """By NumPy's arrays: CuPy cannot hold these."""
    good, bad = np.ones((1, 1, 3)), np.zeros((1, 1, 3), dtype=dtype)
    assert_refused(np, lambda: cuconv.conv(bad, good), TypeError, "x has type")
    assert_refused(np, lambda: cuconv.conv(good, bad), TypeError, "w has type")
    call = lambda: cuconv.conv(good, good, bad.reshape(-1)[:1])  # noqa: E731
    assert_refused(np, call, TypeError, "bias has type")
    call = lambda: cuconv.conv_backward(bad, good, good)  # noqa: E731
    assert_refused(np, call, (TypeError, ValueError), "dy has")


@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_types_with_nothing_in_common(xp, dtype) -> None:
    """Versions of ml_dtypes before 0.7 have no type for bfloat16 with these."""
    try:
        common = np.result_type(dtype, np.dtype("bfloat16"))
    except TypeError:
        x, w = large(xp, *X, dtype=dtype), large(xp, *W, dtype="bfloat16")
        words = (dtype, "bfloat16", "common")
        assert_refused(xp, lambda: cuconv.conv(x, w), TypeError, *words)
    else:
        x, w = (xp.full((1, 2, 3), 2, each) for each in (dtype, "bfloat16"))
        testing.assert_equal(cuconv.conv(x, w), np.full((1, 1, 1), 24), dtype=common)


class _Somewhere:
    """A stand-in for an array on one of several devices."""

    def __init__(self, device: int) -> None:
        self.device = SimpleNamespace(id=device)


def test_arrays_on_different_devices(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=_Somewhere))
    near, far = _Somewhere(0), _Somewhere(3)
    assert array_rules.module_of({"x": near, "w": near}).ndarray is _Somewhere
    with pytest.raises(ValueError, match="x on device 0, w on device 3"):
        array_rules.module_of({"x": near, "w": far})
    with pytest.raises(ValueError, match="argument 1 on device 3"):
        cuconv.array_module(near, far)


def test_array_module_names_its_arguments() -> None:
    assert cuconv.array_module(np.zeros(1), None, np.zeros(2)) is np
    with pytest.raises(TypeError, match="argument 1 must be a NumPy or CuPy array"):
        cuconv.array_module(np.zeros(1), [2])


# Words for the memory limit


LIMITS = {
    "64 MiB": 64 * 2**20,
    "64MiB": 64 * 2**20,
    " 1.5 kib ": 1536,
    "2GB": 2 * 10**9,
    "0.5 TiB": 2**39,
    "3 kB": 3000,
    "12 b": 12,
    "0 B": 0,
    "64": 64,
    2**40: 2**40,
    np.int64(7): 7,
    np.uint8(200): 200,
}


@pytest.mark.parametrize("word", LIMITS)
def test_a_limit_in_words(word) -> None:
    assert parse_memory_limit(word) == LIMITS[word]
    assert type(parse_memory_limit(word)) is int


@pytest.mark.parametrize(
    ("limit", "error"),
    [
        *((bad, ValueError) for bad in ("", "MiB", "64 MB/s", "-1 KiB", "1e3 B")),
        *((bad, TypeError) for bad in (True, 1.0, None, b"64 MiB", [64])),
    ],
)
def test_a_limit_that_is_none(limit, error) -> None:
    with pytest.raises(error, match="memory_limit must be bytes"):
        parse_memory_limit(limit)


def test_an_error_in_the_second_gradient_comes_before_the_first_runs(xp) -> None:
    """conv_backward plans everything before it computes anything."""
    x, w, dy = operands(CASES["two axes, all different"], "float32").on(xp)
    options = CASES["two axes, all different"].options
    wide, turned = x.astype(np.float64), x.astype(np.complex64)
    calls = (
        lambda: cuconv.conv_backward(dy, wide, w, dtype=np.int32, **options),
        lambda: cuconv.conv_backward(dy, turned, w, dtype=np.float32, **options),
    )
    for call in calls:
        assert_refused(xp, call, TypeError, "cannot be cast")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cuconv.conv2d(np.ones((5, 9, 9)), np.ones((7, 3, 3))),
            r"w has 3: give both a channel axis, x\[:, None\], w\[:, None\]",
        ),
        (
            lambda: cuconv.conv(np.ones((5, 9, 9)), np.ones((7, 3, 3))),
            r"images \(T, H, W\) and kernels .* x\[:, None\], w\[:, None\]",
        ),
        (
            lambda: cuconv.conv(
                np.ones((1, 9, 9, 5)), np.ones((4, 5, 3, 3)), layout="NHWC"
            ),
            r"w is \(\*kernel, C / groups, K\), and here its second axis has 5",
        ),
        (
            lambda: cuconv.conv_input_grad(
                np.ones((1, 4, 6, 6)), np.ones((4, 3, 3, 3)), (1, 3, 8)
            ),
            r"x_shape has 3 axes: \(1, 3, 8\), and dy has 4",
        ),
        (
            lambda: cuconv.conv2d(np.ma.ones((1, 3, 8, 8)), np.ones((4, 3, 3, 3))),
            "MaskedArray, whose method filled makes one",
        ),
    ],
)
def test_the_likely_mistake_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
