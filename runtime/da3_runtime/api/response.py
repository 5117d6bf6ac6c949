"""A prediction -> the fields of a response."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pybase64
from pydantic import BaseModel, ConfigDict, Field, create_model

from da3_runtime.errors import ResponseTooLargeError
from da3_runtime.inference import film
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.output.encode import Encoded, Output
from da3_runtime.postprocess.camera import Camera
from da3_runtime.postprocess.depth import Prediction
from da3_runtime.store.manifest import Parity
from da3_runtime.variants import Head, Series, Unit, Variant

JSON = dict[str, object]

# Upper bound of everything in a response but the files, in bytes.
_OVERHEAD = 4096


class CameraResponse(BaseModel):
    """The photo's camera: given, from EXIF if that scaled the depth, else predicted by the network."""

    intrinsics: list[list[float]] = Field(
        description="Camera matrix, 3 rows of 3: fx, fy, cx and cy in pixels of the returned maps; "
        "(0, 0) is the corner of the image."
    )
    extrinsics: list[list[float]] = Field(
        description="World to camera, 3 rows of 4: rotation, then translation in unit. Identity if the "
        "model predicts none."
    )


_COMMON: dict[str, tuple[Any, Any]] = {
    "min_depth": (float, Field(description="Smallest depth of the map, in unit.")),
    "max_depth": (float, Field(description="Largest depth of the map, in unit.")),
    "head_type": (str, Field(description="Class of the model's head: DualDPT, DPT or SDTHeadAdapter.")),
    "file_path": (
        str | None,
        Field(
            None,
            description="Path of the preview on the worker's volume. Left out unless WORKSPACE is set "
            "and the preview was requested.",
        ),
    ),
    "unit": (
        Unit,
        Field(
            description="Unit of depth: m for meters; relative for depth up to one unknown factor; "
            "cameras for the unit of the given extrinsics."
        ),
    ),
    "is_metric": (bool, Field(description="True if unit is m.")),
    "focal_source": (
        str | None,
        Field(
            description="Source of the focal length that scaled depth to meters: focal_length_px, "
            "intrinsics, exif or predicted. Null if no focal length was used."
        ),
    ),
    "width": (int, Field(description="Width of all returned maps, in pixels.")),
    "height": (int, Field(description="Height of all returned maps, in pixels.")),
}
_PROVENANCE: dict[str, tuple[Any, Any]] = {
    "model_id": (str, Field(description="Short id of the model that made the depth.")),
    "license": (str, Field(description="License of the model's checkpoint: its SPDX id.")),
    "backend": (
        str,
        Field(description="Name of the backend that ran the model, such as onnxruntime-cpu."),
    ),
    "precision": (str, Field(description="Precision of the engine that ran: fp32, fp16, bf16 or int8.")),
    "parity": (
        Parity,
        Field(
            description="verified if the engine file that ran was measured against upstream's network "
            "and was within tolerance; unverified if nothing measured it, such as a plan built without "
            "its GPU, or PyTorch eager, which runs no engine file."
        ),
    ),
    "timings_ms": (
        dict[str, float],
        Field(
            description="Duration of each stage by name, in milliseconds; total is the whole request."
        ),
    ),
    "warnings": (
        list[str],
        Field(
            description="Sentences about anything unexpected, such as unknown fields; empty if nothing."
        ),
    ),
}


# Facts that all images of a scene have in common.
SHARED = tuple(name for name in _PROVENANCE if name not in ("timings_ms", "warnings"))


def _file_field(output: Output) -> dict[str, tuple[Any, Any]]:
    description = f"{output.row.description} Left out if not requested or in {output.row.stem}_url."
    return {f"{output.row.stem}_base64": (str | None, Field(None, description=description))}


def _url_field(output: Output) -> dict[str, tuple[Any, Any]]:
    description = (
        f"Address of the same file in the worker's bucket, valid for a week. It replaces "
        f"{output.row.stem}_base64 if the response would be too large."
    )
    return {f"{output.row.stem}_url": (str | None, Field(None, description=description))}


