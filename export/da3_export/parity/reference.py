"""Upstream's own forward in eager FP32, with which every engine is compared."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from da3_export.parity.upstream import Upstream
from da3_runtime.network.dpt import activate
from da3_runtime.network.sdt import SDT
from da3_runtime.network.vit import IMAGENET_MEAN, IMAGENET_STD, Features
from da3_runtime.network_io import RawOutputs
from da3_runtime.variants import Graph

# Upstream's names of a graph's outputs, where they differ.
_UPSTREAM_NAMES = {"confidence": "depth_conf", "rays": "ray", "ray_confidence": "ray_conf"}


def run_reference(
    upstream: Upstream, images: NDArray[np.uint8], graph: Graph, sdt: SDT | None = None
) -> RawOutputs:
    """Run upstream's modules, one view per image, on a batch of uint8 [B, H, W, 3].

    Returns the network's raw maps. Upstream's later steps (sky, nested scaling) are outside the graphs
    too. With ``sdt``, runs upstream's backbone and camera with that head, batch norms unfolded.
    """
    from addict import Dict

    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    height, width = images.shape[1:3]
    with torch.inference_mode():
        pixels = torch.from_numpy(images).float().div(255)
        views = pixels.sub(mean).div(std).permute(0, 3, 1, 2).contiguous()[:, None]
        levels, _ = upstream.backbone(views, cam_token=None, export_feat_layers=[])
        if sdt is None:
            out = upstream._process_depth_head(levels, height, width)
        else:
            grid = (height // 14, width // 14)
            features = Features([x[:, 0] for x, _ in levels], [t[:, 0] for _, t in levels], grid)
            maps = activate(sdt(features), graph.series)
            names = [_UPSTREAM_NAMES.get(name, name) for name in graph.outputs[:2]]
            out = Dict({name: value[:, None] for name, value in zip(names, maps, strict=True)})
        # The camera step removes the rays.
        out |= upstream._process_camera_estimation(levels, height, width, Dict(out))
        values = {
            name: out[_UPSTREAM_NAMES.get(name, name)][:, 0].float().numpy() for name in graph.outputs
        }
        return RawOutputs(**values)
