"""The queue of the HTTP server: slots, and how long results are kept."""

import asyncio

import pytest

from da3_runtime.errors import BusyError, UnknownJobError
from da3_runtime.serve import jobs as jobs_module
from da3_runtime.serve.jobs import Jobs
from da3_runtime.settings import Settings

RESULT = {"image_base64": "x" * 10}


class Service:
    """A stand-in whose jobs end when ``may_end`` is set."""

    max_concurrency = 1
    settings = Settings.of(max_queued_jobs=1)

    def __init__(self):
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def respond(self, data, job_id, *, while_downloading, **_):
        if data == "a URL":
            with while_downloading:
                await self.may_end.wait()
        await self.may_end.wait()
        return RESULT


@pytest.fixture
def jobs():
    return Jobs(Service(), lambda result: None)


async def finished(jobs, keep=True):
    job, task = jobs.start({}, keep)
    await task
    return job


def run(jobs, keep=True):
    """A finished job."""
    return asyncio.run(finished(jobs, keep))


def found(jobs, job):
    try:
        return jobs.find(job.id)
    except UnknownJobError:
        return None


def test_the_oldest_results_are_dropped_when_they_exceed_the_byte_limit(jobs, monkeypatch):
    monkeypatch.setattr(jobs_module, "KEEP_BYTES", 25)
    first, second, third = (run(jobs) for _ in range(3))
    assert [found(jobs, each) for each in (first, second, third)] == [None, second, third]


def test_results_expire(jobs, monkeypatch):
    job = run(jobs)
    assert found(jobs, job) is job
    monkeypatch.setattr(jobs_module, "KEEP_SECONDS", -1.0)
    assert found(jobs, job) is None


def test_the_result_of_runsync_is_not_kept(jobs):
    assert found(jobs, run(jobs, keep=False)) is None


def test_a_full_queue_is_busy_and_a_finished_job_leaves_its_place(jobs):
    async def check():
        jobs._service.may_end.clear()
        tasks = [jobs.start({}, keep=False)[1] for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests wait or run"):
            jobs.start({}, keep=False)
        jobs._service.may_end.set()
        await asyncio.gather(*tasks)
        assert jobs.unfinished == 0
        await finished(jobs)

    asyncio.run(check())


def test_a_job_takes_no_place_while_its_image_is_downloaded(jobs):
    async def check():
        jobs._service.may_end.clear()
        downloads = []
        for _ in range(5):
            downloads.append(jobs.start("a URL", keep=False)[1])
            await asyncio.sleep(0)
        waiting = [jobs.start({}, keep=False)[1] for _ in range(2)]
        with pytest.raises(BusyError):
            jobs.require_place()
        assert jobs.unfinished == 7
        jobs._service.may_end.set()
        await asyncio.gather(*downloads, *waiting)
        jobs.require_place()

    asyncio.run(check())
