"""Video files: their timeline first, then only what the chosen frames depend on is decoded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tango_runtime.video.container import check_file, decode, demux, open_video
from tango_runtime.video.decoding import Decoders, DisagreementError, SeekError, decode_frames, plan_runs, software
from tango_runtime.video.rgb import shown_size, to_rgb
from tango_runtime.video.source import Frame, Rounding, Sampled, Sampling, TimedFrame, choose, choose_at, duration_of
from tango_runtime.video.timeline import decode_all, read_timeline
from tango_runtime.video.yuv import HardwareError, YuvFrame

_T = TypeVar("_T")

_log = logging.getLogger("tango_runtime.video")

#: Most bytes of decoded frames that are held until it is known that they are the right ones: 80 of 1920×1080.
_MAX_HELD = 1 << 28

#: Most decoders that share the engines of a GPU, and the least pixels for each that are worth its start: 64 frames of
#: 1920×1080. On an H200, four are 2.3 times as fast as one and eight are no faster than four.
_GPU_DECODERS, _WORTH = 4, 1 << 27


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
        self._seek = self._sparse = True

    @property
    def frames(self) -> int:
        """How many frames it has."""
        return len(self._timeline.times)

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

    def sample_at(self, fps: float) -> Sampled:
        """Chooses the first frame of every 1 / fps seconds."""
        return choose_at(self._timeline.seconds, fps, self.name)

    def read(self, chosen: Sampled) -> Iterator[TimedFrame]:
        """Decodes the chosen frames, and gives the first once all are known to be the right ones.

        Where the decoder gives other frames than the timeline announced, the file is read more thoroughly, at last
        decoded as a whole, to know its frames, and as many of them are chosen again.

        Raises:
            TangoError: The file cannot be read, or has fewer frames than were chosen.
        """
        return self._read(chosen, self._decode)

    def read_each(self, chosen: Sampled, use: Callable[[Frame], _T]) -> Iterator[tuple[float, _T]]:
        """Reads as :meth:`read` does, but of each frame only what `use` makes of it on a decoder's thread is kept."""
        return self._read(chosen, lambda indices: self._decode_each(indices, use))

    def _read(
        self, chosen: Sampled, decode: Callable[[list[int]], Iterator[tuple[int, _T]]]
    ) -> Iterator[tuple[float, _T]]:
        while True:
            try:
                chosen = self._current(chosen)
                frames = decode(np.unique(chosen.indices).tolist())
                break
            except DisagreementError as error:
                self._learn(error)
        for i, made in frames:
            yield from ((seconds, made) for seconds in chosen.seconds[chosen.indices == i].tolist())

    def decode_on(
        self, chosen: Sampled, device: int, decoders: int | None = None
    ) -> Iterator[tuple[int, YuvFrame]] | None:
        """Decodes the chosen frames on a GPU, by at most so many decoders: (which of them, frame) as they come.

        None where little is to be decoded.

        Raises:
            HardwareError: The GPU does not decode the file, or gives other frames than the timeline announced: then
                :meth:`read` finds out which are right.
            TangoError: The file cannot be read.
        """
        count = min(decoders or _GPU_DECODERS, self._needed(chosen) * self._timeline.pixels // _WORTH)
        if not count:
            return None
        if self._timeline.packets is None or self._timeline.is_uncertain:
            raise HardwareError("every frame has to be decoded to know them")
        return self._decode_on(chosen, Decoders(self._seek, self._sparse, count, device))

    def _needed(self, chosen: Sampled) -> int:
        """How many frames are decoded for the chosen ones."""
        if self._timeline.packets is None:
            return len(self._timeline.times)
        return sum(run.stop - run.start for run in plan_runs(self._timeline, np.unique(chosen.indices).tolist()))

    def _decode_on(self, chosen: Sampled, decoders: Decoders) -> Iterator[tuple[int, YuvFrame]]:
        try:
            for i, frame in self._frames(np.unique(chosen.indices).tolist(), decoders, YuvFrame.of):
                for which in np.flatnonzero(chosen.indices == i).tolist():
                    yield which, frame
        except DisagreementError as error:
            raise HardwareError(str(error)) from error

    def _current(self, chosen: Sampled) -> Sampled:
        """`chosen`, or as many frames chosen again where decoding has since shown that those do not exist."""
        seconds = self._timeline.seconds
        if chosen.indices[-1] < len(seconds) and np.array_equal(seconds[chosen.indices], chosen.seconds):
            return chosen
        return self.sample(len(chosen), rounding=chosen.rounding)

    def _learn(self, error: DisagreementError) -> None:
        """Knows the file better after a timeline that was wrong."""
        if isinstance(error, SeekError):
            self._seek = False
        elif self._sparse:  # the decoder may take pictures that are left out for lost
            self._sparse = False
        elif self._timeline.is_from_index:
            _log.info("%s: %s; reading all of its packets", self.name, error)
            self._timeline = read_timeline(self._path, by_index=False)
        else:
            self._decode_all(str(error))

    def _decode_all(self, reason: str) -> None:
        self._timeline = decode_all(self._path, reason, len(self._timeline.times), self.duration)

    def _decode(self, chosen: list[int]) -> Iterator[tuple[int, Frame]]:
        """(index, RGB) of the chosen frames in order; those that are too many to be held are decoded again."""
        if len(chosen) * self._timeline.pixels * 3 <= _MAX_HELD:
            return self._decode_each(chosen, _itself)
        held: list[tuple[int, Any]] = []
        size = 0
        one = Decoders(self._seek, self._sparse)
        for i, frame in self._frames(chosen, one, _itself):
            size += sum(plane.buffer_size for plane in frame.planes)
            if size <= _MAX_HELD:
                held.append((i, frame))
        rest = chosen[len(held) :]
        again = self._frames(rest, one, _itself) if rest else ()
        return ((i, self._to_rgb(frame)) for i, frame in chain(held, again))

    def _decode_each(self, chosen: list[int], use: Callable[[Frame], _T]) -> Iterator[tuple[int, _T]]:
        decoders = software(self._timeline.pixels, seek=self._seek, sparse=self._sparse)
        found = dict(self._frames(chosen, decoders, lambda frame: use(self._to_rgb(frame))))
        return ((i, found.pop(i)) for i in chosen)

    def _frames(self, chosen: list[int], decoders: Decoders, use: Callable[[Any], _T]) -> Iterator[tuple[int, _T]]:
        return decode_frames(self._path, self._timeline, chosen, decoders, use)

    def _to_rgb(self, frame: Any) -> Frame:
        return to_rgb(frame, self.name)


def _itself(frame: Any) -> Any:
    return frame
