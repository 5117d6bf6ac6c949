"""The queue of the HTTP server: slots, and how long results are kept."""

from types import SimpleNamespace

import pytest

from da3_runtime.errors import BusyError
from da3_runtime.serve import jobs as jobs_module
from da3_runtime.serve.jobs import Jobs
from da3_runtime.settings import Settings

RESULT = {"image_base64": "x" * 10}


@pytest.fixture
def jobs():
    service = SimpleNamespace(
        settings=Settings.of(max_concurrency=1, max_queued_jobs=1),
        answer=lambda data, job_id, **_: RESULT,
    )
    made = Jobs(service, lambda result: None)
    yield made
    made.close()


def run(jobs, keep=True):
    """A finished job."""
    with jobs.reserve() as slot:
        job, future = slot.submit({}, keep)
    future.result(10)
    return job


def test_the_oldest_results_are_dropped_when_they_exceed_the_byte_limit(jobs, monkeypatch):
    monkeypatch.setattr(jobs_module, "KEEP_BYTES", 25)
    first, second, third = (run(jobs) for _ in range(3))
    assert [jobs.find(each.id) for each in (first, second, third)] == [None, second, third]


def test_results_expire(jobs, monkeypatch):
    job = run(jobs)
    assert jobs.find(job.id) is job
    monkeypatch.setattr(jobs_module, "KEEP_SECONDS", -1.0)
    assert jobs.find(job.id) is None


def test_the_result_of_runsync_is_not_kept(jobs):
    assert jobs.find(run(jobs, keep=False).id) is None


def test_an_unused_slot_is_free_again_and_a_full_queue_is_busy(jobs):
    for _ in range(3):
        with jobs.reserve():
            pass
    with jobs.reserve(), jobs.reserve(), pytest.raises(BusyError, match="2 requests wait or run"):
        jobs.reserve().__enter__()
    assert jobs.unfinished == 0
