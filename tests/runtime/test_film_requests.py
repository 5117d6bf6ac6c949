"""A request with a film: its fields, its limits, what it answers, and the progress that it reports."""

import asyncio
import base64
import io
import json
import os
import time

import numpy as np
import pytest
from PIL import Image

from da3_runtime.api.response import FilmResponse
from da3_runtime.output import bucket
from da3_runtime.serve import films, runpod_worker
from da3_runtime.serve.jobs import Jobs, Status
from tests.support.films import ramps, read_film, write_film, write_sound
from tests.support.images import encode

COUNT = 12


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("film") / "a.mp4"
    return write_film(path, ramps(COUNT, 84, 112), "libx264", "yuv420p").read_bytes()


def base64_of(data):
    return base64.b64encode(data).decode()


def ask(service, film, **fields):
    return service.answer({"video_base64": base64_of(film), **fields}, "job")


def file_of(answer, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(base64.b64decode(answer[f"{name}_base64"]))
    return path


def test_a_film_is_answered_with_films_track_and_points(serve, film, tmp_path):
    outputs = ["preview", "depth_png16", "camera", "glb"]
    answer = ask(serve(), film, outputs=outputs, every=2, loop=True, window=4, points_confidence=0)
    FilmResponse.model_validate(answer)
    assert (answer["frames"], answer["windows"]) == (COUNT // 2, 2)
    assert (answer["width"], answer["height"]) == (112, 84)
    assert answer["drift"]["scale"] == pytest.approx(1)
    frames, seconds, _ = read_film(file_of(answer, "video", tmp_path))
    assert len(frames) == COUNT // 2
    np.testing.assert_allclose(seconds, np.arange(COUNT // 2) / 15, atol=1e-3)
    values, _, facts = read_film(file_of(answer, "depth_video", tmp_path), "gray16le")
    assert float(facts["DEPTH_SCALE"]) == answer["depth_scale"]
    np.testing.assert_allclose(np.stack(values) * answer["depth_scale"], 1, rtol=1e-4)
    track = base64.b64decode(answer["track_base64"]).decode().splitlines()
    assert len(track) == 1 + COUNT // 2
    lines = [json.loads(line) for line in io.BytesIO(base64.b64decode(answer["frames_base64"]))]
    assert [line["frame"] for line in lines] == list(range(COUNT // 2))
    assert base64.b64decode(answer["glb_base64"]).startswith(b"glTF")
    assert {"fetch", "network", "join", "write", "total"} <= answer["timings_ms"].keys()
    assert any("too small to find the cameras" in each for each in answer["warnings"])


def test_only_the_requested_files_are_returned(serve, film):
    answer = ask(serve(), film)
    assert [name for name in answer if name.endswith("_base64")] == ["video_base64"]
    assert "url" not in " ".join(answer)


def test_a_film_leaves_nothing_behind(serve, film, tmp_path):
    workspace = tmp_path / "volume"
    workspace.mkdir()
    assert "error" not in ask(serve(workspace=workspace), film)
    assert list(workspace.iterdir()) == []


def test_a_film_may_have_an_address_with_limits_of_its_own(serve, film, monkeypatch):
    seen = []

    async def download(url, budget, seconds, hosts):
        seen.append((url, budget.limit, seconds))
        budget.take(len(film), "image_url")
        return film

    monkeypatch.setattr(films, "download", download)
    url = "https://example.com/a.mp4"
    answer = serve(video_download_seconds=7).answer({"video_url": url}, "job")
    assert answer["frames"] == COUNT
    assert seen == [(url, 256 * 2**20, 7)]
    answer = serve(max_video_bytes=1000).answer({"video_url": url}, "job")
    assert answer == {"error": "video_url has more than 1000 bytes (MAX_VIDEO_BYTES).", "status": 413}


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"max_video_bytes": 900}, "video_base64 has more than 900 bytes (MAX_VIDEO_BYTES)."),
        ({"max_video_frames": 11}, "video_base64 has more than 11 frames that would be used (MAX_VID"),
        ({"max_image_pixels": 9000}, "video_base64: a frame has 9408 pixels; the limit is 9000 (MAX_IM"),
    ],
)
def test_a_film_beyond_a_limit_is_refused_with_its_setting(serve, film, limits, text):
    answer = ask(serve(**limits), film)
    assert answer["status"] == 413
    assert text in answer["error"]


def test_a_film_longer_than_the_limit_is_refused_by_its_header_and_by_its_times(
    serve, network, tmp_path
):
    times = [0, 600, 1200, 1800]
    path = write_film(tmp_path / "a.mp4", ramps(4, 84, 112), "libx264", "yuv420p", times=times)
    service = serve(max_video_seconds=2)
    answer = ask(service, path.read_bytes())
    assert answer["error"].startswith("video_base64 is longer than 2 seconds (MAX_VIDEO_SECONDS)")
    assert network.batches == []
    matroska = write_film(tmp_path / "a.mkv", ramps(4, 84, 112), times=times).read_bytes()
    duration = matroska.index(b"\x44\x89\x88") + 3  # Matroska's element Duration, a double
    lying = matroska[:duration] + np.array(1000.0, ">f8").tobytes() + matroska[duration + 8 :]
    answer = ask(service, lying)
    assert answer["error"].startswith("video_base64 is longer than 2 seconds (MAX_VIDEO_SECONDS)")


def test_a_large_response_goes_to_the_bucket_or_is_refused(serve, film, monkeypatch):
    service = serve()
    fields = {"video_base64": base64_of(film), "outputs": ["preview", "camera"]}
    answer = service.answer(fields, "job", max_bytes=5000)
    assert answer["status"] == 413
    assert "Leave out some of video (" in answer["error"]
    stored = {}
    monkeypatch.setattr(bucket, "is_configured", lambda: True)
    monkeypatch.setattr(
        bucket, "upload", lambda job, name, data: stored.update({f"{job}/{name}": data}) or name
    )
    answer = service.answer(fields, "job", max_bytes=5000)
    FilmResponse.model_validate(answer)
    assert [answer[f"{name}_url"] for name in ("video", "track", "frames")] == [
        "preview.mp4",
        "track.txt",
        "frames.jsonl",
    ]
    assert stored["job/preview.mp4"][4:8] == b"ftyp"


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        (
            {"outputs": ["sky"]},
            400,
            "outputs: sky is not for videos; choose among: preview, depth_png16",
        ),
        (
            {"image_base64": "AAAA"},
            400,
            "Two images: send one of image_url, image_base64, images, video",
        ),
        ({"intrinsics": [[9, 0, 1], [0, 9, 1], [0, 0, 1]]}, 400, "intrinsics is not for videos"),
        ({"fps": 0}, 400, "fps must be a number over 0 and at most 1000."),
        ({"every": 0}, 400, "every must be a whole number from 1 to 1000000."),
        ({"window": 17}, 400, "window is 17; the limit is 16 (MAX_VIEWS): send less."),
        ({"window": 4, "overlap": 3}, 400, "overlap must be from 1 to half of the window of 4 frames"),
        ({"window": 1, "outputs": ["glb"]}, 400, "outputs: glb needs the cameras of the video"),
        ({"model_id": "da3mono-large", "outputs": ["ply"]}, 400, "outputs: ply needs the cameras"),
        ({"video_base64": "!"}, 400, "video_base64 is not valid Base64"),
        ({"video_base64": "AAAA"}, 415, "video_base64 is not a video that can be read"),
        ({"video_base64": None, "video_url": "file:///etc/passwd"}, 400, "video_url must be a public"),
    ],
)
def test_a_wrong_field_of_a_film_is_one_sentence(serve, film, fields, status, text):
    answer = (
        ask(serve(), film, **fields) if "video_base64" not in fields else serve().answer(fields, "j")
    )
    assert answer["status"] == status
    assert answer["error"].startswith(text)
    assert "\n" not in answer["error"]


