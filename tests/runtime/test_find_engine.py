"""Published engines: search, download and upload."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import da3_export.__main__
from da3_export import hub_upload
from da3_export.hub_upload import find_publishable, publish
from da3_runtime.commands import prefetch as prefetch_verb
from da3_runtime.errors import ArtefactError, BuildError, SettingError
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.store import checkpoint
from da3_runtime.store.manifest import Kind
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import Head, find_variant
from tests.support.engines import damage
from tests.support.hub import COMMIT, Hub, serving
from tests.support.paths import NANO, ROOT
from tests.support.processes import clean_env, command, run_module

REPO = "someone/engines"


class EngineHub(Hub):
    """A hub with one repository, whose files are in a folder."""

    def respond(self, body):
        _, _, rest = self.path.partition(f"/{REPO}/resolve/")
        revision, _, name = rest.partition("/")
        path = self.server.folder / name
        if not rest or not path.is_file() or revision not in ("main", COMMIT, "v2"):
            self.refuse("EntryNotFound" if rest else "RepoNotFound")
            return
        if body:
            self.server.sent.append((revision, name))
        content = path.read_bytes()
        self.send_headers(name.replace("/", "-"), len(content))
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(engine, tmp_path):
    folder = tmp_path / "published"
    shutil.copytree(engine.folder, folder / NANO / "dpt", copy_function=os.link)
    with serving(EngineHub, folder=folder, sent=[]) as server:
        yield server


@pytest.fixture
def load(hub, tmp_path, monkeypatch):
    """Loads da3-nano; only the hub has an engine of it."""
    from huggingface_hub import constants

    address = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    given = {"model_id": NANO, "engine_dir": tmp_path / "none", "engine_repo": REPO}
    return lambda **more: load_backend(EngineSettings(**given | more))


def prefetch(tmp_path, hub, largest_file=None, **env):
    return run_module(
        "da3_runtime", "prefetch", largest_file=largest_file, MODEL=NANO, ENGINE_DIR=str(tmp_path / "none"), HF_HUB_DISABLE_XET="1",
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HOME=str(tmp_path / "hf"),
        **({"ENGINE_REPO": REPO} | env),
    )  # fmt: skip


def names(hub):
    return {name.rsplit("/", 1)[-1] for _, name in hub.sent}


def test_an_engine_is_fetched_once_and_only_what_the_backend_needs(hub, load, monkeypatch):
    loaded = load()
    assert (loaded.backend.name, loaded.warnings) == ("onnxruntime-cpu", [])
    assert names(hub) == {"manifest.json", "model.fp32.onnx", "model.fp32.onnx.data"}
    hub.sent.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load().backend.name == "onnxruntime-cpu"
    assert hub.sent == []


def test_a_revision_of_the_repository_may_be_named(hub, load):
    load(engine_repo=f"{REPO}@v2")
    assert {revision for revision, _ in hub.sent} == {"v2", COMMIT}


def test_engine_dir_takes_precedence_over_the_hub(hub, load, engine):
    load(engine_dir=engine.engine_dir)
    assert hub.sent == []


def test_a_damaged_published_engine_is_skipped_with_a_warning(hub, load):
    path = hub.folder / NANO / "dpt" / "model.fp32.onnx"
    damage(path, path.read_bytes()[:-1] + b"x")
    loaded = load()
    assert loaded.backend.name == "eager"
    assert any("does not match the digest" in warning for warning in loaded.warnings)


def test_an_incomplete_published_engine_is_skipped_with_a_warning(hub, load):
    (hub.folder / NANO / "dpt" / "model.fp32.onnx").unlink()
    loaded = load()
    assert loaded.backend.name == "eager"
    assert any(f"{REPO} lacks {NANO}/dpt/model.fp32.onnx" in warning for warning in loaded.warnings)


def test_a_missing_repository_gives_a_warning_and_a_missing_engine_none(hub, load):
    shutil.rmtree(hub.folder / NANO)
    loaded = load()
    assert loaded.backend.name == "eager"
    assert not any("ENGINE_REPO" in warning for warning in loaded.warnings)
    warnings = load(engine_repo="someone/nothing").warnings
    assert any("ENGINE_REPO was skipped: someone/nothing" in warning for warning in warnings)


def test_cached_models_dir_is_used_and_never_written(hub, load, tmp_path):
    """The platform's cache has the layout of the hub's cache; no request goes to the hub."""
    load()
    mount = tmp_path / "mount"
    shutil.move(tmp_path / "hf" / "hub", mount)
    shutil.rmtree(mount / f"models--{REPO.replace('/', '--')}" / "refs")
    before = sorted(path for path in mount.rglob("*"))
    hub.sent.clear()
    loaded = load(cached_models_dir=mount)
    assert (loaded.backend.name, loaded.warnings, hub.sent) == ("onnxruntime-cpu", [], [])
    assert sorted(path for path in mount.rglob("*")) == before
    assert not (tmp_path / "hf" / "hub").exists()


def test_prefetch_fetches_every_artefact_with_plain_lines(hub, tmp_path, engine):
    done = prefetch(tmp_path, hub)
    assert done.code == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert names(hub) == {"manifest.json", *(path.name for path in engine.folder.glob("model.*"))}
    lines = done.stdout.splitlines()
    assert any(line.startswith(f"{NANO}: fetching {Kind.TENSORRT_RTX}") for line in lines)
    assert all(Path(line.split(": ", 1)[1]).is_file() for line in lines if line.endswith(".onnx"))


def test_prefetch_fails_if_the_engine_is_not_published(hub, tmp_path):
    shutil.rmtree(hub.folder / NANO)
    done = prefetch(tmp_path, hub)
    assert done.code == 1
    assert f"it has no engine of {NANO} with head dpt" in done.stderr
    assert prefetch(tmp_path, hub, ENGINE_REPO="").code == 0


class Api:
    """A stand-in for HfApi that records the upload."""

    taken = None

    def __init__(self, **_):
        pass

    def create_repo(self, repo, **options):
        Api.taken = {"repo": repo, **options}

    def create_commit(self, repo, operations, **_):
        Api.taken["files"] = {each.path_in_repo: each.path_or_fileobj for each in operations}
        return type("Commit", (), {"commit_url": f"https://hub/{repo}/commit/1"})


@pytest.fixture
def api(monkeypatch):
    """The stand-in for the hub, with no page in the repository yet."""
    Api.taken, Api.card = None, ""
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr(hub_upload, "_published_card", lambda repo: Api.card)
    return Api


def put(engine, engine_dir, model=None, head=None):
    """Link an engine into a folder of engines; with ``model``, as that model's with ``head``."""
    model, head = model or engine.folder.parent.name, head or engine.folder.name
    folder = engine_dir / model / head
    shutil.copytree(engine.folder, folder, copy_function=os.link)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"model": model, "head": head}
    damage(folder / "manifest.json", json.dumps(manifest).encode())
    return folder


