"""What is measured together: the layers in ``suites.json``, and whole networks.

- resnet50: He et al. 2015, the original: a stage begins with the stride on its 1×1.
  resnet50_v15 is where version 1.5 differs: the stride is on the 3×3.
- vgg16: Simonyan and Zisserman 2014, each shape once.
- mobilenetv2: Sandler et al. 2018, table 2: each depthwise and pointwise shape once.
- unet3d: as in Çiçek et al. 2016, on volumes of moderate size.
- audio1d: WaveNet's dilated layers, and a second of sound through EnCodec's encoder.
- large_kernel: depthwise as in ConvNeXt-T and RepLKNet-31B; dense 11×11 and 15×15.
- filters: a bank of filters over eight frames, as people use SciPy for.
- transposed: decoders: a common shape; DCGAN's, Radford et al. 2015, figure 1; U-Net's,
  Ronneberger et al. 2015, padded to equal sizes; as in CycleGAN, Zhu et al. 2017.
- pooling: ResNet's, without padding too, VGG's, Inception's, and whole planes; over one
  axis as in M5, Dai et al. 2016, and over three as in a 3-D U-Net.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.cases import Case
from benchmarks.layers import Layer, Pool, Transposed, layer_of, read_lists
from benchmarks.networks import NETWORKS, Network, Pass

PYTORCH = ("cuconv", "torch")
WITH_ONNX = (*PYTORCH, "onnxruntime")
FILTERS = (*PYTORCH, "scipy", "oaconvolve", "ndimage", "im2col_columns")
COLUMNS = ("im2col_rows", "im2col_columns")


@dataclass(frozen=True)
class Suite:
    """Layers, and how they are measured when nobody says otherwise."""

    name: str
    layers: tuple[Layer | Network, ...]
    batch: int = 8
    peers: tuple[str, ...] = (*PYTORCH, *COLUMNS)
    operations: tuple[str, ...] = tuple(Layer.operations)

    def cases(self) -> list[Case | Pass]:
        return [
            Pass(each, operation, self.batch)
            if isinstance(each, Network)
            else Case(each, operation, self.batch)
            for operation in self.operations
            for each in self.layers
        ]


LAYERS = {
    name: tuple(layer_of(**each) for each in lines)
    for name, lines in read_lists("suites").items()
}
LIMITS = tuple(f"cuconv@{2**i}MiB" for i in range(9))


def listed(name: str, *more: Any) -> Suite:
    return Suite(name, LAYERS[name], *more)


SUITES = {
    suite.name: suite
    for suite in (
        listed("resnet50"),
        listed("resnet50_v15"),
        listed("vgg16"),
        listed("mobilenetv2"),
        listed("unet3d", 1),
        listed("audio1d"),
        listed("large_kernel"),
        listed("filters", 8, FILTERS, ("forward",)),
        Suite("single_image", LAYERS["resnet50"], 1),
        listed("transposed", 8, PYTORCH, tuple(Transposed.operations)),
        listed("pooling", 8, PYTORCH, tuple(Pool.operations)),
        Suite("networks", NETWORKS, 1, WITH_ONNX, Network.operations),
        Suite("networks_batch8", NETWORKS, 8, WITH_ONNX, Network.operations),
        listed("sweep_memory", 8, ("cuconv", *LIMITS)),
        listed("sweep_size", 1, ("cuconv", "naive")),
        listed("sweep_kernel", 4, ("cuconv", *COLUMNS), ("forward",)),
    )
}
