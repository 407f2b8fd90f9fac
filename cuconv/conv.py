"""Convolution and its gradients: validate, plan, run."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypedDict, TypeVar, Unpack

from cuconv.arrays import (
    Array,
    DType,
    Types,
    check_out,
    check_overlap,
    is_aligned,
    is_matrix_ready,
    module_of,
    plain,
    resolve_types,
)
from cuconv.geometry import ConvGeometry, Padding, Sizes
from cuconv.leaves import Leaves, leaves_of
from cuconv.memory import Buffer, MemoryLimit, MemoryLimitError, parse_memory_limit
from cuconv.plan import Plan, make_plan
from cuconv.strategies import Problem
from cuconv.strategies.base import in_groups

PRECISIONS = ("strict", "standard", "fast")
GRADIENTS = ("x", "w", "bias")

P = ParamSpec("P")
R = TypeVar("R")


class ConvOptions(TypedDict, total=False):
    """The keyword options that every convolution takes; see `conv`."""

    stride: Sizes
    padding: Padding
    dilation: Sizes
    groups: int
    layout: str
    dtype: Any
    strategy: str
    precision: str
    deterministic: bool | None
    memory_limit: MemoryLimit


class ConvGradients(NamedTuple):
    """The gradients of one convolution; None where one was not asked for."""

    x: Array | None = None
    w: Array | None = None
    bias: Array | None = None


class Options(NamedTuple):
    """`ConvOptions` with their defaults, the one place where these are written."""

    stride: Sizes = 1
    padding: Padding = 0
    dilation: Sizes = 1
    groups: int = 1
    layout: str = "channels_first"
    dtype: Any = None
    strategy: str = "auto"
    precision: str = "standard"
    deterministic: bool | None = None
    memory_limit: MemoryLimit = None

    def geometry(self, x_shape: Sequence[int], w_shape: Sequence[int]) -> ConvGeometry:
        return ConvGeometry.of_weights(
            x_shape,
            w_shape,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            layout=self.layout,
        )


def _chosen(options: ConvOptions) -> Options:
    """The options with their defaults; an unknown one is refused by its name."""
    unknown = sorted(set(options) - set(Options._fields))
    if unknown:
        known = ", ".join(Options._fields)
        raise TypeError(f"there is no option {unknown[0]!r}; the options are {known}")
    chosen = Options(**options)
    if chosen.deterministic not in (None, True, False):
        raise TypeError(
            f"deterministic must be True, False or None; got {chosen.deterministic!r}"
        )
    for name in ("strategy", "precision"):
        if not isinstance(options.get(name, ""), str):
            raise TypeError(f"{name} must be a word; got {options.get(name)!r}")
    return chosen


def _shows_options(function: Callable[P, R]) -> Callable[P, R]:
    """Spell ``**options`` out in the signature that `help` and editors show."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    spelled = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in Options._field_defaults.items()
    ]
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own, *spelled]
    )
    return function


class _Call(NamedTuple):
    """One validated and planned call; nothing is allocated before `run`."""

    plan: Plan
    xp: Any
    arrays: dict[str, Array]
    out: Array | None
    shape: tuple[int, ...]

    def run(self) -> Array:
        problem, leaves = self.plan.problem, leaves_of(self.xp)
        first, second, *bias = self.arrays.values()
        with leaves.device_of(first):
            result = self.out
            if result is None:
                result = self.xp.empty(self.shape, dtype=problem.types.result)
            out = plain(result)
            if problem.geometry.multiplications == 0:
                _fill(out, *bias, geometry=problem.geometry)
            elif problem.op == "forward":
                self.plan.run(self.xp, first, second, bias[0] if bias else None, out)
            else:
                self.plan.run(self.xp, first, second, out)
        return result


def _fill(out: Array, bias: Array | None = None, *, geometry: ConvGeometry) -> None:
    """The sum over nothing: zero, or the bias."""
    out[...] = 0
    if bias is not None and out.size:
        ones = (1,) * geometry.rank
        in_groups(out, geometry)[...] = bias.reshape(1, geometry.groups, -1, *ones)


def _inputs(bias: Array | None = None, **arrays: Array) -> dict[str, Array]:
    if bias is not None:
        arrays["bias"] = bias
    module_of(arrays)
    return {name: plain(array) for name, array in arrays.items()}


