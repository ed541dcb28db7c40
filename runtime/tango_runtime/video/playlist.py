"""HLS playlists: FFmpeg would wait for the end of one that has none, and read whatever files it names."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from tango_plugins import TangoError


def check_playlist(path: Path) -> None:
    """Rejects a playlist that has no end or names files outside of its folder; anything else passes.

    Playlists that it names are checked, too.
    """
    waiting, seen = _check(path, is_first=True), set[Path]()
    while waiting:
        named = waiting.pop()
        if named not in seen and named.is_file():
            seen.add(named)
            waiting += _check(named, is_first=False)


def _check(path: Path, *, is_first: bool) -> list[Path]:
    """The files that a playlist names; none where the file is something else."""
    with path.open("rb") as file:
        if file.read(7) != b"#EXTM3U":
            return []
        lines = file.read().splitlines()
    lists_playlists = any(line.startswith(b"#EXT-X-STREAM-INF:") for line in lines)
    if lists_playlists and not is_first:  # FFmpeg would follow them for ever, were they in a circle
        raise TangoError(
            f"{path} is a playlist of playlists, which another one names", "give one of those that it names"
        )
    if lists_playlists and any(line.startswith(b"#EXTINF:") for line in lines):
        raise TangoError(f"{path} is a playlist of videos and of playlists", "keep one of both in it")
    if not lists_playlists and not _has_end(lines):
        raise TangoError(
            f"{path} is a playlist that has no end: FFmpeg would wait for more", "add a line #EXT-X-ENDLIST at its end"
        )
    names = [os.fsdecode(name) for line in lines for name in _names(line.strip())]
    for name in names:
        if ":" in name or name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise TangoError(f"{path} is a playlist that names {name}", "put the files that it names into its folder")
    return [path.parent / name for name in names]


def _has_end(lines: list[bytes]) -> bool:
    """Whether FFmpeg sees the end: not before what begins a list of videos, nor in a comment."""
    begun = False
    for line in lines:
        if begun and line.startswith(b"#EXT-X-ENDLIST"):
            return True
        begun = begun or line.startswith((b"#EXT-X-TARGETDURATION:", b"#EXTINF:"))
    return False


def _names(line: bytes) -> list[bytes]:
    """The files that a line names: itself, or attributes of a tag."""
    if not line.startswith(b"#"):
        return [line] if line else []
    return [quoted or plain for quoted, plain in re.findall(rb'URI=(?:"([^"]*)"|([^",]+))', line)]
