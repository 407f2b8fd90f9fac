"""Shapes that people reported slow: ``python -m benchmarks.reported``.

``reported.json`` has a line for each: a public function of cuconv, the shapes of its
arrays, its options, maybe the array whose gradient is computed, and the type.  A line
with ``unseen`` adds an element to the last axis at each call, so that no shape is seen
twice.  The peer is PyTorch, or SciPy's `oaconvolve` where the line says so; integers
are compared with the peer's float32.  Each side has a process of its own; they take
turns, and both must give the same sums.
"""

import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks import machine, records
from benchmarks.report import digits, quotient
from benchmarks.runner import settle

LINES: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("reported.json").read_text(encoding="utf-8")
)
ROUNDS, SECONDS, MOST_CALLS = 3, 0.12, 300
# Keys of a line that are not options of the function.
SHAPES = ("label", "call", "x", "w", "gradient", "dtype", "peer", "unseen")
Call = Callable[[], Any]


def operands(line: dict[str, Any], number: int) -> list[Any]:
    """X and w, in the layout of the line: small numbers, positive for norms."""
    rng = np.random.default_rng(0)
    x_shape = list(line["x"])
    x_shape[-1] += number if line.get("unseen") else 0
    shapes = [x_shape, *([line["w"]] if "w" in line else [])]
    dtype = line.get("dtype", "float32")
    if dtype == "int8":
        return [rng.integers(-4, 5, shape, np.int8) for shape in shapes]
    found = [rng.standard_normal(shape, np.float32) for shape in shapes]
    if line["call"] == "lp_pool":
        found = [abs(found[0]) + 0.1]
    return [each.astype(dtype) for each in found]


def options(line: dict[str, Any]) -> dict[str, Any]:
    """A list is a tuple: one value for each axis."""
    names = line.keys() - set(SHAPES)
    found = {name: line[name] for name in names}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in found.items()}


class Library:
    """cuconv."""

    def __init__(self) -> None:
        self.module = importlib.import_module("cuconv")

    def call(self, line: dict[str, Any], number: int) -> Call:
        arrays, more = operands(line, number), options(line)
        if more.get("layout") == "channels_last":
            arrays = [self._last(a, is_weights=i == 1) for i, a in enumerate(arrays)]
        if arrays[0].dtype == np.int8:
            more["dtype"] = np.int32
        forward = getattr(self.module, line["call"])
        if "gradient" not in line:
            return lambda: forward(*arrays, **more)
        return self._gradient(line, forward, arrays, more)

    def _gradient(
        self, line: dict[str, Any], forward: Any, arrays: list[Any], more: Any
    ) -> Call:
        name, x = line["call"], arrays[0]
        if name.startswith(("max", "adaptive_max")):
            y, indices = forward(x, return_indices=True, **more)
            args: tuple[Any, ...] = (like(y), indices, x.shape)
            function = getattr(self.module, f"{name}_backward")
        elif "w" not in line:
            args = (like(forward(x, **more)), x.shape)
            function = getattr(self.module, f"{name}_backward")
        else:
            dy = like(forward(*arrays, **more)).astype(x.dtype)
            kind, other, own = "input_grad", *arrays[::-1]
            if line["gradient"] == "w":
                kind, other, own = "weight_grad", *arrays
            args, function = (
                (dy, other, own.shape),
                getattr(self.module, f"{name}_{kind}"),
            )
        return lambda: function(*args, **more)

    def _last(self, array: Any, *, is_weights: bool) -> Any:
        axes = (*range(2, array.ndim), 1, 0) if is_weights else None
        axes = axes or (0, *range(2, array.ndim), 1)
        return array.transpose(axes).copy()


def like(y: Any) -> Any:
    """A gradient of the shape of a result: the same numbers in every layout."""
    return np.ones_like(y)


class Torch:
    """PyTorch's functions; gradients by its autograd."""

    def __init__(self) -> None:
        self.module = importlib.import_module("torch")

    def call(self, line: dict[str, Any], number: int) -> Call:
        torch, more = self.module, options(line)
        last = more.pop("layout", None) == "channels_last"
        more.pop("precision", None)
        arrays = [torch.from_numpy(each) for each in operands(line, number)]
        arrays = [a.float() if a.dtype == torch.int8 else a for a in arrays]
        if last:
            arrays = [a.to(memory_format=torch.channels_last) for a in arrays]
        name, rank = line["call"], arrays[0].ndim - 2
        if name.startswith("global"):
            name, more["output_size"] = "adaptive_avg_pool", 1
        function = getattr(torch.nn.functional, f"{name}{rank}d")
        wanted = line.get("gradient")
        if not wanted:
            with torch.no_grad():
                function(*arrays, **more)
            return lambda: self._without_gradients(function, arrays, more)
        leaf = arrays["xw".index(wanted)].requires_grad_()
        y = function(*arrays, **more)
        dy = torch.ones_like(y)
        return lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]

    def _without_gradients(self, function: Any, arrays: Any, more: Any) -> Any:
        with self.module.no_grad():
            return function(*arrays, **more)


