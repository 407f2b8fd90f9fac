"""Convolutions that are made of plain ones: general ones, and phases of strided ones.

    input dilation       phases of the output: no zero between cells is multiplied
    input gradient       phases of the input, where that is estimated to be faster
    padding modes        blocks of a padded copy, which takes its part of the limit
    batch groups         blocks of a copy in which groups of images are channels
    integers of 8 bits   blocks of a copy in floats, less their zero points

Every part is planned as if it had been asked for alone: any strategy may run it.
"""

from functools import partial

from cuconv.arrays import Array, DType, as_dtype
from cuconv.backends import Backend
from cuconv.engine.plan import (
    ROLES,
    Call,
    Plan,
    bind_with,
    plain_plan,
    shapes_of,
    stub_array,
)
from cuconv.engine.rewrites.base import NO_ZEROS, Arrays, Request, ZeroPoints
from cuconv.engine.rewrites.padded_copy import staged
from cuconv.engine.rewrites.polyphase import faster_by_phases, phased
from cuconv.engine.rewrites.zero_points import (
    Shifted,
    check_zero_points,
    is_faster_shifted,
)
from cuconv.geometry import ConvGeometry
from cuconv.options import Options

__all__ = [
    "ZeroPoints",
    "bind",
    "check_zero_points",
    "plan_of_shapes",
    "plan_of_types",
    "planned",
]


def planned(
    call: str,
    geometry: ConvGeometry,
    arrays: Arrays,
    out: Array | None,
    options: Options,
    backend: Backend,
    zeros: ZeroPoints = NO_ZEROS,
) -> Plan:
    """The plan of any convolution."""
    request = Request(call, geometry, arrays, out, options, backend, zeros)
    if geometry.is_empty:
        return plain_plan(*request.basic)
    if zeros.are_given or is_faster_shifted(request):
        return staged(request, planned, Shifted)
    if geometry.is_copied:
        return staged(request, planned)
    if geometry.has_input_dilation:
        return phased(request, planned)
    whole = plain_plan(*request.basic)
    return faster_by_phases(request, planned, whole) or whole


def bind(
    call: str,
    geometry: ConvGeometry,
    arrays: Arrays,
    out: Array | None,
    options: Options,
    zeros: ZeroPoints = NO_ZEROS,
) -> Call:
    """Check arrays and options, and plan."""
    planner = partial(planned, zeros=zeros) if zeros.are_given else planned
    return bind_with(planner, call, geometry, arrays, out, options)


def plan_of_shapes(
    call: str,
    geometry: ConvGeometry,
    backend: Backend,
    options: Options,
    *,
    bias: bool,
) -> Plan:
    """The plan for C-contiguous arrays of one type."""
    names = (name for name in ROLES[call] if bias or name != "bias")
    dtypes = dict.fromkeys(names, as_dtype(options.dtype))
    return plan_of_types(call, geometry, backend, options, dtypes)


def plan_of_types(
    call: str,
    geometry: ConvGeometry,
    backend: Backend,
    options: Options,
    dtypes: dict[str, DType],
) -> Plan:
    """The plan for C-contiguous arrays of these types by their names."""
    shapes = shapes_of(call, geometry)
    arrays = {name: stub_array(shapes[name], own) for name, own in dtypes.items()}
    return planned(call, geometry, arrays, None, options.settled(), backend)
