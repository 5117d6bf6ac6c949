"""Evaluating a model: figures beside eager's, runs that go on, and the same figures on rendered scenes."""

import fcntl
import json
import re

import cv2
import numpy as np
import pytest

import da3_export.accuracy.evaluate
from da3_export.accuracy.datasets import find_samples
from da3_export.accuracy.evaluate import RESULTS_NAME, Request, evaluate
from da3_export.accuracy.metrics import Alignment
from da3_export.accuracy.report import table, to_json, worst_image
from da3_export.accuracy.samples import Source, read_depth
from da3_export.accuracy.ways import EAGER_FP32, FP16_ROUNDED, Way
from da3_export.settings import BuildSettings
from da3_runtime.errors import InferenceError, SettingError
from da3_runtime.network_io import RawOutputs
from da3_runtime.variants import Head
from tests.support.data_sets import (
    write_diode,
    write_eth3d,
    write_folder,
    write_kitti,
    write_nyu_mat,
    write_photo,
    write_tum,
)
from tests.support.paths import NANO, PHOTOS, ROOT
from tests.support.processes import run_module
from tools.nano.render import HELD_OUT_SEED, SIZES, known_depth, render_folder
from tools.nano.scenes import render, render_views

METRIC = "da3metric-large"
STILL = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)


class StandIn:
    """A way to run that returns one depth everywhere, and cameras in a row; it counts its runs."""

    def __init__(self, depth=2.0, name="stand-in", digest="d1", fails_at=None):
        self.depth, self.fails_at, self.runs = depth, fails_at, 0
        self.way = Way(name, self.run, digest)

    def run(self, images, conditions):
        self.runs += 1
        if self.runs == self.fails_at:
            raise InferenceError("It broke.")
        views = images.shape[1]
        pose = np.tile(np.eye(3, 4, dtype=np.float32), (1, views, 1, 1))
        pose[0, :, 0, 3] = np.arange(views)
        lens = np.tile(np.eye(3, dtype=np.float32), (1, views, 1, 1))
        depth = np.full(images.shape[:4], self.depth, np.float32)
        return {"model": RawOutputs(depth, intrinsics=lens, extrinsics=pose)}


@pytest.fixture
def measured(monkeypatch):
    """Evaluates with stand-ins as the only ways to run."""

    def run(path, *ways, name="folder", model=NANO, **options):
        monkeypatch.setattr(
            da3_export.accuracy.evaluate, "ways_to_run", lambda *_: (each.way for each in ways)
        )
        source = Source(path, options.pop("depth_scale", None))
        settings = BuildSettings(model_id=model, processing_res=options.pop("res", None))
        return evaluate(settings, Request(name, source, **options), heads=(Head.DPT,))

    return run


def test_only_depth_without_a_unit_is_scaled(tmp_path, measured):
    write_folder(tmp_path, 1)
    (figures,) = measured(tmp_path, StandIn(2)).figures
    assert (figures.scaling, figures.errors["abs_rel"], figures.photos) == ("median", 0, 1)
    # 300 is the focal length at which the network's depth is in meters.
    focal = 300 * 32 / 504
    (figures,) = measured(tmp_path, StandIn(2), model=METRIC, focal_length_px=focal).figures
    assert figures.scaling == "none"
    assert figures.errors["abs_rel"] == pytest.approx(1, abs=0.02)
    assert figures.errors["delta1"] == 0


def test_the_alignment_may_be_chosen(tmp_path, measured):
    write_photo(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.tile(np.arange(1, 33.0), (24, 1)))
    found = {each: measured(tmp_path, StandIn(2), alignment=each) for each in Alignment}
    rmse = {each: evaluation.figures[0].errors["rmse"] for each, evaluation in found.items()}
    assert rmse[Alignment.LEAST_SQUARES] == pytest.approx(np.std(np.arange(32)))
    assert rmse[Alignment.NONE] == pytest.approx(np.sqrt(np.mean((np.arange(1, 33.0) - 2) ** 2)))
    assert [e.figures[0].scaling for e in found.values()] == ["median", "least-squares", "none"]


