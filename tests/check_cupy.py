"""Run by hand where the real CuPy is installed and no GPU is: what must hold there.

The library says why no GPU works and falls back to NumPy, and every name that the
stand-in offers in CuPy's place exists in CuPy.
"""

import importlib
import inspect
import sys
from pathlib import Path

STANDIN = Path(__file__).parent / "standin"
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


if __name__ == "__main__":
    main()
