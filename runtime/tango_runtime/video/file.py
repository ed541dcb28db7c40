"""Video files: their timeline first, then only what the chosen frames depend on is decoded."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from tango_runtime.video.container import EXACT, check_file, decode, demux, open_video
from tango_runtime.video.rgb import shown_size, to_rgb
from tango_runtime.video.source import Rounding, Sampled, Sampling, TimedFrame, choose, duration_of
from tango_runtime.video.timeline import Key, Timeline, decode_all, read_timeline

_log = logging.getLogger("tango_runtime.video")

#: Most bytes of decoded frames that are held until it is known that they are the right ones: 80 of 1920×1080.
_MAX_HELD = 1 << 28

#: So many packets between two runs are sought over, not read.
_FAR = 500


class VideoFile:
    """A FrameSource that reads a video file. Opening it reads every packet and, where those suffice, decodes nothing.

    Args:
        path: The file.
        sampling: Which frames :meth:`sample` chooses. Where the keyframes are not known and every frame has to be
            decoded, the exact ones are taken.

    Raises:
        TangoError: The file cannot be read or is truncated, or is not a video.
    """

    def __init__(self, path: Path, sampling: Sampling = "exact") -> None:
        self.name = str(path)
        self._path, self._sampling = path, sampling
        check_file(path)
        self._timeline = read_timeline(path)
        self._seek = True

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return duration_of(self._timeline.seconds)

    @cached_property
    def frame_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the first frame, rotation applied; it decodes that frame."""
        with open_video(self._path) as (container, stream):
            for frame in decode(stream, demux(container, stream)):
                return shown_size(frame)
        return None

    def sample(self, count: int, *, rounding: Rounding = "floor") -> Sampled:
        """Chooses the frames ``linspace(0, n - 1, count)``, or the keyframes that are nearest to them in time."""
        if count > len(self._timeline.times) and self._timeline.is_uncertain:
            self._decode_all("it may have more frames than packets")
        exact = choose(self._timeline.seconds, count, rounding, self.name)
        return exact if self._sampling == "exact" else self._nearest_keyframes(exact)

    def _nearest_keyframes(self, exact: Sampled) -> Sampled:
        """The keyframe nearest in time to each frame, the earlier of two; one may be nearest to several."""
        found = (self._timeline.index(key.pts) for key in self._timeline.keys)
        keys = np.array(sorted({i for i in found if i is not None}), np.int64)
        if not len(keys):
            return replace(exact, wanted=exact.seconds)
        seconds = self._timeline.seconds[keys]
        after = np.clip(np.searchsorted(seconds, exact.seconds), 1, len(keys) - 1) if len(keys) > 1 else 0
        before = np.maximum(after - 1, 0)
        nearer = np.where(exact.seconds - seconds[before] <= seconds[after] - exact.seconds, before, after)
        return Sampled(keys[nearer], seconds[nearer], exact.rounding, wanted=exact.seconds)

    def read(self, chosen: Sampled) -> Iterator[TimedFrame]:
        """Decodes the chosen frames, and gives the first once all are known to be the right ones.

        Where the decoder gives other frames than the timeline announced, the file is read more thoroughly, at last
        decoded as a whole, to know its frames, and as many of them are chosen again.

        Raises:
            TangoError: The file cannot be read, or has fewer frames than were chosen.
        """
        while True:
            try:
                chosen = self._current(chosen)
                frames = self._decode(np.unique(chosen.indices).tolist())
                break
            except _DisagreementError as error:
                self._learn(error)
        for i, frame in frames:
            rgb = to_rgb(frame, self.name)
            yield from ((seconds, rgb) for seconds in chosen.seconds[chosen.indices == i].tolist())

    def _current(self, chosen: Sampled) -> Sampled:
        """`chosen`, or as many frames chosen again where decoding has since shown that those do not exist."""
        seconds = self._timeline.seconds
        if chosen.indices[-1] < len(seconds) and np.array_equal(seconds[chosen.indices], chosen.seconds):
            return chosen
        return self.sample(len(chosen), rounding=chosen.rounding)

    def _learn(self, error: _DisagreementError) -> None:
        """Knows the file better after a timeline that was wrong."""
        if isinstance(error, _SeekError):
            self._seek = False
        elif self._timeline.is_from_index:
            _log.info("%s: %s; reading all of its packets", self.name, error)
            self._timeline = read_timeline(self._path, by_index=False)
        else:
            self._decode_all(str(error))

    def _decode_all(self, reason: str) -> None:
        self._timeline = decode_all(self._path, reason, len(self._timeline.times), self.duration)

    def _decode(self, chosen: list[int]) -> Iterator[tuple[int, Any]]:
        """(index, PyAV frame) of the chosen frames; those that are too many to be held are decoded again."""
        held: list[tuple[int, Any]] = []
        size = 0
        for i, frame in self._frames(chosen):
            size += sum(plane.buffer_size for plane in frame.planes)
            if size <= _MAX_HELD:
                held.append((i, frame))
        rest = chosen[len(held) :]
        return chain(held, self._frames(rest) if rest else ())

    def _frames(self, chosen: list[int]) -> Iterator[tuple[int, Any]]:
        return _decode_frames(self._path, self._timeline, chosen, seek=self._seek)


