"""Transposed convolution and its gradients, exactly, on both array modules."""

import itertools
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import transposed_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    COMPLEX,
    EACH_TYPE,
    HALVES,
    LAYOUTS,
    PLACES,
    STRICT,
    Case,
    assert_refused,
    captured,
    cupy_slowly,
    device_of,
    integers,
    large,
    peak,
    plan_of,
    replay,
    smallest_limit,
    to_device,
    to_host,
)

import cuconv
from cuconv import testing
from cuconv.geometry import ConvGeometry

CALLS = ("forward", "input_grad", "weight_grad")
PLANNED = ("transpose", "transpose_input_grad", "transpose_weight_grad")

# Every extent differs from every other of its case, and each case has its reason.
CASES = {
    "one axis": Case((2, 3, 5), (3, 4, 2), {"stride": 4, "dilation": 3}),
    "two axes, all different": Case(
        (3, 2, 5, 4),
        (2, 5, 3, 2),
        {
            "stride": (2, 3),
            "padding": ((1, 2), (0, 3)),
            "dilation": (2, 1),
            "output_padding": (1, 2),
        },
    ),
    "three axes, uneven pads": Case(
        (2, 2, 4, 2, 3),
        (2, 3, 1, 2, 3),
        {
            "stride": (1, 3, 2),
            "padding": ((0, 1), (2, 0), (-1, 3)),
            "dilation": (3, 2, 1),
            "output_padding": (2, 1, 0),
        },
    ),
    "output_padding of strides, less than dilation": Case(
        (2, 3, 4, 5),
        (3, 2, 3, 2),
        {"stride": (2, 1), "dilation": (7, 4), "output_padding": (5, 3), "padding": 2},
    ),
    "groups with stride": Case(
        (2, 6, 4, 3), (6, 2, 2, 3), {"groups": 3, "stride": (3, 2), "padding": (1, 2)}
    ),
    "depthwise": Case((2, 4, 6, 5), (4, 1, 3, 2), {"groups": 4, "padding": (1, 0)}),
    "depthwise with stride and a multiplier": Case(
        (2, 3, 4), (3, 2, 5), {"groups": 3, "stride": 3, "output_padding": 2}
    ),
    "pointwise": Case((3, 4, 5, 6), (4, 2, 1, 1), {}),
    "pointwise in groups": Case((2, 6, 7), (6, 3, 1), {"groups": 2}),
    "one tap with a stride": Case((2, 3, 4, 2), (3, 5, 1, 1), {"stride": (3, 2)}),
    "unit stride": Case((2, 3, 5, 6), (3, 4, 2, 3), {"padding": ((0, 1), (2, 0))}),
    "cells are added": Case((2, 2, 4, 3), (2, 3, 2, 3), {"padding": ((-2, -1), -3)}),
    "all but the middle is left out": Case((2, 2, 3), (2, 3, 9), {"padding": 5}),
    "same": Case((1, 2, 4, 3), (2, 3, 4, 2), {"padding": "same", "stride": (2, 3)}),
    "same_lower of a size": Case(
        (1, 2, 4, 3),
        (2, 3, 5, 2),
        {"padding": "same_lower", "stride": (3, 2), "output_size": (10, 5)},
    ),
    "same of any size": Case(
        (1, 2, 4, 3),
        (2, 3, 4, 2),
        {"padding": "same", "stride": (2, 3), "output_size": (3, 10)},
    ),
    "same_lower of any size, with output_padding": Case(
        (1, 2, 4, 3),
        (2, 3, 4, 5),
        {
            "padding": "same_lower",
            "stride": (3, 2),
            "output_size": (8, 6),
            "output_padding": (1, 0),
        },
    ),
    "full": Case(
        (2, 2, 6, 7),
        (2, 3, 3, 2),
        {"padding": "full", "stride": (2, 1), "dilation": (1, 3)},
    ),
    "full of a size": Case(
        (2, 2, 5),
        (2, 3, 3),
        {"padding": "full", "stride": 3, "output_size": (12,)},
    ),
    "valid": Case((2, 2, 4), (2, 3, 2), {"padding": "valid", "stride": 3}),
    "a size in place of output_padding": Case(
        (2, 2, 4, 3),
        (2, 3, 3, 2),
        {"stride": (2, 3), "padding": (1, 0), "output_size": (8, 10)},
    ),
    "no batch axis": Case((3, 4, 5), (3, 2, 2, 3), {"stride": (1, 2)}),
}


