"""A network in an ONNX file through onnx.reference, with cuconv's operators.

``onnx.reference`` runs a file node by node in NumPy, and takes operators of one's own.  The
values are compared with ONNX Runtime's.  The files are those of the package
rapidocr-onnxruntime: a detector of text, and a classifier of its direction.
"""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from PIL import Image, ImageDraw, ImageFont

import cuconv

MODELS = "ch_PP-OCRv4_det_infer.onnx", "ch_ppocr_mobile_v2.0_cls_infer.onnx"


def options(given, rank):
    """Attributes of a node as options of cuconv: flat pads become pairs."""
    flat = given.get("pads") or [0] * (2 * rank)
    pairs = tuple(zip(flat[:rank], flat[rank:], strict=True))
    word = given.get("auto_pad") or "NOTSET"
    return {
        "stride": given.get("strides") or 1,
        "dilation": given.get("dilations") or 1,
        "padding": pairs if word == "NOTSET" else word,
    }


class Conv(OpRun):
    def _run(self, x, w, bias=None, group=1, **given):
        return (cuconv.conv(x, w, bias, groups=group, **options(given, w.ndim - 2)),)


class ConvTranspose(OpRun):
    def _run(self, x, w, bias=None, group=1, **given):
        more = options(given, w.ndim - 2)
        more["output_padding"] = given.get("output_padding") or 0
        more["output_size"] = given.get("output_shape")
        if more["output_size"] and given.get("auto_pad", "NOTSET") == "NOTSET":
            more["padding"] = "SAME_LOWER"  # the size determines what is cropped
        return (cuconv.conv_transpose(x, w, bias, groups=group, **more),)


class MaxPool(OpRun):
    def _run(self, x, kernel_shape=None, ceil_mode=0, **given):
        more = options(given, x.ndim - 2)
        return (cuconv.max_pool(x, kernel_shape, ceil_mode=bool(ceil_mode), **more),)


class GlobalAveragePool(OpRun):
    def _run(self, x):
        return (cuconv.global_avg_pool(x),)


class BatchNormalization(OpRun):
    """With the statistics in the file.

    ``onnx.reference`` takes the batch's own for files older than version 14.
    """

    def _run(self, x, scale, shift, mean, var, epsilon=1e-5, **given):
        factor = scale / np.sqrt(var + np.float32(epsilon))
        axes = (-1, *[1] * (x.ndim - 2))
        y = x * factor.reshape(axes) + (shift - mean * factor).reshape(axes)
        return (y,)


CONVOLUTIONS = [Conv, ConvTranspose, MaxPool, GlobalAveragePool]


def picture(size):
    """Black words on white, (1, 3, *size), from -1 to 1."""
    image = Image.new("RGB", size[::-1], "white")
    font = ImageFont.load_default(size=24)
    ImageDraw.Draw(image).text((8, size[0] // 4), "im2col", "black", font)
    pixels = np.asarray(image, dtype="f4") / np.float32(127.5) - 1
    return np.moveaxis(pixels, -1, 0)[None].copy()


def folder():
    """Where the files are; the package itself is not imported."""
    found = importlib.util.find_spec("rapidocr_onnxruntime")
    if found is None:
        raise SystemExit("pip install --no-deps rapidocr-onnxruntime brings the files")
    return Path(found.submodule_search_locations[0]) / "models"


if __name__ == "__main__":
    for name in MODELS:
        model = onnx.load(folder() / name)
        kinds = [node.op_type for node in model.graph.node]
        ran = sum(kinds.count(operator.__name__) for operator in CONVOLUTIONS)
        operators = [*CONVOLUTIONS, BatchNormalization]
        ours = ReferenceEvaluator(model, new_ops=operators)
        theirs = onnxruntime.InferenceSession(model.SerializeToString())
        (x,) = theirs.get_inputs()
        for size in ((64, 96), (96, 160)):
            image = picture(size)
            (wanted,) = theirs.run(None, {x.name: image})
            (got,) = ours.run(None, {x.name: image})
            assert got.shape == wanted.shape
            assert wanted.max() > 0.5  # there is something to find
            difference = float(np.abs(got - wanted).max())
            assert difference < 1e-3
            print(f"{name}: {ran} nodes by cuconv, difference {difference:.1e}")
