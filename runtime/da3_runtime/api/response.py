"""A prediction -> the response's fields."""

from __future__ import annotations

from collections.abc import Callable

import pybase64
from pydantic import BaseModel, ConfigDict, Field

from da3_runtime.errors import ResponseTooLargeError
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.output.encode import Encoded, Output
from da3_runtime.postprocess.depth import Prediction
from da3_runtime.variants import Head, Series, Unit

JSON = dict[str, object]

# First part of the names of an output's two fields, the file itself and the address of where it lies.
STEMS = {
    Output.PREVIEW: "image",
    Output.DEPTH_PNG16: "depth_png16",
    Output.DEPTH_NPZ: "depth_npz",
    Output.CONFIDENCE: "confidence",
    Output.SKY: "sky",
    Output.COLOR: "color",
}
_ENDINGS = {Output.DEPTH_NPZ: "npz"}
# What everything but the files may come to, in bytes.
_OVERHEAD = 4096
_WHERE = "Where it was put instead, when the response would be too large."


class CameraResponse(BaseModel):
    """The camera that the network says took the photo."""

    intrinsics: list[list[float]] = Field(description="[3, 3], pixels of the output's size.")
    extrinsics: list[list[float]] = Field(description="[3, 4], world to camera, in the depth's unit.")


class DepthResponse(BaseModel):
    """What an answer may have; what was not asked for is left out."""

    model_config = ConfigDict(title="Output")

    image_base64: str | None = Field(None, description="preview: 8-bit gray PNG, near is bright.")
    min_depth: float = Field(description="Smallest depth, in unit.")
    max_depth: float = Field(description="Largest depth, in unit.")
    head_type: str = Field(description="DualDPT, DPT or SDTHeadAdapter.")
    file_path: str | None = Field(None, description="Where the preview lies on the worker's volume.")
    unit: Unit = Field(description="What the numbers mean; relative: right up to one unknown factor.")
    is_metric: bool = Field(description="Whether unit is m.")
    focal_source: str | None = Field(
        description="Whose focal length made metres: focal_length_px, intrinsics, exif, predicted."
    )
    width: int = Field(description="Of every output, in pixels.")
    height: int = Field(description="Of every output, in pixels.")
    depth_png16_base64: str | None = Field(None, description="16-bit gray PNG; times depth_scale.")
    depth_scale: float | None = Field(None, description="What a step is worth, in unit; 0 is invalid.")
    depth_npz_base64: str | None = Field(None, description="NumPy archive, array depth, float32.")
    confidence_base64: str | None = Field(None, description="16-bit gray PNG; times confidence_scale.")
    confidence_scale: float | None = Field(None, description="What a step is worth.")
    sky_base64: str | None = Field(None, description="PNG, 255 is sky.")
    color_base64: str | None = Field(None, description="8-bit RGB PNG.")
    image_url: str | None = Field(None, description=_WHERE)
    depth_png16_url: str | None = Field(None, description=_WHERE)
    depth_npz_url: str | None = Field(None, description=_WHERE)
    confidence_url: str | None = Field(None, description=_WHERE)
    sky_url: str | None = Field(None, description=_WHERE)
    color_url: str | None = Field(None, description=_WHERE)
    camera: CameraResponse | None = Field(None, description="Null where the model has none.")
    model_id: str = Field(description="Short id of the model that answered.")
    backend: str = Field(description="What ran it.")
    precision: str = Field(description="fp32, fp16 or bf16.")
    timings_ms: dict[str, float] = Field(description="Milliseconds of each stage.")
    warnings: list[str] = Field(description="What a caller should know.")


def facts_of(prediction: Prediction, loaded: Loaded) -> JSON:
    """The fields that every response has, but timings and warnings."""
    values = prediction.depth.values
    height, width = values.shape
    return {
        "min_depth": float(values.min()),
        "max_depth": float(values.max()),
        "head_type": head_type(loaded),
        "unit": prediction.depth.unit.value,
        "is_metric": prediction.depth.unit is Unit.METRES,
        "focal_source": prediction.focal_source,
        "width": width,
        "height": height,
        "model_id": loaded.folder.variant.model_id,
        "backend": loaded.backend.name,
        "precision": loaded.backend.precision,
    }


def head_type(loaded: Loaded) -> str:
    """Class of the head as the reference service names it."""
    if loaded.folder.head is Head.SDT:
        return "SDTHeadAdapter"
    first = loaded.folder.variant.graphs[0]
    return "DualDPT" if first.series is Series.ANYVIEW else "DPT"


def outputs_of(
    encoded: list[Encoded],
    max_bytes: int | None,
    upload: Callable[[str, bytes], str] | None,
) -> JSON:
    """The fields of what was asked for.

    Parameters
    ----------
    max_bytes : int | None
        Largest response; None for any.
    upload : Callable[[str, bytes], str] | None
        Puts a file of a response that would be larger somewhere and returns its address.

    Raises
    ------
    ResponseTooLargeError
        If it would be larger and there is nowhere to put the files, naming the largest outputs.
    """
    files = [(each.output, each.file) for each in encoded if each.file is not None]
    size = _OVERHEAD + sum(_base64_size(file) for _, file in files)
    elsewhere = bool(files) and max_bytes is not None and size > max_bytes
    if max_bytes is not None and elsewhere and upload is None:
        by_size = sorted(files, key=lambda each: len(each[1]), reverse=True)
        sizes = ", ".join(f"{output} ({_base64_size(file) / 1e6:.1f} MB)" for output, file in by_size)
        raise ResponseTooLargeError(
            f"The response would have {size / 1e6:.1f} MB; the limit is {max_bytes / 1e6:.1f} MB "
            f'(MAX_RESPONSE_BYTES). Leave out some of {sizes}, or send "output_size": "model".'
        )
    told: JSON = {}
    for output, file, facts in encoded:
        told |= facts
        if output not in STEMS:
            continue
        stem = STEMS[output]
        if file is None:
            told[f"{stem}_base64"] = None
        elif elsewhere and upload is not None:
            told[f"{stem}_url"] = upload(f"{output}.{_ENDINGS.get(output, 'png')}", file)
        else:
            told[f"{stem}_base64"] = pybase64.b64encode_as_string(file)
    return told


def _base64_size(file: bytes) -> int:
    return -(-len(file) // 3) * 4
