"""Flipped kernels, and outputs rounded up, in every call and on every road."""

import itertools
import pickle
from functools import partial

import numpy as np
import pytest
from cases import cases, transposed_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    LAYOUTS,
    OPERATIONS,
    STRICT,
    Case,
    Operands,
    candidates_of,
    device_of,
    integers,
    of,
    operands,
    peak,
    plan_of,
    reference,
    run,
    run_candidate,
    smallest_limit,
    to_device,
    to_host,
)

import cuconv
from cuconv import layers, testing

FLIPPED = {"flip_kernel": True}
SEVERAL = {
    "one axis": Case((2, 3, 13), (4, 3, 4), {"stride": 2, "padding": ((3, 1),)}),
    "groups": Case(
        (2, 6, 8, 7), (9, 2, 2, 3), {"groups": 3, "stride": (3, 2), "padding": (1, 2)}
    ),
    "winograd": Case((1, 8, 9, 8), (9, 8, 3, 3), {"padding": 1}),
    "depthwise": Case((2, 4, 6, 5), (4, 1, 3, 2), {"groups": 4, "padding": "same"}),
    "three axes": Case(
        (2, 2, 4, 5, 6), (3, 2, 1, 2, 3), {"stride": (1, 3, 2), "dilation": (3, 2, 1)}
    ),
    "pointwise": Case((3, 4, 5, 6), (2, 4, 1, 1), {}),
    "the whole input": Case((3, 2, 4, 5), (4, 2, 4, 5), {}),
    "one filter over a line": Case((3, 1, 7, 1), (1, 1, 7, 1), {}),
    "many taps": Case((2, 3, 8, 9), (4, 3, 5, 6), {"padding": "full"}),
    "reflect": Case((2, 3, 7), (4, 3, 3), {"padding": 4, "padding_mode": "reflect"}),
    "input dilation": Case((2, 3, 5), (4, 3, 4), {"padding": 3, "input_dilation": 3}),
    "batch groups": Case((4, 3, 6), (4, 3, 3), {"batch_groups": 2}),
}


def turned(w: np.ndarray, layout: str = "channels_first") -> np.ndarray:
    """A copy of weights with their taps in reverse."""
    rank = w.ndim - 2
    axes = range(2, w.ndim) if layout == "channels_first" else range(rank)
    return np.ascontiguousarray(np.flip(w, axes))


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_equals_the_loops(xp, op, layout, dtype) -> None:
    checked = 0
    for shapes in (case.in_layout(layout) for case in SEVERAL.values()):
        case = shapes._replace(options={**shapes.options, **FLIPPED})
        arrays = operands(case, dtype)
        wanted = reference(op, arrays, case).astype(dtype)
        testing.assert_equal(run(op, arrays.on(xp), case), wanted, dtype=dtype)
        checked += 1
    assert checked == len(SEVERAL) == 12


@pytest.mark.parametrize("op", OPERATIONS)
@settings(max_examples=20)
@given(case=cases(), seed=st.integers(0, 2**16))
def test_it_is_a_copy_of_the_weights_in_reverse(xp, op, case, seed) -> None:
    """And the gradient comes back in the orientation of the weights that were given."""
    x, w, dy = operands(case, "float32", seed)
    mine = run(op, Operands(x, w, dy).on(xp), case, **FLIPPED)
    wanted = to_host(run(op, Operands(x, turned(w, case.layout), dy).on(xp), case))
    wanted = turned(wanted, case.layout) if op == "weight_grad" else wanted
    testing.assert_equal(mine, wanted)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_strategy_runs_it(xp, op) -> None:
    seen = set()
    for case in SEVERAL.values():
        arrays = operands(case, "float32")
        other = Operands(arrays.x, turned(arrays.w), arrays.dy)
        wanted = reference(op, other, case)
        wanted = turned(wanted) if op == "weight_grad" else wanted
        for name in (*STRICT, "winograd", "fft", "implicit_gemm"):
            how = {"winograd": "standard", "fft": "fast"}
            options = {"precision": how.get(name, "strict"), "strategy": name}
            plan = plan_of(op, case, device=device_of(xp), **options, **FLIPPED)
            if plan is None:
                continue
            seen.add(plan.strategy)
            got = to_host(plan(*of(op, arrays.on(xp))))
            if name in how:
                largest = float(np.abs(wanted).max())
                testing.assert_close(got, wanted, rtol=0, atol=1e-5 * largest)
            else:
                testing.assert_equal(got, wanted.astype("float32"))
    # Others run input gradients as forward passes over dy, where strides allow.
    least = {"im2col", "winograd"}
    assert seen >= least | ({"fft"} if xp is np else {"implicit_gemm"})


