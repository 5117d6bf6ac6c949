"""FP32 ONNX -> ONNX whose matrix products are in INT8, for CPUs.

Weights have one scale for each output channel. Activations are quantized when the graph runs, with one
scale for a whole tensor: static scales turn the depth into noise, because of outliers. Convolutions,
attention and everything else stay in FP32. So do the camera's layers
(:mod:`da3_runtime.network.precision`) and the last product of a SwiGLU, whose input has outliers: in
da3-giant it alone puts the depth out of tolerance.

Weights take 7 bits. Without VNNI instructions a processor adds two products of 8 bits in 16, which may
overflow; with 7 bits every processor computes the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
from onnx import ModelProto, helper

from da3_export.torch_to_onnx import data_of
from da3_runtime.errors import BuildError

_FP32_LAYERS = ("cam_dec.", "cam_enc.pose_branch.", ".mlp.w3.")  # parts of their weights' names


def write_int8(source: Path, path: Path) -> None:
    """Write the FP32 ONNX file ``source`` to ``path`` with its matrix products in INT8.

    Raises
    ------
    BuildError
        If the graph has no matrix product to quantize.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(str(source), load_external_data=False)
    # Says that the shapes are as they should be; without it a warning asks for ONNX Runtime's optimizer.
    add_pre_process_metadata(model)
    # From a file, beside the weights: of a model in memory the quantizer makes two copies.
    with tempfile.NamedTemporaryFile(dir=source.parent, prefix=".int8.", suffix=".onnx") as marked:
        marked.write(model.SerializeToString())
        marked.flush()
        quantize_dynamic(
            marked.name,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=_fp32_products(model),
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
    quantized = onnx.load(str(path), load_external_data=False)
    if not any(node.op_type == "MatMulInteger" for node in quantized.graph.node):
        raise BuildError(f"{source.name} has no matrix product that can be in INT8.")
    del quantized.metadata_props[:]
    helper.set_model_props(quantized, {"precision": "int8"})
    onnx.save(quantized, str(path))
    # onnx makes files of weights that only their owner can read.
    data_of(path).chmod(path.stat().st_mode)
    onnx.checker.check_model(str(path))


def _fp32_products(model: ModelProto) -> list[str]:
    """Names of the matrix products of :data:`_FP32_LAYERS`, which the names of their biases tell."""
    nodes = model.graph.node
    biased = {
        node.input[0] if node.op_type == "Add" else node.output[0]
        for node in nodes
        if node.op_type in ("Add", "Gemm")
        and any(part in name for name in node.input for part in _FP32_LAYERS)
    }
    names = [node.name for node in nodes if biased & {*node.output}]
    # The quantizer splits a Gemm into a product of this name and an addition.
    return names + [f"{name}_MatMul" for name in names]
