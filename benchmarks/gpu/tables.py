"""Tables of a run on a GPU, for the terminal and for the documentation."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu import targets
from benchmarks.gpu.findings import join
from benchmarks.gpu.steps import Outcome
from benchmarks.records import Record
from benchmarks.report import Table, digits, quotient

# Lines about a step that failed; the JSON has more.
MOST_NOTES = 10

Run = dict[str, Any]
Rows = Sequence[dict[str, Any]]


def findings_of(run: Run) -> dict[str, Any]:
    """What all steps of a run found, in one object."""
    found: dict[str, Any] = {}
    for one in run["steps"].values():
        join(found, one["found"])
    return found


def tables(run: Run, found: Iterable[Record]) -> list[Table]:
    """Every table that has a row, the targets last."""
    suites = {record["suite"]: record for record in found}
    parts = findings_of(run)
    made = [
        steps_table(run["steps"]),
        rates_table(parts),
        memory_table([*suites.values()]),
        gather_table(parts),
        col2im_table(parts.get("col2im", [])),
        blocks_table(parts.get("blocks", [])),
        launch_table(parts.get("launch", [])),
        targets.table(targets.targets(suites.get("resnet50"), parts)),
    ]
    return [table for table in made if table.rows]


def steps_table(steps: dict[str, Outcome]) -> Table:
    rows = [
        [name, one["status"], digits(one["seconds"]), digits(one["limit"]), told(one)]
        for name, one in steps.items()
    ]
    notes = [note for name, one in steps.items() for note in trouble(name, one)]
    return Table(
        "Steps", ["step", "ended", "s", "limit, s", "found"], rows, notes=notes
    )


def trouble(name: str, one: Outcome) -> list[str]:
    """Why a step did not end well: the tests that failed, or the end of its output."""
    if "reason" not in one:
        return []
    failed = one["found"].get("failed", [])
    words = [f"{each['name']}: {each['tail'][-1]}" for each in failed if each["tail"]]
    words += one["found"].get("mistakes", [])
    words = (
        words or [line for line in one.get("tail", []) if line.strip()][-MOST_NOTES:]
    )
    notes = [one["reason"], *words[:MOST_NOTES]]
    return [f"{name}: {note}" for note in notes]


def told(one: Outcome) -> str:
    """The numbers of a check."""
    tested = ("tests", "failures", "errors", "skipped")
    names = (*tested, "checked", "wrong", "cases", "unmeasured")
    found = one["found"]
    return ", ".join(f"{found[n]} {n}" for n in names if isinstance(found.get(n), int))


def rates_table(found: dict[str, Any]) -> Table:
    rows = [
        [f"matrix products, {name}", digits(rate / 1e3), "TFLOP/s"]
        for name, rate in found.get("rates", {}).items()
    ]
    if "copy_gbytes" in found:
        copied = digits(found["copy_gbytes"])
        rows.append(["copy within the device, read and written", copied, "GB/s"])
    return Table(found.get("gpu", "Machine"), ["", "measured", ""], rows)


def memory_table(found: Sequence[Record]) -> Table:
    """What each way of cuconv's took at most, and how often more than its plan said."""
    most: dict[str, list[tuple[int, int]]] = {}
    for record in found:
        for case in record["cases"]:
            for peer, finding in case["findings"].items():
                taken, promised = (
                    finding.get("extra_bytes"),
                    finding.get("promised_bytes"),
                )
                if taken is not None and promised is not None:
                    most.setdefault(peer, []).append((taken, promised))
    rows = [
        [
            peer,
            str(len(pairs)),
            *(digits(max(each) / 2**20) for each in zip(*pairs, strict=True)),
            str(sum(taken > promised for taken, promised in pairs)),
        ]
        for peer, pairs in most.items()
    ]
    header = ["memory", "cases", "taken, MiB", "promised, MiB", "broken promises"]
    return Table("Memory beyond inputs and result, at most", header, rows)


def gather_table(found: dict[str, Any]) -> Table:
    shares = targets.gather_shares(found)
    rows = [[*key, quotient(share)] for key, share in shares.items()]
    header = ["layer", "type", "order", "÷ copy"]
    return Table("im2col: bandwidth ÷ that of a copy", header, rows)


def col2im_table(found: Rows) -> Table:
    rows = [
        [
            row["layer"],
            row["type"],
            digits(row["gather_milliseconds"]),
            digits(row["scatter_milliseconds"]),
            quotient(row["scatter_milliseconds"] / row["gather_milliseconds"]),
        ]
        for row in found
    ]
    header = ["layer", "type", "gather, ms", "scatter, ms", "scatter ÷ gather"]
    return Table("col2im: atomic additions against sums in order", header, rows)


def blocks_table(found: Rows) -> Table:
    sizes = list(dict.fromkeys(row["mib"] for row in found))
    times: dict[tuple[str, str], dict[int, float]] = {}
    for row in found:
        key = row["layer"], row["type"]
        times.setdefault(key, {})[row["mib"]] = row["milliseconds"]
    rows = [
        [*key, *(digits(each[mib]) if mib in each else "" for mib in sizes)]
        for key, each in times.items()
    ]
    header = ["layer", "type", *(f"{mib} MiB" for mib in sizes)]
    return Table("im2col: milliseconds by the size of its blocks", header, rows)


def launch_table(found: Rows) -> Table:
    names = [f"{name}_microseconds" for name in ("eager", "captured", "kernel")]
    rows = [
        [
            row["layer"],
            row["strategy"],
            *(digits(row[name]) if name in row else "" for name in names),
        ]
        for row in found
        if "refused" not in row
    ]
    notes = [
        f"{row['layer']}, {row['strategy']} was not captured: {row['not_captured']}"
        for row in found
        if "not_captured" in row
    ]
    header = ["layer, N = 1", "strategy", "eager", "captured", "kernels"]
    return Table("Small calls, microseconds", header, rows, notes=notes)
