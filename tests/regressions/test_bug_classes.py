"""Bugs that other convolution libraries have shipped, one test for each class of them.

The numbers are those of the project's list.  Not here are the classes of Winograd (14),
pooling (15) and the CUDA kernels alone (18), which have tests of their own.
"""

import itertools
import os
from functools import partial
from typing import Any

import numpy as np
import pytest
from cases import EMPTY
from support import (
    LAYOUTS,
    OPERATIONS,
    PLACES,
    Case,
    Operands,
    cupy_slowly,
    device_allocations,
    integers,
    operands,
    peak,
    reference,
    run,
    slowly,
    smallest_limit,
    to_device,
    to_host,
)

import cuconv
from cuconv import testing
from cuconv.geometry import PADDING_MODES, ConvGeometry


def need_memory(gibibytes: int) -> None:
    """Skip where the machine is too small; in CI that is a failure."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if free < gibibytes * 2**30:
        reason = f"needs {gibibytes} GiB of free memory; there are {free / 2**30:.1f}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def check(
    xp: Any, case: Case, dtype: str = "float32", seed: int = 0, **more: Any
) -> None:
    """All three operations equal the loops."""
    arrays = operands(case, dtype, seed)
    for op in OPERATIONS:
        wanted = reference(op, arrays, case).astype(dtype)
        testing.assert_equal(run(op, arrays.on(xp), case, **more), wanted, dtype=dtype)


# 1. More than 2^31 elements


@pytest.mark.parametrize("dtype", ["float32", *slowly("uint8")])
def test_01_columns_past_2_to_the_31(dtype) -> None:
    """In megabytes of memory; what counts is the end of the last batch entry."""
    need_memory(2)
    taps, length = 64, 2**24 + 4099
    tail = 500
    x = np.zeros((2, 1, length), dtype=dtype)
    x[-1, 0, -tail:] = integers((tail,), dtype)
    w = integers((1, 1, taps), dtype, seed=1)
    geometry = ConvGeometry.of_weights(x.shape, w.shape)
    assert geometry.column_bytes(1) > 2**31
    y = cuconv.conv(x, w, precision="strict")
    end = Case((1, 1, tail), w.shape, {})
    wanted = testing.conv_reference(x[-1:, :, -tail:], w).astype(dtype)
    testing.assert_equal(y[-1:, :, -(tail - taps + 1) :], wanted)
    assert not y[0].any()
    assert not y[-1, 0, : -(tail + taps)].any()
    dy = np.zeros_like(y)
    dy[-1, 0, -300:] = integers((300,), dtype, seed=2)
    arrays = Operands(x[-1:, :, -tail:], w, dy[-1:, :, -(tail - taps + 1) :])
    dw = cuconv.conv_weight_grad(dy, x, w.shape, precision="strict")
    testing.assert_equal(dw, reference("weight_grad", arrays, end).astype(dtype))


def test_01_columns_past_2_to_the_31_backward() -> None:
    need_memory(2)
    taps, length, tail = 32, 2**26 + 4099, 500
    dy = np.zeros((1, 1, length - taps + 1), dtype=np.float32)
    dy[..., -300:] = integers((300,), seed=2)
    w = integers((1, 1, taps), np.float32, seed=1)
    assert ConvGeometry.of_weights((1, 1, length), w.shape).column_bytes(1) > 2**31
    dx = cuconv.conv_input_grad(dy, w, (1, 1, length), precision="strict")
    end = dy[..., -(tail - taps + 1) :]
    wanted = testing.conv_input_grad_reference(end, w, (1, 1, tail))
    testing.assert_equal(dx[..., -tail:], wanted)
    assert not dx[..., :-tail].any()


def test_01_an_input_past_2_to_the_31() -> None:
    """Two gibibytes, of which a long stride reads a page here and there."""
    need_memory(2)
    x = np.zeros((1, 2, 2**30 + 70_001), dtype=np.int8)
    assert x.size > 2**31
    w = integers((3, 2, 2), np.int8)
    stride = 2**16
    positions = (x.shape[-1] - 2) // stride + 1
    last = (positions - 1) * stride
    x[0, :, last : last + 2] = integers((2, 2), np.int8, seed=1)
    y = cuconv.conv(x, w, stride=stride)
    assert y.shape == (1, 3, positions)
    wanted = testing.conv_reference(x[:, :, last : last + 2], w)
    testing.assert_equal(y[..., -1:], wanted)
    assert wanted.any()
    assert not y[..., :-1].any()


def test_01_a_result_that_reaches_past_2_to_the_31() -> None:
    """Cells spread over two gibibytes, most of which are never touched."""
    need_memory(2)
    cells, step = 66, 2**25
    flat = np.zeros(cells * step, dtype=np.int8)
    out = flat.reshape(1, 1, cells, step)[..., 7]
    x, w = integers((1, 2, cells + 1), np.int8), integers((1, 2, 2), np.int8, seed=1)
    cuconv.conv(x, w, out=out)
    testing.assert_equal(out, testing.conv_reference(x, w).astype(np.int8))


# 2. Counts at 65,535 and 65,536


@pytest.mark.parametrize("count", [65_535, 65_536, 65_537])
@pytest.mark.parametrize("where", ["images", "positions", "channels", "filters"])
def test_02_counts_around_2_to_the_16(xp, where, count) -> None:
    case = {
        "images": Case((count, 1, 3), (2, 1, 2), {}),
        "positions": Case((1, 1, count + 1), (2, 1, 2), {}),
        "channels": Case((1, count, 2), (1, count, 2), {}),
        "filters": Case((1, 1, 3), (count, 1, 2), {}),
    }[where]
    arrays = Operands(
        integers(case.x_shape, "float32"),
        integers(case.w_shape, "float32", seed=1),
        integers(
            ConvGeometry.of_weights(case.x_shape, case.w_shape).y_shape,
            "float32",
            seed=2,
        ),
    )
    x, w, dy = arrays
    # Two taps, written out: y[o] = x[o] w[0] + x[o + 1] w[1].
    spots = [slice(None, -1), slice(1, None)]
    pairs = [(x[..., spot], w[..., t]) for t, spot in enumerate(spots)]
    y = sum(np.einsum("nco,kc->nko", part, tap) for part, tap in pairs)
    dw = np.stack([np.einsum("nko,nco->kc", dy, part) for part, _ in pairs], axis=-1)
    dx = np.zeros_like(x)
    for spot, (_, tap) in zip(spots, pairs, strict=True):
        dx[..., spot] += np.einsum("nko,kc->nco", dy, tap)
    for op, wanted in zip(OPERATIONS, (y, dx, dw), strict=True):
        testing.assert_equal(run(op, arrays.on(xp), case), wanted)


# 3 to 7. Geometry


def test_03_stride_tail_of_two_or_more(xp) -> None:
    checked = 0
    for stride, tail in ((3, 2), (4, 2), (4, 3), (5, 4)):
        for padding in (0, 1, (2, 0)):
            pad = padding if isinstance(padding, tuple) else (padding, padding)
            size = 2 * stride + 3 + tail - sum(pad)
            case = Case((2, 2, size), (3, 2, 3), {"stride": stride, "padding": (pad,)})
            assert (size + sum(pad) - 3) % stride == tail
            check(xp, case)
            checked += 1
    assert checked == 12


def test_04_groups_with_stride(xp) -> None:
    for groups, stride in itertools.product((2, 3, 6), (2, 3)):
        case = Case(
            (2, 6, 8, 7),
            (12, 6 // groups, 2, 3),
            {"groups": groups, "stride": (stride, 1), "padding": (0, 1)},
        )
        check(xp, case)


def test_05_stride_is_not_dilation(xp) -> None:
    for stride, dilation in ((2, 3), (3, 2), (1, 4), (4, 1)):
        check(xp, Case((2, 2, 14), (3, 2, 3), {"stride": stride, "dilation": dilation}))


def test_05_nor_is_either_of_them_input_dilation(xp) -> None:
    names = "stride", "dilation", "input_dilation"
    for values in itertools.permutations((1, 2, 3)):
        options = dict(zip(names, values, strict=True))
        check(xp, Case((2, 4, 7), (6, 2, 3), {**options, "groups": 2, "padding": 1}))


def test_06_no_axis_is_taken_for_another(xp) -> None:
    """All parameters differ, then every order of the axes in turn."""
    size, kernel, stride = (5, 8, 7), (1, 3, 2), (2, 1, 3)
    dilation, pads = (3, 2, 1), ((0, 1), (2, 0), (1, 3))
    for order in itertools.permutations(range(3)):
        moved = [
            tuple(v[i] for i in order) for v in (size, kernel, stride, dilation, pads)
        ]
        options = dict(zip(("stride", "dilation", "padding"), moved[2:], strict=True))
        for layout in LAYOUTS:
            case = Case((2, 2, *moved[0]), (2, 2, *moved[1]), options)
            check(xp, case.in_layout(layout))


def test_07_pads_at_the_end_in_three_dimensions(xp) -> None:
    for axis in range(3):
        pads = [(0, 0)] * 3
        pads[axis] = (0, 2)
        case = Case((1, 2, 3, 4, 5), (2, 2, 2, 3, 2), {"padding": tuple(pads)})
        assert (
            case.y_shape()[2 + axis]
            == case.x_shape[2 + axis] + 3 - case.w_shape[2 + axis]
        )
        check(xp, case)


def test_07_same_with_even_kernels_and_strides(xp) -> None:
    checked = 0
    words = ("same", "same_lower")
    for word, kernel, stride, size in itertools.product(
        words, (1, 2, 3, 4), (1, 2, 3), (1, 5, 6)
    ):
        for dilation in (1, 2):
            options = {"padding": word, "stride": stride, "dilation": dilation}
            case = Case((1, 2, size), (2, 2, kernel), options)
            assert case.y_shape()[-1] == -(-size // stride)
            check(xp, case)
            checked += 1
    assert checked == 144


def test_08_output_padding_of_strides_but_less_than_dilation(xp) -> None:
    options = {"stride": (1, 2), "dilation": (3, 5), "output_padding": (2, 4)}
    x, w = integers((2, 3, 4, 5)), integers((3, 2, 2, 3), seed=1)
    y = cuconv.conv_transpose(to_device(xp, x), to_device(xp, w), **options)
    assert y.shape == (2, 2, 3 + 3 + 2 + 1, 8 + 10 + 4 + 1)
    testing.assert_equal(y, testing.conv_transpose_reference(x, w, **options))
    dy = integers(y.shape, seed=2)
    dx, dw, _ = cuconv.conv_transpose_backward(
        *(to_device(xp, array) for array in (dy, x, w)), **options
    )
    wanted = testing.conv_transpose_input_grad_reference(dy, w, x.shape, **options)
    testing.assert_equal(dx, wanted)
    wanted = testing.conv_transpose_weight_grad_reference(dy, x, w.shape, **options)
    testing.assert_equal(dw, wanted)


def test_09_pads_larger_than_the_kernel_and_crops_larger_than_the_input(xp) -> None:
    pads = [
        (5, 0),
        (0, 6),
        (7, 7),
        (-5, 9),
        (9, -5),
        (-4, 6),
        (6, -4),
        (-9, 12),
        (12, -9),
    ]
    for pad in pads:
        for stride in (1, 3):
            case = Case((2, 2, 4), (3, 2, 2), {"padding": (pad,), "stride": stride})
            check(xp, case)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_09_padding_modes_far_beyond_the_input(xp, mode) -> None:
    """Mirrors of mirrors, circles that go round again, and one end cropped away."""
    checked = 0
    for size, pad in itertools.product((1, 2, 4), ((3, 0), (0, 5), (11, 6), (-1, 9))):
        for stride in (1, 3):
            options = {"padding": (pad,), "stride": stride, "padding_mode": mode}
            check(xp, Case((2, 2, size), (3, 2, 2), options))
            checked += 1
    assert checked == 24


# 10, 20. Empty and degenerate


SIZES = itertools.product((0, 2), (0, 2), (0, 2), (1, 2))
NOTHING = [
    *EMPTY,
    *(Case((n, c * g, 4, 5), (k * g, c, 2, 3), {"groups": g}) for n, c, k, g in SIZES),
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_10_empty_operands_give_zeros_never_rubbish(xp, op, dtype) -> None:
    """``out`` is full of NaN beforehand: what is not written shows."""
    for case in NOTHING:
        arrays = operands(case, dtype)
        wanted = reference(op, arrays, case).astype(dtype)
        testing.assert_equal(run(op, arrays.on(xp), case), wanted, dtype=dtype)
        out = xp.full(wanted.shape, np.nan, dtype=dtype)
        testing.assert_equal(run(op, arrays.on(xp), case, out=out), wanted)
    assert len(NOTHING) == len(EMPTY) + 16


def test_10_backward_of_an_empty_batch(xp) -> None:
    x, w, dy = (xp.zeros(s, np.float32) for s in ((0, 2, 5), (3, 2, 2), (0, 3, 4)))
    got = cuconv.conv_backward(dy, x, w)
    assert got.x.shape == (0, 2, 5)
    testing.assert_equal(got.w, np.zeros((3, 2, 2)))
    testing.assert_equal(got.bias, np.zeros(3))


@pytest.mark.parametrize(
    "general",
    [
        {"padding_mode": "circular", "padding": (1, 2)},
        {"input_dilation": (2, 3)},
        {"batch_groups": 2},
    ],
)
def test_10_empty_operands_of_general_convolutions(xp, general) -> None:
    """No image, channel or filter: zeros over the NaN that was there."""
    for images, channels, filters in ((0, 2, 2), (2, 0, 2), (2, 2, 0), (0, 0, 0)):
        case = Case((images, channels, 4, 5), (filters, channels, 2, 3), general)
        arrays = operands(case, "float32")
        for op in OPERATIONS:
            wanted = reference(op, arrays, case)
            out = xp.full(wanted.shape, np.nan, dtype=np.float32)
            testing.assert_equal(run(op, arrays.on(xp), case, out=out), wanted)


def test_20_degenerate_products(xp) -> None:
    """Matrices with a side of one, and vectors, in every role."""
    checked = 0
    for n, c, k, size, kernel in itertools.product(
        (1, 2), (1, 3), (1, 3), (1, 3), (1, 3)
    ):
        if kernel <= size:
            check(xp, Case((n, c, size), (k, c, kernel), {}))
            checked += 1
    assert checked == 24


def test_20_parameters_near_2_to_the_63(xp) -> None:
    x, w = xp.ones((1, 1, 5)), xp.ones((1, 1, 2))
    for value in (2**31, 2**32, 2**63 - 1, 2**63, 2**64, 2**64 + 1):
        for name in ("stride", "dilation", "padding"):
            with pytest.raises(
                ValueError, match=f"{name} of spatial axis 0 is {value}"
            ):
                cuconv.conv(x, w, **{name: value})
    # The largest stride that is allowed is a stride like any other.
    testing.assert_equal(cuconv.conv(x, w, stride=2**31 - 1), np.full((1, 1, 1), 2.0))


# 11, 12. Memory


@pytest.mark.parametrize("where", ["x", "w", "dy"])
def test_11_strides_of_every_kind(xp, where) -> None:
    case = Case((2, 4, 6, 5), (6, 2, 3, 2), {"groups": 2, "stride": (1, 2)})
    arrays = operands(case, "float32")
    checked = 0
    for place, op in itertools.product(PLACES.values(), OPERATIONS):
        moved = place(xp, getattr(arrays, where))
        mine = arrays.on(xp)._replace(**{where: moved})
        testing.assert_equal(run(op, mine, case), reference(op, arrays, case))
        checked += 1
    assert checked == 15


def test_12_transposed_out(xp) -> None:
    """Results stored by columns and by rows, with every axis moved once."""
    case = Case((3, 2, 5, 4), (6, 2, 2, 3), {"padding": 1})
    arrays = operands(case, "float32")
    checked = 0
    for op in OPERATIONS:
        wanted = reference(op, arrays, case)
        for order in itertools.permutations(range(4)):
            shape = [wanted.shape[i] for i in order]
            out = xp.full(shape, np.nan, np.float32).transpose(
                *np.argsort(order).tolist()
            )
            assert out.shape == wanted.shape
            run(op, arrays.on(xp), case, out=out)
            testing.assert_equal(out, wanted)
            checked += 1
    assert checked == 72


# 13. NaN and infinity stay local


@pytest.mark.parametrize("precision", ["strict", "standard"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_13_nan_and_infinity_reach_their_windows_alone(xp, bad, precision) -> None:
    x = np.ones((2, 2, 9, 8), dtype=np.float32)
    x[1, 0, 4, 5] = bad
    w = np.ones((3, 2, 3, 2), dtype=np.float32)
    y = to_host(
        cuconv.conv(to_device(xp, x), to_device(xp, w), padding=1, precision=precision)
    )
    touched = np.zeros(y.shape, dtype=bool)
    touched[1, :, 3:6, 5:7] = True
    assert (np.isfinite(y) == ~touched).all()
    dy = np.ones((2, 3, 7, 7), dtype=np.float32)
    dy[0, 1, 2, 3] = bad
    dx = to_host(cuconv.conv_input_grad(to_device(xp, dy), to_device(xp, w), x.shape))
    touched = np.zeros(dx.shape, dtype=bool)
    touched[0, :, 2:5, 3:5] = True
    assert (np.isfinite(dx) == ~touched).all()


def test_13_a_nan_in_the_padding_of_nothing(xp) -> None:
    """Cropped cells take no part, whatever they hold."""
    x = np.full((1, 1, 6), np.nan)
    x[..., 2:5] = 1
    y = cuconv.conv(to_device(xp, x), xp.ones((1, 1, 2)), padding=((-2, -1),))
    testing.assert_equal(y, np.full((1, 1, 2), 2.0))


# 16, 17. Accumulation


def test_16_int8_and_uint8_sum_in_int32_on_demand(xp) -> None:
    for dtype, value in (("int8", -128), ("uint8", 255)):
        x, w = xp.full((1, 70, 5), value, dtype), xp.full((2, 70, 3), value, dtype)
        y = cuconv.conv(x, w, padding=1, dtype="int32")
        edge, middle = 140 * value**2, 210 * value**2
        wanted = np.array([[[edge, middle, middle, middle, edge]] * 2])
        testing.assert_equal(y, wanted, dtype="int32")


def test_16_zero_points_do_not_wrap(xp) -> None:
    """255 less 0 and -128 less 127, times as much, in sums past 16 bits."""
    ends = {"int8": (-128, 127), "uint8": (0, 255)}
    checked = 0
    for (x_type, x_ends), (w_type, w_ends) in itertools.product(ends.items(), repeat=2):
        for (a, b), (c, d) in ((x_ends, w_ends), (x_ends[::-1], w_ends)):
            x, w = xp.full((1, 300, 2), a, x_type), xp.full((2, 300, 1), c, w_type)
            y = cuconv.conv(x, w, x_zero_point=b, w_zero_point=d)
            wanted = np.full((1, 2, 2), 300 * (a - b) * (c - d))
            testing.assert_equal(y, wanted, dtype="int32")
            checked += 1
    assert checked == 8


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_17_half_types_sum_in_float32_in_every_chunking(xp, op, dtype) -> None:
    """Sums of 3000 ones and more; in half types they would stop at 2048 and 256."""
    many = 3000
    case = {
        "forward": Case((2, many, 4), (1, many, 2), {}),
        "input_grad": Case((2, 1, 4), (many, 1, 1), {}),
        "weight_grad": Case((2, 1, many + 1), (1, 1, 2), {}),
    }[op]
    y_shape = ConvGeometry.of_weights(case.x_shape, case.w_shape).y_shape
    arrays = Operands(
        *(xp.ones(s, dtype) for s in (case.x_shape, case.w_shape, y_shape))
    )
    sums = {"forward": 2 * many, "input_grad": many, "weight_grad": 2 * many}[op]
    rounded = np.array(sums, dtype=dtype)
    call = partial(run, op, arrays, case)
    for options in ({}, {"memory_limit": smallest_limit(call)}):
        result = to_host(call(**options))
        assert result.dtype == rounded.dtype
        assert (result == rounded).all()


# 21, 22. Plans


@pytest.mark.parametrize("op", OPERATIONS)
def test_21_the_same_bits_on_every_run(xp, op) -> None:
    """Large enough for several workers, with numbers whose sums depend on the order."""
    case = Case((6, 16, 30, 28), (24, 16, 3, 3), {"padding": 1})
    rng = np.random.default_rng(0)
    shapes = (case.x_shape, case.w_shape, (6, 24, 30, 28))
    arrays = Operands(*(rng.standard_normal(s).astype(np.float32) for s in shapes)).on(
        xp
    )
    first = to_host(run(op, arrays, case, deterministic=True))
    for _ in range(5):
        again = to_host(run(op, arrays, case, deterministic=True))
        assert (again.view(np.int32) == first.view(np.int32)).all()


def test_22_plans_are_not_confused(xp) -> None:
    """One geometry with every type, place and alignment in turn, twice over."""
    case = Case((2, 4, 5, 4), (4, 4, 1, 1), {})
    kinds = itertools.product(("float32", "float16", "complex64", "int8"), PLACES)
    checked = 0
    for dtype, place in [*kinds] * 2:
        arrays = operands(case, dtype)
        mine = Operands(*(PLACES[place](xp, array) for array in arrays))
        for op in OPERATIONS:
            wanted = reference(op, arrays, case).astype(dtype)
            testing.assert_equal(run(op, mine, case), wanted, dtype=dtype)
            wide = np.result_type(np.dtype(dtype), np.float64)
            result = run(op, mine, case, dtype=wide)
            testing.assert_equal(result, reference(op, arrays, case), dtype=wide)
            checked += 2
    assert checked == 240


def test_22_plans_of_general_convolutions_are_not_confused(xp) -> None:
    """The same arrays with one option after the other, twice over."""
    ways: list[dict[str, Any]] = [{"padding_mode": mode} for mode in PADDING_MODES]
    ways += [{"input_dilation": 2}, {"input_dilation": (1, 2)}]
    cases = [Case((2, 2, 4, 3), (2, 2, 3, 2), {"padding": 2, **way}) for way in ways]
    for case in 2 * cases:
        check(xp, case)


# 23, 25. Memory


@cupy_slowly
@pytest.mark.parametrize("op", OPERATIONS)
def test_23_one_large_volume_is_cut_along_space(xp, op) -> None:
    """The columns of one image are 27 times the input; the limit is a tenth of it."""
    case = Case((1, 4, 20, 41, 43), (4, 4, 3, 3, 3), {"padding": 1})
    arrays = Operands(
        integers(case.x_shape, "float32"),
        integers(case.w_shape, "float32", seed=1),
        integers((1, 4, 20, 41, 43), "float32", seed=2),
    ).on(xp)
    limit = arrays.x.nbytes // 10 + 3 * 2**16
    whole = run(op, arrays, case)
    assert peak(xp, partial(run, op, arrays, case, memory_limit=limit), limit) <= limit
    testing.assert_equal(run(op, arrays, case, memory_limit=limit), whole)


def test_25_one_allocation_serves_a_whole_call(xp) -> None:
    if xp is np:
        pytest.skip("a pool is CuPy's")
    case = Case((9, 4, 12, 11), (8, 4, 3, 3), {"padding": 1})
    arrays = operands(case, "float32").on(xp)
    for op in OPERATIONS:
        call = partial(run, op, arrays, case)
        limit = smallest_limit(call) + 2**12
        call(memory_limit=limit)
        with device_allocations(xp) as seen:
            call(memory_limit=limit)
        # The result, the shared buffers and those of the one worker.
        assert seen.count <= 3


OTHER_OPTIONS: list[dict[str, Any]] = [
    *({"precision": "fast"}, {"memory_limit": "10 MiB"}, {"strategy": "im2col"}),
    *({"deterministic": True}, {"stride": (2, 1)}, {"padding": 2}, {"layout": "NCHW"}),
    *({"stride": [2, 1]}, {"stride": np.array([2, 1])}, {"dtype": "float64"}),
]


@pytest.mark.parametrize("other", OTHER_OPTIONS, ids=str)
def test_22_another_option_is_another_plan(xp, other) -> None:
    x, w, _ = operands(Case((2, 4, 9, 8), (4, 4, 3, 3), {"padding": 1}), "float32")
    known = "stride", "padding", "layout"
    for options in ({"padding": 1}, {"padding": 1, **other}) * 2:
        y = cuconv.conv(to_device(xp, x), to_device(xp, w), **options)
        mine = {name: value for name, value in options.items() if name in known}
        wanted = testing.conv_reference(x, w, **mine)
        dtype = options.get("dtype", "float32")
        testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5, dtype=dtype)


def test_22_other_arrays_are_another_plan() -> None:
    x, w, _ = operands(Case((2, 4, 9, 9), (4, 4, 3, 3), {}), "float32")
    bias = integers((4,), "float32")
    swapped = x.astype(x.dtype.newbyteorder())
    for arrays in 2 * [
        *((x, w), (x.astype("f8"), w), (x, w.astype("f8")), (swapped, w)),
        *((np.asfortranarray(x), w), (x[:, :, ::-1], w), (x[:, :, :, :8], w)),
        *((x[:1], w), (x[0], w), (x, w, bias), (x, w, bias.astype("f8"))),
        (x, w, bias[::-1]),
    ]:
        testing.assert_equal(cuconv.conv(*arrays), testing.conv_reference(*arrays))
