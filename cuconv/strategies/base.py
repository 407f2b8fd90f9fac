"""What a strategy is asked, and the views that all of them share."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from cuconv.arrays import Array, DType, Stored, Types, flattened, grouped, stored
from cuconv.geometry import Block, ConvGeometry, Tile
from cuconv.leaves import Leaves
from cuconv.memory import Buffer, carve

OPERATIONS = ("forward", "input_grad", "weight_grad")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Problem:
    """Everything that a plan depends on; two equal problems have equal plans.

    ``direct`` names the arrays (``x``, ``w``, ``dy``, ``out``) that BLAS can read or
    write where they lie: the right type, and strides that make a matrix.  ``source`` is
    the type of the array that is gathered.
    """

    op: str
    geometry: ConvGeometry
    types: Types
    operand: DType
    source: DType
    direct: frozenset[str]
    has_bias: bool = False
    deterministic: bool = True
    fast: bool = False


class Cut(NamedTuple):
    """How a job is divided: blocks of output, regions of input, workers.

    Regions only matter to the input gradient, which writes one region at a time.
    """

    tile: Tile
    region: Tile
    workers: int


class Job(NamedTuple):
    """One call: the problem, how it is cut, and who carries it out."""

    problem: Problem
    cut: Cut
    leaves: Leaves


class Needs(NamedTuple):
    """The buffers of a job: those shared by all workers, and those of each."""

    shared: tuple[Buffer, ...]
    worker: tuple[Buffer, ...]


class Strategy(Protocol):
    """One way to compute the three operations."""

    name: str

    def supports(self, problem: Problem) -> tuple[bool, str]:
        """Whether it can, and the reason if it cannot."""

    def tile(self, problem: Problem, positions: int) -> Tile:
        """The largest block of at most this many output positions."""

    def needs(self, problem: Problem, cut: Cut, leaves: Leaves) -> Needs:
        """The buffers of a job that is cut like this."""

    def pieces(self, problem: Problem, cut: Cut) -> int:
        """How many parts of the job can run at the same time."""

    def forward(
        self, job: Job, x: Array, w: Array, bias: Array | None, out: Array
    ) -> None:
        """Write ``conv(x, w) + bias`` to ``out``."""

    def input_grad(self, job: Job, dy: Array, w: Array, out: Array) -> None:
        """Write the gradient for ``x`` to ``out``."""

    def weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        """Write the gradient for ``w`` to ``out``."""


class Shared(Iterator[Item]):
    """One iterator for several workers: each item goes to whoever asks first."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()

    def __next__(self) -> Item:
        with self._lock:
            return next(self._items)


def in_groups(array: Array, geometry: ConvGeometry) -> Array:
    """View x, y, or their gradients as (N, G, C/G, *spatial)."""
    return grouped(
        array,
        geometry.groups,
        geometry.rank,
        channels_first=geometry.channels_first,
        batched=geometry.batched,
    )


def weight_matrix(w: Array, geometry: ConvGeometry) -> Array:
    """View C-contiguous weights as (1, G, K/G, patch)."""
    g = geometry
    if g.channels_first:
        return w.reshape(1, g.groups, g.group_filters, g.patch)
    return w.reshape(1, g.patch, g.groups, g.group_filters).transpose(0, 2, 3, 1)


def take_weights(
    job: Job, w: Array, shared: dict[str, Array], *, conjugate: bool = False
) -> Array:
    """The weights as `weight_matrix`: where they lie if they can, else copied."""
    geometry = job.problem.geometry
    if "w" in job.problem.direct:
        return weight_matrix(w, geometry)
    copy = shared["w"].reshape(w.shape)
    job.leaves.copy(w, copy)
    if conjugate and copy.dtype.kind == "c":
        job.leaves.xp.conjugate(copy, out=copy)
    return weight_matrix(copy, geometry)


def weight_buffer(problem: Problem) -> tuple[Buffer, ...]:
    """Room for `take_weights`."""
    if "w" in problem.direct:
        return ()
    geometry = problem.geometry
    return (Buffer("w", geometry.filters * geometry.patch, problem.operand),)


def take_bias(job: Job, bias: Array | None, shared: dict[str, Array]) -> Array | None:
    """The bias as (1, G, K/G, 1), in the type of the running sum."""
    if bias is None:
        return None
    geometry = job.problem.geometry
    copy = shared["bias"]
    job.leaves.copy(bias, copy)
    return copy.reshape(1, geometry.groups, geometry.group_filters, 1)


def bias_buffer(problem: Problem) -> tuple[Buffer, ...]:
    """Room for `take_bias`."""
    if not problem.has_bias:
        return ()
    return (Buffer("bias", problem.geometry.filters, problem.types.accumulate),)


def output_cells(array: Array, block: Block) -> Array:
    """A block of a grouped y: (images, G, K/G, *out)."""
    images = slice(*block.images)
    return array[(images, slice(None), slice(None), *(slice(*s) for s in block.output))]


def output_buffer(problem: Problem, name: str, tile: Tile) -> Buffer:
    """Room for one block of y or dy."""
    dtype = problem.types.accumulate if name == "y" else problem.operand
    return Buffer(name, tile.positions * problem.geometry.filters, dtype)


def staged_output(
    flat: Array, geometry: ConvGeometry, block: Block, *, wide: bool = False
) -> Stored:
    """A block of y or dy in a buffer."""
    first, last = block.images
    return stored(
        flat,
        (last - first, geometry.groups, geometry.group_filters),
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
    """A block of dy as (N, G, K/G, positions): where it lies if it can, else copied."""
    geometry = job.problem.geometry
    if "dy" not in buffers:
        return flattened(cells, geometry.rank)
    copy = staged_output(buffers["dy"], geometry, block, wide=wide)
    job.leaves.copy(cells, copy.cells)
    return copy.matrix


def sums_in_place(problem: Problem) -> bool:
    """Whether the result itself can hold a running sum."""
    return "out" in problem.direct and problem.types.result == problem.types.accumulate


def workspaces(
    strategy: Strategy, job: Job
) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """Allocate what the strategy needs: shared buffers, and those of each worker."""
    needs = strategy.needs(job.problem, job.cut, job.leaves)
    xp = job.leaves.xp
    each = [carve(xp, needs.worker) for _ in range(job.cut.workers)]
    return carve(xp, needs.shared), each
