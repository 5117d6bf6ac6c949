"""The stages in order: bytes -> RGB -> input -> raw outputs -> depth with a unit."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import ImageError, SettingError, of_image
from da3_runtime.image.decode import Photo, decode_photo
from da3_runtime.image.preprocess import fitting_resolution, resize_to_input
from da3_runtime.image.settings import ImageSettings
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.inference.batcher import Batcher, Pending, Share
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.inference.scene import (
    AUTO,
    Crop,
    SceneEstimate,
    View,
    check_scene,
    common_crops,
    known_cameras,
    reference_index,
)
from da3_runtime.inference.settings import InferenceSettings
from da3_runtime.network_io import CHOOSE, MAPS, Conditions
from da3_runtime.postprocess.camera import EXIF, Camera, Lens, centered_lens, given_lens
from da3_runtime.postprocess.depth import (
    Prediction,
    Seen,
    prediction_of,
    predictions_of,
    resize_prediction,
)
from da3_runtime.postprocess.poses import (
    check_known,
    encode_poses,
    normalized,
    with_known_cameras,
)
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import MIN_SIDE, Series, Variant

# For several images: threads that decode, and images whose network inputs are in memory at once.
DECODERS = 4
_CHUNK = 32


@dataclass
class Timings:
    """Milliseconds of each stage, in the order in which the stages ran."""

    ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body as stage ``name``; what runs again under one name adds up."""
        start = time.perf_counter()
        yield
        passed = (time.perf_counter() - start) * 1000
        self.ms[name] = round(self.ms.get(name, 0) + passed, 2)

    def split(self, name: str, last: str, seconds: float) -> None:
        """Move the last ``seconds`` of stage ``name`` to a stage of their own, ``last``."""
        self.ms[last] = round(min(seconds * 1000, self.ms[name]), 2)
        self.ms[name] = round(self.ms[name] - self.ms[last], 2)


class Prepared(NamedTuple):
    """The network input of a photo, uint8 [1, 1, h, w, 3], with the photo's size, lens and warnings."""

    images: NDArray[np.uint8]
    width: int
    height: int
    exif_focal_px: float | None
    warnings: list[str]


class PreparedScene(NamedTuple):
    """The network input of a scene, and what turns the network's outputs into views.

    Attributes
    ----------
    images : NDArray[np.uint8]
        [1, S, h, w, 3], of one shape.
    conditions : Conditions
        The wanted reference, and the known cameras.
    views : list[Prepared]
        Each photo's own input, before it was cropped.
    crops : list[Crop]
        The part of each input that is in ``images``.
    lenses : list[Lens | None]
        The known lens of each view, in pixels of ``images``.
    cameras : list[Camera]
        The known camera of each view, in pixels of ``images``; empty if they are unknown.
    warnings : list[str]
        Sentences about the whole scene.
    """

    images: NDArray[np.uint8]
    conditions: Conditions
    views: list[Prepared]
    crops: list[Crop]
    lenses: list[Lens | None]
    cameras: list[Camera]
    warnings: list[str]


