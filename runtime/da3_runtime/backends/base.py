"""Defines :class:`Backend`, the interface of everything that can run a graph of the network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from da3_runtime.network_io import MAX_BATCH, MAX_VIEWS, PATCH, Conditions, RawOutputs
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.manifest import Artefact, Parity
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.setting_group import AUTO
from da3_runtime.variants import Graph

# Number of batch shapes for which a GPU backend keeps execution contexts and CUDA graphs.
MAX_SHAPES = 8


def tokens_of(height: int, width: int) -> int:
    """Tokens of a view: one for each patch of 14 x 14 pixels, and the camera token."""
    return height // PATCH * (width // PATCH) + 1


# Most tokens of a scene: as many as 16 views of 504 x 504 have.
MAX_TOKENS = MAX_VIEWS * tokens_of(504, 504)


class Backend(ABC):
    """One loaded graph, and the library that runs it.

    Attributes
    ----------
    name : str
        Name in the setting ``BACKEND`` and in results.
    automatic : bool
        Whether ``BACKEND=auto`` tries it.
    on_cpu : bool
        Whether it runs on the CPU.
    precisions : tuple[str, ...]
        Values of ``PRECISION`` with which it is tried.
    precision : str
        ``fp32``, ``fp16``, ``bf16`` or ``int8``.
    trained : bool
        False if the weights are random.
    parity : Parity
        Whether the loaded artefact was measured against upstream. Eager loads none: unverified.
    artefact : Artefact | None
        The artefact that was loaded, or that a plan was made of; None if eager runs the weights.
    gains_from_batches : bool
        Whether a batch takes less time than its images one by one, as on a GPU.
    """

    name: ClassVar[str]
    automatic: ClassVar[bool] = True
    on_cpu: ClassVar[bool] = False
    precisions: ClassVar[tuple[str, ...]] = (AUTO,)
    precision: str
    trained: bool
    parity: Parity = Parity.UNVERIFIED
    artefact: Artefact | None = None
    gains_from_batches: bool = False

    @classmethod
    @abstractmethod
    def unavailable(cls) -> str | None:
        """Why this machine cannot run the backend, or None if it can. Loads no engine."""

    @classmethod
    @abstractmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Backend:
        """Load one graph of the engine.

        Raises
        ------
        DA3Error
            If it cannot be loaded on this machine; the message is the reason.
        """

    def largest_batch(self, views: int, height: int, width: int) -> int:
        """Largest number of scenes of this many views of this size in one batch; 0 if not even one."""
        if views * tokens_of(height, width) > MAX_TOKENS:
            return 0
        return max(1, MAX_BATCH // views)

    def digest(self) -> str:
        """Digest of the artefact, or of the weights that eager runs, in hexadecimal."""
        return "" if self.artefact is None else self.artefact.digest

    def free(self) -> None:  # noqa: B027  (most backends have nothing to release)
        """Release the memory that the next batch can allocate again."""

    def close(self) -> None:  # noqa: B027
        """Release everything, GPU memory included. :meth:`run` must not be called afterwards."""

    @abstractmethod
    def run(self, images: NDArray[np.uint8], conditions: Conditions | None = None) -> RawOutputs:
        """Run a batch of scenes.

        Parameters
        ----------
        images : NDArray[np.uint8]
            RGB, [B, S, H, W, 3]; H and W are multiples of 14. A photo is a scene of one view.
        conditions : Conditions | None
            What is wanted or known of the scenes; None is nothing. A monocular graph ignores it.

        Raises
        ------
        OutOfMemoryError
            If the GPU has not enough memory.
        DeviceLostError
            If the process can no longer use the GPU.
        InferenceError
            If the engine fails on the batch for another reason.
        """
