"""Raw outputs -> depth with a unit, at the size of the photo."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import RawOutputs
from runtime.errors import InferenceError
from runtime.nested import align
from runtime.sky import fill_sky
from runtime.variants import Unit, Variant


@dataclass(frozen=True)
class Depth:
    """A depth map that says what its numbers mean.

    Attributes
    ----------
    values : NDArray[np.float32]
        [H, W], larger is farther.
    unit : Unit
        Metres, or relative: right up to one unknown factor.
    """

    values: NDArray[np.float32]
    unit: Unit


def depth_of(raw: dict[str, RawOutputs], index: int, variant: Variant) -> tuple[Depth, list[str]]:
    """The depth map of one image of a batch, at the model's size, and what to warn of.

    Parameters
    ----------
    raw : dict[str, RawOutputs]
        Outputs of the variant's graphs, by name.

    Raises
    ------
    InferenceError
        If an output holds anything but finite numbers.
    """
    outputs = [raw[graph.name] for graph in variant.graphs]
    for values in (value for graph in outputs for value in graph if value is not None):
        if not np.isfinite(values[index]).all():
            raise InferenceError("The network gave an output that is not finite.")
    first = outputs[0]
    if len(outputs) > 1:
        return _nested_depth(first, outputs[1], index, variant)
    values = first.depth[index]
    if first.sky is not None:
        values = fill_sky(values, first.sky[index])
    return Depth(values, variant.unit), []


def _nested_depth(
    anyview: RawOutputs, metric: RawOutputs, index: int, variant: Variant
) -> tuple[Depth, list[str]]:
    assert anyview.confidence is not None
    assert anyview.intrinsics is not None
    assert anyview.extrinsics is not None
    assert metric.sky is not None
    assert variant.canonical_focal is not None
    intrinsics = anyview.intrinsics[index]
    aligned = align(
        anyview.depth[index],
        anyview.confidence[index],
        anyview.extrinsics[index],
        metric.depth[index],
        metric.sky[index],
        focal=float(intrinsics[0, 0] + intrinsics[1, 1]) / 2,
        canonical_focal=variant.canonical_focal,
    )
    return Depth(aligned.depth, variant.unit if aligned.metric else Unit.RELATIVE), aligned.warnings


def resize_depth(depth: Depth, width: int, height: int) -> Depth:
    """``depth`` resized bilinearly to ``width`` x ``height``."""
    if depth.values.shape == (height, width):
        return depth
    values = cv2.resize(depth.values, (width, height), interpolation=cv2.INTER_LINEAR)
    return Depth(np.asarray(values, dtype=np.float32), depth.unit)
