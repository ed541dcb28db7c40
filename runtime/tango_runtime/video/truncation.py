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

#: So many chunks of an AVI are looked at, one for each frame and piece of sound: a stranger's file may have any number.
_MOST_CHUNKS = 1 << 20


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
    """Bytes that an AVI's RIFF chunks claim, of which a long one has several; 0 where the claim is unknown or wrong.

    A recorder that writes to a pipe leaves all ones; some recorders write too much. An index that is whole shows that
    nothing is missing.
    """
    begin, end, head = 0, 0, b"RIFF"
    while end < size and head[:4] == b"RIFF":
        begin = end
        file.seek(begin)
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        if length == 0xFFFFFFFF:
            return 0
        end += 8 + length
    return end if end > size and head[:4] == b"RIFF" and not _has_whole_index(file, begin + 12, size) else 0


def _has_whole_index(file: BinaryIO, at: int, size: int) -> bool:
    """Whether there is an index among the chunks from a place on. The list that holds the frames is entered."""
    for _ in range(_MOST_CHUNKS):
        file.seek(at)
        head = file.read(12)
        name, chunk = head[:4], int.from_bytes(head[4:8], "little")
        at += 12 if head[8:] == b"movi" else 8 + chunk + chunk % 2
        if at > size or name in (b"idx1", b"ix00"):
            return at <= size
    return False


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """The EBML size field at a place: (its value, 0 if unknown; the place after it)."""
    if len(data) <= at or data[at] == 0:
        return 0, at
    width = 9 - data[at].bit_length()
    bits = 7 * width
    value = int.from_bytes(data[at : at + width], "big") & ((1 << bits) - 1)
    return (0 if value == (1 << bits) - 1 else value), at + width
