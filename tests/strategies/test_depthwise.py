"""Sums over planes, compiled or not: exact for any geometry in groups."""

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cases import EXTREMES, grouped_cases
from hypothesis import given
from hypothesis import strategies as st
from support import (
    OPERATIONS,
    Case,
    Operands,
    forget_plans,
    integers,
    operands,
    plan_of,
    reference,
    run,
    slowly,
)

import cuconv
from cuconv import testing
from cuconv.backends import jit_is_installed
from cuconv.backends.cpu import planes, threads
from cuconv.strategies import depthwise

DEPTHWISE = {"strategy": "depthwise"}


@pytest.fixture(params=["compiled", "numpy"], autouse=True, scope="module")
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs with loops of Numba, and as if Numba were not installed."""
    if request.param == "compiled" and not jit_is_installed():
        pytest.skip("needs Numba")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(depthwise, "jit_is_installed", lambda: False)
        forget_plans()
        yield request.param
    forget_plans()


@pytest.mark.parametrize("dtype", ["float32", *slowly("float64")])
@pytest.mark.parametrize("op", OPERATIONS)
@given(case=grouped_cases(), seed=st.integers(0, 99))
def test_exact_for_any_geometry_in_groups(op, dtype, case, seed) -> None:
    arrays = operands(case, dtype, seed)
    wanted = reference(op, arrays, case)
    testing.assert_equal(run(op, arrays, case, **DEPTHWISE), wanted, dtype=dtype)


@pytest.mark.parametrize("step", [-1, 2])
@pytest.mark.parametrize("op", OPERATIONS)
def test_arrays_may_run_backwards_or_in_steps(op, step) -> None:
    case = Case((2, 4, 5, 6), (4, 1, 3, 2), {"groups": 4, "padding": 1})
    arrays = operands(case, "float32")
    mine = Operands(*(_stepped(array, step) for array in arrays))
    wanted = reference(op, arrays, case)
    testing.assert_equal(run(op, mine, case, **DEPTHWISE), wanted)
    only_w = arrays._replace(w=mine.w)
    testing.assert_equal(run(op, only_w, case, **DEPTHWISE), wanted)


def _stepped(array: np.ndarray, step: int) -> np.ndarray:
    """The same numbers, the last axis backwards or every second cell of another."""
    if step == 1:
        return array
    if step == -1:
        return np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), 55, array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


@pytest.mark.parametrize("images", range(1, 8))
def test_planes_that_are_taken_together(images, monkeypatch) -> None:
    """Runs of three small planes, and what is left over at the end."""
    case = Case((images, 5, 6, 7), (5, 1, 3, 2), {"groups": 5, "padding": ((1, 0), 1)})
    cells = 7 * 9
    monkeypatch.setattr(depthwise, "_RUN", 3 * cells)
    monkeypatch.setattr(planes, "_LOOP", 3 * cells)
    monkeypatch.setattr(planes, "_BLOCK", 6 * cells)
    forget_plans()
    arrays = operands(case, "float32")
    for op in OPERATIONS:
        got = run(op, arrays, case, memory_limit="1 MiB", **DEPTHWISE)
        testing.assert_equal(got, reference(op, arrays, case))


@pytest.mark.parametrize("channels", [2, 7, 8, 9, 23])
def test_every_channel_is_somebodys_task(channels) -> None:
    for multiplier in (1, 3):
        options = {"groups": channels, "padding": 2, "stride": (2, 1)}
        shape = (channels * multiplier, 1, 2, 3)
        case = Case((2, channels, 5, 6), shape, options)
        arrays = operands(case, "float32")
        for op in OPERATIONS:
            got = run(op, arrays, case, **DEPTHWISE)
            testing.assert_equal(got, reference(op, arrays, case))


@pytest.mark.parametrize("each", [1, 2, 3, 4])
def test_a_few_channels_in_a_group(each) -> None:
    case = Case((2, 3 * each, 9), (6, each, 4), {"groups": 3, "padding": ((1, 2),)})
    arrays = operands(case, "float64")
    for op in OPERATIONS:
        got = run(op, arrays, case, **DEPTHWISE)
        testing.assert_equal(got, reference(op, arrays, case))


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("op", OPERATIONS)
def test_extremes(op, name) -> None:
    case = EXTREMES[name]
    long = max(case.x_shape) > 1000
    plan = plan_of(op, case, **DEPTHWISE)
    y_shape = cuconv.plan_conv(case.x_shape, case.w_shape, **case.options).result_shape
    shapes = {"x": case.x_shape, "w": case.w_shape, "dy": y_shape}
    names = {"forward": "xw", "input_grad": ("dy", "w"), "weight_grad": ("dy", "x")}
    arrays = [integers(shapes[n], "float32") for n in names[op]]
    # The loops of the reference are too slow for a long line.
    wanted = cuconv.plan_conv(
        case.x_shape,
        case.w_shape,
        op=op,
        strategy="im2col",
        precision="strict",
        **case.options,
    )(*arrays)
    testing.assert_equal(plan(*arrays), wanted, dtype=np.float32)
    assert long == (name == "a long line")


REFUSED = {
    "there is one group": Case((1, 2, 9), (3, 2, 3), {}),
    "5 channels in a group, 4 at most": Case((1, 10, 9), (2, 5, 3), {"groups": 2}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_it_cannot_do_is_said(words) -> None:
    case = REFUSED[words]
    x, w, _ = operands(case, "float32")
    with pytest.raises(ValueError, match=words):
        cuconv.conv(x, w, **case.options, **DEPTHWISE)


@pytest.mark.parametrize("dtype", ["float16", "int8", "int32", "complex64"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_types_that_are_not_compiled(op, dtype) -> None:
    case = Case((2, 4, 6, 7), (8, 1, 3, 2), {"groups": 4, "stride": (1, 2)})
    arrays = operands(case, dtype)
    wanted = reference(op, arrays, case)
    testing.assert_equal(run(op, arrays, case, **DEPTHWISE), wanted, dtype=dtype)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_memory_beside_its_buffers_is_counted(op, layout, form) -> None:
    """NumPy buffers the operands of a sum over short loops."""
    if form == "compiled":
        pytest.skip("Numba allocates nothing")
    first = layout == "channels_first"
    x = np.ones((2, 96, 7, 7) if first else (2, 7, 7, 96), np.float32)
    w = np.ones((96, 1, 5, 5) if first else (5, 5, 1, 96), np.float32)
    options = {"groups": 96, "padding": 2, "layout": layout, **DEPTHWISE}
    plan = cuconv.plan_conv(x.shape, w.shape, op=op, **options)
    arrays = {"forward": (x, w), "input_grad": (x, w), "weight_grad": (x, x)}[op]
    out = np.empty_like(w if op == "weight_grad" else x)
    plan(*arrays, out=out)
    cuconv.release_memory()
    tracemalloc.start()
    plan(*arrays, out=out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= plan.workspace_bytes


def test_bools_are_refused() -> None:
    x, w = np.ones((1, 2, 5), bool), np.ones((2, 1, 3), bool)
    with pytest.raises((TypeError, ValueError), match="bool"):
        cuconv.conv(x, w, groups=2, **DEPTHWISE)


LAYOUTS = {
    "stride 1": Case((3, 20, 7, 8), (20, 1, 3, 3), {"groups": 20, "padding": 1}),
    "strides": Case(
        (2, 18, 9, 11),
        (36, 1, 3, 2),
        {"groups": 18, "padding": ((2, 1), (0, 3)), "stride": (3, 2), "dilation": 2},
    ),
    "stride beyond the kernel": Case((2, 4, 9), (4, 1, 2), {"groups": 4, "stride": 3}),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_channels_last(op, name) -> None:
    case = LAYOUTS[name]
    rank = len(case.x_shape) - 2
    arrays = operands(case, "float32")
    wanted = reference(op, arrays, case)

    def last(array: np.ndarray, *, weights: bool = False) -> np.ndarray:
        order = (*range(2, 2 + rank), *((1, 0) if weights else (1,)))
        order = order if weights else (0, *order)
        return np.ascontiguousarray(array.transpose(order))

    options = {**case.options, "layout": "channels_last"}
    x, w, dy = last(arrays.x), last(arrays.w, weights=True), last(arrays.dy)
    mine = Case(x.shape, w.shape, options)
    got = run(op, Operands(x, w, dy), mine, **DEPTHWISE)
    testing.assert_equal(got, last(wanted, weights=op == "weight_grad"))


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_infinity_stays_in_its_windows(bad, layout) -> None:
    """The gradient of weights multiplies zeros in gaps by other elements."""
    x, dy = np.ones((1, 2, 5, 5), np.float32), np.ones((1, 2, 2, 2), np.float32)
    x[0, 0, 0, 4] = bad
    if layout == "channels_last":
        x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
    shape = (2, 1, 3, 3) if layout == "channels_first" else (3, 3, 1, 2)
    options = {"groups": 2, "stride": 2, "layout": layout}
    got = cuconv.conv_weight_grad(dy, x, shape, **options, **DEPTHWISE)
    taps = got[0, 0] if layout == "channels_first" else got[:, :, 0, 0]
    assert not np.isfinite(taps[0, 2])
    assert np.isfinite(taps).sum() == taps.size - 1


def test_without_numba_it_runs_where_it_is_faster(form) -> None:
    plan = cuconv.plan_conv(
        (8, 28, 28, 192), (3, 3, 1, 192), groups=192, padding=1, layout="channels_last"
    )
    assert plan.strategy == "depthwise"
    small = cuconv.plan_conv((8, 192, 28, 28), (192, 1, 3, 3), groups=192, padding=1)
    assert (small.strategy == "depthwise") == (form == "compiled")


def test_an_error_in_a_loop_reaches_the_caller(monkeypatch, form) -> None:
    """And the arena goes back, so that the next call works."""
    case = Case((2, 16, 40, 40), (16, 1, 3, 3), {"groups": 16})
    x, w = integers(case.x_shape, "float32"), integers(case.w_shape, "float32")
    wanted = cuconv.conv(x, w, groups=16, **DEPTHWISE)
    module: Any = planes
    if form == "compiled":
        from cuconv.backends.cpu import loops as module

    def broken(*arguments: Any) -> None:
        raise RuntimeError("in a loop")

    with monkeypatch.context() as patch:
        patch.setattr(module, "convolve", broken)
        forget_plans()
        with pytest.raises(RuntimeError, match="in a loop"):
            cuconv.conv(x, w, groups=16, **DEPTHWISE)
    assert threads.BLAS._users == 0
    forget_plans()
    testing.assert_equal(cuconv.conv(x, w, groups=16, **DEPTHWISE), wanted)
