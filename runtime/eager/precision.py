"""The precision policy: which dtype each part of the network computes in.

The engines are strongly typed, so precision is a property of the graph, and the graph is traced from
the network below. Hence one policy, applied in one place, for the FP16 engine, for its FP16 arithmetic
emulated on a CPU, and for eager PyTorch on a GPU.

=====================================================  ========  =======
part                                                   backbone  head
=====================================================  ========  =======
linear layers, convolutions, interpolation             low       low
attention products (Q K^T, P V)                        low
normalisation, softmax, rotary positions               FP32      FP32
residual stream, layer scale, positional embedding     FP32
camera decoder, last 1x1 convolution, exp                        FP32
=====================================================  ========  =======

The residual stream stays in FP32 because upstream's autocast keeps it there (layer scales are FP32
parameters, so bf16 * FP32 promotes).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Precision(NamedTuple):
    """Low-precision dtypes of the two halves of the network; everything else is FP32.

    Parameters
    ----------
    name : str
        As the manifest and the result report it.
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
