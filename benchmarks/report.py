"""Tables of a record: ratios, geometric means, and what went wrong."""

import importlib
from collections.abc import Iterable, Iterator, Sequence
from heapq import nlargest
from operator import itemgetter
from statistics import geometric_mean
from typing import Any, NamedTuple

from benchmarks.records import CaseRecord, Record

Cell = str | float | None

# So many layers of a network are shown: those on which most is lost.
MOST_LOST = 10


class Table(NamedTuple):
    """Cells as text, numbers or None; the first column to the left; notes follow."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    summary: Sequence[Sequence[Cell]] = ()
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        marks = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [self.header, marks, *self.rows, *self.summary]
        return "\n".join(f"| {' | '.join(map(text, line))} |" for line in lines)

    def section(self) -> str:
        """A title, the table and its notes."""
        notes = "\n".join(f"- {note}" for note in self.notes)
        parts = (f"### {self.title}", self.markdown(), notes)
        return "\n\n".join(filter(None, parts))

    def show(self) -> None:
        """Print it: by rich on a terminal where it is installed, else as Markdown."""
        try:
            console: Any = importlib.import_module("rich.console").Console()
            rendered = importlib.import_module("rich.markdown").Markdown(self.section())
        except ImportError:
            console = None
        if console is None or not console.is_terminal:
            print(f"{self.section()}\n")
        else:
            console.print(rendered)


def text(cell: Cell) -> str:
    """A number with three digits."""
    return (
        digits(cell) if isinstance(cell, float) else str("" if cell is None else cell)
    )


def digits(number: float) -> str:
    """Three of them, without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def quotient(number: float) -> str:
    """Two decimals, or two digits where it is small."""
    return f"{number:.2f}" if number >= 0.1 else f"{number:.2g}"


# What a record holds.


def subject_of(record: Record) -> str:
    """The peer that the others are compared with: the first that is cuconv."""
    peers: list[str] = list(record["peers"])
    own = (name for name in peers if name.partition("@")[0] == "cuconv")
    return next(own, peers[0])


def others_of(record: Record, *, strategies: bool = False) -> list[str]:
    """The peers that the subject is compared with.

    On a GPU, cuconv with a strategy by name has a table apart.
    """
    peers = [name for name in record["peers"] if name != subject_of(record)]
    apart = [
        name
        for name in peers
        if record["device"] == "cuda"
        and name.startswith("cuconv@")
        and name != "cuconv@channels_last"
    ]
    return apart if strategies else [name for name in peers if name not in apart]


def parts_of(record: Record) -> list[tuple[str, str | None]]:
    """Operation and arithmetic of each table; on a CPU all is float32."""
    if record["device"] == "cuda":
        return values_of(record, "operation", "arithmetic")
    return [(operation, None) for operation in values_of(record, "operation")]


def values_of(record: Record, *names: str) -> list[Any]:
    """What the cases have under a name, or under several, each once."""
    return list(dict.fromkeys(map(itemgetter(*names), record["cases"])))


def kinds_of(record: Record) -> list[str | None]:
    """All layers; and each kind by itself where some are depthwise and some not."""
    kinds = values_of(record, "kind")
    several = len(kinds) > 1 and "depthwise" in kinds
    return [None, *kinds] if several else [None]


def cases_of(
    record: Record,
    operation: str,
    arithmetic: str | None = None,
    kind: str | None = None,
) -> list[CaseRecord]:
    return [
        case
        for case in record["cases"]
        if case["operation"] == operation
        and arithmetic in (None, case["arithmetic"])
        and kind in (None, case["kind"])
    ]


def has_networks(record: Record) -> bool:
    return values_of(record, "kind") == ["network"]


# Numbers.


def milliseconds(case: CaseRecord, peer: str) -> float | None:
    found: float | None = case["findings"].get(peer, {}).get("milliseconds")
    return found


def ratio(case: CaseRecord, subject: str, peer: str) -> float | None:
    """Time of the subject ÷ time of the peer, where both were timed."""
    ours, theirs = milliseconds(case, subject), milliseconds(case, peer)
    return None if ours is None or theirs is None else ours / theirs


def ratios(cases: Iterable[CaseRecord], subject: str, peer: str) -> dict[str, float]:
    """By layer; layers that were not timed on both are left out."""
    found = {case["name"]: ratio(case, subject, peer) for case in cases}
    return {name: each for name, each in found.items() if each is not None}


def layers_of(case: CaseRecord, peer: str) -> dict[str, float]:
    """Milliseconds of the layers of a network, equal ones together."""
    found: dict[str, float] = {}
    times = case["findings"].get(peer, {}).get("layers", ())
    for name, time in zip(case["layers"], times, strict=False):
        found[name] = found.get(name, 0) + time
    return found


