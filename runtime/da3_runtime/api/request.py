"""A request's ``input`` -> checked fields, or one sentence about the first invalid field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from da3_runtime.errors import RequestError
from da3_runtime.image.fetch import is_data_uri
from da3_runtime.network_io import MOST_VIEWS
from da3_runtime.output.encode import DepthUnit, Output, Wanted
from da3_runtime.output.preview import COLOR_MAPS, DEFAULT_TONE, Tone
from da3_runtime.postprocess.camera import Lens, given_lens
from da3_runtime.postprocess.points import DEFAULT_POINTS, PointOptions
from da3_runtime.variants import MAX_SIDE, MIN_SIDE

MAX_URL = 4096
MAX_POINTS = 2_000_000  # bounds the memory of a request
_FILMS = ("video_url", "video_base64")
_IMAGES = ("image_url", "image_base64", "images", *_FILMS)
_ONE_OF = "send one of image_url, image_base64, images, video_url and video_base64"
# Outputs that a film has, of the whole film.
FILM_OUTPUTS = (
    Output.PREVIEW,
    Output.DEPTH_PNG16,
    Output.CAMERA,
    Output.GLB,
    Output.PLY,
    Output.COLMAP,
)


def _no_bool(value: object) -> object:
    """Reject true and false, which Python counts as numbers."""
    if isinstance(value, bool):
        raise ValueError("is not a number")  # noqa: TRY004  (pydantic takes ValueError)
    return value


_NO_BOOL = BeforeValidator(_no_bool)
_Entry = Annotated[float, Field(ge=-1e6, le=1e6), _NO_BOOL]
Row = Annotated[list[_Entry], Field(min_length=3, max_length=3)]
Matrix = Annotated[list[Row], Field(min_length=3, max_length=3)]
_Place = Annotated[float, Field(ge=-1e9, le=1e9), _NO_BOOL]
_PoseRow = Annotated[list[_Place], Field(min_length=4, max_length=4)]
Pose = Annotated[list[_PoseRow], Field(min_length=3, max_length=3)]
Url = Annotated[str, Field(max_length=MAX_URL)]
Focal = Annotated[float, Field(ge=1, le=1e6), _NO_BOOL]


def _only(image: str, images: Sequence[str]) -> dict[str, Any]:
    """Schema of an object with this image and no other of ``images``."""
    types = {name: {"type": "null"} for name in images}
    kind = "array" if image == "images" else "string"
    return {"required": [image], "properties": {**types, image: {"type": kind}}}


def _config(title: str, images: Sequence[str]) -> ConfigDict:
    return ConfigDict(
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        title=title,
        json_schema_extra={"oneOf": [_only(image, images) for image in images]},
    )


def _check_intrinsics(matrix: Matrix | None) -> None:
    if matrix is not None and (
        min(matrix[0][0], matrix[1][1]) < 1 or matrix[2] != [0.0, 0.0, 1.0] or matrix[1][0] != 0
    ):
        raise ValueError(
            "intrinsics must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]], fx and fy at least 1."
        )


def _matrix_of(intrinsics: Matrix | None) -> NDArray[np.float32] | None:
    """Intrinsics as an array, [3, 3]."""
    return None if intrinsics is None else np.array(intrinsics, dtype=np.float32)


class _ImageFields(BaseModel):
    """What all objects with an image have in common."""

    @model_validator(mode="before")
    @classmethod
    def _simplify(cls, data: object) -> object:
        """Fields without those that are null; a data URI is an image in Base64."""
        if not isinstance(data, Mapping):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        for kind in ("image", "video"):
            url = given.get(f"{kind}_url")
            if isinstance(url, str):
                given[f"{kind}_url"] = url = url.strip()
                if is_data_uri(url):
                    if f"{kind}_base64" in given:
                        raise ValueError(f"Two {kind}s: send {kind}_url or {kind}_base64, not both.")
                    given[f"{kind}_base64"] = given.pop(f"{kind}_url")
        return given


class ViewRequest(_ImageFields):
    """One image of a scene. Exactly one of image_url and image_base64 is required."""

    model_config = _config("View", _IMAGES[:2])

    image_url: Url | None = Field(None, description="As image_url of a request.")
    image_base64: str | None = Field(None, description="As image_base64 of a request.")
    focal_length_px: Focal | None = Field(
        None, description="As focal_length_px of a request, which it overrides."
    )
    intrinsics: Matrix | None = Field(
        None, description="As intrinsics of a request, which it overrides."
    )
    extrinsics: Pose | None = Field(
        None,
        description="Known camera, world to camera: 3 rows of 4, rotation and translation. Send it for "
        "every image or for none, with intrinsics or a focal length; the depth then gets its unit.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.image_url is None) == (self.image_base64 is None):
            count = "No image" if self.image_url is None else "Two images"
            raise ValueError(f"{count}: send one of image_url and image_base64.")
        _check_intrinsics(self.intrinsics)
        return self


class DepthRequest(_ImageFields):
    """Fields of ``input``. Exactly one of the image fields is required; all others are optional."""

    model_config = _config("Input", _IMAGES)

    api_key: SecretStr | None = Field(
        None, description="API key, if the worker has one and the header da3-api-key cannot be sent."
    )
    image_url: Url | None = Field(
        None,
        description="Public http or https address of the image; a data URI of any length counts as "
        "image_base64. Send exactly one of image_url, image_base64, images, video_url and video_base64.",
    )
    image_base64: str | None = Field(
        None,
        description="The encoded image in Base64, standard or URL-safe, with or without padding, white "
        "space and a data URI prefix.",
    )
    model_id: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="Model id in any case, or its hub repository. Null: the worker's MODEL_ID."
    )
    use_ray_pose: bool | None = Field(
        None,
        description="Take the camera from the network's ray branch. Null: the worker's RAY_POSE; false "
        "for another model or head than the worker's own.",
    )
    use_sdt_head: bool | None = Field(
        None, description="Use the SDT head instead of the DPT head. Null: the worker's HEAD."
    )
    processing_res: Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE), _NO_BOOL] | None = Field(
        None,
        description="Longest side of the network's input, in pixels. Null: the worker's PROCESSING_RES, "
        "else the model's own, 504, or 168 for da3-nano.",
    )
    clip_percentile_low: Annotated[float, Field(ge=0, le=100), _NO_BOOL] = Field(
        DEFAULT_TONE.clip_percentile_low,
        description="Percentile of inverse depth that the preview shows as black; below "
        "clip_percentile_high.",
    )
    clip_percentile_high: Annotated[float, Field(ge=0, le=100), _NO_BOOL] = Field(
        DEFAULT_TONE.clip_percentile_high,
        description="Percentile of inverse depth that the preview shows as white.",
    )
    gamma: Annotated[float, Field(gt=0, le=10), _NO_BOOL] = Field(
        DEFAULT_TONE.gamma,
        description="Exponent of the preview's gray values; below 1 brightens the middle.",
    )
    histogram_equalization: bool = Field(
        DEFAULT_TONE.histogram_equalization,
        description="Equalize the preview's histogram, with limited contrast.",
    )
    hist_clip_limit: Annotated[float, Field(ge=0, le=256), _NO_BOOL] = Field(
        DEFAULT_TONE.hist_clip_limit,
        description="Largest count of one gray level before equalization, as a multiple of the mean "
        "count; 0: no limit.",
    )
    focal_length_px: Focal | None = Field(
        None,
        description="Focal length in pixels of the upright image. It overrides intrinsics, EXIF and the "
        "predicted camera. Null: intrinsics, else EXIF.",
    )
    intrinsics: Matrix | None = Field(
        None,
        description="Camera matrix [[fx, s, cx], [0, fy, cy], [0, 0, 1]] in pixels of the upright "
        "image. It overrides EXIF. Null: EXIF.",
    )
    outputs: Annotated[list[Output], Field(min_length=1, max_length=len(Output))] = Field(
        [Output.PREVIEW], description="Outputs to return, each at most once in the response."
    )
    output_size: Literal["original", "model"] = Field(
        "original", description="Size of the returned maps: the image's own, or the network input's."
    )
    color_map: Literal[tuple(COLOR_MAPS)] = Field(  # type: ignore[valid-type]
        "inferno", description="Color map of the output color."
    )
    depth_unit: DepthUnit = Field(
        DepthUnit.AUTO,
        description="Unit of the steps of depth_png16: auto for depth_scale, or mm for millimeters, "
        "which needs depth in meters.",
    )
    points_confidence: Annotated[float, Field(ge=0, le=100), _NO_BOOL] = Field(
        DEFAULT_POINTS.confidence,
        description="For glb, ply and colmap: pixels below this percentile of the confidence of all "
        "images are left out.",
    )
    points_edge: Annotated[float, Field(ge=0, le=100), _NO_BOOL] = Field(
        DEFAULT_POINTS.edge,
        description="For glb, ply and colmap: pixels are left out whose 3 x 3 neighbourhood has depths "
        "that differ by more than this share of their own depth. 0 keeps them all.",
    )
    points_sky: bool = Field(
        DEFAULT_POINTS.sky, description="For glb, ply and colmap: keep pixels of the sky."
    )
    points_max: Annotated[int, Field(ge=1, le=MAX_POINTS), _NO_BOOL] = Field(
        DEFAULT_POINTS.most,
        description="For glb, ply and colmap: largest number of points. Of more, a random choice "
        "remains, the same each time.",
    )
    points_cameras: bool = Field(True, description="For glb: add the cameras.")
    images: Annotated[list[ViewRequest], Field(min_length=1, max_length=MOST_VIEWS)] | None = Field(
        None,
        description="Images of one scene, which the network sees together: the response has views. At "
        "most as many as the worker's MAX_VIEWS.",
    )
    reference: (
        Literal["auto", "first", "middle"] | Annotated[int, Field(ge=0, lt=MOST_VIEWS), _NO_BOOL] | None
    ) = Field(
        None,
        description="For images: the one that the cameras refer to, or its index from 0. Null: auto, "
        "the network chooses.",
    )

    video_url: Url | None = Field(
        None,
        description="Public http or https address of a film, whose frames the network sees in windows. "
        "The response then has the fields of a film. Needs a worker with the extra video.",
    )
    video_base64: str | None = Field(
        None,
        description="A film in Base64, as image_base64; the body of a request has a limit of its own.",
    )
    fps: Annotated[float, Field(gt=0, le=1000), _NO_BOOL] | None = Field(
        None, description="For a film: at most so many frames per second are used. Null: all."
    )
    every: Annotated[int, Field(ge=1, le=1_000_000), _NO_BOOL] = Field(
        1, description="For a film: every n-th frame is used. With fps, of every n-th frame."
    )
    window: Annotated[int, Field(ge=1, le=MOST_VIEWS), _NO_BOOL] | None = Field(
        None,
        description="For a film: frames that the network sees at once, at most the worker's MAX_VIEWS; "
        "1 for each frame alone. Null: 8, or MAX_VIEWS if that is less.",
    )
    overlap: Annotated[int, Field(ge=1, le=MOST_VIEWS // 2), _NO_BOOL] | None = Field(
        None,
        description="For a film: frames that a window shares with the next one, at most half of window. "
        "Null: 3, or half of a smaller window.",
    )
    loop: bool = Field(
        False, description="For a film that ends where it began: measure the drift between its ends."
    )

    @model_validator(mode="after")
    def _check_film(self) -> Self:
        if self.is_film:
            other = [each for each in self.outputs if each not in FILM_OUTPUTS]
            if other:
                known = ", ".join(FILM_OUTPUTS)
                raise ValueError(f"outputs: {other[0]} is not for videos; choose among: {known}.")
            if self.intrinsics is not None:
                raise ValueError("intrinsics is not for videos: send focal_length_px, or leave it out.")
            if self.depth_unit is not DepthUnit.AUTO:
                raise ValueError(f"depth_unit {self.depth_unit} is not for videos: leave it out.")
        return self

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        given = [name for name in _IMAGES if getattr(self, name) is not None]
        if not given:
            raise ValueError(f"No image: {_ONE_OF}.")
        if len(given) > 1:
            raise ValueError(f"Two images: {_ONE_OF}, not {' and '.join(given)}.")
        if self.clip_percentile_low >= self.clip_percentile_high:
            raise ValueError("clip_percentile_low must be below clip_percentile_high.")
        _check_intrinsics(self.intrinsics)
        if self.depth_unit is not DepthUnit.AUTO and Output.DEPTH_PNG16 not in self.outputs:
            raise ValueError(
                f"depth_unit {self.depth_unit} is for depth_png16: add it to outputs, or leave "
                "depth_unit out."
            )
        poses = [view.extrinsics is None for view in self.images or ()]
        if any(poses) and not all(poses):
            raise ValueError(
                f"images[{poses.index(True)}] has no extrinsics: send them for every image or for none."
            )
        return self

    @property
    def is_film(self) -> bool:
        """Whether the request has a film."""
        return any(getattr(self, name) is not None for name in _FILMS)

    @property
    def sources(self) -> list[DepthRequest | ViewRequest]:
        """Where the images are: this request itself, or each image of its scene."""
        return [self] if self.images is None else list(self.images)

    @property
    def wanted(self) -> Wanted:
        """The requested outputs, and how to encode them."""
        tone = Tone(
            self.clip_percentile_low,
            self.clip_percentile_high,
            self.histogram_equalization,
            self.hist_clip_limit,
            self.gamma,
        )
        # The cameras of a scene are what it is for.
        outputs = self.outputs if self.images is None else [*self.outputs, Output.CAMERA]
        return Wanted(
            tuple(dict.fromkeys(outputs)),
            tone,
            self.color_map,
            self.depth_unit,
            PointOptions(self.points_confidence, self.points_sky, self.points_edge, self.points_max),
            self.points_cameras,
        )

    @property
    def camera_matrix(self) -> NDArray[np.float32] | None:
        """``intrinsics`` as an array, [3, 3]."""
        return _matrix_of(self.intrinsics)

    @property
    def extrinsics(self) -> NDArray[np.float64] | None:
        """The known cameras of a scene as an array, [S, 3, 4]."""
        poses = [view.extrinsics for view in self.images or ()]
        return np.array(poses) if poses and poses[0] is not None else None

    def lens(self, view: ViewRequest, width: int, height: int) -> Lens | None:
        """The lens that the request states for one image of a scene, of this size."""
        if view.focal_length_px is not None or view.intrinsics is not None:
            return given_lens(width, height, view.focal_length_px, _matrix_of(view.intrinsics))
        return given_lens(width, height, self.focal_length_px, self.camera_matrix)


FIELDS = frozenset(DepthRequest.model_fields)


def parse_request(data: object) -> tuple[DepthRequest, list[str]]:
    """The request in a job's ``input``, and warnings about unknown fields.

    Raises
    ------
    RequestError
        One sentence that names the first invalid field and its valid values.
    """
    if not isinstance(data, Mapping):
        raise RequestError("input must be a JSON object with the fields of a request.")
    try:
        request = DepthRequest.model_validate(data)
    except ValidationError as error:
        raise RequestError(_sentence(error)) from None
    unknown = sorted(ascii(name)[:40] for name in data if name not in FIELDS)
    views = data["images"] if request.images is not None else []
    unknown += [
        f"images[{index}].{ascii(name)[:40]}"
        for index, view in enumerate(views)
        for name in view
        if name not in ViewRequest.model_fields
    ]
    warnings = [f"Ignored unknown fields: {', '.join(unknown[:10])}."]
    return request, warnings if unknown else []


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = first["loc"]
    # images, 2, intrinsics, ...: a field of one image.
    of_image = f"images[{place[1]}]" if len(place) > 1 and place[0] == "images" else ""
    fields = place[2:] if of_image else place
    if not fields:
        told = first.get("ctx", {}).get("error")
        fault = str(told) if told else "must be an object with image_url or image_base64."
        return f"{of_image}: {fault}" if of_image and told else f"{of_image} {fault}".strip()
    name = str(fields[0])
    full = f"{of_image}.{name}" if of_image else name
    return f"{full} must be {takes(name, ViewRequest if of_image else DepthRequest)}."


def takes(name: str, model: type[BaseModel] = DepthRequest) -> str:
    """The valid values of a field in words, from its schema."""
    schema = _SCHEMA if model is DepthRequest else _SCHEMA["$defs"][model.__name__]
    return _words(schema["properties"][name])


_SCHEMA: dict[str, Any] = DepthRequest.model_json_schema()


def _words(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        schema = _SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
    if "anyOf" in schema:
        kinds = [each for each in schema["anyOf"] if each.get("type") != "null"]
        if len(kinds) > 1:
            return ", or ".join(map(_words, kinds))
        (schema,) = kinds
    if "enum" in schema:
        return "one of: " + ", ".join(schema["enum"])
    match schema["type"]:
        case "object":
            return "an object"
        case "boolean":
            return "true or false"
        case "string":
            longest = schema.get("maxLength")
            return f"text of at most {longest} characters" if longest else "text"
        case "array":
            if schema["minItems"] == schema["maxItems"]:
                return f"a list of {schema['minItems']}, each {_words(schema['items'])}"
            return f"a list of 1 to {schema['maxItems']}, each {_words(schema['items'])}"
    kind = "a whole number" if schema["type"] == "integer" else "a number"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        if schema["type"] == "integer":
            return f"{kind} from {low} to {high}"
        return f"{kind} from {low:g} to {high:g}"
    if low is not None:
        return f"{kind} from {low:g} to {schema['exclusiveMaximum'] - 1:g}"
    if "exclusiveMinimum" in schema:
        return f"{kind} over {schema['exclusiveMinimum']:g} and at most {high:.0f}"
    return kind
