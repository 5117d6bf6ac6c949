"""Sources of weights, and the errors when weights are missing or do not fit."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from da3_export.random_weights import seed_of, write_random_checkpoint
from da3_runtime.errors import CheckpointError, SettingError
from da3_runtime.network.load import load_network
from da3_runtime.network.precision import FP32
from da3_runtime.store.checkpoint import find_checkpoint
from da3_runtime.store.releases import RELEASES
from da3_runtime.variants import Series, find_variant
from tests.support.hub import COMMIT, Hub, serving
from tests.support.networks import NANO_WEIGHTS, load_nano
from tests.support.paths import NANO
from tests.support.processes import run_module

VARIANT = find_variant("da3-small")
GRAPH = VARIANT.graphs[0]
# One LayerNorm that all four levels of the ray branch share; stored for level 0.
SHARED_NORM = "head.scratch.output_conv2_aux.{}.2.weight"
REMEDIES = ("MODEL=da3-nano", "network access", "WEIGHTS=<folder")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_random_checkpoint(VARIANT, 0, tmp_path_factory.mktemp("w") / "c").path


class CheckpointHub(Hub):
    """A hub with one checkpoint."""

    def respond(self, body):
        hub = self.server
        hub.requests.append((self.path, self.headers.get("authorization")))
        name = self.path.rsplit("/", 1)[-1]
        content = hub.files.get(name)
        prefix = f"/{VARIANT.repo}/resolve/"
        if hub.cut and "Range" in self.headers:
            self.refuse("", 503)  # the client wants the rest of a download that broke off
            return
        if not self.path.startswith(prefix) or hub.error or content is None:
            status, code = hub.error or (404, "EntryNotFound")
            self.refuse(code, status)
            return
        self.send_headers(name, len(content))
        if body:
            self.wfile.write(content[: len(content) // 2] if hub.cut else content)


@pytest.fixture
def hub(weights):
    files = {"model.safetensors": weights.read_bytes()}
    with serving(CheckpointHub, files=files, error=None, cut=False, requests=[]) as server:
        yield server


def from_hub(verb, tmp_path, hub, *args, **env):
    """A verb on hub weights, in a new process, because huggingface_hub reads its settings once.

    The weights are no release, so they are at a branch unless a test says otherwise.
    """
    env = {"REVISION": "main"} | env
    endpoint = hub if isinstance(hub, str) else f"http://127.0.0.1:{hub.server_port}"
    return run_module(
        "tests.support.impatient", verb, *args, "--model", VARIANT.model_id,
        HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_XET="1", **env,
    )  # fmt: skip


def prefetch_from_hub(tmp_path, hub, **env):
    """``prefetch``, which downloads as ``depth`` does, without PyTorch."""
    return from_hub("prefetch", tmp_path, hub, **env)


def depth_from_hub(tmp_path, hub, **env):
    """``depth`` with eager."""
    return from_hub(
        "depth", tmp_path, hub, "examples/cat.jpg", "--out", str(tmp_path / "d.png"),
        "--engine-dir", str(tmp_path / "none"), "--backend", "eager", "--processing-res", "140", **env,
    )  # fmt: skip


def files(hub):
    """Paths of the requested files, without huggingface_hub's other requests."""
    return [path for path, _ in hub.requests if "/resolve/" in path]


def test_of_the_hubs_files_only_the_weights_are_downloaded(hub, tmp_path):
    done = depth_from_hub(tmp_path, hub, HF_TOKEN="hf_secret")
    assert done.code == 0, done.stderr
    assert {path.rsplit("/", 1)[-1] for path in files(hub)} == {"model.safetensors"}
    assert ("Bearer hf_secret") in {token for _, token in hub.requests}
    assert "hf_secret" not in done.stdout + done.stderr


def test_the_revision_is_used(hub, tmp_path):
    assert prefetch_from_hub(tmp_path, hub, REVISION="v1.1").code == 0
    assert files(hub)
    assert all("/resolve/v1.1/" in path or f"/resolve/{COMMIT}/" in path for path in files(hub))


def test_without_a_revision_the_release_is_wanted_and_another_file_is_refused(hub, tmp_path):
    release = next(each for each in RELEASES if each.repo == VARIANT.repo)
    done = prefetch_from_hub(tmp_path, hub, REVISION="")
    assert done.code == 2
    assert "DA3-SMALL is not the published file: its SHA-256 starts with" in done.stderr
    assert all(f"/resolve/{release.revision}/" in path for path in files(hub))


def test_offline_without_a_revision_takes_what_the_cache_has(hub, tmp_path):
    assert prefetch_from_hub(tmp_path, hub).code == 0
    done = prefetch_from_hub(tmp_path, hub, REVISION="", HF_HUB_OFFLINE="1")
    assert done.code == 0, done.stderr
    assert done.stdout.count("not a known release") == 1


