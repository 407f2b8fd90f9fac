"""Errors and plans are the same after `pickle` and `copy`."""

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from support import (
    Case,
    device_of,
    normal,
    of,
    operands,
    plan_of,
    to_host,
    wanted_of,
)

import cuconv
from cuconv import testing
from cuconv.arrays import stub_array
from cuconv.engine.problem import ROLES


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


WAYS = {"pickle": pickled, "copy": copy.copy, "deepcopy": copy.deepcopy}
by_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def own_errors() -> Iterator[type[BaseException]]:
    for module in pkgutil.walk_packages(cuconv.__path__, "cuconv."):
        if ".cuda." in module.name or module.name in ("cuconv.__main__", "cuconv.demo"):
            continue  # CuPy is needed, or what draws
        for kind in vars(importlib.import_module(module.name)).values():
            is_error = isinstance(kind, type) and issubclass(kind, BaseException)
            if is_error and kind.__module__ == module.name:
                yield kind


@by_way
def test_every_error_stays_what_it_is(way) -> None:
    """An error with another signature than its message hangs `multiprocessing.Pool`."""
    kinds = list(own_errors())
    assert cuconv.MemoryLimitError in kinds
    assert len(kinds) >= 2
    for kind in kinds:
        arguments = (100, 4096, "the forward pass")
        error = kind(*arguments[: 3 if kind is cuconv.MemoryLimitError else 1])
        error.add_note("beside")
        again = way(error)
        assert type(again) is kind
        assert str(again) == str(error)
        assert again.args == error.args
        assert vars(again) == vars(error)
        assert again.__notes__ == ["beside"]


def ask_too_much(limit: int) -> None:
    cuconv.plan_conv((1, 8, 9, 9), (8, 8, 3, 3), memory_limit=limit)


def test_an_error_comes_back_from_a_process() -> None:
    with get_context("spawn").Pool(1) as pool:
        waiting = pool.apply_async(ask_too_much, (100,))
        with pytest.raises(cuconv.MemoryLimitError) as caught:
            waiting.get(timeout=60)
    assert caught.value.limit == 100
    ask_too_much(caught.value.smallest)


_STRIDED = Case((2, 4, 9, 8), (6, 2, 3, 2), {"stride": (2, 1), "groups": 2})
CASES = {
    "strided": _STRIDED,
    "channels last": _STRIDED.in_layout("channels_last"),
    "winograd": Case((2, 16, 21, 20), (24, 16, 3, 3), {"padding": 1}),
    "depthwise": Case((2, 4, 9, 8), (8, 1, 3, 2), {"groups": 4}),
    "fft": Case((1, 2, 40, 41), (3, 2, 21, 20), {}),
    "reflect": Case(
        (2, 4, 9, 8), (4, 4, 3, 2), {"padding": 1, "padding_mode": "reflect"}
    ),
    "spread": Case((2, 4, 9, 8), (4, 4, 3, 2), {"input_dilation": (2, 1)}),
    "batch groups": Case((2, 4, 9, 8), (4, 4, 3, 2), {"batch_groups": 2}),
    "nothing": Case((0, 4, 9, 8), (4, 4, 3, 2), {}),
}


@by_way
@pytest.mark.parametrize("prepares", [False, True])
@pytest.mark.parametrize("op", ["forward", "input_grad", "weight_grad"])
def test_a_plan_computes_the_same_bits(xp, op, prepares, way) -> None:
    if prepares and "w" not in ROLES[op]:
        return
    for case in CASES.values():
        arrays = normal(case).on(xp)
        first, second = of(op, arrays)
        plan = plan_of(op, case, device=device_of(xp), precision="fast")
        given: tuple[Any, ...] = (first, second)
        if prepares:
            plan, given = plan.prepare(second), (first,)
        fresh, wanted = way(plan), to_host(plan(*given))
        for again in (fresh, way(plan), way(way(plan))):
            assert again is not plan
            assert again.backend is plan.backend
            assert again.is_prepared == prepares
            assert to_host(again(*given)).tobytes() == wanted.tobytes()
            assert str(again) == str(plan)


@pytest.mark.parametrize("xp", ["cupy"], indirect=True)
def test_prepared_weights_return_to_the_device_of_the_plan(xp) -> None:
    case = CASES["strided"]
    with xp.cuda.Device(1):
        arrays = operands(case, "float32").on(xp)
        prepared = plan_of("forward", case, device="cuda:1").prepare(arrays.w)
    again = pickled(prepared)
    assert again.backend.device == "cuda:1"
    assert {w.device.id for w in again.weights.values()} == {1}
    testing.assert_equal(again(arrays.x), wanted_of("forward", case), dtype="float32")


def test_a_pickled_plan_has_no_arrays_but_its_weights() -> None:
    plan = cuconv.plan_conv((8, 64, 256, 256), (64, 64, 3, 3), padding=1)
    assert len(pickle.dumps(plan)) < 4000
    w = np.ones((64, 64, 3, 3), "float32")
    assert len(pickle.dumps(plan.prepare(w))) < w.nbytes + 4000


@pytest.mark.parametrize("way", [pickled, copy.deepcopy])
def test_a_stub_stays_a_stub(way: Callable[[Any], Any]) -> None:
    stub = stub_array((10**9, 3), np.dtype("f4"), misaligned=4)[::2]
    again = way(stub)
    assert type(again) is type(stub)
    assert again.layout == stub.layout
