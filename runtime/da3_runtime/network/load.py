"""Checkpoint -> the network of one graph."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from da3_runtime.errors import CheckpointError
from da3_runtime.network.names import PREFIX, upstream_names
from da3_runtime.network.network import DepthNetwork
from da3_runtime.network.precision import Precision
from da3_runtime.network.sdt import SDT
from da3_runtime.network.sizes import SIZES
from da3_runtime.variants import Graph, Variant, nested_graph

# Parts of a checkpoint that take no part in depth: they make 3D Gaussians.
UNUSED_PARTS = ("gs_head.", "gs_adapter.")
# The tensor that tells the width of an SDT head's fused map.
_SDT_PROJECTION = "weighted_fusion.projections.0.0.weight"
_NAMED = 3
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def build_network(graph: Graph) -> DepthNetwork:
    """A graph's network with random weights and every tensor of a checkpoint, in FP32."""
    return DepthNetwork(SIZES[graph.config], graph)


def load_weights(network: nn.Module, variant: Variant, graph: Graph, path: Path) -> None:
    """Load a graph's tensors of a safetensors checkpoint into ``network``, in FP32.

    The file may hold FP16 or BF16 values, have other names (:mod:`da3_runtime.network.names`), or be
    the nested model's, which has the network as one of two.

    Parameters
    ----------
    network : nn.Module
        With upstream's names and shapes; may be on the meta device.

    Raises
    ------
    CheckpointError
        If the file is damaged or a repack with other names, or naming the first tensors that are
        missing, unexpected or of another shape or dtype. The message names the original.
    """
    tensors = upstream_names(_read(path))
    outer = nested_graph(variant)
    if outer is not None and any(name.startswith(outer.prefix) for name in tensors):
        tensors = {
            name.replace(outer.prefix, graph.prefix, 1): tensor
            for name, tensor in tensors.items()
            if name.startswith(outer.prefix)
        }
    own = {
        name.removeprefix(graph.prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(graph.prefix)
    }
    given = {name: tensor for name, tensor in own.items() if not name.startswith(UNUSED_PARTS)}
    prefixes = tuple(other.prefix for other in variant.graphs)
    foreign = [name for name in tensors if not name.startswith(prefixes)]
    what = f"The checkpoint does not fit {variant.model_id}"
    original = f"{path.name} of {variant.repo}" if variant.repo else "the bundled one, without WEIGHTS"
    expected = network.state_dict().keys()
    if len(expected & given.keys()) < len(expected) / 2:
        raise CheckpointError(f"{what}: {_other_names(variant, tensors)}. Use the original: {original}.")
    try:
        load_exactly(network, given, what, graph.prefix, foreign)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Use the original: {original}.") from None


def _other_names(variant: Variant, tensors: dict[str, Tensor]) -> str:
    """What a checkpoint with other tensor names seems to be."""
    with torch.device("meta"):
        networks = [build_network(graph) for graph in variant.graphs]
    expected = sum(weight.numel() for network in networks for weight in network.parameters())
    given = sum(
        tensor.numel() for name, tensor in tensors.items() if not any(map(name.count, UNUSED_PARTS))
    )
    is_repack = 0.95 < given / expected < 1.05
    names = [name.removeprefix(PREFIX) for name in tensors]
    kind = f"a repack of {variant.model_id}" if is_repack else "another model's checkpoint, or a repack"
    return f"it is {kind}, with other tensor names ({', '.join(names[:_NAMED])}, ...)"


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, sorted by name; their data stays in the mapped file.

    Raises
    ------
    CheckpointError
        If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in sorted(stream.keys())}
    except (SafetensorError, OSError):
        raise CheckpointError(f"{path.name} is not a whole safetensors file.") from None


def load_exactly(
    network: nn.Module,
    given: dict[str, Tensor],
    what: str,
    prefix: str = "",
    foreign: Collection[str] = (),
) -> None:
    """Load ``given`` into ``network``, in FP32; every tensor must fit.

    Parameters
    ----------
    network : nn.Module
        Takes the tensors over, so it may be on the meta device.
    what : str
        Start of the error message.
    prefix : str
        Put before the names in the message.
    foreign : Collection[str]
        Names of further tensors that nothing expects.

    Raises
    ------
    CheckpointError
        Naming up to three tensors of each kind of mismatch.
    """
    expected = network.state_dict(keep_vars=True)
    # The four levels of the ray branch share one LayerNorm, which safetensors stores under one name.
    covered = {id(expected[name]) for name in given if name in expected}
    missing = [prefix + name for name, tensor in expected.items() if id(tensor) not in covered]
    unexpected = [prefix + name for name in given if name not in expected] + list(foreign)
    reshaped = [
        f"{prefix}{name} {list(given[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    quantized = [
        f"{prefix}{name} {str(given[name].dtype).removeprefix('torch.')} instead of float32"
        for name, tensor in expected.items()
        if name in given and tensor.is_floating_point() and given[name].dtype not in _FLOATS
    ]
    kinds = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", reshaped),
        ("of another dtype", quantized),
    )
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
        for kind, names in kinds
        if names
    ]
    if faults:
        raise CheckpointError(f"{what}: tensors {'; '.join(faults)}.")
    state = {name: t.float() if t.is_floating_point() else t for name, t in given.items()}
    network.load_state_dict(state, strict=False, assign=True)
    network.requires_grad_(False)


def feature_width(graph: Graph) -> int:
    """Channels of a level that a graph's head reads."""
    return SIZES[graph.config].feature_width


def build_sdt(channels: int, fused: int) -> SDT:
    """An SDT head with random weights, in eval mode.

    Parameters
    ----------
    channels, fused : int
        Width of a level, and width of the fused map.
    """
    return SDT(channels, fused, outputs=2).eval().requires_grad_(False)


def load_sdt(channels: int, path: Path, fused: int | None = None) -> SDT:
    """The SDT head of a safetensors file, in FP32.

    Parameters
    ----------
    channels : int
        Level width of the network that it goes on.
    fused : int | None
        Width the fused map must have; None takes the file's.

    Raises
    ------
    CheckpointError
        If the file is damaged, or naming the first tensors that are missing, unexpected or of another
        shape or dtype.
    """
    given = _read(path)
    if fused is None and _SDT_PROJECTION in given:
        fused = given[_SDT_PROJECTION].shape[0]
    head = build_sdt(channels, fused or 1)
    load_exactly(head, given, f"The SDT head does not fit features of width {channels}")
    return head


def load_network(
    variant: Variant,
    graph: Graph,
    path: Path,
    precision: Precision,
    sdt: Path | None = None,
    fold: bool = False,
) -> DepthNetwork:
    """The network of one graph for inference, in ``precision``, on the CPU.

    Parameters
    ----------
    path : Path
        The variant's checkpoint.
    sdt : Path | None
        Weights of an SDT head, where the graph has one.
    fold : bool
        Whether to fold layer scales into weights, for an export. The folded weights, a third of all,
        take memory, while those of the checkpoint stay in the mapped file.

    Raises
    ------
    CheckpointError
        As :func:`load_weights` and :func:`load_sdt`.
    """
    # Without memory until the checkpoint's tensors take their places.
    with torch.device("meta"):
        network = build_network(graph)
    load_weights(network, variant, graph, path)
    head = load_sdt(feature_width(graph), sdt) if sdt is not None else None
    if fold:
        network.fold_layer_scales()
    network.for_inference(precision, head)
    network.backbone.pretrained.pair_channels()
    return network
