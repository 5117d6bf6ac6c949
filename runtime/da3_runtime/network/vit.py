"""The backbone: scenes [B, S, H, W, 3] uint8 -> four levels of patch features and the camera tokens.

DINOv2 with DA3's any-view part (upstream's ``DinoVisionTransformer``). Scenes, views, height and width
stay dynamic. Views and scenes are one dimension [B S, tokens, C] everywhere but in the global blocks,
which attend over all views of a scene, [B, S tokens, C]. Parameters have upstream's names and shapes, so
its checkpoints load unchanged.

Upstream moves the reference view to the front before the any-view part, and back afterwards. A view's
place takes part in nothing but the choice of its camera token: global blocks have neutral positions, and
attention does not see the order. So here no view moves; the reference gets the reference's token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from da3_runtime.network.positions import (
    paired_order,
    patch_position_embedding,
    rotary_angles,
    rotary_tables,
    rotate,
    token_positions,
)
from da3_runtime.network.precision import full, low, norm
from da3_runtime.network.reference import reference_of
from da3_runtime.network.sizes import Sizes
from da3_runtime.network_io import CHOOSE
from da3_runtime.variants import PATCH

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # InputProcessor.NORMALIZE
IMAGENET_STD = (0.229, 0.224, 0.225)
BLOCK_EPS = 1e-6  # of the LayerNorms of a block; all others have PyTorch's default, 1e-5
MLP_RATIO = 4


class Features(NamedTuple):
    """The input of the heads.

    Attributes
    ----------
    levels : list[Tensor]
        Four tensors [V, grid_h*grid_w, C] in FP32 for the V = B S views of all scenes; C is
        ``Sizes.feature_width``.
    tokens : list[Tensor]
        Camera (or class) token of each level, before the final norm, [V, C] in FP32.
    grid : tuple[int, int]
        Patches down and across.
    reference : Tensor | None
        Index of each scene's reference view, int64 [B]; None in a monocular network.
    """

    levels: list[Tensor]
    tokens: list[Tensor]
    grid: tuple[int, int]
    reference: Tensor | None = None


class KnownCameras(NamedTuple):
    """Camera tokens of scenes whose poses are known.

    Attributes
    ----------
    tokens : Tensor
        FP32 [B, S, C]; of no meaning where no poses are given.
    is_given : Tensor
        Which scenes have poses, bool [B].
    """

    tokens: Tensor
    is_given: Tensor


class Rotary(NamedTuple):
    """Rotary positions of the tokens, for one kind of block.

    Attributes
    ----------
    cos, sin : Tensor
        As :func:`rotary_tables` returns them; as :func:`rotary_angles` does if ``by_operator``.
    paired : bool
        Whether the channels are in :func:`paired_order`.
    by_operator : bool
        Whether ONNX's RotaryEmbedding rotates. It takes paired channels only.
    """

    cos: Tensor
    sin: Tensor
    paired: bool
    by_operator: bool

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate query or key heads [B, heads, tokens, head_dim], FP32."""
        if not self.by_operator:
            return rotate(x, self.cos, self.sin, self.paired)
        cos, sin = (table[None].expand(x.shape[0], -1, -1) for table in (self.cos, self.sin))
        rotated: Tensor = torch.onnx.ops.rotary_embedding(x, cos, sin)
        return rotated


def normalize(images: Tensor) -> Tensor:
    """uint8 [..., H, W, 3] RGB -> FP32 [V, 3, H, W], normalized by ImageNet's mean and deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).reshape(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).reshape(1, 3, 1, 1)
    # Cast first: TensorRT takes a uint8 input but only casts it.
    pixels = full(images).reshape(-1, *images.shape[-3:])
    return (pixels.permute(0, 3, 1, 2) / 255.0 - mean) / std


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over [B, heads, tokens, head_dim]; the softmax is in FP32.

    Always a fused kernel, which never stores the score matrix: PyTorch's, or exported ONNX's operator.
    ONNX Runtime runs that operator as flash attention on CUDA. It saves 6.6 of the 15.7 ms that a
    softmax between two products takes (da3-large at 504 x 504 on an H200). Plans get it spelled out
    (``da3_export/onnx_attention.py``).
    """
    scale = q.shape[-1] ** -0.5
    if not torch.compiler.is_exporting():
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    attended: Tensor = torch.onnx.ops.attention(q, k, v, scale=scale)[0]
    return attended


