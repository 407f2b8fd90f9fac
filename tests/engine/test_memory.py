"""``memory_limit`` holds: the peak of every call is measured, not computed.

NumPy's memory is traced by `tracemalloc`, with everything that Python itself takes; a
device's by a hook in its memory pool.
"""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from cases import CASES, cases
from hypothesis import given
from hypothesis import strategies as st
from support import (
    LAYOUTS,
    OPERATIONS,
    PLACES,
    Case,
    Operands,
    arrays_of,
    cupy_slowly,
    forget_arenas,
    forget_plans,
    host_peak,
    integers,
    operands,
    peak,
    reference,
    run,
    slowly,
    smallest_limit,
    to_device,
    unaligned,
    with_buffers_on,
)

import cuconv
from cuconv import testing
from cuconv.geometry import ConvGeometry
from cuconv.memory import MemoryLimitError

# Large enough that its column matrix is megabytes, and each extent its own.
BIG = {
    "one axis": Case((4, 12, 3001), (8, 6, 9), {"groups": 2, "padding": "same"}),
    "two axes": Case(
        (5, 16, 41, 37),
        (24, 16, 3, 5),
        {"stride": (1, 2), "padding": ((1, 3), (2, 0)), "dilation": (2, 1)},
    ),
    "three axes": Case(
        (2, 6, 9, 13, 17),
        (8, 3, 2, 3, 4),
        {"groups": 2, "padding": ((1, 0), 2, (0, 3))},
    ),
    "depthwise": Case((3, 20, 31, 29), (20, 1, 5, 3), {"groups": 20, "stride": (3, 1)}),
    "pointwise": Case((5, 32, 23, 29), (16, 32, 1, 1), {}),
    "one image": Case((7, 45, 47), (9, 7, 4, 3), {"padding": 3}),
}
# The same for the stand-in, whose kernels are no faster than a plain C++ loop.
SMALLER = {
    name: BIG[name]._replace(x_shape=x_shape)
    for name, x_shape in {
        "one axis": (4, 12, 301),
        "two axes": (5, 16, 13, 11),
        "three axes": (2, 6, 5, 6, 7),
        "depthwise": (3, 20, 12, 9),
        "pointwise": (5, 32, 7, 9),
        "one image": (7, 15, 17),
    }.items()
}
TYPES = ("float32", "float16", "bfloat16", "int8", "float64", "complex64")


def assert_within(xp: Any, call: Callable[..., Any], limit: int) -> None:
    """A call under a limit takes no more, by measurement."""
    took = peak(xp, partial(call, memory_limit=limit), limit)
    assert took <= limit, f"{took} bytes at the peak, {took - limit} above the limit"


def volumes(xp: Any) -> dict[str, Case]:
    return BIG if xp is np else SMALLER


def big_arrays(xp: Any, case: Case, dtype: Any) -> Operands:
    geometry = ConvGeometry.of_weights(case.x_shape, case.w_shape, **case.options)
    shapes = (case.x_shape, case.w_shape, geometry.y_shape)
    return Operands(*(to_device(xp, integers(s, dtype)) for s in shapes))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [TYPES[0], *slowly(*TYPES[1:])])
@pytest.mark.parametrize("op", OPERATIONS)
def test_the_peak_is_within_the_limit(xp, op, dtype, layout) -> None:
    checked = 0
    for written in volumes(xp).values():
        case = written.in_layout(layout)
        call = partial(
            run, op, big_arrays(xp, case, dtype), case, **with_buffers_on(xp)
        )
        # The smallest limits run one position at a time: not for the largest cases.
        for extra in (2**15, 2**19) if xp is np else (2**12, 2**17):
            assert_within(xp, call, smallest_limit(call) + extra)
            checked += 1
    assert checked == 12


