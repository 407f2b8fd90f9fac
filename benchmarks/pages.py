"""The figures in README.md and docs/benchmarks.md, written between two marks."""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import records, report
from benchmarks.gpu import tables
from benchmarks.machine import ROOT
from benchmarks.records import RESULTS, Record

README = ROOT / "README.md"
DOCS = ROOT / "docs" / "benchmarks.md"
MARKS = ("<!-- figures -->", "<!-- end of figures -->")
NOTHING = "No results are kept yet: `python -m benchmarks --save` measures them."
GPU_IMAGE = "gpu-blocks.png"
NO_GPU = """**Nothing has been measured on a GPU yet**: the CUDA kernels are proven
right on the CPU and by compilation, not timed."""
# What README.md shows: a bank of filters, real networks, and one of them in a loop.
SHOWN = {
    "filters": ("torch", "oaconvolve", "ndimage", "im2col_columns"),
    "networks": ("torch", "onnxruntime"),
    "resnet50": ("torch", "cudnn"),
}
SHOWN_PEERS = {
    "torch": "PyTorch",
    "cudnn": "cuDNN",
    "onnxruntime": "ONNX Runtime",
    "oaconvolve": "`scipy.signal.oaconvolve`",
    "ndimage": "`scipy.ndimage.correlate`",
    "im2col_columns": "im2col by hand",
}
SUMMARY = ("layers", "operation", "compared with", "time of cuconv ÷ its time")
MEANS = """Time of cuconv ÷ time of a peer, geometric means over the layers of networks,
or over networks: below 1, cuconv is faster."""


def pages(folder: Path = RESULTS) -> dict[Path, str]:
    """Return the two pages as they should be."""
    found = records.read_suites(folder)
    small, run = records.read("small_call", folder), records.read(records.GPU, folder)
    closing = [paragraph(report.small_call_text(small))] if small else []
    docs = [*docs_parts(found), *(gpu_parts(run, found) if run else ())]
    on_cpu = bool(found) and all(record["device"] == "cpu" for record in found)
    blocks = {
        README: [*[paragraph(NO_GPU)] * on_cpu, *readme_parts(found), *closing],
        DOCS: [*docs, *["## Small calls"] * bool(small), *closing],
    }
    return {
        path: with_block(path.read_text("utf-8"), "\n\n".join(parts) or NOTHING)
        for path, parts in blocks.items()
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
    return str(record["suite"]).startswith("sweep_")


def images_of(record: Record) -> list[str]:
    has_one = is_sweep(record) or report.has_networks(record)
    tails = [""] if has_one else ["-times", "-rates"]
    return [f"{records.stem_of(record)}{tail}.png" for tail in tails]


def readme_parts(found: Sequence[Record]) -> Iterator[str]:
    """A few geometric means on each device, and where they come from."""
    for device in ("cpu", "cuda"):
        here = [r for r in found if r["device"] == device and r["suite"] in SHOWN]
        if here:
            rows = [row for record in here for row in summary_rows(record)]
            yield paragraph(MEANS)
            yield report.Table("", SUMMARY, rows).markdown()
            yield from (paragraph(f"{line}.") for line in origins(here))


def summary_rows(record: Record) -> Iterator[list[report.Cell]]:
    subject, peers = report.subject_of(record), SHOWN[record["suite"]]
    for part, peer in product(report.parts_of(record), peers):
        cases, words = report.cases_of(record, *part), " ".join(filter(None, part))
        if mean := report.mean_cell(cases, subject, peer):
            suite = f"{record['suite']}, N = {record['batch']}"
            yield [suite, words, SHOWN_PEERS[peer], mean]


def origins(here: Sequence[Record]) -> Iterator[str]:
    """Where records come from, in a line for all that differ in their commit alone."""
    commits: dict[str, dict[str, None]] = {}
    for record in here:
        place, _, commit = report.machine_line(record).rpartition(", commit ")
        commits.setdefault(place, {})[commit] = None
    for place, own in commits.items():
        yield f"{place}, {'commits' if len(own) > 1 else 'commit'} {', '.join(own)}"


def docs_parts(found: Sequence[Record]) -> Iterator[str]:
    for record in found:
        on_gpu = record["device"] == "cuda"
        yield f"## {record['suite']}{' on a GPU' if on_gpu else ''}"
        lines = (report.machine_line(record), report.ceiling_line(record))
        yield paragraph(" ".join(f"{line}." for line in lines))
        if not is_sweep(record):
            yield paragraph(report.legend(record))
            yield from (table.section() for table in report.tables(record))
        yield from map(image, images_of(record))


def gpu_parts(run: dict[str, Any], found: Sequence[Record]) -> Iterator[str]:
    """The checks and probes of a run on a GPU, and the targets."""
    yield "## Checks and probes on a GPU"
    for table in tables.tables(run, [r for r in found if r["device"] == "cuda"]):
        yield table.section()
    if "blocks" in tables.findings_of(run):
        yield image(GPU_IMAGE)


def image(name: str) -> str:
    """Return an image as `docs/benchmarks.md` shows it."""
    return f"![{Path(name).stem}](../benchmarks/results/{name})"
