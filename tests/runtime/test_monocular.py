"""The monocular series (depth and sky), on upstream's own modules at da3-small's width.

da3metric-large and da3mono-large differ from this network in width and depth only.
"""

import numpy as np
import onnx
import pytest
import torch

from da3_export.onnx_fusion import fuse_onnx
from da3_export.parity.cases import Case, case_images
from da3_export.parity.reference import run_reference
from da3_export.parity.report import compare
from da3_export.parity.subjects import FP16, FP16_WEIGHTS, FUSED, onnx_runner
from da3_export.parity.upstream import build_upstream
from da3_export.torch_to_onnx import export_onnx
from da3_runtime.network import precision
from da3_runtime.variants import find_variant
from tests.support.networks import SMALL_MONOCULAR, network_of

(GRAPH,) = find_variant("da3metric-large").graphs
CASES = [Case(84, 126, 2), Case(140, 98, 1), Case(84, 98, 1, 3)]


@pytest.fixture(scope="module")
def upstream(small_monocular):
    return small_monocular


def test_the_small_stand_in_has_the_architecture_of_the_metric_network(upstream):
    metric = build_upstream(GRAPH)
    kinds = [type(module).__name__ for module in metric.head.modules()]
    assert [type(module).__name__ for module in upstream.head.modules()] == kinds
    small, large = upstream.backbone.pretrained, metric.backbone.pretrained
    for name in ("alt_start", "rope", "cat_token", "patch_size"):
        assert getattr(small, name) == getattr(large, name)
    assert type(small.blocks[0].attn.q_norm) is type(large.blocks[0].attn.q_norm)


def test_network_equals_upstream(upstream):
    network = network_of(upstream, SMALL_MONOCULAR, GRAPH, precision.FP32)
    assert network.output_names == ("depth", "sky")
    for case in CASES:
        images = case_images(case)
        reference = run_reference(upstream, images, GRAPH).outputs
        assert 0.05 < (reference.sky == 0).mean() < 0.95, "the sky branch must be both on and off"
        with torch.inference_mode():
            depth, sky = network(torch.from_numpy(images))
        np.testing.assert_allclose(depth.numpy(), reference.depth, rtol=1e-4)
        np.testing.assert_allclose(sky.numpy(), reference.sky, rtol=1e-4, atol=1e-5)


def test_the_exported_fp16_graph_is_in_parity(upstream, tmp_path):
    """In FP32 arithmetic and with rounded results; every build measures its own FP32 graph too."""
    path = tmp_path / "model.onnx"
    export_onnx(network_of(upstream, SMALL_MONOCULAR, GRAPH, precision.FP16, fold=True), path)
    fuse_onnx(path, fused := tmp_path / "fused.onnx")
    assert [output.name for output in onnx.load(str(path)).graph.output] == ["depth", "sky"]
    for subject in (FP16_WEIGHTS, FP16, FUSED):
        run = onnx_runner(fused if subject is FUSED else path, subject)
        for case in CASES:
            reference = run_reference(upstream, case_images(case), GRAPH)
            rows = compare(subject, case, run(case_images(case), None), reference)
            assert {row.output for row in rows} == {"depth", "sky"}
            assert all(row.ok for row in rows), rows
