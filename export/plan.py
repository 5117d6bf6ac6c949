"""ONNX -> serialised plan, with TensorRT-RTX or TensorRT: one builder for both."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from export.onnx_graph import INPUT_NAME, MAX_BATCH
from export.progress import Advance
from runtime.backends.tensorrt import has_cuda_driver
from runtime.errors import BuildError
from runtime.manifest import Kind, Profile
from runtime.variants import MAX_SIDE, MIN_SIDE

_SMALL = 504
# One engine, two shape ranges: a single large photo, or a batch at the default resolution. The runner
# sizes its device memory for the shape in use (the USER_MANAGED strategy of both libraries).
PROFILES = [
    Profile([1, MIN_SIDE, MIN_SIDE, 3], [1, 378, 504, 3], [1, MAX_SIDE, MAX_SIDE, 3]),
    Profile([1, MIN_SIDE, MIN_SIDE, 3], [4, 378, 504, 3], [MAX_BATCH, _SMALL, _SMALL, 3]),
]


@dataclass(frozen=True)
class Library:
    """What differs between the two libraries.

    Attributes
    ----------
    module, package : str
        Python module, and the distribution it comes from.
    needs_gpu : bool
        Whether building needs the target GPU.
    compute_capabilities : tuple[str, ...]
        What a plan runs on, where that is known before building. TensorRT-RTX's default target is
        "portable from Ampere on" (its documentation).
    """

    module: str
    package: str
    needs_gpu: bool
    compute_capabilities: tuple[str, ...]


LIBRARIES = {
    Kind.TENSORRT_RTX: Library("tensorrt_rtx", "tensorrt-rtx-cu12", False, ("8.0+",)),
    Kind.TENSORRT: Library("tensorrt", "tensorrt-cu12", True, ()),
}


def library_version(kind: Kind) -> str:
    """Version of the library that builds ``kind``.

    Raises
    ------
    BuildError
        If it is not installed.
    """
    package = LIBRARIES[kind].package
    try:
        return version(package)
    except PackageNotFoundError:
        raise BuildError(f"Target {kind} needs {package}, which is not installed.") from None


def check_buildable(kind: Kind) -> None:
    """Fail before any work is done if ``kind`` cannot be built here.

    Raises
    ------
    BuildError
        If the library is not installed, or needs a GPU that is not there.
    """
    library_version(kind)
    if LIBRARIES[kind].needs_gpu and not has_cuda_driver():
        raise BuildError(
            f"Target {kind} is built on the GPU it is for, and there is no NVIDIA driver here; "
            f"leave it out of TARGETS ({Kind.TENSORRT_RTX} builds without a GPU)."
        )


def build_plan(kind: Kind, onnx_path: Path, plan_path: Path, advance: Advance) -> list[str]:
    """Build a plan of the strongly typed graph in ``onnx_path`` for :data:`PROFILES`.

    Returns
    -------
    list[str]
        Compute capabilities the plan runs on.

    Raises
    ------
    BuildError
        If the library is not installed, needs a GPU that is not there, or refuses the graph.
    """
    check_buildable(kind)
    library = LIBRARIES[kind]
    trt = importlib.import_module(library.module)
    messages: list[str] = []
    builder = trt.Builder(_logger(trt, messages))
    # Strong typing is all there is from TensorRT 11 on; before it has to be asked for.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    onnx_parser = trt.OnnxParser(network, _logger(trt, messages))
    if not onnx_parser.parse_from_file(str(onnx_path)):
        raise BuildError(f"{library.module} cannot read the graph: {_first(messages)}")
    config = builder.create_builder_config()
    for bounds in PROFILES:
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT_NAME, bounds.minimum, bounds.optimum, bounds.maximum)
        config.add_optimization_profile(profile)
    monitor = _monitor(trt, advance)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"{library.module} cannot build the graph: {_first(messages)}")
    with plan_path.open("wb") as stream:
        stream.write(plan)
    return list(library.compute_capabilities) or [_current_capability()]


def _current_capability() -> str:
    """Compute capability of the GPU that the plan was built on."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def _first(messages: list[str]) -> str:
    return messages[0] if messages else "no reason was given."


def _logger(trt: Any, messages: list[str]) -> Any:
    """A logger that keeps errors for the exception instead of printing them."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            # Without a driver every build reports the CUDA call that found none, and goes on.
            harmless = "cudaError 35" in message
            if severity <= trt.ILogger.Severity.ERROR and not harmless:
                messages.append(message.strip().splitlines()[0])

    return Logger()


def _monitor(trt: Any, advance: Advance) -> Any:
    """A progress monitor that reports each finished phase."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            pass

        def step_complete(self, name: str, step: int) -> bool:
            return True

        def phase_finish(self, name: str) -> None:
            advance(name)

    return Monitor()
