"""What a server may do, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tango_runtime.server.rtsp import AllowedHost


@dataclass(frozen=True)
class Settings:
    """Limits of a server; times are in seconds, sizes in bytes.

    Attributes:
        api_key: What clients must present; None lets everyone in.
        media_root: Folder whose files clients may name as ``file:``; None for none.
        allow_private: Fetch media from, and open streams at, addresses that are not public.
        rtsp_hosts: Hosts whose cameras clients may name as ``rtsp:``.
        origins: Origins of other web pages that may call.
        max_body: Most bytes of a request.
        max_media: Most bytes of a video that is fetched or named.
        max_frames: Most frames of a video or of a stream's window.
        max_images: Most images of a request.
        max_frame: Most bytes of a frame that a client sends to a stream.
        waiting: Most requests that wait for the model.
        together: Most answers that are written at a time; where the backend can, they share decode steps.
        videos: Encoded videos that are kept.
        sessions: Prefixes of videos, with their key/value caches, that are kept.
        uploads: Most bytes of uploaded videos that are kept.
        streams: Most streams that are open.
        decoders: Processes that decode.
        decode_memory: Most bytes of memory of each.
        body_seconds: Most time of a request's arrival.
        fetch_seconds: Most time of fetching a video.
        decode_seconds: Most time of decoding one.
        answer_seconds: Most time from a request's arrival at the model to the end of its answer.
        watch_seconds: Most time that a chat about a camera watches it.
        first_frame_seconds: Most time that a question about a new stream waits for its first frames.
        idle_seconds: Most time between two frames that a client sends to a stream.
        send_seconds: Most time that a client may take to accept a piece of an answer.
        drain_seconds: Most time that answers have to end when the server is told to stop.
    """

    api_key: str | None = None
    media_root: Path | None = None
    allow_private: bool = False
    rtsp_hosts: tuple[AllowedHost, ...] = ()
    origins: tuple[str, ...] = ()
    max_body: int = 64 << 20
    max_media: int = 256 << 20
    max_frames: int = 256
    max_images: int = 256
    max_frame: int = 4 << 20
    waiting: int = 128
    together: int = 8
    videos: int = 8
    sessions: int = 8
    uploads: int = 1 << 30
    streams: int = 8
    decoders: int = 2
    decode_memory: int = 4 << 30
    body_seconds: float = 60.0
    fetch_seconds: float = 30.0
    decode_seconds: float = 60.0
    answer_seconds: float = 300.0
    watch_seconds: float = 60.0
    first_frame_seconds: float = 10.0
    idle_seconds: float = 60.0
    send_seconds: float = 30.0
    drain_seconds: float = 30.0
