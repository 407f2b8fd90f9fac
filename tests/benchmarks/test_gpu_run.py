"""The run on a GPU, without one: its steps, its arithmetic, and its probes."""

import importlib
import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
from benchmark_cases import OPERATIONS, PLAIN, TINY, TINY_OTHERS, planted

import cuconv
from benchmarks import internals, kernels, nvrtc, pages, records, report
from benchmarks.cases import Case
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import compare, exact, probes, steps, tables
from benchmarks.gpu.scale import FULL, QUICK
from benchmarks.layers import Transposed, layer
from benchmarks.peers import base
from benchmarks.peers.base import Device, GpuDevice, cupy_device
from benchmarks.runner import Effort, Process, Session, Worker, measure_case, workers
from benchmarks.taps import norm_error

STANDIN = Path(__file__).parent.parent / "standin"
SMALL = replace(
    QUICK,
    layers=(layer(3, 9, 5, 3, 2),),
    depthwise=(layer(6, 8, 6, 3, groups=6),),
    columns=(layer(3, 9, 5, 3, 2),),
    arithmetics=("float32", "bfloat16"),
    matrix=32,
    copied_bytes=2**16,
    calls=3,
    captured=2,
    repeats=2,
    block_mib=(1, 2),
    tests=("tests/cuda/test_kernels.py::test_divisors_divide",),
)


@pytest.fixture
def standin(monkeypatch):
    """Processes of a test find the stand-in too."""
    monkeypatch.setenv("PYTHONPATH", str(STANDIN))


# Steps.


def step(name: str, share: float, program: str = "", number: str = "") -> steps.Step:
    return steps.Step(name, share, [sys.executable, "-c", program], number)


def test_limits_are_shares_of_what_is_left() -> None:
    stages = [(step("a", 1),), (step("b", 2), step("c", 5)), (step("d", 2),)]
    assert steps.limits(stages, 80) == [10, 50, 20]
    *_, outcomes = steps.run_stages(stages, 80)
    assert [*outcomes] == ["a", "b", "c", "d"]
    got = [one["limit"] for one in outcomes.values()]
    (late,) = steps.run_stages([(step("never", 1),)], 0)
    assert late["never"]["status"] == "skipped"
    # Nothing took its time, so the last has all of it.
    assert got == pytest.approx([10, 80 * 5 / 7, 80 * 5 / 7, 80], rel=0.02)


def test_a_failing_step_does_not_stop_the_others(capsys) -> None:
    found = "print('{\"x\": [1]}')"
    stages = [
        (step("bad", 1, f"{found}; raise ValueError('planted')"), step("beside", 1)),
        (steps.Step("missing", 1, ["no-such-program"]),),
        (step("good", 1, found),),
    ]
    kept = []
    for outcomes in steps.run_stages(stages, 60):
        kept.append([*outcomes])
    statuses = {name: one["status"] for name, one in outcomes.items()}
    assert [*statuses.values()] == ["failed", "ok", "missing", "ok"]
    assert outcomes["bad"]["reason"] == "it ended with status 1"
    assert outcomes["bad"]["tail"][-1] == "ValueError: planted"
    assert outcomes["missing"]["reason"] == "no-such-program is not on the path"
    assert outcomes["bad"]["found"] == outcomes["good"]["found"] == {"x": [1]}
    assert kept == [["bad", "beside"], ["bad", "beside", "missing"], [*outcomes]]
    assert "missing: missing after" in capsys.readouterr().err
    json.dumps(outcomes, allow_nan=False)


SLEEPER = "import time; {}print('begun', flush=True); time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
# A shell may have told its background jobs to ignore interruptions.
HEARING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "


@pytest.mark.parametrize("prelude", [HEARING, DEAF])
def test_a_process_that_is_late_is_stopped(prelude) -> None:
    late = steps.run_step(step("a", 1, SLEEPER.format(prelude), "passed"), 3.0)
    assert late["seconds"] < 10
    assert late["status"] == "late"
    assert late["tail"][0] == "begun"
    assert (late["tail"][-1] == "KeyboardInterrupt") is (prelude == HEARING)


def test_findings_are_joined() -> None:
    lines = '{"a": [1]}\n{"a": [2], "b": {"x": 1}}\n{"b": {"y": 2}, "c": 3}\n{"c": 4'
    assert steps.merged(lines) == {"a": [1, 2], "b": {"x": 1, "y": 2}, "c": 3}


