"""Pooling and its gradients: hand every call to the engine."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import (
    Any,
    Literal,
    ParamSpec,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    get_type_hints,
)

from cuconv.arrays import Array, ArrayT
from cuconv.choices import Layout
from cuconv.docstrings import shares
from cuconv.engine.call import run
from cuconv.engine.pool import (
    DEFAULTS,
    MeanOptions,
    OutputSize,
    PoolOptions,
    UnpoolOptions,
    plan_pool,
)
from cuconv.geometry import Sizes
from cuconv.memory import MemoryLimit
from cuconv.options import documented_as, spells_out

P = ParamSpec("P")
R = TypeVar("R")
IndicesOver: TypeAlias = Literal["plane", "array"]


class _Outside(TypedDict, total=False):
    out: Any
    memory_limit: MemoryLimit


class _Pool(PoolOptions, _Outside, total=False):
    pass


class _MaxGradient(_Pool, total=False):
    indices_over: IndicesOver


class _MaxPool(_MaxGradient, total=False):
    return_indices: bool


class _Unpool(UnpoolOptions, _Outside, total=False):
    indices_over: IndicesOver


class _MeanGradient(MeanOptions, _Outside, total=False):
    pass


class _MeanPool(_MeanGradient, total=False):
    dtype: Any


class _EvenGradient(_Outside, total=False):
    layout: Layout


class _EvenMaxGradient(_EvenGradient, total=False):
    indices_over: IndicesOver


class _EvenMax(_EvenMaxGradient, total=False):
    return_indices: bool


class _EvenMean(_EvenGradient, total=False):
    dtype: Any


_SECTIONS = {
    "*planes": """
(N, C, *spatial), or (N, *spatial, C) with ``layout="channels_last"``, of one to three
spatial axes.
""",
    "*windows over planes": """
{*planes}
The batch axis may be missing if ``kernel_size`` names every axis.
""",
    "x: real": "{*windows over planes}\nAny real type.",
    "x: any": "{*windows over planes}\nAny type.",
    "x: unpooled": "{*planes}\nAny type but bool.",
    "padding: unpooled": """
Padding that the windows have: an integer, one for each axis, (before, after) pairs, or
one of the words of `cuconv.conv`.  The result has none.
""",
    "x: float": "{*windows over planes}\nfloat16, bfloat16, float32 or float64.",
    "x: adaptive": """
{*planes}
The batch axis may be missing if ``output_size`` names every axis.  Any real type; means
take complex ones too.
""",
    "x: global": "{*planes}\nAny real type; means take complex ones too.",
    "x: input": "Input of `lp_pool`, of the type of ``dy``.",
    "y": "Its output.",
    "x: found": """
The input, where ``indices`` are None: the cells are then found once more.
""",
    "dy": "Gradient for the output, of its shape.",
    "*indices": """
What the forward call returned with ``return_indices=True`` for the same options, int64:
each is the index of an element under its window, or -1 for none.  NumPy arrays are
checked while the result is computed; on CUDA, where that would wait for the device,
another index is taken for -1.
""",
    "indices": "{*indices}",
    "indices: or None": "{*indices}\nOr None.",
    "indices: taken": """
Indices of `max_pool` with the same options: take the elements there in place of the
maxima, and 0 where an index is -1.  This is linear in ``x``, the adjoint of
`max_pool_backward` and of `max_unpool`: the second derivative of the maximum.
""",
    "indices_over": """
What an index counts: ``"plane"``, the elements of its plane row by row, as in PyTorch;
or ``"array"``, those of the whole array in its layout, as in ONNX, so that
``x.reshape(-1)[indices]`` are the maxima.
""",
    "x_shape": "Shape of the input.",
    "x_shape: optional": "Shape of the input; None where ``x`` is given.",
    "kernel_size": """
Taps along each axis: one number for a batched ``x``, or one for each axis.
""",
    "norm_type": "The power p, positive and finite: 1 gives sums, 2 Euclidean norms.",
    "output_size": """
