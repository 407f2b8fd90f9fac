"""Calls recorded into a CUDA graph: right when it is launched, or refused with reasons.

Only strategies that launch kernels alone can be captured.
"""

from functools import partial

import numpy as np
import pytest
from support import (
    OPERATIONS,
    Case,
    call_into,
    candidates_of,
    captured,
    device_allocations,
    forget_plans,
    forget_winners,
    integers,
    let_win,
    of,
    operands,
    plan_of,
    reference,
    replay,
    to_host,
    wanted_shape,
    with_candidate,
)

import cuconv
from cuconv import testing

pytestmark = pytest.mark.parametrize("xp", ["cupy"], indirect=True)


LINE = Case((2, 3, 11), (4, 3, 3), {"stride": 2, "padding": ((1, 2),), "dilation": 2})
PLANE = Case(
    (2, 6, 7, 9),
    (4, 3, 3, 2),
    {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2},
)
APART = Case((2, 6, 7, 9), (6, 1, 3, 2), {"padding": (1, 0), "groups": 6})
CAPTURABLE = [
    ("implicit_gemm", LINE),
    ("implicit_gemm", PLANE),
    ("depthwise", APART),
]


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize(("name", "case"), CAPTURABLE)
def test_a_graph_computes_what_is_in_its_buffers(xp, op, name, case) -> None:
    """Recorded once, launched twice: each time on what the buffers hold then."""
    arrays = operands(case, "float32").on(xp)
    out = xp.full(wanted_shape(op, case), 77, dtype="float32")
    call_into(op, arrays, case, out, strategy=name)  # kernels are compiled before
    out[...] = 78
    with captured(xp) as graphs:
        assert call_into(op, arrays, case, out, strategy=name) is out
    assert np.all(to_host(out) == 78), "it ran while it was recorded"
    for seed in (5, 6):
        fresh = operands(case, "float32", seed)
        replay(xp, graphs[0], arrays, fresh)
        testing.assert_equal(out, reference(op, fresh, case))


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_planner_takes_what_can_be_captured(xp, op, choices) -> None:
    arrays = operands(LINE, "float32").on(xp)
    out = xp.zeros(wanted_shape(op, LINE), dtype="float32")
    with captured(xp):
        call_into(op, arrays, LINE, out)
        plan = cuconv.plan_conv(
            LINE.x_shape, LINE.w_shape, op=op, device="cuda", **LINE.options
        )
    assert choices[-1].strategy.capturable
    assert choices[-1].workspace_bytes == 0
    assert plan.problem.captured
    assert plan.strategy == choices[-1].strategy.name
    assert "cannot contain cuBLAS" in plan.passed_over["im2col"]
    host = operands(LINE, "float32")
    made_inside = plan(*of(op, host.on(xp)))
    testing.assert_equal(made_inside, reference(op, host, LINE))


BLAS = {
    "im2col": LINE,
    "tap_matmul": LINE,
    "partial_im2col": LINE,
    "pointwise": Case((2, 3, 11), (4, 3, 1), {}),
    "winograd": Case((2, 3, 11), (4, 3, 3), {"padding": 1}),
    "fft": Case((2, 3, 40), (4, 3, 27), {"precision": "fast"}),
}


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("name", BLAS)
def test_a_strategy_that_cannot_is_refused_before_anything(xp, op, name) -> None:
    case = BLAS[name]
    plain = Case(case.x_shape, case.w_shape, {**case.options})
    precision = plain.options.pop("precision", "standard")
    arrays = operands(plain, "float32").on(xp)
    out = xp.full(wanted_shape(op, plain), 77, dtype="float32")
    stream = xp.cuda.Stream(non_blocking=True)
    with stream, device_allocations(xp) as seen:
        stream.begin_capture()
        with pytest.raises(ValueError, match="a CUDA graph is being captured"):
            call_into(op, arrays, plain, out, strategy=name, precision=precision)
        assert stream.is_capturing(), "the capture was broken"
        graph = stream.end_capture()
    assert seen.count == 0
    graph.launch()
    xp.cuda.Device().synchronize()
    assert np.all(to_host(out) == 77), "something had been recorded"


