"""The test that a GPU works: CuPy can be importable without one."""

from typing import Any

from cuconv.engine.costs import Gpu

_KERNEL = 'extern "C" __global__ void answer(int *out) { *out = 42; }'


# The module that a probe found to work.  A failure may be temporary and is not kept.
_working: list[Any] = []


def _probe() -> tuple[Any, str]:
    """CuPy, if it runs a kernel on a device, and the reason if it does not."""
    if _working:
        return _working[0], ""
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() == 0:
            return None, "there is no CUDA device"
        if is_capturing(cupy):
            # There is a device, but a probe would wait for it, which a capture forbids.
            return cupy, ""
        out = cupy.zeros(1, dtype=cupy.int32)
        cupy.RawKernel(_KERNEL, "answer")((1,), (1,), (out,))
        if int(out[0]) != 42:
            return None, "a kernel ran and wrote nothing"
    except Exception as error:  # noqa: BLE001 - drivers fail in every way there is
        return None, f"{type(error).__name__}: {error}"
    _working.append(cupy)
    return cupy, ""


def working_cupy() -> Any:
    """The module ``cupy`` if a device runs a small kernel, else None."""
    return _probe()[0]


def why_not() -> str:
    """The reason why `working_cupy` is None."""
    return _probe()[1]


def is_capturing(cupy: Any, device: int = -1) -> bool:
    """True if the current stream of a device (the current one) records a graph."""
    stream = cupy.cuda.get_current_stream(device)
    # The default stream cannot capture, and must not be queried while another does.
    return stream.ptr != 0 and bool(stream.is_capturing())


def gpu_of(cupy: Any, device: int) -> Gpu:
    """The properties of a device.

    Read as attributes: CUDA 13 has no clock rates among the properties.
    """
    runtime = cupy.cuda.runtime

    def figure(name: str) -> int:
        attribute = getattr(runtime, f"cudaDevAttr{name}")
        return int(runtime.deviceGetAttribute(attribute, device))

    return Gpu(
        runtime.getDeviceProperties(device)["name"].decode(),
        str(cupy.cuda.Device(device).compute_capability),
        figure("MultiProcessorCount"),
        figure("ClockRate"),
        figure("MemoryClockRate"),
        figure("GlobalMemoryBusWidth"),
        figure("L2CacheSize"),
    )
