"""The stages in order: bytes -> RGB -> input -> raw outputs -> depth with a unit."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from da3_runtime.image.decode import decode_photo
from da3_runtime.image.preprocess import model_input
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.inference.batcher import Batcher
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.postprocess.camera import EXIF, centered_lens, given_lens
from da3_runtime.postprocess.depth import MAPS, Prediction, prediction_of, resize_prediction
from da3_runtime.settings import Settings


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

    def split(self, name: str, last: str, seconds: float) -> None:
        """Count the last ``seconds`` of a stage as another one."""
        self.ms[last] = round(min(seconds * 1000, self.ms[name]), 2)
        self.ms[name] = round(self.ms[name] - self.ms[last], 2)


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
        # No method of this object, which is to end with its last reference.
        largest = partial(_largest_batch, loaded, settings.max_batch)
        self._batcher = Batcher(loaded.run, largest, settings.batch_wait_ms / 1000)

    @classmethod
    def load(cls, settings: Settings) -> Estimator:
        """Load the best backend for the settings; raises as :func:`load_backend`."""
        return cls(load_backend(settings), settings)

    def close(self) -> None:
        """Give back everything that the model holds, once no thread is in it."""
        with self._batcher.alone():
            self.loaded.close()

    def estimate(
        self,
        data: bytes,
        timings: Timings,
        *,
        focal_length_px: float | None = None,
        intrinsics: NDArray[np.float32] | None = None,
        processing_res: int | None = None,
        model_size: bool = False,
        maps: Collection[str] = MAPS,
    ) -> Prediction:
        """Depth and camera of an encoded image, at its own size.

        Threads may call it at once; images of one size that wait for the network go through it together.

        Parameters
        ----------
        focal_length_px : float | None
            What the caller knows of the lens, in pixels of the image as a person sees it.
        intrinsics : NDArray[np.float32] | None
            The same as a matrix, [3, 3]. Where a model needs the focal length and neither is given, the
            image's EXIF is asked.
        processing_res : int | None
            Longest side of the model's input; None for the settings' or else the variant's own.
        model_size : bool
            Answer at the size the model saw instead.
        maps : Collection[str]
            The members of :data:`MAPS` to return; the others are None.

        Raises
        ------
        ImageError, SettingError
            If the image or the processing resolution is outside the limits.
        InferenceError
            If the backend fails.
        """
        settings = self._settings
        variant = self.loaded.folder.variant
        with self._batcher.expect() as pending:
            with timings.stage("decode"):
                rgb, focal_px = decode_photo(
                    data, max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels
                )
            with timings.stage("preprocess"):
                longest = processing_res or settings.processing_res or variant.processing_res
                images = model_input(rgb, longest)
            with timings.stage("wait"):
                raw, place, seconds = pending.run(images)
            timings.split("wait", "inference", seconds)
        with timings.stage("postprocess"):
            height, width = rgb.shape[:2]
            lens = given_lens(width, height, focal_length_px, intrinsics)
            if lens is None and focal_px is not None and variant.needs_focal:
                lens = centered_lens(focal_px, width, height, EXIF)
            seen = lens and lens.resized(images.shape[2] / width, images.shape[1] / height)
            prediction = prediction_of(raw, place, variant, seen)
            if model_size:
                height, width = images.shape[1:3]
            prediction = resize_prediction(prediction, width, height, maps)
        return replace(prediction, warnings=[*self.loaded.warnings, *prediction.warnings])


def _largest_batch(loaded: Loaded, wanted: int | None, height: int, width: int) -> int:
    most = loaded.largest_batch(height, width)
    if wanted is None:
        return most if loaded.backend.gains_from_batches else 1
    return min(wanted, most)
