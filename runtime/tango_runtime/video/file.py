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
from tango_runtime.video.address import PIPE_CAMERA
from tango_runtime.video.h264 import may_have_fields
from tango_runtime.video.playlist import check_playlist
from tango_runtime.video.rgb import shown_size, to_rgb
from tango_runtime.video.source import Rounding, Sampled, TimedFrame, choose, duration_of
from tango_runtime.video.truncation import check_complete

_log = logging.getLogger("tango_runtime.video")

#: Codecs whose every shown packet is one frame. Of others every packet is decoded, to see that it is.
_FRAME_PER_PACKET = {
    *("h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "prores", "ffv1"),
    *("wmv1", "wmv2", "msmpeg4v2", "msmpeg4v3", "flv1"),
}

#: An MPEG-4 packet of at most so many bytes may be a mark that a frame is left out.
_LEFT_OUT = 16

#: Threads within a frame only: with several frames under way, how many of them a damaged packet takes along depends on
#: the number of cores. Frames whose packets are whole decode to the same pixels either way.
_EXACT = "SLICE"

#: Most frames by which decoding and presentation order differ (H.264, H.265).
_REORDERING = 16

#: Most pixels of a frame: 8192×8192, twice an 8K video.
_MAX_PIXELS = 1 << 26

#: Most bytes of decoded frames that are held until it is known that they are the right ones: 80 of 1920×1080.
_MAX_HELD = 1 << 28

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
        if count > len(self._timeline.times) and self._timeline.is_uncertain:
            self._decode_all("it may have more frames than packets")
        return choose(self._timeline.seconds, count, rounding, self.name)

    def read(self, chosen: Sampled) -> Iterator[TimedFrame]:
        """Decodes the chosen frames, and gives the first once all are known to be the right ones.

        Where the decoder gives other frames than the packets announced, the whole file is decoded once to know its
        frames, and as many of them are chosen again.

        Raises:
            TangoError: The file cannot be read, or has fewer frames than were chosen.
        """
        try:
            chosen = self._current(chosen)
            frames = self._decode(chosen.indices.tolist())
        except _DisagreementError as error:
            self._decode_all(str(error))
            chosen = self._current(chosen)
            frames = self._decode(chosen.indices.tolist())
        for seconds, (_, frame) in zip(chosen.seconds.tolist(), frames, strict=True):
            yield seconds, to_rgb(frame, self.name)

    def _current(self, chosen: Sampled) -> Sampled:
        """`chosen`, or as many frames chosen again where decoding has since shown that those do not exist."""
        seconds = self._timeline.seconds
        if chosen.indices[-1] < len(seconds) and np.array_equal(seconds[chosen.indices], chosen.seconds):
            return chosen
        return self.sample(len(chosen), rounding=chosen.rounding)

    def _decode_all(self, reason: str) -> None:
        self._timeline = _decode_all(self._path, reason, len(self._timeline.times), self.duration)

    def _decode(self, chosen: list[int]) -> Iterator[tuple[int, Any]]:
        """(index, PyAV frame) of the chosen frames; those that are too many to be held are decoded again."""
        held: list[tuple[int, Any]] = []
        size = 0
        for i, frame in _decode_frames(self._path, self._timeline, chosen):
            size += sum(plane.buffer_size for plane in frame.planes)
            if size <= _MAX_HELD:
                held.append((i, frame))
        rest = chosen[len(held) :]
        return chain(held, _decode_frames(self._path, self._timeline, rest) if rest else ())


class _Packet(NamedTuple):
    """What the first pass learns of a packet: its times in ticks, whether decoding can begin with it, and so on."""

    pts: int | None
    dts: int | None
    key: bool
    hidden: bool  # decoded for others' sake and not shown (edit lists, VP8's alternate references)
    corrupt: bool
    size: int


@dataclass(frozen=True)
class _Timeline:
    """The frames of a video in order of presentation.

    Attributes:
        times: Presentation time of each frame in ticks, ascending; strictly where ``packets`` is not None.
        tick: Seconds per tick.
        packets: For each frame the place of its packet in the file; None where only decoding showed the frames.
        keys: Places of the packets where decoding may begin, ascending, and the presentation time of each; none where
            every packet must be decoded.
    """

    times: list[int]
    tick: Fraction
    packets: list[int] | None = None
    keys: tuple[Sequence[int], Sequence[int]] = ((), ())

    @property
    def is_uncertain(self) -> bool:
        """Whether only reading shows that each of the packets is one frame."""
        return self.packets is not None and not self.keys[0]

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
        raise TangoError(f"{path} is not a regular file", f"pipe a camera: {PIPE_CAMERA}")
    if path.stat().st_size == 0:
        raise TangoError(f"{path} is empty", "copy or record the video again")
    check_complete(path)
    check_playlist(path)


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
            stream.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}  # where the size changes later
            stream.thread_type = threads
            yield container, stream
    except av.FFmpegError as error:
        raise TangoError(
            f"{path} cannot be read as a video: {error.strerror}", "check that it plays; copy or record it again"
        ) from error


