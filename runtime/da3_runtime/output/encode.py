"""The outputs that a caller can ask for, and a prediction encoded as files.

:class:`Output` is the one table of outputs. The request's choices, the response's fields, the command
line's file names and the maps that are resized all follow from its rows.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.output.png import encode_png
from da3_runtime.output.preview import DEFAULT_TONE, Tone, color_preview, gray_preview
from da3_runtime.postprocess.camera import Camera
from da3_runtime.postprocess.depth import Prediction

_LEVELS = 65535


class Encoding(NamedTuple):
    """An output's file, or None if it has none, and the values of its facts by name."""

    file: bytes | None
    facts: Mapping[str, object] = {}


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
    """

    outputs: tuple[Output, ...]
    tone: Tone = DEFAULT_TONE
    color_map: str = "inferno"

    @property
    def maps(self) -> frozenset[str]:
        """The maps of a prediction (members of ``MAPS``) that the outputs need."""
        return frozenset(output.row.map for output in self.outputs if output.row.map is not None)


class Source:
    """Input of the encoders: a prediction and how to show it."""

    def __init__(self, prediction: Prediction, wanted: Wanted) -> None:
        self.prediction = prediction
        self.wanted = wanted

    @cached_property
    def gray(self) -> NDArray[np.uint8]:
        """The gray preview, [H, W], computed once for all outputs that show it."""
        return gray_preview(self.prediction.depth.values, self.wanted.tone)


@dataclass(frozen=True)
class Row:
    """How an output is encoded, named and described.

    Attributes
    ----------
    encode : Callable[[Source], Encoding]
        Raises SettingError for an unknown color map.
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
    """

    encode: Callable[[Source], Encoding]
    description: str = ""
    stem: str = ""
    ending: str = ""
    map: str | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict)


def _encode_camera(source: Source) -> Encoding:
    camera = source.prediction.camera
    return Encoding(None, {"camera": None if camera is None else camera.as_lists()})


def _encode_depth_png16(source: Source) -> Encoding:
    png, scale = png16(source.prediction.depth.values)
    return Encoding(png, {"depth_scale": scale})


def _encode_confidence(source: Source) -> Encoding:
    png, scale = png16(source.prediction.maps["confidence"])
    return Encoding(png, {"confidence_scale": scale})


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
    """

    output: Output
    file: bytes | None
    facts: Mapping[str, object]


def encode_outputs(prediction: Prediction, wanted: Wanted) -> Iterator[Encoded]:
    """The wanted outputs of a prediction, one after another; raises as :func:`color_preview`."""
    source = Source(prediction, wanted)
    for output in wanted.outputs:
        row = output.row
        is_missing = row.map is not None and row.map not in prediction.maps
        file, facts = Encoding(None) if is_missing else row.encode(source)
        yield Encoded(output, file, facts)


class ScaledPng(NamedTuple):
    """Numbers as a 16-bit PNG.

    Attributes
    ----------
    png : bytes
        Gray, 16 bits; 0 marks invalid pixels.
    scale : float
        Value of one step, above 0.
    """

    png: bytes
    scale: float


def png16(values: NDArray[np.float32]) -> ScaledPng:
    """Non-negative numbers [H, W] as a 16-bit PNG whose largest step is their maximum.

    Step times scale is the value, to within half a scale. Zero, negative and non-finite values become 0.
    A positive value below half a scale becomes 1, so that it stays valid.
    """
    valid = np.isfinite(values) & (values > 0)
    top = float(values[valid].max(initial=0.0))
    scale = top / _LEVELS if top > 0 else 1.0
    with np.errstate(invalid="ignore"):
        steps = np.clip(np.rint(np.where(valid, values, 0) / scale), 1, _LEVELS)
    return ScaledPng(encode_png(np.where(valid, steps, 0).astype(np.uint16)), scale)


def npz(values: NDArray[np.float32]) -> bytes:
    """A compressed NumPy archive with one array, ``depth``, float32 [H, W]."""
    stream = io.BytesIO()
    np.savez_compressed(stream, depth=values.astype(np.float32, copy=False))
    return stream.getvalue()


def sky_png(sky: NDArray[np.bool_]) -> bytes:
    """A gray 8-bit PNG of a mask [H, W]: 255 for sky, 0 elsewhere."""
    return encode_png(np.where(sky, np.uint8(255), np.uint8(0)))
