"""The figures of these pages, drawn when the pages are built.

Everything that they show is computed by cuconv: ``python docs/figures.py FOLDER`` draws
them alone.
"""

import inspect
import sys
import time
from itertools import pairwise
from pathlib import Path
from unittest import mock

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.datasets import load_sample_image

import cuconv
from cuconv import profiling
from cuconv.backends.cpu.backend import CpuBackend
from cuconv.dask.conv import DaskPlan
from cuconv.engine import call, lower
from cuconv.engine.plan import Plan
from cuconv.engine.planner import PlanningResult
from cuconv.engine.program import Program, Recording
from cuconv.engine.request import Request
from cuconv.geometry import WindowGeometry

sys.path.insert(0, str(Path(__file__).parent / "tutorials"))

import graph
import lazy
import loops
import offsets
import scatter

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "legend.frameon": False,
    # The same figure is the same file.
    "svg.hashsalt": "cuconv",
}
# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
CELL = {"edgecolor": "0.4", "linewidth": 0.8}
PACKAGE = Path(cuconv.__file__).parent


def draw_cells(panel, array, marks=(), title=""):
    """Draw a matrix element by element; ``marks`` are (row, column, colour) of some."""
    colours = {(row, column): colour for row, column, colour in marks}
    rows, columns = array.shape
    for (row, column), value in np.ndenumerate(array):
        face = colours.get((row, column), "white")
        corner = column, row
        panel.add_patch(Rectangle(corner, 1, 1, facecolor=face, alpha=0.6))
        panel.add_patch(Rectangle(corner, 1, 1, fill=False, **CELL))
        place = column + 0.5, row + 0.5
        panel.text(*place, f"{value:.0f}", ha="center", va="center", size=8)
    panel.set(xlim=(-0.1, columns + 0.1), ylim=(rows + 0.1, -0.1), aspect="equal")
    panel.set_title(title)
    panel.axis("off")


def window_marks(view, places):
    """The elements of each window, found by their values: all elements of x differ."""
    marked = {}
    for colour, place in zip(COLOURS, places, strict=False):
        for value in view[place].ravel():
            marked[int(value)] = colour
    return marked


