"""Batches: sources, destinations, resuming and refusals. Ray itself is in test_batch_cluster.py."""

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from da3_runtime.__main__ import main
from da3_runtime.batch import pipeline
from da3_runtime.batch.pieces import Piece
from da3_runtime.batch.records import done_photos, records_of
from da3_runtime.batch.sources import Columns, find_shards
from da3_runtime.batch.storage import Place
from da3_runtime.errors import DA3Error, SettingError
from tests.support.batches import (
    SMALLEST,
    Killed,
    lines_of,
    members_of,
    photo,
    run_batch,
    without_ray,
    write_photos,
    write_tar,
)
from tests.support.paths import NANO
from tests.support.processes import free_port

TARS = 2
PER_TAR = 70  # two pieces


@pytest.fixture
def tars(tmp_path):
    """Tars of photos beside other members."""
    for shard in range(TARS):
        members = []
        for index in range(PER_TAR):
            members += [
                (f"{index:04d}.jpg", photo(shard * PER_TAR + index)),
                (f"{index:04d}.json", b"{}"),
            ]
        write_tar(tmp_path / "tars" / f"{shard:05d}.tar", members)
    return tmp_path / "tars"


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_gets_the_files_that_the_command_depth_writes(tmp_path, engine, monkeypatch):
    without_ray(monkeypatch)
    write_photos(tmp_path / "photos", 3)
    options = ("--outputs", "depth_png16,camera")
    assert run_batch(engine, tmp_path / "photos", tmp_path / "batch", *options) == 0
    depth = ["depth", str(tmp_path / "photos"), "--out", str(tmp_path / "depth")]
    assert main([*depth, "--engine-dir", str(engine.engine_dir), *SMALLEST, *options]) == 0
    names = {name for name in files_below(tmp_path / "depth") if name.endswith(".png")}
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "batch" / name).read_bytes() == (tmp_path / "depth" / name).read_bytes()
    records = lines_of(tmp_path / "batch" / "manifest.jsonl")
    assert set(records) == {"000/000000.jpg", "000/000001.jpg", "000/000002.jpg"}
    record = records["000/000001.jpg"]
    assert record["outputs"] == {"depth_png16": "000/000001.depth.png"}
    assert (record["unit"], record["model_id"]) == ("relative", NANO)
    assert "error" not in record
    assert np.shape(record["camera"]["intrinsics"]) == (3, 3)


def test_a_folder_goes_on_with_new_changed_and_failed_photos(tmp_path, engine, monkeypatch, capsys):
    ran = without_ray(monkeypatch)
    photos, out = tmp_path / "photos", tmp_path / "out"
    write_photos(photos, 3)
    (photos / "broken.jpg").write_bytes(b"no photo")
    assert run_batch(engine, photos, out) == 1
    assert "1 failed" in capsys.readouterr().err
    records = lines_of(out / "manifest.jsonl")
    assert "none of the formats" in records["broken.jpg"]["error"]
    (photos / "broken.jpg").write_bytes(photo(7))
    (photos / "new.jpg").write_bytes(photo(8))
    assert run_batch(engine, photos, out) == 0
    assert "2 photos" in (text := capsys.readouterr().err)
    assert "3 done by earlier runs" in text
    assert set(lines_of(out / "manifest.jsonl")) == {*records, "new.jpg"}
    pieces = len(ran)
    assert run_batch(engine, photos, out) == 0
    assert len(ran) == pieces


