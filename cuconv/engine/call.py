"""Every call: a key, the plan of that key from one cache, a run.

    public function → run → plan of the key → Plan.run → Backend.execute
                          ↘ first time: Request → lower → Plan

Calls with Dask arrays branch off here, in `plan_convolution`.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from cuconv.arrays import (
    Array,
    any_dask,
    base_array,
    check_overlap,
    layouts_of,
    module_of,
)
from cuconv.backends import backend_of, is_capturing, refuse_capture
from cuconv.choices import Gradient
from cuconv.config import settings
from cuconv.engine.bias_grad import BiasGrad
from cuconv.engine.plan import Plan
from cuconv.engine.planner import decide
from cuconv.engine.problem import ROLES
from cuconv.engine.request import (
    ZERO_POINTS,
    Request,
    chosen_options,
    geometry_of,
    named_inputs,
)
from cuconv.engine.rewrites.zero_points import check_zero_points
from cuconv.memory import Shortage
from cuconv.options import Options
from cuconv.profiling import stage

GRADIENTS: tuple[Gradient, ...] = ("x", "w", "bias")
T = TypeVar("T")


class ConvGradients(NamedTuple, Generic[T]):
    """The gradients of one convolution; None where one was not asked for.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, w, dy = np.ones((1, 1, 5)), np.ones((2, 1, 3)), np.ones((1, 2, 3))
    >>> gradients = cuconv.conv_backward(dy, x, w, needs=("w",))
    >>> gradients.w.shape, gradients.x
    ((2, 1, 3), None)
    """

    x: T = None  # type: ignore[assignment]
    w: T = None  # type: ignore[assignment]
    bias: T = None  # type: ignore[assignment]


class Runnable(Protocol):
    """A plan in the cache."""

    @property
    def threads(self) -> int:
        """The number of threads it is for; 0 if it does not depend on them."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the arrays that it takes, for messages."""

    def run(self, arrays: Sequence[Array | None], out: Any) -> Any:
        """Run it on arrays with the layouts of the plan."""


# Plans by everything that they depend on; see `run`.
_PLANS: dict[object, Runnable] = {}
_MOST_PLANS = 512


def forget_plans() -> None:
    """Drop every plan that is kept."""
    _PLANS.clear()
    decide.cache_clear()


def run(
    make: Callable[..., Runnable],
    call: str,
    arrays: tuple[Array | None, ...],
    out: Any,
    options: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
    function: tuple[str, int] | None = None,
) -> Any:
    """Run a call, by a cached plan if there is one.

    ``make(call, arrays, out, options, more)`` checks a call and plans it; ``function``
    is added to ``more``: the name of a function of one rank, and the rank.
    """
    outs = out if type(out) is tuple else (out,)
    layouts = layouts_of((*arrays, *outs))
    try:
        # Bytes, in which 1, 1.0, True and np.int8(1) differ.
        given = options if more is None else (options, more)
        text: object = pickle.dumps(given, 5) if given else b""
    except Exception:  # noqa: BLE001 - objects raise whatever they like
        text = repr((options, more))
    is_on_host = layouts is None or type(arrays[0]) is np.ndarray
    captured = not is_on_host and is_capturing(arrays[0])
    key = call, function, layouts, type(out), text, settings(), captured
    plan = _PLANS.get(key)
    if plan is None or (plan.threads and plan.threads != backend_of(np).workers()):
        arrays = tuple(map(base_array, arrays))
        with stage("plan"):
            more = {**(more or {}), **({"function": function} if function else {})}
            plan = make(call, arrays, out, options, more)
        # An object that shows its address says nothing: another may have it later.
        is_clear = type(text) is bytes or " at 0x" not in str(text)
        if layouts is not None and is_clear:
            if len(_PLANS) >= _MOST_PLANS:
                _PLANS.clear()
            _PLANS[key] = plan
    elif out is not None:
        check_overlaps(plan.names, arrays, outs)
    return plan.run(arrays, out)


def check_overlaps(
    names: Sequence[str], arrays: Sequence[Array | None], outs: Sequence[Array | None]
) -> None:
    """Raise if an ``out`` may share memory with an input."""
    given = {n: a for n, a in zip(names, arrays, strict=False) if a is not None}
    xp = module_of(given)
    for out in outs:
        if out is not None:
            check_overlap(xp, out, given)
            given["out"] = out


def plan_convolution(
    call: str,
    arrays: tuple[Array | None, ...],
    out: Array | None,
    options: Mapping[str, Any],
    more: Mapping[str, Any],
) -> Runnable:
    """Check a convolution, and plan it."""
    request = _request(call, arrays, chosen_options(options), more, out)
    if any_dask(request.arrays.values()):
        from cuconv.dask import conv as dask_conv  # noqa: PLC0415 - it imports Dask

        return dask_conv.plan(request)
    plan = Plan(request)
    plan.check_result(out, request.arrays, captured=plan.captured)
    return plan


