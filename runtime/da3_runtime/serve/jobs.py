"""Requests of the HTTP server as RunPod's jobs: queued, run by a few threads, kept for a while."""

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

# How long RunPod keeps the answer of /run, and how many bytes of answers are kept here at most.
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
    answer : JSON | None
        A response's fields, or ``error`` and ``status``; None until it is done.
    queued, started, ended : float
        Seconds of the monotonic clock.
    """

    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    answer: JSON | None = None
    queued: float = field(default_factory=time.monotonic)
    started: float | None = None
    ended: float | None = None

    @property
    def status(self) -> Status:
        """Where it stands."""
        if self.answer is not None:
            return Status.FAILED if "error" in self.answer else Status.COMPLETED
        return Status.IN_QUEUE if self.started is None else Status.IN_PROGRESS

    @property
    def http_status(self) -> int:
        """HTTP status of its answer."""
        status = (self.answer or {}).get("status", 200)
        assert isinstance(status, int)
        return status

    def envelope(self) -> JSON:
        """RunPod's answer about it: ``error`` apart, whatever else the handler said in ``output``."""
        told: JSON = {"id": self.id, "status": self.status.value}
        if self.started is not None:
            told["delayTime"] = round((self.started - self.queued) * 1000)
        if self.ended is not None and self.started is not None:
            told["executionTime"] = round((self.ended - self.started) * 1000)
        if self.answer is not None:
            rest = {name: value for name, value in self.answer.items() if name != "refresh_worker"}
            if "error" in rest:
                told["error"] = rest.pop("error")
            told["output"] = rest
        return told

    @property
    def size(self) -> int:
        """About how many bytes its answer takes."""
        return sum(len(value) for value in (self.answer or {}).values() if isinstance(value, str))


class Place:
    """A place in the queue."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self.taken = False

    def submit(self, data: object, keep: bool) -> tuple[Job, Future[None]]:
        """Put a job into the place.

        Parameters
        ----------
        data : object
            Its ``input``, whose key has been checked.
        keep : bool
            Whether :meth:`Jobs.find` is to find it, until half an hour after it ended.
        """
        job = Job()
        self.taken = True
        return job, self._jobs.start(job, data, keep)


class Jobs:
    """The jobs of one server.

    Parameters
    ----------
    service : Service
        Answers them, as many at once as ``MAX_CONCURRENCY`` says.
    count : Callable[[JSON], None]
        Told of every answer.
    max_bytes : int | None
        Largest answer.
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
        """How many wait or are worked on."""
        return self._unfinished

    @contextmanager
    def reserve(self) -> Iterator[Place]:
        """A place for one job, given back if the body puts none in it.

        Raises
        ------
        BusyError
            If too many wait already.
        """
        with self._lock:
            if self._unfinished >= self._limit:
                raise BusyError(
                    f"{self._limit} requests are waiting or worked on already; try again later."
                )
            self._unfinished += 1
        place = Place(self)
        try:
            yield place
        finally:
            if not place.taken:
                self._leave()

    def start(self, job: Job, data: object, keep: bool) -> Future[None]:
        """Queue a job that has a place; see :meth:`Place.submit`."""
        if keep:
            with self._lock:
                self._kept[job.id] = job
        return self._threads.submit(self._run, job, data)

    def find(self, job_id: str) -> Job | None:
        """The kept job of this id."""
        with self._lock:
            self._forget_old()
            return self._kept.get(job_id)

    def close(self) -> None:
        """Wait for every job to end."""
        self._threads.shutdown()

    def _run(self, job: Job, data: object) -> None:
        job.started = time.monotonic()
        try:
            answer = self._service.answer(data, job.id, is_authorized=True, max_bytes=self._max_bytes)
        finally:
            self._leave()
        job.ended = time.monotonic()
        job.answer = answer
        self._count(answer)
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