def test_focal_length_of_a_data_set_gives_meters(tmp_path, measured):
    write_kitti(tmp_path, np.full((375, 1242), 20.0))
    (figures,) = measured(tmp_path, StandIn(20), name="kitti", model=METRIC).figures
    assert figures.scaling == "none"
    factor = 721.5377 / 300 * np.mean([504 / 1242, 154 / 375])
    assert figures.errors["rmse"] == pytest.approx(20 * abs(factor - 1), rel=0.02)


def test_differences_to_eager_and_published_figures_stand_beside(tmp_path, measured):
    write_kitti(tmp_path, np.tile(np.linspace(5, 50, 1242), (375, 1)))
    ways = StandIn(20, EAGER_FP32), StandIn(20.02, "engine")
    evaluation = measured(tmp_path, *ways, name="kitti", model=METRIC)
    eager, engine = evaluation.figures
    assert set(eager.difference.values()) == {0}
    for name, difference in engine.difference.items():
        assert difference == engine.errors[name] - eager.errors[name]
    assert engine.difference["rmse"] != 0
    text = table(evaluation)
    assert re.search(rf"engine .*\{engine.difference['rmse']:+.1e}", text)
    assert "somebody else's measurement (project changh95/tt-Depth-Anything-3" in text
    content = json.loads(to_json(evaluation, Request("kitti", Source(tmp_path))))
    assert content["figures"][1]["minus_eager"]["rmse"] == round(engine.difference["rmse"], 8)
    assert content["published"]["fp32"] == {"abs_rel": 0.0906, "delta1": 0.9591}


def test_an_engine_equal_to_eager_and_a_missing_eager_are_told_apart(tmp_path, measured):
    write_folder(tmp_path, 1)
    both = table(measured(tmp_path, StandIn(name=EAGER_FP32), StandIn(name="engine")))
    assert re.search(r"minus eager.*\ndpt +engine +\+0\.0e\+00 ", both)
    alone = table(measured(tmp_path, StandIn(name="engine")))
    assert "minus eager" not in alone
    assert "eager fp32 did not run, so the differences to it are not known" in alone


def test_a_link_to_a_missing_photo_is_one_sentence(tmp_path, measured):
    write_folder(tmp_path, 1)
    (tmp_path / "1.png").symlink_to(tmp_path / "missing.png")
    np.save(tmp_path / "1.npy", np.ones((24, 32)))
    with pytest.raises(SettingError, match=r"1\.png cannot be read: No such file"):
        measured(tmp_path, StandIn())


def test_a_wrong_scale_is_remarked(tmp_path, measured):
    write_photo(tmp_path / "a.png")
    cv2.imwrite(str(tmp_path / "a.depth.png"), np.full((24, 32), 2000, np.uint16))
    focal = {"model": METRIC, "focal_length_px": 300 * 32 / 504}
    wrong = measured(tmp_path, StandIn(2), depth_scale=1.0, **focal)
    assert "The known depth is 1e+03 times" in table(wrong)
    right = measured(tmp_path, StandIn(2), depth_scale=0.001, **focal)
    assert "check --depth-scale" not in table(right)


def test_cameras_of_scenes_are_measured(tmp_path, measured):
    image, depth = np.full((24, 32, 3), 90, np.uint8), np.ones((24, 32))
    # The stand-in's cameras stand in a row to the left; the last of these turns by 20 degrees.
    turn = (0.0, 0.0, np.sin(np.radians(10)), np.cos(np.radians(10)))
    row = [(float(i), image, depth, (-float(i), 0.0, 0.0, *STILL[3:])) for i in range(3)]
    write_tum(tmp_path, [*row, (3.0, image, depth, (-3.0, 0.0, 0.0, *turn))])
    (figures,) = measured(tmp_path, StandIn(), name="tum").figures
    assert figures.pairs == 6
    errors = {name: value for name, value in figures.errors.items() if name.startswith("auc")}
    assert errors == pytest.approx(
        {"auc5": 1 / 2, "auc15": 1 / 2, "auc30": (3 + 3 * 1 / 3) / 6}, abs=1e-4
    )
    assert measured(tmp_path, StandIn(), name="tum", views=2).figures[0].pairs == 1
    for options in ({"views": 0}, {"model": METRIC}):
        (figures,) = measured(tmp_path, StandIn(), name="tum", **options).figures
        assert figures.pairs == 0
        assert "auc5" not in figures.errors


