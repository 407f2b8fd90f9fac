"""The benchmarks: layers as published, peers that are checked, figures that match."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
from benchmark_cases import (
    OPERATIONS,
    PLAIN,
    TINY,
    TINY_EFFORT,
    TINY_OTHERS,
    LocalWorker,
    operands_of,
    planted,
    pool,
    reference,
    worker_of,
)

from benchmarks import pages, records, report, small_call
from benchmarks.cases import Case, relative_error
from benchmarks.layers import GlobalPool, Layer, Pool, Transposed, layer
from benchmarks.peers import PEERS, make_peer, on_cuda, wishes_of
from benchmarks.peers.base import RefusedError, Wishes
from benchmarks.peers.whole_buffer import Columns
from benchmarks.runner import (
    Effort,
    Process,
    Worker,
    measure_case,
    summary,
    workers,
)
from benchmarks.suites import SUITES
from benchmarks.taps import maxima, plane
from benchmarks.taps import reference as by_taps
from cuconv.testing import (
    pool_reference,
)

OTHERS = [
    pytest.param(each, operation, id=f"{name}-{operation}")
    for name, each in TINY_OTHERS.items()
    for operation in each.operations
]
PLAIN_CASES = [
    pytest.param(each, operation, id=f"{name}-{operation}")
    for name, each in TINY.items()
    for operation in OPERATIONS
]
ALL = PLAIN_CASES + OTHERS
NUMPY_PEERS = (
    *("cuconv", "im2col_rows", "im2col_columns", "naive"),
    *("scipy", "oaconvolve", "ndimage"),
)


def peer_named(name: str, **wishes: Any) -> Any:
    if name in ("scipy", "oaconvolve", "ndimage"):
        pytest.importorskip("scipy")
    return make_peer(name, wishes)


# The layers.


def multiplications(layers: dict[Layer, int]) -> int:
    return sum(count * each.multiplications(1) for each, count in layers.items())


def test_resnet50_is_the_published_network() -> None:
    """20 shapes; as often as the network has them they are its 3.8 · 10^9 products."""
    layers = SUITES["resnet50"].layers
    assert len(layers) == len(set(layers)) == 20
    counts = [1, 1, 3, 4, 2]
    for blocks in (4, 6, 3):
        counts += [1, blocks, blocks, 1, blocks - 1]
    assert sum(counts) == 53
    assert multiplications(dict(zip(layers, counts, strict=True))) == 3_855_925_248
    assert [each.out for each in layers[:2]] == [(112, 112), (56, 56)]


def test_version_15_moves_the_stride_to_the_3x3() -> None:
    layers = SUITES["resnet50_v15"].layers
    assert len(set(layers) - set(SUITES["resnet50"].layers)) == len(layers) == 6
    for reduce, strided in zip(layers[::2], layers[1::2], strict=True):
        assert (reduce.stride, strided.stride) == ((1, 1), (2, 2))
        assert reduce.out == strided.size
        assert reduce.filters == strided.channels
        assert strided.out == tuple(n // 2 for n in strided.size)


def test_vgg16_is_the_published_network() -> None:
    layers = SUITES["vgg16"].layers
    assert len(set(layers)) == 9
    assert all(each.out == each.size for each in layers)
    counts = (1, 1, 1, 1, 1, 2, 1, 2, 3)
    assert multiplications(dict(zip(layers, counts, strict=True))) == 15_346_630_656


def test_mobilenetv2_is_the_published_network() -> None:
    layers = SUITES["mobilenetv2"].layers
    kinds = [each.kind for each in layers]
    assert len(set(layers)) == len(layers)
    assert (kinds.count("depthwise"), kinds.count("pointwise")) == (10, 19)
    assert len(kinds) == 29
    deep = [(x.channels, x.size[0], x.stride[0]) for x in layers if x.groups > 1]
    assert deep[:4] == [(32, 112, 1), (96, 112, 2), (144, 56, 1), (144, 56, 2)]
    assert deep[-1] == (960, 7, 1)
    # What a layer leaves, another one takes.
    taken = {(each.channels, each.size) for each in layers}
    left = {(each.filters, each.out) for each in layers}
    assert left - taken == {(1280, (7, 7))}
    assert taken - left == {(32, (112, 112))} - left


@pytest.mark.parametrize(
    ("suite", "label", "first", "last"),
    [
        ("audio1d", "encodec", (1, 1, 24000), (1, 128, 75)),
        ("transposed", "dcgan", (1, 1024, 4, 4), (1, 3, 64, 64)),
    ],
)
def test_chains(suite, label, first, last) -> None:
    """DCGAN's generator after its projection, up to an image of 64×64."""
    chain = [x for x in SUITES[suite].layers if x.label == label]
    assert len(chain) == {"encodec": 6, "dcgan": 4}[label]
    for before, after in itertools.pairwise(chain):
        assert (before.filters, before.out) == (after.channels, after.size)
    assert (chain[0].shapes(1)["x"], chain[-1].shapes(1)["dy"]) == (first, last)


