"""``da3-runtime video``: a film becomes depth in one scale, a track, and files that others read."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest
import trimesh
from PIL import Image

from da3_runtime.__main__ import main
from da3_runtime.errors import SettingError
from da3_runtime.image.film import FilmLimits, Pick
from da3_runtime.inference import film as film_module
from da3_runtime.inference.estimator import Estimator, Timings
from da3_runtime.inference.film import WORK, FilmRun, run_film
from da3_runtime.inference.joined_film import joined_film
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.inference.settings import InferenceSettings
from da3_runtime.inference.windows import Window, WindowFiles, WindowOptions
from da3_runtime.network_io import RawOutputs
from da3_runtime.output.encode import Output, Wanted
from da3_runtime.output.film import DepthFilm, PreviewFilm
from da3_runtime.postprocess.join import moved_cameras
from da3_runtime.postprocess.points import PointOptions
from da3_runtime.postprocess.poses import Similarity, inverse, scale_between
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.variants import Head, Unit, find_variant
from tests.support.films import ramps, read_film, write_film
from tests.support.paths import NANO, ROOT
from tests.support.processes import clean_env, command
from tests.support.stand_in import Pretended
from tools.nano.scenes import render_flight

HEIGHT, WIDTH = 84, 112
LOSSLESS = {"codec": "ffv1", "pixels": "bgr0"}
FIELD = 2  # index of a layout of objects in the open


class Exact(Pretended):
    """A network that knows the true depth and cameras of rendered frames.

    Every call returns them in another world: other axes, another origin, another scale.
    """

    name, precision, trained, gains_from_batches = "exact", "fp32", True, False

    def __init__(self, scenes, seed=0):
        self._scenes = {scene.rgb.tobytes(): scene for scene in scenes}
        assert len(self._scenes) == len(scenes)
        self._rng = np.random.default_rng(seed)
        self.calls = 0

    def run(self, images, conditions=None):
        self.calls += 1
        scenes = [self._scenes[image.tobytes()] for image in images[0]]
        turn = cv2.Rodrigues(self._rng.normal(size=3))[0]
        world = Similarity(turn, self._rng.normal(size=3), np.exp(self._rng.uniform(-1, 1)))
        depth = np.stack([np.where(scene.sky, 100, scene.depth) for scene in scenes]) * world.scale
        poses = moved_cameras(np.stack([scene.extrinsics for scene in scenes]), world)
        confidence = np.stack([np.where(scene.sky, 1.0, 2.0) for scene in scenes])
        intrinsics = np.stack([scene.intrinsics for scene in scenes])
        single = (depth, confidence, None, intrinsics, poses)
        return RawOutputs(*(each if each is None else each[None].astype(np.float32) for each in single))


@pytest.fixture(scope="module")
def flight():
    return list(render_flight(3, FIELD, 40, HEIGHT, WIDTH))


@pytest.fixture(scope="module")
def film(flight, tmp_path_factory):
    path = tmp_path_factory.mktemp("films") / "flight.mkv"
    return write_film(path, [scene.rgb for scene in flight])


class Alone(Pretended):
    """A network that sees each photo alone: depth is 2, and the upper third is sky."""

    name, precision, trained, gains_from_batches = "alone", "fp32", True, True

    def run(self, images, conditions=None):
        sky = np.zeros(images.shape[:4], np.float32)
        sky[:, :, : images.shape[2] // 3] = 1
        return RawOutputs(np.full_like(sky, 2), None, sky)


def estimator_of(network, model=NANO):
    folder = EngineFolder(find_variant(model), Head.DPT, None, None)
    settings = InferenceSettings(processing_res=WIDTH)
    return Estimator(Loaded(folder, {"model": network}, []), None, settings)


def make(film, out, network, outputs=(), pick=Pick(), points=None, model=NANO, progress=None, **options):  # noqa: B008
    run = FilmRun(
        film,
        out,
        WindowOptions(pick, **options),
        Wanted(tuple(outputs), points=points or PointOptions()),
        model_size=False,
        limits=FilmLimits(10**8),
        engine={},
        variant=find_variant(model),
    )
    return run_film(run, lambda: estimator_of(network, model), progress or (lambda *_: None), Timings())


def poses_of(out):
    """Extrinsics of every frame, from frames.jsonl."""
    lines = [json.loads(line) for line in (out / "frames.jsonl").read_text().splitlines()]
    return np.array([line["camera"]["extrinsics"] for line in lines])


def depths_of(out):
    frames, _, facts = read_film(out / "depth.mkv", "gray16le")
    return np.stack(frames) * float(facts["DEPTH_SCALE"])


@pytest.fixture(scope="module")
def exact(flight, film, tmp_path_factory):
    """Results of an exact network, whose windows all have another world."""
    out = tmp_path_factory.mktemp("exact")
    outputs = [Output.PREVIEW, Output.DEPTH_NPZ, Output.GLB, Output.PLY, Output.COLMAP]
    points = PointOptions(confidence=20, most=5000)
    return out, make(film, out, Exact(flight), outputs, points=points, loop=True)


def test_windows_in_random_worlds_become_one_exact_world(exact, flight):
    out, summary = exact
    true = np.stack([scene.extrinsics for scene in flight]).astype(np.float64)
    found = poses_of(out)
    # The film's world is the first camera: what remains is its unit.
    unit = scale_between(found, true)
    first = Similarity(true[0, :, :3], true[0, :, 3], 1.0)
    np.testing.assert_allclose(found[0], np.eye(3, 4), atol=1e-6)
    expected = moved_cameras(true, first)
    np.testing.assert_allclose(found[:, :, :3], expected[:, :, :3], atol=1e-5)
    np.testing.assert_allclose(found[:, :, 3] * unit, expected[:, :, 3], atol=1e-5)
    depths = np.stack([np.load(out / f"frames/{i:06d}.depth.npz")["depth"] for i in range(len(flight))])
    true_depths = np.stack([np.where(scene.sky, 100, scene.depth) for scene in flight])
    np.testing.assert_allclose(depths * unit, true_depths, rtol=2e-5)
    assert summary["joins"]["depth_error"] < 1e-5
    assert summary["joins"]["scale_max"] / summary["joins"]["scale_min"] > 1.5
    drift = summary["drift"]
    assert drift["scale"] == pytest.approx(1, abs=1e-5)
    assert drift["share_of_track"] < 1e-5
    assert drift["rotation"] < 0.01


def test_drift_between_the_ends_of_a_loop_is_measured(flight, film, tmp_path):
    class Drifting(Exact):
        """Each window is 1 % too small at its end, in depth and in its cameras' distances."""

        def run(self, images, conditions=None):
            raw = super().run(images, conditions)
            if self.calls <= windows:
                count = raw.depth.shape[1]
                shrink = np.linspace(1, 0.99, count, dtype=np.float32)[None, :, None, None]
                raw = raw._replace(depth=raw.depth * shrink)
            return raw

    windows = 8
    summary = make(film, tmp_path, Drifting(flight), loop=True)
    assert summary["windows"] == windows
    # From a window's first to its last frames there are five of its seven steps.
    assert summary["drift"]["scale"] == pytest.approx(0.99 ** (5 / 7 * windows), abs=0.01)


