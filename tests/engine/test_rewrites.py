"""Padding modes, input dilation, batch groups and zero points, by the loops' word."""

import math
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from cases import general_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    HALVES,
    LAYOUTS,
    OPERATIONS,
    PLACES,
    Case,
    Operands,
    call_into,
    captured,
    device_of,
    forget_plans,
    integers,
    of,
    operands,
    peak,
    plan_of,
    reference,
    run,
    smallest_limit,
    to_device,
    wanted_shape,
    with_buffers_on,
)

import cuconv
from cuconv import testing
from cuconv.engine.rewrites import polyphase
from cuconv.geometry import PADDING_MODES, Axis, ConvGeometry
from cuconv.memory import MemoryLimitError

# One of each kind, and what they have in common; all extents differ.
CASES = {
    "reflect": Case(
        (2, 4, 4, 5),
        (4, 2, 3, 2),
        {"padding": ((5, 2), (1, 9)), "groups": 2, "padding_mode": "reflect"},
    ),
    "symmetric": Case(
        (2, 4, 4, 5),
        (2, 2, 3, 4),
        {
            "padding": ((9, 1), (-1, 13)),
            "groups": 2,
            "stride": (1, 2),
            "padding_mode": "symmetric",
        },
    ),
    "replicate": Case(
        (2, 3, 7),
        (2, 3, 3),
        {"padding": ((3, 4),), "stride": 2, "padding_mode": "replicate"},
    ),
    "circular": Case(
        (1, 2, 3, 4, 5),
        (3, 2, 2, 1, 3),
        {"padding": (1, (0, 2), (7, -1)), "padding_mode": "circular"},
    ),
    "input dilation": Case(
        (2, 4, 5, 4),
        (6, 2, 3, 4),
        {
            "input_dilation": (2, 3),
            "stride": (3, 1),
            "dilation": (1, 2),
            "padding": ((2, 1), (3, 0)),
            "groups": 2,
        },
    ),
    "batch groups": Case(
        (6, 2, 5, 4),
        (9, 2, 2, 3),
        {"batch_groups": 3, "padding": (1, (0, 1)), "stride": (2, 1)},
    ),
    "all together": Case(
        (4, 3, 5),
        (4, 3, 2),
        {"batch_groups": 2, "input_dilation": 2, "padding": ((2, -1),), "dilation": 2},
    ),
    "reflected batch groups": Case(
        (4, 3, 6, 5),
        (2, 3, 3, 3),
        {"batch_groups": 2, "padding": 2, "padding_mode": "reflect"},
    ),
}
by_case = pytest.mark.parametrize("name", CASES)
by_op = pytest.mark.parametrize("op", OPERATIONS)


# Results


@settings(max_examples=10)
@given(case=general_cases(), limited=st.booleans())
def test_everything_equals_the_loops(xp, case, limited) -> None:
    """Small integers held as floats, exactly; under a small limit too.

    ``out`` is full of NaN beforehand: what is not written shows.
    """
    arrays = operands(case)
    for op in OPERATIONS:
        wanted = reference(op, arrays, case)
        task = partial(run, op, arrays.on(xp), case)
        more = {"memory_limit": smallest_limit(task)} if limited else {}
        out = xp.full(wanted.shape, np.nan)
        testing.assert_equal(task(out=out, **more), wanted)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("mode", PADDING_MODES[1:])
@given(data=st.data())
def test_a_padding_mode_is_what_numpy_pads(xp, mode, rank, data) -> None:
    """Padding of up to three times the input, which `numpy.pad` puts around it."""
    size = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    pair = st.tuples(*(st.integers(0, 3 * max(size)),) * 2)
    pads = tuple(data.draw(pair) for _ in size)
    kernel = [min(2, n + sum(p)) for n, p in zip(size, pads, strict=True)]
    x, w = integers((2, 2, *size)), integers((3, 2, *kernel), seed=1)
    padded = np.pad(x, ((0, 0), (0, 0), *pads), WORDS[mode])
    options = {"padding": pads, "padding_mode": mode}
    y = cuconv.conv(*(xp.asarray(a) for a in (x, w)), **options)
    testing.assert_equal(y, cuconv.conv(padded, w, precision="strict"))


