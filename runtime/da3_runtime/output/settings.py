"""Settings of the volume on which previews are kept."""

from __future__ import annotations

from dataclasses import KW_ONLY
from pathlib import Path
from typing import ClassVar

from pydantic.dataclasses import dataclass

from da3_runtime.util.setting_group import CONFIG, setting


@dataclass(frozen=True, config=CONFIG)
class WorkspaceSettings:
    """Where served previews are kept, and for how long."""

    title: ClassVar[str] = "Workspace"

    _: KW_ONLY
    workspace: Path | None = setting(
        None, "Volume on which every served preview is also kept. Unset: none is kept."
    )
    output_retention_days: int = setting(
        0, "Age at which a kept preview is removed, in days. 0: never.", low=0, high=36_500
    )
