"""Requests of the HTTP server as RunPod jobs: queued, run by a few threads, results kept for a while."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from da3_runtime.api.response import JSON
from da3_runtime.errors import BusyError
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


@dataclass
class Job:
    """One request.

    Attributes
    ----------
    result : JSON | None
        Fields of the response, or ``error`` and ``status``; None until the job has ended.
    queued, started, ended : float | None
        Times in seconds of the monotonic clock; None until then.
    """

    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    result: JSON | None = None
    queued: float = field(default_factory=time.monotonic)
    started: float | None = None
    ended: float | None = None

    @property
    def status(self) -> Status:
        """State of the job."""
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


class QueueSlot:
    """Room for one job in the queue."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self.is_used = False

    def submit(self, data: object, keep: bool) -> tuple[Job, Future[None]]:
        """Start a job in this slot.

        Parameters
        ----------
        data : object
            The job's ``input``; the caller has checked the API key.
        keep : bool
            Whether :meth:`Jobs.find` finds the job, until half an hour after it has ended.

        Returns
        -------
        tuple[Job, Future[None]]
            The job, and a future that is done when the job has ended.
        """
        job = Job()
        self.is_used = True
        return job, self._jobs.start(job, data, keep)


class Jobs:
    """The jobs of one server.

    Parameters
    ----------
    service : Service
        Runs the jobs; ``MAX_CONCURRENCY`` of them at once.
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
        capacity = service.settings.capacity
        self._limit = capacity.max_concurrency + capacity.max_queued_jobs
        self._threads = ThreadPoolExecutor(capacity.max_concurrency, "job")
        self._lock = threading.Lock()
        self._unfinished = 0
        self._kept: dict[str, Job] = {}  # oldest first

    @property
    def unfinished(self) -> int:
        """How many jobs wait or run."""
        return self._unfinished

    @contextmanager
    def reserve(self) -> Iterator[QueueSlot]:
        """Reserve a queue slot for one job; an unused slot is free again after the body.

        Raises
        ------
        BusyError
            If all slots are in use.
        """
        with self._lock:
            if self._unfinished >= self._limit:
                raise BusyError(
                    f"The server is busy: {self._limit} requests wait or run already; try again later."
                )
            self._unfinished += 1
        slot = QueueSlot(self)
        try:
            yield slot
        finally:
            if not slot.is_used:
                self._leave()

    def start(self, job: Job, data: object, keep: bool) -> Future[None]:
        """Queue a job that has a slot; see :meth:`QueueSlot.submit`."""
        if keep:
            with self._lock:
                self._kept[job.id] = job
        return self._threads.submit(self._run, job, data)

    def find(self, job_id: str) -> Job | None:
        """The kept job with this id, or None."""
        with self._lock:
            self._forget_old()
            return self._kept.get(job_id)

    def close(self) -> None:
        """Wait for every job to end."""
        self._threads.shutdown()

    def _run(self, job: Job, data: object) -> None:
        job.started = time.monotonic()
        try:
            result = self._service.answer(data, job.id, is_authorized=True, max_bytes=self._max_bytes)
        finally:
            self._leave()
        job.ended = time.monotonic()
        job.result = result
        self._count(result)
        with self._lock:
            self._forget_old()

    def _leave(self) -> None:
        with self._lock:
            self._unfinished -= 1

    def _forget_old(self) -> None:
        before = time.monotonic() - KEEP_SECONDS
        done = [job for job in self._kept.values() if job.ended is not None]
        room = KEEP_BYTES
        for job in reversed(done):
            room -= job.size
            if room < 0 or (job.ended is not None and job.ended < before):
                del self._kept[job.id]
