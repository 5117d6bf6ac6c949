"""One graph for one photo and for several of a scene: uint8 pixels in, maps and cameras out."""

from __future__ import annotations

from torch import Tensor, nn

from da3_runtime.network.camera_decoder import CameraDecoder
from da3_runtime.network.camera_encoder import CameraEncoder
from da3_runtime.network.dpt import DPTHead
from da3_runtime.network.precision import FP32, Precision, cast_weights
from da3_runtime.network.sdt import SDT, SDTHead
from da3_runtime.network.sizes import Sizes
from da3_runtime.network.vit import Block, Features, KnownCameras, VisionTransformer
from da3_runtime.variants import PATCH, Graph, Series


class Backbone(nn.Module):
    """The vision transformer under upstream's name for it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.pretrained = VisionTransformer(sizes)

    def forward(
        self, images: Tensor, wanted: Tensor | None = None, known: KnownCameras | None = None
    ) -> Features:
        """Features of scenes; as :meth:`VisionTransformer.forward`."""
        features: Features = self.pretrained(images, wanted, known)
        return features


class DepthNetwork(nn.Module):
    """A DA3 network as a function of one batch of scenes.

    A new network is in FP32 and eval mode, has random weights, and has every tensor of a checkpoint, by
    upstream's names and shapes. :meth:`for_inference` keeps only what its graph reads.

    Parameters
    ----------
    sizes : Sizes
        Size of the network.
    graph : Graph
        Which outputs it computes. May be changed to the same network's graph with or without rays.
    """

    def __init__(self, sizes: Sizes, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.precision = FP32
        self.backbone = Backbone(sizes)
        self.head: DPTHead | SDTHead = DPTHead(sizes, graph.series)
        if graph.series is Series.ANYVIEW:
            self.cam_dec = CameraDecoder(sizes.feature_width)
            self.cam_enc = CameraEncoder(sizes)
        self.eval().requires_grad_(False)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs of :meth:`forward`."""
        return self.graph.outputs

    def fold_layer_scales(self) -> None:
        """Fold the layer scales of all blocks into weights, before they are cast."""
        for block in [module for module in self.modules() if isinstance(module, Block)]:
            block.fold_layer_scales()

    def for_inference(self, precision: Precision, sdt: SDT | None = None) -> DepthNetwork:
        """Drop the parts that the graph does not read and cast the rest, in place.

        Parameters
        ----------
        precision : Precision
            Dtypes of the two halves.
        sdt : SDT | None
            Head to use in place of the DPT head; changed in place.

        Returns
        -------
        DepthNetwork
            This network.
        """
        self.precision = precision
        if self.graph.series is Series.ANYVIEW:
            cast_weights(self.cam_enc.trunk, precision.backbone)
        if sdt is not None:
            self.head = SDTHead(sdt, self.graph.series)
        elif isinstance(self.head, DPTHead):
            self.head.drop_unused(self.graph.rays)
        cast_weights(self.backbone, precision.backbone)
        cast_weights(self.head, precision.head)
        return self

    def forward(
        self, images: Tensor, wanted_reference: Tensor | None = None, poses: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Maps and cameras of a batch of scenes.

        Parameters
        ----------
        images : Tensor
            uint8 [B, S, H, W, 3], RGB, H and W multiples of 14. A photo is a scene of one view.
        wanted_reference : Tensor | None
            Index of the view that each scene's cameras refer to, or :data:`CHOOSE`, int64 [B]; None
            chooses for all. Any-view networks only.
        poses : Tensor | None
            Encodings of known cameras, FP32 [B, S, 9], as ``postprocess/poses.py`` makes them; zeros for
            a scene whose cameras are unknown. None knows none. Any-view networks only.

        Returns
        -------
        tuple[Tensor, ...]
            FP32, in the order of :attr:`output_names`. Any-view: ``depth`` and ``confidence``
            [B, S, H, W], ``intrinsics`` [B, S, 3, 3] in pixels of the input, ``extrinsics``
            [B, S, 3, 4] world to camera, and ``reference``, int64 [B]. Monocular: ``depth`` and ``sky``
            [B, S, H, W]. With the ray branch also ``rays`` [B, S, 8 grid_h, 8 grid_w, 6] and
            ``ray_confidence`` [B, S, 8 grid_h, 8 grid_w].
        """
        scenes, views = images.shape[:2]
        known = None if poses is None else self.cam_enc(poses)
        features = self.backbone(images, wanted_reference, known)
        # Only the DPT head has rays.
        maps = self.head(features, True) if self.graph.rays else self.head(features)
        if self.graph.series is Series.ANYVIEW:
            grid_h, grid_w = features.grid
            camera = self.cam_dec(features.tokens[-1], grid_h * PATCH, grid_w * PATCH)
            maps = (*maps[:2], *camera, *maps[2:])
        outputs = [each.reshape(scenes, views, *each.shape[1:]) for each in maps]
        if features.reference is not None:
            outputs.insert(self.output_names.index("reference"), features.reference)
        return tuple(outputs)