def test_other_suites() -> None:
    wavenet = [x for x in SUITES["audio1d"].layers if x.label == "wavenet"]
    assert [x.dilation for x in wavenet] == [(1,), (16,), (512,)]
    assert all(x.out == x.size for x in wavenet)
    decoders = SUITES["transposed"].layers
    assert decoders[0].shapes(8)["dy"] == (8, 64, 56, 56)
    assert all(x.out == tuple(2 * n for n in x.size) for x in decoders)
    assert {x.kernel[0] for x in decoders} == {2, 3, 4}
    pools = [x.shapes(8)["dy"] for x in SUITES["pooling"].layers]
    assert sorted({len(shape) for shape in pools}) == [3, 4, 5]
    assert pools[:2] == [(8, 64, 56, 56), (8, 64, 55, 55)]
    assert (8, 2048, 1, 1) in pools


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_suites_are_in_order(suite) -> None:
    names = [each.name for each in suite.layers]
    assert len(set(names)) == len(names) > 1
    cases = [case for each in suite.cases() for case in each.cases]
    assert all(min(case.layer.out) > 0 for case in cases)
    assert all(wishes_of(peer, {}) for peer in suite.peers)
    rank = {"audio1d": 1, "unet3d": 3}.get(suite.name)
    assert rank is None or all(len(each.out) == rank for each in suite.layers)


def test_sizes_are_those_of_cuconv() -> None:
    for each in (*TINY.values(), *SUITES["large_kernel"].layers[:1]):
        case = Case(each, "forward", 2)
        y = peer_named("cuconv").call(case, *operands_of(case))()
        assert y.shape == case.result_shape == each.shapes(2)["dy"]


def test_names_tell_the_shape() -> None:
    assert PLAIN.name == "3-4 3x3 @6"
    assert TINY["line"].name == "3-4 4/3 d2 @13"
    assert TINY["groups"].name == "4-6 3x3 g2 @5"
    assert TINY_OTHERS["output padding"].name == "2-3 3x3/2 o1 @4"
    assert TINY_OTHERS["pool"].name == "3 3x3/2 p1 @7"


# What is right.


@pytest.mark.parametrize(("each", "operation"), ALL)
def test_taps_are_the_definition(each, operation) -> None:
    """Whole, and every plane by itself."""
    case = Case(each, operation, 2)
    true, operands = reference(case), operands_of(case)
    wide = [a if a.dtype == int else a.astype(np.float64) for a in operands]
    got = by_taps(each, operation, wide)
    assert got.shape == true.shape == case.result_shape
    np.testing.assert_allclose(got, true, rtol=1e-12, atol=1e-12)
    planes = [
        plane(each, operation, operands, *at) for at in np.ndindex(true.shape[:2])
    ]
    np.testing.assert_allclose(planes, true.reshape(-1, *true.shape[2:]), rtol=1e-9)


