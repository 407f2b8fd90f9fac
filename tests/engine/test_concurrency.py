"""Several threads and processes at once: right answers, and BLAS as it was."""

import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from cases import CASES
from support import (
    OPERATIONS,
    blas_threads,
    large_arrays,
    operands,
    reference,
    run,
    strictly,
    to_device,
    to_host,
)
from threadpoolctl import threadpool_limits

import cuconv
from cuconv import testing


def test_many_threads_give_right_answers(xp) -> None:
    jobs = []
    for case in CASES.values():
        arrays = operands(case, "float32")
        for op in OPERATIONS:
            wanted = reference(op, arrays, case)
            jobs.append((partial(run, op, arrays.on(xp), case), wanted))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda job: job[0](), jobs * 5))
    assert len(answers) == 5 * 3 * len(CASES)
    for answer, (_, wanted) in zip(answers, jobs * 5, strict=True):
        testing.assert_equal(answer, wanted)


def test_threads_that_each_have_workers(xp, choices) -> None:
    """More calls than cores, all handing work to one pool: none waits forever."""
    x, w = large_arrays()
    with threadpool_limits(1, "blas"):
        wanted = strictly(x, w, memory_limit="1 MiB")
    mine = to_device(xp, x), to_device(xp, w)
    before = blas_threads()
    choices.clear()

    def call() -> Any:
        with cuconv.config(num_threads=4):
            return strictly(*mine)

    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(call) for _ in range(24)]
        answers = [call.result(timeout=120) for call in calls]
    if xp is np:
        assert len(choices) == 24
        assert min(candidate.tiling.workers for candidate in choices) > 1
    for answer in answers:
        testing.assert_equal(answer, wanted)
    assert blas_threads() == before


def test_a_result_is_the_callers_alone(xp) -> None:
    """No buffer of a call lives on in its result or in the next one's."""
    case = CASES["two axes, all different"]
    arrays = operands(case, "float32").on(xp)
    first = run("forward", arrays, case)
    kept = to_host(first).copy()
    second = run("forward", arrays, case)
    second[...] = 99
    run("input_grad", arrays, case)[...] = 98
    testing.assert_equal(first, kept)


def test_the_same_bits_while_other_threads_convolve() -> None:
    """Their calls set BLAS's threads, and OpenBLAS rounds by how many there are."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 16, 13, 13), dtype=np.float32)
    dy = rng.standard_normal((4, 16, 11, 11), dtype=np.float32)
    large, stop = large_arrays(), threading.Event()
    wanted = cuconv.conv_weight_grad(dy, x, (16, 16, 3, 3))

    def disturb() -> None:
        while not stop.is_set():
            cuconv.conv(*large, padding=1)

    other = threading.Thread(target=disturb)
    other.start()
    try:
        for _ in range(500):
            got = cuconv.conv_weight_grad(dy, x, (16, 16, 3, 3))
            assert got.tobytes() == wanted.tobytes()
    finally:
        stop.set()
        other.join()


def run_script(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_threads_that_outlive_the_main_one() -> None:
    """The pool takes no work then; the call does it all by itself."""
    done = run_script("""
        import threading, time
        import numpy as np, cuconv
        x, w = np.ones((8, 16, 56, 56), "f4"), np.ones((16, 16, 3, 3), "f4")
        def late():
            threading.main_thread().join()
            time.sleep(0.1)
            with cuconv.config(num_threads=3, precision="strict"):
                y = cuconv.conv(x, w)
                dw = cuconv.conv_weight_grad(y, x, w.shape)
            print(y.sum() == y.size * 144, dw.shape)
        threading.Thread(target=late).start()
    """)
    assert done.stderr == ""
    assert done.stdout.split() == ["True", "(16,", "16,", "3,", "3)"]


def test_nothing_is_written_after_an_interruption() -> None:
    done = run_script("""
        import signal, time
        import numpy as np, cuconv
        x, w = np.ones((64, 64, 56, 56), "f4"), np.ones((256, 64, 3, 3), "f4")
        out = np.zeros((64, 256, 54, 54), "f4")
        cuconv.conv(x[:2], w)
        # A clock of the kernel's: a thread would wait for the workers to let it run.
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.03, 0.02)
            cuconv.conv(x, w, out=out)
            print("too fast")
        except KeyboardInterrupt:
            pass
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        before = out.copy()
        time.sleep(0.3)
        assert (out == 0).any(), "not interrupted at all"
        print(np.array_equal(before, out))
    """)
    assert done.stdout.split() == ["True"], done.stderr
