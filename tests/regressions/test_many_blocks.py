"""A call of thousands of blocks under a limit, again and again in a fresh process.

CPython's table of interned strings grows by nearly a megabyte when enough of them have
come and gone, as they do where a view is made from an array interface: a call of many
blocks makes its views in another way.
"""

import os
import subprocess
import sys
import textwrap

CODE = """
import tracemalloc
import numpy as np
import cuconv

x, w = np.ones((1, 16, 512, 512), "float32"), np.ones((16, 16, 5, 5), "float32")
limit = 512 * 1024
plan = cuconv.plan_conv(x.shape, w.shape, memory_limit=limit)
assert plan.chunks > 1000
cuconv.conv2d(x, w, memory_limit=limit)
for _ in range(8):
    tracemalloc.start()
    y = cuconv.conv2d(x, w, memory_limit=limit)
    print(tracemalloc.get_traced_memory()[1] - y.nbytes)
    tracemalloc.stop()
    del y
"""


def test_no_call_of_many_passes_its_limit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE)],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == 8
    assert max(peaks) <= 512 * 1024
