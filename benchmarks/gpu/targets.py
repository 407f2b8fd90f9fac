"""What is to be reached on a GPU, and what was: computed from what a run has kept."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks import report
from benchmarks.gpu.scale import ARITHMETICS
from benchmarks.records import CaseRecord, Record
from benchmarks.report import Table, quotient


class Target(NamedTuple):
    """A quantity with the value to reach first, and then; ``reached`` None: unknown.

    ``of`` counts what it was computed from.
    """

    name: str
    first: float
    then: float
    reached: float | None
    of: int
    at_least: bool = False

    def is_met(self, wanted: float) -> bool:
        if self.reached is None:
            return False
        return self.reached >= wanted if self.at_least else self.reached <= wanted

    def row(self) -> list[str]:
        sign = "≥" if self.at_least else "≤"
        wanted = [f"{sign} {self.first:g}"]
        wanted += [f"{sign} {self.then:g}"] if self.then != self.first else [""]
        reached = "not measured" if self.reached is None else quotient(self.reached)
        return [self.name, *wanted, reached, str(self.of), self.verdict()]

    def verdict(self) -> str:
        if self.reached is None:
            return ""
        if self.is_met(self.then):
            return "reached"
        return "the first is" if self.is_met(self.first) else "missed"


def targets(record: Record | None, found: dict[str, Any]) -> list[Target]:
    """All of them, from ResNet-50's record and the findings of the probes."""
    rows = [
        against_cudnn(record, operation, arithmetic)
        for operation in ("forward", "input_grad", "weight_grad")
        for arithmetic in ARITHMETICS
    ]
    return [*rows, whole_buffer(record), gathering(found), capturing(found)]


def against_cudnn(record: Record | None, operation: str, arithmetic: str) -> Target:
    """Time of cuconv ÷ time of cuDNN, both channels first."""
    if operation != "forward":
        first, then = 1.4, 1.1
    else:
        first, then = (1.0 if arithmetic == "float32" else 1.25), 1.0
    cases = chosen(record, operation, arithmetic)
    name = f"{operation} {arithmetic}, cuconv ÷ cudnn"
    return mean_target(name, (first, then), ratios(cases, "cuconv", "cudnn"))


def whole_buffer(record: Record | None) -> Target:
    cases = chosen(record, "forward", "float32")
    name = "forward float32, whole buffer ÷ cuconv"
    found = ratios(cases, "cupy_im2col", "cuconv")
    return mean_target(name, (3.0, 3.0), found, at_least=True)


def gathering(found: dict[str, Any]) -> Target:
    """Bandwidth of im2col ÷ that of a copy within the device."""
    return mean_target(
        "gather ÷ copy", (0.85, 0.85), gather_shares(found).values(), at_least=True
    )


def capturing(found: dict[str, Any]) -> Target:
    """Microseconds of a captured small call beyond its kernels' own."""
    beyond = [
        row["captured_microseconds"] - row["kernel_microseconds"]
        for row in found.get("launch", [])
        if row["strategy"] == "auto" and "captured_microseconds" in row
    ]
    reached = max(beyond, default=None)
    return Target("captured small call - kernels, µs", 2.0, 2.0, reached, len(beyond))


def mean_target(
    name: str,
    wanted: tuple[float, float],
    found: Iterable[float],
    *,
    at_least: bool = False,
) -> Target:
    each = list(found)
    return Target(
        name, *wanted, report.geometric_mean(each), len(each), at_least=at_least
    )


def chosen(
    record: Record | None, operation: str, arithmetic: str
) -> Sequence[CaseRecord]:
    if record is None:
        return []
    return report.cases_of(record, operation, arithmetic=arithmetic)


def ratios(cases: Sequence[CaseRecord], ours: str, theirs: str) -> Iterable[float]:
    return report.ratios(cases, ours, theirs).values()


def gather_shares(found: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """Of a copy's bandwidth, by layer, type and order."""
    copy = found.get("copy_gbytes")
    rows = found.get("gather", []) if copy else []
    return {
        (row["layer"], row["type"], row["order"]): 1e-6
        * row["nbytes"]
        / row["milliseconds"]
        / copy
        for row in rows
    }


def table(each: Sequence[Target]) -> Table:
    header = ["target", "first", "then", "reached", "of", ""]
    return Table("Targets, geometric means", header, [one.row() for one in each])
