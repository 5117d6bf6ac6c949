"""All settings of the runtime, read from the environment and validated once, at the start.

Other packages read further variables: huggingface_hub reads ``HF_*``, the RunPod SDK reads ``BUCKET_*``
and ``RUNPOD_*``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from da3_runtime.errors import SettingError
from da3_runtime.image.settings import OWN_FILES, DownloadSettings, FilmSettings, ImageSettings
from da3_runtime.inference.settings import InferenceSettings
from da3_runtime.output.settings import WorkspaceSettings
from da3_runtime.serve.settings import CapacitySettings, ServerSettings
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.setting_group import Setting, make_group, settings_of_group, variables_given


@dataclass(frozen=True)
class Settings:
    """The groups of settings; each function gets only the groups that it needs."""

    engine: EngineSettings = field(default_factory=EngineSettings)
    images: ImageSettings = field(default_factory=ImageSettings)
    films: FilmSettings = field(default_factory=FilmSettings)
    downloads: DownloadSettings = field(default_factory=DownloadSettings)
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    capacity: CapacitySettings = field(default_factory=CapacitySettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    workspace: WorkspaceSettings = field(default_factory=WorkspaceSettings)

    @classmethod
    def of(cls, **values: object) -> Self:
        """Settings from values by name, as ``Settings.of(model_id="da3-nano", threads=2)``.

        Raises
        ------
        SettingError
            If a name is not a setting, or a value is invalid.
        """
        return cls()._with(values, {})

    @classmethod
    def from_env(
        cls,
        env: Mapping[str, str] = os.environ,
        groups: Collection[str] | None = None,
        own_files: bool = False,
    ) -> Self:
        """Settings from environment variables; an empty variable counts as unset.

        Parameters
        ----------
        groups : Collection[str] | None
            Names of the groups to read; the others keep their defaults. None: all.
        own_files : bool
            Whether the images are the user's own files, whose limits have larger defaults.

        Raises
        ------
        SettingError
            If a value is invalid, or two variables contradict each other; the message names them.
        """
        env = EngineSettings.resolved(env)
        names: dict[str, str] = {}
        for key, group in GROUPS.items():
            if groups is None or key in groups:
                names |= variables_given(group, env)
        values: dict[str, object] = dict(OWN_FILES) if own_files else {}
        values |= {name: env[variable] for name, variable in names.items()}
        return cls()._with(values, names)

    def changed(self, **values: object) -> Self:
        """These settings with some values changed; raises as :meth:`of`."""
        return self._with(values, {})

    def _with(self, values: Mapping[str, object], names: Mapping[str, str]) -> Self:
        unknown = [name for name in values if name not in _GROUP_OF]
        if unknown:
            raise SettingError(
                f"{unknown[0]} is not a setting; the settings are: {', '.join(_GROUP_OF)}."
            )
        by_group: dict[str, dict[str, object]] = {}
        for name, value in values.items():
            by_group.setdefault(_GROUP_OF[name], {})[name] = value
        groups: dict[str, Any] = {}
        for key, given in by_group.items():
            kept = {each.name: getattr(getattr(self, key), each.name) for each in _ROWS[key]}
            groups[key] = make_group(GROUPS[key], kept | given, names)
        return replace(self, **groups)


GROUPS: dict[str, type[Any]] = {each.name: each.default_factory for each in fields(Settings)}  # type: ignore[misc]
_ROWS = {key: settings_of_group(group) for key, group in GROUPS.items()}
_GROUP_OF = {each.name: key for key, rows in _ROWS.items() for each in rows}


def table() -> list[Setting]:
    """Every setting of the runtime, group by group, as docs/settings.md lists them."""
    return [each for rows in _ROWS.values() for each in rows]
