"""The main job on a real photograph: filters, a small network, and what they cost.

The photograph goes through a bank of filters and a stack of convolutions, forward and
backward, every call under one memory limit.  Each call is timed, its memory measured,
and its result compared with loops in float64.  It needs the extra ``demo``.
"""

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_sample_image

from cuconv.arrays import Array
from cuconv.backends import default_array_module
from cuconv.conv import conv, conv_input_grad, conv_weight_grad, plan_conv
from cuconv.engine.plan import Plan
from cuconv.geometry import Block, WindowGeometry
from cuconv.layers import Conv2d
from cuconv.memory import MemoryLimitError, parse_memory_limit
from cuconv.testing import conv_reference, relative_error

# Photographs are scaled down to this many elements on the longer side.
LARGEST_SIDE = 1280
# Rounding alone: sums of at most a thousand float32 products, relative to their norm.
TOLERANCE = 1e-5
REPEATS = 3
# CuPy's pool hands memory out in these many bytes.
_POOL_UNIT = 512
# The errors of Pillow for files that are no pictures, or broken.
_UNREADABLE = (
    *(OSError, ValueError, SyntaxError),
    *(UnidentifiedImageError, Image.DecompressionBombError),
)
CALLS = {"forward": "y", "input_grad": "dx", "weight_grad": "dw"}


class DemoError(Exception):
    """An error that the user can correct."""


class Check(NamedTuple):
    """A number that must not exceed a bound."""

    name: str
    value: float
    bound: float

    @property
    def passed(self) -> bool:
        # NaN compares false, and so fails.
        return self.value <= self.bound


@dataclass(frozen=True)
class StageResult:
    """The cost and the errors of one convolution of the demo."""

    name: str
    shape: tuple[int, ...]
    plan: Plan
    milliseconds: float
    peak_bytes: int

    @property
    def blocks(self) -> int:
        """The number of blocks that the work was split into."""
        return self.plan.chunks

    @property
    def whole_bytes(self) -> int:
        """The size of the whole column matrix, in bytes."""
        problem = self.plan.problem
        return problem.geometry.column_bytes(problem.operand.itemsize)


@dataclass
class Recorder:
    """Run convolutions under the limit, and record and check each of them.

    A limit that is too small for one of them is enlarged, so that `check_limit` names
    what does for all.
    """

    xp: Any
    limit: int
    advance: Callable[[str], None]
    results: list[StageResult] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    too_small: int | None = None

    def check_limit(self) -> None:
        """Raise if the limit that was given was too small."""
        if self.too_small is not None:
            raise MemoryLimitError(self.too_small, self.limit, "the demo")

    def forward(
        self, name: str, x: Array, w: Array, bias: Array | None = None, **options: Any
    ) -> Array:
        plan = self._plan("forward", x, w, bias=bias is not None, **options)
        limited = {**options, "memory_limit": self.limit}
        y = self._run(name, plan, lambda: conv(x, w, bias, **limited))
        for place, block in _crops(plan.problem.geometry):
            error = _crop_error(block, (x, w, bias), y, options)
            self.checks.append(Check(f"{name}: {place} crop", error, TOLERANCE))
        return y

    def backward(
        self, name: str, dy: Array, x: Array, w: Array, **options: Any
    ) -> tuple[Array, Array]:
        """The gradients for x and w."""
        plan = self._plan("input_grad", x, w, **options)
        other = self._plan("weight_grad", x, w, **options)
        limited = {**options, "memory_limit": self.limit}
        dx = self._run(name, plan, lambda: conv_input_grad(dy, w, x.shape, **limited))
        dw = self._run(name, other, lambda: conv_weight_grad(dy, x, w.shape, **limited))
        y = conv(x, w, **limited)
        for gradient, array, words in ((dx, x, "⟨dx, x⟩"), (dw, w, "⟨dw, w⟩")):
            error = _adjoint_error(gradient, array, dy, y)
            self.checks.append(Check(f"{name}: {words} = ⟨dy, y⟩", error, TOLERANCE))
        return dx, dw

    def _plan(self, op: str, x: Array, w: Array, **options: Any) -> Plan:
        device = "cpu" if self.xp is np else "cuda"
        more = {**options, "op": op, "device": device}
        try:
            return plan_conv(x.shape, w.shape, memory_limit=self.limit, **more)
        except MemoryLimitError as error:
            self.too_small = self.too_small or error.limit
            self.limit = error.smallest
        return plan_conv(x.shape, w.shape, memory_limit=self.limit, **more)

    def _run(self, name: str, plan: Plan, call: Callable[[], Array]) -> Array:
        if self.too_small is not None:
            return call()  # nothing will be shown
        self.advance(f"{name} {CALLS[plan.problem.op]}")
        result, peak = measured_peak(self.xp, call)
        milliseconds = min(_milliseconds(self.xp, call) for _ in range(REPEATS))
        self.results.append(StageResult(name, result.shape, plan, milliseconds, peak))
        self.checks.append(Check(f"{name}: extra memory", peak, self.limit))
        return result


