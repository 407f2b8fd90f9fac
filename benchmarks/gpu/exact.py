"""Every strategy on small integers, which must be equal.

``python -m benchmarks.gpu.exact``: few and small launches, as a memory checker wants
them, of every strategy that runs odd sizes, steps, groups and types on a GPU.
``--without-pool`` gives each array an allocation of its own, so that the checker sees
every access outside of it.
"""

import sys
from collections.abc import Iterator
from itertools import chain, product
from typing import Any

import ml_dtypes  # noqa: F401 - NumPy learns the name bfloat16
import numpy as np

import cuconv
from benchmarks.cases import Case
from benchmarks.definitions import Host
from benchmarks.layers import Layer
from benchmarks.peers.base import CupyDevice, cupy_device
from benchmarks.suites import OPERATIONS, layer
from benchmarks.taps import norm_error, reference
from cuconv.config import PRECISIONS
from cuconv.geometry import PADDING_MODES
from cuconv.strategies import strategies

DTYPES = ("float32", "float16", "bfloat16")
LAYERS = (
    Layer(6, (9, 11), 8, (3, 2), (2, 1), (1, 2), (1, 2), groups=2),
    Layer(20, (9, 13), 36, (3, 3), (1, 1), (1, 1), (1, 1)),
    Layer(24, (7, 9), 40, (1, 1), (1, 1), (0, 0), (1, 1)),
    Layer(18, (9, 12), 18, (3, 3), (2, 1), (1, 1), (1, 1), groups=18),
    layer(5, 14, 7, 4, 3, rank=1, dilation=2),
    layer(3, 5, 4, 3, rank=3),
)
# General convolutions, which are made of plain ones: on the host they are exact.
GENERAL: tuple[dict[str, Any], ...] = (
    *(
        {"padding_mode": mode, "padding": ((7, 3), (2, -1))}
        for mode in PADDING_MODES[1:]
    ),
    {"input_dilation": (2, 3), "padding": 2, "stride": (1, 2), "groups": 2},
    {"batch_groups": 2, "padding": 1, "dilation": 2},
)
# Of strategies that round, in the types that they are allowed to round in.
LARGEST_ERROR = 2e-2


def cases() -> Iterator[Case]:
    for each, operation, dtype in product(LAYERS, OPERATIONS, DTYPES):
        yield Case(each, operation, 2, dtype)


def operands(case: Case) -> list[Host]:
    """Of -1, 0 and 1: their sums are exact in every type."""
    rng = np.random.default_rng(len(case.layer.name))
    names = case.definition.operands
    return [rng.integers(-1, 2, case.shapes[n]).astype(np.float32) for n in names]


def precision_for(case: Case, strategy: str) -> str | None:
    """The strictest precision in which a strategy runs a case; None if in none."""
    shapes = case.shapes["x"], case.shapes["w"]
    keywords: dict[str, Any] = {
        **case.options,
        "op": case.operation,
        "dtype": case.dtype,
        "device": "cuda",
        "strategy": strategy,
    }
    for precision in PRECISIONS:
        try:
            cuconv.plan_conv(*shapes, precision=precision, **keywords)
        except ValueError as error:
            if "cannot run" not in str(error):
                raise
            continue
        return precision
    return None


def result(device: CupyDevice, case: Case, arrays: list[Host], **options: Any) -> Host:
    """What the library says, on the host in float64."""
    first, second = (device.cast(device.put(array), case.dtype) for array in arrays)
    keywords = {**case.options, **options}
    if case.operation == "forward":
        found = cuconv.conv(first, second, **keywords)
    elif case.operation == "input_grad":
        found = cuconv.conv_input_grad(first, second, case.shapes["x"], **keywords)
    else:
        found = cuconv.conv_weight_grad(first, second, case.shapes["w"], **keywords)
    return device.take(device.cast(found, "float64"))


def mistakes() -> Iterator[tuple[str, str]]:
    """Each (strategy, operation) that ran, and what was wrong, if anything was."""
    device = cupy_device()
    for case in cases():
        arrays = operands(case)
        first, second = (array.astype(np.float64) for array in arrays)
        true = reference(case, first, second, np.zeros)
        for strategy, deterministic in product(strategies(), (True, False)):
            precision = precision_for(case, strategy)
            if precision is None:
                continue
            options = {"strategy": strategy, "deterministic": deterministic}
            got = result(device, case, arrays, precision=precision, **options)
            wrong = not np.array_equal(got, true)
            if wrong and precision != "strict":
                wrong = not norm_error(got, true) <= LARGEST_ERROR
            words = f"{case.layer.name} {case.dtype} {options}" if wrong else ""
            yield f"{strategy} {case.operation}", words


def general_mistakes() -> Iterator[tuple[str, str]]:
    """The same of general convolutions, on both devices."""
    device = cupy_device()
    rng = np.random.default_rng(0)
    for options in GENERAL:
        channels = 4 // options.get("groups", 1)
        x, w = (
            rng.integers(-1, 2, shape).astype(np.float32)
            for shape in ((4, 4, 9, 7), (6, channels, 3, 2))
        )
        y = cuconv.conv(x, w, precision="strict", **options)
        dy = rng.integers(-1, 2, y.shape).astype(np.float32)
        gradients = cuconv.conv_backward(dy, x, w, precision="strict", **options)
        on_device = [device.put(array) for array in (dy, x, w)]
        found = cuconv.conv(*on_device[1:], precision="strict", **options)
        others = cuconv.conv_backward(*on_device, precision="strict", **options)
        for operation, got, true in zip(
            OPERATIONS, (found, others.x, others.w), (y, *gradients[:2]), strict=True
        ):
            wrong = not np.array_equal(device.take(got), true)
            yield f"general {operation}", f"{options}" if wrong else ""


def main() -> None:
    if "--without-pool" in sys.argv:
        cupy_device().xp.cuda.set_allocator(None)
    counts: dict[str, int] = {}
    wrong = []
    for what, words in chain(mistakes(), general_mistakes()):
        counts[what] = counts.get(what, 0) + 1
        wrong += [f"{what}: {words}"] * bool(words)
    for what, count in counts.items():
        print(f"{what}: {count}")
    for line in wrong:
        print(f"wrong: {line}")
    print(f"{sum(counts.values())} checked, {len(wrong)} wrong")
    sys.exit(bool(wrong) or not counts)


if __name__ == "__main__":
    main()
