"""One measurement: its operands, and how far a result is from the right one."""

from dataclasses import dataclass
from functools import cached_property
from math import isfinite, prod
from typing import Any

import numpy as np

from benchmarks.definitions import (
    DEFINITIONS,
    Definition,
    Host,
    max_indices,
    sample,
)
from benchmarks.layers import Layer, Sizes

Array = Any  # of NumPy, CuPy or PyTorch

# How products are formed, each with the largest error that is not a mistake: TF32 and
# float16 keep ten bits of a factor, bfloat16 seven; all of them are summed in float32.
TOLERANCES = {"float32": 1e-4, "tf32": 2e-3, "float16": 5e-3, "bfloat16": 2e-2}
# Arrays of random numbers, in the order of their seeds; indices follow from x.
RANDOM = ("x", "w", "dy")


@dataclass(frozen=True)
class Case:
    """A layer, an operation, a batch, and an arithmetic of `TOLERANCES`."""

    layer: Layer
    operation: str
    batch: int
    arithmetic: str = "float32"

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Case":
        operation = found["operation"]
        return cls(
            DEFINITIONS[operation].layers.from_json(found["layer"]),
            operation,
            found["batch"],
            found.get("arithmetic", "float32"),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer.to_json(),
            "operation": self.operation,
            "batch": self.batch,
            "arithmetic": self.arithmetic,
        }

    @property
    def definition(self) -> Definition:
        return DEFINITIONS[self.operation]

    @property
    def dtype(self) -> str:
        """The type of the arrays."""
        return "float32" if self.arithmetic == "tf32" else self.arithmetic

    @property
    def nbytes(self) -> int:
        """Of the operands and the result, each moved once."""
        names = (*self.definition.operands, self.definition.result)
        return sum(self.itemsize(name) * prod(self.shapes[name]) for name in names)

    def itemsize(self, name: str) -> int:
        """Bytes of a number in one of the arrays."""
        if name not in RANDOM:
            return 8
        return 4 if self.dtype == "float32" else 2

    @cached_property
    def shapes(self) -> dict[str, Sizes]:
        return self.layer.shapes(self.batch)

    @property
    def result_shape(self) -> Sizes:
        return self.shapes[self.definition.result]

    @cached_property
    def options(self) -> dict[str, Any]:
        """Keywords that cuconv and PyTorch share."""
        return self.layer.options

    def operands(self) -> tuple[Host, ...]:
        """Standard normal float32, the same in every process; weights are scaled.

        Indices are those of the maxima of x.
        """
        return tuple(map(self._operand, self.definition.operands))

    def _operand(self, name: str) -> Host:
        if name not in RANDOM:
            return max_indices(self.layer, self._operand("x"))
        rng = np.random.default_rng(RANDOM.index(name))
        array = rng.standard_normal(self.shapes[name], dtype=np.float32)
        if name == "w":
            array /= np.float32(self.layer.patch**0.5)
        return array


def relative_error(case: Case, operands: tuple[Host, ...], result: Host) -> float:
    """Of a sample of the result, against its largest true value; inf if it has NaN."""
    if result.shape != case.result_shape:
        raise ValueError(f"the result is {result.shape}, not {case.result_shape}")
    element = case.definition.element
    places = sample(case.result_shape, case.definition.samples)
    true = np.array([element(case.layer, *operands, place) for place in places])
    got = np.array([result[tuple(place)] for place in places], dtype=np.float64)
    error = float(abs(got - true).max() / abs(true).max())
    return error if isfinite(error) else float("inf")
