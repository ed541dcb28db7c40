"""Video files: the packets give the times, then only what the chosen frames depend on is decoded."""

from __future__ import annotations

import contextlib
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_runtime.util.versions import release
from tango_runtime.video.rgb import shown_size, to_rgb
from tango_runtime.video.source import Rounding, Sampled, TimedFrame, choose, duration_of
from tango_runtime.video.truncation import check_complete

_log = logging.getLogger("tango_runtime.video")

#: Codecs whose every packet is one shown frame. VP8 is not among them: its alternate reference frames are packets of
#: their own that are never shown, so only decoding shows how many frames a VP8 file has.
_FRAME_PER_PACKET = {"h264", "hevc", "av1", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "prores", "ffv1"}

#: Threads within a frame only: with several frames under way, how many of them a damaged packet takes along depends on
#: the number of cores. Frames whose packets are whole decode to the same pixels either way.
_EXACT = "SLICE"

#: Most frames by which decoding and presentation order differ (H.264, H.265).
_REORDERING = 16

#: Most pixels of a frame: 16384×8192, four times an 8K video.
_MAX_PIXELS = 1 << 27

#: Formats that FFmpeg recognizes by content and that are no video of their own.
_NOT_VIDEO = {"concat": "a list of other files", "tty": "a text"}


class VideoFile:
    """A FrameSource that reads a video file. Opening it reads every packet and, where those suffice, decodes nothing.

    Args:
        path: The file.

    Raises:
        TangoError: The file cannot be read or is truncated, or is not a video.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        _check_file(path)
        self._timeline = _read_timeline(path)

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return duration_of(self._timeline.seconds)

    @cached_property
    def frame_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the first frame, rotation applied; it decodes that frame."""
        with _open(self._path) as (container, stream):
            for frame in _decode(stream, _demux(container, stream)):
                return shown_size(frame)
        return None

    def sample(self, count: int, *, rounding: Rounding = "floor") -> Sampled:
        """Chooses the frames ``linspace(0, n - 1, count)``."""
        return choose(self._timeline.seconds, count, rounding, self.name)

    def read(self, chosen: Sampled) -> Iterator[TimedFrame]:
        """Decodes the chosen frames, one in memory at a time.

        Where the decoder gives other frames than the packets announced, the whole file is decoded once to know its
        frames, and as many of them are chosen again. Frames that were given already may be one index beside these.

        Raises:
            TangoError: The file cannot be read, has fewer frames than were chosen, or frames were given already that
                are further away from those chosen again.
        """
        given: list[float] = []
        try:
            for timed in self._read(self._current(chosen)):
                given.append(timed[0])
                yield timed
            return
        except _DisagreementError as error:
            reason = str(error)
        self._timeline = _decode_all(self._path, reason, len(self._timeline.times), self.duration)
        again, done = self.sample(len(chosen), rounding=chosen.rounding), len(given)
        if not self._continues(given, again):
            raise TangoError(f"{self.name} is damaged: {reason}", _repair(self._path))
        yield from self._read(Sampled(again.indices[done:], again.seconds[done:], again.rounding))

    def _current(self, chosen: Sampled) -> Sampled:
        """`chosen`, or as many frames chosen again where decoding has since shown that those do not exist."""
        seconds = self._timeline.seconds
        if chosen.indices[-1] < len(seconds) and np.array_equal(seconds[chosen.indices], chosen.seconds):
            return chosen
        return self.sample(len(chosen), rounding=chosen.rounding)

    def _continues(self, given: list[float], again: Sampled) -> bool:
        """Whether frames at these seconds are those chosen again, or their neighbors, and leave the rest in order."""
        seconds, done = self._timeline.seconds, len(given)
        indices = np.searchsorted(seconds, given)
        return (
            np.array_equal(seconds[np.minimum(indices, len(seconds) - 1)], given)
            and bool(np.all(np.abs(indices - again.indices[:done]) <= 1))
            and (done == 0 or done == len(again) or bool(indices[-1] < again.indices[done]))
        )

    def _read(self, chosen: Sampled) -> Iterator[TimedFrame]:
        seconds = dict(zip(chosen.indices.tolist(), chosen.seconds.tolist(), strict=True))
        for i, frame in _decode_frames(self._path, self._timeline, list(seconds)):
            yield seconds[i], to_rgb(frame, self.name)


class _Packet(NamedTuple):
    """What the first pass learns of a packet: its times in ticks, whether decoding can begin with it, and so on."""

    pts: int | None
    dts: int | None
    key: bool
    hidden: bool  # decoded for others' sake and not shown (edit lists)
    corrupt: bool


