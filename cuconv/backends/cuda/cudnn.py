"""NVIDIA's cuDNN, by the C interface of its graphs.

A graph of one operation is described attribute by attribute; for a graph, the library
proposes configurations of its engines, those first that it expects to be fastest; and a
plan of one of them runs on addresses.

Numbers are those of ``cudnn_graph.h``, which stay the same between versions.
"""

import ctypes
import threading
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import cupy

from cuconv.arrays import Array, DType, accumulator, is_half
from cuconv.backends.cuda.compiler import Do
from cuconv.backends.cuda.device import is_capturing
from cuconv.backends.library import LibraryConv, LibraryEngine

# The first version that reports the workspace of a configuration.
_OLDEST = 90200
# Engines of a kind that are tried: the first few, and each that needs less workspace.
_FEW = 3
_ALIGNMENT = 16

# Types of attributes, with those of C.
_HANDLE, _DATA_TYPE, _INT64, _FLOAT, _DOUBLE, _POINTER = 0, 1, 3, 4, 5, 6
_MODE, _HEURISTIC, _NUMERICAL, DESCRIPTOR, _BEHAVIOUR = 7, 8, 11, 15, 19
_C_TYPES: dict[int, Any] = {
    **dict.fromkeys((_HANDLE, _POINTER, DESCRIPTOR), ctypes.c_void_p),
    **dict.fromkeys((_DATA_TYPE, _MODE, _HEURISTIC, _NUMERICAL), ctypes.c_int),
    _BEHAVIOUR: ctypes.c_int,
    _INT64: ctypes.c_int64,
    _FLOAT: ctypes.c_float,
    _DOUBLE: ctypes.c_double,
}

# Kinds of descriptors.
_CONVOLUTION, _ENGINE, _CONFIGURATION, HEURISTICS, PLAN = 1, 2, 3, 4, 5
_GRAPH, _ARGUMENTS, _TENSOR = 15, 16, 17


class _Operation(NamedTuple):
    """The numbers of an operation: its kind, and those of its attributes."""

    kind: int
    convolution: int
    x: int
    w: int
    y: int
    alpha: int
    beta: int


_OPERATIONS = {
    "forward": _Operation(10, 702, x=704, w=703, y=705, alpha=700, beta=701),
    "input_grad": _Operation(12, 708, x=710, w=709, y=711, alpha=706, beta=707),
    "weight_grad": _Operation(11, 714, x=716, w=715, y=717, alpha=712, beta=713),
}
_DATA_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 9}
# The attribute of a handle.
_HANDLE_OF = {_GRAPH: 800, PLAN: 400}
# The identifiers of x, w and y in a graph.
_IDENTIFIERS = 1, 2, 3
# The best heuristics, and engines that compute whatever is left.
_WAYS = 3, 2
_CROSS_CORRELATION = 1

# What an engine does with numbers, and how it is made.
_TENSOR_CORES, _NARROWED, _NARROW_SUMS, _FFT, _ATOMIC, _WINOGRAD = range(6)
_WINOGRAD_6, _WINOGRAD_13 = 7, 8
_COMPILED_NOW = 0


@cache
def load() -> Any:
    """The library.

    Raises
    ------
    ImportError
        If it is not installed, or older than 9.2.
    """
    from cuda import pathfinder

    try:
        path = pathfinder.load_nvidia_dynamic_lib("cudnn").abs_path
        library = ctypes.CDLL(path)
    except (RuntimeError, OSError) as error:
        raise ImportError(str(error)) from error
    return checked(library)


def checked(library: Any) -> Any:
    """The library, if it is new enough."""
    found = int(library.cudnnGetVersion())
    if found < _OLDEST:
        raise ImportError(f"version {found} is older than {_OLDEST}")
    return library


def version() -> str:
    """The version of the library, as 9.28.1."""
    number = int(load().cudnnGetVersion())
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


class CudnnError(RuntimeError):
    """A call of cuDNN failed."""


def check(status: int) -> None:
    """Raise if a call has failed."""
    if status:
        text = ctypes.create_string_buffer(256)
        load().cudnnGetLastErrorString(text, ctypes.c_size_t(len(text)))
        words = text.value.decode(errors="replace")
        raise CudnnError(f"cuDNN failed with status {status}: {words}")


