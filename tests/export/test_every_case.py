"""Parity of da3-nano on photos of every shape, in batches of every size, on every scene, and with outliers."""

import json

import torch
from safetensors.torch import load_file, save_file

from da3_export.build import build
from da3_export.parity.cases import Case, all_cases, case_images
from da3_export.parity.reference import run_reference
from da3_export.parity.upstream import load_upstream
from da3_runtime.variants import find_variant
from tests.support.builds import build_request, measure_on
from tests.support.networks import NANO_WEIGHTS
from tests.support.paths import NANO
from tests.support.processes import run_module

CASES = [Case(84, 140, 1), Case(84, 98, 1, 3)]
PATCH_BIAS = "model.backbone.pretrained.patch_embed.proj.bias"
OUTLIERS = {3: 600.0, 50: -600.0, 101: 600.0, 120: -600.0}  # channel -> what is added to it


def test_every_case_is_in_parity(engine_copy):
    folder = ("--engine-dir", str(engine_copy.engine_dir))
    done = run_module("da3_export", "parity", "--model", NANO, *folder, timeout=580)
    assert done.code == 0, done.stderr
    report = json.loads((engine_copy.folder / "parity.json").read_text())
    assert report["ok"]
    assert all(row["ok"] for row in report["rows"])
    # FP16 weights in FP32 arithmetic are measured on one case.
    every = len(all_cases(False, True))
    counts = {("onnx-fp32", "fp32"): every}
    for artefact in ("onnx-fp16", "onnx-fp16-ort"):
        counts |= {(artefact, "fp16 weights"): 1, (artefact, "fp16"): every}
    for (artefact, arithmetic), cases in counts.items():
        of_it = (artefact, arithmetic)
        rows = [row for row in report["rows"] if (row["artefact"], row["arithmetic"]) == of_it]
        assert len({row["output"] for row in rows}) == 6
        assert len(rows) == 6 * cases


def outliers_left(weights):
    """Median size of the channels of ``OUTLIERS`` after the last block of upstream's network."""
    variant = find_variant(NANO)
    network = load_upstream(variant, variant.graphs[0], weights)
    found = []
    block = network.backbone.pretrained.blocks[-1]
    block.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    run_reference(network, case_images(CASES[0]), variant.graphs[0])
    return found[0][..., list(OUTLIERS)].abs().median().item()


def test_outliers_in_the_residual_stream_are_in_parity(tmp_path, monkeypatch):
    weights = tmp_path / "outliers.safetensors"
    tensors = load_file(NANO_WEIGHTS)
    tensors[PATCH_BIAS][list(OUTLIERS)] += torch.tensor(list(OUTLIERS.values()), dtype=torch.float16)
    save_file(tensors, weights)
    assert outliers_left(weights) > 480
    measure_on(monkeypatch, CASES)
    build(build_request(tmp_path, "onnx-fp16,onnx-fp16-ort", weights=str(weights)))
    report = json.loads((tmp_path / NANO / "dpt" / "parity.json").read_text())
    assert all(row["ok"] for row in report["rows"])
    errors = {
        row["artefact"]: row["mean"]
        for row in report["rows"]
        if (row["arithmetic"], row["output"], row["views"]) == ("fp16", "depth", 1)
    }
    # The FP16 stream of the fused graph costs little more than the FP32 stream of the other.
    assert errors["onnx-fp16-ort"] < 2 * errors["onnx-fp16"] < 1e-3
