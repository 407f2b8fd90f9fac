"""Deformable convolution by the `deform_*` kernels: struct, variants and launches."""

from collections.abc import Iterator, Sequence
from typing import Any

from cuconv.arrays import Array, grouped, strided
from cuconv.backends.cuda.compiler import launch
from cuconv.backends.cuda.elements import Variant
from cuconv.backends.cuda.structs import (
    DEFORM,
    GEOMETRY,
    MOST_THREADS,
    divisor,
    pack,
    reach_of,
    steps_of,
    struct,
)
from cuconv.backends.cuda.variants import deform_variant
from cuconv.backends.deform import DeformProblem, Samples
from cuconv.memory import Buffer

_THREADS = 256
# Channels of one thread at most, and threads with which none waits for another.
_EACH, _BUSY = 8, 2**17


class CudaDeform:
    """See `cuconv.backends.DeformBackend`."""

    patch_last = False

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def shared(
        self, problem: DeformProblem, images: int, dx: Array | None, *, reads: bool
    ) -> Iterator[Buffer]:
        del reads
        g = problem.geometry
        if dx is not None and dx.dtype != problem.sums:
            yield Buffer("sums of dx", images * g.channels * g.cells, problem.sums)

    def buffers(
        self, problem: DeformProblem, positions: int, *, gradients: bool
    ) -> tuple[Buffer, ...]:
        del problem, positions, gradients
        return ()

    def load(self, problem: DeformProblem, x: Array, space: dict[str, Array]) -> None:
        del problem, x, space  # kernels read x in place

    def clear(self, problem: DeformProblem, dx: Array, space: dict[str, Array]) -> None:
        del problem
        self._backend.fill(_sums(dx, space), 0)

    def store(self, problem: DeformProblem, dx: Array, space: dict[str, Array]) -> None:
        del problem
        sums = _sums(dx, space)
        if sums is not dx:
            self._backend.copy(sums, dx)

    def sample(
        self,
        x: Array,
        samples: Samples,
        columns: Array,
        space: dict[str, Array],
        own: tuple[dict[str, Array], ...],
    ) -> None:
        del space, own
        arrays = x, samples.offset, _or_null(samples.mask), columns
        self._launch("deform_im2col", samples, x, columns, arrays)

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
        del space, own
        mask, results = _or_null(samples.mask), (doffset, dmask)
        arrays = x, columns, samples.offset, mask, *map(_or_null, results)
        self._launch("deform_offsets", samples, x, columns, arrays, results)

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
        del own
        kernel, sums = (
            ("deform_scatter", "deform_gather")[deterministic],
            _sums(dx, space),
        )
        arrays = columns, samples.offset, _or_null(samples.mask), sums
        self._launch(kernel, samples, sums, columns, arrays)

    def _launch(
        self,
        kernel: str,
        samples: Samples,
        x: Array,
        columns: Array,
        arrays: Sequence[Any],
        results: tuple[Array | None, ...] = (None, None),
    ) -> None:
        packed, items, variant = _packed(kernel, samples, x, columns, results)
        if items:
            blocks = -(-min(items, MOST_THREADS) // _THREADS)
            launch(self._backend.do, variant, blocks, _THREADS, *arrays, packed)


def _packed(
    kernel: str,
    samples: Samples,
    x: Array,
    columns: Array,
    results: tuple[Array | None, ...],
) -> tuple[Array, int, Variant]:
    """The struct, the number of threads with work, and the variant of a launch.

    ``x`` is in the layout of the call, ``columns`` are (N, G, C/G, taps, *out).
    """
    problem, g = samples.problem, samples.problem.geometry
    how = {"channels_first": g.channels_first, "batched": True}
    cells = grouped(x, g.groups, g.rank, **how)
    together = grouped(x, 1, g.rank, **how)
    x_step, c_step = (steps_of(a)[2] for a in (together, columns))
    (n, *_, taps), out = columns.shape[:4], columns.shape[4:]
    offset_channels = g.channels // problem.offset_groups
    each, spans = 1, (*cells.shape[3:],)
    if kernel == "deform_offsets":
        d = problem.offset_groups
        image, _, channel, *steps = together.strides
        strides = image, offset_channels * channel, 0, *steps
        moved = strided(together, (n, d, taps, *spans), strides)
        c = columns.strides
        ones = (1,) * g.rank
        spread = strided(
            columns,
            (n, d, taps, *ones, *out),
            (c[0], c[1], c[3], *(0,) * g.rank, *c[4:]),
        )
    else:
        spread = columns.reshape(*columns.shape[:3], *g.kernel, *out)
        moved = cells
        if kernel == "deform_gather":
            moved = cells[..., :1]
        else:
            each = _channels_at_once(problem, columns)
            moved, spread = moved[:, :, ::each], spread[:, :, ::each]
    given = samples.offset, samples.mask, *results
    far = max(reach_of(a.shape, steps_of(a)) for a in given if a is not None)
    far = max(far, *(reach_of(a.shape, steps_of(a)) for a in (x, columns)))
    over = kernel != "deform_gather"
    firsts = problem.firsts(samples.outputs)
    packed = pack(moved, spread, g.axes, firsts, over_output=over, largest=far)
    wide = packed.wide
    value = (
        packed.geometry.view(GEOMETRY(g.rank, wide=wide))[0],
        *(each, x_step, c_step, g.group_channels, offset_channels),
        *(spans[-1], g.kernel, divisor(offset_channels)),
        *(_steps(a, g.rank, is_mask=bool(i % 2)) for i, a in enumerate(given)),
    )
    dtypes = {"ELEMENT": x.dtype, "COLUMN": columns.dtype, "SUM": problem.sums}
    dtypes["OFFSET"] = samples.offset.dtype
    if samples.mask is not None:
        dtypes["MASK"] = samples.mask.dtype
    if kernel == "deform_offsets":
        dtypes["RESULT"] = next(a.dtype for a in results if a is not None)
    variant = deform_variant(kernel, dtypes, g.rank, wide=wide)
    return struct(value, DEFORM(g.rank, wide=wide)), packed.items, variant


def _channels_at_once(problem: DeformProblem, columns: Array) -> int:
    """The channels of one thread: several share the offsets that it reads.

    One where neighbouring threads have neighbouring channels, and fewer where threads
    are.
    """
    steps, each = columns.strides, 1
    if abs(steps[2]) < abs(steps[-1]):
        return 1
    threads = columns.size // columns.shape[3]
    while each < _EACH and problem.part % (2 * each) == 0 and threads > _BUSY * each:
        each *= 2
    return each


def _steps(array: Array | None, rank: int, *, is_mask: bool) -> tuple[Any, ...]:
    """``struct Steps`` of an array (N, D, taps, rank, *out), or without rank."""
    if array is None:
        return (0, 0, 0, 0, (0,) * rank)
    head, out = steps_of(array)[:-rank], steps_of(array)[-rank:]
    return (*head, 0, out) if is_mask else (*head, out)


def _sums(dx: Array, space: dict[str, Array]) -> Array:
    if "sums of dx" not in space:
        return dx
    return space["sums of dx"][: dx.size].reshape(dx.shape)


def _or_null(array: Array | None) -> Any:
    return 0 if array is None else array