def prepare(
    op: str,
    geometry: ConvGeometry,
    arrays: dict[str, Array],
    out: Array | None,
    options: Options,
) -> _Call:
    """Check, plan, and say what would be run."""
    xp = module_of(arrays if out is None else {**arrays, "out": out})
    leaves = leaves_of(xp)
    types = resolve_types(arrays, options.dtype)
    shape = {
        "forward": geometry.y_shape,
        "input_grad": geometry.x_shape,
        "weight_grad": geometry.w_shape,
    }[op]
    if out is not None:
        check_out(out, shape, types.result)
        check_overlap(xp, out, arrays)
    if options.precision not in PRECISIONS:
        words = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"precision must be one of {words}; got {options.precision!r}")
    operand = leaves.operand_type(types)
    direct = _direct_inputs(op, geometry, arrays, operand, leaves)
    if _is_direct_out(op, geometry, out, types, leaves):
        direct |= {"out"}
    problem = Problem(
        op=op,
        geometry=geometry,
        types=types,
        operand=operand,
        source=arrays["dy" if op == "input_grad" else "x"].dtype,
        direct=direct,
        has_bias="bias" in arrays,
        deterministic=options.deterministic is not False,
        fast=options.precision == "fast",
    )
    plan = make_plan(problem, xp, options.strategy, options.memory_limit)
    return _Call(plan, xp, arrays, out, shape)


def _direct_inputs(
    op: str,
    geometry: ConvGeometry,
    arrays: dict[str, Array],
    operand: DType,
    leaves: Leaves,
) -> frozenset[str]:
    """The inputs that can be multiplied where they lie."""
    ready = set()
    for name, array in arrays.items():
        if array.dtype != operand or name == "bias":
            continue
        if name == "w":
            conjugated = op == "input_grad" and operand.kind == "c"
            fits = array.flags.c_contiguous and is_aligned(array) and not conjugated
        else:
            cells = in_groups(array, geometry)
            fits = is_matrix_ready(cells, geometry.rank, leaves.largest_step)
        if fits:
            ready.add(name)
    return frozenset(ready)


def _is_direct_out(
    op: str, geometry: ConvGeometry, out: Array | None, types: Types, leaves: Leaves
) -> bool:
    """Whether products can be written to the result where it lies."""
    if not leaves.can_store(types, types.result):
        return False
    if out is None:
        return geometry.positions <= leaves.largest_step
    if op == "weight_grad":
        return bool(out.flags.c_contiguous) and is_aligned(out)
    cells = in_groups(plain(out), geometry)
    return is_matrix_ready(cells, geometry.rank, leaves.largest_step)


def _check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape} and must have {shape}")


@_shows_options
def conv(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    **options: Unpack[ConvOptions],
) -> Array:
    """Convolve a batch of multi-channel arrays with a bank of filters.

    As everywhere in deep learning this is cross-correlation: the filters are not
    flipped.  With ``o`` an output position, ``t`` a tap and ``i = o · stride +
    t · dilation - padding``,

        y[n, k, o] = bias[k] + Σ over c, t of x[n, c, i] · w[k, c, t]

    Parameters
    ----------
    x
        Input, (N, C, *spatial), or (C, *spatial) for a single image.
    w
        Filters, (K, C / groups, *kernel).  With ``layout="channels_last"``: x is
        (N, *spatial, C) and w is (*kernel, C / groups, K).
    bias
        (K,), added to every output position.
    out
        Array to write the result to; it must have its shape and type, and share no
        memory with the inputs.
    stride, dilation
        Step between windows and between taps: an integer, or one for each axis.
    padding
        Zeros around the input, in cells: an integer, one for each axis, or (before,
        after) pairs; negative numbers crop.  Or a word: ``"valid"`` is no padding,
        ``"same"`` makes the output ceil(size / stride) long with the extra cell after,
        ``"same_lower"`` with the extra cell before.
    groups
        Split channels and filters into groups that do not see each other; ``groups=C``
        is depthwise convolution.
    layout
        ``"channels_first"`` or ``"channels_last"``; NCHW, NHWC and their kin in one and
        three dimensions are accepted too.
    dtype
        Type of the result; by default NumPy's common type of the arrays.  float16 and
        bfloat16 are summed in float32, everything else in the common type of arrays
        and result.
    strategy
        ``"auto"``, or the name of one: ``"im2col"``, ``"pointwise"``.
    precision
        ``"strict"``, ``"standard"`` or ``"fast"``; with fast, CUDA may multiply float32
        as TF32.
    deterministic
        True: the same bits on every run.  False: CUDA may add in any order where that
        avoids work (`col2im` by atomic additions).  None: decided by the library, today
        as True.
    memory_limit
        Upper bound on everything allocated beyond inputs and result: bytes, or a word
        such as ``"64 MiB"``.  By default 64 MiB with NumPy and 256 MiB with CuPy, or
        the least that will do where that is more.

    Returns
    -------
    array
        (N, K, *out) in the module of the inputs; without the batch axis if ``x`` has
        none.  Along each axis out = (size + padding - dilation · (kernel - 1) - 1) //
        stride + 1.

    Raises
    ------
    ValueError, TypeError
        For shapes, types, devices or options that do not fit, before anything is
        allocated; the message names the numbers.
    MemoryLimitError
        If nothing fits under ``memory_limit``; it names the smallest that would do.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
    >>> w = np.ones((1, 1, 2, 2))
    >>> cuconv.conv(x, w, stride=2)
    array([[[[10., 18.],
             [42., 50.]]]])
    """
    chosen = _chosen(options)
    arrays = _inputs(x=x, w=w, bias=bias)
    geometry = chosen.geometry(x.shape, w.shape)
    if bias is not None:
        _check_shape("bias", bias, (geometry.filters,))
    return prepare("forward", geometry, arrays, out, chosen).run()