def test_results_without_out_are_refused(xp) -> None:
    x, w, dy = operands(LINE, "float32").on(xp)
    plan = cuconv.plan_conv(
        LINE.x_shape,
        LINE.w_shape,
        device="cuda",
        strategy="implicit_gemm",
        **LINE.options,
    )
    columns = cuconv.im2col(x, 3)
    steps = cuconv.iter_im2col(xp.ones((4, 3, 40)), 3, memory_limit=1024)
    next(steps)
    half = xp.zeros(columns.shape, "float16")
    target = xp.zeros(x.shape, "float16")
    calls = {
        "the result cannot be allocated: pass out=": [
            lambda: cuconv.conv(x, w, strategy="implicit_gemm", **LINE.options),
            lambda: cuconv.conv_input_grad(dy, w, x.shape, **LINE.options),
            lambda: cuconv.conv_weight_grad(dy, x, w.shape, **LINE.options),
            lambda: plan(x, w),
            lambda: cuconv.im2col(x, 3),
            lambda: cuconv.col2im(columns, x.shape, 3),
        ],
        "conv_backward allocates its results": [
            lambda: cuconv.conv_backward(dy, x, w, **LINE.options),
            lambda: cuconv.conv_backward(dy, x, w, needs=("bias",), **LINE.options),
        ],
        "prepare the weights before it": [lambda: plan.prepare(w)],
        "sums of float16 take memory": [
            lambda: cuconv.col2im(half, x.shape, 3, out=target)
        ],
        "every block takes memory": [
            lambda: cuconv.iter_im2col(x, 3),
            lambda: next(steps),
        ],
    }
    with captured(xp), device_allocations(xp) as seen:
        for words, each in calls.items():
            for one in each:
                with pytest.raises(ValueError, match=words):
                    one()
    assert seen.count == 0
    assert sum(map(len, calls.values())) == 12


@pytest.mark.parametrize("order", ["rows", "columns", "batched"])
def test_columns_with_out_are_captured(xp, order) -> None:
    options = {"stride": 2, "padding": 1, "order": order}
    x = xp.asarray(integers((2, 3, 7, 9), "float32"))
    columns = cuconv.im2col(x, (3, 2), **options)
    back = cuconv.col2im(columns, x.shape, (3, 2), **options)
    columns[...], back[...] = 77, 78
    with captured(xp) as graphs:
        cuconv.im2col(x, (3, 2), out=columns, **options)
        cuconv.col2im(columns, x.shape, (3, 2), out=back, **options)
    assert np.all(to_host(columns) == 77)
    assert np.all(to_host(back) == 78)
    for seed in (5, 6):
        host = integers((2, 3, 7, 9), "float32", seed)
        x[...] = xp.asarray(host)
        xp.cuda.Device().synchronize()
        graphs[0].launch()
        xp.cuda.Device().synchronize()
        wanted = cuconv.im2col(host, (3, 2), **options)
        np.testing.assert_array_equal(to_host(columns), wanted)
        wanted = cuconv.col2im(wanted, host.shape, (3, 2), **options)
        np.testing.assert_array_equal(to_host(back), wanted)


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_plan_from_outside_is_made_anew_inside(xp, op, choices) -> None:
    options = {**LINE.options, "op": op, "device": "cuda"}
    plan = cuconv.plan_conv(LINE.x_shape, LINE.w_shape, **options)
    insisting = cuconv.plan_conv(
        LINE.x_shape, LINE.w_shape, strategy="im2col", **options
    )
    host = operands(LINE, "float32")
    arrays = of(op, host.on(xp))
    out = xp.full(wanted_shape(op, LINE), 77, "float32")
    with captured(xp) as graphs:
        plan(*arrays, out=out)
        with pytest.raises(ValueError, match=r"'im2col' cannot run .* captured"):
            insisting(*arrays, out=out)
    assert choices[-1].strategy.capturable
    graphs[0].launch()
    xp.cuda.Device().synchronize()
    testing.assert_equal(out, reference(op, host, LINE))


