"""Batches on real Ray clusters on 127.0.0.1: a lost node, a killed driver, an engine that is missing.

``make batch`` runs them, the first test with BATCH photos (10,000).
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from tests.support.batches import SMALLEST, lines_of, members_of, photo, write_tar
from tests.support.paths import ROOT
from tests.support.processes import clean_env, run_module

PHOTOS = int(os.environ.get("BATCH") or 0)
pytestmark = pytest.mark.skipif(not PHOTOS, reason="starts Ray and takes minutes: make batch")
PER_TAR = max(80, PHOTOS // 20)
# Lets Ray connect to 127.0.0.1 itself, not to this machine's outer address.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
DEADLINE = 120 + PHOTOS / 10  # seconds


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes; a test may kill the second."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 256 * 2**20}
    started = Cluster(initialize_head=True, head_node_args=node)
    yield started, started.add_node(**node)
    started.shutdown()


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    for shard, first in enumerate(range(0, PHOTOS, PER_TAR)):
        indices = range(first, min(first + PER_TAR, PHOTOS))
        write_tar(folder / f"{shard:05d}.tar", [(f"{index:06d}.jpg", photo(index)) for index in indices])
    return folder


def start(engine, source, destination, *options):
    """A batch in a process of its own."""
    line = [sys.executable, "-m", "da3_runtime", "batch", str(source), str(destination), *SMALLEST]
    return subprocess.Popen(
        [*line, "--engine-dir", str(engine.engine_dir), *options],
        cwd=ROOT,
        env=clean_env(**LOOPBACK),
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_the_middle(process, out):
    """Until a third of the photos is written, in pieces or in tars."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end and process.poll() is None:
        written = 0
        with contextlib.suppress(FileNotFoundError):  # pieces of a shard that was just joined
            for path in out.glob("manifest/*.jsonl"):
                written += len(path.read_text().splitlines())
            for path in out.glob("_pieces/*/*.parquet"):
                written += pq.ParquetFile(path).metadata.num_rows
        if written >= PHOTOS / 3:
            assert written < PHOTOS
            return
        time.sleep(0.05)
    raise AssertionError("the batch ended, or wrote too few photos")


def assert_complete(out):
    """Each photo once, and nothing that is half written."""
    found = {}
    for path in sorted((out / "manifest").iterdir()):
        records = lines_of(path)
        members = members_of(out / "depth_png16" / f"{path.stem}.tar")
        assert [f"{path.stem}/{name.removesuffix('.png')}" for name in members] == list(records)
        assert all(
            data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82") for data in members.values()
        )
        assert not any("error" in record for record in records.values())
        found |= {name.partition("/")[2]: path.stem for name in records}
    assert sorted(found) == [f"{index:06d}" for index in range(PHOTOS)]
    assert {path.name for path in out.iterdir()} == {"depth_png16", "manifest", "run.json"}


def test_a_lost_node_costs_no_photo(cluster, tars, tmp_path, engine):
    nodes, second = cluster
    out = tmp_path / "out"
    batch = start(engine, tars / "*.tar", out, "--ray", nodes.address)
    wait_for_the_middle(batch, out)
    nodes.remove_node(second, allow_graceful=False)
    _, text = batch.communicate(timeout=DEADLINE)
    assert batch.returncode == 0, text
    assert f"{PHOTOS} photos" in text
    assert_complete(out)


def test_an_engine_that_is_missing_ends_the_batch_in_one_sentence(cluster, tars, tmp_path):
    nodes, _ = cluster
    done = run_module(
        "da3_runtime",
        "batch",
        str(tars / "*.tar"),
        str(tmp_path / "out"),
        *SMALLEST,
        "--ray",
        nodes.address,
        **LOOPBACK,
    )
    assert done.code == 2
    assert done.stderr.startswith("error: No backend can run da3-nano") and done.stderr.count("\n") == 1
    gone = run_module(
        "da3_runtime",
        "batch",
        str(tars / "*.tar"),
        str(tmp_path / "out"),
        *SMALLEST,
        "--ray",
        "127.0.0.1:1",
        **LOOPBACK,
    )
    assert gone.code == 2
    assert gone.stderr.startswith("error: --ray 127.0.0.1:1: ") and gone.stderr.count("\n") == 1


def test_another_run_goes_on_here_after_the_process_on_a_cluster_was_killed(
    cluster, tars, tmp_path, engine
):
    nodes, _ = cluster
    out = tmp_path / "out"
    batch = start(engine, tars / "*.tar", out, "--ray", nodes.address)
    wait_for_the_middle(batch, out)
    batch.send_signal(signal.SIGKILL)
    batch.wait()
    again = start(engine, tars / "*.tar", out)
    _, text = again.communicate(timeout=DEADLINE)
    assert again.returncode == 0, text
    assert f"{PHOTOS} photos" not in text
    assert_complete(out)
