"""The stages in order: bytes -> RGB -> input -> raw outputs -> depth with a unit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from runtime.camera import Camera, resize_camera
from runtime.decode import decode_rgb
from runtime.depth import Depth, prediction_of, resize_depth
from runtime.preprocess import model_input
from runtime.select import Loaded, load_backend
from runtime.settings import Settings


@dataclass
class Timings:
    """Milliseconds per stage, in the order the stages ran."""

    ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body as stage ``name``."""
        start = time.perf_counter()
        yield
        self.ms[name] = round((time.perf_counter() - start) * 1000, 2)


@dataclass(frozen=True)
class Estimate:
    """Depth and camera of one photo, at the photo's size."""

    depth: Depth
    camera: Camera | None
    width: int
    height: int
    warnings: list[str]


class Estimator:
    """A loaded model that turns encoded photos into depth.

    Parameters
    ----------
    loaded : Loaded
        The backend to run.
    settings : Settings
        Limits and the processing resolution.
    """

    def __init__(self, loaded: Loaded, settings: Settings) -> None:
        self.loaded = loaded
        self._settings = settings

    @classmethod
    def load(cls, settings: Settings) -> Estimator:
        """Load the best backend for the settings; raises as :func:`runtime.select.load_backend`."""
        return cls(load_backend(settings), settings)

    def estimate(self, data: bytes, timings: Timings) -> Estimate:
        """Depth of an encoded image.

        Raises
        ------
        ImageError, SettingError
            If the image or the processing resolution is outside the limits.
        InferenceError
            If the backend fails.
        """
        settings = self._settings
        with timings.stage("decode"):
            rgb = decode_rgb(
                data, max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels
            )
        with timings.stage("preprocess"):
            images = model_input(rgb, settings.processing_res)
        with timings.stage("inference"):
            raw = self.loaded.run(images)
        height, width = rgb.shape[:2]
        with timings.stage("postprocess"):
            predicted = prediction_of(raw, 0, self.loaded.folder.variant)
            depth = resize_depth(predicted.depth, width, height)
            camera = predicted.camera
            if camera is not None:
                camera = resize_camera(camera, width / images.shape[2], height / images.shape[1])
        return Estimate(depth, camera, width, height, [*self.loaded.warnings, *predicted.warnings])
