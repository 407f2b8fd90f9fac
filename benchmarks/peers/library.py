"""The library itself: ``cuconv``, ``cuconv@4MiB``, ``cuconv@fast`` and their kin."""

from functools import partial
from typing import Any

import numpy as np

import cuconv
from benchmarks.cases import OPERANDS, Array, Case
from benchmarks.peers.base import (
    Call,
    HostDevice,
    Peer,
    RefusedError,
    Wishes,
    cupy_device,
)
from benchmarks.suites import Sizes


class LibraryHost(HostDevice):
    """NumPy's memory, the workspaces that calls keep for one another included."""

    def extra_bytes(self, call: Call) -> int | None:
        cuconv.release_memory()
        return super().extra_bytes(call)


class Library(Peer):
    def __init__(self, wishes: Wishes) -> None:
        super().__init__(wishes)
        self.device = cupy_device() if wishes.device == "cuda" else LibraryHost()
        self._options = {
            "memory_limit": wishes.memory_limit,
            "strategy": wishes.strategy,
            "layout": wishes.layout,
        }

    def versions(self) -> dict[str, str]:
        return {"cuconv": cuconv.__version__}

    def plan(self, case: Case) -> dict[str, Any]:
        plan = cuconv.plan_conv(
            self._shape(case, "x"),
            self._shape(case, "w"),
            dtype=case.dtype,
            op=case.operation,
            device=self.wishes.device,
            **self._keywords(case),
        )
        return {"strategy": plan.strategy, "promised_bytes": plan.workspace_bytes}

    def call(self, case: Case, first: Array, second: Array) -> Call:
        self._check(case)
        keywords = self._keywords(case)
        if self.wishes.reuse_out:
            keywords["out"] = self.device.put(np.empty(case.result_shape, np.float32))
        names = OPERANDS[case.operation]
        first, second = (
            self._placed(name, array)
            for name, array in zip(names, (first, second), strict=True)
        )
        if case.operation == "forward":
            return partial(cuconv.conv, first, second, **keywords)
        function, result = {
            "input_grad": (cuconv.conv_input_grad, "x"),
            "weight_grad": (cuconv.conv_weight_grad, "w"),
        }[case.operation]
        return partial(function, first, second, self._shape(case, result), **keywords)

    def _check(self, case: Case) -> None:
        """Raise if the strategy that was asked for cannot run the case."""
        try:
            self.plan(case)
        except ValueError as error:
            if "cannot run" not in str(error):
                raise
            raise RefusedError(str(error)) from error

    def _keywords(self, case: Case) -> dict[str, Any]:
        fast = case.arithmetic == "tf32"
        precision = "fast" if fast else self.wishes.precision
        return {**case.options, **self._options, "precision": precision}

    def _is_last(self) -> bool:
        return self.wishes.layout == "channels_last"

    def _shape(self, case: Case, name: str) -> Sizes:
        shape = case.shapes[name]
        return tuple(shape[i] for i in self._order(name, len(shape)))

    def _order(self, name: str, rank: int) -> Sizes:
        """The axes as the layout has them; weights end in (C / groups, K)."""
        if not self._is_last():
            return tuple(range(rank))
        return (*range(2, rank), 1, 0) if name == "w" else (0, *range(2, rank), 1)

    def _placed(self, name: str, array: Array) -> Array:
        """The same numbers in the layout, contiguous."""
        if not self._is_last():
            return array
        return array.transpose(self._order(name, array.ndim)).copy()

    def plain(self, case: Case, result: Array) -> Array:
        name = {"forward": "dy", "input_grad": "x", "weight_grad": "w"}[case.operation]
        order = self._order(name, result.ndim)
        return result.transpose([order.index(axis) for axis in range(result.ndim)])
