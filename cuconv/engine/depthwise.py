"""Depthwise convolution: one of as many groups as channels, weights seen otherwise."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from cuconv.arrays import (
    Array,
    any_dask,
    merged_stride,
    module_of,
    stub_array,
    stub_of,
)
from cuconv.backends import backend_of, refuse_capture
from cuconv.engine.bias_grad import BiasGrad
from cuconv.engine.call import (
    GradientPlans,
    Runnable,
    check_needs,
    plan_convolution,
    plan_gradients,
)
from cuconv.engine.execute import Run
from cuconv.engine.lower import lower
from cuconv.engine.lowering import Lowering
from cuconv.engine.plan import Plan
from cuconv.engine.problem import check_shape
from cuconv.engine.request import Request, chosen_options, named_inputs
from cuconv.geometry import channels_are_first
from cuconv.memory import (
    Buffer,
    MemoryLimit,
    MemoryLimitError,
    all_within,
    buffer_bytes,
    least_limit,
)
from cuconv.options import DEPTHWISE_OPTIONS

# Of each gradient the operation, and what it takes.
_GRADIENTS = {
    "x": ("input_grad", "dy", "w"),
    "w": ("weight_grad", "dy", "x"),
    "bias": ("bias_grad", "dy"),
}
_NONE: Mapping[str, Array] = {}


class FlatWeights(NamedTuple):
    """The weights (C, M, *kernel) of a depthwise convolution, as `conv` takes them.

    ``shape`` is theirs there; ``buffers`` are for the copy that is made of them where
    strides allow no view of this shape.
    """

    shape: tuple[int, ...]
    groups: int
    buffers: tuple[Buffer, ...]

    @classmethod
    def of(cls, name: str, arrays: dict[str, Array], layout: str) -> "FlatWeights":
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
        kernel = w.shape[2:] if first else w.shape[:-2]
        shape = (filters, each, *kernel) if first else (*kernel, each, filters)
        # Weights are an input of the graph: no block copies them.
        lazy = any_dask(arrays.values())
        is_view = lazy or merged_stride(w.shape[split], w.strides[split]) is not None
        buffers = () if is_view else (Buffer("flat", w.size, w.dtype),)
        return cls(shape, max(channels, 1), buffers)

    def stubs(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """Stand in for arrays, the weights as they are convolved with."""
        stubs = {name: stub_of(name, array) for name, array in arrays.items()}
        copied = {b.name: stub_array((b.cells,), b.dtype) for b in self.buffers}
        return {**stubs, "w": self.view(stubs["w"], copied)}

    def copy(self, w: Array, run: Run) -> None:
        """Copy the weights where that must be."""
        if "flat" in run.arrays:
            run.backend.copy(w, run.arrays["flat"].reshape(w.shape))

    def view(self, w: Array, arrays: Mapping[str, Array] = _NONE) -> Array:
        """View the weights, or their copy if it is among these arrays."""
        return arrays.get("flat", w).reshape(self.shape)


class Depthwise(Lowering):
    """A convolution whose weights are seen in another shape."""

    def __init__(self, inner: Lowering, flat: FlatWeights) -> None:
        self.inner, self.flat = inner, flat
        self.parts = inner.parts
        self.buffers = (*flat.buffers, *inner.buffers)
        self.is_capturable = inner.is_capturable and not flat.buffers

    @property
    def chunks(self) -> int:
        return self.inner.chunks

    @property
    def flops(self) -> int:
        return self.inner.flops

    def weights_of(self, w: Array) -> Iterable[Array]:
        return self.inner.weights_of(w.reshape(self.flat.shape))

    def steps(self, run: Run) -> None:
        w = run.arrays["w"]
        self.flat.copy(w, run)
        arrays = {**run.arrays, "w": self.flat.view(w, run.arrays)}
        self.inner.steps(run._replace(arrays=arrays))


def plan_depthwise(
    call: str,
    arrays: tuple[Array | None, ...],
    out: Array | None,
    options: Mapping[str, Any],
    more: Mapping[str, Any],
) -> Runnable:
    """Check a depthwise convolution, and plan it."""
    del call
    chosen = chosen_options(options, DEPTHWISE_OPTIONS)
    named = named_inputs(dict(zip(("x", "w", "bias"), arrays, strict=True)))
    flat = FlatWeights.of("w", named, chosen.layout)
    if any_dask(named.values()):
        x, w, bias = arrays
        given, own = (x, flat.view(w), bias), {**options, "groups": flat.groups}
        return plan_convolution("forward", given, out, own, more)
    chosen = chosen._replace(groups=flat.groups)
    geometry = chosen.geometry(named["x"].shape, flat.shape)
    if "bias" in named:
        check_shape("bias", named["bias"], (geometry.filters,))
    xp = module_of(named if out is None else {**named, "out": out})
    backend = backend_of(xp, named["x"])
    if flat.buffers:
        what = "w must be copied: its axes C and M do not lie in one run"
        refuse_capture(backend, what)
    stubs, target = flat.stubs(named), None if out is None else stub_of("out", out)
    settled = chosen.settled()
    request = Request("forward", geometry, stubs, target, settled, backend)
    plan: Any = _planned({"y": request}, flat)["y"]
    plan.check_result(out, named, captured=plan.captured)
    return plan  # type: ignore[no-any-return]


def plan_depthwise_gradients(
    call: str,
    arrays: tuple[Array | None, ...],
    out: None,
    options: Mapping[str, Any],
    more: Mapping[str, Any],
) -> Runnable:
    """Plan the gradients of a depthwise convolution that are needed."""
    del call
    chosen = chosen_options(options, DEPTHWISE_OPTIONS)
    named = named_inputs(dict(zip(GradientPlans.names, arrays, strict=True)))
    needs = check_needs(more["needs"], named, more["allocates"])
    flat = FlatWeights.of("w", named, chosen.layout)
    chosen = chosen._replace(groups=flat.groups)
    geometry = chosen.geometry(named["x"].shape, flat.shape)
    check_shape("dy", named["dy"], geometry.y_shape)
    if any_dask(named.values()):
        dy, x, w = arrays
        given, own = (dy, x, flat.view(w)), {**options, "groups": flat.groups}
        plans = plan_gradients("", given, out, own, more)
    else:
        stubs, settled = flat.stubs(named), chosen.settled()
        backend = backend_of(module_of(named), named["dy"])
        requests = {}
        for name, (op, *operands) in _GRADIENTS.items():
            if name in needs:
                each = {operand: stubs[operand] for operand in operands}
                requests[name] = Request(op, geometry, each, None, settled, backend)
        plans = GradientPlans(_planned(requests, flat))
    plans.w_shape = named["w"].shape
    return plans


def _planned(requests: dict[str, Request], flat: FlatWeights) -> dict[str, Runnable]:
    """Plan calls, beside a copy of the weights where one is made.

    Raises
    ------
    MemoryLimitError
        If there is no room for them all.
    """
    limit, taken = None, 0
    for request in requests.values():
        limit = request.options.memory_limit
        if "w" in request.arrays:
            taken = buffer_bytes(flat.buffers)
    if taken and isinstance(limit, int):
        smallest = taken + least_limit(_calls(requests, flat, 0))
        if limit < smallest:
            raise MemoryLimitError(limit, smallest, "a copy of w and what it is for")
        limit -= taken
    return all_within(_calls(requests, flat, limit))


def _calls(
    requests: dict[str, Request], flat: FlatWeights, limit: MemoryLimit
) -> dict[str, Callable[[], Runnable]]:
    """The function that plans calls under a limit."""
    return {n: partial(_plan, request, flat, limit) for n, request in requests.items()}


def _plan(request: Request, flat: FlatWeights, limit: MemoryLimit) -> Runnable:
    options = request.options._replace(memory_limit=limit)
    if request.call == "bias_grad":
        g = request.geometry
        return BiasGrad(request.arrays["dy"], g, g.filters, options, request.backend)
    request = request._replace(options=options)
    has_weights = "w" in request.arrays
    return Plan(request, Depthwise(lower(request), flat) if has_weights else None)