def _request(
    call: str,
    arrays: tuple[Array | None, ...],
    options: Options,
    more: Mapping[str, Any],
    out: Array | None = None,
) -> Request:
    """The request of a call whose arrays come in the order of `ROLES`."""
    names = (*ROLES[call], *ZERO_POINTS)
    given = named_inputs(dict(zip(names, arrays, strict=False)))
    zeros = {n[0]: given.pop(n, more.get(n)) for n in ZERO_POINTS}
    zeros = {name: zero for name, zero in zeros.items() if zero is not None}
    _check_rank(given.get("w"), given.get("x"), more)
    geometry = geometry_of(call, given, options, more)
    if any_dask(given.values()):
        if zeros:
            raise TypeError("x_zero_point and w_zero_point are not for Dask arrays")
        return Request(call, geometry, given, out, options, backend_of(np))
    xp = module_of(given if out is None else {**given, "out": out})
    if zeros:
        if options.dtype is None:
            options = options._replace(dtype=np.int32)
        checked = check_zero_points(zeros, given, geometry)
        given.update({f"{name}_zero_point": zero for name, zero in checked.items()})
    backend = backend_of(xp, next(iter(given.values())))
    return Request(call, geometry, given, out, options.settled(), backend)


def _check_rank(w: Array | None, x: Array | None, more: Mapping[str, Any]) -> None:
    """Raise if the rank of the weights is not that of the function."""
    name, rank = more.get("function", ("", None))
    if rank is not None and w is not None and w.ndim != rank + 2:
        kind = "channels, filters" if "transpose" in name else "filters, channels"
        without = x is not None and x.ndim == w.ndim == rank + 1
        hint = ": give both a channel axis, x[:, None], w[:, None]" if without else ""
        raise ValueError(
            f"{name} needs weights of {rank + 2} axes, for {kind} and space; w has "
            f"{w.ndim}{hint}"
        )


class GradientPlans:
    """The plans of the gradients that are needed, of (dy, x, w).

    ``w_shape`` is that of the gradient for w, where its plan gives another.
    """

    names = "dy", "x", "w"
    w_shape: tuple[int, ...] | None = None

    def __init__(self, plans: Mapping[Any, Runnable]) -> None:
        self._plans = plans
        self.threads = max((plan.threads for plan in plans.values()), default=0)

    def run(self, arrays: Sequence[Array | None], out: None) -> ConvGradients[Any]:
        """Run every plan."""
        dy, x, w = arrays
        operands = {"x": (dy, w), "w": (dy, x), "bias": (dy,)}
        # The sums of the bias first: the workspace of the others is kept.
        names = [name for name in ("bias", "x", "w") if name in self._plans]
        found = {n: self._plans[n].run(operands[n], out) for n in names}
        if self.w_shape is not None and "w" in found:
            found["w"] = found["w"].reshape(self.w_shape)
        return ConvGradients(**found)


def plan_gradients(
    call: str,
    arrays: tuple[Array | None, ...],
    out: None,
    options: Mapping[str, Any],
    more: Mapping[str, Any],
) -> GradientPlans:
    """Plan the gradients of a convolution that are needed; errors come first.

    ``call`` is the empty string, or ``"transpose_"`` for a transposed convolution.
    """
    del out
    chosen = chosen_options(options)
    dy, x, w = arrays
    named = named_inputs({"dy": dy, "x": x, "w": w})
    needs = check_needs(more["needs"], named, more["allocates"])
    geometry = geometry_of(f"{call}weight_grad", named, chosen, more)
    lazy = any_dask(named.values())
    if lazy:
        from cuconv.dask import conv as dask_conv  # noqa: PLC0415 - it imports Dask

        named = dask_conv.alike_operands(named, geometry, transposed=bool(call))
    shapes = {"x_shape": named["x"].shape, "w_shape": named["w"].shape}
    ends = {n: more[n] for n in ("output_padding", "output_size") if n in more}

    def plan(name: str) -> Runnable:
        op, other = {"x": ("input_grad", "w"), "w": ("weight_grad", "x")}[name]
        both = named["dy"], named[other]
        own = _request(
            f"{call}{op}",
            both,
            chosen,
            {**ends, f"{name}_shape": shapes[f"{name}_shape"]},
        )
        if lazy:
            return dask_conv.plan(own, like=named["x"])
        return Plan(own)

    def bias() -> Runnable:
        if lazy:
            return dask_conv.plan_bias_grad(geometry, named["dy"], chosen)
        channels = geometry.channels if call else geometry.filters
        backend = backend_of(module_of(named), dy)
        return BiasGrad(named["dy"], geometry, channels, chosen.settled(), backend)

    found, shortage = {}, Shortage()
    for name in GRADIENTS:
        if name in needs:
            with shortage:
                found[name] = bias() if name == "bias" else plan(name)
    shortage.check()
    return GradientPlans(found)


def check_needs(
    needs: Sequence[str],
    arrays: Mapping[str, Array],
    allocates: str,
    known: Sequence[str] = GRADIENTS,
) -> Sequence[str]:
    """Raise for names that are no gradients, and in a capture, as they allocate."""
    if not any_dask(arrays.values()):
        refuse_capture(backend_of(module_of(dict(arrays)), arrays["dy"]), allocates)
    several = isinstance(needs, (tuple, list, set, frozenset))
    if not several or any(name not in known for name in needs):
        raise ValueError(
            f"needs must be a tuple, list or set of names from {known}; got {needs!r}"
        )
    return needs
