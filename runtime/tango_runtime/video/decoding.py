"""Decodes the frames of a video that are wanted, and no packet that they do not need, on several decoders at a time."""

from __future__ import annotations

import os
import queue
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tango_runtime.video.container import EXACT, decode, demux, open_video
from tango_runtime.video.h264 import is_disposable
from tango_runtime.video.timeline import Key, Timeline

_T = TypeVar("_T")

#: So many packets between two runs are sought over, not read.
_FAR = 500

#: PyAV's number of an I picture.
_INTRA = 1

#: Most decoders at a time, and most pixels of the frames that they work on, one each: 16 of 1920×1080.
_DECODERS, _PIXELS = 16, 1 << 25


@dataclass(frozen=True)
class Run:
    """Packets to decode without a gap, and the frames that they must give.

    Attributes:
        start: Place of the first packet.
        stop: One past the place of the last.
        first: First frame that comes out.
        last: Last frame that is wanted.
    """

    start: int
    stop: int
    first: int
    last: int


class DisagreementError(Exception):
    """The decoder gives other frames than the timeline announced."""


class SeekError(DisagreementError):
    """Seeking does not lead where the timeline says."""


@dataclass(frozen=True)
class Decoders:
    """How a file is decoded.

    Attributes:
        seek: Seek over packets that are not needed.
        sparse: Leave out H.264 pictures that no other refers to and that are not wanted, often half of all.
        count: Decoders at a time.
        device: The GPU that decodes, and in whose memory the frames stay; None decodes in software.
    """

    seek: bool = True
    sparse: bool = True
    count: int = 1
    device: int | None = None