def _fact_fields(output: Output) -> dict[str, tuple[Any, Any]]:
    return {
        name: (
            (CameraResponse if fact.type is Camera else fact.type) | None,
            Field(None, description=f"{fact.description} Left out if not requested."),
        )
        for name, fact in output.row.facts.items()
    }


def _fields(outputs: Iterable[Output] = Output) -> dict[str, tuple[Any, Any]]:
    """Every field of a response; the preview's comes first, as in the reference service."""
    files = [output for output in outputs if output.row.stem]
    first, *others = files
    fields = _file_field(first) | _COMMON
    for output in others:
        fields |= _file_field(output) | _fact_fields(output)
    for output in files:
        fields |= _url_field(output)
    for output in (output for output in outputs if output not in files):
        fields |= _fact_fields(output)
    return fields | _PROVENANCE


def _view_fields() -> dict[str, tuple[Any, Any]]:
    fields = _fields([output for output in Output if not output.row.of_scene])
    del fields["timings_ms"]
    return fields


def _scene_fields() -> dict[str, tuple[Any, Any]]:
    files = [output for output in Output if output.row.of_scene]
    own = [field(output) for field in (_file_field, _url_field) for output in files]
    return {name: each for fields in own for name, each in fields.items()} | _PROVENANCE


if TYPE_CHECKING:
    _Fields = BaseModel
    _ViewFields = BaseModel
    _SceneFields = BaseModel
else:
    _Fields = create_model("_Fields", **_fields())
    _ViewFields = create_model("_ViewFields", **_view_fields())
    _SceneFields = create_model("_SceneFields", **_scene_fields())


class DepthResponse(_Fields):
    """The result of a depth request. Outputs that were not requested are left out."""

    model_config = ConfigDict(title="Output")


class ViewResponse(_ViewFields):
    """One image of a scene: the fields of a response, and where its maps are in the image.

    ``camera`` is always there; its intrinsics are in pixels of the maps.
    """

    model_config = ConfigDict(title="View")

    crop: list[float] = Field(
        description="The part of the image that the maps cover, in pixels of the image at the maps' "
        "scale: left, top, width, height. The whole image unless the images have different shapes."
    )


class SceneResponse(_SceneFields):
    """The result of a request with images: what each image has, and the facts of the scene.

    ``warnings`` are about the request; those about an image are in its view.
    """

    model_config = ConfigDict(title="Scene")

    views: list[ViewResponse] = Field(description="One for each image, in their order.")
    reference: int | None = Field(
        description="Index of the image that the cameras refer to. Null if the model sees each alone."
    )


class DriftResponse(BaseModel):
    """How the two ends of a film disagree."""

    scale: float = Field(description="Scale at the end over the scale at the start; 1 is no drift.")
    rotation: float = Field(description="Angle between the two, in degrees.")
    distance: float = Field(
        description="Distance between the last camera in the track and where it should be, in unit."
    )
    share_of_track: float | None = Field(
        description="distance over the length of the track; null if the camera did not move."
    )


class FilmFile(NamedTuple):
    """A file of a film: its output, its name, and its description for API users."""

    output: Output
    name: str
    description: str


FILM_FILES = {
    "video": FilmFile(
        Output.PREVIEW, film.PREVIEW, "Depth through color_map, near is bright: H.264 in MP4"
    ),
    "depth_video": FilmFile(
        Output.DEPTH_PNG16,
        film.DEPTH,
        "Depth: FFV1 in Matroska, gray, 16 bits. Multiply its values by depth_scale to get depth in "
        "unit; 0 marks invalid pixels",
    ),
    "track": FilmFile(
        Output.CAMERA,
        film.TRACK,
        "The camera's way as text, one line for each frame: seconds, x, y, z, and a quaternion, camera "
        "to world",
    ),
    "frames": FilmFile(
        Output.CAMERA, film.FRAMES, "One line of JSON for each frame: seconds, range of depth, camera"
    ),
    **{
        output.row.stem: FilmFile(output, f"{film.STEM}{output.row.ending}", "Points of the whole film")
        for output in film.OF_FILM
    },
}


