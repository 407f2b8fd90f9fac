"""A worker process dies in the middle of a convolution, and the result is the same.

Two processes convolve an image block by block; when a quarter of the blocks is there,
one of them is killed without warning.  Dask computes the lost blocks again, and
the result must equal an eager call.

    python docs/examples/lost_worker.py
"""

import argparse
import os
import signal
import sys
import time

import dask.array as da
import numpy as np
from distributed import Client, LocalCluster, as_completed, futures_of

import cuconv


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048, help="rows and columns")
    parser.add_argument("--chunk", type=int, default=256)
    chosen = parser.parse_args()
    shape, chunks = (8, chosen.size, chosen.size), (8, chosen.chunk, chosen.chunk)
    # Small integers held as floats: sums are exact, in whatever order.
    x = da.random.default_rng(0).integers(0, 4, shape, chunks=chunks)
    x = x.astype(np.float32)
    w = np.random.default_rng(1).integers(-2, 3, (16, 8, 5, 5)).astype(np.float32)
    options = {"padding": 2, "precision": "strict"}
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        pids = client.run(os.getpid)
        y = client.persist(cuconv.conv2d(x, w, **options))
        blocks = futures_of(y)
        wait_for(blocks, len(blocks) // 4)
        done = sum(block.done() for block in blocks)
        victim, pid = next(iter(pids.items()))
        os.kill(pid, signal.SIGKILL)
        print(f"killed process {pid} with {done} of {len(blocks)} blocks done")
        start = time.perf_counter()
        result = y.compute()
        print(f"the rest took {time.perf_counter() - start:.1f} s")
        if done == len(blocks):
            print("it came too late: nothing was left to do")
            return 1
        if victim in client.scheduler_info()["workers"]:
            print("the worker is still there")
            return 1
    if not np.array_equal(result, cuconv.conv2d(x.compute(), w, **options)):
        print("the result differs from the eager call")
        return 1
    print("the result equals the eager call")
    return 0


def wait_for(blocks: list, count: int) -> None:
    """Return when so many blocks are there."""
    for number, _ in enumerate(as_completed(blocks), start=1):
        if number >= count:
            return


if __name__ == "__main__":
    sys.exit(main())