SCIPY_WORDS = {
    "zeros": "constant",
    "reflect": "mirror",
    "symmetric": "reflect",
    "replicate": "nearest",
    "circular": "wrap",
}


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_a_padding_mode_by_its_name_in_scipy(mode) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    x, w = integers((6, 5)), integers((3, 5), seed=1)
    wanted = ndimage.correlate(x, w, mode=SCIPY_WORDS[mode])
    options = {"padding": "same", "padding_mode": mode, "precision": "strict"}
    y = cuconv.conv(x[None, None], w[None, None], **options)
    testing.assert_equal(y[0, 0], wanted)


@by_case
def test_both_gradients_are_adjoints_in_complex_numbers(xp, name) -> None:
    case = CASES[name]
    x, w, _ = operands(case, "complex128").on(xp)
    options, y_shape = case.options, case.y_shape()
    testing.check_adjoint(
        lambda x: cuconv.conv(x, w, **options),
        lambda dy: cuconv.conv_input_grad(dy, w, case.x_shape, **options),
        *(case.x_shape, y_shape),
        dtype="complex128",
        xp=xp,
    )
    testing.check_adjoint(
        lambda w: cuconv.conv(x, w, **options),
        lambda dy: cuconv.conv_weight_grad(dy, x, case.w_shape, **options),
        *(case.w_shape, y_shape),
        dtype="complex128",
        xp=xp,
    )


@pytest.mark.parametrize("name", ["reflected batch groups", "all together"])
@pytest.mark.parametrize("dtype", ["bool", "uint64", "complex64", *HALVES])
def test_every_kind_of_type(xp, dtype, name) -> None:
    case = CASES[name].in_layout("channels_last")
    arrays = operands(case, dtype)
    for op in OPERATIONS:
        wanted = reference(op, arrays, case).astype(dtype)
        testing.assert_equal(run(op, arrays.on(xp), case), wanted, dtype=dtype)


@by_case
def test_bias_out_and_all_gradients_at_once(xp, name) -> None:
    case = CASES[name]
    host = operands(case)
    x, w, dy = host.on(xp)
    bias = integers((case.filters(),), seed=9)
    spaced = xp.full([2 * n for n in dy.shape], 77.0)
    out = spaced[tuple(slice(None, None, 2) for _ in dy.shape)]
    assert cuconv.conv(x, w, to_device(xp, bias), out=out, **case.options) is out
    column = bias.reshape(-1, *(1,) * (dy.ndim - 2))
    testing.assert_equal(out, reference("forward", host, case) + column)
    dx, dw, sums = cuconv.conv_backward(dy, x, w, **case.options)
    testing.assert_equal(dx, reference("input_grad", host, case))
    testing.assert_equal(dw, reference("weight_grad", host, case))
    axes = (0, *range(2, dy.ndim))
    testing.assert_equal(sums, host.dy.sum(axis=axes))


@pytest.mark.parametrize("dtype", HALVES)
@by_op
def test_halves_are_rounded_once(xp, op, dtype) -> None:
    """Mirrored cells and blocks of images are summed in float32, not in halves."""
    half = 2.0 ** -(11 if dtype == "float16" else 8)
    rng = np.random.default_rng(3)
    for name in ("reflect", "batch groups", "reflected batch groups"):
        case = CASES[name]
        arrays = Operands(
            *(rng.uniform(1, 2, a.shape).astype(dtype) for a in operands(case))
        )
        task = partial(run, op, arrays.on(xp), case)
        wide = Operands(*(a.astype("float64") for a in arrays))
        exact = reference(op, wide, case)
        for more in ({}, {"memory_limit": smallest_limit(task)}):
            # Positive numbers: float32 adds a few of its own roundings, no more.
            rtol = half + 2.0**-18
            testing.assert_close(task(**more), exact, rtol=rtol, dtype=dtype)


