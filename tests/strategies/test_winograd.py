"""Winograd's transforms, tiles and tails; that it is near enough, and when it runs."""

from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from cases import tiled_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    LAYOUTS,
    OPERATIONS,
    Case,
    Operands,
    assert_near,
    candidates_of,
    integers,
    normal,
    of,
    peak,
    plan_of,
    reference,
    run,
    run_candidate,
    slowly,
    smallest_limit,
    to_host,
    with_candidate,
)

import cuconv
from cuconv import testing
from cuconv.strategies import strategies
from cuconv.strategies.winograd import matrices

KERNELS = range(2, 6)
SIZES = (4, 6, 8)
# The documented bounds, of the largest number of the result.
BOUNDS = {
    ("standard", "float32"): 1e-5,
    ("fast", "float32"): 1e-4,
    ("standard", "float64"): 1e-12,
    ("fast", "float64"): 1e-12,
}
WINOGRAD = {"strategy": "winograd"}


# The transforms


def _all_sizes() -> list[tuple[int, int]]:
    """Every F(m, r) whose tile is one of those in use, by m and r."""
    return [(n - r + 1, r) for n in SIZES for r in KERNELS if n > r]


@pytest.mark.parametrize(("m", "r"), _all_sizes())
def test_the_transforms_are_the_correlation(m, r) -> None:
    """Checked cell by cell on the unit vectors: every product that there is."""
    found = matrices(m, r, np.dtype(np.float64))
    n = m + r - 1
    assert found.input.shape == (n, n)
    assert found.filter.shape == (n, r)
    assert found.output.shape == (m, n)
    products = np.einsum("of,ft,fi->oti", found.output, found.filter, found.input)
    wanted = np.zeros((m, r, n))
    for o in range(m):
        for t in range(r):
            wanted[o, t, o + t] = 1
    scale = np.einsum("of,ft,fi->oti", *map(np.abs, (found.output, *found[1::-1])))
    assert np.abs(products - wanted).max() <= 4 * np.finfo(float).eps * scale.max()


# Near enough

CASES = {
    "square": Case((2, 12, 14, 15), (10, 12, 3, 3), {"padding": 1}),
    "uneven pads": Case((2, 9, 9, 11), (8, 9, 2, 4), {"padding": ((3, 0), (1, 5))}),
    "cropped": Case((2, 8, 13, 12), (9, 8, 3, 3), {"padding": ((-3, 1), (2, -2))}),
    "in groups": Case((2, 16, 9, 8), (20, 8, 3, 2), {"padding": 1, "groups": 2}),
    "one axis": Case((3, 10, 31), (8, 10, 5), {"padding": ((4, 2),)}),
    "taps outside": Case(
        (2, 8, 12, 9), (9, 8, 5, 3), {"stride": (3, 1), "padding": ((2, 4), (1, 0))}
    ),
    "taps outside, three axes": Case(
        (1, 8, 7, 8, 6), (8, 8, 3, 3, 3), {"stride": (2, 1, 1), "padding": 1}
    ),
    "many taps outside": Case((1, 8, 14, 7), (8, 8, 9, 2), {"padding": (5, 0)}),
    "no batch axis": Case((9, 7, 10), (8, 9, 4, 3), {"padding": (0, 2)}),
    "pads beyond the input": Case(
        (1, 8, 2, 3), (8, 8, 3, 3), {"padding": (9, (0, 11))}
    ),
    "smaller than a tile": Case((1, 8, 3, 2), (8, 8, 3, 2), {}),
}


def wide(arrays: Operands) -> Operands:
    return Operands(*(array.astype(np.float64) for array in arrays))


def planned(
    xp: Any, op: str, case: Case, dtype: Any = "float32", **options: Any
) -> Any:
    """The plan of this strategy for arrays of a module, None where it cannot run."""
    options = {"precision": "fast", **WINOGRAD, **options}
    device = "cpu" if xp is np else "cuda"
    return plan_of(op, case, dtype, device=device, **options)


