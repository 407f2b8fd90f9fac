"""The backend for CuPy: our kernels for columns, cuBLAS for products."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import cupy
import numpy as np

from cuconv.arrays import (
    Array,
    DType,
    Types,
    accumulator,
    alignment_of,
    is_half,
    strided,
)
from cuconv.backends import padding
from cuconv.backends.cuda.compiler import Do, launch
from cuconv.backends.cuda.cudnn import Cudnn
from cuconv.backends.cuda.cudnn import version as cudnn_version
from cuconv.backends.cuda.deform import CudaDeform
from cuconv.backends.cuda.depthwise import (
    MOST_BLOCKS,
    DirectLaunch,
    pack_cells,
    pack_sums,
)
from cuconv.backends.cuda.device import gpu_of, is_capturing
from cuconv.backends.cuda.elements import Variant
from cuconv.backends.cuda.gemm import CUBLAS, gemm
from cuconv.backends.cuda.implicit_gemm import CudaContraction
from cuconv.backends.cuda.libraries import missing
from cuconv.backends.cuda.pooling import PoolLaunch, PoolTypes, pack_pool, pool_macros
from cuconv.backends.cuda.structs import (
    MOST_THREADS,
    Launch,
    copied_as_columns,
    pack,
    pack_windows,
    steps_of,
)
from cuconv.backends.cuda.variants import (
    DELAY,
    copy_variant,
    direct_variant,
    has_atomics,
    pad_adjoint_variant,
    pad_copy_variant,
    sum_variant,
)
from cuconv.backends.cuda.vector_width import ArrayLayout, vector_width
from cuconv.backends.cuda.winograd import CudaTiles
from cuconv.backends.padding import Reading
from cuconv.engine.costs import cuda_block_bytes, cuda_rates
from cuconv.engine.pool_problem import PoolInputs, PoolProblem, PoolTiling
from cuconv.engine.program import Program, takes_addresses
from cuconv.geometry import (
    PADDING_MODES,
    Axis,
    Block,
    Range,
    Ranges,
    Tile,
    WindowGeometry,
)
from cuconv.memory import ALIGNED, Buffer
from cuconv.profiling import stage

_THREADS = 256
# Nanoseconds that the device is kept busy for each call that is timed: longer than the
# host takes for one.
_LEAD = 1_000_000
# As the kernels number them in wrap.cuh.
_MODES = {mode: np.int32(number) for number, mode in enumerate(PADDING_MODES)}


class DirectKernels:
    """See `cuconv.backends.DirectConv`."""

    def __init__(self, do: Do) -> None:
        self._do = do

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
        sums, step = accumulator(source.dtype), 0
        if bias is not None:
            (step,) = steps_of(bias)
        how = {"adjoint": adjoint, "conjugated": conjugated}
        packed = pack_cells(source, w, out, axes, sums, step, **how)
        arrays = source, w, _or_null(bias), out
        _launch_direct(self._do, "depthwise", packed, *arrays)

    def correlate(
        self, x: Array, dy: Array, out: Array, axes: tuple[Axis, ...]
    ) -> None:
        packed = pack_sums(x, out, dy, axes, accumulator(x.dtype))
        _launch_direct(self._do, "depthwise_weights", packed, x, dy, out)


class PoolKernels:
    """See `cuconv.backends.PoolBackend`."""

    def __init__(self, do: Do) -> None:
        self._do = do

    def tiling(self, problem: PoolProblem, limit: int) -> PoolTiling:
        del problem, limit  # kernels take no memory
        return PoolTiling()

    def buffers(self, problem: PoolProblem, tiling: PoolTiling) -> tuple[Buffer, ...]:
        del problem, tiling
        return ()

    def reduce(
        self,
        problem: PoolProblem,
        tiling: PoolTiling,
        scratch: tuple[dict[str, Array], ...],
        x: Array,
        y: Array,
        indices: Array | None,
    ) -> None:
        del tiling, scratch
        packed = pack_pool(problem, x, y, other_y=indices)
        _launch_pool(self._do, "pool", problem, packed, x, y, _or_null(indices))

    def backward(
        self,
        problem: PoolProblem,
        tiling: PoolTiling,
        scratch: tuple[dict[str, Array], ...],
        given: PoolInputs,
        dx: Array,
    ) -> None:
        del tiling, scratch
        dy, indices, x, y = given
        other = indices if y is None else y
        packed = pack_pool(problem, dx, dy, x, other)
        arrays = dy, _or_null(y), _or_null(indices), _or_null(x), dx
        _launch_pool(self._do, "pool_gradient", problem, packed, *arrays)


class CudaBackend:
    """See `cuconv.backends.Backend`; one for each device."""

    xp: Any = cupy
    default_memory_limit = 256 * 2**20
    part_bytes = 0
    # cuBLAS takes its leading dimensions as 32-bit integers.
    largest_step = 2**31 - 1
    needs_partial = False

    def __init__(self, device: int) -> None:
        count = cupy.cuda.runtime.getDeviceCount()
        if device >= count:
            raise ValueError(f"there is no device {device}: there are {count}")
        self._index = device
        self._gpu = gpu_of(cupy, device)
        self._architecture = int(self._gpu.compute_capability)
        self.device = f"cuda:{device}"
        self.rates = cuda_rates(self._gpu)
        self.block_bytes = cuda_block_bytes(self._gpu)

    @property
    def direct(self) -> DirectKernels:
        return DirectKernels(self.do)

    @property
    def tiles(self) -> CudaTiles:
        return CudaTiles(self.do)

    @property
    def contraction(self) -> CudaContraction:
        return CudaContraction(self.do, self._architecture)

    @property
    def library(self) -> Cudnn:
        return Cudnn(self.do, self._index)

    @staticmethod
    def missing(library: str) -> str:
        return missing(library)

    @property
    def pools(self) -> PoolKernels:
        return PoolKernels(self.do)

    @property
    def deform(self) -> CudaDeform:
        return CudaDeform(self)

    @staticmethod
    def do(function: Callable[..., Any], *operands: Any) -> None:
        if takes_addresses(function):
            operands = tuple(map(_address, operands))
        function(*operands)

    stage = stage

    def each(
        self,
        items: Iterable[Any],
        body: Callable[..., None],
        scratch: tuple[Any, ...],
        *,
        single_threaded: bool,
    ) -> None:
        del single_threaded
        for number, item in enumerate(items):
            body(number, item, scratch[0])

    def execute(self, program: Program, arrays: Sequence[Array | None]) -> None:
        with cupy.cuda.Device(self._index), CUBLAS:
            self._execute(program, arrays)

    def _execute(self, program: Program, arrays: Sequence[Any]) -> None:
        slots = program.slots.copy()
        places = {name: arrays[index].data for name, index in program.sources.items()}
        if program.nbytes:
            memory = cupy.cuda.alloc(program.nbytes - ALIGNED)
            for name, (start, *_) in program.regions.items():
                places[name] = memory + start
        addresses = {name: place.ptr for name, place in places.items()}
        for slot, source, offset in program.addresses:
            slots[slot] = addresses[source] + offset
        for slot, view in program.arrays:
            place = places[view.source] + view.offset
            layout = view.shape, view.dtype, place
            slots[slot] = cupy.ndarray(*layout, strides=view.strides)
        for items, _ in program.current_phases():
            for steps in items:
                for function, operands in steps:
                    function(*operands(slots))

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        with cupy.cuda.Device(self._index):
            return cupy.empty(shape, dtype)

    def sum(self, array: Array, axes: tuple[int, ...], dtype: DType) -> Array:
        with array.device:
            return array.sum(axis=axes, dtype=dtype)

    def add_unsafely(self, target: Array, summand: Array) -> None:
        self.xp.add(target, summand, out=target, casting="unsafe")

    def fill(self, target: Array, value: int) -> None:
        self.do(cupy.ndarray.fill, target, value)

    def device_of(self, array: Array) -> AbstractContextManager[object]:
        device: AbstractContextManager[object] = array.device
        return device

    def overhead(self, workers: int, itemsize: int) -> int:
        del workers, itemsize
        return 0

    def workers(self) -> int:
        return 1

    def is_capturing(self) -> bool:
        return is_capturing(cupy, self._index)

    def times(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        with cupy.cuda.Device(self._index):
            # Else the device would wait for the host, and its gaps would be timed.
            lead = np.uint64(_LEAD * len(calls))
            launch(self.do, DELAY, 1, 1, lead)
            marks = [cupy.cuda.Event()]
            marks[0].record()
            for call in calls:
                call()
                marks.append(cupy.cuda.Event())
                marks[-1].record()
            marks[-1].synchronize()
            return [cupy.cuda.get_elapsed_time(*pair) for pair in pairwise(marks)]

    def machine(self) -> tuple[str, ...]:
        runtime = cupy.cuda.runtime
        versions = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        gpu = self._gpu.name, self._gpu.compute_capability
        own = () if missing("cudnn") else (cudnn_version(),)
        return ("cupy", cupy.__version__, *map(str, versions), *gpu, *own)

    def release(self) -> None:
        cupy.get_default_memory_pool().free_all_blocks()

    def memory(self, nbytes: int) -> AbstractContextManager[Array]:
        if not nbytes:
            return nullcontext(np.empty(0, dtype=np.uint8))
        # CuPy's pool keeps memory for reuse already, stream by stream, and aligns it.
        return nullcontext(cupy.empty(nbytes - ALIGNED, dtype=cupy.uint8))

    def operand_type(self, types: Types) -> DType:
        return types.operand if is_half(types.operand) else types.accumulate

    def can_store(self, types: Types, dtype: DType) -> bool:
        return dtype in (types.accumulate, self.operand_type(types))

    def gather_buffers(
        self, geometry: WindowGeometry, tile: Tile, source: DType, operand: DType
    ) -> tuple[Buffer, ...]:
        if source == operand:
            return ()
        cells = tile.positions * geometry.channels * geometry.taps
        return (Buffer("uncast", cells, source),)

    def gather(
        self,
        x: Array,
        columns: Array,
        geometry: WindowGeometry,
        block: Block,
        buffers: dict[str, Array],
    ) -> None:
        uncast = _like(buffers["uncast"], columns) if "uncast" in buffers else columns
        firsts = tuple(
            axis.first(start)
            for axis, (start, _) in zip(geometry.axes, block.output, strict=True)
        )
        self._gather(x, uncast, geometry.axes, firsts)
        if uncast is not columns:
            self.do(cupy.copyto, columns, uncast)

    def _gather(
        self, x: Array, columns: Array, axes: tuple[Axis, ...], firsts: tuple[int, ...]
    ) -> None:
        """Copy windows to columns; see `pack`."""
        size = x.dtype.itemsize
        width = vector_width(_layout(x), _layout(columns), size)
        packed = pack(x, columns, axes, firsts, over_output=True, width=width)
        variant = copy_variant(size, len(axes), wide=packed.wide, width=packed.width)
        _launch(self.do, variant, packed, x, columns)

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
        atomic = not deterministic and has_atomics(columns.dtype)
        if atomic and not add:
            self.fill(target, 0)
        if add and not atomic:
            # Only elements under these windows change.
            under = tuple(map(_common, cells, block.window))
            target = target[(..., *map(_within, under, cells))]
            cells = under
        if target.size == 0:
            return
        firsts = tuple(
            axis.first(output[0]) - span[0]
            for axis, output, span in zip(
                geometry.axes, block.output, cells, strict=True
            )
        )
        packed = pack(target, columns, geometry.axes, firsts, over_output=atomic)
        name = "col2im_scatter" if atomic else "col2im_gather"
        variant = sum_variant(name, columns.dtype, geometry.rank, wide=packed.wide)
        arguments = () if atomic else (np.int32(add),)
        _launch(self.do, variant, packed, columns, target, *arguments)

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
        del partial
        if bias is not None:
            # The product is added to the bias: one rounding, not two.
            self.copy(bias, out)
        gemm(self.do, a, b, out, add=add or bias is not None, fast=fast)

    def copy(self, source: Array, target: Array) -> None:
        views = copied_as_columns(source, target)
        if views is None:
            self.do(cupy.copyto, target, source, "unsafe")
            return
        axes = tuple(Axis(n, 1, 1, 1, 0, 0) for n in views[0].shape[3:])
        self._gather(*views, axes, (0,) * len(axes))

    def pad_copy(
        self,
        cells: Array,
        copied: Array,
        reading: Reading,
    ) -> None:
        if cells.dtype != copied.dtype:
            for source, target in padding.copies(cells, copied, reading):
                self.copy(source, target)
            return
        packed = pack_windows(cells, copied, reading, over_output=True)
        variant = pad_copy_variant(
            cells.dtype.itemsize, len(reading.axes), wide=packed.wide
        )
        _launch(self.do, variant, packed, cells, copied, _MODES[reading.mode])

    def pad_adjoint(
        self,
        copied: Array,
        cells: Array,
        reading: Reading,
        *,
        add: bool,
    ) -> None:
        packed = pack_windows(cells, copied, reading, over_output=False)
        variant = pad_adjoint_variant(cells.dtype, len(reading.axes), wide=packed.wide)
        mode = _MODES[reading.mode]
        _launch(self.do, variant, packed, copied, cells, mode, np.int32(add))

    def alone(self) -> AbstractContextManager[object]:
        return CUBLAS


def _launch(
    do: Do, variant: Variant, packed: Launch, source: Array, target: Array, *more: Any
) -> None:
    if not packed.items:
        return
    blocks = -(-min(packed.items, MOST_THREADS) // _THREADS)
    launch(do, variant, blocks, _THREADS, source, target, packed.geometry, *more)


def _layout(array: Array) -> ArrayLayout:
    return ArrayLayout(array.shape, steps_of(array), alignment_of(array))


def _launch_direct(do: Do, name: str, packed: DirectLaunch, *arrays: Any) -> None:
    source, out, share = arrays[0], arrays[-1], packed.share
    if not out.size:
        return
    variant = direct_variant(name, source.dtype, out.dtype, wide=packed.wide)
    blocks = min(share.blocks, MOST_BLOCKS)
    launch(do, variant, blocks, share.threads, *arrays, packed.packed)


def _launch_pool(
    do: Do, name: str, problem: PoolProblem, packed: PoolLaunch, *arrays: Any
) -> None:
    if not packed.items:
        return
    macros = pool_macros(problem.kind, PoolTypes.of(problem), wide=packed.wide)
    blocks = -(-min(packed.items, MOST_THREADS) // _THREADS)
    variant = Variant(name, macros)
    launch(do, variant, blocks, _THREADS, *arrays, packed.packed)


def _address(operand: Any) -> Any:
    """The address of an array; other operands as they are."""
    return operand.data.ptr if isinstance(operand, cupy.ndarray) else operand


def _or_null(array: Array | None) -> Any:
    return 0 if array is None else array


def _like(flat: Array, columns: Array) -> Array:
    """The flat buffer, stored in the same order as the columns."""
    ratio = flat.dtype.itemsize, columns.dtype.itemsize
    strides = tuple(s // ratio[1] * ratio[0] for s in columns.strides)
    return strided(flat, columns.shape, strides)


def _common(a: Range, b: Range) -> Range:
    start = max(a[0], b[0])
    return start, max(start, min(a[1], b[1]))


def _within(part: Range, whole: Range) -> slice:
    return slice(part[0] - whole[0], part[1] - whole[0])
