"""What differs between NumPy and CuPy, and nothing else.

Algorithms are written once against `Leaves`.  Arrays come grouped, with any strides:
input (N, G, C, *spatial), columns (N, G, C, *kernel, *out), matrices (N, G, rows,
columns).
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from cuconv.arrays import Array, DType, Types
from cuconv.backends.blocking import Blocking
from cuconv.backends.cpu.backend import CpuBackend
from cuconv.backends.cpu.machine import jit_is_installed as jit_is_installed
from cuconv.backends.padding import Reading
from cuconv.engine.costs import Rates
from cuconv.engine.pool_problem import PoolInputs, PoolProblem, PoolTiling
from cuconv.engine.program import Program
from cuconv.geometry import Axis, Block, Ranges, Tile, WindowGeometry
from cuconv.memory import Buffer
from cuconv.profiling import stage


class TileTransforms(Protocol):
    """Winograd's transforms between cells, where they lie, and frequencies.

    Cells are (N, G, C, outer, rows, last), frequencies (i, j, N, G, C, outer, tall,
    wide), both with any strides.  ``matrices`` transform along rows (None where no
    tile has several) and along the last axis; tiles lie ``steps`` apart.
    """

    def split(
        self,
        cells: Array,
        tiles: Array,
        matrices: tuple[Array | None, Array],
        firsts: tuple[int, int, int],
        steps: tuple[int, int],
    ) -> None:
        """Write the frequencies of tiles, the first of which begins at ``firsts``.

        Cells outside the array are zero.
        """

    def join(
        self,
        tiles: Array,
        cells: Array,
        matrices: tuple[Array | None, Array],
        steps: tuple[int, int],
        bias: Array | None,
    ) -> None:
        """Write the cells that there are of every tile, plus a bias (1, G, C, 1)."""


class DirectConv(Protocol):
    """Convolution of few channels in a group, with every array where it lies.

    Nothing is copied or allocated.  Arrays have one type (the result may have that of
    the sums), three spatial axes, and any strides.
    """

    def convolve(
        self,
        source: Array,
        w: Array,
        bias: Array | None,
        out: Array,
        axes: tuple[Axis, ...],
        *,
        adjoint: bool = False,
        conjugated: bool = False,
    ) -> None:
        """``out = conv(source, w) + bias`` or, adjoint, dx from dy, plus a bias.

        Weights are (G, channels of the result in a group, those of the source, …).
        ``conjugated``: they are multiplied so.
        """

    def correlate(
        self, x: Array, dy: Array, out: Array, axes: tuple[Axis, ...]
    ) -> None:
        """The gradient of the weights (G, K/G, C/G, …): the same bits on every run."""


class Contraction(Protocol):
    """Products that gather their columns as they go, with every array where it lies.

    Arrays have one type (the result may have that of the sums) and any strides; x and
    y are (N, G, C, *cells), weights (G, K/G, C/G, *kernel).  ``parts`` has room for as
    many sums of every result as the plan cuts each sum into.
    """

    def convolve(
        self,
        w: Array,
        x: Array,
        bias: Array | None,
        out: Array,
        axes: tuple[Axis, ...],
        how: Blocking,
        parts: Array,
    ) -> None:
        """``out = conv(x, w) + bias``."""

    def correlate(
        self,
        dy: Array,
        x: Array,
        out: Array,
        axes: tuple[Axis, ...],
        how: Blocking,
        parts: Array,
    ) -> None:
        """``out`` becomes the gradient of the weights."""

    def transpose(self, source: Array, target: Array) -> None:
        """Copy (N, G, rows, columns) to (N, G, columns, rows), both along the last."""


class PoolBackend(Protocol):
    """Pooling, and its gradients, of arrays (N, C, *spatial) with any strides."""

    def tiling(self, problem: PoolProblem, limit: int) -> PoolTiling:
        """Tiles and workers of a call that takes no more memory than ``limit``."""

    def buffers(self, problem: PoolProblem, tiling: PoolTiling) -> tuple[Buffer, ...]:
        """What one worker needs."""

    def reduce(
        self,
        problem: PoolProblem,
        tiling: PoolTiling,
        scratch: tuple[dict[str, Array], ...],
        x: Array,
        y: Array,
        indices: Array | None,
    ) -> None:
        """Write to ``y`` what every window holds, and where its maximum lies.

        ``scratch`` are the buffers of every worker.
        """

    def backward(
        self,
        problem: PoolProblem,
        tiling: PoolTiling,
        scratch: tuple[dict[str, Array], ...],
        given: PoolInputs,
        dx: Array,
    ) -> None:
        """Write the gradient for x: the same bits on every run."""


class Backend(Protocol):
    """The operations that know which module they serve."""

    xp: Any
    # ``"cpu"``, ``"cuda:0"``, ``"cuda:1"``, …
    device: str

    # Bytes of columns per block, and the limit when the user names none.
    block_bytes: int
    rates: Rates
    default_memory_limit: int
    # The longest row step that BLAS can take, in items.
    largest_step: int
    # Whether `gemm(add=True)` needs a buffer for the product before it is added.
    needs_partial: bool

    def __hash__(self) -> int: ...

    @property
    def tiles(self) -> TileTransforms | None:
        """Winograd's transforms, where they are kernels and not products."""

    @property
    def contraction(self) -> Contraction | None:
        """The kernel of `implicit_gemm`; None where there is none."""

    @property
    def direct(self) -> DirectConv | None:
        """Loops over channels that need no buffers; None where there are none."""

    @property
    def pools(self) -> PoolBackend:
        """Pooling and its gradients."""

    def do(self, function: Callable[..., Any], *operands: Any) -> None:
        """Call a function; a `Recording` puts a recorder in the place of this."""

    def each(
        self,
        items: Iterable[Any],
        body: Callable[..., None],
        scratch: tuple[Any, ...],
        *,
        single_threaded: bool,
    ) -> None:
        """Share items out: ``body(number, item, scratch of the worker)``."""

    def stage(self, name: str, strategy: str = "", chunk: int = 0) -> stage:
        """A range that a profiler shows."""

    def execute(self, program: Program, arrays: dict[str, Array]) -> None:
        """Run a program on the arrays of a call, by their names."""

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """An uninitialised array on this device."""

    def sum(self, array: Array, axes: tuple[int, ...], dtype: DType) -> Array:
        """Sum over axes, in this type."""

    def fill(self, target: Array, value: int) -> None:
        """Fill with a number."""

    def add_unsafely(self, target: Array, summand: Array) -> None:
        """``target += summand``, cast to its type."""

    def device_of(self, array: Array) -> AbstractContextManager[object]:
        """Make the device that holds the array the current one."""

    def overhead(self, workers: int, itemsize: int) -> int:
        """Bytes that a call takes beyond its buffers, sums having this item size."""

    def memory(self, nbytes: int) -> AbstractContextManager[Array]:
        """Bytes for the buffers of one call, uninitialised."""

    def release(self) -> None:
        """Give back what is kept between calls."""

    def workers(self) -> int:
        """How many blocks may run at the same time."""

    def is_capturing(self) -> bool:
        """Whether the current stream records a CUDA graph instead of working."""

    def times(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Make each call once, in order; how long each took, in milliseconds."""

    def machine(self) -> tuple[str, ...]:
        """Words for everything that measured times depend on, beside the problem."""

    def operand_type(self, types: Types) -> DType:
        """The type of the matrices that `gemm` multiplies."""

    def can_store(self, types: Types, dtype: DType) -> bool:
        """Whether `gemm` can write a finished result of this type."""

    def gather_buffers(
        self, geometry: WindowGeometry, tile: Tile, source: DType, operand: DType
    ) -> tuple[Buffer, ...]:
        """What `gather` needs beside the columns."""

    def gather(
        self,
        x: Array,
        columns: Array,
        geometry: WindowGeometry,
        block: Block,
        buffers: dict[str, Array],
    ) -> None:
        """Write the columns of one block, zeros where a window leaves the input."""

    def scatter(
        self,
        columns: Array,
        target: Array,
        geometry: WindowGeometry,
        block: Block,
        cells: Ranges,
        *,
        add: bool,
        deterministic: bool,
    ) -> None:
        """Sum columns in the input cells they came from: ``target`` holds ``cells``.

        With ``add``, on top of what is there; without, all other cells become zero.
        """

    def gemm(
        self,
        a: Array,
        b: Array,
        out: Array,
        *,
        bias: Array | None = None,
        add: bool = False,
        partial: Array | None = None,
        fast: bool = False,
    ) -> None:
        """``out = a @ b (+ bias) (+ out if add)``; ``fast`` allows TF32.

        Matrices of floats may have any number of axes before their last two.
        """

    def copy(self, source: Array, target: Array) -> None:
        """Copy with a cast."""

    def pad_copy(
        self,
        cells: Array,
        copied: Array,
        reading: Reading,
    ) -> None:
        """Copy with a cast what windows read; both arrays are grouped."""

    def pad_adjoint(
        self,
        copied: Array,
        cells: Array,
        reading: Reading,
        *,
        add: bool,
    ) -> None:
        """The adjoint of `extend`, in a fixed order; ``add`` to what is there."""

    def parallel(
        self,
        body: Callable[[int], None],
        workers: int,
        *,
        single_threaded: bool = False,
    ) -> None:
        """Run ``body(0) … body(workers - 1)``, and return when all are done.

        ``light``: one worker, and no product so large that BLAS would use threads.
        """


def backend_of(xp: Any, array: Array | None = None) -> Backend:
    """The leaves of an array module; CuPy's are imported when first asked for.

    They are those of the device that holds the array; of the current one without.
    """
    if xp is np:
        return _CPU
    from cuconv.backends.cuda import cuda_backend

    return cuda_backend(None if array is None else int(array.device.id))


def backend_on(device: str) -> Backend:
    """The leaves of a device by its name: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``."""
    if device == "cpu":
        return _CPU
    name, *rest = device.split(":") if isinstance(device, str) else ("",)
    if name != "cuda" or len(rest) > 1 or not all(map(str.isdecimal, rest)):
        raise ValueError(
            f"device must be 'cpu', 'cuda' or 'cuda:' and a number; got {device!r}"
        )
    from cuconv.backends.cuda import cuda_backend

    return cuda_backend(int(rest[0]) if rest else None)


def refuse_capture(
    backend: Backend, what: str, *, captured: bool | None = None
) -> None:
    """Raise where a call would take memory while a CUDA graph is captured.

    The pool would hand it to others between two launches of the graph.
    """
    if backend.is_capturing() if captured is None else captured:
        raise ValueError(f"a CUDA graph is being captured, and {what}")


def release_memory() -> None:
    """Give back the workspaces that calls with NumPy arrays keep for one another.

    At most 64 MiB are kept.  CuPy keeps memory in its own pool, which
    ``cupy.get_default_memory_pool().free_all_blocks()`` empties.

    Examples
    --------
    >>> import cuconv
    >>> cuconv.release_memory()
    """
    _CPU.release()


def default_array_module() -> Any:
    """CuPy where a GPU really works, else NumPy.

    A device must answer and run a tiny kernel: that CuPy imports proves nothing.

    Returns
    -------
    module
        ``cupy`` or ``numpy``.

    Examples
    --------
    >>> import cuconv
    >>> xp = cuconv.default_array_module()
    >>> cuconv.conv1d(xp.ones((1, 1, 5)), xp.ones((1, 1, 3))).shape
    (1, 1, 3)
    """
    from cuconv.backends.cuda import working_cupy

    return working_cupy() or np


def precompile(
    dtypes: Sequence[Any] = ("float32",),
    ranks: Sequence[int] = (1, 2, 3),
    *,
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """Compile and load CUDA kernels on the current device, to spare the first call.

    Parameters
    ----------
    dtypes
        Types of the arrays that will be convolved or pooled.
    ranks
        Numbers of spatial axes, of which a convolution may need fewer; the kernels of
        pooling are the same for all.
    progress
        Called after each kernel with how many are ready and how many there will be.

    Returns
    -------
    int
        How many kernels are ready; 0 where no GPU works, which needs none.

    Raises
    ------
    TypeError
        If a type is not supported.

    Examples
    --------
    >>> import cuconv
    >>> cuconv.precompile(("float32",), ranks=(2,)) in (0, 41)
    True
    """
    from cuconv.backends.cuda import working_cupy

    if working_cupy() is None:
        return 0
    from cuconv.backends.cuda import compiler

    return compiler.precompile(dtypes, ranks, progress)


_CPU = CpuBackend()
