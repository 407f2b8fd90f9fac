"""NumPy's side: BLAS has its threads again, forks compute, arenas are bounded."""

import os
import threading
import time
from typing import Any

import numpy as np
import pytest
from support import blas_threads, integers, large_arrays, strictly
from threadpoolctl import threadpool_limits

import cuconv
from cuconv import testing
from cuconv.backends.cpu import backend as host
from cuconv.backends.cpu import threads
from cuconv.memory import ALIGNED


@pytest.mark.parametrize("threads", [1, 2])
def test_blas_has_its_threads_again(threads) -> None:
    x, w = large_arrays()
    with threadpool_limits(threads, "blas"):
        before = blas_threads()
        cuconv.conv(x, w, padding=1)
        assert blas_threads() == before


def test_blas_has_its_threads_again_after_an_error(monkeypatch) -> None:
    """An error in one worker reaches the caller when all have stopped."""
    x, w = large_arrays()
    before, begun = blas_threads(), threading.Event()
    original = host.CpuBackend.gather

    def gather(backend: Any, *arguments: Any) -> None:
        if threading.current_thread().name.startswith("cuconv"):
            begun.set()
            raise MemoryError("in a worker")
        # The caller works too, and must leave something for the others.
        assert begun.wait(60)
        original(backend, *arguments)

    monkeypatch.setattr(host.CpuBackend, "gather", gather)
    with pytest.raises(MemoryError, match="in a worker"), cuconv.config(num_threads=3):
        strictly(x, w, memory_limit="300 KiB")  # blocks enough that none is recorded
    assert begun.is_set()
    assert blas_threads() == before


def test_one_thread_holds_while_any_call_runs() -> None:
    """Overlapping calls: the first lowers the number, the last one restores it."""
    blas = threads.Blas()
    with threadpool_limits(2, "blas"):
        before = blas_threads()
        first, second = blas, blas
        first.__enter__()
        second.__enter__()
        assert set(blas_threads()) <= {1}
        # What is asked meanwhile is the number from before.
        assert blas.threads() == max(1, min([*before, len(os.sched_getaffinity(0))]))
        first.__exit__(None, None, None)
        assert set(blas_threads()) <= {1}
        second.__exit__(None, None, None)
        assert blas_threads() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_too() -> None:
    """It has none of its parent's threads; waiting for them would be forever."""
    x, w = large_arrays()
    with cuconv.config(num_threads=3):
        _compare_in_a_child(x, w)


def _compare_in_a_child(x: np.ndarray, w: np.ndarray) -> None:
    wanted = cuconv.conv(x, w, padding=1)
    assert any(t.name.startswith("cuconv") for t in threading.enumerate())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            same = (cuconv.conv(x, w, padding=1) == wanted).all()
            os.write(write, b"same" if same else b"other")
        finally:
            os._exit(0)
    os.close(write)
    watch = threading.Timer(60, os.kill, (child, 9))
    watch.start()
    answer = os.read(read, 16)
    watch.cancel()
    os.waitpid(child, 0)
    assert answer == b"same"


def test_a_child_forked_during_a_call_has_all_blas_threads(monkeypatch) -> None:
    class Later(threads.ThreadpoolController):
        """A second BLAS, loaded since: the child finds more than its parent did."""

        def select(self, **words: Any) -> Any:
            found = super().select(**words)
            found.lib_controllers *= 2
            return found

    monkeypatch.setattr(threads, "ThreadpoolController", Later)
    with threadpool_limits(2, "blas"):
        wanted = blas_threads()
        with threads.BLAS:
            assert blas_threads() != wanted
            pid = os.fork()
            if pid == 0:
                os._exit(blas_threads() != wanted)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_workers_heed_the_callers_errstate() -> None:
    x, w = large_arrays()
    x[...] = 3e38
    with np.errstate(all="ignore"), cuconv.config(num_threads=3):
        y = strictly(x, np.abs(w) + 1)
    assert np.isinf(y).all()


