"""The warning of integer results that may wrap around."""

import sys
import warnings
from pathlib import Path

import numpy as np

from cuconv.arrays import DType

_PACKAGE = str(Path(__file__).parent)
# NumPy's sums of narrower integers have at least so many bytes too.
_WIDE = 8


class IntegerOverflowWarning(RuntimeWarning):
    """Integer results may wrap around: their type does not hold every sum.

    Raised when a call is planned, by the types and the number of terms, not by values:
    for results of 8, 16 and 32 bits.  Its text names a type that holds all sums, or the
    widest one.

    Examples
    --------
    >>> import warnings
    >>> import numpy as np
    >>> import cuconv
    >>> x, w = np.full((1, 1, 4), 100, np.uint8), np.ones((1, 1, 3), np.uint8)
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", cuconv.IntegerOverflowWarning)
    ...     cuconv.conv(x, w)
    array([[[44, 44]]], dtype=uint8)
    >>> cuconv.conv(x, w, dtype=np.uint32)
    array([[[300, 300]]], dtype=uint32)
    """


def may_wrap(dtype: DType) -> bool:
    """Whether sums of this type wrap around, and there is a wider one."""
    return dtype.kind in "iu" and dtype.itemsize < _WIDE


def magnitude(dtype: DType) -> int:
    """The largest magnitude of a value of an integer type."""
    if dtype.kind == "b":
        return 1
    limits = np.iinfo(dtype)
    return max(-int(limits.min), int(limits.max))


def warn_of_wrapping(dtype: DType, bound: int, what: str, way_out: str) -> None:
    """Warn if sums of at most this magnitude do not fit a type.

    ``way_out`` says what to pass, with ``{}`` for the type.
    """
    if not may_wrap(dtype) or bound <= np.iinfo(dtype).max:
        return
    wider = (np.dtype(f"{dtype.kind}{n}") for n in (2, 4, _WIDE) if n > dtype.itemsize)
    *_, widest = found = list(wider)
    fitting = next((d for d in found if bound <= np.iinfo(d).max), widest)
    warnings.warn(
        f"{what} may wrap around in {dtype}: {way_out.format(fitting)}",
        IntegerOverflowWarning,
        stacklevel=_levels(),
    )


def _levels() -> int:
    """How far up the call is that is not of this package, as a ``stacklevel``."""
    frame, levels = sys._getframe(1), 1  # noqa: SLF001
    while frame.f_back and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, levels = frame.f_back, levels + 1
    return levels
