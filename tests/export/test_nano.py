"""da3-nano: what is bundled, and that its depth and camera are those of scenes it has never seen."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from da3_export.accuracy.metrics import Accuracy, accuracy
from da3_runtime.image.preprocess import model_input
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.postprocess.depth import prediction_of, resize_prediction
from da3_runtime.store.checkpoint import BUNDLED_DIR, bundled_sdt, find_checkpoint
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import find_variant
from tests.support.paths import NANO
from tools.nano.render import by_row, held_out, known_depth, row_profile

VARIANT = find_variant(NANO)
FOLDER = BUNDLED_DIR / NANO
COUNT = 24


@pytest.fixture(scope="module")
def scenes():
    return [scene for scene in held_out(COUNT) if scene.valid.mean() > 0.2]


def predictions(engine, head, scenes, backend="onnxruntime-cpu"):
    settings = EngineSettings(engine_dir=engine.engine_dir, model_id=NANO, head=head, backend=backend)
    loaded = load_backend(settings)
    for scene in scenes:
        images = model_input(scene.rgb, VARIANT.processing_res)
        yield scene, images.shape, prediction_of(loaded.run(images), 0, VARIANT)


def figures(engine, head, scenes):
    """Mean errors."""
    values = []
    for scene, _, predicted in predictions(engine, head, scenes):
        height, width = scene.depth.shape
        resized = resize_prediction(predicted, width, height)
        values.append(accuracy(resized.depth.values, known_depth(scene)))
    return Accuracy(*np.mean(values, axis=0))


def test_the_bundled_checkpoint_is_small_fp16_and_in_the_hubs_layout():
    assert json.loads((FOLDER / "config.json").read_text()) == {"model_name": NANO}
    path = find_checkpoint(VARIANT, "hub").path
    assert path == FOLDER / "model.safetensors"
    assert path.stat().st_size <= 10e6
    tensors = load_file(path)
    assert sum(tensor.numel() for tensor in tensors.values()) <= 5e6
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float16"}
    sdt = bundled_sdt(VARIANT)
    assert sdt is not None
    assert path.stat().st_size + sdt.path.stat().st_size <= 10e6


def test_depth_is_that_of_the_scene(engine, sdt_engine, scenes, monkeypatch):
    """On a few scenes, so with some room; benchmarks/results/nano.json has the figures."""
    monkeypatch.setattr("tools.nano.render._PROFILE_SCENES", 50)
    profile = row_profile()
    by_rows = [accuracy(by_row(profile, *s.depth.shape), known_depth(s)) for s in scenes]
    baseline = np.mean(by_rows, axis=0)[0]
    dpt = figures(engine, "dpt", scenes)
    assert dpt.abs_rel <= min(0.12, 0.5 * baseline)
    assert dpt.delta1 >= 0.88
    assert figures(sdt_engine, "sdt", scenes).abs_rel <= min(dpt.abs_rel + 0.03, 0.5 * baseline)


def test_the_camera_is_the_scenes(engine, scenes):
    errors = []
    for scene, (*_, height, width, _), predicted in predictions(engine, "dpt", scenes):
        scale = np.array([width / scene.rgb.shape[1], height / scene.rgb.shape[0]])
        wanted = scene.intrinsics[(0, 1), (0, 1)] * scale
        errors.append(np.abs(np.log(predicted.camera.intrinsics[(0, 1), (0, 1)] / wanted)).max())
        np.testing.assert_allclose(predicted.camera.extrinsics, np.eye(3, 4), atol=0.1)
    assert np.median(errors) < 0.4
