"""The camera encoder: known poses of a scene's views -> their camera tokens (upstream's CameraEnc)."""

from __future__ import annotations

from torch import Tensor, nn

from da3_runtime.network.precision import full, norm
from da3_runtime.network.sizes import Sizes
from da3_runtime.network.vit import MLP, Block, KnownCameras
from da3_runtime.network_io import POSE_ENCODING, POSE_FOV

_HEADS = 16
_EPS = 1e-5  # of its LayerNorms: PyTorch's default, unlike the backbone's
_INITIAL_SCALE = 0.01


class CameraEncoder(nn.Module):
    """Upstream's CameraEnc: a small transformer over the views of a scene, without positions.

    Parameters
    ----------
    sizes : Sizes
        Size of the network.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.trunk = nn.Sequential(
            *(
                Block(width, _HEADS, initial_scale=_INITIAL_SCALE, eps=_EPS)
                for _ in range(sizes.encoder_depth)
            )
        )
        self.token_norm = nn.LayerNorm(width)
        self.trunk_norm = nn.LayerNorm(width)
        self.pose_branch = MLP(POSE_ENCODING, width // 2, width)

    def forward(self, poses: Tensor) -> KnownCameras:
        """Camera tokens from pose encodings, FP32 [B, S, 9].

        A field of view is never zero, so a scene of zeros is one without known poses.
        """
        tokens = norm(self.token_norm, full(self.pose_branch(poses)))
        tokens = norm(self.trunk_norm, self.trunk(tokens))
        return KnownCameras(tokens, poses[:, 0, POSE_FOV] > 0)