def test_a_killed_run_goes_on(tmp_path, measured):
    data, out = write_folder(tmp_path / "data", 5), tmp_path / "out"
    whole = measured(data, StandIn(), out=tmp_path / "whole")
    with pytest.raises(InferenceError):
        measured(data, StandIn(fails_at=3), out=out)
    lines = (out / RESULTS_NAME).read_bytes()
    (out / RESULTS_NAME).write_bytes(lines[:-9])  # the last line is cut
    rest = StandIn()
    evaluation = measured(data, rest, out=out)
    assert evaluation.figures == whole.figures
    assert rest.runs == 4 + 4  # four photos, and the four worst for the image
    texts = [(folder / RESULTS_NAME).read_text() for folder in (out, tmp_path / "whole")]
    assert texts[0] == texts[1]
    again = StandIn()
    assert measured(data, again, out=out).figures == whole.figures
    assert again.runs == 4


def test_another_way_is_added_to_earlier_results(tmp_path, measured):
    data, out = write_folder(tmp_path / "data", 2), tmp_path / "out"
    measured(data, StandIn(name=EAGER_FP32), out=out)
    first, second = StandIn(name=EAGER_FP32), StandIn(name="engine")
    assert len(measured(data, first, second, out=out).figures) == 2
    assert (first.runs, second.runs) == (2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "d2"}, r'has results with digest of dpt, stand-in "d1", and this run has "d2"'),
        ({"res": 84}, "has results with processing_res 168, and this run has 84"),
        ({"views": 4}, "has results with views 8, and this run has 4"),
        ({"model": METRIC}, f'has results with model "{NANO}", and this run has "{METRIC}"'),
        ({"photos": 1}, "has results with files_digest"),
        ({"name": "kitti-eigen"}, 'has results with dataset "kitti", and this run has "kitti-eigen"'),
    ],
)
def test_results_of_something_else_are_not_mixed(tmp_path, measured, change, message):
    data, out = write_kitti(tmp_path / "data", np.ones((24, 32)), frames=(1, 2)), tmp_path / "out"
    measured(data, StandIn(), name="kitti", out=out)
    way = StandIn(digest=change.get("digest", "d1"))
    options = {"name": "kitti"} | {key: value for key, value in change.items() if key != "digest"}
    with pytest.raises(SettingError, match=message):
        measured(data, way, out=out, **options)
    assert way.runs == 0


def test_bad_results_and_a_running_run_are_refused(tmp_path, measured):
    data, out = write_folder(tmp_path / "data", 1), tmp_path / "out"
    measured(data, StandIn(), out=out)
    with (out / RESULTS_NAME).open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SettingError, match="another run writes to it"):
            measured(data, StandIn(), out=out)
    lines = (out / RESULTS_NAME).read_bytes().split(b"\n")
    (out / RESULTS_NAME).write_bytes(b"\n".join([lines[0], b"{nothing", *lines[1:]]))
    with pytest.raises(SettingError, match=r"line 2 of results\.jsonl is damaged"):
        measured(data, StandIn(), out=out)
    with pytest.raises(SettingError, match=r"--out .*: Not a directory"):
        measured(data, StandIn(), out=data / "0.png" / "out")


def test_a_fault_in_the_last_file_is_found_before_anything_runs(tmp_path, measured):
    data, out = write_folder(tmp_path / "data", 3), tmp_path / "out"
    np.save(data / "2.npy", np.zeros((24, 32)))
    way = StandIn()
    with pytest.raises(SettingError, match=r"2\.npy has no valid pixel"):
        measured(data, way, out=out)
    assert way.runs == 0
    write_folder(data, 3)  # repaired: the folder of the results is still free
    assert measured(data, way, out=out).figures[0].photos == 3


