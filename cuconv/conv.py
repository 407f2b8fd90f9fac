"""Convolution and its gradients: validate, plan, run."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypedDict, TypeVar, Unpack

import numpy as np

from cuconv.arrays import (
    Array,
    Types,
    check_overlap,
    module_of,
    plain,
    resolve_types,
)
from cuconv.config import settings
from cuconv.geometry import ConvGeometry, Padding, Sizes
from cuconv.leaves import Leaves, leaves_of, leaves_on, refuse_capture
from cuconv.memory import Buffer, MemoryLimit, MemoryLimitError
from cuconv.plan import (
    OPERANDS,
    Call,
    Options,
    Plan,
    bind,
    check_shape,
    plan_of_shapes,
    signature,
)
from cuconv.strategies.base import in_groups

GRADIENTS = ("x", "w", "bias")

_BACKWARD_ALLOCATES = (
    "conv_backward allocates its results: call conv_input_grad and conv_weight_grad "
    "with out=, and sum dy for the bias"
)

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
    precision: str | None
    deterministic: bool | None
    memory_limit: MemoryLimit


class ConvGradients(NamedTuple):
    """The gradients of one convolution; None where one was not asked for."""

    x: Array | None = None
    w: Array | None = None
    bias: Array | None = None


def _chosen(options: ConvOptions) -> Options:
    """The options with their defaults; an unknown one is refused by its name."""
    unknown = sorted(set(options) - set(Options._fields))
    if unknown:
        known = ", ".join(Options._fields)
        raise TypeError(f"there is no option {unknown[0]!r}; the options are {known}")
    return Options(**options)


def _shows_options(function: Callable[P, R]) -> Callable[P, R]:
    """Spell ``**options`` out in the signature that `help` and editors show."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    spelled = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in Options._field_defaults.items()
        if name not in signature.parameters
    ]
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own, *spelled]
    )
    return function


# Calls that have been checked and planned before, by everything that they depend on.
_SEEN: dict[tuple[object, ...], Plan] = {}
_MOST_SEEN = 1024


def _call(
    op: str,
    arrays: tuple[Array | None, ...],
    out: Array | None,
    options: ConvOptions,
    bound: Callable[[], Call],
    shape: object = None,
) -> Array:
    """Run a call: at once if one like it has been seen, else as ``bound`` finds it."""
    key = _key(op, arrays, out, options, shape)
    plan = None if key is None else _SEEN.get(key)
    if plan is None or not (plan.is_light or plan.threads == leaves_of(np).workers()):
        call = bound()
        if key is not None and call.plan.options.strategy != "benchmark":
            if len(_SEEN) >= _MOST_SEEN:
                _SEEN.clear()
            _SEEN[key] = call.plan
        return call.run()
    if out is not None:
        named = zip(OPERANDS[op], arrays, strict=False)
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


def _inputs(bias: Array | None = None, **arrays: Array) -> dict[str, Array]:
    if bias is not None:
        arrays["bias"] = bias
    module_of(arrays)
    return {name: plain(array) for name, array in arrays.items()}


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
        ``"auto"``, ``"benchmark"`` to time the candidates on these arrays and remember
        the fastest, or the name of one: ``"im2col"``, ``"pointwise"``,
        ``"tap_matmul"``, ``"winograd"``, ``"depthwise"``, ``"fft"``.
    precision
        ``"strict"``: every result is a plain sum of products.  ``"standard"``: Winograd
        too, in tiles of up to 6 cells: float32 within 1e-5 of the largest result, and
        a NaN spreads over its tile.  ``"fast"``: Winograd in tiles of 8, the Fourier
        transform (both within 1e-4), and TF32 on CUDA.  None: as `cuconv.config` says,
        else standard.
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

    def bound() -> Call:
        chosen = _chosen(options)
        arrays = _inputs(x=x, w=w, bias=bias)
        geometry = chosen.geometry(x.shape, w.shape)
        if bias is not None:
            check_shape("bias", bias, (geometry.filters,))
        return bind("forward", geometry, arrays, out, chosen)

    return _call("forward", (x, w, bias), out, options, bound)


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

    def bound() -> Call:
        chosen = _chosen(options)
        arrays = _inputs(dy=dy, w=w)
        geometry = chosen.geometry(x_shape, w.shape)
        check_shape("dy", dy, geometry.y_shape)
        return bind("input_grad", geometry, arrays, out, chosen)

    return _call("input_grad", (dy, w), out, options, bound, x_shape)


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

    def bound() -> Call:
        chosen = _chosen(options)
        arrays = _inputs(dy=dy, x=x)
        geometry = chosen.geometry(x.shape, w_shape)
        check_shape("dy", dy, geometry.y_shape)
        return bind("weight_grad", geometry, arrays, out, chosen)

    return _call("weight_grad", (dy, x), out, options, bound, w_shape)


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
    refuse_capture(leaves_of(module_of(arrays), dy), _BACKWARD_ALLOCATES)
    several = isinstance(needs, (tuple, list, set, frozenset))
    if not several or any(name not in GRADIENTS for name in needs):
        raise ValueError(f"needs must be several of {GRADIENTS}; got {needs!r}")
    geometry = chosen.geometry(x.shape, w.shape)
    check_shape("dy", dy, geometry.y_shape)
    dy, x, w = arrays.values()
    # Every call is planned before the first one runs: errors come first.
    calls = {
        "x": lambda: bind("input_grad", geometry, {"dy": dy, "w": w}, None, chosen),
        "w": lambda: bind("weight_grad", geometry, {"dy": dy, "x": x}, None, chosen),
        "bias": lambda: _bias_grad(geometry, dy, chosen),
    }
    planned = _prepare_all({name: calls[name] for name in GRADIENTS if name in needs})
    return ConvGradients(**{name: call.run() for name, call in planned.items()})


