"""The layers that are measured, as plain data."""

from dataclasses import dataclass

from benchmarks.cases import Case
from benchmarks.layers import Layer, Pool, Transposed, depthwise, doubling, layer, pool
from benchmarks.networks import NETWORKS, Network, Pass

Layers = tuple[Layer, ...]


@dataclass(frozen=True)
class Suite:
    """Layers, and how they are measured when nobody says otherwise."""

    name: str
    layers: tuple[Layer | Network, ...]
    batch: int = 8
    peers: tuple[str, ...] = ("cuconv", "torch", "im2col_rows", "im2col_columns")
    operations: tuple[str, ...] = tuple(Layer.operations)

    def cases(self) -> list[Case | Pass]:
        return [
            Pass(each, operation, self.batch)
            if isinstance(each, Network)
            else Case(each, operation, self.batch)
            for operation in self.operations
            for each in self.layers
        ]


def resnet50() -> Layers:
    """He et al. 2015, the original: a stage begins with the stride on its 1×1."""
    layers = [layer(3, 224, 64, 7, 2), layer(64, 56, 64, 1), layer(64, 56, 64, 3)]
    layers += [layer(64, 56, 256, 1), layer(256, 56, 64, 1)]
    for enter, size in ((256, 56), (512, 28), (1024, 14)):
        middle, leave, small = enter // 2, enter * 2, size // 2
        layers += [layer(enter, size, middle, 1, 2), layer(middle, small, middle, 3)]
        layers += [layer(middle, small, leave, 1), layer(enter, size, leave, 1, 2)]
        layers.append(layer(leave, small, middle, 1))
    return tuple(layers)