@cache
def known(op: str, name: str, layout: str, dtype: str) -> np.ndarray:
    """The reference for `normal`, computed once for both modules."""
    case = CASES[name].in_layout(layout)
    return reference(op, wide(normal(case, dtype)), case)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        ("float32", LAYOUTS[0]),
        *slowly(("float32", LAYOUTS[1]), *product(["float64"], LAYOUTS)),
    ],
)
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_tile_size_is_within_the_bound(xp, op, layout, dtype) -> None:
    variants = set()
    for name, written in CASES.items():
        case = written.in_layout(layout)
        arrays = normal(case, dtype).on(xp)
        plan = planned(xp, op, case, dtype)
        if plan is None:
            assert op == "input_grad"
            assert max(case.options["stride"]) > 1
            continue
        wanted = known(op, name, layout, dtype)
        for candidate in candidates_of(plan):
            precision = "fast" if 8 in candidate.tiling.variant else "standard"
            got = run_candidate(plan, candidate, of(op, arrays))
            assert_near(got, wanted, BOUNDS[precision, dtype])
            assert got.dtype == dtype
            variants.add(candidate.tiling.variant)
    assert variants == {(n,) * axes for n in SIZES for axes in (1, 2)}


@pytest.mark.parametrize("op", OPERATIONS)
@settings(max_examples=40)
@given(case=tiled_cases(), precision=st.sampled_from(["standard", "fast"]))
def test_any_tail_is_within_the_bound(op, case, precision) -> None:
    """Small integers: a result is off by less than a half, or not at all."""
    plan = plan_of(op, case, precision=precision, **WINOGRAD)
    if plan is None:
        assert op == "input_grad"
        return
    arrays = Operands(*(np.rint(array * 2) for array in normal(case)))
    wanted = reference(op, wide(arrays), case)
    for candidate in candidates_of(plan):
        got = run_candidate(plan, candidate, of(op, arrays))
        np.testing.assert_array_equal(np.rint(got), wanted)


def test_every_length_of_the_last_axes(xp) -> None:
    """Whole tiles, and every tail that there can be."""
    lengths = range(1, 15)
    for rows in (1, 5, 8):
        for length in lengths:
            case = Case((1, 8, rows + 2, length + 2), (8, 8, 3, 3), {})
            host = Operands(*(np.rint(a * 2) for a in normal(case)))
            arrays = host.on(xp)
            for op in OPERATIONS:
                got = run(op, arrays, case, precision="fast", **WINOGRAD)
                wanted = run(op, host, case)
                np.testing.assert_array_equal(np.rint(to_host(got)), wanted)


@pytest.mark.parametrize("op", OPERATIONS)
def test_blocks_and_workers_agree(xp, op) -> None:
    """However the work is cut, every output is computed, and computed alike."""
    case = Case((3, 8, 21, 19), (9, 8, 3, 3), {"padding": 1})
    host = normal(case)
    wanted = run(op, host, case).astype(np.float64)
    arrays, tilings = host.on(xp), set()
    most = (18, 19, 20, 22) if xp is np else (15, 16, 17, 18)
    for limit in (7 * 2**15 if xp is np else 2**17, *(2**n for n in most)):
        plan = planned(xp, op, case, memory_limit=limit)
        for candidate in candidates_of(plan):
            got = run_candidate(plan, candidate, of(op, arrays))
            assert_near(got, wanted, 1e-4)
            tilings.add(candidate.tiling)
            # The first run of a plan records its steps too, within the limit.
            first = partial(run_candidate, plan, candidate, of(op, arrays))
            assert peak(xp, first, limit) <= limit
            later = partial(with_candidate(plan, candidate).run, of(op, arrays), None)
            most = candidate.workspace_bytes
            assert peak(xp, later, most) <= most <= limit
    assert len(tilings) > 12


# The types of x, w and dy, and of the result.
MIXED = [
    ("int8", "float32", "float64", None),
    ("float64", "float32", "float32", None),
    ("float32", "float32", "float32", "float64"),
    ("float64", "int16", "float64", "float32"),
    ("float16", "float32", "float64", "float16"),
    ("float32", "bool", "float32", None),
]


