"""Draw what was measured: ``python -m benchmarks.figures``.

From the JSON under ``results/`` it draws PNG files beside it, and writes the tables of
README.md and docs/benchmarks.md.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from math import nan, prod
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks import pages, records, report
from benchmarks.gpu import tables
from benchmarks.machine import ROOT
from benchmarks.records import RESULTS, CaseRecord, Record
from benchmarks.suites import LIMITS

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

subplots: Any = plt.subplots

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
    return {"color": colour, "marker": marker, "ms": 5}


def logarithmic(panel: Any, axis: str) -> None:
    """With ticks at 1, 2 and 5 that read as numbers."""
    getattr(panel, f"set_{axis}scale")("log")
    ruler = getattr(panel, f"{axis}axis")
    ruler.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ruler.set_major_formatter("{x:g}")
    ruler.set_minor_formatter(NullFormatter())


def powers_of_two(panel: Any, ticks: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, ticks)


def finished(figure: Any, panel: Any) -> Any:
    """One legend for all panels, above them."""
    handles, labels = panel.get_legend_handles_labels()
    columns = max(1, min(len(labels), 5))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)
    return figure


# Layers.


def draw_layers(
    record: Record, value: Value, label: str, ceilings: dict[str, float], best: str
) -> Any:
    """A dot for each layer and peer, and a line for each ceiling.

    A column of panels for each operation, and a row for each arithmetic.
    """
    operations = report.values_of(record, "operation")
    rows = report.values_of(record, "arithmetic")
    names = report.values_of(record, "name")
    shown = [report.subject_of(record), *report.others_of(record)]
    size = (4 * len(operations) + 2, (1.3 + 0.24 * len(names)) * len(rows))
    grid = {"sharex": True, "sharey": True, "squeeze": False, "figsize": size}
    figure, panels = subplots(len(rows), len(operations), **grid)
    places = zip(panels.flat, product(rows, operations), strict=True)
    for panel, (arithmetic, operation) in places:
        cases = report.cases_of(record, operation, arithmetic)
        for place, peer in enumerate(p for p in record["peers"] if p in shown):
            found = {c["name"]: n for c in cases if (n := value(c, peer))}
            at = [names.index(name) for name in found]
            panel.plot(found.values(), at, ls="", label=peer, **look(peer, place))
        if ceiling := ceilings.get(arithmetic):
            panel.axvline(ceiling, color="0.4", ls="--", label=best)
        several = f", {arithmetic}" if len(rows) > 1 else ""
        panel.set(title=f"{operation}{several}", xlabel=label)
        logarithmic(panel, "x")
        panel.set_yticks(range(len(names)), names)
    panels[0][0].set_ylim(len(names) - 0.5, -0.5)
    return finished(figure, panels[0][0])


def draw_times(record: Record) -> Any:
    return draw_layers(record, report.milliseconds, "milliseconds", {}, "")


def draw_rates(record: Record) -> Any:
    unit = report.rate_unit(record["cases"])
    return draw_layers(record, report.rate, unit, *ceilings_of(record))


def draw_networks(record: Record) -> Any:
    """Time of cuconv ÷ time of the next peer: passes, first passes and layers."""
    subject, peer = report.subject_of(record), report.others_of(record)[0]
    operations = report.values_of(record, "operation")
    names = report.values_of(record, "name")
    grid = {"sharex": True, "sharey": True, "squeeze": False}
    size = (4 * len(operations) + 2, 1.3 + 0.3 * len(names))
    figure, panels = subplots(1, len(operations), figsize=size, **grid)
    passes = {"a pass": record, "the first pass": report.first_passes(record)}
    for panel, operation in zip(panels[0], operations, strict=True):
        for case in report.cases_of(record, operation):
            ours, theirs = (report.layers_of(case, each) for each in (subject, peer))
            each = [ours[name] / time for name, time in theirs.items() if ours]
            panel.plot(each, [names.index(case["name"])] * len(each), "|", color="0.6")
        for place, (label, own) in enumerate(passes.items()):
            found = report.ratios(report.cases_of(own, operation), subject, peer)
            at = [names.index(name) for name in found]
            marks = {"ls": "", "label": label, **look("", place)}
            panel.plot(found.values(), at, **marks)
        panel.axvline(1, color="0.4", ls="--")
        panel.set(title=operation, xlabel=f"time of {subject} ÷ time of {peer}")
        logarithmic(panel, "x")
        panel.set_yticks(range(len(names)), names)
    panels[0][0].set_ylim(len(names) - 0.5, -0.5)
    return finished(figure, panels[0][0])


def ceilings_of(record: Record) -> tuple[dict[str, float], str]:
    """The rates that no case exceeds by much, by arithmetic, and what reaches them."""
    machine = record["machine"]
    if report.rate_unit(record["cases"]) == "GB/s":
        types = report.values_of(record, "arithmetic")
        return dict.fromkeys(types, machine.get("copy_gbytes")), "copy"
    own = {"float32": machine["gemm_gflops"]} if "gemm_gflops" in machine else {}
    return {**own, **machine.get("rates", {})}, "large matrix product"


# Sweeps.


def draw_memory(record: Record) -> Any:
    """Time and measured peak memory against the memory limit, a line for each layer."""
    operations = report.values_of(record, "operation")
    limits = [int(name.removeprefix("cuconv@").removesuffix("MiB")) for name in LIMITS]
    units = {"milliseconds": ("milliseconds", 1)}
    units["peak memory, MiB"] = ("extra_bytes", 2**20)
    grid = {"sharex": True, "sharey": "row", "squeeze": False, "figsize": (11, 6)}
    figure, panels = subplots(2, len(operations), **grid)
    for row, (label, (name, unit)) in zip(panels, units.items(), strict=True):
        row[0].set_ylabel(label)
        for panel, operation in zip(row, operations, strict=True):
            for place, case in enumerate(report.cases_of(record, operation)):
                found = [case["findings"].get(peer, {}).get(name) for peer in LIMITS]
                values = [(each or nan) / unit for each in found]
                panel.plot(limits, values, label=case["name"], **look("", place))
            powers_of_two(panel, limits)
            logarithmic(panel, "y")
    for upper, lower, operation in zip(*panels, operations, strict=True):
        upper.set_title(operation)
        lower.set_xlabel("memory_limit, MiB")
        lower.plot(limits, limits, color="0.4", ls="--", label="the limit")
    return finished(figure, panels[1][0])


def draw_lines(
    lines: Mapping[str, dict[int, float]], powers: Sequence[int] = (), **labels: Any
) -> Any:
    """A line for each name, over powers of two or on a logarithmic axis."""
    figure, panel = plt.subplots(figsize=(6, 4))
    for place, (name, values) in enumerate(lines.items()):
        panel.plot([*values], [*values.values()], label=name, **look(name, place))
    panel.set(**labels)
    if powers:
        powers_of_two(panel, powers)
    else:
        logarithmic(panel, "y")
    return finished(figure, panel)


def draw_size(record: Record) -> Any:
    """How many times as fast as loops, against the image size."""
    lines: dict[str, dict[int, float]] = {}
    for case in record["cases"]:
        own = lines.setdefault(case["operation"], {})
        faster = report.ratio(case, "naive", "cuconv")
        own[case["layer"]["size"][0]] = faster or nan
    ylabel = "time of loops ÷ time of cuconv"
    return draw_lines(lines, xlabel="image size", ylabel=ylabel)


def draw_kernel(record: Record) -> Any:
    """Peak memory beyond inputs and result, in units of the input."""
    lines: dict[str, dict[int, float]] = {peer: {} for peer in record["peers"]}
    ticks = []
    for case in report.cases_of(record, "forward"):
        layer = case["layer"]
        ticks.append(layer["kernel"][0])
        nbytes = 4 * case["batch"] * layer["channels"] * prod(layer["size"])
        for peer, finding in case["findings"].items():
            if extra := finding.get("extra_bytes"):
                lines[peer][ticks[-1]] = extra / nbytes
    ylabel = "peak memory ÷ input"
    return draw_lines(lines, xlabel="kernel size", ylabel=ylabel, xticks=ticks)


def draw_blocks(rows: Sequence[dict[str, Any]]) -> Any:
    """Time of im2col ÷ the best, against the size of its blocks."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        own = lines.setdefault(f"{row['layer']} {row['type']}", {})
        own[row["mib"]] = row["milliseconds"]
    for name, own in lines.items():
        lines[name] = {mib: each / min(own.values()) for mib, each in own.items()}
    sizes = sorted({row["mib"] for row in rows})
    xlabel, ylabel = "columns in a block, MiB", "time ÷ the least"
    return draw_lines(lines, sizes, xlabel=xlabel, ylabel=ylabel)