def test_photos_are_spread_evenly(tmp_path, measured):
    write_folder(tmp_path, 5)
    names = [case.name for case in measured(tmp_path, StandIn(), photos=3).worst]
    assert sorted(names) == ["0.png", "2.png", "4.png"]


def test_nothing_that_can_run_is_an_error(tmp_path, measured):
    with pytest.raises(SettingError, match="Nothing can run da3-nano here"):
        measured(write_folder(tmp_path, 1))


WRITERS = {
    "folder": lambda path: write_folder(path, 2),
    "nyu": lambda path: write_nyu_mat(path, 2),
    "kitti-eigen": lambda path: write_kitti(path, np.full((24, 32), 5.0), frames=(1, 2)),
    "eth3d": lambda path: write_eth3d(path, [(1, 0, 0, 0, 0, 0, 0), (1, 0, 0, 0, 1, 0, 0)]),
    "diode": write_diode,
    "tum": lambda path: write_tum(
        path,
        [
            (float(i), np.full((24, 32, 3), 90, np.uint8), np.ones((24, 32)), (i, *STILL[1:]))
            for i in (1, 2)
        ],
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_data_set_runs_to_a_report(tmp_path, run_here, monkeypatch, name):
    monkeypatch.setattr(da3_export.accuracy.evaluate, "ways_to_run", lambda *_: [StandIn().way])
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    WRITERS[name](data)
    done = run_here(
        "da3_export", "evaluate", "--model", NANO, "--dataset", f"{name}:{data}", "--out", str(out)
    )
    assert done.code == 0, done.stderr
    rows = json.loads((out / "figures.json").read_text())["figures"]
    assert {row["how"] for row in rows} == {"stand-in"}
    assert all(np.isfinite(row["abs_rel"]) for row in rows)
    assert ("auc5" in rows[0]) == (name in ("eth3d", "tum"))
    assert done.stdout == (out / "table.txt").read_text()
    assert cv2.imread(str(out / "worst.jpg")) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "nyuv2:here"], "--dataset 'nyuv2' is not one of: folder, nyu"),
        (["--dataset", "kitti"], "--dataset 'kitti': give NAME:DIR, such as kitti:/data/kitti."),
        (["--data", "here", "--photos", "0"], "--photos must be above 0."),
        (["--data", "here", "--focal-length-px", "-1"], "--focal-length-px must be above 0."),
        ([], "one of the arguments --dataset --data is required"),
    ],
)
def test_bad_options_are_one_sentence(run_here, options, message):
    done = run_here("da3_export", "evaluate", *options)
    assert done.code == 2
    assert message in done.stderr


