"""``strategy="benchmark"``: right results, and winners that are remembered or not."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import CASES, EMPTY
from support import (
    OPERATIONS,
    Case,
    forget_plans,
    forget_winners,
    host_peak,
    let_number_win,
    operands,
    races_of,
    reference,
    run,
    smallest_limit,
)

import cuconv
from cuconv import testing
from cuconv.backends import backend_of, backend_on
from cuconv.backends.cpu import backend as host
from cuconv.backends.cpu import machine
from cuconv.engine import autotune as tuning

BENCHMARK = {"strategy": "benchmark"}
CASE = Case((2, 8, 9, 8), (8, 8, 3, 3), {"padding": 1})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test's own, empty on disk and in memory."""
    monkeypatch.setenv("CUCONV_CACHE_DIR", str(tmp_path / "cache"))
    forget_winners()
    yield tmp_path / "cache"
    forget_winners()


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many candidates were timed, each time that any were."""
    return races_of(monkeypatch)


def records(folder: Path) -> dict[str, Any]:
    (file,) = folder.iterdir()
    return json.loads(file.read_text(encoding="utf-8"))


def rewrite(folder: Path, text: str | bytes) -> None:
    """As if another process had left this."""
    (file,) = folder.iterdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    forget_winners()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("op", OPERATIONS)
def test_results_are_right(xp, op, races) -> None:
    for name in ("two axes, all different", "pointwise", "depthwise", "no batch axis"):
        case = CASES[name]
        arrays = operands(case, "float32")
        wanted = reference(op, arrays, case)
        for _ in range(2):
            got = run(op, arrays.on(xp), case, **BENCHMARK)
            testing.assert_equal(got, wanted, dtype=np.float32)
        out = xp.full(wanted.shape, 77, np.float32)
        assert run(op, arrays.on(xp), case, out=out, **BENCHMARK) is out
        testing.assert_equal(out, wanted)
    assert len(races) >= 4


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("op", OPERATIONS)
def test_nothing_to_do_is_not_timed(op, races) -> None:
    for case in EMPTY:
        arrays = operands(case, "float32")
        got = run(op, arrays, case, **BENCHMARK)
        testing.assert_equal(got, reference(op, arrays, case))
    assert races == []


def test_the_winner_is_remembered_in_memory_and_on_disk(folder, races, choices) -> None:
    arrays = operands(CASE, "float32")
    for _ in range(3):
        run("forward", arrays, CASE, precision="standard", **BENCHMARK)
    assert len(races) == 1
    assert races[0] > 2
    (known,) = records(folder).values()
    winner = choices[-1]
    words = winner.strategy.describe(winner.tiling.variant)
    assert known == [winner.strategy.name, words, False]
    assert choices[-2:] == [winner, winner]
    forget_winners()
    run("forward", arrays, CASE, precision="standard", **BENCHMARK)
    assert len(races) == 1, "the next process would measure again"
    for options in ({"precision": "strict"}, {"memory_limit": "1 MiB"}):
        run(
            "forward", arrays, CASE, **{"precision": "standard", **options}, **BENCHMARK
        )
    run("weight_grad", arrays, CASE, precision="standard", **BENCHMARK)
    assert len(races) == len(records(folder)) == 4


def test_the_fastest_is_the_one_with_the_smallest_time(xp, monkeypatch) -> None:
    """By a clock of our own: a slow first round and two outliers do not count."""
    now = [0.0]
    if xp is np:
        monkeypatch.setattr(host, "perf_counter", lambda: now[0])
    elif getattr(xp, "IS_STAND_IN", False):
        clock = SimpleNamespace(perf_counter=lambda: now[0])
        monkeypatch.setattr(xp.cuda.stream, "time", clock)
    else:
        pytest.skip("the clock of a real device cannot be set")
    rounds = {
        "a": [1, 5, 5, 5, 5, 5],
        "b": [90, 3, 3, 80, 3, 80],
        "c": [1, 4, 4, 4, 4, 4],
    }

    def call(name: str) -> Any:
        times = iter(rounds[name])

        def body() -> None:
            now[0] += next(times)

        return body

    assert tuning.fastest(backend_of(xp), [call(name) for name in "abc"]) == 1


BROKEN = {
    "empty": "",
    "cut short": '{"a": ["im2col", [',
    "no object": "[1, 2]",
    "null": "null",
    "binary": "\x00\x01",
    "no text": b"\xff\xfe\x00{",
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_costs_a_measurement_alone(folder, races, name) -> None:
    arrays = operands(CASE, "float32")
    wanted = run("forward", arrays, CASE, **BENCHMARK)
    rewrite(folder, BROKEN[name])
    testing.assert_equal(run("forward", arrays, CASE, **BENCHMARK), wanted)
    assert len(races) == 2
    assert len(records(folder)) == 1, "and it is whole again"


RECORDS = {
    "a strategy that there is not": ["magic", "", False],
    "a strategy that cannot run": ["depthwise", "", False],
    "a variant that there is not": ["winograd", "tiles of 9×9", False],
    "a form that there is not": ["im2col", "", True],
    "no list": "im2col",
    "null": None,
    "too short": ["im2col", ""],
    "too long": ["im2col", "", False, 1],
    "other types": [1, 2, 3],
    "nested": {"strategy": "im2col"},
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_cannot_be_is_not_believed(folder, races, choices, name) -> None:
    arrays = operands(CASE, "float32")
    wanted = run("forward", arrays, CASE, **BENCHMARK)
    (key,) = records(folder)
    rewrite(folder, json.dumps({key: RECORDS[name]}))
    testing.assert_equal(run("forward", arrays, CASE, **BENCHMARK), wanted)
    assert len(races) == 2
    assert choices[-1].strategy.name in ("im2col", "tap_matmul", "pointwise")
    (known,) = records(folder).values()
    assert known != RECORDS[name]


def test_a_record_is_believed_even_if_it_is_slow(folder, races, choices) -> None:
    """Which proves that records are read at all."""
    arrays = operands(CASE, "float32")
    options = {"precision": "standard", **BENCHMARK}
    run("forward", arrays, CASE, **options)
    (key,) = records(folder)
    for words, variant in (("tiles of 4", (4,)), ("tiles of 6×6", (6, 6))):
        rewrite(folder, json.dumps({key: ["winograd", words, False]}))
        forget_plans()
        run("forward", arrays, CASE, **options)
        assert choices[-1].strategy.name == "winograd"
        assert choices[-1].tiling.variant == variant
    assert len(races) == 1


def test_another_machine_or_version_has_another_file(
    folder, races, monkeypatch
) -> None:
    arrays = operands(CASE, "float32")
    run("forward", arrays, CASE, **BENCHMARK)
    files = set(folder.iterdir())

    def changed(**parts: Any) -> None:
        with monkeypatch.context() as patch:
            for name, value in parts.items():
                patch.setattr(*_PARTS[name], value)
            machine.cpu_machine.cache_clear()
            forget_winners()
            run("forward", arrays, CASE, **BENCHMARK)
        machine.cpu_machine.cache_clear()
        forget_winners()

    changed(version="9.9.9")
    changed(processor=lambda: "another one")
    changed(cores=lambda: 77)
    assert len(races) == 4
    assert len(set(folder.iterdir())) == 4
    assert files < set(folder.iterdir())
    run("forward", arrays, CASE, **BENCHMARK)
    assert len(races) == 4, "this machine's own is still there"


@pytest.mark.parametrize("xp", ["cupy"], indirect=True)
def test_another_gpu_or_driver_has_another_file(xp, folder, races, monkeypatch) -> None:
    """And the processor of the host does not count."""
    if not getattr(xp, "IS_STAND_IN", False):
        pytest.skip("drivers of a real GPU cannot be changed")
    arrays = operands(CASE, "float32")
    run("forward", arrays.on(xp), CASE, **BENCHMARK)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_processor", lambda: "another one")
        machine.cpu_machine.cache_clear()
        run("forward", arrays.on(xp), CASE, **BENCHMARK)
    machine.cpu_machine.cache_clear()
    assert (len(races), len(set(folder.iterdir()))) == (1, 1)
    changes = (
        (xp, "__version__", "99.0"),
        (xp.cuda.runtime, "driverGetVersion", lambda: 99),
        (xp.cuda.runtime, "runtimeGetVersion", lambda: 98),
    )
    for number, change in enumerate(changes, 2):
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            forget_plans()
            run("forward", arrays.on(xp), CASE, **BENCHMARK)
        assert (len(races), len(set(folder.iterdir()))) == (number, number)
    with xp.cuda.Device(1):
        run("forward", arrays.on(xp), CASE, **BENCHMARK)
    assert (len(races), len(set(folder.iterdir()))) == (5, 5)
    run("forward", arrays, CASE, **BENCHMARK)
    assert (len(races), len(set(folder.iterdir()))) == (6, 6), "nor NumPy's"
    first, second = backend_on("cuda:0").machine(), backend_on("cuda:1").machine()
    assert [a == b for a, b in zip(first, second, strict=True)] == [True] * 4 + [
        False,
        False,
    ], "name and compute capability"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("xp", ["cupy"], indirect=True)
def test_candidates_are_timed_with_events_on_the_current_stream(
    xp, races, choices
) -> None:
    """One wait for each round, for an event and for nothing else."""
    if not getattr(xp, "IS_STAND_IN", False):
        pytest.skip("a real device does not count who waits")
    arrays = operands(CASE, "float32").on(xp)
    waits = xp.cuda.stream.synchronisations
    before = len(waits)
    with xp.cuda.Stream(non_blocking=True):
        run("forward", arrays, CASE, **BENCHMARK)
    assert waits[before:] == ["event"] * 6
    assert races[0] > 1


_PARTS = {
    "version": (tuning, "__version__"),
    "processor": (machine, "_processor"),
    "cores": (os, "cpu_count"),
}


@pytest.mark.parametrize(
    "where", ["a file in the way", "a folder in the way", "read-only"]
)
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, races, where) -> None:
    place = tmp_path / "cache"
    if where == "a file in the way":
        place.write_text("here")
    elif where == "a folder in the way":
        monkeypatch.setenv("CUCONV_CACHE_DIR", str(place))
        tuning._path(backend_of(np).machine()).mkdir(parents=True)
    else:
        place.mkdir()

        def refused(*arguments: Any, **options: Any) -> Any:
            raise PermissionError(13, "read-only")

        monkeypatch.setattr(tempfile, "NamedTemporaryFile", refused)
    monkeypatch.setenv("CUCONV_CACHE_DIR", str(place))
    forget_winners()
    arrays = operands(CASE, "float32")
    wanted = reference("forward", arrays, CASE)
    for _ in range(2):
        testing.assert_equal(run("forward", arrays, CASE, **BENCHMARK), wanted)
    assert len(races) == 1, "it is remembered in memory all the same"
    forget_winners()
    left = [p for p in tmp_path.rglob("*") if p.name.startswith("tmp")]
    assert left == [], "files half written were left behind"


def test_without_a_home_it_still_works(monkeypatch, races) -> None:
    monkeypatch.delenv("CUCONV_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuning.Path, "home", homeless)
    forget_winners()
    arrays = operands(CASE, "float32")
    wanted = reference("forward", arrays, CASE)
    testing.assert_equal(run("forward", arrays, CASE, **BENCHMARK), wanted)
    assert len(races) == 1
    forget_winners()


def test_the_cache_lies_where_it_is_told(tmp_path, monkeypatch) -> None:
    for name in ("CUCONV_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tuning.Path, "home", lambda: tmp_path / "home")
    assert tuning._path(()).parent == tmp_path / "home" / ".cache" / "cuconv"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning._path(()).parent == tmp_path / "xdg" / "cuconv"
    monkeypatch.setenv("CUCONV_CACHE_DIR", str(tmp_path / "own"))
    assert tuning._path(()).parent == tmp_path / "own"


SCRIPT = """
    import numpy as np, cuconv
    from cuconv.engine import autotune
    races, fastest = [], autotune.fastest
    def spy(leaves, calls):
        races.append(len(calls))
        return fastest(leaves, calls)
    autotune.fastest = spy
    x, w = np.ones((2, 8, 9, 8), "f4"), np.ones((8, 8, 3, 3), "f4")
    cuconv.conv(x, w, strategy="benchmark")
    print(len(races))