def test_indices_are_those_of_the_definition() -> None:
    """The first of several that are equal, and none under padding alone."""
    each = Pool(1, (5, 6), 1, (2, 3), (1, 2), (1, 3), (1, 1))
    x = np.random.default_rng(0).integers(0, 3, (2, 1, 5, 6)).astype(np.float32)
    true = pool_reference(x, kind="max", **each.options).indices
    assert (true == -1).any()
    np.testing.assert_array_equal(maxima(each, x)[1], true)


def test_pooling_has_no_strategies() -> None:
    case = Case(TINY_OTHERS["pool"], "max_pool", 2)
    with pytest.raises(RefusedError, match="no strategies"):
        peer_named("cuconv@im2col").plan(case)


def test_a_gradient_of_zeros_is_wrong() -> None:
    """Though it is mostly zeros."""
    case = Case(pool(64, 7, 7, 7), "max_pool_backward", 2)
    zeros = np.zeros(case.result_shape, np.float32)
    assert relative_error(case, operands_of(case), zeros) == 1.0


@pytest.mark.parametrize("peer", NUMPY_PEERS)
@pytest.mark.parametrize(("each", "operation"), ALL)
def test_peers_answer_rightly(peer, each, operation) -> None:
    case, one = Case(each, operation, 2), peer_named(peer)
    operands = operands_of(case)
    kept = [array.copy() for array in operands]
    if peer != "cuconv" and (operation not in OPERATIONS or case.has_bias):
        with pytest.raises(RefusedError, match=f"no {operation}"):
            one.call(case, *operands)
        return
    if peer == "naive" and each not in map(TINY.get, ("plain", "strides", "pointwise")):
        with pytest.raises(RefusedError, match="two axes"):
            one.call(case, *operands)()
        return
    result = one.device.take(one.call(case, *operands)())
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, reference(case), rtol=1e-4, atol=1e-5)
    assert relative_error(case, operands, result) < 1e-5
    assert all(map(np.array_equal, operands, kept))
    has_plan = peer == "cuconv" and not isinstance(each, Pool)
    assert (one.plan(case)["strategy"] is not None) is has_plan


def test_operands_are_the_same_everywhere() -> None:
    case = Case(PLAIN, "forward", 2)
    x, w = operands_of(case)
    assert np.array_equal(x, operands_of(Case(PLAIN, "weight_grad", 2))[1])
    assert 0.5 < x.std() < 2
    assert w.std() < 0.5


def test_errors_are_found() -> None:
    case = Case(PLAIN, "forward", 1)
    operands, right = operands_of(case), reference(case)
    assert relative_error(case, operands, right) < 1e-12
    assert relative_error(case, operands, right * 1.01) == pytest.approx(0.01)
    corner = right.copy()
    corner[-1, -1, -1, -1] = np.nan
    assert relative_error(case, operands, corner) == float("inf")
    with pytest.raises(ValueError, match=r"\(4, 6, 6\)"):
        relative_error(case, operands, right[0])


def test_columns_that_are_too_large_are_refused() -> None:
    case = Case(SUITES["large_kernel"].layers[4], "forward", 8)
    x = np.broadcast_to(np.float32(1), case.shapes["x"])
    w = np.broadcast_to(np.float32(1), case.shapes["w"])
    with pytest.raises(RefusedError, match="GiB"):
        Columns(Wishes()).call(case, x, w)()


def test_one_result_is_reused_when_that_is_asked_for() -> None:
    case = Case(PLAIN, "input_grad", 1)
    call = peer_named("cuconv", reuse_out=True).call(case, *operands_of(case))
    assert call() is call()
    fresh = peer_named("cuconv").call(case, *operands_of(case))
    assert fresh() is not fresh()


def test_names_carry_options() -> None:
    common = {"device": "cpu", "precision": "strict"}
    assert wishes_of("cuconv", common).precision == "strict"
    assert wishes_of("cuconv@4MiB@fast", common) == Wishes(
        "cpu", precision="fast", memory_limit="4MiB"
    )
    assert wishes_of("cuconv@im2col", {}).strategy == "im2col"
    with pytest.raises(ValueError, match="there is no peer 'tensorflow'"):
        wishes_of("tensorflow", {})
    with pytest.raises(ValueError, match="only cuconv"):
        wishes_of("torch@4MiB", {})