class Attention(nn.Module):
    """Multi-head self-attention; ``rotates`` normalizes and rotates queries and keys."""

    def __init__(self, width: int, heads: int, rotates: bool) -> None:
        super().__init__()
        self.heads = heads
        self.rotates = rotates
        self.qkv = nn.Linear(width, 3 * width)
        if rotates:
            self.q_norm = nn.LayerNorm(width // heads)
            self.k_norm = nn.LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """[B, tokens, C] in FP32 to the same shape in the dtype of the weights."""
        batch, tokens, width = x.shape
        qkv = self.qkv(low(x, self.qkv))
        qkv = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = (part.squeeze(0) for part in qkv.permute(2, 0, 3, 1, 4).split(1))
        if self.rotates:
            assert rotary is not None
            q, k = rotary.rotate(norm(self.q_norm, q)), rotary.rotate(norm(self.k_norm, k))
        out = attention(low(q, self.qkv), low(k, self.qkv), v)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return projected

    def pair_channels(self) -> None:
        """Bring the channels of queries and keys to :func:`paired_order`."""
        width = self.qkv.in_features
        order = torch.tensor(paired_order(width // self.heads))
        # The values come last in the product's outputs and stay.
        outputs = torch.arange(3 * width)
        outputs[: 2 * width] = (torch.arange(2 * self.heads)[:, None] * len(order) + order).reshape(-1)
        _reorder(self.qkv, outputs)
        _reorder(self.q_norm, order)
        _reorder(self.k_norm, order)


def _reorder(layer: nn.Module, order: Tensor) -> None:
    """Reorder a layer's outputs: new parameters, because the old ones may be in a mapped file."""
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter[order], requires_grad=False))


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] in FP32 to [..., outputs] in the dtype of the weights."""
        out: Tensor = self.fc2(F.gelu(self.fc1(low(x, self.fc1))))
        return out


class SwiGLU(nn.Module):
    """The gated feed-forward layer of DINOv2's largest size (arXiv 2002.05202)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Two thirds of an MLP's hidden width, rounded up to a multiple of 8 (upstream's SwiGLUFFNFused).
        hidden = (MLP_RATIO * width * 2 // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] in FP32 to the same shape in the dtype of the weights."""
        gate, value = self.w12(low(x, self.w12)).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    """A learned factor for every channel."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block on the FP32 residual stream [B, tokens, C]."""

    def __init__(
        self,
        width: int,
        heads: int,
        rotates: bool = False,
        gated: bool = False,
        initial_scale: float = 1.0,
        eps: float = BLOCK_EPS,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, rotates)
        self.ls1 = LayerScale(width, initial_scale)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = SwiGLU(width) if gated else MLP(width, MLP_RATIO * width, width)
        self.ls2 = LayerScale(width, initial_scale)

    def fold_layer_scales(self) -> None:
        """Multiply the layers before the layer scales by them: one operation less for each.

        Do it in FP32, before the weights are rounded. A trained scale may be as small as 1e-5, and the
        folded weights then lie between FP16's smallest numbers, 6e-8 apart. Each is off by 3e-8 at most,
        so a sum over n inputs of size one is off by sqrt(n / 3) * 3e-8: 1e-6 for the widest layer.
        """
        last = self.mlp.w3 if isinstance(self.mlp, SwiGLU) else self.mlp.fc2
        for name, layer in (("ls1", self.attn.proj), ("ls2", last)):
            gamma = getattr(self, name).gamma
            # New parameters, because the old ones may be in a mapped file.
            layer.weight = nn.Parameter(layer.weight * gamma[:, None], requires_grad=False)
            layer.bias = nn.Parameter(layer.bias * gamma, requires_grad=False)
            setattr(self, name, nn.Identity())

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        x = x + self.ls1(full(self.attn(norm(self.norm1, x), rotary)))
        scaled: Tensor = self.ls2(full(self.mlp(norm(self.norm2, x))))
        return x + scaled


class VisionTransformer(nn.Module):
    """The backbone's parameters and forward pass.

    Parameters
    ----------
    sizes : Sizes
        Size of the network.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, start = sizes.width, sizes.alternate_from
        self.sizes = sizes
        self.paired = False
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if start is not None:
            # The reference view's token, and that of all other views.
            self.camera_token = nn.Parameter(torch.randn(1, 2, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, sizes.table_side**2 + 1, width))
        self.blocks = nn.ModuleList(
            Block(width, sizes.heads, start is not None and index >= start, sizes.gated)
            for index in range(sizes.depth)
        )
        self.norm = nn.LayerNorm(width)

    def pair_channels(self) -> None:
        """Reorder the channels of queries and keys so that RoPE's partners are half a head apart.

        ONNX's RotaryEmbedding takes them so. Queries and keys change alike, so no score changes; the
        weights are no longer upstream's.
        """
        assert not self.paired
        for module in self.modules():
            if isinstance(module, Attention) and module.rotates:
                module.pair_channels()
        self.paired = True

    def forward(
        self, images: Tensor, wanted: Tensor | None = None, known: KnownCameras | None = None
    ) -> Features:
        """Features of scenes.

        Parameters
        ----------
        images : Tensor
            uint8 [B, S, H, W, 3], RGB, H and W multiples of 14.
        wanted : Tensor | None
            Index of the reference view of each scene, or :data:`CHOOSE`, int64 [B]. None chooses for
            all. A monocular network has no reference.
        known : KnownCameras | None
            Camera tokens made of known poses, for the scenes that have them.
        """
        scenes, views, height, width, _ = images.shape
        grid_h, grid_w = height // PATCH, width // PATCH
        sizes, start = self.sizes, self.sizes.alternate_from

        project = self.patch_embed["proj"]
        assert isinstance(project, nn.Conv2d)
        patches = full(project(low(normalize(images), project)))
        patches = patches.reshape(scenes * views, sizes.width, grid_h * grid_w).transpose(1, 2)
        patches = patches + patch_position_embedding(self.pos_embed[:, 1:], grid_h, grid_w)
        token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat((token.expand(scenes * views, -1, -1), patches), dim=1)

        local_rotary, global_rotary = self._rotary(grid_h, grid_w, views, images.device)
        levels: list[Tensor] = []
        tokens: list[Tensor] = []
        reference: Tensor | None = None
        local = x
        for index, block in enumerate(self.blocks):
            if start is not None and index == start - 1:
                if wanted is None:
                    wanted = torch.full((scenes,), CHOOSE, device=images.device)
                reference = reference_of(x[:, 0].reshape(scenes, views, sizes.width), wanted)
            if index == start:
                assert reference is not None
                camera = self._camera_tokens(reference, views)
                if known is not None:
                    # Known poses are relative to the first view.
                    reference = torch.where(known.is_given, 0, reference)
                    camera = torch.where(known.is_given[:, None, None], known.tokens, camera)
                camera = camera.reshape(scenes * views, 1, sizes.width)
                x = torch.cat((camera, x[:, 1:]), dim=1)
            is_global = start is not None and index >= start and index % 2 == 1
            if is_global:
                x = block(x.reshape(scenes, -1, sizes.width), global_rotary)
                x = x.reshape(scenes * views, -1, sizes.width)
            else:
                local = x = block(x, local_rotary)
            if index in sizes.out_layers:
                last = norm(self.norm, x[:, 1:])
                token = x[:, 0]
                if start is not None:
                    last = torch.cat((local[:, 1:], last), dim=-1)
                    token = torch.cat((local[:, 0], token), dim=-1)
                levels.append(last)
                tokens.append(token)
        return Features(levels, tokens, (grid_h, grid_w), reference)

    def _camera_tokens(self, reference: Tensor, views: int) -> Tensor:
        """The learned camera token of every view, [B, S, C]."""
        place = torch.arange(views, device=reference.device)
        is_reference = (place == reference[:, None])[..., None]
        return torch.where(is_reference, self.camera_token[:, :1], self.camera_token[:, 1:])

    def _rotary(
        self, grid_h: int, grid_w: int, views: int, device: torch.device
    ) -> tuple[Rotary, Rotary]:
        """Rotary positions of the local blocks, and of the global ones, where all patches sit at 1."""
        head_dim = self.sizes.width // self.sizes.heads
        rows, columns = token_positions(grid_h, grid_w, device)
        neutral = torch.clamp(rows, max=1)[None].expand(views, -1).reshape(-1)
        by_operator = self.paired and torch.compiler.is_exporting()

        def rotary(rows: Tensor, columns: Tensor) -> Rotary:
            tables = rotary_angles(rows, columns, head_dim)
            if not by_operator:
                tables = rotary_tables(*tables, self.paired)
            return Rotary(*tables, self.paired, by_operator)

        return rotary(rows, columns), rotary(neutral, neutral)
