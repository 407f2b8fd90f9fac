"""Tables of a record: ratios, geometric means, and what went wrong."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.floors import floor
from benchmarks.records import CaseRecord, Finding, Record

LEGEND = (
    "Milliseconds; in brackets the time of {subject} ÷ that of the peer: below 1, "
    "{subject} is faster."
)


@dataclass(frozen=True)
class Table:
    """Cells as text, the first column to the left; notes follow."""

    title: str
    header: list[str]
    rows: list[list[str]]
    summary: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> list[str]:
        marks = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [self.header, marks, *self.rows, *self.summary]
        return [f"| {' | '.join(line)} |" for line in lines]


def digits(number: float) -> str:
    """Three of them, without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def quotient(number: float) -> str:
    """Two decimals, or two digits where it is small."""
    return f"{number:.2f}" if number >= 0.1 else f"{number:.2g}"


def subject_of(record: Record) -> str:
    """The peer that the others are compared with: the first that is cuconv."""
    peers = list(record["peers"])
    return next((name for name in peers if name.split("@")[0] == "cuconv"), peers[0])


def others_of(record: Record) -> list[str]:
    """The peers that the subject is compared with.

    Not those on a GPU that are its own strategies by name: they have a table apart.
    """
    apart = strategies_of(record)
    return [
        name for name in record["peers"] if name not in (subject_of(record), *apart)
    ]


def strategies_of(record: Record) -> list[str]:
    """On a GPU, cuconv with a strategy of its own choice or by name."""
    if record["device"] != "cuda":
        return []
    own = (name for name in record["peers"] if name.startswith("cuconv@"))
    return [name for name in own if name != "cuconv@channels_last"]


def milliseconds(case: CaseRecord, peer: str) -> float | None:
    return case["findings"].get(peer, {}).get("milliseconds")


def ratio(case: CaseRecord, subject: str, peer: str) -> float | None:
    """Time of the subject ÷ time of the peer, where both were timed."""
    ours, theirs = milliseconds(case, subject), milliseconds(case, peer)
    return None if ours is None or theirs is None else ours / theirs


def ratios(cases: Iterable[CaseRecord], subject: str, peer: str) -> dict[str, float]:
    """By layer; layers that were not timed on both are left out."""
    found = {case["name"]: ratio(case, subject, peer) for case in cases}
    return {name: each for name, each in found.items() if each is not None}


def geometric_mean(values: Iterable[float]) -> float | None:
    each = list(values)
    return statistics.geometric_mean(each) if each else None


def rate(case: CaseRecord, peer: str) -> float | None:
    """GFLOP/s, two operations for each multiplication of the definition.

    GB/s of operands and result, each moved once, where it has none.
    """
    time = milliseconds(case, peer)
    done = 2 * case["multiplications"] or case.get("moved_bytes", 0)
    return None if time is None else 1e-6 * done / time


def multiplies(cases: Iterable[CaseRecord]) -> bool:
    return any(case["multiplications"] for case in cases)


def rate_unit(cases: Iterable[CaseRecord]) -> str:
    """Of `rate`."""
    return "GFLOP/s" if multiplies(cases) else "GB/s"


def cases_of(
    record: Record,
    operation: str,
    kind: str | None = None,
    arithmetic: str | None = None,
) -> list[CaseRecord]:
    return [
        case
        for case in record["cases"]
        if case["operation"] == operation
        and kind in (None, case["kind"])
        and arithmetic in (None, arithmetic_of(case))
    ]


def arithmetic_of(case: CaseRecord) -> str:
    return case.get("arithmetic", "float32")


def arithmetics_of(record: Record) -> list[str]:
    return list(dict.fromkeys(map(arithmetic_of, record["cases"])))


def parts_of(record: Record) -> list[tuple[str, str]]:
    """Each operation and arithmetic that was measured, in that order."""
    return list(
        dict.fromkeys(
            (case["operation"], arithmetic_of(case)) for case in record["cases"]
        )
    )


