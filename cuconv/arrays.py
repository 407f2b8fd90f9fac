"""Module, device, layout, type and overlap of arrays.

CuPy is never imported here: it is looked up among the modules already imported,
because a CuPy array can only exist where CuPy was imported first.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np

Array: TypeAlias = Any


class SupportsArray(Protocol):
    """The part of NumPy's and CuPy's arrays that type checkers ask for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of elements along each axis."""

    @property
    def dtype(self) -> Any:
        """The type of the elements."""

    @property
    def ndim(self) -> int:
        """The number of axes."""


# NumPy's arrays give NumPy's, of any type and shape; others give their own kind.
ArrayT = TypeVar("ArrayT", "np.ndarray[Any, Any]", SupportsArray)
DType: TypeAlias = np.dtype[Any]

SUPPORTED_TYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
)
_HALF_TYPES = ("float16", "bfloat16")
_NDARRAY = np.ndarray
# The flags tell whether an array is aligned, and may be written to.
_layout = attrgetter("shape", "strides", "dtype", "flags.num")
# No kernel reads or writes more bytes at once.
ALIGNMENT = 16


class Types(NamedTuple):
    """The three types of a sum of products: terms, running sum, stored result."""

    operand: DType
    accumulate: DType
    result: DType


def is_half(dtype: DType) -> bool:
    """True if this is float16 or bfloat16."""
    # NumPy works the name out each time.
    return dtype.itemsize == 2 and dtype.name in _HALF_TYPES


def native(dtype: DType) -> DType:
    """A type in the machine's own byte order, which results have."""
    return dtype.newbyteorder("=")


def accumulator(dtype: DType) -> DType:
    """The type that elements of this type are summed in: float32 for halves."""
    return np.dtype(np.float32) if is_half(dtype) else dtype


def array_module(*arrays: Array) -> Any:
    """The module, NumPy or CuPy, that all these arrays belong to.

    Parameters
    ----------
    *arrays
        NumPy or CuPy arrays; ``None`` is passed over.

    Returns
    -------
    module
        ``numpy`` or ``cupy``.

    Raises
    ------
    TypeError
        If host and device arrays are mixed, or an argument is not an array.
    ValueError
        If device arrays are on different devices.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> cuconv.array_module(np.zeros(3)).__name__
    'numpy'
    """
    named = {f"argument {i}": a for i, a in enumerate(arrays) if a is not None}
    return module_of(named)


def module_of(arrays: dict[str, Array]) -> Any:
    """`array_module` with the arguments' names for its messages."""
    xp = _common_module(arrays)
    if xp is not np:
        _check_devices(arrays)
    return xp


def module_of_blocks(arrays: dict[str, Array]) -> Any:
    """`module_of` for arrays among which there are Dask arrays.

    A Dask array counts as its blocks do; the device of future blocks is not known.
    """
    return _common_module({name: sample_of(array) for name, array in arrays.items()})


def is_dask(array: object) -> bool:
    """True if it is a Dask array: blocks that are computed later."""
    # A Dask array can only exist where Dask was imported.
    return isinstance(array, getattr(sys.modules.get("dask.array"), "Array", ()))


def any_dask(arrays: Iterable[object]) -> bool:
    """True if there is a Dask array among them."""
    return "dask.array" in sys.modules and any(map(is_dask, arrays))


def sample_of(array: Array) -> Array:
    """An array itself, or an empty one of the kind of a Dask array's blocks."""
    return array._meta if is_dask(array) else array  # noqa: SLF001 - Dask's name for it


def _common_module(arrays: dict[str, Array]) -> Any:
    """NumPy or CuPy; devices are not checked."""
    on_device = []
    on_host = []
    for name, array in arrays.items():
        if _is_on_host(array):
            on_host.append(name)
        elif _is_on_device(array):
            on_device.append(name)
        else:
            raise TypeError(f"{name} must be a NumPy or CuPy array; {_instead(array)}")
    if on_host and on_device:
        raise TypeError(
            f"host and device arrays are mixed: {', '.join(on_host)} in NumPy, "
            f"{', '.join(on_device)} in CuPy; cupy.asarray and cupy.asnumpy convert "
            "arrays, and the method to of a layer its weights"
        )
    return sys.modules["cupy"] if on_device else np


def is_array(array: object) -> bool:
    """True if it is an array of one of the two modules."""
    return _is_on_host(array) or _is_on_device(array)


def _is_on_host(array: object) -> bool:
    masked = isinstance(array, np.ma.MaskedArray)
    return isinstance(array, np.ndarray) and not masked


def _is_on_device(array: object) -> bool:
    return isinstance(array, _device_type())


def _device_type() -> Any:
    """The type of CuPy's arrays; one can only exist where CuPy was imported."""
    return getattr(sys.modules.get("cupy"), "ndarray", ())


