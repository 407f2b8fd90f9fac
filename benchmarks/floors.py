"""What no implementation of the definition gets below: arithmetic, or bytes moved."""

from typing import Any, NamedTuple

from benchmarks.cases import Case
from benchmarks.records import CaseRecord


class Floor(NamedTuple):
    """The larger of two times, and which of them it is."""

    milliseconds: float
    bound: str


def floor(case: CaseRecord, machine: dict[str, Any]) -> Floor | None:
    """Products at the rate of large matrix products, and bytes at that of a copy.

    Both rates were measured in the same run; None where one of them was not.  Winograd
    needs fewer products, and may get below the first.
    """
    this = Case.from_json(dict(case))
    rate = machine.get("rates", {}).get(this.arithmetic)
    copy = machine.get("copy_gbytes")
    if not rate or not copy:
        return None
    return floor_of(2 * case["multiplications"], this.nbytes, rate, copy)


def floor_of(operations: int, nbytes: int, gflops: float, gbytes: float) -> Floor:
    arithmetic, memory = 1e-6 * operations / gflops, 1e-6 * nbytes / gbytes
    if arithmetic > memory:
        return Floor(arithmetic, "arithmetic")
    return Floor(memory, "memory")
