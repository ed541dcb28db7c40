"""Decodes a client's media, as a process of its own: ``python -m tango_runtime.server.decoder BYTES``.

A video may come from anybody, and FFmpeg is large: what it does to this process, by its time, its memory or its end, it
does not do to the server. Requests are lines of JSON on standard input; a reply is a line of JSON on standard output,
and after it the bytes of the frames.
"""

from __future__ import annotations

import json
import resource
import sys
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from tango_plugins import TangoError
from tango_runtime.bundle import Bundle, Manifest
from tango_runtime.util.errors import first_line
from tango_runtime.util.limited import limit_this_process
from tango_runtime.video import FrameSource, Sampled, open_source
from tango_runtime.video.container import lenient
from tango_runtime.video.frames import from_pairs, upright
from tango_runtime.video.preprocess import preprocess
from tango_runtime.video.shape import choose_size
from tango_runtime.video.source import FrameStream

#: Containers that hold their own frames. Others that FFmpeg knows name further files or hosts (HLS, DASH, concat, SDP).
_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf,gif,h264,hevc,m4v,mpegvideo,ivf,obu,mjpeg"
_IMAGES = ("PNG", "JPEG", "WEBP", "BMP")

#: Most pixels of a frame or an image.
_MAX_PIXELS = 1 << 25


def main() -> None:
    """Serves requests until standard input ends."""
    limit_this_process({resource.RLIMIT_AS: int(sys.argv[1]), resource.RLIMIT_CORE: 0})
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing else writes among the replies
    for line in requests:
        _reply(json.loads(line), replies)


def _reply(request: dict[str, Any], to: BinaryIO) -> None:
    try:
        header, frames = _decode(request)
    except TangoError as error:
        message = error.message  # the client does not learn where the server has it
        for path in request["paths"]:
            message = message.replace(path, "the video")
        header, frames = {"error": message, "hint": error.hint}, b""
    except MemoryError:
        header, frames = {"error": "the video takes too much memory", "hint": "scale it down"}, b""
    except Exception as error:  # a damaged file may raise anything
        header, frames = {"error": f"the video cannot be read: {first_line(error)}", "hint": "check that it plays"}, b""
    to.write(json.dumps({**header, "bytes": len(frames)}).encode() + b"\n")
    to.write(frames)
    to.flush()


def _decode(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    if request.get("whole"):  # an image as it is
        image = _image(Path(request["paths"][0]).read_bytes(), 0)
        height, width = image.shape[:2]
        header = {"seconds": [0.0], "duration": None, "aspect": width / height, "size": (height, width)}
        return header, image.tobytes()
    video = _manifest(request["bundle"]).video
    source = _source(request)
    chosen = _choose(source, request, video.frames, video.sampling)
    found = source.frame_size if video.budget else None
    fixed = request["fixed"] and tuple(request["fixed"])
    size = choose_size(video, len(chosen), found, max_pixels=request["max_pixels"], fixed=fixed)
    stream = FrameStream(source, chosen)
    batch = preprocess(stream, size)
    clock = stream.clock
    header = {
        "seconds": clock.seconds.tolist(),
        "duration": clock.duration,
        "aspect": batch.aspect,
        "size": size,
    }
    return header, np.ascontiguousarray(batch.host_frames).tobytes()


def _choose(source: FrameSource, request: dict[str, Any], default: int, rounding: Any) -> Sampled:
    """The frames that were asked for; without a number, the bundle's, or all where there are fewer."""
    frames, fps, most = request["frames"], request["fps"], request["most"]
    if fps is not None:
        chosen = source.sample_at(fps)
        if frames is None and len(chosen) > most:
            raise TangoError(f"{fps:g} frames a second are {len(chosen)} frames", f"at most {most} are taken")
        if frames is None or len(chosen) <= frames:
            return chosen
    if frames is not None and frames > most:
        raise TangoError(f"{frames} frames were asked for", f"at most {most} are taken")
    if frames is None:
        frames = min(default, len(source.sample_at(1e6)))  # each frame is in a microsecond of its own
    return source.sample(frames, rounding=rounding)


def _source(request: dict[str, Any]) -> FrameSource:
    paths = [Path(path) for path in request["paths"]]
    if not request["images"]:
        _require_own_frames(paths[0])
        return open_source(paths[0])
    seconds = request["seconds"] or [i / (request["fps"] or 1.0) for i in range(len(paths))]
    images = [_image(path.read_bytes(), i) for i, path in enumerate(paths)]
    return from_pairs(list(zip(seconds, images, strict=True)), "the list of images")


def _image(data: bytes, i: int) -> Any:
    try:
        with Image.open(BytesIO(data), formats=_IMAGES) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise TangoError(f"image {i} has {image.width}×{image.height} pixels", "scale it down")
            return np.array(upright(image))
    except TangoError:
        raise
    except UnidentifiedImageError as error:  # its message has an address of memory
        raise TangoError(f"image {i} is of no known format", f"give {', '.join(_IMAGES)}") from error
    except Exception as error:  # a damaged image may raise anything
        raise TangoError(f"image {i} cannot be read: {first_line(error)}", f"give {', '.join(_IMAGES)}") from error


def _require_own_frames(path: Path) -> None:
    """Rejects what is no container of frames, before anything that it names could be opened."""
    import av

    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    try:
        with av.open(str(path.absolute()), options=options, **lenient()) as container:
            stream = container.streams.best("video")
            if stream is not None and stream.codec_context is not None:
                width, height = stream.codec_context.width, stream.codec_context.height
                if width * height > _MAX_PIXELS:
                    raise TangoError(f"the video's frames have {width}×{height} pixels", "scale it down")
    except av.FFmpegError as error:
        raise TangoError(
            f"the video cannot be read: {error.strerror}", "give a file such as MP4, WebM, MKV, AVI or GIF"
        ) from error


@cache
def _manifest(bundle: str) -> Manifest:
    return Bundle.load(bundle).manifest


if __name__ == "__main__":
    main()
