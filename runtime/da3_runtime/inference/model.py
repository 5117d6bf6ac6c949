"""The Python API: a loaded model, the depth of a photo, and the depths and cameras of a scene."""

from __future__ import annotations

import base64
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from da3_runtime.errors import ImageError, InferenceError, SettingError
from da3_runtime.image.cameras import SOURCE, cameras_of, lenses_and_poses
from da3_runtime.image.decode import Photo, photo_of_array, photo_of_image
from da3_runtime.image.settings import ImageSettings
from da3_runtime.inference.estimator import DECODERS, Estimator, Timings
from da3_runtime.inference.settings import InferenceSettings
from da3_runtime.output.encode import DepthUnit, Output, Wanted, encode_outputs, name_of
from da3_runtime.output.files import ENDINGS, output_of, self_describing
from da3_runtime.postprocess.camera import Camera, Lens, given_lens
from da3_runtime.postprocess.depth import Prediction
from da3_runtime.postprocess.points import DEFAULT_POINTS, PointOptions
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.files import write_atomically
from da3_runtime.variants import MAX_SIDE, MIN_SIDE, Unit

Input: TypeAlias = str | PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
_FOCAL_RANGE = (1.0, 1e6)  # pixels


@dataclass(frozen=True, eq=False, repr=False)
class ImageDepth:
    """The depth of one image, with everything needed to interpret it.

    Attributes
    ----------
    values : NDArray[np.float32]
        [H, W], depth along the optical axis; larger is farther.
    unit : Unit
        ``m`` for meters; ``relative``, correct up to one unknown factor; or ``cameras``, the unit of
        the known cameras of a scene.
    maps : Mapping[str, NDArray]
        Every map that the model predicts beside depth, [H, W], by name.
    confidence : NDArray[np.float32] | None
        The map ``confidence``, at least 1; None if the model predicts no confidence.
    sky : NDArray[np.bool_] | None
        The map ``sky``, True for sky; None if the model does not find the sky.
    camera : Camera | None
        Intrinsics [3, 3] in pixels of ``values``, given or predicted, and extrinsics [3, 4]. None if the
        model predicts no camera and no focal length was used.
    focal_source : str | None
        Source of the focal length that gave meters: ``focal_length_px``, ``intrinsics``, ``exif`` or
        ``predicted``; None for relative depth.
    warnings : list[str]
        Reasons for caution, such as random weights.
    model_id : str
        Model that ran.
    backend : str
        Backend that ran it.
    precision : str
        Precision of the engine: ``fp32``, ``fp16`` or ``bf16``.
    parity : str
        ``verified`` if the engine file that ran was measured against upstream's network and was within
        tolerance, else ``unverified``.
    timings_ms : dict[str, float]
        Milliseconds of each stage; of a whole scene for one of its views.
    crop : tuple[float, float]
        Left upper corner of the maps in the photo, x and y in pixels; not (0, 0) only for a view of a
        scene whose photos have different shapes.
    """

    values: NDArray[np.float32]
    unit: Unit
    maps: Mapping[str, NDArray[Any]]
    camera: Camera | None
    focal_source: str | None
    warnings: list[str]
    model_id: str
    backend: str
    precision: str
    parity: str
    timings_ms: dict[str, float]
    _prediction: Prediction
    _name: str
    crop: tuple[float, float] = (0.0, 0.0)

    @property
    def confidence(self) -> NDArray[np.float32] | None:
        """Confidence of the depth, or None."""
        return self.maps.get("confidence")

    @property
    def sky(self) -> NDArray[np.bool_] | None:
        """The sky mask, or None."""
        return self.maps.get("sky")

    def save(
        self,
        path: str | PathLike[str],
        *,
        depth_unit: str = "auto",
        points: PointOptions = DEFAULT_POINTS,
        cameras: bool = True,
    ) -> Path:
        """Write one file; the ending of its name selects the content.

        ======================  ==============================================================
        ending                  content
        ======================  ==============================================================
        ``.depth.png``          16-bit PNG; depth is the PNG's value times its text entry
                                ``depth_scale``, in its text entry ``unit``; 0 is invalid
        ``.depth.npz``          NumPy archive, array ``depth``, float32
        ``.depth.tiff``         TIFF, float32
        ``.depth.exr``          OpenEXR, float32
        ``.confidence.png``     16-bit PNG; confidence is the value times ``confidence_scale``
        ``.sky.png``            8-bit PNG, 255 is sky
        ``.color.png``          8-bit RGB preview
        ``.png``                8-bit gray preview, near is bright
        ``.glb``                colored points and the camera, glTF, y up
        ``.ply``                colored points with confidence, x right, y down, z forward
        ``.colmap.zip``         COLMAP's binary sparse model
        ``.scene.npz``          NumPy archive of what the network saw and returned
        ======================  ==============================================================

        Parameters
        ----------
        path : str | PathLike[str]
            The file to write; its folder must exist.
        depth_unit : str
            For ``.depth.png``: ``mm`` writes millimeters, which needs depth in meters.
        points : PointOptions
            For files of points: which pixels become points.
        cameras : bool
            For ``.glb``: add the camera.

        Returns
        -------
        Path
            The written file.

        Raises
        ------
        SettingError
            If the ending is not in the table, the model lacks the map, or the file cannot be written.
        OutputError
            If the file cannot be made of this depth: millimeters of relative depth, or points without a
            camera.
        """
        return _save([self], Path(path), depth_unit, points, cameras)

    @property
    def _summary(self) -> str:
        height, width = self.values.shape
        low, high = float(self.values.min()), float(self.values.max())
        unit = "m" if self.unit is Unit.METERS else f"({self.unit})"
        return (
            f"{width} x {height}, depth {low:.3g} to {high:.3g} {unit}, "
            f"{self.model_id} on {self.backend} {self.precision}"
        )

    def __repr__(self) -> str:
        """One line: size, range, unit, model."""
        return f"<ImageDepth {self._summary}>"

    @cached_property
    def _preview(self) -> bytes:
        (encoded,) = encode_outputs(self._prediction, Wanted((Output.COLOR,)))
        assert encoded.file is not None
        return encoded.file

    def _repr_png_(self) -> bytes:
        """The color preview, as PNG, for notebooks."""
        return self._preview

    def _repr_html_(self) -> str:
        """The color preview with size, range and unit, for notebooks."""
        image = base64.b64encode(self._preview).decode()
        return (
            f'<figure style="margin:0"><img src="data:image/png;base64,{image}" alt="depth" '
            f'style="max-width:100%"><figcaption>{self._summary}</figcaption></figure>'
        )


