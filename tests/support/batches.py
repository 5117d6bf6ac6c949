"""Photos, tars and tables for batches, and batches without Ray."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np

from da3_runtime.__main__ import main
from da3_runtime.batch import pipeline
from da3_runtime.batch.pieces import Piece
from da3_runtime.batch.sources import read_pieces
from da3_runtime.batch.stages import Decode, Encode, Network, load
from tests.support.images import encode
from tests.support.paths import NANO

SMALLEST = ("--model", NANO, "--processing-res", "84", "--backend", "onnxruntime-cpu")


def photo(index, side=84):
    """A small JPEG, another one for each index."""
    from PIL import Image

    across = np.arange(side, dtype=np.uint8)
    gray = np.add.outer(across, across[::-1]) + np.uint8(index % 251)
    return encode(Image.fromarray(np.stack([gray, gray.T, gray], axis=-1)), "JPEG")


def write_photos(folder, count):
    """A folder of photos, 100 in each folder below."""
    for index in range(count):
        path = Path(folder, f"{index // 100:03d}", f"{index:06d}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(index))


def write_tar(path, members):
    """A tar of members by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def lines_of(path):
    """Records of a file of JSON lines, by id; each id is there once."""
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    by_id = {record["id"]: record for record in records}
    assert len(by_id) == len(records)
    return by_id


def members_of(path):
    """Files in a tar, by name; each name is there once."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    assert len(dict(members)) == len(members)
    return dict(members)


class Killed(BaseException):
    """Ends a batch as if its process was killed."""


def without_ray(monkeypatch, fail_after=None):
    """Let batches in this process run their stages one after another, in the order of the shards.

    Returns the pieces that ran. Batches end with :class:`Killed` after ``fail_after`` pieces.
    """
    ran = []

    def run(shards, done, job, engine, destination, cluster, on_piece, report):
        stages = (Decode(job), Network(job, engine), Encode(job, engine, destination))
        for shard in shards:
            written = set(shard.skip)
            for piece in read_pieces(shard, done):
                if fail_after is not None and len(ran) >= fail_after:
                    raise Killed
                row = piece.packed()
                for stage in stages:
                    row = stage(row)
                if piece.error:
                    report.shards[piece.shard] = piece.error
                elif piece.total is None:
                    ran.append((piece.shard, piece.number))
                    written.add(piece.number)
                    (each,) = Piece.unpacked(row).rows
                    on_piece(each)
                elif len(written) == piece.total:
                    destination.finish(piece.shard, piece.total)

    monkeypatch.setattr(pipeline, "start", lambda address: pipeline.Cluster(1, 1, 0))
    monkeypatch.setattr(pipeline, "probe", lambda job, cluster: load(job.settings)[1])
    monkeypatch.setattr(pipeline, "stop", lambda: None)
    monkeypatch.setattr(pipeline, "run", run)
    return ran


def run_batch(engine, source, destination, *options):
    """The exit code of ``da3-runtime batch`` in this process."""
    return main(
        [
            "batch",
            str(source),
            str(destination),
            "--engine-dir",
            str(engine.engine_dir),
            *SMALLEST,
            *options,
        ]
    )