def draw_columns(figure):
    """4 × 4 elements, patches of 2 × 2: x, and its columns in both orders."""
    x = np.arange(16.0).reshape(1, 1, 4, 4)
    view = cuconv.patches(x, 2)[0, 0]
    places = [(0, 0), (2, 2)]
    marked = window_marks(view, places)
    numbers = [row * view.shape[1] + column for row, column in places]
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 9))
    cells = [(v // 4, v % 4, colour) for v, colour in marked.items()]
    draw_cells(left, x[0, 0], cells, "x")
    rows = cuconv.im2col(x, 2, order="rows")
    pairs = list(zip(numbers, COLOURS, strict=False))
    in_rows = [(n, tap, colour) for n, colour in pairs for tap in range(rows.shape[1])]
    draw_cells(middle, rows, in_rows, 'order="rows"')
    columns = cuconv.im2col(x, 2, order="columns")
    in_columns = [(tap, n, colour) for n, tap, colour in in_rows]
    draw_cells(right, columns, in_columns, 'order="columns"')


def draw_product(figure):
    """6 × 6 elements, one filter of 3 × 3: filter times columns is the output."""
    x, w = np.arange(36.0).reshape(1, 1, 6, 6), np.arange(9.0).reshape(1, 1, 3, 3)
    y = cuconv.conv2d(x, w)
    columns = cuconv.im2col(x, 3, order="columns")
    panels = figure.subplot_mosaic(
        [["x", "w", "y"], ["row", "columns", "columns"]],
        width_ratios=(6, 6, 8),
        height_ratios=(6, 9),
    )
    marked = window_marks(cuconv.patches(x, 3)[0, 0], [(0, 0), (0, 1)])
    cells = [(v // 6, v % 6, colour) for v, colour in marked.items()]
    draw_cells(panels["x"], x[0, 0], cells, "x")
    draw_cells(panels["w"], w[0, 0], title="w")
    firsts = [(0, n, COLOURS[n]) for n in range(2)]
    draw_cells(panels["y"], y[0, 0], firsts, "y = conv2d(x, w)")
    draw_cells(panels["row"], w.reshape(1, 9), title="w as a row")
    taps = [(tap, n, COLOURS[n]) for n in range(2) for tap in range(9)]
    draw_cells(panels["columns"], columns, taps, "columns of x")


def draw_strides(figure):
    """The positions of two windows in the memory of a channels-last image."""
    x = np.arange(5 * 6 * 3.0).reshape(1, 5, 6, 3)
    view = cuconv.patches(x, 2, layout="NHWC")[0]
    marks = [
        (int(value) // 18, int(value) % 18, colour)
        for colour, place in zip(COLOURS, [(0, 0), (2, 3)], strict=False)
        for value in view[(slice(None), *place)].ravel()
    ]
    panel = figure.subplots()
    title = "memory of (1, 5, 6, 3), a line for each row, and two windows of 2 × 2 × 3"
    draw_cells(panel, x.reshape(5, 18), marks, title)


def draw_tiles(figure):
    """Windows that do not overlap: a view of 2 × 2 tiles."""
    x = np.arange(36.0).reshape(1, 1, 6, 6)
    view = cuconv.patches(x, 2, stride=2)[0, 0]
    left, right = figure.subplots(1, 2)
    marks = [
        (int(v) // 6, int(v) % 6, COLOURS[(row + 2 * column) % len(COLOURS)])
        for row, column in np.ndindex(view.shape[:2])
        for v in view[row, column].ravel()
    ]
    draw_cells(left, x[0, 0], marks, "x")
    pooled = cuconv.max_pool2d(x, 2)[0, 0]
    each = [(r, c, COLOURS[(r + 2 * c) % len(COLOURS)]) for r, c in np.ndindex(3, 3)]
    draw_cells(right, pooled, each, "the largest of each tile")


def draw_overlaps(figure):
    """The number of 3 × 3 windows over each element."""
    shape = (1, 1, 8, 8)
    ones = cuconv.im2col(np.ones(shape), 3)
    counts = cuconv.col2im(ones, shape, 3)[0, 0]
    panel = figure.subplots()
    panel.imshow(counts, cmap="Blues", vmin=0, vmax=12)
    for (row, column), count in np.ndenumerate(counts):
        panel.text(column, row, f"{count:.0f}", ha="center", va="center")
    panel.set(xticks=[], yticks=[], title="col2im(im2col(ones))")


def plans_by_limit(limits, strategy):
    """The plans of one large layer, under each limit that does."""
    shapes, options = ((32, 64, 56, 56), (64, 64, 3, 3)), {"padding": 1}
    plans = {}
    for limit in limits:
        options.update(strategy=strategy, memory_limit=limit)
        try:
            plans[limit] = cuconv.plan_conv(*shapes, **options)
        except cuconv.MemoryLimitError:
            continue
    return plans


def draw_limits(figure):
    """Workspace and number of blocks against the limit, by strategy."""
    limits = [2**power for power in range(18, 31)]
    whole = WindowGeometry.of((32, 64, 56, 56), (3, 3), padding=1).column_bytes(4)
    left, right = figure.subplots(1, 2)
    strategies = {"im2col": "o", "tap_matmul": "s", "winograd": "^"}
    for strategy, marker in strategies.items():
        plans = plans_by_limit(limits, strategy)
        held = [plan.workspace_bytes for plan in plans.values()]
        blocks = [plan.chunks for plan in plans.values()]
        left.loglog(list(plans), held, marker + "-", base=2, label=strategy, alpha=0.8)
        right.loglog(
            list(plans), blocks, marker + "-", base=2, label=strategy, alpha=0.8
        )
    left.loglog(limits, limits, "--", color="0.5", base=2, label="the limit")
    left.axhline(whole, color="#D55E00", label=f"all columns: {whole:,}")
    left.set(title="workspace", xlabel="memory_limit, bytes", ylabel="bytes")
    right.set(title="blocks", xlabel="memory_limit, bytes")
    left.legend()
    right.legend()


class Timeline:
    """An NVTX domain that records what a profiler would show."""

    def __init__(self):
        self.ranges, self._open = [], []

    def push_range(self, *, message, payload):
        self._open.append((message, payload, time.perf_counter()))

    def pop_range(self):
        message, payload, start = self._open.pop()
        row = len(self._open)
        self.ranges.append((message, payload, start, time.perf_counter(), row))


def draw_timeline(figure):
    """The ranges of one call that has to work block by block, as they were recorded."""
    x = np.ones((4, 16, 32, 32), dtype=np.float32)
    w = np.ones((16, 16, 3, 3), dtype=np.float32)
    options = {"padding": 1, "strategy": "im2col", "memory_limit": "512 KiB"}
    timeline = Timeline()
    listening = mock.patch.object(profiling, "domain", timeline)
    with listening, cuconv.config(num_threads=1):
        cuconv.conv2d(x, w, **options)
        timeline.ranges.clear()
        cuconv.conv2d(x, w, **options)
    begin = min(start for _, _, start, _, _ in timeline.ranges)
    words = list(dict.fromkeys(message for message, *_ in timeline.ranges))
    panel = figure.subplots()
    for message, _, start, stop, row in timeline.ranges:
        spans = [((start - begin) * 1e3, (stop - start) * 1e3)]
        colour = COLOURS[words.index(message) % len(COLOURS)]
        panel.broken_barh(spans, (row, 0.9), facecolor=colour, edgecolor="white")
    for place, word in enumerate(words):
        panel.plot([], [], "s", color=COLOURS[place % len(COLOURS)], label=word)
    panel.set(xlabel="milliseconds", yticks=[], title="one call, block after block")
    panel.legend(ncols=len(words), loc="upper center", bbox_to_anchor=(0.5, -0.3))


# The boxes of the road of a call: title, text, object, column and row.  The file in a
# box is that of the object, so that the build fails if an object is removed.
ROAD = {
    "call": ("conv2d(x, w, padding=1)", "public function", cuconv.conv2d, 0, 2),
    "key": ("key", "shapes, strides, types,\noptions, settings", call.run, 1, 2),
    "cache": ("plan cache", "one for all calls", call.run, 2, 2),
    "run": ("Plan.run", "allocates the result", Plan.run, 3, 2),
    "execute": ("Backend.execute", "views, workspace,\nthreads", CpuBackend, 4, 2),
    "steps": ("steps", "copies, matrix products,\nkernels", None, 5, 2),
    "dask": ("DaskPlan", "a graph of blocks", DaskPlan, 1, 0),
    "request": ("Request", "checked arrays,\nconvolution geometry", Request, 1, 1),
    "lower": ("lower", "rewrites to\nbasic convolutions", lower.lower, 2, 1),
    "decide": (
        "planner",
        "strategy and tiles\nwithin the limit",
        PlanningResult,
        3,
        1,
    ),
    "record": ("strategy", "its steps, recorded", Recording, 4, 1),
    "program": ("Program", "steps and views", Program, 5, 1),
}
ALWAYS = ("call", "key", "cache", "run", "execute", "steps")
FIRST = ("request", "lower", "decide", "record", "program")


def draw_road(figure):
    """The road of one call: every time above, the first time below."""
    panel = figure.subplots()
    panel.set(xlim=(-0.5, 5.5), ylim=(-0.35, 2.6))
    panel.axis("off")
    places = {name: (column, row) for name, (*_, column, row) in ROAD.items()}
    for name, (title, text, item, *place) in ROAD.items():
        colour = COLOURS[0 if name in ALWAYS else 1 if name in FIRST else 2]
        draw_box(panel, place, colour, title, text, item)
    for way, row in ((ALWAYS, 2), (FIRST, 1)):
        for start, stop in pairwise(way):
            ends = (places[stop][0] - 0.43, row), (places[start][0] + 0.43, row)
            draw_arrow(panel, *ends)
    draw_arrow(panel, (1.1, 1.33), (1.9, 1.67), "new key")
    draw_arrow(panel, (4.1, 1.67), (4.9, 1.33), "kept by the plan")
    draw_arrow(panel, (1, 0.33), (1, 0.67), "Dask arrays")
    panel.text(-0.43, 2.45, "every call", weight="bold")
    panel.text(-0.43, 1.0, "the first call\nwith a key", weight="bold", va="center")


def draw_box(panel, place, colour, title, text, item):
    """A box with a title, a line of text, and the file of the object in it."""
    column, row = place
    corner = column - 0.42, row - 0.32
    panel.add_patch(Rectangle(corner, 0.84, 0.64, facecolor=colour, alpha=0.35))
    panel.add_patch(Rectangle(corner, 0.84, 0.64, fill=False, **CELL))
    centred = {"ha": "center", "va": "center"}
    panel.text(column, row + 0.2, title, weight="bold", size=7.5, **centred)
    panel.text(column, row - 0.01, text, size=7, **centred)
    if item is not None:
        file = Path(inspect.getsourcefile(item)).relative_to(PACKAGE).as_posix()
        panel.text(column, row - 0.24, file, size=6.5, family="monospace", **centred)


def draw_arrow(panel, stop, start, text=""):
    """An arrow with a label."""
    arrow = {"arrowstyle": "-|>", "color": "0.3"}
    panel.annotate("", stop, start, arrowprops=arrow)
    middle = (start[0] + stop[0]) / 2, (start[1] + stop[1]) / 2
    panel.text(middle[0] + 0.12, middle[1] - 0.02, text, size=7, style="italic")


def draw_filters(figure):
    """A photograph through a bank of four filters, in one call."""
    pixels = load_sample_image("china.jpg")
    bright = pixels.mean(-1, dtype=np.float32)[None, None] / 255
    y, x = np.mgrid[-3:4, -3:4]
    blob = np.exp(-(x**2 + y**2) / 4)
    wave = blob * np.cos((x + y) * np.pi / 3)
    bank = np.stack([blob * x, blob * y, blob, wave - blob * wave.sum() / blob.sum()])
    bank = (bank / np.abs(bank).sum((1, 2), keepdims=True))[:, None].astype("f4")
    responses = cuconv.conv2d(bright, bank, padding="same", padding_mode="symmetric")
    panels = figure.subplots(1, 5)
    panels[0].imshow(pixels)
    for panel, response in zip(panels[1:], responses[0], strict=True):
        top = np.percentile(np.abs(response), 99.5)
        low, colours = (-top, "RdBu_r") if response.min() < 0 else (0, "gray")
        panel.imshow(response, cmap=colours, vmin=low, vmax=top)
    names = ("photograph", "across", "down", "blurred", "diagonal wave")
    for panel, name in zip(panels, names, strict=True):
        panel.set_title(name)
        panel.set_axis_off()


FIGURES = {
    "road": (draw_road, (11, 3.8)),
    "columns": (draw_columns, (9, 4)),
    "product": (draw_product, (9, 6.5)),
    "strides": (draw_strides, (9, 3)),
    "tiles": (draw_tiles, (6, 3)),
    "overlaps": (draw_overlaps, (4, 4)),
    "limits": (draw_limits, (9, 4)),
    "timeline": (draw_timeline, (9, 2.5)),
    "tutorial-loops": (loops.draw, (9, 4)),
    "tutorial-offsets": (offsets.draw, (6, 6)),
    "tutorial-scatter": (scatter.draw, (12, 3.4)),
    "tutorial-graph": (graph.draw, (11, 3)),
    "tutorial-lazy": (lazy.draw, (6, 4)),
}


def draw_all(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, (draw, size) in FIGURES.items():
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def draw_front(path):
    """The picture of README.md and of the front page, which is kept."""
    figure = Figure(figsize=(12, 1.9), layout="constrained")
    draw_filters(figure)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))
    draw_front(Path(sys.argv[1]) / "filters.png")
