"""int8 and uint8 minus their zero points, as floats in which every sum is exact.

    y = Σ (x - x_zero_point) · (w - w_zero_point)

where padding is the zero point of x, and so adds nothing.  BLAS multiplies floats and
no integers: float32 if no sum can exceed 2^24, else float64, which is exact too.  If a
sum might exceed the range of the result's type, integers are multiplied, which wrap.
"""

import math
import operator
from typing import Any

import numpy as np

from cuconv.arrays import Array, DType, Types, is_array, module_of, stub_array
from cuconv.engine.execute import Run
from cuconv.engine.problem import SINGLE_THREADED_PRODUCT, in_groups
from cuconv.engine.request import Request
from cuconv.engine.rewrites.padded_copy import (
    PaddedCopy,
    Tiling,
    in_buffer,
    index_of_y,
)
from cuconv.geometry import Block, ConvGeometry
from cuconv.memory import Buffer

_EXACT = (np.float32, 2**24), (np.float64, 2**53)
_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


class ZeroPoints(PaddedCopy):
    """Blocks over copies of x and w minus their zero points."""

    @classmethod
    def buffers_of(
        cls, request: Request, tiling: Tiling, shapes: dict[ConvGeometry, Block]
    ) -> tuple[Buffer, ...]:
        del tiling
        operand = _operand(request)
        cells = max(math.prod(part.x_shape) for part in shapes)
        sums = max(math.prod(part.y_shape) for part in shapes)
        weights = math.prod(request.geometry.w_shape)
        each = {"copy": cells, "weights": weights, "sum": sums}
        return tuple(Buffer(name, count, operand) for name, count in each.items())

    @classmethod
    def request_of(cls, request: Request, part: ConvGeometry, block: Block) -> Request:
        del block
        operand = _operand(request)
        shapes = {"x": part.x_shape, "w": part.w_shape}
        arrays = {name: stub_array(shape, operand) for name, shape in shapes.items()}
        options = request.options._replace(dtype=operand, precision="strict")
        out = stub_array(part.y_shape, operand)
        return request._replace(geometry=part, arrays=arrays, out=out, options=options)

    def _forward(self, run: Run) -> None:
        g, backend, arrays = self.geometry, run.backend, run.arrays
        bias, zero = arrays.get("bias"), arrays.get("w_zero_point")
        weights = in_buffer(arrays["weights"], arrays["w"].shape)
        backend.copy(arrays["w"], weights)
        if zero is not None:
            backend.do(backend.xp.subtract, weights, _by_filter(zero, g), weights)
        for number, block in enumerate(self.tiling.blocks(g)):
            copied = self._copied(run, number, block)
            zero = arrays.get("x_zero_point")
            if zero is not None:
                backend.do(backend.xp.subtract, copied, zero, copied)
            part = g.part(block)
            sums = in_buffer(arrays["sum"], part.y_shape)
            own = {"x": copied, "w": weights, "bias": None, "out": sums}
            self._convolve(run, block, own)
            target = arrays["out"][index_of_y(g, block)]
            # If the sums have the accumulation type, the bias is added before they are
            # rounded; in a narrower float the bias might not be exact.
            is_wide = sums.dtype == self.request.types.accumulate
            if bias is not None and is_wide:
                _add(run, bias, part, sums)
            backend.copy(sums, target)
            if bias is not None and not is_wide:
                _add(run, bias, part, target)


def _add(run: Run, bias: Array, part: ConvGeometry, cells: Array) -> None:
    """Add the bias to elements of y."""
    by_group = in_groups(cells, part)
    offset = bias.reshape(1, part.groups, -1, *(1,) * part.rank)
    run.backend.do(run.backend.add_unsafely, by_group, offset)


def is_faster(request: Request) -> bool:
    """True if integers without zero points are faster as floats."""
    geometry, types = request.geometry, request.types
    if request.call != "forward" or request.backend.xp is not np:
        return False
    small = all(request.arrays[name].dtype.name in _RANGES for name in ("x", "w"))
    wide = types.result == types.accumulate and types.result.kind in "iu"
    heavy = geometry.multiplications > SINGLE_THREADED_PRODUCT
    return small and wide and heavy and _operand(request).kind == "f"


def check_zero_points(
    zeros: dict[str, Any], arrays: dict[str, Array], geometry: ConvGeometry
) -> dict[str, Any]:
    """The zero points as numbers, or as arrays of the type of their array."""
    for name in ("x", "w"):
        if arrays[name].dtype.name not in _RANGES:
            raise TypeError(
                f"zero points are for int8 and uint8; {name} has type "
                f"{arrays[name].dtype}"
            )
    most = {"x": 1, "w": geometry.filters}
    return {n: _checked(n, zero, arrays[n], most[n]) for n, zero in zeros.items()}


def _checked(name: str, zero: Any, array: Array, most: int) -> Any:
    own = array.dtype
    if not is_array(zero):
        try:
            number = operator.index(zero)
        except TypeError:
            kind = type(zero).__name__
            raise TypeError(
                f"{name}_zero_point must be an integer or an array; got {kind}"
            ) from None
        low, high = np.iinfo(own).min, np.iinfo(own).max
        if not low <= number <= high:
            raise ValueError(
                f"{name}_zero_point is {number}; for {own} it must be in {low} … {high}"
            )
        return number
    module_of({name: array, f"{name}_zero_point": zero})
    if zero.dtype != own:
        raise TypeError(
            f"{name}_zero_point has type {zero.dtype} and {name} {own}: it must be "
            "the same, or an integer of Python's"
        )
    if zero.shape not in ((), (1,), (most,)):
        others = f" or {(most,)}" if most > 1 else ""
        raise ValueError(
            f"{name}_zero_point has shape {zero.shape} and must have () or (1,){others}"
        )
    return zero.reshape(()) if zero.size == 1 else zero


def _operand(request: Request) -> DType:
    """The type in which elements minus zero points are multiplied and summed."""
    types, largest = request.types, request.geometry.patch
    if types.result.kind != "i":
        return types.accumulate
    for name in ("x", "w"):
        low, high = _RANGES[request.arrays[name].dtype.name]
        shifted = name in request.zero_points
        largest *= high - low if shifted else max(-low, high)
    return exact_float(largest, types)


def exact_float(largest: int, types: Types) -> DType:
    """The float in which sums up to this are exact, or the type of integer sums."""
    for dtype, most in _EXACT:
        if largest <= min(most, np.iinfo(types.result).max):
            return np.dtype(dtype)
    return types.accumulate


def _by_filter(zeros: Any, geometry: ConvGeometry) -> Any:
    """Zero points of weights along the axis of filters."""
    ones = (1,) * (geometry.rank + 1)
    if getattr(zeros, "ndim", 0) == 0 or not geometry.channels_first:
        return zeros
    return zeros.reshape(-1, *ones)
