"""Runs a network that AOTInductor compiled ahead of time for one shape, and compiles it.

    ENGINE_DIR=engines python -m benchmarks.aoti --model da3-large --size 504x504

It is a contender of :mod:`benchmarks.backends` only; no engine contains it. torch.export traces the
network in the precision of the engines (FP16 on a GPU, FP32 on a CPU), and Inductor compiles it to a
package without Python. A package is kept in ``.cache/aoti`` and compiled again for other weights,
another shape or another PyTorch; with ``AOTI_COMPILE=0`` it must exist.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.record import ROOT
from benchmarks.shapes import positive, size_of
from da3_export.parity.cases import Case, case_images
from da3_runtime.backends.base import Backend
from da3_runtime.backends.eager import Eager
from da3_runtime.commands.options import run_verb
from da3_runtime.errors import BackendUnavailableError
from da3_runtime.network.load import load_network
from da3_runtime.network.network import DepthNetwork
from da3_runtime.network.precision import FP16, FP32
from da3_runtime.network_io import Conditions, RawOutputs, inputs_of
from da3_runtime.settings import Settings
from da3_runtime.store.checkpoint import Checkpoint
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.engine_weights import engine_checkpoint, engine_sdt
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import Graph, Head, Variant, find_variant

PACKAGES = ROOT / ".cache" / "aoti"
WARM_UP = 3  # calls before the capture: the first ones load kernels and fold constants
Package = Callable[..., tuple[Tensor, ...]]


class AotInductorCalls(Backend):
    """The package, called for each batch.

    Parameters
    ----------
    variant, graph, checkpoint, sdt : Variant, Graph, Checkpoint, Checkpoint | None
        What the network is loaded from, if a package must be compiled.
    """

    name = "aoti-calls"
    captures: ClassVar[bool] = False

    def __init__(
        self, variant: Variant, graph: Graph, checkpoint: Checkpoint, sdt: Checkpoint | None
    ) -> None:
        self._parts = (variant, graph, checkpoint, sdt)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._policy = FP16 if self._device == "cuda" else FP32
        self.precision = self._policy.name
        self.trained = checkpoint.trained
        self._runs: dict[tuple[int, ...], Callable[[list[Tensor]], list[Tensor]]] = {}

    @classmethod
    def unavailable(cls) -> str | None:
        if cls.captures and not torch.cuda.is_available():
            return "CUDA graphs need an NVIDIA GPU and a PyTorch built for CUDA"
        return Eager.unavailable()

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Backend:
        has_sdt = folder.head is Head.SDT and graph.takes_sdt
        sdt = engine_sdt(folder, settings) if has_sdt else None
        return cls(folder.variant, graph, engine_checkpoint(folder, settings), sdt)

    def run(self, images: NDArray[np.uint8], conditions: Conditions | None = None) -> RawOutputs:
        graph = self._parts[1]
        inputs = inputs_of(graph.series.inputs, images, conditions).values()
        given = [torch.from_numpy(each) for each in inputs]
        run = self._runs.get(images.shape)
        if run is None:
            package = self._package(images.shape, given)
            run = _Captured(package, given) if self.captures else self._calls(package)
            self._runs[images.shape] = run
        with torch.inference_mode():
            return RawOutputs.of(graph.outputs, [each.numpy() for each in run(given)])

    def close(self) -> None:
        self._runs.clear()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def _calls(self, package: Package) -> Callable[[list[Tensor]], list[Tensor]]:
        return lambda given: [each.cpu() for each in package(*(part.to(self._device) for part in given))]

    def _package(self, shape: tuple[int, ...], given: list[Tensor]) -> Package:
        """Load the package of a shape; compile it if it does not exist."""
        variant, graph, checkpoint, sdt = self._parts
        weights = "-".join(each.sha256()[:12] for each in (checkpoint, sdt) if each is not None)
        where = (self._device, torch.__version__, "x".join(map(str, shape)), weights)
        path = PACKAGES / f"{variant.model_id}-{graph.key}-{'-'.join(where)}.pt2"
        if not path.exists():
            if os.environ.get("AOTI_COMPILE") == "0":
                raise BackendUnavailableError("No package was compiled: run benchmarks.aoti first.")
            path.parent.mkdir(parents=True, exist_ok=True)
            sdt_path = None if sdt is None else sdt.path
            network = load_network(variant, graph, checkpoint.path, self._policy, sdt_path)
            compile_package(network.to(self._device), [each.to(self._device) for each in given], path)
        # Its own thread synchronization records events, which a capture does not allow.
        package: Package = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
        return package


class AotInductor(AotInductorCalls):
    """The package, captured as a CUDA graph with one pinned copy each way."""

    name = "aoti"
    captures = True


class _Captured:
    """A package for one shape on fixed memory; the call is replayed as a CUDA graph."""

    def __init__(self, package: Package, given: list[Tensor]) -> None:
        self._pinned = [torch.empty_like(each).pin_memory() for each in given]
        self._inputs = [each.cuda() for each in given]
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    package(*self._inputs)
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph):
                self._outputs = package(*self._inputs)
        self._results = [torch.empty_like(each, device="cpu").pin_memory() for each in self._outputs]

    def __call__(self, given: list[Tensor]) -> list[Tensor]:
        for value, pinned, place in zip(given, self._pinned, self._inputs, strict=True):
            pinned.copy_(value)
            place.copy_(pinned, non_blocking=True)
        self._graph.replay()
        for value, result in zip(self._outputs, self._results, strict=True):
            result.copy_(value, non_blocking=True)
        torch.cuda.synchronize()
        return [result.clone() for result in self._results]


def compile_package(network: DepthNetwork, examples: list[Tensor], path: Path) -> None:
    """Export a network for the shape of its example inputs, and compile it to a package at ``path``."""
    # The network spells attention and rotation as ONNX's operators only while it is exported, and
    # Inductor has fused kernels for PyTorch's own.
    with torch.no_grad(), mock.patch.object(torch.compiler, "is_exporting", lambda: False):
        program = torch.export.export(network, tuple(examples), strict=False)
    unfinished = path.with_name(f"{os.getpid()}.{path.name}")
    torch._inductor.aoti_compile_and_package(program, package_path=str(unfinished))
    unfinished.rename(path)


def compile_model(args: argparse.Namespace) -> int:
    """Compile the packages of a model for one shape, run them once, and print the seconds it took."""
    from benchmarks.contenders import AOTI_CALLS, make_contender

    variant = find_variant(args.model, "--model")
    case = Case(*size_of(args.size), positive("--batch", args.batch))
    engine_dir = Settings.from_env().engine.engine_dir
    start = time.perf_counter()
    loaded = make_contender(AOTI_CALLS, variant, Head.DPT, engine_dir, engine_dir).load()
    loaded.run(case_images(case))
    loaded.close()
    print(f"AOTInductor's package of {variant.model_id}: {time.perf_counter() - start:.0f} s")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and compile."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aoti", description=__doc__)
    add: Any = parser.add_argument
    add("--model", default="da3-large", help="%(default)s")
    add("--size", default="504x504", help="height x width; %(default)s")
    add("--batch", default="1", help="%(default)s")
    return run_verb(compile_model, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
