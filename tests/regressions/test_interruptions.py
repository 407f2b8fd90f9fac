"""Calls that end early: no worker outlives its call, and no call waits for ever."""

import os
import subprocess
import sys
import textwrap

import pytest

from cuconv.backends.cpu import threads


def _run(code: str) -> str:
    """What a process of its own prints, within a minute."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError, MemoryError])
def test_an_error_before_a_worker_starts_is_raised(monkeypatch, kind) -> None:
    """No one waits for a job that was never started."""

    def refuse() -> None:
        raise kind("in set-up")

    before = os.sched_getaffinity(0) if threads._core else set()
    done: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(threads, "copy_context", refuse)
        with pytest.raises(kind, match="in set-up"):
            threads.WORKERS.share(done.append, 3, lambda: None)
    assert done == []
    threads.WORKERS.share(done.append, 3, lambda: None)
    assert sorted(done) == [0, 1, 2]
    if threads._core:
        assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="it needs Linux")
def test_signals_at_any_time_leave_no_worker_behind() -> None:
    """A handler may raise anything, anywhere: in the set-up, and while it waits."""
    code = """
        import os, random, signal
        from cuconv.backends.cpu import threads

        class Alarm(Exception): pass

        def ring(*_): raise Alarm

        def body(worker):
            running.add(worker)
            sum(range(300))
            running.discard(worker)

        signal.signal(signal.SIGALRM, ring)
        before, running, rung = os.sched_getaffinity(0), set(), 0
        for number in range(4000):
            try:
                delay = random.uniform(1e-5, 2e-4)
                signal.setitimer(signal.ITIMER_REAL, delay)
                for _ in range(6):
                    threads.WORKERS.share(body, 2, lambda: None)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Alarm:
                rung += 1
            assert 1 not in running
            running.clear()
            assert os.sched_getaffinity(0) == before
        print(rung > 1000)
    """
    assert _run(code) == "True\n"


def test_a_call_while_the_interpreter_ends_returns() -> None:
    """Threads of Python no longer run then."""
    code = """
        import os
        import numpy as np
        from cuconv.backends.cpu import threads

        share, write = threads.WORKERS.share, os.write
        share(lambda worker: None, 2, lambda: None)

        class Late:
            def __del__(self):
                share(lambda worker: write(1, b"%d" % worker), 2, lambda: None)

        late = Late()
    """
    assert sorted(_run(code)) == ["0", "1"]
