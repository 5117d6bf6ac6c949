"""Gives access to an engine folder: the manifest of one model and head, and its verified artefacts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from da3_runtime.errors import ArtefactError
from da3_runtime.store.digests import remembered_digest
from da3_runtime.store.hub import HubFolder
from da3_runtime.store.manifest import Artefact, Kind, Manifest, verified_path
from da3_runtime.variants import Graph, Head, Variant


@dataclass(frozen=True)
class EngineFolder:
    """The folder that a backend loads its engine from.

    Attributes
    ----------
    variant, head : Variant, Head
        Requested model and head.
    path : Path
        The folder; it need not exist.
    manifest : Manifest | None
        Its manifest; None if the folder has no engine.
    hub : HubFolder | None
        The same folder in a hub repository, if ``path`` is in the hub's cache.
    cache_dir : Path | None
        ``RUNTIME_CACHE_DIR``, where the digests of verified files are remembered.
    """

    variant: Variant
    head: Head
    path: Path
    manifest: Manifest | None
    hub: HubFolder | None = None
    cache_dir: Path | None = None

    def artefact(self, graph: Graph, kind: Kind) -> Path:
        """Verified path of a graph's only artefact of ``kind``; raises the errors of both steps."""
        return self.verified(self.artefacts(graph, kind)[0])

    def artefacts(self, graph: Graph, kind: Kind) -> list[Artefact]:
        """A graph's artefacts of ``kind`` in the manifest; reads no file.

        Raises
        ------
        ArtefactError
            If the folder has no engine, or the manifest no such artefact.
        """
        if self.manifest is None:
            raise ArtefactError("no engine has been built")
        entry = self.manifest.graphs.get(graph.key)
        if entry is None:
            raise ArtefactError("the engine was built without rays (RAY_POSE=1 builds them)")
        artefacts = entry.of_kind(kind)
        if not artefacts:
            raise ArtefactError(
                f"the engine folder has no {kind} artefact of graph {graph.key} (TARGETS={kind} adds it)"
            )
        return artefacts

    def verified(self, artefact: Artefact) -> Path:
        """Path of an artefact's file to load; the file is downloaded if necessary, then verified.

        A file that was verified before, and has not changed since, is not read again.

        Raises
        ------
        ArtefactError
            If it is not available, or its digest is not that in the manifest.
        """
        if self.hub is not None:
            self.hub.fetch([file.name for file in artefact.files])
        find_digest = partial(remembered_digest, cache_dir=self.cache_dir)
        return verified_path(self.path, artefact, find_digest)
