"""Sizes, blocks and regions by their definitions: windows are counted one by one."""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from support import LAYOUTS, Case

from cuconv.geometry import Axis, ConvGeometry, EvenAxis, WindowGeometry, tile_of

any_axes = st.builds(
    Axis,
    size=st.integers(0, 30),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 5),
    dilation=st.integers(1, 4),
    before=st.integers(-8, 8),
    after=st.integers(-8, 8),
    overhang=st.just(0),
    windows=st.just(0),
    input_dilation=st.just(1),
)
axes = any_axes.filter(lambda a: a.padded >= a.extent)


def geometry_of(case: Case) -> ConvGeometry:
    return ConvGeometry.of_weights(case.x_shape, case.w_shape, **case.options)


def cells_under(axis: Axis, output: int) -> list[int]:
    """The input cells under the taps of one output cell, padding included."""
    start = output * axis.stride - axis.before
    return [start + tap * axis.dilation for tap in range(axis.kernel)]


# One axis


@given(axis=axes)
def test_as_many_windows_as_fit(axis) -> None:
    """The last window ends inside the padded input and one more would not."""
    end = axis.size + axis.after
    assert cells_under(axis, axis.out - 1)[-1] < end
    assert cells_under(axis, axis.out)[-1] >= end
    assert axis.out >= 1


@given(axis=axes)
def test_a_window_spans_its_taps(axis) -> None:
    cells = cells_under(axis, 0)
    assert axis.extent == cells[-1] - cells[0] + 1
    assert axis.first(0) == cells[0]


@given(axis=axes, data=st.data())
def test_the_window_of_a_range_of_outputs(axis, data) -> None:
    start = data.draw(st.integers(0, axis.out - 1))
    stop = data.draw(st.integers(start + 1, axis.out))
    under = [cell for o in range(start, stop) for cell in cells_under(axis, o)]
    assert axis.window(start, stop) == (min(under), max(under) + 1)


@given(axis=axes, data=st.data())
def test_reached_from_holds_every_window_that_meets(axis, data) -> None:
    """Exactly the outputs whose span, from first tap to last, meets the interval."""
    start = data.draw(st.integers(0, axis.size))
    stop = data.draw(st.integers(start, axis.size))
    meets = [
        o
        for o in range(axis.out)
        if cells_under(axis, o)[0] < stop and cells_under(axis, o)[-1] >= start
    ]
    first, last = axis.reached_from(start, stop)
    assert 0 <= first <= last <= axis.out
    if start < stop:
        assert list(range(first, last)) == meets


@given(axis=axes, ceil=st.booleans(), data=st.data())
def test_an_axis_between_cells_and_outputs_joins_the_same_ones(
    axis, ceil, data
) -> None:
    """Every tap of every output meets the cell that it met, and the divisor too."""
    axis = axis.rounded_up(cover_all=False) if ceil else axis
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, axis.size)] * 2)))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, axis.out)] * 2)))
    part = axis.between((low, high), (start, stop))
    assert (part.size, part.out) == (high - low, stop - start)
    for output in range(start, stop):
        moved = [cell - low for cell in cells_under(axis, output)]
        assert cells_under(part, output - start) == moved
        whole = axis.between((0, axis.size), (start, stop))
        for padding in (True, False):
            counts = (
                axis.taps_of(output, padding=padding),
                whole.taps_of(output - start, padding=padding),
            )
            assert counts[0] == counts[1]


def test_windows_that_share_an_axis_out_are_not_cut() -> None:
    axis = EvenAxis.of(8, 3)
    assert axis.between((0, 8), (0, 3)) is axis
    with pytest.raises(ValueError, match="cannot be split"):
        axis.between((0, 5), (0, 2))


@given(size=st.integers(1, 60), windows=st.integers(1, 60))
def test_the_kernel_of_even_windows_is_the_longest(size, windows) -> None:
    axis = EvenAxis.of(size, windows)
    spans = (axis.window(o, o + 1) for o in range(axis.out))
    assert axis.out == windows
    assert axis.kernel == max(stop - start for start, stop in spans)