def kinds_of(record: Record) -> list[str | None]:
    """All layers; and each kind by itself where some are depthwise and some not."""
    kinds = list(dict.fromkeys(case["kind"] for case in record["cases"]))
    several = len(kinds) > 1 and "depthwise" in kinds
    return [None, *kinds] if several else [None]


def operations_of(record: Record) -> list[str]:
    return list(dict.fromkeys(case["operation"] for case in record["cases"]))


def layer_table(record: Record, operation: str, arithmetic: str | None = None) -> Table:
    subject, others = subject_of(record), others_of(record)
    cases = cases_of(record, operation, arithmetic=arithmetic)
    means = [mean_row(record, operation, kind, arithmetic) for kind in kinds_of(record)]
    floors = has_floors(record)
    peak = ["most memory, MiB", most_memory(cases, subject), *[""] * (1 + floors)]
    peak += [most_memory(cases, peer) for peer in others]
    return Table(
        title(record, operation, arithmetic),
        ["layer", subject, *["floor"] * floors, rate_unit(cases), *others],
        [layer_row(case, record, others) for case in cases],
        [*(means if others else []), peak],
        [*worst_notes(cases, subject, others), *trouble(cases, [subject, *others])],
    )


def title(record: Record, operation: str, arithmetic: str | None) -> str:
    words = [record["suite"], operation, *([arithmetic] if arithmetic else [])]
    return f"{', '.join(words)}, batch {record['batch']}"


def has_floors(record: Record) -> bool:
    """Whether the rates of every arithmetic were measured in the same run."""
    return "rates" in record["machine"]


def strategy_table(record: Record, operation: str, arithmetic: str) -> Table:
    """Each strategy of cuconv's by name; in brackets its time ÷ that of the choice."""
    subject, peers = subject_of(record), strategies_of(record)
    cases = cases_of(record, operation, arithmetic=arithmetic)
    tried = [
        peer
        for peer in peers
        if any(milliseconds(case, peer) is not None for case in cases)
    ]
    rows = [
        [
            case["name"],
            time_cell(case["findings"][subject]),
            case["findings"][subject].get("strategy") or "",
            *(compared_cell(case, peer, subject) for peer in tried),
        ]
        for case in cases
    ]
    return Table(
        f"Strategies: {title(record, operation, arithmetic)}",
        ["layer", subject, "chosen", *tried],
        rows,
        notes=trouble(cases, peers),
    )


def compared_cell(case: CaseRecord, peer: str, subject: str) -> str:
    compared = ratio(case, peer, subject)
    cell = time_cell(case["findings"][peer])
    return cell if compared is None else f"{cell} ({quotient(compared)})"


def floor_cell(case: CaseRecord, machine: dict[str, Any]) -> str:
    """The floor, and by which of the two bounds."""
    found = floor(case, machine)
    return "" if found is None else f"{digits(found.milliseconds)} {found.bound}"


def layer_row(case: CaseRecord, record: Record, others: Sequence[str]) -> list[str]:
    subject = subject_of(record)
    reached = rate(case, subject)
    cells = [case["name"], time_cell(case["findings"][subject])]
    cells += [floor_cell(case, record["machine"])] * has_floors(record)
    cells.append("" if reached is None else digits(reached))
    for peer in others:
        cell = time_cell(case["findings"][peer])
        compared = ratio(case, subject, peer)
        cells.append(cell if compared is None else f"{cell} ({quotient(compared)})")
    return cells


def time_cell(finding: Finding) -> str:
    time = finding.get("milliseconds")
    return finding["status"] if time is None else digits(time)


def mean_row(
    record: Record, operation: str, kind: str | None, arithmetic: str | None
) -> list[str]:
    subject = subject_of(record)
    cases = cases_of(record, operation, kind, arithmetic)
    cells = [f"geometric mean{', ' + kind if kind else ''}", "", ""]
    cells += [""] * has_floors(record)
    found = (ratios(cases, subject, peer) for peer in others_of(record))
    means = (mean_cell(each, len(cases)) for each in found)
    return cells + [f"({mean})" if mean else "" for mean in means]