def test_the_track_is_that_of_the_frames(exact, flight):
    out, _ = exact
    lines = (out / "track.txt").read_text().splitlines()
    assert lines[0].startswith("# timestamp tx ty tz qx qy qz qw; unit relative")
    rows = np.array([[float(number) for number in line.split()] for line in lines[1:]])
    np.testing.assert_allclose(rows[:, 0], np.arange(len(flight)) / 30, atol=1e-3)
    poses = inverse(poses_of(out))
    np.testing.assert_allclose(rows[:, 1:4], poses[:, :, 3], atol=2e-6)
    for row, pose in zip(rows, poses, strict=True):
        turn = pycolmap.Rotation3d(row[4:]).matrix()
        np.testing.assert_allclose(turn, pose[:, :3], atol=2e-6)


def test_colmap_and_points_are_read_by_others(exact, flight, tmp_path):
    out, _ = exact
    with zipfile.ZipFile(out / "film.colmap.zip") as archive:
        archive.extractall(tmp_path)
    model = pycolmap.Reconstruction(tmp_path / "sparse" / "0")
    assert model.num_images() == len(flight)
    found = poses_of(out)
    for image in model.images.values():
        number = int(image.name.removesuffix(".jpg"))
        np.testing.assert_allclose(image.cam_from_world().matrix(), found[number], atol=1e-5)
    cloud = trimesh.load(out / "film.ply")
    assert 0.4 * 5000 < len(cloud.vertices) <= 5000
    # Every frame has a share.
    assert min(len(image.points2D) for image in model.images.values()) > 20
    scene = trimesh.load(out / "film.glb")
    assert scene.geometry["points"].vertices.shape == cloud.vertices.shape
    # Seen from the first frame, points are where its depth is.
    depth = np.load(out / "frames/000000.depth.npz")["depth"]
    image = model.images[1]
    xyz = np.array([model.points3D[each.point3D_id].xyz for each in image.points2D])
    x, y = np.array([each.xy for each in image.points2D]).astype(int).T
    np.testing.assert_allclose(xyz[:, 2], depth[y, x], rtol=1e-4)