class Operands(NamedTuple):
    """The arrays of one transposed convolution, of one module."""

    x: Any
    w: Any
    bias: Any
    dy: Any

    def on(self, xp: Any) -> "Operands":
        return Operands(*(to_device(xp, array) for array in self))


def each_in(layout: str, cases: Iterable[Case] = CASES.values()) -> list[Case]:
    return [case.in_layout(layout) for case in cases]


def filters(case: Case) -> int:
    """Channels of the result."""
    each = case.w_shape[1 if case.layout == "channels_first" else -2]
    return each * case.options.get("groups", 1)


def operands(case: Case, dtype: Any = "float64", seed: int = 0) -> Operands:
    geometry = ConvGeometry.of_transposed(case.x_shape, case.w_shape, **case.options)
    shapes = case.x_shape, case.w_shape, (filters(case),), geometry.x_shape
    return Operands(*(integers(s, dtype, seed + i) for i, s in enumerate(shapes)))


def reference(call: str, arrays: Operands, case: Case) -> np.ndarray:
    """What the independent loops say; the forward call has a bias."""
    x, w, bias, dy = arrays
    if call == "forward":
        return testing.conv_transpose_reference(x, w, bias, **case.options)
    if call == "input_grad":
        gradient = testing.conv_transpose_input_grad_reference
        return gradient(dy, w, case.x_shape, **case.options)
    gradient = testing.conv_transpose_weight_grad_reference
    return gradient(dy, x, case.w_shape, **case.options)


@cache
def known(call: str, title: str, layout: str, dtype: str) -> np.ndarray:
    """The reference of a case, once for all types whose small integers are the same."""
    case = CASES[title].in_layout(layout)
    return reference(call, operands(case, dtype), case)


def expect_known(call: str, title: str, layout: str, dtype: Any, actual: Any) -> None:
    same = {"b": "bool", "u": "uint8", "c": "complex128"}
    wanted = known(call, title, layout, same.get(np.dtype(dtype).kind, "int64"))
    testing.assert_equal(actual, wanted.astype(dtype), dtype=dtype)


def run(call: str, arrays: Operands, case: Case, **more: Any) -> Any:
    """What the library says; strictly, unless ``more`` names another precision."""
    x, w, bias, dy = arrays
    options = {"precision": "strict", **case.options, **more}
    if call == "forward":
        return cuconv.conv_transpose(x, w, bias, **options)
    if call == "input_grad":
        return cuconv.conv_transpose_input_grad(dy, w, case.x_shape, **options)
    return cuconv.conv_transpose_weight_grad(dy, x, case.w_shape, **options)


def expect(call: str, arrays: Operands, case: Case, dtype: Any, actual: Any) -> None:
    wanted = reference(call, arrays, case).astype(dtype)
    testing.assert_equal(actual, wanted, dtype=dtype)


@pytest.mark.parametrize(("dtype", "layout"), EACH_TYPE)
@pytest.mark.parametrize("call", CALLS)
def test_equals_the_loops_in_every_type(xp, call, dtype, layout) -> None:
    for title, case in zip(CASES, each_in(layout), strict=True):
        arrays = operands(case, dtype).on(xp)
        expect_known(call, title, layout, dtype, run(call, arrays, case))
    assert len(CASES) == 22


