"""Operands that are made on a device, and whole results that are checked there.

To draw hundreds of millions of random numbers on the host would take longer than all
that is to be measured; so a few millions are drawn once and laid out again and again.
Their number is a prime: no axis repeats them in step.
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np

from benchmarks.cases import RANDOM, Array, Case
from benchmarks.definitions import Host
from benchmarks.layers import Sizes
from benchmarks.taps import norm_error, reference

POOL = 4_000_037
# Inputs take turns until they are this many times what the L2 cache holds.
TIMES_CACHE = 2
MOST_SETS = 16

Judge = Callable[[Array], float]


class Maker(Protocol):
    """What a device offers to make operands with."""

    l2_bytes: int

    def __hash__(self) -> int: ...

    def put(self, array: Host) -> Array: ...

    def join(self, arrays: list[Array]) -> Array: ...

    def cast(self, array: Array, dtype: str) -> Array: ...

    def zeros(self, shape: Sizes) -> Array:
        """In float64."""


class Prepared(NamedTuple):
    """Sets of operands of a case, and who checks the result of the first."""

    sets: list[tuple[Array, ...]]
    judge: Judge


def sets_for(operand_bytes: int, l2_bytes: int) -> int:
    """How many sets of operands keep each other out of the cache."""
    wanted = -(-TIMES_CACHE * l2_bytes // max(operand_bytes, 1))
    return max(1, min(wanted, MOST_SETS))


# All peers of a process measure one case at a time, on the same operands.
@lru_cache(maxsize=1)
def prepared(device: Maker, case: Case) -> Prepared:
    names = case.definition.operands
    nbytes = sum(case.itemsize(name) * prod(case.shapes[name]) for name in names)
    sets = [
        tuple(operand(device, case, name, copy_transposed) for name in names)
        for copy_transposed in range(sets_for(nbytes, device.l2_bytes))
    ]
    first, second = (device.cast(array, "float64") for array in sets[0])
    true = reference(case, first, second, device.zeros)
    return Prepared(sets, partial(_error, device, true))


def _error(device: Maker, true: Array, result: Array) -> float:
    if tuple(result.shape) != tuple(true.shape):
        raise ValueError(f"the result is {result.shape}, not {true.shape}")
    return norm_error(device.cast(result, "float64"), true)


def operand(device: Maker, case: Case, name: str, copy_transposed: int) -> Array:
    """Standard normal numbers in the type of the case; weights are scaled."""
    shape = case.shapes[name]
    seed = 1 + 3 * copy_transposed + RANDOM.index(name)
    numbers = normal(device, prod(shape), seed).reshape(shape)
    if name == "w":
        numbers = numbers * float(case.layer.patch**-0.5)
    return device.cast(numbers, case.dtype)


def normal(device: Maker, count: int, seed: int = 0) -> Array:
    """So many standard normal float32 numbers, from a place that the seed chooses."""
    pool = _pool(device)
    start = seed * 999_983 % POOL
    pieces, wanted = [pool[start : start + count]], count - (POOL - start)
    while wanted > 0:
        pieces.append(pool[:wanted])
        wanted -= POOL
    return device.join(pieces)


@cache
def _pool(device: Maker) -> Array:
    numbers: Any = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32)
    return device.put(numbers)
