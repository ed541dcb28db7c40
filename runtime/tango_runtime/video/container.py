"""Video files as FFmpeg reads them: checked before, one stream of packets, frames."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tango_plugins import TangoError
from tango_runtime.util.versions import release
from tango_runtime.video.address import exists
from tango_runtime.video.playlist import check_playlist
from tango_runtime.video.truncation import check_complete
from tango_runtime.video.yuv import HardwareError

#: Threads within a frame only: with several frames under way, how many of them a damaged packet takes along depends on
#: the number of cores. Frames whose packets are whole decode to the same pixels either way.
EXACT = "SLICE"

#: Most pixels of a frame: 8192×8192, twice an 8K video.
MAX_PIXELS = 1 << 26

#: A file is that file: %d in its name is no pattern of other names.
_OPTIONS = {"pattern_type": "none"}

#: Formats that FFmpeg recognizes by content and that are no video of their own.
_NOT_VIDEO = {"concat": "a list of other files", "tty": "a text"}


def check_file(path: Path) -> None:
    """Rejects what is no video file or not all of one, as far as that shows before FFmpeg opens it."""
    if not exists(path):
        raise TangoError(f"{path} does not exist", "give the path of a video file or of a folder of images")
    if not path.is_file():
        raise TangoError(f"{path} is not a regular file", "give a file, or a camera such as /dev/video0")
    if path.stat().st_size == 0:
        raise TangoError(f"{path} is empty", "copy or record the video again")
    check_complete(path)
    check_playlist(path)


@contextlib.contextmanager
def open_video(
    path: Path, threads: str = "AUTO", thread_count: int = 0, device: int | None = None
) -> Iterator[tuple[Any, Any]]:
    """Opens a video.

    Args:
        path: The file.
        threads: What each of a decoder's threads works on, as PyAV calls it.
        thread_count: A decoder's threads; 0 leaves that to FFmpeg.
        device: The GPU that decodes; None decodes in software.

    Yields:
        (PyAV container, its best video stream).

    Raises:
        TangoError: FFmpeg cannot read it.
    """
    import av  # FFmpeg takes a fifth of the time that importing the runtime does, and not every source needs it

    try:
        # FFmpeg takes what stands before a colon for a protocol, unless the path is absolute.
        options = lenient() if device is None else {**lenient(), "hwaccel": _on_device(device)}
        with av.open(str(path.absolute()), options=_OPTIONS, **options) as container:
            if container.format.name in _NOT_VIDEO:
                raise TangoError(f"{path} is {_NOT_VIDEO[container.format.name]}", "give a video file")
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise TangoError(
                    f"{path} has no video stream", "give a file with video, not only sound or a cover picture"
                )
            if stream.codec_context is None:
                raise TangoError(f"the video stream of {path} has no decoder here", repair(path))
            if device is not None and not stream.codec_context.is_hwaccel:
                raise HardwareError(f"the GPU does not decode {stream.codec_context.name}")
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_PIXELS:  # a GIF of 100 bytes may claim gigabytes
                raise TangoError(f"the frames of {path} have {width}×{height} pixels", "scale the video down")
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # where the size changes later
            stream.thread_type, stream.codec_context.thread_count = threads, thread_count
            yield container, stream
    except av.FFmpegError as error:
        if device is not None:
            raise HardwareError(f"FFmpeg cannot use the GPU: {error.strerror}") from error
        raise TangoError(
            f"{path} cannot be read as a video: {error.strerror}", "check that it plays; copy or record it again"
        ) from error


def lenient() -> dict[str, str]:
    """What av.open needs to read tags that are not UTF-8: from PyAV 19 on nothing."""
    import av

    return {} if release(av.__version__) >= (19,) else {"metadata_errors": "ignore"}


def _on_device(device: int) -> Any:
    """PyAV's wish for frames that the GPU decodes, and that stay in its memory, in the context of the CUDA runtime.

    Raises:
        HardwareError: PyAV is too old for that.
    """
    try:
        from av.codec.hwaccel import HWAccel

        return HWAccel("cuda", device=str(device), is_hw_owned=True)
    except (ImportError, TypeError) as error:
        raise HardwareError("PyAV 16 or newer is needed for that") from error


def repair(path: Path) -> str:
    """The hint for a file with a fault."""
    return f"check that it plays; ffmpeg -i {path.name} fixed.mp4 may repair it"


def demux(container: Any, stream: Any) -> Iterator[Any]:
    """The packets of a stream that have content, from where the container is."""
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


def decode(stream: Any, packets: Iterable[Any], on_damage: Callable[[], None] = lambda: None) -> Iterator[Any]:
    """Decodes packets from a keyframe on, to the last frame, and leaves the decoder ready for another keyframe."""
    for packet in chain(packets, (None,)):
        yield from decode_packet(stream, packet, on_damage)
    stream.codec_context.flush_buffers()


def decode_packet(stream: Any, packet: Any, on_damage: Callable[[], None] = lambda: None) -> Sequence[Any]:
    """The frames that a packet gives; none where it is damaged, as every player does: the other packets still decode.

    Calls ``on_damage`` then.

    Raises:
        MemoryError: There is too little for them.
    """
    from av import FFmpegError

    try:
        frames: Sequence[Any] = stream.decode(packet)
    except MemoryError:
        raise
    except FFmpegError:  # each decoder has its own code for damage
        on_damage()
        return ()
    return frames
