"""ONNX's Attention operator, spelled out as matrix products and a softmax.

The engine's ONNX has attention as one operator, which ONNX Runtime on CUDA needs to fuse it.
TensorRT-RTX 1.7 fuses both forms. From the operator it makes a kernel that sums Q K^T in FP16 (a plan
names its kernels' traits); only a softmax written in FP32 gives a kernel that sums in FP32. So plans are
built from the spelled-out form, and FP16 arithmetic is emulated on it.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

OPERATOR = "Attention"


def spell_out_attention(model: ModelProto) -> None:
    """Replace every Attention node by matrix products around a softmax in FP32, in place.

    Takes nodes as :func:`da3_runtime.network.vit.attention` exports them: Q, K and V of one dtype,
    [B, heads, tokens, head_dim], and the scale as an attribute.
    """
    graph = model.graph
    dtypes = {tensor.name: tensor.data_type for tensor in graph.initializer}
    half = any(dtype == TensorProto.FLOAT16 for dtype in dtypes.values())
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.extend(_parts(node, half) if node.op_type == OPERATOR else [node])
    del graph.node[:]
    graph.node.extend(nodes)


def _parts(node: NodeProto, half: bool) -> list[NodeProto]:
    q, k, v = node.input
    (output,) = (name for name in node.output if name)
    (scale,) = (attribute.f for attribute in node.attribute if attribute.name == "scale")
    value = numpy_helper.from_array(np.asarray(scale, np.float16 if half else np.float32))
    dtype = TensorProto.FLOAT16 if half else TensorProto.FLOAT

    def name(part: str) -> str:
        return f"{output}/{part}"

    return [
        helper.make_node("Constant", [], [name("scale")], value=value),
        helper.make_node("Mul", [q, name("scale")], [name("q")], name("q")),
        helper.make_node("Transpose", [k], [name("k")], name("k"), perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", [name("q"), name("k")], [name("scores")], name("scores")),
        helper.make_node("Cast", [name("scores")], [name("wide")], name("wide"), to=TensorProto.FLOAT),
        helper.make_node("Softmax", [name("wide")], [name("softmax")], name("softmax"), axis=-1),
        helper.make_node("Cast", [name("softmax")], [name("weights")], name("weights"), to=dtype),
        helper.make_node("MatMul", [name("weights"), v], [output], output),
    ]
