"""The backend for NumPy: strided copies, BLAS through matmul, a pool of threads."""

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np

from cuconv.arrays import Array, DType, Types, stored, strided
from cuconv.backends import padding
from cuconv.backends.cpu import threads
from cuconv.backends.cpu.deform import CpuDeform
from cuconv.backends.cpu.machine import PART_BYTES, call_overhead, cpu_machine
from cuconv.backends.cpu.pooling import CpuPools
from cuconv.backends.cpu.threads import Queue, small_buffers
from cuconv.backends.padding import Reading
from cuconv.config import settings
from cuconv.engine.costs import CPU_RATES, SMALL_PRODUCT
from cuconv.engine.program import Item, Phase, Program, Slots
from cuconv.geometry import Axis, Block, Range, Ranges, Tile, WindowGeometry
from cuconv.memory import ALIGNED, Buffer, aligned_start
from cuconv.profiling import stage

# OpenBLAS packs products of more than `SMALL_PRODUCT` multiply-adds, which are split
# therefore.  One core of an AMD EPYC (Zen 4), float32, GFLOP/s, whole and in parts:
# 64×64×3136 96 and 109, 64×576×448 97 and 115, 128×256×784 103 and 112, 512×512×784 104
# and 106, but 512×1024×392 104 and 87.
_LEAST_INNER, _MOST_INNER, _PART_ROWS = 48, 640, 32
# It reads them many times: the rows of the right side must be close enough in memory to
# stay in the cache.  512×128×3136 in place, 784 columns apart: 92 whole, 80 in parts.
_MOST_SPAN = 2**19
# NumPy copies the elements of a contiguous run one by one; as one item of so many bytes
# at most, they are copied faster.  An Intel Xeon (AVX-512) took, in ns for an element
# of float32, 2.3 and 0.72 in runs of 2, 1.2 and 0.25 of 4, 0.53 and 0.36 of 8, 0.23 and
# 0.13 of 16, 0.15 and 0.12 of 32, 0.11 and 0.10 of 64.
_SHORT_RUN = 256
_ALL = slice(None)
_HEAD = (_ALL,) * 3
# The most phases of a strided axis: each is two copies.  Windows of 256 at stride 128
# over (44, 1, 832) take 3.6 ms with 128 phases, and 0.3 without.
_MOST_PHASES = 8
# The largest number of programs that an arena keeps views for.
_MOST_PROGRAMS = 256


Do: TypeAlias = Callable[..., None]


