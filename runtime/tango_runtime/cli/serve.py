"""`tango serve`: bundles behind OpenAI's API."""

from __future__ import annotations

import argparse
from pathlib import Path

from tango_plugins import TangoError
from tango_runtime.cli.args import add_backend, add_count, add_streams, non_negative_int
from tango_runtime.cli.command import Command
from tango_runtime.pipeline.video_llm import VideoLLM
from tango_runtime.server.rtsp import AllowedHost
from tango_runtime.server.serve import listen, serve
from tango_runtime.server.settings import Settings
from tango_runtime.util.console import status


def _configure(parser: argparse.ArgumentParser) -> None:
    defaults = Settings()
    parser.add_argument(
        "bundles", nargs="+", type=Path, metavar="bundle", help="bundle folders; the first is the default"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument(
        "--port",
        type=non_negative_int,
        default=8000,
        help="port; 0 takes a free one (default: %(default)s)",
    )
    parser.add_argument("--api-key", metavar="KEY", help="key that clients must present (default: none)")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file whose first line is the key",
    )
    parser.add_argument(
        "--media-root", type=Path, metavar="FOLDER", help="folder whose files clients may name as file: (default: none)"
    )
    parser.add_argument(
        "--allow-private", action="store_true", help="let clients name URLs of addresses that are not public"
    )
    parser.add_argument(
        "--allow-rtsp",
        action="append",
        default=[],
        metavar="HOST",
        help="let clients name rtsp: cameras of this host: HOST, HOST:PORT, ADDRESS or ADDRESS/BITS",
    )
    parser.add_argument(
        "--origin", action="append", default=[], metavar="ORIGIN", help="origin of another web page that may call"
    )
    add_count(parser, "--queue", "requests that may wait before others are refused with 429", defaults.waiting)
    add_count(parser, "--together", "answers that are written at a time", defaults.together)
    add_count(parser, "--cache-videos", "encoded videos that are kept", defaults.videos)
    add_count(
        parser, "--cache-sessions", "prefixes of videos that are kept with their key/value caches", defaults.sessions
    )
    add_streams(parser, defaults.streams, "%(default)s")
    add_backend(parser)


def _run(args: argparse.Namespace) -> int:
    settings = Settings(
        api_key=_key(args),
        media_root=args.media_root,
        allow_private=args.allow_private,
        rtsp_hosts=tuple(map(AllowedHost.parse, args.allow_rtsp)),
        origins=tuple(args.origin),
        waiting=args.queue,
        together=args.together,
        videos=args.cache_videos,
        sessions=args.cache_sessions,
        streams=args.streams,
    )
    if args.media_root is not None and not args.media_root.is_dir():
        raise TangoError(f"there is no folder {args.media_root}", "check --media-root")
    sock = listen(args.host, args.port)
    models: dict[str, VideoLLM] = {}
    for path in args.bundles:
        name = path.resolve().name
        if name in models:
            raise TangoError(f"two bundles are called {name}", "give folders of different names")
        models[name] = llm = VideoLLM(path, backend=args.backend, sequences=settings.together)
        status(f"{name}: {llm.backend}" + (f" ({llm.fallback_reason})" if llm.fallback_reason else ""))
    host, port = sock.getsockname()[:2]
    if settings.api_key is None and host not in ("127.0.0.1", "::1"):
        status("warning: everybody who reaches this address may ask; --api-key lets in only who has the key")
    where = f"[{host}]" if ":" in host else host
    serve(models, settings, sock, ready=lambda: status(f"serving at http://{where}:{port} (the API: /v1)"))
    return 0


def _key(args: argparse.Namespace) -> str | None:
    if args.api_key and args.api_key_file:
        raise TangoError("--api-key and --api-key-file were given", "give one of them")
    if args.api_key_file is None:
        key: str | None = args.api_key
    else:
        key = _first_line(args.api_key_file)
    if key is not None and not key:
        raise TangoError("the API key is empty", "give one, or leave the option out")
    return key


def _first_line(file: Path) -> str:
    try:
        return next(iter(file.read_text("utf-8").splitlines()), "").strip()
    except UnicodeDecodeError as error:
        raise TangoError(f"{file} is not text in UTF-8", "write the key on its first line") from error


SERVE = Command(_configure, _run)
