"""Memory limits, and the workspace: the one allocation of a call beyond its result.

A strategy lists the buffers that it needs for a tile; their sum is the plan's
workspace, and `carve` divides a single allocation into the same list.  So the memory
that a plan promises and the memory that it takes cannot differ.
"""

import copy
import operator
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

from cuconv.arrays import Array, DType

MemoryLimit: TypeAlias = int | str | None
Key = TypeVar("Key", bound=Hashable)
R = TypeVar("R")

# CuPy's pool hands out memory in these units too.
ALIGNED = 512
# The smallest limit that an error names leaves so many bytes to blocks, or what all of
# the work takes if that is less: one position at a time would be in nobody's interest.
LEAST_ROOM = 2**16
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}ib": 2 ** (10 * i) for i, letter in enumerate("kmgt", 1)},
    **{f"{letter}b": 10 ** (3 * i) for i, letter in enumerate("kmgt", 1)},
}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b|)\s*", re.IGNORECASE)


class MemoryLimitError(MemoryError):
    """No plan fits under ``memory_limit``.

    Attributes
    ----------
    limit, smallest
        The limit that was given, and the smallest that would do, in bytes.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, w = np.ones((1, 8, 9, 9)), np.ones((8, 8, 3, 3))
    >>> try:
    ...     cuconv.conv2d(x, w, memory_limit=100)
    ... except cuconv.MemoryLimitError as error:
    ...     y = cuconv.conv2d(x, w, memory_limit=error.smallest)
    >>> y.shape
    (1, 8, 7, 7)
    """

    def __init__(self, limit: int, smallest: int, what: str) -> None:
        super().__init__(
            f"memory_limit of {limit} bytes is too small for {what}: "
            f"the smallest that would do is {smallest} bytes"
        )
        self.limit = limit
        self.smallest = smallest
        self._what = what

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is made again from its message alone.
        return type(self), (self.limit, self.smallest, self._what), self.__dict__


def parse_memory_limit(limit: int | str) -> int:
    """Bytes from a number or a string such as ``"64 MiB"`` or ``"1.5GB"``.

    Examples
    --------
    >>> from cuconv.memory import parse_memory_limit
    >>> parse_memory_limit("64 MiB")
    67108864
    """
    if isinstance(limit, str):
        match = _QUANTITY.fullmatch(limit)
        if not match:
            raise ValueError(
                f'memory_limit must be bytes or a str such as "64 MiB"; got {limit!r}'
            )
        from decimal import Decimal  # noqa: PLC0415 - strings alone need it

        return int(Decimal(match[1]) * _UNITS[match[2].lower()])
    try:
        number = operator.index(limit)
    except TypeError:
        number = None
    if number is None or isinstance(limit, bool):
        raise TypeError(
            "memory_limit must be bytes, as an int, or a str such as "
            f'"64 MiB"; got {limit!r}'
        )
    if number < 0:
        raise ValueError(f"memory_limit must not be negative; got {number}")
    return number


class Shortage:
    """Blocks that may need a larger limit; `check` raises the error of the largest."""

    error: MemoryLimitError | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: object, error: BaseException | None, trace: object
    ) -> bool:
        if not isinstance(error, MemoryLimitError):
            return False
        if self.error is None or error.smallest > self.error.smallest:
            # Without its traceback, whose frames keep all that was tried.
            self.error = copy.copy(error)
        return True

    def check(self) -> None:
        """Raise if there was none that would do."""
        if self.error is not None:
            raise copy.copy(self.error)


def all_within(calls: Mapping[Key, Callable[[], R]]) -> dict[Key, R]:
    """Make every call; raise the error of the largest limit that one needs."""
    results, shortage = {}, Shortage()
    for key, call in calls.items():
        with shortage:
            results[key] = call()
    shortage.check()
    return results


def least_limit(calls: Mapping[Key, Callable[[], object]]) -> int:
    """The smallest limit that would do for calls that are made under a limit of 0."""
    try:
        all_within(calls)
    except MemoryLimitError as error:
        return error.smallest
    return 0


class Buffer(NamedTuple):
    """A named one-dimensional array in a workspace."""

    name: str
    cells: int
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Bytes, rounded up so that the next buffer is aligned too."""
        return -(-self.cells * self.dtype.itemsize // ALIGNED) * ALIGNED


def least_of(whole: int, smallest: int) -> int:
    """The smallest limit to name for work that takes so much, whole or in pieces."""
    return min(whole, smallest + LEAST_ROOM)


def is_little(buffers: Iterable[Buffer]) -> bool:
    """True if smaller pieces would save too little memory to be worth their time."""
    return workspace_bytes(buffers) <= LEAST_ROOM


def buffer_bytes(buffers: Iterable[Buffer]) -> int:
    """Bytes of these buffers, each rounded up."""
    total = 0
    for _, cells, dtype in buffers:
        total += -(-cells * dtype.itemsize // ALIGNED)
    return total * ALIGNED


def with_start(nbytes: int) -> int:
    """Bytes of an allocation in which buffers can start aligned."""
    return nbytes + ALIGNED if nbytes else 0


def workspace_bytes(buffers: Iterable[Buffer]) -> int:
    """The size of an allocation for these buffers and `carve`."""
    return with_start(buffer_bytes(buffers))


def carve(raw: Array, start: int, buffers: Iterable[Buffer]) -> dict[str, Array]:
    """Divide bytes from ``start`` on into the buffers; each is one-dimensional."""
    views = {}
    for buffer in buffers:
        cells = raw[start : start + buffer.cells * buffer.dtype.itemsize]
        views[buffer.name] = cells.view(buffer.dtype)
        start += buffer.nbytes
    return views


def aligned_start(raw: Array) -> int:
    """The offset of the first aligned byte."""
    address = raw.ctypes.data if hasattr(raw, "ctypes") else raw.data.ptr
    return int(-address % ALIGNED)


def allocated(xp: Any, buffers: tuple[Buffer, ...]) -> dict[str, Array]:
    """Fresh buffers, in one allocation."""
    total = workspace_bytes(buffers)
    if not total:
        return {}
    raw = xp.empty(total, dtype=xp.uint8)
    return carve(raw, aligned_start(raw), buffers)
