"""Creates a plain export: upstream's whole network with its ray branch, traced for one shape.

It shows what exporting gives without this project's work: every branch is computed, no structure is
removed, and on a GPU everything is half precision, from norms to exp. It is stored as an engine folder,
so the same backends run it.

For a GPU the traced graph is cast to half precision: upstream's forward adds FP32 position tables and
cannot run as a half-precision module. torch.onnx cannot trace two parts of upstream's forward, which are
replaced: the position grid (a constant for a fixed shape) and the camera decoder
(:class:`da3_runtime.network.camera_decoder.CameraDecoder`), whose cost is negligible.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from benchmarks.load_once import Shape
from benchmarks.record import reason
from da3_export.onnx_to_plan import LIBRARIES, build_plan, library_version, plan_here
from da3_export.parity.upstream import Upstream, load_upstream
from da3_runtime.network.camera_decoder import CameraDecoder
from da3_runtime.network.vit import normalize
from da3_runtime.network_io import IMAGES, input_specs, output_specs
from da3_runtime.store.checkpoint import Checkpoint
from da3_runtime.store.manifest import (
    MANIFEST_NAME,
    Artefact,
    GraphEntry,
    Kind,
    Manifest,
    Profile,
    Source,
    describe,
)
from da3_runtime.util.files import write_atomically
from da3_runtime.variants import PATCH, Graph, Head, Variant

HALF, FULL = "fp16", "fp32"
TRACED_OPSET = 20  # latest opset that the tracer supports


class PlainNetwork(nn.Module):
    """Upstream's network as a function of one uint8 image batch of a fixed shape.

    Parameters
    ----------
    upstream : Upstream
        ``DepthAnything3Net`` with weights loaded, in FP32.
    graph : Graph
        Decides the outputs.
    grid : tuple[int, int]
        Number of patches, vertical and horizontal.
    """

    def __init__(self, upstream: Upstream, graph: Graph, grid: tuple[int, int]) -> None:
        super().__init__()
        self.upstream: Upstream = upstream
        self.rays = graph.rays
        self.camera: CameraDecoder | None = None
        if upstream.cam_dec is not None:
            self.camera = CameraDecoder(upstream.cam_dec.fc_t.in_features)
            self.camera.load_state_dict(upstream.cam_dec.state_dict())
        table = torch.cartesian_prod(*(torch.arange(side) for side in grid))[None]
        upstream.backbone.pretrained.position_getter = lambda batch, height, width, device: table.expand(
            batch, -1, -1
        ).clone()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The graph's outputs without ``reference``, FP32, for photos uint8 [B, 1, H, W, 3]."""
        height, width = images.shape[2:4]
        views = normalize(images)[:, None]
        levels, _ = self.upstream.backbone(views, cam_token=None, export_feat_layers=[])
        maps = self.upstream._process_depth_head(levels, height, width)
        if self.camera is None:
            return maps.depth, maps.sky
        camera = self.camera(levels[-1][1][:, 0], height, width)
        rays = (maps.ray, maps.ray_conf) if self.rays else ()
        return maps.depth, maps.depth_conf, *(each[:, None] for each in camera), *rays


def output_names(graph: Graph) -> list[str]:
    """Names of the outputs of :class:`PlainNetwork`: one view has no choice of the reference."""
    return [name for name in graph.outputs if name != "reference"]


