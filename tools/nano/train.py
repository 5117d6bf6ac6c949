"""Train a small any-view network on rendered scenes: depth, confidence and cameras, then rays.

Two stages. The first one sees photos only; the second one also sees several views of a scene, some with
their cameras given.

The data is deterministic: step N sees the same scenes on every machine, however often a run is stopped.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from da3_export.crops import in_order
from da3_export.losses import gradient_matching
from da3_export.optimizers import Optimizers, share_of_peak
from da3_export.util.progress import Progress
from da3_export.util.tensors import save_tensors
from da3_runtime.errors import SettingError
from da3_runtime.network.dpt import DPTHead
from da3_runtime.network.load import build_network, load_weights
from da3_runtime.network.network import DepthNetwork
from da3_runtime.network.vit import normalize
from da3_runtime.postprocess.poses import encode_poses, normalized
from da3_runtime.postprocess.rays import image_plane
from da3_runtime.store.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from da3_runtime.util.files import replacing
from da3_runtime.variants import PATCH, Graph, Variant
from tools.nano import losses
from tools.nano.scenes import FAR, render, render_views

STATE_FILE = "training.pt"
LOG_EVERY = 20
SAVE_EVERY = 100
AVERAGE = 0.998  # of the weights that are kept
# Share that the weights of the start have in those of the end, but for the cameras' parts. On 64 scenes
# of another seed, AbsRel of one photo is 0.1060 with it, 0.1075 without it, and 0.1081 of the start. The
# ray branch stays that of the start: trained with all else, its values grow beyond what FP16 holds.
KEPT_SHARE = 0.15
CAMERA_PARTS = ("cam_dec.", "cam_enc.")
RAY_SHARE = 0.05  # of the steps, at the end, for the ray branch
LATE_SHARE = 0.3  # of the steps, at the end, with larger images
KEPT_BATCHES = 64  # by a rendering process, to be shown once more, mirrored
PATCH_SCENES = 64  # whose patches the patch embedding is fitted to
ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3)
ASPECT_ODDS = (0.1, 0.35, 0.2, 0.1, 0.15, 0.1)


@dataclass(frozen=True)
class Stage:
    """One stage of the training.

    Attributes
    ----------
    name : str
        Name of its state.
    early, late : tuple
        Longest side, images and odds of a step; every step is about as much work. Many small images
        teach more in the same time than few large ones; the large ones come last.
    views : tuple[tuple[int, float], ...]
        Number of views of a step's scenes, and its odds.
    rate : float
        Its share of the optimizers' peak rates.
    first_seed : int
        Added to the seed of its scenes.
    has_rays : bool
        Whether the rays are learned with all else; if not, alone at the end, for a share of
        :data:`RAY_SHARE` of the steps. Rays say for every patch how its camera is turned, which teaches
        more than one camera token does.
    """

    name: str
    early: tuple[tuple[int, int, float], ...]
    late: tuple[tuple[int, int, float], ...]
    views: tuple[tuple[int, float], ...] = ((1, 1.0),)
    rate: float = 1.0
    first_seed: int = 0
    has_rays: bool = False


PHOTOS = Stage(
    "photos",
    early=((112, 16, 0.7), (168, 8, 0.3)),
    late=((112, 16, 0.15), (168, 8, 0.35), (252, 4, 0.35), (336, 2, 0.1), (504, 1, 0.05)),
)
SCENES = Stage(
    "scenes",
    early=((112, 16, 0.75), (168, 8, 0.25)),
    late=((112, 16, 0.3), (168, 8, 0.6), (252, 4, 0.1)),
    views=((1, 0.2), (2, 0.4), (3, 0.15), (4, 0.25)),
    rate=0.6,
    first_seed=500_000,
    has_rays=True,
)
_NO_TURN = (0.0, 0.0, 0.0, 1.0)  # quaternion
GIVEN = 0.25  # share of the scenes of several views whose cameras are given


class Batch(dict[str, Tensor]):
    """Scenes: ``images`` uint8 [B, S, H, W, 3]; ``depth`` and ``sky`` [B, S, H, W]; their true
    ``intrinsics`` [B, S, 3, 3] and ``extrinsics`` [B, S, 3, 4]; the wanted ``reference`` int64 [B], and
    whether the network ``is_given`` the cameras, bool [B].
    """


class Scenes(Dataset[Batch]):
    """The batch of every step: :data:`KEPT_BATCHES` new ones, then the same mirrored, and so on.

    Parameters
    ----------
    stage : Stage
        Which sizes and numbers of views.
    seed : int
        Seed of the scenes.
    steps : int
        Number of batches.
    """

    def __init__(self, stage: Stage, seed: int, steps: int) -> None:
        self.stage = stage
        self.seed = seed + stage.first_seed
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
        is_early = 2 * number < self.steps * (1 - LATE_SHARE)
        sizes = self.stage.early if is_early else self.stage.late
        longest, count, _ = sizes[rng.choice(len(sizes), p=[odds for _, _, odds in sizes])]
        aspect = rng.choice(ASPECTS, p=ASPECT_ODDS)
        width, height = (longest, longest / aspect) if aspect >= 1 else (longest * aspect, longest)
        size = (round(height / PATCH) * PATCH, round(width / PATCH) * PATCH)
        numbers, odds = zip(*self.stage.views, strict=True)
        views = int(rng.choice(numbers, p=odds))
        count = max(1, count // views)
        scenes = [render_views(self.seed, number * 64 + i, views, *size) for i in range(count)]
        stacked = {
            name: np.stack([[getattr(view, name) for view in scene] for scene in scenes])
            for name in ("rgb", "depth", "sky", "intrinsics", "extrinsics")
        }
        images = stacked.pop("rgb")
        is_given = (rng.uniform(size=count) < GIVEN) & (views > 1)
        batch = {
            "images": images,
            **stacked,
            "reference": np.where(is_given, 0, rng.integers(views, size=count)),
            "is_given": is_given,
        }
        return Batch({name: torch.from_numpy(value) for name, value in batch.items()})


def mirrored(batch: Batch) -> Batch:
    """Mirror images of the scenes, and of their cameras.

    The principal point is the center, so the intrinsics stay.
    """
    flipped = {name: batch[name].flip(3) for name in ("images", "depth", "sky")}
    mirror = torch.tensor([-1.0, 1.0, 1.0])
    sides = mirror[:, None] * torch.cat((mirror, torch.ones(1)))
    return Batch({**batch, **flipped, "extrinsics": batch["extrinsics"] * sides})


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


def train(
    variant: Variant,
    seed: int,
    steps: int,
    workers: int,
    folder: Path,
    stage: Stage = PHOTOS,
    start: Path | None = None,
) -> Path:
    """Train ``variant``, or continue where an earlier run in ``folder`` was stopped.

    Parameters
    ----------
    seed, steps : int
        Seed of weights and scenes, and total number of steps; those of the earlier run if it continues.
    workers : int
        Processes that render.
    stage : Stage
        What it sees.
    start : Path | None
        Checkpoint to start from; None starts from nothing.

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
    first: dict[str, Tensor] = {}
    hidden: list[nn.Module] = [network.backbone.pretrained.blocks, network.head]
    if start is None:
        _initialise(network, seed)
    else:
        load_weights(network, variant, graph, start)
        first = _copies(network)
        hidden += [network.cam_dec.backbone, network.cam_enc.trunk]
    network.train().requires_grad_(True)
    if start is not None:
        _restart_decoder(network, seed)
    plan = f"{variant.model_id} with seed {seed} and {steps} steps, stage {stage.name}"
    state = State(plan, network, _copies(network), Optimizers(network, hidden), [])
    state_path = folder / STATE_FILE
    if state_path.exists():
        state.load(state_path)
    first_ray_step = steps if stage.has_rays else steps - int(steps * RAY_SHARE)
    if stage.has_rays:
        network.graph = variant.ray_graphs[0]
    progress = Progress(variant.model_id, 1)
    if state.step:
        progress.log(f"continuing at step {state.step}")
    with progress.step("train", steps, state.step) as advance:
        for batch in in_order(Scenes(stage, seed, steps), state.step, steps, workers):
            batch = Batch({name: value.to(device) for name, value in batch.items()})
            if state.step >= first_ray_step:
                _train_rays_only(network, variant.ray_graphs[0])
                parts = _ray_losses(_run(network, batch), batch)
            else:
                outputs = _run(network, batch)
                parts = _depth_losses(outputs, batch)
                if stage.has_rays:
                    parts |= _ray_losses(outputs, batch)
            total = sum(parts.values(), torch.zeros((), device=device))
            network.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            state.optimizers.step(stage.rate * _rate(state.step, steps, steps - first_ray_step))
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
    for name, tensor in first.items():
        if "_aux." in name:
            state.average[name].copy_(tensor)
        elif not name.startswith(CAMERA_PARTS):
            state.average[name].lerp_(tensor, KEPT_SHARE)
    return _write(variant, state.average, graph.prefix, folder)


