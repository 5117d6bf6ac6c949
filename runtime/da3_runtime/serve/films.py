"""Films of requests: one at a time, in a thread of their own, so that images do not wait for them."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from da3_runtime.api.request import DepthRequest
from da3_runtime.api.response import JSON, film_fields
from da3_runtime.errors import BusyError, ImageFormatError, RequestError, of_video
from da3_runtime.image.fetch import ByteBudget, decode_base64
from da3_runtime.image.film import FilmLimits, Pick
from da3_runtime.inference.estimator import Estimator, Timings
from da3_runtime.inference.film import OF_FILM, FilmRun, Progress, run_film
from da3_runtime.inference.model_pool import ModelKey
from da3_runtime.inference.windows import WindowOptions, default_overlap
from da3_runtime.settings import Settings
from da3_runtime.util.extras import missing_package
from da3_runtime.variants import find_variant

_WINDOW = 8
_PROGRESS_SECONDS = 5.0


class Films:
    """Works on the films of requests.

    Parameters
    ----------
    settings : Settings
        All settings of the runtime.

    Attributes
    ----------
    threads : ThreadPoolExecutor
        Its one thread. A film takes minutes: others wait here, and take no thread of an image.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.threads = ThreadPoolExecutor(1, "film")
        self._is_closing = threading.Event()

    def close(self) -> None:
        """End the film in hand, with an error, and wait for that."""
        self._is_closing.set()
        self.threads.shutdown()

    def budget(self) -> ByteBudget:
        """The bytes that a film may have."""
        return ByteBudget(self._settings.films.max_video_bytes, setting="MAX_VIDEO_BYTES")

    def check(self, request: DepthRequest) -> None:
        """Check what can be checked before the film is there.

        Raises
        ------
        RequestError
            If the window is too large for this worker.
        SettingError
            If window and overlap do not fit.
        ImageFormatError
            If this worker has no PyAV.
        """
        if missing := missing_package("av"):
            raise ImageFormatError(f"This worker reads no films: {missing}.")
        most = self._settings.capacity.max_views
        if request.window is not None and request.window > most:
            raise RequestError(
                f"window is {request.window}; the limit is {most} (MAX_VIEWS): send less."
            )
        self._options(request)

    def _options(self, request: DepthRequest) -> WindowOptions:
        window = request.window or min(_WINDOW, self._settings.capacity.max_views)
        overlap = default_overlap(window) if request.overlap is None else request.overlap
        return WindowOptions(
            Pick(request.every, request.fps),
            window,
            overlap,
            request.focal_length_px,
            request.loop,
            request.processing_res,
        )

    def run(
        self,
        request: DepthRequest,
        key: ModelKey,
        data: bytes | None,
        budget: ByteBudget,
        borrow: AbstractContextManager[Estimator],
        max_bytes: int | None,
        upload: Callable[[str, bytes], str] | None,
        on_progress: Callable[[JSON], object],
        timings: Timings,
    ) -> JSON:
        """The response fields of a film.

        Parameters
        ----------
        data : bytes | None
            The downloaded film; None if the request has it in Base64.
        borrow : AbstractContextManager[Estimator]
            The model, which is kept until the film has ended.
        max_bytes, upload
            As in :func:`film_fields`.

        Raises
        ------
        DA3Error
            As :func:`run_film` and :func:`film_fields`; :class:`BusyError` if the worker stops.
        """
        wanted, limits = request.wanted, self._settings.films
        name = "video_base64" if request.video_url is None else "video_url"
        workspace = self._settings.workspace.workspace
        if workspace is not None and not os.access(workspace, os.W_OK):
            workspace = None
        with tempfile.TemporaryDirectory(prefix="da3-film-", dir=workspace) as folder:
            film, out = Path(folder) / "film", Path(folder) / "out"
            if data is None:
                with timings.stage("fetch"), of_video():
                    data = decode_base64(request.video_base64 or "", budget)
            film.write_bytes(data)
            del data
            run = FilmRun(
                film,
                out,
                self._options(request),
                replace(wanted, outputs=tuple(each for each in wanted.outputs if each in OF_FILM)),
                request.output_size == "model",
                FilmLimits(
                    self._settings.images.max_image_pixels,
                    limits.max_video_seconds,
                    limits.max_video_frames,
                ),
                {},
                find_variant(key.model_id),
                name,
            )
            with borrow as estimator:
                summary = run_film(run, lambda: estimator, self._progress(on_progress), timings)
            return film_fields(summary, out, wanted.outputs, max_bytes, upload)

    def _progress(self, on_progress: Callable[[JSON], object]) -> Progress:
        """Passes progress on every few seconds, and ends the film if the worker stops."""
        last = time.monotonic()

        def progress(stage: str, done: int, total: int | None) -> None:
            nonlocal last
            if self._is_closing.is_set():
                raise BusyError("The worker is stopping; send the request again.")
            if time.monotonic() - last >= _PROGRESS_SECONDS:
                last = time.monotonic()
                on_progress({"stage": stage, "frames": done, "of_about": total})

        return progress