@pytest.mark.parametrize("prepares", [False, True])
def test_a_plan_that_ran_outside_is_no_other_inside(xp, prepares, choices) -> None:
    """What a plan keeps of a call outside is nothing for a capture, and back."""
    host = operands(LINE, "float32")
    x, w, _ = host.on(xp)
    arrays = (x,) if prepares else (x, w)
    plan = cuconv.plan_conv(
        LINE.x_shape, LINE.w_shape, device="cuda", strategy="im2col", **LINE.options
    )
    plan = plan.prepare(w) if prepares else plan
    out, wanted = xp.empty(LINE.y_shape(), "float32"), reference("forward", host, LINE)
    words = (
        "for im2col, cannot be part" if prepares else "'im2col' cannot run .* captured"
    )
    for _ in range(2):
        plan(*arrays, out=out)
        testing.assert_equal(plan(*arrays), wanted)
        count = len(choices)
        with captured(xp), device_allocations(xp) as seen:
            for given, said in ((out, words), (None, "captured, .* pass out=")):
                with pytest.raises(ValueError, match=said):
                    plan(*arrays, out=given)
        assert (seen.count, len(choices)) == (0, count)


def test_prepared_plans(xp) -> None:
    """Captured where a graph can hold what they were prepared for, else refused."""
    host = operands(LINE, "float32")
    x, w, _ = host.on(xp)
    options = {**LINE.options, "device": "cuda"}
    plans = {
        name: cuconv.plan_conv(
            LINE.x_shape, LINE.w_shape, strategy=name, **options
        ).prepare(w)
        for name in ("im2col", "implicit_gemm")
    }
    out = xp.full(LINE.y_shape(), 77, "float32")
    with captured(xp) as graphs:
        with pytest.raises(ValueError, match="prepared for im2col, cannot be part"):
            plans["im2col"](x, out=out)
        with pytest.raises(ValueError, match="C-contiguous arrays; x has strides"):
            plans["implicit_gemm"](x[..., ::-1], out=out)
        plans["implicit_gemm"](x, out=out)
    w[...] = 0  # prepared weights are the plan's own
    graphs[0].launch()
    xp.cuda.Device().synchronize()
    testing.assert_equal(out, reference("forward", host, LINE))


def test_a_workspace_is_refused_by_its_size(xp, monkeypatch, choices) -> None:
    """A graph allocates nothing: not for operands copied to channels last either."""
    case = Case((2, 32, 7, 10), (48, 32, 3, 2), {"padding": 1})
    host = operands(case, "float16")
    arrays, wanted = host.on(xp), reference("forward", host, case)
    out = xp.full(case.y_shape(), 77, "float16")
    mine = {"strategy": "implicit_gemm"}
    plan = plan_of("forward", case, "float16", device="cuda", **mine)
    needy = next(c for c in candidates_of(plan) if c.workspace_bytes)
    copying = with_candidate(plan, needy)
    prepared = copying.prepare(arrays.w)
    testing.assert_equal(copying(arrays.x, arrays.w), wanted)
    testing.assert_equal(prepared(arrays.x), wanted)
    with captured(xp) as graphs, device_allocations(xp) as seen:
        copying(arrays.x, arrays.w, out=out)
        with pytest.raises(ValueError, match="prepared for implicit_gemm, cannot be"):
            prepared(arrays.x, out=out)
        assert choices[-1].workspace_bytes == 0, "it was not planned anew"
        # Where nothing does without one, its size is said.
        strategy = type(needy.strategy)
        monkeypatch.setattr(strategy, "variants", lambda *_: (needy.tiling.variant,))
        words = f"implicit_gemm: needs {needy.workspace_bytes} bytes of workspace, "
        for options in (mine, {}):
            forget_plans()
            with pytest.raises(ValueError, match=words):
                call_into("forward", arrays, case, out, **options)
    assert seen.count == 0
    assert np.all(to_host(out) == 77), "it ran while it was recorded"
    graphs[0].launch()
    xp.cuda.Device().synchronize()
    testing.assert_equal(out, wanted)


