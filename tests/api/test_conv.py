"""Convolution and its gradients against the seven loops, exactly on small integers."""

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
from cases import CASES, EMPTY, cases, each_in
from hypothesis import given
from hypothesis import strategies as st
from support import (
    COMPLEX,
    EACH_TYPE,
    HALVES,
    INTEGERS,
    LAYOUTS,
    OPERATIONS,
    PLACES,
    Case,
    Operands,
    add_bias,
    cupy_slowly,
    integers,
    operands,
    outs,
    reference,
    run,
    slowly,
    smallest_limit,
    spread_over,
    to_device,
    to_host,
    unaligned,
    wanted_of,
    widest,
    with_buffers_on,
)

import cuconv
from cuconv import testing


def expect(op: str, arrays: Operands, case: Case, dtype: Any, actual: Any) -> None:
    """Equal to the reference after its conversion, in shape and type too."""
    wanted = reference(op, arrays, case).astype(dtype)
    testing.assert_equal(actual, wanted, dtype=dtype)


def check(xp: Any, op: str, case: Case, dtype: Any = "float32", **options: Any) -> None:
    """Small integers of a type, which give their own sums exactly."""
    actual = run(op, operands(case, dtype).on(xp), case, **options)
    assert type(actual) is xp.ndarray
    testing.assert_equal(actual, wanted_of(op, case, dtype), dtype=dtype)


@pytest.mark.parametrize(("dtype", "layout"), EACH_TYPE)
@pytest.mark.parametrize("op", OPERATIONS)
def test_equals_the_loops_in_every_type(xp, op, dtype, layout) -> None:
    checked = 0
    for case in each_in(layout):
        check(xp, op, case, dtype)
        checked += 1
    assert checked == len(CASES) == 20


CAUSAL = Case((2, 3, 11), (4, 3, 3), {"padding": "causal", "stride": 2, "dilation": 2})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_causal_padding(xp, layout) -> None:
    case = CAUSAL.in_layout(layout)
    arrays = operands(case)
    for op in OPERATIONS:
        expect(op, arrays, case, np.float64, run(op, arrays.on(xp), case))
    assert case.y_shape() == ((2, 4, 6) if layout == "channels_first" else (2, 6, 4))


def test_a_causal_output_sees_no_later_input(xp) -> None:
    x, w = np.zeros((1, 3, 11)), np.ones((4, 3, 3))
    for cell in range(11):
        x[...] = 0
        x[:, :, cell] = 1
        y = to_host(cuconv.conv(xp.asarray(x), xp.asarray(w), **CAUSAL.options))
        seen = [o for o in range(6) if y[0, 0, o]]
        assert seen == [o for o in range(6) if cell in (2 * o, 2 * o - 2, 2 * o - 4)]


