"""The benchmarks: counted work, refusals, the order of timing, the table and the result file."""

import base64
import io
import itertools
import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from benchmarks import gpu_check, kernels, serving
from benchmarks.backends import check, main
from benchmarks.gpu_check import LARGE, Runner, Step, figures_of
from benchmarks.plain import PlainNetwork, cast_to_half
from benchmarks.reference import depth_error
from benchmarks.report import Row, finish, refusals, table
from benchmarks.roofline import Rates, Work, count_work, total
from benchmarks.rounds import Round, summarize, time_in_turn
from da3_export.parity.cases import Case, case_images
from da3_export.parity.reference import run_reference
from da3_runtime.network.load import build_network
from da3_runtime.network.precision import FP16
from da3_runtime.network_io import RawOutputs
from da3_runtime.settings import Settings
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.variants import VARIANTS, Head, find_variant
from tests.support.paths import NANO

CASE = Case(84, 98, 2)


class TwoProducts(nn.Module):
    """A 1x1 convolution from 3 to 8 channels, and a linear layer from 8 to 4."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.linear = nn.Linear(8, 4)

    def forward(self, images):
        x = self.conv(images[:, 0].float().permute(0, 3, 1, 2)).relu()
        return (self.linear(x.permute(0, 2, 3, 1)),)


def test_counted_work_equals_a_hand_count():
    height, width, batch = 5, 7, 2
    pixels = height * width * batch
    network = TwoProducts().to("meta")
    work = count_work(network, (height, width, batch), cache=0)
    assert work.flops == 2 * pixels * (3 * 8 + 8 * 4)
    assert work.weight_bytes == 4 * (3 * 8 + 8 + 8 * 4 + 4)
    assert work.io_bytes == pixels * 3 + 4 * pixels * 4
    assert work.activation_bytes == 2 * 4 * pixels * (8 + 4)


def test_only_results_beyond_the_cache_count_as_traffic():
    pixels = 10 * 10
    network = TwoProducts().to("meta")
    work = count_work(network, (10, 10, 1), cache=4 * pixels * 6)
    assert work.activation_bytes == 2 * 4 * pixels * (8 - 6)


def test_da3_large_takes_1_23_tflop_at_504_x_504():
    """0.95 TFLOP of backbone and 0.28 of head; the head takes slightly less, because its 1x1 convolutions run
    before the upsampling.
    """
    (graph,) = VARIANTS["da3-large"].graphs
    with torch.device("meta"):
        network = build_network(graph).for_inference(FP16)
    one, four = (count_work(network, (504, 504, batch), cache=0) for batch in (1, 4))
    assert one.flops == pytest.approx(1.23e12, rel=0.01)
    assert four.flops == pytest.approx(4 * one.flops, rel=0.01)
    assert four.weight_bytes == one.weight_bytes == pytest.approx(814e6, rel=0.01)


def test_the_roofline_is_the_slower_of_arithmetic_and_memory():
    rates = Rates(flops_per_s=1e12, bytes_per_s=1e9, cache_bytes=0, dtype="float16")
    assert Work(2 * 10**12, 10**6, 0, 0).roofline_s(rates) == pytest.approx(2)
    assert Work(10**9, 10**9, 10**9, 10**9).roofline_s(rates) == pytest.approx(3)
    assert total([Work(1, 2, 3, 4), Work(10, 20, 30, 40)]) == (11, 22, 33, 44)


def checked(depth_scale, precision):
    """The checked row of a contender whose depth is ``depth_scale`` times the reference's."""
    depth = np.linspace(1, 5, 84 * 98, dtype=np.float32).reshape(1, 1, 84, 98)
    outputs = {"model": RawOutputs(depth * np.float32(depth_scale))}
    loaded = SimpleNamespace(
        backend=SimpleNamespace(precision=precision, artefact=None), run=lambda images: outputs
    )
    row = Row(NANO, "dpt", "suspect", 84, 98, 1)
    check(row, loaded, np.zeros((1, 1, 84, 98, 3), np.uint8), {"model": depth})
    return row


def test_a_contender_whose_depth_is_off_by_one_percent_is_refused_and_listed():
    row = checked(1.01, "fp16")
    assert row.error == pytest.approx(0.01, rel=1e-3)
    listed = refusals([row])
    assert "suspect (1 x 84 x 98)" in listed
    assert "1.0e-02" in listed
    assert table([row]) == ""


@pytest.mark.parametrize(
    ("scale", "precision", "timed", "marked"),
    [
        (1.004, "fp16", True, False),
        (1.004, "fp32", False, False),
        (1.00005, "fp32", True, False),
        (1.004, "bf16", True, False),
        (1.01, "bf16", True, True),
        (math.nan, "fp16", False, False),
        (math.nan, "bf16", False, False),
        (math.inf, "bf16", False, False),
    ],
)
def test_the_allowed_error_depends_on_the_precision(scale, precision, timed, marked):
    row = checked(scale, precision)
    assert (row.why is None, row.marked) == (timed, marked)


