"""Calls recorded into a CUDA graph: right when it is launched, or refused with reasons.

Only strategies that launch kernels alone can be captured.  One of this file's own,
slow and simple, is there to see what the planner makes of such a strategy.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support import (
    OPERATIONS,
    Case,
    Operands,
    device_allocations,
    forget_plans,
    integers,
    of,
    operands,
    reference,
    to_host,
)

import cuconv
from cuconv import strategies, testing
from cuconv.engine import plan as planning
from cuconv.engine import planner
from cuconv.engine.costs import Work
from cuconv.memory import Buffer
from cuconv.strategies.base import OneWay, Tilings, Workspace

pytestmark = pytest.mark.parametrize("xp", ["cupy"], indirect=True)

# Every thread looks at all products and adds those that belong to its cell.
DIRECT = """
extern "C" __global__ void direct(const float *a, const float *b, float *out, int op,
    int images, int channels, int filters, int size, int taps, int positions,
    int stride, int dilation, int before)
{
    long long own = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    float sum = 0;
    bool mine = false;
    for (int n = 0; n < images; ++n)
    for (int c = 0; c < channels; ++c)
    for (int k = 0; k < filters; ++k)
    for (int i = 0; i < size; ++i)
    for (int t = 0; t < taps; ++t) {
        int o = i + before - t * dilation;
        bool hit = o % stride == 0 && 0 <= o && o / stride < positions;
        long long x = ((long long)n * channels + c) * size + i;
        long long w = ((long long)k * channels + c) * taps + t;
        long long y = ((long long)n * filters + k) * positions + o / stride;
        if (op == 0 && hit && y == own) { mine = true; sum += a[x] * b[w]; }
        if (op == 1 && x == own) { mine = true; if (hit) sum += a[y] * b[w]; }
        if (op == 2 && w == own) { mine = true; if (hit) sum += a[y] * b[x]; }
    }
    if (mine) out[own] = sum;
}
"""


class DirectConv(OneWay):
    """One kernel for one axis, one group, float32; dear, so that others come first."""

    name = "direct"
    capturable = True
    cost = 1e12

    def __init__(self, xp: Any) -> None:
        self._kernel = xp.RawKernel(DIRECT, "direct")

    def supports(self, problem: Any) -> tuple[bool, str]:
        g = problem.geometry
        mine = g.rank == 1 and g.groups == 1 and problem.module == "cupy"
        return mine and not problem.flipped and not problem.has_bias, "not mine"

    def tilings(self, problem: Any, variant: Any, backend: Any) -> Tilings:
        g = problem.geometry
        return Tilings(g.images * g.positions, g.tile)

    def workspace(self, problem: Any, tiling: Any, backend: Any) -> Workspace:
        return Workspace()

    def work(self, problem: Any, tiling: Any) -> Work:
        return Work(multiply=self.cost, blocks=0)

    def weights(self, job: Any, w: Any, kept: Any) -> Any:
        return w

    def forward(self, job: Any, x: Any, weights: Any, bias: Any, out: Any) -> None:
        self._launch(job, 0, x, weights, out)

    def input_grad(self, job: Any, dy: Any, weights: Any, bias: Any, out: Any) -> None:
        self._launch(job, 1, dy, weights, out)

    def weight_grad(self, job: Any, dy: Any, x: Any, out: Any) -> None:
        self._launch(job, 2, dy, x, out)

    def _launch(self, job: Any, op: int, a: Any, b: Any, out: Any) -> None:
        g = job.problem.geometry
        (axis,) = g.axes
        numbers = (op, g.images, g.channels, g.filters, axis.size, axis.kernel)
        numbers += (axis.out, axis.stride, axis.dilation, axis.before)
        arguments = (a, b, out, *map(np.int32, numbers))
        self._kernel((-(-out.size // 64),), (64,), arguments)


class Cheap(DirectConv):
    """The same, but what the planner prefers."""

    name = "cheap"
    cost = 1


class Hungry(DirectConv):
    """The same, but it asks for memory."""

    name = "hungry"

    def workspace(self, problem: Any, tiling: Any, backend: Any) -> Workspace:
        return Workspace(per_worker=(Buffer("space", 100, np.dtype("f4")),))


class Packing(DirectConv):
    """The same, but it keeps weights of its own."""

    name = "packing"

    def workspace(self, problem: Any, tiling: Any, backend: Any) -> Workspace:
        cells = problem.geometry.filters * problem.geometry.patch
        return Workspace(weights=(Buffer("w", cells, problem.operand),))

    def weights(self, job: Any, w: Any, kept: Any) -> Any:
        job.backend.copy(w.reshape(-1), kept["w"])
        return kept["w"]


def _add(monkeypatch: pytest.MonkeyPatch, strategy: Any) -> None:
    several = (*strategies.STRATEGIES, strategy)
    monkeypatch.setattr(strategies, "STRATEGIES", several)
    forget_plans()


@pytest.fixture
def direct(xp: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The strategy of this file is among the others."""
    _add(monkeypatch, DirectConv(xp))
    yield
    monkeypatch.undo()
    forget_plans()


