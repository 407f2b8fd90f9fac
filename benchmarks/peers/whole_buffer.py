"""The im2col of the tutorials: a strided view, copied whole, and matrix products.

It comes in two forms: a row for each position and one product for the batch, or a row
for each element of a patch and one product for each image.
"""

from math import prod
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.layers import Sizes
from benchmarks.peers.base import Peer, RefusedError, Wishes, cupy_device
from benchmarks.taps import Array

MOST_BYTES = 4 * 2**30


class WholeBuffer(Peer):
    """Both forms; arrays are split in groups, (N, G, channels, *spatial)."""

    xp: Any = np

    def windows(self, case: Case, x: Array) -> Array:
        """(N, G, C / G, *kernel, *out), a view of the padded input."""
        layer, shape = case.layer, patches_shape(case)
        if any(layer.padding):
            x = self.xp.pad(x, layer.around)
        image, channel, *steps = x.strides
        taps = [s * d for s, d in zip(steps, layer.dilation, strict=True)]
        moves = [s * d for s, d in zip(steps, layer.stride, strict=True)]
        strides = (image, channel * shape[2], channel, *taps, *moves)
        return self.xp.lib.stride_tricks.as_strided(x, shape, strides)

    def col2im(self, case: Case, patches: Array) -> Array:
        """Sum (N, G, C / G, *kernel, *out) into the images they came from."""
        layer = case.layer
        total = self.xp.zeros((*patches.shape[:3], *layer.padded), dtype=np.float32)
        for tap in np.ndindex(layer.kernel):
            total[..., *layer.under(tap)] += patches[:, :, :, *tap]
        return total[..., *layer.inside].reshape(case.result_shape)


def patches_shape(case: Case) -> Sizes:
    """(N, G, C / G, *kernel, *out), unless it is too large."""
    layer = case.layer
    channels = layer.channels // layer.groups
    shape = (case.batch, layer.groups, channels, *layer.kernel, *layer.out)
    if 4 * prod(shape) > MOST_BYTES:
        raise RefusedError(f"its columns would take {4 * prod(shape) / 2**30:.1f} GiB")
    return shape


def filters_of(case: Case, w: Array) -> Array:
    """(G, K / G, patch)."""
    return w.reshape(case.layer.groups, -1, case.layer.patch)


def by_group(case: Case, dy: Array) -> Array:
    """(N, G, K / G, positions)."""
    groups = case.layer.groups
    return dy.reshape(case.batch, groups, case.layer.filters // groups, -1)


class Rows(WholeBuffer):
    """A row for each position."""

    def rows(self, case: Case, x: Array) -> Array:
        """(G, N · positions, patch)."""
        rank = len(case.layer.kernel)
        kernel, out = range(3, 3 + rank), range(3 + rank, 3 + 2 * rank)
        ordered = self.windows(case, x).transpose(1, 0, *out, 2, *kernel)
        return ordered.reshape(case.layer.groups, -1, case.layer.patch)

    def dy_rows(self, case: Case, dy: Array) -> Array:
        """(G, N · positions, K / G)."""
        ordered = by_group(case, dy).transpose(1, 0, 3, 2)
        return ordered.reshape(case.layer.groups, -1, ordered.shape[-1])

    def forward(self, case: Case, x: Array, w: Array) -> Array:
        product = self.rows(case, x) @ filters_of(case, w).swapaxes(1, 2)
        ordered = product.reshape(case.layer.groups, case.batch, -1, product.shape[-1])
        return ordered.transpose(1, 0, 3, 2).reshape(case.result_shape)

    def input_grad(self, case: Case, dy: Array, w: Array) -> Array:
        images, groups, channels, *rest = patches_shape(case)
        rank = len(rest) // 2
        rows = self.dy_rows(case, dy) @ filters_of(case, w)
        parts = rows.reshape(groups, images, *rest[rank:], channels, *rest[:rank])
        out, kernel = range(2, 2 + rank), range(3 + rank, 3 + 2 * rank)
        return self.col2im(case, parts.transpose(1, 0, 2 + rank, *kernel, *out))

    def weight_grad(self, case: Case, dy: Array, x: Array) -> Array:
        product = self.dy_rows(case, dy).swapaxes(1, 2) @ self.rows(case, x)
        return product.reshape(case.result_shape)


class Columns(WholeBuffer):
    """A row for each element of a patch."""

    def columns(self, case: Case, x: Array) -> Array:
        """(N, G, patch, positions)."""
        shape = (case.batch, case.layer.groups, case.layer.patch, -1)
        return self.windows(case, x).reshape(shape)

    def forward(self, case: Case, x: Array, w: Array) -> Array:
        return (filters_of(case, w) @ self.columns(case, x)).reshape(case.result_shape)

    def input_grad(self, case: Case, dy: Array, w: Array) -> Array:
        shape = patches_shape(case)
        columns = filters_of(case, w).swapaxes(1, 2) @ by_group(case, dy)
        return self.col2im(case, columns.reshape(shape))

    def weight_grad(self, case: Case, dy: Array, x: Array) -> Array:
        rows = self.columns(case, x).swapaxes(2, 3)
        return (by_group(case, dy) @ rows).sum(0).reshape(case.result_shape)


class CupyColumns(Columns):
    """The second form on CuPy."""

    def __init__(self, wishes: Wishes) -> None:
        super().__init__(wishes)
        self.device = cupy_device()
        self.xp = self.device.xp

    def versions(self) -> dict[str, str]:
        return {"cupy": self.xp.__version__}
