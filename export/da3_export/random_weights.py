"""``WEIGHTS=random:SEED``: an untrained checkpoint for tests and CI, in the hub's layout; and SDT heads.

With upstream's initial values most of the network is silent: layer scales of 1e-5, zero tokens, unit
norms. A graph that dropped a block or a table would still pass. So every tensor gets random values, from
distributions wide enough that each part moves the output.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from da3_export.util.tensors import save_tensors
from da3_runtime.errors import SettingError
from da3_runtime.network.load import build_network, build_sdt
from da3_runtime.network.sdt import SDT
from da3_runtime.network.vit import Features
from da3_runtime.store.checkpoint import CONFIG_FILE, RANDOM_KEY, RANDOM_PREFIX, WEIGHTS_FILE, Checkpoint
from da3_runtime.variants import Variant

# Relative errors mean something only where these two are in the range of a trained network: fields of
# view of a real lens (radians), and logits of order one before exp.
FIELD_OF_VIEW = (0.8, 1.2)
LOGIT_GAIN = 0.3
LOGITS = ("output_conv2.2", "output_conv.4")


def seed_of(weights: str, setting: str = "WEIGHTS") -> int:
    """The seed of a ``random:SEED`` value.

    Parameters
    ----------
    setting : str
        The setting that has the value.

    Raises
    ------
    SettingError
        If SEED is not a whole number from 0 to 2^63 - 1.
    """
    text = weights.removeprefix(RANDOM_PREFIX)
    if not text.isdecimal() or int(text) >= 2**63:
        raise SettingError(f"{setting} {weights!r}: SEED in 'random:SEED' is a whole number.")
    return int(text)


def write_random_checkpoint(variant: Variant, seed: int, folder: Path) -> Checkpoint:
    """Write random weights for ``variant`` to ``folder``, which is created.

    Upstream's ``DepthAnything3.from_pretrained(folder)`` reads them. The safetensors header carries the
    seed, which marks the file as untrained wherever it is copied.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for graph in variant.graphs:
        network = build_network(graph)
        randomize(network, generator)
        tensors |= {graph.prefix + name: tensor for name, tensor in _unique_tensors(network).items()}
    folder.mkdir(parents=True)
    weights = f"{RANDOM_PREFIX}{seed}"
    _save(tensors, folder / WEIGHTS_FILE, weights)
    config = json.dumps({"model_name": variant.model_id}, indent=2)
    (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
    return Checkpoint(weights, folder / WEIGHTS_FILE, trained=False)


def write_random_sdt(
    channels: int, fused: int, seed: int, path: Path, features: Features | None = None
) -> None:
    """Write an SDT head with random weights to ``path``, whose folder must exist.

    Parameters
    ----------
    channels, fused : int
        Feature width, and width of the fused map.
    features : Features | None
        What a trained backbone gives for some photos, to which the head is scaled. None for a random
        backbone, whose features are of order one.
    """
    head = build_sdt(channels, fused)
    # Ten layers with a ReLU and nothing around them would fade to a constant at a gain of one.
    randomize(head, torch.Generator().manual_seed(seed), gain=math.sqrt(2))
    if features is not None:
        _scale_to(head, features)
    _save(_unique_tensors(head), path, f"{RANDOM_PREFIX}{seed}")


def _scale_to(head: SDT, features: Features) -> None:
    """Scale the first layer of every level as if the features' root mean square were one, in place.

    Trained features are ten times as large and more. Without it the sampling points of the random
    DySample layers jump by several pixels from one pixel to the next, so that the smallest rounding
    error moves the depth (da3-nano: mean error 0.16 in FP16, 3e-4 in FP32).
    """
    for readout, *level in zip(
        head.weighted_fusion.readout_projects, features.levels, features.tokens, strict=True
    ):
        (weight,) = (p for p in readout.parameters() if p.ndim == 2)
        for part, values in zip(weight.chunk(2, dim=1), level, strict=True):
            # A power of two, so that the file does not depend on how a machine rounds.
            part.mul_(2.0 ** -round(math.log2(values.square().mean().sqrt())))


def _unique_tensors(network: nn.Module) -> dict[str, Tensor]:
    """State of a network with a shared tensor listed once, as safetensors must have it."""
    state = dict(network.named_parameters()) | dict(network.named_buffers())
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _save(tensors: dict[str, Tensor], path: Path, weights: str) -> None:
    # One header entry only: safetensors writes several in no fixed order, and the file would not repeat.
    save_tensors(tensors, path, metadata={RANDOM_KEY: weights})


def randomize(network: nn.Module, generator: torch.Generator, gain: float = 1.0) -> None:
    """Give every parameter and running statistic of a network a random value, in place.

    Parameters
    ----------
    gain : float
        Output over input spread of a linear layer or convolution.
    """
    with torch.no_grad():
        for name, module in network.named_modules():
            for kind, parameter in module.named_parameters(recurse=False):
                _randomize_parameter(module, kind, parameter, generator, gain)
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0.0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            if name.endswith("fc_fov.0") and isinstance(module, nn.Linear):
                module.weight.mul_(0.1)
                module.bias.uniform_(*FIELD_OF_VIEW, generator=generator)
            if name.endswith(LOGITS) and isinstance(module, nn.Conv2d):
                module.weight.mul_(LOGIT_GAIN)


def _randomize_parameter(
    module: nn.Module, kind: str, parameter: Tensor, generator: torch.Generator, gain: float
) -> None:
    if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        if kind == "weight":
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0.0, 0.1, generator=generator)
    elif kind == "bias":
        parameter.normal_(0.0, 0.1, generator=generator)
    elif kind == "weight":
        spread = gain / math.sqrt(_fan_in(module, parameter))
        parameter.normal_(0.0, spread, generator=generator)
    elif kind == "gamma":
        parameter.uniform_(0.3, 0.8, generator=generator)
    else:  # class and camera tokens, positional embedding, weights of the SDT's levels
        parameter.normal_(0.0, 0.5, generator=generator)


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    """Inputs that one output value sums over."""
    if isinstance(module, nn.ConvTranspose2d):
        overlap = math.prod(module.kernel_size) // math.prod(module.stride)
        return weight.shape[0] * overlap
    return weight[0].numel()
