"""The choice of a rewrite: from a request to a lowering."""

from contextlib import suppress

from cuconv.engine.lowering import Lowering
from cuconv.engine.request import Request
from cuconv.engine.rewrites import (
    canonical,
    flipped,
    float_copies,
    padded_copy,
    polyphase,
    zero_points,
)
from cuconv.memory import MemoryLimitError


def lower(request: Request) -> Lowering:
    """Lower any convolution, or a gradient of one, in canonical form if it has one.

    A strategy that the user named, a memory limit or a CUDA graph may want the
    convolution as it was given.
    """
    if request.options.flip_kernel:
        return flipped.lower(request, lower)
    request.warn_of_wrapping()
    found: Lowering | None = None
    try:
        found = canonical.lower(request, _lower)
    except MemoryLimitError as error:
        return _within(request, error)
    except ValueError:
        pass
    return _lower(request) if found is None else found


def _within(request: Request, error: MemoryLimitError) -> Lowering:
    """Lower over the axes that a convolution has, if that needs less than a limit."""
    try:
        return _lower(request)
    except MemoryLimitError as other:
        raise min(error, other, key=lambda each: each.smallest) from None
    except ValueError:  # a strategy that only runs the canonical form
        raise error from None


def _lower(request: Request) -> Lowering:
    """Lower a convolution over the axes that it has."""
    if not request.geometry.is_empty:
        if request.zero_points or zero_points.is_faster(request):
            return padded_copy.lower(request, zero_points.ZeroPoints)
        if request.geometry.is_copied:
            return padded_copy.lower(request)
        operand = float_copies.operand_of(request)
        if operand is not None:
            with suppress(MemoryLimitError):
                return float_copies.FloatCopies(request, operand)
    return polyphase.lower(request)
