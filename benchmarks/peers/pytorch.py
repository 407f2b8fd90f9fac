"""PyTorch, channels first: oneDNN on the CPU, cuDNN on a GPU."""

from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Array, Case, Host
from benchmarks.peers.base import Call, Peer, ResidentDevice, Wishes

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


class TorchCuda:
    weighed_by = "memory pool"

    def put(self, array: Host) -> Array:
        return torch.from_numpy(array).cuda()

    def take(self, result: Array) -> Host:
        return np.asarray(result.cpu().numpy())

    def seconds(self, call: Call) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def extra_bytes(self, call: Call) -> int | None:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return int(torch.cuda.max_memory_allocated() - before - result.nbytes)


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
        x = first.new_empty(case.shapes["x"]) if for_x else second
        w = second if for_x else first.new_empty(case.shapes["w"])
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


class Cudnn(Torch):
    def __init__(self, wishes: Wishes) -> None:
        super().__init__(wishes)
        if not torch.cuda.is_available():
            raise ImportError("this PyTorch finds no GPU")
        self.device = TorchCuda()
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = wishes.precision == "fast"

    def versions(self) -> dict[str, str]:
        return {
            "torch": torch.__version__,
            "cudnn": str(torch.backends.cudnn.version()),
            "gpu": torch.cuda.get_device_name(),
        }
