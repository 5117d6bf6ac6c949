"""Comparison images for the documentation: a scene or photo beside the inverse depth of both heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_export.photos import read_photo
from da3_runtime.image.preprocess import model_input
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.output.preview import gray_preview
from da3_runtime.postprocess.depth import prediction_of, resize_prediction
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.files import write_atomically
from da3_runtime.variants import Head, find_variant
from tools.nano.render import HELD_OUT_SEED, SIZES
from tools.nano.scenes import render

SCENE_NAME, PHOTO_NAME = "nano-scene.jpg", "nano-photo.jpg"


def write_pictures(settings: EngineSettings, photo: Path, folder: Path) -> list[Path]:
    """Write both comparison images to ``folder`` and return their paths.

    From left to right: the image, the true inverse depth (of the scene), the DPT head's, the SDT head's.

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
    return bytes(cv2.imencode(".jpg", np.hstack(in_color), [cv2.IMWRITE_JPEG_QUALITY, 90])[1])