@pytest.mark.parametrize("call", CALLS)
@given(case=transposed_cases(), dtype=st.sampled_from(["float32", "complex64"]))
def test_equals_the_loops_for_any_geometry(xp, call, case, dtype) -> None:
    arrays = operands(case, dtype)
    expect(call, arrays, case, np.dtype(dtype), run(call, arrays.on(xp), case))


@settings(max_examples=25)
@given(case=transposed_cases(), dtype=st.sampled_from(["float64", "complex128"]))
def test_it_is_the_adjoint_of_the_convolution_with_the_same_weights(
    xp, case, dtype
) -> None:
    """⟨conv(y, w), x⟩ = ⟨y, conv_transpose(x, w̄)⟩, less windows over output_padding."""
    x, w, _, dy = operands(case, dtype)
    w = to_device(xp, w)
    ahead = {"precision": "strict", **case.options}
    more = ahead.pop("output_padding")
    testing.check_adjoint(
        lambda y: cuconv.conv(y, w, **ahead)[tuple(slice(n) for n in x.shape)],
        lambda x: cuconv.conv_transpose(x, w.conj(), **ahead, output_padding=more),
        dy.shape,
        x.shape,
        dtype=dtype,
        xp=xp,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_causal_is_that_of_the_convolution_that_leads_back(xp, layout) -> None:
    options = {"padding": "causal", "stride": 2, "dilation": 2}
    for more in ({}, {"output_size": 7}, {"output_size": 3}):
        case = Case((2, 3, 4), (3, 2, 3), {**options, **more}).in_layout(layout)
        arrays = operands(case)
        for call in CALLS:
            got = run(call, arrays.on(xp), case)
            expect(call, arrays, case, np.float64, got)
    cell = xp.asarray([[[0.0, 1.0, 0.0]]])
    y = to_host(cuconv.conv_transpose(cell, xp.ones((1, 1, 2)), **options))
    assert y.tolist() == [[[1, 0, 1, 0, 0, 0]]]


def test_full_padding_leaves_what_every_tap_reaches(xp) -> None:
    """It is the adjoint of a full convolution: a valid one with flipped weights."""
    x, w = xp.asarray(integers((2, 3, 5, 7))), xp.asarray(integers((3, 4, 2, 3)))
    y = cuconv.conv_transpose(x, w, padding="full")
    flipped = xp.ascontiguousarray(w.swapaxes(0, 1)[..., ::-1, ::-1])
    testing.assert_equal(y, to_host(cuconv.conv(x, flipped)))
    words = "has -1 elements on spatial axis 0: .* less padding 3 and 3"
    with pytest.raises(ValueError, match=words):
        cuconv.conv_transpose(xp.ones((1, 1, 2)), xp.ones((1, 1, 4)), padding="full")


@cupy_slowly
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_the_numerical_ones(xp, layout, dtype) -> None:
    for name in ("one axis", "groups with stride", "no batch axis", "same"):
        case = CASES[name].in_layout(layout)
        x, w, bias, dy = (a / 4 for a in operands(case, dtype).on(xp))

        def loss(x: Any, w: Any, b: Any, case: Case = case, dy: Any = dy) -> Any:
            y = cuconv.conv_transpose(x, w, b, **case.options)
            return (y * dy.conj()).real.sum()

        got = cuconv.conv_transpose_backward(dy, x, w, **case.options)
        wanted = cuconv.ConvGradients(
            testing.numerical_gradient(partial(loss, w=w, b=bias), x),
            testing.numerical_gradient(partial(loss, x, b=bias), w),
            testing.numerical_gradient(partial(loss, x, w), bias),
        )
        for mine, numerical in zip(got, wanted, strict=True):
            testing.assert_close(mine, numerical, rtol=1e-7, atol=1e-7, dtype=dtype)


@pytest.mark.parametrize("needs", [(), ("x",), ("bias", "w"), {"x", "bias"}])
def test_backward_computes_what_is_needed_alone(xp, choices, needs) -> None:
    case = CASES["two axes, all different"]
    arrays = operands(case)
    x, w, _, dy = arrays.on(xp)
    options = {"precision": "strict", **case.options}
    got = cuconv.conv_transpose_backward(dy, x, w, needs=needs, **options)
    wanted = {
        "x": reference("input_grad", arrays, case),
        "w": reference("weight_grad", arrays, case),
        "bias": arrays.dy.sum(axis=(0, 2, 3)),
    }
    for name, array in wanted.items():
        assert (getattr(got, name) is not None) == (name in needs)
        if name in needs:
            testing.assert_equal(getattr(got, name), array)
    ran = {"x": "transpose_input_grad", "w": "transpose_weight_grad"}
    assert [c.problem.call for c in choices] == [ran[n] for n in "xw" if n in needs]


# Strategies, cuts and memory


@pytest.mark.parametrize("name", [*STRICT, "implicit_gemm"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
def test_every_strategy_adds_the_bias(xp, name, dtype) -> None:
    """Wherever it runs a problem at all: with strides, and over x."""
    ran = set()
    for layout, (title, case) in itertools.product(LAYOUTS, CASES.items()):
        written = case.in_layout(layout)
        options = {"strategy": name, "bias": True, "device": device_of(xp)}
        plan = plan_of("transpose", written, dtype, **options)
        if plan is not None:
            x, w, bias, _ = operands(written, dtype).on(xp)
            expect_known("forward", title, layout, dtype, plan(x, w, bias))
            ran.add(title)
    if xp is np and name in ("implicit_gemm", "depthwise"):
        return  # a CUDA kernel, and loops for few types
    least = {"im2col": 18, "pointwise": 3, "implicit_gemm": 18}
    assert len(ran) >= least.get(name, 1)


@pytest.mark.parametrize("name", ["winograd", "fft"])
def test_rounded_strategies_run_over_x(name) -> None:
    case = Case((1, 9, 9, 8), (9, 8, 3, 2), {"padding": 1})
    if name == "fft":
        case = Case((1, 2, 9, 8), (2, 3, 6, 5), {"padding": 1})
    arrays = operands(case, "float32")
    actual = run("forward", arrays, case, strategy=name, precision="fast")
    wanted = reference("forward", arrays, case)
    testing.assert_close(actual, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    plan = plan_of("transpose", case, strategy=name, precision="fast")
    assert f"{name}" in str(plan)
    assert " over x" in str(plan)


@pytest.mark.parametrize("call", CALLS)
@settings(max_examples=15)
@given(
    case=transposed_cases(),
    dtype=st.sampled_from(["float32", "float16", "int8", "complex64"]),
    extra=st.sampled_from([0, 0, 1024, 2**16]),
    places=st.tuples(*[st.sampled_from(sorted(PLACES))] * 3),
)
def test_the_peak_is_within_the_limit(xp, call, case, dtype, extra, places) -> None:
    """Measured; wherever the arrays lie, and with the bias."""
    plain = operands(case, dtype)
    x, w, dy = (PLACES[place] for place in places)
    bias = PLACES["_spread"](xp, plain.bias)
    arrays = Operands(x(xp, plain.x), w(xp, plain.w), bias, dy(xp, plain.dy))
    bound = partial(run, call, arrays, case)
    limit = smallest_limit(bound) + extra
    assert peak(xp, partial(bound, memory_limit=limit), limit) <= limit


def test_the_sum_for_the_bias_is_within_the_limit(xp) -> None:
    """As many sums as the result has channels, not x."""
    x, w = xp.ones((1, 1, 3)), xp.ones((1, 3000, 2))
    dy = xp.ones((1, 3000, 4))
    call = partial(cuconv.conv_transpose_backward, dy, x, w, needs=("bias",))
    smallest = smallest_limit(call)
    assert smallest >= 3000 * 8
    assert peak(xp, partial(call, memory_limit=smallest), smallest) <= smallest


# Types


def test_the_bias_takes_part_in_the_type(xp) -> None:
    x, w = xp.ones((1, 1, 2), "float32"), xp.ones((1, 1, 2), "float32")
    wide = cuconv.conv_transpose(x, w, xp.ones(1, "float64"))
    assert wide.dtype == np.float64
    narrow = cuconv.conv_transpose(x, w, xp.ones(1, "float64"), dtype="float32")
    assert narrow.dtype == np.float32
    with pytest.raises(TypeError, match="complex64 cannot be cast to dtype float32"):
        cuconv.conv_transpose(x, w, xp.ones(1, "complex64"), dtype="float32")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_rounded_once_after_the_bias(xp, dtype, stride) -> None:
    """2048 ones and two more: a sum that stops at 2048 where it is rounded before."""
    many = {"float16": 2048, "bfloat16": 256}[dtype]
    x, w = xp.ones((1, many + 1, 2), dtype), xp.ones((many + 1, 1, 1), dtype)
    y = cuconv.conv_transpose(x, w, xp.ones(1, dtype), stride=stride)
    wanted = np.ones((1, 1, 1 + stride))
    wanted[..., ::stride] = many + 2
    testing.assert_equal(y, wanted, dtype=dtype)


@pytest.mark.parametrize("dtype", COMPLEX)
def test_complex_weights_are_not_conjugated(xp, dtype) -> None:
    x, w = xp.full((1, 1, 1), 2 + 1j, dtype), xp.full((1, 1, 1), 3 - 1j, dtype)
    dy = xp.full((1, 1, 1), 1j, dtype)
    for stride in (1, 2):  # over x, and as an input gradient
        y = cuconv.conv_transpose(x, w, stride=stride)
        assert to_host(y).item() == (2 + 1j) * (3 - 1j)
        dx, dw, _ = cuconv.conv_transpose_backward(dy, x, w, stride=stride)
        assert to_host(dx).item() == 1j * (3 + 1j)
        assert to_host(dw).item() == 1j * (2 - 1j)


# Plans


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", PLANNED)
def test_a_plan_computes_what_the_function_does(xp, op, layout) -> None:
    call = dict(zip(PLANNED, CALLS, strict=True))[op]
    for title, case in zip(CASES, each_in(layout), strict=True):
        check = partial(expect_known, call, title, layout, np.float32)
        arrays = operands(case, "float32")
        x, w, bias, dy = arrays.on(xp)
        plan = plan_of(op, case, bias=True, device=device_of(xp))
        given = {"forward": (x, w, bias), "input_grad": (dy, w)}.get(call, (dy, x))
        check(plan(*given))
        out = xp.full(plan.result_shape[::-1], 77, dtype="float32").T
        check(plan(*given, out=out))
        if call != "weight_grad":
            prepared = plan.prepare(w)
            check(prepared(given[0], *given[2:]))


def test_a_plan_speaks_of_the_callers_arrays() -> None:
    plan = cuconv.plan_conv(
        *((2, 6, 7, 5), (6, 4, 3, 2)),
        op="transpose",
        stride=(3, 2),
        padding=((1, 0), 2),
        output_padding=(2, 0),
        device="cpu",
    )
    words = str(plan)
    for part in (
        "the transposed convolution, float32, numpy",
        "x             (2, 6, 7, 5), w (6, 4, 3, 2), y (2, 4, 22, 6)",
        "7 elements, 3 taps, stride 3, dilation 1, padding 1 and 0, 22 out",
        "winograd: it only runs the forward pass",
    ):
        assert part in words
    assert plan.flops == 2 * 2 * 6 * 7 * 5 * 4 * 6
    names = {
        "transpose": "the transposed convolution",
        "transpose_input_grad": "the gradient of a transposed convolution's input",
        "transpose_weight_grad": "the gradient of a transposed convolution's weights",
    }
    for op, name in names.items():
        with pytest.raises(cuconv.MemoryLimitError, match=name):
            cuconv.plan_conv((2, 6, 7), (6, 4, 3), op=op, stride=2, memory_limit=9)


def test_output_sizes_are_for_transposed_plans_alone() -> None:
    for more in ({"output_padding": 1}, {"output_size": 9}):
        with pytest.raises(ValueError, match="are for op='transpose'"):
            cuconv.plan_conv((1, 1, 5), (1, 1, 2), stride=2, **more)
    with pytest.raises(ValueError, match="'transpose_weight_grad'"):
        cuconv.plan_conv((1, 1, 5), (1, 1, 2), op="transposed")


def test_calls_that_differ_in_the_size_alone_are_not_confused() -> None:
    x, w = np.ones((1, 1, 3)), np.ones((1, 1, 2))
    lengths = [
        cuconv.conv_transpose(x, w, stride=3, **more).shape[-1]
        for more in ({}, {"output_padding": 1}, {"output_padding": 2}, {})
        for _ in range(2)
    ]
    assert lengths == [8, 8, 9, 9, 10, 10, 8, 8]
    assert cuconv.conv_transpose(x, w, stride=3, output_size=9).shape[-1] == 9


def test_the_fastest_is_remembered_for_each_direction() -> None:
    """A race may not confuse the gradient with the transposed call."""
    x, w = integers((1, 3, 5), "complex64"), integers((3, 2, 3), "complex64", seed=1)
    options = {"stride": 2, "strategy": "benchmark"}
    y = cuconv.conv_transpose(x, w, **options)
    dx = cuconv.conv_input_grad(x, w, y.shape, **options)
    testing.assert_equal(y, testing.conv_transpose_reference(x, w, stride=2))
    assert not np.array_equal(y, dx)


# Out, empties, capture


@pytest.mark.parametrize("call", CALLS)
def test_out_takes_the_result_wherever_it_lies(xp, call) -> None:
    for title, dtype in itertools.product(CASES, ("float32", "complex64")):
        case = CASES[title]
        arrays = operands(case, dtype)
        group = "complex128" if dtype == "complex64" else "int64"
        wanted = known(call, title, "channels_first", group)
        spaced = xp.full([2 * n for n in wanted.shape], 77, dtype=dtype)
        spaced = spaced[tuple(slice(1, None, 2) for _ in wanted.shape)]
        for out in (xp.full(wanted.shape, 77, dtype=dtype), spaced):
            assert run(call, arrays.on(xp), case, out=out) is out
            testing.assert_equal(out, wanted, dtype=dtype)


EMPTY = {
    "no image": Case((0, 2, 3, 4), (2, 3, 2, 2), {"stride": 2}),
    "no channel": Case((2, 0, 3, 4), (0, 3, 2, 2), {"stride": (1, 2)}),
    "no filter": Case((2, 2, 3, 4), (2, 0, 2, 2), {}),
    "no cell": Case((2, 2, 0, 4), (2, 3, 5, 2), {"stride": (3, 1)}),
    "nothing left": Case((2, 2, 3), (2, 3, 3), {"padding": ((2, 3),)}),
    "one tap, nothing left": Case((2, 2, 1), (2, 1, 1), {"padding": ((0, 1),)}),
    "depthwise, no cell": Case((2, 2, 0), (2, 1, 2), {"groups": 2, "stride": 2}),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("call", CALLS)
def test_sums_over_nothing_are_zero_and_the_bias(xp, call, name) -> None:
    case = EMPTY[name]
    arrays = operands(case, "float32")
    expect(call, arrays, case, np.float32, run(call, arrays.on(xp), case))


@pytest.mark.parametrize("xp", ["cupy"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("implicit_gemm", "two axes, all different"),
        ("implicit_gemm", "output_padding of strides, less than dilation"),
        ("implicit_gemm", "unit stride"),
        ("depthwise", "depthwise with stride and a multiplier"),
        ("auto", "one tap with a stride"),
    ],
)
def test_a_graph_computes_what_is_in_its_buffers(xp, call, dtype, name, title) -> None:
    case = CASES[title]
    arrays = operands(case, dtype).on(xp)
    out = xp.full(reference(call, operands(case), case).shape, 77, dtype=dtype)
    run(call, arrays, case, out=out, strategy=name)
    out[...] = 78
    with captured(xp) as graphs:
        assert run(call, arrays, case, out=out, strategy=name) is out
    assert np.all(to_host(out) == 78), "it ran while it was recorded"
    for seed in (5, 6):
        fresh = operands(case, dtype, seed)
        replay(xp, graphs[0], arrays, fresh)
        testing.assert_equal(out, reference(call, fresh, case))


@pytest.mark.parametrize("xp", ["cupy"], indirect=True)
def test_backward_is_refused_in_a_capture(xp) -> None:
    x, w, dy = xp.ones((1, 1, 3)), xp.ones((1, 1, 2)), xp.ones((1, 1, 4))
    words = "conv_transpose_backward allocates its results"
    with captured(xp), pytest.raises(ValueError, match=words):
        cuconv.conv_transpose_backward(dy, x, w)


# What is refused

X, W = (64, 6, 2**20, 9), (6, 8, 5, 3)


def bad(*words: str, x: Any = X, w: Any = W, **options: Any) -> tuple[Any, ...]:
    """Shapes and options that are refused, and what the message says."""
    return x, w, options, words


SHAPES = {
    "channels": bad("x has 5 and w expects 6", x=(64, 5, 2**20, 9)),
    "groups": bad("groups 4 do not divide the 6 channels of x", groups=4),
    "no groups": bad("groups", "at least 1", "0", groups=0),
    "stride": bad("stride", "axis 1", "0", stride=(2, 0)),
    "dilation": bad("dilation", "axis 0", "-1", dilation=-1),
    "kernel": bad("kernel_size", "axis 1", "0", w=(6, 8, 5, 0)),
    "axes of w": bad("w has 2 axes", w=(6, 8)),
    "axes of x": bad("x has 2 axes", x=(64, 6)),
    "output_padding": bad(
        "output_padding",
        "axis 0 is 2",
        "stride 2 or dilation 1",
        stride=2,
        dilation=(1, 4),
        output_padding=(2, 3),
    ),
    "output_padding of the dilation": bad(
        "output_padding",
        "axis 1 is 4",
        "stride 2 or dilation 4",
        stride=2,
        dilation=(1, 4),
        output_padding=(1, 4),
    ),
    "negative output_padding": bad("output_padding", "axis 0 is -1", output_padding=-1),
    "values of output_padding": bad(
        "output_padding has 3 values for 2", stride=2, output_padding=(1, 1, 1)
    ),
    "output_size too small": bad(
        "output_size",
        "axis 0 is 16",
        "17 … 19",
        x=(2, 6, 5, 9),
        stride=3,
        output_size=(16, 26),
    ),
    "output_size too large": bad(
        "output_size",
        "axis 1 is 26",
        "23 … 25",
        x=(2, 6, 5, 9),
        stride=2,
        dilation=(1, 3),
        output_size=(14, 26),
    ),
    "values of output_size": bad(
        "output_size has 3 values for 2", output_size=(9, 9, 9)
    ),
    "output_size and output_padding": bad(
        "output_padding 1 and output_size 9",
        "give one",
        stride=2,
        output_padding=1,
        output_size=9,
    ),
    "same and output_padding": bad(
        "output_padding (0, 1) and padding 'same'",
        "give one",
        stride=2,
        output_padding=(0, 1),
        padding="same",
    ),
    "same and a size that it cannot have": bad(
        "output_size",
        "axis 1 is 21",
        "0 … 20",
        x=(2, 6, 5, 9),
        stride=2,
        output_size=(10, 21),
        padding="same_lower",
    ),
    "a word": bad("padding", "'half'", padding="half"),
    "padding": bad(
        "result has -1 elements on spatial axis 1",
        "reach 11",
        "3 and 9",
        x=(2, 6, 5, 9),
        padding=((0, 0), (3, 9)),
    ),
    "layout": bad("'NCL'", "1 spatial", "has 2", layout="NCL"),
    "half an output_padding": bad("output_padding", "0.5", output_padding=0.5),
    "a size in words": bad("output_size", "'4'", output_size="4"),
    "a size of fractions": bad("output_size", "4.5", output_size=[4.5]),
    "an unknown option": bad("no option 'strides'", strides=2),
    "strategy": bad("the transposed convolution", strategy="pointwise"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_bad_options_are_named_before_anything_is_allocated(xp, name) -> None:
    x_shape, w_shape, options, words = SHAPES[name]
    x, w = large(xp, *x_shape), large(xp, *w_shape)
    dy = large(xp, 64, 8, 2**20, 11)
    calls: list[Callable[[], Any]] = [
        lambda: cuconv.conv_transpose(x, w, **options),
        lambda: cuconv.conv_transpose_input_grad(dy, w, x_shape, **options),
        lambda: cuconv.conv_transpose_weight_grad(dy, x, w_shape, **options),
        lambda: cuconv.conv_transpose_backward(dy, x, w, **options),
    ]
    for call in calls[:1] if name == "strategy" else calls:
        assert_refused(xp, call, (ValueError, TypeError), *words)


def test_arrays_are_named_as_the_caller_has_them(xp) -> None:
    x, w, dy = large(xp, *X), large(xp, *W), large(xp, 64, 8, 2**20 + 4, 11)
    bias = large(xp, 6)
    words = ("bias", "(6,)", "(8,)")
    assert_refused(xp, lambda: cuconv.conv_transpose(x, w, bias), ValueError, *words)
    wrong = large(xp, 64, 8, 2**20, 11)
    for call in (
        lambda: cuconv.conv_transpose_input_grad(wrong, w, X),
        lambda: cuconv.conv_transpose_weight_grad(wrong, x, W),
        lambda: cuconv.conv_transpose_backward(wrong, x, w, needs=()),
    ):
        words = ("dy has shape", str(wrong.shape), str(dy.shape))
        assert_refused(xp, call, ValueError, *words)
    one, three = xp.ones((1, 1, 1)), xp.ones((1, 1, 3))
    with pytest.raises(ValueError, match="out may share memory with x"):
        cuconv.conv_transpose(three, one, out=three)
    with pytest.raises(ValueError, match="out may share memory with w"):
        cuconv.conv_transpose(one, three, out=three)
    with pytest.raises(ValueError, match="out may share memory with dy"):
        cuconv.conv_transpose_input_grad(three, one, (1, 1, 3), out=three)
    with pytest.raises(ValueError, match="needs must be a tuple, list or set"):
        cuconv.conv_transpose_backward(dy, x, w, needs="x")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_functions_of_a_rank_refuse_another(xp, rank) -> None:
    function = getattr(cuconv, f"conv_transpose{rank}d")
    shape = (2, 3, *range(4, 4 + rank))
    x, w = xp.ones(shape), xp.ones((3, 5, *(2,) * rank))
    testing.assert_equal(
        function(x, w, stride=2, output_padding=1),
        to_host(cuconv.conv_transpose(x, w, stride=2, output_padding=1)),
    )
    for axes in {3, 4, 5, 6} - {rank + 2}:
        other, taps = large(xp, *(9,) * axes), large(xp, *(3,) * axes)
        words = (f"conv_transpose{rank}d", f"weights of {rank + 2} axes", f"has {axes}")
        call = partial(function, other, taps)
        assert_refused(xp, call, ValueError, *words)
