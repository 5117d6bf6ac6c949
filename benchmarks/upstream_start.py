"""Measures the start and the first result of the reference service, from its documented steps.

``python -m benchmarks.upstream_start FOLDER PHOTO`` prints the seconds of each step as JSON; FOLDER has
a checkpoint in the hub's layout. The steps are the service's imports, the load of upstream's package in
PyTorch eager, upstream's ``inference``, and the service's postprocessing
(:mod:`benchmarks.pillow_pipeline`).

The reference gets two advantages. No build of torchvision loads beside a CPU PyTorch from the package
index, so the two transforms that upstream uses are defined here, and importing torchvision costs
nothing. And the network computes in FP32, which is faster on a CPU than upstream's half precision.
"""
# ruff: noqa: E402  (imports are measured, so they are not at the top)

from __future__ import annotations

import os
import time

_clock = time.perf_counter
_seen = {"interpreter": time.time() - float(os.environ["BEGAN"])}
_start = _clock()

import base64
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import requests  # noqa: F401  (the service downloads with it)

from benchmarks import pillow_pipeline

_seen["import"] = _clock() - _start
_start = _clock()
import runpod  # noqa: F401

_seen["sdk_import"] = _clock() - _start
_start = _clock()
import torch


class Normalize:
    """Replaces torchvision's transform: subtract the mean, divide by the deviation, by channel."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self._mean) / self._std


class ToTensor:
    """Replaces torchvision's transform: uint8 [H, W, 3] to float 0 to 1, [3, H, W]."""

    def __call__(self, image: object) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() / 255


def stand_in_for_torchvision() -> None:
    """Install the two transforms as the module that upstream imports."""
    torchvision, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    vars(transforms).update(Normalize=Normalize, ToTensor=ToTensor)
    vars(torchvision).update(transforms=transforms)
    sys.modules |= {"torchvision": torchvision, "torchvision.transforms": transforms}


def main(folder: str, photo: str) -> None:
    """Load the model, process the photo, print the seconds."""
    stand_in_for_torchvision()
    from depth_anything_3.api import DepthAnything3

    model = DepthAnything3.from_pretrained(folder).eval()
    model.forward = torch.inference_mode()(model.model.forward)  # without its autocast
    _seen["engine_load"] = _clock() - _start
    _seen["ready"] = time.time() - float(os.environ["BEGAN"])
    start = _clock()
    rgb = pillow_pipeline.decode(base64.b64encode(Path(photo).read_bytes()).decode())
    depth = model.inference([rgb]).depth[0]
    height, width = rgb.shape[:2]
    pillow_pipeline.answer(pillow_pipeline.preview(depth, width, height))
    _seen["first_inference"] = _clock() - start
    _seen["total"] = time.time() - float(os.environ["BEGAN"])
    sys.stdout.write(json.dumps({"seconds": _seen, "backend": "upstream", "error": None}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
