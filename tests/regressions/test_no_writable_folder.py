"""Loops that Numba compiles, where nothing can be written, as in a container."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import cuconv

CODE = """
import numpy as np
import cuconv

x, w = np.ones((1, 4, 6, 6), "float32"), np.ones((4, 1, 3, 3), "float32")
y = cuconv.depthwise_conv(x, w, strategy="depthwise")
assert (y == 9).all()
pooled, indices = cuconv.max_pool(x, 2, return_indices=True)
dx = cuconv.max_pool_backward(pooled, indices, x.shape, 2)
assert dx.sum() == pooled.size
print(cuconv.__file__)
"""


def test_loops_are_compiled_without_a_cache(tmp_path) -> None:
    pytest.importorskip("numba")
    package = tmp_path / "cuconv"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(cuconv.__file__).parent, package, ignore=ignored)
    # Files where Numba would make folders: nobody can, not even root.
    (package / "backends/cpu/__pycache__").touch()
    home = tmp_path / "home"
    home.touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"), str(home))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(CODE)],
        cwd=tmp_path,
        env={**environment, **places, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(package / "__init__.py")
