"""Train a small any-view network on rendered scenes: depth, confidence and camera, then rays.

The data is deterministic: step N sees the same scenes on every machine, however often a run is stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from da3_export.distill import use_one_thread
from da3_export.losses import gradient_matching
from da3_export.optimizers import Optimizers, share_of_peak
from da3_export.util.progress import Progress
from da3_export.util.tensors import save_tensors
from da3_runtime.errors import SettingError
from da3_runtime.network.dpt import DPTHead
from da3_runtime.network.load import build_network
from da3_runtime.network.network import DepthNetwork
from da3_runtime.network.vit import normalize
from da3_runtime.postprocess.rays import image_plane
from da3_runtime.store.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from da3_runtime.util.files import replacing
from da3_runtime.variants import PATCH, Graph, Variant
from tools.nano import losses
from tools.nano.scenes import FAR, render

STATE_FILE = "training.pt"
LOG_EVERY = 20
SAVE_EVERY = 100
AVERAGE = 0.998  # of the weights that are kept
RAY_SHARE = 0.05  # of the steps, at the end, for the ray branch
LATE_SHARE = 0.3  # of the steps, at the end, with larger images
# Longest side, batch size and odds of a step; every step is about as much work. Many small scenes teach
# more in the same time than few large ones; the large ones come last.
EARLY_SIZES = ((112, 16, 0.7), (168, 8, 0.3))
LATE_SIZES = ((112, 16, 0.15), (168, 8, 0.35), (252, 4, 0.35), (336, 2, 0.1), (504, 1, 0.05))
KEPT_BATCHES = 64  # by a rendering process, to be shown once more, mirrored
PATCH_SCENES = 64  # whose patches the patch embedding is fitted to
ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3)
ASPECT_ODDS = (0.1, 0.35, 0.2, 0.1, 0.15, 0.1)


class Batch(dict[str, Tensor]):
    """``images`` uint8 [B, H, W, 3]; ``depth`` and ``sky`` [B, H, W]; ``intrinsics`` [B, 3, 3]."""


class Scenes(Dataset[Batch]):
    """The batch of every step: :data:`KEPT_BATCHES` new ones, then the same mirrored, and so on.

    Parameters
    ----------
    seed : int
        Seed of the scenes.
    steps : int
        Number of batches.
    """

    def __init__(self, seed: int, steps: int) -> None:
        self.seed = seed
        self.steps = steps
        self._kept: dict[int, Batch] = {}

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        pair, at = divmod(step, 2 * KEPT_BATCHES)
        number = pair * KEPT_BATCHES + at % KEPT_BATCHES
        if at < KEPT_BATCHES:
            return self._kept.setdefault(number, self._render(number))
        kept = self._kept.pop(number) if number in self._kept else self._render(number)
        return mirrored(kept)

    def _render(self, number: int) -> Batch:
        rng = np.random.default_rng([self.seed, number, 1])
        sizes = EARLY_SIZES if 2 * number < self.steps * (1 - LATE_SHARE) else LATE_SIZES
        longest, count, _ = sizes[rng.choice(len(sizes), p=[odds for _, _, odds in sizes])]
        aspect = rng.choice(ASPECTS, p=ASPECT_ODDS)
        width, height = (longest, longest / aspect) if aspect >= 1 else (longest * aspect, longest)
        size = (round(height / PATCH) * PATCH, round(width / PATCH) * PATCH)
        scenes = [render(self.seed, number * 64 + i, *size) for i in range(count)]
        return Batch(
            images=torch.from_numpy(np.stack([scene.rgb for scene in scenes])),
            depth=torch.from_numpy(np.stack([scene.depth for scene in scenes])),
            sky=torch.from_numpy(np.stack([scene.sky for scene in scenes])),
            intrinsics=torch.from_numpy(np.stack([scene.intrinsics for scene in scenes])),
        )


def mirrored(batch: Batch) -> Batch:
    """Mirror images of the scenes. The principal point is the center, so the intrinsics stay."""
    flipped = {name: batch[name].flip(2) for name in ("images", "depth", "sky")}
    return Batch(flipped, intrinsics=batch["intrinsics"])


@dataclass
class State:
    """Everything that a stopped run needs to continue."""

    plan: str
    network: nn.Module
    average: dict[str, Tensor]
    optimizers: Optimizers
    curve: list[dict[str, float]]
    step: int = 0

    def save(self, path: Path) -> None:
        """Write to ``path``; a stop in the middle leaves the state that was there."""
        content = {
            "plan": self.plan,
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizers": self.optimizers.state_dict(),
            "curve": self.curve,
            "step": self.step,
        }
        with replacing(path) as temporary:
            torch.save(content, temporary)

    def load(self, path: Path) -> None:
        """Continue from a state that :meth:`save` wrote.

        Raises
        ------
        SettingError
            If it is the state of another run.
        """
        content: dict[str, Any] = torch.load(path, weights_only=True)
        if content["plan"] != self.plan:
            raise SettingError(
                f"--out holds a run of {content['plan']}, not of {self.plan}: give another folder."
            )
        self.network.load_state_dict(content["network"])
        self.average = content["average"]
        self.optimizers.load_state_dict(content["optimizers"])
        self.curve, self.step = content["curve"], content["step"]


def train(variant: Variant, seed: int, steps: int, workers: int, folder: Path) -> Path:
    """Train ``variant``, or continue where an earlier run in ``folder`` was stopped.

    Parameters
    ----------
    seed, steps : int
        Seed of weights and scenes, and total number of steps; those of the earlier run if it continues.
    workers : int
        Processes that render.

    Returns
    -------
    Path
        The checkpoint, in the hub's layout in ``folder``, stored in FP16.

    Raises
    ------
    SettingError
        If the variant is not one any-view network, or ``folder`` holds another run.
    """
    if len(variant.graphs) != 1 or not variant.ray_graphs:
        raise SettingError(f"{variant.model_id} is not one any-view network; only such can be trained.")
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    (graph,) = variant.graphs
    network = build_network(graph).to(device)
    _initialise(network, seed)
    network.train().requires_grad_(True)
    plan = f"{variant.model_id} with seed {seed} and {steps} steps"
    hidden = [network.backbone.pretrained.blocks, network.head]
    state = State(plan, network, _copies(network), Optimizers(network, hidden), [])
    state_path = folder / STATE_FILE
    if state_path.exists():
        state.load(state_path)
    first_ray_step = steps - int(steps * RAY_SHARE)
    progress = Progress(variant.model_id, 1)
    if state.step:
        progress.log(f"continuing at step {state.step}")
    with progress.step("train", steps) as advance:
        for _ in range(state.step):
            advance("")
        for batch in _batches(seed, state.step, steps, workers):
            batch = Batch({name: value.to(device) for name, value in batch.items()})
            if state.step >= first_ray_step:
                _train_rays_only(network, variant.ray_graphs[0])
                parts = _ray_losses(network, batch)
            else:
                parts = _depth_losses(network, batch)
            total = sum(parts.values(), torch.zeros((), device=device))
            network.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            state.optimizers.step(_rate(state.step, steps))
            keep = min(AVERAGE, (1 + state.step) / (10 + state.step))
            for name, parameter in network.named_parameters():
                state.average[name].lerp_(parameter.detach(), 1 - keep)
            state.step += 1
            advance(f"{parts['depth'].item():.3f}" if "depth" in parts else "rays")
            if state.step % LOG_EVERY == 0:
                line = {name: round(value.item(), 5) for name, value in parts.items()}
                state.curve.append({"step": state.step, **line})
                if state.step % SAVE_EVERY == 0:
                    progress.log(f"{state.step}/{steps} {json.dumps(line)}")
            if state.step % SAVE_EVERY == 0 or state.step == steps:
                state.save(state_path)
    return _write(variant, state.average, graph.prefix, folder)


def _batches(seed: int, start: int, steps: int, workers: int) -> Iterator[Batch]:
    loader: DataLoader[Batch] = DataLoader(
        Scenes(seed, steps),
        batch_size=None,
        sampler=range(start, steps),
        num_workers=workers,
        worker_init_fn=use_one_thread,
    )
    yield from loader


def _run(network: DepthNetwork, batch: Batch) -> dict[str, Tensor]:
    """The outputs for a batch of photos, each a scene of one view, without the dimension of views."""
    outputs = dict(zip(network.output_names, network(batch["images"][:, None]), strict=True))
    return {name: value.squeeze(1) for name, value in outputs.items() if name != "reference"}


def _depth_losses(network: DepthNetwork, batch: Batch) -> dict[str, Tensor]:
    outputs = _run(network, batch)
    valid = batch["depth"] < FAR
    residual = losses.log_residual(outputs["depth"], batch["depth"], valid)
    farthest = torch.where(valid, outputs["depth"].detach(), 0).flatten(1).amax(dim=1) * 1.2
    return {
        "depth": losses.scale_invariant(residual, valid),
        "gradient": 0.5 * gradient_matching(residual, valid),
        "confidence": 0.2 * losses.confidence(outputs["confidence"], residual.abs(), valid),
        "sky": 0.1 * losses.sky(outputs["depth"], batch["sky"], farthest.clamp(min=1e-3)),
        "camera": 0.2 * losses.camera(outputs["intrinsics"], outputs["extrinsics"], batch["intrinsics"]),
    }


def _ray_losses(network: DepthNetwork, batch: Batch) -> dict[str, Tensor]:
    """The rays of a single view start at the origin and leave through the pixels."""
    outputs = _run(network, batch)
    predicted = outputs["rays"]
    height, width = batch["images"].shape[1:3]
    plane = torch.from_numpy(image_plane(*predicted.shape[1:3])).to(predicted)
    lens = batch["intrinsics"]
    half = torch.tensor([width / 2, height / 2], device=lens.device)
    slope = half / lens[:, (0, 1), (0, 1)]
    directions = plane[None] * slope[:, None]
    target = torch.cat((directions, torch.ones_like(directions[..., :1])), dim=-1)
    target = torch.cat((target, torch.zeros_like(target)), dim=-1).reshape(predicted.shape)
    error = (predicted - target).abs().mean(dim=-1)
    mask = torch.ones_like(error, dtype=torch.bool)
    return {
        "rays": losses.rays(predicted, target),
        "ray confidence": 0.2 * losses.confidence(outputs["ray_confidence"], error, mask),
    }


def _rate(step: int, steps: int) -> float:
    """Share of the peak rates; the rays begin anew."""
    rays = int(steps * RAY_SHARE)
    first_ray_step = steps - rays
    if step < first_ray_step:
        return share_of_peak(step, first_ray_step)
    return share_of_peak(step - first_ray_step, rays)


def _train_rays_only(network: DepthNetwork, graph: Graph) -> None:
    """Compute the ray branch too, and let only it learn."""
    network.graph = graph
    network.requires_grad_(False)
    assert isinstance(network.head, DPTHead)
    for module in network.head.ray_branch():
        module.requires_grad_(True)


def _initialise(network: DepthNetwork, seed: int) -> None:
    """Upstream's initial values, but for those that training from nothing would be slow to find.

    The field of view's ReLU must start open; patches start whitened, positions as sines.
    """
    vit = network.backbone.pretrained
    projection = vit.patch_embed["proj"]
    assert isinstance(projection, nn.Conv2d)
    _whiten(projection, seed)
    side = math.isqrt(vit.pos_embed.shape[1] - 1)
    vit.pos_embed.data[0, 1:] = 0.5 * _sines(side, vit.pos_embed.shape[2]).to(vit.pos_embed)
    for name, module in network.named_modules():
        if name.endswith("fc_fov.0"):
            assert isinstance(module, nn.Linear)
            nn.init.constant_(module.bias, 1.0)
            module.weight.data.mul_(0.1)
        if name.endswith("fc_qvec"):
            assert isinstance(module, nn.Linear)
            module.bias.data.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
            module.weight.data.mul_(0.1)


def _whiten(projection: nn.Conv2d, seed: int) -> None:
    """Make a patch embedding the whitened principal components of rendered scenes' patches."""
    images = np.stack([render(seed, i, 126, 168).rgb for i in range(PATCH_SCENES)])
    pixels = normalize(torch.from_numpy(images))
    patches = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1).double()
    mean = patches.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    kept = projection.out_channels
    values, vectors = values.flip(0)[:kept], vectors.flip(1)[:, :kept]
    filters = (vectors / torch.sqrt(values + 1e-5 * values[0])).T
    projection.weight.data.copy_(filters.reshape(projection.weight.shape))
    assert projection.bias is not None
    projection.bias.data.copy_(-(filters @ mean))


def _sines(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, [side^2, width], as in a transformer's fixed positions."""
    frequencies = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (row, column)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)


def _copies(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def _write(variant: Variant, tensors: dict[str, Tensor], prefix: str, folder: Path) -> Path:
    half = {prefix + name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()}
    path = folder / WEIGHTS_FILE
    save_tensors(half, path)
    config = json.dumps({"model_name": variant.model_id}, indent=2)
    (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
    return path
