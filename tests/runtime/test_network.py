"""The torch network: upstream's parameters and outputs, and the stated precision."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import da3_runtime.network.positions as positions
from da3_export.parity.reference import run_reference
from da3_export.parity.upstream import build_upstream, load_upstream, upstream_of
from da3_export.random_weights import randomize, write_random_checkpoint
from da3_runtime.backends import eager
from da3_runtime.network import precision
from da3_runtime.network.load import build_network, load_network, load_weights
from da3_runtime.network.sizes import SIZES, Sizes
from da3_runtime.network.vit import Block, normalize
from da3_runtime.network_io import CHOOSE, POSE_ENCODING
from da3_runtime.store.manifest import sha256_of
from da3_runtime.variants import VARIANTS, find_variant
from tests.support.networks import network_of
from tests.support.paths import NANO, PHOTOS, ROOT
from tests.support.processes import clean_env

VARIANT = find_variant("da3-small")
GRAPH = VARIANT.graphs[0]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine, threads that wait for each other make these small networks forty times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random_checkpoint(VARIANT, 7, tmp_path_factory.mktemp("weights") / "checkpoint")


@pytest.fixture(scope="module")
def upstream(checkpoint):
    return load_upstream(VARIANT, GRAPH, checkpoint.path)


@pytest.fixture(scope="module")
def network(checkpoint):
    return load_network(VARIANT, GRAPH, checkpoint.path, precision.FP32)


def pixels(scenes, views, height, width, seed=0):
    shape = (scenes, views, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


GRAPHS = [graph for variant in VARIANTS.values() for graph in variant.graphs]


@pytest.fixture
def on_meta(monkeypatch):
    """Where networks are built without memory."""
    # Upstream reads numbers off a linspace while it is built, which has to be a real one.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("config", sorted({graph.config for graph in GRAPHS}))
def test_names_shapes_and_norms_are_upstreams(on_meta, config):
    graph = next(graph for graph in GRAPHS if graph.config == config)
    ours, upstream = build_network(graph), build_upstream(graph)
    assert shapes(ours.state_dict()) == shapes(upstream.state_dict())
    assert shapes(dict(ours.named_parameters())) == shapes(dict(upstream.named_parameters()))
    assert norms(ours) == norms(upstream)


def shapes(tensors):
    return [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]


def norms(network):
    """Shape and epsilon of every LayerNorm that a graph runs."""
    return {
        name: (module.normalized_shape, module.eps)
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.LayerNorm)
    }


# Number of tensors and of values in the published files, without the 66 tensors of a gs_head.
PUBLISHED = {
    "da3-small": (437, 34_299_463),
    "da3-base": (437, 135_366_599),
    "da3-large": (637, 410_941_767),
    "da3-giant": (971 - 66, None),
    "da3metric-large": (406, 334_171_394),
    "da3mono-large": (406, 334_171_394),
    "da3nested-giant-large": (1377 - 66, None),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_tensors_are_as_many_and_as_large_as_the_published_checkpoints(on_meta, model):
    networks = [build_network(graph) for graph in VARIANTS[model].graphs]
    tensors = [tensor for network in networks for tensor in network.parameters()]
    values = sum(tensor.numel() for tensor in tensors)
    assert (len(tensors), values) == (PUBLISHED[model][0], PUBLISHED[model][1] or values)


def test_published_tensors_have_these_shapes(on_meta):
    """One of each kind, from the published files."""
    giant, metric = (
        dict(build_network(VARIANTS[model].graphs[0]).named_parameters())
        for model in ("da3-giant", "da3metric-large")
    )
    vit = "backbone.pretrained"
    assert giant[f"{vit}.pos_embed"].shape == (1, 1370, 1536)
    assert giant[f"{vit}.camera_token"].shape == (1, 2, 1536)
    assert giant[f"{vit}.blocks.0.mlp.w12.weight"].shape == (2 * 4096, 1536)
    assert giant[f"{vit}.blocks.13.attn.q_norm.weight"].shape == (64,)
    assert f"{vit}.blocks.12.attn.q_norm.weight" not in giant
    assert sum(name.startswith("cam_enc.") for name in giant) == 64
    assert sum(name.startswith("cam_dec.") for name in giant) == 10
    assert sum(name.startswith("head.") for name in giant) == 156
    assert metric["head.scratch.sky_output_conv2.2.weight"].shape == (1, 32, 1, 1)
    assert f"{vit}.camera_token" not in metric


def test_initial_values_are_upstreams():
    """Training starts from them."""
    (graph,) = find_variant(NANO).graphs
    states = []
    for build in (build_network, build_upstream):
        torch.manual_seed(0)
        states.append(build(graph).state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


EAGER_ALONE = f"""
import sys