@pytest.mark.parametrize(
    "shapes", [((7,), (4,)), ((2, 5), (3, 2)), ((3, 1, 4), (2,) * 3)]
)
def test_full_padding_is_that_of_scipy(xp, shapes) -> None:
    """Kernels longer than the input too."""
    signal = pytest.importorskip("scipy.signal")
    x, w = integers(shapes[0]), integers(shapes[1], seed=1)
    device = xp.asarray(x[None, None]), xp.asarray(w[None, None])
    y = cuconv.conv(*device, padding="full", precision="strict")
    wanted = signal.correlate(x, w, mode="full", method="direct")
    testing.assert_equal(y[0, 0], wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_padding_has_both_gradients(xp, layout) -> None:
    options = {"padding": "full", "stride": (1, 2), "dilation": (2, 1), "groups": 2}
    case = Case((2, 4, 3, 6), (6, 2, 2, 3), options).in_layout(layout)
    arrays = operands(case)
    for op in OPERATIONS:
        expect(op, arrays, case, np.float64, run(op, arrays.on(xp), case))
    spatial = (5, 4)
    first = layout == "channels_first"
    assert case.y_shape() == ((2, 6, *spatial) if first else (2, *spatial, 6))


def test_words_are_taken_in_any_case(xp) -> None:
    x, w = xp.asarray(integers((1, 2, 5, 6))), xp.asarray(integers((3, 2, 2, 4)))
    plain = to_host(cuconv.conv(x, w, padding="same"))
    for word in ("SAME", "Same", "SAME_UPPER", "same_upper"):
        testing.assert_equal(cuconv.conv(x, w, padding=word, layout="nchw"), plain)
    lower = to_host(cuconv.conv(x, w, padding="same_lower"))
    testing.assert_equal(cuconv.conv(x, w, padding="SAME_LOWER"), lower)
    options = {"padding": ((3, 2), (1, 1))}
    last = x.transpose(0, 2, 3, 1), w.transpose(2, 3, 1, 0)
    for word in ("nhwc", "NhWC", "Channels_Last", "CHANNELS_LAST"):
        y = cuconv.conv(*last, padding_mode="REFLECT", layout=word, **options)
        mode = {"padding_mode": "reflect", **options}
        testing.assert_equal(
            y.transpose(0, 3, 1, 2), to_host(cuconv.conv(x, w, **mode))
        )
    up = to_host(cuconv.conv_transpose(x, w[:2], padding="SAME_UPPER", stride=2))
    same = cuconv.conv_transpose(x, w[:2], padding="same", stride=2)
    testing.assert_equal(same, up)


def test_causal_padding_is_for_one_axis() -> None:
    for call in (cuconv.conv, cuconv.conv_transpose):
        with pytest.raises(ValueError, match="for one spatial axis; there are 2"):
            call(np.ones((1, 1, 4, 4)), np.ones((1, 1, 2, 2)), padding="causal")


@pytest.mark.parametrize("op", OPERATIONS)
@given(case=cases(), seed=st.integers(0, 2**16))
def test_equals_the_loops_for_any_geometry(xp, op, case, seed) -> None:
    arrays = operands(case, "float32", seed)
    expect(op, arrays, case, np.float32, run(op, arrays.on(xp), case))


@pytest.mark.parametrize("op", OPERATIONS)
@given(case=cases(), extra=st.sampled_from([*range(0, 2**12, 256), 2**14, 2**20]))
def test_equals_the_loops_under_any_limit(xp, op, case, extra) -> None:
    arrays = operands(case, "float32")
    mine = arrays.on(xp)
    chunked = partial(run, op, mine, case, **with_buffers_on(xp))
    limit = smallest_limit(chunked) + extra
    expect(op, arrays, case, np.float32, chunked(memory_limit=limit))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.usefixtures("busy")
def test_several_workers_give_the_same_numbers(choices, op, layout) -> None:
    for case in each_in(layout):
        arrays = operands(case, "float32")
        for extra in (0, 2**13, 2**16, 2**18):
            limit = smallest_limit(partial(run, op, arrays, case)) + extra
            with cuconv.config(num_threads=3):
                actual = run(op, arrays, case, memory_limit=limit)
            expect(op, arrays, case, np.float32, actual)
    workers = {candidate.tiling.workers for candidate in choices}
    assert workers >= {1, 3}


@pytest.mark.parametrize("op", OPERATIONS)
def test_deterministic_or_not_the_sums_are_the_same(xp, op) -> None:
    for case, candidate in itertools.product(CASES.values(), (True, False, None)):
        check(xp, op, case, deterministic=candidate)


def test_the_default_precision_is_near_enough(xp) -> None:
    """All options left alone: what most callers run."""
    wide = Case((2, 16, 13, 12), (16, 16, 3, 3), {"padding": 1})
    for case in (*CASES.values(), wide):
        arrays = operands(case, "float32")
        for op in OPERATIONS:
            got = run(op, arrays.on(xp), case, precision="standard")
            wanted = wanted_of(op, case)
            largest = float(np.abs(wanted).max())
            testing.assert_close(got, wanted, rtol=0, atol=1e-5 * largest)


# Bias


@pytest.mark.parametrize(("dtype", "layout"), EACH_TYPE)
def test_bias_is_added_to_every_position(xp, dtype, layout) -> None:
    for case in each_in(layout):
        x, w, _ = operands(case, dtype)
        bias = integers((case.filters(),), dtype, seed=9)
        wanted = add_bias(wanted_of("forward", case, widest(dtype)), bias, case)
        wanted = wanted.astype(dtype)
        on_xp = (to_device(xp, array) for array in (x, w, bias))
        testing.assert_equal(cuconv.conv(*on_xp, **case.options), wanted, dtype=dtype)


def test_bias_survives_every_chunking(xp) -> None:
    case = CASES["groups with stride"]
    x, w, _ = operands(case, "float32").on(xp)
    bias = integers((9,), "float32", seed=9)
    wanted = testing.conv_reference(x, w, bias, **case.options)

    def call(**options: Any) -> Any:
        return cuconv.conv(x, w, to_device(xp, bias), **case.options, **options)

    for extra in (0, 256, 512, 1024, 2048, 4096):
        limit = smallest_limit(call) + extra
        testing.assert_equal(call(memory_limit=limit), wanted)


# Result type and result array


@pytest.mark.parametrize("layout", [LAYOUTS[0], *slowly(LAYOUTS[1])])
@pytest.mark.parametrize("op", OPERATIONS)
def test_out_takes_the_result_wherever_it_lies(xp, op, layout) -> None:
    checked = 0
    for case in each_in(layout):
        mine = operands(case, "float32").on(xp)
        wanted = wanted_of(op, case, "float32")
        for out in outs(xp, wanted.shape, np.float32):
            assert run(op, mine, case, out=out) is out
            testing.assert_equal(out, wanted, dtype=np.float32)
            checked += 1
    assert checked == 4 * len(CASES)


RESULTS = [
    ("int8", "int32"),
    ("uint8", "int32"),
    ("int8", "float32"),
    ("int16", "int8"),
    ("int64", "int16"),
    ("float16", "float32"),
    ("float16", "float64"),
    ("bfloat16", "float32"),
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("float32", "float64"),
    ("float64", "float32"),
    ("float32", "complex64"),
    ("complex64", "complex128"),
    ("bool", "int32"),
    ("bool", "float32"),
]


@pytest.mark.parametrize(("dtype", "result"), RESULTS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_dtype_is_the_type_of_the_result(xp, op, dtype, result) -> None:
    for name in ("two axes, all different", "pointwise", "groups with stride"):
        case = CASES[name]
        arrays = operands(case, dtype)
        actual = run(op, arrays.on(xp), case, dtype=result)
        expect(op, arrays, case, np.dtype(result), actual)


MIXED = [
    ("int8", "float32", "float32"),
    ("int32", "float32", "float64"),
    ("uint8", "int8", "int16"),
    ("float16", "float32", "float32"),
    ("bfloat16", "float32", "float32"),
    ("float32", "float64", "float64"),
    ("complex64", "float32", "complex64"),
    ("complex64", "float64", "complex128"),
    ("bool", "uint8", "uint8"),
]


@pytest.mark.parametrize(("first", "second", "result"), MIXED)
@pytest.mark.parametrize("op", OPERATIONS)
def test_mixed_types_meet_in_numpys_common_one(xp, op, first, second, result) -> None:
    case = CASES["two axes, all different"]
    shapes = (case.x_shape, case.w_shape, case.y_shape())
    types = (first, second, first if op == "input_grad" else second)
    arrays = Operands(*map(integers, shapes, types))
    if op == "input_grad":
        arrays = arrays._replace(w=integers(case.w_shape, second))
    expect(op, arrays, case, np.dtype(result), run(op, arrays.on(xp), case))


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_integers_wrap_as_numpys_do(xp, op, dtype) -> None:
    case = CASES["two axes, all different"]
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(3)
    arrays = Operands(
        *(
            rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
            for shape in (case.x_shape, case.w_shape, case.y_shape())
        )
    )
    exact = reference(op, arrays, case)
    assert (exact.astype(dtype) != exact).any() or limits.bits == 64
    expect(op, arrays, case, np.dtype(dtype), run(op, arrays.on(xp), case))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_bias_gradients_are_summed_in_float32(xp, dtype) -> None:
    dy = xp.ones((2, 3, 2048), dtype)
    x, w = xp.ones((2, 1, 2049), dtype), xp.ones((3, 1, 2), dtype)
    bias = cuconv.conv_backward(dy, x, w, needs=("bias",)).bias
    testing.assert_equal(bias, np.full(3, 4096), dtype=dtype)


def test_a_half_result_is_rounded_once(xp) -> None:
    """2048 + 1 + 1 is 2050 in float32 and 2048 where every step is rounded."""
    x = np.array([[[2048.0, 1.0, 1.0]]], dtype=np.float16)
    w = np.ones((1, 1, 3), dtype=np.float16)
    y = cuconv.conv(to_device(xp, x), to_device(xp, w))
    testing.assert_equal(y, np.full((1, 1, 1), 2050))


# How the inputs lie in memory


@pytest.mark.parametrize("op", OPERATIONS)
@given(
    case=cases(),
    places=st.tuples(*[st.sampled_from(sorted(PLACES))] * 3),
    dtype=st.sampled_from(["float16", "float32", "int16", "complex64"]),
)
def test_any_mix_of_places(xp, op, case, places, dtype) -> None:
    arrays = operands(case, dtype)
    mine = Operands(*(PLACES[p](xp, a) for p, a in zip(places, arrays, strict=True)))
    expect(op, arrays, case, np.dtype(dtype), run(op, mine, case))


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("op", OPERATIONS)
def test_broadcast_inputs(xp, op, axis) -> None:
    """Zero strides, along each axis in turn and along all of them."""
    for case in (CASES["two axes, all different"], CASES["pointwise"]):
        whole = operands(case, "float32")
        thin = [array.take([0], axis=axis) for array in whole]
        arrays = Operands(*map(np.broadcast_to, thin, [a.shape for a in whole]))
        mine = Operands(
            *(
                spread_over(xp, to_device(xp, a), b.shape)
                for a, b in zip(thin, whole, strict=True)
            )
        )
        expect(op, arrays, case, np.float32, run(op, mine, case))
        ones = Operands(*(np.ones(a.shape) for a in whole))
        one = xp.ones((1, 1, 1, 1))
        same = Operands(*(spread_over(xp, one, a.shape) for a in whole))
        expect(op, ones, case, float, run(op, same, case))


@pytest.mark.parametrize("op", OPERATIONS)
def test_byte_swapped_inputs_and_results(op) -> None:
    """NumPy alone: CuPy has only the machine's own byte order."""
    for name, dtype in itertools.product(
        ("two axes, all different", "pointwise"), ("f4", "f8", "f2", "i4", "c8")
    ):
        case = CASES[name]
        arrays = operands(case, dtype)
        swapped = Operands(*(a.astype(a.dtype.newbyteorder()) for a in arrays))
        expect(op, arrays, case, np.dtype(dtype), run(op, swapped, case))
        needs_cast = np.dtype(dtype).newbyteorder()
        expect(op, arrays, case, needs_cast, run(op, swapped, case, dtype=needs_cast))


@pytest.mark.parametrize("op", OPERATIONS)
def test_unaligned_inputs(op) -> None:
    """Addresses that no element may have; NumPy alone makes such arrays."""
    for case in CASES.values():
        arrays = operands(case, "float64")
        mine = Operands(*map(unaligned, arrays))
        assert not any(array.flags.aligned for array in mine)
        expect(op, arrays, case, float, run(op, mine, case))


@pytest.mark.parametrize("op", OPERATIONS)
def test_read_only_inputs_are_not_written(xp, op) -> None:
    for case in [*CASES.values()][::4]:
        arrays = operands(case, "float32")
        mine = arrays.on(xp)
        if xp is np:
            for array in mine:
                array.flags.writeable = False
        run(op, mine, case)
        for before, after in zip(arrays, mine, strict=True):
            testing.assert_equal(after, before)


def test_subclasses_of_numpys_array_are_arrays() -> None:
    class Odd(np.ndarray):
        def __add__(self, other: Any) -> Any:
            raise AssertionError("the habits of a subclass were used")

        __mul__ = __matmul__ = __add__

    case = CASES["two axes, all different"]
    arrays = operands(case)
    odd = Operands(*(array.view(Odd) for array in arrays))
    for op in OPERATIONS:
        actual = run(op, odd, case)
        assert type(actual) is np.ndarray
        expect(op, arrays, case, float, actual)


# Nothing to sum


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sum_over_nothing_with_a_bias_is_the_bias(xp, layout) -> None:
    for case in each_in(layout, EMPTY):
        x, w, _ = operands(case)
        bias = integers((case.filters(),), seed=9)
        wanted = testing.conv_reference(x, w, bias, **case.options)
        on_xp = (to_device(xp, array) for array in (x, w, bias))
        testing.assert_equal(cuconv.conv(*on_xp, **case.options), wanted)


# Gradients


@cupy_slowly
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_the_numerical_ones(xp, layout, dtype) -> None:
    names = (
        "one axis, a tail of two",
        "groups with stride",
        "no batch axis",
        "cropped",
    )
    for name in names:
        case = CASES[name].in_layout(layout)
        arrays = (*operands(case, dtype), integers((case.filters(),), dtype))
        x, w, dy, bias = (to_device(xp, array) / 4 for array in arrays)
        loss = partial(_loss, dy, case.options)
        got = cuconv.conv_backward(dy, x, w, **case.options)
        wanted = cuconv.ConvGradients(
            testing.numerical_gradient(partial(loss, w=w, bias=bias), x),
            testing.numerical_gradient(partial(loss, x, bias=bias), w),
            testing.numerical_gradient(partial(loss, x, w), bias),
        )
        for mine, numerical in zip(got, wanted, strict=True):
            testing.assert_close(mine, numerical, rtol=1e-7, atol=1e-7, dtype=dtype)


def _loss(dy: Any, options: dict[str, Any], x: Any, w: Any, bias: Any) -> Any:
    """Re⟨y, dy⟩, whose gradients are those of the convolution."""
    return (cuconv.conv(x, w, bias, **options) * dy.conj()).real.sum()


@pytest.mark.parametrize("dtype", ["complex64", *slowly("float32", "float64", "int32")])
@given(case=cases())
def test_gradients_are_adjoint(xp, dtype, case) -> None:
    x, w, dy = operands(case, dtype).on(xp)
    testing.check_adjoint(
        lambda x: run("forward", Operands(x, w, dy), case),
        lambda dy: run("input_grad", Operands(x, w, dy), case),
        case.x_shape,
        case.y_shape(),
        dtype=dtype,
        xp=xp,
    )
    testing.check_adjoint(
        lambda w: run("forward", Operands(x, w, dy), case),
        lambda dy: run("weight_grad", Operands(x, w, dy), case),
        case.w_shape,
        case.y_shape(),
        dtype=dtype,
        xp=xp,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int16", *COMPLEX])
def test_backward_is_the_three_gradients(xp, dtype, layout) -> None:
    for case in each_in(layout):
        arrays = operands(case, dtype)
        x, w, dy = arrays.on(xp)
        got = cuconv.conv_backward(dy, x, w, **case.options)
        expect("input_grad", arrays, case, np.dtype(dtype), got.x)
        expect("weight_grad", arrays, case, np.dtype(dtype), got.w)
        testing.assert_equal(got.bias, _bias_gradient(arrays, case), dtype=dtype)


def _bias_gradient(arrays: Operands, case: Case) -> np.ndarray:
    """As the weight gradient for an input of ones under one tap."""
    dy = arrays.dy if len(case.x_shape) == len(case.w_shape) else arrays.dy[None]
    last = case.layout == "channels_last"
    flat = np.moveaxis(dy, -1 if last else 1, 0).reshape(case.filters(), -1)
    ones = np.ones((1, 1, flat.shape[1]), dtype=int)
    sums = testing.conv_reference(flat[np.newaxis].swapaxes(0, 1), ones)
    return sums.reshape(-1).astype(arrays.dy.dtype)


@pytest.mark.parametrize(
    "needs", [(), ("x",), ("w",), ("bias",), ("w", "x"), ["bias", "w"], {"x", "bias"}]
)
def test_backward_computes_what_is_needed_alone(xp, choices, needs) -> None:
    case = CASES["two axes, all different"]
    x, w, dy = operands(case).on(xp)
    whole = cuconv.conv_backward(dy, x, w, **case.options)
    choices.clear()
    some = cuconv.conv_backward(dy, x, w, needs=needs, **case.options)
    for name in ("x", "w", "bias"):
        got = getattr(some, name)
        assert (got is not None) == (name in needs)
        if got is not None:
            testing.assert_equal(got, getattr(whole, name))
    operations = {"x": "input_grad", "w": "weight_grad"}
    ran = [
        "input_grad" if candidate.problem.flipped else candidate.problem.op
        for candidate in choices
    ]
    assert sorted(ran) == sorted(operations[n] for n in needs if n in operations)


# The tail, and the words


SPELLINGS = {
    1: (("NCL", "NCW"), ("NLC", "NWC")),
    2: (("NCHW",), ("NHWC",)),
    3: (("NCDHW",), ("NDHWC",)),
}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_spelled_layouts_are_the_two_layouts(xp, rank) -> None:
    shape, kernel = (2, 3, 6, 5, 4)[: rank + 2], (4, 3, 3, 2, 1)[: rank + 2]
    case = Case(shape, kernel, {})
    for layout, words in zip(LAYOUTS, SPELLINGS[rank], strict=True):
        plain = case.in_layout(layout)
        x, w, _ = operands(plain).on(xp)
        wanted = cuconv.conv(x, w, layout=layout)
        for word in words:
            testing.assert_equal(cuconv.conv(x, w, layout=word), wanted)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_functions_of_a_rank_are_conv(xp, rank) -> None:
    shape, kernel = (2, 3, 6, 5, 4)[: rank + 2], (4, 3, 3, 2, 1)[: rank + 2]
    x, w, _ = operands(Case(shape, kernel, {})).on(xp)
    bias = to_device(xp, integers((4,), seed=3))
    function = getattr(cuconv, f"conv{rank}d")
    options = {"stride": 2, "padding": 1}
    wanted = cuconv.conv(x, w, bias, **options)
    testing.assert_equal(function(x, w, bias, **options), wanted)
    testing.assert_equal(function(x[0], w, bias, **options), wanted[0])
    out = xp.empty(wanted.shape, dtype=wanted.dtype)
    assert function(x, w, bias, out=out, **options) is out


def test_four_axes_work_too(xp) -> None:
    """The code is for any rank; nothing stops at three."""
    case = Case((1, 2, 3, 4, 3, 2), (2, 2, 2, 3, 1, 2), {"stride": (1, 2, 1, 1)})
    arrays = operands(case)
    for op in OPERATIONS:
        expect(op, arrays, case, float, run(op, arrays.on(xp), case))


def test_options_may_be_numpy_integers_and_arrays(xp) -> None:
    case = CASES["two axes, all different"]
    x, w, _ = operands(case).on(xp)
    wanted = cuconv.conv(x, w, **case.options)
    options = {name: np.array(value) for name, value in case.options.items()}
    testing.assert_equal(cuconv.conv(x, w, **options), wanted)
    one = {"stride": np.int64(2), "groups": np.int8(1), "padding": np.uint8(1)}
    plain = {name: int(value) for name, value in one.items()}
    testing.assert_equal(cuconv.conv(x, w, **one), cuconv.conv(x, w, **plain))
