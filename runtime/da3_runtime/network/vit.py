"""The backbone: image [B, H, W, 3] uint8 -> four levels of patch features and the camera token.

Drives upstream's own DinoVisionTransformer modules (so its checkpoints load unchanged) for one view per
image, with shapes that stay dynamic and the dtypes of :mod:`da3_runtime.network.precision`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from da3_runtime.network import Upstream
from da3_runtime.network.positions import (
    paired_order,
    patch_position_embedding,
    rotary_angles,
    rotary_tables,
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
    """Softmax attention over [B, heads, tokens, head_dim].

    A fused kernel everywhere, so that nobody stores the score matrix: PyTorch's, and exported ONNX's
    operator. Of that ONNX Runtime makes flash attention on CUDA, 6.6 ms less of 15.7 than of a softmax
    between two products (da3-large at 504 x 504 on an H200); for plans it is spelled out
    (export/attention.py). The softmax is in FP32 in all of them.
    """
    scale = q.shape[-1] ** -0.5
    if not torch.compiler.is_exporting():
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    attended: Tensor = torch.onnx.ops.attention(q, k, v, scale=scale)[0]
    return attended


def norm(layer: Upstream, x: Tensor) -> Tensor:
    """LayerNorm in FP32 whatever ``x`` is; identity where upstream has nn.Identity."""
    normalised: Tensor = layer(x.float())
    return normalised


def _reorder(layer: Upstream, order: Tensor) -> None:
    """Reorder a layer's outputs: new parameters, as the old ones may lie in a mapped file."""
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter[order], requires_grad=False))


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
        self.paired = False
        vit.patch_embed.to(dtype)
        for block in vit.blocks:
            block.attn.qkv.to(dtype)
            block.attn.proj.to(dtype)
            block.mlp.to(dtype)

    def pair_channels(self) -> None:
        """Reorder the channels of queries and keys so that RoPE's partners lie half a head apart.

        That is how ONNX's RotaryEmbedding takes them. Both change alike, so that no score changes; the
        weights are no longer upstream's.
        """
        assert not self.paired
        width, heads = self.vit.embed_dim, self.vit.num_heads
        order = torch.tensor(paired_order(width // heads))
        # Of the product's outputs the values come last and stay.
        outputs = torch.arange(3 * width)
        outputs[: 2 * width] = (torch.arange(2 * heads)[:, None] * len(order) + order).reshape(-1)
        for attn in (block.attn for block in self.vit.blocks if block.attn.rope is not None):
            _reorder(attn.qkv, outputs)
            _reorder(attn.q_norm, order)
            _reorder(attn.k_norm, order)
        self.paired = True

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
        angles = (rotary_angles(rows, columns, head_dim), rotary_angles(neutral, neutral, head_dim))
        if self._rotates_by_operator:
            return angles
        return tuple(rotary_tables(cos, sin, self.paired) for cos, sin in angles)

    @property
    def _rotates_by_operator(self) -> bool:
        return self.paired and torch.compiler.is_exporting()

    def _rotate(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate query or key heads [B, heads, tokens, head_dim], FP32."""
        if not self._rotates_by_operator:
            return rotate(x, *rope, self.paired)
        cos, sin = (table[None].expand(x.shape[0], -1, -1) for table in rope)
        rotated: Tensor = torch.onnx.ops.rotary_embedding(x, cos, sin)
        return rotated

    def _block(self, block: Upstream, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """One pre-norm transformer block on the FP32 residual stream [B, tokens, C]."""
        attn = block.attn
        batch, tokens, channels = x.shape
        qkv = attn.qkv(norm(block.norm1, x).to(self.dtype))
        qkv = qkv.reshape(batch, tokens, 3, attn.num_heads, channels // attn.num_heads)
        q, k, v = (part.squeeze(0) for part in qkv.permute(2, 0, 3, 1, 4).split(1))
        if not isinstance(attn.q_norm, nn.Identity):
            q, k = norm(attn.q_norm, q), norm(attn.k_norm, k)
        if rope is not None:
            q, k = self._rotate(q.float(), rope), self._rotate(k.float(), rope)
        out = attention(q.to(self.dtype), k.to(self.dtype), v)
        out = attn.proj(out.transpose(1, 2).reshape(batch, tokens, channels))
        x = x + block.ls1(out.float())
        hidden: Tensor = block.mlp(norm(block.norm2, x).to(self.dtype))
        scaled: Tensor = block.ls2(hidden.float())
        return x + scaled
