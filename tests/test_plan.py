"""TensorRT-RTX plans: built without a GPU, loaded with one."""

import pytest

from export.plan import LIBRARIES, build_plan
from runtime.backends.tensorrt import has_cuda_driver
from runtime.errors import BuildError
from runtime.manifest import Kind

NO_GPU = "there is no NVIDIA driver on this machine"


def test_the_rtx_plan_was_built_and_holds_the_weights(engine):
    plan = engine.folder / "model.fp16.rtx.plan"
    assert plan.stat().st_size > (engine.folder / "model.fp16.onnx").stat().st_size * 0.9


def test_a_graph_the_library_cannot_read_is_a_build_error(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(BuildError, match="cannot read the graph"):
        build_plan(Kind.TENSORRT_RTX, tmp_path / "bad.onnx", tmp_path / "plan", lambda _: None)
    assert not (tmp_path / "plan").exists()


def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch):
    library = LIBRARIES[Kind.TENSORRT]
    monkeypatch.setitem(LIBRARIES, Kind.TENSORRT, library.__class__("x", "no-such-package", True, ()))
    with pytest.raises(BuildError, match="no-such-package, which is not installed"):
        build_plan(Kind.TENSORRT, tmp_path / "a", tmp_path / "b", lambda _: None)


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda_driver(), reason=NO_GPU)
def test_the_rtx_plan_deserialises_on_this_gpu(engine):
    import tensorrt_rtx as trt

    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    loaded = runtime.deserialize_cuda_engine((engine.folder / "model.fp16.rtx.plan").read_bytes())
    assert loaded is not None
    assert loaded.num_optimization_profiles == 2
    names = [loaded.get_tensor_name(i) for i in range(loaded.num_io_tensors)]
    assert names == ["images", "depth", "confidence", "intrinsics", "extrinsics"]
