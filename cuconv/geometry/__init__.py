"""The shapes of one convolution: the only size formula of the project.

Along one axis, output element ``o`` and kernel tap ``t`` read the input element

    i = o * stride + t * dilation - before

where ``before`` is the padding in front of the axis (negative padding crops) and
elements outside ``0 <= i < size`` read as zero.  Everything below follows from this
line; a transposed convolution maps ``o`` to ``i``.

A general convolution adds three things: zeros between the elements of x
(``input_dilation``), padding that repeats the input (`PADDING_MODES`), and groups of
images with filters of their own (`ConvGeometry.batch_groups`).  `ConvGeometry.phases`,
`Axis.runs` and `ConvGeometry.part` reduce them to basic ones.
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
from cuconv.geometry.windows import (
    Block,
    Region,
    Tile,
    WindowGeometry,
    tile_of,
    unpooled_shape,
)

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
    "unpooled_shape",
]
