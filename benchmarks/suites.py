"""The layers that are measured, as plain data."""

from dataclasses import dataclass

from benchmarks.definitions import operations_on
from benchmarks.layers import Layer, Pool, Transposed

OPERATIONS = operations_on(Layer)
TRANSPOSED = operations_on(Transposed)
POOLING = operations_on(Pool)


@dataclass(frozen=True)
class Suite:
    """Layers, and how they are measured when nobody says otherwise."""

    name: str
    layers: tuple[Layer, ...]
    batch: int = 8
    peers: tuple[str, ...] = ("cuconv", "torch", "im2col_rows", "im2col_columns")
    operations: tuple[str, ...] = OPERATIONS


def layer(
    channels: int,
    size: int,
    filters: int,
    kernel: int,
    stride: int = 1,
    *,
    rank: int = 2,
    padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
    label: str = "",
) -> Layer:
    """Equal numbers along every axis; by default padded as networks do for stride 1."""
    before = dilation * (kernel - 1) // 2 if padding is None else padding
    numbers = (size, kernel, stride, before, dilation)
    sizes, kernels, strides, paddings, dilations = ((n,) * rank for n in numbers)
    return Layer(
        channels, sizes, filters, kernels, strides, paddings, dilations, groups, label
    )


def depthwise(channels: int, size: int, kernel: int, stride: int = 1) -> Layer:
    return layer(channels, size, channels, kernel, stride, groups=channels)


def doubling(
    channels: int,
    size: int,
    filters: int,
    kernel: int,
    *,
    padding: int = 0,
    output_padding: int = 0,
    label: str = "",
) -> Transposed:
    """A transposed convolution of stride 2 over two axes."""
    numbers = (size, kernel, 2, padding, 1, output_padding)
    sizes, kernels, strides, paddings, dilations, more = ((n, n) for n in numbers)
    return Transposed(
        channels,
        sizes,
        filters,
        kernels,
        strides,
        paddings,
        dilations,
        label=label,
        output_padding=more,
    )


def pool(
    channels: int,
    size: int,
    kernel: int,
    stride: int,
    *,
    padding: int = 0,
    rank: int = 2,
    label: str = "",
) -> Pool:
    numbers = (size, kernel, stride, padding, 1)
    sizes, kernels, strides, paddings, dilations = ((n,) * rank for n in numbers)
    return Pool(
        channels,
        sizes,
        channels,
        kernels,
        strides,
        paddings,
        dilations,
        groups=channels,
        label=label,
    )


def resnet50() -> tuple[Layer, ...]:
    """He et al. 2015, the original: a stage begins with the stride on its 1×1."""
    layers = [layer(3, 224, 64, 7, 2), layer(64, 56, 64, 1), layer(64, 56, 64, 3)]
    layers += [layer(64, 56, 256, 1), layer(256, 56, 64, 1)]
    for enter, size in ((256, 56), (512, 28), (1024, 14)):
        middle, leave, small = enter // 2, enter * 2, size // 2
        layers += [
            layer(enter, size, middle, 1, 2),
            layer(middle, small, middle, 3),
            layer(middle, small, leave, 1),
            layer(enter, size, leave, 1, 2),
            layer(leave, small, middle, 1),
        ]
    return tuple(layers)