def mean_cell(cases: Sequence[CaseRecord], subject: str, peer: str) -> str:
    """The geometric mean of ratios, and of how many layers if not of all."""
    found = ratios(cases, subject, peer)
    if not found:
        return ""
    some = "" if len(found) == len(cases) else f" of {len(found)}"
    return quotient(geometric_mean(found.values())) + some


def rate_unit(cases: Iterable[CaseRecord]) -> str:
    """Of `rate`: products, or bytes where nothing is multiplied."""
    return "GFLOP/s" if any(case["multiplications"] for case in cases) else "GB/s"


def rate(case: CaseRecord, peer: str) -> float | None:
    """Two operations for each multiplication, or operands and result moved once."""
    time = milliseconds(case, peer)
    done = 2 * case["multiplications"] or case["moved_bytes"]
    return None if time is None else 1e-6 * done / time


def floor(case: CaseRecord, machine: dict[str, Any]) -> tuple[float, str] | None:
    """Milliseconds that no implementation of the definition gets below, and why.

    Products at the rate of large matrix products, or bytes at that of a copy, where
    both were measured.  Winograd needs fewer products, and may get below the first.
    """
    products = machine.get("rates", {}).get(case["arithmetic"])
    if not products or "copy_gbytes" not in machine:
        return None
    arithmetic = 2e-6 * case["multiplications"] / products
    memory = 1e-6 * case["moved_bytes"] / machine["copy_gbytes"]
    return max((arithmetic, "arithmetic"), (memory, "memory"))


# Tables.


def tables(record: Record) -> Iterator[Table]:
    """Every table of a record."""
    for part in parts_of(record):
        yield layer_table(record, *part)
        if part[1]:
            yield strategy_table(record, *part)
        if has_networks(record):
            name, cases = f"{record['suite']}, first pass", record["cases"]
            first = {**record, "suite": name, "cases": [*map(first_pass, cases)]}
            yield layer_table(first, part[0])
            yield from (lost_table(record, part[0], p) for p in others_of(record)[:1])


def first_pass(case: CaseRecord) -> CaseRecord:
    """The same case with the times of the first pass."""
    findings = {
        peer: {**finding, "milliseconds": finding.get("first_milliseconds")}
        for peer, finding in case["findings"].items()
    }
    return {**case, "findings": findings}


def lost_table(record: Record, operation: str, peer: str) -> Table:
    """The layers of each network that take longest beyond what they take the peer."""
    subject, rows = subject_of(record), []
    for case in cases_of(record, operation):
        ours, theirs = layers_of(case, subject), layers_of(case, peer)
        lost = {name: ours[name] - time for name, time in theirs.items() if ours}
        slower = [name for name, time in lost.items() if time > 0]
        for name in nlargest(MOST_LOST, slower, key=lost.__getitem__):
            compared = f"{digits(theirs[name])} ({quotient(ours[name] / theirs[name])})"
            count = case["layers"].count(name)
            times = [digits(ours[name]), compared, lost[name]]
            rows.append([f"{case['name']}, {name}", count, *times])
    header = ["layer", "times", subject, peer, "lost, ms"]
    return Table(f"{title(record, operation, None)}: most lost to {peer}", header, rows)


def layer_table(record: Record, operation: str, arithmetic: str | None = None) -> Table:
    """The layers of one operation, with the times of all peers."""
    subject, others = subject_of(record), others_of(record)
    cases, machine = cases_of(record, operation, arithmetic), record["machine"]
    # Where the rates of every arithmetic were measured in the same run.
    floors = [floor_cell] if "rates" in machine else []
    between = ["floor"] * len(floors) + [rate_unit(cases)]
    rows: list[list[Cell]] = []
    for case in cases:
        times = [time_cell(case, peer, ratio(case, subject, peer)) for peer in others]
        own = [time_cell(case, subject), *(each(case, machine) for each in floors)]
        rows.append([case["name"], *own, rate(case, subject), *times])
    blank = [""] * len(between)
    summary: list[list[Cell]] = []
    for kind in kinds_of(record) if others else []:
        part = cases_of(record, operation, arithmetic, kind)
        means = [mean_cell(part, subject, peer) for peer in others]
        brackets = [f"({mean})" if mean else "" for mean in means]
        name = f"geometric mean{f', {kind}' if kind else ''}"
        summary.append([name, "", *blank, *brackets])
    most, *peaks = (most_memory(cases, peer) for peer in (subject, *others))
    summary.append(["most memory, MiB", most, *blank, *peaks])
    notes = []
    for peer in others:
        if each := ratios(cases, subject, peer):
            layer = max(each, key=each.__getitem__)
            worst = f"{quotient(each[layer])}, on {layer}"
            notes.append(f"{subject} ÷ {peer}: at most {worst}")
    notes += trouble(cases, [subject, *others])
    header = ["layer", subject, *between, *others]
    return Table(title(record, operation, arithmetic), header, rows, summary, notes)