# Gradients as convolutions: the identities of docs/general.md


def exchanged(array: np.ndarray) -> np.ndarray:
    """Images and channels, or filters and channels, in each other's place."""
    return array.swapaxes(0, 1)


def pads_for_gradients(case: Case) -> tuple[list[Any], list[Any]]:
    """The padding of the two convolutions that give dx and dw."""
    of_x, of_w = [], []
    for axis in ConvGeometry.of_weights(
        case.x_shape, case.w_shape, **case.options
    ).axes:
        p, q, extent = axis.before, axis.after, axis.extent
        over = (axis.padded - extent) % axis.stride
        of_x.append((extent - 1 - p, extent - 1 - q + over))
        of_w.append((p, q - over))
    return of_x, of_w


def in_first_layout(case: Case) -> bool:
    return case.layout == "channels_first" and len(case.x_shape) == len(case.w_shape)


@settings(max_examples=15)
@given(case=general_cases().filter(in_first_layout))
def test_gradients_are_convolutions_themselves(case) -> None:
    x, w, dy = operands(case, "complex128")
    o, (of_x, of_w) = case.options, pads_for_gradients(case)
    groups, batch_groups = o["groups"], o.get("batch_groups", 1)
    input_dilation, rank = o.get("input_dilation", 1), w.ndim - 2
    dw = cuconv.conv(
        exchanged(x.conj()),
        exchanged(dy),
        stride=o["dilation"],
        dilation=o["stride"],
        input_dilation=input_dilation,
        padding=of_w,
        padding_mode=o["padding_mode"],
        groups=batch_groups,
        batch_groups=groups,
    )
    wanted = cuconv.conv_weight_grad(dy, x, w.shape, **o)
    testing.assert_equal(exchanged(dw), wanted)
    if o["padding_mode"] != "zeros":
        return
    shared = groups * batch_groups
    by_group = w.reshape(shared, -1, *w.shape[1:]).swapaxes(1, 2)
    filters = by_group.reshape(-1, w.shape[0] // shared, *w.shape[2:])
    dx = cuconv.conv(
        dy,
        np.flip(filters, range(2, rank + 2)).conj(),
        stride=input_dilation,
        dilation=o["dilation"],
        input_dilation=o["stride"],
        padding=of_x,
        groups=shared,
    )
    if batch_groups > 1:
        # Channels of each batch group beside each other: images again.
        each = dx.reshape(len(dy), batch_groups, -1, *x.shape[2:])
        dx = each.swapaxes(0, 1).reshape(x.shape)
    testing.assert_equal(dx, cuconv.conv_input_grad(dy, w, x.shape, **o))


@by_case
def test_gradients_of_gradients_are_the_same_three_calls(name) -> None:
    """⟨v, dx⟩ and ⟨u, dw⟩ are both the trilinear form of the convolution."""
    case = CASES[name]
    (x, w, dy), o = operands(case), case.options
    v, u = integers(x.shape, seed=7), integers(w.shape, seed=8)
    form = np.vdot(v, cuconv.conv_input_grad(dy, w, x.shape, **o))
    assert form == np.vdot(cuconv.conv(v, w, **o), dy)
    assert form == np.vdot(cuconv.conv_weight_grad(dy, v, w.shape, **o), w)
    form = np.vdot(u, cuconv.conv_weight_grad(dy, x, w.shape, **o))
    assert form == np.vdot(cuconv.conv(x, u, **o), dy)
    assert form == np.vdot(cuconv.conv_input_grad(dy, u, x.shape, **o), x)


# Geometry

WORDS = {
    "reflect": "reflect",
    "symmetric": "symmetric",
    "replicate": "edge",
    "circular": "wrap",
}


@given(
    mode=st.sampled_from(sorted(WORDS)),
    size=st.integers(1, 6),
    before=st.integers(-4, 25),
    after=st.integers(-4, 25),
)
def test_runs_read_what_numpy_pads(mode, size, before, after) -> None:
    axis, cells = Axis(size, 1, 1, 1, 0, 0), np.arange(size)
    padded = np.pad(cells, (max(before, 0), max(after, 0)), WORDS[mode])
    window = (-before, max(size + after, -before))
    wanted = padded[max(-before, 0) :][: window[1] - window[0]]
    for single in (False, True):
        read = np.full(wanted.shape, -1)
        for found in axis.runs(window, mode):
            for one in found.one_to_one() if single else [found]:
                assert (read[one.window] == -1).all(), "read twice"
                read[one.window] = cells[one.cells]
                same = read[one.window].size == cells[one.cells].size
                assert same or not single
                assert sorted(cells[one.cells]) == list(range(*one.bounds))
        assert np.array_equal(read, wanted)


spread_axes = st.builds(
    Axis,
    size=st.integers(1, 9),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 5),
    dilation=st.integers(1, 6),
    before=st.integers(-5, 8),
    after=st.integers(-5, 8),
    overhang=st.just(0),
    windows=st.just(0),
    input_dilation=st.integers(1, 6),
).filter(lambda a: a.padded >= a.extent)