@pytest.mark.parametrize("types", MIXED, ids=str)
@pytest.mark.parametrize("op", OPERATIONS)
def test_types_may_differ(xp, op, types) -> None:
    """Small integers, which every type holds; copies count as memory too."""
    *own, result = types
    for name, layout in (("uneven pads", LAYOUTS[0]), ("in groups", LAYOUTS[1])):
        case = CASES[name].in_layout(layout)
        shapes = case.x_shape, case.w_shape, case.y_shape()
        host = [integers(s, t, largest=1) for s, t in zip(shapes, own, strict=True)]
        arrays = Operands(*host).on(xp)
        options = {"precision": "standard", "dtype": result, **WINOGRAD}
        call = partial(run, op, arrays, case, **options)
        limit = smallest_limit(call) + 2**14
        assert peak(xp, partial(call, memory_limit=limit), limit) <= limit
        got, wanted = call(memory_limit=limit), run(op, Operands(*host), case)
        np.testing.assert_array_equal(np.rint(to_host(got)), wanted)
        assert got.dtype == (wanted.dtype if result is None else result)


@pytest.mark.parametrize("op", ["forward", "input_grad"])
def test_what_is_no_number_stays_in_its_tiles(xp, op) -> None:
    """A cell spreads to the outputs of the tiles that read it, and no farther."""
    case = Case((2, 8, 23, 26), (9, 8, 3, 3), {"padding": 1})
    first, w = of(op, normal(case))
    image, row, column = 1, 11, 12
    first[image, 3, row, column] = np.nan
    plan = planned(xp, op, case)
    for candidate in candidates_of(plan):
        with np.errstate(invalid="ignore"):
            got = to_host(
                run_candidate(plan, candidate, (xp.asarray(first), xp.asarray(w)))
            )
        bad = np.isnan(got)
        assert bad[image, :, row - 1 : row + 2, column - 1 : column + 2].all()
        bad[image, :, row - 9 : row + 10, column - 9 : column + 10] = False
        assert not bad.any()


def test_what_is_no_number_spoils_the_weights_of_its_filter(xp) -> None:
    case = Case((2, 8, 11, 9), (9, 8, 3, 3), {"padding": 1})
    dy, x = of("weight_grad", normal(case))
    dy[1, 4, 7, 5] = np.inf
    plan = planned(xp, "weight_grad", case)
    for candidate in candidates_of(plan):
        with np.errstate(invalid="ignore"):
            got = to_host(
                run_candidate(plan, candidate, (xp.asarray(dy), xp.asarray(x)))
            )
        assert not np.isfinite(got[4]).any()
        assert np.isfinite(np.delete(got, 4, axis=0)).all()


def test_the_sizes_of_real_layers() -> None:
    """Long sums: the error grows with them, and so does the largest result."""
    for channels, size in ((64, 14), (256, 7)):
        case = Case((1, channels, size, size), (32, channels, 3, 3), {"padding": 1})
        y = (1, 32, size, size)
        rng = np.random.default_rng(channels)
        shapes = (case.x_shape, case.w_shape, y)
        arrays = Operands(*(rng.standard_normal(s).astype("f4") for s in shapes))
        for op in OPERATIONS:
            exact = run(op, wide(arrays), case)
            for precision in ("standard", "fast"):
                plan = plan_of(op, case, precision=precision, **WINOGRAD)
                for candidate in candidates_of(plan):
                    got = run_candidate(plan, candidate, of(op, arrays))
                    assert_near(got, exact, BOUNDS[precision, "float32"])


# When it may run


@pytest.mark.parametrize("op", OPERATIONS)
def test_what_is_allowed_depends_on_the_word_alone(op) -> None:
    allowed = {
        "strict": set(),
        "standard": {"winograd", "fft"},
        "fast": {"winograd", "fft"},
    }
    seen: dict[str, set[str]] = {word: set() for word in allowed}
    shapes = [
        ((8, c, s, s), (c, c, k, k))
        for c in (8, 64)
        for s in (9, 56)
        for k in (3, 5, 9)
    ]
    for word, names in allowed.items():
        for x_shape, w_shape in shapes:
            options = {"op": op, "padding": 1, "precision": word}
            plan = cuconv.plan_conv(x_shape, w_shape, **options)
            seen[word] |= {c.strategy.name for c in candidates_of(plan)}
            for name in {"winograd", "fft"} - names:
                with pytest.raises(ValueError, match="precision"):
                    cuconv.plan_conv(x_shape, w_shape, strategy=name, **options)
    for word, names in allowed.items():
        assert seen[word] & {"winograd", "fft"} == names


