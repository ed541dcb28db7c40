"""A file, a folder of images, arrays or a camera's buffer → uniformly sampled frames with their real times."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tango_plugins import TangoError

Frame: TypeAlias = NDArray[np.uint8]
TimedFrame: TypeAlias = tuple[float, Frame]
Source: TypeAlias = str | Path | NDArray[np.uint8] | Iterable[TimedFrame]

_log = logging.getLogger(__name__)

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}

#: Codecs whose every packet is one shown frame. VP8 is not among them: its alternate reference frames are packets of
#: their own that are never shown, so only decoding tells how many frames a VP8 file has.
_FRAME_PER_PACKET = {"h264", "hevc", "av1", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "prores", "ffv1"}

#: Threads within a frame only: with several frames under way, how many of them a damaged packet takes along depends on
#: the number of cores. Frames whose packets are whole decode to the same pixels either way.
_EXACT = "SLICE"

#: Top-level boxes of an ISO media file. Anything else after them is not counted as part of the file.
_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"mfra", b"sidx", b"styp", b"uuid", b"meta"}


def sample(source: Source, count: int, *, fps: float | None = None) -> Iterator[TimedFrame]:
    """Samples exactly `count` frames at the indices ``linspace(0, n - 1, count)`` of the n frames of `source`.

    The indices are those of the LLaVA-OneVision evaluation (LLaVA-NeXT, ``np.linspace(0, n - 1, F, dtype=int)``).
    Seconds count from the first frame. A video is read twice: its packets first, without decoding, for the number of
    frames and their times; then only what the wanted frames depend on is decoded, one frame in memory at a time. The
    frames are those that decoding the whole video gives; damage in a part that no wanted frame needs stays unnoticed.

    Args:
        source: What to sample:

            - the path of a video file;
            - the path of a folder of images, taken in natural order (``frame2`` before ``frame10``);
            - a uint8 array [N, H, W, 3] of RGB frames;
            - a finite iterable of (seconds, uint8 RGB frame [H, W, 3]), times ascending. Its length must be known, so
              whatever is not a sequence is first read to its end into memory: 6 MB a frame at 1920×1080.
        count: Number of frames, at least 1.
        fps: Frames per second of a folder or an array, which carry no times: frame i is at i / fps seconds.
            1.0 where not given.

    Returns:
        An iterator of (seconds, uint8 RGB frame [H, W, 3]) in order of time; rotation metadata is applied.

    Raises:
        TangoError: The source cannot be read, is truncated, has fewer frames than `count`, its times do not ascend,
            or `fps` is given for a source that has times of its own. A frame that cannot be read raises when it is
            reached; everything else before the first frame.
    """
    if count < 1:
        raise TangoError(f"{count} frames were asked for", "ask for at least one, for example --frames 32")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise TangoError(f"fps is {fps}", "it must be a positive number of frames per second")
    if isinstance(source, np.ndarray):
        return _sample_array(source, count, fps or 1.0)
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return _sample_folder(Path(source), count, fps or 1.0)
    if fps is not None:
        raise TangoError(
            f"fps={fps:g} was given for a source that has times of its own",
            "leave fps away; it is for folders of images and arrays",
        )
    if isinstance(source, (str, Path)):
        return _sample_video(Path(source), count)
    return _sample_timed(source, count)


def _indices(n: int, count: int, name: str) -> list[int]:
    if n == 0:
        raise TangoError(f"{name} has no frames", "give a source with at least one frame")
    if n < count:
        frames = "1 frame" if n == 1 else f"{n} frames"
        raise TangoError(f"{name} has {frames}, {count} were asked for", f"ask for fewer: --frames {n}")
    chosen: list[int] = np.linspace(0, n - 1, count, dtype=int).tolist()
    return chosen


# Arrays, iterables and folders


def _sample_array(array: NDArray[np.uint8], count: int, fps: float) -> Iterator[TimedFrame]:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise TangoError(
            f"the frames are an array of {array.dtype} {list(array.shape)}", "give uint8 RGB frames [N, H, W, 3]"
        )
    return ((i / fps, array[i]) for i in _indices(len(array), count, "the array"))


def _sample_timed(source: Iterable[TimedFrame], count: int) -> Iterator[TimedFrame]:
    frames: Sequence[TimedFrame] = source if isinstance(source, Sequence) else list(source)
    before = -math.inf
    for i, item in enumerate(frames):
        seconds = _time_of(item, i)
        if not before < seconds < math.inf:
            raise TangoError(
                f"timestamps do not ascend: frame {i} is at {seconds:g} s after {before:g} s",
                "give frames in order of time, each with a later time than the one before",
            )
        before = seconds
    chosen = _indices(len(frames), count, "the source")
    first = float(frames[0][0])
    return ((float(frames[i][0]) - first, frames[i][1]) for i in chosen)


def _time_of(item: object, i: int) -> float:
    """The time of item i of an iterable, once it is known to be a (seconds, frame) pair."""
    if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], (int, float, np.number))):
        raise TangoError(f"item {i} is no (seconds, frame) pair", "give (float, uint8 RGB array [H, W, 3]) pairs")
    seconds, frame = item
    if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[-1] == 3):
        what = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise TangoError(f"frame {i} is {what}", "give uint8 RGB frames [H, W, 3]")
    return float(seconds)


def _sample_folder(folder: Path, count: int, fps: float) -> Iterator[TimedFrame]:
    images = sorted((p for p in folder.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES), key=_natural)
    if not images:
        raise TangoError(f"{folder} holds no images", f"put {', '.join(sorted(_IMAGE_SUFFIXES))} files there")
    return ((i / fps, _read_image(images[i])) for i in _indices(len(images), count, str(folder)))


def _natural(path: Path) -> list[str | int]:
    # The capturing group makes split alternate text and digits, so equal places compare equal types.
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", path.name.lower())]


def _read_image(path: Path) -> Frame:
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would clip these to white instead of scaling them
                raise TangoError(f"{path} has pixels of more than 8 bits", "convert it to 8 bits per channel")
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise TangoError(f"{path} cannot be read as an image: {error}", "replace or remove the file") from error


# Videos


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
        times: Presentation time of each frame in ticks, strictly ascending.
        tick: Seconds per tick.
        packets: For each frame the place of its packet in the file; None when only decoding could tell the frames.
        keys: Places of the keyframes' packets, ascending, and the presentation time of each.
    """

    times: list[int]
    tick: Fraction
    packets: list[int] | None = None
    keys: tuple[Sequence[int], Sequence[int]] = ((), ())

    def seconds(self, i: int) -> float:
        return float((self.times[i] - self.times[0]) * self.tick)


