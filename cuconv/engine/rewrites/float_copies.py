"""Gradients of int8 and uint8 over copies in floats in which every sum is exact.

BLAS multiplies floats and no integers: NumPy's own products of integers take some
twenty times as long.  Sums that might leave the range of the result are left to those,
which wrap.
"""

import math
from collections.abc import Iterable

import numpy as np

from cuconv.arrays import Array, DType, stub_array
from cuconv.engine.execute import Run
from cuconv.engine.lowering import Lowering
from cuconv.engine.problem import SINGLE_THREADED_PRODUCT
from cuconv.engine.request import Request
from cuconv.engine.rewrites import polyphase
from cuconv.engine.rewrites.zero_points import exact_float
from cuconv.memory import Buffer, workspace_bytes

_BYTES = ("int8", "uint8")
_LARGEST = 255**2


class FloatCopies(Lowering):
    """The same call on copies of all operands, and a copy of its result."""

    is_capturable = False

    def __init__(self, request: Request, operand: DType) -> None:
        arrays = {n: stub_array(a.shape, operand) for n, a in request.arrays.items()}
        cells = [(n, math.prod(array.shape)) for n, array in arrays.items()]
        cells.append(("sums", math.prod(request.result_shape)))
        self.buffers = tuple(Buffer(f"{n}_copy", size, operand) for n, size in cells)
        options = request.options._replace(dtype=operand, precision="strict")
        limit = options.memory_limit
        limit = (
            limit if isinstance(limit, int) else request.backend.default_memory_limit
        )
        options = options._replace(
            memory_limit=max(limit - workspace_bytes(self.buffers), 0)
        )
        out = stub_array(request.result_shape, operand)
        self._names = tuple(arrays)
        self._inner = polyphase.lower(
            request._replace(arrays=arrays, out=out, options=options)
        )
        self.parts = self._inner.parts

    @property
    def composition(self) -> str:
        return f"copies in {self.buffers[0].dtype}"

    def weights_of(self, w: Array) -> Iterable[Array]:
        return self._inner.weights_of(w)

    def steps(self, run: Run) -> None:
        arrays = dict(run.arrays)
        for name in self._names:
            if name in arrays:
                source = arrays[name]
                copied = arrays[f"{name}_copy"][: source.size].reshape(source.shape)
                run.backend.copy(source, copied)
                arrays[name] = copied
        out = arrays["out"]
        sums = arrays["out"] = arrays["sums_copy"][: out.size].reshape(out.shape)
        self._inner.steps(run._replace(arrays=arrays))
        run.backend.copy(sums, out)


def operand_of(request: Request) -> DType | None:
    """The type of the copies; None where integers are multiplied."""
    g, types = request.geometry, request.types
    small = all(a.dtype.name in _BYTES for a in request.arrays.values())
    wide = types.result == types.accumulate and types.result.kind in "iu"
    heavy = g.multiplications > SINGLE_THREADED_PRODUCT
    if request.call == "forward" or request.backend.xp is not np:
        return None
    if not (small and wide and heavy):
        return None
    terms = g.patch
    if request.is_weight_grad:
        terms = g.images * g.positions
    elif request.is_input_grad:
        terms = g.group_filters * g.taps
    found = exact_float(terms * _LARGEST, types)
    return found if found.kind == "f" else None
