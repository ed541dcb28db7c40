"""Where a live source has its pictures from: what FFmpeg reads over the network, or from a pipe."""

from __future__ import annotations

import math
import os
import select
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

from tango_plugins import TangoError
from tango_runtime.video.address import KINDS, PIPED, Kind, redacted
from tango_runtime.video.container import decode_packet, lenient
from tango_runtime.video.rgb import to_rgb
from tango_runtime.video.source import Frame

#: Most bytes, microseconds and streams by which FFmpeg learns what a stream is.
_PROBING = {"probesize": "5000000", "analyzeduration": "5000000", "max_streams": "32"}

#: Answers of a server that another attempt does not change.
_FINAL = ("HTTPBadRequestError", "HTTPUnauthorizedError", "HTTPForbiddenError", "HTTPNotFoundError")

#: Frames a second of a stream that has neither times nor a rate.
_RATE = 25

#: Most pixels of a frame: 4096×4096.
MAX_PIXELS = 1 << 24


class Picture(NamedTuple):
    """A decoded picture that may become a frame.

    Attributes:
        seconds: By the stream's own clock, which may begin anywhere, step or begin anew.
        rgb: Converts it: uint8 RGB [H, W, 3].
    """

    seconds: float
    rgb: Callable[[], Frame]


class CutError(Exception):
    """A connection failed or was lost; another may succeed. Its text is the reason, without secrets."""


class LiveInput(Protocol):
    """Where a live source has its pictures from.

    Attributes:
        name: What messages call it, without secrets.
        ends: Whether the end of its pictures is its end; else it is a cut, after which it is asked for them again.
    """

    name: str
    ends: bool

    def pictures(self, patience: float, closed: threading.Event) -> Iterator[Picture | None]:
        """Connects, and gives pictures in order of presentation; None where some data gave none.

        Args:
            patience: Seconds after which it gives up waiting for data, with a CutError.
            closed: Set when nobody wants more; it should then end soon.

        Raises:
            CutError: The connection failed or was lost.
            TangoError: It is not to be tried again.
        """


class Network:
    """A LiveInput of an address, ``rtsp://``, ``http://`` or ``https://``."""

    ends = False

    def __init__(self, address: str) -> None:
        self.name = redacted(address)
        self._address, self._kind = address, KINDS[address.partition(":")[0].lower()]
        self._was_connected = False

    def pictures(self, patience: float, closed: threading.Event) -> Iterator[Picture | None]:
        """Connects, and decodes; see :class:`tango_runtime.video.live.LiveInput`."""
        import av

        options = {**options_of(self._kind), **self._kind.options}
        if "tls" in self._kind.protocols and (roots := ssl.get_default_verify_paths().cafile):
            options["ca_file"] = roots
        try:
            with av.open(self._address, options=options, timeout=patience, **lenient()) as container:
                if self._address.lower().startswith("http") and container.duration is not None:
                    seconds = container.duration / av.time_base
                    raise TangoError(
                        f"{self.name} is a recording of {seconds:.1f} s, not a stream", "download it, and give the file"
                    )
                self._was_connected = True
                yield from decode(container, self.name)
        except av.ExitError:  # FFmpeg's, where it was interrupted: by the time-out
            raise CutError(f"nothing came for {patience:.1f} s") from None
        except av.FFmpegError as error:  # its text and its context name the address
            if not self._was_connected and type(error).__name__ in _FINAL:
                raise TangoError(
                    f"{self.name} cannot be read: {error.strerror}", "check the address, user and password"
                ) from None
            raise CutError(error.strerror) from None


class Pipe:
    """A LiveInput of a pipe or a file that others write, standard input by default."""

    ends = True

    def __init__(self, descriptor: int = 0, name: str = "standard input") -> None:
        if os.isatty(descriptor):
            raise TangoError(f"{name} is a terminal", "pipe a stream into it, or give a file in place of -")
        self.name, self._descriptor = name, descriptor

    def pictures(self, patience: float, closed: threading.Event) -> Iterator[Picture | None]:
        """Reads and decodes; see :class:`tango_runtime.video.live.LiveInput`."""
        import av

        silence = TangoError(
            f"{self.name} gave nothing for {patience:.1f} s", "check that what writes to the pipe runs"
        )
        reader = Reader(self._descriptor, patience, closed, silence)
        try:
            with av.open(reader, options=options_of(PIPED), **lenient()) as container:
                yield from decode(container, self.name)
        except av.FFmpegError as error:
            if closed.is_set():
                return
            raise TangoError(
                f"{self.name} cannot be read as a video: {error.strerror}",
                "pipe a format that can be read from its beginning: MPEG-TS, Matroska or raw H.264",
            ) from error


class Reader:
    """What FFmpeg reads a pipe with; waiting ends with the time-out, or when nobody wants more.

    Args:
        descriptor: The pipe.
        patience: Seconds that it waits for data.
        closed: Set when nobody wants more.
        silence: Raised after the time-out.
    """

    def __init__(self, descriptor: int, patience: float, closed: threading.Event, silence: Exception) -> None:
        self._descriptor, self._patience, self._closed, self._silence = descriptor, patience, closed, silence

    def read(self, size: int) -> bytes:
        """At most so many bytes, empty at the end."""
        end = time.monotonic() + self._patience
        while not self._closed.is_set():
            if select.select([self._descriptor], [], [], 0.1)[0]:
                return os.read(self._descriptor, size)
            if time.monotonic() > end:
                raise self._silence
        return b""


def options_of(kind: Kind) -> dict[str, str]:
    """FFmpeg's options that hold a stream to its kind, and limit what it takes to learn what it is."""
    return {"protocol_whitelist": kind.protocols, "format_whitelist": kind.formats, **_PROBING}


def decode(container: Any, name: str, demux: Callable[[Any], Iterable[Any]] | None = None) -> Iterator[Picture | None]:
    """Pictures of a container's best video stream; None for each packet that gives none.

    Args:
        container: PyAV's, open.
        name: What messages call it.
        demux: The packets of a stream, where they come otherwise than from the container.
    """
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        raise TangoError(f"{name} has no video that can be decoded", "give a stream with video, not only sound")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise TangoError(f"the frames of {name} have {width}×{height} pixels", "scale them down where they are made")
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # where the size changes later
    stream.thread_type = "SLICE"  # threads of whole frames would each hold one back
    rate, seconds = float(stream.guessed_rate or _RATE), -math.inf
    for packet in (demux or container.demux)(stream):
        frames = [frame for frame in decode_packet(stream, packet) if not frame.is_corrupt]
        for frame in frames:
            seconds = frame.time if frame.time is not None else max(seconds + 1 / rate, 0.0)
            yield Picture(seconds, partial(to_rgb, frame, name))
        if not frames:
            yield None
