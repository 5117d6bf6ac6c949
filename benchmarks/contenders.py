"""Defines the contenders to measure: backends, torch.compile of the eager network, plain exports.

It imports no heavy library, because :mod:`benchmarks.load_once` times a load from a bare interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from da3_runtime.backends import BACKENDS
from da3_runtime.backends.eager import Eager
from da3_runtime.backends.onnxruntime import OnnxRuntimeCpu
from da3_runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda
from da3_runtime.backends.tensorrt import TensorRT, TensorRTRTX
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.settings import Settings
from da3_runtime.variants import Variant

CUDA, CPU = "cuda", "cpu"
# Backends that run engines on each device.
ENGINE_BACKENDS: dict[str, tuple[str, ...]] = {
    CUDA: (TensorRT.name, TensorRTRTX.name, OnnxRuntimeCuda.name),
    CPU: (OnnxRuntimeCpu.name,),
}
COMPILE = "compile"
PLAIN_PREFIX = "plain-"
MAX_COMPILED_SHAPES = 64


@dataclass(frozen=True)
class Contender:
    """One way to run a model; its fields can be sent to another process as JSON.

    Attributes
    ----------
    name : str
        Name in the table.
    model, head : str
        Model id and head.
    backend : str
        Name of the backend.
    engine_dir : str
        Folder in which the backend finds the engine.
    rays : bool
        Whether to run the graphs with the ray branch.
    compiled : bool
        Whether torch.compile is applied to the eager network.
    """

    name: str
    model: str
    head: str
    backend: str
    engine_dir: str
    rays: bool = False
    compiled: bool = False

    def unavailable(self) -> str | None:
        """Why this machine cannot run it, or None if it can."""
        return next(cls for cls in BACKENDS if cls.name == self.backend).unavailable()

    def load(self) -> Loaded:
        """Load it; settings that are not fields of the contender come from the environment.

        Raises
        ------
        DA3Error
            The errors of :func:`da3_runtime.inference.backend_choice.load_backend`.
        """
        settings = replace(
            Settings.from_env().engine,
            model_id=self.model,
            head=self.head,
            backend=self.backend,
            engine_dir=Path(self.engine_dir),
            ray_pose=self.rays,
        )
        loaded = load_backend(settings)
        if self.compiled:
            _compile(loaded)
        return loaded


def _compile(loaded: Loaded) -> None:
    """Compile each network with torch.compile, for fixed shapes."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = MAX_COMPILED_SHAPES
    # By default torch.compile falls back to eager without an error.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for backend in loaded.graphs.values():
        assert isinstance(backend, Eager)
        backend._network.compile(dynamic=False)


def contender_names(device: str) -> list[str]:
    """Names of all contenders on a device, baselines first."""
    plain = [f"{PLAIN_PREFIX}{name}" for name in ENGINE_BACKENDS[device]]
    return [Eager.name, COMPILE, *plain, *ENGINE_BACKENDS[device]]


def make_contender(name: str, variant: Variant, head: str, engine_dir: Path, plain: Path) -> Contender:
    """Create the contender ``name``, one of :func:`contender_names`.

    Parameters
    ----------
    engine_dir, plain : Path
        Folders with this project's engines and with the plain export.
    """
    model = variant.model_id
    if name.startswith(PLAIN_PREFIX):
        backend = name.removeprefix(PLAIN_PREFIX)
        return Contender(name, model, head, backend, str(plain), rays=bool(variant.ray_graphs))
    compiled = name == COMPILE
    backend = Eager.name if compiled else name
    return Contender(name, model, head, backend, str(engine_dir), compiled=compiled)


def cache_variables(folder: Path) -> dict[str, str]:
    """Environment variables that make every compiler store its cache under ``folder``.

    TensorRT-RTX's runtime cache, the CUDA driver's own compiler, TorchInductor and Triton.
    """
    folders = {
        "RUNTIME_CACHE_DIR": "runtime",
        "CUDA_CACHE_PATH": "cuda",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
    }
    return {variable: str(folder / name) for variable, name in folders.items()}
