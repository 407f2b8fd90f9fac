"""NVIDIA's cuDNN, where it is installed: its engines as variants of one strategy.

Arrays that are packed are read and written in place; others, and weights with channels
last, which cuDNN takes as (K, *kernel, C/G), are copied.  A bias is written to the
result first, to which the products are added.
"""

import math
from collections.abc import Iterator

import numpy as np

from cuconv.arrays import Array
from cuconv.backends import Backend, ConvLibrary
from cuconv.backends.library import LibraryConv, LibraryEngine
from cuconv.engine.costs import Work
from cuconv.engine.problem import Problem, in_groups
from cuconv.geometry import Axis, ConvGeometry, Tile
from cuconv.memory import Buffer
from cuconv.strategies.base import (
    Job,
    Tiling,
    Tilings,
    Workspace,
    filters_of,
    words_of,
)

_TYPES = "float16", "bfloat16", "float32", "float64"
# Results in a tile of a product, and how much longer each choice takes than the one
# before: estimates that were not measured on a GPU.
_TALL, _LEAST_TALL, _WIDE = 128, 32, 64
_LATER = 0.05
# Sums of so many terms are split until they occupy the device.
_SPLIT = 4096
_BYTES = np.dtype(np.uint8)
# The arrays of an operation, by their roles.
_ROLES = {
    "forward": {"x": "x", "w": "w", "out": "y"},
    "input_grad": {"dy": "y", "w": "w", "out": "x"},
    "weight_grad": {"dy": "y", "x": "x", "out": "w"},
}