@dataclass(frozen=True)
class _Timeline:
    """The frames of a video in order of presentation.

    Attributes:
        times: Presentation time of each frame in ticks, ascending; strictly where ``packets`` is not None.
        tick: Seconds per tick.
        packets: For each frame the place of its packet in the file; None where only decoding showed the frames.
        keys: Places of the keyframes' packets, ascending, and the presentation time of each.
    """

    times: list[int]
    tick: Fraction
    packets: list[int] | None = None
    keys: tuple[Sequence[int], Sequence[int]] = ((), ())

    @cached_property
    def seconds(self) -> NDArray[np.float64]:
        """[n], time of each frame since the first."""
        ticks = np.array(self.times, np.int64)
        return (ticks - ticks[:1]) * self.tick.numerator / self.tick.denominator


@dataclass(frozen=True)
class _Run:
    """Packets to decode without a gap, and the frames that they must give."""

    start: int
    stop: int
    first: int
    last: int


class _DisagreementError(Exception):
    """The decoder gives other frames than the packets announced."""


def _check_file(path: Path) -> None:
    if not path.exists():
        raise TangoError(f"{path} does not exist", "give the path of a video file or of a folder of images")
    if not path.is_file():
        raise TangoError(f"{path} is not a regular file", "read a camera as examples/camera.py does")
    if path.stat().st_size == 0:
        raise TangoError(f"{path} is empty", "copy or record the video again")
    check_complete(path)
    with path.open("rb") as file:
        if file.read(7) == b"#EXTM3U" and b"#EXT-X-ENDLIST" not in file.read():
            raise TangoError(
                f"{path} is a playlist that has no end: FFmpeg would wait for more",
                "add a line #EXT-X-ENDLIST at its end",
            )


@contextlib.contextmanager
def _open(path: Path, threads: str = "AUTO") -> Iterator[tuple[Any, Any]]:
    """Opens a video: (PyAV container, its best video stream). FFmpeg's errors become TangoErrors."""
    import av  # FFmpeg takes a fifth of the time that importing the runtime does, and not every source needs it

    try:
        # FFmpeg takes what stands before a colon for a protocol, unless the path is absolute. PyAV reads tags that are
        # not UTF-8 from version 19 on; before, they are an error that can be ignored.
        lenient = {} if release(av.__version__) >= (19,) else {"metadata_errors": "ignore"}
        with av.open(str(path.absolute()), **lenient) as container:
            if container.format.name in _NOT_VIDEO:
                raise TangoError(f"{path} is {_NOT_VIDEO[container.format.name]}", "give a video file")
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise TangoError(
                    f"{path} has no video stream", "give a file with video, not only sound or a cover picture"
                )
            if stream.codec_context is None:
                raise TangoError(f"the video stream of {path} has no decoder here", _repair(path))
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > _MAX_PIXELS:  # a GIF of 100 bytes may claim gigabytes
                raise TangoError(f"the frames of {path} have {width}×{height} pixels", "scale the video down")
            stream.thread_type = threads
            yield container, stream
    except av.FFmpegError as error:
        raise TangoError(f"{path} cannot be read as a video: {error.strerror}", _repair(path)) from error


def _repair(path: Path) -> str:
    return f"check that it plays; ffmpeg -i {path.name} fixed.mp4 may repair it"


def _read_timeline(path: Path) -> _Timeline:
    """The timeline of the packets or, where they do not determine the frames, of decoding everything."""
    with _open(path) as (container, stream):
        packets = []
        for p in _demux(container, stream):
            if _is_encrypted(p):  # the decoder would make frames of noise of some packets
                raise TangoError(f"the video of {path} is encrypted", "give a file without encryption")
            packets.append(_Packet(p.pts, p.dts, p.is_keyframe, p.is_discard, p.is_corrupt))
        tick, codec, rate = Fraction(stream.time_base), stream.codec_context.name, stream.guessed_rate
    if packets and packets[-1].corrupt:
        raise TangoError(f"{path} is truncated in the middle of frame {len(packets) - 1}", "copy or record it again")
    shown = sorted((p.pts, place) for place, p in enumerate(packets) if p.pts is not None and not p.hidden)
    times = [pts for pts, _ in shown]
    if reason := _reason_to_decode(codec, packets, times):
        seconds = (times[-1] - times[0]) * tick if times else len(packets) / Fraction(rate) if rate else None
        return _decode_all(path, reason, len(packets), None if seconds is None else float(seconds))
    keys = [(place, p.pts) for place, p in enumerate(packets) if p.key and p.pts is not None]
    places, key_times = [place for place, _ in keys], [pts for _, pts in keys]
    return _Timeline(times, tick, [place for _, place in shown], (places, key_times))


def _is_encrypted(packet: Any) -> bool:
    """Whether a packet has a key in its side data, which PyAV shows from version 16 on."""
    return hasattr(packet, "has_sidedata") and bool(packet.has_sidedata("encryption_info"))


def _reason_to_decode(codec: str, packets: list[_Packet], times: list[int]) -> str:
    """Why the packets do not determine the frames; empty where they do."""
    if codec not in _FRAME_PER_PACKET:
        return f"a packet of {codec} is not always one frame"
    if any(p.pts is None for p in packets):
        return "its packets have no times"
    if len(set(times)) != len(times):
        return "two of its packets have the same time"
    dts = [p.dts for p in packets if p.dts is not None]
    return "" if dts == sorted(dts) else "its timestamps step back, as where two recordings were joined"