@dataclass(frozen=True)
class _Run:
    """Packets to decode without a gap, and the frames that they must give."""

    start: int
    stop: int
    first: int
    last: int


class _DisagreementError(Exception):
    """The decoder gives other frames than the timeline announced."""


class _SeekError(_DisagreementError):
    """Seeking does not lead where the timeline says."""


def _decode_frames(path: Path, timeline: Timeline, chosen: list[int], *, seek: bool) -> Iterator[tuple[int, Any]]:
    """Yields (index, PyAV frame) of the chosen frames, ascending."""
    wanted = set(chosen)
    with open_video(path, threads=EXACT if timeline.packets is None else "AUTO") as (container, stream):
        if timeline.packets is None:
            decoded = enumerate(decode(stream, demux(container, stream)))
            yield from islice(((i, frame) for i, frame in decoded if i in wanted), len(chosen))
            return
        packets = _Packets(container, stream, timeline, seek=seek)
        for run in _plan_runs(timeline, chosen):
            numbered = _in_order(decode(stream, packets.of(run)), run, timeline)
            yield from ((i, frame) for i, frame in numbered if i in wanted)


class _Packets:
    """The packets of a file, of which far ones are sought."""

    def __init__(self, container: Any, stream: Any, timeline: Timeline, *, seek: bool) -> None:
        self._container, self._stream, self._keys = container, stream, timeline.keys
        self._seek, self._place = seek, 0
        self._packets = demux(container, stream)

    def of(self, run: _Run) -> Iterator[Any]:
        """The packets of a run; runs ascend."""
        start = run.start
        if self._seek and start - self._place > _FAR:
            yield self._find(self._keys[bisect_left(self._keys, (start,))])
            start = self._place = start + 1
        yield from islice(self._packets, start - self._place, run.stop - self._place)
        self._place = run.stop

    def _find(self, key: Key) -> Any:
        """The packet of a key; the others come after it."""
        for ticks in (key.pts, key.dts):
            if ticks is None or key.pos is None:
                continue
            self._container.seek(ticks, stream=self._stream)
            self._packets = demux(self._container, self._stream)
            for packet in islice(self._packets, _FAR):
                if (packet.pos, packet.dts) == (key.pos, key.dts):
                    return packet
                if packet.dts is not None and key.dts is not None and packet.dts > key.dts:
                    break
        raise _SeekError("its keyframes cannot be sought")


def _plan_runs(timeline: Timeline, chosen: list[int]) -> list[_Run]:
    """The least packets that give the chosen frames.

    Decoding from a keyframe gives what decoding from the start gives for every frame presented at or after the
    keyframe. The others that follow it in the file (the leading pictures of an open GOP) need the keyframe before.
    Without keyframes all packets are decoded, so that every frame is seen.
    """
    assert timeline.packets is not None
    keys = timeline.keys
    if timeline.is_uncertain:
        return [_Run(0, max(timeline.packets) + 1, 0, len(timeline.times) - 1)]
    runs: list[_Run] = []
    for i in chosen:
        last = timeline.packets[i]
        k = bisect_left(keys, (last + 1,)) - 1
        while k >= 0 and keys[k].pts > timeline.times[i]:
            k -= 1
        start, first = (keys[k].place, bisect_left(timeline.times, keys[k].pts)) if k >= 0 else (0, 0)
        last += timeline.slack
        if runs and start < runs[-1].stop:
            before = runs.pop()
            start, first, last = before.start, before.first, max(last, before.stop - 1)
        runs.append(_Run(start, last + 1, first, i))
    return runs


def _in_order(frames: Iterator[Any], run: _Run, timeline: Timeline) -> Iterator[tuple[int, Any]]:
    """Numbers the frames of a run and holds them against the timeline, frame by frame."""
    assert timeline.packets is not None
    due = [i for i in range(run.last, run.first - 1, -1) if timeline.packets[i] < run.stop]
    for frame in frames:
        i = timeline.index(frame.pts)
        if i is None:
            raise _DisagreementError("the decoder gives a frame that no packet announced")
        if i < run.first or i > run.last:
            continue  # before: a leading picture, of another run; after: not needed
        if frame.is_corrupt:  # what is made up for the missing part depends on where decoding began
            raise _DisagreementError(f"the frame at {timeline.seconds[i]:.3f} s is damaged")
        if not due or i != due.pop():
            raise _DisagreementError(f"the frame at {timeline.seconds[i]:.3f} s comes out of the decoder unexpectedly")
        yield i, frame
    if due:
        raise _DisagreementError(f"the frame at {timeline.seconds[due[-1]]:.3f} s does not come out of the decoder")