@given(axis=spread_axes)
def test_phases_of_y_meet_every_cell_and_no_zero_between_cells(axis) -> None:
    """Every (output, tap, cell) once; no output and no tap in two phases."""
    outputs, met, owned, taken = range(axis.out), [], [], []
    for phase in ConvGeometry(1, 2, (axis,), filters=3).phases():
        own = outputs[phase.results[0]]
        owned += own
        (other,) = phase.geometry.axes
        taps = range(axis.kernel)[phase.taps[0]]
        taken += taps
        assert (other.input_dilation, other.kernel, other.out) == (
            1,
            len(taps),
            len(own),
        )
        for index, (number, tap) in product(range(len(own)), enumerate(taps)):
            cell = other.first(index) + number * other.dilation
            if 0 <= cell < axis.size:
                met.append((own[index], tap, cell))
    assert len(set(owned)) == len(owned)
    assert len(set(taken)) == len(taken)
    places = {cell * axis.input_dilation: cell for cell in range(axis.size)}
    expected = []
    for output, tap in product(outputs, range(axis.kernel)):
        place = axis.first(output) + tap * axis.dilation
        if place in places:
            expected.append((output, tap, places[place]))
    assert sorted(met) == expected


def test_no_zero_between_cells_is_multiplied() -> None:
    """A transposed convolution of stride 4 written with input dilation."""
    shapes, options = ((1, 8, 16, 16), (8, 8, 8, 8)), {"padding": 5}
    plan = cuconv.plan_conv(*shapes, input_dilation=4, **options)
    y = math.prod(plan.result_shape[2:])
    # Each output meets 2 × 2 elements of x, or fewer at the borders; 64 taps in all.
    assert plan.flops <= 2 * 8 * 8 * y * 4
    whole = 2 * 8 * 8 * y * 64
    assert plan.flops < whole / 15


# Memory

LARGER = {
    "reflect": Case(
        (2, 8, 6, 33), (8, 8, 3, 3), {"padding": (4, 3), "padding_mode": "reflect"}
    ),
    "input dilation": Case(
        (3, 8, 10, 17),
        (8, 8, 5, 3),
        {"input_dilation": (3, 2), "padding": 2, "stride": (1, 3)},
    ),
    "batch groups": Case((6, 8, 12, 19), (12, 8, 3, 2), {"batch_groups": 3}),
}


@pytest.mark.parametrize("name", LARGER)
@by_op
def test_the_peak_is_within_the_limit_and_the_smallest_does(xp, op, name) -> None:
    """Halves, whose sums over blocks and mirrored cells need memory of their own."""
    case = LARGER[name] if xp is np else CASES[name]
    arrays = Operands(*(integers(s, "float16") for s in shapes_of(case))).on(xp)
    task = partial(run, op, arrays, case, **with_buffers_on(xp))
    smallest = smallest_limit(task)
    assert smallest > 0
    # One row of one image at a time, and a little more at a time.
    for limit in (smallest, smallest + 2**17):
        assert peak(xp, partial(task, memory_limit=limit), limit) <= limit
    with pytest.raises(MemoryLimitError) as caught:
        task(memory_limit=smallest - 1)
    assert (caught.value.limit, caught.value.smallest) == (smallest - 1, smallest)