def test_what_is_kept_never_passes_the_default_limit() -> None:
    """Many calls at once, of many sizes, each with an arena of its own."""
    most = host.CpuBackend.default_memory_limit
    arenas = host._Arenas(most)
    sizes = [most // 3, most // 2, most // 2, most, 2 * most, 1, 0, most // 3]
    for order in (sizes, sizes[::-1]):
        open_ = [arenas.borrowed(size) for size in order]
        for arena, size in zip(open_, order, strict=True):
            assert arena.__enter__().nbytes >= size - 2 * ALIGNED
        for arena in open_:
            arena.__exit__(None, None, None)
            assert sum(kept.nbytes for kept in arenas._kept) <= most
    assert arenas._kept
    arenas.clear()
    assert arenas._kept == []


def test_two_calls_never_share_an_arena() -> None:
    arenas = host._Arenas(2**20)
    with arenas.borrowed(100) as first, arenas.borrowed(100) as second:
        assert not np.shares_memory(first, second)
    assert len(arenas._kept) == 2
    for _ in range(3):
        with pytest.raises(KeyError), arenas.borrowed(100):
            raise KeyError("in a call")
    assert len(arenas._kept) == 2, "an arena is brought back by a call that fails"


def test_an_error_of_any_worker_reaches_the_caller_and_stops_the_others() -> None:
    for failing in range(3):
        done: list[int] = []
        queue = threads.Queue(range(1000))

        def body(worker: int, failing: int = failing, queue: Any = queue) -> None:
            for item in queue:
                if worker == failing:
                    raise KeyError(worker)
                time.sleep(1e-3)
                done.append(item)  # noqa: B023

        with pytest.raises(KeyError, match=str(failing)):
            threads.WORKERS.share(body, 3, queue.close)
        assert len(done) < 1000


def test_threads_of_a_call_have_cores_of_their_own() -> None:
    """And the caller has all of its cores again afterwards."""
    before = os.sched_getaffinity(0) if threads._core else set()
    if len(before) < 2:
        pytest.skip("it needs Linux and two cores")
    seen: dict[int, set[int]] = {}

    def body(worker: int) -> None:
        seen[worker] = os.sched_getaffinity(0)

    for count in (2, len(before), 2) * 3:
        seen.clear()
        threads.WORKERS.share(body, count, lambda: None)
        assert os.sched_getaffinity(0) == before
        assert sorted(seen) == list(range(count))
        assert set().union(*seen.values()) == before
        assert sum(map(len, seen.values())) == len(before)
    with pytest.raises(KeyError):
        threads.WORKERS.share({}.__getitem__, 2, lambda: None)
    assert os.sched_getaffinity(0) == before


def test_more_workers_than_cores_take_any() -> None:
    before = os.sched_getaffinity(0) if threads._core else {0}
    seen: list[int] = []

    def body(worker: int) -> None:
        seen.append(worker)
        if threads._core:
            assert len(os.sched_getaffinity(0)) == 1

    for core in sorted(before):
        if threads._core:
            os.sched_setaffinity(0, {core})
        try:
            threads.WORKERS.share(body, 3, lambda: None)
        finally:
            if threads._core:
                os.sched_setaffinity(0, before)
    assert sorted(seen) == sorted([0, 1, 2] * len(before))


@pytest.mark.parametrize("kernel", [1, 3])
def test_calls_are_repeated_by_two_workers(kernel) -> None:
    """Also if the plan has no buffers, so that workers have no memory of their own."""
    x = integers((1, 64, 112, 112), "float32")
    w = integers((64, 64, kernel, kernel), "float32")
    with cuconv.config(num_threads=1, precision="strict"):
        wanted = cuconv.conv(x, w)
    dy = integers(wanted.shape, "float32")
    with cuconv.config(num_threads=2, precision="strict"):
        assert cuconv.plan_conv(x.shape, w.shape).workers == 2
        first = cuconv.conv_backward(dy, x, w)
        for _ in range(3):
            testing.assert_equal(cuconv.conv(x, w), wanted)
            again = cuconv.conv_backward(dy, x, w)
            for one, other in zip(first, again, strict=True):
                testing.assert_equal(one, other)
