"""Convolutions that are made of plain ones: general ones, and phases of strided ones.

    input dilation       phases of the output: no zero between cells is multiplied
    input gradient       phases of the input, where that is estimated to be faster
    padding modes        blocks of a padded copy, which takes its part of the limit
    batch groups         blocks of a copy in which groups of images are channels

Every part is planned as if it had been asked for alone: any strategy may run it.
"""

import numpy as np

from cuconv.arrays import Array
from cuconv.composed.base import Arrays, Request
from cuconv.composed.phased import faster_by_phases, phased
from cuconv.composed.staged import staged
from cuconv.geometry import ConvGeometry
from cuconv.leaves import Leaves
from cuconv.plan import Call, Options, Plan, bind_with, plain_plan, shapes_of, untouched


def planned(
    call: str,
    geometry: ConvGeometry,
    arrays: Arrays,
    out: Array | None,
    options: Options,
    leaves: Leaves,
) -> Plan:
    """The plan of any convolution."""
    request = Request(call, geometry, arrays, out, options, leaves)
    if geometry.is_empty:
        return plain_plan(*request)
    if geometry.is_copied:
        return staged(request, planned)
    if geometry.is_spread:
        return phased(request, planned)
    whole = plain_plan(*request)
    return faster_by_phases(request, planned, whole) or whole


def bind(
    call: str,
    geometry: ConvGeometry,
    arrays: Arrays,
    out: Array | None,
    options: Options,
) -> Call:
    """Check arrays and options, and plan."""
    return bind_with(planned, call, geometry, arrays, out, options)


def plan_of_shapes(
    call: str,
    geometry: ConvGeometry,
    leaves: Leaves,
    options: Options,
    *,
    bias: bool,
) -> Plan:
    """The plan for C-contiguous arrays of one type."""
    own, shapes = np.dtype(options.dtype), shapes_of(call, geometry)
    if not bias:
        shapes.pop("bias", None)
    arrays = {name: untouched(shape, own) for name, shape in shapes.items()}
    return planned(call, geometry, arrays, None, options.settled(), leaves)
