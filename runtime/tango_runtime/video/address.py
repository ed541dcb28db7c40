"""The grammar of a source that is given as text: a file, a folder or a live stream, and what FFmpeg may do for it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tango_plugins import TangoError

#: The stream on standard input.
STDIN = "-"

#: What reads another kind of stream into a pipe.
_PIPE = "ffmpeg -loglevel error -i SOURCE -c copy -f mpegts - | tango run BUNDLE - QUESTION"

#: Kinds of sources of this machine, by what stands before the colon: what must follow, and what to write.
_LOCAL = {
    "v4l2": (r"/.+", "v4l2:/dev/video0"),
    "gst": (r".*\S.*", "'gst:v4l2src ! jpegdec'"),
    "csi": (r"[0-9]+", "csi:0"),
}

_VIDEO_DEVICE = re.compile(r"/dev/video[0-9]+")


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
    if text == STDIN or is_video_device(text):
        return True
    kind, colon, rest = text.partition(":")
    kind = kind.lower()
    is_kind = bool(colon) and re.fullmatch(r"[a-z][a-z0-9+.-]*", kind) is not None
    if not is_kind or not (rest.startswith("//") or kind in _LOCAL) or exists(text):
        return False
    if kind in _LOCAL:
        form, example = _LOCAL[kind]
        if not re.fullmatch(form, rest, re.DOTALL):
            raise TangoError(f"{kind}:{rest} is not a source", f"write {example}")
        return True
    if kind in KINDS:
        if not _host(text):
            raise TangoError(f"{redacted(text)} names no host", f"write {kind}://HOST/PATH")
        return True
    live = ", ".join((*(f"{k}://" for k in KINDS), *(f"{k}:" for k in _LOCAL)))
    raise TangoError(
        f"a source of kind {kind}: is not read; these are: a file, a folder, {live}, {STDIN} for standard input",
        f"pipe it: {_PIPE}",
    )


def exists(path: str | Path) -> bool:
    """Whether there is something of a name, which may be too long for one."""
    return os.path.exists(path)  # noqa: PTH110  # pathlib raises then


def is_video_device(path: str | Path) -> bool:
    """Whether a path is that of a camera of this machine, or a link to one, present or not."""
    with contextlib.suppress(ValueError, OSError):  # no path at all
        return _VIDEO_DEVICE.fullmatch(os.path.realpath(path)) is not None
    return False


def local_kind(text: str) -> tuple[str, str]:
    """(kind, what follows its colon) of a source of this machine; empty, as for files, where it is another."""
    if is_video_device(text):
        return "v4l2", text
    kind, _, rest = text.partition(":")
    return (kind.lower(), rest) if kind.lower() in _LOCAL else ("", text)


def source_name(text: str) -> str:
    """What messages and reports call a source: a file by its name, a stream without what may be a secret."""
    if text == STDIN:
        return "standard input"
    if not is_live(text):
        return Path(text).name
    kind, rest = local_kind(text)
    return f"gst:{_elements(rest)}" if kind == "gst" else text if kind else redacted(text)


def _elements(pipeline: str) -> str:
    """A pipeline's elements without their properties, one of which may be a password."""
    first = (part.split() for part in pipeline.split("!"))
    words = [words[0].split(",")[0] for words in first if words]
    return " ! ".join(word if re.fullmatch(r"[\w/.()-]+", word) else "…" for word in words)


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
