"""Loops over the elements of NumPy arrays, as the definition is first written down."""

from collections.abc import Iterable
from itertools import product

import numpy as np

from benchmarks.cases import Case, Host
from benchmarks.peers.base import Peer, RefusedError

MOST_MULTIPLICATIONS = 2_000_000


class Loops(Peer):
    """Two axes, without dilation and groups."""

    def forward(self, case: Case, x: Host, w: Host) -> Host:
        x, (down, right) = padded(case, x), case.layer.stride
        y = np.zeros(case.result_shape, np.float32)
        for n, k, i, j in every(y.shape):
            for c, u, v in every(w.shape[1:]):
                y[n, k, i, j] += x[n, c, i * down + u, j * right + v] * w[k, c, u, v]
        return y

    def input_grad(self, case: Case, dy: Host, w: Host) -> Host:
        dx = padded(case, np.zeros(case.result_shape, np.float32))
        down, right = case.layer.stride
        for n, k, i, j in every(dy.shape):
            for c, u, v in every(w.shape[1:]):
                dx[n, c, i * down + u, j * right + v] += dy[n, k, i, j] * w[k, c, u, v]
        return dx[:, :, *case.layer.inside]

    def weight_grad(self, case: Case, dy: Host, x: Host) -> Host:
        x, (down, right) = padded(case, x), case.layer.stride
        dw = np.zeros(case.result_shape, np.float32)
        for n, k, i, j in every(dy.shape):
            for c, u, v in every(dw.shape[1:]):
                dw[k, c, u, v] += dy[n, k, i, j] * x[n, c, i * down + u, j * right + v]
        return dw


def padded(case: Case, x: Host) -> Host:
    """The input in its frame of zeros, once it is known that the loops can run it."""
    layer = case.layer
    if len(layer.kernel) != 2 or layer.groups > 1 or max(layer.dilation) > 1:
        raise RefusedError("the loops have two axes, no dilation and no groups")
    count = layer.multiplications(case.batch)
    if count > MOST_MULTIPLICATIONS:
        raise RefusedError(f"{count} multiplications take too long in Python")
    return np.pad(x, layer.around)


def every(shape: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    return product(*map(range, shape))