BLOCKED = {{"depth_anything_3", "addict", "einops", "omegaconf", "antlr4"}}

class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in BLOCKED:
            raise AssertionError(name)

sys.meta_path.insert(0, Blocker())

from pathlib import Path
from da3_runtime.inference.estimator import Estimator, Timings
from da3_runtime.inference.settings import InferenceSettings
from da3_runtime.store.settings import EngineSettings

settings = EngineSettings(model_id="{NANO}", backend="eager", engine_dir=Path("none"))
estimator = Estimator.load(settings, settings=InferenceSettings(processing_res=140))
estimate = estimator.estimate(Path(sys.argv[1]).read_bytes(), Timings())
print(estimate.depth.values.std() > 0, BLOCKED & {{name.partition(".")[0] for name in sys.modules}})
"""


def test_eager_runs_without_upstreams_package():
    done = subprocess.run(
        [sys.executable, "-c", EAGER_ALONE, str(PHOTOS / "cat.jpg")],
        cwd=ROOT,
        env=clean_env(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["True", "set()"], done.stderr[-2000:]


def test_eager_names_the_extra_when_a_package_is_missing(monkeypatch):
    monkeypatch.setattr(eager, "is_installed", lambda name: name != "torch")
    assert eager.Eager.unavailable() == 'torch not installed: pip install "da3-runtime[eager]"'
    monkeypatch.undo()
    assert eager.Eager.unavailable() is None


# 518 x 518 is the positional table's own grid, which upstream does not interpolate.
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 84, 84),
        (2, 1, 98, 140),
        (1, 1, 518, 518),
        (1, 1, 84, 1036),
        (1, 1, 1036, 84),
        (2, 2, 84, 98),
        (1, 4, 98, 84),
    ],
)
def test_network_equals_upstream(network, upstream, shape):
    images = pixels(*shape)
    with torch.inference_mode():
        outputs = network(torch.from_numpy(images))
    reference = run_reference(upstream, images, GRAPH).outputs
    for name, got in zip(network.output_names, outputs, strict=True):
        np.testing.assert_allclose(got.numpy(), getattr(reference, name), rtol=1e-4, atol=1e-5)


def test_a_gated_network_equals_upstream():
    """da3-giant's kind of feed-forward layer, in a network of few and narrow blocks, with rays."""
    sizes = Sizes(96, 4, 3, (0, 1, 2, 3), 32, (8, 16, 24, 32), 1, gated=True, table_side=18)
    with torch.random.fork_rng():
        upstream = upstream_of(sizes).eval().requires_grad_(False)
    randomize(upstream, torch.Generator().manual_seed(0))
    (graph,) = VARIANT.ray_graphs
    network = network_of(upstream, sizes, graph, precision.FP32)
    images = pixels(2, 1, 84, 98)
    with torch.inference_mode():
        outputs = network(torch.from_numpy(images))
    reference = run_reference(upstream, images, graph).outputs
    for name, got in zip(network.output_names, outputs, strict=True):
        np.testing.assert_allclose(got.numpy(), getattr(reference, name), rtol=1e-4, atol=1e-5)