@pytest.mark.parametrize("op", OPERATIONS)
@given(
    case=cases(),
    dtype=st.sampled_from(TYPES),
    extra=st.sampled_from([0, 0, 256, 1024, 4096, 2**16]),
    places=st.tuples(*[st.sampled_from(sorted(PLACES))] * 3),
)
def test_any_geometry_stays_within_the_smallest_limit(
    xp, op, case, dtype, extra, places
) -> None:
    plain = operands(case, dtype)
    arrays = Operands(*(PLACES[p](xp, a) for p, a in zip(places, plain, strict=True)))
    call = partial(run, op, arrays, case, **with_buffers_on(xp))
    assert_within(xp, call, smallest_limit(call) + extra)


@pytest.mark.parametrize(
    "result", ["int32", *slowly("float64", "float16", "complex128")]
)
@pytest.mark.parametrize("op", OPERATIONS)
def test_the_peak_is_within_the_limit_when_types_change(xp, op, result) -> None:
    case = volumes(xp)["two axes"]
    dtype = "int8" if result == "int32" else "float32"
    arrays = big_arrays(xp, case, dtype)
    call = partial(run, op, arrays, case, dtype=result, **with_buffers_on(xp))
    for extra in (2**14, 2**18):
        assert_within(xp, call, smallest_limit(call) + extra)


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_peak_is_within_the_limit_with_out(xp, op) -> None:
    """Also when products cannot be written where ``out`` lies."""
    case = volumes(xp)["two axes"]
    arrays = big_arrays(xp, case, "float32")
    shape = run(op, arrays, case).shape
    spaced = xp.zeros([2 * n for n in shape], dtype=np.float32)
    places = (
        xp.zeros(shape, np.float32),
        spaced[tuple(slice(None, None, 2) for _ in shape)],
    )
    for out in places:
        call = partial(run, op, arrays, case, out=out, **with_buffers_on(xp))
        limit = smallest_limit(call) + 2**17

        def nothing(call: Any = call, limit: int = limit) -> None:
            call(memory_limit=limit)

        assert peak(xp, nothing, limit) <= limit


@pytest.mark.parametrize("dtype", [TYPES[0], *slowly(*TYPES[1:])])
def test_bias_and_its_gradient_are_within_the_limit(xp, dtype) -> None:
    for case in volumes(xp).values():
        x, w, dy = big_arrays(xp, case, dtype)
        bias = to_device(xp, integers((case.filters(),), dtype))
        forward = partial(cuconv.conv, x, w, bias, **case.options)
        assert_within(xp, forward, smallest_limit(forward) + 2**17)
        backward = partial(cuconv.conv_backward, dy, x, w, **case.options)
        assert_within(xp, backward, smallest_limit(backward) + 2**17)
        alone = partial(backward, needs=("bias",))
        assert_within(xp, alone, max(smallest_limit(alone), 2**16))


def test_several_workers_share_the_limit(choices) -> None:
    """Threads have buffers of their own; their sum is what counts."""
    for op in OPERATIONS:
        case = BIG["two axes"]
        call = partial(run, op, big_arrays(np, case, "float32"), case)
        with cuconv.config(num_threads=4):
            for limit in (2**17, 2**20, 2**22, 2**24):
                assert_within(np, call, max(limit, smallest_limit(call)))
    workers = {candidate.tiling.workers for candidate in choices}
    assert min(workers) == 1
    assert max(workers) > 2


@pytest.mark.parametrize("layout", [LAYOUTS[0], *slowly(LAYOUTS[1])])
@pytest.mark.parametrize("op", OPERATIONS)
def test_the_smallest_limit_that_is_named_works_and_one_less_fails(
    xp, op, layout
) -> None:
    checked = 0
    for written in CASES.values():
        case = written.in_layout(layout)
        for dtype in ("float32", "float16"):
            arrays = operands(case, dtype).on(xp)
            call = partial(run, op, arrays, case, **with_buffers_on(xp))
            smallest = smallest_limit(call)
            if smallest == 0:
                continue
            assert_within(xp, call, smallest)
            with pytest.raises(MemoryLimitError) as caught:
                call(memory_limit=smallest - 1)
            assert caught.value.limit == smallest - 1
            assert caught.value.smallest == smallest
            for number in (smallest - 1, smallest):
                assert str(number) in str(caught.value)
            checked += 1
    assert checked > len(CASES)