def test_a_gpu_has_its_own_peers() -> None:
    usual = on_cuda(SUITES["resnet50"].peers)
    assert usual == ("cuconv", "cudnn", "cupy_im2col")
    assert set(usual) <= set(PEERS)
    assert on_cuda(SUITES["sweep_memory"].peers) == SUITES["sweep_memory"].peers


# Processes.


def test_a_wrong_peer_is_caught_and_not_timed(monkeypatch) -> None:
    """Filters that are flipped, as those of signal processing are."""

    class Flipped(Columns):
        def forward(self, case: Case, x: Any, w: Any) -> Any:
            return super().forward(case, x, np.ascontiguousarray(w[:, :, ::-1, ::-1]))

    right, wrong = LocalWorker("im2col_columns"), LocalWorker("im2col_columns")
    wrong.session.peer = Flipped(Wishes())
    case = Case(PLAIN, "forward", 2)
    found = measure_case(case, {"right": right, "wrong": wrong}, TINY_EFFORT)
    findings = found["findings"]
    assert findings["right"]["status"] == "ok"
    assert findings["wrong"]["status"] == "wrong"
    assert findings["wrong"]["error"] > 0.1
    assert "milliseconds" not in findings["wrong"]
    assert (wrong.asked, right.asked) == (
        ["build"],
        ["build", "time", "time", "time", "weigh"],
    )
    json.dumps(found, allow_nan=False)


def test_what_a_finding_says() -> None:
    worker = LocalWorker("im2col_columns")
    case = Case(layer(8, 20, 8, 3), "forward", 2)
    found = measure_case(case, {"a": worker}, TINY_EFFORT)
    finding = found["findings"]["a"]
    assert finding["calls"] >= 3
    several = summary([0.004, 0.001, 0.003, 0.002, 0.1])
    assert (several["milliseconds"], several["calls"]) == (3, 5)
    assert several["quartiles"] == pytest.approx([1.5, 52])
    low, high = finding["quartiles"]
    assert 0 < low <= finding["milliseconds"] <= high
    # At its peak the columns and the padded input are there.
    columns = 4 * 2 * 8 * 9 * 20 * 20
    assert columns < finding["extra_bytes"] < 2 * columns
    assert finding["weighed_by"] == "tracemalloc"
    assert found["multiplications"] == 2 * 8 * 400 * 72


def test_a_peer_that_fails_says_why(monkeypatch) -> None:
    worker = LocalWorker("cuconv@no_such_strategy")
    case = Case(PLAIN, "forward", 1)
    finding = measure_case(case, {"a": worker}, TINY_EFFORT)["findings"]["a"]
    assert finding["status"] == "failed"
    assert "no_such_strategy" in finding["reason"]
    tight = LocalWorker("cuconv@1KiB")
    finding = measure_case(case, {"a": tight}, TINY_EFFORT)["findings"]["a"]
    assert finding["status"] == "refused"
    assert "smallest" in finding["reason"]


@pytest.mark.parametrize("peer", ["cuconv@1MiB", "torch"])
def test_a_process_answers(peer) -> None:
    with worker_of(peer) as worker:
        assert worker.hello["versions"]["numpy"]
        for operation in OPERATIONS:
            case = Case(TINY["strides"], operation, 2)
            effort = Effort(rounds=1, seconds=1e-3)
            finding = measure_case(case, {peer: worker}, effort)["findings"][peer]
            assert finding["status"] == "ok", finding
            assert finding["error"] < 1e-5
            assert finding["calls"] >= 1


def test_pytorch_answers_rightly() -> None:
    """In every operation, built and checked but not timed."""
    cases = [Case(*parameter.values, 2) for parameter in OTHERS]
    operations = {**Transposed.operations, **Pool.operations, **GlobalPool.operations}
    assert {c.operation for c in cases} == set(operations)
    with worker_of("torch") as worker:
        for case in cases:
            reply = worker.ask("build", case=case)
            assert reply["status"] == "ok", (case, reply)
            assert reply["error"] < 1e-5


