"""The kernel of Winograd's transforms, against loops: every tile, type and index.

Its matrices are small integers here, so that results must be equal; what they have to
be for a convolution is tested in `test_winograd`.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from support import Case, integers, operands, reference, to_host

import cuconv
from cuconv.backends.cuda import compiler, cuda_backend
from cuconv.backends.cuda import winograd as module
from cuconv.backends.cuda.gemm import gemm
from cuconv.backends.cuda.variants import TILE_SIZES, all_variants
from cuconv.strategies import winograd

pytestmark = pytest.mark.parametrize("xp", ["cupy"], indirect=True)

# Images, groups, channels; then planes, tiles along rows and along the last axis.
HEAD, COUNTS = (2, 2, 3), (3, 2, 5)


class Tiled(NamedTuple):
    """A transform by n × taken matrices, of tiles that lie some steps apart."""

    n: int
    taken: tuple[int, int]
    steps: tuple[int, int]

    def matrices(self) -> tuple[np.ndarray | None, np.ndarray]:
        rows, last = self.taken
        left = integers((self.n, rows), "float64", seed=7, largest=2)
        right = integers((self.n, last), "float64", seed=8, largest=2)
        return (None if rows == 1 else left), right


def tiled(n: int, axes: int, kind: str) -> Tiled:
    """Tiles that overlap, as the input's do; that lie side by side; or with gaps."""
    taken = (n, n) if kind == "overlapping" else (n - 2, n - 1)
    more = {"overlapping": (-2, -1), "side by side": (0, 0), "gaps": (2, 1)}[kind]
    steps = taken[0] + more[0], taken[1] + more[1]
    if axes == 1:
        taken, steps = (1, taken[1]), (1 + (kind == "gaps"), steps[1])
    return Tiled(n, taken, steps)


def placed(xp: Any, host: np.ndarray, place: str) -> Any:
    """The same numbers with other strides."""
    order = {"plain": range(6), "channels last": (0, 3, 4, 5, 1, 2)}.get(place)
    if order is not None:
        made = xp.asarray(np.ascontiguousarray(host.transpose(*order)))
        return made.transpose(*np.argsort(order))
    flipped = np.ascontiguousarray(host[..., ::-1, ::-1])
    return xp.asarray(flipped)[..., ::-1, ::-1]


PLACES = ("plain", "channels last", "flipped")