def test_backward_names_a_limit_that_does_for_all_gradients(xp) -> None:
    checked = 0
    for case in CASES.values():
        x, w, dy = operands(case, "float32").on(xp)
        call = partial(cuconv.conv_backward, dy, x, w, **case.options)
        smallest = smallest_limit(call)
        each = [smallest_limit(partial(call, needs=(n,))) for n in ("x", "w", "bias")]
        assert smallest == max(each)
        assert_within(xp, call, smallest)
        if smallest:
            with pytest.raises(MemoryLimitError):
                call(memory_limit=smallest - 1)
            checked += 1
    assert checked > len(CASES) // 2


@pytest.mark.parametrize("op", OPERATIONS)
def test_thousands_of_chunks_are_not_listed_beforehand(xp, op) -> None:
    """One position at a time, of thousands: to list them would take megabytes."""
    case = Case((1, 1, 9001), (1, 1, 2), {})
    arrays = Operands(
        *(xp.ones(s, np.float32) for s in ((1, 1, 9001), (1, 1, 2), (1, 1, 9000)))
    )
    call = partial(run, op, arrays, case, **with_buffers_on(xp))
    assert_within(xp, call, smallest_limit(call))


@cupy_slowly
def test_without_a_limit_memory_is_bounded_too(xp) -> None:
    """The whole column matrix would be more than 256 MiB."""
    case = Case((8, 32, 181, 179), (4, 32, 3, 3), {"padding": 1})
    x = xp.zeros(case.x_shape, dtype=np.float32)
    w = xp.zeros(case.w_shape, dtype=np.float32)
    geometry = ConvGeometry.of_weights(case.x_shape, case.w_shape, padding=1)
    most = 64 * 2**20 if xp is np else 256 * 2**20
    assert geometry.column_bytes(4) > 256 * 2**20
    call = partial(cuconv.conv, x, w, padding=1, **with_buffers_on(xp))
    assert peak(xp, call, most) <= most


def test_an_allocation_that_fails_leaves_out_alone(xp, monkeypatch) -> None:
    """The workspace comes first: no memory, and nothing is half written."""
    case = CASES["two axes, all different"]
    arrays = operands(case, "float32").on(xp)
    out = xp.full(case.y_shape(), 77, dtype=np.float32)

    def empty(*arguments: Any, **options: Any) -> Any:
        raise MemoryError("full")

    forget_arenas()
    with monkeypatch.context() as patch:
        patch.setattr(xp, "empty", empty)
        with pytest.raises(MemoryError, match="full"):
            run("forward", arrays, case, out=out, **with_buffers_on(xp))
    assert (out == 77).all()


@pytest.mark.parametrize("op", OPERATIONS)
def test_more_memory_is_never_needed_for_more_images(xp, op) -> None:
    """The smallest limit depends on the image, not on how many there are.

    But for a sum of the weight gradient that is kept turned where that pays.
    """
    limits = []
    for images in (1, 4, 64):
        case = Case((images, 3, 9, 8), (4, 3, 3, 2), {"padding": 1})
        call = partial(run, op, operands(case, "float32").on(xp), case)
        limits.append(smallest_limit(call))
    sums = 512  # what a buffer for the 72 weights takes
    assert limits[0] <= limits[1] <= limits[2] <= limits[1] + sums
    assert op == "weight_grad" or limits[1] == limits[2]


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("name", ["two axes", "pointwise"])
def test_unaligned_arrays_are_not_copied_whole(op, name) -> None:
    """NumPy's matmul would; with ``out`` unaligned too."""
    case = BIG[name]
    aligned = big_arrays(np, case, "float32")
    wanted = run(op, aligned, case)
    arrays = Operands(*map(unaligned, aligned))
    assert not arrays.x.flags.aligned
    out = unaligned(wanted)
    call = partial(run, op, arrays, case, out=out)
    limit = smallest_limit(call) + 2**14
    most = limit - out.nbytes
    assert host_peak(partial(call, memory_limit=limit), most) <= most
    assert np.array_equal(out, wanted)


