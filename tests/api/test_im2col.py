"""im2col, col2im, iter_im2col and patches against loops over single cells."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from cases import CASES, cases
from hypothesis import given
from hypothesis import strategies as st
from support import (
    EACH_TYPE,
    HALVES,
    LAYOUTS,
    PLACES,
    Case,
    device_allocations,
    host_peak,
    integers,
    outs,
    slowly,
    spread_over,
    to_device,
    to_host,
)

import cuconv
from cuconv import testing
from cuconv.memory import MemoryLimitError

ORDERS = ("rows", "columns", "batched")


def window_options(case: Case) -> dict[str, Any]:
    """What a case says about its windows; groups are no business of columns."""
    return {name: value for name, value in case.options.items() if name != "groups"}


def kernel_of(case: Case) -> tuple[int, ...]:
    return case.w_shape[2:] if case.layout == "channels_first" else case.w_shape[:-2]


def is_batched(case: Case) -> bool:
    return len(case.x_shape) == len(case.w_shape)


def as_images(x: np.ndarray, case: Case) -> np.ndarray:
    """(N, C, *spatial) of any layout, a view."""
    x = x if is_batched(case) else x[np.newaxis]
    return x if case.layout == "channels_first" else np.moveaxis(x, -1, 1)


def each_cell(case: Case) -> list[tuple[tuple[int, ...], tuple[int, ...], Any]]:
    """Output cell, tap, and the input cell under it (None in the padding)."""
    x_shape, kernel = as_images(np.empty(case.x_shape), case).shape, kernel_of(case)
    out = as_images(np.empty(case.y_shape()), case).shape[2:]
    padding = case.options.get("padding", 0)
    probe = np.arange(1, math.prod(x_shape[2:]) + 1).reshape(1, 1, *x_shape[2:])
    taps = list(np.ndindex(*kernel))
    # One filter for each tap: the reference then copies the cells under that tap.
    filters = np.eye(len(taps), dtype=int).reshape(len(taps), 1, *kernel)
    options = {k: v for k, v in window_options(case).items() if k != "layout"}
    under = testing.conv_reference(probe, filters, **{**options, "padding": padding})
    cells = []
    for o in np.ndindex(*out):
        for t, tap in enumerate(taps):
            number = int(under[(0, t, *o)])
            found = np.unravel_index(number - 1, x_shape[2:]) if number else None
            cells.append((o, tap, found))
    return cells


def loops_im2col(x: np.ndarray, case: Case, order: str) -> np.ndarray:
    """Cell by cell."""
    images = as_images(x, case)
    kernel = kernel_of(case)
    out = as_images(np.empty(case.y_shape()), case).shape[2:]
    n, c = images.shape[:2]
    cells = np.zeros((n, c, math.prod(kernel), math.prod(out)), dtype=x.dtype)
    for o, tap, found in each_cell(case):
        if found is not None:
            t = int(np.ravel_multi_index(tap, kernel))
            p = int(np.ravel_multi_index(o, out))
            for image, channel in product(range(n), range(c)):
                cells[image, channel, t, p] = images[(image, channel, *found)]
    return in_order(cells, case, order)


def in_order(cells: np.ndarray, case: Case, order: str) -> np.ndarray:
    """From (N, C, taps, positions) to a matrix of the order and the layout."""
    n, c, taps, positions = cells.shape
    if case.layout == "channels_last":
        cells = cells.swapaxes(1, 2)
    patch = cells.reshape(n, c * taps, positions)
    if order == "rows":
        return patch.swapaxes(1, 2).reshape(n * positions, c * taps)
    if order == "columns":
        return patch.swapaxes(0, 1).reshape(c * taps, n * positions)
    return patch if is_batched(case) else patch[0]


def loops_col2im(columns: np.ndarray, case: Case, order: str) -> np.ndarray:
    """The sum of what lies where im2col would have put each cell, exactly."""
    numbers = np.arange(1, math.prod(case.x_shape) + 1).reshape(case.x_shape)
    places = loops_im2col(numbers, case, order)
    sums = np.zeros(math.prod(case.x_shape) + 1, dtype=object)
    wide = columns.astype(complex if columns.dtype.kind == "c" else float).astype(
        object
    )
    if columns.dtype.kind in "biu":
        wide = columns.astype(object)
    for number, value in zip(places.reshape(-1), wide.reshape(-1), strict=True):
        sums[number] += value
    x = sums[1:].reshape(case.x_shape)
    if columns.dtype.kind in "iu":
        return np.mod(x, 2**64).astype(np.uint64).astype(columns.dtype)
    return x.astype(columns.dtype)


def im2col(x: Any, case: Case, **more: Any) -> Any:
    return cuconv.im2col(x, kernel_of(case), **window_options(case), **more)


def col2im(columns: Any, case: Case, **more: Any) -> Any:
    options = window_options(case)
    return cuconv.col2im(columns, case.x_shape, kernel_of(case), **options, **more)


def same_bits(actual: Any, expected: np.ndarray) -> None:
    """Gathering is copying: every bit counts, those of NaN too."""
    host = to_host(actual)
    assert host.dtype == expected.dtype
    assert host.shape == expected.shape
    assert (
        np.ascontiguousarray(host).tobytes() == np.ascontiguousarray(expected).tobytes()
    )


# im2col


@pytest.mark.parametrize(("dtype", "layout"), EACH_TYPE)
@pytest.mark.parametrize("order", ORDERS)
def test_im2col_equals_the_loops(xp, order, dtype, layout) -> None:
    for written in CASES.values():
        case = written.in_layout(layout)
        x = integers(case.x_shape, dtype)
        wanted = loops_im2col(x, case, order)
        same_bits(im2col(to_device(xp, x), case, order=order), wanted)


@pytest.mark.parametrize("order", ORDERS)
@given(case=cases(), place=st.sampled_from(sorted(PLACES)))
def test_im2col_of_any_geometry(xp, order, case, place) -> None:
    x = integers(case.x_shape, "int16")
    same_bits(
        im2col(PLACES[place](xp, x), case, order=order), loops_im2col(x, case, order)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex128"])
def test_im2col_copies_bits_of_every_kind(xp, dtype) -> None:
    """NaN with a payload, infinities, negative zero, subnormals."""
    case = CASES["two axes, all different"]
    raw = np.random.default_rng(0).integers(0, 256, 2**14, dtype=np.uint8)
    x = raw.view(dtype)[: math.prod(case.x_shape)].reshape(case.x_shape)
    with np.errstate(invalid="ignore"):
        same_bits(im2col(to_device(xp, x), case), loops_im2col(x, case, "rows"))


# col2im


@pytest.mark.parametrize(
    ("dtype", "layout"), [each for each in EACH_TYPE if "bool" not in str(each)]
)
@pytest.mark.parametrize("order", ORDERS)
def test_col2im_equals_the_loops(xp, order, dtype, layout) -> None:
    for written in CASES.values():
        case = written.in_layout(layout)
        shape = loops_im2col(np.empty(case.x_shape), case, order).shape
        columns = integers(shape, dtype)
        wanted = loops_col2im(columns, case, order)
        for candidate in (True, False, None):
            actual = col2im(
                to_device(xp, columns), case, order=order, deterministic=candidate
            )
            testing.assert_equal(actual, wanted, dtype=dtype)


@pytest.mark.parametrize("order", ORDERS)
@given(case=cases(), place=st.sampled_from(sorted(PLACES)), atomic=st.booleans())
def test_col2im_of_any_geometry(xp, order, case, place, atomic) -> None:
    shape = loops_im2col(np.empty(case.x_shape), case, order).shape
    columns = integers(shape, "float32")
    mine = columns if len(shape) == 1 else PLACES[place](xp, columns)
    actual = col2im(mine, case, order=order, deterministic=not atomic)
    testing.assert_equal(actual, loops_col2im(columns, case, order), dtype=np.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_col2im_sums_half_types_in_float32(xp, dtype) -> None:
    """A cell under 4096 windows; a sum in half would stop at 2048 or at 256."""
    taps = 4096
    columns = xp.ones((taps, taps), dtype)
    x = cuconv.col2im(columns, (1, 1, 1), taps, padding=taps - 1)
    testing.assert_equal(x, np.full((1, 1, 1), float(taps)), dtype=dtype)


@pytest.mark.parametrize("dtype", ["complex64", *slowly("float64", "int32")])
@pytest.mark.parametrize("order", ORDERS)
@given(case=cases())
def test_col2im_is_the_adjoint(xp, order, dtype, case) -> None:
    shape = loops_im2col(np.empty(case.x_shape), case, order).shape
    testing.check_adjoint(
        lambda x: im2col(x, case, order=order),
        lambda columns: col2im(columns, case, order=order),
        case.x_shape,
        shape,
        dtype=dtype,
        xp=xp,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_times_weights_is_the_convolution(xp, layout) -> None:
    for written in CASES.values():
        if written.options.get("groups", 1) > 1:
            continue
        case = written.in_layout(layout)
        x, w = integers(case.x_shape), integers(case.w_shape, seed=1)
        rows = to_host(im2col(to_device(xp, x), case))
        k = case.filters()
        matrix = w.reshape(k, -1).T if layout == "channels_first" else w.reshape(-1, k)
        y = testing.conv_reference(x, w, **case.options)
        last = np.moveaxis(y, 1 if is_batched(case) else 0, -1)
        wanted = last if layout == "channels_first" else y
        testing.assert_equal((rows @ matrix).reshape(wanted.shape), wanted)


# out


@pytest.mark.parametrize("order", ORDERS)
def test_out_takes_the_result_wherever_it_lies(xp, order) -> None:
    checked = 0
    for layout in LAYOUTS:
        for written in CASES.values():
            case = written.in_layout(layout)
            x = integers(case.x_shape, "float32")
            columns = loops_im2col(x, case, order)
            back = loops_col2im(columns, case, order)
            for out in outs(xp, columns.shape):
                assert im2col(to_device(xp, x), case, order=order, out=out) is out
                testing.assert_equal(out, columns)
            for out in outs(xp, back.shape):
                mine = to_device(xp, columns)
                assert col2im(mine, case, order=order, out=out) is out
                testing.assert_equal(out, back)
            checked += 1
    assert checked == 2 * len(CASES)


# Nothing


def test_empty_columns(xp) -> None:
    for shape, kernel, options in (
        ((0, 2, 5), 2, {}),
        ((2, 0, 5), 2, {}),
        ((2, 3, 0), 3, {"padding": "same"}),
        ((0, 2, 5, 6), (2, 3), {}),
    ):
        x = xp.ones(shape, np.float32)
        for order in ORDERS:
            columns = cuconv.im2col(x, kernel, order=order, **options)
            assert columns.size == 0
            back = cuconv.col2im(columns, shape, kernel, order=order, **options)
            testing.assert_equal(back, np.zeros(shape))
        steps = cuconv.iter_im2col(x, kernel, **options)
        assert sum(columns.size for _, columns in steps) == 0


def test_windows_over_nothing_but_padding(xp) -> None:
    columns = cuconv.im2col(xp.ones((1, 2, 0)), 2, padding=((2, 1),))
    testing.assert_equal(columns, np.zeros((2, 4)))
    back = cuconv.col2im(columns, (1, 2, 0), 2, padding=((2, 1),))
    assert back.shape == (1, 2, 0)
    far = cuconv.col2im(xp.ones((6, 2)), (1, 1, 2), 2, padding=((9, -4),), stride=1)
    testing.assert_equal(far, np.zeros((1, 1, 2)))


# iter_im2col


@pytest.mark.parametrize("order", ORDERS)
@given(case=cases(), extra=st.sampled_from([0, 256, 1024, 4096, 2**20]))
def test_the_steps_cover_the_columns_once(xp, order, case, extra) -> None:
    x = integers(case.x_shape, "float32")
    mine = to_device(xp, x)
    steps = partial(lazily, mine, case, order=order)
    limit = smallest_step(steps) + extra
    cells = loops_im2col(x, case, "rows")
    positions = as_images(np.empty(case.y_shape()), case).shape
    whole = cells.reshape(positions[0], *positions[2:], -1)
    seen = np.zeros(whole.shape[:-1], dtype=int)
    for block, columns in steps(memory_limit=limit):
        place = tuple(slice(*span) for span in (block.images, *block.output))
        seen[place] += 1
        part = whole[place]
        rows = part.reshape(-1, part.shape[-1])
        matrix = {
            "rows": rows,
            "columns": rows.T,
            "batched": part.reshape(part.shape[0], -1, part.shape[-1]).swapaxes(1, 2),
        }[order]
        if order == "batched" and not is_batched(case):
            matrix = matrix[0]
        testing.assert_equal(columns, matrix, dtype=np.float32)
    assert (seen == 1).all()


def lazily(x: Any, case: Case, **more: Any) -> Any:
    return cuconv.iter_im2col(x, kernel_of(case), **window_options(case), **more)


def smallest_step(steps: Callable[..., Any]) -> int:
    with pytest.raises(MemoryLimitError) as caught:
        list(steps(memory_limit=0))
    return caught.value.smallest


@pytest.mark.parametrize("dtype", ["float32", "int8", "complex64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_step_takes_more_than_the_limit(xp, layout, dtype) -> None:
    checked = 0
    for written in CASES.values():
        case = written.in_layout(layout)
        x = to_device(xp, integers(case.x_shape, dtype))
        smallest = smallest_step(partial(lazily, x, case))
        for limit in (smallest, smallest + 2048):
            steps = partial(lazily, x, case, memory_limit=limit)
            assert most_of_a_step(xp, steps, limit) <= limit
            checked += 1
        with pytest.raises(MemoryLimitError) as caught:
            lazily(x, case, memory_limit=smallest - 1)
        assert caught.value.smallest == smallest
        assert str(smallest) in str(caught.value)
    assert checked == 2 * len(CASES)


def most_of_a_step(xp: Any, steps: Callable[[], Any], most: int) -> int:
    """The peak over a walk that keeps nothing, columns included."""

    def walk() -> None:
        for _ in steps():
            del _

    if xp is np:
        return host_peak(walk, most)
    with device_allocations(xp) as seen:
        walk()
    return seen.peak


def test_errors_come_before_the_first_step(xp) -> None:
    x = xp.ones((1, 1, 5))
    with pytest.raises(ValueError, match="kernel is larger"):
        cuconv.iter_im2col(x, 6)
    with pytest.raises(MemoryLimitError, match="smallest that would do"):
        cuconv.iter_im2col(x, 2, memory_limit=1)
    with pytest.raises(ValueError, match="order must be one of"):
        cuconv.iter_im2col(x, 2, order="patches")


# patches


@given(case=cases(), dtype=st.sampled_from(["float32", "bool", "int8", "complex64"]))
def test_patches_are_every_window(xp, case, dtype) -> None:
    options = {k: v for k, v in window_options(case).items() if k != "padding"}
    kernel, plain = (
        kernel_of(case),
        case._replace(options={**case.options, "padding": 0}),
    )
    spatial = as_images(np.empty(case.x_shape), case).shape[2:]
    spans = zip(options["dilation"], kernel, spatial, strict=True)
    if any(d * (k - 1) + 1 > n for d, k, n in spans):
        with pytest.raises(ValueError, match="kernel is larger"):
            cuconv.patches(xp.ones(case.x_shape), kernel, **options)
        return
    x = integers(case.x_shape, dtype)
    view = cuconv.patches(to_device(xp, x), kernel, **options)
    images = as_images(x, case)
    wanted = np.zeros(to_host(view).shape, dtype=dtype)
    into = wanted if is_batched(case) else wanted[np.newaxis]
    for o, tap, found in each_cell(plain):
        into[(slice(None), slice(None), *o, *tap)] = images[(slice(None),) * 2 + found]
    testing.assert_equal(view, wanted, dtype=dtype)


def test_patches_are_the_array_itself(xp) -> None:
    x = to_device(xp, integers((2, 3, 9, 8), "float32"))
    view = cuconv.patches(x, (3, 2), stride=(2, 3), dilation=(1, 2))
    assert view.shape == (2, 3, 4, 2, 3, 2)
    assert xp.may_share_memory(view, x)
    x[0, 0, 0, 0] = 77
    assert float(to_host(view)[0, 0, 0, 0, 0, 0]) == 77
    if xp is np:
        assert not view.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view[...] = 0


def test_patches_take_no_memory(xp) -> None:
    whole = xp.zeros((16, 16, 256, 256), np.int8)

    def call() -> None:
        cuconv.patches(whole, (16, 16))

    if xp is np:
        assert host_peak(call, 2**14) < 2**14
    else:
        with device_allocations(xp) as seen:
            call()
        assert seen.count == 0


# Errors


def test_columns_refuse_what_does_not_fit(xp) -> None:
    x = spread_over(xp, xp.zeros((1, 1, 1, 1), np.float32), (64, 64, 2**12, 2**12))
    im2col = partial(cuconv.im2col, x)
    bad: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, "x has 4 axes; 4 spatial axes need 6", lambda: im2col((3,) * 4)),
        (ValueError, "5000 elements", lambda: im2col(5000)),
        (ValueError, "kernel_size of spatial axis 0 is 0", lambda: im2col(0)),
        (ValueError, "stride of spatial axis 0", lambda: im2col(2, stride=0)),
        (ValueError, "dilation of spatial", lambda: im2col(2, dilation=-1)),
        (ValueError, "'half'", lambda: im2col(2, padding="half")),
        (ValueError, "'NCL'", lambda: im2col(2, layout="NCL")),
        (ValueError, "'rows'.*got 'row'", lambda: im2col(2, order="row")),
        (TypeError, "kernel_size", lambda: im2col("2")),
        (TypeError, "kernel_size.*2.0", lambda: im2col(2.0)),
        (TypeError, "x must be a NumPy or CuPy", lambda: cuconv.im2col([1, 2], 2)),
        (ValueError, "5000 elements", lambda: cuconv.patches(x, 5000)),
        (ValueError, "stride", lambda: cuconv.patches(x, 2, stride=0)),
        (
            *(ValueError, r"cols has shape \(64, 64, 4096, 4096\) and .* \(8, 2\)"),
            lambda: cuconv.col2im(x, (1, 1, 9), 2),
        ),
        (TypeError, "9.5", lambda: cuconv.col2im(xp.ones((8, 2)), (1, 1, 9.5), 2)),
    ]
    for error, words, call in bad:
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("function", ["im2col", "col2im"])
def test_columns_refuse_a_bad_out(xp, function) -> None:
    x, columns = xp.ones((1, 1, 9)), xp.ones((8, 2))

    def call(out: Any) -> Any:
        if function == "im2col":
            return cuconv.im2col(x, 2, out=out)
        return cuconv.col2im(columns, (1, 1, 9), 2, out=out)

    shape = call(None).shape
    for out, error, words in (
        (xp.ones((3, 3)), ValueError, rf"\(3, 3\) and the result has \({shape[0]}"),
        (xp.ones(shape, np.float32), TypeError, "float32.*float64"),
        (spread_over(xp, xp.ones((1,) * len(shape)), shape), ValueError, "overlapping"),
        ([1.0], TypeError, "out must be"),
    ):
        with pytest.raises(error, match=words):
            call(out)
    pool = xp.ones(16)
    x, columns = pool[:9].reshape(1, 1, 9), pool.reshape(8, 2)
    with pytest.raises(ValueError, match="out may share memory with"):
        call(columns if function == "im2col" else x)
    if xp is not np:
        with pytest.raises(TypeError, match="mixed"):
            call(np.ones(shape))


def test_a_kernel_size_of_one_number_needs_a_batch(xp) -> None:
    """With (C, L) it cannot be told from (N, C) without space."""
    with pytest.raises(ValueError, match="no spatial axis"):
        cuconv.im2col(xp.ones((3, 9)), 2)
    columns = cuconv.im2col(xp.ones((3, 9)), (2,))
    assert columns.shape == (8, 6)


@pytest.mark.parametrize("dtype", ["O", "U3", "M8[s]", "V4", "longdouble"])
def test_columns_refuse_types_they_cannot_hold(dtype) -> None:
    with pytest.raises(TypeError, match="x has type"):
        cuconv.im2col(np.zeros((1, 1, 5), dtype), 2)
    with pytest.raises(TypeError, match="cols has type"):
        cuconv.col2im(np.zeros((4, 2), dtype), (1, 1, 5), 2)
