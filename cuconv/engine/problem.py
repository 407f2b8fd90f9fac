"""The problem of a strategy: the hashable value that its plan depends on."""

from dataclasses import dataclass, fields, replace
from functools import cached_property

from cuconv.arrays import Array, DType, Types, grouped
from cuconv.backends.blocking import uses_tensor_cores
from cuconv.geometry import ConvGeometry

# The names of the adjoint convolution's operations for a transposed convolution: y of
# one is x of the other, and the weights are the same.
TRANSPOSED = {
    "input_grad": "transpose",
    "forward": "transpose_input_grad",
    "weight_grad": "transpose_weight_grad",
}
# The operation of the adjoint convolution for each transposed operation.
CONVOLUTION = {call: op for op, call in TRANSPOSED.items()}
# The arrays of each operation, in the order of its arguments, and the role of each in
# the convolution that the strategies run.
ROLES = {
    "forward": {"x": "x", "w": "w", "bias": "bias"},
    "input_grad": {"dy": "dy", "w": "w"},
    "weight_grad": {"dy": "dy", "x": "x"},
    "transpose": {"x": "dy", "w": "w", "bias": "bias"},
    "transpose_input_grad": {"dy": "x", "w": "w"},
    "transpose_weight_grad": {"dy": "x", "x": "dy"},
}
NAMES = {
    "forward": "the forward pass",
    "input_grad": "the gradient of the input",
    "weight_grad": "the gradient of the weights",
    "transpose": "the transposed convolution",
    "transpose_input_grad": "the gradient of a transposed convolution's input",
    "transpose_weight_grad": "the gradient of a transposed convolution's weights",
}

# OpenBLAS uses one thread for products up to this size, whatever the setting.
SINGLE_THREADED_PRODUCT = 2**18


@dataclass(frozen=True)
class Problem:
    """Everything that a strategy's plan depends on; equal problems have equal plans.

    ``zero_copy`` names the arrays (``x``, ``w``, ``dy``, ``out``) that BLAS can read or
    write in place: they have the right type, and strides of a matrix.  It contains
    ``run`` if the result is contiguous, and ``reversed`` if weights, or the gradient
    for them, are such a matrix with their taps in reverse.  ``source`` is the type of
    the array that is gathered, and ``needs_cast`` names all arrays whose type is not
    that of the operands.  ``flipped`` marks the forward pass over dy that an input
    gradient is: its weights are those of the caller, filters and channels exchanged,
    taps in reverse.
    ``packed`` names the arrays on CUDA that are C-contiguous and aligned to 16 bytes.
    ``captured``: the call is recorded into a CUDA graph, which can launch kernels but
    not allocate.  ``transposed``: it is one of `TRANSPOSED`, where the arrays have the
    roles of the adjoint convolution; a transposed convolution is an input gradient, but
    for what is conjugated.
    """

    op: str
    geometry: ConvGeometry
    types: Types
    operand: DType
    source: DType
    zero_copy: frozenset[str]
    needs_cast: frozenset[str] = frozenset()
    has_bias: bool = False
    deterministic: bool = True
    precision: str = "standard"
    module: str = "numpy"
    flipped: bool = False
    packed: frozenset[str] = frozenset()
    captured: bool = False
    transposed: bool = False

    @property
    def call(self) -> str:
        """The public name of the operation."""
        op = "input_grad" if self.flipped else self.op
        return TRANSPOSED[op] if self.transposed else op

    @property
    def conjugates_weights(self) -> bool:
        """True if weights are multiplied conjugated: complex ones, in a gradient."""
        backward = self.flipped or self.op == "input_grad"
        return self.operand.kind == "c" and backward != self.transposed

    @property
    def result_channels(self) -> int:
        """Channels of x or y, whichever is the result: the length of a bias."""
        g = self.geometry
        return g.channels if self.op == "input_grad" else g.filters

    @property
    def fast(self) -> bool:
        return self.precision == "fast"

    @property
    def uniform(self) -> bool:
        """True if a kernel of one type can read every array and store the result."""
        stored = self.types.result in (self.operand, self.types.accumulate)
        return stored and not self.needs_cast

    @cached_property
    def is_for_tensor_cores(self) -> bool:
        """True if its products run on tensor cores, if the device has them."""
        return uses_tensor_cores(self.operand, fast=self.fast)

    @property
    def fingerprint(self) -> str:
        """The same text for equal problems, in every process, captured or not."""
        special = {"zero_copy", "needs_cast", "packed", "captured"}
        names = (field.name for field in fields(self) if field.name not in special)
        words = [f"{name}={getattr(self, name)!r}" for name in names]
        casts = (f"needs_cast {name}" for name in sorted(self.needs_cast))
        packed = (f"packed {name}" for name in sorted(self.packed))
        return "; ".join((*words, *sorted(self.zero_copy), *casts, *packed))

    @property
    def single_threaded(self) -> bool:
        """True if every product is so small that BLAS uses no second thread."""
        return self.geometry.multiplications <= SINGLE_THREADED_PRODUCT

    @cached_property
    def as_forward(self) -> "Problem | None":
        """An input gradient as the forward pass over dy; None if there is no such form.

        It needs stride 1 and a basic convolution; see `ConvGeometry.adjoint`.
        """
        g = self.geometry
        if self.op != "input_grad" or not (g.is_unit_stride and g.is_basic):
            return None
        x = {"x"} if "dy" in self.zero_copy else set()
        return replace(
            self,
            op="forward",
            geometry=self.geometry.adjoint,
            zero_copy=frozenset(x | (self.zero_copy & {"out"})),
            packed=frozenset(),
            needs_cast=frozenset("x" if n == "dy" else n for n in self.needs_cast),
            flipped=True,
        )


def shapes_of(call: str, geometry: ConvGeometry) -> dict[str, tuple[int, ...]]:
    """The shapes of an operation's arrays by their names."""
    channels = geometry.channels if call in CONVOLUTION else geometry.filters
    own = {
        "x": geometry.x_shape,
        "w": geometry.w_shape,
        "dy": geometry.y_shape,
        "bias": (channels,),
    }
    return {name: own[role] for name, role in ROLES[call].items()}


def check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """Raise if an array has another shape."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape} and must have {shape}")


def taps_reversed(w: Array, geometry: ConvGeometry) -> Array:
    """View weights with their taps in reverse along every axis."""
    taps = (slice(None, None, -1),) * geometry.rank
    return w[(..., *taps) if geometry.channels_first else taps]


def in_groups(array: Array, geometry: ConvGeometry) -> Array:
    """View x, y, or their gradients as (N, G, C/G, *spatial)."""
    return grouped(
        array,
        geometry.groups,
        geometry.rank,
        channels_first=geometry.channels_first,
        batched=geometry.batched,
    )
