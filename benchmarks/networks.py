"""Whole networks, a layer after the other, as programs run them.

``networks.json`` lists the convolutions and poolings of eight networks with their
biases, in the order of the ONNX models that packages on PyPI hold (onnx,
rapidocr-onnxruntime and a detector of voices).  Padding at one end alone, of two
poolings, is part of their inputs, since PyTorch has no such option.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from benchmarks.cases import TRAINING, Case
from benchmarks.layers import layer_of, read_lists


@dataclass(frozen=True)
class Network:
    """Cases for one input; some take several images for it: words in a photograph."""

    operations: ClassVar[tuple[str, ...]] = ("forward", TRAINING)

    name: str
    forward: tuple[Case, ...]


@dataclass(frozen=True)
class Pass:
    """Every layer of a network once, forward; in training, every convolution."""

    network: Network
    operation: str
    batch: int
    arithmetic: str = "float32"

    @property
    def cases(self) -> tuple[Case, ...]:
        cases = (replace(c, batch=self.batch * c.batch) for c in self.network.forward)
        if self.operation != TRAINING:
            return tuple(cases)
        convolutions = (case for case in cases if case.operation == "forward")
        return tuple(replace(case, operation=TRAINING) for case in convolutions)

    @property
    def described(self) -> dict[str, Any]:
        """What a record says of it."""
        return {
            "layers": [case.layer.name for case in self.cases],
            "operation": self.operation,
            "batch": self.batch,
            "arithmetic": self.arithmetic,
            "name": self.network.name,
            "kind": "network",
            "multiplications": sum(case.multiplications for case in self.cases),
        }


def case_of(operation: str = "forward", images: int = 1, **sizes: Any) -> Case:
    return Case(layer_of(operation=operation, **sizes), operation, images)


NETWORKS = tuple(
    Network(name, tuple(case_of(**each) for each in lines))
    for name, lines in read_lists("networks").items()
)