def test_tars_keep_their_numbers_and_stems(tars, tmp_path, engine, monkeypatch):
    without_ray(monkeypatch)
    out = tmp_path / "out"
    source = tars / "{00000..00001}.tar"
    assert run_batch(engine, source, out, "--outputs", "depth_png16,preview,camera") == 0
    assert files_below(out) == {
        "run.json",
        *(
            f"{kind}/{shard:05d}.{ending}"
            for shard in range(TARS)
            for kind, ending in (("depth_png16", "tar"), ("preview", "tar"), ("manifest", "jsonl"))
        ),
    }
    for shard in range(TARS):
        records = lines_of(out / "manifest" / f"{shard:05d}.jsonl")
        assert list(records) == [f"{shard:05d}/{index:04d}" for index in range(PER_TAR)]
        for kind in ("depth_png16", "preview"):
            members = members_of(out / kind / f"{shard:05d}.tar")
            assert list(members) == [f"{index:04d}.png" for index in range(PER_TAR)]
    path = records["00001/0003"]["outputs"]["depth_png16"]
    assert path == "depth_png16/00001.tar/0003.png"


def test_a_killed_batch_goes_on_and_ends_with_the_same_files(
    tars, tmp_path, engine, monkeypatch, capsys
):
    without_ray(monkeypatch)
    source = tars / "*.tar"
    assert run_batch(engine, source, tmp_path / "whole") == 0
    with pytest.raises(Killed):
        without_ray(monkeypatch, fail_after=3)
        run_batch(engine, source, tmp_path / "out")
    assert "depth_png16/00001.tar" not in files_below(tmp_path / "out")
    ran = without_ray(monkeypatch)
    capsys.readouterr()
    assert run_batch(engine, source, tmp_path / "out") == 0
    assert ran == [("00001", 1)]
    assert "1 shard done by earlier runs" in capsys.readouterr().err
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")
    for name in files_below(tmp_path / "out") - {"run.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_damaged_photos_and_tars_are_kept_with_the_reason(tmp_path, engine, monkeypatch):
    without_ray(monkeypatch)
    members = [("a.jpg", photo(0)), ("b.jpg", b"no photo"), ("a.png", photo(1)), ("c.v2.jpg", photo(2))]
    write_tar(tmp_path / "tars" / "0.tar", [*members, ("d.jpg", photo(3))])
    whole = (tmp_path / "tars" / "0.tar").read_bytes()
    cut = whole[: whole.rindex(b"d.jpg") + 700]
    (tmp_path / "tars" / "0.tar").write_bytes(cut)
    assert run_batch(engine, tmp_path / "tars" / "0.tar", tmp_path / "out") == 1
    records = lines_of(tmp_path / "out" / "manifest" / "0.jsonl")
    errors = {name: record.get("error", "") for name, record in records.items()}
    assert errors["0/a"] == errors["0/c"] == ""
    assert "none of the formats" in errors["0/b"]
    assert "Another photo before it has the id 0/a" in errors["0/a#2"]
    assert "damaged or cut off" in errors["0.tar"]
    assert list(members_of(tmp_path / "out" / "depth_png16" / "0.tar")) == ["a.png", "c.png"]


def test_members_of_a_tar_are_never_written_outside_of_the_destination(tmp_path, engine, monkeypatch):
    without_ray(monkeypatch)
    names = ("../../a.jpg", "/b.jpg", "./c.jpg", "d/../../../e.jpg", "f" * 230 + ".jpg")
    write_tar(tmp_path / "0.tar", [(name, photo(index)) for index, name in enumerate(names)])
    before = set(tmp_path.parent.rglob("*.png"))
    assert run_batch(engine, tmp_path / "0.tar", tmp_path / "out", "--to", "folder") == 1
    written = set(tmp_path.parent.rglob("*.png")) - before
    assert written == {tmp_path / "out" / "0" / f"{name}.depth.png" for name in "bc"}
    records = lines_of(tmp_path / "out" / "manifest.jsonl")
    failed = {name for name, record in records.items() if "error" in record}
    assert failed == {"0/../../a", "0/d/../../../e", f"0/{'f' * 230}"}


def test_a_table_of_bytes_becomes_parquet(tmp_path, engine, monkeypatch):
    without_ray(monkeypatch)
    rows = {"jpg": [photo(0), None, photo(2)], "key": ["one", "two", "../three"]}
    pq.write_table(pa.table(rows), tmp_path / "part-0.parquet")
    options = ("--column", "jpg", "--id-column", "key", "--outputs", "depth_png16,confidence")
    assert run_batch(engine, tmp_path / "part-0.parquet", tmp_path / "out", *options) == 1
    table = pq.read_table(tmp_path / "out" / "part-0.parquet").to_pylist()
    assert [row["id"] for row in table] == ["one", "two", "../three"]
    assert [row["error"] for row in table] == [
        None,
        "The row has no image in column jpg.",
        "The id cannot be the name of a file: it is too long, or leads to another folder.",
    ]
    depth, confidence = table[0]["depth_png16"], table[0]["confidence"]
    assert depth.startswith(b"\x89PNG") and confidence.startswith(b"\x89PNG")
    assert table[0]["depth_scale"] > 0 and table[0]["unit"] == "relative"
    assert table[1]["depth_png16"] is None


@pytest.fixture
def web():
    """The URL of a photo on a server of this machine, and the paths that were requested."""
    requests = []

    class Photos(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(photo(1))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Photos) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a.jpg", requests
        server.shutdown()


def write_list(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_table_of_paths_and_urls_is_read_under_the_rules_of_serving(
    tmp_path, engine, monkeypatch, web
):
    without_ray(monkeypatch)
    url, requests = web
    (tmp_path / "near.jpg").write_bytes(photo(0))
    rows = [{"url": "near.jpg"}, {"url": url}, {"url": "gone.jpg"}, {}]
    text = "\n".join([*map(json.dumps, rows), "no JSON", ""])
    (tmp_path / "list.jsonl").write_text(text)
    assert run_batch(engine, tmp_path / "list.jsonl", tmp_path / "out", "--to", "folder") == 1
    refused = lines_of(tmp_path / "out" / "manifest.jsonl")
    assert requests == []
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    assert run_batch(engine, tmp_path / "list.jsonl", tmp_path / "out", "--to", "folder") == 1
    assert requests == ["/a.jpg"]
    errors = [refused[f"list.jsonl:{row}"].get("error") for row in range(5)]
    assert errors[0] is None
    assert errors[1] == "image_url must be a public http or https address."
    assert errors[2].endswith("gone.jpg: no such file or folder.")
    assert errors[3:] == ["The row has no image in column url.", "The line is not a JSON object."]
    records = lines_of(tmp_path / "out" / "manifest.jsonl")
    assert records["list.jsonl:1"]["outputs"] == {"depth_png16": "list/00000001.depth.png"}
    assert Image.open(tmp_path / "out" / "list" / "00000001.depth.png").size == (84, 84)


def test_rows_reach_no_server_through_other_protocols(tmp_path, engine, monkeypatch, web):
    without_ray(monkeypatch)
    url, requests = web
    rest = url.partition("://")[2]
    chained = [f"simplecache::{url}", f"file://{tmp_path}/a::{url}", f"zip://a.jpg::{url}"]
    others = [f"ftp://{rest}", "zip://a.zip", f"github://{rest}", f"what://{rest}"]
    urls = [f"HTTP://{rest}", url]
    rows = [{"url": each} for each in (*chained, *others, *urls)]
    write_list(tmp_path / "list.jsonl", rows)
    assert run_batch(engine, tmp_path / "list.jsonl", tmp_path / "out") == 1
    assert requests == []
    errors = [row["error"] for row in pq.read_table(tmp_path / "out" / "list.parquet").to_pylist()]
    refused = len(chained) + len(others)
    assert all("only local paths, s3://" in error for error in errors[:refused])
    assert errors[refused:] == ["image_url must be a public http or https address."] * len(urls)


def test_names_of_files_choose_no_protocol(tmp_path, engine, monkeypatch, web):
    without_ray(monkeypatch)
    url, requests = web
    folder = tmp_path / "photos" / f"simplecache::{url.rpartition('/')[0]}"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(photo(0))
    write_tar(tmp_path / "tars" / "memory::0.tar", [("a.jpg", photo(0))])
    assert run_batch(engine, tmp_path / "photos", tmp_path / "depth") == 0
    assert run_batch(engine, tmp_path / "tars" / "*.tar", tmp_path / "out") == 0
    assert requests == []
    assert list(lines_of(tmp_path / "out" / "manifest" / "memory::0.jsonl")) == ["memory::0/a"]


def test_sizes_are_checked_before_photos_are_read(tmp_path, engine, monkeypatch):
    without_ray(monkeypatch)
    monkeypatch.setenv("MAX_IMAGE_BYTES", "5000")
    size = 10_000
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        sparse, large, good = (tarfile.TarInfo(f"{name}.jpg") for name in ("sparse", "large", "good"))
        sparse.size = 1
        sparse.pax_headers = {"GNU.sparse.map": f"0,1,{size},0", "GNU.sparse.size": str(size)}
        tar.addfile(sparse, io.BytesIO(b"a"))
        large.size = size
        tar.addfile(large, io.BytesIO(bytes(size)))
        good.size = len(photo(0))
        tar.addfile(good, io.BytesIO(photo(0)))
    assert run_batch(engine, tmp_path / "0.tar", tmp_path / "tar") == 1
    records = lines_of(tmp_path / "tar" / "manifest" / "0.jsonl")
    assert "is a sparse file" in records["0/sparse"]["error"]
    limit = "has 10000 bytes; the limit is 5000 (MAX_IMAGE_BYTES)."
    assert records["0/large"]["error"] == f"The photo {limit}"
    assert "error" not in records["0/good"]
    (tmp_path / "large.jpg").write_bytes(bytes(size))
    write_list(tmp_path / "list.jsonl", [{"url": "/dev/null"}, {"url": "large.jpg"}, {"url": "."}])
    assert run_batch(engine, tmp_path / "list.jsonl", tmp_path / "table") == 1
    errors = [row["error"] for row in pq.read_table(tmp_path / "table" / "list.parquet").to_pylist()]
    assert errors == [
        "/dev/null is not a regular file.",
        f"{tmp_path}/large.jpg {limit}",
        f"{tmp_path}/. is not a regular file.",
    ]


def test_manifests_are_read_line_by_line(tmp_path):
    lines = [{"id": "a", "size": 1, "fill": "f" * 500}] * 20_000 + [{"id": "b", "error": "reason"}]
    write_list(tmp_path / "manifest.jsonl", lines)
    tracemalloc.start()
    assert done_photos(Place(str(tmp_path))) == {"a": 1}
    assert tracemalloc.get_traced_memory()[1] < (tmp_path / "manifest.jsonl").stat().st_size / 4
    tracemalloc.stop()


def test_equal_ids_in_two_tables_hide_no_photo(tmp_path, engine, monkeypatch, capsys):
    ran = without_ray(monkeypatch)
    for name in ("l0", "l1"):
        (tmp_path / f"{name}.jpg").write_bytes(photo(ord(name[1])))
        write_list(tmp_path / f"{name}.jsonl", [{"url": f"{name}.jpg", "key": "1"}])
    options = ("--to", "folder", "--id-column", "key")
    with pytest.raises(Killed):
        without_ray(monkeypatch, fail_after=1)
        run_batch(engine, tmp_path / "*.jsonl", tmp_path / "out", *options)
    ran = without_ray(monkeypatch)
    assert run_batch(engine, tmp_path / "*.jsonl", tmp_path / "out", *options) == 0
    assert ran == [("l1", 0)]
    assert set(lines_of(tmp_path / "out" / "manifest.jsonl")) == {"l0/1", "l1/1"}
    assert {name for name in files_below(tmp_path / "out") if name.endswith(".png")} == {
        "l0/1.depth.png",
        "l1/1.depth.png",
    }


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_a_name_that_is_not_utf8_fails_alone(tmp_path, engine, monkeypatch, form):
    without_ray(monkeypatch)
    write_photos(tmp_path / "photos", 1)
    (tmp_path / "photos" / os.fsdecode(b"bad\xff.jpg")).write_bytes(photo(1))
    assert run_batch(engine, tmp_path / "photos", tmp_path / "out", "--to", form) == 1
    if form == "tar":
        records = list(lines_of(tmp_path / "out" / "manifest" / "00000.jsonl").values())
    else:
        records = pq.read_table(tmp_path / "out" / "00000.parquet").to_pylist()
    errors = {record["id"]: record.get("error") for record in records}
    assert errors == {
        "000/000000.jpg": None,
        "bad\\udcff.jpg": "The name is not UTF-8: rename the photo.",
    }


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_a_bad_row_of_a_table_fails_alone(tmp_path, engine, monkeypatch, form):
    without_ray(monkeypatch)
    (tmp_path / "a.jpg").write_bytes(photo(0))
    # json.dumps escapes what no UTF-8 can have.
    rows = [("\ud800", "a.jpg"), ("1", "gone\ud800.jpg"), ("2", "a\0.jpg"), ("3", "a.jpg")]
    write_list(tmp_path / "list.jsonl", [{"key": key, "url": url} for key, url in rows])
    options = ("--to", form, "--id-column", "key")
    assert run_batch(engine, tmp_path / "list.jsonl", tmp_path / "out", *options) == 1
    if form == "folder":
        records = list(lines_of(tmp_path / "out" / "manifest.jsonl").values())
    else:
        records = pq.read_table(tmp_path / "out" / "list.parquet").to_pylist()
    before = "list/" if form == "folder" else ""
    assert [record["id"] for record in records] == [f"{before}{key}" for key in ("\\ud800", *"123")]
    assert [bool(record.get("error")) for record in records] == [True, True, True, False]


def test_a_photo_whose_result_has_too_long_a_name_fails_alone(tmp_path, engine, monkeypatch, capsys):
    without_ray(monkeypatch)
    write_photos(tmp_path / "photos", 1)
    long = "f" * 250 + ".jpg"
    (tmp_path / "photos" / long).write_bytes(photo(1))
    assert run_batch(engine, tmp_path / "photos", tmp_path / "out") == 1
    assert "2 photos" in (text := capsys.readouterr().err)
    assert "1 done, 1 failed" in text
    records = lines_of(tmp_path / "out" / "manifest.jsonl")
    assert "longer than the disk accepts" in records[long]["error"]
    assert "outputs" not in records[long]
    assert "error" not in records["000/000000.jpg"]


@pytest.mark.parametrize(
    ("nodes", "cores", "gpus"), [(1, 1, 0), (2, 1, 0), (2, 1, 1), (8, 96, 8), (50, 16, 1), (100, 64, 0)]
)
def test_all_processes_of_a_cluster_fit_on_the_cores_of_its_last_node(nodes, cores, gpus):
    pools = pipeline.Pools.of(pipeline.Cluster(nodes, nodes * cores, nodes * gpus))
    processes = pools.readers + pools.networks + 2 * pools.workers
    assert processes * pipeline._SHARE < cores


def test_errors_of_ray_have_their_cause_in_one_sentence():
    from ray.exceptions import RayTaskError, UserCodeException

    error = UserCodeException("Ray's text")
    error.__cause__ = ValueError("the cause\nmore of it")
    with pytest.raises(DA3Error) as raised, pipeline._in_one_sentence():
        raise RayTaskError("name", "trace\nadvice of Ray", error, "title", 1, "127.0.0.1")
    assert str(raised.value).startswith("Ray ended the run: ValueError: the cause. Run the same")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (SettingError("No space."), "No space."),
        (ValueError("bad\nmore"), "Ray ended the run: ValueError: bad."),
    ],
)
def test_an_error_of_a_stage_reaches_the_user_with_its_text(error, text):
    class Failing:
        def __call__(self, row):
            raise error

    row = pipeline.Stage(Failing)(Piece("0", 3, [1]).packed())
    piece = Piece.unpacked(row)
    assert (piece.shard, piece.number, piece.rows) == ("0", 3, ())
    assert str(piece.ended).startswith(text)


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_files_of_others_do_not_count_as_results(tmp_path, engine, monkeypatch, capsys, form):
    without_ray(monkeypatch)
    write_tar(tmp_path / "tars" / "l0.tar", [("a.jpg", photo(0))])
    mine = tmp_path / "out" / ("l0.parquet" if form == "parquet" else "manifest/l0.jsonl")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    source = tmp_path / "tars" / "l0.tar"
    assert run_batch(engine, source, tmp_path / "out", "--to", form) == 2
    assert "has files that no run of this command wrote" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_pieces_of_a_finished_shard_are_removed(tmp_path, engine, monkeypatch, capsys):
    without_ray(monkeypatch)
    write_tar(tmp_path / "tars" / "l0.tar", [("a.jpg", photo(0))])
    assert run_batch(engine, tmp_path / "tars" / "l0.tar", tmp_path / "out") == 0
    complete = files_below(tmp_path / "out")
    piece = tmp_path / "out" / "_pieces" / "l0" / "000000.parquet"
    piece.parent.mkdir(parents=True)
    piece.write_bytes(b"")
    assert run_batch(engine, tmp_path / "tars" / "l0.tar", tmp_path / "out") == 0
    assert "0 photos: 0 done, 1 shard done by earlier runs." in capsys.readouterr().err
    assert files_below(tmp_path / "out") == complete
    assert not (tmp_path / "out" / "_pieces").exists()


