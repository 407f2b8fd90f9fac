"""Libraries that CuPy may lack: what does not need them still runs."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support import (
    OPERATIONS,
    Case,
    forget_plans,
    integers,
    of,
    operands,
    plan_of,
    run,
    to_host,
    wanted_of,
)

import cuconv
from cuconv import __main__ as command
from cuconv import testing
from cuconv.strategies import strategies

pytestmark = pytest.mark.parametrize("xp", ["cupy"], indirect=True)
CASE = Case((2, 3, 9, 8), (5, 3, 3, 2), {"padding": 1, "stride": (2, 1)})
NEEDS_CUBLAS = {"im2col", "partial_im2col", "pointwise", "tap_matmul", "winograd"}


@pytest.fixture
def without_cublas(xp, monkeypatch) -> Iterator[None]:
    if not getattr(xp, "IS_STAND_IN", False):
        pytest.skip("about the stand-in, and this is the real CuPy")
    from cuconv.backends.cuda import gemm, libraries

    gemm._cublas.cache_clear()
    monkeypatch.delattr(xp.cuda, "cublas")
    monkeypatch.setitem(sys.modules, "cupy.cuda.cublas", None)
    libraries.error_of.cache_clear()
    forget_plans()
    yield
    monkeypatch.undo()
    libraries.error_of.cache_clear()
    forget_plans()


def test_these_strategies_call_cublas(xp) -> None:
    found = {n for n, each in strategies().items() if "cublas" in each.libraries}
    assert found == NEEDS_CUBLAS
    for each in strategies().values():
        assert each.capturable or each.libraries or each.name == "fft"


@pytest.mark.parametrize("op", OPERATIONS)
def test_without_cublas_kernels_run(xp, without_cublas, op) -> None:
    for dtype in ("float32", "float16", "complex64", "int8"):
        got = run(op, operands(CASE, dtype).on(xp), CASE)
        testing.assert_equal(got, wanted_of(op, CASE, dtype), dtype=dtype)
    plan = plan_of(op, CASE, device="cuda")
    assert plan.strategy == "implicit_gemm"
    reason = plan.passed_over["im2col"]
    assert "cuBLAS cannot be loaded" in reason
    assert "install cuconv with the extra cuda13 or cuda12" in reason
    arrays = of(op, operands(CASE, "float32").on(xp))
    with pytest.raises(ValueError, match=r"'im2col' cannot run .* cuBLAS cannot be"):
        getattr(cuconv, _NAMES[op])(
            *arrays, **_more(op), **CASE.options, strategy="im2col"
        )


_NAMES = {
    "forward": "conv",
    "input_grad": "conv_input_grad",
    "weight_grad": "conv_weight_grad",
}


def _more(op: str) -> dict[str, Any]:
    return {
        "forward": {},
        "input_grad": {"x_shape": CASE.x_shape},
        "weight_grad": {"w_shape": CASE.w_shape},
    }[op]


def test_integers_need_no_cublas(xp, without_cublas) -> None:
    x, w = integers((1, 2, 7, 6), "int32"), integers((3, 2, 3, 3), "int32")
    for name in ("im2col", "tap_matmul", "implicit_gemm"):
        got = cuconv.conv(xp.asarray(x), xp.asarray(w), strategy=name)
        testing.assert_equal(got, cuconv.conv(x, w))


def test_what_nothing_can_run_says_why(xp, without_cublas) -> None:
    """Arrays of several types are cast by strategies that call cuBLAS alone."""
    x, w = xp.ones((1, 2, 7, 6), "float32"), xp.ones((3, 2, 3, 3), "float64")
    with pytest.raises(ValueError, match="nothing can run the forward pass here"):
        cuconv.conv(x, w)
    cuconv.conv(x, w.astype("float32"))


def test_pooling_and_columns_need_no_cublas(xp, without_cublas) -> None:
    x = integers((1, 2, 7, 6), "float32")
    got = cuconv.max_pool(xp.asarray(x), 2)
    np.testing.assert_array_equal(to_host(got), cuconv.max_pool(x, 2))
    got = cuconv.im2col(xp.asarray(x), 2)
    np.testing.assert_array_equal(to_host(got), cuconv.im2col(x, 2))


def test_info_says_which_libraries_there_are(xp, without_cublas, capsys) -> None:
    assert command.main(["info"]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = dict(line.split(maxsplit=1) for line in printed)
    assert lines["cuBLAS"].startswith("cuBLAS cannot be loaded")
    assert lines["cuDNN"].startswith("cuDNN cannot be loaded")


def test_rocm_is_refused_in_one_sentence(xp, monkeypatch) -> None:
    from cuconv.backends.cuda import device

    monkeypatch.setattr(device, "_working", [])
    monkeypatch.setattr(xp.cuda.runtime, "is_hip", True)
    words = "CuPy is built for ROCm, and cuconv's kernels are written for CUDA"
    assert device.why_not() == words
    assert cuconv.default_array_module() is np
    with pytest.raises(RuntimeError, match=f"no GPU works: {words}"):
        cuconv.plan_conv((1, 1, 5), (1, 1, 3), device="cuda")
    assert cuconv.precompile() == 0


def test_a_device_works_if_cupys_own_kernels_compile(xp, monkeypatch) -> None:
    """They need files of CUDA that ours do not."""
    from cuconv.backends.cuda import device

    if not getattr(xp, "IS_STAND_IN", False):
        pytest.skip("about the stand-in, and this is the real CuPy")
    monkeypatch.setattr(device, "_working", [])

    def fail(*_: Any) -> None:
        raise RuntimeError("cuda_fp16.h was not found")

    monkeypatch.setattr(xp.ndarray, "__iadd__", fail)
    assert device.why_not() == "RuntimeError: cuda_fp16.h was not found"
