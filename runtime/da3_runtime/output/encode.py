"""The outputs that a caller can ask for, and a prediction encoded as files.

:class:`Output` is the one table of outputs. The request's choices, the response's fields, the command
line's file names and the maps that are resized all follow from its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import OutputError
from da3_runtime.output.colmap import colmap
from da3_runtime.output.glb import glb
from da3_runtime.output.maps import (
    FARTHEST,
    exr,
    npz,
    png16,
    png_of_millimeters,
    scene_npz,
    sky_png,
    tiff,
)
from da3_runtime.output.ply import ply
from da3_runtime.output.png import encode_png
from da3_runtime.output.preview import DEFAULT_TONE, Levels, Tone, color_preview, gray_preview
from da3_runtime.postprocess.camera import Camera
from da3_runtime.postprocess.depth import Prediction, Seen
from da3_runtime.postprocess.points import DEFAULT_POINTS, Cloud, PointOptions, cloud_of
from da3_runtime.variants import Unit


class Encoding(NamedTuple):
    """An output's file, or None if it has none, and the values of its facts by name."""

    file: bytes | None
    facts: Mapping[str, object] = {}
    warnings: Sequence[str] = ()


class DepthUnit(StrEnum):
    """Unit of the steps of the output depth_png16."""

    AUTO = "auto"
    MM = "mm"


class Fact(NamedTuple):
    """A field of the response beside a file: its type and its description for API users."""

    type: type
    description: str


@dataclass(frozen=True)
class Wanted:
    """What to encode of a prediction.

    Attributes
    ----------
    outputs : tuple[Output, ...]
        Without repetitions, in the order they are returned.
    tone, color_map : Tone, str
        Tone and color map of the previews; the color map is a key of ``COLOR_MAPS``.
    depth_unit : DepthUnit
        Unit of the steps of depth_png16: the depth's range in 65535 steps, or millimeters.
    points : PointOptions
        Which pixels become points.
    cameras : bool
        Whether the GLB file has the cameras too.
    levels : Levels | None
        Gray levels of the previews, such as those of a whole film; None to fit ``tone`` to each image.
    """

    outputs: tuple[Output, ...]
    tone: Tone = DEFAULT_TONE
    color_map: str = "inferno"
    depth_unit: DepthUnit = DepthUnit.AUTO
    points: PointOptions = DEFAULT_POINTS
    cameras: bool = True
    levels: Levels | None = None

    @property
    def maps(self) -> frozenset[str]:
        """The maps of a prediction (members of ``MAPS``) that the outputs need."""
        return frozenset(output.row.map for output in self.outputs if output.row.map is not None)

    def only(self, *, of_scene: bool) -> Wanted:
        """The same without the outputs of each photo, or without those of the whole scene."""
        return replace(
            self, outputs=tuple(each for each in self.outputs if each.row.of_scene is of_scene)
        )


class Source:
    """Input of the encoders: predictions and how to show them.

    Parameters
    ----------
    predictions : Sequence[Prediction]
        One, or for outputs of a scene all of its views.
    wanted : Wanted
        How to show them.
    names : Sequence[str]
        File name of each photo.
    """

    def __init__(self, predictions: Sequence[Prediction], wanted: Wanted, names: Sequence[str]) -> None:
        self.prediction = predictions[0]
        self.wanted = wanted
        self.names = names
        self._predictions = predictions

    @property
    def unit(self) -> Unit:
        """Unit of depth, and of all points."""
        return self.prediction.depth.unit

    @cached_property
    def views(self) -> list[Seen]:
        """What the network saw of each photo."""
        seen = [each.seen for each in self._predictions]
        return [each for each in seen if each is not None]

    @cached_property
    def cloud(self) -> Cloud:
        """The points, found once for all outputs that have them."""
        return cloud_of(self.views, self.wanted.points)

    @cached_property
    def gray(self) -> NDArray[np.uint8]:
        """The gray preview, [H, W], computed once for all outputs that show it."""
        depth, levels = self.prediction.depth.values, self.wanted.levels
        return gray_preview(depth, self.wanted.tone) if levels is None else levels.gray(depth)


