"""cuDNN over host memory: descriptors that are checked, engines that compute.

An object in the place of the loaded library.  What the real one refuses to describe or
to run is refused here too, with a status; every call is counted.
"""

import ctypes
import itertools
from collections import Counter

import numpy as np
from cupy.cuda import memory, stream

BAD, UNSUPPORTED = 2000, 3000
CONVOLUTION, ENGINE, CONFIGURATION, HEURISTICS, PLAN = 1, 2, 3, 4, 5
GRAPH, PACK, TENSOR = 15, 16, 17
# The attributes that each kind of descriptor takes, and the type of each.
ATTRIBUTES = {
    CONVOLUTION: {106: 3, 100: 1, 101: 7, 103: 3, 102: 3, 105: 3, 104: 3},
    TENSOR: {906: 3, 901: 1, 902: 3, 903: 3, 900: 3},
    GRAPH: {800: 0, 801: 15},
    HEURISTICS: {200: 8, 201: 15},
    PLAN: {400: 0, 401: 15},
    PACK: {1000: 3, 1001: 6, 1003: 6},
    10: dict.fromkeys((702, 703, 704, 705), 15) | {700: None, 701: None},
    12: dict.fromkeys((708, 709, 710, 711), 15) | {706: None, 707: None},
    11: dict.fromkeys((714, 715, 716, 717), 15) | {712: None, 713: None},
}
# x, w, y, alpha and beta of each operation, and its result.
OPERATIONS = {
    10: ("forward", 702, 704, 703, 705, 700, 701, "y"),
    12: ("input_grad", 708, 710, 709, 711, 706, 707, "x"),
    11: ("weight_grad", 714, 716, 715, 717, 712, 713, "w"),
}
TYPES = {0: "float32", 1: "float64", 2: "float16", 9: "bfloat16"}
TENSOR_CORES, NARROWED, FFT, ATOMIC, WINOGRAD = 0, 1, 3, 4, 5
# Engines by heuristics, in order: number, numerical notes, behaviour, bytes.
ENGINES = {
    3: (
        (10, (TENSOR_CORES,), (), 4096),
        (11, (NARROWED,), (), 0),
        (12, (TENSOR_CORES, WINOGRAD), (), 0),
        (20, (WINOGRAD,), (), 2048),
        (21, (WINOGRAD, 8), (), 512),
        (30, (ATOMIC,), (), 64),
        (40, (FFT,), (), 8192),
        (50, (), (), 1024),
        (60, (), (0,), 0),
        (51, (), (), 1536),
        (52, (), (), 1024),
        (53, (), (), 1024),
        (1, (), (), 256),
    ),
    2: ((0, (9,), (), 0),),
}


class Descriptor:
    def __init__(self, kind):
        self.kind, self.values, self.is_final = kind, {}, False

    def __getitem__(self, name):
        return self.values[name][1]


