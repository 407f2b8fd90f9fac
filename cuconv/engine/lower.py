"""The choice of a rewrite: from a request to a lowering."""

from cuconv.engine.lowering import Lowering
from cuconv.engine.request import Request
from cuconv.engine.rewrites import padded_copy, polyphase, zero_points


def lower(request: Request) -> Lowering:
    """Lower any convolution, or a gradient of one."""
    if not request.geometry.is_empty:
        if request.zero_points or zero_points.is_faster(request):
            return padded_copy.lower(request, zero_points.ZeroPoints)
        if request.geometry.is_copied:
            return padded_copy.lower(request)
    return polyphase.lower(request)
