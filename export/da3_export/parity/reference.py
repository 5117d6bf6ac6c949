"""Upstream's own forward in eager FP32, with which every engine is compared."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from da3_export.parity.cases import Cameras
from da3_export.parity.upstream import Upstream
from da3_runtime.network.dpt import activate
from da3_runtime.network.reference import unbalance
from da3_runtime.network.sdt import SDT
from da3_runtime.network.vit import IMAGENET_MEAN, IMAGENET_STD, Features
from da3_runtime.network_io import Conditions, RawOutputs
from da3_runtime.postprocess.poses import encode_poses
from da3_runtime.variants import Graph

# Rounding to FP16 moves a view's measures by about this much (da3-nano).
CLEAR_MARGIN = 0.05
# Upstream's names of a graph's outputs, where they differ.
_UPSTREAM_NAMES = {"confidence": "depth_conf", "rays": "ray", "ray_confidence": "ray_conf"}


class Reference(NamedTuple):
    """Upstream's outputs for a case.

    Attributes
    ----------
    outputs : RawOutputs
        The network's raw maps. Upstream's later steps (sky, nested scaling) are outside the graphs too.
    margin : float
        How clearly upstream chose the reference view of each scene, the least over the batch: by how
        much :func:`unbalance` of the second best view exceeds that of the best. Infinite without a
        choice.
    cameras : Cameras | None
        The known cameras of the batch's first scene.
    """

    outputs: RawOutputs
    margin: float = math.inf
    cameras: Cameras | None = None

    @property
    def is_forced(self) -> bool:
        """Whether engines are given the reference views, because upstream's choice is not clear.

        Another choice is another frame and other depths, which says nothing of the rest of the network.
        """
        return self.margin < CLEAR_MARGIN

    def conditions(self, is_forced: bool = False) -> Conditions:
        """What engines are given beside the images.

        Parameters
        ----------
        is_forced : bool
            Whether they are given the reference views even where upstream's choice is clear.
        """
        scenes, views = self.outputs.depth.shape[:2]
        reference, poses = Conditions.none(scenes, views)
        if (is_forced or self.is_forced) and self.outputs.reference is not None:
            reference = self.outputs.reference
        if self.cameras is not None:
            poses[0] = encode_poses(*self.cameras, *self.outputs.depth.shape[2:])
        return Conditions(reference, poses)


def run_reference(
    upstream: Upstream,
    images: NDArray[np.uint8],
    graph: Graph,
    sdt: SDT | None = None,
    cameras: Cameras | None = None,
) -> Reference:
    """Run upstream's modules on a batch of scenes, uint8 [B, S, H, W, 3].

    Parameters
    ----------
    sdt : SDT | None
        Head to run on upstream's backbone and camera, batch norms unfolded.
    cameras : Cameras | None
        Known cameras of the first scene. Upstream takes those of all scenes of a batch or of none, so
        the first scene runs alone.
    """
    if cameras is None:
        return _run(upstream, images, graph, sdt)
    parts = [_run(upstream, images[:1], graph, sdt, cameras)]
    if len(images) > 1:
        parts.append(_run(upstream, images[1:], graph, sdt))
    outputs = RawOutputs.joined([part.outputs for part in parts])
    return Reference(outputs, min(part.margin for part in parts), cameras)


def _run(
    upstream: Upstream,
    images: NDArray[np.uint8],
    graph: Graph,
    sdt: SDT | None,
    cameras: Cameras | None = None,
) -> Reference:
    from addict import Dict

    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    scenes, views, height, width, _ = images.shape
    with torch.inference_mode():
        pixels = torch.from_numpy(images).float().div(255)
        normalized = pixels.sub(mean).div(std).permute(0, 1, 4, 2, 3).contiguous()
        known = [torch.from_numpy(each).float()[None] for each in cameras or ()]
        tokens = upstream.cam_enc(*known, (height, width)) if known else None
        with _recorded_choice() as choice:
            levels, _ = upstream.backbone(normalized, cam_token=tokens, export_feat_layers=[])
        if sdt is None:
            out = upstream._process_depth_head(levels, height, width)
        else:
            grid = (height // 14, width // 14)
            flat = Features(
                [x.flatten(0, 1) for x, _ in levels], [t.flatten(0, 1) for _, t in levels], grid
            )
            maps = (each.unflatten(0, (scenes, views)) for each in activate(sdt(flat), graph.series))
            names = [_UPSTREAM_NAMES.get(name, name) for name in graph.outputs[:2]]
            out = Dict(dict(zip(names, maps, strict=True)))
        # The camera step removes the rays.
        out |= upstream._process_camera_estimation(levels, height, width, Dict(out))
        out.reference = choice[0][1] if choice else torch.zeros(scenes, dtype=torch.int64)
        values = {name: out[_UPSTREAM_NAMES.get(name, name)].numpy() for name in graph.outputs}
        margin = _margin(choice[0]) if choice else math.inf
        return Reference(RawOutputs(**values), margin, cameras)


def _margin(choice: tuple[Tensor, Tensor]) -> float:
    best, second = unbalance(choice[0]).sort(dim=1).values[:, :2].unbind(1)
    return float((second - best).min())


@contextmanager
def _recorded_choice() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record the class tokens [B, S, C] that upstream chooses reference views by, and its choice [B]."""
    from depth_anything_3.model.dinov2 import vision_transformer

    select = vision_transformer.select_reference_view
    made: list[tuple[Tensor, Tensor]] = []

    def recorded(x: Tensor, strategy: str) -> Tensor:
        chosen: Tensor = select(x, strategy=strategy)
        made.append((x[:, :, 0], chosen))
        return chosen

    vision_transformer.select_reference_view = recorded
    try:
        # Upstream prints that it chooses.
        with redirect_stdout(io.StringIO()):
            yield made
    finally:
        vision_transformer.select_reference_view = select
