"""PyTorch, channels first: oneDNN on the CPU, cuDNN on a GPU."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Array, Case
from benchmarks.definitions import Host
from benchmarks.layers import Sizes, Transposed
from benchmarks.peers.base import (
    Call,
    Peer,
    QueueAhead,
    RefusedError,
    ResidentDevice,
    Wishes,
)

torch.set_grad_enabled(False)


class TorchDevice(ResidentDevice):
    def put(self, array: Host) -> Array:
        return torch.from_numpy(array)

    def take(self, result: Array) -> Host:
        return np.asarray(result.numpy())


class TorchCuda(QueueAhead):
    weighed_by = "memory pool"
    is_remote = True
    # Cycles a second at most: a lead may last longer than it need, never shorter.
    clock = 2e9

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ImportError("this PyTorch finds no GPU")
        self.l2_bytes = int(torch.cuda.get_device_properties(0).L2_cache_size)

    def spin(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * self.clock))  # noqa: SLF001

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def elapsed(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))

    def put(self, array: Host) -> Array:
        return torch.from_numpy(array).cuda()

    def join(self, arrays: list[Array]) -> Array:
        return torch.cat(arrays)

    def cast(self, array: Array, dtype: str) -> Array:
        return array.to(getattr(torch, dtype))

    def zeros(self, shape: Sizes) -> Array:
        return torch.zeros(shape, dtype=torch.float64, device="cuda")

    def is_lost(self) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def take(self, result: Array) -> Host:
        return np.asarray(result.cpu().numpy())

    def extra_bytes(self, call: Call) -> int | None:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return int(torch.cuda.max_memory_allocated() - before - result.nbytes)


# PyTorch has no such form of arrays with one spatial axis.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def empty_like(array: Array, shape: Sizes) -> Array:
    """Of another shape and in the same layout, which decides how cuDNN is called."""
    form = torch.contiguous_format
    if not array.is_contiguous():
        form = CHANNELS_LAST[array.ndim]
    return torch.empty(
        shape, dtype=array.dtype, device=array.device, memory_format=form
    )


def functional(name: str, case: Case, *operands: Array) -> Call:
    """Such as `torch.nn.functional.conv2d`."""
    function = getattr(torch.nn.functional, f"{name}{len(case.layer.kernel)}d")
    return partial(function, *operands, **case.options)


def convolution_gradient(case: Case, dy: Array, other: Array) -> Call:
    """One gradient alone; the operand that it does not need lends its shape only."""
    wanted = case.definition.result
    arrays = dict(zip(case.definition.operands, (dy, other), strict=True))
    arrays[wanted] = empty_like(dy, case.shapes[wanted])
    layer, options = case.layer, case.options
    arguments = (
        dy,
        arrays["x"],
        arrays["w"],
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        isinstance(layer, Transposed),
        options.get("output_padding", (0,) * len(layer.kernel)),
        layer.groups,
        (wanted == "x", wanted == "w", False),
    )
    place = ("x", "w").index(wanted)

    def gradient() -> Array:
        return torch.ops.aten.convolution_backward(*arguments)[place]

    return gradient


def max_pool_gradient(case: Case, dy: Array, indices: Array) -> Call:
    name, ceil_mode = "max_pool{}d_with_indices_backward", False
    return pool_gradient(name, case, dy, *windows(case), ceil_mode, in_planes(indices))


def avg_pool_gradient(case: Case, dy: Array) -> Call:
    # Without the dilation; nothing hangs over, padding counts, and no other divisor.
    rest = *windows(case)[:3], False, True, None
    return pool_gradient("avg_pool{}d_backward", case, dy, *rest)


def pool_gradient(name: str, case: Case, dy: Array, *rest: Any) -> Call:
    """By the operator of two or three axes; the input lends its shape only."""
    operator = getattr(torch.ops.aten, name.format(max(2, len(case.layer.kernel))))
    x = empty_like(dy, case.shapes["x"])
    arrays = in_planes(dy), in_planes(x)

    def gradient() -> Array:
        return operator(*arrays, *rest).reshape(case.result_shape)

    return gradient


def in_planes(array: Array) -> Array:
    """An array with one spatial axis as planes of one row."""
    return array.unsqueeze(-2) if array.ndim == 3 else array


def windows(case: Case) -> list[Sizes]:
    """Kernel, stride, padding and dilation, as `in_planes` needs them."""
    layer = case.layer
    each = (layer.kernel, layer.stride, layer.padding, layer.dilation)
    along_rows = (1, 1, 0, 1)
    return [
        (own, *sizes) if len(sizes) == 1 else sizes
        for own, sizes in zip(along_rows, each, strict=True)
    ]


CALLS: dict[str, Callable[..., Call]] = {
    "forward": partial(functional, "conv"),
    "input_grad": convolution_gradient,
    "weight_grad": convolution_gradient,
    "transpose": partial(functional, "conv_transpose"),
    "transpose_input_grad": convolution_gradient,
    "transpose_weight_grad": convolution_gradient,
    "max_pool": partial(functional, "max_pool"),
    "max_pool_backward": max_pool_gradient,
    "avg_pool": partial(functional, "avg_pool"),
    "avg_pool_backward": avg_pool_gradient,
}


class Torch(Peer):
    device: Any = TorchDevice()

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "threads": str(torch.get_num_threads())}

    def call(self, case: Case, *operands: Array) -> Call:
        return CALLS[case.operation](case, *operands)


@cache
def cuda_device() -> TorchCuda:
    """One for the process: its peers share operands."""
    return TorchCuda()


class Cudnn(Torch):
    """PyTorch on a GPU, in either layout; its shapes are always channels first."""

    def __init__(self, wishes: Wishes) -> None:
        super().__init__(wishes)
        self.device = cuda_device()
        torch.backends.cudnn.benchmark = True

    def call(self, case: Case, *operands: Array) -> Call:
        fast = case.arithmetic == "tf32" or self.wishes.precision == "fast"
        torch.backends.cudnn.allow_tf32 = fast
        if self.wishes.layout == "channels_last":
            if operands[0].ndim not in CHANNELS_LAST:
                raise RefusedError("PyTorch has no channels-last form of one axis")
            form = CHANNELS_LAST[operands[0].ndim]
            operands = tuple(a.to(memory_format=form) for a in operands)
        return super().call(case, *operands)

    def versions(self) -> dict[str, str]:
        return {
            "torch": torch.__version__,
            "cudnn": str(torch.backends.cudnn.version()),
            "gpu": torch.cuda.get_device_name(),
        }
