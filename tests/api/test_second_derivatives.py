"""Second derivatives by the library's three calls, against central differences.

A convolution is linear in x and in w, so its gradients are convolutions of the same
kind, and so are theirs: `docs/general.md` has the table.
"""

from typing import Any

import numpy as np
import pytest
from support import Case, cupy_slowly, to_host

import cuconv
from cuconv.testing import assert_close, numerical_gradient

CASES = {
    "one axis": Case((2, 2, 6), (2, 2, 3), {"padding": 1}),
    "strides leave cells over": Case(
        (1, 2, 6, 5), (2, 2, 2, 3), {"stride": (3, 2), "padding": ((1, 0), 1)}
    ),
    "dilation": Case((1, 1, 7, 4), (2, 1, 3, 2), {"dilation": (2, 3), "padding": 1}),
    "groups": Case((2, 4, 5), (6, 2, 2), {"groups": 2, "stride": 2}),
    "three axes": Case((1, 1, 3, 4, 2), (2, 1, 2, 3, 1), {"padding": (0, 1, 0)}),
    "reflect": Case((1, 2, 4), (2, 2, 3), {"padding": 4, "padding_mode": "reflect"}),
    "symmetric": Case(
        (1, 2, 4), (2, 2, 3), {"padding": 5, "padding_mode": "symmetric"}
    ),
    "replicate": Case(
        (1, 1, 3, 4),
        (2, 1, 2, 2),
        {"padding": ((2, 0), (1, 3)), "padding_mode": "replicate", "stride": (1, 2)},
    ),
    "circular": Case(
        (1, 1, 3, 2, 2),
        (1, 1, 2, 2, 1),
        {"padding": ((1, 0), (0, 3), 0), "padding_mode": "circular"},
    ),
    "input dilation": Case(
        (1, 2, 4, 3),
        (2, 2, 3, 2),
        {"input_dilation": (2, 3), "stride": (1, 2), "padding": 1},
    ),
    "batch groups": Case((4, 2, 5), (4, 2, 2), {"batch_groups": 2, "stride": 2}),
}


class Loss:
    """L = Σ y³ / 6 with y = conv(x, w): its slopes are y² / 2, its curvature is y."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def conv(self, x: Any, w: Any) -> Any:
        return cuconv.conv(x, w, **self.case.options)

    def slope(self, x: Any, w: Any, dx: Any, dw: Any) -> float:
        """The derivative of L along (dx, dw), by forward passes alone."""
        along = self.conv(dx, w) + self.conv(x, dw)
        return float((self.conv(x, w) ** 2 / 2 * along).sum())

    def curvature(self, x: Any, w: Any, dx: Any, dw: Any) -> tuple[Any, Any]:
        """The Hessian of L times (dx, dw), by the library's calls."""
        x_shape, w_shape, options = x.shape, w.shape, self.case.options
        y = self.conv(x, w)
        dy, along = y**2 / 2, y * (self.conv(dx, w) + self.conv(x, dw))
        for_x = cuconv.conv_input_grad(along, w, x_shape, **options)
        for_x += cuconv.conv_input_grad(dy, dw, x_shape, **options)
        for_w = cuconv.conv_weight_grad(along, x, w_shape, **options)
        for_w += cuconv.conv_weight_grad(dy, dx, w_shape, **options)
        return for_x, for_w


@cupy_slowly
@pytest.mark.parametrize("name", CASES)
def test_hessians_times_vectors(xp, name) -> None:
    loss = Loss(CASES[name])
    rng = np.random.default_rng(0)
    shapes = 2 * [loss.case.x_shape, loss.case.w_shape]
    x, w, dx, dw = (xp.asarray(rng.standard_normal(shape)) for shape in shapes)
    for_x, for_w = loss.curvature(x, w, dx, dw)
    close = {"rtol": 1e-6, "atol": 1e-7}
    wanted = numerical_gradient(lambda x: loss.slope(x, w, dx, dw), x)
    assert_close(for_x, wanted, **close)
    wanted = numerical_gradient(lambda w: loss.slope(x, w, dx, dw), w)
    assert_close(for_w, wanted, **close)
    assert np.abs(to_host(for_w)).max() > 0.1
