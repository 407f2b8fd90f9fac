"""Nothing waits for the device; arrays, plans and rates are those of their device."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import Case, devices_that_plan, operands, reference, run, to_host

import cuconv
from cuconv import testing
from cuconv.backends import backend_of, backend_on
from cuconv.engine import costs as rates
from cuconv.engine.costs import CUDA_RATES, Gpu, cuda_block_bytes, cuda_rates

CASE = Case((2, 4, 7, 9), (6, 2, 3, 2), {"stride": (2, 1), "padding": 1, "groups": 2})
GENERAL = cuconv.conv, cuconv.conv_input_grad, cuconv.conv_weight_grad
on_cupy = pytest.mark.parametrize("xp", ["cupy"], indirect=True)


@pytest.fixture
def standin(xp: Any) -> Any:
    if not getattr(xp, "IS_STAND_IN", False):
        pytest.skip("about the stand-in, and this is the real CuPy")
    return xp


def every_call(xp: Any) -> dict[str, Callable[[], Any]]:
    """One call of each public function that takes arrays of a device."""
    x, w, dy = operands(CASE, "float32").on(xp)
    block, filters = x[:, :, None], w[:, :, None]
    options: dict[str, Any] = CASE.options
    half, whole = ([a.astype(t) for a in (x, w)] for t in ("float16", "int32"))
    conv = partial(cuconv.conv, **options)
    plan = cuconv.plan_conv(x.shape, w.shape, device="cuda", **options)
    plain = {
        "array_module": (x, w),
        "im2col": (x, 3),
        "col2im": (cuconv.im2col(x, 3), x.shape, 3),
        "patches": (x, 3),
        "precompile": (("float32",), (2,)),
        "default_array_module": (),
        "release_memory": (),
        "asarray": (x,),
    }
    grouped = {
        "conv1d": (x[:, :, 0], w[:, :, 0]),
        "conv2d": (x, w),
        "conv3d": (block, filters),
    }
    gradients = {
        "conv": (x, w, xp.ones(6, "float32")),
        "conv_input_grad": (dy, w, x.shape),
        "conv_weight_grad": (dy, x, w.shape),
        "conv_backward": (dy, x, w),
        "plan_conv": (x.shape, w.shape),
    }
    return {
        **named(plain),
        **named(grouped, groups=2),
        **named(gradients, **options),
        "conv, halves": partial(conv, *half),
        "conv, integers": partial(conv, *whole),
        "conv, turned": partial(conv, x[:, :, ::-1], w[..., ::-1]),
        "conv, nothing": partial(conv, x[:0], w),
        "iter_im2col": lambda: list(cuconv.iter_im2col(x, 3, memory_limit=4096)),
        "Plan": partial(plan, x, w),
        "Plan.prepare": partial(plan.prepare, w),
        "Plan, prepared": partial(plan.prepare(w), x),
        **every_general_call(x, w, dy),
        **every_transposed_call(dy, w, block, filters),
        **every_pooling_call(x),
        **every_separable_call(x),
        **every_deformable_call(x),
    }


def every_general_call(x: Any, w: Any, dy: Any) -> dict[str, Any]:
    """Calls with what is not plain, of each operation."""
    options: dict[str, Any] = {
        "padding mode": {**CASE.options, "padding_mode": "reflect"},
        "input dilation": {"input_dilation": (2, 3), "groups": 2},
        "batch groups": {"batch_groups": 2},
    }
    calls: dict[str, Any] = {}
    for name, each in options.items():
        cells = x[:, :2] if name == "batch groups" else x
        y = cuconv.conv(cells, w, **each)
        both = (cells, w), (y, w, cells.shape), (y, cells, w.shape)
        for call, arrays in zip(GENERAL, both, strict=True):
            calls[f"{call.__name__}, {name}"] = partial(call, *arrays, **each)
    bytes_ = x.astype("int8"), w.astype("int8")
    zeros = {"x_zero_point": 3, "w_zero_point": dy.astype("int8")[0, :, 0, 0].copy()}
    calls["conv, zero points"] = partial(cuconv.conv, *bytes_, **zeros, groups=2)
    small = {"padding_mode": "circular", "memory_limit": "64 KiB"}
    calls["conv, blocks"] = partial(cuconv.conv, x, w, padding=9, groups=2, **small)
    return calls


def named(calls: dict[str, tuple[Any, ...]], **options: Any) -> dict[str, Any]:
    """Public functions by their names, with what each takes."""
    return {
        n: partial(getattr(cuconv, n), *each, **options) for n, each in calls.items()
    }


def every_transposed_call(x: Any, w: Any, block: Any, filters: Any) -> dict[str, Any]:
    options: dict[str, Any] = CASE.options
    dy = cuconv.conv_transpose(x, w, **options)
    deep = cuconv.conv3d(block, filters, groups=2)
    whole = {
        "conv_transpose": (x, w),
        "conv_transpose2d": (x, w),
        "conv_transpose_backward": (dy, x, w),
        "conv_transpose_input_grad": (dy, w, x.shape),
        "conv_transpose_weight_grad": (dy, x, w.shape),
    }
    line = named({"conv_transpose1d": (x[:, :, 0], w[:, :, 0])})
    deep = named({"conv_transpose3d": (deep, filters)}, groups=2)
    return named(whole, **options) | line | deep


def every_deformable_call(x: Any) -> dict[str, Any]:
    w = x[:1, :, :3, :2].copy()
    dy = cuconv.conv(x, w)
    rows, columns = dy.shape[2:]
    offset = cuconv.im2col(x, 1, order="batched")[:, :, : rows * columns]
    offset = offset[:, :1].copy().reshape(-1, 1, rows, columns)
    offset = offset[:, [0] * (2 * 3 * 2)]
    return named(
        {
            "deform_conv": (x, offset, w),
            "deform_conv2d": (x, offset, w),
            "deform_conv_backward": (dy, x, offset, w),
        }
    )


def every_separable_call(x: Any) -> dict[str, Any]:
    w, points = x[0, :, :2, :6].reshape(4, 2, 3, 2), x[0, :, :2, 0].reshape(1, 8)
    between = cuconv.depthwise_conv(x, w)
    return named(
        {
            "depthwise_conv": (x, w),
            "depthwise_conv_backward": (between, x, w),
            "separable_conv": (x, w, points),
            "separable_conv_backward": (between[:, :1], x, w, points),
        }
    )


def every_pooling_call(x: Any) -> dict[str, Any]:
    line, block = x[:, :, 0], x[:, :, None]
    top, places = cuconv.max_pool(x, 2, return_indices=True)
    mean, norm = cuconv.avg_pool(x, 2), cuconv.lp_pool(x, 2, 2)
    small, where = cuconv.adaptive_max_pool(x, 2, return_indices=True)
    one, there = cuconv.global_max_pool(x, return_indices=True)
    calls = {
        "max_pool": (x, 3),
        "max_unpool": (top, places, 2),
        "max_pool_backward": (top, places, x.shape, 2),
        "avg_pool": (x, 3),
        "avg_pool_backward": (mean, x.shape, 2),
        "lp_pool": (x, 2, 2),
        "lp_pool_backward": (norm, x, norm, 2, 2),
        "adaptive_max_pool": (x, 2),
        "adaptive_max_pool_backward": (small, where, x.shape, 2),
        "adaptive_avg_pool": (x, 2),
        "adaptive_avg_pool_backward": (small, x.shape, 2),
        "global_max_pool": (x,),
        "global_max_pool_backward": (one, there, x.shape),
        "global_avg_pool": (x,),
        "global_avg_pool_backward": (one, x.shape),
    }
    for rank, given in enumerate((line, x, block), 1):
        kernel = (1, 2, 2)[-rank:]
        best = cuconv.max_pool(given, kernel, return_indices=True)
        calls |= {
            f"max_unpool{rank}d": (*best, kernel),
            f"lp_pool{rank}d": (given, 2, kernel),
            **{f"{kind}_pool{rank}d": (given, kernel) for kind in ("max", "avg")},
            **{f"adaptive_{kind}_pool{rank}d": (given, 1) for kind in ("max", "avg")},
            **{f"global_{kind}_pool{rank}d": (given,) for kind in ("max", "avg")},
        }
    return {
        **named(calls),
        "max_pool, indices": partial(cuconv.max_pool, x, 2, indices=places),
    }


ELSEWHERE = {
    *("ConvGradients", "DeformGradients", "SeparableGradients", "config"),
    *("IntegerOverflowWarning", "MemoryLimitError"),
}


@on_cupy
def test_no_public_call_waits_for_the_device(standin) -> None:
    waits = standin.cuda.stream.synchronisations
    calls = every_call(standin)
    assert set(cuconv.__all__) - ELSEWHERE <= set(calls)
    for name, call in calls.items():
        before = len(waits)
        call()
        assert waits[before:] == [], name
    assert len(calls) == 89
    x, w, _ = operands(CASE, "float32").on(standin)
    cuconv.conv(x, w, strategy="benchmark", **CASE.options)
    float(x[0, 0, 0, 0])
    assert "event" in waits or "float" in waits, "the list shows nothing"


@on_cupy
@pytest.mark.parametrize("what", ["get", "item", "bool", "int", "float"])
def test_what_waits_is_counted(standin, what) -> None:
    waits = standin.cuda.stream.synchronisations
    x = standin.ones(())
    waiting = {"bool": bool, "int": int, "float": float}
    before = len(waits)
    waiting.get(what, lambda a: getattr(a, what)())(x)
    assert waits[before:] == [what]


@on_cupy
@pytest.mark.parametrize("op", ["forward", "input_grad", "weight_grad"])
def test_a_call_returns_before_the_work_is_done(xp, op) -> None:
    """Behind work that takes long, on a stream of its own."""
    real = not getattr(xp, "IS_STAND_IN", False)
    side = 8192 if real else 8
    a, b = xp.ones((side, side), "float32"), xp.empty((side, side), "float32")
    host = operands(CASE, "float32")
    out = xp.empty(reference(op, host, CASE).shape, "float32")
    call = partial(run, op, host.on(xp), CASE, out=out)
    stream, event = xp.cuda.Stream(non_blocking=True), xp.cuda.Event()
    with stream:
        call()  # kernels are compiled, and the pool is filled
        xp.matmul(a, a, out=b)
        xp.cuda.Device().synchronize()
        for _ in range(100):
            xp.matmul(a, a, out=b)
        event.record()
        call()
        assert not event.done, "the call waited for what was before it"
        stream.synchronize()
    assert event.done
    testing.assert_equal(out, reference(op, host, CASE))


@on_cupy
def test_streams_may_change_between_calls(xp) -> None:
    """Workspaces of calls that still run are not given to another stream."""
    host = operands(CASE, "float32")
    x, w, _ = host.on(xp)
    xp.cuda.Device().synchronize()
    streams = [xp.cuda.Stream(non_blocking=True) for _ in range(3)]
    found = []
    for number in range(12):
        with streams[number % 3]:
            found.append(cuconv.conv(x, w, **CASE.options))
    for stream in streams:
        stream.synchronize()
    for y in found:
        testing.assert_equal(y, reference("forward", host, CASE))


@on_cupy
def test_plans_belong_to_a_device(standin) -> None:
    host = operands(CASE, "float32")
    x, w, _ = host.on(standin)
    with standin.cuda.Device(1):
        x1, w1, _ = host.on(standin)
        out1 = standin.empty(CASE.y_shape(), "float32")
    shapes = CASE.x_shape, CASE.w_shape
    plan = cuconv.plan_conv(*shapes, device="cuda:1", **CASE.options)
    prepared = plan.prepare(w1)
    for call in (lambda: plan(x, w), lambda: plan.prepare(w), lambda: prepared(x)):
        with pytest.raises(
            ValueError, match="are on cuda:0 and the plan is for cuda:1"
        ):
            call()
    with pytest.raises(ValueError, match="different devices: x on device 0"):
        cuconv.conv(x, w, out=out1, **CASE.options)
    with pytest.raises(ValueError, match="different devices"):
        cuconv.plan_conv(*shapes, device="cuda", **CASE.options)(x, w, out=out1)
    with pytest.raises(TypeError, match="mixed"):
        plan(x1, w1, out=np.empty(CASE.y_shape(), "float32"))
    for y in (plan(x1, w1), prepared(x1), prepared(x1, out=out1)):
        assert y.device.id == 1
        np.testing.assert_array_equal(to_host(y), reference("forward", host, CASE))
    assert standin.cuda.runtime.getDevice() == 0


@pytest.mark.parametrize("device", ["cuda:", "cuda:-1", "cuda:x", "cuda:1:1", "cpu:0"])
def test_devices_that_are_not_words(device) -> None:
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or"):
        cuconv.plan_conv((1, 1, 3), (1, 1, 2), device=device)


@on_cupy
def test_a_device_that_is_not_there(xp) -> None:
    count = xp.cuda.runtime.getDeviceCount()
    with pytest.raises(ValueError, match=f"there is no device 99: there are {count}"):
        cuconv.plan_conv((1, 1, 3), (1, 1, 2), device="cuda:99")


@on_cupy
def test_calls_are_planned_for_the_device_of_their_arrays(standin, monkeypatch) -> None:
    """Whichever device is current."""
    large = Case((4, 16, 30, 30), (8, 16, 3, 3), {})
    asked = devices_that_plan(monkeypatch)
    with standin.cuda.Device(1):
        x, w, _ = (standin.ones(s, "float32") for s in (*large[:2], (1,)))
        cuconv.plan_conv(*large[:2], device="cuda")
        cuconv.plan_conv(*large[:2], device="cuda:0")
    cuconv.conv(x, w)
    assert asked == ["cuda:1", "cuda:0", "cuda:1"]
    first, second = (backend_on(f"cuda:{i}") for i in range(2))
    assert first is backend_of(standin)
    assert second is backend_of(standin, x)
    assert (first.block_bytes, second.block_bytes) == (25 * 2**20, 20 * 2**20)
    assert first.default_memory_limit == second.default_memory_limit == 256 * 2**20
    assert first.rates.multiply < second.rates.multiply
    assert first.rates.copy < second.rates.copy
    plans = [cuconv.plan_conv(*large[:2], device=f"cuda:{i}") for i in range(2)]
    estimates = [dict(plan.rows())["estimate"] for plan in plans]
    assert estimates[0] != estimates[1]


H200 = Gpu("any", "90", 132, 1_980_000, 3_125_000, 6144, 50 * 2**20)
UNITS = {
    *("block", "unrecorded", "worker", "worth_workers", "short", "products"),
    *("einsum", "crowding"),
    *("tf32", "halves"),
}


def test_rates_follow_from_properties() -> None:
    assert cuda_rates(H200) == CUDA_RATES
    halved = H200._replace(multiprocessors=66, memory_bits=3072, l2_bytes=7 * 2**20)
    found = cuda_rates(halved)._asdict()
    ratios = {
        n: rate / getattr(CUDA_RATES, n) for n, rate in found.items() if n not in UNITS
    }
    assert ratios.pop("processors") == 1 / 2
    assert len(ratios) == 12
    assert set(ratios.values()) == {2}
    assert all(found[name] == getattr(CUDA_RATES, name) for name in UNITS)
    assert cuda_block_bytes(halved) == 7 * 2**19
    narrow = H200._replace(compute_capability="80")
    assert cuda_rates(narrow).multiply == 2 * CUDA_RATES.multiply
    assert cuda_rates(narrow).copy == CUDA_RATES.copy


def test_a_gpu_that_says_nothing_gets_the_rates_of_the_table() -> None:
    silent = Gpu("virtual", "90", 0, 0, 0, 0, 0)
    assert cuda_rates(silent) == CUDA_RATES
    assert cuda_block_bytes(silent) == 64 * 2**20


def test_measured_rates_go_first(monkeypatch) -> None:
    measured = CUDA_RATES._replace(gather=17.0)
    monkeypatch.setitem(rates.MEASURED_RATES, "the measured", measured)
    assert cuda_rates(H200._replace(name="the measured")) is measured
    assert cuda_rates(H200) == CUDA_RATES


@on_cupy
def test_a_gpu_is_asked_by_attributes(xp) -> None:
    """Clock rates are no properties any more where CuPy is built for CUDA 13."""
    gpu = backend_of(xp)._gpu
    assert isinstance(gpu.name, str)
    assert gpu.compute_capability == xp.cuda.Device().compute_capability
    assert min(gpu.multiprocessors, gpu.memory_bits, gpu.l2_bytes) > 0


@on_cupy
def test_times_come_from_events(standin, monkeypatch) -> None:
    """In order, with one wait for all of them, and not from the host's clock."""
    now = [0.0]
    stream = standin.cuda.stream
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(stream, "time", clock)

    def takes(seconds: float) -> Callable[[], None]:
        def call() -> None:
            now[0] += seconds

        return call

    before = len(stream.synchronisations)
    launched = standin._kernels.launches
    times = backend_of(standin).times([takes(0.25), takes(2), takes(0.5)])
    assert times == [250, 2000, 500]
    assert stream.synchronisations[before:] == ["event"]
    # The device is kept busy first, so that it does not wait for the host.
    assert launched[-1][:3] == ("delay", 1, 1)
