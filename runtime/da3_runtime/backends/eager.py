"""PyTorch eager: the fallback when no engine can run. Imports torch only when it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from da3_runtime.backends.base import Backend
from da3_runtime.backends.gpu.cuda import NO_DRIVER, failure, has_cuda_driver
from da3_runtime.errors import BackendUnavailableError, InferenceError
from da3_runtime.network_io import Conditions, RawOutputs, inputs_of
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.engine_weights import engine_checkpoint, engine_sdt, weights_digest
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.extras import is_installed
from da3_runtime.variants import MIN_SIDE, Graph, Head

logger = logging.getLogger(__name__)


class Eager(Backend):
    """The network itself, in FP32 on a CPU and in upstream's bf16 policy on a GPU."""

    name = "eager"
    on_cpu = True

    def __init__(
        self, network: Any, device: str, trained: bool, digest: Callable[[], str] = str
    ) -> None:
        self._network = network
        self._digest = digest
        self._inputs = network.graph.series.inputs
        self._outputs = network.output_names
        self._device = device
        self.precision = network.precision.name
        self.trained = trained
        self.gains_from_batches = device != "cpu"

    @classmethod
    def unavailable(cls) -> str | None:
        missing = [name for name in ("torch", "safetensors") if not is_installed(name)]
        if not missing:
            return None
        return f'{" and ".join(missing)} not installed: pip install "da3-runtime[eager]"'

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Backend:
        checkpoint = engine_checkpoint(folder, settings)
        sdt = engine_sdt(folder, settings) if folder.head is Head.SDT and graph.takes_sdt else None
        import torch

        from da3_runtime.network.load import load_network
        from da3_runtime.network.precision import FP32, UPSTREAM_GPU

        if settings.threads:
            torch.set_num_threads(settings.threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        precision = UPSTREAM_GPU if device == "cuda" else FP32
        sdt_path = sdt.path if sdt else None
        network = load_network(folder.variant, graph, checkpoint.path, precision, sdt_path)
        trained = checkpoint.trained and (sdt is None or sdt.trained)
        digest = partial(weights_digest, [each for each in (checkpoint, sdt) if each], settings)
        return cls(network.to(device), device, trained, digest)

    def digest(self) -> str:
        return self._digest()

    def run(self, images: NDArray[np.uint8], conditions: Conditions | None = None) -> RawOutputs:
        import torch

        given = inputs_of(self._inputs, images, conditions).values()
        try:
            with torch.inference_mode():
                outputs = self._network(*(torch.from_numpy(each).to(self._device) for each in given))
                values = [tensor.cpu().numpy() for tensor in outputs]
                return RawOutputs.of(self._outputs, values)
        except RuntimeError as error:
            logger.warning("%s: %s", self.name, error)
            raise failure(self.name, images.shape, error, is_lost=self._is_lost) from error

    def _is_lost(self) -> bool:
        """Whether the GPU is in an unrecoverable state, without the help of cuda-bindings."""
        import torch

        if self._device == "cpu":
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def free(self) -> None:
        import torch

        if self._device != "cpu":
            torch.cuda.empty_cache()

    def close(self) -> None:
        self._network = None
        self.free()


class EagerCuda(Eager):
    """Eager on a GPU: far faster than any engine on the CPU."""

    name = "eager-cuda"
    on_cpu = False

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Backend:
        # Too little memory, or a GPU that this PyTorch has no kernels for: the CPU may still run it.
        unusable = BackendUnavailableError("PyTorch cannot run the network on this GPU.")
        try:
            backend = super().load(folder, graph, settings)
        except RuntimeError as error:
            raise unusable from error
        try:
            backend.run(np.zeros((1, 1, MIN_SIDE, MIN_SIDE, 3), np.uint8))
        except BaseException as error:
            backend.close()
            if isinstance(error, InferenceError):
                raise unusable from error
            raise
        return backend

    @classmethod
    def unavailable(cls) -> str | None:
        if not has_cuda_driver():
            return NO_DRIVER
        missing = super().unavailable()
        if missing is not None:
            return missing
        import torch

        return None if torch.cuda.is_available() else "the installed PyTorch cannot use a GPU"
