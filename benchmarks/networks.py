"""Whole networks, a layer after the other, as programs run them.

``networks.json`` lists the convolutions and poolings of eight networks with their
biases, in the order of the ONNX models that packages on PyPI hold (onnx,
rapidocr-onnxruntime and a detector of voices).  Padding at one end alone, of two
poolings, is part of their inputs, since PyTorch has no such option.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.cases import TRAINING, Case
from benchmarks.layers import GlobalPool, Layer, Pool, Transposed

LISTS = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Step:
    """A layer with its operation forward, and the images that it takes for each input.

    A detector of text, for example, finds several words in a photograph.
    """

    layer: Layer
    operation: str
    images: int


@dataclass(frozen=True)
class Network:
    operations: ClassVar[tuple[str, ...]] = ("forward", TRAINING)
    kind: ClassVar[str] = "network"

    name: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Pass:
    """Every layer of a network once, forward; in training, every convolution."""

    network: Network
    operation: str
    batch: int
    arithmetic: str = "float32"

    @property
    def cases(self) -> tuple[Case, ...]:
        steps = self.network.steps
        if self.operation == TRAINING:
            convolutions = (step for step in steps if step.operation == "forward")
            steps = tuple(replace(step, operation=TRAINING) for step in convolutions)
        return tuple(
            Case(step.layer, step.operation, self.batch * step.images) for step in steps
        )

    @property
    def described(self) -> dict[str, Any]:
        """What a record says of it."""
        return {
            "layers": [case.layer.name for case in self.cases],
            "operation": self.operation,
            "batch": self.batch,
            "arithmetic": self.arithmetic,
            "name": self.network.name,
            "kind": self.network.kind,
            "multiplications": sum(case.multiplications for case in self.cases),
        }


def step_of(operation: str, size: list[int], images: int = 1, **sizes: Any) -> Step:
    """A line of a list, which leaves out what is usual."""
    ones, zeros = [1] * len(size), [0] * len(size)
    found = {"stride": ones, "padding": zeros, "dilation": ones, "size": size, **sizes}
    kind: type[Layer] = Layer
    if operation == "transpose":
        kind, found["output_padding"] = Transposed, zeros
    elif operation != "forward":
        kind = GlobalPool if operation == "global_avg_pool" else Pool
        found |= dict.fromkeys(("filters", "groups"), sizes["channels"])
        found.setdefault("kernel", size)
    options: Any = {
        name: tuple(each) if isinstance(each, list) else each
        for name, each in found.items()
    }
    return Step(kind(**options), operation, images)


def read_networks() -> tuple[Network, ...]:
    lists = json.loads(LISTS.read_text(encoding="utf-8"))
    return tuple(
        Network(name, tuple(step_of(**line) for line in lines))
        for name, lines in lists.items()
    )


NETWORKS = read_networks()