@dataclass(frozen=True)
class SceneDepth:
    """Depths and cameras of several photos of one scene; behaves as the sequence of its views.

    Attributes
    ----------
    views : list[ImageDepth]
        The depth of each photo. All depths agree: one factor, if any, is unknown for all of them.
        Extrinsics are from one world, that of the reference view's camera, to each camera.
    reference : int | None
        Index of the reference view. None if the model sees each photo alone, and finds no cameras.
    """

    views: list[ImageDepth]
    reference: int | None

    def __len__(self) -> int:
        """Number of views."""
        return len(self.views)

    def __getitem__(self, index: int) -> ImageDepth:
        """One view."""
        return self.views[index]

    def __iter__(self) -> Iterator[ImageDepth]:
        """The views."""
        return iter(self.views)

    @property
    def warnings(self) -> list[str]:
        """Every warning of the views, once."""
        return list(dict.fromkeys(warning for view in self.views for warning in view.warnings))

    def save(
        self,
        path: str | PathLike[str],
        *,
        points: PointOptions = DEFAULT_POINTS,
        cameras: bool = True,
    ) -> Path:
        """Write one file of all views: ``.glb``, ``.ply``, ``.colmap.zip`` or ``.scene.npz``.

        Parameters and errors are those of :meth:`ImageDepth.save`.
        """
        return _save(self.views, Path(path), "auto", points, cameras)