def _prepare_all(calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Prepare every call, or name the memory limit that would do for all."""
    planned, errors = {}, []
    for name, planning in calls.items():
        try:
            planned[name] = planning()
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
    options = options.settled()
    types = resolve_types({"dy": dy}, options.dtype)
    leaves = leaves_of(module_of({"dy": dy}), dy)
    itemsize = types.accumulate.itemsize
    sums = Buffer("sums", geometry.filters, types.accumulate)
    needed = leaves.overhead(1, itemsize) + sums.nbytes
    limit = options.memory_limit
    if isinstance(limit, int) and limit < needed:
        raise MemoryLimitError(limit, needed, "the gradient of the bias")
    return _BiasGrad(geometry, dy, types, leaves)


@_shows_options
def plan_conv(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    *,
    op: str = "forward",
    bias: bool = False,
    device: str = "cpu",
    **options: Unpack[ConvOptions],
) -> Plan:
    """Plan a convolution without running it: which strategy, why, and what it costs.

    Parameters
    ----------
    x_shape, w_shape
        Shapes of input and weights, as for `conv`.
    op
        ``"forward"``, ``"input_grad"`` or ``"weight_grad"``.
    bias
        Whether there is one.
    device
        ``"cpu"`` for NumPy; for CuPy ``"cuda"``, the current device, or one by its
        number: ``"cuda:1"``.
    **options
        As for `conv`; ``dtype`` is the type of all arrays, float32 by default.

    Returns
    -------
    Plan
        Print it to read it; call it with arrays to run it; ``plan.prepare(w)`` gives
        the same plan with the weights transformed once.

    Raises
    ------
    ValueError, TypeError, MemoryLimitError
        As `conv` does.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> plan = cuconv.plan_conv((8, 64, 56, 56), (64, 64, 3, 3), padding=1)
    >>> plan.strategy
    'winograd'
    >>> x = np.ones((8, 64, 56, 56), dtype=np.float32)
    >>> w = np.ones((64, 64, 3, 3), dtype=np.float32)
    >>> plan(x, w).shape
    (8, 64, 56, 56)
    >>> prepared = plan.prepare(w)
    >>> prepared(x).shape
    (8, 64, 56, 56)
    """
    chosen = _chosen({"dtype": "float32", **options})
    if op not in OPERANDS:
        words = ", ".join(map(repr, OPERANDS))
        raise ValueError(f"op must be one of {words}; got {op!r}")
    geometry = chosen.geometry(x_shape, w_shape)
    shapes = {"x": geometry.x_shape, "w": geometry.w_shape, "dy": geometry.y_shape}
    shapes = {name: shapes[name] for name in OPERANDS[op] if name != "bias"}
    if bias and op == "forward":
        shapes["bias"] = (geometry.filters,)
    return plan_of_shapes(op, shapes, leaves_on(device), geometry, chosen)