def _repair(path: Path) -> str:
    return f"check that it plays; ffmpeg -i {path.name} fixed.mp4 may repair it"


def _read_timeline(path: Path) -> _Timeline:
    """The timeline of the packets or, where these do not tell the frames' times, of decoding everything."""
    with _open(path) as (container, stream):
        codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata
        packets = [_read_packet(packet, codec, path) for packet in _demux(container, stream)]
        tick, rate = Fraction(stream.time_base), stream.guessed_rate
    if packets and packets[-1].corrupt:
        raise TangoError(f"{path} is truncated in the middle of frame {len(packets) - 1}", "copy or record it again")
    shown = sorted((p.pts, place) for place, p in enumerate(packets) if p.pts is not None and not p.hidden)
    times, places = [pts for pts, _ in shown], [place for _, place in shown]
    seconds = (times[-1] - times[0]) * tick if times else len(packets) / Fraction(rate) if rate else None
    if reason := _why_times_are_unknown(packets, times):
        return _decode_all(path, reason, len(packets), None if seconds is None else float(seconds))
    if reason := _why_frames_are_uncertain(codec, extradata, packets):
        _warn_of_decoding(path, reason, len(times), None if seconds is None else float(seconds))
        return _Timeline(times, tick, places)
    keys = [(place, p.pts) for place, p in enumerate(packets) if p.key and p.pts is not None]
    return _Timeline(times, tick, places, ([place for place, _ in keys], [pts for _, pts in keys]))


def _read_packet(packet: Any, codec: str, path: Path) -> _Packet:
    if packet.has_sidedata("encryption_info"):  # the decoder would make frames of noise of some packets
        raise TangoError(f"the video of {path} is encrypted", "give a file without encryption")
    shown = codec != "vp8" or memoryview(packet)[0] & 1 << 4  # RFC 6386, section 9.1: show_frame
    hidden = packet.is_discard or not shown
    return _Packet(packet.pts, packet.dts, packet.is_keyframe, hidden, packet.is_corrupt, packet.size)


def _why_times_are_unknown(packets: list[_Packet], times: list[int]) -> str:
    """Why the packets do not tell when frames are shown; empty where they do."""
    if any(p.pts is None for p in packets):
        return "its packets have no times"
    if len(set(times)) != len(times):
        return "two of its packets have the same time"
    dts = [p.dts for p in packets if p.dts is not None]
    return "" if dts == sorted(dts) else "its timestamps step back, as where two recordings were joined"


def _why_frames_are_uncertain(codec: str, extradata: bytes | None, packets: list[_Packet]) -> str:
    """Why a shown packet may not be one frame; empty where each is."""
    if codec == "h264" and may_have_fields(extradata):
        return "its packets may be fields"
    if codec == "mpeg4" and min(p.size for p in packets) <= _LEFT_OUT:
        return "its packets may be marks of frames left out"
    return "" if codec in _FRAME_PER_PACKET else f"a packet of {codec} is not always one frame"


def _warn_of_decoding(path: Path, reason: str, frames: int, seconds: float | None) -> None:
    length = f"about {frames} frames" + ("" if seconds is None else f", {seconds:.1f} s of video")
    _log.warning("%s: %s; decoding the whole file to know its frames (%s)", path, reason, length)


def _decode_all(path: Path, reason: str, packets: int, seconds: float | None) -> _Timeline:
    """The timeline that decoding everything gives, with a warning because that takes long."""
    _warn_of_decoding(path, reason, packets, seconds)
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
    Without keyframes all packets are decoded, so that every frame is seen.
    """
    assert timeline.packets is not None
    places, times = timeline.keys
    if timeline.is_uncertain:
        return [_Run(0, max(timeline.packets) + 1, 0, len(timeline.times) - 1)]
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