class Model:
    """A loaded model. Threads may share it; use it in a ``with`` statement, or close it.

    Parameters
    ----------
    engine : EngineSettings
        The engine to load, and how.
    images : ImageSettings
        Limits of an image.
    inference : InferenceSettings
        Processing resolution and batches.

    Raises
    ------
    SettingError
        If the model, head or backend is unknown.
    BackendUnavailableError
        If no installed backend can run the model.
    CheckpointError
        If the model's weights are missing.
    """

    def __init__(
        self, engine: EngineSettings, images: ImageSettings, inference: InferenceSettings
    ) -> None:
        self._max_pixels = images.max_image_pixels
        self._estimator: Estimator | None = Estimator.load(engine, images, inference)
        loaded = self._estimator.loaded
        self.model_id = loaded.folder.variant.model_id
        self.head = loaded.folder.head.value
        self.license = loaded.folder.variant.license
        self.backend = loaded.backend.name
        self.precision = loaded.backend.precision
        self.parity = loaded.parity.value
        self.warnings = list(loaded.warnings)

    def __repr__(self) -> str:
        """One line: model, head, backend."""
        state = "" if self._estimator is not None else ", closed"
        return f"<Model {self.model_id} with head {self.head} on {self.backend} {self.precision}{state}>"

    def __enter__(self) -> Self:
        """The model itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Free the memory of the model, after the running batch has ended."""
        estimator, self._estimator = self._estimator, None
        if estimator is not None:
            estimator.close()

    @overload
    def depth(  # type: ignore[overload-overlap]  # a str is also a Sequence[str]
        self,
        image: Input,
        *,
        focal_length_px: float | None = None,
        intrinsics: ArrayLike | None = None,
        processing_res: int | None = None,
        model_size: bool = False,
    ) -> ImageDepth: ...

    @overload
    def depth(
        self,
        image: Sequence[Input],
        *,
        focal_length_px: float | None = None,
        intrinsics: ArrayLike | None = None,
        processing_res: int | None = None,
        model_size: bool = False,
    ) -> list[ImageDepth]: ...

    def depth(
        self,
        image: Input | Sequence[Input],
        *,
        focal_length_px: float | None = None,
        intrinsics: ArrayLike | None = None,
        processing_res: int | None = None,
        model_size: bool = False,
    ) -> ImageDepth | list[ImageDepth]:
        """Depth of an image, or of each image in a list.

        Parameters
        ----------
        image : str | PathLike | bytes | PIL.Image.Image | NDArray[np.uint8] | Sequence
            A path, an encoded image, a Pillow image, or an upright RGB array, uint8 [H, W, 3]. A list or
            tuple of these runs as batches of images of one size. Option ``max_batch`` of
            :func:`da3_runtime.load` limits a batch.
        focal_length_px : float | None
            Focal length in pixels of the upright image, 1 to 1e6. It overrides ``intrinsics`` and EXIF.
        intrinsics : ArrayLike | None
            Camera matrix [[fx, s, cx], [0, fy, cy], [0, 0, 1]], [3, 3], in pixels of the upright image.
            It overrides EXIF.
        processing_res : int | None
            Longest side of the network's input, 84 to 1036 pixels. None: option ``processing_res`` of
            :func:`da3_runtime.load`, or else the model's own.
        model_size : bool
            Return maps at the size of the network's input instead of the image's.

        Returns
        -------
        ImageDepth | list[ImageDepth]
            Upright, at the image's own size; a list for a list or tuple.

        Raises
        ------
        ImageError
            If an image cannot be read or exceeds a limit; the message names its path, if it has one.
        SettingError
            If an argument has a value outside its range.
        InferenceError
            If the backend fails, or the model is closed.

        Examples
        --------
        >>> import da3_runtime as da3
        >>> with da3.load("da3-nano") as model:
        ...     depth = model.depth("examples/temple.jpg")
        ...     cat, coffee = model.depth(["examples/cat.jpg", "examples/coffee.jpg"])
        >>> depth.values.shape, str(depth.unit)
        ((427, 640), 'relative')
        """
        estimator = self._checked(focal_length_px, processing_res)
        matrix = None if intrinsics is None else _camera_matrix(intrinsics)
        if isinstance(image, (list, tuple)):
            timings = [Timings() for _ in image]
            predictions = estimator.estimate_all(
                [partial(self._photo, estimator, each) for each in image],
                timings,
                focal_length_px=focal_length_px,
                intrinsics=matrix,
                processing_res=processing_res,
                model_size=model_size,
            )
            return [
                self._result(*each) for each in zip(predictions, timings, _names(image), strict=True)
            ]
        clock = Timings()
        with clock.stage("decode"):
            photo = self._photo(estimator, image)
        prediction = estimator.estimate(
            photo,
            clock,
            focal_length_px=focal_length_px,
            intrinsics=matrix,
            processing_res=processing_res,
            model_size=model_size,
        )
        return self._result(prediction, clock, *_names([image]))

    def scene(
        self,
        images: Sequence[Input],
        *,
        cameras: str | PathLike[str] | Sequence[tuple[ArrayLike, ArrayLike]] | None = None,
        reference: str | int = "auto",
        focal_length_px: float | None = None,
        intrinsics: ArrayLike | None = None,
        processing_res: int | None = None,
        model_size: bool = False,
    ) -> SceneDepth:
        """Depths and cameras of several photos of one scene, which the network sees together.

        Photos of different shapes are cropped around the middle to one shape, as upstream does.

        Parameters
        ----------
        images : Sequence
            The photos, each as for :meth:`depth`.
        cameras : str | PathLike | Sequence[tuple[ArrayLike, ArrayLike]] | None
            Known cameras: intrinsics [3, 3] in pixels of the upright photo, and extrinsics [3, 4], world
            to camera, of each photo, such as :class:`Camera`. Or the path of a folder with COLMAP's text
            model, or of a ``scene.json``, which name the photos. The depth gets their unit.
        reference : str | int
            The view that the cameras refer to: ``auto`` (the network chooses), ``first``, ``middle``, or
            its index from 0.
        focal_length_px, intrinsics, processing_res, model_size
            As for :meth:`depth`, the same for every photo.

        Returns
        -------
        SceneDepth
            The views in the order of the photos, and the index of the reference view.

        Raises
        ------
        ImageError
            If a photo cannot be read or exceeds a limit.
        SettingError
            If an argument has a value outside its range, there is no photo, or the cameras cannot be
            used.
        SceneTooLargeError
            If the backend cannot run so many views at once.
        InferenceError
            If the backend fails, or the model is closed.

        Examples
        --------
        >>> import da3_runtime as da3
        >>> with da3.load("da3-nano") as model:
        ...     scene = model.scene(["examples/cat.jpg", "examples/coffee.jpg"])
        >>> len(scene), scene.reference, scene[1].camera.extrinsics.shape
        (2, 0, (3, 4))
        """
        estimator = self._checked(focal_length_px, processing_res)
        if isinstance(images, (str, bytes, PathLike)) or not isinstance(images, Sequence) or not images:
            raise SettingError("scene takes a list of at least one photo.")
        matrix = None if intrinsics is None else _camera_matrix(intrinsics)
        clock = Timings()
        with clock.stage("decode"), ThreadPoolExecutor(DECODERS) as threads:
            photos = list(threads.map(partial(self._photo, estimator), images))
        sizes = [(photo.rgb.shape[1], photo.rgb.shape[0]) for photo in photos]
        lenses: Sequence[Lens | None] = [given_lens(*size, focal_length_px, matrix) for size in sizes]
        extrinsics = None
        if cameras is not None:
            if focal_length_px is not None or matrix is not None:
                raise SettingError("cameras have intrinsics: leave focal_length_px and intrinsics out.")
            lenses, extrinsics = _known(cameras, images, sizes)
        estimate = estimator.estimate_scene(
            photos,
            clock,
            lenses=lenses,
            extrinsics=extrinsics,
            reference=reference,
            processing_res=processing_res,
            model_size=model_size,
        )
        views = [
            replace(self._result(view.prediction, clock, name), crop=(view.left, view.top))
            for view, name in zip(estimate.views, _names(images), strict=True)
        ]
        return SceneDepth(views, estimate.reference)

    def _checked(self, focal_length_px: float | None, processing_res: int | None) -> Estimator:
        """The loaded model, once the arguments are known to be in their ranges."""
        if self._estimator is None:
            raise InferenceError("The model is closed; load it again.")
        if focal_length_px is not None and not _FOCAL_RANGE[0] <= focal_length_px <= _FOCAL_RANGE[1]:
            raise SettingError(f"focal_length_px must be from 1 to 1e6 pixels, not {focal_length_px}.")
        if processing_res is not None and not MIN_SIDE <= processing_res <= MAX_SIDE:
            raise SettingError(
                f"processing_res must be from {MIN_SIDE} to {MAX_SIDE} pixels, not {processing_res}."
            )
        return self._estimator

    def _photo(self, estimator: Estimator, image: object) -> Photo:
        match image:
            case bytes():
                return estimator.decode(image)
            case str() | PathLike():
                return estimator.read(Path(image))
            case Image.Image():
                return photo_of_image(image, self._max_pixels)
            case np.ndarray():
                return photo_of_array(image, self._max_pixels)
        raise ImageError(
            f"An image cannot be of type {type(image).__name__}: pass a path, bytes, a Pillow image or "
            "a uint8 array [height, width, 3]."
        )

    def _result(self, prediction: Prediction, clock: Timings, name: str) -> ImageDepth:
        return ImageDepth(
            prediction.depth.values,
            prediction.depth.unit,
            prediction.maps,
            prediction.camera,
            prediction.focal_source,
            prediction.warnings,
            self.model_id,
            self.backend,
            self.precision,
            self.parity,
            clock.ms,
            prediction,
            name,
        )


