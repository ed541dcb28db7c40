"""Does a media file hold all the bytes that its outermost boxes claim?

FFmpeg's own numbers do not answer this. A fragmented MP4 cut at half its length reports a duration of that half and no
number of frames. An MP4 with its index at the end does not open at all, like a file that never was a video. Matroska
knows a duration only of all its streams together, and sound may be longer than the picture. An edit list leaves fewer
packets than ``stream.frames``.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from tango_plugins import TangoError

#: Top-level boxes of an ISO media file. Anything else after them is not counted as part of the file.
_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"mfra", b"sidx", b"styp", b"uuid", b"meta"}


def check_complete(path: Path) -> None:
    """Rejects a file that is shorter than its boxes say; formats that do not say pass (transport and raw streams)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        declared = _declared_size(file, size)
    if declared > size:
        raise TangoError(f"{path} is truncated: {size} of {declared} bytes are there", "copy or record it again")


def _declared_size(file: BinaryIO, size: int) -> int:
    """Bytes that a file's outermost boxes claim, 0 for a format that does not say."""
    head = file.read(64)
    if head[:4] == b"RIFF":
        return _riff_size(file, size)
    if head[:4] == b"\x1a\x45\xdf\xa3":  # Matroska, WebM: an EBML header, then the segment
        header, at = _ebml_size(head, 4)
        file.seek(at + header)
        segment = file.read(12)
        length, width = _ebml_size(segment, 4)
        return at + header + width + length if segment[:4] == b"\x18\x53\x80\x67" else 0
    end = 0  # ISO media: boxes of 32-bit size and type; size 1 puts 64 bits after the type, 0 means up to the end
    while end < size:
        file.seek(end)
        box = file.read(16)
        if box[4:8] not in _BOXES:
            break
        length = int.from_bytes(box[:4], "big")
        length = int.from_bytes(box[8:16], "big") if length == 1 else length or size - end
        end += max(length, 8)
    return end


def _riff_size(file: BinaryIO, size: int) -> int:
    """Bytes that an AVI's RIFF chunk claims, 0 where they are unknown or only that claim is wrong.

    A recorder that writes to a pipe leaves all ones; some recorders write too much. A chunk of indices that is whole at
    the end of the file shows that nothing is missing.
    """
    file.seek(4)
    length = int.from_bytes(file.read(4), "little")
    end, name = 12, b"LIST"
    while end < size and name in (b"LIST", b"JUNK"):
        file.seek(end)
        name = file.read(4)
        chunk = int.from_bytes(file.read(4), "little")
        end += 8 + chunk + chunk % 2
    whole = name == b"idx1" and end <= size
    return 0 if whole or length == 0xFFFFFFFF else 8 + length


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """The EBML size field at a place: (its value, 0 if unknown; the place after it)."""
    if len(data) <= at or data[at] == 0:
        return 0, at
    width = 9 - data[at].bit_length()
    bits = 7 * width
    value = int.from_bytes(data[at : at + width], "big") & ((1 << bits) - 1)
    return (0 if value == (1 << bits) - 1 else value), at + width
