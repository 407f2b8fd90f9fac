"""Deformable convolution: samples between elements become columns, then a product.

    columns[n, c, t, o] = mask[n, d, t, o] · x(n, c, o · stride + t · dilation - padding
                                               + offset[n, d, t, o])
    y = columns × w + bias

x between elements is interpolated linearly along every axis, and zero outside; d is the
offset group of c.  The product is a convolution with one tap over the columns, and so
are its gradients.  Pieces are some images, or outputs of one; columns exist for one
piece at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from cuconv.arrays import (
    Array,
    Types,
    any_dask,
    check_out,
    check_overlap,
    merged_stride,
    module_of,
    resolve_types,
    stub_array,
    stub_of,
)
from cuconv.backends import Backend, backend_of, refuse_capture
from cuconv.backends.deform import DeformProblem, Samples, columns_of
from cuconv.engine.bias_grad import BiasGrad
from cuconv.engine.call import Runnable, check_needs
from cuconv.engine.execute import Run, fill
from cuconv.engine.lower import lower
from cuconv.engine.lowering import Lowering
from cuconv.engine.pieces import Pieces, Step, Tiling
from cuconv.engine.problem import check_shape
from cuconv.engine.recorded import PiecesPlan
from cuconv.engine.request import Request, chosen_options, named_inputs
from cuconv.geometry import Axis, Block, ConvGeometry
from cuconv.memory import Buffer, buffer_bytes, workspace_bytes
from cuconv.options import DEFORM_OPTIONS, Options

DEFORM_GRADIENTS = ("x", "offset", "w", "mask", "bias")
_FORWARD = "x", "offset", "w", "bias", "mask"
_BACKWARD = "dy", "x", "offset", "w", "mask"
_WITH_IMAGES = "dy", "x", "offset", "mask", "y", "dx", "doffset", "dmask"
_MOST_AXES = 3
_TAKES_MEMORY = (
    "a deformable convolution takes memory for its columns, which the graph could not "
    "keep: call it outside the graph"
)
# Elements of columns in a piece below which a second worker costs more than it saves.
_WORTH_WORKERS = 2**18


class DeformGradients(NamedTuple):
    """The gradients of a deformable convolution; None where there is none.

    Examples
    --------
    >>> import cuconv
    >>> cuconv.DeformGradients(bias=0.5)
    DeformGradients(x=None, offset=None, w=None, mask=None, bias=0.5)
    """

    x: Any = None
    offset: Any = None
    w: Any = None
    mask: Any = None
    bias: Any = None


class DeformRequest(NamedTuple):
    """A deformable convolution, or gradients of one, that is to be planned.

    Arrays and results, of which only shapes, strides and types are read, have a batch
    axis, as ``geometry`` does; ``batched`` says whether those of the call do.
    """

    problem: DeformProblem
    batched: bool
    arrays: dict[str, Array]
    results: dict[str, Array]
    types: Types
    options: Options
    backend: Backend

    @classmethod
    def of(cls, arrays: dict[str, Array], options: Options) -> "DeformRequest":
        """Check shapes and types."""
        backend = backend_of(module_of(arrays), arrays["x"])
        refuse_capture(backend, _TAKES_MEMORY)
        for name, array in arrays.items():
            if array.dtype.kind not in "fV":
                raise TypeError(
                    f"{name} has type {array.dtype}; a deformable convolution takes "
                    "real floats"
                )
        options = options.settled()
        geometry = options.geometry(arrays["x"].shape, arrays["w"].shape)
        if geometry.rank > _MOST_AXES:
            raise ValueError(
                f"w has {geometry.rank} spatial axes; a deformable convolution takes "
                f"{_MOST_AXES} at most"
            )
        for index, axis in enumerate(geometry.axes):
            if min(axis.before, axis.after) < 0:
                raise ValueError(
                    f"padding of spatial axis {index} is {axis.before} and "
                    f"{axis.after}; a deformable convolution crops nothing: slice x"
                )
        groups = _offset_groups(arrays, geometry)
        types = resolve_types(arrays, options.dtype)
        columns = backend.operand_type(types)
        sums = types.accumulate
        own = (
            *(arrays[n].dtype for n in ("offset", "mask") if n in arrays),
            types.result,
        )
        problem = DeformProblem(
            replace(geometry, batched=True),
            *(groups, sums, columns),
            uniform=all(dtype == sums for dtype in own),
        )
        options = options._replace(dtype=types.result)
        request = cls(problem, geometry.batched, {}, {}, types, options, backend)
        stubs = {name: stub_of(name, array) for name, array in arrays.items()}
        return request._replace(arrays=request.with_batch(stubs))

    @property
    def what(self) -> str:
        return "a deformable convolution"

    @property
    def geometry(self) -> ConvGeometry:
        return self.problem.geometry

    @property
    def y_shape(self) -> tuple[int, ...]:
        return self.geometry.y_shape[not self.batched :]

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to sample or to multiply."""
        return not (self.geometry.multiplications and self.geometry.cells)

    @property
    def has_columns(self) -> bool:
        return not self.results.keys().isdisjoint(("y", "dw"))

    @property
    def has_gradients(self) -> bool:
        """True if the gradients of the columns are needed."""
        return not self.results.keys().isdisjoint(("dx", "doffset", "dmask"))

    def with_batch(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The arrays of a call with a batch axis, those that have images."""
        own = () if self.batched else _WITH_IMAGES
        return {name: a[None] if name in own else a for name, a in arrays.items()}

    def counts(self) -> list[int]:
        """Halves of the most positions whose columns stay in the cache.

        Columns of less memory than an image are not tried: they would save no more than
        that, and take many pieces.
        """
        g = self.geometry
        column = g.channels * g.taps * self.types.accumulate.itemsize
        most = max(self.backend.block_bytes // max(column, 1), 1)
        most = max(min(most, g.images * g.positions), 1)
        least = max(min(g.cells // max(g.taps, 1), most), 1)
        return sorted({max(most >> i, least) for i in range(most.bit_length())})

    def tiling(self, positions: int, limit: int) -> Tiling:
        """Cut into pieces of at most so many positions."""
        if not self.results or self.is_empty:
            return Tiling(None, 0, (), limit)
        g, deform = self.geometry, self.backend.deform
        tile = g.tile(positions)
        cells = tile.positions * g.channels * g.taps
        workers = self.backend.workers() if cells > _WORTH_WORKERS else 1
        for count in sorted({1, workers}, reverse=True):
            shared = tuple(self._buffers(tile.images, cells, g.count_blocks(tile)))
            own = deform.buffers(
                self.problem, tile.positions, gradients=self.has_gradients
            )
            taken = workspace_bytes(shared) + count * buffer_bytes(own)
            overhead = self.backend.overhead(count, self.types.accumulate.itemsize)
            left = limit - taken - overhead
            if left >= limit // 2:
                break
        return Tiling(tile, g.count_blocks(tile), shared, left, own, count)

    def _buffers(self, images: int, cells: int, pieces: int) -> Iterator[Buffer]:
        """The buffers that all workers share."""
        problem, sums, w = self.problem, self.types.accumulate, self.arrays["w"]
        if self.has_columns:
            yield Buffer("columns", cells, problem.columns)
        if self.has_gradients and (not self.has_columns or problem.columns != sums):
            yield Buffer("dcolumns", cells, sums)
        yield from self.backend.deform.shared(
            problem, images, self.results.get("dx"), reads=self.results.keys() != {"dx"}
        )
        if not self._is_view(w):
            yield Buffer("ordered", w.size, w.dtype)
        if "dw" in self.results:
            if sums != self.types.result or not self._is_view(self.results["dw"]):
                yield Buffer("sum of dw", w.size, sums)
            if pieces > 1:
                yield Buffer("part", w.size, sums)

    def kinds(self, tiling: Tiling) -> Iterator[Step]:
        """The steps of a piece of every kind, of arrays that are not there yet."""
        stubs = {b.name: stub_array((b.cells,), b.dtype) for b in tiling.buffers}
        arrays, seen = {**self.arrays, **self.results, **stubs}, set()
        if tiling.way is None:
            return
        for block in self.geometry.blocks(tiling.way):
            kind = block.images[1] - block.images[0], block.shape
            if kind not in seen:
                seen.add(kind)
                for step in self.steps(block, arrays):
                    yield step
                    yield step.later(arrays)

    def steps(self, block: Block, arrays: dict[str, Array]) -> Iterator[Step]:
        """The products for a piece, in order."""
        product, results = self.product(block), self.results
        w = self.ordered(arrays, "w", "ordered").reshape(product.w_shape)
        if self.has_columns:
            columns = self.columns(arrays, block)[1]
        if "y" in results:
            bias = {"bias": arrays["bias"]} if "bias" in self.arrays else {}
            operands = {"x": columns, "w": w, **bias}
            yield Step(1, "forward", product, operands, self.at(arrays["y"], block))
            return
        dy = self.at(arrays["dy"], block)
        if "dw" in results:
            total = self.ordered(arrays, "dw", "sum of dw").reshape(product.w_shape)
            yield Step(1, "weight_grad", product, {"dy": dy, "x": columns}, total)
        if self.has_gradients:
            into = self.columns(arrays, block, gradient=True)[1]
            yield Step(1, "input_grad", product, {"dy": dy, "w": w}, into)

    def lowered(self, step: Step, limit: int) -> Lowering:
        """Lower a product."""
        options = self.options._replace(dtype=step.out.dtype, memory_limit=limit)
        given = step.call, step.geometry, step.operands, step.out
        return lower(Request(*given, options, self.backend))

    def product(self, block: Block) -> ConvGeometry:
        """The convolution of the columns of a piece."""
        g, axes = self.geometry, tuple(Axis(n, 1, 1, 1, 0, 0) for n in block.shape)
        images = block.images[1] - block.images[0]
        return replace(g, images=images, axes=axes, channels=g.groups * g.patch)

    def columns(
        self, arrays: Mapping[str, Array], block: Block, *, gradient: bool = False
    ) -> tuple[Array, Array]:
        """The columns of a piece, or their gradient: see `columns_of`."""
        name = "dcolumns" if gradient and "dcolumns" in arrays else "columns"
        images, last = block.images[1] - block.images[0], self.backend.deform.patch_last
        return columns_of(
            arrays[name],
            self.geometry,
            images,
            block.shape,
            patch_last=last or not self.geometry.channels_first,
        )

    def samples(self, offset: Array, mask: Array | None, block: Block) -> Samples:
        """The samples of a piece."""
        moved = self.by_tap(offset, block, self.geometry.rank)
        return Samples(self.problem, block.output, moved, self.by_tap(mask, block))

    def by_tap(self, array: Array | None, block: Block, *axes: int) -> Any:
        """View a piece of offsets or of a mask as (N, D, taps, *axes, *out)."""
        if array is None:
            return None
        part, g = self.at(array, block), self.geometry
        if not g.channels_first:
            part = part.transpose(0, g.rank + 1, *range(1, g.rank + 1))
        head = part.shape[0], self.problem.offset_groups, g.taps
        return part.reshape(*head, *axes, *part.shape[2:])

    def at(self, array: Array, block: Block) -> Array:
        """The images and outputs of a piece, of an array of all channels."""
        cells = [slice(*span) for span in block.output]
        return array[self.geometry.arranged(slice(*block.images), slice(None), cells)]

    def ordered(self, arrays: Mapping[str, Array], name: str, copy: str) -> Array:
        """Weights, or their gradient, in the order of columns: a view, or a copy."""
        view = self._in_order(arrays[name])
        return arrays[copy].reshape(view.shape) if copy in arrays else view

    def _in_order(self, w: Array) -> Array:
        if self.geometry.channels_first and self.backend.deform.patch_last:
            return w.transpose(0, *range(2, w.ndim), 1)
        return w

    def _is_view(self, w: Array) -> bool:
        """True if a patch of these weights is one axis of memory as columns have it."""
        ordered = self._in_order(w)
        patch = slice(1, None) if self.geometry.channels_first else slice(0, -1)
        return merged_stride(ordered.shape[patch], ordered.strides[patch]) is not None

    def copy_weights(self, arrays: Mapping[str, Array], run: Run) -> None:
        """Copy the weights where that must be."""
        if "ordered" in arrays and (self.has_gradients or "y" in self.results):
            view = self._in_order(arrays["w"])
            run.backend.copy(view, arrays["ordered"].reshape(view.shape))


def _offset_groups(arrays: dict[str, Array], geometry: ConvGeometry) -> int:
    """The number of offset groups, if offset and mask fit."""
    offset, mask, channels = arrays["offset"], arrays.get("mask"), geometry.channels
    each, ndim = geometry.taps * geometry.rank, len(geometry.x_shape)
    what = f"taps {geometry.taps} × axes {geometry.rank} = {each}"
    if offset.ndim != ndim:
        raise ValueError(f"offset has {offset.ndim} axes and must have {ndim}, as x")
    given = offset.shape[-geometry.rank - 1 if geometry.channels_first else -1]
    groups = int(given // each)
    if not groups or given % each or channels % groups:
        raise ValueError(
            f"offset has {given} channels and must have offset groups × {what}, where "
            f"offset groups divide the {channels} channels of x"
        )
    check_shape("offset", offset, geometry.array_shape(given, geometry.out))
    if mask is not None:
        wanted = geometry.array_shape(groups * geometry.taps, geometry.out)
        check_shape("mask", mask, wanted)
    return groups


class Deformed(Pieces):
    """The steps of every piece."""

    request: DeformRequest

    def steps(self, run: Run) -> None:
        request, results = self.request, self.request.results
        arrays = request.with_batch({**run.arrays})
        if request.is_empty:
            for name in results:
                bias = arrays.get("bias") if name == "y" else None
                fill(run.backend, arrays[name], bias, request.geometry)
            return
        tiling = self.tiling
        own = run.memory.own("sampling", run.start, tiling.own, tiling.workers)
        start = run.start + tiling.workers * buffer_bytes(tiling.own)
        run = run._replace(arrays=arrays, start=start)
        request.copy_weights(arrays, run)
        images = None
        for number, block in enumerate(request.geometry.blocks(tiling.way)):
            if block.images != images:
                self._end_images(run, images)
                images = block.images
                self._begin_images(run, images)
            with run.backend.stage("sample", "deform", number):
                self._piece(run, block, own, is_first=not number)
        self._end_images(run, images)
        if "sum of dw" in arrays:
            view = request.ordered({"dw": arrays["dw"]}, "dw", "sum of dw")
            run.backend.copy(arrays["sum of dw"].reshape(view.shape), view)

    def _piece(
        self,
        run: Run,
        block: Block,
        own: tuple[dict[str, Array], ...],
        *,
        is_first: bool,
    ) -> None:
        request, arrays, deform = self.request, run.arrays, run.backend.deform
        results = request.results
        samples = request.samples(arrays["offset"], arrays.get("mask"), block)
        x = arrays["x"][slice(*block.images)]
        if request.has_columns:
            deform.sample(x, samples, request.columns(arrays, block)[0], arrays, own)
        for step in request.steps(block, arrays):
            self._convolve(step if is_first else step.later(arrays), run)
        if not request.has_gradients:
            return
        columns = request.columns(arrays, block, gradient=True)[0]
        if not results.keys().isdisjoint(("doffset", "dmask")):
            doffset = request.by_tap(
                arrays.get("doffset"), block, request.geometry.rank
            )
            dmask = request.by_tap(arrays.get("dmask"), block)
            deform.gradients(x, samples, columns, doffset, dmask, arrays, own)
        if "dx" in results:
            dx = arrays["dx"][slice(*block.images)]
            same = request.options.deterministic is not False
            deform.scatter(columns, samples, dx, arrays, own, deterministic=same)

    def _begin_images(self, run: Run, images: tuple[int, int]) -> None:
        """Prepare for samples of these images."""
        deform, arrays, results = run.backend.deform, run.arrays, self.request.results
        problem, part = self.request.problem, slice(*images)
        if results.keys() != {"dx"}:
            deform.load(problem, arrays["x"][part], arrays)
        if "dx" in results:
            deform.clear(problem, arrays["dx"][part], arrays)

    def _end_images(self, run: Run, images: tuple[int, int] | None) -> None:
        """Store the gradient of these images."""
        if images is not None and "dx" in self.request.results:
            dx = run.arrays["dx"][slice(*images)]
            run.backend.deform.store(self.request.problem, dx, run.arrays)


class DeformPlan(PiecesPlan):
    """The plan of a deformable convolution, or of gradients of one."""

    gradients = DeformGradients
    lowering: Deformed

    def __init__(
        self,
        request: DeformRequest,
        names: tuple[str, ...],
        results: dict[str, Array],
        bias: BiasGrad | None = None,
    ) -> None:
        request = request._replace(results=request.with_batch(results))
        least = 0 if bias is None else bias.workspace_bytes
        super().__init__(Deformed.of(request, least), request, names, results, bias)

    @property
    def workers(self) -> int:
        return max(super().workers, self.lowering.tiling.workers)

    @property
    def is_single_threaded(self) -> bool:
        return super().is_single_threaded and self.lowering.tiling.workers == 1


def plan_deform(
    call: str,
    arrays: tuple[Array | None, ...],
    out: Array | None,
    options: Mapping[str, Any],
    more: Mapping[str, Any],
) -> Runnable:
    """Check a deformable convolution, and plan it."""
    del call
    named = _named(dict(zip(_FORWARD, arrays, strict=True)), more)
    request = DeformRequest.of(named, chosen_options(options, DEFORM_OPTIONS))
    if "bias" in named:
        check_shape("bias", named["bias"], (request.geometry.filters,))
    y = stub_array(request.y_shape, request.types.result)
    if out is not None:
        xp = module_of({**named, "out": out})
        check_out(out, y.shape, y.dtype)
        check_overlap(xp, out, named)
        y = stub_of("y", out)
    return DeformPlan(request, _FORWARD, {"y": y})


def plan_deform_gradients(
    call: str,
    arrays: tuple[Array | None, ...],
    out: None,
    options: Mapping[str, Any],
    more: Mapping[str, Any],
) -> Runnable:
    """Plan the gradients of a deformable convolution that are needed."""
    del call, out
    named = _named(dict(zip(_BACKWARD, arrays, strict=True)), more)
    needs = check_needs(more["needs"], named, _TAKES_MEMORY, DEFORM_GRADIENTS)
    request = DeformRequest.of(named, chosen_options(options, DEFORM_OPTIONS))
    check_shape("dy", named["dy"], request.y_shape)
    dtype, bias = request.types.result, None
    results = {
        f"d{name}": stub_array(named[name].shape, dtype)
        for name in DEFORM_GRADIENTS[:-1]
        if name in needs and name in named
    }
    if "bias" in needs:
        own = request.options._replace(memory_limit=None)
        geometry, backend = request.geometry, request.backend
        if not request.batched:
            geometry = replace(geometry, batched=False)
        bias = BiasGrad(named["dy"], geometry, geometry.filters, own, backend)
    return DeformPlan(request, _BACKWARD, results, bias)


def _named(
    arrays: dict[str, Array | None], more: Mapping[str, Any]
) -> dict[str, Array]:
    """The arrays that were given; raise for a rank that the function does not have."""
    mask = arrays.pop("mask")
    named = named_inputs(arrays if mask is None else {**arrays, "mask": mask})
    if any_dask(named.values()):
        raise TypeError("a deformable convolution takes no Dask arrays")
    rank = more.get("rank")
    if rank is not None and named["w"].ndim != rank + 2:
        raise ValueError(
            f"deform_conv{rank}d needs weights of {rank + 2} axes, for filters, "
            f"channels and space; w has {named['w'].ndim}"
        )
    return named