class Descriptor:
    """A descriptor, with those that it refers to."""

    def __init__(self, library: Any, kind: int) -> None:
        self._library, self._keeps = library, list[Any]()
        self.pointer = ctypes.c_void_p()
        check(library.cudnnBackendCreateDescriptor(kind, ctypes.byref(self.pointer)))

    def __del__(self) -> None:
        if self.pointer:
            self._library.cudnnBackendDestroyDescriptor(self.pointer)

    def set(self, name: int, kind: int, *values: Any) -> None:
        """Set an attribute."""
        self._keeps += values
        found = [v.pointer if isinstance(v, Descriptor) else v for v in values]
        array = (_C_TYPES[kind] * len(found))(*found)
        count = ctypes.c_int64(len(found))
        check(
            self._library.cudnnBackendSetAttribute(
                self.pointer, name, kind, count, array
            )
        )

    def keep(self, other: "Descriptor") -> None:
        """Let another descriptor live as long as this one."""
        self._keeps.append(other)

    def get(self, name: int, kind: int, room: int = 16) -> list[Any]:
        """The values of an attribute, at most as many as there is room for."""
        values, count = (_C_TYPES[kind] * room)(), ctypes.c_int64()
        self._read(name, kind, room, count, values)
        return list(values)[: count.value]

    def descriptors(self, name: int, kind: int, room: int) -> "list[Descriptor]":
        """The descriptors of this kind that are the values of an attribute."""
        found = [Descriptor(self._library, kind) for _ in range(room)]
        values = (ctypes.c_void_p * room)(*(each.pointer for each in found))
        count = ctypes.c_int64()
        self._read(name, DESCRIPTOR, room, count, values)
        return found[: count.value]

    def count(self, name: int) -> int:
        """The number of descriptors that are the values of an attribute."""
        count = ctypes.c_int64()
        self._read(name, DESCRIPTOR, 0, count, None)
        return count.value

    def _read(
        self, name: int, kind: int, room: int, count: ctypes.c_int64, values: Any
    ) -> None:
        check(
            self._library.cudnnBackendGetAttribute(
                *(self.pointer, name, kind, ctypes.c_int64(room)),
                *(ctypes.byref(count), values),
            )
        )

    def finalize(self) -> "Descriptor":
        """Finish a description; the library checks it."""
        check(self._library.cudnnBackendFinalize(self.pointer))
        return self


class _Plans(NamedTuple):
    """The engines of a convolution, and the plan of each."""

    engines: tuple[LibraryEngine, ...]
    plans: dict[LibraryEngine, Descriptor]


class Handle:
    """A handle of the current device."""

    def __init__(self) -> None:
        self._library, self.pointer = load(), ctypes.c_void_p()
        check(self._library.cudnnCreate(ctypes.byref(self.pointer)))

    def __del__(self) -> None:
        if self.pointer:
            self._library.cudnnDestroy(self.pointer)


class Handles(threading.local):
    """The handles that a thread runs plans with, one for each device."""

    def __init__(self) -> None:
        self.each: dict[int, Handle] = {}

    def current(self, device: int) -> ctypes.c_void_p:
        """The handle of the current device, on CuPy's current stream."""
        if device not in self.each:
            self.each[device] = Handle()
        found = self.each[device].pointer
        stream = cupy.cuda.get_current_stream(device).ptr
        check(load().cudnnSetStream(found, ctypes.c_void_p(stream)))
        return found


RUNNING = Handles()
# Plans are made with a handle that lives as long as they do, one at a time.
PLANNING: dict[int, Handle] = {}
_planning = threading.RLock()


class Cudnn:
    """See `cuconv.backends.ConvLibrary`."""

    def __init__(self, do: Do, device: int) -> None:
        self._do, self._device = do, device

    def engines(self, conv: LibraryConv) -> tuple[LibraryEngine, ...]:
        device = self._device
        if is_capturing(cupy, device) and not (
            device in PLANNING and device in RUNNING.each
        ):
            return ()  # a capture forbids what setting up would do
        return planned(conv, device).engines

    def run(
        self,
        conv: LibraryConv,
        engine: LibraryEngine,
        x: Array,
        w: Array,
        y: Array,
        workspace: Array | None,
    ) -> None:
        library, device = load(), self._device
        plan = planned(conv, device).plans[engine]

        def step(*addresses: int) -> None:
            given, handle = arguments(*addresses), RUNNING.current(device)
            check(library.cudnnBackendExecute(handle, plan.pointer, given.pointer))

        step.takes_addresses = True  # type: ignore[attr-defined]
        self._do(step, x, w, y, 0 if workspace is None else workspace)


def arguments(x: int, w: int, y: int, workspace: int) -> Descriptor:
    """The addresses that a plan runs on."""
    found = _new(_ARGUMENTS)
    found.set(1000, _INT64, *_IDENTIFIERS)
    found.set(1001, _POINTER, x, w, y)
    found.set(1003, _POINTER, workspace)
    return found.finalize()


@lru_cache(maxsize=1024)
def planned(conv: LibraryConv, device: int) -> _Plans:
    """The plans of the first engines, and of each that needs less workspace."""
    with cupy.cuda.Device(device), _planning:
        return _planned(conv, device)


def _planned(conv: LibraryConv, device: int) -> _Plans:
    plans: dict[LibraryEngine, Descriptor] = {}
    least = None
    for choice, configuration in enumerate(_configurations(conv, device)):
        (size,) = configuration.get(303, _INT64, 1)
        if len(plans) >= _FEW and size >= least:
            continue
        plan = aimed(PLAN, device)
        plan.set(401, DESCRIPTOR, configuration)
        try:
            plan.finalize()
        except CudnnError:
            continue
        (size,) = plan.get(402, _INT64, 1)
        engine = configuration.descriptors(300, _ENGINE, 1)[0]
        (number,) = engine.get(1301, _INT64, 1)
        plans[LibraryEngine(number, choice, size)] = plan
        least = size if least is None else min(size, least)
        if len(plans) >= _FEW and not least:
            break
    return _Plans(tuple(plans), plans)