def _film_fields() -> dict[str, tuple[Any, Any]]:
    fields: dict[str, tuple[Any, Any]] = {}
    for stem, file in FILM_FILES.items():
        text = f"{file.description}, in Base64. Left out if not requested or in {stem}_url."
        url = f"Address of the same file in the worker's bucket, instead of {stem}_base64."
        fields[f"{stem}_base64"] = (str | None, Field(None, description=text))
        fields[f"{stem}_url"] = (str | None, Field(None, description=url))
    return fields | _PROVENANCE


if TYPE_CHECKING:
    _FilmFields = BaseModel
else:
    _FilmFields = create_model("_FilmFields", **_film_fields())


class FilmResponse(_FilmFields):
    """The result of a request with a film. docs/films.md says what its numbers mean."""

    model_config = ConfigDict(title="Film")

    width: int = Field(description="Width of both films, in pixels; an odd one is padded in video.")
    height: int = Field(description="Height of both films, in pixels; an odd one is padded in video.")
    frames: int = Field(description="Number of used frames.")
    seconds: float = Field(description="From the first used frame to the end of the last one.")
    unit: Unit = Field(description="Unit of depth and of the camera's track.")
    depth_scale: float = Field(description="Depth of one step of depth_video, in unit, above 0.")
    windows: int = Field(description="Number of windows in which the network saw the film.")
    track: dict[str, float | str] | None = Field(
        description="length and unit of the track; null if each frame was seen alone."
    )
    joins: dict[str, float] | None = Field(
        description="Largest errors of the joins between windows, and the range of their scales. Null "
        "without joins."
    )
    drift: DriftResponse | None = Field(description="Null unless loop is true.")


