"""Settings of a build: those of an engine, and what only the exporter reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import ClassVar, Self

from pydantic.dataclasses import dataclass

from da3_runtime.inference.settings import InferenceSettings
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.setting_group import (
    CONFIG,
    Flag,
    Setting,
    make_group,
    setting,
    settings_of_group,
    variables_given,
)


@dataclass(frozen=True, config=CONFIG)
class BuildSettings(EngineSettings, InferenceSettings):
    """What builds, checks and evaluates an engine."""

    title: ClassVar[str] = "Builds (da3-export)"

    _: KW_ONLY
    sdt_fusion_channels: int | None = setting(
        None,
        "Width of an SDT head's fused map. Unset: the model's own, 256, or 32 for da3-nano.",
        low=8,
        high=1024,
        multiple=8,
    )
    hardware_compatible: Flag = setting(
        False, "Build a TensorRT plan for every GPU of compute capability 8.0 and later."
    )
    version_compatible: Flag = setting(
        False, "Build a TensorRT plan that tensorrt-lean of the same release runs too."
    )

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Self:
        """Settings from environment variables; an empty variable counts as unset.

        Raises
        ------
        SettingError
            Naming the variable whose value is not what it takes, or two that contradict each other.
        """
        env = cls.resolved(env)
        names = variables_given(cls, env)
        return make_group(cls, {name: env[variable] for name, variable in names.items()}, names)


def table() -> list[Setting]:
    """The settings that only the exporter has, as docs/settings.md lists them."""
    shared = {each.name for group in BuildSettings.__bases__ for each in settings_of_group(group)}
    return [each for each in settings_of_group(BuildSettings) if each.name not in shared]
