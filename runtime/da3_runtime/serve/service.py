"""The service behind HTTP server and RunPod worker: a job's input -> its response."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from da3_runtime.api.request import DepthRequest, ViewRequest, parse_request
from da3_runtime.api.response import JSON, SHARED, DepthResponse, facts_of, outputs_of
from da3_runtime.errors import (
    BackendUnavailableError,
    DA3Error,
    DeviceLostError,
    ImageError,
    ImageTooLargeError,
    RequestError,
    UnauthorizedError,
    of_image,
)
from da3_runtime.image.decode import Photo
from da3_runtime.image.fetch import ByteBudget, decode_base64, download
from da3_runtime.inference.backend_choice import candidates
from da3_runtime.inference.estimator import Estimator, Prepared, PreparedScene, Timings
from da3_runtime.inference.model_pool import ModelKey, ModelPool
from da3_runtime.inference.scene import AUTO
from da3_runtime.inference.stages import PhotoStages, Stage
from da3_runtime.network_io import MAX_BATCH
from da3_runtime.output import bucket
from da3_runtime.output.encode import Encoded, Output, encode_outputs
from da3_runtime.output.workspace import Workspace
from da3_runtime.postprocess.depth import Prediction
from da3_runtime.serve.films import Films
from da3_runtime.settings import Settings
from da3_runtime.variants import Head, check_ray_pose, find_head, find_variant

logger = logging.getLogger(__name__)

KEY_HEADER = "da3-api-key"
NO_KEY = "The API key is missing or wrong: send it in the header da3-api-key or in input.api_key."
# Photos that are decoded at once, and as many that are encoded: each takes its full size in memory.
_FULL_SIZE = max(2, min(4, os.cpu_count() or 1))
_UNEXPECTED = "The worker failed on this request; see the reason in the worker's log."


class Service:
    """Runs requests with the models that it keeps loaded.

    Parameters
    ----------
    settings : Settings
        All settings of the runtime.

    Attributes
    ----------
    default : ModelKey
        The model of requests that name none.
    has_loaded : bool
        Whether any model has been loaded.
    is_lost : bool
        Whether the GPU is in an unrecoverable state; every further request fails.
    max_concurrency : int
        How many requests are in hand at once, from decoding to encoding.
    stages : dict[str, Stage]
        The stages of a request by name, in their order.

    Raises
    ------
    SettingError
        If the model, head or backend is unknown, or ``RAY_POSE`` is set for a network without rays.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        engine = settings.engine
        variant, head = find_variant(engine.model_id), find_head(engine.head)
        candidates(engine)
        if engine.ray_pose:
            check_ray_pose(variant, head)
        self.default = ModelKey(variant.model_id, head, engine.ray_pose)
        self.has_loaded = False
        self.is_lost = False
        self._one_load = threading.Lock()
        self.max_concurrency = settings.capacity.max_concurrency or 2 * (
            settings.inference.max_batch or MAX_BATCH
        )
        self._photos = PhotoStages(_FULL_SIZE)
        stages = (
            Stage("download", settings.downloads.max_downloads),
            Stage("queue"),
            self._photos.decode,
            self._photos.network,
            self._photos.encode,
        )
        self.stages = {stage.name: stage for stage in stages}
        self._threads = ThreadPoolExecutor(self.max_concurrency, "job")
        self._films = Films(settings)
        self.pool = ModelPool(self._load, settings.capacity.max_loaded_models)
        kept = settings.workspace
        self._workspace = (
            Workspace(kept.workspace, kept.output_retention_days) if kept.workspace else None
        )

    def is_key(self, supplied: str | None) -> bool:
        """Whether ``supplied`` is the API key, compared in constant time; True if no key is set."""
        key = self.settings.server.api_key
        if key is None:
            return True
        return hmac.compare_digest((supplied or "").encode("utf-8", "surrogatepass"), key.encode())

    def answer(self, data: object, job_id: str, **options: Any) -> JSON:
        """Run a job as :meth:`respond` does, from a thread without an event loop."""
        return asyncio.run(self.respond(data, job_id, **options))

    async def respond(
        self,
        data: object,
        job_id: str,
        *,
        is_authorized: bool = False,
        max_bytes: int | None = None,
        on_start: Callable[[], None] = lambda: None,
        while_downloading: AbstractContextManager[None] | None = None,
        on_progress: Callable[[JSON], object] = lambda _: None,
    ) -> JSON:
        """Run a job; never raises. Nothing in it blocks the event loop.

        Parameters
        ----------
        data : object
            The job's ``input``: the fields of a request, not yet checked.
        job_id : str
            Id of the job, for the log and for uploaded files.
        is_authorized : bool
            Whether the caller has found the API key in a header; if not, it must be in ``data``.
        max_bytes : int | None
            Largest response in bytes, None for no limit. Files of a larger response go to the bucket.
        on_start : Callable[[], None]
            Called when the job has left the queue, from any thread; more than once.
        while_downloading : AbstractContextManager[None] | None
            Entered while the images are downloaded, if the job has a URL, and as long as a video waits
            or is worked on: videos have a queue of their own.
        on_progress : Callable[[JSON], object]
            Called every few seconds while a film is worked on: ``stage``, its ``frames`` that are done,
            and ``of_about``, how many there are.

        Returns
        -------
        JSON
            Fields of :class:`DepthResponse`, or ``error`` and ``status``. ``refresh_worker`` is added if
            the worker must be restarted.
        """
        try:
            if not is_authorized:
                self.authorize(data)
            return await self._depth(
                data, job_id, max_bytes, on_start, while_downloading or nullcontext(), on_progress
            )
        except DeviceLostError as error:
            self.is_lost = True
            logger.error("job %s: %s", job_id, error)  # noqa: TRY400  (the backend has logged the reason)
            return {"error": str(error), "status": error.status, "refresh_worker": True}
        except DA3Error as error:
            logger.info("job %s: %d: %s", job_id, error.status, error)
            return {"error": str(error), "status": error.status}
        except Exception:
            logger.exception("job %s failed", job_id)
            return {"error": _UNEXPECTED, "status": DA3Error.status}

    def close(self) -> None:
        """Wait for every job in hand to end; videos fail."""
        self._films.close()
        self._threads.shutdown()

    def stop_videos(self) -> None:
        """Let the video in hand and those that wait fail soon; further ones fail too."""
        self._films.stop()

    def load_default(self) -> None:
        """Load the default model; raises :class:`BackendUnavailableError` if that fails."""
        with self.pool.borrow(self.default):
            pass

    def authorize(self, data: object) -> None:
        """Check the API key in a job's ``input``.

        Raises
        ------
        UnauthorizedError
            If the key is missing or wrong.
        """
        supplied = data.get("api_key") if isinstance(data, Mapping) else None
        if not self.is_key(supplied if isinstance(supplied, str) else None):
            raise UnauthorizedError(NO_KEY)

    async def _depth(
        self,
        data: object,
        job_id: str,
        max_bytes: int | None,
        on_start: Callable[[], None],
        while_downloading: AbstractContextManager[None],
        on_progress: Callable[[JSON], object],
    ) -> JSON:
        if self.is_lost:
            raise DeviceLostError
        timings, start = Timings(), time.perf_counter()
        request, warnings = await asyncio.to_thread(parse_request, data)
        key, sources, most = self._key(request), request.sources, self.settings.capacity.max_views
        if len(sources) > most:
            raise RequestError(
                f"images has {len(sources)}; the limit is {most} (MAX_VIEWS): send fewer."
            )
        if request.is_film:
            self._films.check(request)
        budget = ByteBudget(self.settings.images.max_image_bytes, len(sources))
        files: list[bytes | None] = [None] * len(sources)
        if any(source.image_url is not None for source in sources):
            on_start()
            with while_downloading, timings.stage("fetch"):
                files = await self._download_all(request, budget)
        queue, is_cancelled = ExitStack(), threading.Event()
        upload = partial(bucket.upload, job_id) if bucket.is_configured() else None

        def film() -> tuple[JSON, list[str]]:
            queue.close()
            on_start()
            borrow = self._borrow(key, timings)
            fields = self._films.run(
                request, key, borrow, max_bytes, upload, on_progress, is_cancelled, timings
            )
            return fields, fields.pop("warnings")  # type: ignore[return-value]

        def work() -> tuple[JSON, list[str]]:
            queue.close()
            on_start()
            return self._work(key, request, files, budget, job_id, max_bytes, timings)

        with ExitStack() as turn, queue:
            threads, task = self._threads, work
            if request.is_film:
                threads, task = self._films.threads, film
                turn.enter_context(self._films.turn())
                turn.enter_context(while_downloading)
            turn.callback(is_cancelled.set)
            queue.enter_context(self.stages["queue"].enter())
            loop = asyncio.get_running_loop()
            fields, more = await loop.run_in_executor(threads, task)
        timings.ms["total"] = round((time.perf_counter() - start) * 1000, 2)
        fields["timings_ms"] = timings.ms
        return {**fields, "warnings": [*warnings, *more, *_missing(fields)]}

    async def _download_all(self, request: DepthRequest, budget: ByteBudget) -> list[bytes | None]:
        """The bytes of each image that has a URL, downloaded side by side; None for the others.

        Raises as :func:`download`, or :class:`BusyError`.
        """
        settings, stage = self.settings.downloads, self.stages["download"]
        sources, is_scene = request.sources, request.images is not None
        seconds = settings.download_seconds
        busy = f"{stage.limit} images are downloaded already (MAX_DOWNLOADS); try again later."
        side_by_side = asyncio.Semaphore(settings.max_downloads)

        async def fetch(index: int, url: str | None) -> bytes | None:
            if url is None:
                return None
            async with side_by_side:
                with of_image(index if is_scene else None), stage.enter(busy):
                    return await download(url, budget, seconds, settings.image_url_hosts)

        try:
            # A single download has this limit itself, and a sentence for it.
            async with asyncio.timeout(seconds if is_scene else None), asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(fetch(index, source.image_url))
                    for index, source in enumerate(sources)
                ]
        except TimeoutError:
            raise ImageError(f"images took longer than {seconds} seconds to download.") from None
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _work(
        self,
        key: ModelKey,
        request: DepthRequest,
        files: list[bytes | None],
        budget: ByteBudget,
        job_id: str,
        max_bytes: int | None,
        timings: Timings,
    ) -> tuple[JSON, list[str]]:
        """All that follows the download; a file is None if the request has it as Base64.

        Returns
        -------
        tuple[JSON, list[str]]
            Fields of the response, and the prediction's warnings.
        """
        with ExitStack() as full_size:
            views, reference = self._predict(key, request, files, budget, timings, full_size)
            start = time.perf_counter()
            encoded, of_scene = _encode([view for view, _ in views], request)
        # A slow upload or volume costs only this request.
        upload = partial(bucket.upload, job_id) if bucket.is_configured() else None
        answers: list[JSON] = []
        *of_views, of_all = outputs_of(encoded, max_bytes, upload, of_scene)
        for (_, facts), outputs, of_view in zip(views, of_views, encoded, strict=True):
            kept = {each.output: each.file for each in of_view}.get(Output.PREVIEW)
            answers.append({**facts, **outputs, **(self._keep(kept) if kept else {})})
        timings.ms["encode"] = round((time.perf_counter() - start) * 1000, 2)
        told = [
            [*view.warnings, *(sentence for each in of_view for sentence in each.warnings)]
            for (view, _), of_view in zip(views, encoded, strict=True)
        ]
        if request.images is None:
            return answers[0], told[0]
        for answer, warnings in zip(answers, told, strict=True):
            answer["warnings"] = [*warnings, *_missing(answer)]
        shared = {name: answers[0][name] for name in SHARED}
        return {"views": answers, "reference": reference, **of_all, **shared}, []

    def _predict(
        self,
        key: ModelKey,
        request: DepthRequest,
        files: list[bytes | None],
        budget: ByteBudget,
        timings: Timings,
        full_size: ExitStack,
    ) -> tuple[list[tuple[Prediction, JSON]], int | None]:
        """The prediction of each image with its facts, and the reference of a scene.

        The stage ``encode`` has been entered on ``full_size`` when they are made.
        """
        is_model_size = request.output_size == "model"
        with self._borrow(key, timings) as estimator:
            prepare = partial(self._prepare, estimator, request, files, budget, timings)
            share, prepared = full_size.enter_context(self._photos.run(estimator, prepare, timings))
            if isinstance(prepared, PreparedScene):
                estimate = estimator.finish_scene(
                    share,
                    prepared,
                    timings,
                    model_size=is_model_size,
                    maps=request.wanted.maps,
                )
                views = []
                for view in estimate.views:
                    facts = facts_of(view.prediction, estimator.loaded)
                    facts["crop"] = [view.left, view.top, facts["width"], facts["height"]]
                    views.append((view.prediction, facts))
                return views, estimate.reference
            prediction = estimator.finish(
                share,
                prepared,
                timings,
                focal_length_px=request.focal_length_px,
                intrinsics=request.camera_matrix,
                model_size=is_model_size,
                maps=request.wanted.maps,
            )
            return [(prediction, facts_of(prediction, estimator.loaded))], None

    def _prepare(
        self,
        estimator: Estimator,
        request: DepthRequest,
        files: list[bytes | None],
        budget: ByteBudget,
        timings: Timings,
    ) -> Prepared | PreparedScene:
        """The network input of a request; the bytes of its images are let go."""
        if request.images is None:
            image = _bytes_of(request, files.pop(), budget, timings)
            return estimator.prepare(image, timings, request.processing_res)
        photos = self._decode_scene(estimator, request, files, budget, timings)
        return estimator.prepare_scene(
            photos,
            timings,
            lenses=[
                request.lens(view, *photo.rgb.shape[1::-1])
                for view, photo in zip(request.images, photos, strict=True)
            ],
            extrinsics=request.extrinsics,
            reference=AUTO if request.reference is None else request.reference,
            processing_res=request.processing_res,
        )

    def _decode_scene(
        self,
        estimator: Estimator,
        request: DepthRequest,
        files: list[bytes | None],
        budget: ByteBudget,
        timings: Timings,
    ) -> list[Photo]:
        """The photos of a scene; the limit of pixels is for all of them together."""
        limit, pixels = self.settings.images.max_image_pixels, 0
        photos: list[Photo] = []
        for index, source in enumerate(request.images or ()):
            with of_image(index):
                data = _bytes_of(source, files[index], budget, timings)
                files[index] = None
                with timings.stage("decode"):
                    photos.append(estimator.decode(data))
            pixels += photos[-1].rgb[..., 0].size
            if pixels > limit:
                raise ImageTooLargeError(
                    f"images together have more than {limit} pixels (MAX_IMAGE_PIXELS): send smaller or "
                    "fewer ones."
                )
        return photos

    def _key(self, request: DepthRequest) -> ModelKey:
        model_id, head, ray_pose = self.default
        if request.model_id is not None:
            model_id = find_variant(request.model_id, "model_id").model_id
        if request.use_sdt_head is not None:
            head = Head.SDT if request.use_sdt_head else Head.DPT
        if request.use_ray_pose is not None:
            ray_pose = request.use_ray_pose
        elif (model_id, head) != self.default[:2]:
            ray_pose = False
        if ray_pose:
            check_ray_pose(find_variant(model_id), head, "use_ray_pose")
        return ModelKey(model_id, head, ray_pose)

    @contextmanager
    def _borrow(self, key: ModelKey, timings: Timings) -> Iterator[Estimator]:
        """The model; the time is recorded as ``load`` if the request had to wait for it."""
        start, was_loaded = time.perf_counter(), key in self.pool.loaded()
        with self.pool.borrow(key) as estimator:
            if not was_loaded:
                timings.ms["load"] = round((time.perf_counter() - start) * 1000, 2)
            yield estimator

    def _load(self, key: ModelKey) -> Estimator:
        model_id, head, ray_pose = key
        settings = self.settings
        engine = replace(settings.engine, model_id=model_id, head=head.value, ray_pose=ray_pose)
        if model_id != self.default.model_id:
            # These settings belong to the default model.
            engine = replace(engine, weights=None, revision=None, sdt_weights=None)
        with self._one_load:
            start = time.perf_counter()
            try:
                estimator = Estimator.load(engine, settings.images, settings.inference)
            except DA3Error as error:
                # The message may name paths and repositories; only the operator may see them.
                logger.error("%s with head %s cannot be loaded: %s", model_id, head, error)  # noqa: TRY400
                raise BackendUnavailableError(
                    f"{model_id} with head {head} cannot be loaded; see the reason in the worker's log."
                ) from error
        estimator.loaded.make_room = self.pool.drop_idle
        self.has_loaded = True
        seconds, backend = time.perf_counter() - start, estimator.loaded.backend.name
        terms = find_variant(model_id).license
        logger.info(
            "loaded %s (license %s) with head %s on %s in %.1f s",
            model_id,
            terms,
            head,
            backend,
            seconds,
        )
        return estimator

    def _keep(self, preview: bytes) -> JSON:
        path = self._workspace and self._workspace.keep(preview)
        return {"file_path": str(path)} if path else {}


def _encode(
    views: Sequence[Prediction], request: DepthRequest
) -> tuple[list[list[Encoded]], list[Encoded]]:
    """The requested outputs of each image, and those that the images of a scene have together."""
    if request.images is None:
        return [list(encode_outputs(views, request.wanted))], []
    own, shared = (request.wanted.only(of_scene=of_scene) for of_scene in (False, True))
    return [list(encode_outputs(view, own)) for view in views], list(encode_outputs(views, shared))


def _missing(fields: JSON) -> list[str]:
    """The warning about requested outputs that the model does not have, if any."""
    names = [name for name in DepthResponse.model_fields if name in fields and fields[name] is None]
    absent = [name.removesuffix("_base64") for name in names if name != "focal_source"]
    return [f"The model does not have: {', '.join(absent)}."] if absent else []


def _bytes_of(
    source: DepthRequest | ViewRequest, file: bytes | None, budget: ByteBudget, timings: Timings
) -> bytes:
    """The bytes of an image: downloaded before, or decoded from Base64 now."""
    if file is not None:
        return file
    with timings.stage("fetch"):
        return decode_base64(source.image_base64 or "", budget)