def shapes_of(case: Case) -> tuple[tuple[int, ...], ...]:
    geometry = ConvGeometry.of_weights(case.x_shape, case.w_shape, **case.options)
    return case.x_shape, case.w_shape, geometry.y_shape


def test_parts_with_other_numbers_of_threads_keep_the_limit_together() -> None:
    """The arena of a part of one thread stays for the next, which has two."""
    options = {"padding": (9, 3), "padding_mode": "reflect"}
    case = Case((3, 8, 9, 33), (8, 8, 3, 3), options)
    arrays = Operands(*(integers(s, "float32") for s in shapes_of(case)))
    with cuconv.config(num_threads=2):
        task = partial(run, "input_grad", arrays, case)
        smallest = smallest_limit(task)
        for more in range(2**17 - 2**13, 2**17 + 2**14, 2**11):
            limit = smallest + more
            assert peak(np, partial(task, memory_limit=limit), limit) <= limit


def test_a_long_pad_is_never_copied_whole(xp) -> None:
    """The padded input would be 32 MiB, sixteen times what may be taken."""
    rows = 2**13 if xp is np else 2**9
    x, w = xp.ones((1, 1, 4, 512), np.float32), xp.ones((1, 1, 1, 2), np.float32)
    options = {"padding": ((rows, rows), (0, 0)), "padding_mode": "reflect"}
    limit = (rows * 2 + 4) * 512 * 4 // 16
    task = partial(cuconv.conv, x, w, memory_limit=limit, **options)
    assert peak(xp, task, limit) <= limit


# Plans


@by_case
def test_a_plan_says_what_it_does_and_runs_on_arrays_that_lie_anyhow(xp, name) -> None:
    case = CASES[name]
    arrays = operands(case, "float32")
    for op in OPERATIONS:
        plan = plan_of(op, case, device=device_of(xp))
        wanted = reference(op, arrays, case)
        assert plan.result_shape == wanted.shape
        text = dict(line.split(maxsplit=1) for line in str(plan).splitlines())
        assert text["parts"]
        assert plan.workspace_bytes >= 0
        assert plan.chunks >= 1
        for place in (to_device, *PLACES.values()):
            mine = Operands(*(place(xp, array) for array in arrays))
            testing.assert_equal(plan(*of(op, mine)), wanted)
        if op != "weight_grad":
            first, w = of(op, arrays.on(xp))
            prepared = plan.prepare(w)
            w[...] = 99
            testing.assert_equal(prepared(first), wanted)


def test_plans_are_printed_with_their_options() -> None:
    shapes = (4, 3, 9, 8), (6, 3, 3, 3)
    mode = str(cuconv.plan_conv(*shapes, padding=2, padding_mode="circular"))
    assert "padding mode  circular" in mode
    assert "parts         one copy, for 4 images and 11 rows" in mode
    input_dilation = str(cuconv.plan_conv(*shapes, input_dilation=(2, 1), padding=1))
    assert (
        "9 elements, 3 taps, stride 1, dilation 1, input dilation 2, padding"
        in input_dilation
    )
    assert "parts         2 phases" in input_dilation
    shared = str(cuconv.plan_conv(*shapes, batch_groups=2))
    assert "groups        2, of images" in shared


def test_a_prepared_plan_of_a_rewrite_takes_x_in_reverse() -> None:
    case = CASES["reflect"]
    x, w, _ = operands(case, "float32")
    plan = cuconv.plan_conv(x.shape, w.shape, **case.options).prepare(w)
    wanted = cuconv.conv(x[..., ::-1], w, **case.options)
    testing.assert_equal(plan(x[..., ::-1]), wanted)