def export_plain(
    variant: Variant, checkpoint: Checkpoint, shape: Shape, kinds: list[Kind], engine_dir: Path
) -> dict[Kind, str]:
    """Write the plain export of a variant for one shape as an engine folder with the DPT head.

    Parameters
    ----------
    shape : Shape
        H, W, B.
    kinds : list[Kind]
        ``ONNX_FP32``, or ``ONNX_FP16`` followed by the plans to build from it.

    Returns
    -------
    dict[Kind, str]
        Reason for each kind that failed.
    """
    height, width, batch = shape
    folder = engine_dir / variant.model_id / Head.DPT
    folder.mkdir(parents=True)
    precision = FULL if Kind.ONNX_FP32 in kinds else HALF
    profile = Profile(*([batch, 1, height, width, 3] for _ in range(3)))
    entries: dict[str, GraphEntry] = {}
    failures: dict[Kind, str] = {}
    for graph in variant.graphs_for(ray_pose=bool(variant.ray_graphs)):
        path = folder / f"{graph.name}.onnx"
        network = PlainNetwork(
            load_upstream(variant, graph, checkpoint.path), graph, (height // PATCH, width // PATCH)
        )
        _export(network, graph, shape, path, half=precision == HALF)
        del network
        files = [describe(file) for file in (path, path.with_name(f"{path.name}.data"))]
        artefacts = [Artefact(kinds[0], files, precision, "", 0.0, {})]
        for kind in kinds[1:]:
            plan_path = folder / f"{graph.name}.{kind}.plan"
            try:
                plan = plan_here(kind)
                build_plan(plan, path, plan_path, engine_dir, lambda phase: None, [profile])
            except Exception as error:  # any error of a compiler goes into the report
                failures[kind] = reason(error)
                continue
            version, made_for = library_version(kind), list(plan.compute_capabilities)
            file = describe(plan_path)
            artefacts.append(Artefact(kind, [file], precision, "", 0.0, {}, version, made_for))
        by_name = {artefact.name: artefact for artefact in artefacts}
        entry = GraphEntry(input_specs([IMAGES]), output_specs(output_names(graph)), by_name)
        # The manifest must list the graphs without rays; the benchmark never runs them.
        entries |= {graph.key: entry, graph.name: entry}
    manifest = Manifest(
        model=variant.model_id,
        head=Head.DPT,
        licence=variant.license,
        unit=variant.unit,
        source=Source(
            checkpoint.weights,
            checkpoint.sha256(),
            checkpoint.repo,
            checkpoint.commit,
            checkpoint.trained,
        ),
        head_source=None,
        side_multiple=PATCH,
        profiles=[profile],
        graphs=entries,
    )
    write_atomically(folder / MANIFEST_NAME, manifest.to_json().encode())
    return failures


def plain_kinds(backend_kinds: list[Kind]) -> list[Kind]:
    """Kinds that :func:`export_plain` must create for backends that load ``backend_kinds``."""
    if Kind.ONNX_FP32 in backend_kinds:
        return [Kind.ONNX_FP32]
    return [Kind.ONNX_FP16, *(kind for kind in backend_kinds if kind in LIBRARIES)]


def _export(network: PlainNetwork, graph: Graph, shape: Shape, path: Path, half: bool) -> None:
    """Trace the network, fold the constants of the fixed shape, cast to half if ``half``, and write."""
    height, width, batch = shape
    traced = path.with_suffix(".traced") / path.name
    traced.parent.mkdir()
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            network,
            (torch.zeros(batch, 1, height, width, 3, dtype=torch.uint8),),
            str(traced),
            input_names=[IMAGES],
            output_names=output_names(graph),
            opset_version=TRACED_OPSET,
            dynamo=False,
        )
    folded = traced.with_name("folded.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", "folded.data"
    )
    ort.InferenceSession(traced, options, providers=["CPUExecutionProvider"])
    model = onnx.load(str(folded))
    if half:
        cast_to_half(model)
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data")
    for file in traced.parent.iterdir():
        file.unlink()
    traced.parent.rmdir()


def cast_to_half(model: ModelProto) -> None:
    """Cast every FP32 value of a graph to FP16, in place; inputs and outputs keep their dtypes.

    Scales of a Resize stay FP32, as ONNX requires. After folding no other input has that requirement.
    """
    graph = model.graph
    scales = {node.input[2] for node in graph.node if node.op_type == "Resize" and len(node.input) > 2}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in scales:
            tensor.CopyFrom(_halved(tensor))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
            is_float = attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT
            if is_float and node.output[0] not in scales:
                attribute.t.CopyFrom(_halved(attribute.t))
    del graph.value_info[:]
    for output in graph.output:
        half = f"{output.name}_half"
        for node in graph.node:
            node.output[:] = [half if name == output.name else name for name in node.output]
            node.input[:] = [half if name == output.name else name for name in node.input]
        graph.node.append(helper.make_node("Cast", [half], [output.name], to=TensorProto.FLOAT))


def _halved(tensor: TensorProto) -> TensorProto:
    with np.errstate(over="ignore"):
        values = numpy_helper.to_array(tensor).astype(np.float16)
    return numpy_helper.from_array(values, tensor.name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracer: it warns about every shape that becomes a constant, which is intended here."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
