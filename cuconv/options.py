"""The options of every convolution, with their types, defaults and checks."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, TypeAlias, TypedDict, TypeVar

import numpy as np

from cuconv.config import check_deterministic, check_precision, settings
from cuconv.geometry import ConvGeometry, Padding, Sizes
from cuconv.memory import MemoryLimit, parse_memory_limit

P = ParamSpec("P")
R = TypeVar("R")

# Options that a transposed convolution does not have.
FORWARD_ALONE = "padding_mode", "input_dilation", "batch_groups"

PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]
Precision: TypeAlias = Literal["strict", "standard", "fast"]


class ConvOptions(TypedDict, total=False):
    """The keyword options that every convolution takes; see `cuconv.conv`."""

    stride: Sizes
    padding: Padding
    dilation: Sizes
    groups: int
    padding_mode: PaddingMode
    input_dilation: Sizes
    batch_groups: int
    layout: str
    dtype: Any
    strategy: str
    precision: Precision | None
    deterministic: bool | None
    memory_limit: MemoryLimit


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
    """Put ``**options`` of a convolution, or these of them, in its signature."""
    defaults = Options._field_defaults
    wanted = defaults if names is None else set(names)
    return spells_out({n: default for n, default in defaults.items() if n in wanted})


class Options(NamedTuple):
    """The options of every convolution with their defaults, as one value."""

    stride: Sizes = 1
    padding: Padding = 0
    dilation: Sizes = 1
    groups: int = 1
    padding_mode: str = "zeros"
    input_dilation: Sizes = 1
    batch_groups: int = 1
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