@pytest.mark.parametrize("xp", ["cupy"], indirect=True)
@by_op
def test_a_capture_is_refused_where_a_copy_is_needed(xp, op) -> None:
    for name in ("reflect", "batch groups"):
        case = CASES[name]
        arrays = operands(case, "float32").on(xp)
        out = xp.empty(wanted_shape(op, case), "float32")
        words = "a CUDA graph is being captured, and padding_mode, batch_groups"
        with captured(xp), pytest.raises(ValueError, match=words):
            call_into(op, arrays, case, out)


@pytest.mark.parametrize("xp", ["cupy"], indirect=True)
@pytest.mark.parametrize("op", ["forward", "weight_grad"])
def test_phases_are_captured_where_their_strategy_is(xp, op) -> None:
    case = CASES["input dilation"]
    host = operands(case, "float32")
    arrays, wanted = host.on(xp), reference(op, host, case)
    out = xp.empty(wanted.shape, "float32")
    call_into(op, arrays, case, out, strategy="implicit_gemm")  # kernels are compiled
    out[...] = 77
    with captured(xp) as graphs:
        call_into(op, arrays, case, out)
    graphs[0].launch()
    xp.cuda.Device().synchronize()
    testing.assert_equal(out, wanted)


# Phases of strided input gradients

STRIDED = Case(
    (8, 128, 40, 39), (64, 128, 3, 3), {"stride": 2, "padding": 1, "dilation": (1, 2)}
)


def test_phases_of_strided_gradients_have_the_bits_of_any_number_of_threads(
    monkeypatch,
) -> None:
    monkeypatch.setattr(polyphase, "_WORTH_PHASES", 10)
    forget_plans()
    rng = np.random.default_rng(1)
    shapes = shapes_of(STRIDED)
    arrays = Operands(*(rng.standard_normal(s).astype("float32") for s in shapes))
    plan = cuconv.plan_conv(*shapes[:2], op="input_grad", **STRIDED.options)
    # Of the four, two meet no tap: every second column of x has no gradient.
    assert "parts         2 phases" in str(plan)
    found = []
    for threads in (1, 2):
        with cuconv.config(num_threads=threads):
            found.append(run("input_grad", arrays, STRIDED, precision="standard"))
    assert np.array_equal(*(dx.view(np.int32) for dx in found))


# Integers less their zero points


