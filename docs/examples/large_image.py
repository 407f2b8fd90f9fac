"""Convolve an image that is several times larger than a worker's memory, on disk.

The image is made block by block as a Zarr array, convolved by two workers whose memory
is limited, and the result written to another Zarr array.  A few windows of it must
equal an eager call, and no worker may have passed its limit.

    python docs/examples/large_image.py --size 20480 --memory-limit "512 MiB"
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import dask.array as da
import numpy as np
import zarr
from dask.utils import format_bytes, parse_bytes
from distributed import Client, LocalCluster, progress

import cuconv

CHANNELS, FILTERS, STRIDE = 3, 4, 2


def main() -> int:
    chosen = parsed_arguments()
    limit, own = parse_bytes(chosen.memory_limit), peak_bytes()
    if limit < 1.5 * own:
        # Dask would restart such workers again and again.
        print(f"a worker holds {format_bytes(own)} before it has done anything:")
        print(f"{format_bytes(limit)} are too little")
        return 2
    weights = np.random.default_rng(0).integers(-2, 3, (FILTERS, CHANNELS, 3, 3))
    weights = weights.astype(np.float32)
    with (
        tempfile.TemporaryDirectory(dir=chosen.folder) as folder,
        LocalCluster(
            n_workers=chosen.workers,
            threads_per_worker=1,
            memory_limit=limit,
            dashboard_address=None,
        ) as cluster,
        Client(cluster) as client,
    ):
        source = make_image(Path(folder) / "image.zarr", chosen.size, chosen.chunk)
        print(f"image {source.shape}, {format_bytes(source.nbytes)}")
        print(f"{chosen.workers} workers, at most {format_bytes(limit)} each")
        start = time.perf_counter()
        result = convolve(source, weights, Path(folder) / "result.zarr")
        seconds = time.perf_counter() - start
        peaks = list(client.run(peak_bytes).values())
        print(f"\nresult {result.shape}, {format_bytes(result.nbytes)}")
        print(f"{seconds:.1f} s")
        print("peak memory of workers:", ", ".join(map(format_bytes, peaks)))
        if max(peaks) > limit:
            print("a worker passed its limit")
            return 1
        return check(source, weights, result)


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=10240, help="rows and columns")
    parser.add_argument("--chunk", type=int, default=1024, help="of a Zarr chunk")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory-limit", default="384 MiB", help="of one worker")
    parser.add_argument("--folder", help="for the arrays; they are removed again")
    return parser.parse_args()


def empty_array(
    path: Path, shape: tuple[int, ...], chunks: tuple[int, ...]
) -> zarr.Array:
    return zarr.create_array(
        path, shape=shape, chunks=chunks, dtype="float32", compressors=None
    )


def make_image(path: Path, size: int, chunk: int) -> zarr.Array:
    """An image of random integers, so that every sum is exact."""
    shape, chunks = (CHANNELS, size, size), (CHANNELS, chunk, chunk)
    rng = da.random.default_rng(0)
    image = rng.integers(0, 256, shape, dtype=np.uint8, chunks=chunks)
    stored = empty_array(path, shape, chunks)
    da.store(image.astype(np.float32), stored, lock=False)
    return stored


def convolve(source: zarr.Array, weights: np.ndarray, path: Path) -> zarr.Array:
    """From Zarr to Zarr; the blocks are never in memory all at once."""
    x = da.from_zarr(source)
    # Dask has a thread for every processor already.
    with cuconv.config(num_threads=1, memory_limit="8 MiB", precision="strict"):
        y = cuconv.conv2d(x, weights, stride=STRIDE, padding=1)
    result = empty_array(path, y.shape, y.chunksize)
    written = da.store(y, result, lock=False, compute=False).persist()
    progress(written, notebook=False)
    written.compute()
    return result


def peak_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():
        words = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(words["VmHWM"].split()[0]) * 1024
    import resource  # noqa: PLC0415 - Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check(source: zarr.Array, weights: np.ndarray, result: zarr.Array) -> int:
    """Compare windows at two corners and across the middle with eager calls."""
    rows, columns = result.shape[1:]
    side = min(rows, columns, 200)
    middle = (rows - side) // 2, (columns - side) // 2
    for top, left in ((0, 0), middle, (rows - side, columns - side)):
        crop, padding = [], []
        for first, size in zip((top, left), source.shape[1:], strict=True):
            # Output o reads elements from o * STRIDE - 1 on.
            start, stop = first * STRIDE - 1, (first + side - 1) * STRIDE + 2
            crop.append(slice(max(start, 0), min(stop, size)))
            padding.append((max(-start, 0), max(stop - size, 0)))
        x = source[:, crop[0], crop[1]]
        wanted = cuconv.conv2d(x, weights, stride=STRIDE, padding=padding)
        got = result[:, top : top + side, left : left + side]
        if not np.array_equal(got, wanted):
            print(f"the window at {top}, {left} differs from the eager call")
            return 1
    print("three windows equal the eager call")
    return 0


if __name__ == "__main__":
    sys.exit(main())
