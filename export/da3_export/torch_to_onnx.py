"""Torch module -> ONNX, dynamic in scenes, views, height and width."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch.export import Dim
from torch.onnx._internal.exporter import _fx_passes

from da3_runtime.network.network import DepthNetwork
from da3_runtime.network_io import (
    IMAGES,
    MAX_BATCH,
    MAX_VIEWS,
    POSES,
    WANTED_REFERENCE,
    input_specs,
    inputs_of,
    output_specs,
)
from da3_runtime.util.garbage import no_garbage_collection
from da3_runtime.variants import MAX_SIDE, MIN_SIDE, PATCH

# 23 has attention and rotary embeddings as one operator each; TensorRT 11's parser knows up to 25.
OPSET = 23
DATA_ENDING = ".data"  # the exporter appends it to the name of the ONNX file
# Sides of the traced example: different from each other, from the positional table's 37 patches and from
# every channel count, so that a size frozen into the graph would show.
_TRACED_GRID = (7, 9)
_TRACED_VIEWS = 11


def data_of(path: Path) -> Path:
    """The file of an ONNX file's weights."""
    return path.with_name(path.name + DATA_ENDING)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """PyTorch's operators that the network has and the exporter does not know, with ONNX's for them."""
    # Takes half a second, which a build that finds everything up to date saves.
    from onnxscript import opset23 as op

    aten = torch.ops.aten
    return {
        aten.to.dtype: lambda x, dtype: op.Cast(x, to=dtype),
        aten.detach_.default: lambda x: op.Identity(x),
        aten.__and__.Tensor: lambda a, b: op.And(a, b),
        aten.rsub.Scalar: lambda x, number: op.Sub(number, x),
        aten.conv_transpose2d.input: lambda x, weight, bias, stride: op.ConvTranspose(
            x, weight, bias, strides=list(stride)
        ),
    }


def export_onnx(network: DepthNetwork, path: Path) -> None:
    """Write ``network`` as ONNX to ``path``, and its weights beside it, with :data:`DATA_ENDING`.

    A weight in a file of its own is mapped where ONNX Runtime uses it as it is, and another graph can
    refer to it. Small constants, which say shapes, stay in the ONNX file.

    torch.export (non-strict) followed by the ONNX exporter on its program: exporting the module directly
    fails on upstream's modules (measured with torch 2.13). The program is not traced again to decompose
    operators that ONNX lacks, which took a third of the time (measured with da3-nano):
    :func:`_translations` has those few that the exporter does not know.
    """
    grid_h, grid_w = _TRACED_GRID
    size = (2, _TRACED_VIEWS, grid_h * PATCH, grid_w * PATCH, 3)
    low, high = MIN_SIDE // PATCH, MAX_SIDE // PATCH
    scenes, views = Dim("scenes", min=1, max=MAX_BATCH), Dim("views", min=1, max=MAX_VIEWS)
    dimensions = {
        IMAGES: {
            0: scenes,
            1: views,
            2: PATCH * Dim("grid_h", min=low, max=high),
            3: PATCH * Dim("grid_w", min=low, max=high),
        },
        WANTED_REFERENCE: {0: scenes},
        POSES: {0: scenes, 1: views},
    }
    names = network.graph.series.inputs
    examples = inputs_of(names, np.zeros(size, np.uint8))
    with _quiet(), no_garbage_collection(), _no_type_promotion(), torch.no_grad():
        program = torch.export.export(
            network,
            tuple(torch.from_numpy(examples[name]) for name in names),
            dynamic_shapes=tuple(dimensions[name] for name in names),
            strict=False,
        )
        program.run_decompositions = lambda _: program  # type: ignore[method-assign, assignment, misc]
        exported = torch.onnx.export(
            program,
            custom_translation_table=_translations(),
            input_names=list(names),
            output_names=list(network.output_names),
            opset_version=OPSET,
            verbose=False,
        )
    assert exported is not None
    exported.save(str(path), external_data=True)
    _finish(path, network)


def _finish(path: Path, network: DepthNetwork) -> None:
    """Name the dynamic dimensions, record the precision, drop the exporter's notes, check the file."""
    model = onnx.load(str(path), load_external_data=False)
    inputs, outputs = input_specs(network.graph.series.inputs), output_specs(network.output_names)
    specs = [(model.graph.input, inputs), (model.graph.output, outputs)]
    for values, tensors in specs:
        for value, spec in zip(values, tensors, strict=True):
            assert value.name == spec.name
            for dim, size in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
                if isinstance(size, str):
                    dim.dim_param = size
    # Intermediate shapes carry the exporter's symbols, which mean nothing now.
    del model.graph.value_info[:]
    # Every node comes with its stack trace: paths of this machine, and other bytes on another.
    for noted in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        del noted.metadata_props[:]
    del model.graph.metadata_props[:]
    onnx.helper.set_model_props(model, {"precision": network.precision.name})
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path))


@contextlib.contextmanager
def _no_type_promotion() -> Iterator[None]:
    """Leave out the exporter's pass that makes operands of different types equal.

    It runs every node of the traced program again, which took a quarter of the time (measured with
    da3-nano). The network converts its operands itself, and ONNX refuses operands of different types.
    """
    before = _fx_passes.insert_type_promotion_nodes
    _fx_passes.insert_type_promotion_nodes = lambda graph_module: None
    try:
        yield
    finally:
        _fx_passes.insert_type_promotion_nodes = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' progress chatter; their exceptions still surface."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
