"""One measurement: its operands, and how far a result is from the right one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite, prod
from typing import Any

import numpy as np

from benchmarks.layers import Layer, Sizes
from benchmarks.taps import plane

Host = np.ndarray[Any, np.dtype[Any]]

# How products are formed, each with the largest error that is not a mistake: TF32 and
# float16 keep ten bits of a factor, bfloat16 seven; all of them are summed in float32.
TOLERANCES = {"float32": 1e-4, "tf32": 2e-3, "float16": 5e-3, "bfloat16": 2e-2}
# Arrays of random numbers, in the order of their seeds.
RANDOM = ("x", "w", "dy", "bias")
# A convolution forward and all its gradients, in one call with several results.
TRAINING = "training"
BIASED = ("forward", "transpose", TRAINING)
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
        names = self._names[:-1]
        return (*names, "bias") if self.has_bias else names

    @property
    def result_name(self) -> str:
        """The array that has the shape of the result."""
        return self._names[-1]

    @property
    def has_bias(self) -> bool:
        return self.layer.bias and self.operation in BIASED

    @property
    def _names(self) -> tuple[str, ...]:
        if self.operation == TRAINING:
            return "dy", "x", "w", "dy"
        return self.layer.operations[self.operation]

    @property
    def cases(self) -> "tuple[Case, ...]":
        """Itself alone: a pass through a network has several."""
        return (self,)

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
    def multiplications(self) -> int:
        """Training has those of each result."""
        times = len(self.layer.operations) if self.operation == TRAINING else 1
        return times * self.layer.multiplications(self.batch)

    @property
    def shapes(self) -> dict[str, Sizes]:
        return self.layer.shapes(self.batch)

    @property
    def result_shape(self) -> Sizes:
        return self.shapes[self.result_name]

    @property
    def described(self) -> dict[str, Any]:
        """What a record says of it."""
        return {
            "layer": asdict(self.layer),
            "operation": self.operation,
            "batch": self.batch,
            "arithmetic": self.arithmetic,
            "name": self.layer.name,
            "kind": self.layer.kind,
            "multiplications": self.multiplications,
            "moved_bytes": self.nbytes(),
        }


def results_of(case: Case, result: Any) -> list[tuple[Case, Any]]:
    """Each result with the case of it alone; the gradient for a bias has none."""
    if case.operation != TRAINING:
        return [(case, result)]
    parts = [replace(case, operation=name) for name in case.layer.operations]
    return [*zip(parts, result, strict=False)]


def largest_error(case: Case, operands: Sequence[Host], result: Any) -> float:
    """The largest `relative_error` of the results."""
    arrays = dict(zip(case.operand_names, operands, strict=True))
    return max(
        relative_error(part, [arrays[name] for name in part.operand_names], got)
        for part, got in results_of(case, result)
    )


def relative_error(case: Case, operands: Sequence[Host], result: Any) -> float:
    """Of some planes, against their largest true value; inf if there is a NaN.

    The first plane, the last, and random ones.
    """
    result = np.asarray(result)
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
