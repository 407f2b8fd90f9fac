"""RawKernel and RawModule: the kernel's text, compiled by the host's C++ compiler."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
import threading
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

from ._arrays import ndarray
from .cuda import memory
from .cuda.device import current
from .cuda.stream import enqueue, get_current_stream

SHIM = Path(__file__).parent.parent / "cuda_shim.h"
MOST_BLOCKS = 2**31 - 1
MOST_THREADS = 1024
MOST_SHARED = 48 * 1024

# One entry per launch: (name, grid, block, device, stream), for tests to look at.
launches = []
# Rows of matrices, loaded together from one bank, by kernel.
bank_conflicts = Counter()

_lock = threading.Lock()


def _flags():
    extra = os.environ.get("CUCONV_SHIM_FLAGS", "").split()
    return ["-std=c++17", "-O1", "-fPIC", "-w", *extra]


def _folder():
    folder = os.environ.get("CUCONV_SHIM_CACHE") or (
        Path(tempfile.gettempdir()) / f"cuconv-shim-{os.getuid()}"
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def compiled(code, name, options):
    """The launcher of a kernel, from the cache on disk or from the compiler."""
    text = code + (
        '\nextern "C" void shim_launch('
        "unsigned grid, unsigned block, unsigned shared, void **args)"
        f"\n{{ shim::launch(&{name}, grid, block, shared, args); }}\n"
    )
    barriers = ["-DSHIM_BARRIERS"] if "__syncthreads" in code else []
    compiler = (os.environ.get("CXX", "g++"), *_flags(), *barriers)
    shim = _shim(compiler)
    command = [*compiler, *options, "-shared", "-include", str(shim), "-x", "c++", "-"]
    library = _kept(
        f"{name}-{_digest(text, *command)}.so",
        lambda made: _build(command, made, text),
    )
    loaded = ctypes.CDLL(str(library))
    if barriers:
        loaded.shim_bank_conflicts.restype = ctypes.c_ulonglong
    return loaded


@cache
def _shim(compiler):
    """The shim in the cache, with a file beside it that saves reading it again.

    A compiler that knows no such files reads the shim.
    """
    text = SHIM.read_text()
    header = _kept(
        f"shim-{_digest(text, *compiler)}.h", lambda made: made.write_text(text)
    )
    command = [*compiler, "-x", "c++-header", str(header)]
    _kept(f"{header.name}.gch", lambda made: _build(command, made))
    return header


def _digest(*parts):
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _kept(name, make):
    """A file in the cache, made once for all processes."""
    path = _folder() / name
    if not path.exists():
        made = path.with_name(f"{name}.{os.getpid()}-{threading.get_ident()}")
        make(made)
        made.replace(path)
    return path


def _build(command, made, text=""):
    # A sanitizer that was loaded for the kernels would slow the compiler down.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    built = subprocess.run(
        [*command, "-o", str(made)],
        env=environment,
        input=text,
        text=True,
        capture_output=True,
        check=False,
    )
    if built.returncode:
        raise CompileException(built.stderr)


class CompileException(Exception):
    """What CuPy raises for source that does not compile."""


class RawKernel:
    def __init__(self, code, name, options=()):
        self.name = name
        self._code = code
        self._options = tuple(options)
        self.max_dynamic_shared_size_bytes = MOST_SHARED

    def __call__(self, grid, block, args, *, shared_mem=0):
        blocks, threads = _single(grid), _single(block)
        if shared_mem > max(MOST_SHARED, self.max_dynamic_shared_size_bytes):
            raise ValueError(f"{shared_mem} bytes of shared memory were not asked for")
        if not 1 <= blocks <= MOST_BLOCKS or not 1 <= threads <= MOST_THREADS:
            raise ValueError(f"cannot launch {blocks} blocks of {threads} threads")
        with _lock:
            kept = [_argument(a) for a in args]
            addresses = [int(a) for a in args if type(a) is int and a]
            pointers = (ctypes.c_void_p * len(kept))(
                *(ctypes.addressof(k) for k in kept)
            )
            pointers.kept = kept
            library = compiled(self._code, self.name, self._options)
            place = current().id

        def launch():
            stream = get_current_stream().ptr
            launches.append((self.name, blocks, threads, place, stream))
            with _lock:
                library.shim_launch(blocks, threads, shared_mem, pointers)
                if hasattr(library, "shim_bank_conflicts"):
                    bank_conflicts[self.name] += library.shim_bank_conflicts()

        enqueue(launch, [a._host for a in args if isinstance(a, ndarray)], addresses)


class RawModule:
    def __init__(self, *, code, options=(), name_expressions=None):
        self._code = code
        self._options = tuple(options)

    def get_function(self, name):
        return RawKernel(self._code, name, self._options)


def _single(extent):
    first, *rest = extent
    assert all(n == 1 for n in rest), "only x is used"
    return int(first)


def _argument(value):
    """A kernel argument as CuPy passes it: arrays by pointer, structs by value."""
    if isinstance(value, ndarray):
        if value.device != current():
            raise RuntimeError(f"{value.device} array in a kernel on {current()}")
        return ctypes.c_void_p(value.data.ptr)
    if isinstance(value, np.ndarray):
        if value.size != 1:
            raise TypeError("only a NumPy array of one item is passed by value")
        return ctypes.create_string_buffer(value.tobytes(), value.nbytes)
    if type(value) is int:
        if value:
            memory.check_inside(value, value + 1)
        return ctypes.c_int64(value)
    if isinstance(value, np.generic):
        return ctypes.create_string_buffer(value.tobytes(), value.nbytes)
    raise TypeError(f"Unsupported type {type(value)}")
