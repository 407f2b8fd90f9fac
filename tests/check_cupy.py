"""Run by hand where the real CuPy is installed and no GPU is: what must hold there.

The library says why no GPU works and falls back to NumPy, every name that the stand-in
offers in CuPy's place exists in CuPy, the whole CUDA backend imports, with cuBLAS and
without, and its products pass through CuPy's own binding to a small library that stands
in for cuBLAS in the loader.
"""

import ctypes
import importlib
import inspect
import itertools
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STANDIN = Path(__file__).parent / "standin"
STUB = Path(__file__).parent / "cublas_stub.cpp"
KEPT: list[bytes] = []  # names of capsules, which refer to them
# Files of the stand-in, and CuPy's modules that hold the same names.
MODULES = {
    "cupy/__init__.py": "cupy",
    "cupy/cuda/__init__.py": "cupy.cuda",
    "cupy/cuda/runtime.py": "cupy.cuda.runtime",
}
METHODS = {
    "Stream": (
        *("begin_capture", "end_capture", "is_capturing", "synchronize", "record"),
        *("wait_event", "null", "ptds"),
    ),
    "Event": ("done", "record", "synchronize"),
    "Graph": ("launch",),
    "Device": ("synchronize", "compute_capability"),
}
OWN = {"IS_STAND_IN", "SimpleNamespace", "wrapped", "float_", "COUNT"}


def names_of(file: str) -> set[str]:
    """Public names of a module of the stand-in, found in a process of its own."""
    name = MODULES[file]
    program = (
        f"import sys; sys.path.insert(0, {str(STANDIN)!r}); import {name} as m; "
        "print(*(n for n in vars(m) if not n.startswith('_')))"
    )
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split()) - OWN


def stub_cublas(folder: str) -> Any:
    """Load the stand-in under the names of cuBLAS, with every function it exports."""
    import cupy_backends.cuda.libs as bindings

    (binding,) = Path(bindings.__file__).parent.glob("cublas.*.so")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", binding],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    source = STUB.read_text()
    others = set(re.findall(r"U (cublas\w+)", listed)) - set(
        re.findall(r"cublas\w+", source)
    )
    (needed,) = set(re.findall(r"(libcublas\.so\.\d+)", _dynamic(binding)))
    lines = "".join(f'extern "C" int {n}() {{ return 14; }}\n' for n in sorted(others))
    text, versions = Path(folder, "stub.cpp"), Path(folder, "versions")
    text.write_text(source + lines)
    versions.write_text(f"{needed} {{ global: *; }};")
    loaded = []
    for name in (needed.replace("cublas", "cublasLt"), needed):
        out = Path(folder, name)
        options = (f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}")
        command = (os.environ.get("CXX", "g++"), "-shared", "-fPIC", *options)
        subprocess.run([*command, "-o", out, text], check=True)
        loaded.append(ctypes.CDLL(str(out)))
    return loaded[-1]


def _dynamic(binding: Path) -> str:
    command = ["readelf", "-d", binding]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def without_a_driver(library: Any) -> None:
    """Let the binding to cuBLAS see a default stream that records no graph.

    It asks CuPy's C interface, where CUDA would look for a driver.
    """
    from cupy_backends.cuda import stream
    from cupy_backends.cuda.api import runtime

    api, zero = ctypes.pythonapi, ctypes.cast(library.zero, ctypes.c_void_p)
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    for module, name in (
        (stream, "get_current_stream_ptr"),
        (runtime, "streamIsCapturing"),
    ):
        capsules = module.__pyx_capi__
        signature = api.PyCapsule_GetName(capsules[name])
        KEPT.append(signature)
        capsules[name] = api.PyCapsule_New(zero, signature, None)