def _configurations(conv: LibraryConv, device: int) -> Iterator[Descriptor]:
    """Configurations that the precision and determinism allow, fastest first."""
    graph = aimed(_GRAPH, device)
    try:
        graph.set(801, DESCRIPTOR, _operation(conv))
        graph.finalize()
    except CudnnError:
        return  # what it does not support, it refuses to describe
    for way in _WAYS:
        heuristics = aimed(HEURISTICS, device)
        heuristics.set(201, DESCRIPTOR, graph)
        heuristics.set(200, _HEURISTIC, way)
        try:
            heuristics.finalize()
        except CudnnError:
            continue
        room = heuristics.count(202)
        for found in heuristics.descriptors(202, _CONFIGURATION, room):
            (engine,) = found.descriptors(300, _ENGINE, 1)
            numerical = engine.get(1303, _NUMERICAL)
            if _COMPILED_NOW in engine.get(1305, _BEHAVIOUR):
                continue
            if is_allowed(numerical, conv):
                found.keep(graph)
                yield found


def _operation(conv: LibraryConv) -> Descriptor:
    """The description of an operation; of one axis as of two."""
    unit, numbers = len(conv.axes) == 1, _OPERATIONS[conv.op]
    axes = conv.axes
    spatial = _new(_CONVOLUTION)
    wide = _DOUBLE if conv.dtype.name == "float64" else _FLOAT
    spatial.set(106, _INT64, len(axes) + unit)
    spatial.set(100, _DATA_TYPE, _DATA_TYPES[accumulator(conv.dtype).name])
    spatial.set(101, _MODE, _CROSS_CORRELATION)
    spatial.set(103, _INT64, *(1,) * unit, *(a.stride for a in axes))
    spatial.set(102, _INT64, *(1,) * unit, *(a.dilation for a in axes))
    spatial.set(105, _INT64, *(0,) * unit, *(a.before for a in axes))
    spatial.set(104, _INT64, *(0,) * unit, *(a.after for a in axes))
    operation = _new(numbers.kind)
    operation.set(numbers.convolution, DESCRIPTOR, spatial.finalize())
    shapes = conv.x_shape, conv.w_shape, conv.y_shape
    names = numbers.x, numbers.w, numbers.y
    for identifier, name, shape in zip(_IDENTIFIERS, names, shapes, strict=True):
        sizes = (*shape[:2], *(1,) * unit, *shape[2:])
        tensor = _tensor(identifier, sizes, conv.dtype, conv.channels_first)
        operation.set(name, DESCRIPTOR, tensor)
    operation.set(numbers.alpha, wide, 1)
    operation.set(numbers.beta, wide, int(conv.adds))
    return operation.finalize()


def aimed(kind: int, device: int) -> Descriptor:
    """A graph, heuristics or a plan, for a device."""
    descriptor = _new(kind)
    if kind in _HANDLE_OF:
        if device not in PLANNING:
            PLANNING[device] = Handle()
        descriptor.set(_HANDLE_OF[kind], _HANDLE, PLANNING[device].pointer)
    return descriptor


def is_allowed(notes: Sequence[int], conv: LibraryConv) -> bool:
    """True if a precision, a type and determinism allow an engine with these notes."""
    found, fast = set(notes), conv.precision == "fast"
    if found & {_NARROWED, _NARROW_SUMS}:
        return False
    if _ATOMIC in found and conv.deterministic:
        return False
    if _TENSOR_CORES in found and conv.dtype.name == "float32":
        # TF32; transforms would magnify its rounding.
        return fast and _WINOGRAD not in found
    if _WINOGRAD in found:
        large = found & {_WINOGRAD_6, _WINOGRAD_13}
        rounds = large or is_half(conv.dtype)
        return fast or (conv.precision == "standard" and not rounds)
    return fast or _FFT not in found


def _new(kind: int) -> Descriptor:
    return Descriptor(load(), kind)


def _tensor(
    identifier: int,
    shape: tuple[int, ...],
    dtype: DType,
    channels_first: bool,  # noqa: FBT001
) -> Descriptor:
    tensor = _new(_TENSOR)
    tensor.set(906, _INT64, identifier)
    tensor.set(901, _DATA_TYPE, _DATA_TYPES[dtype.name])
    tensor.set(902, _INT64, *shape)
    tensor.set(903, _INT64, *packed_steps(shape, channels_first=channels_first))
    tensor.set(900, _INT64, _ALIGNMENT)
    return tensor.finalize()


def packed_steps(shape: tuple[int, ...], *, channels_first: bool) -> tuple[int, ...]:
    """The steps of a packed array (N, C, *spatial), in elements."""
    rank = len(shape) - 2
    order = (0, *range(2, rank + 2), 1)
    steps, step = [0] * len(shape), 1
    for axis in reversed(range(rank + 2) if channels_first else order):
        steps[axis] = step
        step *= shape[axis]
    return tuple(steps)