def test_offline_uses_the_cache_and_sends_no_request(hub, tmp_path):
    assert prefetch_from_hub(tmp_path, hub).code == 0
    hub.requests.clear()
    assert depth_from_hub(tmp_path, hub, HF_HUB_OFFLINE="1").code == 0
    assert not hub.requests


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ((403, "GatedRepo"), "is gated"),
        ((401, "RepoNotFound"), "does not exist"),
        ((404, "RevisionNotFound"), "has no revision"),
        ((404, "EntryNotFound"), "lacks the checkpoint"),
    ],
)
def test_a_refusal_is_one_sentence_with_the_repository_and_two_remedies(hub, tmp_path, error, message):
    hub.error = error
    done = prefetch_from_hub(tmp_path, hub, REVISION="v9")
    assert done.code == 2
    assert all(part in done.stderr for part in (VARIANT.repo, message, *REMEDIES))
    assert "Traceback" not in done.stderr


def test_an_unreachable_hub_is_one_sentence(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        done = prefetch_from_hub(tmp_path, f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert done.code == 2
    assert all(part in done.stderr for part in (VARIANT.repo, "cannot be reached", *REMEDIES))
    assert "Traceback" not in done.stderr


def test_a_download_cut_short_is_never_used(hub, tmp_path):
    hub.cut = True
    done = prefetch_from_hub(tmp_path, hub)
    assert done.code == 2
    assert VARIANT.repo in done.stderr
    assert not list((tmp_path / "hf").rglob("snapshots/*/model.safetensors"))
    hub.cut = False
    assert prefetch_from_hub(tmp_path, hub).code == 0


def test_a_local_folder_and_a_local_file_are_both_accepted(weights):
    for value in (str(weights), str(weights.parent)):
        found = find_checkpoint(VARIANT, value)
        assert found.path == weights
        assert not found.trained


@pytest.mark.parametrize(
    "config",
    [
        None,
        "",
        "{",
        "[]",
        "{}",
        '{"model_name": 3}',
        '{"model_name": "mine"}',
        '{"model_name": "DA3-Nano"}',
    ],
)
def test_weights_alone_are_enough(tmp_path, config):
    (tmp_path / "model.safetensors").symlink_to(NANO_WEIGHTS)
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        assert find_checkpoint(find_variant(NANO), str(weights)).trained


def test_a_config_of_another_model_is_refused(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(NANO_WEIGHTS)
    (tmp_path / "config.json").write_text('{"model_name": "da3-small"}')
    with pytest.raises(
        CheckpointError, match=r"is of da3-small, as its config\.json says, not of da3-nano"
    ):
        find_checkpoint(find_variant(NANO), str(tmp_path))
    (tmp_path / "named.safetensors").symlink_to(NANO_WEIGHTS)  # its folder may hold other models too
    assert find_checkpoint(find_variant(NANO), str(tmp_path / "named.safetensors")).trained


def repacked(tmp_path, rename=lambda name: name, dtype=None):
    """da3-nano's checkpoint with other tensor names or another dtype."""
    path = tmp_path / "repack.safetensors"
    tensors = load_file(NANO_WEIGHTS)
    save_file({rename(name): each.to(dtype or each.dtype) for name, each in tensors.items()}, path)
    return path


def without_prefix(name):
    return name.removeprefix("model.")


@pytest.mark.parametrize("rename", [str, without_prefix])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_a_repack_without_the_prefix_or_in_half_precision_loads(tmp_path, rename, dtype):
    loaded = load_nano(repacked(tmp_path, rename, dtype)).state_dict()
    for name, expected in load_nano(NANO_WEIGHTS).state_dict().items():
        assert loaded[name].dtype == expected.dtype
        torch.testing.assert_close(loaded[name], expected.to(dtype or expected.dtype).to(expected.dtype))


def test_a_nested_checkpoint_without_the_prefix_loads(tmp_path, monkeypatch):
    """Its two networks, here of da3-nano's size."""
    nested = find_variant("da3nested-giant-large")
    variant = replace(
        nested, graphs=tuple(replace(each, config=NANO, series=Series.ANYVIEW) for each in nested.graphs)
    )
    tensors = load_file(NANO_WEIGHTS)
    whole = {
        graph.prefix.removeprefix("model.") + without_prefix(name): tensor + index
        for index, graph in enumerate(variant.graphs)
        for name, tensor in tensors.items()
    }
    save_file(whole, tmp_path / "nested.safetensors")
    name = "head.norm.weight"
    for index, graph in enumerate(variant.graphs):
        network = load_network(variant, graph, tmp_path / "nested.safetensors", FP32)
        assert torch.equal(network.get_parameter(name), tensors[f"model.{name}"] + index)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"backbone.encoder.layer.{name}",
        lambda name: f"net.{without_prefix(name)}",
        lambda name: f"model.net.{without_prefix(name)}",
        lambda name: name.replace("backbone", "encoder").replace("head", "decoder"),
    ],
)
def test_a_repack_with_other_names_is_told_from_the_original(tmp_path, rename):
    with pytest.raises(CheckpointError) as caught:
        load_nano(repacked(tmp_path, rename))
    message = str(caught.value)
    assert "it is a repack of da3-nano, with other tensor names (" in message
    assert message.endswith("Use the original: the bundled one, without WEIGHTS.")


def test_weights_of_something_else_are_named_with_the_original(tmp_path):
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_network(VARIANT, GRAPH, tmp_path / "model.safetensors", FP32)
    assert str(caught.value) == (
        "The checkpoint does not fit da3-small: it is another model's checkpoint, or a repack, with other "
        "tensor names (conv.weight, ...). Use the original: model.safetensors of depth-anything/DA3-SMALL."
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantized_repack_is_refused(tmp_path, dtype):
    with pytest.raises(
        CheckpointError, match=r"of another dtype \(model\..* instead of float32.*Use the orig"
    ):
        load_nano(repacked(tmp_path, dtype=dtype))


def test_other_weight_formats_are_never_read(tmp_path):
    pickle = tmp_path / "model.pt"
    torch.save({}, pickle)
    with pytest.raises(SettingError, match="safetensors"):
        find_checkpoint(VARIANT, str(pickle))
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        find_checkpoint(VARIANT, str(tmp_path))


def test_a_truncated_checkpoint_is_refused(weights, tmp_path):
    cut = tmp_path / "model.safetensors"
    cut.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        find_checkpoint(VARIANT, str(cut))


def changed(weights: Path, tmp_path: Path, change) -> Path:
    tensors = load_file(weights)
    change(tensors)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.head.norm.weight"), r"1 missing \(model\.head\.norm\.weight\)"),
        (lambda t: t.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (
            lambda t: t.update({"model.head.norm.weight": torch.zeros(5)}),
            r"model\.head\.norm\.weight \[5\] instead of \[768\]",
        ),
        (
            lambda t: t.pop("model.cam_enc.token_norm.bias"),
            r"1 missing \(model\.cam_enc\.token_norm\.bias\)",
        ),
        (
            lambda t: t.pop("model.head.scratch.output_conv1_aux.0.0.bias"),
            r"1 missing \(model\.head\.scratch\.output_conv1_aux\.0\.0\.bias\)",
        ),
        (lambda t: t.pop(f"model.{SHARED_NORM.format(0)}"), r"4 missing \(.*, .*, .*, \.\.\.\)"),
        (lambda t: [t.pop(name) for name in list(t)[:9]], r"9 missing \(.*, .*, .*, \.\.\.\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensors(weights, tmp_path, change, message):
    path = changed(weights, tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_network(VARIANT, GRAPH, path, FP32)


def test_the_shared_norm_of_the_ray_levels_may_be_stored_under_any_of_its_names(weights, tmp_path):
    def rename(tensors):
        stored = tensors.pop(f"model.{SHARED_NORM.format(0)}")
        tensors[f"model.{SHARED_NORM.format(2)}"] = stored + 1

    (graph,) = VARIANT.ray_graphs
    network = load_network(VARIANT, graph, changed(weights, tmp_path, rename), FP32)
    loaded = network.get_parameter(SHARED_NORM.format(0))  # the only level that is kept
    expected = load_file(weights)[f"model.{SHARED_NORM.format(0)}"] + 1
    assert torch.equal(loaded, expected)


def test_gaussian_parts_of_a_checkpoint_are_ignored(weights, tmp_path):
    path = changed(weights, tmp_path, lambda t: t.update({"model.gs_head.norm.weight": torch.zeros(3)}))
    load_network(VARIANT, GRAPH, path, FP32)


def test_inference_keeps_no_parameter_that_the_graph_does_not_read(weights):
    """No ray branch, or only the one of its four levels that is used."""
    (with_rays,) = VARIANT.ray_graphs
    names = set(load_network(VARIANT, GRAPH, weights, FP32).state_dict())
    ray_names = set(load_network(VARIANT, with_rays, weights, FP32).state_dict()) - names
    assert not [name for name in names if "_aux" in name]
    levels = {name.split(".")[3] for name in ray_names if "output_conv" in name}
    assert levels == {"0"}
    assert all("_aux" in name for name in ray_names)


def test_half_precision_checkpoints_load(weights, tmp_path):
    path = changed(weights, tmp_path, lambda t: t.update({k: v.half() for k, v in t.items()}))
    dtypes = {parameter.dtype for parameter in load_network(VARIANT, GRAPH, path, FP32).parameters()}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("value", ["random:", "random:x", "random:-1", "random:1.5"])
def test_a_bad_seed_is_a_clear_error(value):
    with pytest.raises(SettingError, match="whole number"):
        seed_of(value)
