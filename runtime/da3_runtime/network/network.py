"""One graph for one image per batch entry: uint8 pixels in, maps and camera out."""

from __future__ import annotations

from torch import Tensor, nn

from da3_runtime.network import Upstream
from da3_runtime.network.camera_decoder import CameraDecoder
from da3_runtime.network.dpt import DPTHead
from da3_runtime.network.precision import Precision
from da3_runtime.network.sdt import SDT, SDTHead
from da3_runtime.network.vit import PATCH, Backbone
from da3_runtime.variants import Graph, Series


class DepthNetwork(nn.Module):
    """An upstream DepthAnything3Net as a function of one uint8 image batch.

    Takes ownership of the modules it is given: their weights are cast in place to ``precision``.

    Parameters
    ----------
    upstream : Upstream
        ``DepthAnything3Net`` with weights loaded, in FP32.
    graph : Graph
        Which of a variant's networks it is.
    precision : Precision
        Dtypes of the two halves.
    sdt : SDT | None
        Head to use in place of upstream's.

    Attributes
    ----------
    output_names : tuple[str, ...]
        Names of what :meth:`forward` returns.
    """

    def __init__(
        self, upstream: Upstream, graph: Graph, precision: Precision, sdt: SDT | None = None
    ) -> None:
        super().__init__()
        self.precision = precision
        self.output_names = graph.outputs
        series = graph.series
        dinov2 = upstream.backbone
        self.backbone = Backbone(dinov2.pretrained, dinov2.out_layers, precision.backbone)
        self.head: nn.Module
        if sdt is None:
            self.head = DPTHead(upstream.head, series, precision.head, graph.rays)
        else:
            self.head = SDTHead(sdt, series, precision.head)
        self.camera = CameraDecoder(upstream.cam_dec) if series is Series.ANYVIEW else None
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps and camera of a batch.

        Parameters
        ----------
        images : Tensor
            uint8 [B, H, W, 3], RGB, H and W multiples of 14.

        Returns
        -------
        tuple[Tensor, ...]
            FP32, as :attr:`output_names` says. Any-view: ``depth`` and ``confidence`` [B, H, W],
            ``intrinsics`` [B, 3, 3] in pixels of the input, ``extrinsics`` [B, 3, 4] world to camera.
            Monocular: ``depth`` and ``sky`` [B, H, W]. With the ray branch also ``rays``
            [B, 8 grid_h, 8 grid_w, 6] and ``ray_confidence`` [B, 8 grid_h, 8 grid_w].
        """
        features = self.backbone(images)
        depth, other, *rays = self.head(features)
        if self.camera is None:
            return depth, other
        grid_h, grid_w = features.grid
        camera = self.camera(features.tokens[-1], grid_h * PATCH, grid_w * PATCH)
        return depth, other, *camera, *rays