class Estimator:
    """A loaded model that turns photos into depth.

    Parameters
    ----------
    loaded : Loaded
        The backend to run.
    images : ImageSettings | None
        Limits of an image; None for the defaults.
    settings : InferenceSettings | None
        Processing resolution and batches; None for the defaults.
    """

    def __init__(
        self,
        loaded: Loaded,
        images: ImageSettings | None = None,
        settings: InferenceSettings | None = None,
    ) -> None:
        self.loaded = loaded
        self._limits = images or ImageSettings()
        self._settings = settings or InferenceSettings()
        # A bound method would let the batcher keep this object alive.
        self._largest = partial(_largest_batch, loaded, self._settings.max_batch)
        self._batcher = Batcher(loaded.run, self._largest, self._settings.batch_wait_ms / 1000)

    @classmethod
    def load(
        cls,
        engine: EngineSettings,
        images: ImageSettings | None = None,
        settings: InferenceSettings | None = None,
    ) -> Estimator:
        """Load an engine with the best available backend; raises as :func:`load_backend`."""
        return cls(load_backend(engine), images, settings)

    def close(self) -> None:
        """Free everything that the model holds, after the running batch has ended."""
        with self._batcher.exclusive():
            self.loaded.close()

    def estimate(
        self,
        image: bytes | Photo,
        timings: Timings,
        *,
        focal_length_px: float | None = None,
        intrinsics: NDArray[np.float32] | None = None,
        processing_res: int | None = None,
        model_size: bool = False,
        maps: Collection[str] = MAPS,
    ) -> Prediction:
        """Depth and camera of an image, at its own size.

        Threads may call it concurrently; waiting images of one size run as one batch.

        Parameters
        ----------
        image : bytes | Photo
            An encoded image, or a decoded one.
        timings : Timings
            The stages are recorded here.
        focal_length_px : float | None
            Focal length in pixels of the upright image, if the caller knows it.
        intrinsics : NDArray[np.float32] | None
            Camera matrix, [3, 3], in pixels of the upright image. ``focal_length_px`` overrides it. If
            neither is given, the focal length in the image's EXIF is used.
        processing_res : int | None
            Longest side of the model's input, in pixels. None: the setting, or else the variant's own.
        model_size : bool
            Return maps at the size of the model's input instead.
        maps : Collection[str]
            The members of :data:`MAPS` to return; the others are left out.

        Returns
        -------
        Prediction
            Depth with its unit, and the other requested maps.

        Raises
        ------
        ImageError, SettingError
            If the image or the processing resolution is outside the limits.
        InferenceError
            If the backend fails.
        """
        with self.expect() as pending:
            prepared = self.prepare(image, timings, processing_res)
            del image
            share = self.run(pending, prepared.images, timings)
        return self.finish(
            share,
            prepared,
            timings,
            focal_length_px=focal_length_px,
            intrinsics=intrinsics,
            model_size=model_size,
            maps=maps,
        )

    def expect(self) -> AbstractContextManager[Pending]:
        """Announce an image, so that a batch can wait for it; the first step of :meth:`estimate`."""
        return self._batcher.expect()

    def prepare(
        self, image: bytes | Photo | Prepared, timings: Timings, processing_res: int | None
    ) -> Prepared:
        """The network input of an image, or of one already; the second step of :meth:`estimate`."""
        if isinstance(image, Prepared):
            return image
        if isinstance(image, bytes):
            with timings.stage("decode"):
                image = self.decode(image)
        with timings.stage("preprocess"):
            wanted = processing_res or self._settings.processing_res
            return prepare_photo(image, self.loaded.folder.variant, wanted)

    def run(
        self,
        pending: Pending,
        images: NDArray[np.uint8],
        timings: Timings,
        conditions: Conditions | None = None,
    ) -> Share:
        """Run the network on an input, in a batch with others; the third step of :meth:`estimate`.

        Raises as :meth:`Pending.run`, which has the parameters.
        """
        with timings.stage("wait"):
            share = pending.run(images, conditions)
        timings.split("wait", "inference", share.seconds)
        return share

    def finish(
        self,
        share: Share,
        prepared: Prepared,
        timings: Timings,
        *,
        focal_length_px: float | None = None,
        intrinsics: NDArray[np.float32] | None = None,
        model_size: bool = False,
        maps: Collection[str] = MAPS,
    ) -> Prediction:
        """The prediction from the network's outputs; the last step of :meth:`estimate`."""
        with timings.stage("postprocess"):
            return finish_photo(
                share,
                prepared,
                self.loaded.folder.variant,
                self.loaded.warnings,
                focal_length_px=focal_length_px,
                intrinsics=intrinsics,
                model_size=model_size,
                maps=maps,
            )

    def estimate_all(
        self,
        photos: Sequence[Callable[[], Photo | Prepared]],
        timings: Sequence[Timings],
        *,
        focal_length_px: float | None = None,
        intrinsics: NDArray[np.float32] | None = None,
        processing_res: int | None = None,
        model_size: bool = False,
    ) -> list[Prediction]:
        """Depth and camera of several photos, in their order; photos of one size run as batches.

        Parameters
        ----------
        photos : Sequence[Callable[[], Photo]]
            Functions that read and decode one photo each. A few threads call them, so that only a few
            photos are in memory.
        timings : Sequence[Timings]
            One for each photo.
        focal_length_px, intrinsics, processing_res, model_size
            As for :meth:`estimate`, the same for every photo.

        Raises
        ------
        ImageError, SettingError, InferenceError
            As :meth:`estimate`; the first photo that fails ends the call.
        """

        def prepare(read: Callable[[], Photo | Prepared], clock: Timings) -> Prepared:
            with clock.stage("decode"):
                photo = read()
            return self.prepare(photo, clock, processing_res)

        def finish(share: Share, prepared: Prepared, clock: Timings) -> Prediction:
            clock.ms["inference"] = round(share.seconds * 1000, 2)
            return self.finish(
                share,
                prepared,
                clock,
                focal_length_px=focal_length_px,
                intrinsics=intrinsics,
                model_size=model_size,
            )

        predictions: list[Prediction] = []
        with ThreadPoolExecutor(DECODERS) as threads:
            for start in range(0, len(photos), _CHUNK):
                clocks = timings[start : start + _CHUNK]
                prepared = list(threads.map(prepare, photos[start : start + _CHUNK], clocks))
                shares = self.run_all([each.images for each in prepared])
                predictions += threads.map(finish, shares, prepared, clocks)
        return predictions

    def run_all(self, images: Sequence[NDArray[np.uint8]]) -> list[Share]:
        """Run images, uint8 [1, 1, h, w, 3], in batches of one size; returns their shares in order.

        Raises
        ------
        InferenceError
            If the backend fails on one of the batches.
        """
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_shape.setdefault(image.shape, []).append(index)
        shares: dict[int, Share] = {}
        for shape, indices in by_shape.items():
            largest = self._largest(*shape[1:4])
            for start in range(0, len(indices), largest):
                batch = indices[start : start + largest]
                with self._batcher.exclusive():
                    begun = time.perf_counter()
                    raw = self.loaded.run(np.concatenate([images[index] for index in batch]))
                seconds = time.perf_counter() - begun
                shares |= {index: Share(raw, position, seconds) for position, index in enumerate(batch)}
        return [shares[index] for index in range(len(images))]

    def estimate_scene(
        self,
        photos: Sequence[Photo | Prepared],
        timings: Timings,
        *,
        lenses: Sequence[Lens | None] | None = None,
        extrinsics: NDArray[np.floating] | None = None,
        reference: str | int = AUTO,
        processing_res: int | None = None,
        model_size: bool = False,
        maps: Collection[str] = MAPS,
    ) -> SceneEstimate:
        """Depth and cameras of several photos of one scene: their depths agree, and so do their cameras.

        Photos of different sizes are cropped around the middle to one size, as upstream does.

        Parameters
        ----------
        photos : Sequence[Photo | Prepared]
            The photos, or their network inputs; at least one.
        timings : Timings
            The stages are recorded here.
        lenses : Sequence[Lens | None] | None
            The lens of each photo that the caller knows, in pixels of the upright photo. For the others
            the focal length in the photo's EXIF is used.
        extrinsics : NDArray[np.floating] | None
            Known cameras, world to camera, [S, 3, 4]: the depth gets their unit. Every photo needs a
            lens then, and the first one is the reference.
        reference : str | int
            The view that the cameras refer to: ``auto`` (the network chooses), ``first``, ``middle``, or
            its index.
        processing_res, model_size, maps
            As for :meth:`estimate`.

        Raises
        ------
        SettingError
            If the reference, the processing resolution or the extrinsics are invalid, or the model sees
            each photo alone and cannot use extrinsics.
        ImageError
            If a photo is too elongated; the message names it by its index.
        SceneTooLargeError
            If the backend cannot run so many views of this size at once.
        InferenceError
            If the backend fails.
        """
        with self.expect() as pending:
            scene = self.prepare_scene(
                photos,
                timings,
                lenses=lenses,
                extrinsics=extrinsics,
                reference=reference,
                processing_res=processing_res,
            )
            share = self.run(pending, scene.images, timings, scene.conditions)
        return self.finish_scene(share, scene, timings, model_size=model_size, maps=maps)

    def prepare_scene(
        self,
        photos: Sequence[Photo | Prepared],
        timings: Timings,
        *,
        lenses: Sequence[Lens | None] | None = None,
        extrinsics: NDArray[np.floating] | None = None,
        reference: str | int = AUTO,
        processing_res: int | None = None,
    ) -> PreparedScene:
        """The network input of a scene; the first step of :meth:`estimate_scene`."""
        variant, conditions = self.loaded.folder.variant, Conditions.none(1, len(photos))
        conditions.reference[:] = reference_index(reference, len(photos))
        warnings = [] if extrinsics is None else self._check_known(extrinsics, conditions.reference[0])
        if len(photos) > 1 and not variant.knows_scenes:
            warnings.append(
                f"{variant.model_id} is too small to find the cameras of a scene: they mean nothing, "
                "and the scale of given ones is rough."
            )
        with timings.stage("preprocess"):
            prepared: list[Prepared] = []
            for index, photo in enumerate(photos):
                with of_image(index):
                    prepared.append(self.prepare(photo, Timings(), processing_res))
            crops = common_crops([(each.images.shape[3], each.images.shape[2]) for each in prepared])
            views = zip(prepared, crops, strict=True)
            images = np.stack([crop.of(each.images[0, 0]) for each, crop in views])[None]
            use_exif = variant.needs_focal or extrinsics is not None
            seen = [
                _lens_seen(*each, use_exif)
                for each in zip(lenses or [None] * len(photos), prepared, strict=True)
            ]
            seen = [
                lens and lens.moved(-crop.left, -crop.top)
                for lens, crop in zip(seen, crops, strict=True)
            ]
            cameras = [] if extrinsics is None else known_cameras(seen, extrinsics)
            if cameras:
                conditions.poses[0] = encode_poses(
                    normalized(np.stack([camera.extrinsics for camera in cameras])),
                    np.stack([camera.intrinsics for camera in cameras]),
                    *images.shape[2:4],
                )
        check_scene(self.loaded, *images.shape[1:4])
        return PreparedScene(images, conditions, prepared, crops, seen, cameras, warnings)

    def finish_scene(
        self,
        share: Share,
        scene: PreparedScene,
        timings: Timings,
        *,
        model_size: bool = False,
        maps: Collection[str] = MAPS,
    ) -> SceneEstimate:
        """The views from the network's outputs; the last step of :meth:`estimate_scene`."""
        variant = self.loaded.folder.variant
        with timings.stage("postprocess"):
            # Relative depth does not depend on a lens, and the known cameras have theirs.
            lenses = scene.lenses
            if scene.cameras and len(variant.graphs) == 1:
                lenses = [None] * len(lenses)
            predictions = predictions_of(share.raw, share.position, variant, lenses)
            if scene.cameras:
                predictions = with_known_cameras(predictions, scene.cameras)
            found = [
                self._view(*each, model_size, maps, scene.warnings)
                for each in zip(predictions, scene.views, scene.crops, strict=True)
            ]
        chosen = share.raw[variant.graphs[0].name].reference
        return SceneEstimate(found, None if chosen is None else int(chosen[share.position]))

    def _check_known(self, extrinsics: NDArray[np.floating], wanted: int) -> list[str]:
        """Check known cameras; returns warnings, and raises :class:`SettingError`."""
        variant = self.loaded.folder.variant
        if variant.graphs[0].series is not Series.ANYVIEW:
            raise SettingError(
                f"{variant.model_id} sees each photo alone and cannot use extrinsics: leave them out, "
                "or choose another model."
            )
        if wanted not in (CHOOSE, 0):
            raise SettingError("With extrinsics the first photo is the reference: leave reference out.")
        return check_known(extrinsics)

    def _view(
        self,
        prediction: Prediction,
        prepared: Prepared,
        crop: Crop,
        model_size: bool,
        maps: Collection[str],
        warnings: Sequence[str],
    ) -> View:
        input_height, input_width = prepared.images.shape[2:4]
        width, height = (input_width, input_height) if model_size else prepared[1:3]
        across, down = width / input_width, height / input_height
        part = (round(crop.width * across), round(crop.height * down))
        warnings = [*self.loaded.warnings, *prepared.warnings, *warnings, *prediction.warnings]
        if part != (width, height):
            warnings.append(
                "The photos have different shapes: the maps cover the middle "
                f"{part[0]} x {part[1]} of {width} x {height} pixels."
            )
        seen = _seen_of(crop.of(prepared.images[0, 0]), prediction, prepared, crop.left, crop.top)
        resized = resize_prediction(prediction, *part, maps)
        corner = (crop.left * across, crop.top * down)
        return View(replace(resized, warnings=warnings, seen=seen), *corner, width, height)

    def read(self, path: Path) -> Photo:
        """Read and decode an image file; raises as :meth:`decode`, with the path in the message."""
        try:
            return self.decode(path.read_bytes())
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror or 'cannot be read'}.") from None
        except ImageError as error:
            raise type(error)(f"{path}: {error}") from None

    def decode(self, data: bytes) -> Photo:
        """Decode an image within the limits; raises as :func:`decode_photo`."""
        limits = self._limits
        return decode_photo(data, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels)


