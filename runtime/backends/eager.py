"""PyTorch eager: the fallback when no engine can run. Imports torch only when it is loaded."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, EngineFolder, RawOutputs
from runtime.backends.cuda import failure, has_cuda_driver
from runtime.checkpoint import (
    BUNDLED,
    HUB,
    RANDOM_PREFIX,
    SDT_FILE,
    Checkpoint,
    bundled_sdt,
    find_checkpoint,
    find_sdt,
)
from runtime.errors import BackendUnavailableError, CheckpointError, InferenceError
from runtime.manifest import CHECKPOINT_DIR
from runtime.settings import Settings
from runtime.variants import MIN_SIDE, Graph, Head

logger = logging.getLogger(__name__)


class Eager(Backend):
    """The network itself, in FP32 on a CPU and in upstream's bf16 policy on a GPU."""

    name = "eager"

    def __init__(self, network: Any, device: str, trained: bool) -> None:
        self._network = network
        self._device = device
        self.precision = network.precision.name
        self.trained = trained
        self.gains_from_batches = device != "cpu"

    @classmethod
    def unavailable(cls) -> str | None:
        missing = [name for name in ("torch", "depth_anything_3") if find_spec(name) is None]
        return f"{' and '.join(missing)} not installed" if missing else None

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: Settings) -> Backend:
        checkpoint = eager_checkpoint(folder, settings)
        sdt = eager_sdt(folder, settings) if folder.head is Head.SDT and graph.takes_sdt else None
        import torch

        from runtime.eager.load import load_network
        from runtime.eager.precision import FP32, UPSTREAM_GPU

        if settings.threads:
            torch.set_num_threads(settings.threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        precision = UPSTREAM_GPU if device == "cuda" else FP32
        sdt_path = sdt.path if sdt else None
        network = load_network(folder.variant, graph, checkpoint.path, precision, sdt_path)
        trained = checkpoint.trained and (sdt is None or sdt.trained)
        return cls(network.to(device), device, trained)

    def run(self, images: NDArray[np.uint8]) -> RawOutputs:
        import torch

        try:
            with torch.inference_mode():
                outputs = self._network(torch.from_numpy(images).to(self._device))
                values = [tensor.float().cpu().numpy() for tensor in outputs]
                return RawOutputs.of(self._network.output_names, values)
        except RuntimeError as error:
            logger.warning("%s: %s", self.name, error)
            raise failure(self.name, images.shape, error, is_lost=self._is_lost) from error

    def _is_lost(self) -> bool:
        """As :func:`runtime.backends.cuda.is_lost`; PyTorch may be there without cuda-bindings."""
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
    """The same where there is a GPU, on which it is far faster than any engine on the CPU."""

    name = "eager-cuda"

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: Settings) -> Backend:
        # Too little memory, or a GPU that this PyTorch has no kernels for: the CPU may still answer.
        unusable = BackendUnavailableError("PyTorch cannot run it on this GPU.")
        try:
            backend = super().load(folder, graph, settings)
        except RuntimeError as error:
            raise unusable from error
        try:
            backend.run(np.zeros((1, MIN_SIDE, MIN_SIDE, 3), np.uint8))
        except InferenceError as error:
            backend.close()
            raise unusable from error
        return backend

    @classmethod
    def unavailable(cls) -> str | None:
        if not has_cuda_driver():
            return "there is no NVIDIA driver"
        missing = super().unavailable()
        if missing is not None:
            return missing
        import torch

        return None if torch.cuda.is_available() else "this PyTorch can use no GPU"


def eager_checkpoint(folder: EngineFolder, settings: Settings) -> Checkpoint:
    """The checkpoint eager must load to answer as the folder's engine would.

    ``WEIGHTS`` if it names any; else the checkpoint in the engine's folder, where drawn weights lie;
    else the hub's at the commit the engine was built from, or what is bundled. Where there is a
    manifest the weights must be the ones it names.

    Raises
    ------
    CheckpointError
        If there are none, or they are other weights than the engine's.
    """
    beside = folder.path / CHECKPOINT_DIR
    source = folder.manifest.source if folder.manifest else None
    revision = settings.revision
    weights = settings.weights or HUB
    drawn = weights.startswith(RANDOM_PREFIX)
    if (settings.weights is None or drawn) and beside.is_dir():
        weights = str(beside)
    elif drawn or (
        settings.weights is None and source is not None and source.weights not in (HUB, BUNDLED)
    ):
        raise CheckpointError(
            f"The {weights if drawn or source is None else source.weights} weights of "
            f"{folder.variant.model_id} are not at hand; set WEIGHTS to their folder, or run "
            "'make engines' with them."
        )
    elif weights == HUB:
        revision = revision or (source.commit if source else None)
    checkpoint = find_checkpoint(folder.variant, weights, revision, settings.cached_models_dir)
    if source is not None and checkpoint.sha256() != source.sha256:
        raise CheckpointError(
            f"The weights for {folder.variant.model_id} are not those its engine was built from; "
            "set WEIGHTS to those, or build the engine again."
        )
    return checkpoint


def eager_sdt(folder: EngineFolder, settings: Settings) -> Checkpoint:
    """The SDT head eager must load to answer as the folder's engine would.

    ``SDT_WEIGHTS`` if it is set, else the head in the engine's folder, else what is bundled.

    Raises
    ------
    CheckpointError
        If there is none, or it is another head than the engine's.
    """
    beside = folder.path / CHECKPOINT_DIR / SDT_FILE
    weights = settings.sdt_weights or (str(beside) if beside.is_file() else None)
    head = find_sdt(weights) if weights is not None else bundled_sdt(folder.variant)
    if head is None:
        raise CheckpointError(
            f"There are no weights for the SDT head of {folder.variant.model_id}; set SDT_WEIGHTS to "
            "a .safetensors file, or run 'make engines HEAD=sdt'."
        )
    source = folder.manifest.head_source if folder.manifest else None
    if source is not None and head.sha256() != source.sha256:
        raise CheckpointError(
            f"The SDT head for {folder.variant.model_id} is not the one its engine was built from; "
            "set SDT_WEIGHTS to that, or build the engine again."
        )
    return head