# Checks.

PYTEST = """some words
FAILED tests/a.py::bad - AssertionError: one
ERROR tests/b.py::broken - why
1 failed, 2 passed, 1 skipped, 1 error in 0.10s
"""
EXACT = "wrong: im2col\n7 checked, 1 wrong\n"


def test_what_checks_say() -> None:
    found = steps.counts(PYTEST, "")
    mistakes = found.pop("mistakes")
    assert found == {"failed": 1, "passed": 2, "skipped": 1, "error": 1}
    assert mistakes == PYTEST.splitlines()[1:3]
    exact = {"checked": 7, "wrong": 1, "mistakes": ["wrong: im2col"]}
    assert steps.counts(EXACT, "") == exact
    memcheck, racecheck = (
        steps.counts(EXACT, f"========= {words} displayed\n")
        for words in ("ERROR SUMMARY: 3 errors", "RACECHECK SUMMARY: 2 hazards")
    )
    assert (memcheck, racecheck) == ({**exact, "errors": 3}, {**exact, "errors": 2})


def test_a_check_without_its_number_is_no_success() -> None:
    program = "print('3 skipped in 0.01s')"
    ended = steps.run_step(step("a", 1, program, "passed"), 30)
    assert (ended["status"], ended["found"]["skipped"]) == ("failed", 3)
    assert ended["reason"] == "it gave no number passed"
    assert steps.run_step(step("a", 1, program, "skipped"), 30)["status"] == "ok"


def some_layers(monkeypatch, *kinds: int) -> None:
    monkeypatch.setattr(exact, "LAYERS", [exact.LAYERS[i] for i in kinds])
    monkeypatch.setattr(exact, "DTYPES", ("float32", "bfloat16"))


def test_every_strategy_is_exact(monkeypatch) -> None:
    some_layers(monkeypatch, 0, 2, 4)
    seen = list(exact.mistakes())
    assert len(seen) > 40
    assert not any(words for _, words in seen)
    ran = {what.split()[0] for what, _ in seen}
    assert {"im2col", "pointwise", "tap_matmul"} <= ran
    assert {what.split()[1] for what, _ in seen} == set(OPERATIONS)


def test_a_mistake_is_found(monkeypatch) -> None:
    some_layers(monkeypatch, 2)
    right = cuconv.conv

    def wrong(*arrays: Any, **options: Any) -> Any:
        y = right(*arrays, **options)
        corner = y[-1:, -1:, -1:, -1:]
        corner += 1
        return y

    monkeypatch.setattr(cuconv, "conv", wrong)
    found = {what for what, words in exact.mistakes() if words}
    assert found
    assert all("forward" in what for what in found)


# Right before fast.


def test_errors_are_relative_to_the_norm() -> None:
    true = np.array([3.0, 4.0])
    assert norm_error(true, true) == 0
    assert norm_error(np.array([3.0, 4.5]), true) == pytest.approx(0.1)
    assert norm_error(np.array([3.0, np.nan]), true) == float("inf")


def test_operands_differ_and_come_again(monkeypatch) -> None:
    device = cupy_device()
    case = Case(PLAIN, "forward", 2, "bfloat16")
    prepare = GpuDevice.prepare.__wrapped__
    for l2_bytes, count in ((0, 1), (2000, 7), (10**9, base.MOST_SETS)):
        # Twice the cache ÷ the 2 · (216 + 108) bytes of a set, rounded up.
        monkeypatch.setattr(device, "l2_bytes", l2_bytes)
        sets, error_of = prepare(device, case)
        assert len(sets) == count
        firsts = {device.take(x).tobytes() for x, _ in sets}
        assert len(firsts) == len(sets)
    assert all(x.dtype.name == "bfloat16" for pair in sets for x in pair)
    again, _ = prepare(device, case)
    assert all(
        np.array_equal(device.take(a), device.take(b))
        for pair, other in zip(sets, again, strict=True)
        for a, b in zip(pair, other, strict=True)
    )
    with pytest.raises(ValueError, match="the result is"):
        error_of(sets[0][0])