def test_a_process_that_never_answers_is_missing() -> None:
    case = Case(PLAIN, "forward", 1)
    for python, reason in (("true", "ended with status 0"), ("no-such", "no-such")):
        process = Process(python)
        worker = Worker("cuconv", {}, process)
        found = measure_case(case, {"a": worker}, TINY_EFFORT)["findings"]["a"]
        process.close()
        assert found["status"] == "missing"
        assert reason in found["reason"]


def test_a_process_that_dies_is_replaced() -> None:
    case = Case(PLAIN, "forward", 1)
    with workers(["naive"], {}) as found:
        worker = found["naive"]
        worker._process.running.kill()
        dead, alive = (
            measure_case(case, found, TINY_EFFORT)["findings"]["naive"]
            for _ in range(2)
        )
    assert dead["status"] == "failed"
    assert "status -9" in dead["reason"]
    assert alive["status"] == "ok"


def test_small_calls() -> None:
    found = small_call.measure(rounds=2, calls=3)
    assert found["call_microseconds"] > 0
    text = report.small_call_text({**found, "import_milliseconds": 40.0})
    assert "40 ms" in text


# Numbers and pages.


RECORD = planted(
    {"cuconv": [1.0, 2.0, 4.0], "torch": [2.0, 1.0, 4.0], "naive": [4.0, None, None]}
)


def test_what_multiplies_nothing_is_counted_in_bytes() -> None:
    case = Case(pool(4, 10, 2, 2), "max_pool_backward", 2)
    # dy, its indices of eight bytes, and dx.
    assert case.nbytes() == 4 * 200 + 8 * 200 + 4 * 800
    record = planted({"cuconv": [1.0, 2.0, 4.0]})
    for each in record["cases"]:
        each |= {"multiplications": 0, "moved_bytes": 5 * 10**6}
    table = report.layer_table(record, "forward")
    assert table.header == ["layer", "cuconv", "GB/s"]
    assert [row[2] for row in table.rows] == [5, 2.5, 1.25]


def test_ratios_and_geometric_means() -> None:
    cases = report.cases_of(RECORD, "forward")
    assert list(report.ratios(cases, "cuconv", "torch").values()) == [0.5, 2.0, 1.0]
    assert list(report.ratios(cases, "cuconv", "naive").values()) == [0.25]
    assert report.mean_cell(cases, "cuconv", "torch") == "1.00"
    assert report.mean_cell(cases, "cuconv", "naive") == "0.25 of 1"
    assert report.mean_cell([], "cuconv", "torch") == ""
    assert report.rate(cases[0], "cuconv") == pytest.approx(2.0)
    assert report.subject_of(RECORD) == "cuconv"
    assert report.subject_of(
        planted({"torch": [1, 1, 1], "cuconv@fast": [1, 1, 1]})
    ) == ("cuconv@fast")


def test_a_table_says_it_all() -> None:
    table = report.layer_table(RECORD, "forward")
    assert table.header == ["layer", "cuconv", "GFLOP/s", "torch", "naive"]
    assert table.rows[0] == ["3-4 3x3 @6", "1", 2, "2 (0.50)", "4 (0.25)"]
    assert table.rows[1][-1] == "refused"
    means = {row[0]: row[3:] for row in table.summary}
    assert means["geometric mean"] == ["(1.00)", "(0.25 of 1)"]
    assert means["geometric mean, depthwise"] == ["(1.00)", ""]
    assert means["most memory, MiB"] == [1, 1]
    assert "cuconv ÷ torch: at most 2.00, on 4-6 3x3 g2 @5" in table.notes
    assert any(note.startswith("naive refused on 4-6 3x3 g2") for note in table.notes)


