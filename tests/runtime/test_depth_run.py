"""Folders of photos: overlapping stages, what is done again, parts for several machines, and kills."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np
import pytest

import da3_runtime.commands.depth_run
import da3_runtime.util.progress
from da3_runtime.__main__ import main
from da3_runtime.commands.depth_run import run_tasks
from da3_runtime.commands.depth_tasks import find_tasks
from da3_runtime.errors import DeviceLostError, InferenceError
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.inference.estimator import Estimator
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.output.encode import Output, Wanted
from da3_runtime.output.run_manifest import Request, RunManifest
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.parallel import in_order
from da3_runtime.variants import find_head, find_variant
from tests.support.paths import NANO, ROOT
from tests.support.processes import clean_env, command
from tests.support.stand_in import StandIn

OUTPUTS = "depth_png16,confidence,camera"


def write_photo(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(pixels, (96, 84)))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for seed, name in enumerate(("a.jpg", "b.png", "deep/a.jpg", "deep/er/c.jpg", "z.jpg")):
        write_photo(folder / name, seed)
    return folder


@pytest.fixture
def network(monkeypatch):
    """A stand-in for every network that the command loads."""
    network = StandIn()
    network.loads = 0

    def load(engine, images, inference):
        network.loads += 1
        variant, head = find_variant(engine.model_id), find_head(engine.head)
        loaded = Loaded(EngineFolder(variant, head, Path(), None), {"model": network}, [])
        return Estimator(loaded, images, inference)

    monkeypatch.setattr(da3_runtime.commands.depth_run.Estimator, "load", load)
    return network


@pytest.fixture
def depth(photos, tmp_path, network, capsys):
    """Run the command over the photos: exit code, ids that were done, and what it said."""

    def run(*args, out="out", outputs=OUTPUTS):
        out = str(tmp_path / out)
        code = main(["depth", str(photos), "--out", out, "--outputs", outputs, "--model", NANO, *args])
        said = capsys.readouterr()
        images = [json.loads(line)["image"] for line in said.out.splitlines()]
        return code, [Path(image).relative_to(photos).as_posix() for image in images], said.err

    return run


def lines_of(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def content_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


ALL = ["a.jpg", "b.png", "deep/a.jpg", "deep/er/c.jpg", "z.jpg"]


def test_the_manifest_has_a_line_for_each_photo(depth, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"x")
    code, done, said = depth()
    assert (code, done) == (1, ["a.jpg", "b.png", "broken.jpg", *ALL[2:]])
    lines = {line["id"]: line for line in lines_of(tmp_path / "out")}
    assert list(lines) == done
    line, stat = lines["deep/a.jpg"], (photos / "deep" / "a.jpg").stat()
    assert (line["size"], line["mtime"]) == (stat.st_size, stat.st_mtime)
    assert line["outputs"] == {
        "depth_png16": "deep/a.depth.png",
        "confidence": "deep/a.confidence.png",
    }
    assert all((tmp_path / "out" / file).is_file() for file in line["outputs"].values())
    facts = ("unit", "model_id", "head", "precision", "backend", "width", "height", "warnings")
    assert [line[fact] for fact in facts] == ["relative", NANO, "dpt", "fp32", "stand-in", 96, 84, []]
    assert len(line["engine"]) == 64
    assert "timings_ms" not in line
    assert set(lines["broken.jpg"]) == {"id", "size", "mtime", "error"}
    assert "6 images in" in said
    assert "5 done, 1 failed." in said
    assert "  .jpg: 5, 1 failed\n  .png: 1\n" in said
    assert "  failed, 1 x: The image is in none of the formats" in said


def test_the_next_run_does_what_is_new_changed_failed_or_gone(depth, photos, tmp_path, network):
    (photos / "broken.jpg").write_bytes(b"x")
    depth()
    before = content_of(tmp_path / "out")
    code, done, said = depth()
    assert (code, done) == (1, ["broken.jpg"])
    assert "5 done by earlier runs, 1 failed." in said
    assert content_of(tmp_path / "out") == before, "a line that stays the same is not written again"

    write_photo(photos / "broken.jpg", 6)
    write_photo(photos / "new.png", 7)
    write_photo(photos / "z.jpg", 8)
    (tmp_path / "out" / "deep" / "a.depth.png").unlink()
    code, done, _ = depth()
    assert (code, done) == (0, ["broken.jpg", "deep/a.jpg", "new.png", "z.jpg"])
    ids = [line["id"] for line in lines_of(tmp_path / "out")]
    assert sorted(ids) == sorted([*ALL, "broken.jpg", "new.png"]), "one line for each photo"

    loads = network.loads
    assert depth()[:2] == (0, [])
    assert network.loads == loads, "nothing to do, nothing to load"
    assert depth("--overwrite")[1] == ["a.jpg", "b.png", "broken.jpg", *ALL[2:4], "new.png", "z.jpg"]


@pytest.mark.parametrize(
    ("args", "outputs", "named"),
    [
        (["--model", "da3-small"], OUTPUTS, 'model_id "da3-nano", and this run has "da3-small"'),
        (["--head", "sdt"], OUTPUTS, 'head "dpt"'),
        (["--processing-res", "140"], OUTPUTS, "processing_res null"),
        (["--focal-length-px", "90"], OUTPUTS, "focal_length_px null"),
        (["--model-size"], OUTPUTS, "model_size false"),
        ([], "depth_png16", 'outputs ["depth_png16", "confidence", "camera"]'),
        (["--overwrite", "--points-max", "9"], OUTPUTS, 'points {"confidence": 40.0'),
    ],
)
def test_another_model_or_setting_into_the_same_folder_is_refused(depth, tmp_path, args, outputs, named):
    depth()
    before = content_of(tmp_path / "out")
    code, done, said = depth(*args, outputs=outputs)
    assert (code, done) == (2, [])
    assert f"out has results with {named}" in said
    assert said.endswith("choose another folder.\n")
    assert content_of(tmp_path / "out") == before


def test_another_engine_of_the_same_model_is_refused(depth, photos, tmp_path, network, monkeypatch):
    depth()
    write_photo(photos / "new.jpg")
    monkeypatch.setattr(network, "digest", lambda: "other")
    code, done, said = depth()
    assert (code, done) == (2, [])
    assert 'out has results with engine "' in said
    assert not (tmp_path / "out" / "new.depth.png").exists()


def test_parts_are_disjoint_complete_and_stable(depth, photos, tmp_path):
    for index in range(20):
        write_photo(photos / f"more{index}.jpg", index)
    depth(out="whole")
    parts = [depth("--shard", f"{number}/3", out="parts")[1] for number in (1, 2, 3)]
    everything = [name for part in parts for name in part]
    assert all(parts)
    assert sorted(everything) == sorted(line["id"] for line in lines_of(tmp_path / "whole"))
    assert len(list((tmp_path / "parts").glob("manifest.*-of-3.jsonl"))) == 3
    assert depth(out="parts")[1] == [], "a run of all photos knows what the parts have done"
    assert content_of(tmp_path / "parts") == content_of(tmp_path / "whole"), "it takes over their lines"
    for name in everything[::2]:
        (photos / name).unlink()
    write_photo(photos / "0.jpg")
    again = depth("--shard", "1/3", "--overwrite", out="parts")[1]
    assert set(again) - {"0.jpg"} <= set(parts[0])


@pytest.mark.parametrize("text", ["0/8", "9/8", "1", "1/0", "a/b", "1/2/3", "-1/2", ""])
def test_a_part_that_does_not_exist_is_one_sentence(depth, text):
    code, _, said = depth(f"--shard={text}")
    assert code == 2
    assert said == f"error: --shard {text!r} is not I/N, such as 1/8 for the first of eight parts.\n"


def test_a_second_run_at_the_same_time_is_refused(depth, tmp_path):
    with RunManifest(tmp_path / "out"):
        code, done, said = depth()
        assert (code, done) == (2, [])
        assert said.startswith("error: Another run writes to ")
        assert depth("--shard", "1/2")[0] == 2
    with RunManifest(tmp_path / "out", "1-of-2"):
        assert depth()[0] == depth("--shard", "1/2")[0] == 2
        assert depth("--shard", "2/2")[0] == 0, "parts run side by side"
    assert depth()[0] == 0


def test_a_part_does_not_trust_lines_that_contradict_each_other(depth, photos, tmp_path):
    """Which of them is about the files that are there is not known."""
    depth("--shard", "1/1")
    part = tmp_path / "out" / "manifest.1-of-1.jsonl"
    old_lines, old_photo = part.read_bytes(), (photos / "a.jpg").read_bytes()
    old_time = (photos / "a.jpg").stat().st_mtime_ns
    write_photo(photos / "a.jpg", 99)
    assert depth()[1] == ["a.jpg"]
    part.write_bytes(old_lines)  # as a kill leaves it before its lines are taken over
    (photos / "a.jpg").write_bytes(old_photo)
    os.utime(photos / "a.jpg", ns=(old_time, old_time))
    assert depth()[1] == ["a.jpg"], "the file is that of the other photo"
    assert depth()[1] == []


def test_first_runs_of_parts_at_once_agree_on_the_settings(tmp_path):
    def keep(number):
        with RunManifest(tmp_path, f"{number}-of-16") as manifest:
            start.wait()
            manifest.keep({"model_id": NANO, "note": "x" * 2000})

    for _ in range(20):
        start = threading.Barrier(16)
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(keep, range(16)))
        assert json.loads((tmp_path / "run.json").read_text())["model_id"] == NANO
        (tmp_path / "run.json").unlink()


def test_the_exit_code_of_a_folder_with_one_bad_photo_is_1(depth, photos):
    for photo in photos.rglob("*.*g"):
        photo.unlink()
    (photos / "bad.jpg").write_bytes(b"x")
    code, done, said = depth()
    assert (code, done) == (1, ["bad.jpg"])
    assert "1 image in " in said


def test_a_manifest_of_something_else_is_left_alone(depth, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.jsonl").write_text('{"audio": "a.wav"}\n{"audio"')
    for name in ("manifest.jsonl", "run.json"):
        before = content_of(tmp_path / "out")
        code, _, said = depth()
        assert (code, content_of(tmp_path / "out")) == (2, before)
        assert f"{name} is not of a run of this command: choose another folder." in said
        (tmp_path / "out" / "run.json").write_text('{"mine": 1}')


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"model_id": '])
def test_a_damaged_record_of_the_settings_is_never_ignored(depth, tmp_path, text):
    depth()
    (tmp_path / "out" / "run.json").write_text(text)
    code, _, said = depth("--overwrite")
    assert code == 2
    assert "run.json is not of a run of this command: choose another" in said


def test_a_run_that_was_killed_at_its_start_leaves_nothing_in_the_way(depth, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("run.json", "manifest.jsonl"):
        (tmp_path / "out" / name).touch()
    assert depth()[0] == 0


def test_a_photo_that_cannot_be_named_in_unicode_has_a_line(depth, photos, tmp_path):
    write_photo(photos / "x.jpg")
    (photos / "x.jpg").rename(photos / os.fsdecode(b"\xff.jpg"))
    assert depth()[0] == 0
    assert depth()[1] == []
    assert os.fsencode(lines_of(tmp_path / "out")[-1]["id"]) == b"\xff.jpg"


def test_photos_are_decoded_and_encoded_while_the_network_runs(photos, tmp_path, network):
    for index in range(300):
        write_photo(photos / f"{index}.jpg", index)
    tasks = find_tasks([photos], tmp_path / "out").tasks
    variant = find_variant(NANO)
    loaded = Loaded(EngineFolder(variant, find_head("dpt"), Path(), None), {"model": network}, [])
    estimator, prepared = Estimator(loaded), []
    prepare = estimator.prepare
    estimator.prepare = lambda *args: prepared.append(args) or prepare(*args)
    network.may_run.clear()
    results = []

    def consume():
        request = Request(Wanted((Output.DEPTH_PNG16,)))
        results.extend(run_tasks(estimator, tasks, request, most=8))

    thread = threading.Thread(target=consume)
    thread.start()
    deadline = time.monotonic() + 20
    while len(prepared) < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    waiting = len(prepared)
    network.may_run.set()
    thread.join()
    assert 16 <= waiting < 100, "two batches come together, not the whole folder"
    assert [task for task, _ in results] == tasks
    assert max(network.batches) == 8


@pytest.mark.parametrize("error", [DeviceLostError(), InferenceError("the batch is bad")])
def test_only_an_error_that_every_photo_would_have_ends_the_run(depth, tmp_path, network, error):
    def fail(images, conditions=None):
        raise error

    network.run = fail
    code, done, said = depth()
    is_lost = isinstance(error, DeviceLostError)
    assert (code, len(done)) == (1, 0 if is_lost else 5)
    assert str(error) in said
    assert (tmp_path / "out" / "manifest.jsonl").exists() is not is_lost


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(depth, tmp_path, monkeypatch):
    import da3_runtime.commands.depth

    write, written = da3_runtime.commands.depth.write_atomically, []

    def fill(path, data, scratch=None):
        if len(written) >= 4:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, data, scratch)

    with monkeypatch.context() as patched:
        patched.setattr(da3_runtime.commands.depth, "write_atomically", fill)
        code, _, said = depth()
    assert (code, "No space left on device." in said) == (2, True)
    assert (depth()[0], depth(out="whole")[0]) == (0, 0)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


def test_progress_without_a_terminal_is_plain_lines(depth, monkeypatch):
    monkeypatch.setattr(da3_runtime.util.progress, "_SECONDS", 0.0)
    said = depth()[2].splitlines()
    assert [line.split(", ")[0] for line in said[:4]] == [f"{n} of 5 images" for n in (1, 2, 3, 4)]
    assert " per second, 00:00 left." in said[0]


def test_a_killed_run_goes_on_to_the_same_files_bit_for_bit(engine, photos, tmp_path):
    for index in range(40):
        write_photo(photos / f"{index:02d}.jpg", index)

    def start(out):
        line = command("da3_runtime", "depth", str(photos), "--out", str(out), "--outputs", OUTPUTS)
        env = clean_env(ENGINE_DIR=str(engine.engine_dir), MODEL=NANO, THREADS="1")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(line, cwd=ROOT, env=env, text=True, **pipes)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with start(whole) as process:
        process.communicate()
    assert process.returncode == 0
    for lines in (1, 15):
        with start(killed) as process:
            for _ in range(lines):
                assert process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    with (killed / "manifest.jsonl").open("ab") as file:
        file.write(b'{"id": "39.jpg", "si')  # what a kill in the middle of a line leaves
    with start(killed) as process:
        rest = process.stdout.readlines()
    assert process.returncode == 0
    assert len(rest) <= 45 - 16
    assert content_of(killed) == content_of(whole)


def test_results_come_in_order_and_only_so_many_wait():
    started, may_end = [], threading.Event()

    def work(item):
        started.append(item)
        assert item != 0 or may_end.wait(20)
        return item

    results = in_order(work, range(100), 4, 10)
    threading.Timer(0.2, may_end.set).start()
    assert next(results) == 0
    assert max(started) < 10
    assert list(results) == list(range(1, 100))


def test_an_error_ends_the_work_and_starts_no_more():
    started = []

    def work(item):
        started.append(item)
        if item == 3:
            raise ValueError(item)
        return item

    with pytest.raises(ValueError, match="3"):
        list(in_order(work, range(1000), 1, 5))
    assert len(started) < 12
    results = in_order(work, iter([1, 2]), 1, 1)
    with contextlib.closing(results):
        assert next(results) == 1


def test_the_digest_is_that_of_the_engine_file_or_of_the_weights(engine):
    def digest(backend):
        settings = EngineSettings(engine_dir=engine.engine_dir, model_id=NANO, backend=backend)
        loaded = load_backend(settings)
        return loaded.digest(), loaded.folder.manifest

    found, manifest = digest("onnxruntime-cpu")
    file = manifest.graphs["model"].artefacts["onnx-fp32"].digest
    assert found == sha256(file.encode()).hexdigest()
    weights = sha256(manifest.source.sha256.encode()).hexdigest()
    assert digest("eager")[0] == sha256(weights.encode()).hexdigest()
