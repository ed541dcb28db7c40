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
    waiting, seen = [path], {path}
    while waiting:
        playlist = waiting.pop()
        for named in _check(playlist):
            if named not in seen and named.is_file():
                seen.add(named)
                waiting.append(named)


def _check(path: Path) -> list[Path]:
    """The files that a playlist names; none where the file is something else."""
    with path.open("rb") as file:
        if file.read(7) != b"#EXTM3U":
            return []
        text = file.read()
    if b"#EXT-X-ENDLIST" not in text and b"#EXT-X-STREAM-INF" not in text:
        raise TangoError(
            f"{path} is a playlist that has no end: FFmpeg would wait for more", "add a line #EXT-X-ENDLIST at its end"
        )
    names = [os.fsdecode(name) for line in text.splitlines() for name in _names(line.strip())]
    for name in names:
        if ":" in name or name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise TangoError(f"{path} is a playlist that names {name}", "put the files that it names into its folder")
    return [path.parent / name for name in names]


def _names(line: bytes) -> list[bytes]:
    """The files that a line names: itself, or attributes of a tag."""
    return re.findall(rb'URI="([^"]*)"', line) if line.startswith(b"#") else [line] if line else []