def floor_cell(case: CaseRecord, machine: dict[str, Any]) -> str:
    least = floor(case, machine)
    return f"{digits(least[0])} {least[1]}" if least else ""


def most_memory(cases: Iterable[CaseRecord], peer: str) -> float | None:
    """In MiB."""
    found = (case["findings"][peer].get("extra_bytes") for case in cases)
    return max((each / 2**20 for each in found if each is not None), default=None)


def strategy_table(record: Record, operation: str, arithmetic: str | None) -> Table:
    """Each strategy of cuconv's by name; in brackets its time ÷ that of the choice."""
    subject, peers = subject_of(record), others_of(record, strategies=True)
    cases = cases_of(record, operation, arithmetic)
    tried = [p for p in peers if any(milliseconds(c, p) is not None for c in cases)]
    rows = []
    for case in cases:
        chosen = case["findings"][subject].get("strategy")
        times = [time_cell(case, peer, ratio(case, peer, subject)) for peer in tried]
        rows.append([case["name"], time_cell(case, subject), chosen, *times])
    name = f"Strategies: {title(record, operation, arithmetic)}"
    header = ["layer", subject, "chosen", *tried]
    return Table(name, header, rows, notes=trouble(cases, peers))


def title(record: Record, operation: str, arithmetic: str | None) -> str:
    words = filter(None, (record["suite"], operation, arithmetic))
    return f"{', '.join(words)}, batch {record['batch']}"


def time_cell(case: CaseRecord, peer: str, compared: float | None = None) -> str:
    """The time, or why there is none; in brackets a ratio."""
    time = milliseconds(case, peer)
    cell = case["findings"][peer]["status"] if time is None else digits(time)
    return cell if compared is None else f"{cell} ({quotient(compared)})"


def trouble(cases: Sequence[CaseRecord], peers: Sequence[str]) -> list[str]:
    """Every peer that was not timed, with the layers and the reason."""
    layers: dict[tuple[str, str, str], list[str]] = {}
    for peer in peers:
        for case in cases:
            finding = case["findings"][peer]
            if finding["status"] != "ok":
                key = peer, finding["status"], finding["reason"]
                layers.setdefault(key, []).append(case["name"])
    notes = []
    for (peer, status, reason), names in layers.items():
        where = "" if len(names) == len(cases) else f" on {', '.join(names)}"
        notes.append(f"{peer} {status}{where}: {reason}")
    return notes


# Sentences.


def machine_line(record: Record) -> str:
    """Where, with what and when: what a figure needs to mean anything."""
    machine = record["machine"]
    place = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    # Of all peers; where two differ in one, that of the first.
    found: dict[str, str] = {}
    for peer in reversed(record["peers"].values()):
        found |= peer.get("versions", {})
    order = ("cuconv", "python", "numpy", "blas", "torch", "cudnn", "cupy", "scipy")
    versions = ", ".join(f"{name} {found[name]}" for name in order if name in found)
    types = ", ".join(values_of(record, "arithmetic")) or "float32"
    commit = record["commit"] + (" with changes" if record["dirty"] else "")
    return f"{place}; {versions}; {types}; {record['date']}, commit {commit}"


def ceiling_line(record: Record) -> str:
    """The rates that were measured in the same run."""
    machine = record["machine"]
    if "copy_gbytes" not in machine:
        return "The rates of this machine were not measured"
    rates = machine.get("rates") or {"": machine["gemm_gflops"]}
    words = (f"{digits(rate)} GFLOP/s {name}".strip() for name, rate in rates.items())
    copies = f"copies {digits(machine['copy_gbytes'])} GB/s"
    return f"Large matrix products reach {', '.join(words)} and {copies}"


def legend(record: Record) -> str:
    subject = subject_of(record)
    return (
        f"Milliseconds; in brackets the time of {subject} ÷ that of the peer: below 1, "
        f"{subject} is faster."
    )


def small_call_text(found: dict[str, float]) -> str:
    call, ranges = digits(found["call_microseconds"]), found["ranges_microseconds"]
    return (
        f"A call on (1, 3, 8, 8) with 8 filters of 3×3, padding 1, takes {call} µs, "
        f"with a prepared plan {digits(found['prepared_microseconds'])} µs; "
        f"{max(ranges, 0):.1f} µs of it are NVTX ranges without a profiler. "
        f"`import cuconv` takes {digits(found['import_milliseconds'])} ms beyond "
        "NumPy's."
    )
