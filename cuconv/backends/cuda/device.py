"""The test that a GPU works: CuPy can be importable without one.

A kernel of our own must run, and one that CuPy makes: it needs more of CUDA's files.
What only some strategies need is in `cuconv.backends.cuda.libraries`.
"""

from typing import Any

from cuconv.engine.costs import Gpu

_KERNEL = 'extern "C" __global__ void answer(int *out) { *out = 42; }'


# The module that a probe found to work.  A failure may be temporary and is not kept.
_working: list[Any] = []


def _probe() -> tuple[Any, str]:
    """CuPy, if it runs kernels on a device, and the reason if it does not."""
    if _working:
        return _working[0], ""
    try:
        import cupy

        reason = _reason_against(cupy)
        if not reason and not is_capturing(cupy):
            reason = _run_kernels(cupy)
            if not reason:
                _working.append(cupy)
    except Exception as error:  # noqa: BLE001 - drivers fail in every way there is
        return None, f"{type(error).__name__}: {error}"
    return (None if reason else cupy), reason


def _reason_against(cupy: Any) -> str:
    """Why CuPy has no device for us; empty if it has one."""
    if cupy.cuda.runtime.is_hip:
        return "CuPy is built for ROCm, and cuconv's kernels are written for CUDA"
    return "" if cupy.cuda.runtime.getDeviceCount() else "there is no CUDA device"


def _run_kernels(cupy: Any) -> str:
    """Run a kernel of ours, then one of CuPy's; what was wrong, if anything.

    It waits for the device, which a capture forbids.
    """
    out = cupy.zeros(1, dtype=cupy.int32)
    cupy.RawKernel(_KERNEL, "answer")((1,), (1,), (out,))
    out += 1
    return "" if int(out[0]) == 43 else "a kernel ran and wrote nothing"


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
