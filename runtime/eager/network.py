"""The whole network for one image per batch entry: uint8 pixels in, depth and camera out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from runtime.eager import Upstream
from runtime.eager.camera import Camera
from runtime.eager.dpt import DualDPTDepth
from runtime.eager.precision import Precision
from runtime.eager.vit import PATCH, Backbone


class Outputs(NamedTuple):
    """The engine's outputs, all FP32; the field names are the graph's output names."""

    depth: Tensor
    confidence: Tensor
    intrinsics: Tensor
    extrinsics: Tensor


class DepthNetwork(nn.Module):
    """An upstream DepthAnything3Net as a function of one uint8 image batch.

    Takes ownership of ``upstream``'s modules: their weights are cast in place to ``precision``.

    Parameters
    ----------
    upstream : Upstream
        ``DepthAnything3Net`` with weights loaded, in FP32.
    precision : Precision
        Dtypes of the two halves.
    """

    def __init__(self, upstream: Upstream, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        dinov2 = upstream.backbone
        self.backbone = Backbone(dinov2.pretrained, dinov2.out_layers, precision.backbone)
        self.head = DualDPTDepth(upstream.head, precision.head)
        self.camera = Camera(upstream.cam_dec)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Outputs:
        """Depth and camera of a batch.

        Parameters
        ----------
        images : Tensor
            uint8 [B, H, W, 3], RGB, H and W multiples of 14.

        Returns
        -------
        Outputs
            ``depth`` and ``confidence`` [B, H, W], ``intrinsics`` [B, 3, 3] in pixels of the input,
            ``extrinsics`` [B, 3, 4] world to camera.
        """
        features = self.backbone(images)
        depth, confidence = self.head(features)
        grid_h, grid_w = features.grid
        intrinsics, extrinsics = self.camera(features.camera, grid_h * PATCH, grid_w * PATCH)
        return Outputs(depth, confidence, intrinsics, extrinsics)
