"""Flipped kernels: the same convolution over a view of w, its taps in reverse."""

from collections.abc import Callable, Iterable

from cuconv.arrays import Array
from cuconv.engine.lowering import Lowering, Viewed
from cuconv.engine.problem import taps_reversed
from cuconv.engine.request import Request
from cuconv.geometry import ConvGeometry


class Flipped(Viewed):
    """A convolution with a view of its weights, or of their gradient: ``name``."""

    def __init__(self, inner: Lowering, name: str, geometry: ConvGeometry) -> None:
        super().__init__(inner)
        self.name, self.geometry = name, geometry

    def views(self, arrays: dict[str, Array]) -> dict[str, Array]:
        w = arrays.get(self.name)
        return {} if w is None else {self.name: taps_reversed(w, self.geometry)}

    def weights_of(self, w: Array) -> Iterable[Array]:
        return self.inner.weights_of(taps_reversed(w, self.geometry))


def lower(request: Request, lower_other: Callable[[Request], Lowering]) -> Lowering:
    """Lower the convolution that is not flipped, over such a view."""
    geometry, result = request.geometry, request.result
    options = request.options._replace(flip_kernel=False)
    request = request._replace(options=options)
    if geometry.taps == 1 or result.shape != request.result_shape:
        return lower_other(request)  # a result of another shape is refused later
    if request.is_weight_grad:
        request = request._replace(out=taps_reversed(result, geometry))
        return Flipped(lower_other(request), "out", geometry)
    w = taps_reversed(request.arrays["w"], geometry)
    request = request._replace(arrays={**request.arrays, "w": w})
    return Flipped(lower_other(request), "w", geometry)
