"""A loaded model, and everything that is done when memory runs out.

Backends free their own memory and report :class:`OutOfMemoryError`, which ``backends/gpu/cuda.py``
recognizes in the errors of all libraries. :meth:`Loaded.run` decides what is tried next.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from da3_runtime.backends.base import Backend
from da3_runtime.backends.gpu.capture_gate import GATE
from da3_runtime.errors import InferenceError, OutOfMemoryError
from da3_runtime.network_io import Conditions, RawOutputs
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.manifest import Parity

logger = logging.getLogger(__name__)


@dataclass
class Loaded:
    """A model that is ready to run.

    Attributes
    ----------
    folder : EngineFolder
        The engine folder that it was loaded from.
    graphs : dict[str, Backend]
        Its graphs by name, all on the same backend.
    warnings : list[str]
        Warnings for every response: an engine that could not be used, random weights.
    is_closed : bool
        Whether its memory was freed, so that it cannot run.
    make_room : Callable[[], bool]
        Closes other models that nobody uses; returns whether there were any. The service sets it.
    """

    folder: EngineFolder
    graphs: dict[str, Backend]
    warnings: list[str]
    is_closed: bool = False
    make_room: Callable[[], bool] = lambda: False

    @property
    def backend(self) -> Backend:
        """The chosen backend."""
        return next(iter(self.graphs.values()))

    @property
    def parity(self) -> Parity:
        """Verified if every graph's artefact is."""
        is_verified = all(graph.parity is Parity.VERIFIED for graph in self.graphs.values())
        return Parity.VERIFIED if is_verified else Parity.UNVERIFIED

    def digest(self) -> str:
        """Digest of what all graphs loaded, in hexadecimal: another one means another engine."""
        digests = "".join(graph.digest() for graph in self.graphs.values())
        return hashlib.sha256(digests.encode()).hexdigest()

    def largest_batch(self, views: int, height: int, width: int) -> int:
        """How many scenes of this shape all graphs can run as one batch; 0 if not even one."""
        return min(graph.largest_batch(views, height, width) for graph in self.graphs.values())

    def run(
        self, images: NDArray[np.uint8], conditions: Conditions | None = None
    ) -> dict[str, RawOutputs]:
        """Run every graph on a batch of scenes, uint8 [B, S, H, W, 3]; raises as :meth:`Backend.run`.

        If memory runs out, the graphs free what they can, and the scenes run again one by one. If it
        still runs out, :attr:`make_room` closes other models, and the scenes run once more. A scene is
        never split: its views alone would have other depths.
        """
        try:
            return self._run(images, conditions)
        except OutOfMemoryError:
            logger.warning(
                "not enough memory for a batch of shape %s; running its scenes one by one",
                list(images.shape),
            )
        try:
            return self._run_one_by_one(images, conditions)
        except OutOfMemoryError:
            if not self.make_room():
                raise
            logger.warning("not enough memory for one scene; models that nobody uses were closed")
        return self._run_one_by_one(images, conditions)

    def _run_one_by_one(
        self, images: NDArray[np.uint8], conditions: Conditions | None
    ) -> dict[str, RawOutputs]:
        with GATE.use():
            for graph in self.graphs.values():
                graph.free()
        singles = [
            self._run(images[index : index + 1], conditions and conditions.scene(index))
            for index in range(len(images))
        ]
        return {name: RawOutputs.joined([single[name] for single in singles]) for name in self.graphs}

    def _run(self, images: NDArray[np.uint8], conditions: Conditions | None) -> dict[str, RawOutputs]:
        if self.is_closed:
            raise InferenceError("The model is closed; load it again.")
        with GATE.use():
            return {name: graph.run(images, conditions) for name, graph in self.graphs.items()}

    def close(self) -> None:
        """Free everything that its graphs hold; the model cannot run afterwards."""
        with GATE.use():
            for graph in self.graphs.values():
                graph.close()
        self.is_closed = True
