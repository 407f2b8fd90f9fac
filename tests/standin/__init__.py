"""A stand-in for the parts of CuPy that cuconv uses, on machines without a GPU.

Device memory is host memory behind arrays that refuse to become host arrays; kernels
are the real ``.cu`` text, compiled by the host's C++ compiler behind ``cuda_shim.h``.
What CuPy forbids is forbidden here too: mixing host and device arrays, implicit
conversion, launching on another device than the arrays', reading fresh memory (it is
poisoned), cuBLAS operands outside any allocation.
"""

import sys
from pathlib import Path


def install() -> None:
    """Make ``import cupy`` find the stand-in."""
    if "cupy" in sys.modules:
        raise RuntimeError("cupy is imported already; the stand-in comes too late")
    sys.path.insert(0, str(Path(__file__).parent))
    import cupy

    assert cupy.IS_STAND_IN
