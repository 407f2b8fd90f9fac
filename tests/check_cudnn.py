"""Run by hand where CuPy and cuDNN are installed and no GPU is: what must hold there.

cuDNN plans for a device that is described in JSON.  So the library itself checks every
description that the strategy `cudnn` makes, proposes engines for an H200, and says how
much workspace each needs; nothing runs.  The driver, which it loads, is a stub.
"""

import ctypes
import itertools
import json
import os
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# Every function of the driver that cuDNN looks up.
DRIVER = """
CtxGetCurrent CtxGetLimit CtxPopCurrent CtxPushCurrent DeviceGet DeviceGetCount
DriverGetVersion GetErrorName GetErrorString KernelGetAttribute KernelGetFunction
KernelSetAttribute LaunchCooperativeKernel LaunchKernel LaunchKernelEx LibraryGetKernel
LibraryLoadData LibraryLoadFromFile LibraryUnload LinkAddData LinkComplete LinkCreate
LinkDestroy ModuleGetFunction ModuleLoadData ModuleUnload
OccupancyMaxPotentialClusterSize StreamGetCtx TensorMapEncodeIm2col TensorMapEncodeTiled
FuncSetAttribute FuncGetAttribute GetProcAddress GetProcAddress_v2 Init
OccupancyMaxActiveBlocksPerMultiprocessor DeviceGetAttribute
"""
H200 = {
    "deviceName": "NVIDIA H200",
    "deviceVer": 900,
    "driverVer": 13000,
    "cudaDeviceId": 0,
    "pciDeviceId": 0,
    "isTccDriver": 0,
    "supportCoopLaunch": 1,
    "multiProcessorCount": 132,
    "smCountOrigin": 0,
    "warpSize": 32,
    "maxGridSize": [2**31 - 1, 65535, 65535],
    "maxBlockSize": [1024, 1024, 64],
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048,
    "maxCtasPerSM": 32,
    "regsPerBlock": 65536,
    "maxRegistersPerSM": 65536,
    "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448,
    "oversizedSharedMemoryPerBlock": 0,
    "reservedSharedMemoryPerBlock": 1024,
    "totalGlobalMem": 141 * 10**9,
    "smClockRateKHz": 1_980_000,
    "memClockRateKHz": 3_201_000,
    "memoryBusWidth": 6144,
    "l2CacheSize": 50 * 2**20,
}
DEVICE, JSON, CHARACTER = 38, 2702, 24
OLDEST = 90800  # the first version that plans for a described device
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "ResNet-50, 3×3": ((32, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}),
    "ResNet-50, 1×1": ((32, 256, 56, 56), (64, 256, 1, 1), {}),
    "its first layer": (
        (32, 3, 224, 224),
        (64, 3, 7, 7),
        {"padding": 3, "stride": 2},
    ),
    "dilated": (
        (2, 6, 20, 22),
        (8, 6, 3, 3),
        {"padding": 1, "stride": (1, 2), "dilation": (2, 3)},
    ),
    "groups": ((2, 6, 20, 22), (9, 2, 3, 3), {"padding": 1, "groups": 3}),
    "depthwise": ((8, 32, 20, 22), (32, 1, 3, 3), {"padding": 1, "groups": 32}),
    "uneven pads": ((2, 8, 20, 22), (8, 8, 3, 3), {"padding": ((1, 0), (0, 2))}),
    "one axis": ((4, 8, 100), (16, 8, 5), {"padding": 2, "stride": 2}),
    "three axes": (
        (2, 8, 10, 12, 14),
        (16, 4, 3, 3, 3),
        {"padding": 1, "stride": (1, 1, 2), "groups": 2},
    ),
}
TYPES = ("float32", "float16", ml_dtypes.bfloat16, "float64")
LAYOUTS = ("channels_first", "channels_last")


def stub_driver(folder: str) -> None:
    """Load a driver whose functions fail: cuDNN looks for their names alone."""
    source, library = Path(folder, "driver.cpp"), Path(folder, "libcuda.so.1")
    lines = (f'extern "C" int cu{name}() {{ return 100; }}' for name in DRIVER.split())
    source.write_text("\n".join(lines))
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC"]
    command += ["-Wl,-soname,libcuda.so.1", "-o", library, source]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def main() -> None:
    import cuconv
    from cuconv.backends.cuda import cudnn
    from cuconv.strategies.cudnn import described

    with tempfile.TemporaryDirectory() as folder:
        stub_driver(folder)
        library = cudnn.load()
    assert library.cudnnGetVersion() >= OLDEST, cudnn.version()
    text = json.dumps(H200).encode()
    device = cudnn.Descriptor(library, DEVICE)
    cudnn.check(
        library.cudnnBackendSetAttribute(
            *(device.pointer, JSON, CHARACTER, ctypes.c_int64(len(text) + 1)),
            ctypes.create_string_buffer(text),
        )
    )
    device.finalize()

    def aimed(kind: int, index: int) -> Any:
        """For a device that is described, instead of one that is there."""
        descriptor = cudnn.Descriptor(library, kind)
        attribute = {cudnn.HEURISTICS: 204, cudnn.PLAN: 407}
        if kind in attribute:
            descriptor.set(attribute[kind], cudnn.DESCRIPTOR, device)
        return descriptor

    class Nowhere:
        """The device that is not there, as the current one."""

        def __init__(self, _: int) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    cudnn.aimed = aimed
    cudnn.cupy.cuda.Device = Nowhere
    checked, seconds = 0, time.perf_counter()
    for (name, (x, w, options)), op, layout, dtype, precision in itertools.product(
        CASES.items(),
        ("forward", "input_grad", "weight_grad"),
        LAYOUTS,
        map(np.dtype, TYPES),
        ("strict", "fast"),
    ):
        shapes = x, w
        if layout == "channels_last":
            shapes = (x[0], *x[2:], x[1]), (*w[2:], w[1], w[0])
        words = {"layout": layout, "op": op, "dtype": "float32"}
        plan = cuconv.plan_conv(*shapes, **words, **options)
        problem = replace(plan.problem, operand=dtype, precision=precision)
        for adds in (False, True):
            conv = described(problem)._replace(adds=adds)
            engines = cudnn.planned(conv, 0).engines
            where = f"{name}, {op}, {layout}, {dtype}, {precision}, adds {adds}"
            assert engines, f"no engine for {where}"
            assert min(each.workspace for each in engines) == 0, where
            choices = [each.choice for each in engines]
            assert choices == sorted(set(choices)), where
            checked += 1
    seconds = (time.perf_counter() - seconds) / checked
    cudnn.arguments(16, 32, 48, 0)
    assert checked == len(CASES) * 3 * 2 * 4 * 2 * 2
    print(
        f"cuDNN {cudnn.version()} plans {checked} convolutions for an H200, "
        f"{seconds * 1e3:.1f} ms each"
    )


if __name__ == "__main__":
    main()