def check_products() -> None:
    """Products in every type and order, through CuPy's binding."""
    import numpy as np

    from cuconv.backends.cuda import gemm, libraries

    assert "cuBLAS cannot be loaded" in libraries.missing("cublas")
    print(libraries.missing("cublas"))
    with tempfile.TemporaryDirectory() as folder:
        library = stub_cublas(folder)
    without_a_driver(library)
    libraries.error_of.cache_clear()
    assert not libraries.missing("cublas")
    from cupy.cuda import cublas

    handle = cublas.create()
    gemm.get_cublas_handle = lambda: handle
    counted = (ctypes.c_int * 6).in_dll(library, "counted")

    def do(function: Any, product: Any, *arrays: Any) -> None:
        function(product, *(a.ctypes.data for a in arrays))

    rng, made = np.random.default_rng(0), 0
    for name, turns, add in itertools.product(
        ("float32", "float64", "complex64", "complex128"),
        itertools.product((False, True), repeat=3),
        (False, True),
    ):
        a, b, out = (
            rng.integers(-5, 6, shape[::-1] if turned else shape).astype(name)
            for shape, turned in zip(((3, 4), (4, 5), (3, 5)), turns, strict=True)
        )
        twice = (np.stack([m, 2 * m]) for m in (a, b, out))
        a, b, out = (
            m.swapaxes(1, 2) if turned else m
            for m, turned in zip(twice, turns, strict=True)
        )
        wanted = a @ b + (out if add else 0)
        gemm.gemm(do, a, b, out, add=add)
        np.testing.assert_array_equal(out, wanted)
        made += 1
    assert made == counted[2] == 64, list(counted)
    x = np.ones((1, 2, 2), "float32")
    gemm.gemm(do, x, x, x.copy(), fast=True)
    assert counted[5] == cublas.CUBLAS_COMPUTE_32F_FAST_TF32
    half = np.ones((1, 2, 2), "float16")
    gemm.gemm(do, half, half, half.copy())
    assert counted[4] == 16, "halves are summed in float32"
    assert counted[3] == cublas.CUBLAS_DEFAULT_MATH, "the mode is restored"
    assert (gemm._COMPUTE_32F, gemm._COMPUTE_64F) == (
        cublas.CUBLAS_COMPUTE_32F,
        cublas.CUBLAS_COMPUTE_64F,
    )
    print(counted[2], "products through CuPy's binding to cuBLAS")


def check_modules() -> None:
    """Every module of the CUDA backend imports."""
    import cuconv.backends.cuda as backend

    names = [m.name for m in pkgutil.iter_modules(backend.__path__)]
    for name in names:
        importlib.import_module(f"cuconv.backends.cuda.{name}")
    assert len(names) > 14, names
    print(len(names), "modules of the CUDA backend import")


def main() -> None:
    import numpy as np

    import cuconv
    from cuconv.backends.cuda import why_not

    assert "cupy" not in sys.modules
    assert cuconv.default_array_module() is np
    assert why_not()
    print("no GPU works:", why_not())
    checked = 0
    for file, name in MODULES.items():
        real = importlib.import_module(name)
        submodules = {"device", "graph", "memory", "stream", "cublas", "runtime"}
        names = names_of(file) - submodules - {"device"}
        missing = {n for n in names if not hasattr(real, n)}
        assert not missing, f"{name} has no {missing}"
        checked += len(names)
    assert checked > 60, checked
    import cupy

    for method in ("reshape", "transpose", "swapaxes", "view", "astype", "sum", "get"):
        assert hasattr(cupy.ndarray, method)
    for kind, methods in METHODS.items():
        assert hasattr(cupy.cuda, kind), kind
        absent = [m for m in methods if not hasattr(getattr(cupy.cuda, kind), m)]
        assert not absent, f"cupy.cuda.{kind} has no {absent}"
    for key in ("code", "options"):
        assert key in (inspect.getdoc(cupy.RawModule) or "")
    print(checked, "names of the stand-in exist in CuPy", cupy.__version__)
    check_modules()
    check_products()


if __name__ == "__main__":
    main()
