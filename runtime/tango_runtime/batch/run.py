"""A batch from its questions to its file: what is missing, in which order, and where it goes."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tango_plugins import TangoError
from tango_runtime.batch.answers import Answered, AnswerFile, ErrorFile, Trial
from tango_runtime.batch.questions import AskedVideo, Failure, Id
from tango_runtime.batch.ray_pool import Pool
from tango_runtime.batch.worker import Outcome, Task, Worker
from tango_runtime.util.console import OnProgress


class Usage:
    """How much of the time models work.

    Attributes:
        busy: Seconds that they worked, added up.
        ready: Seconds that they could have worked, added up; None for one model that is ready since the beginning.
    """

    def __init__(self) -> None:
        self.busy = 0.0
        self.ready: float | None = None
        self.restart()

    def restart(self) -> None:
        """Lets the time begin now."""
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._begin

    @property
    def share(self) -> float:
        """Share of the time that the models worked, from 0 to 1."""
        return min(self.busy / max(self.seconds if self.ready is None else self.ready, 1e-9), 1.0)


def missing(videos: Iterable[AskedVideo], trials: Sequence[Trial], answers: AnswerFile) -> list[Task]:
    """What is still to be answered, in the order in which it should be.

    The largest files come first, so videos of like length stand side by side, and the last ones to be decoded are the
    shortest. A file's size stands for its length: to know that of a million clips, each would have to be opened.
    """
    tasks = []
    for video in videos:
        asked = [(trial, tuple(q for q in video.questions if not answers.has(q.id, trial))) for trial in trials]
        if left := tuple((trial, questions) for trial, questions in asked if questions):
            tasks.append(Task(video, left))
    return sorted(tasks, key=lambda task: -_size(task.video.path))


def answer_here(worker: Worker, tasks: Iterable[Task], usage: Usage) -> Iterator[Outcome]:
    """Answers in this process."""
    for task in tasks:
        worker.add(task)
        while len(worker) >= worker.depth:
            yield from _next(worker, usage)
    while len(worker):
        yield from _next(worker, usage)


def answer_on_ray(pool: Pool[Task, Outcome], tasks: Sequence[Task], usage: Usage) -> Iterator[Outcome]:
    """Answers on the nodes of a cluster; a video's answers come together."""
    for done in pool.run(tasks):
        usage.busy, usage.ready = pool.busy, pool.ready
        yield from _lost(done.item) if done.results is None else done.results


def write(
    outcomes: Iterable[Outcome],
    tasks: Iterable[Task],
    answers: AnswerFile,
    errors: ErrorFile,
    on_progress: OnProgress,
) -> None:
    """Writes what comes of tasks, as it comes; ``on_progress`` gets the number of answers given or given up since."""
    asked: Counter[Id | None] = Counter(
        question.id for task in tasks for _, questions in task.asked for question in questions
    )
    for outcome in outcomes:
        if isinstance(outcome, Answered):
            answers.append(outcome)
            on_progress(1)
        else:
            errors.append(outcome)
            # Without a bundle it is the video that failed, and with it the question in every trial.
            on_progress(1 if outcome.bundle else asked[outcome.id])


def _lost(task: Task) -> list[Failure]:
    error = TangoError(f"the workers that had {task.video.path} died", "look for what ended them: dmesg, ray status")
    return task.failures(error)


def _next(worker: Worker, usage: Usage) -> Iterator[Outcome]:
    for outcome in worker.answer_next():
        usage.busy = worker.busy
        yield outcome


def _size(path: Path) -> int:
    """Bytes of a video file, or of the images of a folder; 0 of what cannot be read."""
    try:
        if path.is_dir():
            return sum(entry.stat().st_size for entry in os.scandir(path))
        return path.stat().st_size
    except OSError:
        return 0