def test_numbers_begin_again_after_the_last(monkeypatch) -> None:
    monkeypatch.setattr(base, "POOL", 7)
    device = GpuDevice()
    device.join, device.pool = np.concatenate, np.arange(7)
    start = 2 * 999_983 % 7
    got = device.normal(20, 2)
    assert got.tolist() == [(start + i) % 7 for i in range(20)]
    assert device.normal(2, 0).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("each", "operation"),
    [(TINY["strides"], name) for name in OPERATIONS]
    + [(TINY_OTHERS["uneven"], name) for name in Transposed.operations],
)
@pytest.mark.parametrize("arithmetic", FULL.arithmetics)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_a_session_on_a_gpu(each, operation, arithmetic, layout) -> None:
    session = Session(f"cuconv@{layout}", {"device": "cuda"})
    assert session.answer("open")["status"] == "ok"
    case = Case(each, operation, 2, arithmetic)
    built = session.answer("build", case)
    assert built["status"] == "ok", built
    assert 0 <= built["error"] < (1e-6 if arithmetic == "float32" else 1e-2)
    assert min(session.answer("time", seconds=1e-3)["times"]) > 0
    weighed = session.answer("weigh")
    assert 0 <= weighed["extra_bytes"] <= built["promised_bytes"]


def test_a_wrong_result_on_a_gpu_is_not_timed(monkeypatch) -> None:
    right = cuconv.conv

    def slightly_wrong(*arrays: Any, **options: Any) -> Any:
        return right(*arrays, **options) * 1.001

    monkeypatch.setattr(cuconv, "conv", slightly_wrong)
    session = Session("cuconv", {"device": "cuda"})
    for arithmetic, status in (("float32", "wrong"), ("bfloat16", "ok")):
        case = Case(PLAIN, "forward", 2, arithmetic)
        assert session.answer("build", case)["status"] == status
    refused = Session("cuconv@pointwise", {"device": "cuda"}).answer("build", case)
    assert refused["status"] == "refused"
    assert "9 taps" in refused["reason"]


def test_a_lost_gpu_is_said(monkeypatch) -> None:
    session = Session("cuconv", {"device": "cuda"})
    broken = Case(None, "forward", 2)
    session.answer("open")
    assert "lost" not in session.answer("build", broken)

    def fail() -> None:
        raise RuntimeError("cudaErrorIllegalAddress")

    monkeypatch.setattr(session.peer.device, "synchronize", fail)
    assert session.answer("build", broken)["lost"] is True


class FakeQueue(GpuDevice):
    """Counts what it is kept busy for; a call takes the host a moment."""

    def __init__(self) -> None:
        self.leads: list[float] = []

    def spin(self, seconds: float) -> None:
        self.leads.append(seconds)

    def event(self) -> Any:
        return SimpleNamespace(record=lambda: None, synchronize=lambda: None)

    def elapsed(self, start: Any, end: Any) -> float:
        return 7.0


def test_the_device_is_kept_busy_while_the_host_queues() -> None:
    queue = FakeQueue()
    assert queue.seconds(lambda: time.sleep(0.002)) == 0.007
    queue.seconds(lambda: time.sleep(0.02))
    queue.seconds(lambda: None)
    first, second, third = queue.leads
    assert first == 0
    assert 0.003 <= second <= base.LONGEST_LEAD
    assert third == base.LONGEST_LEAD


# Processes.


def test_peers_on_a_gpu_share_a_process_and_outlive_it(standin) -> None:
    case = Case(PLAIN, "forward", 2)
    with workers(["cuconv", "cuconv@im2col"], {"device": "cuda"}) as found:
        first, second = found.values()
        process = first._process
        assert second._process is process
        record = measure_case(case, found, Effort(rounds=1, seconds=1e-3))
        assert {f["status"] for f in record["findings"].values()} == {"ok"}
        before = process.running
        process.end()
        # A case is built again in a new process.
        assert second.ask("time", case=case, seconds=1e-3)["status"] == "ok"
        assert process.running is not before
    with workers(["naive", "im2col_columns"], {}) as found:
        first, second = found.values()
        assert second._process is not first._process


