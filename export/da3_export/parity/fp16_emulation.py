"""Emulation of FP16 arithmetic on a CPU.

ONNX Runtime's CPU provider has no FP16 kernels for this graph: it computes in FP32 and rounds only at
the ends (measured with 1.32: the error of a two-layer FP16 product is that of FP32). Parity measured
that way would be too good. The emulation keeps every product and sum in FP32, as tensor cores
accumulate, and rounds each value that the graph stores in FP16 to FP16.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT


def round_like_half(model: ModelProto) -> ModelProto:
    """A copy of an FP16 model in FP32 in which every FP16 value is rounded to FP16 where it is made.

    Weights stay as they are stored and are widened where they are used, so the copy of a model with an
    external file of weights can use the same file. Run it with graph optimization off: optimizers may
    drop a cast to FP16 and back.
    """
    graph = shape_inference.infer_shapes(model).graph
    typed = [*graph.value_info, *graph.output, *graph.input]
    half = {value.name for value in typed if value.type.tensor_type.elem_type == HALF}
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == HALF}
    nodes = [helper.make_node("Cast", [name], [f"{name}/wide"], to=SINGLE) for name in sorted(weights)]
    for node in graph.node:
        nodes.extend(_rounded(node, half, weights))
    rewritten = helper.make_graph(
        nodes,
        graph.name,
        list(graph.input),
        list(graph.output),
        list(graph.initializer),
    )
    return helper.make_model(rewritten, opset_imports=model.opset_import, ir_version=model.ir_version)


def _rounded(node: NodeProto, half: set[str], weights: set[str]) -> list[NodeProto]:
    """``node`` in FP32, followed by casts that round its FP16 outputs."""
    wide = NodeProto()
    wide.CopyFrom(node)
    for i, name in enumerate(node.input):
        if name in weights:
            wide.input[i] = f"{name}/wide"
    if node.op_type == "Cast":
        # The rounding below does what a cast to FP16 did.
        del wide.attribute[:]
        to = next(a.i for a in node.attribute if a.name == "to")
        wide.attribute.append(helper.make_attribute("to", SINGLE if to == HALF else to))
    for attribute in wide.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            attribute.t.CopyFrom(_widen(attribute.t))
    casts: list[NodeProto] = []
    for i, name in enumerate(node.output):
        if name not in half:
            continue
        exact, stored = f"{name}/exact", f"{name}/half"
        wide.output[i] = exact
        casts.append(helper.make_node("Cast", [exact], [stored], to=HALF))
        casts.append(helper.make_node("Cast", [stored], [name], to=SINGLE))
    return [wide, *casts]


def _widen(tensor: TensorProto) -> TensorProto:
    """An FP16 tensor's values in FP32; other tensors as they are."""
    if tensor.data_type != HALF:
        return tensor
    values = numpy_helper.to_array(tensor).astype(np.float32)
    return numpy_helper.from_array(values, tensor.name)