# Padding words


@pytest.mark.parametrize("word", ["same", "same_lower"])
@given(
    size=st.integers(0, 40),
    kernel=st.integers(1, 6),
    stride=st.integers(1, 6),
    dilation=st.integers(1, 4),
)
def test_same_is_the_least_padding_for_its_size(
    word, size, kernel, stride, dilation
) -> None:
    options = {"stride": stride, "dilation": dilation}
    geometry = WindowGeometry.of((1, 1, size), kernel, padding=word, **options)
    (axis,) = geometry.axes
    outputs = len(range(0, size, stride))
    assert axis.out == outputs
    assert axis.before >= 0
    assert axis.after >= 0
    extra = axis.after - axis.before if word == "same" else axis.before - axis.after
    assert extra in (0, 1)
    total = axis.before + axis.after
    if total and size:
        less = axis._replace(before=0, after=total - 1)
        assert less.out < outputs


@given(
    size=st.integers(0, 40),
    kernel=st.integers(1, 6),
    stride=st.integers(1, 6),
    dilation=st.integers(1, 4),
)
def test_a_causal_window_ends_at_its_own_cell(size, kernel, stride, dilation) -> None:
    options = {"stride": stride, "dilation": dilation, "padding": "causal"}
    (axis,) = WindowGeometry.of((1, 1, size), kernel, **options).axes
    assert axis.out == len(range(0, size, stride))
    assert all(axis.window(o, o + 1)[1] == o * stride + 1 for o in range(axis.out))


@given(
    size=st.integers(0, 40),
    kernel=st.integers(1, 6),
    stride=st.integers(1, 6),
    dilation=st.integers(1, 4),
)
def test_full_is_every_window_that_overlaps(size, kernel, stride, dilation) -> None:
    """The first ends at the first element, and every stride from there has one."""
    options = {"stride": stride, "dilation": dilation, "padding": "full"}
    (axis,) = WindowGeometry.of((1, 1, size), kernel, **options).axes
    assert axis.window(0, 1)[1] == 1
    windows = [axis.window(o, o + 1) for o in range(axis.out + 1)]
    assert all(start < size for start, _ in windows[:-1])
    assert windows[-1][0] >= size


SPELLINGS: list[tuple[Any, tuple[tuple[int, int], ...]]] = [
    (2, ((2, 2), (2, 2))),
    (-1, ((-1, -1), (-1, -1))),
    ((1, 3), ((1, 1), (3, 3))),
    ([1, 3], ((1, 1), (3, 3))),
    (((1, 2), (3, 0)), ((1, 2), (3, 0))),
    (((1, 2), 3), ((1, 2), (3, 3))),
    ((0, [4, -1]), ((0, 0), (4, -1))),
    (np.array([[1, 2], [3, 0]]), ((1, 2), (3, 0))),
    (np.int16(2), ((2, 2), (2, 2))),
]


@pytest.mark.parametrize(("padding", "pairs"), SPELLINGS)
def test_spellings_of_padding(padding, pairs) -> None:
    geometry = WindowGeometry.of((1, 1, 20, 20), 3, padding=padding)
    assert tuple((axis.before, axis.after) for axis in geometry.axes) == pairs


# Blocks


@st.composite
def cut_geometries(draw: st.DrawFn) -> tuple[ConvGeometry, Any]:
    geometry = geometry_of(draw(cases()))
    most = geometry.images * geometry.positions
    return geometry, geometry.tile(draw(st.integers(1, most + 3)))


def each_cell(*ranges: tuple[int, int]) -> Iterator[tuple[int, ...]]:
    return product(*(range(*r) for r in ranges))


@given(tiling=cut_geometries())
def test_blocks_cover_the_output_once(tiling) -> None:
    geometry, tile = tiling
    blocks = list(geometry.blocks(tile))
    assert len(blocks) == geometry.count_blocks(tile)
    seen = [cell for b in blocks for cell in each_cell(b.images, *b.output)]
    wanted = list(np.ndindex(geometry.images, *geometry.out))
    assert len(seen) == len(wanted)
    assert set(seen) == set(wanted)
    for block in blocks:
        assert block.images[1] - block.images[0] <= tile.images
        assert all(n <= most for n, most in zip(block.shape, tile.cells, strict=True))
    assert blocks == sorted(blocks, key=lambda b: (b.images, b.output))