def publish_all(engine_dir, *names):
    return publish(engine_dir, find_publishable(engine_dir, *names)[0], REPO, private=True)


def test_publishing_uploads_the_layout_that_engine_repo_reads(engine, api, tmp_path):
    put(engine, tmp_path)
    (tmp_path / NANO / "dpt" / "notes.txt").write_text("mine")
    assert publish_all(tmp_path) == f"https://hub/{REPO}/commit/1"
    assert (api.taken["repo"], api.taken["private"], api.taken["exist_ok"]) == (REPO, True, True)
    files = api.taken["files"]
    expected = {path.name for path in engine.folder.iterdir() if path.is_file()}
    assert {name.removeprefix(f"{NANO}/dpt/") for name in files} == expected | {"README.md"}
    assert f"| dpt | {NANO} | bundled |  | MIT | model tensorrt-rtx |" in files["README.md"].decode()


def test_one_engine_is_published_and_the_page_keeps_the_others(engine, api, tmp_path):
    put(engine, tmp_path)
    put(engine, tmp_path, model="da3-large")
    large, nano = find_variant("da3-large"), find_variant(NANO)
    publish_all(tmp_path, large, Head.DPT)
    assert {name.split("/")[0] for name in api.taken["files"]} == {"da3-large", "README.md"}
    api.card = api.taken["files"]["README.md"].decode()
    assert NANO not in api.card
    for _ in range(2):
        publish_all(tmp_path, nano)
        assert {name.split("/")[0] for name in api.taken["files"]} == {NANO, "README.md"}
        api.card = api.taken["files"]["README.md"].decode()
        assert api.card.count("| dpt | da3-large |") == api.card.count(f"| dpt | {NANO} |") == 1


