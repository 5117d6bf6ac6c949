"""The published checkpoints: the loader expects exactly their files, and a download must be the release."""

import contextlib
import hashlib
import io
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from depth_anything_3.cfg import create_object, load_config
from depth_anything_3.registry import MODEL_REGISTRY
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from da3_runtime.errors import CheckpointError, SettingError
from da3_runtime.network.load import build_network, load_network
from da3_runtime.network.names import upstream_names
from da3_runtime.network.precision import FP32
from da3_runtime.store.checkpoint import find_checkpoint
from da3_runtime.store.engine_weights import engine_checkpoint, verified_sha256
from da3_runtime.store.hub import CACHED_MODELS_DIR
from da3_runtime.store.manifest import Source
from da3_runtime.store.releases import RELEASES, UNKNOWN, check_release, weights_name
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import VARIANTS, Series, find_variant
from tests.support.networks import NANO_WEIGHTS, load_nano
from tests.support.paths import NANO

SMALL = RELEASES[0]
OTHER_COMMIT = "f" * 40


def published_tensors(variant):
    """Shapes of the tensors that the loader expects, with upstream's Gaussian head, and the aliases."""
    shapes, aliases = {}, {}
    for graph in variant.graphs:
        with torch.device("meta"):
            network = build_network(graph)
        stored = {}
        for name, tensor in network.state_dict(keep_vars=True).items():
            if id(tensor) in stored:
                aliases[graph.prefix + name] = graph.prefix + stored[id(tensor)]
            else:
                stored[id(tensor)] = name
                shapes[graph.prefix + name] = list(tensor.shape)
        config = load_config(MODEL_REGISTRY[graph.config])
        if "gs_head" in config:
            with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
                gaussians = create_object(config.gs_head)
            for name, tensor in gaussians.state_dict().items():
                shapes[f"{graph.prefix}gs_head.{name}"] = list(tensor.shape)
    return shapes, aliases


def size_of(shapes, aliases):
    """Size of the safetensors file with these FP32 tensors and this metadata."""
    header, end = ({"__metadata__": aliases} if aliases else {}), 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + end


def test_the_size_of_a_file_is_that_which_safetensors_writes(tmp_path):
    tensors = {"b": torch.zeros(3, 2), "a.weight": torch.zeros(1), "c": torch.zeros(12345)}
    save_file(tensors, tmp_path / "file", {"d": "b"})
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert size_of(shapes, {"d": "b"}) == (tmp_path / "file").stat().st_size


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.repo)
def test_the_loader_expects_what_is_published(release):
    """Names, shapes, dtype and aliases give the published size; upstream's config its digest."""
    variant = find_variant(release.repo)
    assert size_of(*published_tensors(variant)) == release.size
    if release.config_sha256:
        config = OmegaConf.to_container(load_config(MODEL_REGISTRY[variant.model_id]), resolve=True)
        text = json.dumps({"model_name": variant.model_id, "config": config}, indent=2)
        assert hashlib.sha256(text.encode()).hexdigest() == release.config_sha256


def test_every_model_of_the_hub_but_one_is_pinned():
    pinned = {release.repo for release in RELEASES}
    repos = {variant.model_id: variant.repo for variant in VARIANTS.values() if variant.repo}
    assert [model for model, repo in repos.items() if repo not in pinned] == ["da3mono-large"]
    assert len({release.sha256 for release in RELEASES}) == len(RELEASES)
    assert all(len(release.revision) == 40 and len(release.sha256) == 64 for release in RELEASES)


def test_weights_are_named_by_their_digest():
    assert weights_name("local", SMALL.sha256) == "DA3-SMALL as published (commit e08cab65)"
    assert weights_name("hub", "0" * 64) == weights_name("local", "0" * 64) == UNKNOWN
    assert weights_name("random:0", "0" * 64) == "random:0"


def test_a_changed_file_of_a_pinned_commit_is_refused():
    check_release(SMALL.repo, SMALL.revision, SMALL.sha256)
    check_release(SMALL.repo, OTHER_COMMIT, "0" * 64)
    check_release(None, None, "0" * 64)
    with pytest.raises(
        CheckpointError, match=r"DA3-SMALL is not the published file: .* 00000000 instead"
    ):
        check_release(SMALL.repo, SMALL.revision, "0" * 64)


@pytest.fixture
def mount(tmp_path):
    """A function that puts a file of a repository at a commit into a cache of the hub's layout."""

    def add(repo, commit, content=b""):
        folder = tmp_path / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(content)
        return tmp_path

    return add


def test_the_published_commit_is_preferred_to_another(mount):
    variant = find_variant("da3-small")
    mount(SMALL.repo, OTHER_COMMIT)
    cache = mount(SMALL.repo, SMALL.revision)
    assert find_checkpoint(variant, "hub", None, cache).commit == SMALL.revision
    assert find_checkpoint(variant, "hub", OTHER_COMMIT, cache).commit == OTHER_COMMIT


def test_a_cache_with_another_commit_alone_is_used_as_it_is(mount):
    cache = mount(SMALL.repo, OTHER_COMMIT)
    assert find_checkpoint(find_variant("da3-small"), "hub", None, cache).commit == OTHER_COMMIT


