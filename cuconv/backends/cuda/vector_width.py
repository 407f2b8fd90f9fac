"""The number of items that a copy moves at once: as many as alignment allows.

The result depends on item size, shapes, steps and addresses alone.
"""

from typing import NamedTuple

# Bytes of a vector, the widest first; there are no kernels for narrower ones.
_VECTORS = (16, 8)
# Item sizes with a kernel for vectors of positions; bytes are copied one by one.
_ITEMS = (2, 4, 8)


class ArrayLayout(NamedTuple):
    """The layout of an array (N, G, C, …): steps in items, address in bytes."""

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


def vector_widths(itemsize: int) -> list[VectorWidth]:
    """Every width that items of this size can be copied in."""
    counts = [size // itemsize for size in _VECTORS if size > itemsize]
    by_channels = [VectorWidth(channels=count) for count in counts]
    by_positions = [VectorWidth(positions=count) for count in counts]
    return [VectorWidth(), *by_channels, *(by_positions if itemsize in _ITEMS else ())]


def vector_width(x: ArrayLayout, columns: ArrayLayout, itemsize: int) -> VectorWidth:
    """The widest vectors in which columns (N, G, C, *kernel, *out) can be written.

    A vector needs a contiguous axis whose length is a multiple of the vector's, and
    steps and an address that keep all vectors aligned.
    """
    for size in _VECTORS:
        count = size // itemsize
        if count > 1 and all(_fits(layout, 2, count, size) for layout in (x, columns)):
            return VectorWidth(channels=count)
    for size in _VECTORS if itemsize in _ITEMS else ():
        count = size // itemsize
        if count > 1 and _fits(columns, len(columns.shape) - 1, count, size):
            return VectorWidth(positions=count)
    return VectorWidth()


def _fits(layout: ArrayLayout, axis: int, count: int, size: int) -> bool:
    """True if vectors of this many items divide an axis and are aligned."""
    others = [
        step
        for i, (n, step) in enumerate(zip(layout.shape, layout.steps, strict=True))
        if i != axis and n > 1
    ]
    whole = layout.steps[axis] == 1 and layout.shape[axis] % count == 0
    return whole and layout.address % size == 0 and not any(s % count for s in others)