def test_photos_in_a_colmap_model_keep_their_file_names(tmp_path, engine, monkeypatch):
    without_ray(monkeypatch)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "IMG.JPG").write_bytes(photo(0))
    write_tar(tmp_path / "0.tar", [("IMG.JPG", photo(0))])
    for source, out in (("photos", "depth"), ("0.tar", "tar")):
        options = ("--to", "folder", "--outputs", "colmap")
        assert run_batch(engine, tmp_path / source, tmp_path / out, *options) == 0
        (archive,) = (tmp_path / out).rglob("*.colmap.zip")
        with zipfile.ZipFile(archive) as files:
            assert b"IMG.JPG\0" in files.read(next(n for n in files.namelist() if "images" in n))


@pytest.fixture
def bucket(monkeypatch):
    """The address of a bucket in a server of S3 on this machine."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as client:
        assert client.put(f"{endpoint}/photos").status_code == 200
    yield "s3://photos"
    server.terminate()
    server.wait()


def test_buckets_are_sources_and_destinations(tars, tmp_path, engine, monkeypatch, capsys, bucket):
    import s3fs

    without_ray(monkeypatch)
    fs = s3fs.S3FileSystem()
    fs.put(f"{tars}/", f"{bucket}/tars/", recursive=True)
    assert run_batch(engine, f"{bucket}/tars/*.tar", f"{bucket}/out") == 0
    assert run_batch(engine, tars / "*.tar", tmp_path / "out") == 0
    for name in files_below(tmp_path / "out") - {"run.json"}:
        assert fs.cat(f"{bucket}/out/{name}") == (tmp_path / "out" / name).read_bytes()
    assert not fs.exists(f"{bucket}/out/_pieces")
    # A folder of photos, which goes on.
    for index in range(3):
        fs.pipe(f"{bucket}/photos/{index}.jpg", photo(index))
    assert run_batch(engine, f"{bucket}/photos", f"{bucket}/depth") == 0
    fs.pipe(f"{bucket}/photos/3.jpg", photo(3))
    capsys.readouterr()
    assert run_batch(engine, f"{bucket}/photos", f"{bucket}/depth") == 0
    assert "1 photo in" in (text := capsys.readouterr().err)
    assert "3 done by earlier runs" in text
    pngs = {name for name in fs.find(f"{bucket}/depth") if name.endswith(".png")}
    assert pngs == {f"photos/depth/{index}.depth.png" for index in range(4)}
    assert run_batch(engine, "s3://missing/photos", tmp_path / "none") == 2
    assert capsys.readouterr().err == "error: s3://missing/photos: no such bucket, folder or file.\n"


def test_names_with_braces_and_wildcards(tmp_path):
    for name in ("a/00.tar", "b/00.tar", "b/01.tar"):
        write_tar(tmp_path / name, [])
    shards = find_shards(str(tmp_path / "b" / "{00..01}.tar"), Columns())
    assert [shard.name for shard in shards] == ["00", "01"]
    shards = find_shards(str(tmp_path / "*" / "00.tar"), Columns())
    assert [shard.name for shard in shards] == ["a/00", "b/00"]


def test_what_cannot_be_is_refused_in_one_sentence(tars, tmp_path, engine, monkeypatch, capsys):
    without_ray(monkeypatch)
    write_photos(tmp_path / "photos", 1)
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), tmp_path / "t.parquet")
    assert run_batch(engine, tars / "*.tar", tmp_path / "done") == 0
    capsys.readouterr()

    def refusal(*args):
        assert run_batch(engine, *args) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1
        return text

    assert "results need another folder" in refusal(tmp_path / "photos", tmp_path / "photos")
    assert "has no column url; it has a, b" in refusal(tmp_path / "t.parquet", tmp_path / "out")
    table = refusal(tmp_path / "t.parquet", tmp_path, "--column", "a")
    assert "is a file of the source" in table
    assert "no file has such a name" in refusal(tars / "x*.tar", tmp_path / "out")
    assert "ends before it begins" in refusal(tars / "{2..1}.tar", tmp_path / "out")
    assert "no such file" in refusal(tmp_path / "gone", tmp_path / "out")
    assert "no such file" in refusal(tmp_path / "gone.tar", tmp_path / "out")
    for address in ("what://b/*.tar", "http://b/*.tar", f"simplecache::{tars}/*.tar", "zip://a::s3://b"):
        assert "only local paths" in refusal(address, tmp_path / "out")
        assert "only local paths" in refusal(tars / "*.tar", address)
    assert "outputs" in refusal(tars / "*.tar", tmp_path / "done", "--outputs", "preview")
    assert "processing_res" in refusal(tars / "*.tar", tmp_path / "done", "--processing-res", "98")
    assert "source" in refusal(tars / "00000.tar", tmp_path / "done")
    assert "at least one output with a file" in refusal(
        tars / "*.tar", tmp_path / "out", "--outputs", "camera"
    )


def test_a_folder_as_tars_refuses_another_listing(tmp_path, engine, monkeypatch, capsys):
    without_ray(monkeypatch)
    write_photos(tmp_path / "photos", 2)
    (tmp_path / "photos" / "a.b.jpg").write_bytes(photo(5))
    (tmp_path / "photos" / "a_b.jpg").write_bytes(photo(6))
    assert run_batch(engine, tmp_path / "photos", tmp_path / "out", "--to", "tar") == 0
    members = members_of(tmp_path / "out" / "depth_png16" / "00000.tar")
    assert set(members) == {"000/000000.png", "000/000001.png", "a_b.png", "a_b_2.png"}
    (tmp_path / "photos" / "new.jpg").write_bytes(photo(7))
    assert run_batch(engine, tmp_path / "photos", tmp_path / "out", "--to", "tar") == 2
    assert "listing" in capsys.readouterr().err


def test_two_batches_into_one_folder_at_once_are_refused(tmp_path, engine, monkeypatch, capsys):
    without_ray(monkeypatch)
    write_photos(tmp_path / "photos", 1)
    with records_of(Place(str(tmp_path / "out"))):
        assert run_batch(engine, tmp_path / "photos", tmp_path / "out") == 2
    assert "Another run writes to" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path):
    code = (
        "import sys; sys.modules['ray'] = None; from da3_runtime.__main__ import main; "
        f"sys.exit(main(['batch', {str(tmp_path)!r}, {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == 'error: ray is not installed: pip install "da3-runtime[ray]".\n'