def test_a_film_of_more_frames_than_points_has_every_camera(flight, film, tmp_path, monkeypatch):
    monkeypatch.setattr(film_module, "_CLOUDS", 4)
    points = PointOptions(confidence=0, most=15)
    make(film, tmp_path, Exact(flight), [Output.COLMAP, Output.PLY], points=points)
    with zipfile.ZipFile(tmp_path / "film.colmap.zip") as archive:
        archive.extractall(tmp_path)
    model = pycolmap.Reconstruction(tmp_path / "sparse" / "0")
    counts = [len(model.images[number].points2D) for number in range(1, len(flight) + 1)]
    assert counts == [1, 0, 0] * 13 + [1]
    assert len(trimesh.load(tmp_path / "film.ply").vertices) == 14


def test_the_depth_film_can_be_read_alone(exact, flight):
    out, summary = exact
    frames, seconds, facts = read_film(out / "depth.mkv", "gray16le")
    assert facts["UNIT"] == summary["unit"] == "relative"
    scale = float(facts["DEPTH_SCALE"])
    assert scale == summary["depth_scale"]
    np.testing.assert_allclose(seconds, np.arange(len(flight)) / 30, atol=1e-3)
    for number, frame in enumerate(frames):
        depth = np.load(out / f"frames/{number:06d}.depth.npz")["depth"]
        assert np.abs(frame * scale - depth).max() <= 0.501 * scale
    assert max(frame.max() for frame in frames) == 65535


def test_a_depth_has_one_gray_level_in_the_whole_film(exact, flight):
    out, _ = exact
    names = [f"{number:06d}" for number in range(len(flight))]
    depths = np.stack([np.load(out / f"frames/{name}.depth.npz")["depth"] for name in names])
    grays = np.stack([np.asarray(Image.open(out / f"frames/{name}.png")) for name in names])
    # From the nearest pixel of the film to its farthest, gray never becomes brighter.
    by_depth = grays.ravel()[np.argsort(depths, axis=None)].astype(int)
    assert np.diff(by_depth).max() <= 0
    assert by_depth[0] == 255
    assert by_depth[-1] == 0


def test_preview_shows_near_bright_with_times_kept(flight, tmp_path):
    times = [0, 20, 37, 60, 61, 300, 340, 400]
    path = write_film(
        tmp_path / "a.mov", [scene.rgb for scene in flight[:8]], "png", "rgb24", times=times
    )
    make(path, tmp_path / "out", Exact(flight))
    frames, seconds, _ = read_film(tmp_path / "out" / "preview.mp4")
    np.testing.assert_allclose(np.array(seconds) * 600, times, atol=1e-6)
    seconds = read_film(tmp_path / "out" / "depth.mkv")[1]
    np.testing.assert_allclose(seconds, np.array(times) / 600, atol=6e-4)
    depth = depths_of(tmp_path / "out")
    bright = frames[0].astype(int).sum(axis=2)
    near, far = depth[0] < np.quantile(depth[0], 0.1), depth[0] > np.quantile(depth[0], 0.9)
    assert bright[near].mean() > 2 * bright[far].mean()


def test_films_of_odd_sizes_keep_their_depth_and_pad_their_preview(tmp_path):
    shape = 51, 37, Fraction(1, 600), Fraction(30)
    depth = np.random.default_rng(0).uniform(0.5, 9, (37, 51)).astype(np.float32)
    depth[0, 0], depth[1, 0], depth[2, 0] = 0, np.nan, 1e-9
    color = ramps(1, 37, 51)[0]
    with (
        DepthFilm(tmp_path / "a.mkv", *shape, farthest=9.0, unit="m") as one,
        PreviewFilm(tmp_path / "a.mp4", *shape) as other,
    ):
        one.write(depth, 0, 20)
        other.write(color, 0, 20)
    ((values,), _, facts) = read_film(tmp_path / "a.mkv", "gray16le")
    assert facts["UNIT"] == "m"
    assert values.shape == (37, 51)
    assert values[:3, 0].tolist() == [0, 0, 1]
    np.testing.assert_allclose(values[3:] * float(facts["DEPTH_SCALE"]), depth[3:], atol=7e-5)
    ((shown,), _, _) = read_film(tmp_path / "a.mp4")
    assert shown.shape == (38, 52, 3)
    assert np.abs(shown[:37, :51].astype(int) - color).mean() < 8


