"""A layer: the shapes of its arrays, its options, its operations and its name."""

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, ClassVar

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One convolution, for any batch: x (N, C, *size), w (K, C / groups, *kernel)."""

    # The operands of each operation, in every peer's order, and last the array that
    # has the shape of the result.
    operations: ClassVar[dict[str, tuple[str, ...]]] = {
        "forward": ("x", "w", "dy"),
        "input_grad": ("dy", "w", "x"),
        "weight_grad": ("dy", "x", "w"),
    }
    # The array with an element for each window.
    windows: ClassVar[str] = "dy"

    channels: int
    size: Sizes
    filters: int
    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int = 1
    label: str = ""
    bias: bool = False

    @property
    def kind(self) -> str:
        if self.groups == self.channels > 1:
            return "depthwise"
        return "pointwise" if prod(self.kernel) == 1 else "dense"

    @property
    def name(self) -> str:
        """Such as ``64-128 3x3/2 @56``: channels, filters, kernel, stride and size."""
        window = times(self.kernel) + flag("/", self.stride, above=1)
        place = times(self.size) if len(set(self.size)) > 1 else self.size[0]
        words = (self.label, *self._words(window), f"@{place}")
        return " ".join(filter(None, words))

    def _words(self, window: str) -> tuple[str, ...]:
        dilated = flag("d", self.dilation, above=1)
        grouped = flag("g", (self.groups,), above=1)
        return f"{self.channels}-{self.filters}", window, dilated, grouped

    @property
    def options(self) -> dict[str, Any]:
        """Keywords that cuconv and PyTorch share."""
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    @property
    def window(self) -> tuple[Sizes, Sizes, Sizes, Sizes]:
        return self.kernel, self.stride, self.padding, self.dilation

    @property
    def around(self) -> list[tuple[int, int]]:
        """The padding of every axis of x, as `numpy.pad` takes it."""
        return [(0, 0), (0, 0), *((p, p) for p in self.padding)]

    @property
    def padded(self) -> Sizes:
        """The spatial sizes of the padded input."""
        return tuple(n + 2 * p for n, p in zip(self.size, self.padding, strict=True))

    @property
    def inside(self) -> tuple[slice, ...]:
        """The input within the padded input."""
        axes = zip(self.size, self.padding, strict=True)
        return tuple(slice(p, p + n) for n, p in axes)

    @property
    def out(self) -> Sizes:
        axes = zip(self.padded, self.kernel, self.stride, self.dilation, strict=True)
        return tuple((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in axes)

    @property
    def patch(self) -> int:
        """Products in each element of the array `windows`."""
        return prod(self.shapes(1)["w"][1:])

    def shapes(self, batch: int) -> dict[str, Sizes]:
        """Of every array that an operation takes or gives, by its name."""
        return {
            "x": (batch, self.channels, *self.size),
            "w": (self.filters, self.channels // self.groups, *self.kernel),
            "dy": (batch, self.filters, *self.out),
            "bias": (self.filters,),
        }

    def multiplications(self, batch: int) -> int:
        """The same for all its operations; padding counts; none where there is no w."""
        shapes = self.shapes(batch)
        return prod(shapes[self.windows]) * self.patch if "w" in shapes else 0

    def under(self, tap: Sizes) -> tuple[slice, ...]:
        """The elements of the padded input that one tap meets, window after window."""
        axes = zip(tap, self.dilation, self.stride, self.out, strict=True)
        return tuple(slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in axes)


@dataclass(frozen=True)
class Transposed(Layer):
    """One transposed convolution: x (N, C, *size), w (C, K / groups, *kernel)."""

    operations: ClassVar[dict[str, tuple[str, ...]]] = {
        "transpose": ("x", "w", "dy"),
        "transpose_input_grad": ("dy", "w", "x"),
        "transpose_weight_grad": ("dy", "x", "w"),
    }

    windows = "x"
    output_padding: Sizes = field(kw_only=True)

    @property
    def adjoint(self) -> Layer:
        """The convolution from the result to the input."""
        return Layer(self.filters, self.out, self.channels, *self.window, self.groups)

    def _words(self, window: str) -> tuple[str, ...]:
        return *super()._words(window), flag("o", self.output_padding)

    @property
    def options(self) -> dict[str, Any]:
        return {**super().options, "output_padding": self.output_padding}

    @property
    def out(self) -> Sizes:
        axes = zip(self.size, *self.window, self.output_padding, strict=True)
        sizes = ((n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, k, s, p, d, o in axes)
        return tuple(sizes)

    def shapes(self, batch: int) -> dict[str, Sizes]:
        found = self.adjoint.shapes(batch)
        return {**found, "x": found["dy"], "dy": found["x"], "bias": (self.filters,)}


@dataclass(frozen=True)
class Pool(Layer):
    """One pooling, each channel by itself: x (N, C, *size)."""

    operations: ClassVar[dict[str, tuple[str, ...]]] = {
        "max_pool": ("x", "dy"),
        "max_pool_backward": ("dy", "indices", "x"),
        "avg_pool": ("x", "dy"),
        "avg_pool_backward": ("dy", "x"),
    }

    kind = "pooling"

    def _words(self, window: str) -> tuple[str, ...]:
        return str(self.channels), window, flag("p", self.padding)

    @property
    def options(self) -> dict[str, Any]:
        window = {"stride": self.stride, "padding": self.padding}
        return {"kernel_size": self.kernel, **window}

    def shapes(self, batch: int) -> dict[str, Sizes]:
        found = super().shapes(batch)
        return {"x": found["x"], "dy": found["dy"], "indices": found["dy"]}


@dataclass(frozen=True)
class GlobalPool(Pool):
    """The mean of every whole plane."""

    operations: ClassVar[dict[str, tuple[str, ...]]] = {"global_avg_pool": ("x", "dy")}

    def _words(self, _: str) -> tuple[str, ...]:
        return str(self.channels), "global"

    @property
    def options(self) -> dict[str, Any]:
        return {}


KINDS: tuple[type[Layer], ...] = (Layer, Transposed, Pool, GlobalPool)
OPERATIONS = [name for kind in KINDS for name in kind.operations]


def times(sizes: Sizes) -> str:
    return "x".join(map(str, sizes))


def flag(letter: str, sizes: Sizes, above: int = 0) -> str:
    return f"{letter}{sizes[0]}" if max(sizes) > above else ""


def layer(
    *sizes: int,
    rank: int = 2,
    padding: int | None = None,
    dilation: int = 1,
    **more: Any,
) -> Layer:
    """Channels, size, filters, kernel and stride, if not 1; equal along every axis.

    By default padded as networks do for stride 1.
    """
    channels, size, filters, kernel, stride = (*sizes, 1)[:5]
    before = dilation * (kernel - 1) // 2 if padding is None else padding
    along, *window = ((n,) * rank for n in (size, kernel, stride, before, dilation))
    everything: Any = (channels, along, filters, *window)
    return Layer(*everything, **more)


def read_lists(name: str) -> dict[str, list[dict[str, Any]]]:
    """Lists of layers in a file beside this one: the arguments of `layer_of`."""
    text = Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8")
    found: dict[str, list[dict[str, Any]]] = json.loads(text)
    return found


def layer_of(size: list[int], operation: str = "forward", **sizes: Any) -> Layer:
    """The layer of a forward operation; what is usual may be left out."""
    ones, zeros = [1] * len(size), [0] * len(size)
    usual = {"stride": ones, "padding": zeros, "dilation": ones, "kernel": size}
    (kind,) = (each for each in KINDS if operation in each.operations)
    if kind is Transposed:
        usual["output_padding"] = zeros
    if issubclass(kind, Pool):
        sizes |= dict.fromkeys(("filters", "groups"), sizes["channels"])
    options: Any = {
        name: tuple(each) if isinstance(each, list) else each
        for name, each in {**usual, "size": size, **sizes}.items()
    }
    return kind(**options)
