"""The table of model variants: every fact about a model is in its row.

Other files use this table; none of them interprets a model id.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from da3_runtime.errors import SettingError, UnknownModelError
from da3_runtime.network_io import (
    ANYVIEW_INPUTS,
    ANYVIEW_OUTPUTS,
    MONOCULAR_INPUTS,
    MONOCULAR_OUTPUTS,
    RAY_OUTPUTS,
)
from da3_runtime.network_io import PATCH as PATCH

# Range of a model input's height and width, in pixels.
MIN_SIDE = 84
MAX_SIDE = 1036
# The default of every command, of serving and of the Python API: its license permits commercial use, and
# it runs on any machine. The reference service's default, da3nested-giant-large, does neither.
DEFAULT_MODEL = "da3-small"


class Head(StrEnum):
    """Decoder on top of the backbone; its value names the engine's folder."""

    DPT = "dpt"
    SDT = "sdt"


class Unit(StrEnum):
    """Unit of a depth map."""

    RELATIVE = "relative"
    METERS = "m"
    CAMERAS = "cameras"  # that of the translations of known cameras


class Series(StrEnum):
    """Upstream's two kinds of networks."""

    ANYVIEW = "anyview"
    MONOCULAR = "monocular"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs of a network of this series, in order."""
        return ANYVIEW_INPUTS if self is Series.ANYVIEW else MONOCULAR_INPUTS

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs of a network of this series without a ray branch, in order."""
        if self is Series.ANYVIEW:
            return ANYVIEW_OUTPUTS
        return MONOCULAR_OUTPUTS


@dataclass(frozen=True)
class Graph:
    """One network of a variant: one ONNX file, one plan.

    Attributes
    ----------
    name : str
        ``model``, or the network's name in the nested variant.
    config : str
        Row of the network's sizes, ``network/sizes.py``; upstream's name of its configuration.
    prefix : str
        Prefix of its tensors in the variant's checkpoint.
    series : Series
        Decides its outputs.
    takes_sdt : bool
        Whether the SDT head replaces its DPT head in an engine with ``HEAD=sdt``.
    rays : bool
        Whether the ray branch is included.
    """

    name: str
    config: str
    prefix: str
    series: Series
    takes_sdt: bool = True
    rays: bool = False

    @property
    def key(self) -> str:
        """Start of its file names, and its name in the manifest and the parity report."""
        return f"{self.name}-rays" if self.rays else self.name

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of its outputs, in order."""
        return self.series.outputs + (RAY_OUTPUTS if self.rays else ())


@dataclass(frozen=True)
class Variant:
    """One DA3 model.

    Attributes
    ----------
    model_id : str
        Short id.
    repo : str | None
        Hub repository of the preferred checkpoint; None if the checkpoint is bundled with this package.
    license : str
        SPDX id of the checkpoint's license.
    graphs : tuple[Graph, ...]
        Its networks; the nested model has two.
    unit : Unit
        Unit of the depth if the focal length is unknown.
    canonical_focal : float | None
        If set, depth x focal length / canonical_focal is in meters; the focal length is in pixels of the
        model's input (upstream's ``apply_metric_scaling``).
    deprecated_repos : tuple[str, ...]
        Older repositories that are still accepted.
    above_half_billion : bool
        Whether it has more than 500 million parameters.
    sdt_fusion_channels : int
        Default number of channels of its SDT head's fused map.
    processing_res : int
        Default longest side of its input, in pixels.
    knows_scenes : bool
        Whether its cameras of several views mean something.
    """

    model_id: str
    repo: str | None
    license: str
    graphs: tuple[Graph, ...]
    unit: Unit = Unit.RELATIVE
    canonical_focal: float | None = None
    deprecated_repos: tuple[str, ...] = ()
    above_half_billion: bool = False
    sdt_fusion_channels: int = 256
    processing_res: int = 504
    knows_scenes: bool = True

    @property
    def needs_focal(self) -> bool:
        """Whether it returns meters only if the photo's focal length is known."""
        return self.canonical_focal is not None and self.unit is Unit.RELATIVE

    @property
    def ray_graphs(self) -> tuple[Graph, ...]:
        """The variant's networks that have a ray branch, with the branch included."""
        return tuple(
            replace(graph, rays=True) for graph in self.graphs if graph.series is Series.ANYVIEW
        )

    def graphs_for(self, ray_pose: bool) -> tuple[Graph, ...]:
        """The graphs to run for a camera from rays (``ray_pose``) or from the camera decoder."""
        if not ray_pose:
            return self.graphs
        with_rays = {graph.name: graph for graph in self.ray_graphs}
        return tuple(with_rays.get(graph.name, graph) for graph in self.graphs)


APACHE, MIT, NON_COMMERCIAL = "Apache-2.0", "MIT", "CC-BY-NC-4.0"
METRIC_FOCAL = 300.0