def software(pixels: int, *, seek: bool, sparse: bool) -> Decoders:
    """As many decoders of frames of so many pixels as this process has cores, and as memory allows."""
    return Decoders(seek, sparse, max(1, min(_cores(), _DECODERS, _PIXELS // max(pixels, 1))))


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def decode_frames(
    path: Path, timeline: Timeline, chosen: Sequence[int], decoders: Decoders, use: Callable[[Any], _T]
) -> Iterator[tuple[int, _T]]:
    """Decodes chosen frames.

    Args:
        path: The file.
        timeline: Its frames.
        chosen: Indices, ascending, each once.
        decoders: How.
        use: What to make of each PyAV frame, on the thread of its decoder.

    Yields:
        (index, what was made of the frame), in any order where several decoders work.

    Raises:
        DisagreementError: The decoder gives other frames than the timeline says.
        TangoError: The file cannot be read.
    """
    wanted = set(chosen)
    if timeline.packets is None:
        with open_video(path, threads=EXACT) as (container, stream):
            decoded = enumerate(decode(stream, demux(container, stream)))
            yield from islice(((i, use(frame)) for i, frame in decoded if i in wanted), len(wanted))
        return
    groups = _share(plan_runs(timeline, chosen), decoders.count)
    threads = 0 if len(groups) == 1 else max(1, _cores() // len(groups))  # 0: as many as FFmpeg thinks best
    if decoders.device is not None:
        threads = 1

    def work(runs: Sequence[Run]) -> Iterator[tuple[int, _T]]:
        with open_video(path, thread_count=threads, device=decoders.device) as (container, stream):
            packets = _Packets(container, stream, timeline, seek=decoders.seek)
            # Without reordering, only pictures that come out late would show that the times are those of decoding.
            sparse = decoders.sparse and timeline.reorders and not timeline.is_uncertain
            sparse = sparse and stream.codec_context.codec.canonical_name == "h264"
            for run in runs:
                left_out: set[int] = set()
                needed = packets.of(run)
                if sparse:
                    needed = _without_disposable(needed, stream, timeline, wanted, left_out)
                numbered = _in_order(decode(stream, needed), run, timeline, left_out)
                yield from ((i, use(frame)) for i, frame in numbered if i in wanted)

    if len(groups) == 1:
        yield from work(groups[0])
    else:
        yield from _side_by_side(work, groups)


class _Packets:
    """The packets of a file, of which far ones are sought."""

    def __init__(self, container: Any, stream: Any, timeline: Timeline, *, seek: bool) -> None:
        self._container, self._stream, self._keys = container, stream, timeline.keys
        self._seek, self._place = seek, 0
        self._packets = demux(container, stream)

    def of(self, run: Run) -> Iterator[Any]:
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
        raise SeekError("its keyframes cannot be sought")


def plan_runs(timeline: Timeline, chosen: Sequence[int]) -> list[Run]:
    """The least packets that give the chosen frames.

    Decoding from a keyframe gives what decoding from the start gives for every frame presented at or after the
    keyframe. The others that follow it in the file (the leading pictures of an open GOP) need the keyframe before.
    Without keyframes all packets are decoded, so that every frame is seen.
    """
    assert timeline.packets is not None
    keys = timeline.keys
    if timeline.is_uncertain:
        return [Run(0, max(timeline.packets) + 1, 0, len(timeline.times) - 1)]
    runs: list[Run] = []
    for i in chosen:
        last = timeline.packets[i]
        k = bisect_left(keys, (last + 1,)) - 1
        while k >= 0 and keys[k].pts > timeline.times[i]:
            k -= 1
        start, first = (keys[k].place, bisect_left(timeline.times, keys[k].pts)) if k >= 0 else (0, 0)
        # An index knows the packet of a keyframe, and which frame that gives is seen when it is decoded.
        if not (timeline.is_from_index and k >= 0 and last == start):
            last += timeline.slack
        if runs and start < runs[-1].stop:
            before = runs.pop()
            start, first, last = before.start, before.first, max(last, before.stop - 1)
        runs.append(Run(start, last + 1, first, i))
    return runs


def _share(runs: Sequence[Run], workers: int) -> list[list[Run]]:
    """Runs in order, in at most so many groups of about as many packets."""
    total = sum(run.stop - run.start for run in runs)
    groups: list[list[Run]] = []
    done = 0
    for run in runs:
        if not groups or done * workers >= len(groups) * total:
            groups.append([])
        groups[-1].append(run)
        done += run.stop - run.start
    return groups


def _side_by_side(work: Callable[[list[Run]], Iterator[_T]], groups: Sequence[list[Run]]) -> Iterator[_T]:
    """What work gives of each group, on a thread each, as it comes; the first error ends all."""
    results: queue.Queue[tuple[_T] | Exception | None] = queue.Queue(maxsize=len(groups))
    stopped = threading.Event()

    def run(group: list[Run]) -> None:
        try:
            for result in work(group):
                if stopped.is_set():
                    break
                results.put((result,))
            results.put(None)
        except Exception as error:
            results.put(error)

    threads = [threading.Thread(target=run, args=(group,), name="decoder") for group in groups]
    for thread in threads:
        thread.start()
    left, result = len(groups), None
    try:
        while left:
            result = results.get()
            left -= not isinstance(result, tuple)
            if isinstance(result, Exception):
                raise result
            if result is not None:
                yield result[0]
    finally:
        result = None  # an error would refer to itself by its traceback, and keep a frame and its threads
        stopped.set()
        while left:  # so that none waits for room in the queue
            left -= not isinstance(results.get(), tuple)
        for thread in threads:
            thread.join()


def _without_disposable(
    packets: Iterator[Any], stream: Any, timeline: Timeline, wanted: Set[int], left_out: set[int]
) -> Iterator[Any]:
    """Packets without those of frames that are neither wanted nor referred to; adds these frames to ``left_out``."""
    extradata = stream.codec_context.extradata
    for packet in packets:
        i = timeline.index(packet.pts)
        # A keyframe is kept, whatever it says: that decoding can begin with it is seen when it is decoded.
        if i is None or i in wanted or packet.is_keyframe or not is_disposable(bytes(packet), extradata):
            yield packet
        else:
            left_out.add(i)


def _in_order(frames: Iterator[Any], run: Run, timeline: Timeline, left_out: Set[int]) -> Iterator[tuple[int, Any]]:
    """Numbers the frames of a run and holds them against the timeline, frame by frame, but for those left out."""
    assert timeline.packets is not None
    due = [i for i in range(run.last, run.first - 1, -1) if timeline.packets[i] < run.stop]
    before = -1
    for frame in frames:
        i = timeline.index(frame.pts)
        if i is None:
            raise DisagreementError("the decoder gives a frame that no packet announced")
        if i <= before:
            raise DisagreementError(f"the frame at {timeline.seconds[i]:.3f} s comes out of the decoder late")
        before = i
        if i < run.first:
            continue  # a leading picture, of another run
        if i == run.first and run.start and not _is_key(frame):
            raise DisagreementError(f"decoding cannot begin with the frame at {timeline.seconds[i]:.3f} s")
        # What is made up for the missing part depends on what was decoded before, and may spoil even the next run.
        if frame.is_corrupt:
            raise DisagreementError(f"the frame at {timeline.seconds[i]:.3f} s is damaged")
        if i > run.last:
            continue  # not needed
        while due and due[-1] in left_out:
            due.pop()
        if not due or i != due.pop():
            raise DisagreementError(f"the frame at {timeline.seconds[i]:.3f} s comes out of the decoder unexpectedly")
        yield i, frame
    due = [i for i in due if i not in left_out]
    if due:
        raise DisagreementError(f"the frame at {timeline.seconds[due[-1]]:.3f} s does not come out of the decoder")


def _is_key(frame: Any) -> bool:
    """Whether a frame depends on no other; some recorders mark packets as keyframes that are none."""
    return bool(frame.key_frame) or frame.pict_type == _INTRA
