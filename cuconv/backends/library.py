"""A convolution as another library describes it: shapes and numbers, no arrays."""

from typing import NamedTuple

from cuconv.arrays import DType
from cuconv.geometry import Axis


class LibraryConv(NamedTuple):
    """One operation on packed arrays of one type; equal ones have equal engines.

    x (N, C, *spatial), w (K, C/G, *kernel) and y (N, K, *out) have these shapes in
    either layout: with channels first they are C-contiguous, with channels last their
    second axis is the fastest.  The result is added to what is there if ``adds``.
    """

    op: str
    dtype: DType
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    channels_first: bool
    precision: str
    deterministic: bool
    adds: bool


class LibraryEngine(NamedTuple):
    """One way of a library to compute a `LibraryConv`.

    ``choice`` is its place in the library's own order, the fastest first; ``workspace``
    is in bytes.
    """

    number: int = 0
    choice: int = 0
    workspace: int = 0