@dataclass(frozen=True)
class _Run:
    """Packets to decode without a gap, and the frames that they must give."""

    start: int
    stop: int
    first: int
    last: int


class _DisagreementError(Exception):
    """The decoder gives other frames than the packets promised."""


def _sample_video(path: Path, count: int) -> Iterator[TimedFrame]:
    _check_file(path)
    timeline = _read_packets(path) or _decode_all(path)
    return _decode_chosen(path, timeline, _indices(len(timeline.times), count, str(path)))


def _decode_chosen(path: Path, timeline: _Timeline, chosen: list[int]) -> Iterator[TimedFrame]:
    done = 0
    try:
        for i, frame in _decode_frames(path, timeline, chosen):
            yield timeline.seconds(i), _to_rgb(frame)
            done += 1
        return
    except _DisagreementError as error:
        why = str(error)
    _log.info("%s: %s; decoding all of it", path, why)
    given = [timeline.seconds(i) for i in chosen[:done]]
    timeline = _decode_all(path)
    chosen = _indices(len(timeline.times), len(chosen), str(path))
    if given != [timeline.seconds(i) for i in chosen[:done]]:  # these frames are out already
        raise TangoError(f"{path} is damaged: {why}", _mend(path))
    for i, frame in _decode_frames(path, timeline, chosen[done:]):
        yield timeline.seconds(i), _to_rgb(frame)


def _check_file(path: Path) -> None:
    if not path.exists():
        raise TangoError(f"{path} does not exist", "give the path of a video file or of a folder of images")
    if not path.is_file():
        raise TangoError(f"{path} is not a regular file", "read a camera as examples/camera.py does")
    size = path.stat().st_size
    if size == 0:
        raise TangoError(f"{path} is empty", "copy or record the video again")
    with path.open("rb") as file:
        declared = _declared_size(file, size)
    if declared > size:
        raise TangoError(f"{path} is truncated: {size} of {declared} bytes are there", "copy or record it again")


