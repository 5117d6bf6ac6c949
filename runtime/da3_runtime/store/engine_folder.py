"""An engine folder: one model and head, its manifest and its artefacts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from da3_runtime.errors import ArtefactError
from da3_runtime.store.hub import HubFolder
from da3_runtime.store.manifest import Artefact, Kind, Manifest, verified_path
from da3_runtime.variants import Graph, Head, Variant


@dataclass(frozen=True)
class EngineFolder:
    """Where a backend loads from.

    Attributes
    ----------
    variant, head : Variant, Head
        What is asked for.
    path : Path
        The folder; it need not exist.
    manifest : Manifest | None
        Its manifest, None where no engine is.
    hub : HubFolder | None
        Where its files come from, when it lies in the hub's cache.
    """

    variant: Variant
    head: Head
    path: Path
    manifest: Manifest | None
    hub: HubFolder | None = None

    def artefact(self, graph: Graph, kind: Kind) -> Path:
        """Path of a graph's one artefact of ``kind``, verified; raises as the two it is made of."""
        return self.verified(self.artefacts(graph, kind)[0])

    def artefacts(self, graph: Graph, kind: Kind) -> list[Artefact]:
        """A graph's artefacts of ``kind`` as the manifest has them: no file is touched.

        Raises
        ------
        ArtefactError
            If there is none.
        """
        if self.manifest is None:
            raise ArtefactError("no engine has been built")
        entry = self.manifest.graphs.get(graph.key)
        if entry is None:
            raise ArtefactError("the engine was built without rays (RAY_POSE=1 builds them)")
        artefacts = entry.of_kind(kind)
        if not artefacts:
            raise ArtefactError(f"the engine folder has no {kind} artefact of graph {graph.key}")
        return artefacts

    def verified(self, artefact: Artefact) -> Path:
        """Path to load of one of the folder's artefacts, fetched if need be, verified.

        Raises
        ------
        ArtefactError
            If it cannot be fetched, or does not match the manifest.
        """
        if self.hub is not None:
            self.hub.fetch([file.name for file in artefact.files])
        return verified_path(self.path, artefact)