def test_sound_and_missing_packages_are_415(serve, film, tmp_path, monkeypatch):
    answer = ask(serve(), write_sound(tmp_path / "a.m4a", "aac", 1024).read_bytes())
    assert answer == {
        "error": "video_base64 has no video stream, only audio: send a video.",
        "status": 415,
    }
    monkeypatch.setattr(films, "missing_package", lambda name: f"{name} is not installed")
    answer = ask(serve(), film)
    assert answer == {"error": "This worker reads no videos: av is not installed.", "status": 415}


def test_a_data_uri_is_a_film(serve, film):
    answer = serve().answer({"video_url": f"data:video/mp4;base64,{base64_of(film)}"}, "job")
    assert answer["frames"] == COUNT


def test_progress_goes_to_runpod_while_a_film_is_worked_on(serve, film, monkeypatch):
    import runpod.serverless

    monkeypatch.setattr(films, "_PROGRESS_SECONDS", 0.0)
    sent = []
    monkeypatch.setattr(
        runpod.serverless, "progress_update", lambda job, progress: sent.append((job["id"], progress))
    )
    handler = runpod_worker.make_handler(serve())
    job = {"id": "job-7", "input": {"video_base64": base64_of(film)}}
    answer = asyncio.run(handler(job))
    assert answer["frames"] == COUNT
    assert {name for name, _ in sent} == {"job-7"}
    assert sent[0][1] == {"stage": "frames", "frames": 0, "of_about": COUNT}
    assert sent[-1][1] == {"stage": "write", "frames": COUNT, "of_about": COUNT}


def test_images_are_answered_while_a_film_waits_for_its_turn(serve, film, network):
    service = serve()

    async def ask_both():
        running = [asyncio.create_task(service.respond(fields, "film")) for _ in range(3)]
        while service._films.threads._work_queue.qsize() != 2:
            await asyncio.sleep(0.005)
        image = base64_of(encode(Image.new("RGB", (56, 56))))
        photo = asyncio.create_task(service.respond({"image_base64": image}, "photo"))
        await asyncio.sleep(0.05)
        network.may_run.set()
        answers = await asyncio.gather(*running, photo)
        return answers, [task.done() for task in running]

    fields = {"video_base64": base64_of(film)}
    network.may_run.clear()
    answers, _ = asyncio.run(ask_both())
    assert [answer.get("frames") for answer in answers] == [COUNT] * 3 + [None]
    assert "image_base64" in answers[3]