Windows along each axis: one number for a batched ``x``, or one for each axis; None
keeps the size of an axis.
""",
    "batched": "Whether the input has a batch axis.",
    "stride": """
Step between windows: an integer, or one for each axis; None is the kernel size, so that
windows lie side by side.
""",
    "padding: least": """
Cells around the input that count as the least value: an integer, one for each axis,
(before, after) pairs, or one of the words of `cuconv.conv`.  Negative numbers crop.
More than half a kernel is allowed.
""",
    "padding: zero": """
Cells around the input that count as zero: an integer, one for each axis, (before,
after) pairs, or one of the words of `cuconv.conv`.  Negative numbers crop.  More than
half a kernel is allowed.
""",
    "dilation": "Step between taps.",
    "ceil_mode": """
Whether cells that strides leave over at the end get a window of their own, which hangs
over; none starts in the padding after the input.
""",
    "cover_all": """
The same, for padding that is left over too: the word of Chainer, where a window may
start in the padding after the input.
""",
    "layout": """
``"channels_first"`` or ``"channels_last"``, and the other names of `cuconv.conv`.
""",
    "count_include_pad": """
Whether a mean divides by the cells of the padding too.  What hangs over beyond it
(``ceil_mode``) is never counted.
""",
    "divisor_override": "A number to divide every sum by instead.",
    "return_indices": "Whether to return the index of each maximum too.",
    "dtype": """
Type of the result, real or complex; by default that of ``x``, and float64 for integers
and booleans, as for `numpy.mean`.  Half types are summed in float32.
""",
    "out": "Array to write to, of the result's shape and type.",
    "out: pair": """
Array to write to, of the result's shape and type; with ``return_indices`` a pair of
them, the second of int64.
""",
    "memory_limit": """
Upper bound on what is allocated beyond the arrays and the result: bytes, or a word such
as ``"64 MiB"``.  Kernels on CUDA need none.
""",
    "*windows: least": """
{stride}
{padding: least}
{dilation}
{ceil_mode}
{cover_all}
{layout}
""",
    "*windows: zero": """
{stride}
{padding: zero}
{dilation}
{ceil_mode}
{cover_all}
{layout}
""",
    "*divisors": """
{count_include_pad}
{divisor_override}
""",
    "*outside": """
{out}
{memory_limit}
""",
    "*returns: pooled max": """
Returns
-------
array
    (N, C, *out) in the type and layout of ``x``.  A NaN under a window is its
    maximum.  A window over padding alone gives the least value of the type: minus
    infinity, the smallest integer, or False.
indices
    With ``return_indices``, as the second of a pair: int64, of the same shape.  The
    cell of each maximum, counted in its plane as if that lay row by row; the first
    of several that are equal, or of several NaN; -1 for a window over padding
    alone.
""",
    "*returns: gradient max": """
Returns
-------
array
    Of the input's shape and the type of ``dy``: what several windows give to one
    cell is added up, in float32 for half types.
""",
    "*returns: pooled mean": """
Returns
-------
array
    (N, C, *out) in the layout of ``x``.  A window over padding alone gives 0.
""",
    "*returns: gradient mean": """
Returns
-------
array
    Of shape ``x_shape`` and the type of ``dy``, or float64 for integers.  Half
    types are summed in float32.
""",
    "*raises": """
Raises
------
{ValueError, TypeError}
{MemoryLimitError}
""",
    "ValueError, TypeError": """
For shapes or options that do not fit, before anything is allocated.
""",
    "MemoryLimitError": """
