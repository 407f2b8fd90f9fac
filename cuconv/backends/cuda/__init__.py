"""The backend for CuPy; this module can be imported without CuPy."""

from functools import cache
from typing import TYPE_CHECKING

from cuconv.backends.cuda.device import why_not, working_cupy

if TYPE_CHECKING:
    from cuconv.backends.cuda.backend import CudaBackend


def cuda_backend(device: int | None = None) -> "CudaBackend":
    """The backend of a CUDA device, by default the current one.

    Raises
    ------
    RuntimeError
        If CuPy imports but no device runs a kernel.
    ValueError
        If there is no such device.
    """
    cupy = working_cupy()
    if cupy is None:
        raise RuntimeError(f"CUDA is asked for, but no GPU works: {why_not()}")
    runtime = cupy.cuda.runtime
    return _backend(int(runtime.getDevice()) if device is None else device)


@cache
def _backend(device: int) -> "CudaBackend":
    from cuconv.backends.cuda.backend import CudaBackend

    return CudaBackend(device)


__all__ = ["cuda_backend", "why_not", "working_cupy"]
