"""The calls of pooling: options and arrays are checked and become a plan.

Dask arrays leave the road here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, TypeAlias, TypedDict

import numpy as np

from cuconv.arrays import (
    Array,
    DType,
    accumulator,
    any_dask,
    as_dtype,
    base_array,
    check_type,
    module_of,
    module_of_blocks,
    native,
    resolve_types,
)
from cuconv.choices import Layout, check_choice, check_options
from cuconv.engine.pool_plan import INDEX, limit_of, plan_of, warn_of_sums, y_shape
from cuconv.engine.pool_problem import MAXIMUM, MEAN, NORM, TAKE, PoolProblem
from cuconv.engine.problem import check_shape
from cuconv.geometry import (
    Padding,
    Sizes,
    WindowGeometry,
    as_index,
    check_axes,
    kernel_of_rank,
    unpooled_shape,
)

OutputSize: TypeAlias = int | Sequence[int | None] | None
Arrays: TypeAlias = tuple[Array | None, ...]
Named: TypeAlias = dict[str, Array]
Values: TypeAlias = Mapping[str, Any]


class PoolOptions(TypedDict, total=False):
    """The keyword options of every pooling with a kernel; see `cuconv.max_pool`."""

    stride: Sizes | None
    padding: Padding
    dilation: Sizes
    ceil_mode: bool
    cover_all: bool
    layout: Layout


class UnpoolOptions(TypedDict, total=False):
    """Those of `cuconv.max_unpool`."""

    stride: Sizes | None
    padding: Padding
    dilation: Sizes
    output_size: Sizes | None
    layout: Layout


class MeanOptions(PoolOptions, total=False):
    """Those of `cuconv.avg_pool` beside them."""

    count_include_pad: bool
    divisor_override: int | None


DEFAULTS: dict[str, Any] = {
    "stride": None,
    "padding": 0,
    "dilation": 1,
    "ceil_mode": False,
    "cover_all": False,
    "layout": "channels_first",
    "count_include_pad": True,
    "divisor_override": None,
    "output_size": None,
    "return_indices": False,
    "indices_over": "plane",
    "dtype": None,
    "out": None,
    "memory_limit": None,
}
# Options of a call that say nothing of its windows.
_OTHERS = {
    "max_pool": {"return_indices", "indices_over"},
    "max_pool_backward": {"indices_over"},
    "max_unpool": {"indices_over", "output_size"},
    "avg_pool": {"dtype"},
}


def plan_pool(
    call: str, arrays: Arrays, out: Any, options: Values, more: Values
) -> Any:
    """Check a pooling, or a gradient of one, and plan it.

    Parameters
    ----------
    call
        Name of the public function, without a rank.
    arrays
        Its arrays, in the order of `NAMES`.
    out
        What the results are written to, or None.
    options
        Its options; `DEFAULTS` has the others.
    more
        The windows: a ``kernel_size``, an ``output_size``, or ``batched`` alone for one
        over everything; the ``rank`` where that is fixed; and numbers that the call has
        beside them.
    """
    named = dict(zip(NAMES[call], arrays, strict=True))
    problem, given = _PROBLEMS[call](call, named, options, more)
    if problem.is_gradient:
        name = "x" if call == "max_unpool" else "dy"
        check_shape(name, given["dy"], y_shape(problem.geometry))
    limit = options.get("memory_limit")
    if any_dask(given.values()):
        from cuconv.dask import pooling as dask_pooling  # noqa: PLC0415 - it imports Dask

        return dask_pooling.plan(problem, given, out, limit_of(limit))
    names = _ROLES.get(call, NAMES[call])
    return plan_of(problem, given, out, limit, names)


NAMES = {
    "max_pool": ("x", "indices"),
    "max_unpool": ("x", "indices"),
    "avg_pool": ("x",),
    "lp_pool": ("x",),
    "max_pool_backward": ("dy", "indices", "x"),
    "avg_pool_backward": ("dy",),
    "lp_pool_backward": ("dy", "x", "y"),
}
# Unpooling is the gradient of pooling, of other arrays.
_ROLES = {"max_unpool": ("dy", "indices")}


def _geometry(
    call: str, shape: Sequence[int], options: Values, more: Values
) -> WindowGeometry:
    """The windows of a call over an array of this shape."""
    others = {"memory_limit", *_OTHERS.get(call, ())}
    own = {name: value for name, value in options.items() if name not in others}
    if "kernel_size" in more:
        kind = MeanOptions if call.startswith("avg") else PoolOptions
        return window_geometry(shape, more["kernel_size"], own, kind)
    _check_known(own, ["layout"])
    size = more.get("output_size", 0)
    if "batched" in more:
        size = (1,) * (len(shape) - 1 - more["batched"])
    return WindowGeometry.of_even(shape, size, **own)


def _x_geometry(call: str, x: Any, options: Values, more: Values) -> WindowGeometry:
    """The windows of a call over its input; what is no array is refused."""
    shape = _shape_of(x)
    return _geometry(call, shape, options, _of_rank(len(shape), more))


def _of_rank(ndim: int, more: Values) -> Values:
    """The windows of a function with a rank in its name, for an x of so many axes."""
    if "rank" not in more:
        return more
    rank, found = more["rank"], dict(more)
    check_axes(ndim, rank)
    if "batched" in more:
        found["batched"] = ndim == rank + 2
    if "kernel_size" in more:
        found["kernel_size"] = kernel_of_rank(more["kernel_size"], rank)
    size = more.get("output_size", ())
    if size is None or isinstance(size, int):
        found["output_size"] = (size,) * rank
    return found


def _shape_of(x: Any) -> tuple[int, ...]:
    module_of_blocks({"x": x})
    shape: tuple[int, ...] = x.shape
    return shape


def window_geometry(
    shape: Sequence[int],
    kernel_size: Sizes,
    options: Values,
    kind: type = PoolOptions,
) -> WindowGeometry:
    """The windows over an array of this shape."""
    _check_known(options, list(kind.__annotations__))
    chosen = {**DEFAULTS, **options}
    stride, covers = chosen["stride"], bool(chosen["cover_all"])
    return WindowGeometry.of(
        shape,
        kernel_size,
        stride=kernel_size if stride is None else stride,
        padding=chosen["padding"],
        dilation=chosen["dilation"],
        ceil_mode=bool(chosen["ceil_mode"]) or covers,
        cover_all=covers,
        layout=chosen["layout"],
    )


def _check_known(options: Values, names: list[str]) -> None:
    check_options(options, names)


def divided_by(options: Values) -> dict[str, Any]:
    """The divisor of a mean, as fields of a `PoolProblem`."""
    chosen = {**DEFAULTS, **options}
    divisor = chosen["divisor_override"]
    if divisor is not None:
        divisor = as_index("divisor_override", divisor)
        if not divisor:
            raise ValueError("divisor_override must not be 0")
    counts_padding = bool(chosen["count_include_pad"])
    return {"counts_padding": counts_padding, "divisor": divisor}


def _source_shape(x: Array | None, x_shape: Sequence[int] | None) -> Sequence[int]:
    if x is not None and x_shape is not None and tuple(x_shape) != x.shape:
        raise ValueError(f"x has shape {x.shape} and x_shape is {tuple(x_shape)}")
    shape = x_shape if x is None else x.shape
    if shape is None:
        raise TypeError("x_shape is None, and so is x: one of them must be given")
    return shape


def _checked(named: Mapping[str, Array | None]) -> Named:
    """Arrays by their names: of one module and one device, and of types we know."""
    given = {name: array for name, array in named.items() if array is not None}
    if any_dask(given.values()):
        module_of_blocks(given)
    else:
        module_of(given)
    for name, array in given.items():
        check_type(name, array.dtype)
    return {name: base_array(array) for name, array in given.items()}


def _over_array(options: Values) -> bool:
    """Whether indices count the elements of the whole array."""
    over = options.get("indices_over", "plane")
    return check_choice("indices_over", over, ("plane", "array")) == "array"


def _check_indices(indices: Array, geometry: WindowGeometry) -> None:
    check_shape("indices", indices, y_shape(geometry))
    if indices.dtype != INDEX:
        raise TypeError(f"indices have type {indices.dtype} and must have int64")


def _max(
    call: str, named: Named, options: Values, more: Values
) -> tuple[PoolProblem, Named]:
    geometry = _x_geometry(call, named["x"], options, more)
    given, over_array = _checked(named), _over_array(options)
    dtype, wanted = given["x"].dtype, bool(options.get("return_indices"))
    kind = TAKE if "indices" in given else MAXIMUM
    if kind == MAXIMUM:
        _check_ordered("x", dtype)
    elif wanted:
        raise TypeError("indices are given: return_indices must be False")
    else:
        _check_indices(given["indices"], geometry)
    problem = PoolProblem(
        kind,
        geometry,
        *(native(dtype),) * 3,
        with_indices=wanted,
        over_array=over_array,
    )
    return problem, given


def _max_gradient(
    call: str, named: Named, options: Values, more: Values
) -> tuple[PoolProblem, Named]:
    dy, indices, x = named.values()
    geometry = _geometry(call, _source_shape(x, more["x_shape"]), options, more)
    given = _checked(named)
    if (indices is None) == (x is None):
        both = "both" if x is not None else "neither"
        raise TypeError(f"indices or x must be given, one of them; got {both}")
    name = NAMES[call][0]
    if dy.dtype == bool:
        raise TypeError(f"{name} has type bool, which cannot be summed")
    over_array = _over_array(options)
    if indices is not None:
        _check_indices(indices, geometry)
    if x is not None:
        _check_ordered("x", x.dtype)
    dtype = native(dy.dtype)
    warn_of_sums(name, dtype, geometry)
    dtypes = dtype, accumulator(dtype), dtype
    values = None if x is None else native(x.dtype)
    problem = PoolProblem(
        MAXIMUM,
        geometry,
        *dtypes,
        is_gradient=True,
        values=values,
        over_array=over_array and x is None,
    )
    return problem, given


def _unpool(
    call: str, named: Named, options: Values, more: Values
) -> tuple[PoolProblem, Named]:
    """The gradient of pooling for arrays of this output size."""
    x, indices = named["x"], named["indices"]
    others = {"memory_limit", "indices_over"}
    own = {name: value for name, value in options.items() if name not in others}
    _check_known(own, list(UnpoolOptions.__annotations__))
    shape = _shape_of(x)
    windows = _of_rank(len(shape), more)
    shape = unpooled_shape(
        shape,
        windows["kernel_size"],
        **{
            name: own.get(name, DEFAULTS[name])
            for name in UnpoolOptions.__annotations__
        },
    )
    arrays = {"dy": x, "indices": indices, "x": None}
    return _max_gradient(call, arrays, options, {**windows, "x_shape": shape})


def _mean(
    call: str, named: Named, options: Values, more: Values
) -> tuple[PoolProblem, Named]:
    geometry = _x_geometry(call, named["x"], options, more)
    divided = divided_by(options)
    given = _checked(named)
    own, dtype = given["x"].dtype, options.get("dtype")
    result = _mean_type(own) if dtype is None else as_dtype(dtype)
    if result.kind in "biu":
        raise TypeError(f"a mean needs a real or complex dtype; got {result}")
    types = resolve_types(given, result)
    dtypes = own, types.accumulate, types.result
    return PoolProblem(MEAN, geometry, *dtypes, **divided), given


def _mean_gradient(
    call: str, named: Named, options: Values, more: Values
) -> tuple[PoolProblem, Named]:
    geometry = _geometry(call, more["x_shape"], options, more)
    divided = divided_by(options)
    given = _checked(named)
    own = given["dy"].dtype
    types = resolve_types(given, _mean_type(own))
    dtypes = own, types.accumulate, types.result
    return PoolProblem(MEAN, geometry, *dtypes, is_gradient=True, **divided), given


def _norm(
    call: str, named: Named, options: Values, more: Values
) -> tuple[PoolProblem, Named]:
    geometry = _x_geometry(call, named["x"], options, more)
    given, power = _checked(named), more["norm_type"]
    dtype = native(given["x"].dtype)
    for name, array in given.items():
        if array.dtype.kind not in "fV":
            raise TypeError(f"{name} has type {array.dtype}; lp_pool takes real floats")
        if native(array.dtype) != dtype:
            raise TypeError(f"{name} has type {array.dtype} and x has {dtype}")
    if not isinstance(power, Real):
        raise TypeError(f"norm_type must be a number; got {power!r}")
    if not 0 < float(power) < math.inf:
        raise ValueError(f"norm_type must be positive and finite; got {power}")
    dtypes = dtype, accumulator(dtype), dtype
    return PoolProblem(NORM, geometry, *dtypes, norm=float(power)), given


def _norm_gradient(
    call: str, named: Named, options: Values, more: Values
) -> tuple[PoolProblem, Named]:
    problem, given = _norm(call, named, options, more)
    check_shape("y", given["y"], y_shape(problem.geometry))
    return replace(problem, is_gradient=True), given


_PROBLEMS: dict[str, Callable[..., tuple[PoolProblem, Named]]] = {
    "max_pool": _max,
    "max_unpool": _unpool,
    "avg_pool": _mean,
    "lp_pool": _norm,
    "max_pool_backward": _max_gradient,
    "avg_pool_backward": _mean_gradient,
    "lp_pool_backward": _norm_gradient,
}


def _mean_type(dtype: DType) -> DType:
    return np.dtype(np.float64) if dtype.kind in "biu" else native(dtype)


def _check_ordered(name: str, dtype: DType) -> None:
    if dtype.kind == "c":
        raise TypeError(f"{name} has type {dtype}, and complex numbers have no maximum")
