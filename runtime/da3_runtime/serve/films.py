"""Videos of requests: one at a time, in a thread of their own, so that images do not wait for them."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path

from da3_runtime.api.request import DepthRequest
from da3_runtime.api.response import JSON, film_fields
from da3_runtime.errors import BusyError, ImageFormatError, RequestError, of_video
from da3_runtime.image.fetch import ByteBudget, decode_base64, download
from da3_runtime.image.film import FilmLimits, Pick
from da3_runtime.inference.estimator import Estimator, Timings
from da3_runtime.inference.film import OF_FILM, FilmRun, Progress, run_film
from da3_runtime.inference.model_pool import ModelKey
from da3_runtime.inference.stages import Stage
from da3_runtime.inference.windows import WindowOptions, default_overlap
from da3_runtime.settings import Settings
from da3_runtime.util.extras import missing_package
from da3_runtime.variants import find_variant

_WINDOW = 8
_PROGRESS_SECONDS = 5.0
_POLL_SECONDS = 0.2  # from one look at a download to the next
_MOST_WAITING = 4
_MOST_RATE = 240  # frames per second of slow motion cameras; bounds the time of decoding
_PREFIX = "da3-film-"
_OLD_SECONDS = 24 * 3600.0  # a worker that lives writes a window within minutes


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
    stage : Stage
        The film in hand and those that wait, of which only the one in hand was downloaded.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.threads = ThreadPoolExecutor(1, "film")
        self.stage = Stage("film", 1 + _MOST_WAITING)
        self._is_closing = threading.Event()
        _remove_old(self._workspace())

    def stop(self) -> None:
        """End the film in hand and those that wait, with an error, without waiting for that."""
        self._is_closing.set()

    def close(self) -> None:
        """End the film in hand and those that wait, with an error, and wait for that."""
        self.stop()
        self.threads.shutdown()

    def turn(self) -> AbstractContextManager[None]:
        """Wait as one of the films, or work on one; raises :class:`BusyError` if too many wait."""
        return self.stage.enter(
            f"{_MOST_WAITING} videos wait for this worker already; send the request again later."
        )

    def _workspace(self) -> Path | None:
        """Folder of the films in hand; None for that of temporary files."""
        workspace = self._settings.workspace.workspace
        return workspace if workspace is not None and os.access(workspace, os.W_OK) else None

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
            raise ImageFormatError(f"This worker reads no videos: {missing}.")
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
        borrow: AbstractContextManager[Estimator],
        max_bytes: int | None,
        upload: Callable[[str, bytes], str] | None,
        on_progress: Callable[[JSON], object],
        is_cancelled: threading.Event,
        timings: Timings,
    ) -> JSON:
        """The response fields of a film, which is downloaded now.

        Parameters
        ----------
        borrow : AbstractContextManager[Estimator]
            The model, which is kept until the film has ended.
        max_bytes, upload
            As in :func:`film_fields`.
        is_cancelled : threading.Event
            Ends the work when it is set.

        Raises
        ------
        DA3Error
            As :func:`download`, :func:`run_film` and :func:`film_fields`; :class:`BusyError` if the
            worker stops or the request is cancelled.
        """
        wanted, limits = request.wanted, self._settings.films
        name = "video_base64" if request.video_url is None else "video_url"
        self._check_wanted(is_cancelled)
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=self._workspace()) as folder:
            film, out = Path(folder) / "film", Path(folder) / "out"
            with timings.stage("fetch"), of_video():
                film.write_bytes(self._bytes(request, is_cancelled))
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
                    _MOST_RATE,
                ),
                {},
                find_variant(key.model_id),
                name,
            )
            with borrow as estimator:
                summary = run_film(
                    run, lambda: estimator, self._progress(on_progress, is_cancelled), timings
                )
            return film_fields(summary, out, wanted.outputs, max_bytes, upload)

    def _bytes(self, request: DepthRequest, is_cancelled: threading.Event) -> bytes:
        limits = self._settings.films
        budget = ByteBudget(limits.max_video_bytes, setting="MAX_VIDEO_BYTES")
        if request.video_url is None:
            return decode_base64(request.video_base64 or "", budget)
        hosts = self._settings.downloads.image_url_hosts
        loading = download(request.video_url, budget, limits.video_download_seconds, hosts)

        async def finish() -> bytes:
            # An error ends the event loop, and with it the download.
            task = asyncio.ensure_future(loading)
            while not (await asyncio.wait([task], timeout=_POLL_SECONDS))[0]:
                self._check_wanted(is_cancelled)
            return task.result()

        return asyncio.run(finish())

    def _check_wanted(self, is_cancelled: threading.Event) -> None:
        """Raise :class:`BusyError` if nobody needs the response any more."""
        if self._is_closing.is_set():
            raise BusyError("The worker is stopping; send the request again.")
        if is_cancelled.is_set():
            raise BusyError("The request was cancelled.")

    def _progress(
        self, on_progress: Callable[[JSON], object], is_cancelled: threading.Event
    ) -> Progress:
        """Passes progress on every few seconds, and ends a film that nobody needs any more."""
        last = time.monotonic()

        def progress(stage: str, done: int, total: int | None) -> None:
            nonlocal last
            self._check_wanted(is_cancelled)
            if time.monotonic() - last >= _PROGRESS_SECONDS:
                last = time.monotonic()
                on_progress({"stage": stage, "frames": done, "of_about": total})

        return progress


def _remove_old(workspace: Path | None) -> None:
    """Remove the folders of workers that were killed; other workers may use the same workspace now."""
    if workspace is None:
        return
    for folder in workspace.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
            if newest < time.time() - _OLD_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