def mean_cell(found: dict[str, float], layers: int) -> str:
    """The geometric mean, and of how many layers if not of all."""
    mean = geometric_mean(found.values())
    if mean is None:
        return ""
    some = "" if len(found) == layers else f" of {len(found)}"
    return f"{quotient(mean)}{some}"


def most_memory(cases: Sequence[CaseRecord], peer: str) -> str:
    """The largest peak beyond inputs and result, over the layers."""
    found = (case["findings"][peer].get("extra_bytes") for case in cases)
    known = [nbytes for nbytes in found if nbytes is not None]
    return digits(max(known) / 2**20) if known else ""


def worst_notes(
    cases: Sequence[CaseRecord], subject: str, others: Sequence[str]
) -> list[str]:
    notes = []
    for peer in others:
        found = ratios(cases, subject, peer)
        if found:
            layer = max(found, key=found.__getitem__)
            notes.append(
                f"{subject} ÷ {peer}: at most {quotient(found[layer])}, on {layer}"
            )
    return notes


def trouble(cases: Sequence[CaseRecord], peers: Sequence[str]) -> list[str]:
    """Every peer that was not timed, with the layers and the reason."""
    layers: dict[tuple[str, str, str], list[str]] = {}
    for peer in peers:
        for case in cases:
            finding = case["findings"][peer]
            if finding["status"] != "ok":
                key = peer, finding["status"], finding["reason"]
                layers.setdefault(key, []).append(case["name"])
    return [
        f"{peer} {status}{where(names, cases)}: {reason}"
        for (peer, status, reason), names in layers.items()
    ]


def where(names: Sequence[str], cases: Sequence[CaseRecord]) -> str:
    return "" if len(names) == len(cases) else f" on {', '.join(names)}"


def machine_line(record: Record) -> str:
    """What a figure needs to mean anything."""
    machine, versions = record["machine"], versions_of(record)
    place = machine.get("gpu", f"{machine['cpu']}, {machine['cores']} cores")
    commit = record["commit"] + (" with changes" if record["dirty"] else "")
    return (
        f"{place}; {', '.join(f'{k} {v}' for k, v in versions.items())}; "
        f"{', '.join(arithmetics_of(record)) or 'float32'}; {record['date']}, "
        f"commit {commit}"
    )


def ceiling_line(record: Record) -> str:
    """The rates that were measured in the same run."""
    machine = record["machine"]
    if "copy_gbytes" not in machine:
        return "The rates of this machine were not measured"
    rates = machine.get("rates") or {"": machine["gemm_gflops"]}
    words = (f"{digits(rate)} GFLOP/s {name}".strip() for name, rate in rates.items())
    return (
        f"Large matrix products reach {', '.join(words)} and "
        f"copies {digits(machine['copy_gbytes'])} GB/s"
    )


def versions_of(record: Record) -> dict[str, str]:
    """Of all peers; where two differ in one, that of the first."""
    found: dict[str, str] = {}
    for peer in reversed(list(record["peers"].values())):
        found |= peer.get("versions", {})
    order = ("cuconv", "python", "numpy", "blas", "torch", "cudnn", "cupy", "scipy")
    return {name: found[name] for name in order if name in found}


def small_call_text(found: dict[str, float]) -> str:
    call, ranges = digits(found["call_microseconds"]), found["ranges_microseconds"]
    prepared = found.get("prepared_microseconds")
    plan = "" if prepared is None else f", with a prepared plan {digits(prepared)} µs"
    return (
        f"A call on (1, 3, 8, 8) with 8 filters of 3×3, padding 1, takes {call} µs"
        f"{plan}; {ranges:.1f} µs of it are NVTX ranges that nobody listens to. "
        f"`import cuconv` takes {digits(found['import_milliseconds'])} ms beyond "
        "NumPy's."
    )