def test_eager_refuses_a_damaged_download_of_the_release(mount):
    cache = mount(SMALL.repo, SMALL.revision, b"damaged")
    found = find_checkpoint(find_variant("da3-small"), "hub", None, cache)
    with pytest.raises(CheckpointError, match="not the published file"):
        verified_sha256(found, EngineSettings(cached_models_dir=cache))


def test_giant_can_be_taken_out_of_the_nested_checkpoint(mount):
    nested = find_variant("da3nested-giant-large")
    (release,) = [each for each in RELEASES if each.repo == nested.repo]
    cache = mount(nested.repo, release.revision)
    found = find_checkpoint(find_variant("da3-giant"), "nested", None, cache)
    assert (found.weights, found.repo, found.commit) == ("nested", nested.repo, release.revision)


def test_an_engine_built_from_the_nested_checkpoint_falls_back_to_its_weights(mount, tmp_path):
    """Without WEIGHTS too, so that eager answers as the engine does."""
    nested = find_variant("da3nested-giant-large")
    cache = mount(nested.repo, OTHER_COMMIT, b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    source = Source("nested", digest, nested.repo, OTHER_COMMIT, True)
    folder = SimpleNamespace(
        path=tmp_path / "engine",
        variant=find_variant("da3-giant"),
        manifest=SimpleNamespace(source=source),
    )
    settings = EngineSettings(cached_models_dir=cache, runtime_cache_dir=tmp_path)
    assert engine_checkpoint(folder, settings).repo == nested.repo


@pytest.mark.parametrize("model", ["da3-small", "da3metric-large", "da3nested-giant-large", NANO])
def test_no_other_model_is_taken_out_of_it(model):
    """The metric network is in it too, but the nested checkpoint's license forbids what its own permits."""
    with pytest.raises(SettingError, match=f"does not hold {model} under its license"):
        find_checkpoint(find_variant(model), "nested", None, CACHED_MODELS_DIR)


@pytest.fixture
def like_giant(monkeypatch):
    """da3-giant and the nested model with networks of da3-nano's size."""
    for model in ("da3-giant", "da3nested-giant-large"):
        variant = VARIANTS[model]
        graphs = tuple(replace(each, config=NANO, series=Series.ANYVIEW) for each in variant.graphs)
        monkeypatch.setitem(VARIANTS, model, replace(variant, graphs=graphs))
    return VARIANTS["da3-giant"]


def test_a_nested_file_gives_the_giants_weights(like_giant, tmp_path):
    tensors = load_file(NANO_WEIGHTS)
    whole = {
        prefix + name.removeprefix("model."): tensor + add
        for prefix, add in (("model.da3.", 1), ("model.da3_metric.", 2))
        for name, tensor in tensors.items()
    }
    path = tmp_path / "model.safetensors"
    save_file(whole, path)
    path.with_name("config.json").write_text('{"model_name": "da3nested-giant-large"}')
    assert find_checkpoint(like_giant, str(tmp_path)).path == path
    network = load_network(like_giant, like_giant.graphs[0], path, FP32)
    name = "head.norm.weight"
    assert torch.equal(network.get_parameter(name), tensors[f"model.{name}"] + 1)


# Names of the backbone's tensors in transformers, as the files for ComfyUI have them.
IN_TRANSFORMERS = {
    "pretrained.patch_embed.proj": "embeddings.patch_embeddings.projection",
    "pretrained.pos_embed": "embeddings.position_embeddings",
    "pretrained.cls_token": "embeddings.cls_token",
    "pretrained.camera_token": "embeddings.camera_token",
    "pretrained.norm": "layernorm",
    "pretrained.blocks": "encoder.layer",
    "attn.proj": "attention.output.dense",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}


def for_comfyui(tensors):
    """A checkpoint with the names of the files for ComfyUI, and the mask token that those may keep."""
    renamed = {"backbone.embeddings.mask_token": torch.zeros(1, 8)}
    for name, tensor in tensors.items():
        name = name.removeprefix("model.")
        if name.startswith("backbone."):
            for upstream, other in IN_TRANSFORMERS.items():
                name = name.replace(upstream, other)
        if name.startswith("backbone.") and ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = rows.contiguous()
        else:
            renamed[name] = tensor
    return renamed


def test_a_file_for_comfyui_gives_the_same_weights(tmp_path):
    path = tmp_path / "depth_anything_3_nano.safetensors"
    save_file(for_comfyui(load_file(NANO_WEIGHTS)), path)
    loaded, expected = (load_nano(each).state_dict() for each in (path, NANO_WEIGHTS))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_file_for_comfyui_without_a_key_is_refused_by_name(tmp_path):
    tensors = for_comfyui(load_file(NANO_WEIGHTS))
    del tensors["backbone.encoder.layer.1.attention.attention.key.bias"]
    save_file(tensors, tmp_path / "repack.safetensors")
    with pytest.raises(
        CheckpointError, match=r"missing \(model\.backbone\.pretrained\.blocks\.1\.attn\.qkv"
    ):
        load_nano(tmp_path / "repack.safetensors")


def test_gated_blocks_of_giant_are_renamed_too():
    given = {"model.backbone.pretrained.blocks.3.mlp.w12.bias": torch.arange(4.0)}
    renamed = for_comfyui(given)
    assert "backbone.encoder.layer.3.mlp.weights_in.bias" in renamed
    assert upstream_names(renamed).keys() == given.keys()
