"""The shapes of one convolution: the only size formula of the project.

Along one axis, output cell ``o`` and kernel tap ``t`` read the input cell

    i = o * stride + t * dilation - before

where ``before`` is the padding in front of the axis (negative padding crops) and
cells outside ``0 <= i < size`` read as zero.  Everything below follows from this line;
a transposed convolution goes along it the other way, from ``o`` to ``i``.

A general convolution reads more into it: cells of x may lie ``spread`` apart (input
dilation), cells outside may repeat those inside (`PADDING_MODES`), and the batch may be
shared out to filters (`ConvGeometry.batch_groups`).  `ConvGeometry.phases`,
`Axis.runs` and `ConvGeometry.part` lead back to plain ones.
"""

from cuconv.geometry.axis import Axis, EvenAxis, Meeting, Range, Ranges, Run
from cuconv.geometry.convolution import ConvGeometry, Phase
from cuconv.geometry.options import (
    LARGEST_PARAMETER,
    LAYOUTS,
    PADDING_MODES,
    PADDING_WORDS,
    Padding,
    Sizes,
    as_index,
    channels_are_first,
    check_axes,
    kernel_of_rank,
)
from cuconv.geometry.windows import Block, Region, Tile, WindowGeometry, tile_of

__all__ = [
    "LARGEST_PARAMETER",
    "LAYOUTS",
    "PADDING_MODES",
    "PADDING_WORDS",
    "Axis",
    "Block",
    "ConvGeometry",
    "EvenAxis",
    "Meeting",
    "Padding",
    "Phase",
    "Range",
    "Ranges",
    "Region",
    "Run",
    "Sizes",
    "Tile",
    "WindowGeometry",
    "as_index",
    "channels_are_first",
    "check_axes",
    "kernel_of_rank",
    "tile_of",
]
