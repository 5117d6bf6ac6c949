"""The stages in order: bytes -> RGB -> input -> raw outputs -> depth with a unit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from runtime.decode import decode_photo
from runtime.depth import Prediction, prediction_of, resize_prediction
from runtime.lens import EXIF, centred_lens, given_lens
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
        self._one_at_a_time = threading.Lock()

    @classmethod
    def load(cls, settings: Settings) -> Estimator:
        """Load the best backend for the settings; raises as :func:`runtime.select.load_backend`."""
        return cls(load_backend(settings), settings)

    def close(self) -> None:
        """Give back everything that the model holds, once no thread is in it."""
        with self._one_at_a_time:
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
    ) -> Prediction:
        """Depth and camera of an encoded image, at its own size.

        Threads may call it at once; one of them is in the network.

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

        Raises
        ------
        ImageError, SettingError
            If the image or the processing resolution is outside the limits.
        InferenceError
            If the backend fails.
        """
        settings = self._settings
        variant = self.loaded.folder.variant
        with timings.stage("decode"):
            rgb, focal_px = decode_photo(
                data, max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels
            )
        with timings.stage("preprocess"):
            longest = processing_res or settings.processing_res or variant.processing_res
            images = model_input(rgb, longest)
        with ExitStack() as stack:
            with timings.stage("wait"):
                stack.enter_context(self._one_at_a_time)
            with timings.stage("inference"):
                raw = self.loaded.run(images)
        with timings.stage("postprocess"):
            height, width = rgb.shape[:2]
            lens = given_lens(width, height, focal_length_px, intrinsics)
            if lens is None and focal_px is not None and variant.needs_focal:
                lens = centred_lens(focal_px, width, height, EXIF)
            seen = lens and lens.resized(images.shape[2] / width, images.shape[1] / height)
            prediction = prediction_of(raw, 0, variant, seen)
            if not model_size:
                prediction = resize_prediction(prediction, width, height)
        return replace(prediction, warnings=[*self.loaded.warnings, *prediction.warnings])
