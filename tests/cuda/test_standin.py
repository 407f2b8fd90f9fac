"""The stand-in forbids what CuPy forbids, and the shim runs CUDA as CUDA means it."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from support import (
    LAYOUTS,
    OPERATIONS,
    TESTS,
    Case,
    candidates_of,
    device_allocations,
    forget_plans,
    integers,
    normal,
    of,
    operands,
    plan_of,
    run,
    to_host,
)

import cuconv

pytestmark = pytest.mark.parametrize("xp", ["cupy"], indirect=True)

REVERSE = """
extern "C" __global__ void reverse(float *x)
{
    __shared__ float tile[64];
    tile[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
    __syncthreads();
    x[blockIdx.x * 64 + threadIdx.x] = tile[63 - threadIdx.x];
}
"""
COUNT = """
extern "C" __global__ void count(unsigned *n) { atomicAdd(n, 1u + threadIdx.x % 2); }
"""
DIVERGENT = """
extern "C" __global__ void divergent(float *x) { if (threadIdx.x < 3) __syncthreads(); }
"""
# Every thread takes the next number, and tells no one.
RACE = """
extern "C" __global__ void race(float *x)
{
    if (blockDim.x == 1) __syncthreads();
    x[1 + threadIdx.x] = x[0]++;
}
"""


@pytest.fixture
def standin(xp):
    if not getattr(xp, "IS_STAND_IN", False):
        pytest.skip("about the stand-in, and this is the real CuPy")
    return xp


@pytest.fixture
def loaded():
    """The cache of the kernels that are loaded."""
    from cuconv.backends.cuda.compiler import _loaded

    return _loaded


def test_shared_memory_and_barriers(xp):
    host = integers((3 * 64,), "float32", largest=1000)
    x = xp.asarray(host)
    xp.RawKernel(REVERSE, "reverse")((3,), (64,), (x,))
    expected = host.reshape(3, 64)[:, ::-1].ravel()
    np.testing.assert_array_equal(to_host(x), expected)


def test_atomics_and_every_thread_of_every_block(xp):
    n = xp.zeros(1, dtype="uint32")
    xp.RawKernel(COUNT, "count")((5,), (32,), (n,))
    assert int(n[0]) == 5 * 32 + 5 * 16


def test_a_barrier_that_some_threads_miss_is_an_error(standin):
    program = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "import standin; standin.install()\n"
        "import cupy\n"
        "x = cupy.zeros(1, dtype='float32')\n"
        f"cupy.RawKernel({DIVERGENT!r}, 'divergent')((1,), (4,), (x,))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "reached by some threads only" in done.stderr


def in_orders(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[bytes]:
    """The bits of a result, with the threads of a block in several orders."""
    found = []
    for seed in ("0", "1", "2"):
        monkeypatch.setenv("CUCONV_SHIM_ORDER", seed)
        found.append(to_host(run()).tobytes())
    return found


def test_a_race_shows_in_another_order_of_threads(standin, monkeypatch):
    def launched(source: str, name: str) -> Any:
        x = standin.zeros(65, "float32")
        standin.RawKernel(source, name)((1,), (64,), (x,))
        return x

    bits = in_orders(monkeypatch, lambda: launched(RACE, "race"))
    assert len(set(bits)) == len(bits) == 3
    bits = in_orders(monkeypatch, lambda: launched(REVERSE, "reverse"))
    assert len(set(bits)) == 1


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("strategy", ["implicit_gemm", "depthwise"])
def test_threads_of_a_block_do_not_race(standin, monkeypatch, strategy, dtype, op):
    """Whatever the order of warps and lanes, and whenever copies arrive."""
    case = Case((2, 6, 9, 11), (12, 2, 3, 2), {"groups": 3, "padding": (2, 1)})
    arrays = normal(case, dtype).on(standin)
    bits = in_orders(monkeypatch, lambda: run(op, arrays, case, strategy=strategy))
    assert len(set(bits)) == 1


@pytest.mark.parametrize(
    "convert", [np.asarray, np.array, np.sort, lambda a: np.ones(2) + a]
)
def test_no_implicit_conversion(xp, convert):
    with pytest.raises(TypeError):
        convert(xp.ones(2))


def test_no_mixing(xp):
    with pytest.raises(TypeError):
        xp.add(xp.ones(2), np.ones(2))
    with pytest.raises(TypeError):
        xp.ones(2)[...] = np.ones(2)[None]


def test_fresh_memory_is_poisoned(standin):
    assert not np.any(to_host(standin.empty(100, dtype="float32")) == 0)


def test_source_that_does_not_compile(standin):
    broken = standin.RawKernel('extern "C" __global__ void f() { mistake; }', "f")
    with pytest.raises(Exception, match="mistake"):
        broken((1,), (1,), ())


def test_launches_past_the_limits_are_refused(standin):
    kernel = standin.RawKernel(COUNT, "count")
    n = standin.zeros(1, dtype="uint32")
    with pytest.raises(ValueError, match="cannot launch"):
        kernel((2**31,), (1,), (n,))
    with pytest.raises(ValueError, match="cannot launch"):
        kernel((1,), (1025,), (n,))


def test_memory_is_given_back(standin):
    with device_allocations(standin) as seen:
        x = standin.zeros(1000, dtype="float32")
        view = x[10:]
        del x
        assert seen.live == 4096
        del view
        assert seen.live == 0


def test_cublas_reads_inside_arrays_only(standin):
    blas = standin.cuda.cublas
    a = standin.zeros(16, dtype="float32")
    one = np.ones(1, dtype="float32")
    r = standin.cuda.runtime.CUDA_R_32F
    with pytest.raises(RuntimeError, match="outside any array"):
        blas.gemmStridedBatchedEx(
            0, 0, 0, 4, 4, 5, one.ctypes.data, a.data.ptr, r, 4, 0, a.data.ptr, r, 5, 0,
            one.ctypes.data, a.data.ptr, r, 4, 0, 1, blas.CUBLAS_COMPUTE_32F, -1,
        )  # fmt: skip


def test_the_arrays_device_becomes_current(standin):
    launches = standin._kernels.launches
    with standin.cuda.Device(1):
        x = standin.asarray(integers((2, 3, 6, 7), "float32"))
        w = standin.asarray(integers((4, 3, 3, 2), "float32"))
    assert cuconv.default_array_module() is standin  # which launches a kernel itself
    before = len(launches)
    y = cuconv.conv(x, w, padding=1)
    assert y.device.id == 1
    assert {device for *_, device, _ in launches[before:]} == {1}
    assert standin.cuda.runtime.getDevice() == 0
    gradients = cuconv.conv_backward(y, x, w, padding=1)
    assert {g.device.id for g in gradients} == {1}
    columns = cuconv.im2col(x, 3)
    assert cuconv.col2im(columns, x.shape, 3).device.id == 1
    for _, piece in cuconv.iter_im2col(x, 3):
        assert piece.device.id == 1


def test_arrays_of_two_devices_are_refused(standin):
    x = standin.zeros((1, 1, 4))
    with standin.cuda.Device(1):
        w = standin.zeros((1, 1, 3))
    with pytest.raises(ValueError, match="x on device 0, w on device 1"):
        cuconv.conv(x, w)


def test_kernels_run_on_the_current_stream(standin):
    launches = standin._kernels.launches
    x = standin.asarray(integers((2, 3, 6, 7), "float32"))
    w = standin.asarray(integers((4, 3, 3, 2), "float32"))
    before = len(launches)
    stream = standin.cuda.Stream(non_blocking=True)
    with stream:
        y = cuconv.conv(x, w)
        cuconv.conv_input_grad(y, w, x.shape)
    assert len(launches) > before + 1
    assert {ptr for *_, ptr in launches[before:]} == {stream.ptr}


def test_kernels_are_loaded_once_per_device(standin, loaded):
    x = standin.asarray(integers((1, 1, 9, 9), "float64"))
    cuconv.im2col(x, 3)
    before = loaded.cache_info()
    forget_plans()  # a plan keeps its kernels
    cuconv.im2col(x, 3)
    after = loaded.cache_info()
    assert after.misses == before.misses
    assert after.hits == before.hits + 1
    with standin.cuda.Device(1):
        cuconv.im2col(standin.asarray(integers((1, 1, 9, 9), "float64")), 3)
    assert loaded.cache_info().misses == after.misses + 1


def test_precompile(xp):
    # For each rank, and each below: the copy in every width, two sums, what lies around
    # an array and its adjoint; a product for integers; for floats two loops over
    # channels, tiles of three sizes along one axis, and along two; and products without
    # columns, in five ways for four sizes of blocks (three of doubles), on tensor cores
    # in six, halves whole and in parts,
    # of float32 as TF32 too; a sum of parts, and, for tensor cores, a copy to
    # channels last. For any rank: pooling by maxima and means, and norms of floats, and
    # their gradients, of which that of a maximum takes indices or, of floats, x;
    # elements at indices; and the four of deformable convolution.
    products = {"float32": 5 * 4 + 4 * 6 + 2, "float16": 2 * 4 * 6 + 2}
    single = cuconv.precompile(("float32",), (2,))
    assert single == 2 * 9 + 2 + 6 + 8 + 4 + products["float32"]
    assert cuconv.precompile(("float64",), (1,)) == 7 + 2 + 3 + 5 * 3 + 1 + 8 + 4
    assert cuconv.precompile(("int8",), (1, 2)) == 13 + 5 * 4 + 1 + 4
    assert cuconv.precompile(("float16",), (2,)) > products["float16"]
    with pytest.raises(TypeError, match="object"):
        cuconv.precompile((object,))


def test_default_array_module_is_cupy_where_a_kernel_runs(xp):
    assert cuconv.default_array_module() is xp


def test_precision_governs_tf32(standin):
    blas = standin.cuda.cublas
    x = standin.asarray(integers((1, 2, 5, 5), "float32"))
    w = standin.asarray(integers((3, 2, 3, 3), "float32"))
    seen = {}
    for precision in ("strict", "standard", "fast"):
        before = len(blas.calls)
        cuconv.conv(x, w, precision=precision, strategy="im2col")
        seen[precision] = {compute for *_, compute, _ in blas.calls[before:]}
    plain, tf32 = {blas.CUBLAS_COMPUTE_32F}, {blas.CUBLAS_COMPUTE_32F_FAST_TF32}
    assert seen == {"strict": plain, "standard": plain, "fast": tf32}


def test_deterministic_never_scatters(standin):
    launches = standin._kernels.launches
    x_shape, w = (1, 2, 6, 6), standin.asarray(integers((3, 2, 3, 3), "float32"))
    dy = standin.asarray(integers((1, 3, 4, 4), "float32"))
    names = {}
    for candidate in (None, True, False):
        before = len(launches)
        options = {"strategy": "im2col", "deterministic": candidate}
        cuconv.conv_input_grad(dy, w, x_shape, **options)
        names[candidate] = {name for name, *_ in launches[before:]}
    gather, scatter = {"col2im_gather"}, {"col2im_scatter"}
    assert names == {None: gather, True: gather, False: scatter}


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("wide", ["float32", "float64", "complex64", "complex128"])
def test_halves_with_wide_results_reach_cublas_in_types_it_knows(xp, half, wide):
    x, w = integers((2, 4, 5, 6), half), integers((3, 4, 2, 3), half, seed=1)
    on_xp = xp.asarray(x), xp.asarray(w)
    y = cuconv.conv(x, w, dtype=wide)
    found = cuconv.conv(*on_xp, dtype=wide)
    np.testing.assert_array_equal(to_host(found), y)
    dy = integers(y.shape, half, seed=2)
    wanted = cuconv.conv_backward(dy, x, w, dtype=wide)
    gradients = cuconv.conv_backward(xp.asarray(dy), *on_xp, dtype=wide)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_array_equal(to_host(got), want)


def test_a_gpu_that_failed_once_is_asked_again(standin, monkeypatch):
    from cuconv.backends.cuda import device

    monkeypatch.setattr(device, "_working", [])

    def fail(*arguments, **options):
        raise MemoryError("full")

    x, w = standin.ones((1, 1, 4)), standin.ones((1, 1, 2))
    with monkeypatch.context() as broken:
        broken.setattr(standin, "zeros", fail)
        with pytest.raises(RuntimeError, match="no GPU works: MemoryError: full"):
            cuconv.conv(x, w)
        assert cuconv.default_array_module() is np
    assert cuconv.default_array_module() is standin
    assert cuconv.conv(x, w).shape == (1, 1, 3)


def products(xp: Any, layout: str) -> None:
    """Real numbers are not conjugated: all three operations find their kernels."""
    case = Case((2, 8, 5, 6), (16, 8, 3, 2), {}).in_layout(layout)
    for op in OPERATIONS:
        run(op, operands(case, "float32").on(xp), case, strategy="implicit_gemm")


def columns(xp: Any) -> None:
    """With a bias: columns and the bias are copied in vectors of 4, and of 2."""
    for size in (8, 10):
        shapes = (2, 4, size, size), (4, 4, 3, 3), (4,)
        x, w, bias = (xp.ones(shape, "float32") for shape in shapes)
        cuconv.conv(x, w, bias, padding=1, strategy="im2col")


def convolutions(xp: Any) -> None:
    x, w = xp.ones((1, 8, 6, 6), "float16"), xp.ones((8, 8, 3, 3), "float16")
    cuconv.conv_backward(cuconv.conv(x, w), x, w)


def pooling(xp: Any) -> None:
    x = xp.ones((1, 2, 4, 6), "float16")
    y, indices = cuconv.max_pool(x, 2, return_indices=True)
    cuconv.max_pool_backward(y, indices, x.shape, 2)
    cuconv.max_pool_backward(y, None, None, 2, x=x)
    cuconv.avg_pool_backward(cuconv.avg_pool(x, 2), x.shape, 2)
    cuconv.lp_pool_backward(y, x, cuconv.lp_pool(x, 2, 2), 2, 2)
    cuconv.global_avg_pool_backward(cuconv.global_avg_pool(x), x.shape)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_whatever_auto_can_choose_is_compiled_before(
    standin, loaded, monkeypatch, dtype
):
    """Channels and filters that fill vectors: every candidate, in every precision."""
    loaded.cache_clear()
    forget_plans()
    cuconv.precompile((dtype,), (2,))
    nothing = lambda *_, **__: None  # noqa: E731 - what is compiled is all that counts
    monkeypatch.setattr(standin.RawKernel, "__call__", nothing)
    monkeypatch.setattr(standin.cuda.cublas, "gemmStridedBatchedEx", nothing)
    monkeypatch.setattr(standin._arrays, "enqueue", nothing)
    before, ran, words = loaded.cache_info().misses, 0, set()
    case = Case((8, 128, 8, 4), (64, 128, 3, 3), {"padding": 1})
    for layout, op, precision in itertools.product(
        LAYOUTS, OPERATIONS, ("standard", "fast")
    ):
        mine = case.in_layout(layout)
        arrays = operands(mine, dtype).on(standin)
        plan = plan_of(op, mine, dtype, device="cuda", precision=precision)
        for candidate in candidates_of(plan):
            plan.with_candidates([candidate])(*of(op, arrays))
            ran, words = ran + 1, words | {candidate.label}
            assert loaded.cache_info().misses == before, candidate.label
    assert ran > 60
    assert any("parts" in word for word in words)
    assert any("channels last" in word for word in words)


@pytest.mark.parametrize(
    ("dtype", "calls"),
    [
        ("float16", convolutions),
        ("float32", columns),
        ("float16", pooling),
        *(("float32", partial(products, layout=layout)) for layout in LAYOUTS),
    ],
)
def test_precompiled_kernels_are_those_that_run(standin, loaded, dtype, calls):
    calls(standin)  # others are compiled as they are met
    loaded.cache_clear()
    forget_plans()
    cuconv.precompile((dtype,), (2,))
    before = loaded.cache_info().misses
    calls(standin)
    assert loaded.cache_info().misses == before
    cuconv.max_pool(standin.ones((1, 1, 4), "float64"), 2)
    assert loaded.cache_info().misses == before + 1, "nothing was counted"


def test_patches_allocate_nothing(standin):
    x = standin.ones((2, 3, 8, 9))
    with device_allocations(standin) as seen:
        view = cuconv.patches(x, 3, stride=2, dilation=2)
    assert seen.count == 0
    assert view.shape == (2, 3, 2, 3, 3, 3)


def test_a_capture_records_and_does_not_run(standin):
    launches = standin._kernels.launches
    host = integers((64,), "float32", largest=1000)
    x, y = standin.asarray(host), standin.zeros(64, "float32")
    total = standin.ones(64, "float32")
    stream, before = standin.cuda.Stream(), len(launches)
    with stream:
        stream.begin_capture()
        standin.RawKernel(REVERSE, "reverse")((1,), (64,), (x,))
        standin.copyto(y, x)
        standin.add(total, y, out=total)
        y[::2] = 0
        y += total
        graph = stream.end_capture()
    assert len(launches) == before
    np.testing.assert_array_equal(to_host(x), host)
    assert not to_host(y).any()
    for expected in (host[::-1], host):
        graph.launch()
        np.testing.assert_array_equal(to_host(x), expected)
    wanted = 1 + host[::-1] + host
    np.testing.assert_array_equal(to_host(total), wanted)
    kept = np.where(np.arange(64) % 2, host, 0)
    np.testing.assert_array_equal(to_host(y), kept + wanted)
    assert {name for name, *_ in launches[before:]} == {"reverse"}


def test_a_capture_refuses_what_cuda_does(standin):
    x, square = standin.ones(4), standin.ones((2, 2), "float32")
    one = np.ones(1, dtype="float32")
    r, pointer = standin.cuda.runtime.CUDA_R_32F, square.data.ptr
    blas = standin.cuda.cublas
    event = standin.cuda.Event()
    stream = standin.cuda.Stream()
    waits = len(standin.cuda.stream.synchronisations)
    with stream:
        stream.begin_capture()
        for call in (
            stream.synchronize,
            standin.cuda.Device().synchronize,
            event.synchronize,
            x.get,
            lambda: bool(x[0]),
            lambda: float(x[0]),
        ):
            with pytest.raises(RuntimeError, match="CaptureUnsupported"):
                call()
        for call in (lambda: standin.empty(3), lambda: x + x, lambda: x.astype("f4")):
            with pytest.raises(RuntimeError, match="taken from the pool"):
                call()
        with pytest.raises(NotImplementedError, match="during stream capture"):
            blas.gemmStridedBatchedEx(
                0, 0, 0, 2, 2, 2, one.ctypes.data, pointer, r, 2, 0, pointer, r, 2, 0,
                one.ctypes.data, pointer, r, 2, 0, 1, blas.CUBLAS_COMPUTE_32F, -1,
            )  # fmt: skip
        with pytest.raises(RuntimeError, match="IllegalState"):
            stream.begin_capture()
        with pytest.raises(RuntimeError, match="CaptureImplicit"):
            standin.cuda.Stream.null.is_capturing()
        stream.end_capture()
    assert len(standin.cuda.stream.synchronisations) == waits
    with pytest.raises(RuntimeError, match="IllegalState"):
        stream.end_capture()
    with pytest.raises(RuntimeError, match="default"):
        standin.cuda.Stream.null.begin_capture()
    with pytest.raises(NotImplementedError):
        standin.cuda.Graph()


def test_a_graph_does_not_keep_arrays_alive(standin):
    x, y = standin.ones(4), standin.zeros(4)
    stream = standin.cuda.Stream()
    with stream:
        stream.begin_capture()
        standin.copyto(y, x)
        graph = stream.end_capture()
    graph.launch()
    del x
    with pytest.raises(RuntimeError, match="outside any array"):
        graph.launch()


def test_streams_belong_to_devices(standin):
    stream = standin.cuda.Stream()
    with standin.cuda.Device(1):
        with pytest.raises(RuntimeError, match=r"created on \(0\) does not match"):
            stream.__enter__()
        with standin.cuda.Stream() as other:
            assert standin.cuda.get_current_stream() == other
            assert standin.cuda.get_current_stream(0) == standin.cuda.Stream.null


def test_events_are_done_when_something_has_waited(standin):
    events = [standin.cuda.Event() for _ in range(3)]
    for event in events:
        event.record()
    assert not events[0].done
    with pytest.raises(RuntimeError, match="NotReady"):
        standin.cuda.get_elapsed_time(*events[:2])
    events[1].synchronize()
    assert [event.done for event in events] == [True, True, False]
    assert standin.cuda.get_elapsed_time(*events[:2]) >= 0
    standin.cuda.get_current_stream().synchronize()
    assert events[2].done
    untimed = standin.cuda.Event(disable_timing=True)
    untimed.record()
    with pytest.raises(RuntimeError, match="InvalidResourceHandle"):
        standin.cuda.get_elapsed_time(events[0], untimed)
