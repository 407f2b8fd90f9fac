"""The samples of a deformable convolution, and the order of its columns."""

import math
from dataclasses import dataclass
from functools import cached_property

from cuconv.arrays import Array, DType
from cuconv.geometry import ConvGeometry, Ranges


@dataclass(frozen=True)
class DeformProblem:
    """Windows whose taps are moved, each offset group of channels by its own offsets.

    ``sums`` is the type of coordinates and sums, ``columns`` that of the columns;
    ``uniform``: offsets, mask and result have the type of sums.
    """

    geometry: ConvGeometry
    offset_groups: int
    sums: DType
    columns: DType
    uniform: bool

    @cached_property
    def part(self) -> int:
        """Neighbouring channels that share a group and an offset group."""
        g = self.geometry
        return math.gcd(g.group_channels, g.channels // self.offset_groups)

    def firsts(self, outputs: Ranges) -> tuple[int, ...]:
        """The element under tap 0 of the first of these outputs, without its offset."""
        each = zip(self.geometry.axes, outputs, strict=True)
        return tuple(axis.first(start) for axis, (start, _) in each)


@dataclass(frozen=True)
class Samples:
    """The samples of some images at some outputs.

    ``offset`` is (N, D, taps, rank, *out), ``mask`` (N, D, taps, *out) or None; D are
    the offset groups.
    """

    problem: DeformProblem
    outputs: Ranges
    offset: Array
    mask: Array | None


def columns_of(
    flat: Array,
    geometry: ConvGeometry,
    images: int,
    out: tuple[int, ...],
    *,
    patch_last: bool,
) -> tuple[Array, Array]:
    """View a buffer as (N, G, C/G, taps, *out), and as the input of a product.

    With ``patch_last`` a patch is one run of memory, taps then channels; otherwise it
    is channels then taps, and positions are the fastest.
    """
    g, c, taps = geometry.groups, geometry.group_channels, geometry.taps
    flat = flat[: images * math.prod(out) * g * c * taps]
    if not patch_last:
        x = flat.reshape(images, g * c * taps, *out)
        return flat.reshape(images, g, c, taps, *out), x
    k, spatial = len(out), tuple(range(1, len(out) + 1))
    x = flat.reshape(images, *out, g * taps * c)
    cells = flat.reshape(images, *out, g, taps, c)
    cells = cells.transpose(0, k + 1, k + 3, k + 2, *spatial)
    return cells, x.transpose(0, k + 1, *spatial) if geometry.channels_first else x