def prepare_photo(photo: Photo, variant: Variant, processing_res: int | None) -> Prepared:
    """The network input of a photo; needs no loaded model.

    Parameters
    ----------
    processing_res : int | None
        Longest side of the input in pixels; None for the variant's own.

    Raises
    ------
    ImageError, SettingError
        As :func:`fitting_resolution`.
    """
    wanted = processing_res or variant.processing_res
    height, width = photo.rgb.shape[:2]
    longest, warnings = fitting_resolution(width, height, wanted), list(photo.warnings)
    if longest > wanted:
        warnings.append(
            f"The image is wide or tall: processing_res was raised from {wanted} to {longest}, "
            f"so that the network sees {MIN_SIDE} pixels of the short side."
        )
    images = resize_to_input(photo.rgb, longest)[None, None]
    return Prepared(images, width, height, photo.focal_px, warnings)


def finish_photo(
    share: Share,
    prepared: Prepared,
    variant: Variant,
    engine_warnings: Sequence[str],
    *,
    focal_length_px: float | None = None,
    intrinsics: NDArray[np.float32] | None = None,
    model_size: bool = False,
    maps: Collection[str] = MAPS,
) -> Prediction:
    """The prediction from the network's outputs for a photo; needs no loaded model.

    Parameters
    ----------
    variant : Variant
        The model that made the outputs.
    engine_warnings : Sequence[str]
        Its warnings, which come before those of the photo.
    focal_length_px, intrinsics, model_size, maps
        As for :meth:`Estimator.estimate`.

    Raises
    ------
    InferenceError
        If an output has values that are not finite.
    """
    images, width, height, _, warnings = prepared
    lens = given_lens(width, height, focal_length_px, intrinsics)
    seen = _lens_seen(lens, prepared, variant.needs_focal)
    prediction = prediction_of(share.raw, share.position, variant, seen)
    kept = _seen_of(images[0, 0], prediction, prepared)
    if model_size:
        height, width = images.shape[2:4]
    prediction = resize_prediction(prediction, width, height, maps)
    warnings = [*engine_warnings, *warnings, *prediction.warnings]
    return replace(prediction, warnings=warnings, seen=kept)


def _lens_seen(lens: Lens | None, prepared: Prepared, use_exif: bool) -> Lens | None:
    """A photo's lens in pixels of its network input: the given one, or that of its EXIF."""
    images, width, height, exif_focal_px, _ = prepared
    if lens is None and exif_focal_px is not None and use_exif:
        lens = centered_lens(exif_focal_px, width, height, EXIF)
    return lens and lens.resized(images.shape[3] / width, images.shape[2] / height)


def _seen_of(
    image: NDArray[np.uint8], prediction: Prediction, prepared: Prepared, left: int = 0, top: int = 0
) -> Seen:
    """What the network saw of a photo: the part of its input that starts at this corner."""
    _, _, height, width, _ = prepared.images.shape
    scale = prepared.width / width, prepared.height / height
    return Seen(image, prediction, prepared.width, prepared.height, left, top, scale)


def _largest_batch(loaded: Loaded, wanted: int | None, views: int, height: int, width: int) -> int:
    most = max(1, loaded.largest_batch(views, height, width))
    if wanted is None:
        return most if loaded.backend.gains_from_batches else 1
    return min(wanted, most)
