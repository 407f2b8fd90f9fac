"""The strategies: ways to compute a convolution, one in each file."""

from cuconv.strategies.base import (
    Blocks,
    Job,
    Strategy,
    Tiling,
    Workspace,
)
from cuconv.strategies.depthwise import Depthwise
from cuconv.strategies.fft import Fft
from cuconv.strategies.im2col import Im2col
from cuconv.strategies.implicit_gemm import ImplicitGemm
from cuconv.strategies.pointwise import Pointwise
from cuconv.strategies.tap_matmul import TapMatmul
from cuconv.strategies.winograd import Winograd

_REGISTRY: dict[str, Strategy] = {}


def register(strategy: Strategy) -> None:
    """Add a strategy; its name must be new."""
    if strategy.name in _REGISTRY:
        raise ValueError(f"a strategy named {strategy.name!r} is already registered")
    _REGISTRY[strategy.name] = strategy


def strategies() -> dict[str, Strategy]:
    """Every strategy by name."""
    return dict(_REGISTRY)


register(Pointwise())
register(Depthwise())
register(Winograd())
register(Fft())
register(ImplicitGemm())
register(TapMatmul())
register(Im2col())

__all__ = [
    "Blocks",
    "Job",
    "Strategy",
    "Tiling",
    "Workspace",
    "register",
    "strategies",
]
