"""PyTorch, channels first: oneDNN on the CPU, cuDNN on a GPU."""

from functools import cache, partial
from typing import Any

import torch

from benchmarks.cases import Case, Host
from benchmarks.layers import Pool, Sizes, Transposed
from benchmarks.peers.base import (
    CYCLES_PER_SECOND,
    Call,
    GpuDevice,
    Peer,
    RefusedError,
    ResidentDevice,
    Wishes,
)
from benchmarks.taps import Array

torch.set_grad_enabled(False)

# PyTorch has no such form of arrays with one spatial axis.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class TorchDevice(ResidentDevice):
    def put(self, array: Host) -> Array:
        return torch.from_numpy(array)


class TorchCuda(GpuDevice):
    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ImportError("this PyTorch finds no GPU")
        self.l2_bytes = int(torch.cuda.get_device_properties(0).L2_cache_size)
        self.event = partial(torch.cuda.Event, enable_timing=True)
        self.elapsed = torch.cuda.Event.elapsed_time
        self.join = torch.cat
        self.zeros = partial(torch.zeros, dtype=torch.float64, device="cuda")

    def spin(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))  # noqa: SLF001

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def put(self, array: Host) -> Array:
        return torch.from_numpy(array).cuda()

    def cast(self, array: Array, dtype: str) -> Array:
        return array.to(getattr(torch, dtype))

    def extra_bytes(self, call: Call) -> int | None:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return int(torch.cuda.max_memory_allocated() - before - result.nbytes)


cuda_device = cache(TorchCuda)


class Torch(Peer):
    device: Any = TorchDevice()

    def versions(self) -> dict[str, str]:
        return {
            "torch": str(torch.__version__),
            "threads": str(torch.get_num_threads()),
        }

    def call(self, case: Case, *operands: Array) -> Call:
        """Call a function such as `torch.nn.functional.conv2d`, or one gradient alone.

        The array that a gradient has the shape of lends that only.
        """
        wanted, layer = case.result_name, case.layer
        if wanted == "dy":
            usual = {"forward": "conv", "transpose": "conv_transpose"}
            name = f"{usual.get(case.operation, case.operation)}{len(layer.kernel)}d"
            function = getattr(torch.nn.functional, name)
            return partial(function, *operands, **layer.options)
        arrays = dict(zip(case.operand_names, operands, strict=True))
        arrays[wanted] = empty_like(arrays["dy"], case.shapes[wanted])
        if isinstance(layer, Pool):
            return pool_gradient(case, **arrays)
        more = layer.options.get("output_padding", (0,) * len(layer.kernel))
        arguments = (
            *(arrays["dy"], arrays["x"], arrays["w"], None),
            *(layer.stride, layer.padding, layer.dilation),
            *(isinstance(layer, Transposed), more, layer.groups),
            (wanted == "x", wanted == "w", False),
        )
        place = ("x", "w").index(wanted)
        return lambda: torch.ops.aten.convolution_backward(*arguments)[place]


def pool_gradient(case: Case, dy: Array, x: Array, indices: Array = None) -> Call:
    """By the operator of two or three axes: one axis is planes of one row."""
    layer = case.layer
    window = [layer.kernel, layer.stride, layer.padding]
    rank = max(2, len(layer.kernel))
    if dy.ndim == 3:
        window = [(a, *b) for a, b in zip((1, 1, 0), window, strict=True)]
        dy, x = dy.unsqueeze(-2), x.unsqueeze(-2)
    rest: tuple[Any, ...]
    if indices is None:
        # Nothing hangs over, padding counts, and there is no other divisor.
        name, rest = f"avg_pool{rank}d_backward", (False, True, None)
    else:
        name = f"max_pool{rank}d_with_indices_backward"
        rest = ((1,) * rank, False, indices.view(dy.shape))
    operator = getattr(torch.ops.aten, name)
    return lambda: operator(dy, x, *window, *rest).reshape(case.result_shape)


def empty_like(array: Array, shape: Sizes) -> Array:
    """Of another shape and in the same layout, which decides how cuDNN is called."""
    like = {"dtype": array.dtype, "device": array.device}
    if not array.is_contiguous():
        like["memory_format"] = CHANNELS_LAST[array.ndim]
    return torch.empty(shape, **like)


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
        cudnn = str(torch.backends.cudnn.version())
        gpu = torch.cuda.get_device_name()
        return {"torch": str(torch.__version__), "cudnn": cudnn, "gpu": gpu}
