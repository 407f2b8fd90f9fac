"""The library itself: ``cuconv``, ``cuconv@4MiB``, ``cuconv@fast`` and their kin."""

from functools import partial
from typing import Any

import numpy as np

import cuconv
from benchmarks.cases import Array, Case
from benchmarks.peers.base import Call, CupyDevice, HostDevice, Peer, Wishes


class LibraryHost(HostDevice):
    """NumPy's memory, the workspaces that calls keep for one another included."""

    def extra_bytes(self, call: Call) -> int | None:
        cuconv.release_memory()
        return super().extra_bytes(call)


class Library(Peer):
    def __init__(self, wishes: Wishes) -> None:
        super().__init__(wishes)
        self.device = CupyDevice() if wishes.device == "cuda" else LibraryHost()
        self._options = {
            "precision": wishes.precision,
            "memory_limit": wishes.memory_limit,
            "strategy": wishes.strategy,
        }

    def versions(self) -> dict[str, str]:
        return {"cuconv": cuconv.__version__}

    def strategy(self, case: Case) -> str | None:
        plan = cuconv.plan_conv(
            case.shapes["x"],
            case.shapes["w"],
            dtype="float32",
            op=case.operation,
            **self._keywords(case),
        )
        return str(plan.strategy)

    def call(self, case: Case, first: Array, second: Array) -> Call:
        keywords = self._keywords(case)
        if self.wishes.reuse_out:
            keywords["out"] = self.device.put(np.empty(case.result_shape, np.float32))
        if case.operation == "forward":
            return partial(cuconv.conv, first, second, **keywords)
        function, shape = {
            "input_grad": (cuconv.conv_input_grad, case.shapes["x"]),
            "weight_grad": (cuconv.conv_weight_grad, case.shapes["w"]),
        }[case.operation]
        return partial(function, first, second, shape, **keywords)

    def _keywords(self, case: Case) -> dict[str, Any]:
        return {**case.options, **self._options}
