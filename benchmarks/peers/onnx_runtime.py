"""ONNX Runtime, forward alone: a model of one node for each layer."""

from typing import Any

import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.cases import Case, Host
from benchmarks.peers.base import Call, Peer, RefusedError, ResidentDevice

OPERATORS = {
    "forward": "Conv",
    "transpose": "ConvTranspose",
    "max_pool": "MaxPool",
    "avg_pool": "AveragePool",
    "global_avg_pool": "GlobalAveragePool",
}
# The names of options, where a node has another.
ATTRIBUTES = {"stride": "strides", "dilation": "dilations", "groups": "group"}
ATTRIBUTES |= {"kernel_size": "kernel_shape", "padding": "pads"}
# Versions that every release since 2021 reads.
VERSIONS: Any = {"ir_version": 7, "opset_imports": [helper.make_opsetid("", 13)]}


class OnnxRuntime(Peer):
    device = ResidentDevice()

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": onnxruntime.__version__}

    def call(self, case: Case, *operands: Host) -> Call:
        """Run a session, which has the weights."""
        if case.operation not in OPERATORS:
            raise RefusedError(f"this peer has no {case.operation}")
        x, *weights = operands
        options = onnxruntime.SessionOptions()
        # Else the threads of each layer's session would spin through the next one's.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            model(case, weights), options, providers=["CPUExecutionProvider"]
        )
        return lambda: session.run(None, {"x": x})[0]


def model(case: Case, weights: list[Host]) -> bytes:
    names = case.operand_names
    constants = map(numpy_helper.from_array, weights, names[1:])
    node = helper.make_node(OPERATORS[case.operation], names, ["y"], **attributes(case))
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", case.shapes["x"]), ("y", case.result_shape))
    )
    graph = helper.make_graph([node], case.operation, [x], [y], [*constants])
    made: bytes = helper.make_model(graph, **VERSIONS).SerializeToString()
    return made


def attributes(case: Case) -> dict[str, Any]:
    """The options as a node has them: padding before each axis, then after each."""
    options = case.layer.options.items()
    found = {ATTRIBUTES.get(name, name): value for name, value in options}
    if "pads" in found:
        found["pads"] *= 2
    if case.operation == "avg_pool":
        found["count_include_pad"] = 1
    return found