def test_untrained_and_damaged_engines_beside_the_wanted_one_do_not_matter(
    engine, small_engine, api, tmp_path
):
    put(engine, tmp_path)
    put(small_engine, tmp_path)
    damage(put(engine, tmp_path, model="da3-large") / "model.fp32.onnx", b"x")
    nano = find_variant(NANO)
    for names in ((nano,), (nano, Head.DPT)):
        (only,), left_out = find_publishable(tmp_path, *names)
        assert (only.manifest.model, left_out) == (NANO, [])
    shutil.rmtree(tmp_path / "da3-large")
    (only,), left_out = find_publishable(tmp_path)
    assert only.manifest.model == NANO
    assert left_out == ["The engine of da3-small with head dpt has random weights and is left out."]


def test_an_engine_that_is_untrained_or_damaged_or_missing_is_not_published(
    small_engine, engine_copy, tmp_path
):
    put(small_engine, tmp_path)
    for names in ((), (find_variant("da3-small"), Head.DPT)):
        with pytest.raises(BuildError, match="random weights and cannot be published"):
            find_publishable(tmp_path, *names)
    with pytest.raises(SettingError, match="no engine of da3-small with head sdt to publish"):
        find_publishable(tmp_path, find_variant("da3-small"), Head.SDT)
    with pytest.raises(SettingError, match="no engine of any model"):
        find_publishable(tmp_path / "nothing")
    damage(engine_copy.folder / "model.fp32.onnx", b"x")
    with pytest.raises(ArtefactError, match=r"model\.fp32\.onnx has 1 bytes"):
        find_publishable(engine_copy.engine_dir)


