"""Draw what was measured: ``python -m benchmarks.figures``.

From the JSON under ``results/`` it draws PNG files beside it, and writes the tables of
README.md and docs/benchmarks.md.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks import pages, records, report
from benchmarks.gpu import tables
from benchmarks.records import RESULTS, CaseRecord, Record
from benchmarks.suites import LIMITS

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's colours, which the colour-blind tell apart; shapes differ too.
LOOKS = {
    "cuconv": ("#0072B2", "o"),
    "torch": ("#D55E00", "s"),
    "cudnn": ("#D55E00", "s"),
    "cudnn@channels_last": ("#E69F00", "P"),
    "cuconv@channels_last": ("#56B4E9", "X"),
    "im2col_rows": ("#009E73", "^"),
    "im2col_columns": ("#CC79A7", "v"),
    "cupy_im2col": ("#CC79A7", "v"),
    "scipy": ("#56B4E9", "D"),
    "naive": ("#000000", "x"),
}
OTHERS = (("#E69F00", "P"), ("#56B4E9", "X"), ("#000000", "*"), ("#F0E442", "h"))
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "font.size": 9,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}

Value = Callable[[CaseRecord, str], float | None]


def look(peer: str, place: int) -> dict[str, Any]:
    colour, marker = LOOKS.get(peer, OTHERS[place % len(OTHERS)])
    return {"color": colour, "marker": marker}


def points(
    cases: Sequence[CaseRecord], peer: str, value: Value
) -> tuple[list[int], list[float]]:
    """The places of the cases in which a peer has a value, and the values."""
    found = [(i, n) for i, case in enumerate(cases) if (n := value(case, peer))]
    return [i for i, _ in found], [n for _, n in found]


def draw_layers(
    record: Record,
    value: Value,
    label: str,
    ceilings: dict[str, float],
    reached_by: str = "",
) -> Any:
    """A dot for each layer and peer, and a line for each ceiling.

    A column of panels for each operation, and a row for each arithmetic.
    """
    operations, rows = report.operations_of(record), report.arithmetics_of(record)
    names = list(dict.fromkeys(case["name"] for case in record["cases"]))
    size = (4 * len(operations) + 2, (1.3 + 0.24 * len(names)) * len(rows))
    figure, panels = plt.subplots(
        len(rows),
        len(operations),
        sharey=True,
        sharex=True,
        squeeze=False,
        figsize=size,
    )
    for place, (arithmetic, operation) in enumerate(product(rows, operations)):
        panel = panels.flat[place]
        cases = report.cases_of(record, operation, arithmetic=arithmetic)
        draw_points(panel, record, cases, value, names)
        ceiling = ceilings.get(arithmetic)
        if ceiling is not None:
            panel.axvline(ceiling, color="0.4", ls="--", label=reached_by)
        several = f", {arithmetic}" if len(rows) > 1 else ""
        panel.set(title=f"{operation}{several}", xlabel=label)
        logarithmic(panel, "x")
        panel.set_yticks(range(len(names)), names)
    panels[0][0].set_ylim(len(names) - 0.5, -0.5)
    return finished(figure, panels[0][0])


def draw_points(
    panel: Any,
    record: Record,
    cases: Sequence[CaseRecord],
    value: Value,
    names: Sequence[str],
) -> None:
    """The values of the subject and of those it is compared with, by layer."""
    shown = [report.subject_of(record), *report.others_of(record)]
    for place, peer in enumerate(name for name in record["peers"] if name in shown):
        at, values = points(cases, peer, value)
        rows = [names.index(cases[i]["name"]) for i in at]
        panel.plot(values, rows, ls="", ms=5, label=peer, **look(peer, place))


def logarithmic(panel: Any, axis: str) -> None:
    """With ticks at 1, 2 and 5 that read as numbers."""
    getattr(panel, f"set_{axis}scale")("log")
    ruler = getattr(panel, f"{axis}axis")
    ruler.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ruler.set_major_formatter("{x:g}")
    ruler.set_minor_formatter(NullFormatter())


def finished(figure: Any, panel: Any) -> Any:
    """One legend for all panels, above them."""
    handles, labels = panel.get_legend_handles_labels()
    columns = max(1, min(len(labels), 5))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)
    return figure


def draw_times(record: Record) -> Any:
    return draw_layers(record, report.milliseconds, "milliseconds", {})


def draw_rates(record: Record) -> Any:
    unit = report.rate_unit(record["cases"])
    return draw_layers(record, report.rate, unit, *ceilings_of(record))


def ceilings_of(record: Record) -> tuple[dict[str, float], str]:
    """The rates that no case exceeds by much, by arithmetic, and what reaches them."""
    machine = record["machine"]
    if not report.multiplies(record["cases"]):
        copy = machine.get("copy_gbytes")
        rates = dict.fromkeys(report.arithmetics_of(record), copy) if copy else {}
        return rates, "copy"
    own = {"float32": machine["gemm_gflops"]} if "gemm_gflops" in machine else {}
    return {**own, **machine.get("rates", {})}, "large matrix product"


def extra_mib(case: CaseRecord, peer: str) -> float | None:
    nbytes = case["findings"][peer].get("extra_bytes")
    return None if nbytes is None else nbytes / 2**20


def draw_memory(record: Record) -> Any:
    """Time and measured peak memory against the memory limit, a line for each layer."""
    operations = report.operations_of(record)
    rows: list[tuple[str, Value]] = [
        ("milliseconds", report.milliseconds),
        ("peak memory, MiB", extra_mib),
    ]
    figure, panels = plt.subplots(
        2, len(operations), sharex=True, sharey="row", squeeze=False, figsize=(11, 6)
    )
    limits = [int(name.removeprefix("cuconv@").removesuffix("MiB")) for name in LIMITS]
    for row, (label, value) in zip(panels, rows, strict=True):
        row[0].set_ylabel(label)
        for panel, operation in zip(row, operations, strict=True):
            for place, case in enumerate(report.cases_of(record, operation)):
                values = [value(case, name) or float("nan") for name in LIMITS]
                style = look("", place)
                panel.plot(limits, values, ms=5, label=case["name"], **style)
            panel.set_xscale("log", base=2)
            panel.set_xticks(limits, limits)
            logarithmic(panel, "y")
    for panel, operation in zip(panels[0], operations, strict=True):
        panel.set_title(operation)
    for panel in panels[1]:
        panel.set_xlabel("memory_limit, MiB")
        panel.plot(limits, limits, color="0.4", ls="--", label="the limit")
    return finished(figure, panels[1][0])


def draw_size(record: Record) -> Any:
    """How many times as fast as loops, against the image size."""
    figure, panel = plt.subplots(figsize=(6, 4))
    for place, operation in enumerate(report.operations_of(record)):
        cases = report.cases_of(record, operation)
        faster = [
            report.ratio(case, "naive", "cuconv") or float("nan") for case in cases
        ]
        sizes = [case["layer"]["size"][0] for case in cases]
        panel.plot(sizes, faster, ms=5, label=operation, **look("", place))
    panel.set(xlabel="image size", ylabel="time of loops ÷ time of cuconv")
    logarithmic(panel, "y")
    return finished(figure, panel)


def draw_kernel(record: Record) -> Any:
    """Peak memory beyond inputs and result, in units of the input."""
    figure, panel = plt.subplots(figsize=(6, 4))
    cases = report.cases_of(record, "forward")
    sizes = [case["layer"]["kernel"][0] for case in cases]
    for place, peer in enumerate(record["peers"]):
        at, values = points(cases, peer, expansion)
        panel.plot(
            [sizes[i] for i in at], values, ms=5, label=peer, **look(peer, place)
        )
    panel.set(xlabel="kernel size", ylabel="peak memory ÷ input", xticks=sizes)
    logarithmic(panel, "y")
    return finished(figure, panel)


def expansion(case: CaseRecord, peer: str) -> float | None:
    nbytes, layer = case["findings"][peer].get("extra_bytes"), case["layer"]
    cells = case["batch"] * layer["channels"] * prod(layer["size"])
    return None if nbytes is None else nbytes / (4 * cells)


SWEEPS = {
    "sweep_memory": draw_memory,
    "sweep_size": draw_size,
    "sweep_kernel": draw_kernel,
}


def draw(record: Record, folder: Path = RESULTS) -> list[Path]:
    """The pictures that the pages show of a record."""
    one = SWEEPS.get(record["suite"])
    drawers = [one] if one else [draw_times, draw_rates]
    pairs = zip(pages.images_of(record), drawers, strict=True)
    return [saved(partial(drawer, record), folder / name) for name, drawer in pairs]


def draw_blocks(rows: Sequence[dict[str, Any]]) -> Any:
    """Time of im2col ÷ the best, against the size of its blocks."""
    figure, panel = plt.subplots(figsize=(6, 4))
    names = list(dict.fromkeys((row["layer"], row["type"]) for row in rows))
    for place, name in enumerate(names):
        own = [row for row in rows if (row["layer"], row["type"]) == name]
        least = min(row["milliseconds"] for row in own)
        panel.plot(
            [row["mib"] for row in own],
            [row["milliseconds"] / least for row in own],
            ms=5,
            label=" ".join(name),
            **look("", place),
        )
    sizes = sorted({row["mib"] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, sizes)
    panel.set(xlabel="columns in a block, MiB", ylabel="time ÷ the least")
    return finished(figure, panel)


def draw_gpu(
    run: dict[str, Any], suites: Iterable[Record], folder: Path = RESULTS
) -> list[Path]:
    """The pictures of a run on a GPU."""
    drawn = [
        path for record in suites if record["cases"] for path in draw(record, folder)
    ]
    rows = tables.findings_of(run).get("blocks")
    if rows:
        drawn.append(saved(partial(draw_blocks, rows), folder / pages.GPU_IMAGE))
    return drawn


def saved(drawer: Callable[[], Any], path: Path) -> Path:
    with plt.rc_context(STYLE):
        figure = drawer()
        figure.savefig(path)
        plt.close(figure)
    return path


def main() -> None:
    run = records.read(records.GPU)
    drawn = [path for record in records.read_suites() for path in draw(record)]
    for path in [*drawn, *(draw_gpu(run, ()) if run else ())]:
        print(path.relative_to(pages.ROOT))
    for path, text in pages.pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(pages.ROOT))


if __name__ == "__main__":
    main()