def test_the_worst_cases_are_drawn_with_their_known_depth(tmp_path, measured):
    write_folder(tmp_path, 5)
    depth = np.full((24, 32), 3.0)
    depth[:, :8] = 12
    depth[:, 8:16] = 0
    np.save(tmp_path / "3.npy", depth)
    evaluation = measured(tmp_path, StandIn())
    assert evaluation.worst[0].name == "3.png"
    image = cv2.imdecode(np.frombuffer(worst_image(evaluation), np.uint8), cv2.IMREAD_COLOR)
    height, width = evaluation.worst[0].truth.shape
    assert image.shape[1] == 4 * (width + 6)
    known, error = (image[22 : 22 + height, i * (width + 6) :][:, :width] for i in (1, 3))
    for panel in (known, error):
        bright, unknown, dark = (panel[:, at].mean() for at in (width // 8, 3 * width // 8, width - 30))
        assert bright > unknown > dark
        assert unknown == pytest.approx(128, abs=3)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.nano.render._PROFILE_SCENES", 20)
        render_folder(folder, 3)
    return folder


def test_rendered_scenes_are_stored_without_loss(scenes):
    assert len(find_samples("folder", Source(scenes))[1]) == 3
    scene = render(HELD_OUT_SEED, 1, *SIZES[1])
    assert np.array_equal(cv2.imread(str(scenes / "00001.png"))[..., ::-1], scene.rgb)
    assert np.array_equal(read_depth(scenes / "00001.depth.npz"), known_depth(scene))
    about = json.loads((scenes / "about.json").read_text())
    assert about["count"] == 3
    assert str(HELD_OUT_SEED) in about["scenes"]
    assert 0.05 < about["baseline"]["abs_rel"] < 1


def test_every_way_to_run_both_heads_is_measured(engine, sdt_engine, scenes, tmp_path):
    target = tmp_path / "figures.json"
    done = run_module(
        "da3_export", "evaluate", "--model", NANO, "--engine-dir", str(engine.engine_dir),
        "--data", str(scenes), "--json", str(target),
    )  # fmt: skip
    assert done.code == 0, done.stderr
    content = json.loads(target.read_text())
    assert content["data"] == json.loads((scenes / "about.json").read_text())
    rows = {(row["head"], row["how"]): row for row in content["figures"]}
    for head in ("dpt", "sdt"):
        eager, onnx = (rows[head, way]["abs_rel"] for way in (EAGER_FP32, "onnxruntime-cpu fp32"))
        assert 0.02 < eager < 0.2
        assert onnx == pytest.approx(eager, rel=1e-4)
        assert f"{eager:.4f}" in done.stdout
    eager, half = (rows["dpt", way]["abs_rel"] for way in (EAGER_FP32, FP16_ROUNDED))
    assert half == pytest.approx(eager, abs=2e-3)
    assert half != eager
    assert len({row["digest"] for row in rows.values()}) == len(rows)
    assert ("sdt", FP16_ROUNDED) not in rows
    assert f"sdt, {FP16_ROUNDED}: not run" in done.stderr
    assert "cuda" in done.stderr  # a backend that cannot run is named with the reason
    assert str(ROOT) not in target.read_text()


def test_engines_find_the_same_cameras_as_eager(engine, tmp_path, run_here):
    views = render_views(HELD_OUT_SEED, 0, 3, 126, 168)
    write_tum(
        tmp_path,
        [
            (float(i), view.rgb, np.minimum(known_depth(view), 13), tum_pose(view.extrinsics))
            for i, view in enumerate(views)
        ],
    )
    done = run_here(
        "da3_export", "evaluate", "--model", NANO, "--engine-dir", str(engine.engine_dir),
        "--dataset", f"tum:{tmp_path}", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.code == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "figures.json").read_text())["figures"]
    onnx = next(row for row in rows if row["how"] == "onnxruntime-cpu fp32")
    assert onnx["pairs"] == 3
    assert max(abs(value) for value in onnx["minus_eager"].values()) < 1e-3
    assert {"auc5", "auc15", "auc30"} <= onnx["minus_eager"].keys()
    lines = [json.loads(line) for line in (tmp_path / "out" / RESULTS_NAME).read_text().splitlines()]
    errors = {line["how"]: line["errors"] for line in lines if line["kind"] == "scene"}
    assert errors["onnxruntime-cpu fp32"] == pytest.approx(errors[EAGER_FP32], abs=0.05)


def tum_pose(extrinsics):
    """Tx ty tz qx qy qz qw of a camera given as world to camera."""
    rotation = np.asarray(extrinsics)[:, :3].T.astype(np.float64)
    turn = cv2.Rodrigues(rotation)[0][:, 0]
    angle = np.linalg.norm(turn)
    axis = turn / max(angle, 1e-12)
    return *(-rotation @ extrinsics[:, 3]), *(axis * np.sin(angle / 2)), np.cos(angle / 2)


def test_comparison_images_are_written(engine, sdt_engine, tmp_path):
    done = run_module(
        "tools.nano", "pictures", "--engine-dir", str(engine.engine_dir),
        "--photo", str(PHOTOS / "temple.jpg"), "--out", str(tmp_path),
    )  # fmt: skip
    assert done.code == 0, done.stderr
    scene, photo = (cv2.imread(str(tmp_path / f"nano-{name}.jpg")) for name in ("scene", "photo"))
    assert scene.shape == (378, 4 * 504, 3)
    assert photo.shape[1] > 2 * photo.shape[0]
