"""The problem of a pooling call: windows, and the reduction of their elements."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from cuconv.arrays import Array, DType
from cuconv.geometry import Tile, WindowGeometry

MAXIMUM, MEAN, NORM, TAKE = "max", "mean", "norm", "take"


@dataclass(frozen=True)
class PoolProblem:
    """One call, forward or for the gradient; arrays are (N, C, *spatial).

    ``source`` is the type of x, or of dy for a gradient; ``accumulate`` that of sums.
    ``values`` is the type of x if a gradient must find the maxima in x.  `TAKE` are the
    elements that indices name; ``over_array`` are those that count the elements of the
    whole array in place of one plane.
    """

    kind: str
    geometry: WindowGeometry
    source: DType
    accumulate: DType
    result: DType
    is_gradient: bool = False
    with_indices: bool = False
    values: DType | None = None
    counts_padding: bool = True
    divisor: int | None = None
    norm: float = 1.0
    over_array: bool = False

    @property
    def is_search(self) -> bool:
        """True if only the indices are needed: see `search`."""
        return self.with_indices and self.values is not None

    @property
    def search(self) -> "PoolProblem":
        """The call that finds the indices of the maxima for a gradient."""
        own = dict.fromkeys(("source", "accumulate", "result"), self.values)
        return replace(self, is_gradient=False, with_indices=True, **own)

    @property
    def index_steps(self) -> tuple[int, int, int]:
        """How far indices of neighbouring elements, images and channels are apart."""
        g = self.geometry
        if not self.over_array:
            return 1, 0, 0
        image = g.channels * g.cells
        return (1, image, g.cells) if g.channels_first else (g.channels, image, 1)

    @property
    def common_divisor(self) -> int | None:
        """The divisor of every sum; None if windows have different counts."""
        axes = self.geometry.axes
        if self.divisor is not None:
            return self.divisor
        same = self.counts_padding or not self.geometry.is_padded
        plain = not any(axis.overhang or axis.windows for axis in axes)
        return self.geometry.taps if same and plain else None

    def count(self, axis: int, output: int) -> int:
        """Elements along an axis that the divisor of an output counts, at least one."""
        found = self.geometry.axes[axis].taps_of(output, padding=self.counts_padding)
        return max(found, 1)


class PoolInputs(NamedTuple):
    """The arrays that a gradient is computed from; None where it needs none."""

    dy: Array
    indices: Array | None = None
    x: Array | None = None
    y: Array | None = None


class PoolTiling(NamedTuple):
    """Tiles of a call: outputs (elements, for a gradient), channels; its workers.

    ``pieces`` is how many there are.  ``threads`` is the number of workers that there
    were to choose from, 0 where that does not matter.
    """

    tile: Tile = Tile(1, ())
    channels: int = 0
    workers: int = 1
    pieces: int = 1
    threads: int = 0