@pytest.mark.parametrize(
    ("options", "variables", "models"),
    [
        ([], {}, {NANO, "da3-large"}),
        (["--model", "all"], {}, {NANO, "da3-large"}),
        (["--model", "DA3-Nano"], {"MODEL": "da3-large"}, {NANO}),
        ([], {"MODEL": "da3-large", "HEAD": "dpt"}, {"da3-large"}),
        ([], {"MODEL_ID": "depth-anything/DA3-LARGE-1.1"}, {"da3-large"}),
    ],
)
def test_a_dry_run_lists_what_the_options_select_and_uploads_nothing(
    engine, api, tmp_path, monkeypatch, capsys, options, variables, models
):
    put(engine, tmp_path)
    put(engine, tmp_path, model="da3-large")
    for name in ("MODEL", "MODEL_ID", "HEAD", "USE_SDT_HEAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = ["publish", "--repo", REPO, "--dry-run", "--engine-dir", str(tmp_path), *options]
    assert da3_export.__main__.main(line) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert {each.split("/")[0] for each in lines} == models
    assert f"{NANO}/dpt/manifest.json  0.0 MB" in lines or NANO not in models
    assert total.startswith(f"{len(lines)} files, ")
    assert api.taken is None


def test_publishing_the_sdt_engine_of_a_model_that_has_none_is_one_sentence(engine_copy, capsys):
    line = ["publish", "--repo", REPO, "--engine-dir", str(engine_copy.engine_dir), "--head", "sdt"]
    assert da3_export.__main__.main(line) == 2
    assert "has no engine of any model with head sdt to publish" in capsys.readouterr().err


def test_the_published_page_is_read_from_the_hub(hub, load):
    (hub.folder / "README.md").write_text("the page")
    assert hub_upload._published_card(REPO) == "the page"
    (hub.folder / "README.md").unlink()
    assert hub_upload._published_card("someone/nothing") == ""


def test_prefetch_may_fetch_the_engine_alone(hub, load, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "download", lambda *_: pytest.fail("the checkpoint was asked for"))
    settings = EngineSettings(model_id="da3-large", engine_repo=REPO, engine_dir=tmp_path / "none")
    shutil.copytree(hub.folder / NANO, hub.folder / "da3-large")
    path = hub.folder / "da3-large" / "dpt" / "manifest.json"
    damage(path, path.read_text().replace(f'"{NANO}"', '"da3-large"').encode())
    prefetch_verb.prefetch(settings, engine_only=True)
    lines = capsys.readouterr().out.splitlines()
    assert all("checkpoint" not in line for line in lines)
    assert any(line.endswith("model.fp32.onnx") for line in lines)
    with pytest.raises(SettingError, match="--engine-only needs ENGINE_REPO"):
        prefetch_verb.prefetch(EngineSettings(model_id="da3-large"), engine_only=True)


class Upload(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that an upload uses; file uploads block until ``go_on`` is set."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here = f"http://127.0.0.1:{self.server.server_port}"
        if self.path.endswith("/validate-yaml"):
            content = {"errors": [], "warnings": []}
        elif self.path.endswith("/repos/create"):
            content = {"url": f"{here}/{REPO}", "name": REPO, "id": REPO}
        elif "/preupload/" in self.path:
            kind = {".onnx": "lfs", ".plan": "lfs"}
            files = [each["path"] for each in json.loads(body)["files"]]
            content = {"files": [
                {"path": path, "uploadMode": kind.get(Path(path).suffix, "regular"), "shouldIgnore": False}
                for path in files
            ]}  # fmt: skip
        elif self.path.endswith("/objects/batch"):
            content = {"objects": [
                {**each, "actions": {"upload": {"href": f"{here}/put/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]}  # fmt: skip
        else:
            assert "/commit/" in self.path
            self.server.commits.append([json.loads(line) for line in body.splitlines()])
            content = {
                "commitUrl": f"{here}/{REPO}/commit/{COMMIT}",
                "commitOid": COMMIT,
                "success": True,
            }
        self.respond(content)

    def do_GET(self):
        self.respond({"id": REPO, "sha": COMMIT, "siblings": []})

    def do_HEAD(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def do_PUT(self):
        self.server.begun.set()
        self.server.go_on.wait()
        self.rfile.read(int(self.headers["Content-Length"]))
        self.respond({})

    def respond(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_a_killed_upload_changes_nothing_and_the_next_one_is_complete(engine_copy):
    """The upload is one commit, and the commit comes last."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upload)
    server.commits, server.begun, server.go_on = [], threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    line = command("da3_export", "publish", "--repo", REPO, "--engine-dir", str(engine_copy.engine_dir))
    env = clean_env(
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_TOKEN="hf_x", HF_HUB_DISABLE_XET="1"
    )
    try:
        process = subprocess.Popen(line, cwd=ROOT, env=env, stderr=subprocess.PIPE)
        assert server.begun.wait(120)
        process.kill()
        process.wait()
        assert server.commits == []
        server.go_on.set()
        done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "\r" not in done.stderr
        (commit,) = server.commits
        sent = {entry["value"]["path"] for entry in commit if entry["key"] in ("file", "lfsFile")}
        assert {f"{NANO}/dpt/manifest.json", f"{NANO}/dpt/model.fp16.rtx.plan"} < sent
    finally:
        server.go_on.set()
        server.shutdown()


def test_an_unreachable_hub_is_skipped_with_a_warning(hub, load, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's retries
    hub.shutdown()
    hub.server_close()
    loaded = load()
    assert loaded.backend.name == "eager"
    assert any(
        "ENGINE_REPO was skipped" in warning and "cannot be reached" in warning
        for warning in loaded.warnings
    )


def test_a_hub_library_that_cannot_be_imported_is_skipped_with_a_warning(hub, load, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    loaded = load()
    assert loaded.backend.name == "eager"
    assert any("huggingface_hub cannot be imported" in warning for warning in loaded.warnings)


def test_a_full_cache_is_one_sentence_and_leaves_no_partial_file(hub, tmp_path):
    done = prefetch(tmp_path, hub, largest_file=10**6)
    assert done.code == 1
    assert "cannot be kept in the cache (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert prefetch(tmp_path, hub).code == 0
