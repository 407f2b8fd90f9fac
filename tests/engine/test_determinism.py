"""The same bits: whatever the threads, the call, and what else runs meanwhile."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from cases import LARGE
from support import (
    LAYOUTS,
    OPERATIONS,
    ROUNDED,
    STRICT,
    Case,
    Operands,
    fill_arenas,
    forget_plans,
    of,
    operands,
    plan_of,
    run,
    slowly,
    smallest_limit,
)
from threadpoolctl import threadpool_limits

import cuconv

THREADS = (1, 2, 3, 5)


def random(case: Case) -> Operands:
    rng = np.random.default_rng(7)
    plan = cuconv.plan_conv(case.x_shape, case.w_shape, **case.options)
    shapes = (case.x_shape, case.w_shape, plan.result_shape)
    return Operands(*(rng.standard_normal(s).astype("f4") for s in shapes))


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("name", [*STRICT, *ROUNDED, "auto"])
@pytest.mark.parametrize("layout", [LAYOUTS[0], *slowly(LAYOUTS[1])])
@pytest.mark.parametrize("op", OPERATIONS)
def test_the_number_of_threads_does_not_show(op, layout, name) -> None:
    """Every problem is shared out here, however small, in many pieces or few."""
    compared = most = 0
    for case in (case.in_layout(layout) for case in LARGE.values()):
        options = {"strategy": name, "precision": "fast"}
        if plan_of(op, case, **options) is None:
            continue
        arrays = random(case)

        def call(**more: Any) -> Any:
            return run(op, arrays, case, **options, **more)  # noqa: B023

        least = smallest_limit(call)
        for limit in (None, least + 2**15, least + 2**18):
            found = set()
            for threads in THREADS:
                with cuconv.config(num_threads=threads):
                    found.add(call(memory_limit=limit).tobytes())
                    plan = plan_of(op, case, memory_limit=limit, **options)
                most = max(most, plan.workers)
            assert len(found) == 1, f"{name}, {case}, limit {limit}"
            compared += len(THREADS)
    if name == "depthwise" and layout == "channels_last":
        return
    assert compared >= 12
    # Loops over taps share the sums of a gradient among two, and blocks of an image.
    assert most > 1


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_threads_of_blas_do_not_show(op) -> None:
    for case in LARGE.values():
        arrays = random(case)
        found = set()
        for threads in (1, 2):
            with threadpool_limits(threads, "blas"):
                found.add(run(op, arrays, case, precision="standard").tobytes())
        assert len(found) == 1


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("name", [*STRICT, *ROUNDED, "auto"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_rubbish_in_the_arenas_does_not_show(op, name) -> None:
    """Also where there are fewer blocks than sums of a gradient side by side."""
    ran = 0
    few = (
        Case((1, 900, 2), (1, 900, 2), {}),
        Case((1, 8, 5, 6), (8, 8, 3, 3), {"padding": 1}),
        Case((2, 9, 4, 5), (9, 1, 3, 3), {"groups": 9, "padding": 1}),
        Case((2, 8, 3), (300, 8, 1), {}),
        Case((1, 2, 9, 8), (3, 2, 6, 5), {"padding": 2}),
        Case((1, 2, 3), (2, 2, 2), {"padding": 3, "stride": 4}),
    )
    for case in (case.in_layout(layout) for case in few for layout in LAYOUTS):
        arrays = operands(case, "float32")
        wanted = None
        for limit in (None, 2**16, 2**18):
            options = {"strategy": name, "precision": "fast", "memory_limit": limit}
            with contextlib.suppress(cuconv.MemoryLimitError):
                plan = plan_of(op, case, **options)
                if plan is None:
                    break
                if wanted is None:
                    fill_arenas(0)
                    wanted = run(op, Operands(*(a.astype("f8") for a in arrays)), case)
                for value in (np.nan, 1e30):
                    fill_arenas(value)
                    got = plan(*of(op, arrays))
                    np.testing.assert_array_equal(np.rint(got), wanted)
                    ran += 1
    assert ran >= 6


def test_threads_with_settings_of_their_own() -> None:
    """Eight threads, every one in a block of its own, over the same arrays."""
    case = Case((4, 64, 28, 28), (64, 64, 3, 3), {"padding": 1})
    arrays = random(case)
    settings = [
        {"num_threads": n, "precision": p, "memory_limit": m}
        for n in (1, 3)
        for p in ("strict", "fast")
        for m in (2**19, 2**24)
    ]

    def all_three(number: int) -> list[bytes]:
        with cuconv.config(**settings[number % len(settings)]):
            return [
                run(op, arrays, case, precision=None).tobytes() for op in OPERATIONS
            ]

    wanted = [all_three(i) for i in range(len(settings))]
    assert len({one[0] for one in wanted}) > 1, "the settings changed nothing"
    forget_plans()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(all_three, range(64)))
    assert len(found) == 64
    for number, one in enumerate(found):
        assert one == wanted[number % len(settings)]


def test_one_plan_in_many_threads() -> None:
    """A plan holds no call's state: also the smallest, whose buffers it may keep."""
    cases = {
        "small": Case((2, 3, 9, 8), (4, 3, 3, 3), {"padding": 1}),
        "large": LARGE["square"],
    }
    for case in cases.values():
        x, w, _ = random(case)
        for plan in (
            plan_of("forward", case),
            plan_of("forward", case).prepare(w),
            lambda *a, c=case: cuconv.conv(*a, **c.options),
        ):
            prepared = getattr(plan, "is_prepared", False)
            inputs = [x * k for k in (1, 2, 4, 8)]
            each = [(one,) if prepared else (one, w) for one in inputs]
            wanted = [plan(*arrays).tobytes() for arrays in each]
            gate = threading.Barrier(8)

            def many(number: int) -> int:
                gate.wait(60)  # noqa: B023
                good = 0
                for i in range(number, number + 100):
                    got = plan(*each[i % 4]).tobytes()  # noqa: B023
                    good += got == wanted[i % 4]  # noqa: B023
                return good

            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(many, range(8))) == [100] * 8
