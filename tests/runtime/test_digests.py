"""Verified files are hashed once, and again when they change."""

import hashlib
import json
import os
import time

import pytest

from da3_runtime.errors import BackendUnavailableError, CheckpointError
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.store import digests, manifest
from da3_runtime.store.digests import FILE_NAME, remembered_digest, remembered_sha256
from da3_runtime.store.manifest import digest_of, sha256_of
from da3_runtime.store.settings import EngineSettings
from tests.support.paths import NANO

ONNX = ["model.fp32.onnx", "model.fp32.onnx.data"]


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that were hashed, in a process that remembers nothing yet."""
    names = []

    for name in ("sha256_of", "digest_of"):
        compute = getattr(manifest, name)

        def note(path, compute=compute):
            names.append(path.name)
            return compute(path)

        monkeypatch.setattr(manifest, name, note)
    monkeypatch.setattr(digests, "_known", {})
    return names


@pytest.fixture
def load(engine_copy, tmp_path):
    """Load the copied engine; its ONNX and weights are files of their own, not links.

    A link that another test makes to the same file would change the file's time of change.
    """
    for name in ONNX:
        path = engine_copy.folder / name
        content, old = path.read_bytes(), path.stat()
        path.unlink()
        path.write_bytes(content)
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))

    def load(backend="onnxruntime-cpu"):
        return load_backend(
            EngineSettings(
                engine_dir=engine_copy.engine_dir,
                model_id=NANO,
                backend=backend,
                runtime_cache_dir=tmp_path / "cache",
            )
        )

    load.file = engine_copy.folder / ONNX[0]
    load.cache = tmp_path / "cache" / FILE_NAME
    return load


def forget(monkeypatch):
    """What another process remembers: only the file."""
    monkeypatch.setattr(digests, "_known", {})


@pytest.mark.parametrize(
    ("backend", "names"), [("onnxruntime-cpu", ONNX), ("eager", ["model.safetensors"])]
)
def test_the_second_load_hashes_nothing(load, hashed, monkeypatch, backend, names):
    load(backend)
    assert hashed == names
    load(backend)
    forget(monkeypatch)
    load(backend)
    assert hashed == names


def spoil(path, stamp=None):
    """Change one bit in place, and set the time of modification."""
    old = path.stat()
    with path.open("r+b") as stream:
        stream.seek(old.st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(old.st_size // 2)
        stream.write(bytes([byte ^ 1]))
    if stamp is not None:
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + stamp))


def replace_by_a_copy(path):
    """Another inode with one other bit; size and time of modification stay."""
    old, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(old.st_atime_ns, old.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize(
    "change",
    [
        spoil,
        lambda path: spoil(path, stamp=1),
        lambda path: spoil(path, stamp=0),  # of the two times only the one that nobody can set differs
        replace_by_a_copy,
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
    ],
)
def test_a_changed_file_is_hashed_again_and_refused(load, hashed, change):
    load()
    change(load.file)
    with pytest.raises(
        BackendUnavailableError, match=r"model\.fp32\.onnx (does not match|has \d+ bytes)"
    ):
        load()


def test_a_damaged_file_is_refused_at_every_load(load, hashed, monkeypatch):
    spoil(load.file, stamp=0)
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match="does not match the digest"):
            load()
        forget(monkeypatch)


def test_eager_refuses_weights_that_changed(small_copy, hashed, tmp_path):
    settings = EngineSettings(
        engine_dir=small_copy.engine_dir,
        model_id="da3-small",
        backend="eager",
        runtime_cache_dir=tmp_path,
    )
    load_backend(settings).close()
    path = small_copy.folder / "checkpoint" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not those its engine was built from"):
        load_backend(settings)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"x": 1}', b"\xff"])
def test_without_a_usable_cache_file_files_are_hashed_again(load, hashed, monkeypatch, content):
    load()
    load.cache.write_bytes(content)
    forget(monkeypatch)
    load()
    assert hashed == ONNX * 2
    forget(monkeypatch)
    load()
    assert hashed == ONNX * 2


def test_a_cache_folder_that_cannot_be_written_costs_only_time(load, hashed, monkeypatch):
    load.cache.parent.write_text("not a folder")
    load()
    load()
    assert hashed == ONNX
    forget(monkeypatch)
    load()
    assert hashed == ONNX * 2


def test_a_file_that_has_just_changed_is_not_remembered(hashed, tmp_path):
    path = tmp_path / "file"
    path.write_text("one")
    for _ in range(2):
        remembered_sha256(path, tmp_path)
    assert hashed == ["file"] * 2
    os.utime(path, ns=(0, time.time_ns() - 2 * 10**9))
    for _ in range(2):
        assert remembered_sha256(path, tmp_path) == sha256_of(path)
    assert hashed == ["file"] * 3


def test_only_the_latest_files_are_remembered(hashed, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_MAX_FILES", 2)
    for name in ("a", "b", "c"):
        path = tmp_path / name
        path.write_text(name)
        os.utime(path, ns=(0, 0))
        remembered_sha256(path, tmp_path / "cache")
    entries = json.loads((tmp_path / "cache" / FILE_NAME).read_text())
    assert list(entries) == [str(tmp_path / name) for name in ("b", "c")]


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 3000, 4567])
def test_a_digest_is_that_of_the_digests_of_the_pieces(tmp_path, monkeypatch, size):
    monkeypatch.setattr(manifest, "_PIECE", 1000)
    monkeypatch.setattr(manifest, "_CHUNK", 300)
    data = bytes(range(256)) * 20
    path = tmp_path / "file"
    path.write_bytes(data[:size])
    pieces = [data[start : min(start + 1000, size)] for start in range(0, size, 1000)]
    joined = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    assert digest_of(path) == hashlib.sha256(joined).hexdigest()


def test_both_digests_of_one_file_are_remembered(tmp_path, hashed):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    os.utime(path, (1, 1))
    for _ in range(2):
        assert remembered_sha256(path, tmp_path) == hashlib.sha256(b"content").hexdigest()
        assert remembered_digest(path, tmp_path) == digest_of(path) != sha256_of(path)
    assert hashed == ["file", "file"]
