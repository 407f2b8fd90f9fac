"""Layers, references and records that tests of the benchmarks share."""

from typing import Any

import numpy as np

from benchmarks import records
from benchmarks.cases import Case
from benchmarks.layers import Layer
from benchmarks.runner import summary
from benchmarks.suites import layer
from cuconv.testing import (
    conv_input_grad_reference,
    conv_reference,
    conv_transpose_input_grad_reference,
    conv_transpose_reference,
    conv_transpose_weight_grad_reference,
    conv_weight_grad_reference,
)

PLAIN = layer(3, 6, 4, 3)


TINY = {
    "plain": PLAIN,
    "strides": Layer(2, (7, 6), 3, (3, 2), (2, 3), (1, 2), (1, 1)),
    "dilated": Layer(2, (9, 8), 2, (3, 2), (2, 1), (2, 1), (2, 3)),
    "groups": layer(4, 5, 6, 3, groups=2),
    "depthwise": layer(4, 5, 4, 3, 2, groups=4),
    "pointwise": layer(5, 4, 3, 1),
    "line": layer(3, 13, 4, 4, 3, rank=1, dilation=2),
    "volume": layer(2, 4, 3, 3, rank=3),
}


def reference(case: Case) -> np.ndarray:
    function, wanted = {
        "forward": (conv_reference, None),
        "input_grad": (conv_input_grad_reference, "x"),
        "weight_grad": (conv_weight_grad_reference, "w"),
        "transpose": (conv_transpose_reference, None),
        "transpose_input_grad": (conv_transpose_input_grad_reference, "x"),
        "transpose_weight_grad": (conv_transpose_weight_grad_reference, "w"),
    }[case.operation]
    shapes = [case.shapes[wanted]] if wanted else []
    return function(*case.operands(), *shapes, **case.options)


def planted(times: dict[str, list[float | None]], **changes: Any) -> records.Record:
    """A record of three layers, the last one depthwise."""
    layers = [PLAIN, TINY["groups"], TINY["depthwise"]]
    cases = []
    for i, each in enumerate(layers):
        findings = {peer: finding(column[i]) for peer, column in times.items()}
        case = Case(each, "forward", 2)
        cases.append(
            {
                **case.to_json(),
                "name": each.name,
                "kind": each.kind,
                "multiplications": 10**6,
                "findings": findings,
            }
        )
    return {
        "suite": "resnet50",
        "device": "cpu",
        "batch": 2,
        "wishes": {},
        "rounds": 1,
        "seconds": 1.0,
        "peers": {name: {"versions": {"numpy": "2"}} for name in times},
        "machine": {"cpu": "c", "cores": 2, "gemm_gflops": 123.4, "copy_gbytes": 9.87},
        "commit": "abc",
        "dirty": False,
        "date": "2001-02-03",
        "cases": cases,
        **changes,
    }


def finding(milliseconds: float | None) -> dict[str, Any]:
    if milliseconds is None:
        return {"status": "refused", "reason": "too large"}
    times = summary([milliseconds / 1e3])
    return {"status": "ok", "error": 1e-7, "extra_bytes": 2**20, **times}
