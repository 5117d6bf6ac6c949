"""Builds for tests: requests, few parity cases, stand-ins for what is slow or needs a GPU."""

import hashlib
from dataclasses import replace

import da3_export.build
import da3_export.onnx_to_plan
from da3_export.onnx_to_plan import LIBRARIES, Library
from da3_export.parity import cases
from da3_export.parity.cases import Case
from da3_export.request import request_of
from da3_export.settings import BuildSettings
from da3_runtime.store.manifest import Kind, read_manifest
from tests.support.engines import Engine, copy_engine, damage, link_onnx
from tests.support.paths import NANO

ONE_CASE = [Case(84, 98, 1)]


def build_request(engine_dir, targets=None, **settings):
    """The request for da3-nano's engine in ``engine_dir``."""
    return request_of(BuildSettings(engine_dir=engine_dir, model_id=NANO, **settings), targets)


def artefacts_of(folder, graph="model"):
    """Artefacts of a graph, by name, as the manifest lists them."""
    return read_manifest(folder).graphs[graph].artefacts


def measure_on(patch, chosen):
    """Let parity be measured on the ``chosen`` cases only."""
    patch.setattr(cases, "all_cases", lambda *_: chosen)


def copy_with(engine: Engine, root, *kinds: Kind) -> Engine:
    """A copy of an engine with the artefacts of some kinds only, for builds that measure little."""
    copy = copy_engine(engine, root)
    manifest = read_manifest(copy.folder)
    assert manifest is not None
    entry = manifest.graphs["model"]
    kept = {name: each for name, each in entry.artefacts.items() if each.kind in kinds}
    smaller = replace(manifest, graphs={"model": replace(entry, artefacts=kept)})
    for name in manifest.file_names() - smaller.file_names():
        (copy.folder / name).unlink()
    damage(copy.folder / "manifest.json", smaller.to_json().encode())
    return copy


def stand_in_for_tensorrt(patch, capability=None):
    """Let TensorRT-RTX's package stand in for TensorRT's, on a GPU of ``capability`` if it is given."""
    library = Library("tensorrt_rtx", "tensorrt-rtx-cu12", None)
    patch.setitem(LIBRARIES, Kind.TENSORRT, library)
    if capability is not None:
        patch.setattr(da3_export.onnx_to_plan, "_capability", lambda: capability)


def write_plans_at_once(patch):
    """Replace the builder of plans, which takes minutes, by one whose plan names what it is made from.

    The plan that tests of the builder itself look at is the real one in the fixture ``engine``.
    """

    def write(plan, onnx_path, plan_path, timing_caches, advance):
        source = hashlib.sha256(onnx_path.read_bytes()).hexdigest()
        plan_path.write_text(f"{plan} of {source}\n")

    patch.setattr(da3_export.build, "build_plan", write)


def export_by_copying(patch, *sources):
    """Replace the ONNX exporter by one that links existing files, one after another."""
    left = list(sources)
    patch.setattr(da3_export.build, "export_onnx", lambda network, path: link_onnx(left.pop(0), path))