def test_a_product_longer_than_its_buffer_is_cut_along_either_side() -> None:
    """A single filter is a row whichever way it is stored."""
    options = {
        "stride": (1, 2, 3),
        "padding": ((0, 1), (0, 0), (0, 0)),
        "dilation": (1, 1, 1),
        "layout": "channels_last",
    }
    checked = 0
    for filters in (1, 3):
        case = Case((1, 5, 13, 5, 2), (1, 2, 3, 2, filters), options)
        arrays = operands(case, "float32")
        wanted = reference("weight_grad", arrays, case)
        call = partial(run, "weight_grad", arrays, case, strategy="im2col")
        smallest = smallest_limit(call)
        for extra in range(0, 4096, 512):
            testing.assert_equal(call(memory_limit=smallest + extra), wanted)
            checked += 1
    assert checked == 16


def test_a_kernel_of_many_taps_is_not_listed() -> None:
    x, w = np.ones((1, 1, 2030), np.float32), np.ones((1, 1, 2000), np.float32)
    dy = np.ones((1, 1, 31), np.float32)
    call = partial(cuconv.conv_input_grad, dy, w, x.shape)
    assert_within(np, call, smallest_limit(call) + 2**17)


def _ways() -> list[Callable[..., Any]]:
    """Small calls of every kind, which a smallest limit could make slow."""
    made = []
    for shapes, options in (
        (((2, 3, 37), (4, 3, 5)), {"padding_mode": "circular", "padding": 2}),
        (((2, 4, 19, 23), (6, 2, 3, 4)), {"groups": 2, "stride": (1, 2)}),
        (((1, 2, 7, 8, 9), (2, 2, 4, 3, 2)), {"input_dilation": 2}),
        (((2, 8, 21, 17), (8, 1, 3, 3)), {"groups": 8}),
    ):
        case = Case(*shapes, options)
        arrays = operands(case, "float32")
        made += [partial(run, op, arrays, case) for op in OPERATIONS]
        x, w, dy = arrays
        made.append(partial(cuconv.conv_backward, dy, x, w, **options))
    x, w = integers((1, 3, 9, 8), "float32"), integers((3, 4, 5, 4), "float32")
    made.append(partial(cuconv.conv_transpose, x, w, stride=(2, 3)))
    x = integers((2, 3, 23, 50), "float32")
    made += [partial(cuconv.max_pool, x, 3), partial(cuconv.avg_pool, x, 3, stride=2)]
    depthwise, pointwise = integers((3, 1, 3, 3)), integers((5, 3))
    made.append(partial(cuconv.separable_conv, x, depthwise, pointwise))
    return made


@pytest.mark.usefixtures("room")
def test_a_first_call_is_within_the_smallest_limit_and_usable() -> None:
    """With all objects that planning leaves; and not hundreds of times as slow."""
    checked = 0
    for call in _ways():
        smallest = smallest_limit(call)
        assert 0 < smallest < 2**19
        small = partial(call, memory_limit=smallest)

        def first(small: Any = small) -> Any:
            forget_plans()
            return small()

        for each in (first, small):
            assert host_peak(each, smallest) <= smallest
        larger = partial(call, memory_limit=4 * smallest)
        both = zip(arrays_of(small()), arrays_of(larger()), strict=True)
        for one, two in both:
            testing.assert_equal(one, two)
        assert fastest(small) <= 20 * fastest(larger)
        checked += 1
    assert checked == 20


def fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(9):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)
