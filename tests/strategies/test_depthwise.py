"""Loops over planes: exact for any geometry in groups, clear about what they take."""

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
from cuconv.backends.cpu import backend as host
from cuconv.strategies import depthwise

pytestmark = pytest.mark.skipif(not jit_is_installed(), reason="needs Numba")
DEPTHWISE = {"strategy": "depthwise"}


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
    """It takes them as they lie, or says that it does not; another strategy does."""
    case = Case((2, 4, 5, 6), (4, 1, 3, 2), {"groups": 4, "padding": 1})
    arrays = operands(case, "float32")
    mine = Operands(*(_stepped(array, step) for array in arrays))
    wanted = reference(op, arrays, case)
    testing.assert_equal(run(op, mine, case), wanted)
    if step > 0:
        testing.assert_equal(run(op, mine, case, **DEPTHWISE), wanted)
    else:
        with pytest.raises(ValueError, match="strides"):
            run(op, mine, case, **DEPTHWISE)
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


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_types_that_its_loops_would_round(dtype) -> None:
    case = Case((2, 4, 6), (4, 1, 3), {"groups": 4})
    x, w, _ = operands(case, dtype)
    with pytest.raises(ValueError, match=f"would round {dtype}"):
        cuconv.conv(x, w, groups=4, **DEPTHWISE)
    testing.assert_equal(
        cuconv.conv(x, w, groups=4), testing.conv_reference(x, w, groups=4), dtype=dtype
    )


def test_without_numba_another_strategy_runs(monkeypatch) -> None:
    case = Case((2, 4, 6), (4, 1, 3), {"groups": 4})
    arrays = operands(case, "float32")
    monkeypatch.setattr(depthwise, "jit_is_installed", lambda: False)
    forget_plans()
    try:
        plan = plan_of("forward", case)
        assert plan.strategy != "depthwise"
        assert "Numba is not installed" in plan.passed_over["depthwise"]
        with pytest.raises(ValueError, match="Numba is not installed"):
            cuconv.conv(arrays.x, arrays.w, groups=4, **DEPTHWISE)
        for op in OPERATIONS:
            testing.assert_equal(run(op, arrays, case), reference(op, arrays, case))
    finally:
        forget_plans()


def test_an_error_in_a_loop_reaches_the_caller(monkeypatch) -> None:
    """And the arena goes back, so that the next call works."""
    case = Case((2, 16, 40, 40), (16, 1, 3, 3), {"groups": 16})
    x, w = integers(case.x_shape, "float32"), integers(case.w_shape, "float32")
    wanted = cuconv.conv(x, w, groups=16, **DEPTHWISE)
    from cuconv.backends.cpu import loops as jit

    def broken(*arguments: Any) -> None:
        raise RuntimeError("in a loop")

    with monkeypatch.context() as patch:
        patch.setattr(jit, "convolve", broken)
        forget_plans()
        with pytest.raises(RuntimeError, match="in a loop"):
            cuconv.conv(x, w, groups=16, **DEPTHWISE)
    assert host._BLAS._users == 0
    forget_plans()
    testing.assert_equal(cuconv.conv(x, w, groups=16, **DEPTHWISE), wanted)
