"""Tables of a run on a GPU, and the targets: computed from what the run has kept."""

from collections.abc import Iterable, Sequence
from itertools import product
from statistics import geometric_mean
from typing import Any, NamedTuple

from benchmarks.gpu.scale import ARITHMETICS
from benchmarks.gpu.steps import Outcome, join
from benchmarks.layers import Layer
from benchmarks.records import Record
from benchmarks.report import Cell, Table, cases_of, quotient, ratios

# Lines about a step that failed; the JSON has more.
MOST_NOTES = 10
# Numbers of a check, as its last line names them.
TOLD = [
    "passed",
    "failed",
    "skipped",
    "errors",
    "checked",
    "wrong",
    "cases",
    "unmeasured",
]
PROBES = {
    "gather": "im2col",
    "col2im": "col2im: atomic additions against sums in order",
    "blocks": "im2col by the size of its blocks",
    "launch": "Small calls",
}


def findings_of(run: dict[str, Any]) -> dict[str, Any]:
    """What all steps of a run found, in one object."""
    return join(one["found"] for one in run["steps"].values())


def tables(run: dict[str, Any], found: Iterable[Record]) -> list[Table]:
    """Every table that has a row, the targets last."""
    suites = {record["suite"]: record for record in found}
    parts = findings_of(run)
    reached = [one.row() for one in targets(suites.get("resnet50"), parts)]
    header = ["target", "first", "then", "reached", "of", ""]
    made = [
        steps_table(run["steps"]),
        rates_table(parts),
        memory_table([*suites.values()]),
        *(probe_table(title, parts.get(name, [])) for name, title in PROBES.items()),
        Table("Targets, geometric means", header, reached),
    ]
    return [table for table in made if table.rows]


def steps_table(steps: dict[str, Outcome]) -> Table:
    """How each step ended, with the numbers of a check.

    What did not end well has the mistakes, or the end of its output, as notes.
    """
    rows, notes = [], []
    for name, one in steps.items():
        found = one["found"]
        told = (f"{found[n]} {n}" for n in TOLD if isinstance(found.get(n), int))
        ended = [one["status"], one["seconds"], one["limit"]]
        rows.append([name, *ended, ", ".join(told)])
        if "reason" in one:
            tail = [line for line in one.get("tail", []) if line.strip()][-MOST_NOTES:]
            words = [one["reason"], *(found.get("mistakes") or tail)[:MOST_NOTES]]
            notes += [f"{name}: {each}" for each in words]
    return Table("Steps", ["step", "ended", "s", "limit, s", "found"], rows, (), notes)


def rates_table(found: dict[str, Any]) -> Table:
    rows = [
        [f"matrix products, {name}", rate / 1e3, "TFLOP/s"]
        for name, rate in found.get("rates", {}).items()
    ]
    if copied := found.get("copy_gbytes"):
        rows.append(["copy within the device, read and written", copied, "GB/s"])
    return Table(found.get("gpu", "Machine"), ["", "measured", ""], rows)


def memory_table(found: Sequence[Record]) -> Table:
    """What each way of cuconv's took at most, and how often more than its plan said."""
    most: dict[str, list[tuple[int, int]]] = {}
    for case in (case for record in found for case in record["cases"]):
        for peer, finding in case["findings"].items():
            pair = finding.get("extra_bytes"), finding.get("promised_bytes")
            if None not in pair:
                most.setdefault(peer, []).append(pair)
    rows = []
    for peer, pairs in most.items():
        peaks = [max(each) / 2**20 for each in zip(*pairs, strict=True)]
        broken = sum(taken > promised for taken, promised in pairs)
        rows.append([peer, len(pairs), *peaks, broken])
    header = ["memory", "cases", "taken, MiB", "promised, MiB", "broken promises"]
    return Table("Memory beyond inputs and result, at most", header, rows)


def probe_table(title: str, found: Sequence[dict[str, Any]]) -> Table:
    """What a probe found, as it found it: a column for each name."""
    names = list(dict.fromkeys(name for row in found for name in row))
    return Table(title, names, [[*map(row.get, names)] for row in found])


def gather_shares(found: dict[str, Any]) -> list[float]:
    """Of a copy's bandwidth, of each layer, type and order."""
    rows = found.get("gather", []) if "copy_gbytes" in found else []
    rates = (1e-6 * row["nbytes"] / row["milliseconds"] for row in rows)
    return [rate / found["copy_gbytes"] for rate in rates]


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

    def verdict(self) -> str:
        if self.reached is None:
            return ""
        sign = -1 if self.at_least else 1
        if sign * self.reached <= sign * self.then:
            return "reached"
        return "the first is" if sign * self.reached <= sign * self.first else "missed"

    def row(self) -> list[Cell]:
        sign = "≥" if self.at_least else "≤"
        then = f"{sign} {self.then:g}" if self.then != self.first else ""
        reached = "not measured" if self.reached is None else quotient(self.reached)
        wanted = [f"{sign} {self.first:g}", then]
        return [self.name, *wanted, reached, self.of, self.verdict()]


def mean_target(
    name: str, first: float, then: float, each: Iterable[float], **more: bool
) -> Target:
    values = [*each]
    reached = geometric_mean(values) if values else None
    return Target(name, first, then, reached, len(values), **more)


def targets(record: Record | None, found: dict[str, Any]) -> list[Target]:
    """All of them, from ResNet-50's record and the findings of the probes."""

    def compared(ours: str, theirs: str, *part: str) -> Iterable[float]:
        return ratios(cases_of(record, *part) if record else [], ours, theirs).values()

    made = []
    for operation, arithmetic in product(Layer.operations, ARITHMETICS):
        first, then = (1.25, 1.0) if operation == "forward" else (1.4, 1.1)
        part = operation, arithmetic
        first = 1.0 if part == ("forward", "float32") else first
        name, each = " ".join(part), compared("cuconv", "cudnn", *part)
        made.append(mean_target(f"{name}, cuconv ÷ cudnn", first, then, each))
    whole = compared("cupy_im2col", "cuconv", "forward", "float32")
    beyond = [
        row["captured_microseconds"] - row["kernel_microseconds"]
        for row in found.get("launch", [])
        if row["strategy"] == "auto" and "captured_microseconds" in row
    ]
    worst, name = max(beyond, default=None), "captured small call - kernels, µs"
    shares, most = gather_shares(found), {"at_least": True}
    return [
        *made,
        mean_target("forward float32, whole buffer ÷ cuconv", 3.0, 3.0, whole, **most),
        mean_target("gather ÷ copy", 0.85, 0.85, shares, **most),
        Target(name, 2.0, 2.0, worst, len(beyond)),
    ]
