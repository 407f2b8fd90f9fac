"""The im2col of the tutorials: a strided view, copied whole, and matrix products.

It comes in two forms: a row for each position and one product for the batch, or a row
for each cell of a patch and one product for each image.
"""

from math import prod
from typing import Any

import numpy as np

from benchmarks.cases import Array, Case
from benchmarks.peers.base import Peer, RefusedError, Wishes, cupy_device

MOST_BYTES = 4 * 2**30


class WholeBuffer(Peer):
    """What both forms share; arrays are split in groups (N, G, channels, *spatial)."""

    xp: Any = np

    def windows(self, case: Case, x: Array) -> Array:
        """(N, G, C / G, *kernel, *out), a view of the padded input."""
        layer = case.layer
        check_size(case)
        if any(layer.padding):
            around = ((0, 0), (0, 0), *((p, p) for p in layer.padding))
            x = self.xp.pad(x, around)
        image, channel, *steps = x.strides
        taps = [s * d for s, d in zip(steps, layer.dilation, strict=True)]
        moves = [s * d for s, d in zip(steps, layer.stride, strict=True)]
        channels = layer.channels // layer.groups
        return self.xp.lib.stride_tricks.as_strided(
            x,
            (case.batch, layer.groups, channels, *layer.kernel, *layer.out),
            (image, channel * channels, channel, *taps, *moves),
        )

    def folded(self, case: Case, patches: Array) -> Array:
        """Sum (N, G, C / G, *kernel, *out) into the images they came from."""
        layer = case.layer
        padded = [n + 2 * p for n, p in zip(layer.size, layer.padding, strict=True)]
        channels = layer.channels // layer.groups
        total = self.xp.zeros(
            (case.batch, layer.groups, channels, *padded), dtype=np.float32
        )
        for tap in np.ndindex(layer.kernel):
            total[..., *layer.under(tap)] += patches[:, :, :, *tap]
        inner = zip(layer.padding, layer.size, strict=True)
        tiling = total[..., *(slice(p, p + n) for p, n in inner)]
        return tiling.reshape(case.result_shape)


def check_size(case: Case) -> None:
    layer = case.layer
    nbytes = 4 * case.batch * layer.groups * layer.patch * prod(layer.out)
    if nbytes > MOST_BYTES:
        raise RefusedError(f"its columns would take {nbytes / 2**30:.1f} GiB")


def filters_of(case: Case, w: Array) -> Array:
    """(G, K / G, patch)."""
    return w.reshape(case.layer.groups, -1, case.layer.patch)


class Rows(WholeBuffer):
    """A row for each position."""

    def rows(self, case: Case, x: Array) -> Array:
        """(G, N · positions, patch)."""
        rank = len(case.layer.kernel)
        windows = self.windows(case, x)
        kernel, out = range(3, 3 + rank), range(3 + rank, 3 + 2 * rank)
        ordered = windows.transpose(1, 0, *out, 2, *kernel)
        return ordered.reshape(case.layer.groups, -1, case.layer.patch)

    def dy_rows(self, case: Case, dy: Array) -> Array:
        """(G, N · positions, K / G)."""
        groups, each = case.layer.groups, case.layer.filters // case.layer.groups
        cells = dy.reshape(case.batch, groups, each, -1)
        return cells.transpose(1, 0, 3, 2).reshape(groups, -1, each)

    def forward(self, case: Case, x: Array, w: Array) -> Array:
        layer = case.layer
        product = self.rows(case, x) @ filters_of(case, w).swapaxes(1, 2)
        split = product.reshape(layer.groups, case.batch, *layer.out, -1)
        last = split.ndim - 1
        ordered = split.transpose(1, 0, last, *range(2, last))
        return ordered.reshape(case.result_shape)

    def input_grad(self, case: Case, dy: Array, w: Array) -> Array:
        check_size(case)
        layer, rank = case.layer, len(case.layer.kernel)
        rows = self.dy_rows(case, dy) @ filters_of(case, w)
        channels = layer.channels // layer.groups
        split = rows.reshape(
            layer.groups, case.batch, *layer.out, channels, *layer.kernel
        )
        out, kernel = range(2, 2 + rank), range(3 + rank, 3 + 2 * rank)
        return self.folded(case, split.transpose(1, 0, 2 + rank, *kernel, *out))

    def weight_grad(self, case: Case, dy: Array, x: Array) -> Array:
        product = self.dy_rows(case, dy).swapaxes(1, 2) @ self.rows(case, x)
        return product.reshape(case.result_shape)


class Columns(WholeBuffer):
    """A row for each cell of a patch."""

    def columns(self, case: Case, x: Array) -> Array:
        """(N, G, patch, positions)."""
        layer = case.layer
        windows = self.windows(case, x)
        return windows.reshape(case.batch, layer.groups, layer.patch, -1)

    def dy_columns(self, case: Case, dy: Array) -> Array:
        """(N, G, K / G, positions)."""
        groups = case.layer.groups
        return dy.reshape(case.batch, groups, case.layer.filters // groups, -1)

    def forward(self, case: Case, x: Array, w: Array) -> Array:
        product = filters_of(case, w) @ self.columns(case, x)
        return product.reshape(case.result_shape)

    def input_grad(self, case: Case, dy: Array, w: Array) -> Array:
        check_size(case)
        layer = case.layer
        columns = filters_of(case, w).swapaxes(1, 2) @ self.dy_columns(case, dy)
        channels = layer.channels // layer.groups
        shape = (case.batch, layer.groups, channels, *layer.kernel, *layer.out)
        return self.folded(case, columns.reshape(shape))

    def weight_grad(self, case: Case, dy: Array, x: Array) -> Array:
        turned = self.columns(case, x).swapaxes(2, 3)
        product = (self.dy_columns(case, dy) @ turned).sum(0)
        return product.reshape(case.result_shape)


class CupyColumns(Columns):
    """The second form on CuPy."""

    def __init__(self, wishes: Wishes) -> None:
        super().__init__(wishes)
        self.device = device = cupy_device()
        self.xp = device.xp

    def versions(self) -> dict[str, str]:
        return {"cupy": self.xp.__version__}
