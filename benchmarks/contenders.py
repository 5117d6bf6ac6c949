"""Defines the contenders to measure: backends, torch.compile and AOTInductor, plain exports.

It imports no heavy library, because :mod:`benchmarks.load_once` times a load from a bare interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from da3_runtime.backends import BACKENDS
from da3_runtime.backends.base import Backend
from da3_runtime.backends.eager import Eager
from da3_runtime.backends.onnxruntime import OnnxRuntimeCpu
from da3_runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda
from da3_runtime.backends.tensorrt import TensorRT, TensorRTRTX
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.settings import Settings
from da3_runtime.store.find_engine import find_engine
from da3_runtime.variants import Variant

CUDA, CPU = "cuda", "cpu"
# Backends that run engines on each device.
ENGINE_BACKENDS: dict[str, tuple[str, ...]] = {
    CUDA: (TensorRT.name, TensorRTRTX.name, OnnxRuntimeCuda.name),
    CPU: (OnnxRuntimeCpu.name,),
}
COMPILE = "compile"
AOTI, AOTI_CALLS = "aoti", "aoti-calls"
PLAIN_PREFIX, BEFORE_PREFIX = "plain-", "before-"
NHWC_SUFFIX, LOOSE_SUFFIX = "-nhwc", "-loose"
MAX_COMPILED_SHAPES = 64


class ChannelsLast(OnnxRuntimeCuda):
    """The CUDA provider's convolutions with the channels last."""

    cuda_options = OnnxRuntimeCuda.cuda_options | {"prefer_nhwc": "1"}


class LooseNorms(OnnxRuntimeCuda):
    """The CUDA provider's fused norms in one pass."""

    cuda_options = OnnxRuntimeCuda.cuda_options | {"enable_skip_layer_norm_strict_mode": "0"}


# The CUDA provider with another option, by the suffix of its name.
OTHER_OPTIONS = {NHWC_SUFFIX: ChannelsLast, LOOSE_SUFFIX: LooseNorms}


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
    options : str
        Key of :data:`OTHER_OPTIONS`; empty for the backend as it is.
    """

    name: str
    model: str
    head: str
    backend: str
    engine_dir: str
    rays: bool = False
    compiled: bool = False
    options: str = ""

    def unavailable(self) -> str | None:
        """Why this machine cannot run it, or None if it can."""
        return self._class().unavailable()

    def _class(self) -> type[Backend]:
        if self.options:
            return OTHER_OPTIONS[self.options]
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
    - ``onnxruntime-cuda-nhwc`` and ``-loose``, also with ``before-``: :data:`OTHER_OPTIONS`.
    - ``aoti`` and ``aoti-calls``: AOTInductor's package of the network, captured as a CUDA graph and not
      (:mod:`benchmarks.aoti`).
    """
    engines = [*ENGINE_BACKENDS[device]]
    if device == CUDA:
        engines += [OnnxRuntimeCuda.name + suffix for suffix in OTHER_OPTIONS]
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
    for suffix in OTHER_OPTIONS:
        if name.endswith(suffix):
            backend = name.removesuffix(suffix)
            return Contender(name, model, head, backend, str(engine_dir), options=suffix)
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