def test_the_precision_of_config_holds_too() -> None:
    """And strict results are those of plain sums, bit by bit."""
    case = Case((4, 32, 28, 28), (32, 32, 3, 3), {"padding": 1})
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, case.x_shape).astype("f4")
    w = rng.integers(-3, 4, case.w_shape).astype("f4")
    exact = cuconv.conv(x.astype(float), w.astype(float), padding=1, strategy="im2col")
    with cuconv.config(precision="strict"):
        got = cuconv.conv(x, w, padding=1)
        with pytest.raises(ValueError, match="strict"):
            cuconv.conv(x, w, padding=1, **WINOGRAD)
    np.testing.assert_array_equal(got, exact)
    assert_near(cuconv.conv(x, w, padding=1), exact, 1e-5)


REFUSED = {
    "stride": (Case((1, 8, 9, 9), (8, 8, 3, 3), {"stride": (1, 2)}), "stride 1"),
    "dilation": (Case((1, 8, 9, 9), (8, 8, 3, 3), {"dilation": 2}), "dilation 1"),
    "one tap": (Case((1, 8, 9, 9), (8, 8, 3, 1), {}), "2 to 5 taps"),
    "many taps": (Case((1, 8, 9, 9), (8, 8, 3, 6), {}), "2 to 5 taps"),
    "a dilated outer axis": (
        Case((1, 8, 9, 9), (8, 8, 3, 3), {"dilation": (2, 1)}),
        "outer axis needs dilation 1",
    ),
    "two outer axes": (
        Case((1, 8, 9, 9, 9), (8, 8, 3, 6, 3), {}),
        "only one axis",
    ),
    "few channels": (Case((1, 7, 9, 9), (8, 7, 3, 3), {}), "fewer than 8 channels"),
    "few filters": (Case((1, 8, 9, 9), (7, 8, 3, 3), {}), "fewer than 8 channels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_said(name) -> None:
    case, words = REFUSED[name]
    x, w, _ = normal(case)
    call = partial(cuconv.conv, x, w, **case.options)
    with pytest.raises(
        ValueError, match="'winograd' cannot run the forward pass"
    ) as caught:
        call(**WINOGRAD)
    assert words in str(caught.value)
    assert strategies()["winograd"].name in call.func.__doc__
    wanted = testing.conv_reference(x, w, **case.options)
    assert_near(call(), wanted, 1e-5)


def test_prepared_weights_are_transformed_once(xp, monkeypatch) -> None:
    """The same bits as without, and the transform runs for `prepare` alone."""
    case = CASES["square"]
    arrays = normal(case).on(xp)
    strategy = strategies()["winograd"]
    calls = []
    original = type(strategy).weights

    def spy(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(type(strategy), "weights", spy)
    for op in ("forward", "input_grad"):
        plan = planned(xp, op, case, precision="standard")
        first, w = of(op, arrays)
        wanted = to_host(plan(first, w))
        calls.clear()
        prepared = plan.prepare(w)
        for _ in range(3):
            assert to_host(prepared(first)).tobytes() == wanted.tobytes()
        assert calls == [1]


@pytest.mark.parametrize("dtype", ["float16", "int32", "complex64"])
def test_types_that_its_transforms_would_round(xp, dtype) -> None:
    """Halves are operands of their own on a device, and float32 on a CPU."""
    plan = planned(xp, "forward", CASES["square"], dtype)
    assert (plan is None) == (dtype != "float16" or xp is not np)


def test_tiles_of_8_are_for_fast_alone() -> None:
    case = CASES["square"]
    for precision, largest in (("standard", 6), ("fast", 8)):
        plan = plan_of("forward", case, precision=precision, **WINOGRAD)
        tiles = {n for c in candidates_of(plan) for n in c.tiling.variant}
        assert max(tiles) == largest
