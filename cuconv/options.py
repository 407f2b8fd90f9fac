"""The options of every convolution, with their types, defaults and checks."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, ParamSpec, TypeAlias, TypedDict, TypeVar

import numpy as np

from cuconv.choices import Layout, StrategyWord, check_flag
from cuconv.config import check_deterministic, check_precision, settings
from cuconv.geometry import ConvGeometry, Padding, Sizes
from cuconv.memory import MemoryLimit, parse_memory_limit

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# Options that a transposed convolution does not have.
FORWARD_ALONE = "padding_mode", "input_dilation", "batch_groups", "cover_all"

PaddingMode: TypeAlias = Literal[
    "zeros", "reflect", "symmetric", "replicate", "circular"
]
Precision: TypeAlias = Literal["strict", "standard", "fast"]


class ConvOptions(TypedDict, total=False):
    """The keyword options of a convolution, documented for all functions.

    Parameters
    ----------
    stride, dilation
        Step between windows and between taps, in elements: an integer, or one for each
        spatial axis.
    padding
        Zeros around the input, in elements: an integer, one for each spatial axis, or
        (before, after) pairs; negative numbers crop.  Or a string: ``"valid"`` is no
        padding; ``"full"`` is dilation · (kernel - 1) elements at both ends, so that
        there is an output for every overlap of kernel and input; ``"same"``, also as
        ``"SAME_UPPER"``, makes the output ceil(size / stride) long, with the extra
        element after; ``"same_lower"`` with the extra element before; ``"causal"``, for
        one spatial axis, is dilation · (kernel - 1) elements before and none after, so
        that output o depends on no input after o · stride.  In any case.
    groups
        Split channels and filters into this number of independent groups;
        ``groups=C`` is depthwise convolution.
    padding_mode
        Values of the padding, of any length: ``"zeros"``; ``"reflect"``, the element at
        the mirrored position, without repeating the edge; ``"symmetric"``, repeating
        the edge (SciPy's ``"reflect"``; its ``"mirror"`` is ``"reflect"`` here);
        ``"replicate"``, the edge; ``"circular"``, the element that follows when x is
        repeated.  If one end is cropped, padding at the other end still reads all of x.
    input_dilation
        Distance between neighbouring elements of x, with zeros between them that are
        never multiplied: an integer, or one for each spatial axis.  ``padding`` is
        added around all of them.  Above 1, only with ``padding_mode="zeros"``.
    batch_groups
        Split images and filters into B groups: images [b · N / B, (b + 1) · N / B) are
        convolved with filters [b · K / B, (b + 1) · K / B) only, and y has N / B images
        and all K filters.  Above 1, only with ``groups=1``.
    flip_kernel
        True: convolution in the sense of mathematics and of SciPy.  The taps are taken
        in reverse along every spatial axis, ``w[k, c, kernel - 1 - t]`` in place of
        ``w[k, c, t]``, and nothing is conjugated.  ``w`` is not copied for it.
    cover_all
        True: round the size of the output up, as Chainer does: the padding at the end
        of each axis grows until no element, and no padding, is left over after the last
        window.
    layout
        ``"channels_first"``, also as ``"NCL"``, ``"NCW"``, ``"NCHW"`` or ``"NCDHW"``;
        or ``"channels_last"``, also as ``"NLC"``, ``"NWC"``, ``"NHWC"`` or
        ``"NDHWC"``; in any case.
    dtype
        Type of the result; by default NumPy's common type of the arrays.  float16 and
        bfloat16 are summed in float32 and rounded once, everything else in the common
        type of arrays and result: int8 and uint8 with ``dtype=int32`` are summed in
        int32.
    strategy
        ``"auto"``; ``"benchmark"`` to time the candidates on these arrays and remember
        the fastest; or the name of one: ``"im2col"``, ``"partial_im2col"``,
        ``"pointwise"``, ``"tap_matmul"``, ``"winograd"``, ``"depthwise"``, ``"fft"``
        (NumPy only), ``"implicit_gemm"`` and ``"cudnn"`` (CuPy only).
    precision
        ``"strict"``: every result is a direct sum of products.  ``"standard"``:
        Winograd in tiles of up to 6 elements and the Fourier transform too: float32
        within 1e-5 of the largest result, and a NaN propagates to its tile.
        ``"fast"``: Winograd in tiles of 8 (within 1e-4), and TF32 on CUDA.  None: the
        setting of `cuconv.config`, by default standard.
    deterministic
        True: the same bits on every run.  False: CUDA may add in any order if that is
        less work (`col2im` by atomic additions).  None: decided by the library, today
        as True.
    memory_limit
        Upper bound on everything allocated beyond inputs and result: bytes, or a
        string such as ``"64 MiB"``.  By default 64 MiB with NumPy and 256 MiB with
        CuPy, or the smallest possible limit if that is larger.
    """

    stride: Sizes
    padding: Padding
    dilation: Sizes
    groups: int
    padding_mode: PaddingMode
    input_dilation: Sizes
    batch_groups: int
    flip_kernel: bool
    cover_all: bool
    layout: Layout
    dtype: Any
    strategy: StrategyWord
    precision: Precision | None
    deterministic: bool | None
    memory_limit: MemoryLimit


class SeparableOptions(TypedDict, total=False):
    """The keyword options of separable convolutions; see `cuconv.separable_conv`."""

    stride: Sizes
    padding: Padding
    dilation: Sizes
    flip_kernel: bool
    cover_all: bool
    layout: Layout
    dtype: Any
    strategy: StrategyWord
    precision: Precision | None
    deterministic: bool | None
    memory_limit: MemoryLimit


class DeformOptions(TypedDict, total=False):
    """The keyword options of deformable convolutions; see `cuconv.deform_conv`."""

    stride: Sizes
    padding: Padding
    dilation: Sizes
    groups: int
    layout: Layout
    dtype: Any
    precision: Precision | None
    deterministic: bool | None
    memory_limit: MemoryLimit


# The spatial axes in shapes of functions of one rank.
_NAMES_OF_AXES = {
    1: {"*spatial": "L", "*kernel": "kernel", "*out": "out"},
    2: {"*spatial": "H, W", "*kernel": "kh, kw", "*out": "oh, ow"},
    3: {"*spatial": "D, H, W", "*kernel": "kd, kh, kw", "*out": "od, oh, ow"},
}

DEPTHWISE_OPTIONS = tuple(n for n in ConvOptions.__annotations__ if n != "groups")
SEPARABLE_OPTIONS = tuple(SeparableOptions.__annotations__)
DEFORM_OPTIONS = tuple(DeformOptions.__annotations__)


def spells_out(
    defaults: Mapping[str, Any],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Put options in place of ``**options`` in the signature that `help` shows."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        spelled = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in defaults.items()
            if name not in signature.parameters
        ]
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*own, *spelled]
        )
        return function

    return decorate


def shows_options(
    names: Iterable[str] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Put ``**options`` of a convolution, or these of them, in its signature.

    The line ``{options}`` of its docstring becomes their entries of `ConvOptions`.
    """
    defaults = Options._field_defaults
    wanted = tuple(defaults) if names is None else tuple(names)
    in_signature = spells_out({n: defaults[n] for n in defaults if n in wanted})

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        doc = function.__doc__ or ""
        before, marker, after = doc.partition("{options}")
        if marker:
            indent = before[before.rindex("\n") :]
            texts = (
                text
                for heading, text in _entries()
                if set(heading.split(", ")) <= set(wanted)
                and f"{indent}{heading}\n" not in before
            )
            entries = "".join(texts).rstrip().replace("\n", indent)
            function.__doc__ = f"{before}{entries}{after}"
        return in_signature(function)

    return decorate


@cache
def _entries() -> tuple[tuple[str, str], ...]:
    """Headings and texts of the parameters of `ConvOptions`, without indentation."""
    doc = inspect.cleandoc(ConvOptions.__doc__ or "")
    lines = doc.partition("----------\n")[2].splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if not line[0].isspace()]
    ends = [*starts[1:], len(lines)]
    each = zip(starts, ends, strict=True)
    return tuple((lines[i].strip(), "".join(lines[i:j])) for i, j in each)


