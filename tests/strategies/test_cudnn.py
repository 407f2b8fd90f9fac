"""cuDNN as a strategy: exact over a stand-in that checks every description.

``-m gpu`` runs the same tests on the real library, if it is installed.
"""

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from standin.engines import ENGINES, Library
from support import (
    HALVES,
    LAYOUTS,
    OPERATIONS,
    PLACES,
    Case,
    Operands,
    add_bias,
    call_into,
    candidates_of,
    captured,
    chosen,
    device_peak,
    forget_plans,
    integers,
    of,
    operands,
    plan_of,
    reference,
    replay,
    run,
    smallest_limit,
    to_host,
    wanted_of,
    wanted_shape,
)

import cuconv
from cuconv import testing
from cuconv.backends.library import LibraryConv

pytestmark = pytest.mark.parametrize("xp", ["cupy"], indirect=True)
STRICT = {"strategy": "cudnn", "precision": "strict"}
FLOATS = ("float32", "float64", *HALVES)

CASES = {
    "one axis": Case((2, 4, 13), (6, 4, 3), {"stride": 2, "padding": 1}),
    "one axis, uneven pads": Case(
        (2, 4, 13), (6, 4, 3), {"padding": ((2, 5),), "dilation": 2}
    ),
    "two axes": Case((2, 3, 9, 8), (5, 3, 3, 2), {"padding": 1}),
    "groups": Case(
        (2, 6, 8, 9),
        (9, 2, 3, 2),
        {"groups": 3, "padding": (1, 0), "stride": (2, 1), "dilation": (1, 2)},
    ),
    "a tail": Case((2, 3, 10, 9), (4, 3, 2, 2), {"stride": (3, 4)}),
    "depthwise": Case((2, 4, 6, 5), (8, 1, 3, 3), {"groups": 4, "padding": 1}),
    "one tap": Case((2, 4, 5, 6), (3, 4, 1, 1), {}),
    "same, even kernel": Case((1, 2, 7, 6), (3, 2, 4, 2), {"padding": "same"}),
    "three axes": Case(
        (1, 4, 5, 4, 6),
        (6, 2, 3, 2, 3),
        {"groups": 2, "stride": (2, 1, 1), "padding": ((1, 1), (0, 2), (1, 0))},
    ),
    "no batch axis": Case((4, 7, 5), (3, 4, 3, 2), {"padding": 1}),
}
# Large enough to be worth one launch of cuDNN instead of one of ours.
LARGE = (32, 64, 56, 56), (64, 64, 3, 3)


def forget_engines() -> None:
    """Ask the library anew."""
    from cuconv.backends.cuda import cudnn, libraries
    from cuconv.engine import planner

    cudnn.planned.cache_clear()
    cudnn.RUNNING.each.clear()
    cudnn.PLANNING.clear()
    libraries.error_of.cache_clear()
    planner.decide.cache_clear()
    forget_plans()


def loaded(monkeypatch: pytest.MonkeyPatch, library: Any) -> Iterator[Any]:
    from cuconv.backends.cuda import cudnn

    def load() -> Any:
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(cudnn, "load", load)
    forget_engines()
    yield library
    forget_engines()


@pytest.fixture
def cudnn(xp, monkeypatch) -> Iterator[Any]:
    """The library: the stand-in, or the real one on a GPU."""
    from cuconv.backends.cuda.libraries import missing

    if getattr(xp, "IS_STAND_IN", False):
        yield from loaded(monkeypatch, Library())
    elif missing("cudnn"):
        pytest.skip(missing("cudnn"))
    else:
        yield None


@pytest.fixture
def library(xp, cudnn) -> Library:
    """The stand-in."""
    if cudnn is None:
        pytest.skip("about the stand-in, and this is the real library")
    return cudnn


