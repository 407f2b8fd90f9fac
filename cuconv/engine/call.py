"""What all convolutions share: options, calls seen before, and gradients together."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, ParamSpec, TypedDict, TypeVar

import numpy as np

from cuconv.arrays import (
    Array,
    Types,
    any_dask,
    base_array,
    check_overlap,
    is_dask,
    module_of,
    module_of_blocks,
    resolve_types,
)
from cuconv.backends import Backend, backend_of, refuse_capture
from cuconv.config import settings
from cuconv.engine.plan import ROLES, Plan, signature
from cuconv.engine.rewrites import bind as bind_now
from cuconv.geometry import ConvGeometry, Padding, Sizes
from cuconv.memory import Buffer, MemoryLimit, MemoryLimitError, all_within
from cuconv.options import Options, spells_out
from cuconv.strategies.base import in_groups

GRADIENTS = ("x", "w", "bias")

P = ParamSpec("P")
R = TypeVar("R")


class ConvOptions(TypedDict, total=False):
    """The keyword options that every convolution takes; see `conv`."""

    stride: Sizes
    padding: Padding
    dilation: Sizes
    groups: int
    padding_mode: str
    input_dilation: Sizes
    batch_groups: int
    layout: str
    dtype: Any
    strategy: str
    precision: str | None
    deterministic: bool | None
    memory_limit: MemoryLimit


class ConvGradients(NamedTuple):
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

    x: Array | None = None
    w: Array | None = None
    bias: Array | None = None


def chosen_options(options: Any, known: Sequence[str] = Options._fields) -> Options:
    """The options with their defaults; an unknown one is refused by its name."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        words = ", ".join(known)
        raise TypeError(f"there is no option {unknown[0]!r}; the options are {words}")
    return Options(**options)


