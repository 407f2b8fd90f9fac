"""NVTX ranges: which, in which order, with what said, and always closed again."""

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from support import (
    OPERATIONS,
    Case,
    forget_plans,
    operands,
    run,
    smallest_limit,
    with_buffers_on,
)

import cuconv
from cuconv import profiling
from cuconv.backends import backend_of


class Range(NamedTuple):
    message: str
    payload: int
    inside: tuple[str, ...]


class Recorder:
    """An NVTX domain that remembers, with a stack for each thread as NVTX has."""

    def __init__(self) -> None:
        self.ranges: list[Range] = []
        self.pops = 0
        self.stacks: dict[int, list[str]] = {}

    def push_range(self, message: str, payload: int) -> None:
        stack = self.stacks.setdefault(threading.get_ident(), [])
        self.ranges.append(Range(message, payload, tuple(stack)))
        stack.append(message)

    def pop_range(self) -> None:
        self.stacks[threading.get_ident()].pop()
        self.pops += 1

    def payloads(self, message: str) -> list[int]:
        return [r.payload for r in self.ranges if r.message == message]

    def messages(self) -> set[str]:
        return {r.message for r in self.ranges}

    def assert_balanced(self) -> None:
        assert self.pops == len(self.ranges) > 0
        assert not any(self.stacks.values())


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(profiling, "domain", recorder)
    return recorder


# With a stride, its input gradient scatters: without one it gathers from dy.
PADDED = Case((3, 2, 9, 8), (4, 2, 3, 2), {"padding": 1, "stride": (2, 1)})
# Rows long enough that images side by side are not worth the copy.
POINTWISE = Case((3, 2, 29, 31), (4, 2, 1, 1), {})
FLIPPED = Case((3, 8, 29, 31), (8, 8, 3, 3), {"padding": 1})

STAGES = {
    "forward": {"plan", "gather im2col", "gemm im2col"},
    "input_grad": {"plan", "gemm im2col", "scatter im2col"},
    "weight_grad": {"plan", "gather im2col", "gemm im2col"},
}


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_stages_of_an_operation(xp, domain, op) -> None:
    run(op, operands(PADDED, "float32").on(xp), PADDED, strategy="im2col")
    domain.assert_balanced()
    assert domain.messages() - {"pad"} == STAGES[op]
    assert domain.ranges[0].message == "plan"


def test_an_input_gradient_of_stride_1_gathers_from_dy(domain) -> None:
    """With NumPy, where adding columns up costs more than gathering them."""
    arrays = operands(FLIPPED, "float32")
    run("input_grad", arrays, FLIPPED, strategy="im2col")
    domain.assert_balanced()
    assert domain.messages() - {"pad"} == STAGES["forward"]


