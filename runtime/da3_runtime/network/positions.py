"""Positional terms as functions of the patch grid, written so that height and width stay dynamic.

Upstream caches these tables per shape or computes them through Python numbers, which a trace freezes
into constants. Here every table is arithmetic on the grid's size. All tables are FP32.

In an exported graph shapes are known on the host, so a size that takes part in arithmetic would be
copied to the device in the middle of the network (and ONNX Runtime captures no CUDA graph of that).
:func:`size_of` takes it from a sequence that the device makes itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import device as Device

from da3_runtime.network.precision import full

CUBIC_A = -0.75  # PyTorch's bicubic coefficient (aten UpSample.h, cubic_convolution1/2)
INTERPOLATE_OFFSET = 0.1  # DinoVisionTransformer.interpolate_offset
ROPE_BASE = 100.0  # DinoVisionTransformer rope_freq
UV_BASE = 100.0  # position_grid_to_embed omega_0
UV_RATIO = 0.1  # DualDPT._add_pos_embed ratio


def _sequence(n: int, device: Device) -> Tensor:
    """0, 1, ..., n-1 as float32 [n]."""
    return torch.arange(n, dtype=torch.float32, device=device)


def size_of(n: int, device: Device) -> Tensor:
    """The (possibly symbolic) integer ``n`` as a float tensor of shape [1]."""
    return _sequence(n, device)[-1:] + 1


def bicubic_matrix(out_size: int, in_size: int, scale: Tensor) -> Tensor:
    """Matrix [out_size, in_size] of a 1-D bicubic resize by ``scale``, as PyTorch computes it.

    ``interpolate(mode="bicubic", scale_factor=scale, align_corners=False, antialias=False)`` along one
    axis is this matrix times the input: source coordinate (i + 0.5) / scale - 0.5, four taps of the
    cubic convolution kernel, indices clamped at the border.
    """
    device = scale.device
    source = (_sequence(out_size, device) + 0.5) / scale - 0.5
    base = torch.floor(source)
    taps = torch.arange(-1, 3, dtype=torch.float32, device=device)
    index = base[:, None] + taps  # [out, 4]
    distance = torch.abs(source[:, None] - index)
    near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance * distance + 1
    far = ((CUBIC_A * distance - 5 * CUBIC_A) * distance + 8 * CUBIC_A) * distance - 4 * CUBIC_A
    weight = torch.where(distance <= 1, near, far)
    hit = torch.clamp(index, 0, in_size - 1)[:, :, None] == _sequence(in_size, device)
    return torch.sum(weight[:, :, None] * hit.to(torch.float32), dim=1)


def patch_position_embedding(table: Tensor, grid_h: int, grid_w: int) -> Tensor:
    """The learned patch positions [1, M*M, C] resized to the grid, [1, grid_h*grid_w, C].

    Follows DinoVisionTransformer.interpolate_pos_encoding: scale (side + 0.1) / M, except on the
    table's own M x M grid, where upstream returns the table untouched. With the offset set to zero
    there the scale is one and the bicubic matrices are exact identities.
    """
    count, channels = table.shape[1], table.shape[2]
    side = round(count**0.5)
    h, w = size_of(grid_h, table.device), size_of(grid_w, table.device)
    native = ((h == side) & (w == side)).to(torch.float32)
    offset = INTERPOLATE_OFFSET * (1 - native)
    rows = bicubic_matrix(grid_h, side, (h + offset) / side)
    columns = bicubic_matrix(grid_w, side, (w + offset) / side)
    resized = torch.matmul(rows, full(table).reshape(side, side * channels))
    resized = resized.reshape(grid_h, side, channels)
    return torch.matmul(columns, resized).reshape(1, grid_h * grid_w, channels)


def rotary_angles(rows: Tensor, columns: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cos and sin of the angle by which each pair of a head's channels rotates, [n, head_dim / 2] each.

    The first half of the pairs rotates with the token's row, the second with its column; both are [n]
    (RotaryPositionEmbedding2D).
    """
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, dtype=torch.float32, device=rows.device) / half
    frequency = 1.0 / ROPE_BASE**exponent
    angle = torch.cat((rows[:, None] * frequency, columns[:, None] * frequency), dim=1)
    return torch.cos(angle), torch.sin(angle)


