"""The operations that differ between NumPy and CuPy.

Algorithms are written once against `Backend`.  Arrays are grouped, with any strides:
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
from cuconv.backends.deform import DeformProblem, Samples
from cuconv.backends.library import LibraryConv, LibraryEngine
from cuconv.backends.padding import Reading
from cuconv.engine.costs import Rates
from cuconv.engine.pool_problem import PoolInputs, PoolProblem, PoolTiling
from cuconv.engine.program import Program
from cuconv.geometry import Axis, Block, Ranges, Tile, WindowGeometry
from cuconv.memory import Buffer
from cuconv.profiling import stage


class TileTransforms(Protocol):
    """Winograd's transforms between elements, in place, and frequencies.

    Elements are (N, G, C, outer, rows, last), frequencies (i, j, N, G, C, outer, tall,
    wide), both with any strides.  ``matrices`` transform along rows (None where no
    tile has several) and along the last axis; tiles start ``steps`` apart.
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

        Elements outside the array are zero.
        """

    def join(
        self,
        tiles: Array,
        cells: Array,
        matrices: tuple[Array | None, Array],
        steps: tuple[int, int],
        bias: Array | None,
    ) -> None:
        """Write the elements that there are of every tile, plus a bias (1, G, C, 1)."""


class DirectConv(Protocol):
    """Direct convolution of few channels in a group.

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
    """Matrix products that gather their columns as they go, without copies.

    Arrays have one type (the result may have that of the sums) and any strides; x and
    y are (N, G, C, *spatial), weights (G, K/G, C/G, *kernel).  ``parts`` has room for
    as many partial sums of every result as the plan splits each sum into (split-K).
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


class ConvLibrary(Protocol):
    """A library that computes whole convolutions."""

    def engines(self, conv: LibraryConv) -> tuple[LibraryEngine, ...]:
        """The engines that compute it, those expected to be fastest first."""

    def run(
        self,
        conv: LibraryConv,
        engine: LibraryEngine,
        x: Array,
        w: Array,
        y: Array,
        workspace: Array | None,
    ) -> None:
        """Compute it on packed arrays: write the result, or add to it."""


class PoolBackend(Protocol):
    """Pooling, and its gradients, of arrays (N, C, *spatial) with any strides."""

    def tiling(self, problem: PoolProblem, limit: int) -> PoolTiling:
        """Tiles and workers of a call that takes no more memory than ``limit``."""

    def buffers(self, problem: PoolProblem, tiling: PoolTiling) -> tuple[Buffer, ...]:
        """The buffers of one worker."""

    def reduce(
        self,
        problem: PoolProblem,
        tiling: PoolTiling,
        scratch: tuple[dict[str, Array], ...],
        x: Array,
        y: Array,
        indices: Array | None,
    ) -> None:
        """Write the value of every window to ``y``, and the index of its maximum.

        To take elements, the indices are read.  ``scratch`` are the buffers of every
        worker.
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


class DeformBackend(Protocol):
    """The samples of a deformable convolution, and their adjoint.

    x is in the layout of the call, columns are (N, G, C/G, taps, *out).  ``space`` has
    the `shared` buffers, ``own`` those of every worker.
    """

    # Whether patches of columns are runs of memory, taps then channels, in any layout.
    patch_last: bool

    def shared(
        self, problem: DeformProblem, images: int, dx: Array | None, *, reads: bool
    ) -> Iterable[Buffer]:
        """Buffers for so many images: ``reads`` x, sums for ``dx`` if it is wanted."""

    def buffers(
        self, problem: DeformProblem, positions: int, *, gradients: bool
    ) -> tuple[Buffer, ...]:
        """The buffers of one worker, for pieces of at most so many positions."""

    def load(self, problem: DeformProblem, x: Array, space: dict[str, Array]) -> None:
        """Prepare x for samples."""

    def clear(self, problem: DeformProblem, dx: Array, space: dict[str, Array]) -> None:
        """Begin sums for ``dx``."""

    def store(self, problem: DeformProblem, dx: Array, space: dict[str, Array]) -> None:
        """Write the sums to ``dx``."""

    def sample(
        self,
        x: Array,
        samples: Samples,
        columns: Array,
        space: dict[str, Array],
        own: tuple[dict[str, Array], ...],
    ) -> None:
        """Write the columns."""

    def gradients(
        self,
        x: Array,
        samples: Samples,
        columns: Array,
        doffset: Array | None,
        dmask: Array | None,
        space: dict[str, Array],
        own: tuple[dict[str, Array], ...],
    ) -> None:
        """Write the gradients for offsets and mask, from those of the columns."""

    def scatter(
        self,
        columns: Array,
        samples: Samples,
        dx: Array,
        space: dict[str, Array],
        own: tuple[dict[str, Array], ...],
        *,
        deterministic: bool,
    ) -> None:
        """Add the gradients of the columns to the sums for ``dx``."""