@contextlib.contextmanager
def captured(xp: Any) -> Iterator[list[Any]]:
    """A stream that records; its graph is in the list afterwards."""
    stream, found = xp.cuda.Stream(non_blocking=True), []
    with stream:
        stream.begin_capture()
        try:
            yield found
        finally:
            found.append(stream.end_capture())
    stream.synchronize()


def call(op: str, arrays: Operands, case: Case, out: Any, **options: Any) -> Any:
    x, w, dy = arrays
    options = {**case.options, **options}
    if op == "forward":
        return cuconv.conv(x, w, out=out, **options)
    if op == "input_grad":
        return cuconv.conv_input_grad(dy, w, case.x_shape, out=out, **options)
    return cuconv.conv_weight_grad(dy, x, case.w_shape, out=out, **options)


LINE = Case((2, 3, 11), (4, 3, 3), {"stride": 2, "padding": ((1, 2),), "dilation": 2})
PLANE = Case(
    (2, 6, 7, 9),
    (4, 3, 3, 2),
    {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2},
)
APART = Case((2, 6, 7, 9), (6, 1, 3, 2), {"padding": (1, 0), "groups": 6})
CAPTURABLE = [
    ("direct", LINE),
    ("implicit_gemm", LINE),
    ("implicit_gemm", PLANE),
    ("depthwise", APART),
]


def wanted_shape(op: str, case: Case) -> tuple[int, ...]:
    shapes = case.y_shape(), case.x_shape, case.w_shape
    return dict(zip(OPERATIONS, shapes, strict=True))[op]


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize(("name", "case"), CAPTURABLE)
def test_a_graph_computes_what_is_in_its_buffers(xp, op, name, case) -> None:
    """Recorded once, launched twice: each time on what the buffers hold then."""
    arrays = operands(case, "float32").on(xp)
    out = xp.full(wanted_shape(op, case), 77, dtype="float32")
    call(op, arrays, case, out, strategy=name)  # kernels are compiled before
    out[...] = 78
    with captured(xp) as graphs:
        assert call(op, arrays, case, out, strategy=name) is out
    assert np.all(to_host(out) == 78), "it ran while it was recorded"
    for seed in (5, 6):
        fresh = operands(case, "float32", seed)
        for mine, others in zip(arrays, fresh.on(xp), strict=True):
            mine[...] = others
        xp.cuda.Device().synchronize()
        graphs[0].launch()
        xp.cuda.Device().synchronize()
        testing.assert_equal(out, reference(op, fresh, case))


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("op", OPERATIONS)
def test_the_planner_takes_what_can_be_captured(xp, op, choices) -> None:
    arrays = operands(LINE, "float32").on(xp)
    out = xp.zeros(wanted_shape(op, LINE), dtype="float32")
    call(op, arrays, LINE, out)
    assert choices[-1].strategy.name != "direct", "or this test shows nothing"
    with captured(xp):
        call(op, arrays, LINE, out)
        plan = cuconv.plan_conv(
            LINE.x_shape, LINE.w_shape, op=op, device="cuda", **LINE.options
        )
    assert choices[-1].strategy.capturable
    assert choices[-1].workspace_bytes == 0
    assert plan.problem.captured
    assert plan.strategy == choices[-1].strategy.name
    assert "cannot hold cuBLAS" in plan.passed_over["im2col"]