@given(tiling=cut_geometries())
def test_a_window_and_its_padding_are_what_a_block_needs(tiling) -> None:
    """No cell too few, none too many at either end, and the padding fills the rest."""
    geometry, tile = tiling
    for block in geometry.blocks(tile):
        spans = zip(
            geometry.axes, block.output, block.window, block.padding, strict=True
        )
        for axis, output, window, padding in spans:
            under = [cell for o in range(*output) for cell in cells_under(axis, o)]
            start, stop = min(under), max(under) + 1
            inside = [i for i in range(start, stop) if 0 <= i < axis.size]
            assert window[1] - window[0] == len(inside)
            assert 0 <= window[0] <= window[1] <= axis.size
            assert min(padding) >= 0
            assert sum(padding) + len(inside) == stop - start
            if inside:
                assert window == (inside[0], inside[-1] + 1)
                assert padding == (inside[0] - start, stop - inside[-1] - 1)


@given(tiling=cut_geometries(), data=st.data())
def test_blocks_of_a_part_cover_the_part(tiling, data) -> None:
    geometry, tile = tiling
    part = []
    for size in (geometry.images, *geometry.out):
        start = data.draw(st.integers(0, size - 1))
        part.append((start, data.draw(st.integers(start + 1, size))))
    blocks = geometry.blocks(tile, part[0], tuple(part[1:]))
    seen = [cell for b in blocks for cell in each_cell(b.images, *b.output)]
    assert sorted(seen) == sorted(each_cell(*part))


# Regions


@given(case=cases(), budget=st.integers(1, 60))
def test_regions_cover_the_input_once_and_know_their_outputs(case, budget) -> None:
    geometry = geometry_of(case)
    tile = geometry.region_tile(budget)
    regions = list(geometry.regions(tile))
    assert len(regions) == geometry.count_regions(tile)
    seen = [cell for r in regions for cell in each_cell(r.images, *r.cells)]
    wanted = list(np.ndindex(geometry.images, *geometry.size))
    assert len(seen) == len(wanted)
    assert set(seen) == set(wanted)
    for region in regions:
        assert math.prod(stop - start for start, stop in region.cells) <= max(budget, 1)
        spans = zip(geometry.axes, region.cells, region.output, strict=True)
        for axis, cells, output in spans:
            for o in range(axis.out):
                touched = any(cells[0] <= i < cells[1] for i in cells_under(axis, o))
                assert not touched or output[0] <= o < output[1]
        reached = math.prod(stop - start for start, stop in region.output)
        images = region.images[1] - region.images[0]
        assert images * reached <= geometry.reach(tile)


# Tiles


sizes = st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple)


@given(images=st.integers(0, 9), size=sizes, budget=st.integers(-2, 2000))
def test_tiles_stay_in_their_budget(images, size, budget) -> None:
    tile = tile_of(images, size, budget)
    assert tile.positions <= max(budget, 1)
    assert tile.images >= 1
    assert all(1 <= t <= max(n, 1) for t, n in zip(tile.cells, size, strict=True))
    assert tile.images <= max(images, 1)


