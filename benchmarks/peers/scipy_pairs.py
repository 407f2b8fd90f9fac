"""SciPy: a correlation for every pair of a channel and a filter.

Forward by any of its three functions for it, and both gradients by `scipy.signal`.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import scipy
from scipy import ndimage
from scipy.signal import convolve, correlate, oaconvolve

from benchmarks.cases import Case, Host
from benchmarks.layers import Sizes
from benchmarks.peers.base import Peer, RefusedError, ResidentDevice

MOST_PAIRS = 4096


class Pairs(Peer):
    """Strides skip elements of a result for stride 1; dilation is zeros in filters."""

    device = ResidentDevice()

    def versions(self) -> dict[str, str]:
        return {"scipy": scipy.__version__}

    def correlated(self, image: Host, kernel: Host) -> Any:
        """The correlation where they overlap completely."""
        return correlate(image, kernel, "valid")

    def forward(self, case: Case, x: Host, w: Host) -> Host:
        x, w = np.pad(x, case.layer.around), dilated(w, case.layer.dilation)
        y = np.zeros(case.result_shape, np.float32)
        every = tuple(slice(None, None, step) for step in case.layer.stride)
        for n, k, c, channel in pairs(case):
            y[n, k] += self.correlated(x[n, channel], w[k, c])[every]
        return y

    def input_grad(self, case: Case, dy: Host, w: Host) -> Host:
        dy, w = dilated(dy, case.layer.stride), dilated(w, case.layer.dilation)
        dx = np.pad(np.zeros(case.result_shape, np.float32), case.layer.around)
        for n, k, c, channel in pairs(case):
            found = convolve(dy[n, k], w[k, c], "full")
            dx[n, channel][tuple(map(slice, found.shape))] += found
        return dx[:, :, *case.layer.inside]

    def weight_grad(self, case: Case, dy: Host, x: Host) -> Host:
        x, dy = np.pad(x, case.layer.around), dilated(dy, case.layer.stride)
        dw = np.zeros(case.result_shape, np.float32)
        axes = zip(case.layer.kernel, case.layer.dilation, strict=True)
        taps = tuple(slice(0, (taps - 1) * step + 1, step) for taps, step in axes)
        for n, k, c, channel in pairs(case):
            dw[k, c] += correlate(x[n, channel], dy[n, k], "valid")[taps]
        return dw


class OverlapAdd(Pairs):
    """By the Fourier transform, block by block."""

    def correlated(self, image: Host, kernel: Host) -> Any:
        return oaconvolve(image, np.flip(kernel), "valid")


class Ndimage(Pairs):
    """By loops over the taps; what hangs over the edge is cut off."""

    def correlated(self, image: Host, kernel: Host) -> Any:
        sizes = zip(image.shape, kernel.shape, strict=True)
        inside = (slice(k // 2, k // 2 + n - k + 1) for n, k in sizes)
        return ndimage.correlate(image, kernel, mode="constant")[tuple(inside)]


def pairs(case: Case) -> Iterator[tuple[int, int, int, int]]:
    """Image, filter, channel in its group, and channel."""
    layer = case.layer
    each, per_group = layer.channels // layer.groups, layer.filters // layer.groups
    count = case.batch * layer.filters * each
    if count > MOST_PAIRS:
        raise RefusedError(f"{count} pairs of channels and filters take too long")
    for n, k, c in product(range(case.batch), range(layer.filters), range(each)):
        yield n, k, c, k // per_group * each + c


def dilated(array: Host, steps: Sizes) -> Host:
    """Zeros between the elements along the spatial axes."""
    pairs = zip(array.shape[2:], steps, strict=True)
    sizes = [(n - 1) * step + 1 for n, step in pairs]
    wide = np.zeros((*array.shape[:2], *sizes), array.dtype)
    wide[:, :, *(slice(None, None, step) for step in steps)] = array
    return wide
