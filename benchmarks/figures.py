"""Draw what was measured: ``python -m benchmarks.figures``.

From the JSON under ``results/`` it draws PNG files beside it, and writes the tables of
README.md and docs/benchmarks.md.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks import pages, records, report
from benchmarks.gpu import tables
from benchmarks.machine import ROOT
from benchmarks.records import RESULTS, CaseRecord, Record

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
# Draws cases on a panel, each at the place of its name.
Plot = Callable[[Any, list[CaseRecord], dict[str, int]], None]


def look(peer: str, place: int) -> dict[str, Any]:
    colour, marker = LOOKS.get(peer, OTHERS[place % len(OTHERS)])
    return {"color": colour, "marker": marker, "ms": 5, "label": peer}


def logarithmic(panel: Any, axes: str) -> None:
    """With ticks at 1, 2 and 5 that read as numbers."""
    for axis in axes:
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


# Layers and networks.


def draw_panels(record: Record, label: str, plot: Plot) -> Any:
    """A column of panels for each operation, and a row for each arithmetic.

    The names of the cases are along the vertical axis.
    """
    operations = report.values_of(record, "operation")
    rows = report.values_of(record, "arithmetic")
    places = {name: at for at, name in enumerate(report.values_of(record, "name"))}
    size = (4 * len(operations) + 2, (1.3 + 0.24 * len(places)) * len(rows))
    grid = {"sharex": True, "sharey": True, "squeeze": False, "figsize": size}
    figure, panels = subplots(len(rows), len(operations), **grid)
    parts = zip(panels.flat, product(rows, operations), strict=True)
    for panel, (arithmetic, operation) in parts:
        plot(panel, report.cases_of(record, operation, arithmetic), places)
        several = f", {arithmetic}" if len(rows) > 1 else ""
        panel.set(title=f"{operation}{several}", xlabel=label)
        logarithmic(panel, "x")
        panel.set_yticks(range(len(places)), places)
    panels[0][0].set_ylim(len(places) - 0.5, -0.5)
    return finished(figure, panels[0][0])


def draw_layers(
    record: Record, value: Value, label: str, ceilings: dict[str, float], best: str
) -> Any:
    """A dot for each layer and peer, and a line for each ceiling."""
    shown = [report.subject_of(record), *report.others_of(record)]
    peers = [peer for peer in record["peers"] if peer in shown]

    def plot(panel: Any, cases: list[CaseRecord], places: dict[str, int]) -> None:
        for place, peer in enumerate(peers):
            found = {c["name"]: n for c in cases if (n := value(c, peer))}
            at = [places[name] for name in found]
            panel.plot(found.values(), at, ls="", **look(peer, place))
        if ceiling := ceilings.get(cases[0]["arithmetic"]):
            panel.axvline(ceiling, color="0.4", ls="--", label=best)

    return draw_panels(record, label, plot)


def draw_times(record: Record) -> Any:
    return draw_layers(record, report.milliseconds, "milliseconds", {}, "")


def draw_rates(record: Record) -> Any:
    unit = report.rate_unit(record["cases"])
    return draw_layers(record, report.rate, unit, *ceilings_of(record))


def ceilings_of(record: Record) -> tuple[dict[str, float], str]:
    """The rates that no case exceeds by much, by arithmetic, and what reaches them."""
    machine = record["machine"]
    if report.rate_unit(record["cases"]) == "GB/s":
        types = report.values_of(record, "arithmetic")
        return dict.fromkeys(types, machine.get("copy_gbytes")), "copy"
    own = {"float32": machine["gemm_gflops"]} if "gemm_gflops" in machine else {}
    return {**own, **machine.get("rates", {})}, "large matrix product"


def draw_networks(record: Record) -> Any:
    """Time of cuconv ÷ time of the next peer: passes, first passes and layers."""
    subject = report.subject_of(record)
    peer = next(iter(report.others_of(record)), subject)

    def plot(panel: Any, cases: list[CaseRecord], places: dict[str, int]) -> None:
        for case in cases:
            ours, theirs = (report.layers_of(case, name) for name in (subject, peer))
            each = [ours[name] / time for name, time in theirs.items() if ours]
            at = [places[case["name"]]] * len(each)
            panel.plot(each, at, ls="", marker="|", color="0.6")
        firsts = [*map(report.first_pass, cases)]
        passes = {"a pass": cases, "the first pass": firsts}
        for place, (label, timed) in enumerate(passes.items()):
            found = report.ratios(timed, subject, peer)
            at = [places[name] for name in found]
            panel.plot(found.values(), at, ls="", **look(label, place))
        panel.axvline(1, color="0.4", ls="--")

    return draw_panels(record, f"time of {subject} ÷ time of {peer}", plot)


# Lines.


def draw_lines(panel: Any, points: Iterable[tuple[str, float, float]]) -> None:
    """A line for each name of points, on logarithmic axes."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, x, y in points:
        lines.setdefault(name, []).append((x, y))
    for place, (name, each) in enumerate(lines.items()):
        panel.plot(*zip(*each, strict=True), **look(name, place))
    logarithmic(panel, "xy")


# What each sweep varies, with its value and the line that it belongs to.
SWEEPS: dict[str, tuple[str, Callable[[CaseRecord, str], tuple[str, float]]]] = {
    "sweep_memory": ("memory_limit, MiB", lambda case, peer: (case["name"], mib(peer))),
    "sweep_size": ("image size", lambda case, peer: (peer, case["layer"]["size"][0])),
    "sweep_kernel": ("kernel size", lambda case, p: (p, case["layer"]["kernel"][0])),
}


def mib(peer: str) -> float:
    """The memory limit of a peer; none is no point of a line."""
    return float(peer.partition("@")[2].removesuffix("MiB") or "nan")


def draw_sweep(record: Record) -> Any:
    """Time and measured peak memory against what is varied."""
    label, place_of = SWEEPS[record["suite"]]
    operations = report.values_of(record, "operation")
    grid = {"sharex": True, "sharey": "row", "squeeze": False, "figsize": (11, 6)}
    figure, panels = subplots(2, len(operations), **grid)
    units = {"milliseconds": ("milliseconds", 1.0)}
    units["peak memory, MiB"] = ("extra_bytes", 2.0**20)
    for row, (quantity, (name, unit)) in zip(panels, units.items(), strict=True):
        for panel, operation in zip(row, operations, strict=True):
            pairs = product(report.cases_of(record, operation), record["peers"])
            draw_lines(
                panel,
                (
                    (*place_of(case, peer), value / unit)
                    for case, peer in pairs
                    if (value := case["findings"][peer].get(name))
                ),
            )
            panel.set(title=operation, xlabel=label, ylabel=quantity)
    return finished(figure, panels[0][0])


def draw_blocks(rows: Sequence[dict[str, Any]]) -> Any:
    """Time of im2col against the size of its blocks."""
    figure, panel = subplots(figsize=(6, 4))
    points = ((f"{r['layer']} {r['type']}", r["mib"], r["milliseconds"]) for r in rows)
    draw_lines(panel, points)
    panel.set(xlabel="columns in a block, MiB", ylabel="milliseconds")
    return finished(figure, panel)


def drawers_of(record: Record) -> list[Callable[[Record], Any]]:
    """One for each of `pages.images_of`."""
    if report.has_networks(record):
        return [draw_networks]
    return [draw_sweep] if record["suite"] in SWEEPS else [draw_times, draw_rates]


def draw(record: Record, folder: Path = RESULTS) -> list[Path]:
    """The pictures that the pages show of a record."""
    pairs = zip(drawers_of(record), pages.images_of(record), strict=True)
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