@dataclass(frozen=True)
class Row:
    """How an output is encoded, named and described.

    Attributes
    ----------
    encode : Callable[[Source], Encoding]
        Raises SettingError for an unknown color map, and OutputError if it cannot be made of the depth.
    description : str
        Description of the file for API users; empty if the output has no file.
    stem : str
        Start of the file's two response fields, ``{stem}_base64`` and ``{stem}_url``.
    ending : str
        End of the file's name on the command line.
    map : str | None
        The member of ``MAPS`` that it shows. It has no file for a model that lacks this map.
    facts : Mapping[str, Fact]
        Response fields of its own, beside those of the file.
    of_scene : bool
        Whether several photos of a scene have one of it together.
    """

    encode: Callable[[Source], Encoding]
    description: str = ""
    stem: str = ""
    ending: str = ""
    map: str | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict)
    of_scene: bool = False


def _encode_camera(source: Source) -> Encoding:
    camera = source.prediction.camera
    return Encoding(None, {"camera": None if camera is None else camera.as_lists()})


def _encode_depth_png16(source: Source) -> Encoding:
    depth = source.prediction.depth.values
    if source.wanted.depth_unit is DepthUnit.AUTO:
        png, scale = png16(depth)
        return Encoding(png, {"depth_scale": scale})
    if source.unit is not Unit.METERS:
        raise OutputError(
            f"depth_unit mm needs depth in meters, and the unit of this depth is {source.unit}: choose "
            "a metric model and send focal_length_px, or leave depth_unit out."
        )
    png, beyond = png_of_millimeters(depth)
    warnings = [
        f"{beyond:.1%} of the pixels are farther than {FARTHEST} m, the most that "
        "depth_png16 holds in mm: they are 0, as invalid ones."
    ]
    return Encoding(png, {"depth_scale": 0.001}, warnings if beyond else ())


def _encode_confidence(source: Source) -> Encoding:
    png, scale = png16(source.prediction.maps["confidence"])
    return Encoding(png, {"confidence_scale": scale})


def _encode_glb(source: Source) -> Encoding:
    cloud, cameras = source.cloud, source.wanted.cameras
    return Encoding(glb(cloud, source.views, source.names, source.unit, cameras))


def _encode_sky(source: Source) -> Encoding:
    return Encoding(sky_png(source.prediction.maps["sky"]))