def _decode_all(path: Path, reason: str, packets: int, seconds: float | None) -> _Timeline:
    """The timeline that decoding everything gives, with a warning because that takes long."""
    length = f"about {packets} frames" + ("" if seconds is None else f", {seconds:.1f} s of video")
    _log.warning("%s: %s; decoding the whole file to know its frames (%s)", path, reason, length)
    with _open(path, threads=_EXACT) as (container, stream):
        times = [frame.pts for frame in _decode(stream, _demux(container, stream))]
        tick, rate, format_name = Fraction(stream.time_base), stream.guessed_rate, container.format.name
    if not times:
        raise TangoError(f"no frame of {path} ({format_name}) can be decoded", f"is it encrypted? {_repair(path)}")
    if None in times:  # raw streams: no times, at best a rate
        if not rate:
            raise TangoError(f"{path} has neither times nor a frame rate", _repair(path))
        return _Timeline(list(range(len(times))), 1 / Fraction(rate))
    ascending = _ascending(times)
    if ascending != times:
        _log.warning("%s: the times of its frames step back; the frames keep their order, their times are fixed", path)
    return _Timeline(ascending, tick)


def _ascending(times: list[int]) -> list[int]:
    """Times of frames in order of presentation, so that none steps back.

    Within a codec's reordering the times are those of other frames, because the container has none of presentation
    (AVI): they are sorted. A larger step back is a joint of two recordings: the second continues where the first ends.
    """
    shift, shifted = 0, times[:1]
    for i in range(1, len(times)):
        if times[i] <= min(times[max(0, i - _REORDERING) : i]):
            shift += times[i - 1] - times[i]
        shifted.append(times[i] + shift)
    return sorted(shifted)


def _decode_frames(path: Path, timeline: _Timeline, chosen: list[int]) -> Iterator[tuple[int, Any]]:
    """Yields (index, PyAV frame) of the chosen frames."""
    wanted = set(chosen)
    with _open(path, threads=_EXACT if timeline.packets is None else "AUTO") as (container, stream):
        packets = _demux(container, stream)
        if timeline.packets is None:
            decoded = enumerate(_decode(stream, packets))
            yield from islice(((i, frame) for i, frame in decoded if i in wanted), len(chosen))
            return
        index_of = {pts: i for i, pts in enumerate(timeline.times)}
        place = 0
        for run in _plan_runs(timeline, chosen):
            frames = _decode(stream, islice(packets, run.start - place, run.stop - place))
            numbered = _in_order(frames, index_of, run, timeline)
            yield from ((i, frame) for i, frame in numbered if i in wanted)
            place = run.stop


def _plan_runs(timeline: _Timeline, chosen: list[int]) -> list[_Run]:
    """The least packets that give the chosen frames.

    Decoding from a keyframe gives what decoding from the start gives for every frame presented at or after the
    keyframe. The others that follow it in the file (the leading pictures of an open GOP) need the keyframe before.
    """
    assert timeline.packets is not None
    places, times = timeline.keys
    runs: list[_Run] = []
    for i in chosen:
        last = timeline.packets[i]
        k = bisect_right(places, last) - 1
        while k >= 0 and times[k] > timeline.times[i]:
            k -= 1
        start, first = (places[k], bisect_right(timeline.times, times[k] - 1)) if k >= 0 else (0, 0)
        if runs and start < runs[-1].stop:
            before = runs.pop()
            start, first, last = before.start, before.first, max(last, before.stop - 1)
        runs.append(_Run(start, last + 1, first, i))
    return runs


def _in_order(
    frames: Iterator[Any], index_of: dict[int, int], run: _Run, timeline: _Timeline
) -> Iterator[tuple[int, Any]]:
    """Numbers the frames of a run and holds them against the timeline, frame by frame."""
    assert timeline.packets is not None
    due = [i for i in range(run.last, run.first - 1, -1) if timeline.packets[i] < run.stop]
    for frame in frames:
        i = index_of.get(frame.pts)
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


def _demux(container: Any, stream: Any) -> Iterator[Any]:
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except IndexError:  # PyAV's, at the first packet of a stream that FFmpeg found only now
            packets = container.demux(stream)
            continue
        if packet is None:
            return
        # Packets without content are a dropped frame or PyAV's mark of the end; a decoder would take both for the end.
        if packet.size:
            yield packet


def _decode(stream: Any, packets: Iterable[Any]) -> Iterator[Any]:
    """Decodes packets from a keyframe on, to the last frame, and leaves the decoder ready for another keyframe."""
    from av import InvalidDataError

    for packet in chain(packets, (None,)):
        try:
            frames = stream.decode(packet)
        except InvalidDataError:  # as every player does: the other packets still decode
            continue
        yield from frames
    stream.codec_context.flush_buffers()
