"""What several test files need: arrays, calls, limits and measured memory."""

import contextlib
import gc
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - gives NumPy the name bfloat16
import numpy as np
import pytest
from threadpoolctl import threadpool_info

import cuconv
from cuconv import testing
from cuconv.arrays import SUPPORTED_TYPES
from cuconv.backends.cpu import backend as host
from cuconv.engine import autotune, separable
from cuconv.engine import call as calls
from cuconv.engine import plan as planning
from cuconv.memory import MemoryLimitError

TESTS = Path(__file__).parent
ROOT = TESTS.parent

OPERATIONS = ("forward", "input_grad", "weight_grad")
LAYOUTS = ("channels_first", "channels_last")
INTEGERS = tuple(t for t in SUPPORTED_TYPES if np.dtype(t).kind in "iu")
COMPLEX = ("complex64", "complex128")
HALVES = ("float16", "bfloat16")
# What computes plain sums of products, and what does not.
STRICT = ("im2col", "pointwise", "partial_im2col", "tap_matmul", "depthwise")
ROUNDED = ("winograd", "fft")


# Arrays


def to_host(array: Any) -> np.ndarray:
    """An array of either module on the host; nothing else moves one there."""
    return array if isinstance(array, np.ndarray) else array.get()


def to_device(xp: Any, array: np.ndarray) -> Any:
    return xp.asarray(array)


def spread_over(xp: Any, array: Any, shape: Sequence[int]) -> Any:
    """Broadcast along axes of one cell, by strides of zero: no memory is taken."""
    assert array.ndim == len(shape), "every axis must be there"
    pairs = zip(array.shape, array.strides, shape, strict=True)
    strides = [0 if have != wanted else step for have, step, wanted in pairs]
    return xp.lib.stride_tricks.as_strided(array, tuple(shape), tuple(strides))


def integers(
    shape: Sequence[int], dtype: Any = "float64", seed: int = 0, largest: int = 3
) -> np.ndarray:
    """Random small integers held in any type; complex ones have both parts."""
    rng = np.random.default_rng((seed, *shape))
    kind = np.dtype(dtype).kind
    if kind == "b":
        return rng.integers(0, 2, tuple(shape)).astype(bool)
    least = 0 if kind == "u" else -largest
    values = rng.integers(least, largest + 1, tuple(shape))
    if kind == "c":
        values = values + 1j * rng.integers(least, largest + 1, tuple(shape))
    return values.astype(dtype)


# Convolutions, and what the loops say


class Case(NamedTuple):
    """One convolution by its shapes and options; ``options`` are `cuconv.conv`'s."""

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    options: dict[str, Any]

    @property
    def layout(self) -> str:
        return self.options.get("layout", "channels_first")

    def filters(self) -> int:
        return self.w_shape[0 if self.layout == "channels_first" else -1]

    def y_shape(self) -> tuple[int, ...]:
        """By asking the reference, not the library."""
        return _y_shape(self)

    def in_layout(self, layout: str) -> "Case":
        """The same convolution with its arrays in another layout."""
        assert self.layout == "channels_first", "cases are written channels first"
        if layout == "channels_first":
            return self
        batched = len(self.x_shape) == len(self.w_shape)
        n, (c, *size) = self.x_shape[:batched], self.x_shape[batched:]
        k, c_group, *kernel = self.w_shape
        options = {**self.options, "layout": layout}
        return Case((*n, *size, c), (*kernel, c_group, k), options)


_SHAPES: dict[str, tuple[int, ...]] = {}


