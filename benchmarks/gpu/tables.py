"""Tables of a run on a GPU, and the targets: computed from what the run has kept."""

from collections.abc import Iterable, Sequence
from itertools import product
from statistics import geometric_mean
from typing import Any, NamedTuple

from benchmarks.gpu.scale import ARITHMETICS
from benchmarks.gpu.steps import Outcome, join
from benchmarks.records import Record
from benchmarks.report import Cell, Table, cases_of, quotient, ratios

# Lines about a step that failed; the JSON has more.
MOST_NOTES = 10
TESTED = ("tests", "failures", "errors", "skipped")
TOLD = (*TESTED, "checked", "wrong", "cases", "unmeasured")
GATHERED = ("layer", "type", "order", "÷ copy")
TARGETS = ("target", "first", "then", "reached", "of", "")

Rows = Sequence[dict[str, Any]]


def findings_of(run: dict[str, Any]) -> dict[str, Any]:
    """What all steps of a run found, in one object."""
    found: dict[str, Any] = {}
    for one in run["steps"].values():
        join(found, one["found"])
    return found


def tables(run: dict[str, Any], found: Iterable[Record]) -> list[Table]:
    """Every table that has a row, the targets last."""
    suites = {record["suite"]: record for record in found}
    parts = findings_of(run)
    gathered = [[*key, quotient(n)] for key, n in gather_shares(parts).items()]
    reached = targets(suites.get("resnet50"), parts)
    made = [
        steps_table(run["steps"]),
        rates_table(parts),
        memory_table([*suites.values()]),
        Table("im2col: bandwidth ÷ that of a copy", GATHERED, gathered),
        col2im_table(parts.get("col2im", [])),
        blocks_table(parts.get("blocks", [])),
        launch_table(parts.get("launch", [])),
        Table("Targets, geometric means", TARGETS, [one.row() for one in reached]),
    ]
    return [table for table in made if table.rows]


def steps_table(steps: dict[str, Outcome]) -> Table:
    """How each step ended, with the numbers of a check.

    What did not end well has the tests that failed, or the end of its output, as notes.
    """
    rows, notes = [], []
    for name, one in steps.items():
        found = one["found"]
        told = (f"{found[n]} {n}" for n in TOLD if isinstance(found.get(n), int))
        ended = [one["status"], one["seconds"], one["limit"]]
        rows.append([name, *ended, ", ".join(told)])
        if "reason" in one:
            failed = [each for each in found.get("failed", []) if each["tail"]]
            words = [f"{each['name']}: {each['tail'][-1]}" for each in failed]
            words += found.get("mistakes", [])
            tail = [line for line in one.get("tail", []) if line.strip()]
            words = [one["reason"], *(words or tail[-MOST_NOTES:])[:MOST_NOTES]]
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


def gather_shares(found: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """Of a copy's bandwidth, by layer, type and order."""
    copy, shares = found.get("copy_gbytes"), {}
    for row in found.get("gather", []) if copy else []:
        share = 1e-6 * row["nbytes"] / row["milliseconds"] / copy
        shares[row["layer"], row["type"], row["order"]] = share
    return shares


def col2im_table(found: Rows) -> Table:
    rows = []
    for row in found:
        gather, scatter = row["gather_milliseconds"], row["scatter_milliseconds"]
        times = [gather, scatter, quotient(scatter / gather)]
        rows.append([row["layer"], row["type"], *times])
    header = ["layer", "type", "gather, ms", "scatter, ms", "scatter ÷ gather"]
    return Table("col2im: atomic additions against sums in order", header, rows)


def blocks_table(found: Rows) -> Table:
    sizes = list(dict.fromkeys(row["mib"] for row in found))
    times: dict[tuple[str, str], dict[int, float]] = {}
    for row in found:
        own = times.setdefault((row["layer"], row["type"]), {})
        own[row["mib"]] = row["milliseconds"]
    rows = [[*key, *map(each.get, sizes)] for key, each in times.items()]
    header = ["layer", "type", *(f"{mib} MiB" for mib in sizes)]
    return Table("im2col: milliseconds by the size of its blocks", header, rows)


def launch_table(found: Rows) -> Table:
    names = [f"{name}_microseconds" for name in ("eager", "captured", "kernel")]
    rows = [
        [row["layer"], row["strategy"], *map(row.get, names)]
        for row in found
        if "refused" not in row
    ]
    notes = [
        f"{row['layer']}, {row['strategy']} was not captured: {row['not_captured']}"
        for row in found
        if "not_captured" in row
    ]
    header = ["layer, N = 1", "strategy", "eager", "captured", "kernels"]
    return Table("Small calls, microseconds", header, rows, (), notes)


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


def targets(record: Record | None, found: dict[str, Any]) -> list[Target]:
    """All of them, from ResNet-50's record and the findings of the probes."""
    made = []

    def mean(
        name: str, first: float, then: float, each: Iterable[float], **more: Any
    ) -> None:
        values = list(each)
        reached = geometric_mean(values) if values else None
        made.append(Target(name, first, then, reached, len(values), **more))

    def compared(ours: str, theirs: str, *part: str) -> Iterable[float]:
        return ratios(cases_of(record, *part) if record else [], ours, theirs).values()

    for part in product(("forward", "input_grad", "weight_grad"), ARITHMETICS):
        first, then = (1.25, 1.0) if part[0] == "forward" else (1.4, 1.1)
        first = 1.0 if part == ("forward", "float32") else first
        name = f"{' '.join(part)}, cuconv ÷ cudnn"
        mean(name, first, then, compared("cuconv", "cudnn", *part))
    whole = compared("cupy_im2col", "cuconv", "forward", "float32")
    mean("forward float32, whole buffer ÷ cuconv", 3.0, 3.0, whole, at_least=True)
    mean("gather ÷ copy", 0.85, 0.85, gather_shares(found).values(), at_least=True)
    beyond = [
        row["captured_microseconds"] - row["kernel_microseconds"]
        for row in found.get("launch", [])
        if row["strategy"] == "auto" and "captured_microseconds" in row
    ]
    worst, name = max(beyond, default=None), "captured small call - kernels, µs"
    return [*made, Target(name, 2.0, 2.0, worst, len(beyond))]
