"""The library itself: ``cuconv``, ``cuconv@4MiB``, ``cuconv@fast`` and their kin."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

import cuconv
from benchmarks.cases import Array, Case
from benchmarks.layers import Sizes
from benchmarks.peers.base import (
    Call,
    HostDevice,
    Peer,
    RefusedError,
    Wishes,
    cupy_device,
)


class LibraryHost(HostDevice):
    """NumPy's memory, the workspaces that calls keep for one another included."""

    def extra_bytes(self, call: Call) -> int | None:
        cuconv.release_memory()
        return super().extra_bytes(call)


class Way(NamedTuple):
    """How an operation is called.

    The name of a public function, the array whose shape it takes after its operands,
    and whether it has a plan, a strategy and a precision.
    """

    function: str
    shape: str | None = None
    is_planned: bool = True


WAYS = {
    "forward": Way("conv"),
    "input_grad": Way("conv_input_grad", "x"),
    "weight_grad": Way("conv_weight_grad", "w"),
    "transpose": Way("conv_transpose"),
    "transpose_input_grad": Way("conv_transpose_input_grad", "x"),
    "transpose_weight_grad": Way("conv_transpose_weight_grad", "w"),
    "max_pool": Way("max_pool", is_planned=False),
    "max_pool_backward": Way("max_pool_backward", "x", is_planned=False),
    "avg_pool": Way("avg_pool", is_planned=False),
    "avg_pool_backward": Way("avg_pool_backward", "x", is_planned=False),
}


class Library(Peer):
    def __init__(self, wishes: Wishes) -> None:
        super().__init__(wishes)
        self.device = cupy_device() if wishes.device == "cuda" else LibraryHost()

    def versions(self) -> dict[str, str]:
        return {"cuconv": cuconv.__version__}

    def plan(self, case: Case) -> dict[str, Any]:
        if not WAYS[case.operation].is_planned:
            return super().plan(case)
        plan = cuconv.plan_conv(
            self._shape(case, "x"),
            self._shape(case, "w"),
            dtype=case.dtype,
            op=case.operation,
            device=self.wishes.device,
            **self._keywords(case),
        )
        return {"strategy": plan.strategy, "promised_bytes": plan.workspace_bytes}

    def call(self, case: Case, *operands: Array) -> Call:
        self._check(case)
        way, keywords = WAYS[case.operation], self._keywords(case)
        if self.wishes.reuse_out:
            keywords["out"] = self.device.put(np.empty(case.result_shape, np.float32))
        arrays = map(self._placed, case.definition.operands, operands)
        shapes = [self._shape(case, way.shape)] if way.shape else []
        return partial(getattr(cuconv, way.function), *arrays, *shapes, **keywords)

    def _check(self, case: Case) -> None:
        """Raise if the strategy that was asked for cannot run the case."""
        if self.wishes.strategy != "auto" and not WAYS[case.operation].is_planned:
            raise RefusedError(f"{case.operation} has no strategies")
        try:
            self.plan(case)
        except ValueError as error:
            if "cannot run" not in str(error):
                raise
            raise RefusedError(str(error)) from error

    def _keywords(self, case: Case) -> dict[str, Any]:
        wishes, fast = self.wishes, case.arithmetic == "tf32"
        keywords = {
            **case.options,
            "memory_limit": wishes.memory_limit,
            "layout": wishes.layout,
        }
        if WAYS[case.operation].is_planned:
            keywords["strategy"] = wishes.strategy
            keywords["precision"] = "fast" if fast else wishes.precision
        return keywords

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

    def base_array(self, case: Case, result: Array) -> Array:
        order = self._order(case.definition.result, result.ndim)
        return result.transpose([order.index(axis) for axis in range(result.ndim)])
