"""The backbone: image [B, H, W, 3] uint8 -> four levels of patch features and the camera token.

Drives upstream's own DinoVisionTransformer modules (so its checkpoints load unchanged) for one view per
image, with shapes that stay dynamic and the dtypes of :mod:`runtime.eager.precision`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.eager import Upstream
from runtime.eager.positions import (
    patch_position_embedding,
    rope_tables,
    rotate,
    token_positions,
)

PATCH = 14
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # InputProcessor.NORMALIZE
IMAGENET_STD = (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """What the heads read.

    Attributes
    ----------
    levels : list[Tensor]
        Four tensors [B, grid_h*grid_w, C] in FP32; C is twice the embedding width with ``cat_token``.
    tokens : list[Tensor]
        Camera (or class) token of each level, before the final norm, [B, C] in FP32.
    grid : tuple[int, int]
        Patches down and across.
    """

    levels: list[Tensor]
    tokens: list[Tensor]
    grid: tuple[int, int]


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] RGB -> FP32 [B, 3, H, W], ImageNet-normalised."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).reshape(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).reshape(1, 3, 1, 1)
    # Cast first: TensorRT takes a uint8 input but only casts it.
    return (images.float().permute(0, 3, 1, 2) / 255.0 - mean) / std


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over [B, heads, tokens, head_dim], softmax in FP32.

    Exported as two matrix products around a softmax, with Q scaled before the first one: the form that
    TensorRT fuses ("Fused Attention" in its documentation). Run eagerly it is PyTorch's fused kernel,
    which never stores the score matrix.
    """
    if not torch.compiler.is_exporting():
        return F.scaled_dot_product_attention(q, k, v)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    weights = torch.softmax(scores.float(), dim=-1).to(v.dtype)
    return torch.matmul(weights, v)


def norm(layer: Upstream, x: Tensor) -> Tensor:
    """LayerNorm in FP32 whatever ``x`` is; identity where upstream has nn.Identity."""
    normalised: Tensor = layer(x.float())
    return normalised


class Backbone(nn.Module):
    """Upstream's vision transformer for one view per image.

    Parameters
    ----------
    vit : Upstream
        ``DinoV2.pretrained`` of an upstream network.
    out_layers : list[int]
        Blocks whose outputs the head reads.
    dtype : torch.dtype
        Dtype of matrix products (``Precision.backbone``).
    """

    def __init__(self, vit: Upstream, out_layers: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.vit: Upstream = vit
        self.out_layers = list(out_layers)
        self.dtype = dtype
        vit.patch_embed.to(dtype)
        for block in vit.blocks:
            block.attn.qkv.to(dtype)
            block.attn.proj.to(dtype)
            block.mlp.to(dtype)

    def forward(self, images: Tensor) -> Features:
        vit = self.vit
        batch, height, width, _ = images.shape
        grid_h, grid_w = height // PATCH, width // PATCH

        patches = vit.patch_embed.proj(normalise(images).to(self.dtype)).float()
        patches = patches.reshape(batch, vit.embed_dim, grid_h * grid_w).transpose(1, 2)
        patches = patches + patch_position_embedding(vit.pos_embed[:, 1:], grid_h, grid_w)
        token = vit.cls_token + vit.pos_embed[:, :1]
        x = torch.cat((token.expand(batch, -1, -1), patches), dim=1)

        local_rope, global_rope = self._rope(grid_h, grid_w, images.device)
        levels: list[Tensor] = []
        tokens: list[Tensor] = []
        local = x
        for index, block in enumerate(vit.blocks):
            alternating = vit.alt_start != -1 and index >= vit.alt_start
            if alternating and index == vit.alt_start:
                reference = vit.camera_token[:, :1].expand(batch, -1, -1)
                x = torch.cat((reference, x[:, 1:]), dim=1)
            is_global = alternating and index % 2 == 1
            rope = global_rope if is_global else local_rope
            x = self._block(block, x, rope if block.attn.rope is not None else None)
            if not is_global:
                local = x
            if index in self.out_layers:
                last = norm(vit.norm, x[:, 1:])
                token = x[:, 0]
                if vit.cat_token:
                    last = torch.cat((local[:, 1:], last), dim=-1)
                    token = torch.cat((local[:, 0], token), dim=-1)
                levels.append(last)
                tokens.append(token)
        return Features(levels, tokens, (grid_h, grid_w))

    def _rope(self, grid_h: int, grid_w: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
        """Rotary tables of the local blocks, and of the global ones, where all patches sit at 1."""
        head_dim = self.vit.embed_dim // self.vit.num_heads
        rows, columns = token_positions(grid_h, grid_w, device)
        neutral = torch.clamp(rows, max=1)
        return rope_tables(rows, columns, head_dim), rope_tables(neutral, neutral, head_dim)

    def _block(self, block: Upstream, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """One pre-norm transformer block on the FP32 residual stream [B, tokens, C]."""
        attn = block.attn
        batch, tokens, channels = x.shape
        qkv = attn.qkv(norm(block.norm1, x).to(self.dtype))
        qkv = qkv.reshape(batch, tokens, 3, attn.num_heads, channels // attn.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if not isinstance(attn.q_norm, nn.Identity):
            q, k = norm(attn.q_norm, q), norm(attn.k_norm, k)
        if rope is not None:
            q, k = rotate(q.float(), *rope), rotate(k.float(), *rope)
        out = attention(q.to(self.dtype), k.to(self.dtype), v)
        out = attn.proj(out.transpose(1, 2).reshape(batch, tokens, channels))
        x = x + block.ls1(out.float())
        hidden: Tensor = block.mlp(norm(block.norm2, x).to(self.dtype))
        scaled: Tensor = block.ls2(hidden.float())
        return x + scaled