def resnet50_v15() -> tuple[Layer, ...]:
    """Where version 1.5 differs: the stride is on the 3×3."""
    stages = ((256, 56), (512, 28), (1024, 14))
    pairs = (
        (layer(c, size, c // 2, 1), layer(c // 2, size, c // 2, 3, 2))
        for c, size in stages
    )
    return tuple(each for pair in pairs for each in pair)


def vgg16() -> tuple[Layer, ...]:
    """Simonyan and Zisserman 2014, each shape once."""
    shapes = (
        (3, 224, 64),
        (64, 224, 64),
        (64, 112, 128),
        (128, 112, 128),
        (128, 56, 256),
        (256, 56, 256),
        (256, 28, 512),
        (512, 28, 512),
        (512, 14, 512),
    )
    return tuple(layer(c, size, k, 3) for c, size, k in shapes)


def mobilenetv2() -> tuple[Layer, ...]:
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
    layers.append(layer(320, 7, 1280, 1))
    return tuple(dict.fromkeys(layers))


def unet3d() -> tuple[Layer, ...]:
    """Layers as in Çiçek et al. 2016, on volumes of moderate size."""
    shapes = [(1, 48, 32, 1), (32, 48, 32, 1), (32, 48, 64, 2), (64, 24, 64, 1)]
    shapes += [(192, 24, 64, 1), (128, 12, 128, 1), (256, 6, 256, 1)]
    return tuple(layer(c, size, k, 3, stride, rank=3) for c, size, k, stride in shapes)


def audio1d() -> tuple[Layer, ...]:
    """WaveNet's dilated layers, and a second of sound through EnCodec's encoder."""
    wavenet = tuple(
        layer(64, 16000, 128, 3, rank=1, dilation=d, label="wavenet")
        for d in (1, 16, 512)
    )
    # Channels, length, filters, kernel, stride and padding.
    encoder = (
        (1, 24000, 32, 7, 1, 3),
        (32, 24000, 64, 4, 2, 1),
        (64, 12000, 128, 8, 4, 2),
        (128, 3000, 256, 10, 5, 3),
        (256, 600, 512, 16, 8, 4),
        (512, 75, 128, 7, 1, 3),
    )
    return wavenet + tuple(
        layer(c, length, k, kernel, stride, rank=1, padding=padding, label="encodec")
        for c, length, k, kernel, stride, padding in encoder
    )


def large_kernel() -> tuple[Layer, ...]:
    """Depthwise as in ConvNeXt-T and RepLKNet-31B, and dense 11×11 and 15×15."""
    convnext = tuple(depthwise(96 << i, 56 >> i, 7) for i in range(4))
    replknet = tuple(
        depthwise(128 << i, 56 >> i, k) for i, k in enumerate((31, 29, 27, 13))
    )
    alexnet = layer(3, 224, 64, 11, 4, padding=2)
    return (*convnext, *replknet, alexnet, layer(32, 56, 32, 11), layer(16, 64, 16, 15))


def transposed() -> tuple[Layer, ...]:
    """Decoders: a common shape, DCGAN's, U-Net's, and one with output padding.

    Radford et al. 2015, figure 1; Ronneberger et al. 2015, padded to equal sizes; the
    last as in CycleGAN, Zhu et al. 2017.
    """
    dcgan = ((1024, 4, 512), (512, 8, 256), (256, 16, 128), (128, 32, 3))
    unet = ((512, 28, 256), (256, 56, 128), (128, 112, 64))
    return (
        doubling(128, 28, 64, 4, padding=1),
        *(doubling(*shape, 4, padding=1, label="dcgan") for shape in dcgan),
        *(doubling(*shape, 2, label="unet") for shape in unet),
        doubling(256, 64, 128, 3, padding=1, output_padding=1, label="cyclegan"),
    )


def pooling() -> tuple[Layer, ...]:
    """ResNet's, without padding too, VGG's, Inception's, and a mean of whole planes.

    Then over one axis as in M5, Dai et al. 2016, and over three as in a 3-D U-Net.
    """
    return (
        pool(64, 112, 3, 2, padding=1),
        pool(64, 112, 3, 2),
        pool(128, 56, 2, 2),
        pool(192, 28, 3, 1, padding=1),
        pool(2048, 7, 7, 7, label="whole"),
        pool(128, 8000, 4, 4, rank=1),
        pool(64, 24, 2, 2, rank=3),
    )


LIMITS = tuple(f"cuconv@{2**i}MiB" for i in range(9))
WHOLE_BUFFER = ("im2col_rows", "im2col_columns")

SUITES = {
    suite.name: suite
    for suite in (
        Suite("resnet50", resnet50()),
        Suite("resnet50_v15", resnet50_v15()),
        Suite("vgg16", vgg16()),
        Suite("mobilenetv2", mobilenetv2()),
        Suite("unet3d", unet3d(), batch=1),
        Suite("audio1d", audio1d()),
        Suite("large_kernel", large_kernel()),
        Suite("single_image", resnet50(), batch=1),
        Suite(
            "transposed",
            transposed(),
            peers=("cuconv", "torch"),
            operations=TRANSPOSED,
        ),
        Suite(
            "pooling",
            pooling(),
            peers=("cuconv", "torch"),
            operations=POOLING,
        ),
        Suite(
            "sweep_memory",
            (
                layer(64, 56, 64, 3),
                layer(256, 14, 256, 3),
                layer(32, 48, 32, 3, rank=3),
            ),
            peers=("cuconv", *LIMITS),
        ),
        Suite(
            "sweep_size",
            tuple(layer(3, size, 8, 3) for size in (8, 16, 24, 32, 48, 64)),
            batch=1,
            peers=("cuconv", "naive"),
        ),
        Suite(
            "sweep_kernel",
            tuple(layer(64, 56, 64, kernel) for kernel in range(1, 12, 2)),
            batch=4,
            peers=("cuconv", *WHOLE_BUFFER),
            operations=("forward",),
        ),
    )
}