def _y_shape(case: Case) -> tuple[int, ...]:
    """Of no images, which take the reference no time."""
    key = repr(case)
    if key not in _SHAPES:
        batch = case.x_shape[: len(case.x_shape) == len(case.w_shape)]
        x = np.zeros((0, *case.x_shape[len(batch) :]))
        y = testing.conv_reference(x, np.zeros(case.w_shape), **case.options)
        together = case.options.get("batch_groups", 1)
        _SHAPES[key] = (*(n // together for n in batch), *y.shape[1:])
    return _SHAPES[key]


class Operands(NamedTuple):
    """The three arrays of one convolution, of one module."""

    x: Any
    w: Any
    dy: Any

    def on(self, xp: Any) -> "Operands":
        return Operands(*(to_device(xp, array) for array in self))


def operands(case: Case, dtype: Any = "float64", seed: int = 0) -> Operands:
    shapes = (case.x_shape, case.w_shape, case.y_shape())
    return Operands(*(integers(s, dtype, seed + i) for i, s in enumerate(shapes)))


def normal(case: Case, dtype: Any = "float32", seed: int = 0) -> Operands:
    """Random arrays that rounding shows on."""
    rng = np.random.default_rng((seed, *case.x_shape))
    shapes = (case.x_shape, case.w_shape, case.y_shape())
    return Operands(*(rng.standard_normal(s).astype(dtype) for s in shapes))


def reference(op: str, arrays: Operands, case: Case) -> np.ndarray:
    """What the independent loops say."""
    x, w, dy = arrays
    if op == "forward":
        return testing.conv_reference(x, w, **case.options)
    if op == "input_grad":
        return testing.conv_input_grad_reference(dy, w, case.x_shape, **case.options)
    return testing.conv_weight_grad_reference(dy, x, case.w_shape, **case.options)


def widest(dtype: Any) -> str:
    """The type that holds the same small integers, and their sums."""
    same = {"b": "bool", "u": "uint64", "c": "complex128"}
    return same.get(np.dtype(dtype).kind, "int64")


_KNOWN: dict[Any, np.ndarray] = {}


def wanted_of(op: str, case: Case, dtype: Any = "float64", seed: int = 0) -> np.ndarray:
    """`reference` for `operands`, looped over once for all types that hold the same."""
    kind = widest(dtype)
    key = op, repr(case), kind, seed
    if key not in _KNOWN:
        _KNOWN[key] = reference(op, operands(case, kind, seed), case)
    return _KNOWN[key].astype(dtype)


def add_bias(y: np.ndarray, bias: np.ndarray, case: Case) -> np.ndarray:
    """A result of either layout with a number added for each filter."""
    if case.layout == "channels_first":
        bias = bias.reshape(-1, *(1,) * (len(case.w_shape) - 2))
    return y + bias


# Calls and plans


def run(op: str, arrays: Operands, case: Case, **options: Any) -> Any:
    """What the library says; strictly, unless ``options`` name another precision."""
    x, w, dy = arrays
    options = {"precision": "strict", **case.options, **options}
    if op == "forward":
        return cuconv.conv(x, w, **options)
    if op == "input_grad":
        return cuconv.conv_input_grad(dy, w, case.x_shape, **options)
    return cuconv.conv_weight_grad(dy, x, case.w_shape, **options)


def call_into(op: str, arrays: Operands, case: Case, out: Any, **options: Any) -> Any:
    x, w, dy = arrays
    options = {**case.options, **options}
    if op == "forward":
        return cuconv.conv(x, w, out=out, **options)
    if op == "input_grad":
        return cuconv.conv_input_grad(dy, w, case.x_shape, out=out, **options)
    return cuconv.conv_weight_grad(dy, x, case.w_shape, out=out, **options)


def wanted_shape(op: str, case: Case) -> tuple[int, ...]:
    shapes = case.y_shape(), case.x_shape, case.w_shape
    return dict(zip(OPERATIONS, shapes, strict=True))[op]


def of(op: str, arrays: Operands) -> tuple[Any, Any]:
    """The two arrays that an operation takes, in the order of a plan."""
    x, w, dy = arrays
    return {"forward": (x, w), "input_grad": (dy, w), "weight_grad": (dy, x)}[op]


def device_of(xp: Any) -> str:
    """The word of a plan for a module."""
    return "cpu" if xp is np else "cuda"


def plan_of(
    op: str, case: Case, dtype: Any = "float32", **options: Any
) -> cuconv.Plan | None:
    """The plan of a strategy that is named; None where it says that it cannot run."""
    options = {"precision": "strict", **case.options, **options}
    shapes = case.x_shape, case.w_shape
    try:
        return cuconv.plan_conv(*shapes, dtype=dtype, op=op, **options)
    except ValueError as error:
        if "cannot run" not in str(error):
            raise
        return None


def with_buffers_on(xp: Any) -> dict[str, str]:
    """Options with which calls need buffers: on a device, few strategies do."""
    return {} if xp is np else {"strategy": "im2col"}


def smallest_limit(call: Callable[..., Any]) -> int:
    """The least memory limit of a call, by its own word."""
    try:
        call(memory_limit=0)
    except MemoryLimitError as error:
        return error.smallest
    return 0


def arrays_of(result: Any) -> list[Any]:
    results = result if isinstance(result, tuple) else (result,)
    return [array for array in results if array is not None]


# Nearness


def assert_near(actual: Any, wanted: np.ndarray, bound: float) -> None:
    """No farther off than this part of the largest number; NaN is never near."""
    largest = float(np.abs(wanted).max(initial=0))
    assert_within(actual, wanted, bound * largest)


def assert_within(actual: Any, wanted: np.ndarray, bound: float) -> None:
    actual = to_host(actual)
    assert actual.shape == wanted.shape
    error = float(np.abs(actual.astype(np.float64) - wanted).max(initial=0))
    assert error <= bound, f"off by {error:.3g}, and {bound:.3g} is allowed"


# Where arrays are stored


def _spread(xp: Any, array: np.ndarray) -> Any:
    """Every second cell of a larger array."""
    big = xp.full([2 * n + 1 for n in array.shape], 55, dtype=array.dtype)
    view = big[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = to_device(xp, array)
    return view


def _turned(xp: Any, array: np.ndarray) -> Any:
    """Negative strides along every axis."""
    back = tuple(slice(None, None, -1) for _ in array.shape)
    return to_device(xp, np.ascontiguousarray(array[back]))[back]


def _fortran(xp: Any, array: np.ndarray) -> Any:
    return to_device(xp, np.ascontiguousarray(array.T)).transpose()


def _swapped_axes(xp: Any, array: np.ndarray) -> Any:
    """Contiguous with the first two axes exchanged."""
    axes = 0, min(1, array.ndim - 1)
    return to_device(xp, np.ascontiguousarray(array.swapaxes(*axes))).swapaxes(*axes)


def _shifted(xp: Any, array: np.ndarray) -> Any:
    """Contiguous, but no address is aligned to more than one element."""
    flat = xp.empty(array.size + 1, dtype=array.dtype)[1:]
    view = flat.reshape(array.shape)
    view[...] = to_device(xp, array)
    return view


PLACES = {f.__name__: f for f in (_spread, _turned, _fortran, _swapped_axes, _shifted)}


def unaligned(array: np.ndarray) -> np.ndarray:
    raw = np.empty(array.nbytes + 1, dtype=np.uint8)[1:]
    view = raw.view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def outs(xp: Any, shape: Sequence[int], dtype: Any = "float32") -> list[Any]:
    """Results full of rubbish: plain, Fortran, every second cell, and reversed."""
    plain, other = xp.full(shape, 77, dtype), xp.full(shape, 77, dtype)
    fortran = xp.full(tuple(shape)[::-1], 77, dtype).transpose()
    spaced = xp.full([2 * n for n in shape], 77, dtype)
    spaced = spaced[tuple(slice(1, None, 2) for _ in shape)]
    return [plain, fortran, spaced, other[tuple(slice(None, None, -1) for _ in shape)]]


# Memory, measured


def host_peak(call: Callable[[], Any], most: float) -> int:
    """Bytes that a call holds at its peak beyond what it returns.

    Measured again, up to three times, where they are more than ``most``: what other
    threads of the process, such as xdist's, take meanwhile is counted too.
    """
    call()
    for _ in range(3):
        took = _traced_peak(call)
        if took <= most:
            break
    return took


def _traced_peak(call: Callable[[], Any]) -> int:
    gc.disable()
    _fill_shelves()
    forget_arenas()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.enable()
    return peak - before - sum(array.nbytes for array in arrays_of(result))


def _fill_shelves() -> None:
    """Let CPython keep all the freed objects that it will: 2000 tuples of each length.

    Otherwise every chunk of a call leaves a few there, which are no memory of the call
    but would be counted to it.
    """
    shelves: list[Any] = [
        [tuple([None] * length) for _ in range(2000)] for length in range(1, 20)
    ]
    shelves += [[None] for _ in range(200)], [dict.fromkeys("ab") for _ in range(200)]
    del shelves


# NumPy's strided views make and drop these words, and CPython's table of words grows by
# hundreds of kilobytes when enough of them have come and gone.
_WORDS = [
    sys.intern(word)
    for word in ("data", "strides", "descr", "typestr", "shape", "version")
]


class Allocations:
    """What a device's memory pool handed out, by a hook of its own."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.live = 0
        self.peak = 0
        self.count = 0

    def took(self, pointer: int, size: int) -> None:
        self.sizes[pointer] = size
        self.count += 1
        self.live += size
        self.peak = max(self.peak, self.live)

    def gave_back(self, size: int) -> None:
        self.live -= size

    def beyond(self, result: Any) -> int:
        """The peak without the arrays that were returned."""
        mine = (self.sizes.get(a.data.ptr, 0) for a in arrays_of(result))
        return self.peak - sum(mine)


@contextlib.contextmanager
def device_allocations(xp: Any) -> Iterator[Allocations]:
    """Watch the memory pool of CuPy or its stand-in."""
    seen = Allocations()

    class Hook(xp.cuda.MemoryHook):  # type: ignore[misc, name-defined]
        name = "cuconv tests"

        def malloc_postprocess(self, **event: Any) -> None:
            seen.took(event["mem_ptr"], event["mem_size"])

        def free_postprocess(self, **event: Any) -> None:
            seen.gave_back(event["mem_size"])

    with Hook():
        yield seen


def device_peak(xp: Any, call: Callable[[], Any]) -> int:
    """`host_peak` for device memory."""
    call()
    with device_allocations(xp) as seen:
        result = call()
    assert seen.count > 0, "the hook saw no allocation, not even the result's"
    return seen.beyond(result)


def peak(xp: Any, call: Callable[[], Any], most: float) -> int:
    """Bytes beyond inputs and results at the peak of a call, measured."""
    return host_peak(call, most) if xp is np else device_peak(xp, call)


# Refusals


def large(xp: Any, *shape: int, dtype: Any = np.float32) -> Any:
    """An array of any size that takes the memory of one element."""
    return spread_over(xp, xp.zeros((1,) * len(shape), dtype=dtype), shape)


def assert_refused(
    xp: Any, call: Callable[[], Any], error: type[Exception], *words: str
) -> None:
    """The call raises, says these words, and takes no memory to speak of."""
    assert words, "a refusal must say something"
    with pytest.raises(error):
        call()  # what is imported or cached at the first call is no part of the second
    tracemalloc.start()
    try:
        with device_or_nothing(xp) as seen, pytest.raises(error) as caught:
            call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Frames, the message and the traceback; the arrays are gigabytes.
    assert peak < 64 * 1024
    assert seen.count == 0
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def device_or_nothing(xp: Any) -> Any:
    if xp is np:
        return contextlib.nullcontext(SimpleNamespace(count=0))
    return device_allocations(xp)


# CUDA graphs


@contextlib.contextmanager
def captured(xp: Any) -> Iterator[list[Any]]:
    """A stream that records; its graph is in the list afterwards."""
    stream, found = xp.cuda.Stream(non_blocking=True), []
    with stream:
        stream.begin_capture()
        try:
            yield found
        finally:
            found.append(stream.end_capture())
    stream.synchronize()


def replay(xp: Any, graph: Any, arrays: Operands, fresh: Operands) -> None:
    """Launch a graph on other numbers in the same buffers."""
    for mine, others in zip(arrays, fresh.on(xp), strict=True):
        mine[...] = others
    xp.cuda.Device().synchronize()
    graph.launch()
    xp.cuda.Device().synchronize()


# Sweeps that take long


def slowly(*values: Any) -> list[Any]:
    """Parameters of a test that are left to ``-m slow``."""
    each = (v if isinstance(v, tuple) else (v,) for v in values)
    return [pytest.param(*value, marks=pytest.mark.slow) for value in each]


# NumPy always, and CuPy or its stand-in where slow tests run.
cupy_slowly = pytest.mark.parametrize("xp", ["numpy", *slowly("cupy")], indirect=True)


# Types of every kind with channels first, one with channels last; the others slowly.
KINDS = ("bool", "int8", "int64", "uint16", *HALVES, "float32", "float64", *COMPLEX)
EACH_TYPE = [
    *((dtype, LAYOUTS[0]) for dtype in KINDS),
    ("float32", LAYOUTS[1]),
    *slowly(*((dtype, LAYOUTS[0]) for dtype in SUPPORTED_TYPES if dtype not in KINDS)),
    *slowly(*((dtype, LAYOUTS[1]) for dtype in SUPPORTED_TYPES if dtype != "float32")),
]


# Calls that are worth several workers


# More than two million multiply-adds: worth several workers.
BUSY = Case((12, 16, 30, 28), (32, 16, 3, 3), {"padding": 1})


def blas_threads() -> list[int]:
    return [
        lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"
    ]


def large_arrays() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, BUSY.x_shape).astype(np.float32)
    return x, rng.integers(-3, 4, BUSY.w_shape).astype(np.float32)


# Integers in float32 are exact in sums of products, and not under Winograd.
strictly = partial(cuconv.conv, padding=1, precision="strict")


# Inside the library: nothing else in the tests knows these names


def forget_plans() -> None:
    """Plan every call anew: needed where something changes that no key knows of."""
    calls.forget_plans()


def forget_winners() -> None:
    """Read the records of `strategy="benchmark"` from the disk again."""
    autotune._known.cache_clear()
    forget_plans()


def candidates_of(plan: cuconv.Plan) -> Sequence[Any]:
    """Everything that a plan could run: strategy, tiling and what they cost."""
    (part,) = plan.lowering.parts
    return part.candidates


def chosen(plan: cuconv.Plan) -> Any:
    """The candidate that a plan runs."""
    return plan.candidates[0]


def with_candidate(plan: cuconv.Plan, candidate: Any) -> cuconv.Plan:
    """The same plan, which runs another of its candidates."""
    return plan.with_candidates([candidate])


def run_candidate(plan: cuconv.Plan, candidate: Any, arrays: Sequence[Any]) -> Any:
    return with_candidate(plan, candidate).run(arrays, None)


def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The first candidate of every call that runs from now on."""
    seen: list[Any] = []
    for kind in (planning.Plan, separable.SeparablePlan):

        def spy(plan: Any, *arguments: Any, run: Any = kind.run) -> Any:
            result = run(plan, *arguments)
            seen.append(chosen(plan))
            return result

        monkeypatch.setattr(kind, "run", spy)
    return seen


def let_win(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Let a strategy win every race; how many candidates each of them had."""
    races: list[int] = []
    names: list[str] = []
    original = autotune.recall

    def recall(machine: Any, key: Any, candidates: Sequence[Any]) -> Any:
        names[:] = [candidate.strategy for candidate in candidates]
        return original(machine, key, candidates)

    def fastest(backend: Any, timed: Sequence[Any]) -> int:
        races.append(len(timed))
        return names.index(name)

    monkeypatch.setattr(autotune, "recall", recall)
    monkeypatch.setattr(autotune, "fastest", fastest)
    return races


def make_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every problem be worth several workers, however small it is."""
    eager = host.CPU_RATES._replace(worth_workers=0, worker=0)
    monkeypatch.setattr(host.CpuBackend, "rates", eager)
    forget_plans()


def forget_arenas() -> None:
    """Give the memory back that calls leave to the next ones."""
    host._ARENAS.clear()


def fill_arenas(value: float) -> None:
    """Leave rubbish in the memory that the next call takes."""
    forget_arenas()
    with host._ARENAS.borrowed(2**23) as memory:
        memory.view(np.float32)[...] = value


def kept_arenas() -> list[int]:
    """Bytes of each piece of memory that waits for the next call."""
    return [arena.nbytes for arena in host._ARENAS._kept]


def calls_that_plan(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operation of each call from now on that was not known before."""
    seen: list[str] = []
    note_plans(monkeypatch, calls, lambda request: seen.append(request.call))
    return seen


def note_plans(
    monkeypatch: pytest.MonkeyPatch, module: Any, note: Callable[[Any], Any]
) -> None:
    """Hand the request of every plan that a module makes to ``note``."""
    original = module.Plan

    def spy(request: Any) -> Any:
        note(request)
        return original(request)

    monkeypatch.setattr(module, "Plan", spy)
    forget_plans()


def keep_few_plans(monkeypatch: pytest.MonkeyPatch, most: int) -> Sized:
    """Let the library keep no more plans than that; those that it keeps."""
    monkeypatch.setattr(calls, "_MOST_PLANS", most)
    return calls._PLANS


def devices_that_plan(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The device of each plan that is made from now on."""
    asked: list[str] = []
    # `cuconv.conv` is the function; `plan_conv` plans in the module of that name.
    for module in (calls, sys.modules["cuconv.conv"]):
        note_plans(monkeypatch, module, lambda r: asked.append(r.backend.device))
    return asked


def races_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many candidates are timed, each time that any are."""
    seen: list[int] = []
    original = autotune.fastest

    def spy(backend: Any, candidates: Any) -> int:
        seen.append(len(candidates))
        return original(backend, candidates)

    monkeypatch.setattr(autotune, "fastest", spy)
    return seen


def let_number_win(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let every race be won by the candidate of a number, whatever is on record."""
    monkeypatch.setattr(autotune, "recall", lambda *_: None)
    monkeypatch.setattr(autotune, "fastest", lambda _, each: number % len(each))
    forget_plans()


def on_blocks(monkeypatch: pytest.MonkeyPatch, note: Callable[[Any, Any], Any]) -> None:
    """Hand the arrays and the options of every block of Dask arrays to ``note``."""
    from cuconv.dask import conv as blocks

    note_plans(monkeypatch, blocks, lambda r: note(r.arrays, r.options))
