"""The leaves over NumPy: strided copies, BLAS through matmul, a pool of threads."""

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from threadpoolctl import ThreadpoolController

from cuconv.arrays import Array, DType, Types, stored
from cuconv.geometry import Axis, Block, Range, Ranges, Tile, WindowGeometry
from cuconv.memory import Buffer
from cuconv.profiling import stage

# NumPy adds strided arrays by way of three buffers of this many items; a thousand are
# as fast as its default of 8192.
_BUFFER_ITEMS = 1024
_CALL_BYTES = 12 * 1024
_WORKER_BYTES = 8 * 1024


class HostLeaves:
    """See `cuconv.leaves.Leaves`."""

    xp: Any = np
    # Columns of one block.  Of 1, 2, 4 and 8 MiB, 4 was the best over six 3×3 and 7×7
    # layers of ResNet-50 and VGG-16, N = 8, on two AMD EPYC cores (1 MiB of L2 cache
    # each, 32 MiB of L3): 1 MiB took 1.04 (forward), 1.12 (input gradient) and 1.09
    # (weight gradient) times as long, 8 MiB 1.03, 1.01 and 1.01.
    block_bytes = 4 * 2**20
    default_memory_limit = 64 * 2**20
    largest_step = 2**62
    needs_partial = True

    def device_of(self, array: Array) -> AbstractContextManager[object]:
        del array
        return nullcontext()

    def overhead(self, workers: int, itemsize: int) -> int:
        # Views, slices and closures, measured with tracemalloc on CPython 3.11: at most
        # 12 KiB for one worker and 9 KiB for each more; and NumPy's own buffers.
        return _CALL_BYTES + workers * (_WORKER_BYTES + 3 * _BUFFER_ITEMS * itemsize)

    def workers(self) -> int:
        return _BLAS.threads()

    def operand_type(self, types: Types) -> DType:
        return types.accumulate

    def can_store(self, types: Types, dtype: DType) -> bool:
        return dtype == types.accumulate

    def gather_buffers(
        self, geometry: WindowGeometry, tile: Tile, source: DType, operand: DType
    ) -> tuple[Buffer, ...]:
        del source
        if not geometry.is_padded:
            return ()
        windows = [
            axis.window(0, size)
            for axis, size in zip(geometry.axes, tile.cells, strict=True)
        ]
        cells = math.prod(stop - start for start, stop in windows)
        return (Buffer("window", tile.images * geometry.channels * cells, operand),)

    def gather(
        self,
        x: Array,
        columns: Array,
        geometry: WindowGeometry,
        block: Block,
        buffers: dict[str, Array],
    ) -> None:
        _STOPPING.check()
        cells = tuple(slice(*span) for span in block.window)
        source = x[(..., *cells)]
        if any(map(any, block.padding)):
            source = _padded(source, block.padding, geometry, buffers["window"])
        np.copyto(columns, _windows(source, geometry.axes, columns.shape))

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
            target[...] = 0
        _STOPPING.check()
        for tap in _taps(geometry.kernel):
            met = list(map(_hits, geometry.axes, tap, block.output, cells))
            into = target[(..., *(inside for inside, _ in met))]
            part = columns[(slice(None),) * 3 + (*tap, *(which for _, which in met))]
            np.add(into, part, out=into)

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
        _STOPPING.check()
        product = out if not add else _like(partial, out)
        if product.strides[-1] == product.itemsize:
            np.matmul(a, b, out=product)
        else:
            # matmul writes rows; a result stored by columns is the product transposed.
            np.matmul(b.mT, a.mT, out=product.mT)
        if add:
            np.add(out, product, out=out)
        if bias is not None:
            np.add(out, bias, out=out)

    def copy(self, source: Array, target: Array) -> None:
        np.copyto(target, source, casting="unsafe")

    def parallel(self, body: Callable[[int], None], workers: int) -> None:
        stop = threading.Event()
        run = partial(_work, body, stop)
        others: list[Future[None]] = []
        # Threaded BLAS rounds by its number of threads, and other calls change that.
        with _BLAS.one_thread():
            try:
                others += (_submit(run, worker) for worker in range(1, workers))
                run(0)
            except BaseException:
                stop.set()
                raise
            finally:
                _wait(others)
        for error in (future.exception() for future in others):
            if error is not None:
                raise error


class _Stopping(threading.local):
    """In each thread, the event that tells its worker to stop."""

    event: threading.Event | None = None

    def check(self) -> None:
        if self.event is not None and self.event.is_set():
            raise _StoppedError


class _StoppedError(Exception):
    """Another worker of the same call has failed, and its error is the one to raise."""


_STOPPING = _Stopping()


def _work(body: Callable[[int], None], stop: threading.Event, worker: int) -> None:
    """Run a body, with NumPy's buffers for strided operands at a known size."""
    outer, _STOPPING.event = _STOPPING.event, stop
    before = np.setbufsize(_BUFFER_ITEMS)
    try:
        body(worker)
    except _StoppedError:
        pass
    except BaseException:
        stop.set()
        raise
    finally:
        np.setbufsize(before)
        _STOPPING.event = outer