def test_the_error_is_that_of_the_worse_graph():
    right = np.ones((1, 2, 2), np.float32)
    outputs = {"anyview": RawOutputs(right), "metric": RawOutputs(right * 2)}
    reference = {"anyview": right, "metric": right}
    assert depth_error(outputs, reference) == 1
    outputs["anyview"] = RawOutputs(right * np.nan)
    assert math.isnan(depth_error(outputs, reference))


def test_a_failed_contender_is_listed_with_its_reason():
    def out_of_memory(images):
        raise RuntimeError("out of memory")

    row = Row(NANO, "dpt", "large", 84, 98, 1)
    loaded = SimpleNamespace(backend=SimpleNamespace(precision="fp16", artefact=None), run=out_of_memory)
    check(row, loaded, np.zeros((1, 1, 84, 98, 3), np.uint8), {})
    assert "out of memory" in refusals([row])


def test_contenders_take_turns_and_another_one_is_first_in_each_round():
    ran = []
    runs = {name: partial(ran.append, name) for name in "abc"}
    ticks = itertools.count(step=0.5)
    seconds, failures = time_in_turn(runs, rounds=3, per_round=2, clock=lambda: next(ticks))
    turns = ["".join(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert turns == ["aaa", "bbb", "ccc", "bbb", "ccc", "aaa", "ccc", "aaa", "bbb"]
    # The clock ticks 0.5 s per call: each turn has two timed runs and an untimed first one.
    assert seconds == {name: [[0.5, 0.5]] * 3 for name in "abc"}
    assert failures == {}


def test_a_contender_that_fails_in_a_later_round_is_left_out():
    left = iter(range(4))
    runs = {"good": lambda: None, "bad": lambda: next(left)}
    seconds, failures = time_in_turn(runs, rounds=3, per_round=2)
    assert [len(turn) for turn in seconds["good"]] == [2, 2, 2]
    assert list(seconds) == ["good"]
    assert "StopIteration" in failures["bad"]


def test_a_latency_is_the_median_of_the_rounds_medians():
    timing = summarize([[0.001, 0.002, 0.009], [0.004, 0.004, 0.004], [0.003, 0.003, 0.100]])
    assert timing.median_ms == pytest.approx(3)
    assert [turn.median_ms for turn in timing.rounds] == pytest.approx([2, 4, 3])
    assert timing.rounds[1] == Round(pytest.approx(4), pytest.approx(4))
    # The 99th percentile of nine numbers lies 0.92 of the way from the eighth to the ninth.
    assert timing.p99_ms == pytest.approx(9 + 0.92 * 91)


def test_ratios_are_of_medians():
    rows = [Row(NANO, "dpt", name, 84, 98, 4) for name in ("eager", "fast", "refused")]
    rows[0].median_ms, rows[1].median_ms = 20, 5
    finish(rows, floor_ms=2)
    assert [row.speedup for row in rows] == [1, 4, None]
    assert [row.over_floor for row in rows] == [10, 2.5, None]
    assert [row.images_per_s for row in rows] == [200, 800, None]


def test_without_eager_there_is_no_ratio_to_it():
    row = Row(NANO, "dpt", "fast", 84, 98, 1, median_ms=5)
    finish([row], floor_ms=2)
    assert (row.speedup, row.over_floor) == (None, 2.5)


def test_the_plain_network_computes_upstream_s_outputs(small_monocular):
    (graph,) = VARIANTS["da3mono-large"].graphs
    images = case_images(CASE)
    want = run_reference(small_monocular, images, graph).outputs
    with torch.no_grad():
        depth, sky = PlainNetwork(small_monocular, graph, (6, 7))(torch.from_numpy(images))
    np.testing.assert_allclose(depth, want.depth, rtol=1e-4)
    np.testing.assert_allclose(sky, want.sky, rtol=1e-4, atol=1e-4)


def test_a_graph_cast_to_half_keeps_the_dtypes_of_inputs_outputs_and_scales():
    def constant(name, values):
        return numpy_helper.from_array(np.array(values, np.float32), name)

    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "third"], ["y"]),
        helper.make_node("Resize", ["y", "", "scales"], ["depth"], mode="nearest"),
    ]
    image = helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 1, 2, 2])
    depth = helper.make_tensor_value_info("depth", TensorProto.FLOAT, [1, 1, 4, 4])
    constants = [constant("third", 1 / 3), constant("scales", [1, 1, 2, 2])]
    graph = helper.make_graph(nodes, "g", [image], [depth], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    cast_to_half(model)
    onnx.checker.check_model(model, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types == {"third": TensorProto.FLOAT16, "scales": TensorProto.FLOAT}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"images": np.full((1, 1, 2, 2), 3, np.uint8)})
    assert got.dtype == np.float32
    assert got[0, 0, 3, 3] == pytest.approx(1, abs=1e-3)


