"""Costs of the steps of a strategy, from which plans are chosen.

Strategies count their steps as `Work`; `Rates` are the nanoseconds of one step, on one
worker, for float32.
"""

import math
from typing import NamedTuple

# OpenBLAS for AVX-512 multiplies up to this many multiply-adds without packing.
SMALL_PRODUCT = 10**6
# The launches of a kernel in one `Rates.block` of a GPU.
LAUNCHES = 3
# The most blocks that are recorded: with more, the work takes longer than computing the
# steps anew.
MOST_BLOCKS = 32


class Work(NamedTuple):
    """The steps of a job, counted in the units of `Rates`.

    ``tiles`` are pieces of a product that run in parallel, as many at a time as there
    are processors; ``pieces`` are parts of the job that can run at the same time.
    ``moved`` are the elements that products read from device memory and write to it at
    least, in units of four bytes: moving them takes place during the products.
    """

    multiply: float = 0
    short_side: float = float("inf")
    gather: float = 0
    scatter: float = 0
    copy: float = 0
    transform: float = 0
    last_transform: float = 0
    transpose: float = 0
    reread: float = 0
    fourier: float = 0
    direct: float = 0
    einsum: float = 0
    loads: float = 0
    moved: float = 0
    products: float = 0
    blocks: float = 1
    tiles: float = 0
    pieces: int = 1


class Rates(NamedTuple):
    """Nanoseconds for one unit of each step, and thresholds."""

    # A multiply-add of a matrix product: at its best, and how much longer where one
    # side of the product is short (the factor is 1 + short / side).
    multiply: float
    short: float
    # An element gathered to columns, added back from columns, copied in contiguous
    # runs.
    gather: float
    scatter: float
    copy: float
    # An element written by a Winograd transform along an outer axis, and along the
    # last.
    transform: float
    last_transform: float
    # A weight transposed; a weight read from memory once more.
    transpose: float
    reread: float
    # An element of a Fourier transform, for each doubling of its length.
    fourier: float
    # An element multiplied and added by a direct loop.
    direct: float
    # The same by `numpy.einsum`.
    einsum: float
    # A copy from device memory into that of a multiprocessor, of 1 to 16 bytes; four
    # bytes read from device memory or written to it, beside other work.
    loads: float
    moved: float
    # A matrix product, however small.
    products: float
    # The gain of a second worker in steps that wait for memory, as a fraction of one.
    crowding: float
    # One block of work, one of a plan that is not recorded since it has too many, and
    # one more worker.
    block: float
    unrecorded: float
    worker: float
    # Work of fewer nanoseconds than this gets one worker.
    worth_workers: float
    # Multiprocessors that share a kernel's blocks, and the speedup of products of
    # float32 as TF32, and of half types.
    processors: int = 0
    tf32: float = 1
    halves: float = 1

    def on_tensor_cores(self, *, halves: bool) -> "Rates":
        """The rates with products on tensor cores, if the device has them."""
        faster = self.halves if halves else self.tf32
        if faster == 1:
            return self
        return self._replace(multiply=self.multiply / faster)


class Price(NamedTuple):
    """Nanoseconds of one worker: of steps that scale with workers, and of others.

    The others wait for memory, for which workers compete.  The work is in so many
    pieces: with two workers, five take as long as six.
    """

    even: float
    crowded: float
    pieces: int = 1

    def of(self, workers: int, rates: Rates) -> float:
        """Nanoseconds with this number of workers."""
        rounds = math.ceil(self.pieces / workers)
        share = rounds / max(self.pieces, rounds, 1)
        crowd = 1 + rates.crowding * (workers - 1)
        return self.even * share + self.crowded / crowd + (workers - 1) * rates.worker


def price(work: Work, rates: Rates) -> Price:
    """The price of this work."""
    short = 1 + rates.short / max(work.short_side, 1)
    product = work.multiply * rates.multiply * short + work.loads * rates.loads
    product = max(product, work.moved * rates.moved)
    if work.tiles and rates.processors:
        # The last round of tiles takes as long as a full one, and processors without a
        # tile neither multiply nor read.
        rounds = math.ceil(work.tiles / rates.processors)
        product *= rounds * rates.processors / work.tiles
    each = (
        work.gather * rates.gather
        + work.scatter * rates.scatter
        + work.fourier * rates.fourier
        + work.direct * rates.direct
        + work.einsum * rates.einsum
        + work.products * rates.products
    )
    crowded = (
        work.copy * rates.copy
        + work.transform * rates.transform
        + work.last_transform * rates.last_transform
        + work.transpose * rates.transpose
        + work.reread * rates.reread
    )
    block = rates.block if work.blocks <= MOST_BLOCKS else rates.unrecorded
    even = product + each + work.blocks * block
    return Price(float(even), float(crowded), work.pieces)