class Cudnn:
    """See `cuconv.strategies.Strategy`."""

    name = "cudnn"
    libraries: tuple[str, ...] = ("cudnn",)
    capturable = True
    on_tensor_cores = True
    gains_from_size = True
    by_runs = False

    def supports(self, problem: Problem) -> tuple[bool, str]:
        reason = next(_refusals(problem), "")
        return not reason, reason

    def variants(self, problem: Problem, backend: Backend) -> tuple[LibraryEngine, ...]:
        if problem.geometry.is_empty:
            return (LibraryEngine(),)
        return _library(backend).engines(described(problem))

    def describe(self, variant: LibraryEngine) -> str:
        return f"engine {variant.number}, its choice {variant.choice + 1}"

    def tilings(
        self, problem: Problem, variant: LibraryEngine, backend: Backend
    ) -> Tilings:
        del variant, backend
        g = problem.geometry
        tile = Tile(max(g.images, 1), tuple(max(n, 1) for n in g.out))
        return Tilings(max(g.images * g.positions, 1), lambda _: tile)

    def workspace(
        self, problem: Problem, tiling: Tiling, backend: Backend
    ) -> Workspace:
        del backend
        own, sizes = problem.operand, _sizes(problem.geometry)
        copied = [
            Buffer(role, math.prod(sizes[array]), own)
            for role, array in _ROLES[problem.op].items()
            if not _is_in_place(problem, role)
        ]
        nbytes = tiling.variant.workspace
        extra = [Buffer("workspace", nbytes, _BYTES)] * (nbytes > 0)
        weights = tuple(buffer for buffer in copied if buffer.name == "w")
        shared = tuple(buffer for buffer in copied if buffer.name != "w")
        return Workspace(weights, (*shared, *extra))

    def work(self, problem: Problem, tiling: Tiling) -> Work:
        g, sizes = problem.geometry, _sizes(problem.geometry)
        rows, columns, terms = {
            "forward": (g.group_filters, g.images * g.positions, g.patch),
            "input_grad": (g.group_channels, g.images * g.cells, 0),
            "weight_grad": (g.group_filters, g.patch, g.images * g.positions),
        }[problem.op]
        if problem.op == "input_grad":
            terms = g.multiplications // max(g.groups * rows * columns, 1)
        tall = min(_TALL, max(_LEAST_TALL, 1 << (rows - 1).bit_length()))
        tiles = g.groups * -(-rows // tall) * -(-columns // _WIDE)
        roles = _ROLES[problem.op]
        copies = [a for role, a in roles.items() if not _is_in_place(problem, role)]
        return Work(
            multiply=float(tiles)
            * tall
            * _WIDE
            * terms
            * (1 + _LATER * tiling.variant.choice),
            copy=2 * sum(math.prod(sizes[array]) for array in copies),
            moved=words_of(problem, sum(map(math.prod, sizes.values()))),
            tiles=tiles if terms < _SPLIT else 0,
            blocks=1 + len(copies) + problem.has_bias,
        )

    def weights(self, job: Job, w: Array, kept: dict[str, Array]) -> Array:
        if "w" not in kept:
            return w
        with job.backend.stage("weights", self.name):
            job.backend.copy(filters_of(w, job.problem), _filters(job, kept["w"]))
        return kept["w"]

    def forward(
        self, job: Job, x: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        y = self._result(job, out, bias)
        self._run(job, self._operand(job, "x", x), weights, y)
        self._finish(job, y, out)

    def input_grad(
        self, job: Job, dy: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        dx = self._result(job, out, bias)
        self._run(job, dx, weights, self._operand(job, "dy", dy))
        self._finish(job, dx, out)

    def weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        dw = job.shared.get("out", out)
        self._run(job, self._operand(job, "x", x), dw, self._operand(job, "dy", dy))
        if dw is not out:
            into = filters_of(out, job.problem)
            job.backend.copy(_filters(job, dw), into)

    def _run(self, job: Job, x: Array, w: Array, y: Array) -> None:
        conv, engine = described(job.problem), job.tiling.variant
        with job.backend.stage("product", self.name):
            _library(job.backend).run(
                conv, engine, x, w, y, job.shared.get("workspace")
            )

    def _operand(self, job: Job, role: str, array: Array) -> Array:
        """The array, or a packed copy of it."""
        if role not in job.shared:
            return array
        copy = _like(job.shared[role], array)
        with job.backend.stage("gather", self.name):
            g = job.problem.geometry
            job.backend.copy(in_groups(array, g), in_groups(copy, g))
        return copy

    def _result(self, job: Job, out: Array, bias: Array | None) -> Array:
        """The packed array that products are added to: a bias, or nothing."""
        result = _like(job.shared["out"], out) if "out" in job.shared else out
        if bias is not None:
            g = job.problem.geometry
            offset = bias.reshape(1, g.groups, -1, *(1,) * g.rank)
            job.backend.copy(offset, in_groups(result, g))
        return result

    def _finish(self, job: Job, result: Array, out: Array) -> None:
        if result is not out:
            g = job.problem.geometry
            job.backend.copy(in_groups(result, g), in_groups(out, g))


def _refusals(problem: Problem) -> Iterator[str]:
    g, name = problem.geometry, problem.operand.name
    if problem.module == "numpy":
        yield "it is a library for CUDA"
    if g.rank > 3:
        yield f"{g.rank} axes, 3 at most"
    if problem.flipped:
        yield "cuDNN has an input gradient of its own"
    if name not in _TYPES:
        yield f"it takes {', '.join(_TYPES)}, not {name}"
    if problem.needs_cast or problem.types.result != problem.operand:
        yield f"not all arrays are {name}, and it casts none"
    for axis in g.axes:
        least = min(axis.before, axis.after)
        if least < 0:
            yield f"padding of {least} crops the input, which cuDNN does not"
        elif axis.out and _padded(axis) is None:
            yield f"an axis has {axis.out} windows, of those that cuDNN would count"


def _library(backend: Backend) -> ConvLibrary:
    found = backend.library
    if found is None:
        raise RuntimeError(f"{backend.device} has no cuDNN")
    return found


def described(problem: Problem) -> LibraryConv:
    """The problem as a library sees it."""
    g = problem.geometry
    sizes = _sizes(g)
    return LibraryConv(
        problem.op,
        problem.operand,
        *(sizes["x"], sizes["w"], sizes["y"]),
        tuple(_padded(axis) or axis for axis in g.axes),
        channels_first=g.channels_first,
        precision=problem.precision,
        deterministic=problem.deterministic,
        adds=problem.has_bias,
    )


def _padded(axis: Axis) -> Axis | None:
    """The axis with padding for its last window: equal to that before, if possible.

    cuDNN counts windows from the padding, and has more engines where both are equal.
    """
    needed = (axis.out - 1) * axis.stride + axis.extent - axis.size - axis.before
    for after in (axis.before, axis.after, max(needed, 0)):
        padded = Axis(*axis[:5], after)
        if padded.out == axis.out:
            return padded
    return None


def _sizes(g: ConvGeometry) -> dict[str, tuple[int, ...]]:
    """The shapes of x, w and y with channels first."""
    return {
        "x": (g.images, g.channels, *g.size),
        "w": (g.filters, g.group_channels, *g.kernel),
        "y": (g.images, g.filters, *g.out),
    }


def _is_in_place(problem: Problem, role: str) -> bool:
    """True if cuDNN can read or write an array where it is."""
    is_weights = _ROLES[problem.op][role] == "w"
    first = problem.geometry.channels_first
    return role in problem.packed and (first or not is_weights)


def _like(flat: Array, array: Array) -> Array:
    return flat.reshape(array.shape)


def _filters(job: Job, flat: Array) -> Array:
    """View cuDNN's weights as (G, K/G, C/G, *kernel)."""
    g = job.problem.geometry
    head = g.groups, g.group_filters
    if g.channels_first:
        return flat.reshape(*head, g.group_channels, *g.kernel)
    view = flat.reshape(*head, *g.kernel, g.group_channels)
    return view.transpose(0, 1, g.rank + 2, *range(2, g.rank + 2))
