"""Work on strips, on several cores."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from da3_runtime.util import parallel
from da3_runtime.util.parallel import on_cores, strips


@pytest.fixture(params=[1, 2, 4])
def threads(request, monkeypatch):
    monkeypatch.setattr(parallel, "_thread_count", lambda: request.param)
    return request.param


@pytest.mark.parametrize(("height", "rows"), [(1, 1), (10, 3), (10, 10), (10, 99), (9, 3)])
def test_strips_cover_every_row_once(height, rows):
    parts = strips(height, rows)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(height))
    assert all(part.stop - part.start == rows for part in parts[:-1])


def test_works_on_every_part_once(threads):
    seen = []
    on_cores(lambda part: seen.append(part.start), strips(1000, 3))
    assert sorted(seen) == list(range(0, 1000, 3))


def test_several_threads_work_at_the_same_time(threads):
    together = threading.Barrier(threads, timeout=20)
    on_cores(lambda part: together.wait(), strips(threads, 1))


@pytest.mark.parametrize("wrong", [0, 57, 99])
def test_raises_what_any_part_raises(threads, wrong):
    def work(part):
        if part.start == wrong:
            raise ValueError("row")

    with pytest.raises(ValueError, match="row"):
        on_cores(work, strips(100, 1))
    on_cores(lambda part: None, strips(100, 1))


def test_concurrent_callers_each_get_all_their_parts_done(threads):
    totals = [[] for _ in range(8)]
    with ThreadPoolExecutor(8) as callers:
        list(callers.map(lambda total: on_cores(total.append, strips(500, 1)), totals))
    assert [len(total) for total in totals] == [500] * 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_works_in_a_forked_process():
    code = (
        "import os\n"
        "from da3_runtime.util import parallel\n"
        "parallel._thread_count = lambda: 2\n"
        "work = lambda: parallel.on_cores(lambda part: None, parallel.strips(9, 1))\n"
        "work()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    work()\n"
        "    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "7", done.stderr


def test_runs_where_the_system_has_no_call_for_affinity():
    """As on macOS and Windows."""
    code = (
        "import os\n"
        "for name in ('sched_getaffinity', 'register_at_fork'):\n"
        "    if hasattr(os, name):\n"
        "        delattr(os, name)\n"
        "os.cpu_count = lambda: 3\n"
        "from da3_runtime.util import parallel\n"
        "seen = []\n"
        "parallel.on_cores(seen.append, parallel.strips(9, 1))\n"
        "print(parallel._thread_count(), len(seen))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["3", "9"], done.stderr