@pytest.fixture
def absent(xp, monkeypatch) -> Iterator[Any]:
    yield from loaded(monkeypatch, ImportError("no file\nof that name"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_it_is_exact_in_every_type(xp, cudnn, op, layout) -> None:
    ran = 0
    for case in (case.in_layout(layout) for case in CASES.values()):
        for dtype in FLOATS:
            plan = plan_of(op, case, dtype, strategy="cudnn", device="cuda")
            got = plan(*of(op, operands(case, dtype).on(xp)))
            testing.assert_equal(got, wanted_of(op, case, dtype), dtype=dtype)
            assert plan.strategy == "cudnn"
            ran += 1
    assert ran == len(CASES) * len(FLOATS)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_engine_within_its_workspace(xp, library, op) -> None:
    """The stand-in poisons its workspace: it is nobody else's memory."""
    case, seen = CASES["two axes"], set()
    plan = plan_of(op, case, strategy="cudnn", device="cuda", deterministic=False)
    for candidate in candidates_of(plan):
        mine = plan.with_candidates([candidate])
        got = mine(*of(op, operands(case, "float32").on(xp)))
        testing.assert_equal(got, wanted_of(op, case, "float32"))
        seen.add(library.ran[-1])
    assert seen == {(op, number) for number in (30, 50, 51, 0)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_arrays_that_are_not_packed_are_copied(xp, cudnn, op, layout) -> None:
    ran = 0
    for name in ("groups", "one axis", "three axes"):
        case = CASES[name].in_layout(layout)
        arrays = operands(case, "float32")
        wanted = wanted_of(op, case, "float32")
        for place in PLACES.values():
            mine = Operands(*(place(xp, a) for a in arrays))
            around = xp.full([n + 2 for n in wanted.shape], 77, np.float32)
            inside = tuple(slice(1, -1) for _ in wanted.shape)
            run(op, mine, case, out=around[inside], **STRICT)
            testing.assert_equal(around[inside].copy(), wanted, dtype=np.float32)
            around[inside] = 77
            assert (around == 77).all(), "it wrote beyond its result"
            ran += 1
    assert ran == 3 * len(PLACES)


def test_addresses_that_cudnn_does_not_take(xp, cudnn) -> None:
    """An array that is one run of memory and begins between two vectors is copied."""
    case = CASES["two axes"]
    x, w, _ = operands(case, "float32").on(xp)
    base = xp.zeros(x.size + 1, "float32")
    shifted = base[1:].reshape(x.shape)
    shifted[...] = x
    got = cuconv.conv(shifted, w, strategy="cudnn", precision="strict", **case.options)
    testing.assert_equal(got, wanted_of("forward", case, "float32"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bias_is_added_once(xp, cudnn, dtype, layout) -> None:
    case = CASES["groups"].in_layout(layout)
    arrays = operands(case, dtype)
    bias = integers((case.filters(),), dtype, largest=9)
    wanted = add_bias(wanted_of("forward", case, dtype), bias, case)
    on = [xp.asarray(a) for a in (arrays.x, arrays.w, bias)]
    options = {**case.options, **STRICT}
    for out in (None, xp.full(wanted.shape, 77, wanted.dtype)):
        got = cuconv.conv(*on, out=out, **options)
        testing.assert_equal(got, wanted, dtype=dtype)
    spread = xp.full((*wanted.shape, 2), 77, wanted.dtype)[..., 0]
    cuconv.conv(*on, out=spread, **options)
    testing.assert_equal(spread.copy(), wanted, dtype=dtype)


def test_transposed_convolution_and_prepared_weights(xp, cudnn) -> None:
    x, w = integers((2, 6, 5, 4), "float32"), integers((6, 3, 3, 2), "float32")
    bias = integers((3,), "float32", seed=3)
    options = {"stride": (2, 1), "padding": 1}
    wanted = cuconv.conv_transpose(x, w, bias, **options)
    on = [xp.asarray(a) for a in (x, w, bias)]
    got = cuconv.conv_transpose(*on, **STRICT, **options)
    testing.assert_equal(got, wanted)
    for layout in LAYOUTS:
        case = CASES["groups"].in_layout(layout)
        arrays = operands(case, "float32").on(xp)
        plan = plan_of("forward", case, strategy="cudnn", device="cuda")
        got = plan.prepare(arrays.w)(arrays.x)
        testing.assert_equal(got, wanted_of("forward", case, "float32"))


CONV = LibraryConv(
    "forward", np.dtype("float32"), (), (), (), (), True, "standard", True, False
)
TENSOR, NARROW, NARROW_SUMS, FFT, ATOMIC, WINOGRAD = range(6)
SIX, THIRTEEN = 7, 8


@pytest.mark.parametrize(
    ("notes", "dtype", "allowed"),
    [
        ((), "float32", "strict standard fast"),
        ((9,), "float64", "strict standard fast"),
        ((TENSOR,), "float32", "fast"),
        ((TENSOR,), "float16", "strict standard fast"),
        ((TENSOR,), "float64", "strict standard fast"),
        ((TENSOR, WINOGRAD), "float32", ""),
        ((NARROW,), "float32", ""),
        ((NARROW_SUMS,), "float16", ""),
        ((FFT,), "float32", "fast"),
        ((WINOGRAD,), "float32", "standard fast"),
        ((WINOGRAD,), "float16", "fast"),
        ((WINOGRAD, 6), "float32", "standard fast"),
        ((WINOGRAD, SIX), "float32", "fast"),
        ((WINOGRAD, THIRTEEN), "float32", "fast"),
    ],
)
def test_precision_allows_engines_by_what_they_note(xp, notes, dtype, allowed) -> None:
    from cuconv.backends.cuda.cudnn import is_allowed

    conv = CONV._replace(dtype=np.dtype(dtype))
    found = [
        word
        for word in ("strict", "standard", "fast")
        if is_allowed(notes, conv._replace(precision=word))
    ]
    assert found == allowed.split()
    for word in found:
        mine = conv._replace(precision=word)
        assert not is_allowed((*notes, ATOMIC), mine)
        assert is_allowed((*notes, ATOMIC), mine._replace(deterministic=False))


def engines(dtype: str = "float32", **options: Any) -> list[int]:
    plan = plan_of(
        "forward", CASES["two axes"], dtype, strategy="cudnn", device="cuda", **options
    )
    return [candidate.tiling.variant.number for candidate in candidates_of(plan)]


def test_the_first_engines_are_tried_and_smaller_ones(xp, library) -> None:
    assert engines(precision="strict") == [50, 51, 52, 1, 0]
    assert engines(precision="standard") == [20, 50, 51, 1, 0]
    assert engines(precision="fast") == [10, 20, 21, 1, 0]
    assert engines("float16", precision="strict") == [10, 50, 51, 1, 0]
    assert engines(precision="strict", deterministic=False) == [30, 50, 51, 0]


def test_workspace_is_within_the_limit(xp, library) -> None:
    case = CASES["two axes"]
    arrays = operands(case, "float32").on(xp)
    options = {"strategy": "cudnn", "precision": "strict", **case.options}
    found = {}
    for limit in (4096, 1024, 0):
        before = len(library.ran)
        call = partial(cuconv.conv, arrays.x, arrays.w, memory_limit=limit, **options)
        call()
        taken = device_peak(xp, call) - 4 * 2 * 5 * 9 * 9
        found[limit] = library.ran[before][1]
        assert taken <= limit + 511
    assert found == {4096: 50, 1024: 1, 0: 0}


def test_the_smallest_limit_is_named(xp, library) -> None:
    library.engines = {3: ((51, (), (), 5000), (50, (), (), 1000)), 2: ()}
    plan = partial(plan_of, "forward", CASES["two axes"], device="cuda")
    least = smallest_limit(partial(plan, strategy="cudnn"))
    assert least == 1024 + 512
    found = plan(strategy="cudnn", memory_limit=least)
    assert found.workspace_bytes == least


REFUSED = {
    "int32": ({}, "float64, not int32"),
    "complex64": ({}, "float64, not complex64"),
    "float16": ({"dtype": "float32"}, "it casts none"),
}


@pytest.mark.parametrize("dtype", REFUSED)
def test_types_that_it_refuses(xp, cudnn, dtype) -> None:
    options, words = REFUSED[dtype]
    x, w = xp.ones((1, 2, 5, 5), dtype), xp.ones((3, 2, 3, 3), dtype)
    with pytest.raises(ValueError, match=words):
        cuconv.conv(x, w, strategy="cudnn", **options)


def test_geometries_that_it_refuses(xp, cudnn) -> None:
    x, w = xp.ones((1, 2, 7, 5), "float32"), xp.ones((3, 2, 3, 3), "float32")
    with pytest.raises(ValueError, match="padding of -1 crops"):
        cuconv.conv(x, w, strategy="cudnn", padding=((-1, 0), (0, 0)))
    x = xp.ones((1, 2, 3, 3, 3, 4), "float32")
    w = xp.ones((3, 2, 2, 2, 2, 2), "float32")
    with pytest.raises(ValueError, match="4 axes, 3 at most"):
        cuconv.conv(x, w, strategy="cudnn")
    host = np.ones((1, 2, 5), "float32")
    with pytest.raises(ValueError, match="a library for CUDA"):
        cuconv.conv(host, np.ones((3, 2, 3), "float32"), strategy="cudnn")


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_sum_over_nothing_asks_nobody(xp, library, op) -> None:
    ran = 0
    for shapes in (((0, 4, 8, 9), (6, 4, 3, 3)), ((2, 4, 8), (0, 4, 3))):
        case = Case(*shapes, {"padding": 1})
        arrays = operands(case, "float32")
        got = run(op, arrays.on(xp), case, **STRICT)
        testing.assert_equal(got, reference(op, arrays, case), dtype=np.float32)
        ran += 1
    assert ran == 2
    assert not library.calls["cudnnCreate"]


def test_padding_modes_are_rewritten_as_for_every_strategy(xp, cudnn) -> None:
    x, w = integers((2, 3, 7, 6), "float32"), integers((4, 3, 3, 2), "float32")
    for mode in ("reflect", "circular"):
        options = {"padding": ((1, 2), (0, 1)), "padding_mode": mode}
        got = cuconv.conv(xp.asarray(x), xp.asarray(w), **STRICT, **options)
        testing.assert_equal(got, cuconv.conv(x, w, **options))


def test_no_engine_is_a_reason(xp, library) -> None:
    library.engines = {3: ((30, (ATOMIC,), (), 0),), 2: ()}
    case = CASES["two axes"]
    x, w, _ = operands(case, "float32").on(xp)
    with pytest.raises(ValueError, match="none of its engines computes this"):
        cuconv.conv(x, w, strategy="cudnn", precision="strict", **case.options)
    plan = plan_of("forward", case, device="cuda")
    assert "none of its engines" in plan.passed_over["cudnn"]
    assert library.calls["cudnnBackendExecute"] == 0


def test_it_is_not_chosen_where_it_is_not_installed(xp, absent) -> None:
    plan = cuconv.plan_conv(*LARGE, padding=1, device="cuda")
    assert plan.strategy != "cudnn"
    reason = plan.passed_over["cudnn"]
    assert reason.startswith("cuDNN cannot be loaded (no file of that name): install")
    with pytest.raises(ValueError, match="cuDNN cannot be loaded"):
        cuconv.plan_conv(*LARGE, padding=1, device="cuda", strategy="cudnn")


@pytest.mark.parametrize("op", OPERATIONS)
def test_it_is_chosen_by_price_where_it_is(xp, library, op) -> None:
    options = {"padding": 1, "op": op, "device": "cuda", "precision": "strict"}
    plan = cuconv.plan_conv(*LARGE, **options)
    assert plan.strategy == "cudnn"
    few = cuconv.plan_conv((8, 32, 56, 56), (32, 1, 3, 3), groups=32, **options)
    assert few.strategy == "depthwise"
    assert few.passed_over["cudnn (engine 50, its choice 1)"].startswith("estimated")


def test_a_repeated_call_describes_nothing(xp, library) -> None:
    case = CASES["two axes"]
    x, w, _ = operands(case, "float32").on(xp)
    call = lambda: cuconv.conv(x, w, strategy="cudnn", **case.options)  # noqa: E731
    call()
    library.calls.clear()
    for _ in range(3):
        call()
    names = ("Create", "Destroy")
    each = {f"cudnnBackend{name}Descriptor": 3 for name in names}
    each |= {"cudnnBackendSetAttribute": 9, "cudnnBackendFinalize": 3}
    each |= {"cudnnSetStream": 3, "cudnnBackendExecute": 3}
    assert library.calls == each


def test_it_runs_on_the_current_stream(xp, library) -> None:
    """The stand-in refuses to run on a stream that its handle does not have."""
    case = CASES["two axes"]
    x, w, _ = operands(case, "float32").on(xp)
    for stream in (xp.cuda.Stream(non_blocking=True), xp.cuda.Stream.null):
        with stream:
            cuconv.conv(x, w, strategy="cudnn", **case.options)
        assert stream.ptr in library.handles.values()


def test_handles_belong_to_threads_and_devices(xp, library) -> None:
    case = CASES["two axes"]

    def call() -> None:
        x, w, _ = operands(case, "float32").on(xp)
        cuconv.conv(x, w, strategy="cudnn", precision="strict", **case.options)

    call()
    assert library.calls["cudnnCreate"] == 2, "one plans, one runs"
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert library.calls["cudnnCreate"] == 3
    with xp.cuda.Device(1):
        call()
        call()
    assert library.calls["cudnnCreate"] == 5
    assert len(library.ran) == 4
    assert len(library.handles) == 4, "that of the thread is gone"


def test_descriptors_are_given_back(xp, library) -> None:
    for case in CASES.values():
        plan_of("forward", case, strategy="cudnn", device="cuda")
    assert len(library.descriptors) > 50
    forget_engines()
    assert not library.descriptors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_a_graph_computes_what_is_in_its_buffers(xp, cudnn, op, layout) -> None:
    """Engines without a workspace are captured; weights in another order are not."""
    case = CASES["two axes"].in_layout(layout)
    arrays = operands(case, "float32").on(xp)
    out = xp.full(wanted_shape(op, case), 77, dtype="float32")
    call_into(op, arrays, case, out, **STRICT)
    if layout == LAYOUTS[1]:
        with captured(xp), pytest.raises(ValueError, match="workspace"):
            call_into(op, arrays, case, out, **STRICT)
        return
    out[...] = 78
    with captured(xp) as graphs:
        assert call_into(op, arrays, case, out, **STRICT) is out
    assert np.all(to_host(out) == 78), "it ran while it was recorded"
    for seed in (5, 6):
        fresh = operands(case, "float32", seed)
        replay(xp, graphs[0], arrays, fresh)
        testing.assert_equal(out, reference(op, fresh, case))


def test_a_capture_does_not_set_it_up(xp, library) -> None:
    case = CASES["two axes"]
    x, w, _ = operands(case, "float32").on(xp)
    out = xp.zeros(wanted_shape("forward", case), "float32")
    cuconv.conv(x, w, out=out, strategy="implicit_gemm", **case.options)
    with captured(xp):
        cuconv.conv(x, w, out=out, **case.options)
        with pytest.raises(ValueError, match="none of its engines"):
            cuconv.conv(x, w, out=out, strategy="cudnn", **case.options)
    assert library.calls["cudnnCreate"] == 0


def test_benchmark_remembers_an_engine(xp, library, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = CASES["two axes"]
    x, w, _ = operands(case, "float32").on(xp)
    got = cuconv.conv(x, w, strategy="benchmark", **case.options)
    testing.assert_equal(got, wanted_of("forward", case, "float32"))
    assert {number for _, number in library.ran} >= {20, 50}


def test_a_failure_says_what_cudnn_says(xp, library, monkeypatch) -> None:
    case = CASES["two axes"]
    x, w, _ = operands(case, "float32").on(xp)
    monkeypatch.setattr(library, "cudnnBackendExecute", lambda *_: 5000)
    with pytest.raises(RuntimeError, match="status 5000: the stand-in refuses"):
        cuconv.conv(x, w, strategy="cudnn", precision="strict", **case.options)


@pytest.mark.parametrize("number", [90100, 92800])
def test_old_versions_are_refused(xp, monkeypatch, number) -> None:
    from cuconv.backends.cuda import cudnn

    library = Library()
    library.version = number
    if number < 90200:
        with pytest.raises(ImportError, match="older than"):
            cudnn.checked(library)
    else:
        assert cudnn.checked(library) is library


def test_a_plan_prints_its_engine(xp, library) -> None:
    options = {"strategy": "cudnn", "device": "cuda", "precision": "standard"}
    plan = plan_of("forward", CASES["two axes"], **options)
    assert "cudnn (engine 20, its choice 1)" in str(plan)
    assert chosen(plan).tiling.variant.workspace == 2048
    assert set(ENGINES) == {3, 2}
