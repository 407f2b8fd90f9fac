"""PyTorch, channels first: oneDNN on the CPU, cuDNN on a GPU."""

from functools import cache, partial
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Array, Case, Host
from benchmarks.peers.base import (
    Call,
    Peer,
    QueueAhead,
    RefusedError,
    ResidentDevice,
    Wishes,
)
from benchmarks.suites import Sizes

torch.set_grad_enabled(False)

CONVOLUTIONS = (
    torch.nn.functional.conv1d,
    torch.nn.functional.conv2d,
    torch.nn.functional.conv3d,
)


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


class Torch(Peer):
    device: Any = TorchDevice()

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "threads": str(torch.get_num_threads())}

    def call(self, case: Case, first: Array, second: Array) -> Call:
        if case.operation == "forward":
            convolve = CONVOLUTIONS[len(case.layer.kernel) - 1]
            return partial(convolve, first, second, None, **case.options)
        for_x = case.operation == "input_grad"
        # The operand that a gradient does not need lends its shape only.
        x = empty_like(first, case.shapes["x"]) if for_x else second
        w = second if for_x else empty_like(first, case.shapes["w"])
        return partial(self._gradient, first, x, w, case)

    @staticmethod
    def _gradient(dy: Array, x: Array, w: Array, case: Case) -> Array:
        layer, for_x = case.layer, case.operation == "input_grad"
        gradients = torch.ops.aten.convolution_backward(
            dy,
            x,
            w,
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,  # noqa: FBT003 - the operator takes it by place: not transposed
            (0,) * len(layer.kernel),
            layer.groups,
            (for_x, not for_x, False),
        )
        return gradients[0 if for_x else 1]


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

    def call(self, case: Case, first: Array, second: Array) -> Call:
        fast = case.arithmetic == "tf32" or self.wishes.precision == "fast"
        torch.backends.cudnn.allow_tf32 = fast
        if self.wishes.layout == "channels_last":
            if first.ndim not in CHANNELS_LAST:
                raise RefusedError("PyTorch has no channels-last form of one axis")
            form = CHANNELS_LAST[first.ndim]
            first, second = (a.to(memory_format=form) for a in (first, second))
        return super().call(case, first, second)

    def versions(self) -> dict[str, str]:
        return {
            "torch": torch.__version__,
            "cudnn": str(torch.backends.cudnn.version()),
            "gpu": torch.cuda.get_device_name(),
        }