def test_padding_is_a_stage_of_gathering() -> None:
    """With NumPy alone: the kernel of CUDA fills in the zeros itself."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "domain", recorder)
        forget_plans()  # one that is known may have its zeros already
        run("forward", operands(PADDED, "float32"), PADDED, strategy="im2col")
        plain = Recorder()
        patch.setattr(profiling, "domain", plain)
        case = PADDED._replace(options={"stride": (2, 1)})
        run("forward", operands(case, "float32"), case, strategy="im2col")
    inside = {r.inside for r in recorder.ranges if r.message == "pad"}
    assert inside == {("gather im2col",)}
    assert "pad" not in plain.messages()


@pytest.mark.parametrize("op", OPERATIONS)
def test_pointwise_convolutions_gather_and_scatter_nothing(xp, domain, op) -> None:
    arrays = operands(POINTWISE, "float32").on(xp)
    run(op, arrays, POINTWISE, strategy="pointwise")
    domain.assert_balanced()
    assert domain.messages() == {"plan", "gemm pointwise"}


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_payload_counts_the_chunks(xp, domain, op) -> None:
    arrays = operands(PADDED, "float32").on(xp)
    call = partial(run, op, arrays, PADDED, **with_buffers_on(xp))
    limit = smallest_limit(call)
    domain.ranges.clear()
    domain.pops = 0
    call(memory_limit=limit)
    domain.assert_balanced()
    chunks = domain.payloads("gemm im2col")
    assert len(chunks) > 4
    if op != "input_grad":
        assert chunks == list(range(len(chunks)))
        assert domain.payloads("gather im2col") == chunks
    else:
        assert domain.payloads("scatter im2col") == chunks
    assert domain.payloads("plan") == [0]


def test_backward_shows_both_gradients(xp, domain) -> None:
    x, w, dy = operands(PADDED, "float32").on(xp)
    cuconv.conv_backward(dy, x, w, strategy="im2col", **PADDED.options)
    domain.assert_balanced()
    wanted = STAGES["input_grad"] | STAGES["weight_grad"]
    assert domain.messages() - {"pad"} == wanted
    # Everything is planned before anything is computed.
    assert [r.message for r in domain.ranges].index("plan") == 0
    assert domain.payloads("plan") == [0]


@pytest.mark.usefixtures("busy")
def test_every_worker_closes_its_ranges(domain, monkeypatch) -> None:
    begun = threading.Event()
    push = domain.push_range

    def wait_for_another(message: str, payload: int) -> None:
        push(message, payload)
        if threading.current_thread() is not threading.main_thread():
            begun.set()
        elif message.startswith("gather"):
            assert begun.wait(60), "the second worker never came"

    monkeypatch.setattr(domain, "push_range", wait_for_another)
    case = Case((3, 4, 40, 41), (8, 4, 3, 3), {})
    arrays = operands(case, "float32")
    options = {"strategy": "im2col", "memory_limit": 3 * 2**17}
    with cuconv.config(num_threads=3):
        cuconv.conv_weight_grad(arrays.dy, arrays.x, case.w_shape, **options)
    domain.assert_balanced()
    assert len(domain.stacks) >= 2
    assert sorted(domain.payloads("gemm im2col")) == sorted(
        domain.payloads("gather im2col")
    )


def test_ranges_close_when_something_fails(xp, domain, monkeypatch) -> None:
    x, w, _ = operands(PADDED, "float32").on(xp)
    with pytest.raises(MemoryError):
        cuconv.conv(x, w, padding=1, memory_limit=1, **with_buffers_on(xp))
    backend = type(backend_of(xp))

    def gather(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("in the gather")

    monkeypatch.setattr(backend, "gather", gather)
    with pytest.raises(RuntimeError, match="in the gather"):
        cuconv.conv(x, w, padding=1, **with_buffers_on(xp))
    domain.assert_balanced()


def test_without_nvtx_there_are_no_ranges(monkeypatch) -> None:
    monkeypatch.setattr(profiling, "domain", None)
    with profiling.stage("plan", "im2col", 3):
        pass
    arrays = operands(PADDED)
    assert np.isfinite(cuconv.conv(arrays.x, arrays.w, padding=1)).all()


class Broken:
    """A domain whose ranges fail from the second on."""

    begun = 0

    def push_range(self, message: str, payload: int) -> None:
        self.begun += 1
        if self.begun > 1:
            raise OSError("the profiler has gone")

    def pop_range(self) -> None:
        pass


@pytest.mark.parametrize("broken", [Broken(), object()])
def test_a_profiler_that_fails_breaks_no_call(broken, monkeypatch) -> None:
    """As `nvtx` before 0.2.15: no ``push_range``, or one without a message."""
    monkeypatch.setattr(profiling, "domain", broken)
    forget_plans()
    arrays = operands(PADDED)
    with pytest.warns(RuntimeWarning, match="no more NVTX ranges of cuconv: ") as seen:
        y = cuconv.conv(arrays.x, arrays.w, **PADDED.options)
    assert len(seen) == 1
    assert profiling.domain is None
    wanted = cuconv.conv(arrays.x, arrays.w, **PADDED.options)
    assert (y == wanted).all()


def test_a_profiler_that_fails_at_once_is_none(monkeypatch) -> None:
    nvtx = pytest.importorskip("nvtx")

    def fail(name: str) -> None:
        raise OSError(name)

    monkeypatch.setenv("NVTX_INJECTION64_PATH", "a profiler")
    monkeypatch.setattr(nvtx, "get_domain", fail)
    with pytest.warns(RuntimeWarning, match="OSError: cuconv"):
        assert profiling._find_domain() is None


def test_the_domain_of_nvtx_takes_our_words(monkeypatch) -> None:
    """The real one, as it is installed: no profiler listens, and nothing is raised."""
    nvtx = pytest.importorskip("nvtx")
    monkeypatch.delenv("NVTX_INJECTION64_PATH", raising=False)
    assert profiling._find_domain() is None
    monkeypatch.setenv("NVTX_INJECTION64_PATH", "a profiler")
    assert profiling._find_domain() is None  # a domain that does nothing
    with monkeypatch.context() as patch:
        patch.setattr(nvtx, "get_domain", lambda name: [name])
        assert profiling._find_domain() == ["cuconv"]
    domain = nvtx.get_domain("cuconv")
    domain.push_range(message="gather im2col", payload=7)
    domain.pop_range()
