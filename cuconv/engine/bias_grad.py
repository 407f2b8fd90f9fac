"""The gradient for a bias: the sum of dy over images and positions."""

from collections.abc import Sequence

from cuconv.arrays import Array, resolve_types
from cuconv.backends import Backend
from cuconv.geometry import ConvGeometry
from cuconv.memory import Buffer, MemoryLimitError
from cuconv.options import Options
from cuconv.overflow import magnitude, may_wrap, warn_of_wrapping


class BiasGrad:
    """The plan of a gradient for a bias of so many channels."""

    threads, names = 0, ("dy",)

    def __init__(
        self,
        dy: Array,
        geometry: ConvGeometry,
        channels: int,
        options: Options,
        backend: Backend,
    ) -> None:
        self.types = resolve_types({"dy": dy}, options.dtype)
        result, terms = self.types.result, geometry.results * geometry.positions
        if may_wrap(result):
            bound, what = terms * magnitude(dy.dtype), f"a sum of {terms} {dy.dtype}"
            warn_of_wrapping(result, bound, what, "pass dtype='{}'")
        self.backend = backend
        sums = Buffer("sums", channels, self.types.accumulate)
        self.workspace_bytes = backend.overhead(1, sums.dtype.itemsize) + sums.nbytes
        limit = options.memory_limit
        if isinstance(limit, int) and limit < self.workspace_bytes:
            what = "the gradient of the bias"
            raise MemoryLimitError(limit, self.workspace_bytes, what)
        spatial = [True] * geometry.rank
        summed = geometry.arranged(True, False, spatial)  # noqa: FBT003
        self.axes = tuple(axis for axis, is_summed in enumerate(summed) if is_summed)

    def run(self, arrays: Sequence[Array | None], out: None) -> Array:
        """Sum dy in the type for sums, and round once."""
        del out
        (dy,) = arrays
        sums = self.backend.sum(dy, self.axes, self.types.accumulate)
        with self.backend.device_of(dy):
            return sums.astype(self.types.result, copy=False)
