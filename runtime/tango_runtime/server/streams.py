"""Streams that are open: each is encoded as its frames come, in turns with the others."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from tango_plugins import TangoError
from tango_runtime.pipeline.feed import CameraFeed
from tango_runtime.pipeline.live import LiveVideo
from tango_runtime.pipeline.video_llm import VideoLLM
from tango_runtime.server.errors import ApiError
from tango_runtime.server.metrics import Metrics
from tango_runtime.server.pushed import PushedFrames
from tango_runtime.video import TimedFrame, open_source

#: Most frames of a stream that are encoded before the next has its turn. The same for all, so that one of many frames
#: a second takes no more than its share when there is too much to do: it gives up its own.
_TURN = 4

#: Weight of the newest frames in the mean time of a frame.
_NEWEST = 0.2


class Stream:
    """An open stream.

    Attributes:
        name: Its id.
        model: Name of the bundle that reads it.
        live: The stream itself; for the worker's thread.
        fps: Frames a second that it has at most.
        frame_seconds: What encoding a frame took in the mean; 0 before the first.
        source: What its client named, without secrets.
        pushed: Where its client puts frames; None for a stream with a source of its own.
        in_use: Whether an answer about it is written, which must not lose its session.
        error: What ended it, empty while it goes on.
    """

    def __init__(self, name: str, model: str, live: LiveVideo, fps: float, metrics: Metrics) -> None:
        self.name, self.model, self.live, self.fps, self.error = name, model, live, fps, ""
        self.frame_seconds, self.source = 0.0, ""
        self.pushed: PushedFrames | None = None
        self.in_use = False
        self._metrics = metrics
        self._encoded, self._dropped, self._ended = 0, 0, False

    @property
    def over(self) -> bool:
        """Whether no frame will come any more."""
        return bool(self.error) or self.live.feed.over

    @property
    def waits(self) -> bool:
        """Whether frames wait to be encoded, or the end, which may be an error, to be noticed."""
        feed = self.live.feed
        if self.error or not isinstance(feed, CameraFeed):
            return False
        return feed.waiting > 0 or (feed.over and not self._ended)

    @property
    def lag(self) -> float:
        """Seconds that its oldest frame has waited to be encoded."""
        feed = self.live.feed
        return feed.lag if isinstance(feed, CameraFeed) and not self.error else 0.0

    @property
    def load(self) -> float:
        """The share of the model's time that its frames take; nothing once it is over."""
        return 0.0 if self.over else self.fps * self.frame_seconds

    def take_in(self, wait: float, most: int | None = None) -> None:
        """Encodes what came, or the oldest so many frames of it; an error of the source ends the stream."""
        began = monotonic()
        try:
            self.live.take_in(wait, most)
        except TangoError as error:
            self.error = f"{error.message}; {error.hint}"
        except Exception as error:  # whatever a camera raises
            self.error = f"the source failed: {type(error).__name__}"
        window, feed = self.live.window, self.live.feed
        self._ended = feed.over
        if count := window.encoded - self._encoded:
            now = (monotonic() - began) / count
            self.frame_seconds += (_NEWEST if self.frame_seconds else 1.0) * (now - self.frame_seconds)
        self._metrics.add("tango:stream_frames_encoded_total", count)
        self._metrics.add("tango:stream_frames_dropped_total", feed.dropped - self._dropped)
        self._encoded, self._dropped = window.encoded, feed.dropped

    def describe(self) -> dict[str, Any]:
        """What a client learns of it."""
        window, newest = self.live.window, self.live.window.newest
        return {
            "id": self.name,
            "object": "stream",
            "model": self.model,
            "source": self.source,
            "state": "failed" if self.error else "over" if self.over else "open",
            "error": self.error or None,
            "frames_encoded": window.encoded,
            "frames_dropped": self.live.feed.dropped,
            "frames_in_window": window.held,
            "gaps": window.gaps,
            "seconds": None if newest is None else newest.seconds,
            "lag_seconds": round(self.lag, 3),
            "load": round(self.load, 4),
        }


class Streams:
    """All open streams.

    Args:
        most: How many there may be.
        metrics: Counts.
    """

    def __init__(self, most: int, metrics: Metrics) -> None:
        self._most, self._metrics = most, metrics
        self._open: dict[str, Stream] = {}
        self._lock = threading.Lock()
        self._last = ""
        self._discarded: deque[str] = deque()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._open.values()))

    @property
    def load(self) -> float:
        """The share of the model's time that all streams' frames take; above 1, some frames are given up."""
        return sum(stream.load for stream in self)

    @property
    def lag(self) -> float:
        """The longest that a frame has waited to be encoded, in seconds."""
        return max((stream.lag for stream in self), default=0.0)

    def add(self, model: str, fps: float, open_live: Callable[[], LiveVideo]) -> Stream:
        """Opens a stream; on the worker's thread. Where all places are taken, one that is over makes room.

        Raises:
            ApiError: There are too many.
            TangoError: The source cannot be read.
        """
        ended = next((stream for stream in self if stream.over and not stream.in_use), None)
        if len(self._open) >= self._most and ended is not None:
            self.remove(ended.name)
        if len(self._open) >= self._most:
            raise ApiError(429, f"{self._most} streams are open; close one", headers={"Retry-After": "60"})
        stream = Stream(f"stream:{secrets.token_hex(8)}", model, open_live(), fps, self._metrics)
        with self._lock:
            self._open[stream.name] = stream
        return stream

    def get(self, name: str) -> Stream:
        """The stream of an id.

        Raises:
            ApiError: There is none.
        """
        if name not in self._open:
            raise ApiError(404, f"there is no stream {name[:60]!r}", "url")
        return self._open[name]

    def remove(self, name: str) -> None:
        """Forgets a stream, and closes it; on the worker's thread."""
        stream = self.get(name)
        with self._lock:
            del self._open[name]
        stream.live.close()
        stream.error = stream.error or "the stream was closed"  # who waits for its frames waits no more

    def discard(self, name: str) -> None:
        """Has a stream removed at the next turn; from any thread."""
        self._discarded.append(name)

    def turn(self) -> bool:
        """Encodes some frames of the next stream that has any; whether there was one. On the worker's thread."""
        while self._discarded:
            if (name := self._discarded.popleft()) in self._open:
                self.remove(name)
        with self._lock:
            names = sorted(self._open)
        behind = [name for name in names if name > self._last] + [name for name in names if name <= self._last]
        for name in behind:
            stream = self._open.get(name)
            if stream is not None and stream.waits:
                self._last = name
                stream.take_in(0, _TURN)
                return True
        return False

    def close(self) -> None:
        """Closes all; on the worker's thread, or after its end."""
        for stream in self:
            self.remove(stream.name)


def played(path: Path, fps: float) -> Iterator[TimedFrame]:
    """A recording as if it happened now: its frames come at their times."""
    source = open_source(path)
    began = monotonic()
    for seconds, frame in source.read(source.sample_at(fps)):
        sleep(max(0.0, began + seconds - monotonic()))
        yield seconds, frame


def open_live(
    llm: VideoLLM, source: Any, *, window: int | None, fps: float, ratio: float | None, wake: Callable[[], None]
) -> LiveVideo:
    """A stream of a model; raises what :meth:`VideoLLM.live` does."""
    return llm.live(source, window=window, fps=fps, retention_ratio=ratio, on_arrival=wake)