def test_normalization_is_upstreams():
    images = pixels(1, 1, 14, 14)
    expected = (images[0, 0] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    actual = normalize(torch.from_numpy(images))[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [(6, 74), (26, 36), (37, 36), (74, 74)])
def test_bicubic_matrices_are_pytorchs_interpolation_with_the_offset(grid):
    table = torch.randn(1, 37 * 37, 5, generator=torch.Generator().manual_seed(0))
    image = table.reshape(1, 37, 37, 5).permute(0, 3, 1, 2)
    scale = tuple((side + 0.1) / 37 for side in grid)
    expected = F.interpolate(image, scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1)
    actual = positions.patch_position_embedding(table, *grid).reshape(1, *grid, 5)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


def test_the_tables_own_grid_is_not_interpolated():
    table = torch.randn(1, 37 * 37, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(positions.patch_position_embedding(table, 37, 37), table)


def test_uv_embedding_is_upstreams():
    from depth_anything_3.model.utils.head_utils import create_uv_grid, position_grid_to_embed

    grid = create_uv_grid(9, 5, aspect_ratio=9 / 5)
    expected = 0.1 * position_grid_to_embed(grid, 16).permute(2, 0, 1)
    aspect = positions.aspect_ratio(5, 9, torch.device("cpu"))
    by_column, by_row = positions.uv_embedding(5, 9, 16, aspect)
    torch.testing.assert_close((by_column + by_row)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("paired", [False, True])
def test_rope_is_upstreams_with_rows_first(paired):
    from depth_anything_3.model.dinov2.layers.rope import RotaryPositionEmbedding2D

    heads = torch.randn(1, 2, 1 + 3 * 4, 64, generator=torch.Generator().manual_seed(0))
    rows, columns = positions.token_positions(3, 4, torch.device("cpu"))
    where = torch.stack((rows, columns), dim=-1)[None].long()
    expected = RotaryPositionEmbedding2D(frequency=100.0)(heads, where)
    order = positions.paired_order(64) if paired else list(range(64))
    tables = positions.rotary_tables(*positions.rotary_angles(rows, columns, 64), paired)
    actual = positions.rotate(heads[..., order], *tables, paired)
    torch.testing.assert_close(actual, expected[..., order], rtol=1e-5, atol=1e-6)


def test_pairing_channels_changes_no_output(checkpoint):
    digest = sha256_of(checkpoint.path)
    plain = build_network(GRAPH)
    load_weights(plain, VARIANT, GRAPH, checkpoint.path)
    plain.for_inference(precision.FP32)
    paired = load_network(VARIANT, GRAPH, checkpoint.path, precision.FP32)
    vits = [network.backbone.pretrained for network in (plain, paired)]
    assert [vit.paired for vit in vits] == [False, True]
    assert sha256_of(checkpoint.path) == digest
    assert not torch.equal(*(vit.blocks[11].attn.qkv.weight for vit in vits))
    images = torch.from_numpy(pixels(2, 1, 84, 98))
    with torch.inference_mode():
        for before, after in zip(plain(images), paired(images), strict=True):
            torch.testing.assert_close(after, before, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("config", ["da3-small", "da3-giant"])
def test_folding_layer_scales_changes_no_output(config):
    """The two kinds of feed-forward layers, with scales as small as DINOv2 starts with."""
    sizes = replace(SIZES[config], depth=1)
    with torch.device("meta"):
        block = Block(sizes.width, sizes.heads, gated=sizes.gated)
    block = block.to_empty(device="cpu")
    randomize(block, torch.Generator().manual_seed(0))
    block.requires_grad_(False)
    block.ls1.gamma[::2] *= 1e-5
    x = torch.randn(2, 9, sizes.width, generator=torch.Generator().manual_seed(0))
    before = block(x)
    block.fold_layer_scales()
    assert not [name for name, _ in block.named_parameters() if "gamma" in name]
    torch.testing.assert_close(block(x), before, rtol=1e-5, atol=1e-6)


def test_weights_are_folded_before_they_are_rounded(checkpoint):
    folded, plain = (
        load_network(VARIANT, GRAPH, checkpoint.path, policy, fold=policy is precision.FP16)
        for policy in (precision.FP16, precision.FP32)
    )
    for name in ("backbone.pretrained.blocks.3", "cam_enc.trunk.1"):
        layer, block = folded.get_submodule(f"{name}.mlp.fc2"), plain.get_submodule(name)
        exact = block.mlp.fc2.weight * block.ls2.gamma[:, None]
        assert torch.equal(layer.weight, exact.half())


def test_fp16_policy_keeps_range_critical_weights_in_fp32(checkpoint):
    network = load_network(VARIANT, GRAPH, checkpoint.path, precision.FP16)
    dtypes = {name: parameter.dtype for name, parameter in network.named_parameters()}
    wide = (
        "norm",
        "gamma",
        "pos_embed",
        "cls_token",
        "camera_token",
        "cam_dec.",
        ".output_conv2.2.",
        "pose_branch",
    )
    for name, dtype in dtypes.items():
        expected = torch.float32 if any(part in name for part in wide) else torch.float16
        assert dtype == expected, name
    assert {torch.float16, torch.float32} == set(dtypes.values())


def test_random_weights_leave_no_part_of_the_network_silent(tmp_path):
    """Zeroing any block, token, table, norm or head layer visibly moves an output."""
    nano = find_variant(NANO)
    path = write_random_checkpoint(nano, 7, tmp_path / "checkpoint").path
    network = load_network(nano, nano.graphs[0], path, precision.FP32)
    # A scene with unknown cameras, and one with known ones.
    poses = torch.rand(2, 2, POSE_ENCODING, generator=torch.Generator().manual_seed(0))
    poses[0] = 0
    inputs = torch.from_numpy(pixels(2, 2, 84, 98)), torch.tensor([CHOOSE, CHOOSE]), poses
    with torch.inference_mode():
        before = network(*inputs)
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                continue
            kept = parameter.clone()
            parameter.zero_()
            after = network(*inputs)
            parameter.copy_(kept)
            moved = max(
                float((torch.abs(a - b) / (torch.abs(b) + 1e-3)).mean())
                for a, b in zip(after, before, strict=True)
            )
            assert moved > 1e-4, name


def test_every_tensor_is_randomized():
    network = build_network(GRAPH)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    randomize(network, torch.Generator().manual_seed(0))
    for name, tensor in network.state_dict().items():
        assert not torch.equal(tensor, before[name]), name
        assert tensor.std() > 0, name


def test_the_same_seed_gives_the_same_checkpoint(checkpoint, tmp_path):
    again = write_random_checkpoint(VARIANT, 7, tmp_path / "again")
    other = write_random_checkpoint(VARIANT, 8, tmp_path / "other")
    assert again.sha256() == checkpoint.sha256() != other.sha256()


def test_upstreams_own_loader_reads_a_random_checkpoint(checkpoint, network):
    """As PyTorchModelHubMixin does: build from config.json, then safetensors' load_model, strictly."""
    import json

    from depth_anything_3.cfg import create_object, load_config
    from depth_anything_3.registry import MODEL_REGISTRY
    from safetensors.torch import load_model

    config = json.loads((checkpoint.path.parent / "config.json").read_text())
    holder = torch.nn.Module()
    holder.model = create_object(load_config(MODEL_REGISTRY[config["model_name"]]))
    missing, unexpected = load_model(holder, checkpoint.path, strict=True)
    assert not missing
    assert not unexpected
    images = pixels(1, 1, 98, 126)
    reference = run_reference(holder.eval().model, images, GRAPH).outputs
    with torch.inference_mode():
        depth = network(torch.from_numpy(images))[0].numpy()
    np.testing.assert_allclose(depth, reference.depth, rtol=1e-4)
