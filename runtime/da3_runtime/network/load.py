"""Checkpoint -> upstream's modules -> the network of one graph."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from da3_runtime.errors import CheckpointError
from da3_runtime.network import Upstream
from da3_runtime.network.network import DepthNetwork
from da3_runtime.network.precision import Precision
from da3_runtime.network.sdt import SDT
from da3_runtime.variants import Graph, Variant

# Parts of upstream's network that take no part in depth (and need packages of their own to build).
UNUSED_PARTS = ("gs_head", "gs_adapter")
CONFIGS = Path(__file__).resolve().parent / "configs"
# Where an SDT head's widths can be read off.
_SDT_PROJECTION = "weighted_fusion.projections.0.0.weight"
_NAMED = 3


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Upstream's modules warn and print when they are imported and built."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _config(graph: Graph) -> Upstream:
    """Configuration of a graph's network: ours if there is one of that name, else upstream's."""
    from depth_anything_3.cfg import load_config
    from depth_anything_3.registry import MODEL_REGISTRY

    own = CONFIGS / f"{graph.config}.yaml"
    return load_config(str(own) if own.exists() else MODEL_REGISTRY[graph.config])


def build_upstream(graph: Graph) -> nn.Module:
    """Upstream's own network for a graph, in eval mode, weights not loaded."""
    with _quiet():
        from depth_anything_3.cfg import create_object

        config = _config(graph)
        for part in UNUSED_PARTS:
            config.pop(part, None)
        network: nn.Module = create_object(config)
    return network.eval().requires_grad_(False)


def load_upstream(variant: Variant, graph: Graph, path: Path) -> nn.Module:
    """Upstream's network with the weights of a safetensors checkpoint, in FP32.

    Raises
    ------
    CheckpointError
        If the file is damaged, or naming the first tensors that are missing, unexpected or of another
        shape.
    """
    network = build_upstream(graph)
    try:
        with safe_open(path, framework="pt") as stream:
            names = set(stream.keys())
            own = sorted(name for name in names if name.startswith(graph.prefix))
            tensors = {name.removeprefix(graph.prefix): stream.get_tensor(name) for name in own}
    except (SafetensorError, OSError):
        raise CheckpointError(f"{path.name} is not a whole safetensors file.") from None
    prefixes = tuple(other.prefix for other in variant.graphs)
    foreign = sorted(name for name in names if not name.startswith(prefixes))
    unused = tuple(f"{part}." for part in UNUSED_PARTS)
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
    what = f"The checkpoint does not fit {variant.model_id}"
    load_exactly(network, given, what, graph.prefix, foreign)
    return network


def load_exactly(
    network: nn.Module,
    given: dict[str, Tensor],
    what: str,
    prefix: str = "",
    foreign: Collection[str] = (),
) -> None:
    """Load ``given`` into ``network``; every tensor must fit.

    Parameters
    ----------
    what : str
        Start of the error message.
    prefix : str
        Put before the names in the message.
    foreign : Collection[str]
        Further names that have no place.

    Raises
    ------
    CheckpointError
        Naming up to three tensors of each kind of mismatch.
    """
    expected = network.state_dict()
    # DualDPT's auxiliary levels share one LayerNorm, which safetensors stores under one of its names.
    covered = {expected[name].data_ptr() for name in given if name in expected}
    missing = [prefix + name for name, t in expected.items() if t.data_ptr() not in covered]
    unexpected = [prefix + name for name in given if name not in expected] + list(foreign)
    reshaped = [
        f"{prefix}{name} {list(given[name].shape)} instead of {list(tensor.shape)}"
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
        raise CheckpointError(f"{what}: tensors {'; '.join(faults)}.")
    state = {name: t.float() if t.is_floating_point() else t for name, t in given.items()}
    network.load_state_dict(state, strict=False, assign=True)
    network.requires_grad_(False)


def feature_width(graph: Graph) -> int:
    """Channels of a level that a graph's head reads. Loads no weights."""
    with _quiet():
        return int(_config(graph).head.dim_in)


def build_sdt(channels: int, fused: int) -> SDT:
    """An SDT head, freshly initialised, in eval mode."""
    return SDT(channels, fused, outputs=2).eval().requires_grad_(False)


def load_sdt(channels: int, path: Path, fused: int | None = None) -> SDT:
    """The SDT head of a safetensors file, in FP32.

    Parameters
    ----------
    channels : int
        Feature width of the network it goes on.
    fused : int | None
        Width the fused map must have; None takes the file's.

    Raises
    ------
    CheckpointError
        As :func:`load_upstream`.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            given = {name: stream.get_tensor(name) for name in sorted(stream.keys())}
    except (SafetensorError, OSError):
        raise CheckpointError(f"{path.name} is not a whole safetensors file.") from None
    if fused is None and _SDT_PROJECTION in given:
        fused = given[_SDT_PROJECTION].shape[0]
    head = build_sdt(channels, fused or 1)
    load_exactly(head, given, f"The SDT head does not fit features of width {channels}")
    return head


def load_network(
    variant: Variant, graph: Graph, path: Path, precision: Precision, sdt: Path | None = None
) -> DepthNetwork:
    """The network of one graph, in ``precision``, on the CPU.

    Parameters
    ----------
    path : Path
        The variant's checkpoint.
    sdt : Path | None
        Weights of an SDT head, where the graph has one.

    Raises
    ------
    CheckpointError
        As :func:`load_upstream`.
    """
    upstream = load_upstream(variant, graph, path)
    head = load_sdt(feature_width(graph), sdt) if sdt is not None else None
    network = DepthNetwork(upstream, graph, precision, head)
    network.backbone.pair_channels()
    return network
