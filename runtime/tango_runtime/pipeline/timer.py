"""How long the stages of an answer take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tango_runtime.backends.base import Backend, TimingEvent


class StageTimer:
    """Measures stages between events of a backend, so that none of them has to wait until its work is done.

    Attributes:
        stages: Milliseconds of each stage that has been read.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._events: dict[str, tuple[TimingEvent, TimingEvent]] = {}
        self.stages: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Measures a stage by the backend's events."""
        begin = self._backend.record_event()
        yield
        self._events[stage] = begin, self._backend.record_event()

    @contextmanager
    def measure_on_host(self, stage: str) -> Iterator[None]:
        """Adds the time of a block to a stage, by the host's clock."""
        begin = time.perf_counter()
        yield
        self.stages[stage] = self.stages.get(stage, 0.0) + 1e3 * (time.perf_counter() - begin)

    def read(self) -> dict[str, float]:
        """All stages so far; waits for the last event."""
        self.stages |= {stage: end.elapsed_ms(begin) for stage, (begin, end) in self._events.items()}
        self._events.clear()
        return self.stages
