"""Blocks of a convolution, each a plain one over a copy of what it reads.

The copy has what lies around the input where that is not zero, and groups of images
beside each other as channels.  It is taken for some images and rows at a time, so that
it and the plain convolution stay within the memory limit together.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from cuconv.arrays import Array, grouped, is_aligned
from cuconv.backends import refuse_capture
from cuconv.backends.padding import Reading
from cuconv.engine.plan import Plan, Planner, stub_array
from cuconv.engine.rewrites.base import (
    Arrays,
    Composed,
    Index,
    Request,
    held,
    run_part,
    within,
)
from cuconv.engine.tile_search import NAMES
from cuconv.geometry import Block, ConvGeometry, Range
from cuconv.memory import (
    Buffer,
    MemoryLimitError,
    aligned_start,
    carve,
    workspace_bytes,
)
from cuconv.options import Options
from cuconv.profiling import stage

_NEEDS_COPY = (
    "padding_mode, batch_groups and zero points take a copy of what is read, in memory "
    "of its own"
)


class Tiling(NamedTuple):
    """How many images, and rows of the output, a block has."""

    images: int
    rows: int

    def halved(self) -> "Tiling | None":
        """The next smaller cut: fewer images first, then fewer rows."""
        if self.images > 1:
            return self._replace(images=-(-self.images // 2))
        return self._replace(rows=-(-self.rows // 2)) if self.rows > 1 else None

    def blocks(self, geometry: ConvGeometry) -> Iterator[Block]:
        """The blocks, those of the same images after each other."""
        for images in _in_steps(geometry.results, self.images):
            for rows in _in_steps(geometry.out[0], self.rows):
                yield geometry.rows(images, rows)

    def samples(self, geometry: ConvGeometry) -> dict[ConvGeometry, Block]:
        """A block for each plain convolution that there is among the blocks."""
        rest = geometry.results % self.images or self.images
        rows = list(_in_steps(geometry.out[0], self.rows))
        if geometry.padding_mode != "zeros":
            # Their windows are equally long, but for the last.
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


class Staged(Composed):
    """See `staged`; ``inner`` are the plans of the blocks."""

    def __init__(
        self,
        request: Request,
        planner: Planner,
        tiling: Tiling,
        inner: dict[ConvGeometry, Plan],
        buffers: tuple[Buffer, ...],
    ) -> None:
        super().__init__(request, planner, inner.values())
        self._cut, self._inner, self._buffers = tiling, inner, buffers
        self._zeros = request.zeros

    @classmethod
    def buffers(
        cls, request: Request, tiling: Tiling, shapes: dict[ConvGeometry, Block]
    ) -> tuple[Buffer, ...]:
        """The memory that copies take, and sums over blocks."""
        geometry, arrays, types = request.geometry, request.arrays, request.types
        is_whole = types.result == types.accumulate
        # A cell where no block reads any: no bytes would be no array of a device.
        largest = max(1, *(math.prod(part.x_shape) for part in shapes))
        if request.is_input_grad:
            cells = math.prod(geometry.x_shape) // geometry.results * tiling.images
            sums = () if is_whole else (Buffer("dx", cells, types.accumulate),)
            return (Buffer("x", largest, types.accumulate), *sums)
        copied = Buffer("x", largest, arrays["x"].dtype)
        single = tiling == (geometry.results, geometry.out[0])
        if not request.is_weight_grad or single:
            return (copied,)
        cells = math.prod(geometry.w_shape)
        is_ready = is_whole and _is_ready(request.result)
        names = ("part",) if is_ready else ("part", "sum")
        return (copied, *(Buffer(name, cells, types.accumulate) for name in names))

    @classmethod
    def planned(
        cls, request: Request, part: ConvGeometry, block: Block
    ) -> tuple[Arrays, Array, Options]:
        """The arrays and the result of a block's plan, and what differs in options."""
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
        return arrays, result, request.options._replace(dtype=dtype)

    @property
    def _count(self) -> int:
        g, tiling = self.problem.geometry, self._cut
        return -(-g.results // tiling.images) * -(-g.out[0] // tiling.rows)

    @property
    def chunks(self) -> int:
        g = self.problem.geometry
        return sum(self._inner[g.part(b)].chunks for b in self._cut.blocks(g))

    @property
    def workspace_bytes(self) -> int:
        return workspace_bytes(self._buffers) + held(self._parts)

    @property
    def memory_limit(self) -> int:
        return workspace_bytes(self._buffers) + self._parts[0].memory_limit

    @property
    def nanoseconds(self) -> float:
        return self._parts[0].nanoseconds * self._count

    @property
    def is_capturable(self) -> bool:
        return False

    def _prepare(self, w: Array) -> None:
        self._inner = {g: plan.with_weights(w) for g, plan in self._inner.items()}

    def _composition(self) -> str:
        images, rows = self._cut
        size = f"{images} images and {rows} rows"
        one = self._count == 1
        return (
            f"one copy, for {size}" if one else f"{self._count} copies, each for {size}"
        )

    def _carry_out(
        self, first: Array, second: Array, bias: Array | None, result: Array
    ) -> None:
        nbytes = workspace_bytes(self._buffers)
        with self._backend.memory(nbytes) as raw:
            space = carve(raw, aligned_start(raw), self._buffers)

            def body(worker: int) -> None:
                del worker
                if self.problem.op == "forward":
                    self._forward(first, second, bias, result, space)
                elif self.problem.op == "input_grad":
                    self._input_grad(first, second, result, space)
                else:
                    self._weight_grad(first, second, result, space)

            # One worker, but as workers do: with what NumPy buffers within bounds.
            self._backend.parallel(body, 1, single_threaded=True)

    def _forward(
        self,
        x: Array,
        w: Array,
        bias: Array | None,
        y: Array,
        space: dict[str, Array],
    ) -> None:
        for number, block in enumerate(self._cut.blocks(self.problem.geometry)):
            plan, copied = self._copied(number, x, block, space)
            run_part(plan, copied, w, bias, y[self._of_y(block)])

    def _input_grad(
        self, dy: Array, w: Array, dx: Array, space: dict[str, Array]
    ) -> None:
        g = self.problem.geometry
        for images in _in_steps(g.results, self._cut.images):
            target = cells = _cells(dx, g, images)
            if "dx" in space:
                cells = in_buffer(space["dx"], target.shape)
            for number, rows in enumerate(_in_steps(g.out[0], self._cut.rows)):
                block = g.rows(images, rows)
                part = g.part(block)
                copied = in_buffer(space["x"], part.x_shape)
                run_part(self._inner[part], dy[self._of_y(block)], w, None, copied)
                with stage("fold", "input", number):
                    reading = Reading(g.axes, block.window, g.padding_mode)
                    placed = _grouped(copied, g)
                    self._backend.pad_adjoint(placed, cells, reading, add=number > 0)
            if cells is not target:
                self._backend.copy(cells, target)

    def _weight_grad(
        self, dy: Array, x: Array, dw: Array, space: dict[str, Array]
    ) -> None:
        shape = dw.shape
        total = space["sum"].reshape(shape) if "sum" in space else dw
        for number, block in enumerate(self._cut.blocks(self.problem.geometry)):
            plan, copied = self._copied(number, x, block, space)
            sums = space["part"].reshape(shape) if number else total
            run_part(plan, dy[self._of_y(block)], copied, None, sums)
            if number:
                self._xp.add(total, sums, out=total)
        if total is not dw:
            self._backend.copy(total, dw)

    def _copied(
        self, number: int, x: Array, block: Block, space: dict[str, Array]
    ) -> tuple[Plan, Array]:
        """The plan of a block, and the copy of what it reads."""
        g = self.problem.geometry
        part = g.part(block)
        copied = in_buffer(space["x"], part.x_shape)
        cells = _cells(x, g, block.images)
        with stage("copy", "input", number):
            reading = Reading(g.axes, block.window, g.padding_mode)
            self._backend.pad_copy(cells, _grouped(copied, g), reading)
        return self._inner[part], copied

    def _of_y(self, block: Block) -> Index:
        return index_of_y(self.problem.geometry, block)


def staged(request: Request, planner: Planner, kind: type[Staged] = Staged) -> Staged:
    """The plan with the largest blocks that leave half of the limit to the others.

    Where none do, with the smallest that fit.

    Raises
    ------
    MemoryLimitError
        If no cut fits.
    ValueError
        If a CUDA graph is being captured.
    """
    backend, limit = request.backend, request.options.memory_limit
    refuse_capture(backend, _NEEDS_COPY)
    if isinstance(limit, int):
        return _fitting(request, planner, kind, limit)
    try:
        return _fitting(request, planner, kind, backend.default_memory_limit)
    except MemoryLimitError as error:
        return _fitting(request, planner, kind, error.smallest)


def _fitting(
    request: Request, planner: Planner, kind: type[Staged], limit: int
) -> Staged:
    errors: list[MemoryLimitError] = []
    for attempt in _attempts(request, planner, kind, limit):
        try:
            return attempt()
        except MemoryLimitError as error:
            errors.append(error)
    raise min(errors, key=lambda error: error.smallest)


def _attempts(
    request: Request, planner: Planner, kind: type[Staged], limit: int
) -> Iterator[Callable[[], Staged]]:
    """What makes the plan with each cut, those that are wanted most first.

    A small cut may need more than a large one: sums over blocks have their buffers too.
    """
    too_large = []
    for tiling in _cuts(request.geometry):
        shapes = tiling.samples(request.geometry)
        buffers = kind.buffers(request, tiling, shapes)

        def attempt(
            tiling: Tiling = tiling,
            shapes: dict[ConvGeometry, Block] = shapes,
            buffers: tuple[Buffer, ...] = buffers,
        ) -> Staged:
            own = workspace_bytes(buffers)
            try:
                inner = _inner(request, planner, kind, shapes, max(limit - own, 0))
            except MemoryLimitError as error:
                least = own + error.smallest
                raise MemoryLimitError(limit, least, NAMES[request.call]) from None
            return kind(request, planner, tiling, inner, buffers)

        if workspace_bytes(buffers) > limit // 2:
            too_large.append(attempt)
        else:
            yield attempt
    yield from reversed(too_large)


def _cuts(geometry: ConvGeometry) -> Iterator[Tiling]:
    """From the whole to a row of an image, or an image whose rows cannot be cut."""
    tiling: Tiling | None = Tiling(geometry.results, geometry.out[0])
    while tiling is not None:
        yield tiling
        is_last = geometry.has_input_dilation and tiling.images == 1
        tiling = None if is_last else tiling.halved()


def _inner(
    request: Request,
    planner: Planner,
    kind: type[Staged],
    shapes: dict[ConvGeometry, Block],
    limit: int,
) -> dict[ConvGeometry, Plan]:
    """The plans of all blocks."""

    def plan(part: ConvGeometry, block: Block) -> Plan:
        arrays, result, options = kind.planned(request, part, block)
        options = options._replace(memory_limit=limit)
        return planner(request.call, part, arrays, result, options, request.backend)

    calls = {part: partial(plan, part, block) for part, block in shapes.items()}
    return within(calls, limit)


def _is_ready(result: Array) -> bool:
    """Whether a plan for a fresh buffer can write here too."""
    return bool(result.flags.c_contiguous) and is_aligned(result)


def _is_whole(geometry: ConvGeometry, block: Block) -> bool:
    whole = (0, geometry.results), (0, geometry.out[0])
    return (block.images, block.output[0]) == whole


def in_buffer(buffer: Array, shape: tuple[int, ...]) -> Array:
    """The first cells of a buffer, in this shape."""
    return buffer[: math.prod(shape)].reshape(shape)


def index_of_y(geometry: ConvGeometry, block: Block) -> Index:
    """The index of a block in y, with an axis for images whether y has it or not."""
    images = slice(*block.images) if geometry.batched else None
    rows = slice(*block.output[0])
    return (images, slice(None), rows) if geometry.channels_first else (images, rows)


def _cells(x: Array, geometry: ConvGeometry, images: Range) -> Array:
    """The images of x that these of y are made of: (images, groups, C, *spatial)."""
    g = geometry
    each = grouped(x, 1, g.rank, channels_first=g.channels_first, batched=g.batched)[
        :, 0
    ]
    by_group = each.reshape(g.batch_groups, g.results, *each.shape[1:])
    return by_group[:, slice(*images)].swapaxes(0, 1)


def _grouped(copied: Array, geometry: ConvGeometry) -> Array:
    """A copy as `_cells` has the input: (images, groups, C, *window)."""
    return grouped(
        *(copied, geometry.batch_groups, geometry.rank),
        channels_first=geometry.channels_first,
        batched=True,
    )