def test_the_stream_of_the_arrays_device_counts(xp) -> None:
    """Whichever device is current."""
    if xp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two devices")
    with xp.cuda.Device(1):
        x, w, _ = operands(LINE, "float32").on(xp)
        out = xp.empty(LINE.y_shape(), "float32")
        with captured(xp), xp.cuda.Device(0):
            with pytest.raises(ValueError, match="'im2col' cannot run"):
                cuconv.conv(x, w, out=out, strategy="im2col", **LINE.options)
            there = operands(LINE, "float32").on(xp)
            found = cuconv.conv(*there[:2], strategy="im2col", **LINE.options)
    testing.assert_equal(found, reference("forward", operands(LINE), LINE))


def test_another_stream_may_capture_meanwhile(xp, choices) -> None:
    """Only the current stream counts."""
    host = operands(LINE, "float32")
    arrays = host.on(xp)
    recording = xp.cuda.Stream(non_blocking=True)
    for working in (xp.cuda.Stream(non_blocking=True), xp.cuda.Stream.null):
        with recording:
            recording.begin_capture()
            with working:
                found = call_into("forward", arrays, LINE, None)
            recording.end_capture()
        working.synchronize()
        testing.assert_equal(found, reference("forward", host, LINE))


def test_the_first_call_of_a_process_may_be_in_a_capture(xp, monkeypatch) -> None:
    """Whether a GPU works is not asked there: it would have to be waited for."""
    from cuconv.backends.cuda import device

    host = operands(LINE, "float32")
    arrays = host.on(xp)
    out = xp.zeros(LINE.y_shape(), "float32")
    call_into("forward", arrays, LINE, out, strategy="implicit_gemm")
    monkeypatch.setattr(device, "_working", [])
    with captured(xp) as graphs:
        call_into("forward", arrays, LINE, out, strategy="implicit_gemm")
    assert device._working == []
    out[...] = 77
    graphs[0].launch()
    xp.cuda.Device().synchronize()
    testing.assert_equal(out, reference("forward", host, LINE))


def test_where_nothing_can_be_captured_the_error_says_what_would_do(xp) -> None:
    """Four axes, which no kernel takes."""
    x, w = xp.ones((1, 2, 3, 3, 3, 5), "f4"), xp.ones((3, 2, 2, 2, 2, 2), "f4")
    out = xp.empty((1, 3, 2, 2, 2, 4), "f4")
    with captured(xp), pytest.raises(ValueError, match="cannot be captured") as found:
        cuconv.conv(x, w, out=out)
    message = str(found.value)
    assert "im2col: a CUDA graph is being captured" in message
    assert "so that 'depthwise' or 'implicit_gemm' can run it" in message


def test_a_graph_that_recalls_the_winner(xp, monkeypatch, tmp_path, choices) -> None:
    """Recorded winners hold in a capture; without one nothing is timed there."""
    monkeypatch.setenv("CUCONV_CACHE_DIR", str(tmp_path))
    forget_winners()
    host = operands(APART, "float32")
    arrays = host.on(xp)
    out = xp.full(APART.y_shape(), 77, "float32")
    call = partial(call_into, "forward", arrays, APART, out, strategy="benchmark")
    races = let_win(monkeypatch, "implicit_gemm")
    with captured(xp):
        call()
    assert (choices[-1].strategy.name, races) == ("depthwise", [])
    call()
    assert len(races) == 1
    with captured(xp) as graphs:
        call()
    assert (choices[-1].strategy.name, len(races)) == ("implicit_gemm", 1)
    out[...] = 77
    graphs[0].launch()
    xp.cuda.Device().synchronize()
    testing.assert_equal(out, reference("forward", host, APART))
    forget_winners()