def met(
    tile: Tiled, firsts: tuple[int, int, int], sizes: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every cell of a tile (d, th, tw, a, b), and where it lies, if it does."""
    for d, th, tw, a, b in itertools.product(*map(range, (*COUNTS, *tile.taken))):
        row, column = th * tile.steps[0] + a, tw * tile.steps[1] + b
        place = firsts[0] + d, firsts[1] + row, firsts[2] + column
        if all(0 <= i < n for i, n in zip(place, sizes, strict=True)):
            yield (d, th, tw, a, b), place


def room(xp: Any, tile: Tiled, dtype: str, place: str) -> Any:
    """Room for frequencies (i, j, n, g, c, d, th, tw), tiles or channels fastest."""
    count = 1 if tile.taken[0] == 1 else tile.n
    n, g, c = HEAD
    d, th, tw = COUNTS
    if place == "channels last":
        return xp.empty((count, tile.n, g, n, th, tw, d, c), dtype=dtype).transpose(
            0, 1, 3, 2, 7, 6, 4, 5
        )
    return xp.empty((count, tile.n, g, d, c, n, th, tw), dtype=dtype).transpose(
        0, 1, 5, 2, 4, 3, 6, 7
    )


@pytest.fixture(params=[False, True], ids=["int32", "int64"])
def wide_index(request, monkeypatch):
    """Both index widths, the wide one by pretending that launches are huge."""
    if request.param:
        monkeypatch.setattr(module, "MOST_THREADS", 2**31)
    module._packed.cache_clear()
    yield request.param
    module._packed.cache_clear()


@pytest.fixture
def variants(monkeypatch):
    """What is launched in this test."""
    seen = []
    original = compiler.kernel
    monkeypatch.setattr(compiler, "kernel", lambda v: seen.append(v) or original(v))
    return seen


KINDS = ("overlapping", "side by side", "gaps")


def over_tiles(test: Any) -> Any:
    for name, values in (
        ("n", TILE_SIZES),
        ("axes", [1, 2]),
        ("dtype", ["float32", "float64"]),
    ):
        test = pytest.mark.parametrize(name, values)(test)
    return test


@pytest.mark.parametrize("kind", KINDS)
@over_tiles
def test_split(xp, n, axes, dtype, kind, wide_index, variants):
    tile = tiled(n, axes, kind)
    left, right = tile.matrices()
    cells = integers((*HEAD, 3, 9, 14), dtype)
    lefts = np.ones((1, 1)) if left is None else left
    for place, firsts in zip(
        PLACES, [(0, 0, 0), (-1, -3, -2), (1, 4, -5)], strict=True
    ):
        into = room(xp, tile, dtype, place)
        matrices = (None if left is None else left.astype(dtype), right.astype(dtype))
        found = np.zeros((*HEAD, *COUNTS, *tile.taken))
        # NaN where no tile lies: zeros of a matrix times those must not be added.
        only_read = np.full_like(cells, np.nan)
        for index, where in met(tile, firsts, cells.shape[3:]):
            found[(..., *index)] = only_read[(..., *where)] = cells[(..., *where)]
        source = placed(xp, only_read, place)
        cuda_backend().tiles.split(source, into, matrices, firsts, tile.steps)
        wanted = np.einsum("ia,jb,ngcdtwab->ijngcdtw", lefts, right, found)
        np.testing.assert_array_equal(to_host(into), wanted)
    rows = 1 if axes == 1 else n
    kernels = {variant.macros[:4] for variant in variants}
    names = f"ELEMENT={dtype}_t", f"ROWS={rows}", f"COLUMNS={n}"
    assert kernels == {(*names, f"WIDE_INDEX={int(wide_index)}")}
    assert len(variants) == len(PLACES)


@pytest.mark.parametrize("kind", KINDS[1:])
@over_tiles
def test_join(xp, n, axes, dtype, kind, wide_index):
    """Cells of a tile that the array has are written, those between and around not."""
    tile = tiled(n, axes, kind)
    left, right = (None if m is None else m.T.astype(dtype) for m in tile.matrices())
    bias = integers((1, *HEAD[1:], 1), dtype, seed=4)
    sums = integers(room(xp, tile, dtype, "plain").shape, dtype, seed=3)
    lefts = np.ones((1, 1)) if left is None else left
    cells = np.einsum("ai,bj,ijngcdtw->ngcdtwab", lefts, right, sums)
    size = tuple(
        (count - 1) * step + max(taken - 1, 1)
        for count, step, taken in zip(COUNTS[1:], tile.steps, tile.taken, strict=True)
    )
    for place, offset in itertools.product(PLACES, (None, bias)):
        source = room(xp, tile, dtype, place)
        source[...] = xp.asarray(sums)
        around = np.full((*HEAD, COUNTS[0], size[0] + 2, size[1] + 3), 77, dtype)
        target = placed(xp, around, place)
        given = None if offset is None else xp.asarray(offset)
        inside = target[..., 1:-1, 2:-1]
        cuda_backend().tiles.join(source, inside, (left, right), tile.steps, given)
        plus = 0 if offset is None else bias.reshape(1, *HEAD[1:])
        for index, (d, row, column) in met(tile, (0, 0, 0), inside.shape[3:]):
            found = cells[(slice(None),) * 3 + index] + plus
            around[:, :, :, d, 1 + row, 2 + column] = found
        np.testing.assert_array_equal(to_host(target), around)


@pytest.mark.parametrize("n", TILE_SIZES)
def test_split_and_join_are_adjoint(xp, n):
    """⟨split c, t⟩ = ⟨c, join t⟩ where tiles do not overlap, tails included."""
    tile = tiled(n, 2, "side by side")
    left, right = tile.matrices()
    for tail in (0, 1):
        sizes = (
            count * step - tail * 2
            for count, step in zip(COUNTS[1:], tile.steps, strict=True)
        )
        cells = integers((*HEAD, COUNTS[0], *sizes), "float64")
        forth, back = room(xp, tile, "float64", "plain"), xp.zeros(cells.shape)
        cuda_backend().tiles.split(
            xp.asarray(cells), forth, (left, right), (0, 0, 0), tile.steps
        )
        tiles = integers(forth.shape, "float64", seed=1)
        cuda_backend().tiles.join(
            xp.asarray(tiles), back, (left.T, right.T), tile.steps, None
        )
        one, other = (to_host(forth) * tiles).sum(), (cells * to_host(back)).sum()
        assert one == other != 0


@pytest.mark.parametrize(
    ("strides", "firsts", "wide"),
    [
        ((2**28, 1, 1, 1, 9, 1), (0, 0, 0), False),
        ((2**30, 1, 1, 1, 9, 1), (0, 0, 0), True),
        ((1, 1, 1, 2**28, -(2**29), 1), (0, 0, 0), True),
        ((1, 1, 1, 1, 9, 0), (0, 0, -(2**30)), True),
        ((1, 1, 1, 1, 9, 0), (0, 0, -(2**29)), False),
        ((1, 1, 1, 1, 9, 1), (0, -(2**31), 0), True),
    ],
)
def test_offsets_past_31_bits_have_wide_indices(xp, monkeypatch, strides, firsts, wide):
    """By the choice alone: the arrays would be gigabytes."""
    seen = []

    def kernel(variant: Any) -> Any:
        seen.append(variant)
        return lambda *_, shared_mem: None

    monkeypatch.setattr(compiler, "kernel", kernel)
    tile = Tiled(4, (4, 4), (2, 2))
    cell = xp.zeros(1, dtype="float32")
    steps = tuple(4 * step for step in strides)
    sizes = 3, 4, 5 if strides[-1] else 2**30
    cells = xp.lib.stride_tricks.as_strided(cell, (*HEAD, *sizes), steps)
    into = room(xp, tile, "float32", "plain")
    square = np.eye(4, dtype="float32")
    cuda_backend().tiles.split(cells, into, (square, square), firsts, tile.steps)
    (variant,) = seen
    assert f"WIDE_INDEX={int(wide)}" in variant.macros


def test_there_is_a_kernel_for_every_tile(xp):
    kernels = {v.macros[:4] for v in all_variants() if v.kernel == "transform_tiles"}
    assert set(TILE_SIZES) == set(winograd._TILES["fast"])
    assert len(kernels) == 2 * len(TILE_SIZES) * 2 * 2


def test_products_of_all_frequencies_and_groups_are_one_batch(xp):
    if not getattr(xp, "IS_STAND_IN", False):
        pytest.skip("counts calls, which only the stand-in notes")
    case = Case((3, 16, 7, 9), (18, 8, 3, 3), {"padding": 1, "groups": 2})
    arrays = operands(case, "float64")
    x, w, dy = arrays.on(xp)
    options = {**case.options, "strategy": "winograd", "precision": "standard"}
    blas, batches = xp.cuda.cublas, {}
    for layout in ("forward", "weight_grad"):
        before = len(blas.calls)
        if layout == "forward":
            got = cuconv.conv(x, w, **options)
        else:
            got = cuconv.conv_weight_grad(dy, x, case.w_shape, **options)
        wanted = reference(layout, arrays, case)
        np.testing.assert_array_equal(np.rint(to_host(got)), wanted)
        batches[layout] = [batch for *_, batch, _, _ in blas.calls[before:]]
    assert all(found in ([2 * 36], [2 * 16]) for found in batches.values()), batches


def test_halves_are_batched_along_the_axis_that_is_aligned(xp):
    """Groups 24 bytes apart, and images 48: merged, no batch would be possible."""
    if not getattr(xp, "IS_STAND_IN", False):
        pytest.skip("counts calls, which only the stand-in notes")
    calls = xp.cuda.cublas.calls
    before = len(calls)
    host = integers((4, 2, 3, 4), "float16", largest=2)
    a = xp.asarray(host)
    out = xp.empty((4, 2, 3, 8), dtype="float16")[..., :3]
    gemm(cuda_backend().do, a, a.swapaxes(-1, -2), out)
    np.testing.assert_array_equal(to_host(out), host @ host.swapaxes(-1, -2))
    assert [batch for *_, batch, _, _ in calls[before:]] == [4, 4]