@pytest.mark.parametrize("xp", ["cupy"], indirect=True)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_variant_of_the_kernel_runs_it(xp, op, dtype) -> None:
    """Sums in parts, and operands that are copied to channels last, among them."""
    case = Case((2, 8, 30, 31), (8, 8, 3, 2), {"padding": 1})
    x, w = (integers(shape, dtype, largest=1) for shape in (case.x_shape, case.w_shape))
    arrays = Operands(x, w, integers((2, 8, 30, 32), dtype, largest=1))
    other = Operands(*(a.astype("float32") for a in (x, turned(w), arrays.dy)))
    wanted = run(op, other, case).astype(dtype)
    wanted = turned(wanted) if op == "weight_grad" else wanted
    plan = plan_of(op, case, dtype, device="cuda", strategy="implicit_gemm", **FLIPPED)
    mine, labels = of(op, arrays.on(xp)), set()
    for candidate in candidates_of(plan):
        testing.assert_equal(to_host(run_candidate(plan, candidate, mine)), wanted)
        labels.add(candidate.label)
    copied = any("copied to channels last" in label for label in labels)
    assert copied == (dtype == "float16")
    assert op != "weight_grad" or any("parts" in label for label in labels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_columns_in_reverse_need_no_copy_of_the_weights(op, layout) -> None:
    """Those of a caller's own view too."""
    case = SEVERAL["groups"].in_layout(layout)
    plain, flipped = (
        plan_of(op, case, strategy="im2col", **more) for more in ({}, FLIPPED)
    )
    assert flipped.workspace_bytes == plain.workspace_bytes
    arrays = operands(case, "float32")
    rank = arrays.w.ndim - 2
    taps = (slice(None, None, -1),) * rank
    view = turned(arrays.w, layout)[(..., *taps) if layout == LAYOUTS[0] else taps]
    mine = Operands(arrays.x, view, arrays.dy)
    call = partial(run, op, mine, case, strategy="im2col", memory_limit=None)
    testing.assert_equal(call(), reference(op, arrays, case).astype("float32"))


@pytest.mark.parametrize("op", OPERATIONS)
def test_under_a_limit(xp, op) -> None:
    case = SEVERAL["groups"]
    x, w, dy = operands(case, "float32")
    wanted = reference(op, Operands(x, turned(w), dy), case)
    wanted = turned(wanted) if op == "weight_grad" else wanted
    arrays = Operands(x, w, dy).on(xp)
    call = partial(run, op, arrays, case, strategy="im2col", **FLIPPED)
    limit = smallest_limit(call)
    for extra in (0, 512, 4096):
        chunked = partial(call, memory_limit=limit + extra)
        testing.assert_equal(chunked(), wanted.astype("float32"))
        assert peak(xp, chunked, limit + extra) <= limit + extra


def test_plans_say_so_and_are_prepared(xp) -> None:
    case = SEVERAL["winograd"]
    x, w, dy = operands(case, "float32").on(xp)
    for op, array in (("forward", x), ("input_grad", dy)):
        for strategy in ("im2col", "auto"):
            more = {"precision": "standard", "strategy": strategy, **FLIPPED}
            plan = plan_of(op, case, device=device_of(xp), **more)
            assert "flipped" in str(plan)
            assert plan.as_dict()["flip_kernel"] is True
            same = to_host(plan(array, w))
            prepared = plan.prepare(w)
            testing.assert_equal(prepared(array), same)
            testing.assert_equal(pickle.loads(pickle.dumps(prepared))(array), same)
    assert "flipped" not in str(plan_of("forward", case))
    with pytest.raises(TypeError, match="flip_kernel must be True or False; got 'yes'"):
        cuconv.conv(x, w, flip_kernel="yes")


@pytest.mark.parametrize(
    "shapes", [((7,), (4,)), ((2, 5), (3, 2)), ((3, 1, 4), (2,) * 3)]
)
def test_it_is_the_convolution_of_scipy(xp, shapes) -> None:
    signal = pytest.importorskip("scipy.signal")
    x, w = integers(shapes[0]), integers(shapes[1], seed=1)
    device = xp.asarray(x[None, None]), xp.asarray(w[None, None])
    y = cuconv.conv(*device, padding="full", precision="strict", **FLIPPED)
    testing.assert_equal(y[0, 0], signal.convolve(x, w, mode="full", method="direct"))
    z = 1j * x + x[::-1], w - 2j * w
    device = tuple(xp.asarray(array[None, None]) for array in z)
    y = cuconv.conv(*device, padding="full", precision="strict", **FLIPPED)
    testing.assert_equal(y[0, 0], signal.convolve(*z, mode="full", method="direct"))


@settings(max_examples=20)
@given(case=transposed_cases())
def test_transposed_convolutions(xp, case) -> None:
    rng = np.random.default_rng(7)
    x, w = (
        rng.integers(-3, 4, shape).astype("float64")
        for shape in (case.x_shape, case.w_shape)
    )
    options = {"precision": "strict", **case.options}
    other = to_device(xp, turned(w, case.layout))
    x, w = to_device(xp, x), to_device(xp, w)
    y = cuconv.conv_transpose(x, w, **options, **FLIPPED)
    testing.assert_equal(y, to_host(cuconv.conv_transpose(x, other, **options)))
    dy = to_device(xp, rng.integers(-3, 4, y.shape).astype("float64"))
    mine = cuconv.conv_transpose_backward(dy, x, w, **options, **FLIPPED)
    plain = cuconv.conv_transpose_backward(dy, x, other, **options)
    testing.assert_equal(mine.x, to_host(plain.x))
    testing.assert_equal(mine.w, turned(to_host(plain.w), case.layout))
    wanted = testing.conv_transpose_reference(x, w, **case.options, **FLIPPED)
    testing.assert_equal(y, wanted)


def test_depthwise_and_separable_convolutions(xp) -> None:
    x, dy = integers((2, 3, 7, 6)), integers((2, 5, 5, 5), seed=1)
    w, points = integers((3, 2, 3, 2), seed=2), integers((5, 6), seed=3)
    wide = integers((2, 6, 5, 5), seed=4)
    given = [to_device(xp, array) for array in (x, dy, w, points, wide, turned(w))]
    x, dy, w, points, wide, other = given
    y = cuconv.depthwise_conv(x, w, **FLIPPED)
    testing.assert_equal(y, to_host(cuconv.depthwise_conv(x, other)))
    mine = cuconv.depthwise_conv_backward(wide, x, w, **FLIPPED)
    plain = cuconv.depthwise_conv_backward(wide, x, other)
    testing.assert_equal(mine.x, to_host(plain.x))
    testing.assert_equal(mine.w, turned(to_host(plain.w)))
    for limit in (None, 2**18):
        more = {"memory_limit": limit}
        y = cuconv.separable_conv(x, w, points, **more, **FLIPPED)
        testing.assert_equal(y, to_host(cuconv.separable_conv(x, other, points)))
        found = cuconv.separable_conv_backward(dy, x, w, points, **more, **FLIPPED)
        plain = cuconv.separable_conv_backward(dy, x, other, points)
        testing.assert_equal(found.x, to_host(plain.x))
        testing.assert_equal(found.depthwise, turned(to_host(plain.depthwise)))
        testing.assert_equal(found.pointwise, to_host(plain.pointwise))


def test_layers() -> None:
    x = integers((2, 4, 7, 6), "float32")
    made = (
        layers.Conv2d(4, 6, (3, 2), **FLIPPED, cover_all=True, stride=3, xp=np),
        layers.DepthwiseConv2d(4, 3, **FLIPPED, xp=np),
        layers.ConvTranspose2d(4, 2, 3, stride=2, **FLIPPED, xp=np),
        layers.SeparableConv2d(4, 2, 3, **FLIPPED, xp=np),
    )
    for layer in made:
        name = next(n for n in ("weight", "depthwise") if n in layer.parameters)
        layer.parameters[name][...] = integers(layer.parameters[name].shape, seed=1)
        if "pointwise" in layer.parameters:
            layer.parameters["pointwise"][...] = 1
        y = layer(x)
        dx = layer.backward(np.ones_like(y))
        dw, w = layer.gradients[name].copy(), layer.parameters[name]
        layer._options["flip_kernel"] = False
        w[...] = turned(w)
        testing.assert_equal(layer(x), y)
        testing.assert_equal(layer.backward(np.ones_like(y)), dx)
        testing.assert_equal(turned(layer.gradients[name]), dw)
    with pytest.raises(TypeError, match="flip_kernel must be True or False"):
        layers.Conv1d(2, 2, 3, flip_kernel=1, xp=np)


def test_dask_arrays() -> None:
    da = pytest.importorskip("dask.array")
    case = Case(
        (4, 3, 9, 8), (5, 3, 3, 2), {"stride": 2, "cover_all": True, "padding": (0, 1)}
    )
    x, w, dy = operands(case)
    lazy = da.from_array(x, chunks=(2, 3, 4, 5))
    wanted = to_host(cuconv.conv(x, w, **case.options, **FLIPPED))
    y = cuconv.conv(lazy, w, **case.options, **FLIPPED)
    testing.assert_equal(y.compute(scheduler="sync"), wanted)
    found = cuconv.conv_backward(dy, lazy, w, **case.options, **FLIPPED)
    eager = cuconv.conv_backward(dy, x, w, **case.options, **FLIPPED)
    for mine, whole in zip(found, eager, strict=True):
        testing.assert_equal(mine.compute(scheduler="sync"), whole)


# Rounding up


def test_sizes_are_those_of_chainer() -> None:
    """``(n + 2 p - e + s - 1) // s + 1``, also where windows start in the padding."""
    checked = 0
    sizes = [range(1, 7), range(1, 4), range(1, 4), range(2), range(1, 3)]
    for n, k, s, p, d in itertools.product(*sizes):
        out = (n + 2 * p - d * (k - 1) - 1 + s - 1) // s + 1
        options = {"stride": s, "padding": p, "dilation": d, "cover_all": True}
        x, w = np.ones((1, 1, n)), np.ones((1, 1, k))
        if out < 1:
            with pytest.raises(ValueError, match="kernel is larger"):
                cuconv.conv(x, w, **options)
            continue
        assert cuconv.conv(x, w, **options).shape == (1, 1, out)
        columns = cuconv.im2col(x, k, order="batched", **options)
        assert columns.shape == (1, k, out)
        checked += 1
    assert checked == 197


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_are_those_of_the_convolution(xp, layout) -> None:
    options = {"stride": (3, 2), "padding": (0, 1), "cover_all": True, "layout": layout}
    case = Case((2, 3, 8, 7), (4, 3, 2, 3), {})
    case = case.in_layout(layout)
    x, w = integers(case.x_shape), integers(case.w_shape, seed=1)
    y = cuconv.conv(to_device(xp, x), to_device(xp, w), **options)
    columns = cuconv.im2col(to_device(xp, x), (2, 3), **options)
    first = layout == "channels_first"
    matrix = w.reshape(4, -1).T if first else w.reshape(-1, 4)
    rows = to_host(y).transpose(0, 2, 3, 1) if first else to_host(y)
    testing.assert_equal(to_host(columns) @ matrix, rows.reshape(-1, 4))
    testing.check_adjoint(
        lambda x: cuconv.im2col(x, (2, 3), **options),
        lambda c: cuconv.col2im(c, case.x_shape, (2, 3), **options),
        case.x_shape,
        columns.shape,
        xp=xp,
    )
    blocks = cuconv.iter_im2col(to_device(xp, x), (2, 3), memory_limit=2**17, **options)
    parts = [to_host(part) for _, part in blocks]
    testing.assert_equal(np.concatenate(parts), to_host(columns))


def test_padding_that_repeats_is_longer_too(xp) -> None:
    x, w = xp.asarray([[[1.0, 2.0, 3.0]]]), xp.ones((1, 1, 2))
    options = {"stride": 3, "padding": ((0, 1),), "cover_all": True}
    for mode, last in (("zeros", 0), ("reflect", 3), ("circular", 3)):
        y = cuconv.conv(x, w, padding_mode=mode, **options)
        assert to_host(y).tolist() == [[[3.0, float(last)]]], mode
    with pytest.raises(ValueError, match="transposed convolution has no cover_all"):
        cuconv.conv_transpose(x, w, cover_all=True)
    with pytest.raises(TypeError, match="cover_all must be True or False; got 2"):
        cuconv.conv(x, w, cover_all=2)