def _names(images: Sequence[object]) -> list[str]:
    """The file name of each image; of one without a file, a number.

    Where two names are the same, they are paths below the folder that all files have in common.
    """
    names = [
        Path(image).name if isinstance(image, (str, PathLike)) else name_of(index)
        for index, image in enumerate(images)
    ]
    if len(set(names)) == len(names):
        return names
    files = {
        i: Path(each).absolute() for i, each in enumerate(images) if isinstance(each, (str, PathLike))
    }
    common = os.path.commonpath([file.parent for file in files.values()])
    return [
        files[index].relative_to(common).as_posix() if index in files else name
        for index, name in enumerate(names)
    ]


def _save(
    views: Sequence[ImageDepth],
    path: Path,
    depth_unit: str,
    points: PointOptions,
    cameras: bool,
) -> Path:
    """Write the output that the ending of ``path`` selects; several views have only those of a scene."""
    output, is_scene = output_of(path.name), len(views) > 1
    if output is None or (is_scene and not output.row.of_scene):
        known = [ending for each, ending in ENDINGS.items() if each.row.of_scene or not is_scene]
        raise SettingError(
            f"{path.name}: the ending selects no output; give a name that ends in one of "
            f"{', '.join(known)}."
        )
    if depth_unit not in list(DepthUnit):
        raise SettingError(f"depth_unit {depth_unit!r} is not one of: {', '.join(DepthUnit)}.")
    wanted = Wanted((output,), depth_unit=DepthUnit(depth_unit), points=points, cameras=cameras)
    predictions = [view._prediction for view in views]
    (encoded,) = encode_outputs(predictions, wanted, [view._name for view in views])
    if encoded.file is None:
        raise SettingError(f"{path.name}: {views[0].model_id} has no {output} map to save.")
    for sentence in encoded.warnings:
        warnings.warn(sentence, stacklevel=3)
    try:
        write_atomically(path, self_describing(encoded.file, encoded.facts, views[0].unit))
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror or 'cannot be written'}.") from None
    return path


