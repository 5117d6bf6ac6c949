"""ONNX -> serialized plan, with TensorRT-RTX or TensorRT: one builder for both.

A TensorRT plan runs on the compute capability that it was built for; a hardware-compatible plan runs on
8.0 and later. It runs with the release that built it. A version-compatible plan also runs with the
tensorrt-lean of that release.
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
from da3_runtime.network_io import INPUT, MAX_BATCH
from da3_runtime.store.manifest import Kind, Profile, artefact_name
from da3_runtime.util.files import write_atomically
from da3_runtime.variants import MAX_SIDE, MIN_SIDE

_SMALL = 504
# One plan, two shape ranges: a single large photo, or a batch at the default resolution. The runner
# allocates device memory for the shape in use (the USER_MANAGED strategy of both libraries).
PROFILES = [
    Profile([1, MIN_SIDE, MIN_SIDE, 3], [1, 378, 504, 3], [1, MAX_SIDE, MAX_SIDE, 3]),
    Profile([1, MIN_SIDE, MIN_SIDE, 3], [4, 378, 504, 3], [MAX_BATCH, _SMALL, _SMALL, 3]),
]


@dataclass(frozen=True)
class Library:
    """Differences between the two libraries.

    Attributes
    ----------
    module : str
        Python module.
    package : str
        Distribution that installs the module.
    compute_capabilities : tuple[str, ...] | None
        Compute capabilities that a plan supports; None: that of the GPU that it is built on.
    """

    module: str
    package: str
    compute_capabilities: tuple[str, ...] | None


AMPERE_AND_LATER = "8.0+"
# Compute capabilities of TensorRT-RTX 1.7's default target, as listed in its error message on an H200.
RTX_GPUS = ("8.0", "8.6", "8.9", "12.0+")
LIBRARIES = {
    Kind.TENSORRT_RTX: Library("tensorrt_rtx", "tensorrt-rtx-cu12", RTX_GPUS),
    Kind.TENSORRT: Library("tensorrt", "tensorrt-cu12", None),
}


@dataclass(frozen=True)
class Plan:
    """The library and the GPUs that a plan is built for.

    Attributes
    ----------
    kind : Kind
        The library.
    compute_capabilities : tuple[str, ...]
        Compute capabilities: ``9.0``, or ``8.0+`` for 8.0 and later. A TensorRT plan has one entry.
    version_compatible : bool
        Whether tensorrt-lean of the same release can run it too.
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
        """Its GPUs as part of a file name: ``sm90``, ``sm80plus``."""
        return "-".join(map(_in_file_name, self.compute_capabilities))


def library_version(kind: Kind) -> str:
    """Version of the library that builds ``kind``.

    Raises
    ------
    BuildError
        If the library is not installed.
    """
    package = LIBRARIES[kind].package
    try:
        return version(package)
    except PackageNotFoundError:
        raise BuildError(
            f"Target {kind} needs {package}, which is not installed; install it, or leave the target "
            "out of TARGETS."
        ) from None


def plan_here(kind: Kind, hardware_compatible: bool = False, version_compatible: bool = False) -> Plan:
    """The plan of ``kind`` that this machine builds; TensorRT-RTX ignores the two options.

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
    plan : Plan
        Library and GPUs.
    onnx_path : Path
        The graph.
    plan_path : Path
        The file to write.
    timing_caches : Path
        Folder that keeps TensorRT's timings of kernels for later builds.
    advance : Advance
        Called with the name of each finished phase.
    profiles : Sequence[Profile]
        Ranges of input shapes that the plan supports.

    Raises
    ------
    BuildError
        If the library rejects the graph. Raises also as :func:`plan_here`.
    """
    library = LIBRARIES[plan.kind]
    trt = importlib.import_module(library.module)
    log, messages = error_log(trt)
    builder = trt.Builder(log)
    # TensorRT 11 is always strongly typed; older releases need the flag.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    onnx_parser = trt.OnnxParser(network, log)
    # The path is needed to find external weights beside the file.
    if not onnx_parser.parse(_source(onnx_path), str(onnx_path)):
        raise BuildError(f"{library.module} cannot read the graph: {_first(messages)}")
    config = builder.create_builder_config()
    for bounds in profiles:
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT, bounds.minimum, bounds.optimum, bounds.maximum)
        config.add_optimization_profile(profile)
    monitor = _monitor(trt, advance)
    config.progress_monitor = monitor
    # TensorRT-RTX chooses kernels when a plan is loaded; its timing cache does nothing since 1.2.
    if plan.kind is Kind.TENSORRT:
        timing_cache = timing_caches / f"{library_version(plan.kind)}.{_in_file_name(_capability())}"
        set_compatibility(trt, config, plan)
        known = len(messages)
        load_timing_cache(config, timing_cache)
        del messages[known:]  # a refused timing cache does not explain a failure of the build
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BuildError(f"{library.module} cannot build the graph: {_first(messages)}")
    with plan_path.open("wb") as stream:
        stream.write(serialized)
    if plan.kind is Kind.TENSORRT:
        save_timing_cache(config, timing_cache)


def _source(onnx_path: Path) -> bytes:
    """The serialized graph, rewritten for TensorRT by :func:`spell_out_attention`.

    Raises
    ------
    BuildError
        If the file is not ONNX.
    """
    try:
        model = onnx.load(str(onnx_path), load_external_data=False)
    except DecodeError:
        raise BuildError(f"{onnx_path.name} is not a valid ONNX file; build the engine again.") from None
    spell_out_attention(model)
    return bytes(model.SerializeToString())


def set_compatibility(trt: Any, config: Any, plan: Plan) -> None:
    """Configure TensorRT for the hardware and version compatibility of ``plan``."""
    if plan.compute_capabilities == (AMPERE_AND_LATER,):
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if plan.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # Without this flag the plan contains the lean runtime for later releases: 100 MB of host code
        # that every user of the plan would have to trust.
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)


def load_timing_cache(config: Any, path: Path) -> None:
    """Give a builder the timings of earlier builds; an empty cache if ``path`` has none that fit."""
    saved = b""
    with contextlib.suppress(OSError):
        saved = path.read_bytes()
    for content in (saved, b""):
        # TensorRT refuses a cache that is damaged or of another GPU: None, False or an exception.
        with contextlib.suppress(RuntimeError, ValueError):
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
                return


def save_timing_cache(config: Any, path: Path) -> None:
    """Save a builder's timings. If two builds run at once, the later one overwrites the other's.

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
    """Compute capability of this machine's GPU; TensorRT builds plans on the GPU that runs them."""
    target = f"Target {Kind.TENSORRT} must be built on the GPU that runs it"
    if not has_cuda_driver():
        raise BuildError(
            f"{target}, but this machine has no NVIDIA driver; "
            f"leave it out of TARGETS ({Kind.TENSORRT_RTX} builds without a GPU)."
        )
    import torch

    if not torch.cuda.is_available():
        raise BuildError(
            f"{target}, but PyTorch cannot use this machine's GPU; check the CUDA installation."
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
