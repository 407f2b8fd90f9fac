"""The threads of a call: its workers, the cores they run on, and those of BLAS."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import Context, copy_context
from functools import partial
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from cuconv.backends.cpu.machine import BUFFER_ITEMS

Item = TypeVar("Item")

_OPENBLAS = [
    f"{prefix}openblas_set_num_threads{suffix}"
    for prefix in ("", "scipy_")
    for suffix in ("", "64_", "_64")
]
_AVX512 = ("SkylakeX", "Cooperlake", "SapphireRapids")
# The most threads to keep for later calls.
_MOST_IDLE = 64
# The core of the calling thread, where the system has a call for it: 0.1 µs.
_core: Callable[[], int] | None = (
    getattr(ctypes.CDLL(None), "sched_getcpu", None)
    if sys.platform == "linux"
    else None
)


class Queue(Iterator[Item]):
    """Items for the workers of a call: each goes to the first worker that asks."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()

    def __next__(self) -> Item:
        with self._lock:
            return next(self._items)

    def close(self) -> None:
        """Keep all further items back: one of the workers has failed."""
        with self._lock:
            self._items = iter(())


class _Worker:
    """A thread that runs jobs of one call at a time."""

    def __init__(self) -> None:
        self._start, self._end = threading.Lock(), threading.Lock()
        self._start.acquire()
        self._job: tuple[Context, Callable[[], None], threading.Lock] | None = None
        self._is_busy = False
        self._cores: set[int] = set()
        self._thread = threading.Thread(target=self._serve, name="cuconv", daemon=True)
        self._thread.start()

    def run(self, job: Callable[[], None], cores: set[int]) -> None:
        """Start a job on these cores, in the caller's context (for `numpy.errstate`).

        No cores: those that it has.
        """
        if cores and cores != self._cores:
            _set_cores(self._thread.native_id or 0, cores)
            self._cores = cores
        # A lock for each job: one that was waited for with an interruption may be in
        # either state.
        self._end = threading.Lock()
        self._end.acquire()
        self._job = copy_context(), job, self._end
        self._is_busy = True
        self._start.release()

    def stop(self) -> None:
        """End the thread."""
        self._job = None
        self._start.release()

    def wait(self) -> None:
        """Wait for the end of the job, if there is one; again after an interruption."""
        while self._is_busy:
            self._end.acquire()

    def _serve(self) -> None:
        while True:
            self._start.acquire()
            if self._job is None:
                return
            context, job, end = self._job
            self._job = None
            context.run(job)
            del context, job
            self._is_busy = False
            end.release()


