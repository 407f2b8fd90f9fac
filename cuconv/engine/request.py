"""Checked calls, with everything that a plan depends on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cuconv.arrays import (
    Array,
    Types,
    alignment_of,
    any_dask,
    as_dtype,
    base_array,
    is_aligned,
    is_matrix_ready,
    module_of,
    module_of_blocks,
    resolve_types,
    stub_array,
)
from cuconv.backends import Backend
from cuconv.choices import check_options
from cuconv.engine.problem import (
    CONVOLUTION,
    ROLES,
    Problem,
    check_shape,
    in_groups,
    shapes_of,
    taps_reversed,
)
from cuconv.geometry import ConvGeometry
from cuconv.geometry.options import checked_shape
from cuconv.options import Options
from cuconv.overflow import magnitude, may_wrap, warn_of_wrapping

ZERO_POINTS = "x_zero_point", "w_zero_point"
# Bytes that a library may read at once.
PACKED_TO = 16
_OPTIONAL = ("bias", "indices", *ZERO_POINTS)


class Request(NamedTuple):
    """A checked call.

    Only shapes, strides and types of its arrays are read.
    """

    call: str
    geometry: ConvGeometry
    arrays: dict[str, Array]
    out: Array | None
    options: Options
    backend: Backend

    @property
    def types(self) -> Types:
        operands = {n: a for n, a in self.arrays.items() if n not in ZERO_POINTS}
        return resolve_types(operands, self.options.dtype)

    @property
    def zero_points(self) -> dict[str, Array]:
        """The zero points that were given, by the names of their arrays."""
        found = {n: self.arrays.get(f"{n}_zero_point") for n in ("x", "w")}
        return {name: zero for name, zero in found.items() if zero is not None}

    def warn_of_wrapping(self) -> None:
        """Warn if the type of the result may not hold every sum of products."""
        result, g = self.types.result, self.geometry
        if not may_wrap(result):
            return
        terms = {
            "forward": g.patch,
            "input_grad": g.group_filters * g.taps,
            "weight_grad": g.results * g.positions,
        }[CONVOLUTION.get(self.call, self.call)]
        arrays, zeros, bound = self.arrays, self.zero_points, terms
        names = list(ROLES[self.call])[:2]
        for name in names:
            # Less its zero point, a value is at most twice as large.
            bound *= magnitude(arrays[name].dtype) * (1 + (name in zeros))
        if "bias" in arrays:
            bound += magnitude(arrays["bias"].dtype)
        both = " and ".join(arrays[name].dtype.name for name in names)
        what = f"a sum of {terms} products of {both}"
        warn_of_wrapping(result, bound, what, "pass dtype='{}'")

    @property
    def is_input_grad(self) -> bool:
        """True if the result is x, or has its role: transposed convolution."""
        return self.call in ("input_grad", "transpose")

    @property
    def is_weight_grad(self) -> bool:
        return self.call.endswith("weight_grad")

    @property
    def result_shape(self) -> tuple[int, ...]:
        geometry = self.geometry
        if self.is_weight_grad:
            return geometry.w_shape
        return geometry.x_shape if self.is_input_grad else geometry.y_shape

    @property
    def result(self) -> Array:
        """The array for the result, or a stub that is C-contiguous."""
        if self.out is not None:
            return base_array(self.out)
        return stub_array(self.result_shape, self.types.result)

    def problem(self, *, flipped: bool = False) -> Problem:
        """The problem for strategies; ``flipped`` as in `Problem`."""
        backend, types = self.backend, self.types
        operand = backend.operand_type(types)
        op, roles = CONVOLUTION.get(self.call, self.call), ROLES[self.call]
        if flipped:
            source = next(name for name, role in roles.items() if role == "dy")
            op, roles = "forward", {**roles, source: "x"}
        in_roles = {
            role: self.arrays[name]
            for name, role in roles.items()
            if name in self.arrays
        }
        transposed = self.call in CONVOLUTION
        is_backward = flipped or op == "input_grad"
        # Whether weights are as they are multiplied.
        as_given = not flipped and (operand.kind != "c" or is_backward == transposed)
        packed = _packed(in_roles, self.out) if backend.xp is not np else frozenset()
        in_place = self._result_in_place(op, types)
        for role, array in in_roles.items():
            if array.dtype == operand and role != "bias" and (role != "w" or as_given):
                in_place |= _in_place(role, array, self.geometry, backend)
        return Problem(
            op=op,
            geometry=self.geometry,
            types=types,
            operand=operand,
            source=in_roles["dy" if op == "input_grad" else "x"].dtype,
            zero_copy=frozenset(in_place),
            needs_cast=frozenset(
                [role for role, array in in_roles.items() if array.dtype != operand]
            ),
            has_bias="bias" in self.arrays,
            deterministic=self.options.deterministic is not False,
            precision=self.options.precision or "standard",
            module=backend.xp.__name__,
            flipped=flipped,
            captured=backend.is_capturing(),
            transposed=transposed,
            packed=packed,
        )

    def _result_in_place(self, op: str, types: Types) -> set[str]:
        """``out`` if BLAS can write to the result; ``run`` if it is contiguous."""
        backend, geometry = self.backend, self.geometry
        can_store = backend.can_store(types, types.result)
        if self.out is None:
            fits = can_store and geometry.positions <= backend.largest_step
            return {"out", "run"} if fits else {"run"}
        found = {"run"} if _is_one_run(self.out) else set[str]()
        if can_store:
            role, out = "w" if op == "weight_grad" else "out", base_array(self.out)
            ready = _in_place(role, out, geometry, backend)
            found |= {"out" if name == role else name for name in ready}
        return found


def named_inputs(arrays: Mapping[str, Array | None]) -> dict[str, Array]:
    """The arrays that were given, by name, which must be of one module."""
    given = {n: a for n, a in arrays.items() if a is not None or n not in _OPTIONAL}
    if any_dask(given.values()):
        module_of_blocks(given)
    else:
        module_of(given)
    return {name: base_array(array) for name, array in given.items()}


def chosen_options(options: Mapping[str, Any], known: Any = Options._fields) -> Options:
    """The options with their defaults; raise for an unknown one."""
    check_options(options, known)
    return Options(**options)


def geometry_of(
    call: str, arrays: Mapping[str, Array], options: Options, more: Mapping[str, Any]
) -> ConvGeometry:
    """The geometry of a call; raise if its arrays do not fit.

    ``more`` is the shape of a gradient's result, and the arguments of a transposed
    convolution beside the options.
    """
    if "dy" in arrays and "x" not in arrays:
        _check_batch_axis(arrays["dy"].ndim, arrays["w"].ndim, more["x_shape"])
    shapes = {
        name: more[f"{name}_shape"] if f"{name}_shape" in more else arrays[name].shape
        for name in ("x", "w")
    }
    if call in CONVOLUTION:
        ends = more["output_padding"], more["output_size"]
        geometry = options.transposed_geometry(shapes["x"], shapes["w"], *ends)
    else:
        geometry = options.geometry(shapes["x"], shapes["w"])
    wanted = shapes_of(call, geometry)
    for name in ("dy", "bias"):
        if name in arrays:
            check_shape(name, arrays[name], wanted[name])
    return geometry


def _check_batch_axis(dy_axes: int, w_axes: int, x_shape: Sequence[int]) -> None:
    """Raise if only one of x_shape and dy has a batch axis."""
    shape = checked_shape("x", x_shape)
    if {len(shape), dy_axes} == {w_axes - 1, w_axes}:
        raise ValueError(
            f"x_shape has {len(shape)} axes: {shape}, and dy has {dy_axes}: both have "
            "a batch axis, or neither"
        )


def request_of_shapes(
    call: str,
    options: Options,
    more: Mapping[str, Any],
    backend: Backend,
    *,
    bias: bool,
) -> Request:
    """The request of a call on C-contiguous arrays of one type."""
    geometry = geometry_of(call, {}, options, more)
    shapes, dtype = shapes_of(call, geometry), as_dtype(options.dtype)
    arrays = {
        name: stub_array(shape, dtype, name=name)
        for name, shape in shapes.items()
        if bias or name != "bias"
    }
    return Request(call, geometry, arrays, None, options.settled(), backend)


def _in_place(
    role: str, array: Array, geometry: ConvGeometry, backend: Backend
) -> set[str]:
    """The role of an array that BLAS can read or write in place.

    For weights, ``reversed`` if it could with their taps in reverse.
    """
    if role != "w":
        cells = in_groups(array, geometry)
        fits = is_matrix_ready(cells, geometry.rank, backend.largest_step)
        return {role} if fits else set()
    if _is_weight_matrix(array, geometry, backend):
        return {role}
    other = taps_reversed(array, geometry)
    is_reversed = geometry.taps > 1 and _is_weight_matrix(other, geometry, backend)
    return {"reversed"} if is_reversed else set()


def _packed(in_roles: dict[str, Array], out: Array | None) -> frozenset[str]:
    """The names of arrays that a library takes as they are; see `Problem`."""
    arrays = dict(in_roles)
    if out is not None:
        arrays["out"] = base_array(out)
    found = {
        name
        for name, array in arrays.items()
        if array.flags.c_contiguous and alignment_of(array) % PACKED_TO == 0
    }
    return frozenset(found | ({"out"} if out is None else set()))


def _is_one_run(array: Array) -> bool:
    """Whether an array is one run of memory, in whichever order of its axes.

    Any of them may be in reverse.
    """
    step = array.dtype.itemsize
    pairs = zip(array.strides, array.shape, strict=True)
    for stride, size in sorted((abs(s), n) for s, n in pairs if n != 1):
        if stride != step:
            return False
        step *= size
    return True


def _is_weight_matrix(array: Array, geometry: ConvGeometry, backend: Backend) -> bool:
    """Whether weights are one run of memory, as filters × patch or as its transpose.

    Kernels on CUDA take them in the order of the layout alone.
    """
    if not is_aligned(array):
        return False
    if array.flags.c_contiguous or backend.xp is not np:
        return bool(array.flags.c_contiguous)
    inner = range(geometry.rank + 1)
    order = (*(i + 1 for i in inner), 0)
    if not geometry.channels_first:
        order = (geometry.rank + 1, *inner)
    return bool(array.transpose(order).flags.c_contiguous)
