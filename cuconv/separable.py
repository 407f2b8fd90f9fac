"""Depthwise and separable convolution: validate, cut, run.

A depthwise convolution is `cuconv.conv` with as many groups as channels, its weights
seen with an axis for what each channel gives.  A separable one is that, and a
convolution of one tap over its result,

    h = depthwise_conv(x, depthwise)        y = conv(h, pointwise) + bias

where h is larger than x or y may be.  It is computed in pieces: some images, or a part
of the output of one image with the cells of x under it.  Every step of a piece is
planned as a convolution of its own, in the memory that the piece leaves.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypedDict, TypeVar, Unpack

from cuconv.arrays import (
    Array,
    Types,
    any_dask,
    check_out,
    check_overlap,
    is_aligned,
    merged_stride,
    module_of,
    resolve_types,
    stub_array,
)
from cuconv.backends import Backend, backend_of, refuse_capture
from cuconv.conv import conv
from cuconv.engine.bias_grad import BiasGrad
from cuconv.engine.call import (
    GRADIENTS,
    ConvGradients,
    check_needs,
    plan_gradients,
)
from cuconv.engine.plan import Plan
from cuconv.engine.problem import check_shape
from cuconv.engine.request import Request, chosen_options, named_inputs
from cuconv.engine.tile_search import largest_fitting
from cuconv.engine.traversal import Piece, Tiling, Traversal
from cuconv.geometry import (
    Axis,
    ConvGeometry,
    Padding,
    Range,
    Ranges,
    Sizes,
    channels_are_first,
)
from cuconv.memory import (
    Buffer,
    MemoryLimit,
    MemoryLimitError,
    aligned_start,
    carve,
    workspace_bytes,
)
from cuconv.options import ConvOptions, Options, shows_options
from cuconv.profiling import stage

P = ParamSpec("P")
R = TypeVar("R")
# Plans something under a limit, or raises what would do.
Planning: TypeAlias = Callable[[int], object]

_GRADIENTS = ("x", "depthwise", "pointwise", "bias")
_NAME = "a separable convolution"
_TAKES_MEMORY = (
    "a separable convolution takes memory for what lies between its steps: call "
    "depthwise_conv and conv, both with out="
)
_BACKWARD_ALLOCATES = (
    "depthwise_conv_backward allocates its results: call conv_input_grad and "
    "conv_weight_grad with out=, and sum dy for the bias"
)


class SeparableOptions(TypedDict, total=False):
    """The keyword options of separable convolutions; see `separable_conv`."""

    stride: Sizes
    padding: Padding
    dilation: Sizes
    layout: str
    dtype: Any
    strategy: str
    precision: str | None
    deterministic: bool | None
    memory_limit: MemoryLimit


class SeparableGradients(NamedTuple):
    """The gradients of a separable convolution; None where one was not asked for.

    Examples
    --------
    >>> import cuconv
    >>> cuconv.SeparableGradients(bias=0.5)
    SeparableGradients(x=None, depthwise=None, pointwise=None, bias=0.5)
    """

    x: Array | None = None
    depthwise: Array | None = None
    pointwise: Array | None = None
    bias: Array | None = None


_DEPTHWISE_OPTIONS = tuple(n for n in ConvOptions.__annotations__ if n != "groups")
_SEPARABLE_OPTIONS = tuple(SeparableOptions.__annotations__)


class _Filters(NamedTuple):
    """What the weights (C, M, *kernel) of a depthwise convolution are to `conv`.

    ``shape`` are theirs there; ``copied`` are the bytes of the copy that is made of
    them where strides allow no view of this shape.
    """

    shape: tuple[int, ...]
    groups: int
    copied: int

    @classmethod
    def of(cls, name: str, arrays: dict[str, Array], layout: str) -> "_Filters":
        w, x_shape = arrays[name], arrays["x"].shape
        first, rank = channels_are_first(layout), w.ndim - 2
        if rank < 1:
            raise ValueError(
                f"{name} has {w.ndim} axes; it needs at least 3: channels, "
                "multiplier, space"
            )
        split = slice(0, 2) if first else slice(rank, rank + 2)
        channels, multiplier = w.shape[split]
        place = len(x_shape) - rank - 1 if first else len(x_shape) - 1
        # Where x has another number of axes, the geometry says so.
        if len(x_shape) - rank in (1, 2) and x_shape[place] != channels:
            form = "(C, M, *kernel)" if first else "(*kernel, C, M)"
            raise ValueError(
                f"channels do not match: x has {x_shape[place]} and {name} {channels}; "
                f"{name} is {form}"
            )
        # Without channels there is one group of none.
        filters, each = channels * multiplier, min(channels, 1)
        shape = (filters, each, *w.shape[2:])
        if not first:
            shape = (*w.shape[:-2], each, filters)
        copied = 0
        # A graph holds weights as it does any input: no block makes a copy of them.
        if not any_dask(arrays.values()):
            is_view = merged_stride(w.shape[split], w.strides[split]) is not None
            copied = 0 if is_view else Buffer("copy", w.size, w.dtype).nbytes
        return cls(shape, max(channels, 1), copied)


@shows_options(_DEPTHWISE_OPTIONS)
def depthwise_conv(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    **options: Unpack[ConvOptions],
) -> Array:
    """Convolve every channel with filters of its own.

    It is `conv` with as many groups as channels.  With m below M,

        y[n, c · M + m, o] = bias[c · M + m] + Σ over t of x[n, c, i] · w[c, m, t]

    Parameters
    ----------
    x
        Input, (N, C, *spatial), or (C, *spatial) for a single image.
    w
        Filters, (C, M, *kernel): M for each channel.  With ``layout="channels_last"``:
        x is (N, *spatial, C) and w is (*kernel, C, M).  Where the axes C and M do not
        lie in one run of memory, w is copied, which counts to ``memory_limit``.
    bias
        (C · M,), added to every output position.
    out
        Array to write the result to; it must have its shape and type, and share no
        memory with the inputs.
    **options
        As for `conv`, which are all but ``groups``.

    Returns
    -------
    array
        (N, C · M, *out) in the layout of ``x``: the M results of a channel side by
        side.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `conv` does.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]])
    >>> w = np.array([[[1.0, 1.0], [1.0, -1.0]], [[1.0, 1.0], [1.0, -1.0]]])
    >>> cuconv.depthwise_conv(x, w)
    array([[[  3.,   5.],
            [ -1.,  -1.],
            [ 30.,  50.],
            [-10., -10.]]])
    """
    chosen = chosen_options(options, _DEPTHWISE_OPTIONS)
    arrays = named_inputs({"x": x, "w": w, "bias": bias})
    filters = _Filters.of("w", arrays, chosen.layout)
    more: Any = {**options, "groups": filters.groups}
    if filters.copied:
        chosen = chosen._replace(groups=filters.groups)
        geometry = chosen.geometry(x.shape, filters.shape)
        arrays["w"] = stub_array(filters.shape, w.dtype)
        step = _Step("forward", geometry, arrays, out, chosen)
        plans = [partial(step.plan, _leaves_for_copies(x))]
        more["memory_limit"] = _beside_copy(filters.copied, plans, chosen)
    return conv(x, w.reshape(filters.shape), bias, out=out, **more)


@shows_options(_DEPTHWISE_OPTIONS)
def depthwise_conv_backward(
    dy: Array,
    x: Array,
    w: Array,
    *,
    needs: Sequence[str] = GRADIENTS,
    **options: Unpack[ConvOptions],
) -> ConvGradients:
    """All gradients of `depthwise_conv`, or those that are needed.

    Parameters
    ----------
    dy
        Gradient for the output, (N, C · M, *out).
    x, w
        Input and weights of the forward call.
    needs
        Which of ``"x"``, ``"w"``, ``"bias"`` to compute; the others cost nothing.
    **options
        As for `depthwise_conv`, the same as in the forward call.

    Returns
    -------
    ConvGradients
        Named tuple ``(x, w, bias)`` with the shapes of the three, None for a gradient
        that was not asked for.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `depthwise_conv` does, before the first gradient is computed.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, w = np.ones((1, 2, 3)), np.ones((2, 1, 2))
    >>> cuconv.depthwise_conv_backward(np.ones((1, 2, 2)), x, w).w
    array([[[2., 2.]],
    <BLANKLINE>
           [[2., 2.]]])
    """
    chosen = chosen_options(options, _DEPTHWISE_OPTIONS)
    arrays = named_inputs({"dy": dy, "x": x, "w": w})
    check_needs(needs, arrays, _BACKWARD_ALLOCATES)
    filters = _Filters.of("w", arrays, chosen.layout)
    chosen = chosen._replace(groups=filters.groups)
    geometry = chosen.geometry(x.shape, filters.shape)
    check_shape("dy", dy, geometry.y_shape)
    if "x" in needs:
        if filters.copied:
            plans = _plans_of_gradients(arrays, geometry, needs, chosen)
            room = _beside_copy(filters.copied, plans, chosen)
            chosen = chosen._replace(memory_limit=room)
        arrays["w"] = arrays["w"].reshape(filters.shape)
    given = arrays["dy"], arrays["x"], arrays["w"].reshape(filters.shape)
    more = {"needs": needs, "allocates": _BACKWARD_ALLOCATES}
    plan = plan_gradients("", given, None, chosen._asdict(), more)
    found = plan.run(given, None)
    return found._replace(w=None if found.w is None else found.w.reshape(w.shape))


def _leaves_for_copies(array: Array) -> Backend:
    backend = backend_of(module_of({"x": array}), array)
    refuse_capture(backend, "w must be copied: its axes C and M do not lie in one run")
    return backend


def _plans_of_gradients(
    arrays: dict[str, Array],
    geometry: ConvGeometry,
    needs: Sequence[str],
    options: Options,
) -> list[Planning]:
    """How the gradients are planned for which w will be a copy."""
    dy, x = arrays["dy"], arrays["x"]
    backend = backend_of(module_of({"dy": dy}), dy)
    w = stub_array(geometry.w_shape, arrays["w"].dtype)
    steps = {
        "x": _Step("input_grad", geometry, {"dy": dy, "w": w}, None, options),
        "w": _Step("weight_grad", geometry, {"dy": dy, "x": x}, None, options),
    }
    plans: list[Planning] = [
        partial(step.plan, backend) for name, step in steps.items() if name in needs
    ]
    if "bias" in needs:
        plans.append(_bias_planning(geometry, dy, options))
    return plans


def _bias_planning(geometry: ConvGeometry, dy: Array, options: Options) -> Planning:
    def planning(limit: int) -> object:
        own = options._replace(memory_limit=limit)
        return BiasGrad(dy, geometry, geometry.filters, own.settled())

    return planning


def _beside_copy(
    copied: int, plans: Iterable[Planning], options: Options
) -> MemoryLimit:
    """The limit for calls beside a copy of the weights; refused if it is too small."""
    limit = options.settled().memory_limit
    if not isinstance(limit, int):
        return None
    smallest = copied + _least(plans)
    if limit < smallest:
        raise MemoryLimitError(limit, smallest, "a copy of w and what it is for")
    return limit - copied


def _least(plans: Iterable[Planning]) -> int:
    """The smallest limit under which each of these can be planned."""
    smallest = 0
    for plan in plans:
        try:
            plan(0)
        except MemoryLimitError as error:
            smallest = max(smallest, error.smallest)
    return smallest


class _Step(NamedTuple):
    """One convolution among others, of arrays of which it may only know how they lie.

    ``total``, if there is one, is what the result is added to.
    """

    call: str
    geometry: ConvGeometry
    arrays: dict[str, Array]
    out: Array | None
    options: Options
    total: Array | None = None

    def plan(self, backend: Backend, limit: int) -> Plan:
        """Plan it for a result of the type of ``out``."""
        dtype = self.options.dtype if self.out is None else self.out.dtype
        own = self.options._replace(dtype=dtype, memory_limit=limit).settled()
        with stage("plan"):
            request = Request(
                self.call, self.geometry, self.arrays, self.out, own, backend
            )
            return Plan(request)

    def run(self, backend: Backend, limit: int) -> None:
        plan = self.plan(backend, limit)
        plan.run(tuple(self.arrays.values()), self.out)
        total = self.total
        if total is not None:
            total += self.out


@shows_options(_SEPARABLE_OPTIONS)
def separable_conv(
    x: Array,
    depthwise: Array,
    pointwise: Array,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    **options: Unpack[SeparableOptions],
) -> Array:
    """Convolve every channel alone, then mix the channels cell by cell.

    With h the result of `depthwise_conv`,

        y[n, k, o] = bias[k] + Σ over c of h[n, c, o] · pointwise[k, c]

    h exists whole where the limit has room for it, and else in pieces: some images, or
    a part of one.

    Parameters
    ----------
    x
        Input, (N, C, *spatial), or (C, *spatial) for a single image.
    depthwise
        Filters of the first step, (C, M, *kernel), as for `depthwise_conv`.
    pointwise
        Weights of the second step, (K, C · M).  With ``layout="channels_last"``: x is
        (N, *spatial, C), depthwise (*kernel, C, M) and pointwise (C · M, K).
    bias
        (K,), added to every output position.
    out
        Array to write the result to; it must have its shape and type, and share no
        memory with the inputs.
    stride, padding, dilation
        As for `conv`; they are those of the first step.
    layout, precision, deterministic
        As for `conv`.
    dtype
        Type of h and of the result; by default NumPy's common type of the arrays.
    strategy
        As for `conv`; the name of a strategy is for the first step alone.
    memory_limit
        As for `conv`; what there is of h counts too.

    Returns
    -------
    array
        (N, K, *out) in the layout of ``x``; without the batch axis if ``x`` has none.

    Raises
    ------
    ValueError, TypeError
        For shapes, types, devices or options that do not fit, before anything is
        allocated, and while a CUDA graph is captured.
    MemoryLimitError
        If nothing fits under ``memory_limit``; it names the smallest that would do.

    References
    ----------
    Chollet, "Xception: Deep learning with depthwise separable convolutions", 2017.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]])
    >>> depthwise, pointwise = np.ones((2, 1, 2)), np.array([[1.0, 1.0], [0.0, 1.0]])
    >>> cuconv.separable_conv(x, depthwise, pointwise)
    array([[[33., 55.],
            [30., 50.]]])
    """
    chosen = chosen_options(options, _SEPARABLE_OPTIONS)
    arrays = named_inputs(
        {"x": x, "depthwise": depthwise, "pointwise": pointwise, "bias": bias}
    )
    call = _Separable.of(arrays, frozenset({"y"}), chosen)
    filters, shape = call.filters, call.whole.y_shape
    if bias is not None:
        check_shape("bias", bias, (filters,))
    result = call.types.result
    if out is not None:
        xp = module_of({**arrays, "out": out})
        check_out(out, shape, result)
        check_overlap(xp, out, arrays)
    into = {"y": stub_array(shape, result) if out is None else out}
    tiling = call.fitting(into)
    with call.backend.device_of(x):
        if out is None:
            into["y"] = call.backend.xp.empty(shape, dtype=result)
        call.run(tiling, into)
    return into["y"]


@shows_options(_SEPARABLE_OPTIONS)
def separable_conv_backward(
    dy: Array,
    x: Array,
    depthwise: Array,
    pointwise: Array,
    *,
    needs: Sequence[str] = _GRADIENTS,
    **options: Unpack[SeparableOptions],
) -> SeparableGradients:
    """All gradients of `separable_conv`, or those that are needed.

    What lay between its steps is computed once more, piece by piece, for the gradient
    of ``pointwise``; nothing else needs it.

    Parameters
    ----------
    dy
        Gradient for the output, (N, K, *out).
    x, depthwise, pointwise
        Input and weights of the forward call.
    needs
        Which of ``"x"``, ``"depthwise"``, ``"pointwise"``, ``"bias"`` to compute; the
        others cost nothing.
    **options
        As for `separable_conv`, the same as in the forward call.

    Returns
    -------
    SeparableGradients
        Named tuple ``(x, depthwise, pointwise, bias)`` with the shapes of the four,
        None for a gradient that was not asked for.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `separable_conv` does, before the first gradient is computed.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, dy = np.ones((1, 2, 4)), np.ones((1, 5, 3))
    >>> depthwise, pointwise = np.ones((2, 3, 2)), np.ones((5, 6))
    >>> found = cuconv.separable_conv_backward(dy, x, depthwise, pointwise)
    >>> found.x
    array([[[15., 30., 30., 15.],
            [15., 30., 30., 15.]]])
    >>> found.depthwise.shape, found.pointwise.shape, found.bias
    ((2, 3, 2), (5, 6), array([3., 3., 3., 3., 3.]))
    """
    chosen = chosen_options(options, _SEPARABLE_OPTIONS)
    arrays = named_inputs(
        {"dy": dy, "x": x, "depthwise": depthwise, "pointwise": pointwise}
    )
    check_needs(needs, arrays, _TAKES_MEMORY, _GRADIENTS)
    call = _Separable.of(arrays, frozenset(needs) - {"bias"}, chosen)
    check_shape("dy", dy, call.whole.y_shape)
    shapes = {
        "x": x.shape,
        "depthwise": call.geometry.w_shape,
        "pointwise": call.whole.w_shape,
    }
    into = {n: stub_array(shapes[n], call.types.result) for n in shapes if n in needs}
    plans = [_bias_planning(call.whole, dy, call.options)] if "bias" in needs else []
    tiling = call.fitting(into, plans)
    with call.backend.device_of(x):
        into = {n: call.backend.xp.empty(a.shape, a.dtype) for n, a in into.items()}
        call.run(tiling, into)
    for name, weights in (("depthwise", depthwise), ("pointwise", pointwise)):
        if name in into:
            into[name] = into[name].reshape(weights.shape)
    if "bias" in needs:
        found = BiasGrad(dy, call.whole, call.filters, call.options.settled())
        into["bias"] = found.run((arrays["dy"],), None)
    return SeparableGradients(**into)


# How calls that were seen before were shared out.
_SEEN: dict[object, Tiling] = {}
_MOST_SEEN = 1024


class _Separable(NamedTuple):
    """One call: the geometry of its first step, and what both steps take.

    ``copied`` are the weights of the first step where strides allow no view of them
    that `conv` could take.
    """

    geometry: ConvGeometry
    filters: int
    given: dict[str, Array]
    copied: Array | None
    types: Types
    options: Options
    backend: Backend
    results: frozenset[str]

    @classmethod
    def of(
        cls, arrays: dict[str, Array], results: frozenset[str], options: Options
    ) -> "_Separable":
        """Check shapes and types, and see the weights as `conv` does."""
        x, w, points = (arrays[name] for name in ("x", "depthwise", "pointwise"))
        backend = backend_of(module_of(arrays), x)
        refuse_capture(backend, _TAKES_MEMORY)
        own = _Filters.of("depthwise", arrays, options.layout)
        options = options._replace(groups=own.groups).settled()
        geometry = options.geometry(x.shape, own.shape)
        filters = _filters_of(points, w, geometry)
        types = resolve_types(arrays, options.dtype)
        axes = (None,) * geometry.rank
        place = (..., *axes) if geometry.channels_first else axes
        given = {
            **arrays,
            "depthwise": stub_array(own.shape, w.dtype),
            "pointwise": points[place],
        }
        if not own.copied:
            given["depthwise"] = arrays["depthwise"].reshape(own.shape)
        options = options._replace(dtype=types.result)
        copied = arrays["depthwise"] if own.copied else None
        return cls(geometry, filters, given, copied, types, options, backend, results)

    @property
    def whole(self) -> ConvGeometry:
        """The geometry of the second step."""
        return _second(self.geometry, self.filters)

    def fitting(
        self, into: dict[str, Array], beside: Sequence[Planning] = ()
    ) -> Tiling:
        """The largest pieces that fit, or an error that names what would do.

        ``beside`` are plans of calls that come before or after.
        """
        key = self._key(into, beside)
        tiling = _SEEN.get(key)
        if tiling is None:
            if len(_SEEN) >= _MOST_SEEN:
                _SEEN.clear()
            tiling = _SEEN[key] = self._found(into, beside)
        return tiling

    def _key(self, into: dict[str, Array], beside: Sequence[Planning]) -> object:
        """What the plans of the steps depend on."""
        arrays = {**self.given, **{f"into {name}": a for name, a in into.items()}}
        lies = tuple(
            (name, array.shape, array.strides, array.dtype, is_aligned(array))
            for name, array in arrays.items()
        )
        options = self.options
        words = options.strategy, options.precision, options.deterministic
        place = self.backend.device, self.backend.workers(), options.memory_limit
        how = self.geometry, self.types, self.results, len(beside), self.copied is None
        return lies, words, place, how

    def _found(self, into: dict[str, Array], beside: Sequence[Planning]) -> Tiling:
        limit = self.options.memory_limit
        if isinstance(limit, int):
            return self._within(limit, into, beside)
        try:
            return self._within(self.backend.default_memory_limit, into, beside)
        except MemoryLimitError as error:
            return self._within(error.smallest, into, beside)

    def run(self, tiling: Tiling, into: dict[str, Array]) -> None:
        """Carry it out on arrays that have been checked."""
        backend = self.backend
        with backend.memory(workspace_bytes(tiling.buffers)) as lent:
            raw = lent if lent.size else backend.xp.empty(0, dtype=backend.xp.uint8)
            buffers = carve(raw, aligned_start(raw) if raw.size else 0, tiling.buffers)
            if self.copied is not None and self.results:
                buffers["copy"].reshape(self.copied.shape)[...] = self.copied
            is_first = True
            for piece in chain.from_iterable(sweep.pieces() for sweep in tiling.sweeps):
                for step in self._steps(piece, into, buffers, is_first=is_first):
                    step.run(backend, tiling.limit)
                is_first = False
            for name in self._weights & set(buffers):
                backend.copy(buffers[name].reshape(into[name].shape), into[name])

    @property
    def _weights(self) -> frozenset[str]:
        """The gradients that are summed over pieces."""
        return self.results & {"depthwise", "pointwise"}

    def _within(
        self, limit: int, into: dict[str, Array], beside: Sequence[Planning]
    ) -> Tiling:
        least = _least(beside)
        counts = self._counts() if least <= limit else []
        tilings = [self._cut(count, limit) for count in reversed(counts)]
        # The largest pieces first, but half of the limit is for the steps if it can be:
        # in what little the largest may leave, their blocks would be tiny.
        tilings.sort(key=lambda tiling: tiling.limit < limit // 2)
        for tiling in tilings:
            if tiling.limit >= 0 and self._fits(tiling, into):
                return tiling
        raise MemoryLimitError(limit, max(least, self._smallest(into)), _NAME)

    def _counts(self) -> list[int]:
        """How many positions a piece may have, from one to all."""
        images, positions = self.geometry.images, self.geometry.positions
        if not images * positions:
            return [max(images, positions, 1)]
        halves = (1 << i for i in range((images * positions - 1).bit_length()))
        return [*halves, images * positions]

    def _cut(self, positions: int, limit: int) -> Tiling:
        if not self.results:
            return Tiling((), (), limit)
        sweeps = self._sweeps(positions)
        buffers = tuple(self._buffers(sweeps))
        overhead = self.backend.overhead(1, self.types.accumulate.itemsize)
        return Tiling(sweeps, buffers, limit - overhead - workspace_bytes(buffers))

    def _sweeps(self, positions: int) -> tuple[Traversal, ...]:
        g, results = self.geometry, self.results
        blocks = Traversal(g, g.tile(positions), results)
        if blocks.is_whole or "x" not in results:
            return (blocks,)
        # What several outputs give to a cell of x is summed in one piece.
        cells = largest_fitting(
            lambda n: g.reach(g.region_tile(n)) <= positions, g.cells
        )
        regions = Traversal(g, g.region_tile(cells), results & {"x"}, over_x=True)
        if results == {"x"}:
            return (regions,)
        return blocks._replace(results=results - {"x"}), regions

    def _buffers(self, sweeps: tuple[Traversal, ...]) -> Iterator[Buffer]:
        g, types = self.geometry, self.types
        cells = g.filters * max(sweep.positions for sweep in sweeps)
        yield Buffer("between", cells, types.result)
        if self.copied is not None:
            yield Buffer("copy", self.copied.size, self.copied.dtype)
        if not self._weights or sweeps[0].number < 2:
            return
        taps, points = g.filters * g.patch, self.filters * g.filters
        sizes = {"depthwise": taps, "pointwise": points}
        yield Buffer("part", max(sizes[n] for n in self._weights), types.accumulate)
        if types.accumulate != types.result:
            for name in sorted(self._weights):
                yield Buffer(name, sizes[name], types.accumulate)

    def _fits(self, tiling: Tiling, into: dict[str, Array]) -> bool:
        try:
            for step in self._kinds(tiling, into):
                step.plan(self.backend, tiling.limit)
        except MemoryLimitError:
            return False
        return True

    def _smallest(self, into: dict[str, Array]) -> int:
        """The smallest limit that would do."""
        best: int | None = None
        for count in self._counts():
            tiling = self._cut(count, 0)
            if best is None or -tiling.limit < best:
                plans = (
                    partial(s.plan, self.backend) for s in self._kinds(tiling, into)
                )
                needed = _least(plans) - tiling.limit
                best = needed if best is None else min(best, needed)
        return best or 0

    def _kinds(self, tiling: Tiling, into: dict[str, Array]) -> Iterator[_Step]:
        """The steps of a piece of every kind, of arrays that are not there yet."""
        buffers = {b.name: stub_array((b.cells,), b.dtype) for b in tiling.buffers}
        for piece in tiling.kinds():
            for is_first in (True, False)[: 1 + ("part" in buffers)]:
                yield from self._steps(piece, into, buffers, is_first=is_first)

    def _steps(
        self,
        piece: Piece,
        into: dict[str, Array],
        buffers: dict[str, Array],
        *,
        is_first: bool,
    ) -> Iterator[_Step]:
        """What is done for a piece, in this order: its buffers are used again."""
        one, results = self._first(piece), piece.results
        two = _second(one, self.filters)
        x = self._at(self.given["x"], piece.images, piece.cells)
        w, points = self.given["depthwise"], self.given["pointwise"]
        if "copy" in buffers:
            w = buffers["copy"].reshape(w.shape)
        h = buffers["between"][: math.prod(one.y_shape)].reshape(one.y_shape)
        own, other = self.options, self._options_of_second

        def weights(step: _Step, name: str) -> _Step:
            shape = into[name].shape
            total = (buffers[name] if name in buffers else into[name]).reshape(shape)
            if is_first:
                return step._replace(out=total)
            part = buffers["part"][: total.size].reshape(shape)
            return step._replace(out=part, total=total)

        if results & {"y", "pointwise"}:
            yield _Step("forward", one, {"x": x, "w": w}, h, own)
        if "y" in results:
            y = self._at(into["y"], piece.images, piece.outputs)
            bias = {"bias": self.given["bias"]} if "bias" in self.given else {}
            yield _Step("forward", two, {"x": h, "w": points, **bias}, y, other)
            return
        dy = self._at(self.given["dy"], piece.images, piece.outputs)
        if "pointwise" in results:
            step = _Step("weight_grad", two, {"dy": dy, "x": h}, None, other)
            yield weights(step, "pointwise")
        if results & {"x", "depthwise"}:
            yield _Step("input_grad", two, {"dy": dy, "w": points}, h, other)
        if "depthwise" in results:
            step = _Step("weight_grad", one, {"dy": h, "x": x}, None, own)
            yield weights(step, "depthwise")
        if "x" in results:
            dx = self._at(into["x"], piece.images, piece.cells)
            yield _Step("input_grad", one, {"dy": h, "w": w}, dx, own)

    @property
    def _options_of_second(self) -> Options:
        """A strategy that is named is the first step's."""
        strategy = self.options.strategy
        if strategy != "benchmark":
            strategy = "auto"
        return self.options._replace(strategy=strategy)

    def _first(self, piece: Piece) -> ConvGeometry:
        """The geometry of the first step of a piece."""
        each = zip(self.geometry.axes, piece.cells, piece.pads, strict=True)
        axes = tuple(
            axis._replace(size=stop - start, before=before, after=after)
            for axis, (start, stop), (before, after) in each
        )
        start, stop = piece.images
        return replace(self.geometry, images=stop - start, axes=axes)

    def _at(self, array: Array, images: Range, ranges: Ranges) -> Array:
        """A part of an array of all channels."""
        cells = tuple(slice(*span) for span in ranges)
        every = slice(None)
        inner = (every, *cells) if self.geometry.channels_first else (*cells, every)
        return array[(slice(*images), *inner) if self.geometry.batched else inner]


def _second(geometry: ConvGeometry, filters: int) -> ConvGeometry:
    """The geometry of the second step, over what the first one gives."""
    axes = tuple(Axis(n, 1, 1, 1, 0, 0) for n in geometry.out)
    return replace(
        geometry, axes=axes, channels=geometry.filters, filters=filters, groups=1
    )


def _filters_of(points: Array, w: Array, geometry: ConvGeometry) -> int:
    """K, if the weights of the second step fit what the first one gives."""
    if points.ndim != 2:
        raise ValueError(
            f"pointwise has {points.ndim} axes and must have 2: filters and channels"
        )
    filters, taken = points.shape
    channels, multiplier = w.shape[:2]
    if not geometry.channels_first:
        filters, taken = taken, filters
        channels, multiplier = w.shape[-2:]
    if taken != channels * multiplier:
        raise ValueError(
            f"channels do not match: pointwise takes {taken} and depthwise gives "
            f"{channels} × {multiplier} = {channels * multiplier}"
        )
    return int(filters)