def extremes(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """The whole range of a type, and both ends of it."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    rng = np.random.default_rng((seed, *shape))
    values = rng.integers(low, high + 1, shape).astype(dtype)
    values.reshape(-1)[:2] = low, high
    return values


def less(array: np.ndarray, zero: Any, case: Case) -> np.ndarray:
    """In int64, the zero points of filters along their axis."""
    values = np.asarray(zero).astype(np.int64)
    if values.size > 1 and case.layout == "channels_first":
        values = values.reshape(-1, *(1,) * (array.ndim - 1))
    return array.astype(np.int64) - values


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("w_type", ["int8", "uint8"])
@pytest.mark.parametrize("x_type", ["int8", "uint8"])
def test_zero_points_in_every_type_exactly(xp, x_type, w_type, layout) -> None:
    checked = 0
    for name in ("reflect", "input dilation", "batch groups"):
        case = CASES[name].in_layout(layout)
        x, w = extremes(case.x_shape, x_type, 0), extremes(case.w_shape, w_type, 1)
        each = extremes((case.filters(),), w_type, 2)
        low, high = np.iinfo(x_type).min, np.iinfo(x_type).max
        for x_zero, w_zero in (
            (low, None),
            (high, np.iinfo(w_type).min),
            (np.full(1, 7, x_type), each),
            (None, np.full((), 3, w_type)),
        ):
            zeros = {"x_zero_point": x_zero, "w_zero_point": w_zero}
            mine = {
                n: to_device(xp, z) if isinstance(z, np.ndarray) else z
                for n, z in zeros.items()
            }
            pair = to_device(xp, x), to_device(xp, w)
            y = cuconv.conv(*pair, **mine, **case.options)
            shifted = less(x, x_zero or 0, case), less(w, 0, case)
            if w_zero is not None:
                shifted = shifted[0], less(w, w_zero, case)
            wanted = testing.conv_reference(*shifted, **case.options)
            testing.assert_equal(y, wanted, dtype="int32")
            checked += 1
    assert checked == 12


def test_zero_points_with_a_bias_and_another_result(xp) -> None:
    x, w = extremes((2, 70, 5), "uint8", 0), extremes((3, 70, 3), "int8", 1)
    bias = np.array([2**20, -7, 0], np.int32)
    arrays = (to_device(xp, a) for a in (x, w, bias))
    y = cuconv.conv1d(*arrays, x_zero_point=128, padding=1, dtype="int64")
    wanted = testing.conv_reference(x.astype(int) - 128, w, bias, padding=1)
    testing.assert_equal(y, wanted, dtype="int64")


def test_padding_is_the_zero_point(xp) -> None:
    """Cells around x add nothing, and cells that equal it add nothing."""
    x, w = xp.full((1, 1, 3), 9, "uint8"), xp.ones((1, 1, 3), "int8")
    y = cuconv.conv(x, w, padding=2, x_zero_point=9)
    testing.assert_equal(y, np.zeros((1, 1, 5)), dtype="int32")


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("channels", [2**10, 2**11])
def test_sums_beyond_float32_are_exact(channels, dtype) -> None:
    """255² · 1024 lies past 2^24, where float32 skips integers; 128² · 1024 not."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    x = np.full((1, channels, 2), high, dtype)
    w = np.full((1, channels, 1), high, dtype)
    x[0, 0, 0] -= 1
    y = cuconv.conv(x, w, x_zero_point=low, w_zero_point=low)
    whole = channels * 255**2
    testing.assert_equal(y, np.array([[[whole - 255, whole]]]), dtype="int32")


def test_large_integers_without_zero_points_are_exact_as_well() -> None:
    """Worth turning into floats, and equal to what integers give."""
    case = Case((2, 64, 20, 20), (64, 64, 3, 3), {"padding": 1})
    x, w = extremes(case.x_shape, "uint8", 0), extremes(case.w_shape, "int8", 1)
    y = cuconv.conv(x, w, dtype="int32", **case.options)
    floats = x.astype("float64"), w.astype("float64")
    wanted = cuconv.conv(*floats, precision="strict", padding=1)
    testing.assert_equal(y, wanted, dtype="int32")
    plan = cuconv.plan_conv(*shapes_of(case)[:2], dtype="int32", padding=1)
    assert "copies" not in str(plan), "int32 arrays are multiplied as they are"


# Errors

X, W = (4, 3, 5, 6), (4, 3, 2, 2)


MISTAKES: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "'replicate', 'circular'; got 'mirror'", {"padding_mode": "mirror"}),
    (ValueError, "padding_mode must be one of .* got None", {"padding_mode": None}),
    (
        *(ValueError, "padding_mode 'reflect' and input_dilation 3 of spatial axis 1"),
        {"padding_mode": "reflect", "input_dilation": (1, 3), "padding": 1},
    ),
    (ValueError, "axis 0 is 0; it must be in 1 … 2147483647", {"input_dilation": 0}),
    (TypeError, "input_dilation must be made of integers", {"input_dilation": 1.5}),
    (ValueError, "has 3 values for 2 spatial axes", {"input_dilation": (2, 2, 2)}),
    (
        *(ValueError, r"-1 \(21: 6 with input_dilation 4 \+ padding -11 \+ -11\)"),
        {"input_dilation": (1, 4), "padding": (0, -11)},
    ),
    (ValueError, "batch_groups must be at least 1; got 0", {"batch_groups": 0}),
    (ValueError, "batch_groups 3 do not divide the 4 images", {"batch_groups": 3}),
    (TypeError, "batch_groups must be made of integers", {"batch_groups": 1.0}),
]


