"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

The kernel tests run once more in a process of their own, with kernels built to stop at
the first bad access or undefined operation.  NumPy's allocations come from the
sanitizer's allocator there, so arrays have guarded ends.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, TESTS, slowly

SANITIZE = (
    "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-sanitize=alignment"
)

# Reads one element past the end of x; shifts by too much.
MISTAKES = {
    "heap-buffer-overflow": "x[0] = x[n];",
    "shift exponent": "x[0] = (float)(1 << (30 + n));",
}


def runtime() -> str:
    found = subprocess.run(
        [os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"],
        capture_output=True,
        text=True,
        check=True,
    )
    path = Path(found.stdout.strip())
    assert path.is_file(), "the compiler has no AddressSanitizer runtime"
    return str(path.resolve())


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "CUCONV_SHIM_FLAGS": SANITIZE,
        # Python's own allocator would hand out memory without guards.
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "chosen", "least"),
    [
        (
            *("cuda/test_kernels.py",),
            "int32 and (int16 or float32 and (False- or True-True) and not gemm)",
            *(60,),
        ),
        *slowly(
            ("cuda/test_kernels.py", "im2col and not complex128 and not float64", 60),
            (
                *("cuda/test_kernels.py",),
                *("col2im and False- and (float32 or uint8 or complex64)", 30),
            ),
            ("cuda/test_kernels.py", "gemm or offsets", 100),
            ("cuda/test_winograd_tiles.py", "split or join", 15),
            (
                "cuda/test_direct.py",
                "(extremes and not long) or one_in_memory or again",
                15,
            ),
            ("api/test_pooling.py", "cupy and (any_view or no_window)", 6),
            ("api/test_pool_indices.py", "cupy and any_view or on_a_device", 3),
            ("api/test_deform.py", "cupy and (gradients or order or not_a_number)", 20),
            (
                *("strategies/test_implicit_gemm.py",),
                "odd-channels_first or aligned-channels_last or coordinates or several",
                36,
            ),
        ),
    ],
)
def test_kernels_are_clean(name, chosen, least):
    done = run_sanitized(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", ""),
        *(str(TESTS / name), "-k", chosen),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-3000:]
    assert int(passed[1]) >= least


@pytest.mark.parametrize("report", MISTAKES)
def test_a_mistake_is_caught(report):
    code = f'extern "C" __global__ void wrong(float *x, int n) {{ {MISTAKES[report]} }}'
    program = (
        "import sys; sys.path.insert(0, 'tests'); import standin; standin.install()\n"
        "import cupy, numpy\n"
        "x = cupy.zeros(1000, dtype='float32')\n"
        f"cupy.RawKernel({code!r}, 'wrong')((1,), (1,), (x, numpy.int32(1000)))\n"
    )
    done = run_sanitized("-c", program)
    assert done.returncode != 0
    assert report in done.stderr