# What `cuconv.asarray` can look through.
_SHARED = "__dlpack__", "__cuda_array_interface__", "__array_interface__"


def _instead(array: object) -> str:
    """The type of something that is not an array, and the call that converts it."""
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    masked = isinstance(array, np.ma.MaskedArray)
    if not masked and any(hasattr(array, name) for name in _SHARED):
        return f"got {kind}, of which cuconv.asarray makes one without a copy"
    if masked:
        return f"got {kind}, whose method filled makes one"
    if isinstance(array, (list, tuple)):
        return f"got {kind}, of which numpy.asarray makes one"
    return f"got {kind}"


def _check_devices(arrays: dict[str, Array]) -> None:
    devices = {name: int(array.device.id) for name, array in arrays.items()}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on device {i}" for name, i in devices.items())
        raise ValueError(f"arrays are on different devices: {places}")


class Source(NamedTuple):
    """The source of the views of an `ArrayStub`.

    ``address`` is the stub's address in NumPy; ``misaligned`` is the address of the
    array that it stands for, modulo `ALIGNMENT`.
    """

    name: str
    address: int
    misaligned: int = 0


class ArrayStub(np.ndarray):
    """A NumPy array without memory: only shape, strides and type can be read.

    Steps of a program are recorded on stubs: every view of one remembers its source.
    They have no data to read or write, so NumPy's functions raise.
    """

    __array_ufunc__ = None  # type: ignore[assignment]

    source: Source | None

    @property
    def layout(self) -> tuple[object, ...]:
        """Everything that a plan may read of the array."""
        moves = tuple(
            stride if size > 1 and self.size else 0
            for size, stride in zip(self.shape, self.strides, strict=True)
        )
        return self.shape, moves, self.dtype, alignment_of(self)

    def __reduce__(self) -> tuple[Any, ...]:
        made = partial(stub_array, misaligned=alignment_of(self))
        return made, (self.shape, self.dtype, self.strides)

    def __deepcopy__(self, memo: object) -> "ArrayStub":
        return self

    def __array_finalize__(self, base: Any) -> None:
        self.source = getattr(base, "source", None)

    def __array_function__(self, function: Any, *_: Any) -> Any:
        raise TypeError(f"{function.__name__} of an array without memory")


def stub_array(
    shape: tuple[int, ...],
    dtype: DType,
    strides: tuple[int, ...] | None = None,
    *,
    name: str = "",
    misaligned: int = 0,
) -> ArrayStub:
    """Stand in for an array of this layout, C-contiguous without ``strides``."""
    if strides is None:
        strides = contiguous_strides(shape, dtype.itemsize)
    odd = misaligned % dtype.alignment
    cell = np.empty(dtype.itemsize + odd, np.uint8)[odd:].view(dtype)
    layout = shape, strides
    memory = np.lib.stride_tricks.as_strided(cell, *layout, writeable=False)
    stub = memory.view(ArrayStub)
    stub.source = Source(name, stub.__array_interface__["data"][0], misaligned)
    return stub


def stub_of(name: str, array: Array) -> Any:
    """A stub of a NumPy or CuPy array; other operands are returned as they are."""
    if isinstance(array, ArrayStub):
        odd = alignment_of(array)
    elif isinstance(array, np.ndarray):
        odd = 0 if array.flags.aligned else 1
    elif is_array(array):
        odd = alignment_of(array)
    else:
        return array
    layout = array.shape, array.dtype, array.strides
    return stub_array(*layout, name=name, misaligned=odd)


def layouts_of(arrays: Iterable[Array | None]) -> tuple[object, ...] | None:
    """A key for shapes, strides, types and alignment; None for other arrays."""
    key: list[object] = []
    array: Any
    device_type: Any = None
    for array in arrays:
        kind = type(array)
        if kind is _NDARRAY:
            key.append(_layout(array))
        elif array is None:
            key.append(None)
        elif kind is (device_type := device_type or _device_type()):
            place = array.data
            key += (array.shape, array.strides, array.dtype, place.ptr % ALIGNMENT)
            key.append(place.device_id)
        else:
            return None
    return tuple(key)


def contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Strides of a C-contiguous array, in bytes."""
    strides, step = [], itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def offset_of(view: ArrayStub) -> int:
    """The offset of a view of a stub from its source, in bytes."""
    return int(view.__array_interface__["data"][0] - view.source.address)  # type: ignore[union-attr]


def alignment_of(array: Array) -> int:
    """The address of an array modulo `ALIGNMENT`."""
    if isinstance(array, ArrayStub):
        return (array.source.misaligned + offset_of(array)) % ALIGNMENT  # type: ignore[union-attr]
    return int(array.data.ptr % ALIGNMENT)


def strided(
    array: Array,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int = 0,
    dtype: DType | None = None,
) -> Array:
    """View the memory of an array with other strides, from ``offset`` bytes on.

    ``dtype`` is the type of the array, or a void type for several of its items.
    """
    dtype = array.dtype if dtype is None else dtype
    if not isinstance(array, np.ndarray):
        return type(array)(shape, dtype, array.data + offset, strides=strides)
    if type(array) is np.ndarray and array.flags.c_contiguous and array.size:
        return np.ndarray(shape, dtype, array, offset, strides)
    if dtype != array.dtype:
        size = array.itemsize
        items = (*shape, dtype.itemsize // size), (*strides, size)
        return strided(array, *items, offset).view(dtype)[..., 0]
    if offset:
        # The interface has no word for bfloat16.
        array = np.asarray(_Shifted(array, offset)).view(array.dtype)
    is_stub = isinstance(array, ArrayStub)
    return np.lib.stride_tricks.as_strided(array, shape, strides, subok=is_stub)


class _Shifted:
    """View the memory of an array from an offset in bytes on as one element."""

    def __init__(self, array: Array, offset: int) -> None:
        interface = dict(array.__array_interface__)
        address, read_only = interface["data"]
        interface.update(data=(address + offset, read_only), shape=(1,), strides=None)
        self.__array_interface__ = interface
        self.array = array


def base_array(array: Array) -> Array:
    """The array without what a subclass adds (`numpy.matrix`, `numpy.memmap`)."""
    kind = type(array)
    if kind is np.ndarray or kind is ArrayStub or not _is_on_host(array):
        return array
    return array.view(np.ndarray)


def as_dtype(dtype: Any) -> DType:
    """The dtype that an option ``dtype`` names."""
    try:
        resolved: DType = np.dtype(dtype)
    except TypeError:
        raise TypeError(
            f"dtype must be a type of NumPy's or its name, as 'float32'; got {dtype!r}"
        ) from None
    return resolved


def check_type(name: str, dtype: DType) -> None:
    """Raise for a type that NumPy and CuPy do not share."""
    if dtype.name not in SUPPORTED_TYPES:
        raise TypeError(
            f"{name} has type {dtype}; supported: {', '.join(SUPPORTED_TYPES)}"
        )


def resolve_types(arrays: dict[str, Array], dtype: Any) -> Types:
    """The types of a convolution of these arrays with a result of ``dtype``.

    Half types are summed in float32.  Everything else is summed in the type that
    NumPy gives the operands and the result together.
    """
    dtypes = tuple((name, array.dtype) for name, array in arrays.items())
    return _resolved(dtypes, None if dtype is None else as_dtype(dtype))


@lru_cache(maxsize=1024)
def _resolved(arrays: tuple[tuple[str, DType], ...], dtype: DType | None) -> Types:
    for name, own in arrays:
        check_type(name, own)
    operand = _common("operands", *(own for _, own in arrays))
    result = operand if dtype is None else dtype
    check_type("dtype", result)
    if not np.can_cast(operand, result, "same_kind"):
        raise TypeError(f"a result of type {operand} cannot be cast to dtype {result}")
    accumulate = _common("operands and dtype", operand, result)
    wide = accumulator(accumulate)
    # Halves are multiplied as they are where their products are summed in float32.
    as_half = is_half(operand) and wide == np.float32
    return Types(operand if as_half else wide, wide, result)


def _common(what: str, *dtypes: DType) -> DType:
    try:
        return np.result_type(*map(native, dtypes))
    except TypeError:
        names = ", ".join(dict.fromkeys(d.name for d in dtypes))
        raise TypeError(
            f"the types of the {what} have no common type: {names}"
        ) from None


def check_out(out: Array, shape: tuple[int, ...], dtype: DType) -> None:
    """Raise if ``out`` cannot take the result as it is."""
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape} and the result has {shape}")
    if out.dtype != dtype:
        raise TypeError(f"out has type {out.dtype} and the result has {dtype}")
    if not getattr(out.flags, "writeable", True):
        raise ValueError("out is read-only")
    if _overlaps_itself(shape, out.strides, out.dtype.itemsize):
        raise ValueError(
            f"out has overlapping elements: shape {shape}, strides {out.strides}"
        )


def _overlaps_itself(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> bool:
    """True if two arrays may share an element; never False where they do."""
    if 0 in shape:
        return False
    reach = itemsize
    steps = ((abs(s), n) for s, n in zip(strides, shape, strict=True) if n > 1)
    for step, count in sorted(steps):
        if step < reach:
            return True
        reach += step * (count - 1)
    return False


def check_overlap(xp: Any, out: Array, inputs: dict[str, Array]) -> None:
    """Raise if ``out`` may share memory with an input."""
    for name, array in inputs.items():
        if _overlap(xp, out, array):
            raise ValueError(
                f"out may share memory with {name} (overlapping or interleaved)"
            )


def _overlap(xp: Any, a: Array, b: Array) -> bool:
    if not xp.may_share_memory(a, b):
        return False
    if xp is not np:
        return True
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def merged_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride of these axes merged into one; None if they cannot be."""
    if 0 in shape:
        return 0
    last: int | None = None
    for size, stride in zip(shape, strides, strict=True):
        if size != 1:
            if last is not None and last != size * stride:
                return None
            last = stride
    return last or 0


