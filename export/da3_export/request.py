"""One build request: model, head, weights and target artefacts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from da3_export.random_weights import seed_of
from da3_export.settings import BuildSettings
from da3_runtime.errors import SettingError
from da3_runtime.store.checkpoint import HUB, RANDOM_PREFIX
from da3_runtime.store.manifest import Kind
from da3_runtime.variants import Head, Variant, check_ray_pose, find_head, find_variant

DEFAULT_TARGETS = (Kind.ONNX_FP32, Kind.ONNX_FP16, Kind.ONNX_FP16_ORT, Kind.TENSORRT_RTX)
# What PRECISION adds to them.
BY_PRECISION = {"bf16": (Kind.ONNX_BF16,), "int8": (Kind.ONNX_INT8,)}


@dataclass(frozen=True)
class Request:
    """One engine to build.

    Attributes
    ----------
    variant, head : Variant, Head
        The engine.
    weights, revision : str, str | None
        ``WEIGHTS`` and ``REVISION``.
    sdt_weights, sdt_fusion_channels : str | None, int
        ``SDT_WEIGHTS`` and ``SDT_FUSION_CHANNELS``.
    ray_pose : bool
        Whether to build the graphs with a ray branch too.
    hardware_compatible, version_compatible : bool
        ``HARDWARE_COMPATIBLE`` and ``VERSION_COMPATIBLE``, for a TensorRT plan.
    targets : tuple[Kind, ...]
        Artefacts that the engine must have at the end.
    engine_dir : Path
        Folder of all engine folders.
    cached_models_dir : Path
        A hub cache that is searched before the hub.
    """

    variant: Variant
    head: Head
    weights: str
    revision: str | None
    sdt_weights: str | None
    sdt_fusion_channels: int
    ray_pose: bool
    hardware_compatible: bool
    version_compatible: bool
    targets: tuple[Kind, ...]
    engine_dir: Path
    cached_models_dir: Path

    @property
    def folder(self) -> Path:
        """The engine folder."""
        return self.engine_dir / self.variant.model_id / self.head

    @property
    def title(self) -> str:
        """Name of the engine in messages."""
        return f"{self.variant.model_id}/{self.head}"


def request_of(settings: BuildSettings, targets: str | None) -> Request:
    """The request that settings and a comma-separated ``TARGETS`` make.

    Raises
    ------
    SettingError
        If a model, head or target does not exist, or the engine has no ray branch to build.
    """
    variant, head = find_variant(settings.model_id), find_head(settings.head)
    if settings.ray_pose:
        check_ray_pose(variant, head)
    weights = settings.weights or HUB
    for name, given in (("WEIGHTS", weights), ("SDT_WEIGHTS", settings.sdt_weights or "")):
        if given.startswith(RANDOM_PREFIX):
            seed_of(given, name)
    return Request(
        variant=variant,
        head=head,
        weights=weights,
        revision=settings.revision,
        sdt_weights=settings.sdt_weights,
        sdt_fusion_channels=settings.sdt_fusion_channels or variant.sdt_fusion_channels,
        ray_pose=settings.ray_pose,
        hardware_compatible=settings.hardware_compatible,
        version_compatible=settings.version_compatible,
        targets=_kinds(targets) or (*DEFAULT_TARGETS, *BY_PRECISION.get(settings.precision, ())),
        engine_dir=settings.engine_dir,
        cached_models_dir=settings.cached_models_dir,
    )


def _kinds(targets: str | None) -> tuple[Kind, ...]:
    names = [name.strip().lower() for name in (targets or "").split(",") if name.strip()]
    unknown = [name for name in names if name not in list(Kind)]
    if unknown:
        known = ", ".join(Kind)
        raise SettingError(f"TARGETS {unknown[0]!r} is not one of: {known}.")
    return tuple(dict.fromkeys(Kind(name) for name in names))