def mobilenetv2() -> Layers:
    """Sandler et al. 2018, table 2: each depthwise and pointwise shape once."""
    # Expansion, filters, blocks and first stride of each stage.
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)]
    stages += [(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    layers, channels, size = [], 32, 112
    for expansion, filters, blocks, first in stages:
        for stride in (first, *(1,) * (blocks - 1)):
            wide = channels * expansion
            if expansion > 1:
                layers.append(layer(channels, size, wide, 1))
            layers.append(depthwise(wide, size, 3, stride))
            size //= stride
            layers.append(layer(wide, size, filters, 1))
            channels = filters
    return tuple(dict.fromkeys([*layers, layer(320, 7, 1280, 1)]))


# Where version 1.5 differs: the stride is on the 3×3.
RESNET50_V15 = tuple(
    each
    for c, size in ((256, 56), (512, 28), (1024, 14))
    for each in (layer(c, size, c // 2, 1), layer(c // 2, size, c // 2, 3, 2))
)

# Simonyan and Zisserman 2014, each shape once.
VGG16 = tuple(
    layer(channels, size, filters, 3)
    for size, *pairs in (
        (224, (3, 64), (64, 64)),
        (112, (64, 128), (128, 128)),
        (56, (128, 256), (256, 256)),
        (28, (256, 512), (512, 512)),
        (14, (512, 512)),
    )
    for channels, filters in pairs
)

# Layers as in Çiçek et al. 2016, on volumes of moderate size.
UNET3D = (
    *(layer(c, 48, 32, 3, rank=3) for c in (1, 32)),
    layer(32, 48, 64, 3, 2, rank=3),
    *(layer(c, 24, 64, 3, rank=3) for c in (64, 192)),
    layer(128, 12, 128, 3, rank=3),
    layer(256, 6, 256, 3, rank=3),
)

# WaveNet's dilated layers, and a second of sound through EnCodec's encoder.
WAVENET = tuple(
    layer(64, 16000, 128, 3, rank=1, dilation=dilation, label="wavenet")
    for dilation in (1, 16, 512)
)
ENCODEC = tuple(
    layer(*sizes, rank=1, padding=padding, label="encodec")
    for *sizes, padding in (
        (1, 24000, 32, 7, 1, 3),
        (32, 24000, 64, 4, 2, 1),
        (64, 12000, 128, 8, 4, 2),
        (128, 3000, 256, 10, 5, 3),
        (256, 600, 512, 16, 8, 4),
        (512, 75, 128, 7, 1, 3),
    )
)

# Depthwise as in ConvNeXt-T and RepLKNet-31B, and dense 11×11 and 15×15.
LARGE_KERNEL = (
    *(depthwise(96 << i, 56 >> i, 7) for i in range(4)),
    *(depthwise(128 << i, 56 >> i, k) for i, k in enumerate((31, 29, 27, 13))),
    layer(3, 224, 64, 11, 4, padding=2),
    layer(32, 56, 32, 11),
    layer(16, 64, 16, 15),
)

# Decoders: a common shape; DCGAN's, Radford et al. 2015, figure 1; U-Net's, Ronneberger
# et al. 2015, padded to equal sizes; and as in CycleGAN, Zhu et al. 2017.
TRANSPOSED = (
    doubling(128, 28, 64, 4, padding=1),
    *(
        doubling(*sizes, 4, padding=1, label="dcgan")
        for sizes in ((1024, 4, 512), (512, 8, 256), (256, 16, 128), (128, 32, 3))
    ),
    *(
        doubling(*sizes, 2, label="unet")
        for sizes in ((512, 28, 256), (256, 56, 128), (128, 112, 64))
    ),
    doubling(256, 64, 128, 3, padding=1, output_padding=1, label="cyclegan"),
)

# ResNet's, without padding too, VGG's, Inception's, and a mean of whole planes; over
# one axis as in M5, Dai et al. 2016, and over three as in a 3-D U-Net.
POOLING = (
    pool(64, 112, 3, 2, padding=1),
    pool(64, 112, 3, 2),
    pool(128, 56, 2, 2),
    pool(192, 28, 3, 1, padding=1),
    pool(2048, 7, 7, 7, label="whole"),
    pool(128, 8000, 4, 4, rank=1),
    pool(64, 24, 2, 2, rank=3),
)

SWEPT = (layer(64, 56, 64, 3), layer(256, 14, 256, 3), layer(32, 48, 32, 3, rank=3))
SIZES = tuple(layer(3, size, 8, 3) for size in (8, 16, 24, 32, 48, 64))
KERNELS = tuple(layer(64, 56, 64, kernel) for kernel in range(1, 12, 2))
LIMITS = tuple(f"cuconv@{2**i}MiB" for i in range(9))
WHOLE_BUFFER = ("cuconv", "im2col_rows", "im2col_columns")
PYTORCH = ("cuconv", "torch")
WITH_ONNX = (*PYTORCH, "onnxruntime")

SUITES = {
    suite.name: suite
    for suite in (
        Suite("resnet50", resnet50()),
        Suite("resnet50_v15", RESNET50_V15),
        Suite("vgg16", VGG16),
        Suite("mobilenetv2", mobilenetv2()),
        Suite("unet3d", UNET3D, batch=1),
        Suite("audio1d", WAVENET + ENCODEC),
        Suite("large_kernel", LARGE_KERNEL),
        Suite("single_image", resnet50(), batch=1),
        Suite("transposed", TRANSPOSED, 8, PYTORCH, tuple(Transposed.operations)),
        Suite("pooling", POOLING, 8, PYTORCH, tuple(Pool.operations)),
        Suite("networks", NETWORKS, 1, WITH_ONNX, Network.operations),
        Suite("networks_batch8", NETWORKS, 8, WITH_ONNX, Network.operations),
        Suite("sweep_memory", SWEPT, peers=("cuconv", *LIMITS)),
        Suite("sweep_size", SIZES, 1, ("cuconv", "naive")),
        Suite("sweep_kernel", KERNELS, 4, WHOLE_BUFFER, ("forward",)),
    )
}