def test_json_comes_back(tmp_path) -> None:
    records.write(RECORD, records.stem_of(RECORD), tmp_path)
    cuda = planted({"cuconv": [1.0, 2.0, 3.0]}, device="cuda")
    records.write(cuda, records.stem_of(cuda), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["resnet50-cuda.json", "resnet50.json"]
    first, second = records.read_suites(tmp_path)
    assert report.layer_table(first, "forward") == report.layer_table(RECORD, "forward")
    assert second["device"] == "cuda"
    assert records.read("vgg16", tmp_path) is None
    with pytest.raises(ValueError, match="JSON compliant"):
        records.write({"time": float("nan")}, "bad", tmp_path)


def test_pages_are_what_the_results_say() -> None:
    """Run ``python -m benchmarks.figures`` where this fails."""
    written = pages.pages()
    assert len(written) == 2
    for path, text in written.items():
        assert path.read_text(encoding="utf-8") == text


def test_results_have_their_pictures() -> None:
    for record in records.read_suites():
        for name in pages.images_of(record):
            assert (records.RESULTS / name).exists()


def test_pages_with_results(tmp_path) -> None:
    small = {
        "call_microseconds": 100.0,
        "prepared_microseconds": 20.0,
        "ranges_microseconds": 1.25,
        "import_milliseconds": 40.0,
    }
    assert all(pages.NOTHING in text for text in pages.pages(tmp_path).values())
    records.write(RECORD, "resnet50", tmp_path)
    records.write(small, "small_call", tmp_path)
    readme, docs = pages.pages(tmp_path).values()
    assert "| resnet50, N = 2 | forward | PyTorch | " in readme
    assert "with a prepared plan 20 µs" in " ".join(readme.split())
    assert "**Nothing has been measured on a GPU yet**" in readme
    assert "| 3-4 3x3 @6 | 1 | 2 | 2 (0.50) | 4 (0.25) |" in docs
    assert "../benchmarks/results/resnet50-times.png" in docs
    with pytest.raises(ValueError, match="lacks the marks"):
        pages.with_block("no marks", "block")


def test_the_command_line(tmp_path) -> None:
    pytest.importorskip("rich")
    from benchmarks.__main__ import main

    words = "--quick --suite sweep_kernel --peer cuconv --peer im2col_columns"
    main([*words.split(), "--layer", "3x3", "--out", str(tmp_path)])
    (record,) = records.read_suites(tmp_path)
    assert [case["name"] for case in record["cases"]] == ["64-64 3x3 @56"]
    assert record["batch"] == 1
    assert record["machine"]["gemm_gflops"] > 0
    assert record["peers"]["cuconv"]["versions"]["blas"]
    findings = record["cases"][0]["findings"]
    assert {each["status"] for each in findings.values()} == {"ok"}


@pytest.mark.parametrize(
    "words",
    [
        ["--save", "--quick"],
        ["--peer", "cuconf"],
        ["--batch", "0"],
        ["--layer", "no such", "--suite", "vgg16"],
        ["--operation", "max_pool", "--suite", "vgg16"],
        ["--device", "cuda", "--suite", "pooling"],
    ],
)
def test_the_command_line_refuses(words, capsys) -> None:
    pytest.importorskip("rich")
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_ceilings_are_of_what_limits() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.figures import ceilings_of

    assert ceilings_of(RECORD) == ({"float32": 123.4}, "large matrix product")
    moved = [{**case, "multiplications": 0} for case in RECORD["cases"]]
    assert ceilings_of({**RECORD, "cases": moved}) == ({"float32": 9.87}, "copy")


@pytest.mark.parametrize("suite", ["resnet50", *(s for s in SUITES if "sweep" in s)])
def test_pictures_are_drawn(tmp_path, suite) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.figures import draw

    peers: dict[str, list[float | None]] = {
        name: [1.0, 2.0, None] for name in SUITES[suite].peers
    }
    record = planted(peers, suite=suite)
    record["cases"] += [{**c, "operation": "input_grad"} for c in record["cases"]]
    drawn = draw(record, tmp_path)
    assert len(drawn) == (1 if "sweep" in suite else 2)
    assert all(path.stat().st_size > 5000 for path in drawn)
