"""The precision policy: which dtype each part of the network computes in.

The engines are strongly typed, so precision is a property of the graph, and the graph is traced from
the network. Hence one policy for the FP16 engine, for its FP16 arithmetic emulated on a CPU, and for
eager PyTorch on a GPU.

=====================================================  ========  =======
part                                                   backbone  head
=====================================================  ========  =======
linear layers, convolutions, interpolation             low       low
camera encoder: pose branch FP32, its blocks           low
attention (Q K^T, P V; its softmax in FP32)            low
normalization, rotary positions                        FP32      FP32
residual stream, layer scale, positional embedding     FP32
camera decoder, last 1x1 convolution, exp                        FP32
DySample: offsets, coordinates, sampling                         FP32
=====================================================  ========  =======

:func:`cast_weights` sets the dtypes of the weights. The network states the dtypes of its activations
with three functions: :func:`low`, :func:`full` and :func:`norm`. Elsewhere a value only follows another:
the head's UV embedding and DySample's output take the dtype of the map that they belong to.

NVIDIA's ModelOpt AutoCast rewrites the FP32 graph instead. It was measured on da3-small with random
weights and calibration photos, as mean relative error of depth. The tolerance is 3e-3.

- Defaults: fails on the uint8 input.
- Calibrated: 2.4e-3, against 4.3e-4 of this policy. It puts norms, softmax, the camera decoder and exp
  into FP16. Most of the error comes from rounding the coordinates of the position table.
- Calibrated, with those parts kept in FP32: 5.8e-4.
- With the operator types of this policy: 3.8e-4. That is no gain over a policy that eager shares.

Two things differ in ONNX, which ``da3_export`` makes:

- Layer scales are folded into the weights before them, in FP32, before those are cast.
- The graph for ONNX Runtime on CUDA (``onnx_fusion.py``) keeps the residual stream, norms and rotary
  positions in FP16 between operators. ONNX Runtime's fused norm takes one dtype for product, residual
  and sum. The mean error of depth is 4.5e-4 instead of 4.1e-4 (da3-large, random weights), and with
  residual channels of 500 it is 2.6e-3 instead of 2.4e-3 (da3-small).

Elsewhere the residual stream stays in FP32 because upstream's autocast keeps it there: layer scales are
FP32 parameters, so bf16 * FP32 promotes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Precision(NamedTuple):
    """Low-precision dtypes of the two halves of the network; everything else is FP32.

    Parameters
    ----------
    name : str
        Name in the manifest and in results.
    backbone, head : torch.dtype
        Dtype of weights and activations of matrix products and convolutions.
    """

    name: str
    backbone: torch.dtype
    head: torch.dtype


FP32 = Precision("fp32", torch.float32, torch.float32)
FP16 = Precision("fp16", torch.float16, torch.float16)
# Upstream's own choice on a GPU: bf16 autocast around the backbone, autocast off for the heads
# (DepthAnything3.forward and DepthAnything3Net.forward).
UPSTREAM_GPU = Precision("bf16", torch.bfloat16, torch.float32)


class FP32Conv2d(nn.Conv2d):
    """A convolution that computes in FP32 in every precision."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the base class's name)
        """Convolve [B, C, H, W] of any dtype; the result is FP32."""
        return super().forward(full(input))


def cast_weights(part: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of a part's matrix products and convolutions, in place.

    Norms, layer scales, tokens, tables and :class:`FP32Conv2d` stay in FP32.
    """
    for module in part.modules():
        is_low = isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
        if is_low and not isinstance(module, FP32Conv2d):
            module.to(dtype)


def low(x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """``x`` as the input of a matrix product or convolution: in the dtype of its weights."""
    return x.to(layer.weight.dtype)


def full(x: Tensor) -> Tensor:
    """``x`` in FP32: for the residual stream, layer scale, rotary positions and logits."""
    return x.float()


def norm(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm layer (LayerNorm, or Identity where a network has none) in FP32."""
    normalized: Tensor = layer(full(x))
    return normalized
