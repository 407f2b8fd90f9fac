"""The canonical form: fewer axes, the same results, and no copy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    LAYOUTS,
    OPERATIONS,
    PLACES,
    Case,
    assert_near,
    device_of,
    integers,
    normal,
    of,
    operands,
    plan_of,
    reference,
    run,
    smallest_limit,
    to_device,
    wanted_shape,
)

import cuconv
from cuconv import testing
from cuconv.engine.rewrites.canonical import Canonical

# Each with the shape of x that is left, channels first.
CASES: dict[str, tuple[Case, tuple[int, ...]]] = {
    "fully connected": (Case((5, 6, 1, 1), (4, 6, 1, 1), {}), (1, 6, 5)),
    "in groups": (Case((5, 6, 1, 1), (4, 3, 1, 1), {"groups": 2}), (1, 6, 5)),
    "a kernel of the whole image": (
        Case((3, 2, 4, 5), (4, 2, 4, 5), {"stride": 3}),
        (1, 40, 3),
    ),
    "depthwise, of the whole image": (
        Case((3, 4, 2, 3), (4, 1, 2, 3), {"groups": 4}),
        (1, 24, 3),
    ),
    "text": (Case((2, 1, 9, 5), (3, 1, 3, 5), {"stride": (2, 1)}), (2, 5, 9)),
    "electrodes": (Case((2, 1, 4, 9), (3, 1, 4, 1), {}), (2, 4, 9)),
    "one axis under the names of two": (
        Case((2, 3, 1, 9), (4, 3, 1, 3), {"padding": (0, 1)}),
        (2, 3, 9),
    ),
    "no padding to reflect": (
        Case((2, 3, 1, 9), (4, 3, 1, 3), {"padding_mode": "reflect"}),
        (2, 3, 9),
    ),
    "padding to reflect": (
        Case(
            (2, 3, 1, 9),
            (4, 3, 1, 3),
            {"padding": (0, 1), "padding_mode": "reflect"},
        ),
        (2, 3, 9),
    ),
    "batch groups": (
        Case((4, 3, 1, 9), (4, 3, 1, 3), {"batch_groups": 2}),
        (4, 3, 9),
    ),
    "a dilated input": (
        Case((2, 3, 1, 5), (4, 3, 1, 3), {"input_dilation": (2, 3)}),
        (2, 3, 5),
    ),
    "pointwise": (Case((2, 3, 4, 5), (4, 3, 1, 1), {}), (2, 3, 20)),
    "pointwise, one image": (Case((3, 4, 5), (4, 3, 1, 1), {}), (1, 3, 20)),
    "along one axis of three": (
        Case((2, 3, 6, 4, 5), (4, 3, 3, 1, 1), {"padding": (1, 0, 0)}),
        (2, 3, 6, 20),
    ),
}
# What has no other form, and what only looks as if it had.
KEPT = {
    "windows": Case((2, 3, 5, 6), (4, 3, 3, 2), {}),
    "padded": Case((2, 3, 1, 5), (4, 3, 1, 3), {"padding": (1, 0)}),
    "spanned, but channels lie apart": Case((2, 3, 7, 5), (4, 3, 3, 5), {}),
    "dilated": Case((2, 1, 5, 6), (4, 1, 3, 2), {"dilation": 2}),
    "one tap with a stride": Case((2, 3, 4, 5), (4, 3, 1, 1), {"stride": 2}),
    "already": Case((2, 3, 9), (4, 3, 3), {}),
    "zeros between the cells": Case((2, 1, 3), (4, 1, 3), {"input_dilation": 2}),
    "empty": Case((0, 3, 1, 5), (4, 3, 1, 3), {}),
}


def form(op: str, case: Case, **options: Any) -> Canonical | None:
    """The canonical form that a plan goes by, if it does."""
    lowering = cuconv.plan_conv(
        case.x_shape, case.w_shape, op=op, **case.options, **options
    ).lowering
    return lowering if isinstance(lowering, Canonical) else None


@pytest.mark.parametrize("op", OPERATIONS)
def test_fewer_axes_remain(xp, op) -> None:
    found = 0
    for case, left in CASES.values():
        lowering = form(op, case, device=device_of(xp))
        assert lowering is not None
        geometry = lowering.form.geometry
        cells = (geometry.images, geometry.channels, *geometry.size)
        assert cells == left, case
        found += 1
    assert found == len(CASES) == 14


@pytest.mark.parametrize("op", OPERATIONS)
def test_others_are_left_alone(xp, op) -> None:
    for name, case in KEPT.items():
        assert form(op, case, device=device_of(xp)) is None, name
        last = form(op, case.in_layout("channels_last"), device=device_of(xp))
        # Channels last, those of a row are neighbours.
        assert (last is not None) == ("channels" in name), name


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_equal(xp, op, layout) -> None:
    for each in (*(case for case, _ in CASES.values()), *KEPT.values()):
        case = each.in_layout(layout)
        arrays = operands(case)
        wanted = reference(op, arrays, case)
        for _ in range(2):  # recorded, and repeated
            actual = run(op, arrays.on(xp), case)
            testing.assert_equal(actual, wanted, dtype="float64")


# Axes by their kind: cells, taps, and options.
@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int, tuple[int, int]]:
    """Cells, taps, stride and padding of an axis, often of one that can vanish."""
    kind = draw(st.sampled_from(("unit", "identity", "spanned", "windows")))
    stride = draw(st.integers(1, 3))
    if kind == "unit":
        return 1, 1, stride, (0, 0)
    if kind == "identity":
        return draw(st.integers(2, 4)), 1, 1, (0, 0)
    taps = draw(st.integers(2, 3))
    if kind == "spanned":
        return taps, taps, stride, (0, 0)
    pads = draw(st.tuples(st.integers(0, 1), st.integers(0, 1)))
    return taps + draw(st.integers(0, 3)), taps, stride, pads


@st.composite
def simple_cases(draw: st.DrawFn, *, transposed: bool = False) -> Case:
    """A convolution of which little may be left."""
    rank = draw(st.integers(1, 3))
    size, kernel, stride, pads = zip(*(draw(axes()) for _ in range(rank)), strict=True)
    groups = draw(st.integers(1, 2))
    channels, filters = (draw(st.integers(1, 3)) for _ in range(2))
    images = draw(st.sampled_from([(), (1,), (2,), (3,)]))
    options = {"stride": stride, "padding": pads, "groups": groups}
    if transposed:
        # One cell becomes the whole kernel.
        size = tuple(1 if n == k else n for n, k in zip(size, kernel, strict=True))
        options["padding"] = 0
        w_shape = (channels * groups, filters, *kernel)
    else:
        w_shape = (filters * groups, channels, *kernel)
    case = Case((*images, channels * groups, *size), w_shape, options)
    return case.in_layout(draw(st.sampled_from(LAYOUTS)))


def _axes_of(case: Case) -> list[Any]:
    """Cells, taps and padding of every axis."""
    last, rank = case.layout == "channels_last", len(case.w_shape) - 2
    size = case.x_shape[-rank - last : len(case.x_shape) - last]
    kernel = case.w_shape[:rank] if last else case.w_shape[2:]
    return list(zip(size, kernel, case.options["padding"], strict=True))


PLACED = (*PLACES.values(), to_device)


@given(case=simple_cases(), places=st.lists(st.sampled_from(PLACED), min_size=4))
def test_any_operation_equals_the_loops(xp, case, places) -> None:
    """Wherever the arrays and the result lie, and again when it is repeated."""
    host, sizes = operands(case), _axes_of(case)
    for op in OPERATIONS:
        if len(sizes) > 1 and (1, 1, (0, 0)) in sizes:
            assert form(op, case, device=device_of(xp)) is not None
        wanted = reference(op, host, case)
        first, second = (
            place(xp, array) for place, array in zip(places, of(op, host), strict=False)
        )
        x, w, dy = {
            "forward": (first, second, None),
            "input_grad": (None, second, first),
            "weight_grad": (second, None, first),
        }[op]
        for _ in range(2):
            out = places[2](xp, np.full(wanted_shape(op, case), 77.0))
            call = partial(run, op, type(host)(x, w, dy), case)
            testing.assert_equal(call(), wanted, dtype="float64")
            testing.assert_equal(call(out=out), wanted, dtype="float64")


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "forward": (cuconv.conv_transpose, testing.conv_transpose_reference),
    "input_grad": (
        cuconv.conv_transpose_input_grad,
        testing.conv_transpose_input_grad_reference,
    ),
    "weight_grad": (
        cuconv.conv_transpose_weight_grad,
        testing.conv_transpose_weight_grad_reference,
    ),
}


@given(case=simple_cases(transposed=True), place=st.sampled_from(PLACED))
def test_transposed_calls_equal_the_loops(xp, case, place) -> None:
    x, w = integers(case.x_shape), integers(case.w_shape, seed=1)
    wanted = testing.conv_transpose_reference(x, w, **case.options)
    dy = integers(wanted.shape, seed=2)
    operands_of = {
        "forward": (x, w),
        "input_grad": (dy, w, x.shape),
        "weight_grad": (dy, x, w.shape),
    }
    for op, (call, loops) in CALLS.items():
        *arrays, last = operands_of[op] if op != "forward" else (x, w, None)
        more = () if last is None else (last,)
        wanted = loops(*arrays, *more, **case.options)
        placed = [place(xp, array) for array in arrays]
        for _ in range(2):
            actual = call(*placed, *more, **case.options)
            testing.assert_equal(actual, wanted, dtype="float64")


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_plan_shows_what_was_asked(op) -> None:
    case = CASES["text"][0]
    plan = cuconv.plan_conv(case.x_shape, case.w_shape, op=op, **case.options)
    assert isinstance(plan.lowering, Canonical)
    said = plan.as_dict()
    assert (said["x_shape"], said["w_shape"]) == (case.x_shape, case.w_shape)
    assert (said["y_shape"], said["stride"]) == (case.y_shape(), (2, 1))
    assert said["flops"] == 2 * 2 * 4 * 3 * 15
    assert "axis 1        5 elements, 5 taps" in str(plan)


def test_prepared_weights(xp) -> None:
    prepared = 0
    for case, _ in CASES.values():
        for op in ("forward", "input_grad"):
            arrays = operands(case, "float32").on(xp)
            first, w = of(op, arrays)
            plan = plan_of(op, case, device=device_of(xp))
            assert plan is not None
            wanted = reference(op, operands(case), case)
            for _ in range(2):
                actual = plan.prepare(w)(first)
                testing.assert_equal(actual, wanted.astype("float32"), dtype="float32")
            prepared += 1
    assert prepared == 2 * len(CASES)


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_strategy_that_ran_runs(op) -> None:
    """Tap by tap needs taps, which the kernel of the whole image loses."""
    case = CASES["a kernel of the whole image"][0]
    plan = plan_of(op, case, strategy="tap_matmul")
    if op != "input_grad":
        assert plan is not None
        assert not isinstance(plan.lowering, Canonical)
    plan = plan_of(op, case, strategy="im2col")
    assert plan is not None
    assert isinstance(plan.lowering, Canonical)


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_smallest_limit_is_the_smallest(xp, op) -> None:
    for case, _ in CASES.values():
        arrays = operands(case, "float32").on(xp)
        call = partial(run, op, arrays, case)
        least = smallest_limit(call)
        wanted = reference(op, operands(case), case).astype("float32")
        testing.assert_equal(call(memory_limit=least), wanted, dtype="float32")
        if least:
            with pytest.raises(cuconv.MemoryLimitError):
                call(memory_limit=least - 1)


def test_zero_points(xp) -> None:
    case = CASES["one axis under the names of two"][0]
    x = to_device(xp, integers(case.x_shape, "uint8", largest=9))
    w = to_device(xp, integers(case.w_shape, "int8", 1))
    options = {"x_zero_point": 3, "w_zero_point": 1, **case.options}
    wide = (array.astype("int64") - zero for array, zero in ((x, 3), (w, 1)))
    wanted = testing.conv_reference(*wide, **case.options)
    actual = cuconv.conv(x, w, **options)
    testing.assert_equal(actual, wanted.astype("int32"), dtype="int32")


def test_large_layers_are_near_the_plain_ones() -> None:
    """Where sums change their order."""
    case = Case((40, 1, 56, 30), (24, 1, 3, 30), {})
    arrays = normal(case)
    wide = type(arrays)(*(array.astype("float64") for array in arrays))
    for op in OPERATIONS:
        assert form(op, case) is not None
        actual = run(op, arrays, case, precision="standard")
        assert_near(actual, run(op, wide, case), 1e-5)
