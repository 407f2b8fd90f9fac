"""Device arrays: host memory that refuses to become a host array."""

import operator
from types import SimpleNamespace

import numpy as np

from .cuda import memory
from .cuda.device import Device, current
from .cuda.stream import enqueue, get_current_stream, waited


class ndarray:
    """A view of a `memory.Block`."""

    __array_ufunc__ = None
    __hash__ = None

    def __init__(self, shape, dtype=float, memptr=None, strides=None):
        if memptr is None:
            raise NotImplementedError("an array of its own: use empty")
        self._host = memptr.view(shape, np.dtype(dtype), strides)
        self._block = memptr.mem[0]
        self.device = memptr.device

    @classmethod
    def _of(cls, host, block, device):
        made = cls.__new__(cls)
        made._host, made._block, made.device = host, block, device
        return made

    def __array__(self, *_, **__):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    strides = property(lambda self: self._host.strides)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    T = property(lambda self: self.transpose())
    real = property(lambda self: self._view(self._host.real))
    imag = property(lambda self: self._view(self._host.imag))

    @property
    def data(self):
        address = self._host.__array_interface__["data"][0]
        return Pointer(address, (self._block, self._host), self.device)

    @property
    def flags(self):
        return Flags(self._host.flags)

    def get(self):
        self._wait("get")
        return self._host.copy(order="K")

    def item(self, *args):
        self._wait("item")
        return self._host.item(*args)

    def _view(self, host):
        return ndarray._of(host, self._block, self.device)

    def __getitem__(self, key):
        return (
            self._view(self._host[key])
            if is_plain(key)
            else result(self._host[device_free(key)], self)
        )

    def __setitem__(self, key, value):
        host, place, cells = self._host, device_free(key), unwrap(value)
        enqueue(lambda: host.__setitem__(place, cells), hosts_of(self, value))

    def fill(self, value):
        self[...] = value

    def __len__(self):
        return len(self._host)

    def _wait(self, name):
        waited(name, get_current_stream(self.device.id))

    def __bool__(self):
        self._wait("bool")
        return bool(self._host)

    def __int__(self):
        self._wait("int")
        return int(self._host)

    def __float__(self):
        self._wait("float")
        return float(self._host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __repr__(self):
        return repr(self._host)


class Pointer:
    """CuPy's MemoryPointer: an address in a block."""

    def __init__(self, ptr, mem, device):
        self.ptr = ptr
        self.mem = mem
        self.device = device

    device_id = property(lambda self: self.device.id)

    def __add__(self, offset):
        return Pointer(self.ptr + offset, self.mem, self.device)

    def view(self, shape, dtype, strides):
        """The memory from here on, as NumPy sees it."""
        interface = {
            "version": 3,
            "data": (self.ptr, False),
            "typestr": f"|V{dtype.itemsize}",
            "shape": tuple(shape),
            "strides": strides,
        }
        holder = SimpleNamespace(__array_interface__=interface, mem=self.mem)
        return np.asarray(holder).view(dtype)


class Flags:
    """CuPy's flags: it has no read-only arrays."""

    def __init__(self, flags):
        self.c_contiguous = flags.c_contiguous
        self.f_contiguous = flags.f_contiguous
        self.owndata = flags.owndata


def is_plain(key):
    """Whether an index makes a view: slices and integers."""
    keys = key if isinstance(key, tuple) else (key,)
    return all(k is None or k is Ellipsis or isinstance(k, (int, slice)) for k in keys)


def device_free(key):
    keys = key if isinstance(key, tuple) else (key,)
    keys = tuple(map(unwrap, keys))
    return keys if isinstance(key, tuple) else keys[0]


def unwrap(value, *, anywhere=False):
    """The host array behind a device array; host arrays are refused.

    To compute, the array's device must be the current one; to view, it need not.
    """
    if isinstance(value, ndarray):
        if value.device != current() and not anywhere:
            raise ValueError(f"array of {value.device} used on {current()}")
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, (list, tuple)):
        return type(value)(map(unwrap, value))
    return value


def hosts_of(*values):
    """The host arrays behind those of the values that are device arrays."""
    return [v._host for v in values if isinstance(v, ndarray)]


def result(host, *parents):
    """Wrap what NumPy answered: a view of a parent, or fresh device memory."""
    if not isinstance(host, (np.ndarray, np.generic)):
        return host
    host = np.asanyarray(host)
    for parent in parents:
        if host.size and np.may_share_memory(host, parent._host):
            return ndarray._of(host, parent._block, parent.device)
    return ndarray._of(host, memory.Block(host), current())


