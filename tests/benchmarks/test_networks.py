"""Whole networks: their lists, a pass through one, and what is reported of it."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from benchmark_cases import (
    PLAIN,
    TINY,
    TINY_EFFORT,
    TINY_OTHERS,
    LocalWorker,
    operands_of,
    planted,
    worker_of,
)

from benchmarks import pages, records, report
from benchmarks.cases import TRAINING, Case, largest_error
from benchmarks.layers import Layer
from benchmarks.networks import NETWORKS, Network, Pass
from benchmarks.peers import make_peer
from benchmarks.runner import measure_case, summary
from benchmarks.suites import SUITES

BIASED = TINY["biased"]
TINY_NETWORK = Network(
    "tiny",
    (
        Case(PLAIN, "forward", 1),
        Case(BIASED, "forward", 3),
        Case(TINY_OTHERS["doubling"], "transpose", 1),
        Case(TINY_OTHERS["pool"], "max_pool", 1),
        Case(TINY_OTHERS["global pool"], "global_avg_pool", 1),
    ),
)
PASSES = [Pass(TINY_NETWORK, operation, 2) for operation in Network.operations]


def test_the_lists_are_the_networks() -> None:
    """Layers and multiplications of an image, as the models have them."""
    found = {
        network.name: (
            len(network.forward),
            len(Pass(network, TRAINING, 1).cases),
            Pass(network, "forward", 1).described["multiplications"],
        )
        for network in NETWORKS
    }
    assert found["resnet50"] == (55, 53, 4_087_136_256)
    assert found["vgg19"] == (21, 16, 19_508_428_800)
    assert [layers for layers, *_ in found.values()] == [6, 8, 54, 64, 71, 55, 21, 74]
    cases = [case for network in NETWORKS for case in network.forward]
    assert sum(case.has_bias for case in cases) == 136
    assert {case.batch for case in cases} == {1, 5, 44}
    kinds = {"forward", "transpose", "max_pool", "avg_pool", "global_avg_pool"}
    assert {case.operation for case in cases} == kinds


def test_a_pass_has_every_layer_and_training_every_convolution() -> None:
    forward, training = (each.cases for each in PASSES)
    assert [case.batch for case in forward] == [2, 6, 2, 2, 2]
    assert [case.operation for case in training] == [TRAINING] * 2
    assert training[0].multiplications == 3 * forward[0].multiplications
    assert forward[1].operand_names == ("x", "w", "bias")
    assert training[1].operand_names == ("dy", "x", "w", "bias")


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("each", [TINY["groups"], BIASED], ids=["plain", "biased"])
def test_training_is_a_convolution_and_its_gradients(each, layout) -> None:
    case = Case(each, TRAINING, 2)
    operands, peer = operands_of(case), make_peer(f"cuconv@{layout}", {})
    results = peer.call(case, *operands)()
    found = peer.first_channels(case, results)
    assert largest_error(case, operands, found) < 1e-5
    for place, operation in enumerate(Layer.operations):
        alone = replace(case, operation=operation)
        other = peer.call(alone, *operands_of(alone))()
        np.testing.assert_allclose(
            found[place], peer.first_channels(alone, other), rtol=1e-4, atol=1e-5
        )
        wrong = [array + (i == place) for i, array in enumerate(found)]
        assert largest_error(case, operands, wrong) > 0.05
    if each.bias:
        np.testing.assert_allclose(results[3], operands[0].sum((0, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("case", PASSES, ids=Network.operations)
def test_a_pass_is_timed_layer_by_layer(case) -> None:
    worker = LocalWorker("cuconv")
    found = measure_case(case, {"cuconv": worker}, TINY_EFFORT)
    assert worker.asked == ["end", "build", "time", "time", "time", "weigh"]
    finding = found["findings"]["cuconv"]
    assert finding["status"] == "ok", finding
    assert finding["error"] < 1e-5
    assert finding["calls"] == 3
    assert finding["first_milliseconds"] > 0
    assert len(finding["layers"]) == len(found["layers"]) == len(case.cases)
    assert 0 < sum(finding["layers"]) < 2 * finding["quartiles"][1]
    assert finding["extra_bytes"] > 0
    json.dumps(found, allow_nan=False)


def test_a_wrong_layer_is_named() -> None:
    worker = LocalWorker("cuconv")
    right = worker.session.peer.call

    def call(case: Case, *operands: Any) -> Any:
        found = right(case, *operands)
        return (lambda: 2 * found()) if case.layer is BIASED else found

    worker.session.peer.call = call
    found = measure_case(PASSES[0], {"a": worker}, TINY_EFFORT)
    finding = found["findings"]["a"]
    assert finding["status"] == "wrong"
    assert finding["reason"].startswith(f"{BIASED.name}: relative error")


@pytest.mark.parametrize("peer", ["torch", "onnxruntime"])
def test_other_libraries_answer_rightly(peer) -> None:
    with worker_of(peer) as worker:
        for case in PASSES:
            reply = worker.ask("build", case=case)
            refuses = peer == "onnxruntime" and case.operation == TRAINING
            assert reply["status"] == ("refused" if refuses else "ok"), reply
            assert reply.get("error", 0) < 1e-5


def test_passes_are_summed_and_layers_are_not() -> None:
    found = summary([1.0, 2.0, 3.0, 10.0, 5.0, 6.0], layers=2)
    assert found["calls"] == 3
    assert found["milliseconds"] == 11_000
    assert found["layers"] == [3000, 6000]


def record() -> records.Record:
    """Two networks; layers of the same name count as one."""
    found = planted({"cuconv": [4.0, 6.0, None], "torch": [2.0, 6.0, None]})
    found["suite"] = "networks"
    del found["cases"][2]
    times = {"cuconv": [1.0, 2.0, 1.0], "torch": [0.5, 3.0, 0.25]}
    for name, case in zip(("a", "b"), found["cases"], strict=True):
        case |= {"name": name, "kind": "network", "layers": ["one", "two", "one"]}
        for peer, finding in case["findings"].items():
            first = 3 * finding["milliseconds"]
            finding |= {"layers": times[peer], "first_milliseconds": first}
    return found


def test_tables_of_networks() -> None:
    passes, first, lost = report.tables(record())
    assert passes.title == "networks, forward, batch 2"
    assert [row[1] for row in passes.rows] == ["4", "6"]
    assert first.title == "networks, first pass, forward, batch 2"
    assert [row[1] for row in first.rows] == ["12", "18"]
    assert first.rows[0][-1] == "6 (2.00)"
    assert lost.header == ["layer", "times", "cuconv", "torch", "lost, ms"]
    rows = [["one", 2, "2", "0.75 (2.67)", 1.25]]
    assert lost.rows == [[f"{n}, {name}", *more] for n in "ab" for name, *more in rows]


def test_pages_and_pictures_of_networks(tmp_path) -> None:
    records.write(record(), "networks", tmp_path)
    readme, docs = pages.pages(tmp_path).values()
    assert "| networks, N = 2 | forward | PyTorch | 1.41 |" in readme
    assert "### networks, forward, batch 2: most lost to torch" in docs
    assert "../benchmarks/results/networks.png" in docs
    pytest.importorskip("matplotlib")
    from benchmarks.figures import draw

    found = record()
    found["cases"] += [{**case, "operation": TRAINING} for case in found["cases"]]
    (drawn,) = draw(found, tmp_path)
    assert drawn.stat().st_size > 5000


def test_a_short_run(tmp_path) -> None:
    """By the name of a network, a batch and an operation."""
    pytest.importorskip("rich")
    from benchmarks.__main__ import main

    words = "networks --layer voice --batch 2 --operation forward --peer cuconv"
    effort = "--repeats 1 --seconds 0.01 --out"
    main([*words.split(), *effort.split(), str(tmp_path)])
    (found,) = records.read_suites(tmp_path)
    assert (found["suite"], found["batch"]) == ("networks", 2)
    assert [case["name"] for case in found["cases"]] == ["voice_activity"]
    assert found["cases"][0]["findings"]["cuconv"]["status"] == "ok"
    assert found["commit"]


def test_the_suites() -> None:
    one, eight = (SUITES[name] for name in ("networks", "networks_batch8"))
    assert (one.batch, eight.batch) == (1, 8)
    assert [case.network.name for case in one.cases()[:8]] == [n.name for n in NETWORKS]
    assert len(one.cases()) == 16
