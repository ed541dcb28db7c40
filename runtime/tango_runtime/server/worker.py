"""The one thread that uses the models: answers are written in turns, and streams are encoded between them."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Hashable
from contextlib import suppress
from time import monotonic

from tango_runtime.server.errors import ApiError

_log = logging.getLogger("tango_runtime.server")

#: Weight of the newest request in the mean time of a request.
_NEWEST = 0.2


class Job:
    """Work for the model.

    Args:
        work: Does the work step by step, on the worker's thread. It tells its results itself.
        failed: Called there with the error that ended it.
        key: Of work with the same key one is done at a time; None for any.
    """

    def __init__(
        self, work: Generator[None, None, None], failed: Callable[[Exception], None], key: Hashable = None
    ) -> None:
        self.work, self.failed, self.key = work, failed, key
        self.cancelled = threading.Event()
        self.arrived = monotonic()


class Worker:
    """A thread that does jobs: a step of each in turn.

    Args:
        waiting: Most jobs that wait.
        together: Most jobs that are done in turns.
        between: Called between steps; does a piece of other work, and says whether there was any.
    """

    def __init__(self, waiting: int, together: int, between: Callable[[], bool] = lambda: False) -> None:
        self._most, self._together, self._between = waiting, together, between
        self._waiting: deque[Job] = deque()
        self._active: deque[Job] = deque()
        self._news = threading.Condition()
        self._woken = self._closed = False
        self._mean = 1.0
        self._thread = threading.Thread(target=self._run, name="tango-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that are done at the moment."""
        return len(self._active)

    def submit(self, job: Job) -> None:
        """Puts a job behind those that wait.

        Raises:
            ApiError: Too many wait, or the worker was closed.
        """
        with self._news:
            if self._closed:
                raise ApiError(503, "the server is stopping; ask again", headers={"Retry-After": "5"})
            if len(self._waiting) >= self._most:
                seconds = max(1, math.ceil(self._mean * len(self._waiting) / 2))
                raise ApiError(
                    429, f"{len(self._waiting)} requests wait already; ask again", headers={"Retry-After": str(seconds)}
                )
            self._waiting.append(job)
            self._news.notify()

    def cancel(self, job: Job) -> None:
        """Ends a job after its present step, or before its first."""
        job.cancelled.set()
        with self._news, suppress(ValueError):
            self._waiting.remove(job)

    def wake(self) -> None:
        """Has the other work looked for; from any thread."""
        with self._news:
            self._woken = True
            self._news.notify()

    def close(self) -> None:
        """Rejects further jobs, does the rest, and ends the thread."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._news:
                while not (self._active or self._waiting or self._woken or self._closed):
                    self._news.wait()
                if self._closed and not (self._active or self._waiting):
                    return
                self._woken = False
                self._admit()
            if self._active:
                job = self._active[0]
                if self._step(job):
                    self._active.rotate(-1)
                else:
                    self._active.popleft()
                    self._mean += _NEWEST * (monotonic() - job.arrived - self._mean)
            self._do_between()

    def _do_between(self) -> None:
        try:
            if self._between():
                self.wake()
        except Exception:
            _log.exception("a stream failed")

    def _admit(self) -> None:
        """Takes up the first of the jobs that wait whose key is free, as many as are done together."""
        for job in list(self._waiting):
            if len(self._active) >= self._together:
                return
            if job.key is None or all(job.key != other.key for other in self._active):
                self._waiting.remove(job)
                self._active.append(job)

    def _step(self, job: Job) -> bool:
        """A step of a job; whether it goes on."""
        try:
            if job.cancelled.is_set():
                job.work.close()
                return False
            next(job.work)
        except StopIteration:
            return False
        except Exception as error:
            with suppress(RuntimeError):  # the event loop that would hear of it is closed
                job.failed(error)
            return False
        return True
