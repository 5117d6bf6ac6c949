"""What a backend is: load from an engine folder, run a batch, say its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ArtefactError
from runtime.hub import HubFolder
from runtime.manifest import Artefact, Kind, Manifest, verified_path
from runtime.settings import Settings
from runtime.variants import Graph, Head, Variant

INPUT = "images"  # name of every graph's input
# Shapes that a backend keeps things ready for; the least recently used goes.
MAX_SHAPES = 8
MAX_BATCH = 8  # images of a batch that engines are built for


class RawOutputs(NamedTuple):
    """One graph's outputs for a batch, FP32; which there are is the graph's choice.

    Attributes
    ----------
    depth : NDArray[np.float32]
        [B, H, W].
    confidence, sky : NDArray[np.float32] | None
        [B, H, W].
    intrinsics : NDArray[np.float32] | None
        [B, 3, 3], pixels of the model's input.
    extrinsics : NDArray[np.float32] | None
        [B, 3, 4], world to camera.
    rays : NDArray[np.float32] | None
        [B, 8 grid_h, 8 grid_w, 6], direction and origin of rays spread over the image.
    ray_confidence : NDArray[np.float32] | None
        [B, 8 grid_h, 8 grid_w], 1 and more.
    """

    depth: NDArray[np.float32]
    confidence: NDArray[np.float32] | None = None
    sky: NDArray[np.float32] | None = None
    intrinsics: NDArray[np.float32] | None = None
    extrinsics: NDArray[np.float32] | None = None
    rays: NDArray[np.float32] | None = None
    ray_confidence: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, names: Sequence[str], values: Sequence[NDArray[np.float32]]) -> RawOutputs:
        """The outputs that a graph gives in the order of its output ``names``."""
        return cls(**dict(zip(names, values, strict=True)))

    @classmethod
    def joined(cls, parts: Sequence[RawOutputs]) -> RawOutputs:
        """The outputs of several batches as those of one."""
        columns = zip(cls._fields, zip(*parts, strict=True), strict=True)
        return cls(**{name: np.concatenate(values) for name, values in columns if values[0] is not None})


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


class Backend(ABC):
    """One way to run a graph.

    Attributes
    ----------
    name : str
        As ``BACKEND`` and the result say it.
    automatic : bool
        Whether it is tried where ``BACKEND`` names none.
    precision : str
        ``fp32``, ``fp16`` or ``bf16``.
    trained : bool
        False when the weights were drawn.
    gains_from_batches : bool
        Whether a batch takes less time than its images one by one, as on a GPU.
    """

    name: ClassVar[str]
    automatic: ClassVar[bool] = True
    precision: str
    trained: bool
    gains_from_batches: bool = False

    @classmethod
    @abstractmethod
    def unavailable(cls) -> str | None:
        """Why this machine cannot run the backend at all, or None if it may. Loads no engine."""

    @classmethod
    @abstractmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: Settings) -> Backend:
        """Load one graph of the engine.

        Raises
        ------
        DA3Error
            With the reason, if it cannot be loaded here.
        """

    def largest_batch(self, height: int, width: int) -> int:
        """How many images of this size a batch may have."""
        return MAX_BATCH

    def free(self) -> None:  # noqa: B027  (most hold nothing that they could give back)
        """Give back the memory that the next batch can take again."""

    def close(self) -> None:  # noqa: B027
        """Give everything back, what is on a GPU first of all; nothing is run afterwards."""

    @abstractmethod
    def run(self, images: NDArray[np.uint8]) -> RawOutputs:
        """Run a batch, uint8 [B, H, W, 3] RGB, H and W multiples of 14.

        Raises
        ------
        OutOfMemoryError
            If the GPU has not enough memory.
        DeviceLostError
            If the GPU takes no more work from this process.
        InferenceError
            If the engine fails on it otherwise.
        """