class Targets(NamedTuple):
    """The true cameras of a batch, in the network's frame and unit.

    Attributes
    ----------
    lens, pose : Tensor
        Intrinsics [B S, 3, 3] and extrinsics [B S, 3, 4]. The reference view's camera is the frame, and
        the median depth of all views is the unit.
    """

    lens: Tensor
    pose: Tensor


def _targets(batch: Batch) -> Targets:
    pairs = zip(batch["depth"], batch["depth"] < FAR, strict=True)
    unit = torch.stack([d[v].median() if v.any() else d.new_ones(()) for d, v in pairs])
    extrinsics = batch["extrinsics"]
    rotation, translation = extrinsics[..., :3], extrinsics[..., 3:]
    which = torch.arange(len(unit), device=unit.device)
    base = rotation[which, batch["reference"]].transpose(1, 2)[:, None]
    rotation = rotation @ base
    translation = translation - rotation @ translation[which, batch["reference"]][:, None]
    pose = torch.cat((rotation, translation / unit[:, None, None, None]), dim=-1).flatten(0, 1)
    return Targets(batch["intrinsics"].flatten(0, 1), pose)


def _run(network: DepthNetwork, batch: Batch) -> dict[str, Tensor]:
    """The outputs for a batch; those per view have one dimension for scenes and views, [B S, ...]."""
    poses = None
    if batch["is_given"].any():
        height, width = batch["images"].shape[2:4]
        poses = _encodings(batch["extrinsics"], batch["intrinsics"], height, width)
        poses = torch.where(batch["is_given"][:, None, None], poses, 0)
    values = network(batch["images"], batch["reference"], poses)
    outputs = dict(zip(network.output_names, values, strict=True))
    return {name: value.flatten(0, 1) for name, value in outputs.items() if name != "reference"}