def grouped(
    array: Array, groups: int, rank: int, *, channels_first: bool, batched: bool
) -> Array:
    """View an array of any layout as (N, G, C/G, *spatial)."""
    whole = array if batched else array[None]
    first = (
        whole if channels_first else whole.transpose(0, rank + 1, *range(1, rank + 1))
    )
    channels = first.shape[1]
    # Splitting one axis in two never copies, whatever the strides.
    shape = (first.shape[0], groups, channels // groups, *first.shape[2:])
    return first.reshape(shape)


def flattened(array: Array, rank: int) -> Array:
    """View the last ``rank`` axes, which must be mergeable, as one."""
    if merged_stride(array.shape[-rank:], array.strides[-rank:]) is None:
        raise RuntimeError(f"axes do not merge: {array.shape}, strides {array.strides}")
    return array.reshape(
        *array.shape[: array.ndim - rank], math.prod(array.shape[-rank:])
    )


class Stored(NamedTuple):
    """A buffer in two views: element by element, and as the matrix for BLAS.

    ``cells`` is (N, G, C, *kernel, *out) and ``matrix`` (N, G, C·taps, positions) or,
    wide, (1, G, C·taps, N·positions).
    """

    cells: Array
    matrix: Array


def stored(
    flat: Array,
    head: tuple[int, int, int],
    kernel: tuple[int, ...],
    out: tuple[int, ...],
    *,
    channels_first: bool,
    wide: bool = False,
) -> Stored:
    """View a flat buffer as elements, in the axis order of the layout.

    With channels first, positions are the fastest axis and the patch is channels then
    taps; with channels last, the patch is the fastest axis, taps then channels.
    ``wide`` puts the positions of all images in one row of the matrix.
    """
    n, g, c = head
    k, o = len(kernel), len(out)
    taps, positions = math.prod(kernel), math.prod(out)
    flat = flat[: n * g * c * taps * positions]
    if channels_first and wide:
        cells = flat.reshape(g, c, *kernel, n, *out)
        cells = cells.transpose(2 + k, 0, 1, *range(2, 2 + k), *range(3 + k, 3 + k + o))
        return Stored(cells, flat.reshape(1, g, c * taps, n * positions))
    if channels_first:
        return Stored(
            flat.reshape(*head, *kernel, *out), flat.reshape(n, g, c * taps, positions)
        )
    outer = (g, n) if wide else (n, g)
    cells = flat.reshape(*outer, *out, *kernel, c)
    inner = (*range(2 + o, 2 + o + k), *range(2, 2 + o))
    cells = cells.transpose(*((1, 0) if wide else (0, 1)), 2 + o + k, *inner)
    batch = (1, g, n * positions) if wide else (n, g, positions)
    return Stored(cells, flat.reshape(*batch, taps * c).swapaxes(-1, -2))


def is_aligned(array: Array) -> bool:
    """True if every item is aligned to its size; NumPy copies the array if not."""
    return bool(getattr(array.flags, "aligned", True))


def is_matrix_ready(array: Array, rank: int, largest_step: int) -> bool:
    """True if the last ``rank`` axes merge into the columns or rows of a BLAS matrix.

    ``array`` is grouped: (N, G, C, *spatial).  BLAS needs one contiguous matrix axis;
    the stride of the other must be at least one row and at most ``largest_step`` items.
    """
    if 0 in array.shape:
        return True
    if not is_aligned(array):
        return False
    item = array.dtype.itemsize
    spatial = math.prod(array.shape[-rank:])
    run = merged_stride(array.shape[-rank:], array.strides[-rank:])
    channels, step = array.shape[-rank - 1], array.strides[-rank - 1]
    if run is None or max(run, step) > largest_step * item:
        return False
    by_channel = _is_blas_row(spatial, run, channels, step, item)
    return by_channel or _is_blas_row(channels, step, spatial, run, item)


def _is_blas_row(inner: int, run: int, outer: int, step: int, item: int) -> bool:
    contiguous = inner == 1 or run == item
    spaced = outer == 1 or (step >= inner * item and step % item == 0)
    return contiguous and spaced