If ``memory_limit`` is too small; it names the smallest that would do.
""",
}
_shared = shares(_SECTIONS)


def _public(function: Callable[P, R]) -> Callable[P, R]:
    """Complete the docstring, and the signature where there are ``**options``."""
    options = function.__annotations__.get("options")
    if options is not None:
        names = get_type_hints(options.__args__[0])
        spells_out({n: v for n, v in DEFAULTS.items() if n in names})(function)
    return _shared(function)


def _pool(
    call: str, arrays: tuple[Array | None, ...], options: Any, **more: Any
) -> Any:
    out = options.pop("out", None)
    if "_rank" in options:
        more["rank"] = options.pop("_rank")
    return run(plan_pool, call, arrays, out, options, more)


@_public
def max_pool(
    x: ArrayT,
    kernel_size: Sizes,
    *,
    indices: ArrayT | None = None,
    **options: Unpack[_MaxPool],
) -> Array:
    """The largest value under every window.

    Parameters
    ----------
    {x: real}
    {kernel_size}
    {indices: taken}
    {*windows: least}
    {return_indices}
    {indices_over}
    {out: pair}
    {memory_limit}

    {*returns: pooled max}

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[1.0, 5.0, 5.0, 2.0, 0.0]]])
    >>> cuconv.max_pool(x, 2)
    array([[[5., 5.]]])
    >>> cuconv.max_pool(x, 3, stride=2, padding=1, return_indices=True)
    (array([[[5., 5., 2.]]]), array([[[1, 1, 3]]]))
    """
    return _pool("max_pool", (x, indices), options, kernel_size=kernel_size)


@_public
def max_pool_backward(
    dy: ArrayT,
    indices: ArrayT | None,
    x_shape: Sequence[int] | None,
    kernel_size: Sizes,
    *,
    x: ArrayT | None = None,
    **options: Unpack[_MaxGradient],
) -> ArrayT:
    """The gradient of `max_pool` for its input: dy goes where the maxima were.

    Parameters
    ----------
    {dy}
    {indices: or None}
    {x_shape: optional}
    {kernel_size}
    {x: found}
    {*windows: least}
    {indices_over}
    {*outside}

    {*returns: gradient max}

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[1.0, 5.0, 5.0, 2.0, 0.0]]])
    >>> y, indices = cuconv.max_pool(x, 3, stride=1, return_indices=True)
    >>> cuconv.max_pool_backward(np.ones(y.shape), indices, x.shape, 3, stride=1)
    array([[[0., 2., 1., 0., 0.]]])
    """
    return _pool(
        "max_pool_backward",
        (dy, indices, x),
        options,
        kernel_size=kernel_size,
        x_shape=x_shape,
    )


@_public
def max_unpool(
    x: ArrayT,
    indices: ArrayT,
    kernel_size: Sizes,
    **options: Unpack[_Unpool],
) -> ArrayT:
    """Put values where maxima were, and zeros everywhere else: undoes `max_pool`.

    It is linear in ``x``, and its adjoint is `max_pool` with ``indices=``.  Where
    windows overlap, values for one element are added up; PyTorch keeps one of them.

    Parameters
    ----------
    {x: unpooled}
    {indices}
    {kernel_size}
    {stride}
    {padding: unpooled}
    {dilation}
    output_size
        Spatial sizes of the result; by default the smallest that has these windows:
        ``(out - 1) stride + dilation (kernel - 1) + 1`` less the padding.
    {indices_over}
    {layout}
    {*outside}

    Returns
    -------
    array
        (N, C, *output_size) in the type and layout of ``x``.

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[1.0, 5.0, 4.0, 2.0]]])
    >>> y, indices = cuconv.max_pool(x, 2, return_indices=True)
    >>> cuconv.max_unpool(y, indices, 2)
    array([[[0., 5., 4., 0.]]])
    >>> cuconv.max_pool(np.array([[[1.0, 2.0, 3.0, 4.0]]]), 2, indices=indices)
    array([[[2., 3.]]])
    """
    return _pool("max_unpool", (x, indices), options, kernel_size=kernel_size)


@_public
def avg_pool(x: ArrayT, kernel_size: Sizes, **options: Unpack[_MeanPool]) -> ArrayT:
    """The mean of the cells under every window.

    Parameters
    ----------
    {x: any}
    {kernel_size}
    {*windows: zero}
    {*divisors}
    {dtype}
    {*outside}

    {*returns: pooled mean}

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[2.0, 4.0, 6.0, 8.0]]])
    >>> cuconv.avg_pool(x, 2)
    array([[[3., 7.]]])
    >>> cuconv.avg_pool(x, 2, padding=1)
    array([[[1., 5., 4.]]])
    >>> cuconv.avg_pool(x, 2, padding=1, count_include_pad=False)
    array([[[2., 5., 8.]]])
    """
    return _pool("avg_pool", (x,), options, kernel_size=kernel_size)


@_public
def avg_pool_backward(
    dy: ArrayT,
    x_shape: Sequence[int],
    kernel_size: Sizes,
    **options: Unpack[_MeanGradient],
) -> ArrayT:
    """The gradient of `avg_pool` for its input.

    Parameters
    ----------
    {dy}
    {x_shape}
    {kernel_size}
    {*windows: zero}
    {*divisors}
    {*outside}

    {*returns: gradient mean}

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.avg_pool_backward(np.ones((1, 1, 2)), (1, 1, 5), 2)
    array([[[0.5, 0.5, 0.5, 0.5, 0. ]]])
    """
    return _pool(
        "avg_pool_backward", (dy,), options, kernel_size=kernel_size, x_shape=x_shape
    )


@_public
def lp_pool(
    x: ArrayT, norm_type: float, kernel_size: Sizes, **options: Unpack[_Pool]
) -> ArrayT:
    """The p-norm of the cells under every window, ``(Σ |x|^p)^(1/p)``.

    PyTorch sums ``x^p`` without the absolute value, which differs for odd p where x is
    negative (and is NaN where such a sum is), and it scales what hangs over
    (``ceil_mode``) up to a whole window.  Here it is the norm of the cells there are,
    also where their powers overflow or underflow.

    Parameters
    ----------
    {x: float}
    {norm_type}
    {kernel_size}
    {*windows: zero}
    {*outside}

    Returns
    -------
    array
        (N, C, *out) in the type and layout of ``x``; half types are summed in float32.

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.lp_pool(np.array([[[3.0, -4.0, 5.0, 12.0]]]), 2, 2)
    array([[[ 5., 13.]]])
    """
    more = {"kernel_size": kernel_size, "norm_type": norm_type}
    return _pool("lp_pool", (x,), options, **more)


@_public
def lp_pool_backward(
    dy: ArrayT,
    x: ArrayT,
    y: ArrayT,
    norm_type: float,
    kernel_size: Sizes,
    **options: Unpack[_Pool],
) -> ArrayT:
    """The gradient of `lp_pool`: ``dy · y^(1 - p) · |x|^(p - 1) · sign(x)``.

    Parameters
    ----------
    {dy}
    {x: input}
    {y}
    {norm_type}
    {kernel_size}
    {*windows: zero}
    {*outside}

    Returns
    -------
    array
        Of the shape and type of ``x``.  Zero where x is zero, and under windows whose
        norm is zero, where there is no derivative.

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.array([[[3.0, -4.0, 0.0, 0.0]]])
    >>> y = cuconv.lp_pool(x, 2, 2)
    >>> cuconv.lp_pool_backward(np.ones(y.shape), x, y, 2, 2)
    array([[[ 0.6, -0.8,  0. ,  0. ]]])
    """
    return _pool(
        "lp_pool_backward",
        (dy, x, y),
        options,
        kernel_size=kernel_size,
        norm_type=norm_type,
    )


@_public
def adaptive_max_pool(
    x: ArrayT,
    output_size: OutputSize,
    *,
    indices: ArrayT | None = None,
    **options: Unpack[_EvenMax],
) -> Array:
    """The largest values of as many windows as are asked for.

    Of ``m`` windows over ``n`` cells, number ``i`` goes from ``floor(i n / m)`` up to
    ``ceil((i + 1) n / m)``.

    Parameters
    ----------
    {x: adaptive}
    {output_size}
    {indices: taken}
    {return_indices}
    {indices_over}
    {layout}
    {out: pair}
    {memory_limit}

    {*returns: pooled max}

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.adaptive_max_pool(np.arange(7.0).reshape(1, 1, 7), 3)
    array([[[2., 4., 6.]]])
    """
    return _pool("max_pool", (x, indices), options, output_size=output_size)


@_public
def adaptive_max_pool_backward(
    dy: ArrayT,
    indices: ArrayT | None,
    x_shape: Sequence[int] | None,
    output_size: OutputSize,
    *,
    x: ArrayT | None = None,
    **options: Unpack[_EvenMaxGradient],
) -> ArrayT:
    """The gradient of `adaptive_max_pool` for its input.

    Parameters
    ----------
    {dy}
    {indices: or None}
    {x_shape: optional}
    {output_size}
    {x: found}
    {indices_over}
    {layout}
    {*outside}

    {*returns: gradient max}

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.arange(7.0).reshape(1, 1, 7)
    >>> cuconv.adaptive_max_pool_backward(np.ones((1, 1, 3)), None, None, 3, x=x)
    array([[[0., 0., 1., 0., 1., 0., 1.]]])
    """
    return _pool(
        "max_pool_backward",
        (dy, indices, x),
        options,
        output_size=output_size,
        x_shape=x_shape,
    )


@_public
def adaptive_avg_pool(
    x: ArrayT,
    output_size: OutputSize,
    **options: Unpack[_EvenMean],
) -> ArrayT:
    """The means of as many windows as are asked for.

    Parameters
    ----------
    {x: adaptive}
    {output_size}
    {layout}
    {dtype}
    {*outside}

    {*returns: pooled mean}

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.adaptive_avg_pool(np.arange(7.0).reshape(1, 1, 7), 3)
    array([[[1., 3., 5.]]])
    """
    return _pool("avg_pool", (x,), options, output_size=output_size)


@_public
def adaptive_avg_pool_backward(
    dy: ArrayT,
    x_shape: Sequence[int],
    output_size: OutputSize,
    **options: Unpack[_EvenGradient],
) -> ArrayT:
    """The gradient of `adaptive_avg_pool` for its input.

    Parameters
    ----------
    {dy}
    {x_shape}
    {output_size}
    {layout}
    {*outside}

    {*returns: gradient mean}

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.adaptive_avg_pool_backward(np.ones((1, 1, 2)), (1, 1, 3), 2)
    array([[[0.5, 1. , 0.5]]])
    """
    return _pool(
        "avg_pool_backward", (dy,), options, output_size=output_size, x_shape=x_shape
    )


@_public
def global_max_pool(
    x: ArrayT,
    *,
    batched: bool = True,
    indices: ArrayT | None = None,
    **options: Unpack[_EvenMax],
) -> Array:
    """The largest value of every plane: `adaptive_max_pool` to one cell an axis.

    Parameters
    ----------
    {x: global}
    {batched}
    {indices: taken}
    {return_indices}
    {indices_over}
    {layout}
    {out: pair}
    {memory_limit}

    {*returns: pooled max}

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.arange(12.0).reshape(1, 2, 2, 3)
    >>> cuconv.global_max_pool(x, return_indices=True)
    (array([[[[ 5.]],
    <BLANKLINE>
            [[11.]]]]), array([[[[5]],
    <BLANKLINE>
            [[5]]]]))
    """
    return _pool("max_pool", (x, indices), options, batched=batched)


@_public
def global_max_pool_backward(
    dy: ArrayT,
    indices: ArrayT | None,
    x_shape: Sequence[int] | None,
    *,
    x: ArrayT | None = None,
    batched: bool = True,
    **options: Unpack[_EvenMaxGradient],
) -> ArrayT:
    """The gradient of `global_max_pool` for its input.

    Parameters
    ----------
    {dy}
    {indices: or None}
    {x_shape: optional}
    {x: found}
    {batched}
    {indices_over}
    {layout}
    {*outside}

    {*returns: gradient max}

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> dy, indices = np.ones((1, 1, 1)), np.full((1, 1, 1), 2)
    >>> cuconv.global_max_pool_backward(dy, indices, (1, 1, 4))
    array([[[0., 0., 1., 0.]]])
    """
    return _pool(
        "max_pool_backward", (dy, indices, x), options, batched=batched, x_shape=x_shape
    )


@_public
def global_avg_pool(
    x: ArrayT,
    *,
    batched: bool = True,
    **options: Unpack[_EvenMean],
) -> ArrayT:
    """The mean of every plane: `adaptive_avg_pool` to one cell an axis.

    Parameters
    ----------
    {x: global}
    {batched}
    {layout}
    {dtype}
    {*outside}

    {*returns: pooled mean}

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.global_avg_pool(np.arange(12.0).reshape(1, 2, 6))
    array([[[2.5],
            [8.5]]])
    """
    return _pool("avg_pool", (x,), options, batched=batched)


@_public
def global_avg_pool_backward(
    dy: ArrayT,
    x_shape: Sequence[int],
    *,
    batched: bool = True,
    **options: Unpack[_EvenGradient],
) -> ArrayT:
    """The gradient of `global_avg_pool` for its input.

    Parameters
    ----------
    {dy}
    {x_shape}
    {batched}
    {layout}
    {*outside}

    {*returns: gradient mean}

    {*raises}

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.global_avg_pool_backward(np.ones((1, 1, 1)), (1, 1, 4))
    array([[[0.25, 0.25, 0.25, 0.25]]])
    """
    more = {"batched": batched, "x_shape": x_shape}
    return _pool("avg_pool_backward", (dy,), options, **more)


_RANKS = {
    1: ("one spatial axis", "(N, C, L)", (8,)),
    2: ("two spatial axes", "(N, C, H, W)", (8, 6)),
    3: ("three spatial axes", "(N, C, D, H, W)", (4, 8, 6)),
}


def _of_ranks(
    general: Callable[P, R], arguments: str, result: Callable[[int], int]
) -> Iterator[Callable[P, R]]:
    """A pooling over one to three spatial axes: the same options and docstring.

    ``arguments`` are those of its example beside x, whose ``result`` has these sizes.
    """
    shown = inspect.signature(general)
    own = [value for name, value in shown.parameters.items() if name != "batched"]
    for rank, (axes, shape, sizes) in _RANKS.items():

        def pool(*arrays: Any, _rank: int = rank, **options: Any) -> Any:
            return general(*arrays, _rank=_rank, **options)  # type: ignore[arg-type]

        name = f"{general.__name__}{rank}d"
        pool.__name__ = pool.__qualname__ = name
        pool.__signature__ = shown.replace(parameters=own)  # type: ignore[attr-defined]
        pool.__annotations__ = general.__annotations__
        after = (1, 2, *map(result, sizes))
        pool.__doc__ = f"""`{general.__name__}` over {axes}: x {shape}, or without N.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> x = np.zeros({(1, 2, *sizes)})
    >>> cuconv.{name}({arguments}).shape
    {after}
    """
        documented_as(general, rank)(pool)
        pool.__doc__ = pool.__doc__.replace(_SECTION_OF_BATCHED, "")
        yield cast("Callable[P, R]", pool)


_SECTION_OF_BATCHED = f"    batched\n        {_SECTIONS['batched']}\n"


def _half(size: int) -> int:
    return size // 2


max_pool1d, max_pool2d, max_pool3d = _of_ranks(max_pool, "x, 2", _half)
max_unpool1d, max_unpool2d, max_unpool3d = _of_ranks(
    max_unpool, "x, np.full(x.shape, -1), 2", lambda size: 2 * size
)
avg_pool1d, avg_pool2d, avg_pool3d = _of_ranks(avg_pool, "x, 2", _half)
lp_pool1d, lp_pool2d, lp_pool3d = _of_ranks(lp_pool, "x, 2, 2", _half)
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = _of_ranks(
    adaptive_max_pool, "x, 2", lambda _: 2
)
adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = _of_ranks(
    adaptive_avg_pool, "x, 2", lambda _: 2
)
global_max_pool1d, global_max_pool2d, global_max_pool3d = _of_ranks(
    global_max_pool, "x", lambda _: 1
)
global_avg_pool1d, global_avg_pool2d, global_avg_pool3d = _of_ranks(
    global_avg_pool, "x", lambda _: 1
)
