"""The figures in README.md and docs/benchmarks.md, written between two marks."""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import records, report
from benchmarks.gpu import tables
from benchmarks.records import RESULTS, Record

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs" / "benchmarks.md"
MARKS = ("<!-- figures -->", "<!-- end of figures -->")
NOTHING = "No results are kept yet: `python -m benchmarks --save` measures them."
# As `docs/benchmarks.md` sees them.
IMAGES = "../benchmarks/results"
GPU_IMAGE = "gpu-blocks.png"


def pages(folder: Path = RESULTS) -> dict[Path, str]:
    """What the two pages should say."""
    found, small = records.read_suites(folder), records.read("small_call", folder)
    docs = docs_block(found, small, records.read(records.GPU, folder))
    blocks = {README: readme_block(found, small), DOCS: docs}
    return {
        path: with_block(path.read_text(encoding="utf-8"), block)
        for path, block in blocks.items()
    }


def with_block(text: str, block: str) -> str:
    before, start, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (start and end):
        raise ValueError(f"the page lacks the marks {MARKS[0]} and {MARKS[1]}")
    return f"{before}{start}\n\n{block}\n\n{end}{after}"


def paragraph(text: str) -> str:
    return textwrap.fill(text, 88, break_long_words=False, break_on_hyphens=False)


def is_sweep(record: Record) -> bool:
    return record["suite"].startswith("sweep_")


def images_of(record: Record) -> list[str]:
    stem = records.stem_of(record)
    if is_sweep(record):
        return [f"{stem}.png"]
    return [f"{stem}-times.png", f"{stem}-rates.png"]


def readme_block(found: Sequence[Record], small: dict[str, float] | None) -> str:
    suites = [record for record in found if not is_sweep(record)]
    parts = []
    for device in ("cpu", "cuda"):
        here = [record for record in suites if record["device"] == device]
        if here:
            parts += device_summary(here)
    if small:
        parts.append(paragraph(report.small_call_text(small)))
    if not parts:
        return NOTHING
    if all(record["device"] == "cpu" for record in found):
        parts.append("Nothing here has been measured on a GPU yet.")
    return "\n\n".join(parts)


def device_summary(here: Sequence[Record]) -> list[str]:
    """Geometric means of all suites on one device, and where they come from."""
    peers = dict.fromkeys(p for r in here for p in report.others_of(r))
    header = ["layers", "batch", "operation", *peers]
    rows = [row for record in here for row in summary_rows(record, list(peers))]
    return [
        paragraph(
            "Time of cuconv ÷ time of a peer, geometric means over the layers of "
            "networks: below 1, cuconv is faster."
        ),
        "\n".join(report.Table("", header, rows).markdown()),
        *(paragraph(f"{line}.") for line in origins(here)),
    ]


def origins(here: Sequence[Record]) -> Iterator[str]:
    """Where records come from, in a line for all that differ in their commit alone."""
    commits: dict[str, dict[str, None]] = {}
    for record in here:
        place, _, commit = report.machine_line(record).rpartition(", commit ")
        commits.setdefault(place, {})[commit] = None
    for place, own in commits.items():
        yield f"{place}, {'commits' if len(own) > 1 else 'commit'} {', '.join(own)}"


def summary_rows(record: Record, peers: Sequence[str]) -> list[list[str]]:
    subject, rows = report.subject_of(record), []
    for kind, part in product(report.kinds_of(record), report.parts_of(record)):
        operation, arithmetic = part
        name = f"{record['suite']}, {kind}" if kind else record["suite"]
        cases = report.cases_of(record, operation, kind, arithmetic)
        found = (report.ratios(cases, subject, peer) for peer in peers)
        means = [report.mean_cell(each, len(cases)) for each in found]
        words = operation if record["device"] == "cpu" else f"{operation} {arithmetic}"
        rows.append([name, str(record["batch"]), words, *means])
    return rows


def docs_block(
    found: Sequence[Record],
    small: dict[str, float] | None,
    run: dict[str, Any] | None = None,
) -> str:
    parts = [part for record in found for part in docs_section(record)]
    if run:
        parts += gpu_section(run, found)
    if small:
        parts += ["## Small calls", paragraph(report.small_call_text(small))]
    return "\n\n".join(parts) or NOTHING


def docs_section(record: Record) -> list[str]:
    where = " on a GPU" if record["device"] == "cuda" else ""
    lines = (report.machine_line(record), report.ceiling_line(record))
    parts = [
        f"## {record['suite']}{where}",
        paragraph(" ".join(f"{line}." for line in lines)),
    ]
    if not is_sweep(record):
        legend = report.LEGEND.format(subject=report.subject_of(record))
        parts.append(paragraph(legend))
        for table in layer_tables(record):
            parts += operation_parts(table)
    for image in images_of(record):
        parts.append(f"![{Path(image).stem}]({IMAGES}/{image})")
    return parts


def layer_tables(record: Record) -> list[report.Table]:
    """A table for each operation; on a GPU for each arithmetic, and its strategies."""
    if record["device"] == "cpu":
        operations = report.operations_of(record)
        return [report.layer_table(record, operation) for operation in operations]
    return [
        make(record, *part)
        for part in report.parts_of(record)
        for make in (report.layer_table, report.strategy_table)
    ]


def gpu_section(run: dict[str, Any], found: Sequence[Record]) -> list[str]:
    """The checks and probes of a run on a GPU, and the targets."""
    on_gpu = [record for record in found if record["device"] == "cuda"]
    parts = ["## Checks and probes on a GPU"]
    for table in tables.tables(run, on_gpu):
        parts += operation_parts(table)
    if "blocks" in tables.findings_of(run):
        parts.append(f"![{Path(GPU_IMAGE).stem}]({IMAGES}/{GPU_IMAGE})")
    return parts


def operation_parts(table: report.Table) -> list[str]:
    parts = [f"### {table.title}", "\n".join(table.markdown())]
    if table.notes:
        parts.append("\n".join(f"- {note}" for note in table.notes))
    return parts
