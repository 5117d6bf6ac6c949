"""A model ready to run, and what happens where it finds too little memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from da3_runtime.backends.base import Backend
from da3_runtime.backends.gpu.capture_gate import GATE
from da3_runtime.errors import OutOfMemoryError
from da3_runtime.network_io import RawOutputs
from da3_runtime.store.engine_folder import EngineFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and how it came to run this way.

    Attributes
    ----------
    folder : EngineFolder
        What it was loaded from.
    graphs : dict[str, Backend]
        Its graphs by name, all on the same backend.
    warnings : list[str]
        What a caller should know: an engine that could not be used, untrained weights.
    """

    folder: EngineFolder
    graphs: dict[str, Backend]
    warnings: list[str]

    @property
    def backend(self) -> Backend:
        """The chosen backend."""
        return next(iter(self.graphs.values()))

    def largest_batch(self, height: int, width: int) -> int:
        """How many images of this size every graph takes at once; at least 1."""
        return max(1, min(graph.largest_batch(height, width) for graph in self.graphs.values()))

    def run(self, images: NDArray[np.uint8]) -> dict[str, RawOutputs]:
        """Run every graph on a batch, uint8 [B, H, W, 3]; raises as :meth:`Backend.run`.

        Where there is not enough memory, what can be freed is freed, and the images are run once more,
        one by one.
        """
        try:
            return self._run(images)
        except OutOfMemoryError:
            logger.warning("not enough memory for %s; once more, one by one", list(images.shape))
            with GATE.use():
                for graph in self.graphs.values():
                    graph.free()
        singles = [self._run(images[index : index + 1]) for index in range(len(images))]
        return {name: RawOutputs.joined([single[name] for single in singles]) for name in self.graphs}

    def _run(self, images: NDArray[np.uint8]) -> dict[str, RawOutputs]:
        with GATE.use():
            return {name: graph.run(images) for name, graph in self.graphs.items()}

    def close(self) -> None:
        """Give back everything that its graphs hold; nothing is run afterwards."""
        with GATE.use():
            for graph in self.graphs.values():
                graph.close()
