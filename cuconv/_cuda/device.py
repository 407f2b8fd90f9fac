"""Whether a GPU works: that CuPy imports proves nothing."""

from typing import Any

_KERNEL = 'extern "C" __global__ void answer(int *out) { *out = 42; }'


# What a probe found: the module that works.  A failure may pass, and is not kept.
_working: list[Any] = []


def _probe() -> tuple[Any, str]:
    """CuPy, if it runs a kernel on a device, and the reason if it does not."""
    if _working:
        return _working[0], ""
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() == 0:
            return None, "there is no CUDA device"
        out = cupy.zeros(1, dtype=cupy.int32)
        cupy.RawKernel(_KERNEL, "answer")((1,), (1,), (out,))
        if int(out[0]) != 42:
            return None, "a kernel ran and wrote nothing"
    except Exception as error:  # noqa: BLE001 - drivers fail in every way there is
        return None, f"{type(error).__name__}: {error}"
    _working.append(cupy)
    return cupy, ""


def working_cupy() -> Any:
    """The module ``cupy`` if a device answers and a tiny kernel runs, else None."""
    return _probe()[0]


def why_not() -> str:
    """The reason why `working_cupy` is None."""
    return _probe()[1]