def wrapped(function):
    """A NumPy function over device arrays."""

    def on_device(*args, **kwargs):
        arrays = [a for a in (*args, *kwargs.values()) if isinstance(a, ndarray)]
        named = {name: unwrap(value) for name, value in kwargs.items()}
        hosts = tuple(map(unwrap, args))
        out = kwargs.get("out")
        if isinstance(function, np.ufunc) and len(args) > function.nin:
            out = args[function.nin]
        if isinstance(out, ndarray):
            enqueue(lambda: function(*hosts, **named), hosts_of(*arrays))
            return out
        host = function(*hosts, **named)
        return host if isinstance(host, bool) else result(host, *arrays)

    on_device.__name__ = function.__name__
    return on_device


def viewing(function):
    """A method that only views, on whichever device."""

    def method(self, *args, **kwargs):
        host = function(self._host, *args, **kwargs)
        if host.size and not np.may_share_memory(host, self._host):
            return wrapped(lambda _: host)(self)
        return self._view(host)

    return method


for _name in ("reshape", "transpose", "swapaxes", "view"):
    setattr(ndarray, _name, viewing(getattr(np.ndarray, _name)))
for _name in (
    "astype",
    "sum",
    "copy",
    "ravel",
    "conj",
    "max",
    "min",
    "mean",
    "argmax",
    "all",
    "any",
):
    setattr(ndarray, _name, wrapped(getattr(np.ndarray, _name)))
for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and_",
    "or_",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
):
    _slot = _name.rstrip("_")
    _operator = getattr(operator, _name)
    setattr(ndarray, f"__{_slot}__", wrapped(_operator))
    if _slot not in ("eq", "ne", "lt", "le", "gt", "ge"):
        _reversed = wrapped(lambda a, b, f=_operator: f(b, a))
        setattr(ndarray, f"__r{_slot}__", _reversed)


def _in_place(name):
    function = getattr(np, name)

    def method(self, other):
        host, more = self._host, unwrap(other)
        enqueue(
            lambda: function(host, more, out=host, casting="same_kind"),
            hosts_of(self, other),
        )
        return self

    return method


for _slot, _name in (
    ("iadd", "add"),
    ("isub", "subtract"),
    ("imul", "multiply"),
    ("itruediv", "divide"),
):
    setattr(ndarray, f"__{_slot}__", _in_place(_name))
ndarray.__neg__ = wrapped(operator.neg)


def empty(shape, dtype=float, order="C"):
    """Fresh device memory, poisoned: reading it before writing shows."""
    host = np.empty(shape, dtype=dtype, order=order)
    made = ndarray._of(host, memory.Block(host), current())
    host.reshape(-1, order="A").view(np.uint8)[...] = 0xCD
    return made


def zeros(shape, dtype=float, order="C"):
    # Pages that nobody touches cost nothing: tests make arrays of gigabytes.
    host = np.zeros(shape, dtype=dtype, order=order)
    return ndarray._of(host, memory.Block(host), current())


def ones(shape, dtype=float, order="C"):
    return full(shape, 1, dtype, order)


def full(shape, value, dtype=None, order="C"):
    made = empty(shape, np.asarray(value).dtype if dtype is None else dtype, order)
    made._host[...] = value
    return made


def arange(*args, **kwargs):
    return asarray(np.arange(*args, **kwargs))


def array(value, dtype=None, copy=True, order="K"):
    """Copy a host array to the device, strides kept as CuPy keeps them."""
    if isinstance(value, ndarray):
        host = value._host
        fits = dtype is None or host.dtype == dtype
        if not copy and fits and (order == "K" or host.flags[f"{order}_CONTIGUOUS"]):
            return value
    else:
        host = np.asarray(value)
    dtype = host.dtype if dtype is None else np.dtype(dtype)
    if dtype.kind not in "biufcV" or not dtype.isnative:
        raise ValueError(f"Unsupported dtype {dtype}")
    made = np.empty_like(host, dtype=dtype, order=order, subok=False)
    made[...] = host
    return ndarray._of(made, memory.Block(made), current())


def asarray(value, dtype=None):
    if hasattr(value, "__cuda_array_interface__"):
        value = from_dlpack(value)
    return array(value, dtype, copy=False)


def from_dlpack(value):
    """A view of foreign device memory, which here is an array that the object owns."""
    return value.owner[...]


def asnumpy(value):
    return value.get() if isinstance(value, ndarray) else np.asarray(value)


def copyto(dst, src, casting="same_kind"):
    into, host = unwrap(dst), unwrap(src)
    if isinstance(host, np.ndarray) and not np.can_cast(
        host.dtype, into.dtype, casting
    ):
        raise TypeError(f"Cannot cast {host.dtype} to {into.dtype} in {casting} mode")
    enqueue(lambda: np.copyto(into, host, casting=casting), hosts_of(dst, src))


def may_share_memory(a, b):
    """Asked of addresses alone, on whichever device is current."""
    return a.device == b.device and np.may_share_memory(a._host, b._host)


__all__ = ["Device", "array", "asarray", "ndarray"]
