"""How large the measurements are: whole ones, a smoke test, and what tests choose."""

from dataclasses import dataclass

from benchmarks.layers import Layer
from benchmarks.suites import LAYERS

ARITHMETICS = ("float32", "tf32", "float16", "bfloat16")
HALF_AND_WHOLE = ("float32", "float16")
RESNET50 = LAYERS["resnet50"]


@dataclass(frozen=True)
class Scale:
    """Sizes and numbers of calls."""

    batch: int = 32
    # Layers of the two suites that are compared with cuDNN.
    layers: tuple[Layer, ...] = RESNET50
    depthwise: tuple[Layer, ...] = tuple(
        each for each in LAYERS["mobilenetv2"] if each.kind == "depthwise"
    )
    arithmetics: tuple[str, ...] = ARITHMETICS
    # Layers whose columns are gathered, added back and cut in blocks of other sizes.
    columns: tuple[Layer, ...] = tuple(
        each
        for each in RESNET50
        if each.name in ("3-64 7x7/2 @224", "64-64 3x3 @56", "256-256 3x3 @14")
    )
    block_mib: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    # A side of the square matrices, and bytes of a copy.
    matrix: int = 8192
    copied_bytes: int = 4 * 2**30
    repeats: int = 15
    # Small calls that are timed together, and those in one captured graph.
    calls: int = 500
    captured: int = 64
    # What each peer is timed on each case: rounds, and seconds in all.
    rounds: int = 2
    seconds: float = 0.02
    tests: tuple[str, ...] = ("tests",)


FULL = Scale()
QUICK = Scale(
    batch=2,
    layers=RESNET50[:3],
    depthwise=FULL.depthwise[:1],
    columns=FULL.columns[1:2],
    block_mib=(2, 32),
    matrix=1024,
    copied_bytes=64 * 2**20,
    repeats=3,
    calls=20,
    captured=8,
    rounds=1,
    seconds=0.005,
    tests=("tests/cuda/test_kernels.py",),
)
