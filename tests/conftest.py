"""The backends, and how hypothesis is run.

Every test that takes the fixture ``xp`` runs on NumPy and on CuPy.  CuPy is a stand-in
over host memory, unless pytest is asked for ``-m gpu``: then it is the real one, and
the tests on it carry the mark ``gpu``.  A missing device skips them, or fails them
where the environment says ``CUCONV_REQUIRE_GPU=1``.
"""

import gc
import importlib
import os
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import hypothesis
import pytest

BACKENDS = ("numpy", "cupy")
ROOM = pytest.StashKey[int]()

hypothesis.settings.register_profile(
    "default",
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "ci",
    parent=hypothesis.settings.get_profile("default"),
    max_examples=1000,
    derandomize=False,
    print_blob=True,
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def wants_gpu(config: pytest.Config) -> bool:
    """Whether ``-m`` selects the tests that need a device."""
    words = re.findall(r"\w+", config.option.markexpr)
    negated = re.search(r"\bnot\s+gpu\b", config.option.markexpr)
    return "gpu" in words and not negated


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs on the real CuPy and a device")
    if not wants_gpu(config):
        # Before any test module is imported, so that none sees another CuPy.
        importlib.import_module("standin").install()
    # Limits allow one position at a time, so that small arrays are split anyhow they
    # can be; see the fixture ``room``.
    memory = importlib.import_module("cuconv.memory")
    config.stash[ROOM], memory.LEAST_ROOM = memory.LEAST_ROOM, 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    # First, because pytest itself drops what -m does not select.
    if not wants_gpu(config):
        return
    for item in items:
        call = getattr(item, "callspec", None)
        if call is not None and call.params.get("xp") == "cupy":
            item.add_marker("gpu")


def pytest_collection_finish() -> None:
    """Thousands of tests stay to the end: nothing is gained by looking through them."""
    gc.freeze()


# One for the session: hypothesis refuses fixtures that differ between examples.
@pytest.fixture(scope="session", params=BACKENDS)
def xp(request: pytest.FixtureRequest) -> ModuleType:
    """The array module of a test: NumPy, and CuPy or its stand-in."""
    if request.param == "cupy" and wants_gpu(request.config):
        return real_cupy()
    return importlib.import_module(request.param)


def real_cupy() -> ModuleType:
    """CuPy with a device that answers; else skip the test, or fail it."""
    try:
        cupy = importlib.import_module("cupy")
        cupy.zeros(1).sum().get()
    except Exception as error:  # noqa: BLE001 - a broken driver may raise anything
        reason = f"no GPU answers: {error!r}"
        if os.environ.get("CUCONV_REQUIRE_GPU") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return cupy


@pytest.fixture
def room(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The smallest limits are those that callers see: blocks have some room."""
    support().forget_plans()
    monkeypatch.setattr("cuconv.memory.LEAST_ROOM", request.config.stash[ROOM])
    yield
    support().forget_plans()


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What ran in this test, one candidate for each call."""
    return support().ran(monkeypatch)


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Problems are worth several workers however small they are."""
    support().make_busy(monkeypatch)
    yield
    support().forget_plans()


def support() -> ModuleType:
    """Helpers of the tests: they import cuconv, and so after the stand-in is there."""
    return importlib.import_module("support")
