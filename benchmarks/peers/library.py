"""The library itself: ``cuconv``, ``cuconv@4MiB``, ``cuconv@fast`` and their kin."""

from functools import partial
from typing import Any

import numpy as np

import cuconv
from benchmarks.cases import TRAINING, Case, results_of
from benchmarks.layers import Pool, Sizes
from benchmarks.peers.base import Call, Device, Peer, RefusedError, Wishes, cupy_device
from benchmarks.taps import Array


class LibraryHost(Device):
    """NumPy's memory, the workspaces that calls keep for one another included."""

    def extra_bytes(self, call: Call) -> int | None:
        cuconv.release_memory()
        return super().extra_bytes(call)


class Library(Peer):
    def __init__(self, wishes: Wishes) -> None:
        super().__init__(wishes)
        self.device = cupy_device() if wishes.device == "cuda" else LibraryHost()

    def versions(self) -> dict[str, str]:
        return {"cuconv": cuconv.__version__}

    def plan(self, case: Case) -> dict[str, Any]:
        """The plan of a call; `RefusedError` where the named strategy cannot run."""
        if isinstance(case.layer, Pool):
            if self.wishes.strategy != "auto":
                raise RefusedError(f"{case.operation} has no strategies")
            return super().plan(case)
        keywords: dict[str, Any] = {"dtype": case.dtype, "device": self.wishes.device}
        keywords |= {"op": case.operation, **self._keywords(case)}
        try:
            plan = cuconv.plan_conv(*(self._shape(case, n) for n in "xw"), **keywords)
        except ValueError as error:
            if "cannot run" not in str(error):
                raise
            raise RefusedError(str(error)) from error
        return {"strategy": plan.strategy, "promised_bytes": plan.workspace_bytes}

    def call(self, case: Case, *operands: Array, **more: Any) -> Call:
        """Call the public function, with more keywords where they are given."""
        arguments = [*map(self._placed, case.operand_names, operands)]
        keywords = {**self._keywords(case), **more}
        if case.operation == TRAINING:
            return training(*arguments, **keywords)
        if self.wishes.reuse_out:
            keywords["out"] = self.device.put(np.empty(case.result_shape, np.float32))
        if case.result_name != "dy":
            arguments.append(self._shape(case, case.result_name))
        name = "conv" if case.operation == "forward" else f"conv_{case.operation}"
        name = case.operation if isinstance(case.layer, Pool) else name
        return partial(getattr(cuconv, name), *arguments, **keywords)

    def first_channels(self, case: Case, result: Array) -> Array:
        if case.operation == TRAINING:
            parts = results_of(case, result)
            return [self.first_channels(part, each) for part, each in parts]
        axes = self._axes(case.result_name, result.ndim)
        return result.transpose([axes.index(axis) for axis in range(result.ndim)])

    def _keywords(self, case: Case) -> dict[str, Any]:
        wishes = self.wishes
        common = {"memory_limit": wishes.memory_limit, "layout": wishes.layout}
        if isinstance(case.layer, Pool):
            return {**case.layer.options, **common}
        precision = "fast" if case.arithmetic == "tf32" else wishes.precision
        way = {"strategy": wishes.strategy, "precision": precision}
        return {**case.layer.options, **common, **way}

    def _axes(self, name: str, rank: int) -> Sizes:
        """The axes as the layout has them; weights end in (C / groups, K)."""
        if self.wishes.layout == "channels_first" or name == "bias":
            return tuple(range(rank))
        return (*range(2, rank), 1, 0) if name == "w" else (0, *range(2, rank), 1)

    def _shape(self, case: Case, name: str) -> Sizes:
        shape = case.shapes[name]
        return tuple(shape[axis] for axis in self._axes(name, len(shape)))

    def _placed(self, name: str, array: Array) -> Array:
        """The same numbers in the layout, contiguous."""
        if self.wishes.layout == "channels_first":
            return array
        return array.transpose(self._axes(name, array.ndim)).copy()


def training(dy: Array, x: Array, w: Array, *bias: Array, **keywords: Any) -> Call:
    """A convolution, then all its gradients."""
    needs = ("x", "w", "bias")[: 2 + len(bias)]
    forward = partial(cuconv.conv, x, w, *bias, **keywords)
    backward = partial(cuconv.conv_backward, dy, x, w, needs=needs, **keywords)
    return lambda: (forward(), *backward())
