"""How many items of a copy move at once: as wide a word as memory allows.

A copy knows no types.  Pure: from shapes, steps and addresses alone.
"""

from typing import NamedTuple

# Bytes of a word, the widest first; narrower ones are not worth a kernel of their own.
_WORDS = (16, 8)
# Item sizes with a kernel for several positions in a word; bytes go one by one.
_ITEMS = (2, 4, 8)


class ArrayLayout(NamedTuple):
    """How an array (N, G, C, …) lies in memory: steps in items, address in bytes."""

    shape: tuple[int, ...]
    steps: tuple[int, ...]
    address: int


class VectorWidth(NamedTuple):
    """Items that a thread of `im2col.cu` moves at once: channels, or positions.

    Neighbouring channels are read and written as one wider item (``ELEMENT``);
    neighbouring positions are read one by one and written as one (``VECTOR``).
    """

    channels: int = 1
    positions: int = 1


def vector_width(x: ArrayLayout, columns: ArrayLayout, itemsize: int) -> VectorWidth:
    """The widest words in which columns (N, G, C, *kernel, *out) can be written.

    A word needs neighbours in memory, a multiple of it along their axis, and steps and
    an address that keep all words aligned.
    """
    for size in _WORDS:
        count = size // itemsize
        if count > 1 and all(_fits(lie, 2, count, size) for lie in (x, columns)):
            return VectorWidth(channels=count)
    for size in _WORDS if itemsize in _ITEMS else ():
        count = size // itemsize
        if count > 1 and _fits(columns, len(columns.shape) - 1, count, size):
            return VectorWidth(positions=count)
    return VectorWidth()


def _fits(lie: ArrayLayout, axis: int, count: int, size: int) -> bool:
    """Whether words of this many items along an axis are whole and aligned."""
    others = [
        step
        for i, (n, step) in enumerate(zip(lie.shape, lie.steps, strict=True))
        if i != axis and n > 1
    ]
    whole = lie.steps[axis] == 1 and lie.shape[axis] % count == 0
    return whole and lie.address % size == 0 and not any(s % count for s in others)