def _encodings(extrinsics: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    pairs = zip(extrinsics.cpu().numpy(), intrinsics.cpu().numpy(), strict=True)
    return torch.from_numpy(
        np.stack([encode_poses(normalized(poses), lenses, height, width) for poses, lenses in pairs])
    ).to(extrinsics.device)


def _depth_losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    target = _targets(batch)
    # All views of a scene have one scale: they are one tall map.
    tall_depth = batch["depth"].flatten(1, 2)
    tall_valid = tall_depth < FAR
    tall = losses.log_residual(outputs["depth"].reshape(tall_depth.shape), tall_depth, tall_valid)
    valid = tall_valid.reshape(outputs["depth"].shape)
    residual = tall.reshape(valid.shape)
    farthest = torch.where(valid, outputs["depth"].detach(), 0).flatten(1).amax(dim=1) * 1.2
    parts = {
        "depth": losses.scale_invariant(tall, tall_valid),
        "gradient": 0.5 * gradient_matching(residual, valid),
        "confidence": 0.2 * losses.confidence(outputs["confidence"], residual.abs(), valid),
        "sky": 0.1 * losses.sky(outputs["depth"], batch["sky"].flatten(0, 1), farthest.clamp(min=1e-3)),
        "camera": 0.2
        * losses.camera(outputs["intrinsics"], outputs["extrinsics"], target.lens, target.pose),
    }
    if batch["images"].shape[1] > 1:
        parts["pose"] = 3 * losses.relative_pose(outputs["extrinsics"], target.pose)
    return parts


def _ray_losses(outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Rays start at their camera and leave through the pixels, in the reference view's frame."""
    target = _targets(batch)
    predicted = outputs["rays"]
    height, width = batch["images"].shape[2:4]
    plane = torch.from_numpy(image_plane(*predicted.shape[1:3])).to(predicted)
    half = torch.tensor([width / 2, height / 2], device=predicted.device)
    slope = half / target.lens[:, (0, 1), (0, 1)]
    directions = plane[None] * slope[:, None]
    directions = torch.cat((directions, torch.ones_like(directions[..., :1])), dim=-1)
    directions = directions @ target.pose[:, :, :3]  # to the reference's frame: the inverse rotation
    origins = losses.center(target.pose)[:, None].expand_as(directions)
    rays = torch.cat((directions, origins), dim=-1).reshape(predicted.shape)
    error = (predicted - rays).abs().mean(dim=-1)
    mask = torch.ones_like(error, dtype=torch.bool)
    weight = 1 if batch["images"].shape[1] == 1 else 3
    return {
        "rays": weight * losses.rays(predicted, rays),
        "ray confidence": 0.2 * losses.confidence(outputs["ray_confidence"], error, mask),
    }


def _rate(step: int, steps: int, rays: int) -> float:
    """Share of the peak rates; the last steps, for ``rays`` alone, begin anew."""
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
            module.bias.data.copy_(torch.tensor(_NO_TURN))
            module.weight.data.mul_(0.1)


def _restart_decoder(network: DepthNetwork, seed: int) -> None:
    """Let the camera decoder learn anew, with its first layer fixed.

    After photos alone, whose pose is always the identity, nearly all of its ReLUs are shut, and pass no
    gradient. Camera tokens have a large mean in common: a small step of the first layer along it shuts
    them all again. So this layer looks in random directions from the mean, and only its bias learns.
    """
    layers = [module for module in network.cam_dec.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.reset_parameters()
    nn.init.constant_(layers[-1].bias, 1.0)  # the field of view's
    network.cam_dec.fc_qvec.bias.data.copy_(torch.tensor(_NO_TURN))
    scenes = [[view.rgb for view in render_views(seed, i, 2, 84, 112)] for i in range(PATCH_SCENES)]
    with torch.no_grad():
        tokens = network.backbone(torch.from_numpy(np.array(scenes))).tokens[-1]
        mean, spread = tokens.mean(dim=0), tokens.std(dim=0).norm()
        first = layers[0]
        first.weight.normal_().div_(spread)
        first.bias.copy_(-first.weight @ mean)
    first.weight.requires_grad_(False)


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
