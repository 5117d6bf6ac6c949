"""Runs an ONNX file on the CPU with OpenVINO, in the precision of upstream on a GPU.

OpenVINO takes the precision of each part from the graph: the backbone's products in bf16, everything
else in FP32 (:data:`da3_runtime.network.precision.UPSTREAM_GPU`). OpenVINO's own way to use bf16 rounds
the residual stream too, with ten times the error (da3-small: 1.1e-2 instead of 1.2e-3).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from da3_runtime.backends.base import Backend
from da3_runtime.errors import BackendUnavailableError, InferenceError
from da3_runtime.network_io import Conditions, RawOutputs, inputs_of
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.manifest import Kind
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.extras import missing_package
from da3_runtime.variants import Graph

logger = logging.getLogger(__name__)

_OPTIONS = {
    "INFERENCE_PRECISION_HINT": "f32",  # leaves the graph's own types as they are
    "NUM_STREAMS": 1,  # one batch at a time, on all threads
    # Two processes would be pinned to the same cores.
    "ENABLE_CPU_PINNING": False,
}


class OpenVino(Backend):
    """Runs the bf16 graph on a CPU.

    On a processor without instructions for bf16 OpenVINO computes in FP32: no less exact, and no faster.

    Parameters
    ----------
    path : Path
        The ONNX file.
    threads : int
        CPU threads; 0 for all cores.
    trained : bool
        False if the weights are random.

    Raises
    ------
    BackendUnavailableError
        If OpenVINO cannot load the file.
    """

    name = "openvino"
    on_cpu = True
    precisions = ("bf16",)

    def __init__(self, path: Path, threads: int = 0, trained: bool = True) -> None:
        import openvino

        options = _OPTIONS | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        try:
            self._compiled: Any = openvino.Core().compile_model(str(path), "CPU", options)
        except RuntimeError as error:
            raise BackendUnavailableError(f"OpenVINO cannot load {path.name}.") from error
        self._inputs = [each.any_name for each in self._compiled.inputs]
        self._outputs = [each.any_name for each in self._compiled.outputs]
        self.precision = "bf16"
        self.trained = trained

    @classmethod
    def unavailable(cls) -> str | None:
        return missing_package("openvino")

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Backend:
        (artefact,) = folder.artefacts(graph, Kind.ONNX_BF16)
        assert folder.manifest is not None
        backend = cls(folder.verified(artefact), settings.threads, folder.manifest.trained)
        backend.artefact, backend.parity = artefact, artefact.parity
        return backend

    def run(self, images: NDArray[np.uint8], conditions: Conditions | None = None) -> RawOutputs:
        try:
            request = self._compiled.create_infer_request()
            request.infer(inputs_of(self._inputs, images, conditions))
            # The request's memory is its own: the copies outlive it.
            values = [request.get_tensor(name).data.copy() for name in self._outputs]
        except RuntimeError as error:
            logger.warning("%s: %s", self.name, error)
            raise InferenceError(
                f"{self.name} failed on a batch of shape {list(images.shape)}."
            ) from error
        return RawOutputs.of(self._outputs, values)

    def close(self) -> None:
        self._compiled = None
