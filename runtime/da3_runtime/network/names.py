"""Other names of a checkpoint's tensors -> upstream's, where the mapping is exact.

Repacks drop the prefix ``model.``, or use the names that the DINOv2 of Hugging Face transformers gives
its backbone, as the files for ComfyUI do. There queries, keys and values are tensors of their own; one
after the other they are upstream's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX = "model."  # of every tensor of a published checkpoint
# Parts of names in the backbone, in transformers and upstream.
_PARTS = (
    ("backbone.embeddings.patch_embeddings.projection.", "backbone.pretrained.patch_embed.proj."),
    ("backbone.embeddings.position_embeddings", "backbone.pretrained.pos_embed"),
    ("backbone.embeddings.", "backbone.pretrained."),
    ("backbone.encoder.layer.", "backbone.pretrained.blocks."),
    ("backbone.layernorm.", "backbone.pretrained.norm."),
    (".attention.output.dense.", ".attn.proj."),
    (".attention.attention.", ".attn."),
    (".attention.", ".attn."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    (".mlp.weights_in.", ".mlp.w12."),
    (".mlp.weights_out.", ".mlp.w3."),
)
_BACKBONE = f"{PREFIX}backbone."
_TRANSFORMERS = f"{_BACKBONE}encoder.layer."
_MASK = f"{_BACKBONE}pretrained.mask_token"  # for the training of DINOv2; no published checkpoint has it
_QUERY, _OTHERS = ".attn.query.", (".attn.key.", ".attn.value.")


def upstream_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names of the published one.

    Names that no rule knows stay as they are; loading then names them.
    """
    if not any(name.startswith(PREFIX) for name in tensors):
        tensors = {PREFIX + name: tensor for name, tensor in tensors.items()}
    if not any(name.startswith(_TRANSFORMERS) for name in tensors):
        return dict(tensors)
    return _joined({_renamed(name): tensor for name, tensor in tensors.items()})


def _renamed(name: str) -> str:
    if name.startswith(_BACKBONE):
        for given, wanted in _PARTS:
            name = name.replace(given, wanted)
    return name


def _joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as one tensor; without the mask token."""
    joined = {name: tensor for name, tensor in tensors.items() if name != _MASK}
    for query in [name for name in joined if _QUERY in name]:
        parts = [query, *(query.replace(_QUERY, other) for other in _OTHERS)]
        if all(part in joined for part in parts):
            whole = torch.cat([joined.pop(part) for part in parts])
            joined[query.replace(_QUERY, ".attn.qkv.")] = whole
    return joined