def _declared_size(file: BinaryIO, size: int) -> int:
    """Bytes that a file's outermost boxes claim, 0 for a format that does not say (transport streams, raw streams)."""
    head = file.read(64)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == b"\x1a\x45\xdf\xa3":  # Matroska, WebM: an EBML header, then the segment
        header, at = _ebml_size(head, 4)
        file.seek(at + header)
        segment = file.read(12)
        length, width = _ebml_size(segment, 4)
        return at + header + width + length if segment[:4] == b"\x18\x53\x80\x67" else 0
    end = 0  # ISO media: boxes of 32-bit size and type; size 1 puts 64 bits after the type, 0 means up to the end
    while end < size:
        file.seek(end)
        box = file.read(16)
        if box[4:8] not in _BOXES:
            break
        length = int.from_bytes(box[:4], "big")
        length = int.from_bytes(box[8:16], "big") if length == 1 else length or size - end
        end += max(length, 8)
    return end


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """The EBML size field at a place: (its value, 0 if unknown; the place after it)."""
    if len(data) <= at or data[at] == 0:
        return 0, at
    width = 9 - data[at].bit_length()
    bits = 7 * width
    value = int.from_bytes(data[at : at + width], "big") & ((1 << bits) - 1)
    return (0 if value == (1 << bits) - 1 else value), at + width


@contextlib.contextmanager
def _open(path: Path, threads: str = "AUTO") -> Iterator[tuple[Any, Any]]:
    """Opens a video: (PyAV container, its best video stream). FFmpeg's errors become TangoErrors."""
    import av  # FFmpeg takes a fifth of the time that importing the runtime does, and not every source needs it

    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise TangoError(f"{path} has no video stream", "give a file with pictures in it")
            if stream.codec_context is None:
                raise TangoError(f"the video stream of {path} has no decoder here", _mend(path))
            stream.thread_type = threads
            yield container, stream
    except av.FFmpegError as error:
        raise TangoError(f"{path} cannot be read as a video: {error.strerror}", _mend(path)) from error


def _mend(path: Path) -> str:
    return f"check that it plays; ffmpeg -i {path.name} fixed.mp4 may mend it"


def _read_packets(path: Path) -> _Timeline | None:
    """The timeline as the packets tell it, without decoding; None if they do not tell."""
    with _open(path) as (container, stream):
        packets = [_Packet(p.pts, p.dts, p.is_keyframe, p.is_discard, p.is_corrupt) for p in _demux(container, stream)]
        tick, codec = Fraction(stream.time_base), stream.codec_context.name
    if packets and packets[-1].corrupt:
        raise TangoError(f"{path} is truncated in the middle of frame {len(packets) - 1}", "copy or record it again")
    shown = sorted((p.pts, place) for place, p in enumerate(packets) if p.pts is not None and not p.hidden)
    times = [pts for pts, _ in shown]
    dts = [p.dts for p in packets if p.dts is not None]  # a step back in these is a joint of two recordings
    timed = all(p.pts is not None for p in packets) and dts == sorted(dts) and len(set(times)) == len(times)
    if codec not in _FRAME_PER_PACKET or not timed:
        _log.info("%s: the packets do not tell the frames (%s); decoding all of it", path, codec)
        return None
    keys = [(place, p.pts) for place, p in enumerate(packets) if p.key and p.pts is not None]
    places, key_times = [place for place, _ in keys], [pts for _, pts in keys]
    return _Timeline(times, tick, [place for _, place in shown], (places, key_times))


def _decode_all(path: Path) -> _Timeline:
    """The timeline as decoding everything gives it."""
    with _open(path, threads=_EXACT) as (container, stream):
        times = [frame.pts for frame in _decode(stream, _demux(container, stream))]
        tick, rate = Fraction(stream.time_base), stream.guessed_rate
    if None in times:  # raw streams: no times, at best a rate
        if not rate:
            raise TangoError(f"{path} tells neither times nor a frame rate", _mend(path))
        return _Timeline(list(range(len(times))), 1 / Fraction(rate))
    for i in range(1, len(times)):
        if times[i] <= times[i - 1]:
            raise TangoError(f"the timestamps of {path} do not ascend at frame {i}", _mend(path))
    return _Timeline(times, tick)


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
            raise _DisagreementError("the decoder gives a frame that no packet tells of")
        if i < run.first or i > run.last:
            continue  # before: a leading picture, of another run; after: not needed
        if frame.is_corrupt:  # what is made up for the missing part depends on where decoding began
            raise _DisagreementError(f"the frame at {timeline.seconds(i):.3f} s is damaged")
        if not due or i != due.pop():
            raise _DisagreementError(f"the frame at {timeline.seconds(i):.3f} s comes out of the decoder unexpectedly")
        yield i, frame
    if due:
        raise _DisagreementError(f"the frame at {timeline.seconds(due[-1]):.3f} s does not come out of the decoder")


def _demux(container: Any, stream: Any) -> Iterator[Any]:
    # Packets without content are a dropped frame or PyAV's mark of the end; a decoder would take both for the end.
    return (packet for packet in container.demux(stream) if packet.size)


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


def _to_rgb(frame: Any) -> Frame:
    rgb: Frame = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))
