"""PyTorch, channels first: oneDNN on the CPU, cuDNN on a GPU."""

from functools import cache, partial
from typing import Any

import torch

from benchmarks.cases import TRAINING, Case, Host
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

# What `torch.nn.functional` calls an operation, where that differs.
NAMES = {"forward": "conv", TRAINING: "conv", "transpose": "conv_transpose"}
NAMES["global_avg_pool"] = "adaptive_avg_pool"
# PyTorch has no such form of arrays with one spatial axis.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class TorchDevice(ResidentDevice):
    join: Any = staticmethod(torch.cat)

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
        """Call a function, a function and all gradients, or one gradient alone.

        The array that a gradient has the shape of lends that only.
        """
        arrays = dict(zip(case.operand_names, operands, strict=True))
        if case.operation == TRAINING:
            forward, backward = function(case, *operands[1:]), gradients(case, **arrays)
            return lambda: (forward(), *backward())
        wanted = case.result_name
        if wanted == "dy":
            return function(case, *operands)
        arrays[wanted] = empty_like(arrays["dy"], case.shapes[wanted])
        if isinstance(case.layer, Pool):
            return pool_gradient(case, **arrays)
        one, place = gradients(case, **arrays), ("x", "w").index(wanted)
        return lambda: one()[place]


def function(case: Case, *operands: Array) -> Call:
    """Such as `torch.nn.functional.conv2d`."""
    name = f"{NAMES.get(case.operation, case.operation)}{len(case.layer.kernel)}d"
    options = case.layer.options or {"output_size": 1}
    return partial(getattr(torch.nn.functional, name), *operands, **options)


def gradients(case: Case, dy: Array, x: Array, w: Array, bias: Array = None) -> Call:
    """All of them, or the one that the case wants and None for the others."""
    layer, trains = case.layer, case.operation == TRAINING
    more = layer.options.get("output_padding", (0,) * len(layer.kernel))
    return partial(
        torch.ops.aten.convolution_backward,
        *(dy, x, w, None if bias is None else [len(bias)]),
        *(layer.stride, layer.padding, layer.dilation),
        *(isinstance(layer, Transposed), more, layer.groups),
        [*(trains or name == case.result_name for name in "xw"), bias is not None],
    )


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