# Of the records that have one picture.
DRAWERS = {
    "networks": [draw_networks],
    "networks_batch8": [draw_networks],
    "sweep_memory": [draw_memory],
    "sweep_size": [draw_size],
    "sweep_kernel": [draw_kernel],
}


def draw(record: Record, folder: Path = RESULTS) -> list[Path]:
    """The pictures that the pages show of a record."""
    drawers = DRAWERS.get(record["suite"], [draw_times, draw_rates])
    pairs = zip(drawers, pages.images_of(record), strict=True)
    return [saved(drawer, record, folder / name) for drawer, name in pairs]


def draw_gpu(
    run: dict[str, Any], suites: Iterable[Record], folder: Path = RESULTS
) -> list[Path]:
    """The pictures of a run on a GPU."""
    drawn = [path for each in suites if each["cases"] for path in draw(each, folder)]
    if rows := tables.findings_of(run).get("blocks"):
        drawn.append(saved(draw_blocks, rows, folder / pages.GPU_IMAGE))
    return drawn


def saved(drawer: Callable[[Any], Any], found: Any, path: Path) -> Path:
    with plt.rc_context(STYLE):
        figure = drawer(found)
        figure.savefig(path)
        plt.close(figure)
    return path


def main() -> None:
    run = records.read(records.GPU)
    drawn = [path for record in records.read_suites() for path in draw(record)]
    drawn += draw_gpu(run, ()) if run else ()
    for path, text in pages.pages().items():
        path.write_text(text, encoding="utf-8")
        drawn.append(path)
    for path in drawn:
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
