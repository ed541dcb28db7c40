"""The newest frames of a stream as the vision graph gave them: each is encoded once, whatever is asked."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_runtime.backends.base import Backend
from tango_runtime.bundle import Manifest
from tango_runtime.pipeline.encoded import EncodedClip, host_frames
from tango_runtime.pipeline.feed import Arrival
from tango_runtime.util.numbers import is_integer
from tango_runtime.video import Clock
from tango_runtime.video.shape import ClipShape, choose_size
from tango_runtime.video.source import duration_of

_log = logging.getLogger("tango_runtime.live")

#: A pause is longer than this many times the usual interval before it.
_PAUSE = 3


class FrameWindow:
    """The newest frames of a stream, encoded.

    Frames go through the vision graph in whole steps, so where a step is a pair the newest frame may wait for the next.
    The window begins anew where what it holds does not belong to what comes: after a pause as long as itself, where the
    clock steps back, and where frames become of another size for the vision graph.

    Args:
        backend: Encodes the frames.
        manifest: The bundle's.
        frames: Frames of the window.
        fps: Frames a second that come at most.
        settle: Called before the backend's shared tensors are overwritten.
        frame_size: The caller's own (height, width).
        max_pixels: The caller's own most pixels of a frame.

    Attributes:
        elapsed: Seconds of the stream so far; a clock that steps back adds nothing.
        encoded: Frames that were encoded so far.
        gaps: Pauses and steps of the clock so far.
        newest: The newest frame that was encoded; None before the first.

    Raises:
        TangoError: The window is no whole number of steps, or the sizes do not suit the bundle.
    """

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        frames: int,
        fps: float,
        settle: Callable[[], None],
        frame_size: tuple[int, int] | None = None,
        max_pixels: int | None = None,
    ) -> None:
        step = manifest.video.frames_per_step
        if not is_integer(frames) or frames < 1 or frames % step:
            raise TangoError(f"the window has {frames!r} frames", f"take a positive multiple of {step}")
        self._backend, self._manifest, self._settle = backend, manifest, settle
        self._frames, self._fps, self._sizes = frames, fps, (frame_size, max_pixels)
        self._ring = backend.new_ring(frames // step)
        self._waiting: list[Arrival] = []  # frames of a step that is not whole
        self._pixels: deque[NDArray[np.uint8]] = deque(maxlen=frames)
        self._arrivals: deque[tuple[float, float]] = deque(maxlen=frames)  # seconds, and width over height
        self._source: tuple[int, int] | None = None  # size of the stream's frames
        self._size: tuple[int, int] | None = None  # what they become
        self._before: float | None = None
        self._usual: float | None = None  # seconds between two frames
        self.elapsed, self.encoded, self.gaps = 0.0, 0, 0
        self.newest: Arrival | None = None

    @property
    def held(self) -> int:
        """Frames in the window."""
        return len(self._arrivals)

    @property
    def full(self) -> bool:
        """Whether the window has all its frames."""
        return self.held == self._frames

    @property
    def span(self) -> tuple[float, float]:
        """Seconds of the first and of the last frame, on the stream's clock."""
        return self._arrivals[0][0], self._arrivals[-1][0]

    def add(self, arrivals: Sequence[Arrival]) -> None:
        """Encodes frames, in order, in as few passes as there are breaks among them.

        Raises:
            TangoError: The backend failed, or a frame is not one.
        """
        for arrival in arrivals:
            self._follow_clock(arrival.seconds)
            self._follow_size(arrival.frame.shape[0], arrival.frame.shape[1])
            self._waiting.append(arrival)
        self._encode()

    def clip(self) -> EncodedClip:
        """The window as a session takes it.

        Raises:
            TangoError: No step is whole yet.
        """
        if not self.held:
            raise TangoError("the stream has no whole step of frames yet", "ask when frames have come")
        assert self._size is not None
        shape = ClipShape.of(self._manifest, self.held, self._size)
        features, salience = self._ring.newest(shape.steps)
        times = np.array([seconds for seconds, _ in self._arrivals])
        since_first, pixels = times - times[0], list(self._pixels)
        clock = Clock(since_first, duration_of(since_first))
        aspect = self._arrivals[0][1]
        seconds = since_first.astype(np.float32)
        return EncodedClip(shape, clock, seconds, aspect, features, salience, lambda: np.stack(pixels))

    def _follow_clock(self, seconds: float) -> None:
        """Notes a pause before a frame, or a clock that steps back."""
        before, self._before = self._before, seconds
        if before is None:
            return
        pause = seconds - before
        if pause <= 0:
            self._note(f"its clock stepped back from {before:.1f} to {seconds:.1f} s; the window begins anew")
            self._begin_anew()
            self._usual = None
            return
        self.elapsed += pause
        usual = max(1 / self._fps, self._usual or 0.0)
        whole = pause > max(self._frames, _PAUSE) * usual
        if whole or (self._usual is not None and pause > _PAUSE * usual):
            self._note(
                f"it paused from {before:.1f} to {seconds:.1f} s" + ("; the window begins anew" if whole else "")
            )
            if whole:
                self._begin_anew()
        else:
            self._usual = pause

    def _follow_size(self, height: int, width: int) -> None:
        """Notes that the stream's frames have another size."""
        if (height, width) == self._source:
            return
        frame_size, max_pixels = self._sizes
        found = (height, width) if self._manifest.video.budget else None
        size = choose_size(
            self._manifest.video,
            self._frames,
            found,
            asked=frame_size,
            max_pixels=max_pixels,
            fixed=self._backend.frame_size,
        )
        anew = self._size not in (None, size)
        if self._source is not None:
            before, end = "x".join(map(str, self._source)), "; the window begins anew" if anew else ""
            _log.warning("the stream: its frames are %dx%d in place of %s%s", height, width, before, end)
        if anew:
            self._begin_anew()
        self._source, self._size = (height, width), size

    def _note(self, what: str) -> None:
        self.gaps += 1
        _log.warning("the stream: %s", what)

    def _begin_anew(self) -> None:
        self._waiting.clear()
        self._ring.clear()
        self._pixels.clear()
        self._arrivals.clear()

    def _encode(self) -> None:
        """Encodes the whole steps of what waits."""
        step = self._manifest.video.frames_per_step
        count = len(self._waiting) // step * step
        if not count:
            return
        assert self._size is not None
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        self._settle()
        shape = ClipShape.of(self._manifest, count, self._size)
        batch = self._backend.load_frames(((a.seconds, a.frame) for a in ready), count, self._size)
        self._ring.append(*self._backend.vision(shape.as_steps(batch.frames), lambda steps: None))
        self._pixels.extend(np.array(frame) for frame in host_frames(self._backend, batch.frames))  # theirs is shared
        self._arrivals.extend((a.seconds, a.frame.shape[1] / a.frame.shape[0]) for a in ready)
        self.encoded, self.newest = self.encoded + count, ready[-1]