"""


def test_the_next_process_recalls_it(tmp_path) -> None:
    """Whatever the seed of its hashes."""
    timed = []
    for seed in ("1", "2", "3"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SCRIPT)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={
                **os.environ,
                "CUCONV_CACHE_DIR": str(tmp_path),
                "PYTHONHASHSEED": seed,
            },
        )
        assert done.stderr == ""
        timed.append(int(done.stdout))
    assert timed == [1, 0, 0]
    assert len(records(tmp_path)) == 1


@pytest.mark.usefixtures("folder")
def test_the_limit_holds_while_candidates_are_timed(folder) -> None:
    """Every candidate fits; and the result that they write is the only one."""
    case = Case((3, 16, 19, 21), (24, 16, 3, 3), {"padding": 1})
    x = np.ones(case.x_shape, "f4")
    w = np.ones(case.w_shape, "f4")

    def call(**options: Any) -> Any:
        rewrite_all = folder.exists() and list(folder.iterdir())
        for file in rewrite_all or ():
            file.unlink()
        forget_winners()
        return cuconv.conv(
            x, w, padding=1, precision="standard", **BENCHMARK, **options
        )

    limit = smallest_limit(call) + 2**16
    # Beside arrays, the file is read and written again: tens of kibibytes of text, and
    # a plan for each candidate.
    most = limit + 3 * 2**15
    assert host_peak(lambda: call(memory_limit=limit), most) <= most


SMALL = [
    Case((3, 8, 9, 7), (1, 8, 3, 1), {"padding": 2}),
    Case((3, 4, 9, 7), (1, 4, 1, 1), {"padding": 1}),
    Case((3, 4, 3, 9), (4, 4, 1, 2), {}),
    Case((2, 8, 9, 8), (8, 8, 3, 3), {"padding": 1}),
    Case((3, 6, 7, 8), (6, 1, 3, 3), {"groups": 6, "padding": 1}),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("op", OPERATIONS)
def test_whatever_wins_computes_the_same(op, monkeypatch, choices) -> None:
    """Also a winner that cuts its work where the one that was expected does not."""
    won, tiling = 0, set()
    for case in SMALL:
        arrays = operands(case, "float32")
        wanted = reference(op, arrays, case)
        call = partial(run, op, arrays, case, precision="standard")
        least = smallest_limit(call)
        limits = (least, least + 4000, 152_000, 160_000, 166_000, 2**24)
        for limit in (max(limit, least) for limit in limits):
            for number in range(8):
                let_number_win(monkeypatch, number)
                got = call(memory_limit=limit, **BENCHMARK)
                np.testing.assert_array_equal(np.rint(got), wanted)
                won += 1
                tiling.add((choices[-1].label, choices[-1].tiling))
    assert won == 8 * 6 * len(SMALL)
    assert len(tiling) > 30