def token_positions(grid_h: int, grid_w: int, device: Device) -> tuple[Tensor, Tensor]:
    """Row and column of every token, [1 + grid_h*grid_w] each.

    The camera token sits at 0, patches count from 1 (DinoVisionTransformer._prepare_rope).
    """
    special = torch.zeros(1, device=device)
    rows = (_sequence(grid_h, device) + 1)[:, None].expand(grid_h, grid_w).reshape(-1)
    columns = (_sequence(grid_w, device) + 1)[None, :].expand(grid_h, grid_w).reshape(-1)
    return torch.cat((special, rows)), torch.cat((special, columns))


def paired_order(head_dim: int) -> list[int]:
    """Upstream's channels of a head in the order in which the partners of a pair are half a head apart.

    Upstream's quarters are the first and second partners of the row's pairs, then those of the column's.
    """
    quarter = head_dim // 4
    starts = (0, 2 * quarter, quarter, 3 * quarter)
    return [start + channel for start in starts for channel in range(quarter)]


def rotary_tables(cos: Tensor, sin: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """Cos and signed sin for every channel [n, head_dim], which :func:`rotate` takes.

    Parameters
    ----------
    cos, sin : Tensor
        As :func:`rotary_angles` gives them.
    paired : bool
        Whether the channels are in :func:`paired_order`, or as upstream has them.
    """
    if paired:
        return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)
    (row_cos, column_cos), (row_sin, column_sin) = cos.chunk(2, dim=1), sin.chunk(2, dim=1)
    cosines = torch.cat((row_cos, row_cos, column_cos, column_cos), dim=1)
    return cosines, torch.cat((-row_sin, row_sin, -column_sin, column_sin), dim=1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor, paired: bool) -> Tensor:
    """Rotate query or key heads [B, heads, tokens, head_dim].

    A pair (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    halves = torch.chunk(x, 2, dim=-1)
    # Upstream has a rotation of its own in each half.
    pairs = [halves] if paired else [torch.chunk(half, 2, dim=-1) for half in halves]
    partners = [part for a, b in pairs for part in (b, a)]
    return x * cos + torch.cat(partners, dim=-1) * signed_sin


def _uv_axis(n: int, span: Tensor, channels: int) -> Tensor:
    """Sine-cosine embedding [n, channels] of n pixel centers spread over [-span, span]."""
    size = size_of(n, span.device)
    position = span * (2 * _sequence(n, span.device) - (size - 1)) / size
    exponent = torch.arange(channels // 2, dtype=torch.float32, device=span.device) / (channels / 2.0)
    angle = position[:, None] * (1.0 / UV_BASE**exponent)
    return torch.cat((torch.sin(angle), torch.cos(angle)), dim=1)


def uv_embedding(height: int, width: int, channels: int, aspect: Tensor) -> tuple[Tensor, Tensor]:
    """Upstream's UV positional embedding of a feature map, as two terms to add by broadcasting.

    create_uv_grid and position_grid_to_embed give an [C, H, W] tensor whose first half of channels
    depends on the column only and the second on the row only. So it is the sum of a [1, C, 1, W] and
    a [1, C, H, 1] term, each zero in the other's half, and never has to be stored at full size.

    Parameters
    ----------
    aspect : Tensor
        Image width over height, shape [1].
    """
    diagonal = torch.sqrt(aspect * aspect + 1)
    half = channels // 2
    columns = UV_RATIO * _uv_axis(width, aspect / diagonal, half).transpose(0, 1)
    rows = UV_RATIO * _uv_axis(height, 1 / diagonal, half).transpose(0, 1)
    by_column = torch.cat((columns, torch.zeros_like(columns)), dim=0)
    by_row = torch.cat((torch.zeros_like(rows), rows), dim=0)
    return by_column[None, :, None, :], by_row[None, :, :, None]


def aspect_ratio(height: int, width: int, device: Device) -> Tensor:
    """Width over height of the image as a float tensor [1]."""
    return size_of(width, device) / size_of(height, device)