@pytest.mark.parametrize(("error", "words", "options"), MISTAKES)
def test_what_does_not_fit_is_named(xp, error, words, options) -> None:
    x, w = xp.ones(X), xp.ones(W)
    for call in (
        partial(cuconv.conv, x, w),
        partial(cuconv.conv_input_grad, xp.ones((4, 4, 4, 5)), w, X),
        partial(cuconv.conv_weight_grad, xp.ones((4, 4, 4, 5)), x, W),
        partial(cuconv.plan_conv, X, W),
    ):
        with pytest.raises(error, match=words):
            call(**options)


def test_batch_groups_that_do_not_fit_are_named(xp) -> None:
    with pytest.raises(ValueError, match="do not divide the 4 filters of w"):
        cuconv.conv(xp.ones((3, 3, 5, 6)), xp.ones(W), batch_groups=3)
    with pytest.raises(ValueError, match="groups 3 and batch_groups 2 both share out"):
        cuconv.conv(xp.ones(X), xp.ones((6, 1, 2, 2)), groups=3, batch_groups=2)
    with pytest.raises(ValueError, match="batch_groups 2 need x with a batch axis"):
        cuconv.conv(xp.ones(X[1:]), xp.ones(W), batch_groups=2)


@pytest.mark.parametrize("mode", PADDING_MODES[1:])
def test_an_empty_axis_has_nothing_to_repeat(xp, mode) -> None:
    words = f"'{mode}' needs elements to repeat; spatial axis 1 has 0 and padding 2 + 1"
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        cuconv.conv(
            xp.ones((1, 3, 5, 0)),
            xp.ones(W),
            padding=(0, (2, 1)),
            padding_mode=mode,
        )


@pytest.mark.parametrize("name", ["padding_mode", "input_dilation", "batch_groups"])
def test_transposed_convolutions_have_none_of_it(xp, name) -> None:
    value = {"padding_mode": "reflect"}.get(name, 2)
    with pytest.raises(ValueError, match=f"a transposed convolution has no {name}"):
        cuconv.conv_transpose(xp.ones((1, 2, 3)), xp.ones((2, 1, 2)), **{name: value})


BAD_ZEROS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "x_zero_point is 256; for uint8 .* 0 … 255", {"x_zero_point": 256}),
    (ValueError, "x_zero_point is -1; for uint8", {"x_zero_point": -1}),
    (ValueError, "w_zero_point is 128; .* -128 … 127", {"w_zero_point": 128}),
    (TypeError, "an integer or an array; got float", {"w_zero_point": 0.5}),
    (TypeError, "has type int8 and x uint8", {"x_zero_point": np.zeros(1, "int8")}),
    (
        *(ValueError, r"x_zero_point has shape \(4,\) and must have \(\) or \(1,\)$"),
        {"x_zero_point": np.zeros(4, "uint8")},
    ),
    (
        *(ValueError, r"shape \(3,\) and must have \(\) or \(1,\) or \(4,\)"),
        {"w_zero_point": np.zeros(3, "int8")},
    ),
]


@pytest.mark.parametrize(("error", "words", "zeros"), BAD_ZEROS)
def test_zero_points_that_do_not_fit_are_named(xp, error, words, zeros) -> None:
    x, w = xp.ones(X, "uint8"), xp.ones(W, "int8")
    mine = {
        n: xp.asarray(z) if isinstance(z, np.ndarray) else z for n, z in zeros.items()
    }
    with pytest.raises(error, match=words):
        cuconv.conv2d(x, w, **mine)


def test_zero_points_are_for_integers_of_8_bits(xp) -> None:
    words = "zero points are for int8 and uint8; x has type float32"
    with pytest.raises(TypeError, match=words):
        cuconv.conv(xp.ones(X, "float32"), xp.ones(W, "int8"), w_zero_point=1)
    words = "zero points are for int8 and uint8; w has type int16"
    with pytest.raises(TypeError, match=words):
        cuconv.conv(xp.ones(X, "int8"), xp.ones(W, "int16"), x_zero_point=1)