class Scipy:
    """`scipy.signal.oaconvolve` of one channel and one filter."""

    def __init__(self) -> None:
        self.module = importlib.import_module("scipy.signal")

    def call(self, line: dict[str, Any], number: int) -> Call:
        x, w = (array[0, 0] for array in operands(line, number))
        flipped = w[(slice(None, None, -1),) * w.ndim]
        return lambda: self.module.oaconvolve(x, flipped, "valid")


KINDS: dict[str, Any] = {"cuconv": Library, "torch": Torch, "scipy": Scipy}


def serve(kind: str) -> None:
    """Answer lines of standard input: build a case, or time it."""
    side, call, number = KINDS[kind](), None, 0
    line: dict[str, Any] = {}
    for text in sys.stdin:
        request = json.loads(text)
        if request:
            line, number = request, 0
            call = side.call(line, 0)
            sums = np.asarray(call(), np.float64)
            reply: Any = [float(sums.sum()), float(abs(sums).sum())]
        else:
            reply, begun = [], perf_counter()
            while not reply or (
                perf_counter() - begun < SECONDS and len(reply) < MOST_CALLS
            ):
                if line.get("unseen"):
                    number += 1
                    call = side.call(line, number)
                start = perf_counter()
                call()  # type: ignore[misc]
                reply.append(perf_counter() - start)
            settle()
        print(json.dumps(reply), flush=True)


class Side:
    """A process that has one side."""

    def __init__(self, kind: str, python: str) -> None:
        self.process = subprocess.Popen(  # noqa: S603
            [python, "-m", "benchmarks.reported", "--serve", kind],
            cwd=machine.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: Any) -> list[float]:
        assert self.process.stdin and self.process.stdout  # noqa: PT018, S101
        print(json.dumps(request), file=self.process.stdin, flush=True)
        reply: list[float] = json.loads(self.process.stdout.readline() or "[]")
        if not reply:
            raise RuntimeError("a process ended")
        return reply


def measure(lines: list[dict[str, Any]], python: str) -> Iterator[dict[str, Any]]:
    """Milliseconds of both sides for each line."""
    pythons = {"cuconv": sys.executable, "torch": python, "scipy": sys.executable}
    sides: dict[str, Side] = {}
    for line in lines:
        pair = "cuconv", line.get("peer", "torch")
        for kind in pair:
            if kind not in sides:
                sides[kind] = Side(kind, pythons[kind])
        ours, theirs = (sides[kind].ask(line) for kind in pair)
        slack = 2e-3 if line.get("dtype") != "float16" else 2e-2
        if abs(ours[1] - theirs[1]) > slack * abs(theirs[1]):
            raise RuntimeError(f"{line}: sums {ours} and {theirs}")
        times: dict[str, list[float]] = {kind: [] for kind in pair}
        for _ in range(ROUNDS):
            for kind in pair:
                times[kind] += sides[kind].ask(None)
        ours_ms, theirs_ms = (1e3 * statistics.median(times[kind]) for kind in pair)
        yield {**line, "milliseconds": ours_ms, "peer_milliseconds": theirs_ms}


def main() -> None:
    words = records.parser("benchmarks.reported", __doc__)
    words.add_argument("--label", default="", help="lines whose text contains this")
    words.add_argument("--torch-python", **records.TORCH_PYTHON)
    words.add_argument("--serve", metavar="SIDE", help="used by this program itself")
    chosen = words.parse_args()
    if chosen.serve:
        serve(chosen.serve)
        return
    lines = [line for line in LINES if chosen.label in json.dumps(line)]
    found = []
    for each in measure(lines, chosen.torch_python):
        found.append(each)
        ratio = each["milliseconds"] / each["peer_milliseconds"]
        text = " ".join(
            f"{n}={v}" for n, v in options(each).items() if "milli" not in n
        )
        shapes = " ∗ ".join(str(tuple(each[n])) for n in "xw" if n in each)
        what = f"{each['label']}: {each['call']} {each.get('gradient', '')}"
        both = (
            f"{digits(each['milliseconds'])} / {digits(each['peer_milliseconds'])} ms"
        )
        print(f"{quotient(ratio):>5} {both:>20}  {what} {shapes} {text}", flush=True)
    ratios = sorted(e["milliseconds"] / e["peer_milliseconds"] for e in found)
    mean = statistics.geometric_mean(ratios)
    print(
        f"{len(ratios)} cases: geometric mean {mean:.2f}, nine in ten below "
        f"{ratios[int(0.9 * len(ratios))]:.2f}, worst {ratios[-1]:.2f}"
    )
    if chosen.out:
        where = {"machine": machine.host(), **machine.provenance()}
        records.write({**where, "cases": found}, "reported", chosen.out)


if __name__ == "__main__":
    main()
