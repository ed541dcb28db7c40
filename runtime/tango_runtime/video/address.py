"""The grammar of a source that is given as text: a file or a folder, or a live stream and what FFmpeg may do for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tango_plugins import TangoError

#: The stream on standard input.
STDIN = "-"

_PIPE = "{} | tango run BUNDLE - QUESTION"

#: What reads a camera of this machine into a pipe.
PIPE_CAMERA = _PIPE.format("ffmpeg -loglevel error -f v4l2 -i /dev/video0 -f mpegts -")
_PIPE_PIPELINE = _PIPE.format("gst-launch-1.0 -q PIPELINE ! mpegtsmux ! fdsink")
_PIPE_STREAM = _PIPE.format("ffmpeg -loglevel error -i SOURCE -c copy -f mpegts -")

#: Kinds of sources that are not read, and how a pipe reads them.
_REFUSED = {"v4l2": PIPE_CAMERA, "gst": _PIPE_PIPELINE, "csi": _PIPE_PIPELINE}


@dataclass(frozen=True)
class Kind:
    """A kind of live stream.

    Attributes:
        protocols: Those that FFmpeg may open, whatever the stream names.
        formats: Those that it may be in.
        options: FFmpeg's others.
    """

    protocols: str
    formats: str
    options: Mapping[str, str]


_HTTP_FORMATS = "mpegts,hls,mpjpeg,matroska,webm,mov,mp4"
_VERIFIED = {"tls_verify": "1"}

#: Kinds by what stands before ``://``. RTSP is carried over its own TCP connection: nothing is lost on the way.
KINDS = {
    "rtsp": Kind("rtsp,rtp,tcp", "rtsp", {"rtsp_transport": "tcp", "allowed_media_types": "video"}),
    "http": Kind("http,https,tls,tcp", _HTTP_FORMATS, _VERIFIED),
    "https": Kind("https,tls,tcp", _HTTP_FORMATS, _VERIFIED),
}

#: What comes in on standard input; it opens nothing else.
PIPED = Kind("pipe", "mpegts,matroska,webm,flv,h264,hevc,mov,mp4,mpjpeg,yuv4mpegpipe", {})


def is_live(text: str) -> bool:
    """Whether a text names a live stream. What exists as a file or a folder is that, whatever its name.

    Raises:
        TangoError: It names a kind of source that is not read.
    """
    if text == STDIN:
        return True
    scheme, colon, rest = text.partition(":")
    scheme = scheme.lower()
    has_scheme = bool(colon) and re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) is not None
    if not has_scheme or not (rest.startswith("//") or scheme in _REFUSED) or Path(text).exists():
        return False
    if scheme in KINDS and rest.startswith("//"):
        if not _host(text):
            raise TangoError(f"{redacted(text)} names no host", f"write {scheme}://HOST/PATH")
        return True
    raise TangoError(
        f"a source of kind {scheme}: is not read; these are: a file, a folder, {', '.join(f'{k}://' for k in KINDS)}, "
        f"{STDIN} for standard input",
        f"pipe it: {_REFUSED.get(scheme, _PIPE_STREAM)}",
    )


def source_name(text: str) -> str:
    """What messages and reports call a source: a file by its name, a stream without what may be a secret."""
    if text == STDIN:
        return "standard input"
    return redacted(text) if is_live(text) else Path(text).name


def redacted(address: str) -> str:
    """An address without user, password, query and fragment, any of which may be a secret."""
    scheme, _, rest = address.partition("://")
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _host(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:  # an unfinished IPv6 address
        return None