# Fitted to 1,854 candidates for 478 passes of layers of eight networks, N = 1 and 8,
# forward and both gradients, on one core of an Intel Xeon (AVX-512, 2 MiB of L2 cache)
# with NumPy 2.4 and OpenBLAS 0.3.31: least squares of the relative error.  The cheapest
# takes 1.04 times as long as the fastest (geometric mean), nine in ten at most 1.14.
CPU_RATES = Rates(
    multiply=0.0154,
    short=2,
    gather=0.28,
    scatter=0.28,
    copy=0.24,
    transform=0.4,
    last_transform=0.58,
    transpose=0.8,
    reread=0.042,
    fourier=0.2,
    direct=0.03,
    einsum=0.15,
    loads=0,
    moved=0,
    products=30,
    crowding=0.2,
    block=5_000,
    unrecorded=40_000,
    worker=100_000,
    # With two workers, layers of 0.3 to 0.5 ms took 1.05 times as long as with one, and
    # those of 0.5 to 1 ms 0.78 times, in passes over networks after 50 ms of sleep.
    worth_workers=450_000,
)

# From data sheets of an H200 and not yet measured on one: float32 products at 45
# TFLOP/s, 8 times that as TF32 and 16 times in half types, copies at 4 TB/s, 5 µs for a
# launch; a direct loop reads two elements for a multiply-add, of 32 in each clock of
# 132 processors at 1.8 GHz.  A copy takes eight instructions of 128 in each clock:
# counted in machine code (`benchmarks/budgets.json`), 4 to 5 for itself, and 8 to 9
# with the steps, tables and reads of shared memory around it.  Other GPUs get them in
# proportion.
CUDA_RATES = Rates(
    multiply=4.4e-5,
    short=64,
    gather=2e-3,
    scatter=4e-3,
    copy=2e-3,
    transform=2e-3,
    last_transform=2e-3,
    transpose=2e-3,
    reread=1e-3,
    fourier=4e-3,
    direct=3e-4,
    einsum=0,
    loads=2.6e-4,
    moved=1e-3,
    products=0,
    crowding=0,
    block=15_000,
    unrecorded=15_000,
    worker=0,
    worth_workers=float("inf"),
    processors=132,
    tf32=8,
    halves=16,
)

# Measured rates, by the GPU's name; they take precedence over derived ones.
MEASURED_RATES: dict[str, Rates] = {}

# The steps that wait for device memory.
_MEMORY_STEPS = (
    *("gather", "scatter", "copy", "transform", "last_transform"),
    *("transpose", "reread", "fourier", "direct", "moved"),
)

# Architectures whose multiprocessors have 64 float32 lanes; all others have 128.
_HALF_AS_WIDE = ("70", "72", "75", "80")

# The first architecture whose tensor cores and asynchronous copies are used.
MODERN = 80

# Columns of one block, as a fraction of the L2 cache: the rest is for operands and
# results, so that columns stay in the cache.  Not yet measured.
_L2_SHARE = 0.5
_UNKNOWN_L2_BLOCK = 64 * 2**20


class Gpu(NamedTuple):
    """The properties of a CUDA device; 0 if unknown."""

    name: str
    compute_capability: str
    multiprocessors: int
    kilohertz: int
    memory_kilohertz: int
    memory_bits: int
    l2_bytes: int

    @property
    def multiplications(self) -> float:
        """Multiply-adds of float32 in a nanosecond, at best."""
        lanes = 64 if self.compute_capability in _HALF_AS_WIDE else 128
        return self.multiprocessors * lanes * self.kilohertz * 1e-6

    @property
    def bandwidth(self) -> float:
        """Bytes of device memory in a nanosecond, at best: two for each clock."""
        return 2 * self.memory_kilohertz * 1e-6 * self.memory_bits / 8


_H200 = Gpu("NVIDIA H200", "90", 132, 1_980_000, 3_125_000, 6144, 50 * 2**20)


def cuda_rates(gpu: Gpu) -> Rates:
    """The rates of a GPU: measured ones, else derived from its properties."""
    if gpu.name in MEASURED_RATES:
        return MEASURED_RATES[gpu.name]
    faster = gpu.multiplications / _H200.multiplications or 1
    wider = gpu.bandwidth / _H200.bandwidth or 1
    moved = {name: getattr(CUDA_RATES, name) / wider for name in _MEMORY_STEPS}
    modern = int(gpu.compute_capability) >= MODERN
    return CUDA_RATES._replace(
        multiply=CUDA_RATES.multiply / faster,
        loads=CUDA_RATES.loads / faster,
        processors=gpu.multiprocessors or CUDA_RATES.processors,
        # Our kernels do not use the tensor cores of older devices.
        tf32=CUDA_RATES.tf32 if modern else 1,
        halves=CUDA_RATES.halves if modern else 1,
        **moved,
    )


def cuda_block_bytes(gpu: Gpu) -> int:
    """Bytes of columns in one block on a GPU."""
    return int(gpu.l2_bytes * _L2_SHARE) or _UNKNOWN_L2_BLOCK
