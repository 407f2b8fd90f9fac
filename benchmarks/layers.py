"""What a layer is: the shapes of its arrays, its options, and its name."""

from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, Self

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One convolution, for any batch: x (N, C, *size), w (K, C / groups, *kernel)."""

    channels: int
    size: Sizes
    filters: int
    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int = 1
    label: str = ""

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        """From `to_json`, whose tuples JSON has made lists."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found.items()
        }
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def kind(self) -> str:
        if self.groups == self.channels > 1:
            return "depthwise"
        return "pointwise" if prod(self.kernel) == 1 else "dense"

    @property
    def name(self) -> str:
        """Such as ``64-128 3x3/2 @56``: channels, filters, kernel, stride and size."""
        return " ".join(filter(None, (self.label, *self._words(), self._place())))

    def _words(self) -> tuple[str, ...]:
        dilated = f"d{self.dilation[0]}" if max(self.dilation) > 1 else ""
        grouped = f"g{self.groups}" if self.groups > 1 else ""
        return f"{self.channels}-{self.filters}", self._window(), dilated, grouped

    def _window(self) -> str:
        step = f"/{self.stride[0]}" if max(self.stride) > 1 else ""
        return times(self.kernel) + step

    def _place(self) -> str:
        cube = len(set(self.size)) == 1
        return f"@{self.size[0] if cube else times(self.size)}"

    @property
    def options(self) -> dict[str, Any]:
        """Keywords that cuconv and PyTorch share."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    @property
    def out(self) -> Sizes:
        axes = zip(
            self.size,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)

    @property
    def patch(self) -> int:
        """Products in one output cell."""
        return self.channels // self.groups * prod(self.kernel)

    @property
    def w_shape(self) -> Sizes:
        return (self.filters, self.channels // self.groups, *self.kernel)

    def x_shape(self, batch: int) -> Sizes:
        return (batch, self.channels, *self.size)

    def y_shape(self, batch: int) -> Sizes:
        return (batch, self.filters, *self.out)

    def shapes(self, batch: int) -> dict[str, Sizes]:
        """Of every array, by its name in `benchmarks.definitions`."""
        return {
            "x": self.x_shape(batch),
            "w": self.w_shape,
            "dy": self.y_shape(batch),
        }

    def multiplications(self, batch: int) -> int:
        """The same for all its operations; padding counts as cells."""
        return prod(self.y_shape(batch)) * self.patch

    def under(self, tap: Sizes) -> tuple[slice, ...]:
        """The cells of the padded input that one tap meets, window after window."""
        axes = zip(tap, self.dilation, self.stride, self.out, strict=True)
        return tuple(slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in axes)


@dataclass(frozen=True)
class Transposed(Layer):
    """One transposed convolution: x (N, C, *size), w (C, K / groups, *kernel)."""

    output_padding: Sizes = field(kw_only=True)

    @property
    def back(self) -> Layer:
        """The convolution that leads back, from the result to the input."""
        return Layer(
            self.filters,
            self.out,
            self.channels,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    def _words(self) -> tuple[str, ...]:
        more = f"o{self.output_padding[0]}" if max(self.output_padding) else ""
        return *super()._words(), more

    @property
    def options(self) -> dict[str, Any]:
        return {**super().options, "output_padding": self.output_padding}

    @property
    def out(self) -> Sizes:
        axes = zip(
            self.size,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.output_padding,
            strict=True,
        )
        return tuple(
            (n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, k, s, p, d, o in axes
        )

    @property
    def patch(self) -> int:
        """Products that each input cell takes part in."""
        return self.back.patch

    @property
    def w_shape(self) -> Sizes:
        return self.back.w_shape

    def multiplications(self, batch: int) -> int:
        return self.back.multiplications(batch)


@dataclass(frozen=True)
class Pool(Layer):
    """One pooling, each channel by itself: x (N, C, *size)."""

    @property
    def kind(self) -> str:
        return "pooling"

    def _words(self) -> tuple[str, ...]:
        padded = f"p{self.padding[0]}" if max(self.padding) else ""
        return str(self.channels), self._window(), padded

    @property
    def options(self) -> dict[str, Any]:
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
        }

    def shapes(self, batch: int) -> dict[str, Sizes]:
        y_shape = self.y_shape(batch)
        return {"x": self.x_shape(batch), "dy": y_shape, "indices": y_shape}

    def multiplications(self, batch: int) -> int:
        """None: its time is that of the cells it moves."""
        del batch
        return 0


def times(sizes: Sizes) -> str:
    return "x".join(map(str, sizes))
