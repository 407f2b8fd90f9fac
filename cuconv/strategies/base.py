"""The protocol of a strategy, and views that all strategies share."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from cuconv.arrays import (
    Array,
    Stored,
    flattened,
    is_aligned,
    stored,
)
from cuconv.backends import Backend
from cuconv.engine.costs import Work
from cuconv.engine.problem import Problem
from cuconv.geometry import Axis, Block, ConvGeometry, Tile
from cuconv.memory import Buffer

# The reason of strategies that have no input gradient of their own.
OVER_DY = "it only runs the forward pass; at stride 1 an input gradient is one"

# Weights are transposed this many filters at a time: 512×512×9 take 2.4 ms, 4.7 at
# once.
_STRIP = 16
# Below this many elements a second worker costs more than it saves in sums and copies:
# it takes 0.1 ms to start.  And below this many, one copy is as good as several.
_WORTH_SHARING, _WORTH_STRIPS = 2**19, 2**17
_PARTIAL_ROWS, _PARTIAL_CELLS, _PARTIAL_POSITIONS = 64, 2**17, 16
# The most blocks to keep with a plan: each is a kibibyte of Python objects.
_FEW = 16

# Weights of at most this many elements stay in the cache between blocks.
_IN_CACHE = 2**17

Item = TypeVar("Item")
# One of the ways of a strategy: an enum, sizes, or None where there is one way.
Variant: TypeAlias = Any


class Tiling(NamedTuple):
    """The tiling of a job: blocks of output, regions of input, splits, workers.

    Regions are used by `input_grad` alone, which writes one region at a time.  Splits
    are parts of the work: in `weight_grad` each sums its own blocks, or all blocks for
    its own filters; in `forward` the latter, if there are few positions.  ``variant``
    is one of the strategy's variants.  None of them depends on the number of workers,
    so that results do not either.
    """

    tile: Tile
    region: Tile
    splits: int = 1
    variant: Variant = None
    workers: int = 1


class Tilings(NamedTuple):
    """The tilings of a variant that are worth a try.

    ``positions`` and ``splits`` are the most output positions of a block, and the most
    splits; ``tile`` gives the largest block of at most so many positions.
    """

    positions: int
    tile: Callable[[int], Tile]
    splits: int = 1


class Job(NamedTuple):
    """One call: the problem, its tiling, the backend, and the buffers."""

    problem: Problem
    tiling: Tiling
    backend: Backend
    shared: dict[str, Array]
    own: tuple[dict[str, Array], ...]
    blocks: "Blocks"

    def each(
        self,
        items: Iterable[Item],
        body: Callable[[int, Item, dict[str, Array]], None],
        cells: int | None = None,
    ) -> None:
        """Distribute items to the workers: ``body(number, item, worker's buffers)``.

        Items of few ``cells`` in all go to one worker.
        """
        alone = cells is not None and cells < _WORTH_SHARING
        own, single = self.own[:1] if alone else self.own, self.problem.single_threaded
        self.backend.each(items, body, own, single_threaded=single)


class Blocks:
    """The blocks of a tiling; a few are kept, many are generated each time."""

    def __init__(self, make: Callable[[], Iterator[Block]], count: int) -> None:
        self._make = make
        self._few = tuple(make()) if count <= _FEW else None

    def __iter__(self) -> Iterator[Block]:
        return self._make() if self._few is None else iter(self._few)


class Workspace(NamedTuple):
    """The buffers of a job.

    ``weights`` are for the weights in the form that the strategy uses, and stay
    allocated in a prepared plan; ``shared`` are for one call, ``per_worker`` for each
    of its workers.  ``unseen`` are bytes that NumPy allocates itself for a worker.
    """

    weights: tuple[Buffer, ...] = ()
    shared: tuple[Buffer, ...] = ()
    per_worker: tuple[Buffer, ...] = ()
    unseen: int = 0


class Strategy(Protocol):
    """One way to compute the three operations."""

    name: str
    # The libraries of NVIDIA that it calls on CUDA with floats: cublas or cudnn.
    libraries: tuple[str, ...]
    # Whether a run on CUDA only launches kernels, so that a graph can contain it: CuPy
    # refuses cuBLAS and cuFFT while one is captured.
    capturable: bool
    # Whether its products run on tensor cores where the problem allows that.
    on_tensor_cores: bool
    # Whether one block of everything costs no more than any other tiling, and several
    # no less than that and the start of each.
    gains_from_size: bool
    # Whether the positions of a block must be one run of memory in each channel.
    by_runs: bool

    def supports(self, problem: Problem) -> tuple[bool, str]:
        """Whether it can run the problem, and the reason if it cannot."""

    def variants(self, problem: Problem, backend: Backend) -> tuple[Variant, ...]:
        """The ways in which it can do it."""

    def describe(self, variant: Variant) -> str:
        """A phrase for a variant, different for each; empty for the basic one."""

    def tilings(self, problem: Problem, variant: Variant, backend: Backend) -> Tilings:
        """The tilings that are worth a try."""

    def workspace(
        self, problem: Problem, tiling: Tiling, backend: Backend
    ) -> Workspace:
        """The buffers of a job with this tiling."""

    def work(self, problem: Problem, tiling: Tiling) -> Work:
        """The work of all workers together."""

    def weights(self, job: Job, w: Array, kept: dict[str, Array]) -> Array:
        """The weights in the form for `forward`, in ``kept`` if they are copied."""

    def forward(
        self, job: Job, x: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        """Write ``conv(x, w) + bias`` to ``out``."""

    def input_grad(
        self, job: Job, dy: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        """Write the gradient for ``x``, plus a bias for its channels, to ``out``."""

    def weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        """Write the gradient for ``w`` to ``out``."""


class OneWay:
    """The answers of a strategy with a single variant."""

    gains_from_size = True
    by_runs = False

    def variants(self, problem: Problem, backend: Backend) -> tuple[Variant, ...]:
        del problem, backend
        return (None,)

    def describe(self, variant: Variant) -> str:
        del variant
        return ""


def filters_of(w: Array, problem: Problem) -> Array:
    """View weights as the problem sees them: (G, K/G, C/G, *kernel)."""
    g = problem.geometry
    filters = g.channels if problem.flipped else g.filters
    if not g.channels_first:
        w = w.transpose(g.rank + 1, g.rank, *range(g.rank))
    view = w.reshape(g.groups, filters // g.groups, *w.shape[1:])
    if not problem.flipped:
        return view
    return view.swapaxes(1, 2)[(..., *(slice(None, None, -1),) * g.rank)]


def weight_matrix(w: Array, geometry: ConvGeometry) -> Array:
    """View C-contiguous weights as (1, G, K/G, patch)."""
    g = geometry
    if g.channels_first:
        return w.reshape(1, g.groups, g.group_filters, g.patch)
    return w.reshape(1, g.patch, g.groups, g.group_filters).transpose(0, 2, 3, 1)


def take_weights(job: Job, w: Array, kept: dict[str, Array]) -> Array:
    """The weights as `weight_matrix`: a view if possible, else a copy."""
    problem, geometry = job.problem, job.problem.geometry
    if "w" in problem.zero_copy:
        return weight_matrix(w, geometry)
    copy = kept["w"].reshape(geometry.w_shape)
    into = filters_of(copy, replace(problem, flipped=False))
    source = filters_of(w, problem)
    copy_transposed(job, source, into)
    if problem.conjugates_weights:
        job.backend.do(job.backend.xp.conjugate, copy, copy)
    return weight_matrix(copy, geometry)


def copy_transposed(job: Job, source: Array, target: Array) -> None:
    """Copy (G, K, C, …) in strips of filters, which stay in cache when transposed."""
    filters = max(source.shape[1], source.shape[2])
    axis = 1 if source.shape[1] == filters else 2
    strips = (slice(i, i + _STRIP) for i in range(0, filters, _STRIP))

    def body(number: int, strip: slice, own: dict[str, Array]) -> None:
        del number, own
        place = (slice(None),) * axis + (strip,)
        job.backend.copy(source[place], target[place])

    if source.size < _WORTH_STRIPS:
        job.backend.copy(source, target)
    else:
        job.each(strips, body, source.size)


def weight_buffer(problem: Problem) -> tuple[Buffer, ...]:
    """The buffer of `take_weights`."""
    if "w" in problem.zero_copy:
        return ()
    geometry = problem.geometry
    return (Buffer("w", geometry.filters * geometry.patch, problem.operand),)


def take_bias(job: Job, bias: Array | None) -> Array | None:
    """The bias as (1, G, K/G, 1), in the type of the running sum."""
    if bias is None:
        return None
    copy = job.shared["bias"]
    if bias.dtype != copy.dtype or not is_aligned(bias):
        job.backend.copy(bias, copy)
        bias = copy
    return bias.reshape(1, job.problem.geometry.groups, -1, 1)


def bias_buffer(problem: Problem) -> tuple[Buffer, ...]:
    """The buffer of `take_bias`."""
    if not problem.has_bias:
        return ()
    return (Buffer("bias", problem.result_channels, problem.types.accumulate),)


def output_cells(array: Array, block: Block) -> Array:
    """A block of a grouped y: (images, G, K/G, *out)."""
    images = slice(*block.images)
    return array[(images, slice(None), slice(None), *(slice(*s) for s in block.output))]


def output_buffer(problem: Problem, name: str, tile: Tile) -> Buffer:
    """The buffer for one block of y or dy."""
    dtype = problem.types.accumulate if name == "y" else problem.operand
    return Buffer(name, tile.positions * problem.geometry.filters, dtype)


def staged_output(
    flat: Array,
    geometry: ConvGeometry,
    block: Block,
    filters: int,
    *,
    wide: bool = False,
) -> Stored:
    """A block of y or dy in a buffer."""
    first, last = block.images
    return stored(
        flat,
        (last - first, geometry.groups, filters),
        (),
        block.shape,
        channels_first=geometry.channels_first,
        wide=wide,
    )


def take_dy(
    job: Job,
    cells: Array,
    buffers: dict[str, Array],
    block: Block,
    *,
    wide: bool = False,
) -> Array:
    """A block of dy as (N, G, K/G, positions): a view if possible, else a copy."""
    geometry = job.problem.geometry
    if "dy" not in buffers:
        return flattened(cells, geometry.rank)
    copy = staged_output(buffers["dy"], geometry, block, cells.shape[2], wide=wide)
    job.backend.copy(cells, copy.cells)
    return copy.matrix


def sums_in_place(problem: Problem) -> bool:
    """True if the result itself can be the running sum."""
    return (
        "out" in problem.zero_copy and problem.types.result == problem.types.accumulate
    )


def words_of(problem: Problem, elements: int) -> float:
    """The size of so many elements of the operands, in units of four bytes."""
    return elements * problem.operand.itemsize / 4


def read_again(problem: Problem, weights: int, times: int) -> int:
    """The elements of weights that are read from memory, if they are many."""
    is_counted = problem.module == "numpy" and weights > _IN_CACHE
    return weights * times if is_counted else 0


class ForwardOnly:
    """A strategy that has no input gradient of its own: `OVER_DY`."""

    def input_grad(
        self, job: Job, dy: Array, weights: Array, bias: Array | None, out: Array
    ) -> None:
        raise NotImplementedError  # refused by `supports`


def parts_of(count: int, parts: int) -> list[slice]:
    """Split a range into parts that are as even as possible."""
    step = -(-count // parts)
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]


def partial_cells(cells: int, row: int, positions: int) -> int:
    """The size of the buffer for a product that is added to a sum.

    It has some rows of the product, as many as fill a cache; at least one, if the
    memory limit makes blocks small.
    """
    if positions < _PARTIAL_POSITIONS:
        return min(cells, row * max(positions, 1))
    return min(cells, max(row * _PARTIAL_ROWS, _PARTIAL_CELLS))


def add_splits(job: Job, sums: list[Array]) -> None:
    """Add the sums of all splits to the first, in order."""
    first, *others = sums
    step = -(-first.shape[0] // 8)
    if not others:
        return

    def body(number: int, rows: slice, own: dict[str, Array]) -> None:
        del number, own
        for other in others:
            job.backend.do(job.backend.xp.add, first[rows], other[rows], first[rows])

    if first.size < _WORTH_SHARING:
        body(0, slice(None), {})
    else:
        job.each((slice(i, i + step) for i in range(0, first.shape[0], step)), body)


def outer_view(array: Array, tiled: int) -> Array:
    """View the spatial axes, after three others, as (outer, rows, last).

    The last ``tiled`` of them (at most three) are the last of the view; axes that the
    array lacks have one element.
    """
    spatial = array.ndim - 3
    if tiled == 1 and spatial == 2:
        return array[:, :, :, :, None]
    return array[(..., *(None,) * (3 - spatial), *(slice(None),) * spatial)]


_NO_AXIS = Axis(size=1, kernel=1, stride=1, dilation=1, before=0, after=0)


def three_axes(geometry: ConvGeometry, tiled: int = 3) -> tuple[Axis, Axis, Axis]:
    """The axes as `outer_view` has them."""
    axes = geometry.axes
    if tiled == 1 and len(axes) == 2:
        return axes[0], _NO_AXIS, axes[1]
    padded: list[Axis] = [_NO_AXIS] * (3 - len(axes))
    padded.extend(axes)
    outer, rows, last = padded
    return outer, rows, last
