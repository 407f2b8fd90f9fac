"""Everything that touches CuPy; this module alone may be imported without it."""

from functools import cache
from typing import TYPE_CHECKING

from cuconv._cuda.device import why_not, working_cupy

if TYPE_CHECKING:
    from cuconv._cuda.leaves import CudaLeaves


@cache
def cuda_leaves() -> "CudaLeaves":
    """The leaves over CuPy.

    Raises
    ------
    RuntimeError
        If CuPy imports but no device runs a kernel.
    """
    if working_cupy() is None:
        raise RuntimeError(f"a CuPy array came in, but no GPU works: {why_not()}")
    from cuconv._cuda.leaves import CudaLeaves

    return CudaLeaves()


__all__ = ["cuda_leaves", "why_not", "working_cupy"]
