"""Prices of plans for a GPU: what they may not prefer, layer by layer of networks.

The device is the stand-in's: the data sheet of an H200 with 132 multiprocessors.
"""

from typing import Any

import pytest
from support import candidates_of

import cuconv
from benchmarks.suites import LAYERS
from cuconv.engine.costs import CUDA_RATES, Work, price
from cuconv.strategies.implicit_gemm import ImplicitGemm

pytestmark = pytest.mark.parametrize("xp", ["cupy"], indirect=True)

TYPES = {
    "float32": {"dtype": "float32"},
    "tf32": {"dtype": "float32", "precision": "fast"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
}
OPERATIONS = ("forward", "input_grad", "weight_grad")


def plans_of(name: str, batch: int, types: str):
    """The plans of a network, by layer and operation."""
    for layer in LAYERS[name]:
        x = (batch, layer.channels, *layer.size)
        w = (layer.filters, layer.channels // layer.groups, *layer.kernel)
        for op in OPERATIONS:
            options: dict[str, Any] = {**layer.options, **TYPES[types], "op": op}
            yield layer, op, cuconv.plan_conv(x, w, device="cuda", **options)


@pytest.mark.parametrize("types", TYPES)
def test_no_split_would_fill_processors_for_less(xp, types):
    """Of ResNet-50, N = 32: any number of parts, not only those that are tried."""
    strategy, rates = ImplicitGemm(), CUDA_RATES
    if types != "float32":
        rates = rates.on_tensor_cores(halves=types != "tf32")
    few, least = 0, rates.processors
    for layer, op, plan in plans_of("resnet50", 32, types):
        best = plan.candidates[0]
        if best.strategy.name != "implicit_gemm":
            continue
        work = strategy.work(best.problem, best.tiling)
        terms, least = best.problem.geometry.patch, min(least, work.tiles)
        if work.tiles >= rates.processors or "run" not in best.problem.zero_copy:
            continue
        few += 1
        filters, columns, _, layout = best.tiling.variant
        for parts in range(2, 65):
            if parts * 256 > terms and op != "weight_grad":
                break
            if op == "input_grad" and not best.problem.geometry.is_unit_stride:
                break
            variant = type(best.tiling.variant)(filters, columns, parts, layout)
            other = strategy.work(best.problem, best.tiling._replace(variant=variant))
            own, split = (price(each, rates).of(1, rates) for each in (work, other))
            assert own <= 1.1 * split, (layer.name, op, best.label, parts)
    assert few >= 10
    # Seventy per cent of the processors, where there are fewer tiles.
    assert least >= 0.7 * rates.processors


def test_winograd_is_never_priced_as_tf32(xp):
    """Its frequencies are multiplied in float32 under every precision."""
    x, w = (32, 256, 14, 14), (256, 256, 3, 3)
    costs = {}
    for precision in ("standard", "fast"):
        plan = cuconv.plan_conv(
            x, w, padding=1, device="cuda", strategy="winograd", precision=precision
        )
        same = (c for c in candidates_of(plan) if c.tiling.variant == (6, 6))
        costs[precision] = min(c.nanoseconds for c in same)
    assert costs["standard"] == costs["fast"]
    options = {"padding": 1, "device": "cuda", "precision": "fast"}
    assert cuconv.plan_conv(x, w, **options).strategy != "winograd"


def test_tf32_and_halves_have_their_own_rates(xp):
    single, half = (CUDA_RATES.on_tensor_cores(halves=h) for h in (False, True))
    assert single.multiply == CUDA_RATES.multiply / 8
    assert half.multiply == CUDA_RATES.multiply / 16


def test_memory_bounds_products_from_below(xp):
    """Moving operands takes place during products: the longer of both counts."""
    work = Work(multiply=1e6, moved=1e9, tiles=CUDA_RATES.processors, blocks=0)
    assert price(work, CUDA_RATES).even == 1e9 * CUDA_RATES.moved
    work = work._replace(multiply=1e12)
    assert price(work, CUDA_RATES).even > 1e9 * CUDA_RATES.moved
    # Half of the processors neither multiply nor read.
    idle = work._replace(tiles=CUDA_RATES.processors // 2)
    assert price(idle, CUDA_RATES).even == 2 * price(work, CUDA_RATES).even


def test_pointwise_layers_of_few_channels_cost_their_memory(xp):
    shape = (32, 16, 112, 112)
    plan = cuconv.plan_conv(shape, (16, 16, 1, 1), device="cuda", precision="fast")
    assert plan.nanoseconds >= 2 * 32 * 16 * 112 * 112 * CUDA_RATES.moved
