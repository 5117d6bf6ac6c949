"""Images for the documentation: a scene or photo, or several views of one, with their inverse depth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_export.photos import read_photo
from da3_runtime.image.decode import Photo
from da3_runtime.image.preprocess import model_input
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.inference.estimator import Estimator, Timings
from da3_runtime.output.preview import gray_preview
from da3_runtime.postprocess.depth import prediction_of, resize_prediction
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.files import write_atomically
from da3_runtime.variants import Head, find_variant
from tools.nano.render import HELD_OUT_SEED, SIZES
from tools.nano.scenes import render, render_views

SCENE_NAME, PHOTO_NAME, VIEWS_NAME = "nano-scene.jpg", "nano-photo.jpg", "scenes.jpg"
WALK, VIEWS = 205, 4  # the scene of examples/walk, and its number of views


def write_pictures(settings: EngineSettings, photo: Path, folder: Path) -> list[Path]:
    """Write the images to ``folder`` and return their paths.

    Comparisons, from left to right: the image, the true inverse depth (of the scene), the DPT head's,
    the SDT head's. Views, from top to bottom: the images, the true inverse depth, the DPT head's.

    Raises
    ------
    DA3Error
        If the photo cannot be read or no backend can run.
    """
    scene = render(HELD_OUT_SEED, 0, *SIZES[0])
    truth = gray_preview(np.where(scene.valid, scene.depth, np.float32(1e6)))
    images = {
        SCENE_NAME: _side_by_side(settings, scene.rgb, [truth]),
        PHOTO_NAME: _side_by_side(settings, read_photo(photo).rgb, []),
        VIEWS_NAME: _views(settings),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        write_atomically(folder / name, data)
    return [folder / name for name in images]


def _side_by_side(
    settings: EngineSettings, rgb: NDArray[np.uint8], panels: list[NDArray[np.uint8]]
) -> bytes:
    """JPEG of an image [H, W, 3], of gray ``panels`` [H, W], and of both heads' inverse depth."""
    variant = find_variant(settings.model_id)
    height, width = rgb.shape[:2]
    for head in Head:
        raw = load_backend(replace(settings, head=head)).run(model_input(rgb, variant.processing_res))
        depth = resize_prediction(prediction_of(raw, 0, variant), width, height).depth.values
        panels = [*panels, gray_preview(depth)]
    in_color = [rgb[..., ::-1], *(cv2.cvtColor(panel, cv2.COLOR_GRAY2BGR) for panel in panels)]
    return _jpeg(np.hstack(in_color))


def _views(settings: EngineSettings) -> bytes:
    """JPEG of the views of a scene, of their true inverse depth, and of the DPT head's."""
    views = render_views(HELD_OUT_SEED, WALK, VIEWS, *SIZES[0])
    estimator = Estimator.load(replace(settings, head=Head.DPT))
    estimate = estimator.estimate_scene([Photo(view.rgb, None) for view in views], Timings())
    truth = [np.where(view.valid, view.depth, np.float32(1e6)) for view in views]
    found = [view.prediction.depth.values for view in estimate.views]
    rows = [cv2.cvtColor(np.hstack([view.rgb for view in views]), cv2.COLOR_RGB2BGR)]
    # One preview of all views, so that equal depths are equally bright.
    rows += [cv2.cvtColor(gray_preview(np.hstack(maps)), cv2.COLOR_GRAY2BGR) for maps in (truth, found)]
    small = cv2.resize(np.vstack(rows), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return _jpeg(np.asarray(small, np.uint8))


def _jpeg(bgr: NDArray[np.uint8]) -> bytes:
    return bytes(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])[1])