def _milliseconds(xp: Any, call: Callable[[], Array]) -> float:
    start = perf_counter()
    call()
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()
    return (perf_counter() - start) * 1e3


def measured_peak(xp: Any, call: Callable[[], Array]) -> tuple[Array, int]:
    """Run a call; measure its peak memory beyond its result.

    Returns
    -------
    tuple
        The result, and bytes: as `tracemalloc` counts them on the host, as CuPy's
        memory pool hands them out on a device.
    """
    call()  # the memory of a first call, for compiled kernels, is no workspace
    if xp is np:
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            result = call()
            _, highest = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        return result, highest - before - result.nbytes
    with _pool_hook(xp) as pool:
        result = call()
    own = -(-result.nbytes // _POOL_UNIT) * _POOL_UNIT
    return result, pool.highest - own


def _pool_hook(xp: Any) -> Any:
    """Count the bytes that CuPy's memory pool hands out and takes back."""

    class PeakHook(xp.cuda.MemoryHook):  # type: ignore[misc]
        name = "cuconv demo"
        held = 0
        highest = 0

        def malloc_postprocess(self, **block: Any) -> None:
            self.held += block["mem_size"]
            self.highest = max(self.highest, self.held)

        def free_postprocess(self, **block: Any) -> None:
            self.held -= block["mem_size"]

    return PeakHook()


def _crops(geometry: WindowGeometry, side: int = 8) -> list[tuple[str, Block]]:
    """Two small blocks of the output: in the corner, with padding, and inside."""
    corner = tuple((0, min(side, n)) for n in geometry.out)
    centre = tuple((n // 2, min(n // 2 + side, n)) for n in geometry.out)
    return [
        (name, geometry.block((0, 1), cells))
        for name, cells in (("corner", corner), ("centre", centre))
    ]


def _crop_error(
    block: Block,
    arrays: tuple[Array, Array, Array | None],
    y: Array,
    options: dict[str, Any],
) -> float:
    """The error of a block of y against float64 loops over the input it needs."""
    x, w, bias = arrays
    inputs, outputs = (
        (slice(*block.images), ..., *(slice(*span) for span in spans))
        for spans in (block.window, block.output)
    )
    own = {**options, "padding": block.padding}
    return relative_error(y[outputs], conv_reference(x[inputs], w, bias, **own))


def _adjoint_error(gradient: Array, array: Array, dy: Array, y: Array) -> float:
    """The difference of ⟨gradient, array⟩ and ⟨dy, y⟩, relative to ‖dy‖ · ‖y‖."""
    scale = np.sqrt(_inner(dy, dy) * _inner(y, y))
    error = abs(_inner(gradient, array) - _inner(dy, y))
    return float(error / scale) if scale else error


def _inner(a: Array, b: Array) -> float:
    return float((a.astype(np.float64) * b.astype(np.float64)).sum())


def filter_bank() -> dict[str, Array]:
    """The filters for brightness, by name, each 7×7."""
    y, x = np.mgrid[-3:4, -3:4].astype(np.float64)
    blob = _gaussian(1.0)
    laplacian = blob * (x**2 + y**2 - 2)
    angles = {"Gabor 0°": 0, "Gabor 45°": 45, "Gabor 90°": 90, "Gabor 135°": 135}
    return {
        "Sobel x": _centred([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]),
        "Sobel y": _centred([[-1, -2, -1], [0, 0, 0], [1, 2, 1]]),
        "Laplacian": laplacian - laplacian.mean(),
        "Emboss": _centred([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]),
        **{name: _gabor(np.deg2rad(angle)) for name, angle in angles.items()},
    }


def _centred(kernel: list[list[int]]) -> Array:
    return np.pad(np.array(kernel, dtype=np.float64), 2)


def _gaussian(deviation: float) -> Array:
    y, x = np.mgrid[-3:4, -3:4]
    blob = np.exp(-(x**2 + y**2) / (2 * deviation**2))
    return blob / blob.sum()


def _gabor(angle: float, wavelength: float = 4.0) -> Array:
    """A wave under a blob, after D. Gabor, "Theory of communication", 1946."""
    y, x = np.mgrid[-3:4, -3:4]
    across = x * np.cos(angle) + y * np.sin(angle)
    wave = _gaussian(1.8) * np.cos(2 * np.pi * across / wavelength)
    return wave - _gaussian(1.8) * wave.sum()


def filter_photo(recorder: Recorder, photo: Array) -> dict[str, Array]:
    """The photograph, (1, 3, H, W), through every filter: responses by name."""
    xp = recorder.xp

    def weights(kernels: list[Array]) -> Array:
        return xp.asarray(np.stack(kernels)[:, None].astype(np.float32))

    shares = xp.asarray([0.2126, 0.7152, 0.0722], dtype=np.float32)
    bright = recorder.forward("brightness", photo, shares.reshape(1, 3, 1, 1))
    sharp = 2.5 * _centred([[0, 0, 0], [0, 1, 0], [0, 0, 0]]) - 1.5 * _gaussian(1.2)
    # Each colour has both filters: the result is red blurred, red sharpened, green …
    pairs = weights([_gaussian(2.0), sharp] * 3)
    both = recorder.forward("blur, sharpen", photo, pairs, padding="same", groups=3)
    bank = filter_bank()
    each = recorder.forward("filter bank", bright, weights([*bank.values()]), padding=3)
    edges = xp.hypot(each[0, 0], each[0, 1])
    return {
        "Blurred": both[0, 0::2],
        "Sharpened": both[0, 1::2],
        "Edges": edges,
        **dict(zip(bank, each[0], strict=True)),
    }


class StackLayer(NamedTuple):
    """One convolution of the small network: channels, taps, options, then ReLU."""

    name: str
    channels: tuple[int, int]
    taps: int
    options: dict[str, Any]


STACK = (
    StackLayer("3×3, stride 2", (3, 16), 3, {"stride": 2, "padding": 1}),
    StackLayer(
        "depthwise 5×5",
        (16, 16),
        5,
        {"groups": 16, "padding": "same", "dilation": 2},
    ),
    StackLayer("pointwise", (16, 32), 1, {}),
    StackLayer("grouped 3×3", (32, 32), 3, {"stride": 2, "padding": 1, "groups": 4}),
)


def run_stack(recorder: Recorder, photo: Array) -> tuple[Array, Array]:
    """Forward, and backward from ½ Σ y²: the responses, and the photo's gradient."""
    rng, x = np.random.default_rng(0), photo - photo.mean()
    tape = []
    for layer in STACK:
        held = Conv2d(
            *layer.channels, layer.taps, xp=recorder.xp, rng=rng, **layer.options
        )
        weight, bias = held.parameters.values()
        y = recorder.forward(layer.name, x, weight, bias, **layer.options)
        tape.append((layer, x, weight, y > 0))
        x = recorder.xp.maximum(y, 0)
    dy = x
    for layer, before, weight, active in reversed(tape):
        dy, _ = recorder.backward(
            layer.name, dy * active, before, weight, **layer.options
        )
    return x, dy


def load_photo(path: Path | None) -> Array:
    """A photograph as (1, 3, H, W), float32 from 0 to 1.

    Pixels of more than 8 bits are divided by the largest of them.

    Raises
    ------
    DemoError
        If there is no picture in the file.
    """
    if path is None:
        pixels, top = load_sample_image("china.jpg"), 255.0
    else:
        try:
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image)
                is_deep = upright.mode.startswith(("I", "F"))
                upright = upright.convert("F" if is_deep else "RGB")
        except _UNREADABLE as error:
            raise DemoError(f"{path} cannot be read as a picture: {error}") from error
        upright.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        pixels = np.atleast_3d(np.asarray(upright, dtype=np.float32))
        top = float(pixels.max()) if is_deep else 255.0
        if not np.isfinite(pixels).all():
            raise DemoError(f"{path} has pixels that are not finite")
    planes = np.moveaxis(pixels, -1, 0)[None]
    photo = np.broadcast_to(planes, (1, 3, *planes.shape[2:]))
    return np.ascontiguousarray(photo, dtype=np.float32) / np.float32(top or 1)


def check_output(output: Path, photo: Path | None) -> None:
    """Raise if the panel cannot or must not be written to this path."""
    if output.suffix.lower() != ".png":
        raise DemoError(f"{output} must end in .png, as what is drawn is a PNG file")
    if output.is_dir() or not output.parent.is_dir():
        raise DemoError(f"there is no folder {output.parent} to write {output.name} to")
    if (
        photo is not None
        and photo.exists()
        and output.exists()
        and (output.samefile(photo))
    ):
        raise DemoError(f"{output} is the photograph itself")


def choose_module(device: str) -> Any:
    """The array module for ``"auto"``, ``"cpu"`` or ``"cuda"``."""
    if device == "cpu":
        return np
    xp = default_array_module()
    if device == "cuda" and xp is np:
        raise DemoError("no CUDA device works; `python -m cuconv info` says why")
    return xp


def results_table(recorder: Recorder) -> Table:
    """A row for every convolution."""
    title = f"every call under {recorder.limit / 2**10:.0f} KiB"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("stage", "call", "result", "strategy"):
        table.add_column(heading, no_wrap=True)
    for heading in ("blocks", "ms", "extra KiB", "whole KiB"):
        table.add_column(heading, justify="right")
    for result in recorder.results:
        table.add_row(
            result.name,
            CALLS[result.plan.problem.op],
            "×".join(map(str, result.shape)),
            result.plan.strategy,
            str(result.blocks),
            f"{result.milliseconds:.1f}",
            f"{result.peak_bytes / 2**10:.0f}",
            f"{result.whole_bytes / 2**10:.0f}",
        )
    table.caption = "whole: the column matrix in one piece, which was never built"
    return table


def print_checks(console: Console, checks: list[Check]) -> None:
    """Print every check that failed, and the number of checks."""
    failed = [check for check in checks if not check.passed]
    for check in failed:
        console.print(f"[red]failed[/] {check.name}: {check.value:g} > {check.bound:g}")
    worst = max(c.value for c in checks if c.bound == TOLERANCE)
    colour = "red" if failed else "green"
    console.print(
        f"[{colour}]{len(checks) - len(failed)} of {len(checks)} checks passed[/]; "
        f"largest error against float64: {worst:.1e} (allowed {TOLERANCE:.0e})"
    )


def draw_panel(
    photo: Array, responses: dict[str, Array], deep: Array, gradient: Array
) -> Figure:
    """All responses in one picture; arrays on the host."""
    strongest = np.argsort(deep[0].std(axis=(1, 2)))[::-1][:3]
    pictures = {"Photograph": photo[0], **responses}
    pictures |= {f"Network, channel {i}": deep[0, i] for i in sorted(strongest)}
    pictures["Gradient for the photograph"] = np.abs(gradient[0]).max(axis=0)
    figure = Figure(figsize=(16, 11.4), layout="constrained", facecolor="white")
    for axes, (name, picture) in zip(
        figure.subplots(4, 4).flat, pictures.items(), strict=True
    ):
        axes.set_title(name, fontsize=12)
        axes.set_axis_off()
        if picture.ndim == 3:
            axes.imshow(np.moveaxis(picture, 0, -1).clip(0, 1))
        elif name == "Emboss":
            axes.imshow(_within(picture), cmap="gray", vmin=0, vmax=1)
        else:
            _draw_response(axes, _within(picture))
    return figure


def _within(picture: Array) -> Array:
    # Zeros read beyond the edge would give the largest responses: they are cropped.
    return picture[3:-3, 3:-3] if min(picture.shape) > 12 else picture


def _draw_response(axes: Axes, picture: Array) -> None:
    """Signed numbers around white, or magnitudes on black."""
    top = float(np.percentile(np.abs(picture), 99)) or 1.0
    if picture.min() < 0:
        axes.imshow(picture, cmap="RdBu_r", vmin=-top, vmax=top)
    else:
        axes.imshow(picture, cmap="magma", vmin=0, vmax=top)


def run_demo(
    photo: Path | None, *, memory_limit: int | str, device: str, output: Path
) -> bool:
    """Run everything, print the table, save the panel.

    Parameters
    ----------
    photo
        A picture file; by default one that scikit-learn ships.
    memory_limit
        For each convolution, as for `cuconv.conv`.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    output
        Path of the panel, a PNG file.

    Returns
    -------
    bool
        Whether every check passed.

    Raises
    ------
    DemoError
        If there is no such picture, device or folder.
    MemoryLimitError
        If a convolution does not fit under the limit.
    """
    check_output(output, photo)
    xp, limit = choose_module(device), parse_memory_limit(memory_limit)
    picture = load_photo(photo)
    console = Console()
    name = escape(str(photo or "china.jpg of scikit-learn"))
    console.print(f"{name}, {xp.__name__}")
    # Nothing but the convolutions may allocate while they are measured: no refreshing
    # from another thread.
    with Progress(console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", total=3 + 3 * len(STACK))

        def advance(name: str) -> None:
            progress.update(task, description=name, advance=1, refresh=True)

        recorder = Recorder(xp, limit, advance)
        responses = filter_photo(recorder, xp.asarray(picture))
        deep, gradient = run_stack(recorder, xp.asarray(picture))
        recorder.check_limit()
    console.print(results_table(recorder))
    print_checks(console, recorder.checks)
    hosted = {name: _on_host(xp, response) for name, response in responses.items()}
    panel = draw_panel(picture, hosted, _on_host(xp, deep), _on_host(xp, gradient))
    try:
        panel.savefig(output, dpi=100)
    except OSError as error:
        raise DemoError(f"{output} cannot be written: {error}") from error
    console.print(f"responses drawn in {escape(str(output))}")
    return all(check.passed for check in recorder.checks)


def _on_host(xp: Any, array: Array) -> Array:
    return array if xp is np else xp.asnumpy(array)
