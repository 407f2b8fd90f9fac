"""Steps of repeated calls: what they pass to CuPy, and how often they set it up."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from support import arrays_of, forget_plans, integers, to_host

import cuconv
from cuconv.backends import backend_of
from cuconv.backends.cuda import compiler, gemm
from cuconv.backends.cuda.structs import copied_as_columns

pytestmark = pytest.mark.parametrize("xp", ["cupy"], indirect=True)


@pytest.fixture
def standin(xp: Any) -> Any:
    if not getattr(xp, "IS_STAND_IN", False):
        pytest.skip("about the stand-in, and this is the real CuPy")
    return xp


def layer(xp: Any, dtype: str = "float32") -> list[Any]:
    """x, w and a bias."""
    shapes = (4, 8, 9, 10), (8, 8, 3, 3), (8,)
    return [xp.asarray(integers(shape, dtype, largest=2)) for shape in shapes]


def conv(dtype: str, **options: Any) -> Callable[[Any], Any]:
    return lambda xp: cuconv.conv2d(*layer(xp, dtype), padding=1, **options)


def backward(xp: Any) -> Any:
    x, w, _ = layer(xp)
    return cuconv.conv_backward(x, x, w, padding=1, strategy="winograd")


def depthwise(xp: Any) -> Any:
    x, w, bias = layer(xp)
    return cuconv.conv2d(x, w[:, :1], bias, groups=8)


def pool_gradient(xp: Any) -> Any:
    x, *_ = layer(xp)
    return cuconv.max_pool_backward(cuconv.max_pool2d(x, 2), None, None, 2, x=x)


# A call for each kernel that takes a struct.
CALLS = {
    "implicit_gemm": conv("float32", strategy="implicit_gemm"),
    "halves": conv("float16", strategy="implicit_gemm"),
    "im2col": conv("float32", strategy="im2col"),
    "integers": conv("int32", strategy="im2col"),
    "winograd": conv("float32", strategy="winograd", precision="fast"),
    "padding": conv("float32", strategy="im2col", padding_mode="reflect"),
    "backward": backward,
    "depthwise": depthwise,
    "pool": lambda xp: cuconv.max_pool2d(layer(xp)[0], 2),
    "pool_gradient": pool_gradient,
}


@pytest.mark.parametrize("name", CALLS)
def test_kernels_of_a_repeated_call_take_addresses_and_bytes(
    standin, monkeypatch, name
):
    """CuPy would make an array of each view; NumPy lists the fields of a struct."""
    kernel = type(standin.RawKernel("", ""))
    original, taken = kernel.__call__, []

    def noted(self: Any, grid: Any, block: Any, args: Any, **more: Any) -> None:
        taken.extend(args)
        original(self, grid, block, args, **more)

    first = CALLS[name](standin)
    monkeypatch.setattr(kernel, "__call__", noted)
    again = CALLS[name](standin)
    for one, two in zip(arrays_of(first), arrays_of(again), strict=True):
        np.testing.assert_array_equal(to_host(one), to_host(two))
    structs = [a for a in taken if isinstance(a, np.ndarray)]
    assert structs
    assert not any(a.dtype.names for a in structs)
    assert all(isinstance(a, (int, np.ndarray, np.integer)) for a in taken)


def test_kernels_are_loaded_on_the_device_of_the_arrays(standin, monkeypatch):
    """A module that needs much shared memory asks for it on its own device."""
    devices, load = [], compiler._loaded
    monkeypatch.setattr(
        compiler, "_loaded", lambda v, device: devices.append(device) or load(v, device)
    )
    with standin.cuda.Device(1):
        x, w, bias = layer(standin)
    forget_plans()
    for name in ("implicit_gemm", "im2col"):
        cuconv.conv2d(x, w, bias, strategy=name)
    cuconv.max_pool2d(x, 2)
    assert devices
    assert set(devices) == {1}


@pytest.mark.parametrize(("dtype", "modes"), [("float32", []), ("float16", [16, 0])])
@pytest.mark.parametrize("limit", [16_000, 600_000])
def test_cublas_is_set_up_once_a_call(standin, monkeypatch, dtype, modes, limit):
    """Also where the limit has no room for recorded steps."""
    blas, handles, set_to = standin.cuda.cublas, [], []
    x = standin.zeros((4, 8, 40, 80), dtype)
    call = partial(cuconv.conv2d, x, layer(standin, dtype)[1], memory_limit=limit)
    call(strategy="im2col")
    handle, mode = gemm.get_cublas_handle, blas.setMathMode
    monkeypatch.setattr(
        gemm, "get_cublas_handle", lambda: handles.append(0) or handle()
    )
    monkeypatch.setattr(
        blas, "setMathMode", lambda h, to: set_to.append(to) or mode(h, to)
    )
    start = len(blas.calls)
    call(strategy="im2col")
    used = [mode for *_, mode in blas.calls[start:]]
    assert len(used) > 3
    assert set(used) == {modes[0] if modes else 0}
    assert len(handles) == 1
    assert set_to == modes


def test_the_math_mode_is_as_before_when_a_product_fails(standin, monkeypatch):
    blas, handle = standin.cuda.cublas, 1000
    call = conv("float16", strategy="im2col")
    call(standin)

    def fail(*_: Any) -> None:
        raise RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")

    blas.setMathMode(handle, 3)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(blas, "gemmStridedBatchedEx", fail)
            with pytest.raises(RuntimeError, match="EXECUTION_FAILED"):
                call(standin)
        assert blas.getMathMode(handle) == 3
        call(standin)
        assert blas.getMathMode(handle) == 3
    finally:
        blas.setMathMode(handle, 0)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.transpose(0, 2, 3, 1),
    "reversed": lambda a: a[:, ::-1, :, ::-1],
    "with gaps": lambda a: a[:, ::2, 1:, :-1],
    "single image": lambda a: a[:1],
    "broadcast": lambda a: a[:, :1, :, :1],
    "one row for all": lambda a: a[0, 0, 0],
    "empty": lambda a: a[:0],
}


@pytest.mark.parametrize("dtype", ["bool", "float16", "float32", "complex128"])
@pytest.mark.parametrize("way", VIEWS)
def test_copies_within_a_type_are_a_kernel(xp, way, dtype):
    host = integers((4, 6, 5, 8), dtype)
    source = VIEWS[way](xp.asarray(host))
    shape = (4, 6, 5, 8) if way in ("broadcast", "one row for all") else source.shape
    for target in (
        xp.zeros(shape, dtype),
        xp.zeros(shape[::-1], dtype).transpose(3, 2, 1, 0),
    ):
        assert copied_as_columns(source, target) is not None
        backend_of(xp, source).copy(source, target)
        wanted = np.broadcast_to(VIEWS[way](host), shape)
        np.testing.assert_array_equal(to_host(target), wanted)


def test_other_copies_are_those_of_cupy(xp):
    """Casts, addresses between items, more axes than the kernel has."""
    raw = xp.asarray(integers((4 * 8 + 1,), "int8"))
    host = integers((3,) * 7, "float32")
    many = xp.asarray(host)[(slice(2),) * 7]
    for source, dtype in (
        (xp.asarray(host), "float64"),
        (raw[1:].view("complex64"), "complex64"),
        (many, "float32"),
    ):
        target = xp.zeros(source.shape, dtype)
        assert copied_as_columns(source, target) is None
        backend_of(xp, source).copy(source, target)
        np.testing.assert_array_equal(to_host(target), to_host(source).astype(dtype))
