"""TensorRT and TensorRT-RTX plans.

The plans are built and verified here, but not run yet: both backends step aside with the reason, and the
next one answers.
"""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, EngineFolder, RawOutputs
from runtime.errors import BackendUnavailableError
from runtime.manifest import Kind
from runtime.settings import Settings
from runtime.variants import Graph


def has_cuda_driver() -> bool:
    """Whether an NVIDIA driver is loaded on this machine."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


class PlanBackend(Backend):
    """A serialised plan of one of the two TensorRT libraries.

    Attributes
    ----------
    kind : Kind
        The artefact it loads.
    module : str
        Python module of the library.
    """

    kind: ClassVar[Kind]
    module: ClassVar[str]

    @classmethod
    def unavailable(cls) -> str | None:
        if find_spec(cls.module) is None:
            return f"{cls.module} is not installed"
        if not has_cuda_driver():
            return "there is no NVIDIA driver"
        return None

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: Settings) -> Backend:
        folder.artefact(graph, cls.kind)
        raise BackendUnavailableError(f"This version builds {cls.kind} plans but does not run them.")

    def run(self, images: NDArray[np.uint8]) -> RawOutputs:
        raise BackendUnavailableError(f"This version builds {self.kind} plans but does not run them.")


class TensorRT(PlanBackend):
    """A plan built on, and only for, one kind of GPU."""

    name = "tensorrt"
    kind = Kind.TENSORRT
    module = "tensorrt"


class TensorRTRTX(PlanBackend):
    """A portable plan whose kernels are specialised when it is loaded."""

    name = "tensorrt-rtx"
    kind = Kind.TENSORRT_RTX
    module = "tensorrt_rtx"