class Library:
    """``calls`` counts functions; ``ran`` lists engines with their operations."""

    version = 92801

    def __init__(self, engines=ENGINES):
        self.calls, self.ran, self.engines = Counter(), [], engines
        self.descriptors, self.handles = {}, {}
        self._numbers = itertools.count(1 << 20)

    def __getattribute__(self, name):
        if name.startswith("cudnn"):
            self.calls[name] += 1
        return super().__getattribute__(name)

    def cudnnGetVersion(self):
        return self.version

    def cudnnGetLastErrorString(self, text, size):
        text.value = b"the stand-in refuses"

    def cudnnCreate(self, handle):
        stream.refuse("a handle is made in a capture")
        handle._obj.value = next(self._numbers)
        self.handles[handle._obj.value] = 0
        return 0

    def cudnnDestroy(self, handle):
        del self.handles[handle.value]
        return 0

    def cudnnSetStream(self, handle, ptr):
        self.handles[handle.value] = ptr.value or 0
        return 0

    def cudnnBackendCreateDescriptor(self, kind, pointer):
        if kind not in (*ATTRIBUTES, ENGINE, CONFIGURATION):
            return BAD
        pointer._obj.value = next(self._numbers)
        self.descriptors[pointer._obj.value] = Descriptor(kind)
        return 0

    def cudnnBackendDestroyDescriptor(self, pointer):
        del self.descriptors[pointer.value]
        return 0

    def cudnnBackendSetAttribute(self, pointer, name, kind, count, values):
        found = self.descriptors[pointer.value]
        if found.is_final or name not in ATTRIBUTES.get(found.kind, {}):
            return BAD
        if ATTRIBUTES[found.kind][name] not in (kind, None):
            return BAD
        values = list(values)
        if len(values) != count.value:
            return BAD
        if kind == 15:
            values = [self.descriptors[value] for value in values]
            if not all(v.is_final or v.kind == CONFIGURATION for v in values):
                return BAD
        found.values[name] = kind, values
        return 0

    def cudnnBackendFinalize(self, pointer):
        found = self.descriptors[pointer.value]
        missing = set(ATTRIBUTES[found.kind]) - set(found.values)
        if missing or found.is_final:
            return BAD
        check = {
            CONVOLUTION: self._check_convolution,
            TENSOR: self._check_tensor,
            HEURISTICS: self._propose,
            PACK: lambda pack: 0 if pack[1000] == [1, 2, 3] else BAD,
            **dict.fromkeys(OPERATIONS, self._check_operation),
        }.get(found.kind, lambda _: 0)
        status = check(found)
        found.is_final = status == 0
        return status

    @staticmethod
    def _check_convolution(found):
        (rank,) = found[106]
        each = [found[name] for name in (102, 103, 104, 105)]
        fits = rank in (2, 3) and found[101] == [1]
        fits = fits and all(len(values) == rank for values in each)
        fits = fits and min(map(min, each[:2])) > 0 and min(map(min, each[2:])) >= 0
        return 0 if fits else BAD

    @staticmethod
    def _check_tensor(found):
        dims, steps = found[902], found[903]
        fits = len(dims) == len(steps) in (4, 5) and min(dims) > 0 and min(steps) > 0
        first = np.cumprod([1, *dims[:0:-1]])[::-1]
        turned = [dims[0], *dims[2:], dims[1]]
        last = np.cumprod([1, *turned[:0:-1]])[::-1]
        last = [last[0], last[-1], *last[1:-1]]
        packed = steps in ([int(n) for n in first], [int(n) for n in last])
        return 0 if fits and packed and found[900] == [16] else BAD

    @staticmethod
    def _check_operation(found):
        _, conv, x, w, y, alpha, beta, _ = OPERATIONS[found.kind]
        (conv,), x, w, y = found[conv], *(found[name][0] for name in (x, w, y))
        if len({each[901][0] for each in (x, w, y)}) > 1:
            return UNSUPPORTED
        wide = 5 if x[901] == [1] else 4
        if {found.values[alpha][0], found.values[beta][0]} != {wide}:
            return BAD
        if conv[100] != [int(wide == 5)] or found[alpha] != [1]:
            return BAD
        x, w, y = x[902], w[902], y[902]
        fits = x[0] == y[0] and y[1] == w[0] and x[1] % w[1] == 0
        if not fits or w[0] % (x[1] // w[1]):
            return BAD
        steps = zip(
            x[2:], w[2:], y[2:], *(conv[n] for n in (102, 103, 105, 104)), strict=True
        )
        fits = all(
            (size + before + after - dilation * (kernel - 1) - 1) // stride + 1 == out
            for size, kernel, out, dilation, stride, before, after in steps
        )
        return 0 if fits else BAD

    def _propose(self, found):
        found.proposed = self.engines.get(found[200][0], ())
        found.operation = found[201][0][801][0]
        return 0 if found.proposed else UNSUPPORTED

    def cudnnBackendGetAttribute(self, pointer, name, kind, room, count, values):
        found = self.descriptors[pointer.value]
        if name == 202:
            count._obj.value = len(found.proposed)
            for place, engine in zip(values or (), found.proposed, strict=False):
                mine = self.descriptors[place]
                mine.engine, mine.operation = engine, found.operation
            return 0
        if name == 300:
            self.descriptors[values[0]].engine = found.engine
            got = ()
        elif name == 402:
            got = (found[401][0].engine[3],)
        else:
            got = {
                303: lambda: (found.engine[3],),
                1301: lambda: (found.engine[0],),
                1303: lambda: found.engine[1],
                1305: lambda: found.engine[2],
            }[name]()
        for i, value in enumerate(got):
            values[i] = value
        count._obj.value = 1 if name == 300 else len(got)
        return 0

    def cudnnBackendExecute(self, handle, plan, pack):
        plan, pack = (self.descriptors[p.value] for p in (plan, pack))
        if not (plan.is_final and pack.is_final):
            return BAD
        if self.handles[handle.value] != stream.get_current_stream().ptr:
            return BAD
        configuration, (workspace,) = plan[401][0], pack[1003]
        number, _, _, nbytes = configuration.engine
        operation = configuration.operation
        if nbytes and not workspace:
            return BAD
        places = pack[1001]

        def action():
            if nbytes:
                memory.check_inside(workspace, workspace + nbytes)
                ctypes.memset(workspace, 0xFF, nbytes)
            self.ran.append((OPERATIONS[operation.kind][0], number))
            compute(operation, places)

        extra = [workspace] if nbytes else []
        stream.enqueue(action, (), [*places, *extra])
        return 0


def compute(operation, places):
    """The sums of an operation, tap by tap, in float64."""
    op, conv, x, w, y, _, beta, result = OPERATIONS[operation.kind]
    (conv,) = operation[conv]
    tensors = [operation[name][0] for name in (x, w, y)]
    arrays = dict(zip("xwy", map(view, tensors, places), strict=True))
    x, w, y = (arrays[name].astype(np.float64) for name in "xwy")
    stride, dilation, before = conv[103], conv[102], conv[105]
    groups, total = x.shape[1] // w.shape[1], {"x": x, "w": w, "y": y}[result]
    total = total * 0 if operation[beta] == [0] else total
    padding = [(0, 0), (0, 0), *zip(before, conv[104], strict=True)]
    padded = np.pad(np.zeros_like(x) if op == "input_grad" else x, padding)
    for tap in np.ndindex(*w.shape[2:]):
        reads = (Ellipsis,) + tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, dilation, y.shape[2:], stride, strict=True)
        )
        part, dy = grouped(padded[reads], groups), grouped(y, groups)
        at = w.reshape(groups, -1, *w.shape[1:])[(..., *tap)]
        if op == "forward":
            total += np.einsum("ngc...,gkc->ngk...", part, at).reshape(total.shape)
        elif op == "input_grad":
            back = np.einsum("ngk...,gkc->ngc...", dy, at)
            padded[reads] += back.reshape(padded[reads].shape)
        else:
            flat = (*part.shape[:3], -1)
            dy = dy.reshape(*dy.shape[:3], -1)
            sums = np.einsum("ngcp,ngkp->gkc", part.reshape(flat), dy)
            total[(..., *tap)] += sums.reshape(total.shape[:2])
    if op == "input_grad":
        inside = (slice(b, b + n) for b, n in zip(before, x.shape[2:], strict=True))
        total += padded[(..., *inside)]
    arrays[result][...] = total.astype(arrays[result].dtype)


def grouped(array, groups):
    return array.reshape(array.shape[0], groups, -1, *array.shape[2:])


def view(tensor, place):
    """The memory of a tensor, every byte of which is inside an allocation."""
    (code,), dims, steps = tensor[901], tensor[902], tensor[903]
    if TYPES[code] == "bfloat16":
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
    else:
        dtype = np.dtype(TYPES[code])
    nbytes = int(np.prod(dims)) * dtype.itemsize
    if place % 16:
        raise RuntimeError(f"CUDNN_STATUS_BAD_PARAM_MISALIGNED_POINTER: {place:#x}")
    memory.check_inside(place, place + nbytes)
    flat = np.frombuffer((ctypes.c_char * nbytes).from_address(place), dtype)
    strides = [step * dtype.itemsize for step in steps]
    return np.lib.stride_tricks.as_strided(flat, dims, strides)
