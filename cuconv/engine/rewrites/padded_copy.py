"""Padding modes and batch groups: copy a block's padded input, then convolve the copy.

The copy contains the padding if that is not zero, and groups of images as channels.  It
is made for some images and rows at a time, so that the copy and the convolution fit the
memory limit together.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

from cuconv.arrays import Array, grouped, is_aligned, stub_array
from cuconv.backends import refuse_capture
from cuconv.backends.padding import Reading
from cuconv.config import config, settings
from cuconv.engine.execute import Run
from cuconv.engine.lowering import Lowering, fits
from cuconv.engine.planner import PlanningResult
from cuconv.engine.problem import NAMES
from cuconv.engine.request import Request
from cuconv.engine.rewrites import polyphase
from cuconv.geometry import Block, ConvGeometry, Range
from cuconv.memory import (
    Buffer,
    MemoryLimitError,
    Shortage,
    is_little,
    workspace_bytes,
)

Index: TypeAlias = tuple[Any, ...]

_NEEDS_COPY = (
    "padding_mode, batch_groups and zero points copy the input to memory of the call"
)


class Tiling(NamedTuple):
    """The images, and rows of the output, of a block."""

    images: int
    rows: int

    def halved(self) -> "Tiling | None":
        """The next smaller tiling: fewer images first, then fewer rows."""
        if self.images > 1:
            return self._replace(images=-(-self.images // 2))
        return self._replace(rows=-(-self.rows // 2)) if self.rows > 1 else None

    def blocks(self, geometry: ConvGeometry) -> Iterator[Block]:
        """The blocks, those of the same images one after another."""
        for images in _in_steps(geometry.results, self.images):
            for rows in _in_steps(geometry.out[0], self.rows):
                yield geometry.rows(images, rows)

    def samples(self, geometry: ConvGeometry) -> dict[ConvGeometry, Block]:
        """A sample block for each different basic convolution."""
        rest = geometry.results % self.images or self.images
        rows = list(_in_steps(geometry.out[0], self.rows))
        if geometry.padding_mode != "zeros":
            # All windows but the last have the same length.
            rows = rows[:1] + rows[-1:]
        shapes: dict[ConvGeometry, Block] = {}
        for images in dict.fromkeys((self.images, rest)):
            for span in rows:
                block = geometry.rows((0, images), span)
                shapes.setdefault(geometry.part(block), block)
        return shapes


def _in_steps(whole: int, step: int) -> Iterator[Range]:
    for first in range(0, whole, step):
        yield first, min(first + step, whole)


class PaddedCopy(Lowering):
    """Blocks of a convolution over padded copies of their input.

    ``inner`` are the lowerings of the convolution of each shape of copies.
    """

    is_capturable = False

    def __init__(
        self,
        request: Request,
        tiling: Tiling,
        inner: dict[ConvGeometry, Lowering],
        buffers: tuple[Buffer, ...],
    ) -> None:
        self.request, self.geometry = request, request.geometry
        self.tiling, self.inner, self.buffers = tiling, inner, buffers
        self.parts: tuple[PlanningResult, ...] = ()
        self._first: dict[ConvGeometry, int] = {}
        for part, lowering in inner.items():
            self._first[part] = len(self.parts)
            self.parts += lowering.parts

    @classmethod
    def buffers_of(
        cls, request: Request, tiling: Tiling, shapes: dict[ConvGeometry, Block]
    ) -> tuple[Buffer, ...]:
        """The buffers for copies, and for sums over blocks."""
        geometry, arrays, types = request.geometry, request.arrays, request.types
        is_whole = types.result == types.accumulate
        # At least one element: CuPy has no views of an empty allocation.
        largest = max(1, *(math.prod(part.x_shape) for part in shapes))
        if request.is_input_grad:
            cells = math.prod(geometry.x_shape) // geometry.results * tiling.images
            sums = () if is_whole else (Buffer("sum", cells, types.accumulate),)
            return (Buffer("copy", largest, types.accumulate), *sums)
        copied = Buffer("copy", largest, arrays["x"].dtype)
        single = tiling == (geometry.results, geometry.out[0])
        if not request.is_weight_grad or single:
            return (copied,)
        cells = math.prod(geometry.w_shape)
        is_ready = is_whole and _is_ready(request.result)
        names = ("part",) if is_ready else ("part", "sum")
        return (copied, *(Buffer(name, cells, types.accumulate) for name in names))

    @classmethod
    def request_of(cls, request: Request, part: ConvGeometry, block: Block) -> Request:
        """The request of a block."""
        arrays, result, types = request.arrays.copy(), request.result, request.types
        dtype = types.result
        if request.is_input_grad:
            dtype = types.accumulate
            result = stub_array(part.x_shape, dtype)
        else:
            arrays["x"] = stub_array(part.x_shape, arrays["x"].dtype)
        if request.is_weight_grad and not _is_whole(request.geometry, block):
            dtype = types.accumulate
            result = stub_array(part.w_shape, dtype)
        if "dy" in arrays:
            arrays["dy"] = arrays["dy"][index_of_y(request.geometry, block)]
        if request.call == "forward":
            result = result[index_of_y(request.geometry, block)]
        options = request.options._replace(dtype=dtype)
        return request._replace(
            geometry=part, arrays=arrays, out=result, options=options
        )

    @property
    def _count(self) -> int:
        g, tiling = self.geometry, self.tiling
        return -(-g.results // tiling.images) * -(-g.out[0] // tiling.rows)

    @property
    def chunks(self) -> int:
        g = self.geometry
        return sum(self.inner[g.part(b)].chunks for b in self.tiling.blocks(g))

    @property
    def flops(self) -> int:
        return 2 * self.geometry.multiplications

    @property
    def nanoseconds(self) -> float:
        return next(iter(self.inner.values())).nanoseconds * self._count

    @property
    def composition(self) -> str:
        images, rows = self.tiling
        size = f"{images} images and {rows} rows"
        if self._count == 1:
            return f"one copy, for {size}"
        return f"{self._count} copies, each for {size}"

    def weights_of(self, w: Array) -> Iterable[Array]:
        for lowering in self.inner.values():
            yield from lowering.weights_of(w)

    def steps(self, run: Run) -> None:
        if self.request.is_weight_grad:
            self._weight_grad(run)
        elif self.request.is_input_grad:
            self._input_grad(run)
        else:
            self._forward(run)

    def _forward(self, run: Run) -> None:
        for number, block in enumerate(self.tiling.blocks(self.geometry)):
            x = self._copied(run, number, block)
            y = self._of_y(run.arrays["out"], block)
            self._convolve(run, block, {"x": x, "out": y})

    def _input_grad(self, run: Run) -> None:
        g, backend, arrays = self.geometry, run.backend, run.arrays
        for images in _in_steps(g.results, self.tiling.images):
            target = cells = _cells(arrays["out"], g, images)
            if "sum" in arrays:
                cells = in_buffer(arrays["sum"], target.shape)
            for number, rows in enumerate(_in_steps(g.out[0], self.tiling.rows)):
                block = g.rows(images, rows)
                copied = in_buffer(arrays["copy"], g.part(block).x_shape)
                dy = self._of_y(arrays["dy"], block)
                self._convolve(run, block, {"dy": dy, "out": copied})
                with backend.stage("pad_adjoint", "input", number):
                    reading = Reading(g.axes, block.window, g.padding_mode)
                    placed = _grouped(copied, g)
                    backend.pad_adjoint(placed, cells, reading, add=number > 0)
            if cells is not target:
                backend.copy(cells, target)

    def _weight_grad(self, run: Run) -> None:
        arrays, backend, dw = run.arrays, run.backend, run.arrays["out"]
        total = arrays["sum"].reshape(dw.shape) if "sum" in arrays else dw
        for number, block in enumerate(self.tiling.blocks(self.geometry)):
            x = self._copied(run, number, block)
            sums = arrays["part"].reshape(dw.shape) if number else total
            dy = self._of_y(arrays["dy"], block)
            self._convolve(run, block, {"dy": dy, "x": x, "out": sums})
            if number:
                backend.do(backend.xp.add, total, sums, total)
        if total is not dw:
            backend.copy(total, dw)

    def _copied(self, run: Run, number: int, block: Block) -> Array:
        """Copy the padded input of a block."""
        g, backend = self.geometry, run.backend
        copied = in_buffer(run.arrays["copy"], g.part(block).x_shape)
        cells = _cells(run.arrays["x"], g, block.images)
        with backend.stage("pad_copy", "input", number):
            reading = Reading(g.axes, block.window, g.padding_mode)
            backend.pad_copy(cells, _grouped(copied, g), reading)
        return copied

    def _convolve(self, run: Run, block: Block, arrays: dict[str, Array]) -> None:
        """Convolve the copy of a block."""
        part = self.geometry.part(block)
        first = run.first + self._first[part]
        own = {**run.arrays, **arrays}
        self.inner[part].steps(run._replace(arrays=own, first=first))

    def _of_y(self, array: Array, block: Block) -> Array:
        return array[index_of_y(self.geometry, block)]


def lower(request: Request, kind: type[PaddedCopy] = PaddedCopy) -> PaddedCopy:
    """Lower to the largest blocks that leave half of the limit to the convolutions.

    If there are none, to the smallest that fit.

    Raises
    ------
    MemoryLimitError
        If no tiling fits.
    ValueError
        If a CUDA graph is being captured.
    """
    backend, limit = request.backend, request.options.memory_limit
    refuse_capture(backend, _NEEDS_COPY)
    if isinstance(limit, int):
        return _fitting(request, kind, limit)
    try:
        return _fitting(request, kind, backend.default_memory_limit)
    except MemoryLimitError as error:
        return _fitting(request, kind, error.smallest)


def _fitting(request: Request, kind: type[PaddedCopy], limit: int) -> PaddedCopy:
    sizes: list[int] = []
    for attempt in _attempts(request, kind, limit):
        try:
            return attempt()
        except MemoryLimitError as error:
            sizes.append(error.smallest)
    raise MemoryLimitError(limit, min(sizes), NAMES[request.call])


def _attempts(
    request: Request, kind: type[PaddedCopy], limit: int
) -> Iterator[Callable[[], PaddedCopy]]:
    """Functions that lower with each tiling, the preferred ones first.

    A smaller tiling may need more memory: sums over blocks have buffers too.
    """
    too_large = []
    for tiling in _tilings(request.geometry):
        shapes = tiling.samples(request.geometry)
        buffers = kind.buffers_of(request, tiling, shapes)

        def attempt(
            tiling: Tiling = tiling,
            shapes: dict[ConvGeometry, Block] = shapes,
            buffers: tuple[Buffer, ...] = buffers,
        ) -> PaddedCopy:
            own = workspace_bytes(buffers)
            try:
                inner = _inner(request, kind, shapes, max(limit - own, 0))
            except MemoryLimitError as error:
                least = own + error.smallest
                raise MemoryLimitError(limit, least, NAMES[request.call]) from None
            return kind(request, tiling, inner, buffers)

        if workspace_bytes(buffers) > limit // 2:
            too_large.append(attempt)
        else:
            yield attempt
        if is_little(buffers):
            break
    yield from reversed(too_large)


def _tilings(geometry: ConvGeometry) -> Iterator[Tiling]:
    """Tilings from the whole to one row, or to one image with input dilation."""
    tiling: Tiling | None = Tiling(geometry.results, geometry.out[0])
    while tiling is not None:
        yield tiling
        is_last = geometry.has_input_dilation and tiling.images == 1
        tiling = None if is_last else tiling.halved()


def _inner(
    request: Request,
    kind: type[PaddedCopy],
    shapes: dict[ConvGeometry, Block],
    limit: int,
) -> dict[ConvGeometry, Lowering]:
    """The lowering of the convolution of every shape, run one after another."""
    found, shortage = dict[ConvGeometry, Lowering](), Shortage()
    for part, block in shapes.items():
        own = kind.request_of(request, part, block)
        options = own.options._replace(memory_limit=limit)
        with shortage:
            found[part] = polyphase.lower(own._replace(options=options))
    shortage.check()
    if fits(found.values(), limit) or settings().num_threads == 1:
        return found
    with config(num_threads=1):
        return _inner(request, kind, shapes, limit)


def _is_ready(result: Array) -> bool:
    """True if a plan for a fresh buffer can write here too."""
    return bool(result.flags.c_contiguous) and is_aligned(result)


def _is_whole(geometry: ConvGeometry, block: Block) -> bool:
    whole = (0, geometry.results), (0, geometry.out[0])
    return (block.images, block.output[0]) == whole


def in_buffer(buffer: Array, shape: tuple[int, ...]) -> Array:
    """View the first elements of a buffer in this shape."""
    return buffer[: math.prod(shape)].reshape(shape)


def index_of_y(geometry: ConvGeometry, block: Block) -> Index:
    """The index of a block in y; the result always has an axis for images."""
    images = slice(*block.images) if geometry.batched else None
    rows = slice(*block.output[0])
    return (images, slice(None), rows) if geometry.channels_first else (images, rows)


def _cells(x: Array, geometry: ConvGeometry, images: Range) -> Array:
    """The images of x for these images of y: (images, groups, C, *spatial)."""
    g = geometry
    each = grouped(x, 1, g.rank, channels_first=g.channels_first, batched=g.batched)[
        :, 0
    ]
    by_group = each.reshape(g.batch_groups, g.results, *each.shape[1:])
    return by_group[:, slice(*images)].swapaxes(0, 1)


def _grouped(copied: Array, geometry: ConvGeometry) -> Array:
    """View a copy as (images, groups, C, *window)."""
    return grouped(
        *(copied, geometry.batch_groups, geometry.rank),
        channels_first=geometry.channels_first,
        batched=True,
    )