def test_a_film_ends_with_an_error_when_the_worker_stops(serve, film, network):
    service = serve()
    network.may_run.clear()

    async def stop():
        task = asyncio.create_task(service.respond({"video_base64": base64_of(film)}, "film"))
        while not network.batches:
            await asyncio.sleep(0.005)
        closing = asyncio.create_task(asyncio.to_thread(service.close))
        await asyncio.sleep(0.05)
        network.may_run.set()
        await closing
        return await task

    assert asyncio.run(stop()) == {
        "error": "The worker is stopping; send the request again.",
        "status": 503,
    }


def test_films_wait_in_a_short_queue_of_their_own(serve, film, network, monkeypatch):
    downloaded = []

    async def download(url, budget, seconds, hosts):
        downloaded.append(url)
        return film

    monkeypatch.setattr(films, "download", download)
    service = serve(max_concurrency=1, max_queued_jobs=0)
    network.may_run.clear()

    async def ask_all():
        jobs, tasks = Jobs(service, lambda _: None), []
        for number in range(6):
            job, task = jobs.start({"video_url": f"https://example.com/{number}.mp4"}, keep=False)
            tasks.append((job, task))
            # A film that waits has no slot of the queue, which has a single one here.
            while jobs._places and not task.done():
                await asyncio.sleep(0.005)
            while not downloaded:
                await asyncio.sleep(0.005)
        refused = tasks[-1][0].result
        waiting = list(downloaded)
        photo, task = jobs.start({"image_base64": base64_of(encode(Image.new("RGB", (56, 56))))}, False)
        network.may_run.set()
        await asyncio.gather(task, *(task for _, task in tasks))
        return refused, waiting, photo, [job.result.get("frames") for job, _ in tasks]

    refused, waiting, photo, frames = asyncio.run(ask_all())
    assert refused == {
        "error": "4 videos wait for this worker already; send the request again later.",
        "status": 503,
    }
    assert waiting == ["https://example.com/0.mp4"]
    assert photo.status is Status.COMPLETED
    assert frames == [COUNT] * 5 + [None]
    assert len(downloaded) == 5


@pytest.mark.parametrize("moment", ["network", "download"])
def test_a_cancelled_film_ends_and_the_next_one_has_its_turn(serve, film, network, monkeypatch, moment):
    async def download(url, budget, seconds, hosts):
        started.append(url)
        if moment == "download" and len(started) == 1:
            await asyncio.sleep(3600)
        return film

    started, service = [], serve()
    monkeypatch.setattr(films, "download", download)
    fields = {"video_url": "https://example.com/a.mp4", "window": 2}
    if moment == "network":
        network.may_run.clear()

    async def cancel():
        jobs = Jobs(service, lambda _: None)
        job, task = jobs.start(fields, keep=True)
        while not (started if moment == "download" else network.batches):
            await asyncio.sleep(0.005)
        jobs.cancel(job)
        await asyncio.gather(task, return_exceptions=True)
        network.may_run.set()
        # The one thread is free again once this ends.
        await asyncio.get_running_loop().run_in_executor(service._films.threads, lambda: None)
        batches = len(network.batches)
        return job, batches, await service.respond(fields, "next")

    job, batches, answer = asyncio.run(cancel())
    assert job.status is Status.CANCELLED
    assert batches == (0 if moment == "download" else 1)
    assert answer["frames"] == COUNT


def test_the_server_stops_without_the_rest_of_its_films(serve, film, network):
    service = serve()
    network.may_run.clear()

    async def stop():
        jobs = Jobs(service, lambda _: None)
        started = [jobs.start({"video_base64": base64_of(film), "window": 2}, True)[0] for _ in range(2)]
        while not network.batches:
            await asyncio.sleep(0.005)
        closing = asyncio.create_task(jobs.close())
        await asyncio.sleep(0)
        network.may_run.set()
        await closing
        return [job.result for job in started]

    stopping = {"error": "The worker is stopping; send the request again.", "status": 503}
    assert asyncio.run(stop()) == [stopping] * 2
    assert len(network.batches) == 1


def test_folders_of_killed_workers_are_removed_and_those_in_use_are_kept(serve, tmp_path):
    workspace = tmp_path / "volume"
    for name, file in (("da3-film-old", "old"), ("da3-film-used", "new"), ("mine", "old")):
        (workspace / name).mkdir(parents=True)
        (workspace / name / file).touch()
    old = time.time() - 2 * 24 * 3600
    for path in [*workspace.glob("*"), *workspace.glob("*/old")]:
        os.utime(path, (old, old))
    serve(workspace=workspace)
    assert sorted(path.name for path in workspace.iterdir()) == ["da3-film-used", "mine"]