@pytest.mark.parametrize("count", [1, 2, 8, 9, 13])
def test_films_of_any_length_have_every_frame_once(flight, tmp_path, count):
    path = write_film(tmp_path / "a.mkv", [scene.rgb for scene in flight[:count]])
    summary = make(path, tmp_path / "out", Exact(flight), loop=True)
    assert summary["frames"] == count
    assert summary["windows"] == {1: 1, 2: 1, 8: 1, 9: 2, 13: 2}[count]
    assert len(read_film(tmp_path / "out" / "preview.mp4")[0]) == count
    assert len(read_film(tmp_path / "out" / "depth.mkv", "gray16le")[0]) == count


def test_a_metric_model_that_sees_frames_alone_gives_meters(film, tmp_path):
    options = {"model": "da3metric-large", "focal_length_px": 450.0}
    summary = make(film, tmp_path, Alone(), [Output.SKY], **options)
    assert (summary["unit"], summary["track"], summary["frames"]) == ("m", None, 40)
    np.testing.assert_allclose(depths_of(tmp_path), 2 * 450 / 300, rtol=1e-4)
    sky = np.asarray(Image.open(tmp_path / "frames" / "000039.sky.png"))
    assert (sky[: HEIGHT // 3 - 1] == 255).all()
    assert (sky[HEIGHT // 3 + 1 :] == 0).all()


def test_the_meters_of_a_film_are_the_median_of_its_windows(flight, tmp_path):
    scenes, options = flight[:12], WindowOptions(window=4, overlap=2)
    files = WindowFiles(tmp_path / "windows")
    for index, unit in enumerate((2.0, 1.0, 1.0, 0.25, 1.0)):
        views = scenes[2 * index : 2 * index + 4]
        world = Similarity(np.eye(3), np.zeros(3), unit)
        depth = np.stack([np.where(view.sky, 100, view.depth) * unit for view in views])
        poses = moved_cameras(np.stack([view.extrinsics for view in views]), world)
        window = Window(
            times=np.arange(2 * index, 2 * index + 4),
            images=np.stack([view.rgb for view in views]),
            depth=depth.astype(np.float32),
            maps={"confidence": np.ones(depth.shape, np.float32)},
            intrinsics=np.stack([view.intrinsics for view in views]),
            extrinsics=poses.astype(np.float32),
            unit=Unit.METERS,
            focal_source="predicted",
            warnings=[],
            width=WIDTH,
            height=HEIGHT,
        )
        files.save(index, window)
    film = joined_film(files, options, is_joined=True)
    assert film.unit is Unit.METERS
    np.testing.assert_allclose([place.scale for place in film.places], [0.5, 1, 1, 4, 1], rtol=1e-5)
    for (at, seen), scene in zip(film.frames(), scenes, strict=True):
        assert scene is scenes[at]
        expected = np.where(scene.sky, 100, scene.depth)
        np.testing.assert_allclose(seen.model.depth.values, expected, rtol=1e-5)


def test_memory_does_not_grow_with_the_film(flight, tmp_path):
    def peak(name, count):
        frames = [scene.rgb for scene in flight]
        path = write_film(tmp_path / f"{name}.mkv", (frames * count)[: 30 * count])
        network = Exact(flight)
        tracemalloc.start()
        make(path, tmp_path / name, network, [Output.PLY], points=PointOptions(most=2000))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak("imports", 1)
    # 60 frames more, each of 140 kB as the network sees it.
    assert peak("long", 3) - peak("short", 1) < 500_000


def tree(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def small_film(path, count=24):
    return write_film(path, [scene.rgb for scene in render_flight(5, FIELD, count, 56, 84)])


def video_command(engine, film, out, *more):
    line = command("da3_runtime", "video", str(film), "--out", str(out), "--model", NANO)
    settings = ["--window", "4", "--processing-res", "84", "--threads", "1"]
    return [*line, *settings, "--engine-dir", str(engine.engine_dir), *more]


def run_video(engine, film, out, *more):
    """Run the verb in this process; returns its exit code."""
    return main(video_command(engine, film, out, *more)[3:])


def test_a_killed_run_goes_on_and_ends_with_the_same_files(engine, tmp_path):
    film = small_film(tmp_path / "a.mkv")
    more = ("--outputs", "preview,ply", "--loop", "--points-max", "3000")
    assert run_video(engine, film, tmp_path / "whole", *more) == 0
    out = tmp_path / "out"
    moments = (
        lambda: len(list((out / WORK / "windows").glob("0*.npz"))) >= 3,
        (out / WORK / "results" / "frames").exists,
    )
    before = 0
    for is_reached in moments:
        process = subprocess.Popen(
            video_command(engine, film, out, *more), cwd=ROOT, env=clean_env(), stdout=subprocess.DEVNULL
        )
        while process.poll() is None and not is_reached():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        windows = len(list((out / WORK / "windows").glob("0*.npz")))
        assert windows > before
        before = windows
    assert run_video(engine, film, out, *more) == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_results_that_were_moved_in_part_are_written_again(flight, film, tmp_path, monkeypatch):
    outputs = [Output.PREVIEW, Output.PLY]
    make(film, tmp_path / "whole", Exact(flight), outputs)
    replace, moved = Path.replace, []

    def stop(source, target):
        if source.parent.name == "publishing":
            if len(moved) == 7:  # the summary was written into its place among them
                raise KeyboardInterrupt
            moved.append(target.name)
        return replace(source, target)

    out = tmp_path / "out"
    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        make(film, out, Exact(flight), outputs)
    assert "frames" in moved
    assert not (out / "film.json").exists()
    monkeypatch.undo()
    network = Exact(flight)
    make(film, out, network, outputs)
    assert network.calls == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_finished_windows_are_not_run_again(flight, film, tmp_path):
    stop_in_the_fourth_window(flight, film, tmp_path)
    network = Exact(flight, seed=1)
    make(film, tmp_path, network)
    assert network.calls == 8 - 3
    # A finished run is returned as it is.
    again = Exact(flight)
    assert make(film, tmp_path, again)["frames"] == 40
    assert again.calls == 0


def test_another_film_model_or_setting_is_refused_in_a_folder(flight, film, tmp_path):
    make(film, tmp_path, Exact(flight))
    with pytest.raises(SettingError, match=r"another video, model or option \(--window\): choose"):
        make(film, tmp_path, Exact(flight), window=6)
    with pytest.raises(SettingError, match=r"option \(--outputs\)"):
        make(film, tmp_path, Exact(flight), [Output.PREVIEW])
    other = write_film(tmp_path / "other.mkv", [scene.rgb for scene in flight[:9]])
    with pytest.raises(SettingError, match=r"option \(video\)"):
        make(other, tmp_path, Exact(flight))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "track.txt").write_text("mine")
    with pytest.raises(SettingError, match=r"track\.txt exists already"):
        make(film, mine, Exact(flight))
    assert tree(mine).keys() == {"track.txt"}


def test_progress_can_end_a_run_while_frames_are_left_out(flight, film, tmp_path):
    calls, network = [], Exact(flight)

    def progress(stage, done, total):
        calls.append(stage)
        if len(calls) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(film, tmp_path, network, pick=Pick(every=1000), progress=progress)
    assert calls == ["frames"] * 10
    assert network.calls == 0


class Interrupted(Exact):
    """A network that is interrupted in its fourth window."""

    def run(self, images, conditions=None):
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().run(images, conditions)


def stop_in_the_fourth_window(flight, film, out):
    with pytest.raises(KeyboardInterrupt):
        make(film, out, Interrupted(flight))


@pytest.mark.parametrize("name", ["preview.mp4", "frames/mine.txt"])
def test_a_run_that_goes_on_leaves_files_of_others_alone(flight, film, tmp_path, name):
    out = tmp_path / "out"
    stop_in_the_fourth_window(flight, film, out)
    mine = out / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(SettingError, match="exists already and is not of this run: move it away"):
        make(film, out, Exact(flight))
    assert mine.read_text() == "mine"
    (out / name.partition("/")[0]).rename(tmp_path / "moved")
    network = Exact(flight)
    make(film, out, network)
    assert network.calls == 8 - 3


def test_a_file_that_appears_during_a_run_is_not_overwritten(flight, film, tmp_path):
    class Slow(Exact):
        def run(self, images, conditions=None):
            (tmp_path / "preview.mp4").write_text("mine")
            return super().run(images, conditions)

    with pytest.raises(SettingError, match=r"preview\.mp4 exists already"):
        make(film, tmp_path, Slow(flight))
    assert (tmp_path / "preview.mp4").read_text() == "mine"
    assert not (tmp_path / "depth.mkv").exists()
    (tmp_path / "preview.mp4").unlink()
    network = Exact(flight)
    assert make(film, tmp_path, network)["frames"] == 40
    assert network.calls == 0
    assert len(read_film(tmp_path / "preview.mp4")[0]) == 40


@pytest.mark.parametrize("name", ["depth.mkv", "frames", "frames/000003.png", "frames.jsonl"])
def test_a_finished_run_without_one_of_its_files_writes_them_again(flight, film, tmp_path, name):
    out = tmp_path / "out"
    make(film, out, Exact(flight), [Output.PREVIEW])
    whole = tree(out)
    (tmp_path / "away").mkdir()
    (out / name).rename(tmp_path / "away" / "it")
    network = Exact(flight)
    make(film, out, network, [Output.PREVIEW])
    assert network.calls == 8
    assert tree(out) == whole


def test_results_are_on_the_disk_before_the_summary_says_so(flight, film, tmp_path, monkeypatch):
    synced, before = [], []
    sync, replace = film_module.sync, Path.replace

    def keep(source, target):
        if Path(target) == tmp_path / "film.json":
            before.extend(synced)
        return replace(source, target)

    monkeypatch.setattr(film_module, "sync", lambda path: (sync(path), synced.append(path)))
    monkeypatch.setattr(Path, "replace", keep)
    summary = make(film, tmp_path, Exact(flight), [Output.PREVIEW])
    assert {*summary["files"], "000039.png"} <= {path.name for path in before}
    assert before[-1] == tmp_path


def test_a_film_that_was_touched_or_copied_goes_on(flight, film, tmp_path):
    out = tmp_path / "out"
    stop_in_the_fourth_window(flight, film, out)
    copy = tmp_path / "copy.mkv"
    copy.write_bytes(film.read_bytes())
    os.utime(copy, (1, 1))
    network = Exact(flight)
    make(copy, out, network)
    assert network.calls == 8 - 3


def test_another_engine_does_not_go_on_with_a_run(flight, film, tmp_path):
    class Rebuilt(Exact):
        def digest(self):
            return "rebuilt"

    class Other(Exact):
        name = "other"

    stop_in_the_fourth_window(flight, film, tmp_path)
    with pytest.raises(SettingError, match="was begun with another engine of this model: choose"):
        make(film, tmp_path, Rebuilt(flight))
    with pytest.raises(SettingError, match="was begun with exact fp32, and this run has other fp32"):
        make(film, tmp_path, Other(flight))
    network = Exact(flight)
    make(film, tmp_path, network)
    assert network.calls == 8 - 3


def test_two_runs_at_once_in_a_folder_are_refused(flight, film, tmp_path):
    class Meanwhile(Exact):
        def run(self, images, conditions=None):
            with pytest.raises(SettingError, match="another run writes there"):
                make(film, tmp_path, Exact(flight))
            return super().run(images, conditions)

    network = Meanwhile(flight)
    assert make(film, tmp_path, network)["frames"] == 40
    assert network.calls == 8
    assert not list(tmp_path.glob(".*"))


def test_network_file_systems_hold_results(flight, film, tmp_path, monkeypatch):
    def as_nfs(file, operation):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")

    def without_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    for number, lock in enumerate((as_nfs, without_locks)):
        monkeypatch.setattr(fcntl, "flock", lock)
        assert make(film, tmp_path / str(number), Exact(flight))["frames"] == 40


def test_a_folder_that_cannot_be_written_is_one_sentence(engine, film, tmp_path, capsys):
    (tmp_path / "file").touch()
    # Nobody, not even root, can write to the second one.
    for out in (tmp_path / "file" / "out", Path("/proc/self")):
        assert run_video(engine, film, out) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --out {out}: ")
        assert error.count("\n") == 1


def test_a_film_that_cannot_be_read_leaves_no_folder(engine, tmp_path, capsys):
    path = tmp_path / "a.mp4"
    path.write_text("no film")
    assert run_video(engine, path, tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_missing_package_is_named_with_its_extra(engine, film, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert run_video(engine, film, tmp_path / "out") == 2
    assert capsys.readouterr().err == 'error: av is not installed: pip install "da3-runtime[video]".\n'


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--window", "0"], "--window must be from 1 to 256, not 0"),
        (["--overlap", "3"], "--overlap must be from 1 to half of the window of 4 frames, not 3"),
        (["--every", "0"], "--every must be 1 or more"),
        (["--fps", "0"], "--fps must be a number over 0"),
        (["--focal-length-px", "nan"], "--focal-length-px must be a number over 0"),
        (["--outputs", "scene_npz"], "--outputs: scene_npz is not for videos"),
        (["--outputs", "glb", "--window", "1"], "--outputs: glb needs the cameras of the video"),
        (["--points-edge", "-1"], "--points-edge must be from 0 to 100"),
        (["--loop", "--window", "1"], "--loop needs a model that sees several frames"),
    ],
)
def test_a_wrong_option_is_one_sentence(engine, film, tmp_path, capsys, options, text):
    assert run_video(engine, film, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_frames_seen_alone_have_the_files_of_the_command_depth(engine, tmp_path, capsys):
    film = small_film(tmp_path / "a.mkv", 3)
    for number, frame in enumerate(read_film(film)[0]):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(frame).save(tmp_path / "photos" / f"{number:06d}.png")
    outputs = "depth_png16,depth_npz,confidence,camera"
    assert run_video(engine, film, tmp_path / "film", "--window", "1", "--outputs", outputs) == 0
    folders = [str(tmp_path / "photos"), "--out", str(tmp_path / "depth"), "--outputs", outputs]
    settings = ["--model", NANO, "--processing-res", "84", "--threads", "1"]
    assert main(["depth", *folders, *settings, "--engine-dir", str(engine.engine_dir)]) == 0
    files = tree(tmp_path / "film" / "frames")
    assert len(files) == 9
    assert files.items() <= tree(tmp_path / "depth").items()
    summary, *lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert summary["track"] is None
    frames = [json.loads(line) for line in (tmp_path / "film" / "frames.jsonl").open()]
    for frame, line in zip(frames, lines, strict=True):
        for name in ("camera", "depth_scale", "confidence_scale", "min_depth", "max_depth"):
            assert frame[name] == line[name]


def test_a_flight_of_200_frames_with_the_bundled_model(engine, tmp_path, capsys, record_property):
    scenes = list(render_flight(3, FIELD, 200, HEIGHT, WIDTH))
    film = write_film(tmp_path / "a.mp4", [each.rgb for each in scenes], "libx264", "yuv420p")
    assert (
        run_video(engine, film, tmp_path / "out", "--loop", "--window", "8", "--processing-res", "112")
        == 0
    )
    summary = json.loads(capsys.readouterr().out)
    assert summary["frames"] == 200
    assert summary["windows"] == 40
    # It is too small to find cameras, and says so: the error of its track is a fact, not a promise.
    assert "too small to find the cameras" in summary["warnings"][0]
    found, true = poses_of(tmp_path / "out"), np.stack([each.extrinsics for each in scenes])
    error = track_error(found, true)
    record_property("track_error_share", error)
    print(f"error of the track: {error:.1%} of its length, drift {summary['drift']}")
    assert np.isfinite(error)
    # The scale of neighbouring windows agrees, so the depth of the film does not jump.
    depths = depths_of(tmp_path / "out")
    assert depths.shape == (200, HEIGHT, WIDTH)
    middles = np.log(np.median(depths, axis=(1, 2)))
    assert np.abs(np.diff(middles)).max() < 0.2
    assert 0.5 < summary["drift"]["scale"] < 2


def track_error(found, true):
    """Root mean square distance of a track's centers from the true ones, over the way's length.

    After the best similarity between them (Umeyama 1991), as the TUM benchmark's absolute error.
    """
    one, other = (inverse(each)[:, :, 3] for each in (found, true))
    one, other = (each - each.mean(axis=0) for each in (one, other))
    u, values, v = np.linalg.svd(other.T @ one)
    sign = np.array([1, 1, np.sign(np.linalg.det(u @ v))])
    fitted = (values @ sign / (one**2).sum()) * one @ (u * sign @ v).T
    length = np.linalg.norm(np.diff(other, axis=0), axis=1).sum()
    return float(np.sqrt(((fitted - other) ** 2).sum(axis=1).mean()) / length)
