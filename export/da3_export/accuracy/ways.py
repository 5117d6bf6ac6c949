"""Every way to run a model here: PyTorch eager, the backends, and the FP16 graph in FP16 arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from da3_export.parity.subjects import FP16, onnx_runner
from da3_export.settings import BuildSettings
from da3_export.util.progress import Progress
from da3_runtime.backends import BACKENDS
from da3_runtime.backends.eager import Eager
from da3_runtime.errors import DA3Error
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.network import precision
from da3_runtime.network.load import load_network
from da3_runtime.network_io import Conditions, RawOutputs, inputs_of
from da3_runtime.store.engine_weights import engine_checkpoint, engine_sdt, weights_digest
from da3_runtime.store.find_engine import find_engine
from da3_runtime.store.manifest import Kind
from da3_runtime.util.setting_group import AUTO
from da3_runtime.variants import Head, find_variant

EAGER_FP32 = "eager fp32"
FP16_ROUNDED = "fp16 graph, rounded"

Run = Callable[[NDArray[np.uint8], Conditions | None], dict[str, RawOutputs]]


class Way(NamedTuple):
    """A way to run one head.

    Attributes
    ----------
    name : str
        The backend with its precision.
    run : Run
        Runs a batch of scenes, until the next way is asked for.
    digest : str
        Digest of the weights or of the artefact that it runs, in hexadecimal.
    """

    name: str
    run: Run
    digest: str


def ways_to_run(settings: BuildSettings, progress: Progress) -> Iterator[Way]:
    """Every way to run one head here: PyTorch eager, backends, the FP16 graph with FP16 arithmetic."""
    variant = find_variant(settings.model_id)
    try:
        yield _eager_fp32(settings)
    except DA3Error as error:
        progress.log(f"{settings.head}, {EAGER_FP32}: not run: {error}")
    folder = None
    # Eager is on a CPU the same as above, and on a GPU the same as eager-cuda.
    ways = [(cls, each) for cls in reversed(BACKENDS) if cls is not Eager for each in cls.precisions]
    for cls, asked in ways:
        try:
            loaded = load_backend(replace(settings, backend=cls.name, precision=asked))
        except DA3Error as error:
            way = cls.name if asked == AUTO else f"{cls.name} {asked}"
            progress.log(f"{settings.head}, {way}: not run: {error}")
            continue
        folder = loaded.folder
        try:
            yield Way(f"{cls.name} {loaded.backend.precision}", loaded.run, loaded.digest())
        finally:
            loaded.close()
    if folder is None or folder.manifest is None or len(variant.graphs) != 1:
        return
    (graph,) = variant.graphs
    try:
        artefact = folder.artefacts(graph, Kind.ONNX_FP16)[0]
        rounded = onnx_runner(folder.verified(artefact), FP16)
    except DA3Error as error:
        progress.log(f"{settings.head}, {FP16_ROUNDED}: not run: {error}")
        return
    yield Way(
        FP16_ROUNDED,
        lambda images, conditions: {graph.name: rounded(images, conditions)},
        artefact.digest,
    )


def _eager_fp32(settings: BuildSettings) -> Way:
    """The networks themselves, in FP32 on the CPU, with the weights that the engine was built from."""
    folder, _ = find_engine(settings)
    checkpoint = engine_checkpoint(folder, settings)
    sdt = engine_sdt(folder, settings) if folder.head is Head.SDT else None
    networks = {
        graph.name: load_network(
            folder.variant,
            graph,
            checkpoint.path,
            precision.FP32,
            sdt.path if sdt is not None and graph.takes_sdt else None,
        )
        for graph in folder.variant.graphs
    }

    def run(images: NDArray[np.uint8], conditions: Conditions | None) -> dict[str, RawOutputs]:
        outputs = {}
        with torch.inference_mode():
            for name, network in networks.items():
                inputs = inputs_of(network.graph.series.inputs, images, conditions)
                outputs[name] = network(*map(torch.from_numpy, inputs.values()))
        return {
            name: RawOutputs.of(networks[name].output_names, [tensor.numpy() for tensor in tensors])
            for name, tensors in outputs.items()
        }

    weights = [checkpoint] if sdt is None else [checkpoint, sdt]
    return Way(EAGER_FP32, run, weights_digest(weights, settings))
