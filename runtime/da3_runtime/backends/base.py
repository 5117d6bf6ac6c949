"""What a backend is: load from an engine folder, run a batch, say its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from da3_runtime.network_io import MAX_BATCH, RawOutputs
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import Graph

# Shapes that a backend keeps things ready for; the least recently used goes.
MAX_SHAPES = 8


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
    def load(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Backend:
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
