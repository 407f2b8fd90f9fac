"""``cupy.cuda.runtime``: what the library asks of it."""

from . import device

CUDA_R_32F, CUDA_R_64F, CUDA_R_16F, CUDA_R_16BF = 0, 1, 2, 14
CUDA_C_32F, CUDA_C_64F = 4, 5


class CUDARuntimeError(RuntimeError):
    pass


def getDeviceCount():
    return device.COUNT


def getDevice():
    return device.current().id


def getDeviceProperties(index):
    return {"name": b"stand-in", "totalGlobalMem": 0, "multiProcessorCount": 1}


def driverGetVersion():
    return 0


def runtimeGetVersion():
    return 0