def test_a_peer_that_hangs_is_killed(tmp_path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    process = Process(str(program), patience=0.2)
    begun = time.monotonic()
    reply = Worker("cuconv", {}, process).hello
    process.close()
    assert time.monotonic() - begun < 10
    assert reply["status"] == "missing"
    assert "status -9" in reply["reason"]


def test_a_lost_process_is_started_anew(monkeypatch) -> None:
    replies = iter(
        [{"status": "ok"}, {"status": "failed", "reason": "x", "lost": True}]
    )
    process = Process(sys.executable)
    process.running = SimpleNamespace(wait=lambda: 0)
    process._connection = SimpleNamespace(
        send=lambda _: None, recv=lambda: next(replies), close=lambda: None
    )
    worker = Worker("cuconv", {}, process)
    assert worker.hello["status"] == "ok"
    assert worker.ask("build")["status"] == "failed"
    assert process.running is None
    process.close()


# Floors and targets.

CUDA = {
    "cpu": "c",
    "cores": 2,
    "gpu": "g",
    "copy_gbytes": 4000.0,
    "gemm_gflops": 50_000.0,
    "rates": {"float32": 50_000.0, "float16": 500_000.0},
}


def test_a_floor_is_the_larger_of_two_times() -> None:
    case = on_cuda({"cuconv": [1.0, 2.0, 4.0]})["cases"][0]
    assert case["moved_bytes"] == 4 * (2 * 3 * 36 + 4 * 27 + 2 * 4 * 36)
    floor = 2 * 10**6 / 50_000.0 * 1e-6
    assert report.floor(case, CUDA) == (pytest.approx(floor), "arithmetic")
    half = {**case, "arithmetic": "float16"}
    assert report.floor(half, CUDA)[0] == pytest.approx(floor / 10)
    moved = {**case, "moved_bytes": 10**9}
    assert report.floor(moved, CUDA) == (pytest.approx(0.25), "memory")
    assert report.floor({**case, "arithmetic": "tf32"}, CUDA) is None
    assert report.floor(case, {"gemm_gflops": 1.0}) is None
    small = Case(PLAIN, "forward", 2, "float16")
    assert small.nbytes() * 2 == case["moved_bytes"]


def on_cuda(times: dict[str, list[float | None]], **changes: Any) -> Any:
    return planted(times, device="cuda", machine=CUDA, **changes)


RATIOS = {
    "cuconv": [1.0, 2.0, 4.0],
    "cudnn": [2.0, 1.0, 4.0],
    "cuconv@im2col": [2.0, 2.0, 3.0],
    "cuconv@channels_last": [1.0, 1.0, 1.0],
    "cuconv@pointwise": [None, None, None],
    "cupy_im2col": [3.0, 6.0, 12.0],
}
FOUND = {
    "copy_gbytes": 1000.0,
    "gather": [
        {"layer": "a", "type": "t", "order": "o", "nbytes": 10**9, "milliseconds": m}
        for m in (1.0, 4.0)
    ],
    "launch": [
        {"layer": "a", "strategy": strategy, "eager_microseconds": 9.0, **more}
        for strategy, more in (
            ("im2col", {"not_captured": "why"}),
            ("tap_matmul", {"captured_microseconds": 9.5, "kernel_microseconds": 4.0}),
            ("auto", {"captured_microseconds": 5.5, "kernel_microseconds": 4.0}),
            ("pointwise", {"refused": "9 taps"}),
        )
    ],
    "col2im": [
        {
            "layer": "a",
            "type": "t",
            "gather_milliseconds": 2.0,
            "scatter_milliseconds": 1.0,
        }
    ],
    "blocks": [
        {"layer": "a", "type": "t", "mib": mib, "chunks": 1, "milliseconds": 1.0 + mib}
        for mib in (2, 8)
    ],
}


def test_targets_are_geometric_means() -> None:
    rows = {t.name: t for t in tables.targets(on_cuda(RATIOS), FOUND)}
    assert len(rows) == 15
    forward = rows["forward float32, cuconv ÷ cudnn"]
    assert (forward.reached, forward.of) == (pytest.approx(1.0), 3)
    assert forward.verdict() == "reached"
    whole = rows["forward float32, whole buffer ÷ cuconv"]
    assert whole.reached == pytest.approx(3.0)
    captured = rows["captured small call - kernels, µs"]
    assert (captured.reached, captured.of) == (1.5, 1)
    assert rows["forward tf32, cuconv ÷ cudnn"].reached is None
    assert rows["forward tf32, cuconv ÷ cudnn"].row()[3] == "not measured"
    gathered = [{**row, "layer": i} for i, row in enumerate(FOUND["gather"])]
    for found, reached in ((FOUND, 0.5), ({}, None)):
        *_, target, _ = tables.targets(None, {**found, "gather": gathered})
        assert target.reached == (reached and pytest.approx(reached))


def test_verdicts() -> None:
    for reached, verdict in ((1.3, "missed"), (1.2, "the first is"), (1, "reached")):
        assert tables.Target("t", 1.25, 1.0, reached, 1).verdict() == verdict
    for reached, verdict in ((1.3, "reached"), (0.9, "missed"), (None, "")):
        assert tables.Target("t", 1.0, 1.0, reached, 1, True).verdict() == verdict


# Tables and pages.


def ran(**found: Any) -> dict[str, Any]:
    good = {"status": "ok", "seconds": 1.0, "limit": 2.0}
    bad = {
        "status": "failed",
        "seconds": 1.0,
        "limit": 2.0,
        "reason": "status 1",
        "found": {"passed": 4, "failed": 1, "mistakes": ["FAILED a::b - boom"]},
    }
    return {"steps": {"probe": {**good, "found": found}, "tests": bad}}


def test_the_tables_of_a_run() -> None:
    record = on_cuda(RATIOS)
    shown = {t.title: t for t in tables.tables(ran(**FOUND), [record])}
    assert [*shown][-1] == "Targets, geometric means"
    first = shown["Steps"]
    assert first.rows[1][:2] == ["tests", "failed"]
    assert first.rows[1][-1] == "4 passed, 1 failed"
    assert first.notes == ["tests: status 1", "tests: FAILED a::b - boom"]
    blocks = shown["im2col by the size of its blocks"]
    assert blocks.header == ["layer", "type", "mib", "chunks", "milliseconds"]
    assert blocks.rows == [["a", "t", 2, 1, 3], ["a", "t", 8, 1, 9]]
    launches = shown["Small calls"]
    assert launches.header[2:4] == ["eager_microseconds", "not_captured"]
    assert launches.rows[0] == ["a", "im2col", 9, "why", None, None, None]
    for table in shown.values():
        lines = table.markdown().splitlines()
        assert len(lines) == 2 + len(table.rows)
        assert {line.count("|") for line in lines} == {len(table.header) + 1}


def test_broken_promises_are_counted() -> None:
    record = on_cuda({"cuconv": [1.0, 1.0, 1.0]})
    for case, promised in zip(record["cases"], (2**20, 2**19, 2**18), strict=True):
        case["findings"]["cuconv"]["promised_bytes"] = promised
    (row,) = tables.memory_table([record]).rows
    assert row == ["cuconv", 3, 1, 1, 2]


def test_a_table_on_a_gpu_has_floors_and_strategies_apart() -> None:
    record = on_cuda(RATIOS)
    table = report.layer_table(record, "forward", "float32")
    assert table.header[:3] == ["layer", "cuconv", "floor"]
    others = ["cudnn", "cuconv@channels_last", "cupy_im2col"]
    assert table.header[3:] == ["GFLOP/s", *others]
    assert table.rows[0][2].endswith("arithmetic")
    lines = [*table.rows, *table.summary]
    assert {len(line) for line in lines} == {len(table.header)}
    other = report.strategy_table(record, "forward", "float32")
    assert other.header == ["layer", "cuconv", "chosen", "cuconv@im2col"]
    assert other.rows[0][-1] == "2 (2.00)"
    assert any("pointwise refused" in note for note in other.notes)


def test_pages_show_a_run_and_nothing_without_one(tmp_path) -> None:
    _, before = pages.pages(tmp_path).values()
    assert "on a GPU\n" not in before
    record = on_cuda(RATIOS)
    records.write(record, records.stem_of(record), tmp_path)
    records.write(ran(**FOUND), records.GPU, tmp_path)
    readme, docs = pages.pages(tmp_path).values()
    assert "| resnet50, N = 2 | forward float32 | cuDNN | 1.00 |" in readme
    assert "## resnet50 on a GPU" in docs
    assert "## Checks and probes on a GPU" in docs
    assert "### Targets, geometric means" in docs
    assert "products reach 50000 GFLOP/s float32, 500000" in " ".join(docs.split())
    assert pages.GPU_IMAGE in docs


def test_pictures_of_a_run_are_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.figures import draw_gpu

    record = on_cuda(RATIOS)
    half = [{**case, "arithmetic": "float16"} for case in record["cases"]]
    record["cases"] += half
    drawn = draw_gpu(ran(**FOUND), [record], tmp_path)
    assert [path.name for path in drawn][-1] == pages.GPU_IMAGE
    assert len(drawn) == 3
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_tables_without_rich(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    report.Table("T", ["a", "b"], [["x", 1.5], ["y", None]], notes=["n"]).show()
    said = "### T\n\n| a | b |\n| --- | ---: |\n| x | 1.5 |\n| y |  |\n\n- n\n\n"
    assert capsys.readouterr().out == said


# The whole run.


def test_the_comparison_is_in_order_of_importance() -> None:
    jobs = compare.jobs(FULL)
    assert len(jobs) == 3 * (4 + 2)
    firsts = [cases[0] for _, cases in jobs]
    assert [case.arithmetic for case in firsts[:4]] == [*FULL.arithmetics]
    assert all(case.operation == "forward" for case in firsts[:6])
    assert {suite for suite, _ in jobs[4:6]} == {"mobilenetv2"}
    assert all(case.layer.kind == "depthwise" for case in jobs[4][1])
    assert len(set(firsts)) == len(jobs)
    names = compare.peers()
    assert names[:3] == ("cuconv", "cudnn", "cudnn@channels_last")
    assert {"cuconv@benchmark", "cuconv@im2col", "cupy_im2col"} <= set(names)


def test_a_comparison_that_is_stopped_keeps_what_it_has(monkeypatch, tmp_path) -> None:
    def stopped(case: Case, *_: Any) -> Any:
        if case.layer.channels == PLAIN.channels:
            return {"name": case.layer.name}
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "peers", lambda: ())
    monkeypatch.setattr(compare, "measure_case", stopped)
    records.write({"machine": {}}, records.GPU, tmp_path)
    scale = replace(SMALL, layers=(PLAIN, TINY["strides"]))
    with pytest.raises(KeyboardInterrupt):
        list(compare.compare(scale, tmp_path, sys.executable))
    assert records.read("resnet50-cuda", tmp_path)["cases"] == [{"name": PLAIN.name}]


def test_the_plan_is_shown(tmp_path, capsys) -> None:
    command.main(["--plan", "--minutes", "8", "--out", str(tmp_path / "none")])
    lines = capsys.readouterr().out.splitlines()
    seconds = sum(int(line.split()[0]) for line in lines)
    assert abs(seconds - (480 - command.FINISH)) <= len(lines)
    assert lines[0].endswith("machine")
    assert any("memcheck" in line for line in lines)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("words", [["--save", "--quick"], ["--minutes", "0.1"]])
def test_the_command_line_refuses(words, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_the_whole_run_on_the_stand_in(standin, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(command, "QUICK", SMALL)
    monkeypatch.setattr(command, "draw", lambda *_: None)
    monkeypatch.setenv("CUCONV_CACHE_DIR", "")
    with pytest.raises(SystemExit) as ended:
        command.main(["--quick", "--out", str(tmp_path)])
    run = records.read(records.GPU, tmp_path)
    statuses = {name: one["status"] for name, one in run["steps"].items()}
    missing = {name: statuses.pop(name) for name in ("memcheck", "racecheck")}
    assert set(missing.values()) <= {"missing", "failed"}
    assert set(statuses.values()) == {"ok"}, run["steps"]
    assert len(statuses) == 8
    assert ended.value.code == ("failed" in missing.values())
    assert run["commit"]
    assert set(run["machine"]["rates"]) == set(FULL.arithmetics)
    assert run["steps"]["tests"]["found"]["passed"] == 1
    compared = run["steps"]["comparisons"]["found"]
    assert (compared["cases"], compared["unmeasured"]) == (12, 0)
    for name in ("resnet50-cuda", "mobilenetv2-cuda"):
        record = records.read(name, tmp_path)
        findings = [case["findings"] for case in record["cases"]]
        assert len(findings) == 6
        assert all(each["cuconv"]["status"] == "ok" for each in findings)
        assert {each["cudnn"]["status"] for each in findings} <= {"missing", "ok"}
        assert any(each["cupy_im2col"]["status"] == "ok" for each in findings)
    found = tables.findings_of(run)
    sizes = [len(found[name]) for name in ("gather", "col2im", "blocks")]
    assert sizes == [6, 2, 4]
    assert {row["strategy"] for row in found["launch"]} >= {"auto", "im2col"}
    assert "Targets, geometric means" in capsys.readouterr().out


def test_a_probe_that_fails_keeps_what_it_found(standin) -> None:
    broken = replace(SMALL, matrix=-1)
    machine = steps.Step("machine", 1, probes.command("machine", broken))
    ended = steps.run_step(machine, 30)
    assert ended["reason"] == "it ended with status 1"
    assert ended["found"]["copy_gbytes"] > 0
    assert "rates" not in ended["found"]
    assert any("Error" in line for line in ended["tail"])


def test_blocks_are_cut_as_they_are_asked_for(monkeypatch) -> None:
    """Smaller blocks are more chunks, and the default comes back."""
    backend = importlib.import_module("cuconv.backends.cuda").cuda_backend()
    usual = backend.block_bytes
    wide = replace(SMALL, columns=(layer(8, 60, 4, 3),), block_mib=(1, 16))
    rows = [*probes.blocks(wide)]
    chunks = {(row["type"], row["mib"]): row["chunks"] for row in rows}
    assert chunks["float32", 1] > chunks["float32", 16] == 1
    assert chunks["float32", 1] > chunks["float16", 1]
    assert backend.block_bytes == usual


def test_times_are_those_of_calls_in_turn() -> None:
    called: list[str] = []
    device: Any = Device()
    calls = [partial(called.append, name) for name in "abc"]
    assert probes.milliseconds(device, calls, 4) >= 0
    assert "".join(called) == "abc" + "abcab"


class FakeStream:
    """Records calls, and notes how many each launch of a graph repeats."""

    def __init__(self) -> None:
        self.calls = 0
        self.launched: list[int] = []
        self.is_capturing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        assert not self.is_capturing

    def begin_capture(self) -> None:
        self.calls, self.is_capturing = 0, True

    def end_capture(self) -> Any:
        self.is_capturing = False
        count = self.calls
        return SimpleNamespace(launch=lambda _: self.launched.append(count))

    def call(self) -> None:
        self.calls += 1


class SlowLaunches(Device):
    """A launch takes 5 µs and each call in its graph 2 µs."""

    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream
        cuda = SimpleNamespace(Stream=lambda non_blocking: stream)
        self.xp = SimpleNamespace(cuda=cuda)

    def seconds(self, call: Any) -> float:
        before = len(self.stream.launched)
        call()
        return 1e-6 * sum(5 + 2 * count for count in self.stream.launched[before:])


def test_replays_are_compared_with_kernels_alone() -> None:
    stream = FakeStream()
    device: Any = SlowLaunches(stream)
    found = probes.captured(device, stream.call, replace(SMALL, captured=10))
    assert found["captured_microseconds"] == pytest.approx(5 + 2)
    assert found["kernel_microseconds"] == pytest.approx(5 / 10 + 2)
    assert set(stream.launched) == {1, 10}


def test_a_capture_that_fails_is_ended() -> None:
    stream = FakeStream()

    def fail() -> None:
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        probes.graph(stream, fail, 1)
    assert not stream.is_capturing


# What kernels take.


def test_the_report_of_kernels(tmp_path, capsys) -> None:
    kernels.main(["--kernel", "matmul", "--architecture", "90", "--out", str(tmp_path)])
    found = records.read(kernels.KERNELS, tmp_path)
    rows = found["kernels"]
    assert len(rows) == 5
    assert found["nvrtc"] == nvrtc.nvrtc_version()
    assert all(row["registers"] > 0 and row["binary_bytes"] > 0 for row in rows)
    assert all(row["spill_load_bytes"] == 0 for row in rows)
    largest = max(row["shared_bytes"] for row in rows)
    # Two tiles of 16 rows and 17 columns of 8 bytes.
    assert largest == 2 * 16 * 17 * 8
    assert f"{largest}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        kernels.main(["--kernel", "no such", "--architecture", "90"])


def test_a_kernel_that_does_not_compile_is_a_finding() -> None:
    row = kernels.taken(internals.Variant("matmul", ("ELEMENT=no_such_type",)), 90)
    assert "no_such_type" in row["error"]
    table = kernels.table([row])
    assert table.notes == [row["error"]]
    assert table.rows == [["matmul", 90, 1, 0, 0, 0, 0, 0]]


def test_a_compilers_report_is_read() -> None:
    log = (
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "info: Used 40 registers, used 1 barriers, 4352 bytes smem\n"
    )
    assert nvrtc.Compiled(bytes(99), log).resources() == {
        "registers": 40,
        "shared_bytes": 4352,
        "stack_bytes": 8,
        "spill_store_bytes": 12,
        "spill_load_bytes": 16,
        "binary_bytes": 99,
    }
    with pytest.raises(ValueError, match="no registers"):
        nvrtc.Compiled(b"", "nothing").resources()