def _conv_of_rank(rank: int, x: Array, w: Array, *rest: Any, **options: Any) -> Array:
    axes = getattr(w, "ndim", rank + 2)
    if axes != rank + 2:
        raise ValueError(f"conv{rank}d needs weights of {rank + 2} axes; w has {axes}")
    return conv(x, w, *rest, **options)


@_shows_options
def conv1d(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    **options: Unpack[ConvOptions],
) -> Array:
    """`conv` over one spatial axis: x (N, C, L), w (K, C / groups, kernel).

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.arange(6.0).reshape(1, 1, 6)
    >>> cuconv.conv1d(x, np.array([[[-1.0, 0.0, 1.0]]]))
    array([[[2., 2., 2., 2.]]])
    """
    return _conv_of_rank(1, x, w, bias, out=out, **options)


@_shows_options
def conv2d(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    **options: Unpack[ConvOptions],
) -> Array:
    """`conv` over two spatial axes: x (N, C, H, W), w (K, C / groups, *kernel).

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.zeros((8, 64, 56, 56), dtype=np.float32)
    >>> w = np.zeros((64, 64, 3, 3), dtype=np.float32)
    >>> cuconv.conv2d(x, w, padding=1).shape
    (8, 64, 56, 56)
    """
    return _conv_of_rank(2, x, w, bias, out=out, **options)


@_shows_options
def conv3d(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    **options: Unpack[ConvOptions],
) -> Array:
    """`conv` over three spatial axes: x (N, C, D, H, W), w (K, C / groups, *kernel).

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, w = np.ones((1, 2, 3, 4, 5)), np.ones((1, 2, 3, 3, 3))
    >>> cuconv.conv3d(x, w)
    array([[[[[54., 54., 54.],
              [54., 54., 54.]]]]])
    """
    return _conv_of_rank(3, x, w, bias, out=out, **options)


@_shows_options
def conv_input_grad(
    dy: Array,
    w: Array,
    x_shape: Sequence[int],
    *,
    out: Array | None = None,
    **options: Unpack[ConvOptions],
) -> Array:
    """The gradient of `conv` for its input.

    Each cell of the input receives, from every window over it, ``dy`` times the weight
    it met there (conjugated where complex): the adjoint of ``x ↦ conv(x, w)``.

    Parameters
    ----------
    dy
        Gradient for the output, (N, K, *out).
    w
        Filters, (K, C / groups, *kernel).
    x_shape
        Shape of the input, which strides leave open.
    out, **options
        As for `conv`; ``dtype`` defaults to the common type of ``dy`` and ``w``.

    Returns
    -------
    array
        Of shape ``x_shape``.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `conv` does, and if ``dy`` has not the shape of its output.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> dy, w = np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2))
    >>> cuconv.conv_input_grad(dy, w, (1, 1, 3, 3))
    array([[[[1., 2., 1.],
             [2., 4., 2.],
             [1., 2., 1.]]]])
    """
    chosen = _chosen(options)
    arrays = _inputs(dy=dy, w=w)
    geometry = chosen.geometry(x_shape, w.shape)
    _check_shape("dy", dy, geometry.y_shape)
    return prepare("input_grad", geometry, arrays, out, chosen).run()