@given(images=st.integers(1, 9), size=sizes.filter(all), budget=st.integers(1, 2000))
def test_tiles_grow_with_their_budget(images, size, budget) -> None:
    """In blocks never more of them for a larger budget."""

    def blocks(cells: int) -> int:
        tile = tile_of(images, size, cells)
        steps = (tile.images, *tile.cells)
        return math.prod(
            -(-n // s) for n, s in zip((images, *size), steps, strict=True)
        )

    assert blocks(budget + 1) <= blocks(budget)
    if budget >= images * math.prod(size):
        assert blocks(budget) == 1


@given(images=st.integers(1, 9), size=sizes.filter(all), budget=st.integers(1, 2000))
def test_tiles_are_cut_along_one_axis_and_in_balance(images, size, budget) -> None:
    tile = tile_of(images, size, budget)
    whole, steps = (images, *size), (tile.images, *tile.cells)
    tiling = [i for i, (n, s) in enumerate(zip(whole, steps, strict=True)) if 1 < s < n]
    assert len(tiling) <= 1
    full = [s == n for n, s in zip(whole, steps, strict=True)]
    one = [s == 1 for s in steps]
    for i in tiling:
        assert all(one[:i])
        assert all(full[i + 1 :])
    # The last piece falls short of the others by less than one for each piece.
    for n, s in zip(whole, steps, strict=True):
        pieces = -(-n // s)
        assert pieces * s - n < pieces


def test_the_tile_of_the_documentation() -> None:
    assert tile_of(8, (56, 56), 15 * 56).cells == (14, 56)


# Shapes


@pytest.mark.parametrize("order", ["rows", "columns", "batched"])
@given(case=cases())
def test_column_shapes_hold_every_cell_of_every_window(order, case) -> None:
    geometry = geometry_of(case)
    shape = geometry.column_shape(order)
    y_shape, batched = case.y_shape(), len(case.x_shape) == len(case.w_shape)
    first = case.layout == "channels_first"
    positions = math.prod(
        (y_shape[batched:])[1:] if first else (y_shape[batched:])[:-1]
    )
    images = case.x_shape[0] if batched else 1
    kernel = case.w_shape[2:] if first else case.w_shape[:-2]
    channels = case.w_shape[1 if first else -2] * case.options["groups"]
    patch = channels * math.prod(kernel)
    wanted: dict[str, tuple[int, ...]] = {
        "rows": (images * positions, patch),
        "columns": (patch, images * positions),
        "batched": (images, patch, positions) if batched else (patch, positions),
    }
    assert shape == wanted[order]
    for itemsize in (1, 2, 16):
        assert geometry.column_bytes(itemsize) == math.prod(shape) * itemsize


@given(case=cases())
def test_geometry_knows_its_arrays(case) -> None:
    geometry = geometry_of(case)
    assert geometry.x_shape == case.x_shape
    assert geometry.w_shape == case.w_shape
    assert geometry.y_shape == case.y_shape()


def test_large_numbers_are_exact() -> None:
    """Python's integers: nothing wraps at 2^31, 2^63 or anywhere."""
    side = 2**31 - 1
    shape = (2**20, 2**10, side, side, side)
    geometry = ConvGeometry.of_weights(shape, (2**10, 2**10, 3, 3, 3), padding=1)
    assert geometry.y_shape == shape
    assert geometry.positions == side**3
    assert geometry.column_bytes(8) == 2**20 * side**3 * 2**10 * 27 * 8
    assert geometry.multiplications == 2**20 * side**3 * 2**20 * 27
    tile = geometry.tile(2**40)
    assert 2**39 <= tile.positions <= 2**40
    first = next(geometry.block((0, 1), tuple((0, c) for c in tile.cells)) for _ in "1")
    assert first.padding[-1] == (1, 1)
    wide = WindowGeometry.of((1, 1, 10), 2, stride=side, padding=((side, side),))
    assert wide.out == ((10 + 2 * side - 2) // side + 1,)


def test_blocks_of_a_huge_output_come_one_by_one() -> None:
    """A million of blocks and more, of which only the first is asked for."""
    geometry = WindowGeometry.of((4, 3, 2**20, 64), (3, 3), padding=1)
    blocks = geometry.blocks(geometry.tile(64))
    assert next(blocks).output == ((0, 1), (0, 64))


# Equality and caching


def test_equal_options_are_one_geometry() -> None:
    of = ConvGeometry.of_weights
    shapes = (2, 3, 9, 8), (4, 3, 3, 2)
    one = of(*shapes, stride=2, padding=1)
    assert of(*shapes, stride=(2, 2), padding=((1, 1), (1, 1))) == one
    assert of(*shapes, stride=[2, np.int8(2)], padding=np.array([1, 1])) == one
    assert hash(of(*shapes, stride=[2, 2], padding=(1, 1))) == hash(one)
    assert of(*shapes, stride=2) != one


@pytest.mark.parametrize("layout", LAYOUTS)
def test_true_is_an_integer_and_not_confused_with_one(layout) -> None:
    """Python says True == 1; a cache must not answer one with the other's type."""
    geometry = WindowGeometry.of((1, 4, 4, 4), 2, stride=True, layout=layout)
    assert geometry == WindowGeometry.of((1, 4, 4, 4), 2, stride=1, layout=layout)
    assert all(type(axis.stride) is int for axis in geometry.axes)


# Phases


@given(axis=axes)
def test_phases_meet_exactly_what_the_windows_meet(axis) -> None:
    """Every (cell, tap, output) once, and no cell in two phases."""
    geometry = ConvGeometry(1, 2, (axis,), filters=3)
    cells = range(axis.size)
    met, owned = [], []
    for phase in geometry.input_phases():
        own = cells[phase.results[0]]
        owned += own
        (other,) = phase.geometry.axes
        taps = range(axis.kernel)[phase.taps[0]][::-1]
        assert (phase.geometry.channels, phase.geometry.filters) == (3, 2)
        assert (other.out, other.kernel, other.stride) == (len(own), len(taps), 1)
        for cell, (index, tap) in product(range(len(own)), enumerate(taps)):
            output = cells_under(other, cell)[index]
            if 0 <= output < axis.out:
                met.append((own[cell], tap, output))
    assert len(set(owned)) == len(owned)
    windows = {o: cells_under(axis, o) for o in range(axis.out)}
    expected = [
        (cell, tap, o) for o, under in windows.items() for tap, cell in enumerate(under)
    ]
    assert sorted(met) == sorted(p for p in expected if 0 <= p[0] < axis.size)


def test_one_phase_at_stride_one() -> None:
    geometry = ConvGeometry.of_weights((2, 4, 9, 8), (6, 4, 3, 2), padding=(1, 2))
    (phase,) = geometry.input_phases()
    assert phase.geometry == geometry.adjoint


# Axes of pooling


@given(axis=any_axes)
def test_rounded_up_axes(axis) -> None:
    """One window more where cells are left over and it starts before they end."""
    up = axis.rounded_up(cover_all=False)
    assert up.out - axis.out in (0, 1)
    end = axis.size + axis.after
    is_left = (axis.out - 1) * axis.stride - axis.before + axis.extent < end
    starts = axis.out * axis.stride - axis.before < axis.size
    assert (up.out > axis.out) == (is_left and starts)
    if up.out > axis.out:
        assert up.window(0, up.out)[1] == end + up.overhang > end
    assert up.counted(padding=True) == axis.counted(padding=True)


@given(size=st.integers(1, 30), windows=st.integers(1, 30), data=st.data())
def test_even_axes(size, windows, data) -> None:
    """Against floor and ceil, in both directions."""
    axis = EvenAxis.of(size, windows)
    assert axis.out == windows
    under = [
        range(i * size // windows, -(-(i + 1) * size // windows))
        for i in range(windows)
    ]
    start = data.draw(st.integers(0, windows - 1))
    stop = data.draw(st.integers(start + 1, windows))
    assert axis.window(start, stop) == (under[start][0], under[stop - 1][-1] + 1)
    assert axis.span(stop - start) >= under[stop - 1][-1] + 1 - under[start][0]
    for i, cells in enumerate(under):
        assert axis.taps_of(i, padding=True) == len(cells)
        assert axis.cells_under(i, (0, size)) == slice(
            cells[0], cells[-1] + 1, None
        ) or (range(size)[axis.cells_under(i, (0, size))] == cells)
    low = data.draw(st.integers(0, size - 1))
    high = data.draw(st.integers(low + 1, size))
    met = [i for i, cells in enumerate(under) if cells[0] < high and cells[-1] >= low]
    assert axis.reached_from(low, high) == (met[0], met[-1] + 1)
    assert axis.reach(high - low) >= len(met)
