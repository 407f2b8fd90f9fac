"""Layers, references and records that several tests of the benchmarks share."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from benchmarks import records
from benchmarks.cases import Case
from benchmarks.layers import GlobalPool, Layer, Pool, Transposed, layer
from benchmarks.peers.base import Device
from benchmarks.runner import Effort, Session, Worker, summary, workers
from cuconv.testing import (
    conv_input_grad_reference,
    conv_reference,
    conv_transpose_input_grad_reference,
    conv_transpose_reference,
    conv_transpose_weight_grad_reference,
    conv_weight_grad_reference,
    pool_grad_reference,
    pool_reference,
)


def pool(channels: int, size: int, *window: int, padding: int = 0, **more: Any) -> Pool:
    sizes = (channels, size, channels, *window)
    return Pool(**vars(layer(*sizes, padding=padding, groups=channels, **more)))


def doubling(*sizes: int, padding: int = 0, output_padding: int = 0) -> Transposed:
    """Of stride 2: channels, size, filters and kernel."""
    plain = layer(*sizes, 2, padding=padding)
    return Transposed(**vars(plain), output_padding=(output_padding,) * 2)


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
    "biased": layer(4, 7, 6, 3, 2, groups=2, bias=True),
}


# Of other kinds of layer, with the operations of each.
TINY_OTHERS = {
    "doubling": doubling(3, 4, 2, 4, padding=1),
    "side by side": doubling(2, 3, 4, 2),
    "output padding": doubling(2, 4, 3, 3, padding=1, output_padding=1),
    "uneven": Transposed(
        *(4, (4, 3), 6, (3, 2), (2, 3), (1, 0), (1, 2), 2), output_padding=(1, 2)
    ),
    "pool": pool(3, 7, 3, 2, padding=1),
    "loose pool": pool(2, 8, 2, 3),
    "uneven pool": Pool(2, (7, 6), 2, (3, 2), (1, 2), (1, 0), (1, 1), groups=2),
    "whole pool": pool(2, 5, 5, 5),
    "line pool": pool(3, 11, 4, 2, padding=1, rank=1),
    "volume pool": pool(2, 5, 2, 2, rank=3),
    "global pool": GlobalPool(**vars(pool(3, 5, 5, 5))),
}


OPERATIONS = tuple(Layer.operations)
operands_of = Device().operands


def reference(case: Case) -> np.ndarray:
    """What the loops of `cuconv.testing` say, which share no line with benchmarks."""
    if case.operation == "global_avg_pool":
        return operands_of(case)[0].mean((2, 3), keepdims=True, dtype=float)
    if kind := {"max": "max", "avg": "mean"}.get(case.operation[:3]):
        (x,) = operands_of(Case(case.layer, "max_pool", case.batch))
        if case.operation.endswith("_backward"):
            dy = operands_of(case)[0]
            return pool_grad_reference(dy, x, kind=kind, **case.layer.options)
        return pool_reference(x, kind=kind, **case.layer.options).y
    function = {
        "forward": conv_reference,
        "input_grad": conv_input_grad_reference,
        "weight_grad": conv_weight_grad_reference,
        "transpose": conv_transpose_reference,
        "transpose_input_grad": conv_transpose_input_grad_reference,
        "transpose_weight_grad": conv_transpose_weight_grad_reference,
    }[case.operation]
    shapes = [case.result_shape] if case.result_name != "dy" else []
    first, second, *biases = operands_of(case)
    result = function(first, second, *shapes, **case.layer.options)
    return result + sum(bias[:, None, None] for bias in biases)


def planted(times: dict[str, list[float | None]], **changes: Any) -> records.Record:
    """A record of three layers, the last one depthwise."""
    layers = [PLAIN, TINY["groups"], TINY["depthwise"]]
    cases = []
    for i, each in enumerate(layers):
        findings = {peer: finding(column[i]) for peer, column in times.items()}
        more = {"multiplications": 10**6, "findings": findings}
        cases.append({**Case(each, "forward", 2).described, **more})
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


@contextmanager
def worker_of(peer: str) -> Iterator[Worker]:
    """A peer in a process, which may be that of another environment."""
    python = os.environ.get("CUCONV_TORCH_PYTHON", sys.executable)
    with workers([peer], {"device": "cpu"}, python) as found:
        worker = found[peer]
        if worker.hello["status"] == "missing":
            pytest.skip(f"{peer} is not installed: {worker.hello['reason']}")
        yield worker


class LocalWorker:
    """A session without a process, which counts its requests."""

    def __init__(self, name: str) -> None:
        self.session, self.asked = Session(name, {}), []

    def ask(self, do: str, **words: Any) -> dict[str, Any]:
        self.asked.append(do)
        return self.session.answer(do, **words)

    def end(self) -> None:
        self.asked.append("end")


TINY_EFFORT = Effort(rounds=3, seconds=3e-3)
