"""Counts the operators of a model's FP16 ONNX and of the graph that ONNX Runtime runs on CUDA.

    python -m benchmarks.fused_nodes --model da3-large

Needs no GPU. The weights are random: they change no operator. An operator is about one kernel, except
that Reshape, Squeeze and Unsqueeze move nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import onnx

from benchmarks.record import RESULTS, installed, provenance, write_result
from da3_export.onnx_fusion import fuse_onnx
from da3_export.random_weights import write_random_checkpoint
from da3_export.torch_to_onnx import export_onnx
from da3_runtime.network import precision
from da3_runtime.network.load import load_network
from da3_runtime.variants import Graph, Variant, find_variant

PACKAGES = ("torch", "onnx", "onnxscript")
FREE = ("Reshape", "Squeeze", "Unsqueeze")  # other shapes of the same memory
# Operators that are listed; all others are one row.
LISTED = (
    "MatMul",
    "Attention",
    "Conv",
    "Add",
    "Mul",
    "Cast",
    "LayerNormalization",
    "SkipLayerNormalization",
    "RotaryEmbedding",
    "Gelu",
    "BiasGelu",
    "Transpose",
    "Split",
)


def operators_of(path: Path) -> Counter[str]:
    """Operators of an ONNX file that compute or move floats, by type.

    Sizes are whole numbers, which ONNX Runtime computes on the host.
    """
    model = onnx.load(str(path), load_external_data=False)
    graph = onnx.shape_inference.infer_shapes(model).graph
    floats = {
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    }
    nodes = [node for node in graph.node if node.output[0] in floats and node.op_type not in FREE]
    return Counter(node.op_type if node.op_type in LISTED else "others" for node in nodes)


def count(variant: Variant, graph: Graph, folder: Path) -> dict[str, Counter[str]]:
    """Operators of both graphs, by artefact; ``folder`` keeps their files."""
    checkpoint = write_random_checkpoint(variant, 0, folder / "checkpoint")
    network = load_network(variant, graph, checkpoint.path, precision.FP16, fold=True)
    source, target = folder / "fp16.onnx", folder / "fp16.ort.onnx"
    export_onnx(network, source)
    fuse_onnx(source, target)
    return {"onnx-fp16": operators_of(source), "onnx-fp16-ort": operators_of(target)}


def main() -> int:
    """Count and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="da3-large", help="model id; default da3-large")
    parser.add_argument("--out", type=Path, default=RESULTS / "fused_nodes.json", help="result file")
    args = parser.parse_args()
    variant = find_variant(args.model)
    with tempfile.TemporaryDirectory() as folder:
        counts = count(variant, variant.graphs[0], Path(folder))
    before, after = counts.values()
    operators = [
        {"operator": name, "onnx-fp16": before[name], "onnx-fp16-ort": after[name]}
        for name in (*LISTED, "others")
        if before[name] or after[name]
    ]
    content = {
        "model": variant.model_id,
        "weights": "random:0",
        **provenance(installed(PACKAGES)),
        "operators": operators,
        "total": {name: counted.total() for name, counted in counts.items()},
    }
    write_result(args.out, content)
    print(f"{content['total']} -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