class Output(StrEnum):
    """What a caller can ask for, in the order of the response's fields."""

    row: Row

    def __new__(cls, name: str, row: Row) -> Output:
        member = str.__new__(cls, name)
        member._value_ = name
        member.row = row
        return member

    PREVIEW = (
        "preview",
        Row(
            lambda source: Encoding(encode_png(source.gray)),
            "Gray preview of inverse depth, near is bright: PNG, 8 bits, in Base64. It is for viewing; "
            "depth_png16 and depth_npz have the numbers.",
            stem="image",
            ending=".png",
        ),
    )
    DEPTH_PNG16 = (
        "depth_png16",
        Row(
            _encode_depth_png16,
            "Depth: gray PNG, 16 bits, in Base64. Multiply its values by depth_scale to get depth in "
            "unit; 0 marks invalid pixels. Larger is farther.",
            stem="depth_png16",
            ending=".depth.png",
            facts={
                "depth_scale": Fact(
                    float,
                    "Depth of one step of depth_png16, in unit, above 0.",
                )
            },
        ),
    )
    DEPTH_NPZ = (
        "depth_npz",
        Row(
            lambda source: Encoding(npz(source.prediction.depth.values)),
            "Depth: compressed NumPy archive in Base64 with one array, depth, float32 [height, width], "
            "in unit. Larger is farther.",
            stem="depth_npz",
            ending=".depth.npz",
        ),
    )
    CONFIDENCE = (
        "confidence",
        Row(
            _encode_confidence,
            "Confidence of the depth: gray PNG, 16 bits, in Base64. Multiply its values by "
            "confidence_scale to get numbers from 1 up; larger is surer. Null if the model predicts no "
            "confidence.",
            stem="confidence",
            ending=".confidence.png",
            map="confidence",
            facts={
                "confidence_scale": Fact(
                    float,
                    "Confidence of one step of its PNG, without a unit, above 0.",
                )
            },
        ),
    )
    SKY = (
        "sky",
        Row(
            _encode_sky,
            "Sky mask: gray PNG, 8 bits, in Base64; 255 is sky, 0 is not. Null if the model predicts "
            "no sky.",
            stem="sky",
            ending=".sky.png",
            map="sky",
        ),
    )
    CAMERA = (
        "camera",
        Row(
            _encode_camera,
            facts={
                "camera": Fact(
                    Camera,
                    "The camera. Null if the model predicts none and no focal length was used.",
                )
            },
        ),
    )
    COLOR = (
        "color",
        Row(
            lambda source: Encoding(encode_png(color_preview(source.gray, source.wanted.color_map))),
            "The preview through color_map: RGB PNG, 8 bits per channel, in Base64.",
            stem="color",
            ending=".color.png",
        ),
    )
    DEPTH_TIFF = (
        "depth_tiff",
        Row(
            lambda source: Encoding(tiff(source.prediction.depth.values, source.unit)),
            "Depth: TIFF in Base64, float32, in unit. Larger is farther.",
            stem="depth_tiff",
            ending=".depth.tiff",
        ),
    )
    DEPTH_EXR = (
        "depth_exr",
        Row(
            lambda source: Encoding(exr(source.prediction.depth.values)),
            "Depth: OpenEXR image in Base64, one channel Y, float32, in unit. Larger is farther.",
            stem="depth_exr",
            ending=".depth.exr",
        ),
    )
    GLB = (
        "glb",
        Row(
            _encode_glb,
            "Colored points and the cameras of all images: GLB (binary glTF 2.0, y up) in Base64, in "
            "unit. Needs a camera.",
            stem="glb",
            ending=".glb",
            of_scene=True,
        ),
    )
    PLY = (
        "ply",
        Row(
            lambda source: Encoding(ply(source.cloud, source.unit)),
            "Colored points of all images, with confidence if the model predicts it: binary PLY in "
            "Base64, in unit, x right, y down, z forward. Needs a camera.",
            stem="ply",
            ending=".ply",
            of_scene=True,
        ),
    )
    COLMAP = (
        "colmap",
        Row(
            lambda source: Encoding(colmap(source.cloud, source.views, source.names)),
            "COLMAP's binary sparse model of all images, in pixels of the images: ZIP archive in "
            "Base64. Needs a camera.",
            stem="colmap",
            ending=".colmap.zip",
            of_scene=True,
        ),
    )
    SCENE_NPZ = (
        "scene_npz",
        Row(
            lambda source: Encoding(scene_npz(source.views)),
            "What the network saw and returned for all images, at its own size, under upstream's names: "
            "compressed NumPy archive in Base64 with image, uint8 [N, h, w, 3], depth and conf, float32 "
            "[N, h, w], intrinsics [N, 3, 3] and extrinsics [N, 3, 4].",
            stem="scene_npz",
            ending=".scene.npz",
            of_scene=True,
        ),
    )


@dataclass(frozen=True)
class Encoded:
    """One output of a prediction.

    Attributes
    ----------
    output : Output
        The output.
    file : bytes | None
        A PNG or a NumPy archive; None if the output has no file or the model lacks its map.
    facts : Mapping[str, object]
        Values of the output's facts by name.
    warnings : Sequence[str]
        Sentences for the caller.
    """

    output: Output
    file: bytes | None
    facts: Mapping[str, object]
    warnings: Sequence[str]


def name_of(index: int) -> str:
    """The name that files of points give to a photo whose own name is not known."""
    return f"{index:04d}.jpg"


def encode_outputs(
    predictions: Prediction | Sequence[Prediction], wanted: Wanted, names: Sequence[str] = ()
) -> Iterator[Encoded]:
    """The wanted outputs of a prediction, one after another.

    Parameters
    ----------
    predictions : Prediction | Sequence[Prediction]
        A photo's; or those of all views, for outputs of a whole scene.
    wanted : Wanted
        The outputs.
    names : Sequence[str]
        File name of each photo; empty if they are not known.

    Raises
    ------
    SettingError
        As :func:`color_preview`.
    OutputError
        If an output cannot be made of the depth; the message says why.
    """
    if isinstance(predictions, Prediction):
        predictions = [predictions]
    names = names or [name_of(index) for index in range(len(predictions))]
    source = Source(predictions, wanted, names)
    for output in wanted.outputs:
        row = output.row
        is_missing = row.map is not None and row.map not in source.prediction.maps
        yield Encoded(output, *(Encoding(None) if is_missing else row.encode(source)))