def documented_as(general: Any, rank: int) -> Callable[[T], T]:
    """Put the sections of another docstring, for this rank, before the examples."""

    def decorate(item: T) -> T:
        doc, source = item.__doc__ or "", general.__doc__ or ""
        sections = source.partition("Parameters\n")[2].partition("Examples\n")[0]
        for name, axes in _NAMES_OF_AXES[rank].items():
            sections = sections.replace(name, axes)
        head, heading, examples = doc.partition("Examples\n")
        if heading and sections:
            item.__doc__ = f"{head}Parameters\n{sections}{heading}{examples}"
        return item

    return decorate


class Options(NamedTuple):
    """The options of every convolution with their defaults, as one value."""

    stride: Sizes = 1
    padding: Padding = 0
    dilation: Sizes = 1
    groups: int = 1
    padding_mode: str = "zeros"
    input_dilation: Sizes = 1
    batch_groups: int = 1
    flip_kernel: bool = False
    cover_all: bool = False
    layout: str = "channels_first"
    dtype: Any = None
    strategy: str = "auto"
    precision: str | None = None
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
            padding_mode=self.padding_mode,
            input_dilation=self.input_dilation,
            batch_groups=self.batch_groups,
            cover_all=self.cover_all,
        )

    def transposed_geometry(
        self,
        x_shape: Sequence[int],
        w_shape: Sequence[int],
        output_padding: Sizes,
        output_size: Sizes | None,
    ) -> ConvGeometry:
        for name in FORWARD_ALONE:
            given, usual = getattr(self, name), self._field_defaults[name]
            if not _is_usual(given, usual):
                raise ValueError(
                    f"a transposed convolution has no {name}; got {given!r}"
                )
        return ConvGeometry.of_transposed(
            x_shape,
            w_shape,
            stride=self.stride,
            padding=self.padding,
            output_padding=output_padding,
            output_size=output_size,
            dilation=self.dilation,
            groups=self.groups,
            layout=self.layout,
        )

    def settled(self) -> "Options":
        """Replace None by the current settings, and check strings."""
        now = settings()
        if not isinstance(self.strategy, str):
            raise TypeError(f"strategy must be a str; got {self.strategy!r}")
        limit, precision, same = self.memory_limit, self.precision, self.deterministic
        return self._replace(
            flip_kernel=check_flag("flip_kernel", self.flip_kernel),
            memory_limit=(
                now.memory_limit if limit is None else parse_memory_limit(limit)
            ),
            precision=now.precision
            if precision is None
            else check_precision(precision),
            deterministic=(
                now.deterministic if same is None else check_deterministic(same)
            ),
        )


def check_bias(bias: object) -> None:
    """Raise if ``bias`` is not a bool, such as the bias itself."""
    if not isinstance(bias, (bool, np.bool_)):
        kind = type(bias).__name__
        raise TypeError(f"bias must be True or False, whether there is one; got {kind}")


def _is_usual(given: Any, usual: Any) -> bool:
    """True if an option has its default, also if given for each axis."""
    if isinstance(given, str):
        return bool(given == usual)
    several = hasattr(given, "__iter__")
    return all(item == usual for item in given) if several else bool(given == usual)