def _submit(run: Callable[[int], None], worker: int) -> "Future[None]":
    """Hand a worker to the pool, in the caller's context: `numpy.errstate` is there."""
    try:
        return _POOL.submit(copy_context().run, run, worker)
    except RuntimeError as error:
        if "shutdown" not in str(error):
            raise
        # The interpreter is ending and takes no more threads: do the work here.
        done: Future[None] = Future()
        run(worker)
        done.set_result(None)
        return done


def _wait(futures: "list[Future[None]]") -> None:
    """Wait until no worker touches the arrays any more, interrupted or not."""
    interruption: BaseException | None = None
    while True:
        try:
            wait(futures)
            break
        except KeyboardInterrupt as error:
            interruption = error
    if interruption is not None:
        raise interruption


def _like(flat: Array, out: Array) -> Array:
    """The flat buffer as an array with the shape and the axis order of ``out``."""
    if out.strides[-1] == out.itemsize:
        return flat[: out.size].reshape(out.shape)
    return flat[: out.size].reshape(out.mT.shape).mT


def _padded(
    window: Array, padding: Ranges, geometry: WindowGeometry, buffer: Array
) -> Array:
    """The window with its zeros, in the buffer, axes in the order of the input."""
    with stage("pad"):
        inner = window.shape[3:]
        each = list(zip(inner, padding, strict=True))
        padded = stored(
            buffer,
            window.shape[:3],
            (),
            tuple(before + size + after for size, (before, after) in each),
            channels_first=geometry.channels_first,
        ).cells
        padded[...] = 0
        inside = tuple(slice(before, before + size) for size, (before, _) in each)
        np.copyto(padded[(..., *inside)], window)
        return padded


def _windows(source: Array, axes: tuple[Axis, ...], shape: tuple[int, ...]) -> Array:
    """Every window over the source, without a copy: (N, G, C, *kernel, *out)."""
    head, spatial = source.strides[:3], source.strides[3:]
    taps = (s * axis.dilation for s, axis in zip(spatial, axes, strict=True))
    steps = (s * axis.stride for s, axis in zip(spatial, axes, strict=True))
    return as_strided(source, shape, (*head, *taps, *steps), writeable=False)


def _taps(kernel: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every tap of a kernel, the last axis fastest; none of them listed beforehand."""
    if not kernel:
        yield ()
        return
    for tap in range(kernel[0]):
        for rest in _taps(kernel[1:]):
            yield (tap, *rest)


def _hits(axis: Axis, tap: int, output: Range, cells: Range) -> tuple[slice, slice]:
    """Where a tap of these output cells falls within ``cells``: (cells, outputs)."""
    offset = tap * axis.dilation - axis.before
    start = max(output[0], -((offset - cells[0]) // axis.stride))
    stop = max(start, min(output[1], (cells[1] - 1 - offset) // axis.stride + 1))
    first = start * axis.stride + offset - cells[0]
    last = first + (stop - start - 1) * axis.stride
    inside = slice(first, last + 1, axis.stride) if stop > start else slice(0, 0)
    return inside, slice(start - output[0], stop - output[0])


class _Blas:
    """The threads of NumPy's BLAS, and calls that must have only one of them.

    The limit is a property of the process, so overlapping calls share it: the first
    to enter sets it and the last to leave restores what was there.
    """

    def __init__(self) -> None:
        controller = ThreadpoolController().select(user_api="blas")
        self._libraries = controller.lib_controllers
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[int] = []

    def threads(self) -> int:
        with self._lock:
            now = self._before or [lib.get_num_threads() for lib in self._libraries]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        return max(1, min([*now, cores or os.cpu_count() or 1])) if now else 1

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._before = [lib.get_num_threads() for lib in self._libraries]
                self._set([1] * len(self._libraries))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._set(self._before)
                    self._before = []

    def restore(self) -> None:
        """Set back what a call has set that will never end: its thread is no more."""
        if self._before:
            self._set(self._before)

    def _set(self, threads: list[int]) -> None:
        for library, count in zip(self._libraries, threads, strict=True):
            library.set_num_threads(count)
            # threadpoolctl lets one thread alone set OpenBLAS's number until that
            # thread gives way; the last of several calls to leave may be another.
            give_way = getattr(library, "clear_controlling_thread", None)
            if give_way:
                give_way()


def _begin() -> None:
    """Set up the state that all calls share; again in a forked child.

    A child has none of its parent's threads, and a lock of theirs may be held forever.
    """
    global _BLAS, _POOL  # noqa: PLW0603 - one state for the process is the point
    if "_BLAS" in globals():
        _BLAS.restore()
    _BLAS = _Blas()
    _POOL = ThreadPoolExecutor(thread_name_prefix="cuconv")


_BLAS: _Blas
_POOL: ThreadPoolExecutor
_begin()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin)