def _camera_matrix(intrinsics: ArrayLike) -> NDArray[np.float32]:
    try:
        matrix = np.asarray(intrinsics, dtype=np.float32)
    except (TypeError, ValueError):
        matrix = np.empty(0, np.float32)
    is_camera = (
        matrix.shape == (3, 3)
        and bool(np.isfinite(matrix).all())
        and min(matrix[0, 0], matrix[1, 1]) >= 1
        and matrix[1, 0] == 0
        and matrix[2].tolist() == [0, 0, 1]
    )
    if not is_camera:
        raise SettingError(
            "intrinsics must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]], fx and fy at least 1 pixel."
        )
    return matrix


def _pose(extrinsics: ArrayLike) -> NDArray[np.float64]:
    try:
        pose = np.asarray(extrinsics, dtype=np.float64)
    except (TypeError, ValueError):
        pose = np.empty(0)
    if pose.shape == (4, 4):
        pose = pose[:3]
    if pose.shape != (3, 4) or not np.isfinite(pose).all():
        raise SettingError("extrinsics must be [R | t], world to camera, 3 rows of 4 finite numbers.")
    return pose


def _known(
    cameras: str | PathLike[str] | Sequence[tuple[ArrayLike, ArrayLike]],
    images: Sequence[object],
    sizes: Sequence[tuple[int, int]],
) -> tuple[list[Lens], NDArray[np.float64]]:
    """Lenses of known cameras, for photos of these widths and heights, and extrinsics [S, 3, 4]."""
    if isinstance(cameras, (str, PathLike)):
        paths = [Path(image) for image in images if isinstance(image, (str, PathLike))]
        if len(paths) < len(images):
            raise SettingError("cameras of a file are found by the photos' names: pass photos as paths.")
        return lenses_and_poses(cameras_of(Path(cameras), paths), sizes)
    if len(cameras) != len(images):
        raise SettingError(f"cameras has {len(cameras)} of {len(images)} photos: pass one for each.")
    extrinsics = [_pose(each[1]) for each in cameras]
    matrices = [_camera_matrix(each[0]) for each in cameras]
    return [Lens(matrix, SOURCE) for matrix in matrices], np.stack(extrinsics)