class CpuBackend:
    """See `cuconv.backends.Backend`."""

    xp: Any = np
    device = "cpu"
    direct = None
    contraction = None
    library = None
    # Columns of one block.  Of 1, 2, 4 and 8 MiB, 4 was the best over six 3×3 and 7×7
    # layers of ResNet-50 and VGG-16, N = 8, on two AMD EPYC cores (1 MiB of L2 cache
    # each, 32 MiB of L3): 1 MiB took 1.04 (forward), 1.12 (input gradient) and 1.09
    # (weight gradient) times as long, 8 MiB 1.03, 1.01 and 1.01.
    block_bytes = 4 * 2**20
    default_memory_limit = 64 * 2**20
    part_bytes = PART_BYTES
    rates = CPU_RATES
    largest_step = 2**62
    tiles = None
    needs_partial = True

    @property
    def pools(self) -> CpuPools:
        return CpuPools(self.do, self.each, self.workers())

    @property
    def deform(self) -> CpuDeform:
        return CpuDeform(self)

    @staticmethod
    def missing(library: str) -> str:
        del library  # NumPy has what it needs
        return ""

    def device_of(self, array: Array) -> AbstractContextManager[object]:
        del array
        return nullcontext()

    overhead = staticmethod(call_overhead)

    def workers(self) -> int:
        asked = settings().num_threads
        return threads.BLAS.threads() if asked is None else asked

    def is_capturing(self) -> bool:
        return False

    def times(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        return [_milliseconds(call) for call in calls]

    def machine(self) -> tuple[str, ...]:
        return cpu_machine()

    def memory(self, nbytes: int) -> AbstractContextManager[Array]:
        return _ARENAS.borrowed(nbytes)

    def operand_type(self, types: Types) -> DType:
        return types.accumulate

    def can_store(self, types: Types, dtype: DType) -> bool:
        return dtype == types.accumulate

    def release(self) -> None:
        _ARENAS.clear()

    def gather_buffers(
        self, geometry: WindowGeometry, tile: Tile, source: DType, operand: DType
    ) -> tuple[Buffer, ...]:
        del source
        step = _phases(geometry)
        if not geometry.is_padded and step == 1:
            return ()
        windows = [
            axis.window(0, size)
            for axis, size in zip(geometry.axes, tile.cells, strict=True)
        ]
        *outer, last = (stop - start for start, stop in windows)
        cells = tile.images * geometry.channels * math.prod(outer)
        return (Buffer("window", cells * -(-last // step) * step, operand),)

    def gather(
        self,
        x: Array,
        columns: Array,
        geometry: WindowGeometry,
        block: Block,
        buffers: dict[str, Array],
    ) -> None:
        source = x[(..., *(slice(*span) for span in block.window))]
        step = _phases(geometry)
        if step > 1:
            self._gather_phases(
                source, columns, geometry, block, buffers["window"], step
            )
            return
        if any(map(any, block.padding)):
            source = self._padded(source, block.padding, geometry, buffers["window"])
        self._copy_windows(_windows(source, geometry.axes, columns.shape), columns)

    def _padded(
        self, window: Array, padding: Ranges, geometry: WindowGeometry, buffer: Array
    ) -> Array:
        """Copy the window with its zeros, axes in the order of the input."""
        with self.stage("pad"):
            inner = window.shape[3:]
            each = list(zip(inner, padding, strict=True))
            padded = stored(
                buffer,
                window.shape[:3],
                (),
                tuple(before + size + after for size, (before, after) in each),
                channels_first=geometry.channels_first,
            ).cells
            self.fill(padded, 0)
            cells = tuple(slice(before, before + size) for size, (before, _) in each)
            self._copy_windows(window, padded[(..., *cells)])
            return padded

    def _gather_phases(
        self,
        window: Array,
        columns: Array,
        geometry: WindowGeometry,
        block: Block,
        buffer: Array,
        step: int,
    ) -> None:
        """Gather by way of (N, G, C, *outer, phase, elements / step)."""
        *outer, last = geometry.axes
        sizes = [
            before + size + after
            for size, (before, after) in zip(
                window.shape[3:], block.padding, strict=True
            )
        ]
        run = -(-sizes[-1] // step)
        shape = (*window.shape[:3], *sizes[:-1], step, run)
        split = buffer[: math.prod(shape)].reshape(shape)
        with self.stage("pad"):
            if any(map(any, block.padding)):
                self.fill(split, 0)
            inside = tuple(
                slice(before, before + size)
                for size, (before, _) in zip(
                    window.shape[3:-1], block.padding[:-1], strict=True
                )
            )
            before = block.padding[-1][0]
            for phase in range(step):
                first = -(-(before - phase) // step) if before > phase else 0
                cells = window[..., first * step + phase - before :: step]
                run = slice(first, first + cells.shape[-1])
                self.copy(cells, split[(..., *inside, phase, run)])
        single_step = (*outer, last._replace(stride=1))
        rank = geometry.rank
        for phase in range(step):
            part = columns[(slice(None),) * (2 + rank) + (slice(phase, None, step),)]
            windows = _windows(split[..., phase, :], single_step, part.shape)
            self._copy_windows(windows, part)

    def _copy_windows(self, source: Array, target: Array) -> None:
        self.copy(_without_ones(source), _without_ones(target))

    def scatter(
        self,
        columns: Array,
        target: Array,
        geometry: WindowGeometry,
        block: Block,
        cells: Ranges,
        *,
        add: bool,
        deterministic: bool,
    ) -> None:
        del deterministic  # NumPy adds in the order of the taps, always.
        if not add:
            under = _apart(target, columns, geometry, block, cells)
            if under is None or under.size < target.size:
                self.fill(target, 0)
            if under is not None:
                # A sum, of which there is no other term: -0 becomes 0.
                zero = np.zeros((), target.dtype)
                self.do(np.add, _without_ones(columns), zero, _without_ones(under))
                return
        each = list(zip(geometry.axes, block.output, cells, strict=True))
        for tap, inside, outputs in _taps(each):
            into = target[(..., *inside)]
            self.do(np.add, into, columns[(*_HEAD, *tap, *outputs)], into)

    def gemm(
        self,
        a: Array,
        b: Array,
        out: Array,
        *,
        bias: Array | None = None,
        add: bool = False,
        partial: Array | None = None,
        fast: bool = False,
    ) -> None:
        del fast  # a CPU has no TF32
        if out.strides[-1] != out.itemsize:
            # matmul writes rows; a result stored by columns is the product transposed.
            a, b, out = b.mT, a.mT, out.mT
            bias = bias if bias is None else bias.mT
        if not add:
            _multiply(self.do, a, b, out)
        else:
            _add_product(self.do, a, b, out, partial)
        if bias is not None:
            out, bias = _without_batch(out, bias)
            self.do(np.add, out, bias, out)

    def copy(self, source: Array, target: Array) -> None:
        source, target = _runs_as_items(source, target)
        self.do(np.ndarray.__setitem__, target, ..., source)

    empty: Any = staticmethod(np.empty)

    def sum(self, array: Array, axes: tuple[int, ...], dtype: DType) -> Array:
        if array.dtype == dtype:
            return np.add.reduce(array, axes, dtype)
        with small_buffers():  # for the cast
            return np.add.reduce(array, axes, dtype)

    def add_unsafely(self, target: Array, summand: Array) -> None:
        self.xp.add(target, summand, out=target, casting="unsafe")

    def fill(self, target: Array, value: int) -> None:
        run = target.reshape(-1) if target.flags.c_contiguous else target
        self.do(np.ndarray.fill, run, value)

    def pad_copy(
        self,
        cells: Array,
        copied: Array,
        reading: Reading,
    ) -> None:
        for source, target in padding.copies(cells, copied, reading):
            self.copy(source, target)

    def pad_adjoint(
        self,
        copied: Array,
        cells: Array,
        reading: Reading,
        *,
        add: bool,
    ) -> None:
        each = padding.sums(copied, cells, reading)
        first = None if add else next(each, None)
        if first is not None and first[2]:
            self.copy(first[1], first[0])
        elif not add:
            self.fill(cells, 0)
            each = padding.sums(copied, cells, reading)
        for inside, outside, _ in each:
            self.do(np.add, inside, outside, inside)

    stage = stage

    do = staticmethod(threads.do)
    each = staticmethod(threads.each)
    alone = small_buffers

    def execute(self, program: Program, arrays: Sequence[Array | None]) -> None:
        phases, bound = program.current_phases(), [program.slots]
        arena = _ARENAS.take(program.nbytes) if program.kept else None
        try:
            if arena is not None:
                bound = arena.slots_of(program)
            if program.single_threaded and not program.is_buffered:
                _run(phases, program.placed(arrays, bound[0]))
                return
            each = [program.placed(arrays, slots) for slots in bound]
            # Threaded BLAS rounds by its number of threads, and other calls change it.
            with (
                small_buffers() if program.is_buffered else nullcontext(),
                threads.one_blas_thread(program.single_threaded),
            ):
                if program.workers == 1:
                    _run(phases, each[0])
                    return
                if arena is None:  # nothing is a worker's own
                    each *= program.workers
                for items, workers in phases:
                    queue = Queue(items)
                    count = min(len(items), workers)
                    threads.WORKERS.share(
                        partial(_run_shared, queue, each), count, queue.close
                    )
        finally:
            if arena is not None:
                _ARENAS.give_back(arena)


def _run(phases: tuple[Phase, ...], slots: Slots) -> None:
    """Run all phases in this thread."""
    for items, _ in phases:
        for steps in items:
            for function, operands in steps:
                function(*operands(slots))


def _run_shared(queue: Iterable[Item], each: list[Slots], worker: int) -> None:
    """Run the items that this worker gets."""
    slots = each[worker]
    for steps in queue:
        for function, operands in steps:
            function(*operands(slots))


def _milliseconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return (perf_counter() - start) * 1e3


class _Arena:
    """Memory for buffers, from an aligned place on, and the programs' views of it.

    The views are freed with the arena.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        raw = np.empty(nbytes, dtype=np.uint8)
        start = aligned_start(raw) if nbytes else 0
        self.raw = raw[start : start + nbytes - ALIGNED] if nbytes else raw
        self._slots: dict[Program, list[Slots]] = {}

    def slots_of(self, program: Program) -> list[Slots]:
        found = self._slots.get(program)
        if found is None:
            if len(self._slots) >= _MOST_PROGRAMS:
                self._slots.clear()
            found = self._slots[program] = program.bound(self.raw)
        return found


class _Arenas:
    """Workspaces that calls reuse.

    Fresh memory is mapped page by page as it is first written, which costs more than
    the copies made in it.  A call takes an arena from here, or a new one if those here
    are too small, and returns it; at most ``most`` bytes are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: list[_Arena] = []
        self._held = 0

    @contextmanager
    def borrowed(self, nbytes: int) -> Iterator[Array]:
        arena = self.take(nbytes)
        try:
            yield arena.raw
        finally:
            self.give_back(arena)

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._held = 0

    def take(self, nbytes: int) -> _Arena:
        with self._lock:
            if self._kept:
                arena = self._kept.pop()
                self._held -= arena.nbytes
                if arena.nbytes >= nbytes:
                    return arena
                del arena  # frees its memory before more is allocated
        return _Arena(nbytes)

    def give_back(self, arena: _Arena) -> None:
        with self._lock:
            if self._held + arena.nbytes <= self._most:
                self._kept.append(arena)
                self._held += arena.nbytes


def _add_product(do: Do, a: Array, b: Array, out: Array, partial: Array) -> None:
    """``out += a @ b``, in parts that fit into the buffer for the product."""
    if out.size <= partial.size:
        product = partial[: out.size].reshape(out.shape)
        _multiply(do, a, b, product)
        do(np.add, out, product, out)
        return
    each, picks = out[0].size, list[int | slice](range(len(out)))
    if out.ndim == 2 and len(out) == 1:
        # A row that is longer than the buffer is split as a column of the transpose.
        _add_product(do, b.swapaxes(-1, -2), a.swapaxes(-1, -2), out.T, partial)
        return
    if each <= partial.size or out.ndim == 2:
        step = max(partial.size // each, 1)
        picks = [slice(i, i + step) for i in range(0, len(out), step)]
    for pick in picks:
        left = a[pick] if out.ndim == 2 else _picked(a, pick)
        right = b if out.ndim == 2 else _picked(b, pick)
        _add_product(do, left, right, out[pick], partial)


def _picked(matrices: Array, pick: int | slice) -> Array:
    """Select matrices of a batch; a batch of one is broadcast."""
    if len(matrices) > 1:
        return matrices[pick]
    return matrices[0] if isinstance(pick, int) else matrices


def _multiply(do: Do, a: Array, b: Array, out: Array) -> None:
    """``out = a @ b``, split into products that BLAS multiplies without packing."""
    rows, columns = _part(a, b, out)
    if not rows:
        do(*_product(a, b, out))
        return
    whole = out.shape[-2] // rows * rows, out.shape[-1] // columns * columns
    for tall in (slice(0, whole[0]), slice(whole[0], out.shape[-2])):
        for wide in (slice(0, whole[1]), slice(whole[1], out.shape[-1])):
            left, right, into = a[..., tall, :], b[..., wide], out[..., tall, wide]
            if into.size and tall.start == wide.start == 0:
                _multiply_parts(do, left, right, into, rows, columns)
            elif into.size:
                do(np.matmul, left, right, into)


def _product(a: Array, b: Array, out: Array) -> tuple[Any, Array, Array, Array]:
    """The function for a product, and its operands: `numpy.dot` where it calls BLAS.

    It takes 0.5 µs for a small product, and `numpy.matmul` 0.9 (Intel Xeon).
    """
    a, b, out = _without_batch(a, b, out)
    is_ready = (
        out.ndim == 2
        and out.flags.c_contiguous
        and out.dtype.char in "fd"
        and min(*a.shape, b.shape[1]) > 1
        and a.dtype == b.dtype == out.dtype
        and all(m.flags.forc and m.flags.aligned for m in (a, b))
    )
    return np.dot if is_ready else np.matmul, a, b, out


def _without_batch(*matrices: Array) -> tuple[Array, ...]:
    """View matrices without the axes before them, where all have one element there."""
    while matrices[0].ndim > 2 and all(len(each) == 1 for each in matrices):
        matrices = tuple([each[0] for each in matrices])
    return matrices


def _multiply_parts(
    do: Do, a: Array, b: Array, out: Array, rows: int, columns: int
) -> None:
    """Multiply blocks of rows by blocks of columns; the larger operand is read once."""
    left, right = _rows_apart(a, rows), _columns_apart(b, columns)
    into = _columns_apart(_rows_apart(out, rows), columns)
    if a.shape[-2] > b.shape[-1]:
        left, right = left[..., :, None, :, :], right[..., None, :, :, :]
    else:
        left, right = left[..., None, :, :, :], right[..., :, None, :, :]
        into = into.swapaxes(-3, -4)
    do(np.matmul, left, right, into)


def _part(a: Array, b: Array, out: Array) -> tuple[int, int]:
    """Rows and columns of one part of a product, or zeros to leave it unsplit."""
    inner, item = a.shape[-1], out.itemsize
    if out.shape[-2] * inner * out.shape[-1] <= SMALL_PRODUCT:
        return 0, 0
    is_whole = (
        not threads.BLAS.has_small_products
        or out.dtype.char not in "fd"
        or not _LEAST_INNER <= inner <= _MOST_INNER
        or out.shape[-1] < _LEAST_INNER
        or inner * b.strides[-2] > _MOST_SPAN
        or out.shape[-2] * inner * item > _MOST_SPAN // 2
        or not a.strides[-1] == b.strides[-1] == out.strides[-1] == item
    )
    if is_whole:
        return 0, 0
    rows = min(_PART_ROWS if inner > 2 * _PART_ROWS else 2 * _PART_ROWS, out.shape[-2])
    columns = SMALL_PRODUCT // (rows * inner) // 8 * 8
    return rows, min(columns, out.shape[-1])


def _rows_apart(matrix: Array, rows: int) -> Array:
    return matrix.reshape(*matrix.shape[:-2], -1, rows, matrix.shape[-1])


def _columns_apart(matrix: Array, columns: int) -> Array:
    head, last = matrix.shape[:-1], matrix.shape[-1]
    apart = matrix.reshape(*head, last // columns, columns)
    return apart.swapaxes(-2, -3)


def _phases(geometry: WindowGeometry) -> int:
    """The number of phases that the last axis is split into before it is gathered.

    With a stride, each tap would read single elements.  Split by phase of the stride,
    the elements that a tap reads are contiguous.  The 7×7 windows of stride 2 of
    ResNet-50 take 0.12 ns an element so, and 0.31 without phases.
    """
    if not geometry.axes or not geometry.channels_first:
        return 1
    last = geometry.axes[-1]
    pays = last.dilation == 1 and last.stride < last.kernel
    return last.stride if pays and last.stride <= _MOST_PHASES else 1


def _windows(source: Array, axes: tuple[Axis, ...], shape: tuple[int, ...]) -> Array:
    """Every window over the source, without a copy: (N, G, C, *kernel, *out)."""
    head, spatial = source.strides[:3], source.strides[3:]
    taps = [s * axis.dilation for s, axis in zip(spatial, axes, strict=True)]
    steps = [s * axis.stride for s, axis in zip(spatial, axes, strict=True)]
    return strided(source, shape, (*head, *taps, *steps))


def _runs_as_items(source: Array, target: Array) -> tuple[Array, Array]:
    """View short runs that are contiguous in both arrays as one item each.

    Neighbouring axes of the target's memory make a run, in whichever order they come.
    """
    if source.dtype != target.dtype or source.shape != target.shape:
        return source, target
    strides, shape, run = target.strides, target.shape, target.itemsize
    order = sorted(range(target.ndim), key=strides.__getitem__, reverse=True)
    inner = len(order)
    while inner:
        axis = order[inner - 1]
        if not source.strides[axis] == strides[axis] == run:
            break
        inner -= 1
        run *= shape[axis]
    if not (inner and target.itemsize < run <= _SHORT_RUN):
        return source, target
    item = np.dtype((np.void, run))
    merged = *[shape[axis] for axis in order[:inner]], run // target.itemsize
    source, target = source.transpose(order), target.transpose(order)
    source, target = source.reshape(merged), target.reshape(merged)
    return source.view(item)[..., 0], target.view(item)[..., 0]


def _without_ones(array: Array) -> Array:
    """View an array without its axes of length 1: NumPy takes a microsecond for two."""
    shape = array.shape
    if 1 not in shape:
        return array
    return array[(*[0 if n == 1 else _ALL for n in shape], ...)]


def _apart(
    target: Array,
    columns: Array,
    geometry: WindowGeometry,
    block: Block,
    cells: Ranges,
) -> Array | None:
    """View the target as the columns of a block; None where windows share cells.

    Or where they do not lie within it, or bits cannot be kept so.
    """
    if target.dtype != columns.dtype or target.dtype.kind in "bV":
        return None
    place: list[slice] = []
    for axis, output, span in zip(geometry.axes, block.output, cells, strict=True):
        inside = axis.apart(output, span)
        if inside is None:
            return None
        place.append(slice(*inside))
    return _windows(target[(..., *place)], geometry.axes, columns.shape)


def _taps(
    axes: Sequence[tuple[Axis, Range, Range]],
) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]]:
    """Every tap, the last axis fastest, with the elements and outputs that it meets.

    One at a time: there may be more than fit into memory.
    """
    if not axes:
        yield (), (), ()
        return
    (axis, output, cells), *others = axes
    for tap in range(axis.kernel):
        inside, outputs = axis.hits(tap, output, cells)
        for more in _taps(others):
            yield (tap, *more[0]), (inside, *more[1]), (outputs, *more[2])


def _begin() -> None:
    """Forget workspaces in a forked child: a lock of them may never be released."""
    global _ARENAS  # noqa: PLW0603 - one state for the process
    _ARENAS = _Arenas(CpuBackend.default_memory_limit)


_ARENAS: _Arenas
_begin()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin)
