"""One measurement: its operands, and how far a result is from the right one."""

from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import numpy as np

from benchmarks.layers import Layer, Sizes
from benchmarks.taps import maxima, plane

Host = np.ndarray[Any, np.dtype[Any]]

# How products are formed, each with the largest error that is not a mistake: TF32 and
# float16 keep ten bits of a factor, bfloat16 seven; all of them are summed in float32.
TOLERANCES = {"float32": 1e-4, "tf32": 2e-3, "float16": 5e-3, "bfloat16": 2e-2}
# Arrays of random numbers, in the order of their seeds; indices follow from x.
RANDOM = ("x", "w", "dy")
# So many planes of a result are compared on a CPU.
PLANES = 8


@dataclass(frozen=True)
class Case:
    """A layer, an operation, a batch, and an arithmetic of `TOLERANCES`."""

    layer: Layer
    operation: str
    batch: int
    arithmetic: str = "float32"

    @property
    def operand_names(self) -> tuple[str, ...]:
        return self.layer.operations[self.operation][:-1]

    @property
    def result_name(self) -> str:
        """The array that has the shape of the result."""
        return self.layer.operations[self.operation][-1]

    @property
    def dtype(self) -> str:
        """The type of the arrays."""
        return "float32" if self.arithmetic == "tf32" else self.arithmetic

    def nbytes(self, *names: str) -> int:
        """Of these arrays; of operands and result where none is named."""
        half = 4 if self.dtype == "float32" else 2
        return sum(
            (half if name in RANDOM else 8) * prod(self.shapes[name])
            for name in names or (*self.operand_names, self.result_name)
        )

    @property
    def shapes(self) -> dict[str, Sizes]:
        return self.layer.shapes(self.batch)

    @property
    def result_shape(self) -> Sizes:
        return self.shapes[self.result_name]

    def operands(self) -> tuple[Host, ...]:
        """Standard normal float32, the same in every process; weights are scaled.

        Indices are those of the maxima of x.
        """
        return tuple(map(self._operand, self.operand_names))

    def _operand(self, name: str) -> Host:
        found: Host
        if name == "indices":
            _, found = maxima(self.layer, self._operand("x"))
            return found
        rng = np.random.default_rng(RANDOM.index(name))
        found = rng.standard_normal(self.shapes[name], dtype=np.float32)
        scale = self.layer.patch**0.5 if name == "w" else 1
        return found / np.float32(scale)


def relative_error(case: Case, operands: tuple[Host, ...], result: Host) -> float:
    """Of some planes, against their largest true value; inf if there is a NaN.

    The first plane, the last, and random ones.
    """
    if result.shape != case.result_shape:
        raise ValueError(f"the result is {result.shape}, not {case.result_shape}")
    heads = result.shape[:2]
    places = np.random.default_rng(3).integers(0, heads, (PLANES, 2))
    places[:2] = (0, 0), np.array(heads) - 1
    whole = case.layer, case.operation, operands
    true = np.array([plane(*whole, a, b) for a, b in places])
    got = np.array([result[a, b] for a, b in places], dtype=np.float64)
    error = float(abs(got - true).max() / abs(true).max())
    return error if isfinite(error) else float("inf")