class Backend(Protocol):
    """The operations of one array module, on one device."""

    xp: Any
    # ``"cpu"``, ``"cuda:0"``, ``"cuda:1"``, …
    device: str

    # Bytes of columns per block, and the limit when the user sets none.
    block_bytes: int
    rates: Rates
    default_memory_limit: int
    # What a part of a plan takes, where the limit is for the host's memory.
    part_bytes: int
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
    def library(self) -> ConvLibrary | None:
        """The library of strategy `cudnn`; None where there is none."""

    def missing(self, library: str) -> str:
        """The reason why a library of NVIDIA cannot be used; empty if it can."""

    @property
    def pools(self) -> PoolBackend:
        """Pooling and its gradients."""

    @property
    def deform(self) -> DeformBackend:
        """Samples of deformable convolutions."""

    def do(self, function: Callable[..., Any], *operands: Any) -> None:
        """Call a function; a `Recording` replaces this method to record the call."""

    def each(
        self,
        items: Iterable[Any],
        body: Callable[..., None],
        scratch: tuple[Any, ...],
        *,
        single_threaded: bool,
    ) -> None:
        """Distribute items to workers: ``body(number, item, worker's scratch)``."""

    def stage(self, name: str, strategy: str = "", chunk: int = 0) -> stage:
        """A range that a profiler shows."""

    def execute(self, program: Program, arrays: Sequence[Array | None]) -> None:
        """Run a program on the arrays of a call, in the order of its recording."""

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """An uninitialised array on this device."""

    def sum(self, array: Array, axes: tuple[int, ...], dtype: DType) -> Array:
        """Sum over axes, in this type."""

    def fill(self, target: Array, value: int) -> None:
        """Fill with a number."""

    def add_unsafely(self, target: Array, summand: Array) -> None:
        """``target += summand``, cast to its type."""

    def device_of(self, array: Array) -> AbstractContextManager[object]:
        """Make the device of the array the current one."""

    def overhead(self, workers: int, itemsize: int) -> int:
        """Bytes that a call takes beyond its buffers, sums having this item size."""

    def memory(self, nbytes: int) -> AbstractContextManager[Array]:
        """Bytes for the buffers of one call, uninitialised."""

    def release(self) -> None:
        """Free the memory that is kept between calls."""

    def workers(self) -> int:
        """The number of blocks that may run at the same time."""

    def is_capturing(self) -> bool:
        """True if the current stream records a CUDA graph instead of running."""

    def times(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Make each call once, in order; how long each took, in milliseconds."""

    def machine(self) -> tuple[str, ...]:
        """Everything that measured times depend on, beside the problem, as strings."""

    def operand_type(self, types: Types) -> DType:
        """The type of the matrices that `gemm` multiplies."""

    def can_store(self, types: Types, dtype: DType) -> bool:
        """True if `gemm` can write a finished result of this type."""

    def gather_buffers(
        self, geometry: WindowGeometry, tile: Tile, source: DType, operand: DType
    ) -> tuple[Buffer, ...]:
        """The buffers that `gather` needs beside the columns."""

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
        """Add columns to the elements they came from: ``target`` is ``cells`` of x.

        With ``add``, on top of what is there; without, all other elements become zero.
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
        """Copy, with a cast, the padded input that windows read; arrays are grouped."""

    def pad_adjoint(
        self,
        copied: Array,
        cells: Array,
        reading: Reading,
        *,
        add: bool,
    ) -> None:
        """The adjoint of `pad_copy`, in a fixed order; ``add`` to what is there."""

    def alone(self) -> AbstractContextManager[object]:
        """Run steps that are not recorded, with the buffers of NumPy within bounds."""


def backend_of(xp: Any, array: Array | None = None) -> Backend:
    """The backend of an array module; CuPy's is imported when first needed.

    For CuPy, that of the device of the array; without an array, of the current device.
    """
    if xp is np:
        return _CPU
    from cuconv.backends.cuda import cuda_backend

    return cuda_backend(None if array is None else int(array.device.id))


def backend_on(device: str) -> Backend:
    """The backend of a device by its name: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``."""
    if device == "cpu":
        return _CPU
    name, *rest = device.split(":") if isinstance(device, str) else ("",)
    if name != "cuda" or len(rest) > 1 or not all(map(str.isdecimal, rest)):
        raise ValueError(
            f"device must be 'cpu', 'cuda' or 'cuda:' and a number; got {device!r}"
        )
    from cuconv.backends.cuda import cuda_backend

    return cuda_backend(int(rest[0]) if rest else None)


def is_capturing(array: Array | None) -> bool:
    """Whether a CUDA graph is being captured on the device of an array."""
    if array is None or isinstance(array, np.ndarray):
        return False
    from cuconv.backends.cuda import cuda_backend

    return cuda_backend(int(array.device.id)).is_capturing()


def refuse_capture(
    backend: Backend, what: str, *, captured: bool | None = None
) -> None:
    """Raise if a CUDA graph is being captured, for a call that allocates memory.

    CuPy's pool could give that memory to other calls between launches of the graph.
    """
    if backend.is_capturing() if captured is None else captured:
        raise ValueError(f"a CUDA graph is being captured, and {what}")


def release_memory() -> None:
    """Free the workspaces that are kept between calls with NumPy arrays.

    At most 64 MiB are kept.  CuPy keeps memory in its own pool, which
    ``cupy.get_default_memory_pool().free_all_blocks()`` empties.

    Examples
    --------
    >>> import cuconv
    >>> cuconv.release_memory()
    """
    _CPU.release()


def default_array_module() -> Any:
    """CuPy if a GPU works, else NumPy.

    A device must run a small kernel: CuPy can be importable without a usable GPU.

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
    """Compile and load CUDA kernels on the current device before the first call.

    Parameters
    ----------
    dtypes
        Types of the arrays that will be convolved or pooled.
    ranks
        Numbers of spatial axes, of which a convolution may need fewer; the kernels of
        pooling are the same for all.
    progress
        Called after each kernel with the number that are ready and the total.

    Returns
    -------
    int
        The number of kernels that are ready; 0 if no GPU works.

    Raises
    ------
    TypeError
        If a type is not supported.

    Examples
    --------
    >>> import cuconv
    >>> cuconv.precompile(("float32",), ranks=(2,)) in (0, 84)
    True
    """
    from cuconv.backends.cuda import working_cupy

    if working_cupy() is None:
        return 0
    from cuconv.backends.cuda import compiler

    return compiler.precompile(dtypes, ranks, progress)


_CPU = CpuBackend()
