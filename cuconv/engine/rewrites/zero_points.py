"""Integers of 8 bits, less their zero points, as floats that hold every sum exactly.

    y = Σ (x - x_zero_point) · (w - w_zero_point)

where padding is the zero point of x, and so adds nothing.  BLAS multiplies floats and
no integers: float32 where no sum can pass 2^24, else float64, which is exact too.
Where a sum might leave the result's type, integers are multiplied, which wrap.
"""

import math
import operator
from typing import Any

import numpy as np

from cuconv.arrays import Array, DType, is_array, module_of
from cuconv.engine.plan import stub_array
from cuconv.engine.rewrites.base import Arrays, Request, ZeroPoints, run_part
from cuconv.engine.rewrites.padded_copy import Staged, Tiling, in_buffer, index_of_y
from cuconv.geometry import Block, ConvGeometry
from cuconv.memory import Buffer
from cuconv.options import Options
from cuconv.strategies.base import LIGHT_PRODUCT, in_groups

_EXACT = (np.float32, 2**24), (np.float64, 2**53)
_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


class Shifted(Staged):
    """Blocks over copies of cells and weights less their zero points."""

    @classmethod
    def buffers(
        cls, request: Request, tiling: Tiling, shapes: dict[ConvGeometry, Block]
    ) -> tuple[Buffer, ...]:
        del tiling
        operand = _operand(request)
        cells = max(math.prod(part.x_shape) for part in shapes)
        sums = max(math.prod(part.y_shape) for part in shapes)
        weights = math.prod(request.geometry.w_shape)
        each = {"x": cells, "w": weights, "y": sums}
        return tuple(Buffer(name, count, operand) for name, count in each.items())

    @classmethod
    def planned(
        cls, request: Request, part: ConvGeometry, block: Block
    ) -> tuple[Arrays, Array, Options]:
        del block
        operand = _operand(request)
        shapes = {"x": part.x_shape, "w": part.w_shape}
        arrays = {name: stub_array(shape, operand) for name, shape in shapes.items()}
        options = request.options._replace(dtype=operand, precision="strict")
        return arrays, stub_array(part.y_shape, operand), options

    def _forward(
        self,
        x: Array,
        w: Array,
        bias: Array | None,
        y: Array,
        space: dict[str, Array],
    ) -> None:
        g, backend, xp = self.problem.geometry, self._backend, self._xp
        weights = in_buffer(space["w"], w.shape)
        backend.copy(w, weights)
        if self._zeros.w is not None:
            xp.subtract(weights, _by_filter(self._zeros.w, g), out=weights)
        for number, block in enumerate(self._cut.blocks(g)):
            plan, copied = self._copied(number, x, block, space)
            if self._zeros.x is not None:
                xp.subtract(copied, self._zeros.x, out=copied)
            part = g.part(block)
            sums = in_buffer(space["y"], part.y_shape)
            run_part(plan, copied, weights, None, sums)
            target = y[index_of_y(g, block)]
            # Sums in the type that everything is added in take the bias before they
            # are rounded; exact ones may have no room for it.
            is_wide = sums.dtype == self.problem.types.accumulate
            if bias is not None and is_wide:
                self._add(bias, part, sums)
            backend.copy(sums, target)
            if bias is not None and not is_wide:
                self._add(bias, part, target)

    def _add(self, bias: Array, part: ConvGeometry, cells: Array) -> None:
        """Add the bias to cells of y."""
        by_group = in_groups(cells, part)
        offset = bias.reshape(1, part.groups, -1, *(1,) * part.rank)
        self._xp.add(by_group, offset, out=by_group, casting="unsafe")


def is_faster_shifted(request: Request) -> bool:
    """Whether integers without zero points are worth turning into floats."""
    geometry, types = request.geometry, request.types
    if request.call != "forward" or request.backend.xp is not np:
        return False
    small = all(request.arrays[name].dtype.name in _RANGES for name in ("x", "w"))
    wide = types.result == types.accumulate and types.result.kind in "iu"
    heavy = geometry.multiplications > LIGHT_PRODUCT
    return small and wide and heavy and _operand(request).kind == "f"


def check_zero_points(
    zeros: ZeroPoints, arrays: Arrays, geometry: ConvGeometry
) -> ZeroPoints:
    """The zero points as numbers, or arrays of the type of what they belong to."""
    each = zip(ZeroPoints._fields, zeros, (1, geometry.filters), strict=True)
    return ZeroPoints(*(_checked(n, z, arrays[n], most) for n, z, most in each))


def _checked(name: str, zero: Any, array: Array, most: int) -> Any:
    own = array.dtype
    if own.name not in _RANGES:
        raise TypeError(f"zero points are for int8 and uint8; {name} has type {own}")
    if zero is None:
        return None
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
                f"{name}_zero_point is {number}; in {own} it lies in {low} … {high}"
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
    """The type in which cells less zero points are multiplied and summed."""
    types, largest = request.types, request.geometry.patch
    if types.result.kind != "i":
        return types.accumulate
    for name in ("x", "w"):
        low, high = _RANGES[request.arrays[name].dtype.name]
        shifted = getattr(request.zeros, name) is not None
        largest *= high - low if shifted else max(-low, high)
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