def film_fields(
    summary: Mapping[str, Any],
    folder: Path,
    outputs: Collection[Output],
    max_bytes: int | None,
    upload: Callable[[str, bytes], str] | None,
) -> JSON:
    """The response fields of a film, from its summary and the files in a folder.

    Parameters
    ----------
    max_bytes, upload
        As in :func:`outputs_of`.

    Raises
    ------
    ResponseTooLargeError
        If the response would exceed ``max_bytes`` and ``upload`` is None.
    """
    files = {
        stem: folder / file.name
        for stem, file in FILM_FILES.items()
        if file.output in outputs and (folder / file.name).exists()
    }
    sizes = {stem: -(-path.stat().st_size // 3) * 4 for stem, path in files.items()}
    size = _OVERHEAD + sum(sizes.values())
    is_too_large = max_bytes is not None and size > max_bytes
    if max_bytes is not None and is_too_large and upload is None:
        parts = ", ".join(f"{stem} ({each / 1e6:.1f} MB)" for stem, each in sizes.items())
        raise ResponseTooLargeError(
            f"The response would have {size / 1e6:.1f} MB; the limit is {max_bytes / 1e6:.1f} MB "
            f'(MAX_RESPONSE_BYTES). Leave out some of {parts}, send "output_size": "model", or use '
            "fewer frames by fps."
        )
    names = FilmResponse.model_fields
    fields: JSON = {name: value for name, value in summary.items() if name in names}
    for stem, path in files.items():
        data = path.read_bytes()
        if is_too_large and upload is not None:
            fields[f"{stem}_url"] = upload(path.name, data)
        else:
            fields[f"{stem}_base64"] = pybase64.b64encode_as_string(data)
    return fields


def facts_of(prediction: Prediction, loaded: Loaded) -> JSON:
    """The fields that every response has, except timings and warnings.

    Parameters
    ----------
    prediction : Prediction
        At the size that is returned.
    loaded : Loaded
        The model that made it.
    """
    return facts_of_depth(prediction) | facts_of_engine(loaded)


def facts_of_depth(prediction: Prediction) -> JSON:
    """The fields about a prediction, at the size that is returned."""
    values = prediction.depth.values
    height, width = values.shape
    return {
        "min_depth": float(values.min()),
        "max_depth": float(values.max()),
        "unit": prediction.depth.unit.value,
        "is_metric": prediction.depth.unit is Unit.METERS,
        "focal_source": prediction.focal_source,
        "width": width,
        "height": height,
    }


def facts_of_engine(loaded: Loaded) -> JSON:
    """The fields that all predictions of a loaded model have in common."""
    variant, backend = loaded.folder.variant, loaded.backend
    return {
        "head_type": head_type(variant, loaded.folder.head),
        "model_id": variant.model_id,
        "license": variant.license,
        "backend": backend.name,
        "precision": backend.precision,
        "parity": loaded.parity.value,
    }


def head_type(variant: Variant, head: Head) -> str:
    """Class of the head, as the reference service names it."""
    if head is Head.SDT:
        return "SDTHeadAdapter"
    return "DualDPT" if variant.graphs[0].series is Series.ANYVIEW else "DPT"


def outputs_of(
    images: Sequence[Sequence[Encoded]],
    max_bytes: int | None,
    upload: Callable[[str, bytes], str] | None,
    of_scene: Sequence[Encoded] = (),
) -> list[JSON]:
    """The response fields of the requested outputs of each image, and last those of the whole scene.

    Parameters
    ----------
    images : Sequence[Sequence[Encoded]]
        The outputs of each image.
    max_bytes : int | None
        Largest response in bytes; None for no limit.
    upload : Callable[[str, bytes], str] | None
        Stores a file under a name and returns its address. Used for all files of a response that would
        exceed ``max_bytes``.
    of_scene : Sequence[Encoded]
        The outputs that all images have together.

    Raises
    ------
    ResponseTooLargeError
        If the response would exceed ``max_bytes`` and ``upload`` is None; the message lists the outputs
        by size.
    """
    totals: Counter[Output] = Counter()
    every = [*images, of_scene]
    for each in (each for encoded in every for each in encoded if each.file is not None):
        totals[each.output] += _base64_size(each.file or b"")
    size = _OVERHEAD * len(every) + totals.total()
    is_too_large = bool(totals) and max_bytes is not None and size > max_bytes
    if max_bytes is not None and is_too_large and upload is None:
        sizes = ", ".join(f"{output} ({total / 1e6:.1f} MB)" for output, total in totals.most_common())
        smaller = {
            False: '"output_size": "model"',
            True: "a smaller points_max or processing_res",
        }
        ways = [way for kind, way in smaller.items() if kind in {each.row.of_scene for each in totals}]
        raise ResponseTooLargeError(
            f"The response would have {size / 1e6:.1f} MB; the limit is {max_bytes / 1e6:.1f} MB "
            f"(MAX_RESPONSE_BYTES). Leave out some of {sizes}, or send {' and '.join(ways)}."
        )
    stored = upload if is_too_large else None
    names = [f"{index}-" for index in range(len(images))] if len(images) > 1 else [""]
    return [_fields_of(*each, stored) for each in zip(every, [*names, ""], strict=True)]


def _fields_of(
    encoded: Sequence[Encoded], prefix: str, upload: Callable[[str, bytes], str] | None
) -> JSON:
    """The response fields of one image's outputs; ``upload`` stores the files, under this prefix."""
    fields: JSON = {}
    for each in encoded:
        fields |= each.facts
        row = each.output.row
        if not row.stem:
            continue
        if each.file is None:
            fields[f"{row.stem}_base64"] = None
        elif upload is not None:
            extension = row.ending.rpartition(".")[2]
            fields[f"{row.stem}_url"] = upload(f"{prefix}{each.output}.{extension}", each.file)
        else:
            fields[f"{row.stem}_base64"] = pybase64.b64encode_as_string(each.file)
    return fields


def _base64_size(file: bytes) -> int:
    return -(-len(file) // 3) * 4
