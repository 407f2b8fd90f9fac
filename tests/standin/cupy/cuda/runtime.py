"""``cupy.cuda.runtime``: what the library asks of it."""

from . import device

is_hip = False
CUDA_R_32F, CUDA_R_64F, CUDA_R_16F, CUDA_R_16BF = 0, 1, 2, 14
CUDA_C_32F, CUDA_C_64F = 4, 5


cudaDevAttrClockRate, cudaDevAttrMultiProcessorCount = 13, 16
cudaDevAttrMemoryClockRate, cudaDevAttrGlobalMemoryBusWidth = 36, 37
cudaDevAttrL2CacheSize = 38

# Two devices that differ: by the data sheets of an H200 and of an A100.
_ATTRIBUTES = (
    {13: 1_980_000, 16: 132, 36: 3_125_000, 37: 6144, 38: 50 * 2**20},
    {13: 1_410_000, 16: 108, 36: 1_215_000, 37: 5120, 38: 40 * 2**20},
)
_NAMES = (b"stand-in", b"smaller stand-in")


class CUDARuntimeError(RuntimeError):
    pass


def getDeviceCount():
    return device.COUNT


def getDevice():
    return device.current().id


def getDeviceProperties(index):
    own = _ATTRIBUTES[index]
    return {
        "name": _NAMES[index],
        "totalGlobalMem": (141, 40)[index] * 10**9,
        "multiProcessorCount": own[cudaDevAttrMultiProcessorCount],
        "memoryBusWidth": own[cudaDevAttrGlobalMemoryBusWidth],
        "l2CacheSize": own[cudaDevAttrL2CacheSize],
    }


def deviceGetAttribute(attrib, device):
    return _ATTRIBUTES[device][attrib]


def driverGetVersion():
    return 13000


def runtimeGetVersion():
    return 13020
