"""The precision policy: which dtype each part of the network computes in.

The engines are strongly typed, so precision is a property of the graph, and the graph is traced from
the network below. Hence one policy, applied in one place, for the FP16 engine, for its FP16 arithmetic
emulated on a CPU, and for eager PyTorch on a GPU.

=====================================================  ========  =======
part                                                   backbone  head
=====================================================  ========  =======
linear layers, convolutions, interpolation             low       low
attention (Q K^T, P V; its softmax in FP32)            low
normalisation, rotary positions                        FP32      FP32
residual stream, layer scale, positional embedding     FP32
camera decoder, last 1x1 convolution, exp                        FP32
=====================================================  ========  =======

Why not NVIDIA's ModelOpt AutoCast, which rewrites the FP32 graph (benchmarks/autocast.py, da3-small):
with its defaults it fails on the uint8 input; calibrated on photographs it puts norms, softmax, the
camera decoder and exp into FP16 and errs five times as much (mean relative error of depth 2.4e-3
against 4.3e-4, beside a tolerance of 3e-3), most of it from rounding the coordinates of the position
table (a trained table is smoother and would suffer less). With those named and kept it errs 5.8e-4,
with everything else in FP16, on drawn weights that have no outliers to overflow. Told by operator type
to cast what this policy casts, it is as accurate (3.8e-4), and nothing is won over stating the policy
here, where eager PyTorch shares it.

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
