"""When the frames of a video file are shown, and which packets give them."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_runtime.video.container import EXACT, decode, demux, open_video, repair
from tango_runtime.video.h264 import has_slice, may_have_fields

_log = logging.getLogger("tango_runtime.video")

#: Codecs whose every shown packet is one frame. Of others every packet is decoded, to see that it is.
_FRAME_PER_PACKET = {
    *("h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "prores", "ffv1"),
    *("wmv1", "wmv2", "msmpeg4v2", "msmpeg4v3", "flv1"),
}

#: An MPEG-4 packet of at most so many bytes may be a mark that a frame is left out.
_LEFT_OUT = 16

#: Those of them whose long files are read by their index; from how many packets on, and how many are read to see that
#: the index says the same as they do.
_INDEXED, _MANY, _LOOK = {"h264", "hevc"}, 500, 64
_INDEX_ENTRY = np.dtype([("dts", "i8"), ("pos", "i8"), ("size", "i8"), ("key", "?")])

#: Most frames by which decoding and presentation order differ (H.264, H.265).
_REORDERING = 16


class Packet(NamedTuple):
    """What the first pass learns of a packet: its times in ticks, whether decoding can begin with it, and so on."""

    pts: int | None
    dts: int | None
    key: bool
    hidden: bool  # decoded for others' sake and not shown (edit lists, VP8's alternate references, messages alone)
    corrupt: bool
    size: int
    pos: int | None  # byte in the file


class Key(NamedTuple):
    """A packet where decoding may begin.

    Attributes:
        place: Which packet of the file it is.
        pts: Presentation time in ticks.
        dts: Decoding time in ticks, None where there is none.
        pos: Its byte in the file, None where unknown.
    """

    place: int
    pts: int
    dts: int | None
    pos: int | None


@dataclass(frozen=True)
class Timeline:
    """The frames of a video in order of presentation.

    Attributes:
        times: Presentation time of each frame in ticks, ascending; strictly where ``packets`` is not None.
        tick: Seconds per tick.
        pixels: Of a frame.
        packets: For each frame the place of its packet in the file; None where only decoding showed the frames.
        keys: Packets where decoding may begin, by place; none where every packet must be decoded.
        slack: By how many packets the packet of a frame may follow the place that ``packets`` has, or others' packets
            would show that the times are not those of presentation.
        is_from_index: The container's index told all this. It has no times of presentation: they are expected to be
            even, which decoding the chosen frames confirms or refutes.
    """

    times: Sequence[int]
    tick: Fraction
    pixels: int
    packets: Sequence[int] | None = None
    keys: Sequence[Key] = ()
    slack: int = 0
    is_from_index: bool = False

    @property
    def is_uncertain(self) -> bool:
        """Whether only reading shows that each of the packets is one frame."""
        return self.packets is not None and not self.keys

    @cached_property
    def reorders(self) -> bool:
        """Whether packets have another order than their frames: then their times are surely those of presentation."""
        if self.packets is None or self.is_from_index:
            return self.slack > 0
        return any(after < before for before, after in pairwise(self.packets))

    @cached_property
    def seconds(self) -> NDArray[np.float64]:
        """[n], time of each frame since the first."""
        ticks = np.array(self.times, np.int64)
        return (ticks - ticks[:1]) * self.tick.numerator / self.tick.denominator

    def index(self, pts: int | None) -> int | None:
        """The frame at a time of presentation; None if there is none."""
        if pts is None:
            return None
        i = bisect_left(self.times, pts)
        return i if i < len(self.times) and self.times[i] == pts else None


def read_timeline(path: Path, *, by_index: bool = True) -> Timeline:
    """The timeline of the packets or, where these do not tell the frames' times, of decoding everything.

    Args:
        path: The file.
        by_index: Trust the index of a long file; else every packet is read.
    """
    with open_video(path) as (container, stream):
        if by_index and (indexed := _read_index(path, container, stream)):
            return indexed
        codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata
        packets = [_read_packet(packet, codec, extradata, path) for packet in demux(container, stream)]
        tick, rate, pixels = Fraction(stream.time_base), stream.guessed_rate, _pixels(stream)
        reorders = stream.codec_context.has_b_frames
    if packets and packets[-1].corrupt:
        raise TangoError(f"{path} is truncated in the middle of frame {len(packets) - 1}", "copy or record it again")
    shown = sorted((p.pts, place) for place, p in enumerate(packets) if p.pts is not None and not p.hidden)
    times, places = [pts for pts, _ in shown], [place for _, place in shown]
    seconds = (times[-1] - times[0]) * tick if times else len(packets) / Fraction(rate) if rate else None
    if reason := _why_times_are_unknown(packets, times):
        return decode_all(path, reason, len(packets), None if seconds is None else float(seconds))
    if reason := _why_frames_are_uncertain(codec, extradata, packets):
        _warn_of_decoding(path, reason, len(times), None if seconds is None else float(seconds))
        return Timeline(times, tick, pixels, places)
    keys = [Key(place, p.pts, p.dts, p.pos) for place, p in enumerate(packets) if p.key and p.pts is not None]
    # Times in the order of decoding may be made up: with a few packets more, frames come out in another order then.
    slack = _REORDERING if reorders and places == sorted(places) else 0
    return Timeline(times, tick, pixels, places, keys, slack)


def _read_index(path: Path, container: Any, stream: Any) -> Timeline | None:
    """The timeline by the index of an MP4 of many frames at even times, which costs little for any number.

    Returns:
        None, before any packet is read, where there is no such index. Where the first packets are not as it says, the
        timeline of all packets.
    """
    codec, entries = stream.codec_context.codec.canonical_name, stream.index_entries
    if codec not in _INDEXED or not container.format.name.startswith("mov") or len(entries) < _MANY:
        return None
    extradata = stream.codec_context.extradata
    if codec == "h264" and may_have_fields(extradata):
        return None
    rows = ((entry.timestamp, entry.pos, entry.size, entry.is_keyframe) for entry in entries)
    index = np.fromiter(rows, _INDEX_ENTRY, len(entries))  # a list would take ten times the memory
    n, step = len(index), int(index["dts"][1] - index["dts"][0])
    if step <= 0 or (np.diff(index["dts"]) != step).any() or n * step != stream.duration:
        return None
    if any(entry.is_discard for entry in entries):
        return None
    first = [_read_packet(packet, codec, extradata, path) for packet in islice(demux(container, stream), _LOOK)]
    times = [p.pts for p in first if p.pts is not None and not p.hidden]
    if len(times) < _LOOK or [(p.dts, p.pos, p.size, p.key) for p in first] != index[:_LOOK].tolist():
        return read_timeline(path, by_index=False)
    begin = min(times)
    places = np.flatnonzero(index["key"]).tolist()
    keys = [Key(i, begin + i * step, int(index["dts"][i]), int(index["pos"][i])) for i in places]
    slack = max(place - (pts - begin) // step for place, pts in enumerate(times))
    even = range(begin, begin + n * step, step)
    return Timeline(even, Fraction(stream.time_base), _pixels(stream), range(n), keys, slack, is_from_index=True)


def _pixels(stream: Any) -> int:
    return int(stream.codec_context.width * stream.codec_context.height)


def _read_packet(packet: Any, codec: str, extradata: bytes | None, path: Path) -> Packet:
    if packet.has_sidedata("encryption_info"):  # the decoder would make frames of noise of some packets
        raise TangoError(f"the video of {path} is encrypted", "give a file without encryption")
    shown = True
    if codec == "vp8":
        shown = bool(memoryview(packet)[0] & 1 << 4)  # RFC 6386, section 9.1: show_frame
    elif codec in ("h264", "hevc"):
        shown = has_slice(bytes(packet), codec, extradata)
    hidden = packet.is_discard or not shown
    return Packet(packet.pts, packet.dts, packet.is_keyframe, hidden, packet.is_corrupt, packet.size, packet.pos)


def _why_times_are_unknown(packets: list[Packet], times: list[int]) -> str:
    """Why the packets do not tell when frames are shown; empty where they do."""
    if any(p.pts is None for p in packets):
        return "its packets have no times"
    if len(set(times)) != len(times):
        return "two of its packets have the same time"
    dts = [p.dts for p in packets if p.dts is not None]
    return "" if dts == sorted(dts) else "its timestamps step back, as where two recordings were joined"


def _why_frames_are_uncertain(codec: str, extradata: bytes | None, packets: list[Packet]) -> str:
    """Why a shown packet may not be one frame; empty where each is."""
    if codec == "h264" and may_have_fields(extradata):
        return "its packets may be fields"
    if codec == "mpeg4" and any(p.size <= _LEFT_OUT for p in packets):
        return "its packets may be marks of frames left out"
    return "" if codec in _FRAME_PER_PACKET else f"a packet of {codec} is not always one frame"


def _warn_of_decoding(path: Path, reason: str, frames: int, seconds: float | None) -> None:
    length = f"about {frames} frames" + ("" if seconds is None else f", {seconds:.1f} s of video")
    _log.warning("%s: %s; decoding the whole file to know its frames (%s)", path, reason, length)


def decode_all(path: Path, reason: str, packets: int, seconds: float | None) -> Timeline:
    """The timeline that decoding everything gives, with a warning because that takes long, and one of what is lost."""
    _warn_of_decoding(path, reason, packets, seconds)
    damaged: list[None] = []
    with open_video(path, threads=EXACT) as (container, stream):
        times = [frame.pts for frame in decode(stream, demux(container, stream), lambda: damaged.append(None))]
        tick, rate, pixels = Fraction(stream.time_base), stream.guessed_rate, _pixels(stream)
        format_name = container.format.name
    if not times and format_name == "webp_pipe":
        raise TangoError(
            f"{path} is an animated or damaged WebP: FFmpeg reads no frame of it", "make it a GIF or a video"
        )
    if not times:
        raise TangoError(f"no frame of {path} ({format_name}) can be decoded", f"is it encrypted? {repair(path)}")
    if damaged:
        lost, left = len(damaged), len(times)
        _log.warning("%s: packets that do not decode: %d; frames are taken from the %d that are left", path, lost, left)
    if None in times:  # raw streams: no times, at best a rate
        if not rate:
            raise TangoError(f"{path} has neither times nor a frame rate", repair(path))
        return Timeline(range(len(times)), 1 / Fraction(rate), pixels)
    ascending = _ascending(times)
    if ascending != times:
        _log.warning("%s: the times of its frames step back; the frames keep their order, their times are fixed", path)
    return Timeline(ascending, tick, pixels)


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
