"""The camera decoder: camera token -> intrinsics and extrinsics, all in FP32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from da3_runtime.network.positions import size_of


def rotation_matrix(quaternion: Tensor) -> Tensor:
    """Quaternions [B, 4], scalar last and of any length, to rotation matrices [B, 3, 3]."""
    x, y, z, w = quaternion.unbind(-1)
    s = 2.0 / torch.sum(quaternion * quaternion, dim=-1)
    rows = (
        (1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)),
        (s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)),
        (s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def world_to_camera(rotation: Tensor, translation: Tensor) -> Tensor:
    """Inverse [B, 3, 4] of the camera-to-world pose (rotation [B, 3, 3], translation [B, 3])."""
    inverse = rotation.transpose(1, 2)
    return torch.cat((inverse, -torch.matmul(inverse, translation[:, :, None])), dim=2)


def pinhole(field_of_view: Tensor, height: int, width: int) -> Tensor:
    """Intrinsics [B, 3, 3] in pixels from (vertical, horizontal) fields of view [B, 2] in radians.

    focal = (side / 2) / tan(fov / 2), principal point at the center
    (upstream's pose_encoding_to_extri_intri).
    """
    device = field_of_view.device
    half = torch.cat((size_of(height, device), size_of(width, device))) / 2
    # ONNX Runtime has no tangent on CUDA.
    angle = field_of_view / 2.0
    focal = half / torch.clamp(torch.sin(angle) / torch.cos(angle), min=1e-6)
    fy, fx = focal.unbind(-1)
    zero = torch.zeros_like(fx)
    cx, cy = zero + half[1], zero + half[0]
    rows = ((fx, zero, cx), (zero, fy, cy), (zero, zero, zero + 1))
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


class CameraDecoder(nn.Module):
    """Upstream's CameraDec and its pose decoding.

    Parameters
    ----------
    channels : int
        Width of a camera token.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU()
        )
        self.fc_t = nn.Linear(channels, 3)
        self.fc_qvec = nn.Linear(channels, 4)
        self.fc_fov = nn.Sequential(nn.Linear(channels, 2), nn.ReLU())

    def forward(self, token: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Intrinsics [B, 3, 3] (pixels of the model's input) and extrinsics [B, 3, 4]
        (world to camera) from the camera token [B, C].
        """
        hidden = self.backbone(token)
        rotation = rotation_matrix(self.fc_qvec(hidden))
        intrinsics = pinhole(self.fc_fov(hidden), height, width)
        return intrinsics, world_to_camera(rotation, self.fc_t(hidden))
