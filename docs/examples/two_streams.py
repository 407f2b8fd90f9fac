"""Copy on one stream, convolve on another, with an event between the two.

    python docs/examples/two_streams.py

It needs CuPy and a GPU.  Without one, the stand-in for CuPy runs it, from a checkout:

    PYTHONPATH=tests/standin python docs/examples/two_streams.py
"""

import cupy
import numpy as np

import cuconv
from cuconv.testing import assert_equal


def main():
    rng = np.random.default_rng(0)
    batches = rng.integers(-3, 4, size=(4, 2, 3, 9, 8)).astype(np.float32)
    weights = rng.integers(-3, 4, size=(4, 3, 3, 3)).astype(np.float32)

    w = cupy.asarray(weights)
    begun = cupy.cuda.get_current_stream().record()
    copying = cupy.cuda.Stream(non_blocking=True)
    computing = cupy.cuda.Stream(non_blocking=True)
    computing.wait_event(begun)  # w is there before a convolution reads it

    results = []
    for batch in batches:
        with copying:
            x = cupy.asarray(batch)
            arrived = copying.record()
        computing.wait_event(arrived)
        with computing:
            y = cuconv.conv2d(x, w, padding=1)  # returns before the work is done
        # x is kept too: its memory belongs to the stream that copied it.
        results.append((x, y))
    computing.synchronize()

    for batch, (_, y) in zip(batches, results, strict=True):
        assert_equal(y, cuconv.conv2d(batch, weights, padding=1, precision="strict"))
    print(len(results), "batches convolved on a stream of their own")


if __name__ == "__main__":
    main()
