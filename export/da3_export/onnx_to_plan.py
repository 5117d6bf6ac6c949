"""ONNX -> serialised plan, with TensorRT-RTX or TensorRT: one builder for both.

A TensorRT plan runs on the compute capability it was built for, unless it is hardware compatible, and
with the release that built it: with all of TensorRT or, if it is version compatible, with that release's
tensorrt-lean.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from da3_export.onnx_attention import spell_out_attention
from da3_export.util.progress import Advance
from da3_runtime.backends.gpu.cuda import has_cuda_driver
from da3_runtime.backends.tensorrt import error_log
from da3_runtime.errors import BuildError
from da3_runtime.network_io import INPUTS, MAX_BATCH, MAX_VIEWS, input_specs, shapes_of
from da3_runtime.store.manifest import Kind, Profile, artefact_name
from da3_runtime.util.files import write_atomically
from da3_runtime.variants import MAX_SIDE, MIN_SIDE

_SMALL = 504
# One plan, three ranges of shapes: a single large photo, a batch of photos at the default resolution, or
# a scene of several views at it. The runtime sizes device memory for the shape in use (the USER_MANAGED
# strategy of both libraries).
_LEAST = [1, 1, MIN_SIDE, MIN_SIDE, 3]
PROFILES = [
    Profile(_LEAST, [1, 1, 378, 504, 3], [1, 1, MAX_SIDE, MAX_SIDE, 3]),
    Profile(_LEAST, [4, 1, 378, 504, 3], [MAX_BATCH, 1, _SMALL, _SMALL, 3]),
    Profile(_LEAST, [1, 4, 378, 504, 3], [1, MAX_VIEWS, _SMALL, _SMALL, 3]),
]


@dataclass(frozen=True)
class Library:
    """Differences between the two libraries.

    Attributes
    ----------
    module, package : str
        Python module and its distribution.
    compute_capabilities : tuple[str, ...] | None
        GPUs that a plan runs on; None: the GPU that it is built on.
    """

    module: str
    package: str
    compute_capabilities: tuple[str, ...] | None


AMPERE_AND_LATER = "8.0+"
# GPUs that TensorRT-RTX 1.7 names for its default target in the error it raises on an H200.
RTX_GPUS = ("8.0", "8.6", "8.9", "12.0+")
LIBRARIES = {
    Kind.TENSORRT_RTX: Library("tensorrt_rtx", "tensorrt-rtx-cu12", RTX_GPUS),
    Kind.TENSORRT: Library("tensorrt", "tensorrt-cu12", None),
}


@dataclass(frozen=True)
class Plan:
    """A plan to build: its library, and the GPUs and releases that it runs on.

    Attributes
    ----------
    kind : Kind
        The library.
    compute_capabilities : tuple[str, ...]
        ``9.0``, or ``8.0+`` with all later ones. A TensorRT plan has exactly one entry.
    version_compatible : bool
        Whether tensorrt-lean of the same release runs it too.
    """

    kind: Kind
    compute_capabilities: tuple[str, ...]
    version_compatible: bool = False

    @property
    def name(self) -> str:
        """Name of its artefact."""
        return artefact_name(self.kind, self.compute_capabilities)

    @property
    def target(self) -> str:
        """The GPU as a file name has it: ``sm90``, ``sm80plus``."""
        return "-".join(map(_in_file_name, self.compute_capabilities))


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
        raise BuildError(
            f"Target {kind} needs {package}, which is not installed; install it, or leave {kind} out of "
            "TARGETS."
        ) from None


def plan_here(kind: Kind, hardware_compatible: bool = False, version_compatible: bool = False) -> Plan:
    """The plan of ``kind`` that this machine builds; both options apply to TensorRT only.

    Raises
    ------
    BuildError
        If the library is not installed, or needs a GPU and this machine has none.
    """
    library_version(kind)
    known = LIBRARIES[kind].compute_capabilities
    if known is not None:
        return Plan(kind, known)
    capability = _capability()
    return Plan(kind, (AMPERE_AND_LATER if hardware_compatible else capability,), version_compatible)


def build_plan(
    plan: Plan,
    onnx_path: Path,
    plan_path: Path,
    timing_caches: Path,
    advance: Advance,
    profiles: Sequence[Profile] = PROFILES,
) -> None:
    """Build a plan of the strongly typed graph in ``onnx_path`` for the ``profiles``.

    Parameters
    ----------
    timing_caches : Path
        Folder that keeps TensorRT's timings of kernels from one build to the next.

    Raises
    ------
    BuildError
        If the file is not valid ONNX, the library refuses the graph, or this machine lacks the GPU.
    """
    library = LIBRARIES[plan.kind]
    trt = importlib.import_module(library.module)
    log, messages = error_log(trt)
    builder = trt.Builder(log)
    # From TensorRT 11 on every network is strongly typed; before, a flag asks for it.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    onnx_parser = trt.OnnxParser(network, log)
    # With its path, as its weights may be in another file beside it.
    if not onnx_parser.parse(_source(onnx_path), str(onnx_path)):
        raise BuildError(f"{library.module} cannot read the graph: {_first(messages)}")
    config = builder.create_builder_config()
    names = [network.get_input(index).name for index in range(network.num_inputs)]
    specs = input_specs(name for name in names if name in INPUTS)
    for bounds in profiles:
        profile = builder.create_optimization_profile()
        shapes = (shapes_of(specs, size) for size in (bounds.minimum, bounds.optimum, bounds.maximum))
        for spec, *range_of_shapes in zip(specs, *shapes, strict=True):
            profile.set_shape(spec.name, *range_of_shapes)
        config.add_optimization_profile(profile)
    monitor = _monitor(trt, advance)
    config.progress_monitor = monitor
    # TensorRT-RTX chooses kernels when a plan is loaded; its timing cache does nothing since 1.2.
    if plan.kind is Kind.TENSORRT:
        timing_cache = timing_caches / f"{library_version(plan.kind)}.{_in_file_name(_capability())}"
        set_compatibility(trt, config, plan)
        known = len(messages)
        load_timing_cache(config, timing_cache)
        del messages[known:]  # a refused timing cache does not explain a later failure
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BuildError(f"{library.module} cannot build the graph: {_first(messages)}")
    with plan_path.open("wb") as stream:
        stream.write(serialized)
    if plan.kind is Kind.TENSORRT:
        save_timing_cache(config, timing_cache)


def _source(onnx_path: Path) -> bytes:
    """The graph that a plan is built from, serialized.

    Raises
    ------
    BuildError
        If the file is not valid ONNX.
    """
    try:
        model = onnx.load(str(onnx_path), load_external_data=False)
    except DecodeError:
        raise BuildError(
            f"The plan cannot be built: {onnx_path.name} is not a valid ONNX file; "
            "build the engine again."
        ) from None
    spell_out_attention(model)
    return bytes(model.SerializeToString())


def set_compatibility(trt: Any, config: Any, plan: Plan) -> None:
    """Set the compatibility with other GPUs and releases that ``plan`` asks for."""
    if plan.compute_capabilities == (AMPERE_AND_LATER,):
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if plan.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # Otherwise the plan carries its own runtime for later releases: 100 MB of host code that every
        # user of the plan would have to trust.
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)


def load_timing_cache(config: Any, path: Path) -> None:
    """Give a builder the timings in ``path``, or an empty cache where they do not fit."""
    saved = b""
    with contextlib.suppress(OSError):
        saved = path.read_bytes()
    for content in (saved, b""):
        # Damaged timings, or those of another GPU or release, are refused: None, False or an exception.
        with contextlib.suppress(RuntimeError, ValueError):
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
                return


def save_timing_cache(config: Any, path: Path) -> None:
    """Save a builder's timings; of two concurrent builds the later one's stay.

    Raises
    ------
    OSError
        If the folder cannot be written.
    """
    cache = config.get_timing_cache()
    if cache is not None:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, bytes(cache.serialize()))


def _in_file_name(compute_capability: str) -> str:
    return "sm" + compute_capability.replace(".", "").replace("+", "plus")


def _capability() -> str:
    """Compute capability of this machine's GPU, which TensorRT plans are built on."""
    target = f"Target {Kind.TENSORRT} is built on the GPU it is for"
    if not has_cuda_driver():
        raise BuildError(
            f"{target}, and this machine has no NVIDIA driver; "
            f"leave it out of TARGETS ({Kind.TENSORRT_RTX} builds without a GPU)."
        )
    import torch

    if not torch.cuda.is_available():
        raise BuildError(
            f"{target}, and PyTorch cannot use the GPU of this machine; install its CUDA build."
        )
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def _first(messages: list[str]) -> str:
    return messages[0] if messages else "the library gave no reason."


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