def shows_only(names: Sequence[str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Spell these of the ``**options`` out in the signature that `help` shows."""
    defaults = Options._field_defaults
    return spells_out({name: defaults[name] for name in defaults if name in names})


def shows_options(function: Callable[P, R]) -> Callable[P, R]:
    """Spell all ``**options`` out in the signature that `help` and editors show."""
    return shows_only(Options._fields)(function)


# Calls that have been checked and planned before, by everything that they depend on.
_SEEN: dict[tuple[object, ...], Plan] = {}
_MOST_SEEN = 1024


def carry_out(
    op: str,
    arrays: tuple[Array | None, ...],
    out: Array | None,
    options: ConvOptions,
    bound: Callable[[], Any],
    shape: object = None,
) -> Array:
    """Run a call: at once if one like it has been seen, else as ``bound`` finds it."""
    key = _key(op, arrays, out, options, shape)
    plan = None if key is None else _SEEN.get(key)
    if plan is None or not (
        plan.is_single_threaded or plan.threads == backend_of(np).workers()
    ):
        call = bound()
        if key is not None and call.plan.options.strategy != "benchmark":
            if len(_SEEN) >= _MOST_SEEN:
                _SEEN.clear()
            _SEEN[key] = call.plan
        return call.run()
    if out is not None:
        named = zip(ROLES[op], arrays, strict=False)
        check_overlap(np, out, {name: a for name, a in named if a is not None})
    return plan.run(arrays, out)


def _key(
    op: str,
    arrays: tuple[Array | None, ...],
    out: Array | None,
    options: ConvOptions,
    shape: object,
) -> tuple[object, ...] | None:
    """What a plan depends on; None where arrays are not plain NumPy's."""
    lies = signature((*arrays, out))
    if lies is None:
        return None
    # As text: 1, 1.0 and True are equal, and not the same option.  An object that
    # shows its address says nothing: another may have it later.
    text = repr((shape, options))
    return None if " at 0x" in text else (op, settings(), lies, text)


def inputs(bias: Array | None = None, **arrays: Array) -> dict[str, Array]:
    """Arrays of one module by their names, the bias last if there is one."""
    if bias is not None:
        arrays["bias"] = bias
    if any_dask(arrays.values()):
        module_of_blocks(arrays)
    else:
        module_of(arrays)
    return {name: base_array(array) for name, array in arrays.items()}


def bind(
    call: str,
    geometry: ConvGeometry,
    arrays: dict[str, Array],
    out: Array | None,
    options: Options,
    like: Array | None = None,
) -> Any:
    """Check arrays and options, and plan; of Dask arrays, what is known of the blocks.

    Returns
    -------
    Call or LazyCall
        Its ``run()`` gives the result.  A gradient for x has the blocks of ``like``,
        where that is a Dask array.
    """
    if any_dask(arrays.values()):
        from cuconv.dask import conv as lazy  # noqa: PLC0415 - it imports Dask

        return lazy.bind(call, geometry, arrays, out, options, like)
    return bind_now(call, geometry, arrays, out, options)


def check_needs(
    needs: Sequence[str],
    arrays: dict[str, Array],
    why: str,
    known: Sequence[str] = GRADIENTS,
) -> None:
    """Refuse names that are no gradients, and a capture for the reason ``why``."""
    if not any_dask(arrays.values()):
        refuse_capture(backend_of(module_of(arrays), arrays["dy"]), why)
    several = isinstance(needs, (tuple, list, set, frozenset))
    if not several or any(name not in known for name in needs):
        raise ValueError(
            f"needs must be several of {known}, as ({known[0]!r},); got {needs!r}"
        )


def gradients(
    arrays: dict[str, Array],
    needs: Sequence[str],
    geometry: ConvGeometry,
    options: Options,
    *,
    transposed: bool = False,
) -> ConvGradients:
    """The gradients that are needed, from (dy, x, w) by their names."""
    arrays = _alike(arrays, geometry, transposed=transposed)
    dy = arrays["dy"]
    prefix = "transpose_" if transposed else ""

    def bound(op: str, other: str) -> Any:
        both = {"dy": dy, other: arrays[other]}
        return bind(prefix + op, geometry, both, None, options, arrays["x"])

    channels = geometry.channels if transposed else geometry.filters
    # Every call is planned before the first one runs: errors come first.
    calls: dict[str, Callable[[], Any]] = {
        "x": lambda: bound("input_grad", "w"),
        "w": lambda: bound("weight_grad", "x"),
        "bias": lambda: bias_grad(geometry, channels, dy, options),
    }
    planned = all_within({name: calls[name] for name in GRADIENTS if name in needs})
    return ConvGradients(**{name: call.run() for name, call in planned.items()})


def _alike(
    arrays: dict[str, Array], geometry: ConvGeometry, *, transposed: bool
) -> dict[str, Array]:
    """With dy and x as Dask arrays where any array is one."""
    if not any_dask(arrays.values()):
        return arrays
    from cuconv.dask import conv as lazy  # noqa: PLC0415 - it imports Dask

    # What is x to the convolution that runs, and what its dy.
    x, dy = ("dy", "x") if transposed else ("x", "dy")
    both = lazy.alike(arrays[x], arrays[dy], geometry)
    return {**arrays, **dict(zip((x, dy), both, strict=True))}


class _BiasGrad(NamedTuple):
    """The gradient for the bias: the sum of dy over images and positions."""

    geometry: ConvGeometry
    dy: Array
    types: Types
    backend: Backend

    def run(self) -> Array:
        cells = in_groups(self.dy, self.geometry)
        axes = (0, *range(3, cells.ndim))
        sums = []

        def body(worker: int) -> None:
            del worker
            sums.append(cells.sum(axis=axes, dtype=self.types.accumulate))

        with self.backend.device_of(self.dy):
            self.backend.parallel(body, 1)
            return sums[0].reshape(-1).astype(self.types.result, copy=False)


def bias_grad(
    geometry: ConvGeometry, channels: int, dy: Array, options: Options
) -> Any:
    """The gradient of a bias of so many channels, which fits the limit."""
    options = options.settled()
    types = resolve_types({"dy": dy}, options.dtype)
    if is_dask(dy):
        from cuconv.dask import conv as lazy  # noqa: PLC0415 - it imports Dask

        return lazy.DaskCall(partial(lazy.bias_grad, dy, geometry, types))
    backend = backend_of(module_of({"dy": dy}), dy)
    itemsize = types.accumulate.itemsize
    sums = Buffer("sums", channels, types.accumulate)
    needed = backend.overhead(1, itemsize) + sums.nbytes
    limit = options.memory_limit
    if isinstance(limit, int) and limit < needed:
        raise MemoryLimitError(limit, needed, "the gradient of the bias")
    return _BiasGrad(geometry, dy, types, backend)
