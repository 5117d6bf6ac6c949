"""Requests of the HTTP server as RunPod jobs: queued, run by the service, results kept for a while."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from da3_runtime.api.response import JSON
from da3_runtime.errors import BusyError, UnknownJobError
from da3_runtime.serve.service import Service

# How long the result of /run stays available, as long as on RunPod, and how many bytes of results are
# kept at most; the oldest results go first.
KEEP_SECONDS = 30 * 60.0
KEEP_BYTES = 512 * 2**20


class Status(StrEnum):
    """RunPod's states of a job."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


@dataclass
class Job:
    """One request.

    Attributes
    ----------
    result : JSON | None
        Fields of the response, or ``error`` and ``status``; None until the job has ended.
    queued, started, ended : float | None
        Times in seconds of the monotonic clock; None until then.
    is_cancelled : bool
        Whether it was cancelled; it has no result then.
    """

    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    result: JSON | None = None
    queued: float = field(default_factory=time.monotonic)
    started: float | None = None
    ended: float | None = None
    is_cancelled: bool = False

    def start(self) -> None:
        """Note that the job has left the queue."""
        if self.started is None:
            self.started = time.monotonic()

    @property
    def status(self) -> Status:
        """State of the job."""
        if self.is_cancelled:
            return Status.CANCELLED
        if self.result is not None:
            return Status.FAILED if "error" in self.result else Status.COMPLETED
        return Status.IN_QUEUE if self.started is None else Status.IN_PROGRESS

    @property
    def http_status(self) -> int:
        """HTTP status of its response."""
        status = (self.result or {}).get("status", 200)
        assert isinstance(status, int)
        return status

    def envelope(self) -> JSON:
        """RunPod's response about the job: ``error`` on its own, all other fields in ``output``."""
        envelope: JSON = {"id": self.id, "status": self.status.value}
        if self.started is not None:
            envelope["delayTime"] = round((self.started - self.queued) * 1000)
        if self.ended is not None and self.started is not None:
            envelope["executionTime"] = round((self.ended - self.started) * 1000)
        if self.result is not None:
            rest = {name: value for name, value in self.result.items() if name != "refresh_worker"}
            if "error" in rest:
                envelope["error"] = rest.pop("error")
            envelope["output"] = rest
        return envelope

    @property
    def size(self) -> int:
        """Approximate size of its result, in bytes."""
        return sum(len(value) for value in (self.result or {}).values() if isinstance(value, str))


class Jobs:
    """The jobs of one server; used on its event loop only.

    Parameters
    ----------
    service : Service
        Runs the jobs; ``service.max_concurrency`` of them at once.
    count : Callable[[JSON], None]
        Called with the result of every job.
    max_bytes : int | None
        Largest response in bytes; None for no limit.
    """

    def __init__(
        self, service: Service, count: Callable[[JSON], None], max_bytes: int | None = None
    ) -> None:
        self._count = count
        self._max_bytes = max_bytes
        self._service = service
        self._limit = service.max_concurrency + service.settings.capacity.max_queued_jobs
        self._places = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._kept: dict[str, Job] = {}  # oldest first
        self._ended: Counter[Status] = Counter()

    @property
    def unfinished(self) -> int:
        """How many jobs wait, download or run."""
        return len(self._tasks)

    def require_place(self) -> None:
        """Raise :class:`BusyError` if the queue is full now."""
        if self._places >= self._limit:
            raise BusyError(
                f"The server is busy: {self._limit} requests wait or run already; try again later."
            )

    def start(self, data: object, keep: bool) -> tuple[Job, asyncio.Task[None]]:
        """Queue a job.

        A job takes a place in the queue, except while its image is downloaded: downloads have a bound of
        their own.

        Parameters
        ----------
        data : object
            The job's ``input``; the caller has checked the API key.
        keep : bool
            Whether :meth:`find` finds the job, until half an hour after it has ended.

        Returns
        -------
        tuple[Job, asyncio.Task[None]]
            The job, and the task that ends with it.

        Raises
        ------
        BusyError
            If all places are taken.
        """
        self.require_place()
        self._forget_old()
        job = Job()
        if keep:
            self._kept[job.id] = job
        task = asyncio.get_running_loop().create_task(self._run(job, data))
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job.id))
        self._places += 1
        return job, task

    def find(self, job_id: str) -> Job:
        """The kept job with this id; raises :class:`UnknownJobError`."""
        self._forget_old()
        try:
            return self._kept[job_id]
        except KeyError:
            raise UnknownJobError("Unknown job: its id is wrong, or its result has expired.") from None

    def cancel(self, job: Job) -> None:
        """Cancel a job that has not ended.

        A video ends after the window in hand. An image in the network runs on, but its result is
        dropped.
        """
        if job.id in self._tasks:
            self._tasks[job.id].cancel()
            job.is_cancelled = True
            job.ended = time.monotonic()

    def purge(self) -> int:
        """Cancel every kept job that waits in the queue; returns how many."""
        waiting = [job for job in self._kept.values() if job.status is Status.IN_QUEUE]
        for job in waiting:
            self.cancel(job)
        return len(waiting)

    def counts(self) -> dict[str, int]:
        """RunPod's counts of jobs: ended ones since the start, and those that wait or run."""
        waiting = self._service.stages["queue"].in_hand
        return {
            "completed": self._ended[Status.COMPLETED],
            "failed": self._ended[Status.FAILED],
            "inProgress": max(0, self.unfinished - waiting),
            "inQueue": waiting,
            "retried": 0,
        }

    async def close(self) -> None:
        """Wait for every job to end; videos fail."""
        self._service.stop_videos()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await asyncio.to_thread(self._service.close)

    async def _run(self, job: Job, data: object) -> None:
        try:
            result = await self._service.respond(
                data,
                job.id,
                is_authorized=True,
                max_bytes=self._max_bytes,
                on_start=job.start,
                while_downloading=self._without_place(),
            )
        finally:
            self._places -= 1
        job.start()
        job.ended = time.monotonic()
        job.result = result
        self._ended[job.status] += 1
        self._count(result)
        self._forget_old()

    @contextmanager
    def _without_place(self) -> Iterator[None]:
        self._places -= 1
        try:
            yield
        finally:
            self._places += 1

    def _forget_old(self) -> None:
        before = time.monotonic() - KEEP_SECONDS
        done = [job for job in self._kept.values() if job.ended is not None]
        room = KEEP_BYTES
        for job in reversed(done):
            room -= job.size
            if room < 0 or (job.ended is not None and job.ended < before):
                del self._kept[job.id]
