"""Everything that touches CuPy; imported when the first CuPy array comes in."""

from functools import cache

from cuconv._cuda.compiler import precompile
from cuconv._cuda.device import working_cupy, why_not
from cuconv._cuda.leaves import CudaLeaves


@cache
def cuda_leaves() -> CudaLeaves:
    """The leaves over CuPy.

    Raises
    ------
    RuntimeError
        If CuPy imports but no device runs a kernel.
    """
    if working_cupy() is None:
        raise RuntimeError(f"a CuPy array came in, but no GPU works: {why_not()}")
    return CudaLeaves()


__all__ = ["CudaLeaves", "cuda_leaves", "precompile", "why_not", "working_cupy"]