class Workers:
    """Threads for all calls: those that no call uses wait for the next."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []

    def share(
        self,
        body: Callable[[int], None],
        count: int,
        close: Callable[[], None],
    ) -> None:
        """Run ``body(worker)`` for each of so many workers; the caller is worker 0.

        ``close`` is called when one fails, so that the others stop soon.
        """
        errors: list[BaseException] = []
        run = partial(_guarded, body, close, errors)
        others: list[_Worker] = []
        failure: BaseException | None = None
        allowed = _allowed_cores(count)
        try:
            cores = _cores_apart(allowed, count)
            _set_cores(0, cores[0])
            for worker in range(1, count):
                other = self._take()
                if other is None:
                    run(worker)
                else:
                    others.append(other)
                    other.run(partial(run, worker), cores[worker])
            body(0)
        except BaseException as error:  # noqa: BLE001 - raised below
            failure = error
        # Signals may raise anywhere.  No call may end before its workers, which use its
        # arrays, nor on fewer cores.
        while True:
            try:
                if failure is not None:
                    close()
                while others:
                    others[-1].wait()
                    self._keep(others.pop())
                _set_cores(0, allowed)
                break
            except BaseException as error:  # noqa: BLE001 - raised below
                failure = error
        if failure is not None:
            raise failure
        if errors:
            raise errors[0]

    def each(
        self,
        items: Iterable[Any],
        body: Callable[..., None],
        scratch: Sequence[Any],
    ) -> None:
        """Call ``body(number, item, worker's scratch)`` for every item."""
        if len(scratch) == 1:
            for number, item in enumerate(items):
                body(number, item, scratch[0])
            return
        queue = Queue(enumerate(items))

        def work(worker: int) -> None:
            for number, item in queue:
                body(number, item, scratch[worker])

        self.share(work, len(scratch), queue.close)

    def _take(self) -> _Worker | None:
        """A worker that waits, or a new one; None if the interpreter is ending."""
        if sys.is_finalizing():
            return None
        try:
            return self._idle.pop()
        except IndexError:
            pass
        try:
            return _Worker()
        except RuntimeError:  # it starts no threads any more
            return None

    def _keep(self, other: _Worker) -> None:
        if len(self._idle) < _MOST_IDLE:
            self._idle.append(other)
        else:
            other.stop()


def _allowed_cores(count: int) -> set[int]:
    """The cores of the calling thread; none if there is no need to divide them."""
    return set() if _core is None or count < 2 else os.sched_getaffinity(0)


def _cores_apart(allowed: set[int], count: int) -> list[set[int]]:
    """Divide cores among so many threads, the one that calls first, if they suffice.

    Linux wakes a thread on the core of the one that wakes it, where both stay for
    milliseconds, also where they take the interpreter's lock in turns.  The product of
    64 × 256 × 3136 in two halves took 0.95 to 1.3 ms after a sleep, and 0.5 on two
    cores, on an Intel Xeon; setting the cores of two threads takes 1 µs.
    """
    if _core is None or len(allowed) < max(count, 2):
        return [allowed] * max(count, 1)
    mine = _core()
    cores = [mine, *sorted(allowed - {mine})]
    return [set(cores[worker::count]) for worker in range(count)]


def _set_cores(thread: int, cores: set[int]) -> None:
    if cores:
        with suppress(OSError):  # cores that may be seen and not chosen
            os.sched_setaffinity(thread, cores)


def _guarded(
    body: Callable[[int], None],
    close: Callable[[], None],
    errors: list[BaseException],
    worker: int,
) -> None:
    """Run a body with a known size of NumPy's buffers, and keep its error."""
    try:
        with small_buffers():
            body(worker)
    except BaseException as error:  # noqa: BLE001 - raised by the caller
        close()
        errors.append(error)


class small_buffers:  # noqa: N801 - used as a function
    """Limit the buffers that NumPy uses for strided operands, within ``with``."""

    def __enter__(self) -> None:
        self._before = np.setbufsize(BUFFER_ITEMS)

    def __exit__(self, *error: object) -> None:
        np.setbufsize(self._before)


class Blas:
    """The threads of NumPy's BLAS; one within ``with``.

    The limit is a property of the process, so overlapping calls share it: the first
    to enter sets it and the last to leave restores what was there.
    """

    def __init__(self) -> None:
        controller = ThreadpoolController().select(user_api="blas")
        self._libraries = controller.lib_controllers
        self._setters = list(map(_setter, self._libraries))
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[int] = []
        # OpenBLAS for AVX-512 multiplies up to a million multiply-adds without packing.
        self.has_small_products = bool(self._libraries) and all(
            getattr(library, "architecture", "") in _AVX512
            for library in self._libraries
        )

    def threads(self) -> int:
        with self._lock:
            now = self._before or [lib.get_num_threads() for lib in self._libraries]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        return max(1, min([*now, cores or os.cpu_count() or 1])) if now else 1

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = [lib.get_num_threads() for lib in self._libraries]
                self._set([1] * len(self._libraries))
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._set(self._before)
                self._before = []

    def restore(self) -> None:
        """Restore the number of threads after a fork ended a call's thread."""
        if self._before:
            self._set(self._before)

    def _set(self, threads: list[int]) -> None:
        for setter, count in zip(self._setters, threads, strict=True):
            setter(count)


def _setter(library: Any) -> Callable[[int], object]:
    """The function that sets the number of threads of a library.

    For OpenBLAS its own: threadpoolctl's takes 5 µs for two calls, and lets only one
    thread call it.
    """
    if getattr(library, "threading_layer", "") == "pthreads":
        for name in _OPENBLAS:
            if hasattr(library.dynlib, name):
                found: Callable[[int], object] = getattr(library.dynlib, name)
                return found

    def set_threads(count: int) -> None:
        library.set_num_threads(count)
        # One thread may call it until that gives way, and the last of several calls to
        # leave may be another.
        give_way = getattr(library, "clear_controlling_thread", None)
        if give_way:
            give_way()

    return set_threads


def do(function: Callable[..., Any], *operands: Any) -> None:
    """Call a function."""
    function(*operands)


def each(
    items: Iterable[Any],
    body: Callable[..., None],
    scratch: Sequence[Any],
    *,
    single_threaded: bool,
) -> None:
    """`Workers.each` with the workers of this process."""
    with small_buffers(), one_blas_thread(single_threaded):
        WORKERS.each(items, body, scratch)


def one_blas_thread(is_single: bool) -> AbstractContextManager[object]:  # noqa: FBT001
    """Limit BLAS to one thread, unless it uses no other anyway."""
    return nullcontext() if is_single else BLAS


def _begin() -> None:
    """Set up the state that all calls share, also in a forked child.

    A child has none of its parent's threads, and a lock of theirs may never be
    released.
    """
    global BLAS, WORKERS
    if "BLAS" in globals():
        BLAS.restore()
    BLAS, WORKERS = Blas(), Workers()


BLAS: Blas
WORKERS: Workers
_begin()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin)
