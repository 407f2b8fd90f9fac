"""The strategies: ways to compute a convolution, one in each file."""

from cuconv.strategies.base import (
    Blocks,
    Job,
    Strategy,
    Tiling,
    Tilings,
    Variant,
    Workspace,
)
from cuconv.strategies.cudnn import Cudnn
from cuconv.strategies.depthwise import Depthwise
from cuconv.strategies.fft import Fft
from cuconv.strategies.im2col import Im2col
from cuconv.strategies.implicit_gemm import ImplicitGemm
from cuconv.strategies.partial_im2col import PartialIm2col
from cuconv.strategies.pointwise import Pointwise
from cuconv.strategies.tap_matmul import TapMatmul
from cuconv.strategies.winograd import Winograd

# In the order in which a plan takes them where prices are equal.
STRATEGIES: tuple[Strategy, ...] = (
    Pointwise(),
    Depthwise(),
    Winograd(),
    Fft(),
    Cudnn(),
    ImplicitGemm(),
    PartialIm2col(),
    TapMatmul(),
    Im2col(),
)


def strategies() -> dict[str, Strategy]:
    """Every strategy by name."""
    return {strategy.name: strategy for strategy in STRATEGIES}


__all__ = [
    "STRATEGIES",
    "Blocks",
    "Job",
    "Strategy",
    "Tiling",
    "Tilings",
    "Variant",
    "Workspace",
    "strategies",
]
