"""Where a build finds its weights."""

from pathlib import Path

import pytest

from da3_export.request import request_of
from da3_export.settings import BuildSettings
from da3_export.weights import find_weights
from da3_runtime.store.manifest import Source, sha256_of
from tests.support.hub import COMMIT
from tests.support.networks import NANO_WEIGHTS
from tests.support.paths import SMALL


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    """A hub cache, as RunPod mounts it, with a checkpoint of da3-small: the weights alone, no refs."""
    snapshot = tmp_path / "mount" / "models--depth-anything--DA3-SMALL" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(NANO_WEIGHTS)
    return tmp_path / "mount"


@pytest.mark.parametrize("revision", ["", COMMIT])
def test_a_build_takes_a_checkpoint_from_cached_models_dir_without_the_hub(
    mount, tmp_path, revision, monkeypatch
):
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked")
    )
    env = {"MODEL": SMALL, "CACHED_MODELS_DIR": str(mount), "REVISION": revision}
    request = request_of(BuildSettings.from_env(env), None)
    weights = find_weights(request, None, tmp_path)
    assert weights.source == Source(
        "hub", sha256_of(NANO_WEIGHTS), "depth-anything/DA3-SMALL", COMMIT, True, "not a known release"
    )
    assert weights.checkpoint.path.is_relative_to(mount)
