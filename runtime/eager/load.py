"""Checkpoint -> upstream's modules -> the network."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from runtime.eager.network import DepthNetwork
from runtime.eager.precision import Precision
from runtime.errors import CheckpointError
from runtime.variants import Variant

CHECKPOINT_PREFIX = "model."
# Parts of upstream's network that take no part in depth (and need packages of their own to build).
UNUSED_PARTS = ("gs_head", "gs_adapter")
_NAMED = 3


def build_upstream(variant: Variant) -> nn.Module:
    """Upstream's own network for a variant, in eval mode, weights not loaded."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from depth_anything_3.cfg import create_object, load_config
        from depth_anything_3.registry import MODEL_REGISTRY

        config = load_config(MODEL_REGISTRY[variant.model_id])
        for part in UNUSED_PARTS:
            config.pop(part, None)
        network: nn.Module = create_object(config)
    return network.eval().requires_grad_(False)


def load_upstream(variant: Variant, path: Path) -> nn.Module:
    """Upstream's network with the weights of a safetensors checkpoint, in FP32.

    Raises
    ------
    CheckpointError
        If the file is damaged, or naming the first tensors that are missing, unexpected or of another
        shape.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError):
        raise CheckpointError(f"{path.name} is not a whole safetensors file.") from None
    network = build_upstream(variant)
    load_exactly(network, tensors, variant)
    return network


def load_exactly(network: nn.Module, tensors: dict[str, Tensor], variant: Variant) -> None:
    """Load ``tensors`` (names with the ``model.`` prefix) into ``network``; every tensor must fit.

    Raises
    ------
    CheckpointError
        Naming up to three tensors of each kind of mismatch.
    """
    unused = tuple(f"{CHECKPOINT_PREFIX}{part}." for part in UNUSED_PARTS)
    expected = {CHECKPOINT_PREFIX + name: tensor for name, tensor in network.state_dict().items()}
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
    # DualDPT's auxiliary levels share one LayerNorm, which safetensors stores under one of its names.
    covered = {expected[name].data_ptr() for name in given if name in expected}
    missing = [name for name, tensor in expected.items() if tensor.data_ptr() not in covered]
    unexpected = [name for name in given if name not in expected]
    reshaped = [
        f"{name} {list(given[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
        for kind, names in kinds
        if names
    ]
    if faults:
        raise CheckpointError(
            f"The checkpoint does not fit {variant.model_id}: tensors {'; '.join(faults)}."
        )
    state = {name.removeprefix(CHECKPOINT_PREFIX): t.float() for name, t in given.items()}
    network.load_state_dict(state, strict=False, assign=True)
    network.requires_grad_(False)


def load_network(variant: Variant, path: Path, precision: Precision) -> DepthNetwork:
    """The network of a checkpoint, in ``precision``, on the CPU.

    Raises
    ------
    CheckpointError
        As :func:`load_upstream`.
    """
    return DepthNetwork(load_upstream(variant, path), precision)