BLAS = {
    "im2col": LINE,
    "tap_matmul": LINE,
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
            call(op, arrays, plain, out, strategy=name, precision=precision)
        assert stream.is_capturing(), "the capture was broken"
        graph = stream.end_capture()
    assert seen.count == 0
    graph.launch()
    xp.cuda.Device().synchronize()
    assert np.all(to_host(out) == 77), "something had been recorded"


def test_where_nothing_can_be_captured_the_error_says_what_would_do(
    xp, monkeypatch
) -> None:
    known = {
        n: strategies.strategies()[n] for n in ("im2col", "pointwise", "depthwise")
    }
    monkeypatch.setattr(planner, "strategies", lambda: known)
    forget_plans()
    x, w = xp.ones((1, 2, 5), "float32"), xp.ones((3, 2, 2), "float32")
    out = xp.empty((1, 3, 4), "float32")
    with captured(xp), pytest.raises(ValueError, match="cannot be captured") as found:
        cuconv.conv(x, w, out=out)
    message = str(found.value)
    assert "im2col: a CUDA graph is being captured" in message
    assert "depthwise: there is one group" in message
    assert "so that 'depthwise' can run it" in message
    forget_plans()


@pytest.mark.parametrize("name", ["hungry", "auto"])
def test_a_workspace_is_refused_with_its_size(xp, monkeypatch, name) -> None:
    _add(monkeypatch, Hungry(xp))
    known = {n: strategies.strategies()[n] for n in ("im2col", "hungry")}
    monkeypatch.setattr(planner, "strategies", lambda: known)
    x, w = xp.ones((1, 2, 5), "float32"), xp.ones((3, 2, 2), "float32")
    out = xp.empty((1, 3, 4), "float32")
    cuconv.conv(x, w, out=out, strategy="hungry")
    words = "hungry: needs 1024 bytes of workspace, which a CUDA graph cannot hold"
    with captured(xp), pytest.raises(ValueError, match=words):
        cuconv.conv(x, w, out=out, strategy=name, memory_limit="1 GiB")
    forget_plans()


@pytest.mark.usefixtures("direct")
def test_results_without_out_are_refused(xp) -> None:
    x, w, dy = operands(LINE, "float32").on(xp)
    plan = cuconv.plan_conv(
        LINE.x_shape, LINE.w_shape, device="cuda", strategy="direct", **LINE.options
    )
    columns = cuconv.im2col(x, 3)
    steps = cuconv.iter_im2col(xp.ones((4, 3, 40)), 3, memory_limit=1024)
    next(steps)
    half = xp.zeros(columns.shape, "float16")
    target = xp.zeros(x.shape, "float16")
    calls = {
        "give the array for the result as out=": [
            lambda: cuconv.conv(x, w, strategy="direct", **LINE.options),
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
        "weights are prepared before": [lambda: plan.prepare(w)],
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


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("op", OPERATIONS)
def test_a_plan_from_outside_is_made_anew_inside(xp, op, choices) -> None:
    options = {**LINE.options, "op": op, "device": "cuda"}
    plan = cuconv.plan_conv(LINE.x_shape, LINE.w_shape, **options)
    insisting = cuconv.plan_conv(
        LINE.x_shape, LINE.w_shape, strategy="im2col", **options
    )
    assert plan.strategy != "direct"
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


@pytest.mark.usefixtures("direct")
def test_a_plan_from_inside_runs_outside(xp) -> None:
    host = operands(LINE, "float32")
    with captured(xp):
        plan = cuconv.plan_conv(
            LINE.x_shape, LINE.w_shape, device="cuda", **LINE.options
        )
    assert plan.problem.captured
    x, w, _ = host.on(xp)
    testing.assert_equal(plan(x, w), reference("forward", host, LINE))


@pytest.mark.usefixtures("direct")
def test_prepared_plans(xp) -> None:
    """Captured where a graph can hold what they were prepared for, else refused."""
    host = operands(LINE, "float32")
    x, w, _ = host.on(xp)
    options = {**LINE.options, "device": "cuda"}
    plans = {
        name: cuconv.plan_conv(
            LINE.x_shape, LINE.w_shape, strategy=name, **options
        ).prepare(w)
        for name in ("im2col", "direct")
    }
    out = xp.full(LINE.y_shape(), 77, "float32")
    with captured(xp) as graphs:
        with pytest.raises(ValueError, match="prepared for im2col, which it cannot"):
            plans["im2col"](x, out=out)
        plans["direct"](x, out=out)
    w[...] = 0  # prepared weights are the plan's own
    graphs[0].launch()
    xp.cuda.Device().synchronize()
    testing.assert_equal(out, reference("forward", host, LINE))


def test_a_graph_that_recalls_the_winner(xp, monkeypatch, tmp_path, choices) -> None:
    """Recorded winners hold in a capture; without one nothing is timed there."""
    monkeypatch.setenv("CUCONV_CACHE_DIR", str(tmp_path))
    planning.recall.__globals__["_known"].cache_clear()
    _add(monkeypatch, DirectConv(xp))
    _add(monkeypatch, Cheap(xp))
    host = operands(LINE, "float32")
    arrays = host.on(xp)
    out = xp.full(LINE.y_shape(), 77, "float32")
    races = []
    with captured(xp):
        call("forward", arrays, LINE, out, strategy="benchmark")
        assert choices[-1].strategy.name == "cheap", "the cheapest, as by auto"

    def picks_direct(backend: Any, calls: Any) -> int:
        races.append(len(calls))
        names = [c.strategy.name for c in candidates]
        return names.index("direct")

    decide = planning.decide
    candidates: list[Any] = []

    def spying(*arguments: Any) -> Any:
        decision = decide(*arguments)
        candidates[:] = decision.candidates
        return decision

    monkeypatch.setattr(planning, "decide", spying)
    monkeypatch.setattr(planning, "fastest", picks_direct)
    call("forward", arrays, LINE, out, strategy="benchmark")
    assert len(races) == 1
    assert choices[-1].strategy.name == "direct"
    with captured(xp) as graphs:
        call("forward", arrays, LINE, out, strategy="benchmark")
    assert choices[-1].strategy.name == "direct"
    assert len(races) == 1
    out[...] = 77
    graphs[0].launch()
    xp.cuda.Device().synchronize()
    testing.assert_equal(out, reference("forward", host, LINE))
    monkeypatch.undo()
    forget_plans()


def test_packed_weights_are_prepared_before_a_capture(xp, monkeypatch) -> None:
    """Then they are no workspace of a call."""
    _add(monkeypatch, Packing(xp))
    host = operands(LINE, "float32")
    x, w, _ = host.on(xp)
    options = {**LINE.options, "device": "cuda", "strategy": "packing"}
    plan = cuconv.plan_conv(LINE.x_shape, LINE.w_shape, **options)
    prepared = plan.prepare(w)
    out = xp.full(LINE.y_shape(), 77, "float32")
    with captured(xp) as graphs:
        with pytest.raises(ValueError, match="packing: needs 1024 bytes"):
            plan(x, w, out=out)
        prepared(x, out=out)
    graphs[0].launch()
    xp.cuda.Device().synchronize()
    testing.assert_equal(out, reference("forward", host, LINE))
    monkeypatch.undo()
    forget_plans()


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


@pytest.mark.usefixtures("direct")
def test_another_stream_may_capture_meanwhile(xp, choices) -> None:
    """Only the current stream counts."""
    host = operands(LINE, "float32")
    arrays = host.on(xp)
    recording = xp.cuda.Stream(non_blocking=True)
    for working in (xp.cuda.Stream(non_blocking=True), xp.cuda.Stream.null):
        with recording:
            recording.begin_capture()
            with working:
                found = call("forward", arrays, LINE, None)
            recording.end_capture()
        working.synchronize()
        assert choices[-1].strategy.name != "direct"
        testing.assert_equal(found, reference("forward", host, LINE))


@pytest.mark.usefixtures("direct")
def test_the_first_call_of_a_process_may_be_in_a_capture(xp, monkeypatch) -> None:
    """Whether a GPU works is not asked there: it would have to be waited for."""
    from cuconv.backends.cuda import device

    host = operands(LINE, "float32")
    arrays = host.on(xp)
    out = xp.zeros(LINE.y_shape(), "float32")
    call("forward", arrays, LINE, out, strategy="direct")
    monkeypatch.setattr(device, "_working", [])
    with captured(xp) as graphs:
        call("forward", arrays, LINE, out, strategy="direct")
    assert device._working == []
    out[...] = 77
    graphs[0].launch()
    xp.cuda.Device().synchronize()
    testing.assert_equal(out, reference("forward", host, LINE))
