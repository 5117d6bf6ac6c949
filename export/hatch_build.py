"""Declare da3-runtime of the same version, which only ``__init__.py`` states, as a dependency."""

from __future__ import annotations

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class SameVersion(MetadataHookInterface):
    """Hatchling's hook; it runs after the version is read."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Write the field ``dependencies``."""
        extras = ",".join(self.config["runtime-extras"])
        runtime = f"da3-runtime[{extras}]=={metadata['version']}"
        metadata["dependencies"] = [runtime, *self.config["dependencies"]]