def test_without_a_gpu_the_command_prints_one_error_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert "needs an NVIDIA GPU" in line


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--sizes", "500x504"),
        ("--sizes", "504"),
        ("--batches", "0"),
        ("--contenders", "tensorrt"),
        ("--models", "da4"),
    ],
)
def test_an_error_names_the_wrong_value(option, value, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["--device", "cpu", option, value]) == 2
    assert repr(value.partition("x")[2] if value == "504" else value) in capsys.readouterr().err


def test_a_missing_engine_is_listed_with_the_command_to_build_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ENGINE_DIR", str(tmp_path))
    out = tmp_path / "results" / "cpu.json"
    args = ["--device", "cpu", "--models", NANO, "--heads", "dpt", "--sizes", "84x84", "--batches", "1"]
    assert main([*args, "--contenders", "onnxruntime-cpu", "--out", str(out)]) == 0
    assert "no engine: run make engines MODEL=da3-nano HEAD=dpt" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    assert "no engine" in row["why"]
    assert row["median_ms"] is None


def test_no_loads_skips_loading_and_memory(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ENGINE_DIR", str(engine.engine_dir))
    out = tmp_path / "cpu.json"
    args = ["--device", "cpu", "--models", NANO, "--heads", "dpt", "--sizes", "84x84", "--batches", "1"]
    args += ["--contenders", "onnxruntime-cpu", "--rounds", "1", "--runs", "1", "--no-loads"]
    assert main([*args, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["median_ms"] > 0
    assert (row["cold_s"], row["cached_s"], row["memory_mb"]) == (None, None, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_kernels_without_a_gpu_prints_one_error_line(tmp_path, capsys):
    assert kernels.main(["--backend", "eager", "--out", str(tmp_path / "kernels.json")]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_step_of_the_gpu_check_that_hangs_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    runner = Runner(tmp_path / "gpu_check.json", {}, "cpu", limit_s=60, at_once=2)
    hangs = Step("hangs", ("http.server", "0", "--bind", "127.0.0.1"), limit_s=0.3)
    needs = Step("needs", ("this",), limit_s=30, needs=("hangs",))
    later = Step("later", ("platform",), limit_s=30, after=("hangs",))
    fails = Step("fails", ("platform",), limit_s=30, may_exit=(7,))
    runner.run([hangs, needs, later, fails])
    steps = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    ends = {step["name"]: step["status"] for step in steps}
    assert ends == {"hangs": "timed out", "needs": "not run", "later": "ran", "fails": "failed"}


def test_the_gpu_check_compares_medians_with_its_targets():
    medians = {
        "eager": 16.8,
        "before-onnxruntime-cuda": 8.4,
        "onnxruntime-cuda": 5.6,
        "onnxruntime-cuda-nhwc": 7.0,
        "aoti": 4.2,
    }
    others = {"artefact": None, "over_floor": 2.0}
    rows = [{"contender": name, "median_ms": ms, **others} for name, ms in medians.items()]
    found = figures_of(LARGE, rows)
    assert found["met"] == {"ms": False, "speedup": True}
    assert (found["over_before"], found["nhwc_gain"]) == (1.5, 0.8)
    assert (found["over_aoti"], found["keep_aoti"]) == (0.75, True)


def test_serving_is_timed_beside_the_reference_and_returns_the_same_preview(tmp_path):
    folder = EngineFolder(find_variant(NANO), Head.DPT, tmp_path, None)
    depth = np.linspace(1, 4, 126 * 168, dtype=np.float32).reshape(126, 168)
    stream = io.BytesIO()
    serving.photo(320, 240).save(stream, "JPEG")
    text = base64.b64encode(stream.getvalue()).decode()
    sample = serving.Sample("320 x 240 JPEG", 320, 240, text, depth)
    row = serving.overhead(sample, folder, Settings.of(model_id=NANO), rounds=2, per_round=1)
    assert row["picture"]["within_1"] >= 0.99
    assert row["picture"]["most"] <= 3
    assert min(row["ours_ms"], row["reference_ms"], row["times_less"]) > 0
    (graph,) = folder.variant.graphs
    service = serving.prepared(
        {graph.name: serving.StandIn(depth, 0, 0)}, folder, Settings.of(model_id=NANO)
    )
    assert serving.throughput(service, text, 2, 0.2) > 0
    with pytest.raises(RuntimeError, match="Base64"):
        serving.throughput(service, "*", 2, 0.2)
