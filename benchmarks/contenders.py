"""Defines the contenders to measure: backends, torch.compile and AOTInductor, plain exports.

It imports no heavy library, because :mod:`benchmarks.load_once` times a load from a bare interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from da3_runtime.backends import BACKENDS
from da3_runtime.backends.base import Backend
from da3_runtime.backends.eager import Eager
from da3_runtime.backends.onnxruntime import OnnxRuntimeCpu
from da3_runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda
from da3_runtime.backends.tensorrt import TensorRT, TensorRTRTX
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.settings import Settings
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.find_engine import find_engine
from da3_runtime.store.manifest import GraphEntry
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import Variant

CUDA, CPU = "cuda", "cpu"
# Backends that run engines on each device.
ENGINE_BACKENDS: dict[str, tuple[str, ...]] = {
    CUDA: (TensorRT.name, TensorRTRTX.name, OnnxRuntimeCuda.name),
    CPU: (OnnxRuntimeCpu.name,),
}
COMPILE = "compile"
AOTI, AOTI_CALLS = "aoti", "aoti-calls"
PLAIN_PREFIX, BEFORE_PREFIX, NHWC_SUFFIX = "plain-", "before-", "-nhwc"
MAX_COMPILED_SHAPES = 64


class ChannelsLast(OnnxRuntimeCuda):
    """The CUDA provider with its option ``prefer_nhwc``: convolutions with the channels last."""

    @classmethod
    def _options(
        cls, provider: str, folder: EngineFolder, entry: GraphEntry, settings: EngineSettings
    ) -> dict[str, Any]:
        return super()._options(provider, folder, entry, settings) | {"prefer_nhwc": "1"}


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
    channels_last : bool
        Whether the backend is :class:`ChannelsLast`.
    """

    name: str
    model: str
    head: str
    backend: str
    engine_dir: str
    rays: bool = False
    compiled: bool = False
    channels_last: bool = False

    def unavailable(self) -> str | None:
        """Why this machine cannot run it, or None if it can."""
        return self._class().unavailable()

    def _class(self) -> type[Backend]:
        if self.channels_last:
            return ChannelsLast
        if self.backend in (AOTI, AOTI_CALLS):
            from benchmarks.aoti import AotInductor, AotInductorCalls

            return AotInductor if self.backend == AOTI else AotInductorCalls
        return next(cls for cls in BACKENDS if cls.name == self.backend)

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
        cls = self._class()
        if cls not in BACKENDS:
            folder, warnings = find_engine(settings)
            graphs = folder.variant.graphs_for(self.rays)
            backends = {graph.name: cls.load(folder, graph, settings) for graph in graphs}
            return Loaded(folder, backends, warnings)
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


def extra_names(device: str) -> list[str]:
    """Names of the contenders on a device that run only if they are named.

    - ``before-NAME``: backend NAME with the engines of another folder.
    - ``onnxruntime-cuda-nhwc``, also with ``before-``: :class:`ChannelsLast`.
    - ``aoti`` and ``aoti-calls``: AOTInductor's package of the network, captured as a CUDA graph and not
      (:mod:`benchmarks.aoti`).
    """
    engines = [*ENGINE_BACKENDS[device]]
    if device == CUDA:
        engines.append(OnnxRuntimeCuda.name + NHWC_SUFFIX)
    added = [name for name in engines if name not in ENGINE_BACKENDS[device]]
    captured = [AOTI, AOTI_CALLS] if device == CUDA else [AOTI_CALLS]
    return [*(BEFORE_PREFIX + name for name in engines), *added, *captured]


def make_contender(
    name: str, variant: Variant, head: str, engine_dir: Path, plain: Path, before: Path | None = None
) -> Contender:
    """Create the contender ``name``, one of :func:`contender_names` or :func:`extra_names`.

    Parameters
    ----------
    engine_dir, plain, before : Path
        Folders with this project's engines, with the plain export, and with the engines of contenders
        ``before-``.
    """
    model = variant.model_id
    if name.startswith(BEFORE_PREFIX):
        assert before is not None
        of_before = make_contender(name.removeprefix(BEFORE_PREFIX), variant, head, before, plain)
        return replace(of_before, name=name)
    if name.endswith(NHWC_SUFFIX):
        backend = name.removesuffix(NHWC_SUFFIX)
        return Contender(name, model, head, backend, str(engine_dir), channels_last=True)
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
