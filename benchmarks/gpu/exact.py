"""Every strategy on small integers, which must be equal.

``python -m benchmarks.gpu.exact``: few and small launches, as a memory checker wants
them, of every strategy that runs odd sizes, steps, groups and types on a GPU.
``--without-pool`` gives each array an allocation of its own, so that the checker sees
every access outside of it.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, product
from typing import Any

import ml_dtypes  # noqa: F401 - NumPy learns the name bfloat16
import numpy as np

import cuconv
from benchmarks.cases import Case, Host
from benchmarks.internals import PADDING_MODES, strategies
from benchmarks.layers import Layer, Sizes, layer
from benchmarks.peers import PRECISIONS
from benchmarks.peers.base import Call, RefusedError, Wishes, cupy_device
from benchmarks.peers.library import Library
from benchmarks.taps import Array, norm_error, reference

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


def ones(shape: Sizes) -> Host:
    """Of -1, 0 and 1, whose sums are exact in every type."""
    return np.random.default_rng(len(shape)).integers(-1, 2, shape).astype(np.float32)


def mistakes() -> Iterator[tuple[str, str]]:
    """Each strategy and operation that ran, and what was wrong, if anything was."""
    device = cupy_device()
    for each, operation, dtype in product(LAYERS, Layer.operations, DTYPES):
        case = Case(each, operation, 2, dtype)
        arrays = [ones(case.shapes[name]) for name in case.operand_names]
        true = reference(each, operation, [array.astype(float) for array in arrays])
        operands = [device.cast(device.put(array), dtype) for array in arrays]
        for strategy, deterministic in product(strategies(), (True, False)):
            precision, call = strictest(case, strategy, operands, deterministic)
            if call is None:
                continue
            got = device.take(device.cast(call(), "float64"))
            wrong = not np.array_equal(got, true)
            if wrong and precision != "strict":
                wrong = not norm_error(got, true) <= LARGEST_ERROR
            words = f"{each.name} {dtype} {strategy} {deterministic=}"
            yield f"{strategy} {operation}", words if wrong else ""


def strictest(
    case: Case, strategy: str, operands: list[Array], deterministic: object
) -> tuple[str, Call | None]:
    """The strictest precision in which a strategy runs a case, and the call."""
    for precision in PRECISIONS:
        peer = Library(Wishes("cuda", precision, strategy=strategy))
        with suppress(RefusedError):
            peer.plan(case)
            call = peer.call(case, *operands, deterministic=deterministic)
            return precision, call
    return "", None


def general_mistakes() -> Iterator[tuple[str, str]]:
    """The same of general convolutions, on both devices."""
    device = cupy_device()
    for options in GENERAL:
        keywords = {**options, "precision": "strict"}
        x, w = ones((4, 4, 9, 7)), ones((6, 4 // options.get("groups", 1), 3, 2))
        dy = ones(cuconv.conv(x, w, **keywords).shape)
        true, got = (
            (cuconv.conv(x, w, **keywords), *cuconv.conv_backward(dy, x, w, **keywords))
            for dy, x, w in ((dy, x, w), map(device.put, (dy, x, w)))
        )
        for operation, ours, theirs in zip(Layer.operations, got, true, strict=False):
            wrong = not np.array_equal(device.take(ours), theirs)
            yield f"general {operation}", f"{options}" if wrong else ""


def main() -> None:
    if "--without-pool" in sys.argv:
        cupy_device().xp.cuda.set_allocator(None)
    found = list(chain(mistakes(), general_mistakes()))
    for what, count in Counter(what for what, _ in found).items():
        print(f"{what}: {count}")
    wrong = [f"wrong: {what}: {words}" for what, words in found if words]
    for line in wrong:
        print(line)
    print(f"{len(found)} checked, {len(wrong)} wrong")
    sys.exit(bool(wrong) or not found)


if __name__ == "__main__":
    main()