def _anyview(config: str) -> tuple[Graph, ...]:
    return (Graph("model", config, "model.", Series.ANYVIEW),)


def _monocular(config: str) -> tuple[Graph, ...]:
    return (Graph("model", config, "model.", Series.MONOCULAR),)


VARIANTS: dict[str, Variant] = {
    variant.model_id: variant
    for variant in (
        Variant(
            "da3-nano",
            None,
            MIT,
            _anyview("da3-nano"),
            sdt_fusion_channels=32,
            processing_res=168,
            knows_scenes=False,
        ),
        Variant("da3-small", "depth-anything/DA3-SMALL", APACHE, _anyview("da3-small")),
        Variant("da3-base", "depth-anything/DA3-BASE", APACHE, _anyview("da3-base")),
        Variant(
            "da3-large",
            "depth-anything/DA3-LARGE-1.1",
            NON_COMMERCIAL,
            _anyview("da3-large"),
            deprecated_repos=("depth-anything/DA3-LARGE",),
        ),
        Variant(
            "da3-giant",
            "depth-anything/DA3-GIANT-1.1",
            NON_COMMERCIAL,
            _anyview("da3-giant"),
            deprecated_repos=("depth-anything/DA3-GIANT",),
            above_half_billion=True,
        ),
        Variant(
            "da3metric-large",
            "depth-anything/DA3METRIC-LARGE",
            APACHE,
            _monocular("da3metric-large"),
            canonical_focal=METRIC_FOCAL,
        ),
        Variant("da3mono-large", "depth-anything/DA3MONO-LARGE", APACHE, _monocular("da3mono-large")),
        Variant(
            "da3nested-giant-large",
            "depth-anything/DA3NESTED-GIANT-LARGE-1.1",
            NON_COMMERCIAL,
            (
                Graph("anyview", "da3-giant", "model.da3.", Series.ANYVIEW),
                Graph(
                    "metric",
                    "da3metric-large",
                    "model.da3_metric.",
                    Series.MONOCULAR,
                    takes_sdt=False,
                ),
            ),
            unit=Unit.METERS,
            canonical_focal=METRIC_FOCAL,
            deprecated_repos=("depth-anything/DA3NESTED-GIANT-LARGE",),
            above_half_billion=True,
        ),
    )
}


def find_variant(model: str, name: str = "MODEL") -> Variant:
    """The variant named ``model``, case-insensitive.

    Parameters
    ----------
    model : str
        Short id, or a hub repository of the variant such as ``depth-anything/DA3-SMALL``.
    name : str
        Name of the caller's setting or field, for the error.

    Raises
    ------
    UnknownModelError
        If no variant has that name; the message lists the ids.
    """
    wanted = model.strip().lower()
    for variant in VARIANTS.values():
        repos = (variant.repo or "", *variant.deprecated_repos)
        if wanted and wanted in (variant.model_id, *(repo.lower() for repo in repos)):
            return variant
    known = ", ".join(VARIANTS)
    raise UnknownModelError(f"{name} {model!r} is not a known model; choose one of: {known}.")


def nested_variant(variant: Variant) -> Variant | None:
    """The variant whose checkpoint holds ``variant``'s network as one of several, under its license."""
    (graph, *others) = variant.graphs
    for outer in VARIANTS.values():
        configs = [each.config for each in outer.graphs]
        if not others and len(configs) > 1 and graph.config in configs:
            return outer if outer.license == variant.license else None
    return None


def nested_graph(variant: Variant) -> Graph | None:
    """``variant``'s network as a part of its :func:`nested_variant`."""
    outer = nested_variant(variant)
    config = variant.graphs[0].config
    return next((each for each in outer.graphs if each.config == config), None) if outer else None


def find_head(head: str) -> Head:
    """The head named ``head``, case-insensitive.

    Raises
    ------
    SettingError
        If no head has that name; the message lists the heads.
    """
    try:
        return Head(head.strip().lower())
    except ValueError:
        known = ", ".join(Head)
        raise SettingError(f"HEAD {head!r} is not a known head; choose one of: {known}.") from None


def check_ray_pose(variant: Variant, head: Head, name: str = "RAY_POSE") -> None:
    """Check that a model and head can compute the camera from rays.

    Parameters
    ----------
    name : str
        Name of the caller's setting or field, for the error.

    Raises
    ------
    SettingError
        If the variant has no ray branch, or the head replaces it.
    """
    if not variant.ray_graphs:
        raise SettingError(f"{name}: {variant.model_id} has no rays; leave {name} out.")
    check_head_has_rays(head, name)


def check_head_has_rays(head: Head, name: str = "RAY_POSE") -> None:
    """Check that a head can compute rays.

    Raises
    ------
    SettingError
        If the head is SDT.
    """
    if head is Head.SDT:
        raise SettingError(f"{name}: the SDT head has no rays; use the DPT head, or leave {name} out.")
