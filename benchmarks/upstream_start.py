"""The reference service's start and first answer, from its documented steps, in a process of its own.

``python -m benchmarks.upstream_start FOLDER PHOTO`` with a checkpoint in the hub's layout prints the
seconds of each step as JSON: its imports, upstream's own package in PyTorch eager, upstream's
``inference``, and what the service makes of the depth (:mod:`benchmarks.pillow_pipeline`).

Two things are spared it. torchvision has no build that loads beside a CPU PyTorch from the package
index, so the two steps that upstream takes from it are here, and its import costs nothing. And the
network computes in FP32, which a CPU does faster than the half precision that upstream asks for.
"""
# ruff: noqa: E402  (what is measured is when things are imported)

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
import requests  # noqa: F401  (the service fetches with it)

from benchmarks import pillow_pipeline

_seen["import"] = _clock() - _start
_start = _clock()
import runpod  # noqa: F401

_seen["sdk_import"] = _clock() - _start
_start = _clock()
import torch


class Normalize:
    """torchvision's step of that name: less the mean, over the deviation, by channel."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self._mean) / self._std


class ToTensor:
    """torchvision's step of that name: bytes [H, W, 3] to 0 to 1, [3, H, W]."""

    def __call__(self, image: object) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() / 255


def stand_in_for_torchvision() -> None:
    """Put the two steps where upstream imports them from."""
    torchvision, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    vars(transforms).update(Normalize=Normalize, ToTensor=ToTensor)
    vars(torchvision).update(transforms=transforms)
    sys.modules |= {"torchvision": torchvision, "torchvision.transforms": transforms}


def main(folder: str, photo: str) -> None:
    """Load, answer, print."""
    stand_in_for_torchvision()
    from depth_anything_3.api import DepthAnything3

    model = DepthAnything3.from_pretrained(folder).eval()
    model.forward = torch.inference_mode()(model.model.forward)  # without its autocast
    _seen["engine_load"] = _clock() - _start
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
