"""Batches: sources, destinations, resuming and refusals. Ray itself is in test_batch_cluster.py."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from da3_runtime.__main__ import main
from da3_runtime.batch.sources import Columns, find_shards
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
    assert "1 shards done by earlier runs" in capsys.readouterr().err
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


def test_a_table_of_paths_and_urls_is_read_under_the_rules_of_serving(tmp_path, engine, monkeypatch):
    without_ray(monkeypatch)
    requests = []

    class Photos(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(photo(1))

        def log_message(self, *args):
            pass

    (tmp_path / "near.jpg").write_bytes(photo(0))
    with ThreadingHTTPServer(("127.0.0.1", 0), Photos) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.jpg"
        rows = [{"url": "near.jpg"}, {"url": url}, {"url": "gone.jpg"}, {}]
        text = "\n".join([*map(json.dumps, rows), "no JSON", ""])
        (tmp_path / "list.jsonl").write_text(text)
        assert run_batch(engine, tmp_path / "list.jsonl", tmp_path / "out", "--to", "folder") == 1
        refused = lines_of(tmp_path / "out" / "manifest.jsonl")
        assert requests == []
        monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
        assert run_batch(engine, tmp_path / "list.jsonl", tmp_path / "out", "--to", "folder") == 1
        server.shutdown()
    assert requests == ["/a.jpg"]
    errors = [refused[f"list.jsonl:{row}"].get("error") for row in range(5)]
    assert errors[0] is None
    assert errors[1] == "image_url must be a public http or https address."
    assert errors[2].endswith("gone.jpg: no such file or folder.")
    assert errors[3:] == ["The row has no image in column url.", "The line is not a JSON object."]
    records = lines_of(tmp_path / "out" / "manifest.jsonl")
    assert records["list.jsonl:1"]["outputs"] == {"depth_png16": "list/00000001.depth.png"}
    assert Image.open(tmp_path / "out" / "list" / "00000001.depth.png").size == (84, 84)


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
    assert "1 photos" in (text := capsys.readouterr().err)
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
    assert "Protocol not known" in refusal("what://bucket/*.tar", tmp_path / "out")
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
    from da3_runtime.batch.records import records_of
    from da3_runtime.batch.storage import Place

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
