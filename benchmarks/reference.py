"""Computes the reference depth in eager FP32, the error against it, and the work of the network."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contenders import CUDA
from benchmarks.roofline import Work, count_work, total
from da3_export.parity.cases import Case, case_images
from da3_runtime.network.load import load_network
from da3_runtime.network.precision import FP16, FP32
from da3_runtime.network_io import RawOutputs
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.engine_weights import engine_checkpoint, engine_sdt
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import Head

# Largest mean relative error of depth by precision. Other precisions are not refused for their error.
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3}
Depths = dict[str, NDArray[np.float32]]


def depth_error(outputs: dict[str, RawOutputs], reference: Depths) -> float:
    """Mean relative error of depth, |a - b| / |b|: the largest over the graphs, NaN if any is NaN."""
    errors = []
    for name, want in reference.items():
        exact = want.astype(np.float64)
        errors.append(float(np.mean(np.abs(outputs[name].depth - exact) / np.abs(exact))))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def refusal(precision: str, error: float) -> str | None:
    """Why a contender with this precision and error is not timed, or None if it is."""
    bound = TOLERANCES.get(precision, math.inf)
    if math.isfinite(error) and error <= bound:
        return None
    return f"refused: mean relative error of depth {error:.1e}, allowed {bound:.0e}"


class Reference:
    """Depth in eager FP32 and work of the engine's network, for every case.

    Parameters
    ----------
    folder : EngineFolder
        Engine whose weights are used.
    device : str
        Device that runs the FP32 network.
    cache : int
        Bytes of the device's last-level cache.
    """

    def __init__(
        self,
        folder: EngineFolder,
        settings: EngineSettings,
        device: str,
        cases: tuple[Case, ...],
        cache: int,
    ) -> None:
        self.checkpoint = engine_checkpoint(folder, settings)
        self.depths: dict[Case, Depths] = {case: {} for case in cases}
        works: dict[Case, list[Work]] = {case: [] for case in cases}
        sdt = engine_sdt(folder, settings).path if folder.head is Head.SDT else None
        for graph in folder.variant.graphs:
            parts = (folder.variant, graph, self.checkpoint.path)
            head = sdt if graph.takes_sdt else None
            network = load_network(*parts, FP32, head).to(device)
            with without_tf32():
                for case in cases:
                    self.depths[case][graph.name] = _depth(network, case_images(case), device)
            del network
            counted = load_network(*parts, FP16 if device == CUDA else FP32, head).to("meta")
            for case in cases:
                works[case].append(count_work(counted, case[:3], cache))
        self.work = {case: total(of_graphs) for case, of_graphs in works.items()}


def _depth(
    network: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], images: NDArray[np.uint8], device: str
) -> NDArray[np.float32]:
    """Depth [B, S, H, W], one scene at a time because FP32 needs the most memory."""
    with torch.inference_mode():
        maps = [network(torch.from_numpy(image[None]).to(device))[0] for image in images]
    return np.concatenate([depth.cpu().numpy() for depth in maps])


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Disable TF32, cuDNN's default for FP32 convolutions."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