@_shows_options
def conv_weight_grad(
    dy: Array,
    x: Array,
    w_shape: Sequence[int],
    *,
    out: Array | None = None,
    **options: Unpack[ConvOptions],
) -> Array:
    """The gradient of `conv` for its weights.

    Each weight receives the sum, over images and output positions, of ``dy`` times the
    input it met (conjugated where complex): the adjoint of ``w ↦ conv(x, w)``.

    Parameters
    ----------
    dy
        Gradient for the output, (N, K, *out).
    x
        Input, (N, C, *spatial).
    w_shape
        Shape of the weights, (K, C / groups, *kernel).
    out, **options
        As for `conv`; ``dtype`` defaults to the common type of ``dy`` and ``x``.

    Returns
    -------
    array
        Of shape ``w_shape``.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `conv` does, and if ``dy`` has not the shape of its output.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, dy = np.arange(9.0).reshape(1, 1, 3, 3), np.ones((1, 1, 2, 2))
    >>> cuconv.conv_weight_grad(dy, x, (1, 1, 2, 2))
    array([[[[ 8., 12.],
             [20., 24.]]]])
    """
    chosen = _chosen(options)
    arrays = _inputs(dy=dy, x=x)
    geometry = chosen.geometry(x.shape, w_shape)
    _check_shape("dy", dy, geometry.y_shape)
    return prepare("weight_grad", geometry, arrays, out, chosen).run()


@_shows_options
def conv_backward(
    dy: Array,
    x: Array,
    w: Array,
    *,
    needs: Sequence[str] = GRADIENTS,
    **options: Unpack[ConvOptions],
) -> ConvGradients:
    """All gradients of `conv`, or those that are needed.

    Parameters
    ----------
    dy
        Gradient for the output, (N, K, *out).
    x, w
        Input and weights of the forward call.
    needs
        Which of ``"x"``, ``"w"``, ``"bias"`` to compute; the others cost nothing.
    **options
        As for `conv`, the same as in the forward call.

    Returns
    -------
    ConvGradients
        Named tuple ``(x, w, bias)`` with the shapes of the three, None for a gradient
        that was not asked for.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `conv` does, before the first gradient is computed.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x, w = np.ones((1, 1, 3, 3)), np.ones((1, 1, 2, 2))
    >>> dy = np.ones((1, 1, 2, 2))
    >>> gradients = cuconv.conv_backward(dy, x, w, needs=("w", "bias"))
    >>> gradients.w, gradients.bias, gradients.x
    (array([[[[4., 4.],
             [4., 4.]]]]), array([4.]), None)
    """
    chosen = _chosen(options)
    arrays = _inputs(dy=dy, x=x, w=w)
    several = isinstance(needs, (tuple, list, set, frozenset))
    if not several or any(name not in GRADIENTS for name in needs):
        raise ValueError(f"needs must be several of {GRADIENTS}; got {needs!r}")
    geometry = chosen.geometry(x.shape, w.shape)
    _check_shape("dy", dy, geometry.y_shape)
    dy, x, w = arrays.values()
    # Every call is planned before the first one runs: errors come first.
    calls = {
        "x": lambda: prepare("input_grad", geometry, {"dy": dy, "w": w}, None, chosen),
        "w": lambda: prepare("weight_grad", geometry, {"dy": dy, "x": x}, None, chosen),
        "bias": lambda: _bias_grad(geometry, dy, chosen),
    }
    planned = _prepare_all({name: calls[name] for name in GRADIENTS if name in needs})
    return ConvGradients(**{name: call.run() for name, call in planned.items()})


def _prepare_all(calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Prepare every call, or name the memory limit that would do for all."""
    planned, errors = {}, []
    for name, prepare in calls.items():
        try:
            planned[name] = prepare()
        except MemoryLimitError as error:
            errors.append(error)
    if errors:
        raise max(errors, key=lambda error: error.smallest)
    return planned


class _BiasGrad(NamedTuple):
    """The gradient for the bias: the sum of dy over images and positions."""

    geometry: ConvGeometry
    dy: Array
    types: Types
    leaves: Leaves

    def run(self) -> Array:
        cells = in_groups(self.dy, self.geometry)
        axes = (0, *range(3, cells.ndim))
        sums = []

        def body(worker: int) -> None:
            del worker
            sums.append(cells.sum(axis=axes, dtype=self.types.accumulate))

        with self.leaves.device_of(self.dy):
            self.leaves.parallel(body, 1)
            return sums[0].reshape(-1).astype(self.types.result, copy=False)


def _bias_grad(geometry: ConvGeometry, dy: Array, options: Options) -> _BiasGrad:
    types = resolve_types({"dy": dy}, options.dtype)
    leaves = leaves_of(module_of({"dy": dy}))
    itemsize = types.accumulate.itemsize
    sums = Buffer("sums", geometry.filters, types.accumulate)
    needed = leaves.overhead(1, itemsize) + sums.nbytes
    if options.memory_limit is not None:
        limit = parse_memory_limit(options.memory_limit)
        if limit < needed:
            raise MemoryLimitError(limit, needed, "the gradient of the bias")
    return _BiasGrad(geometry, dy, types, leaves)
