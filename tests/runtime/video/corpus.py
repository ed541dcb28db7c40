"""Damaged and malicious files: small ones of every container, changed at random, and texts that claim to be a video."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from tests.runtime.video.clips import H264, OPEN_GOP, picture, write

#: Name → what writes it: encoder, its options, the muxer's.
_VIDEOS = {
    "h264.mp4": ("libx264", H264, {}),
    "fragmented.mp4": ("libx264", H264, {"movflags": "frag_keyframe+empty_moov"}),
    "hevc.mp4": ("libx265", {"x265-params": f"{OPEN_GOP}:log-level=none"}, {}),
    "h264.mkv": ("libx264", H264, {}),
    "mpeg4.avi": ("mpeg4", {"g": "12"}, {}),
    "mjpeg.avi": ("mjpeg", {"strict": "unofficial"}, {}),
    "vp8.webm": ("libvpx", {"g": "12"}, {}),
    "vp9.webm": ("libvpx-vp9", {"g": "12", "deadline": "realtime"}, {}),
    "h264.ts": ("libx264", H264, {}),
    "mpeg2.ts": ("mpeg2video", {"g": "12"}, {}),
    "flv1.flv": ("flv", {"g": "12"}, {}),
    "wmv2.wmv": ("wmv2", {"g": "12"}, {}),
    "raw.h264": ("libx264", H264, {}),
}
_ANIMATIONS = {"animation.gif": "GIF", "animation.webp": "WEBP", "animation.png": "PNG"}
_IMAGES = {"image.jpg": "JPEG", "image.png": "PNG", "image.webp": "WEBP", "image.bmp": "BMP"}

#: Texts that name other files or hosts, and what else is no video.
_TEXTS = {
    "concat": b"ffconcat version 1.0\nfile h264.mp4\n",
    "concat of all": b"ffconcat version 1.0\nfile /etc/passwd\nfile ../../h264.mp4\n",
    "hls": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
    "hls of a file": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n",
    "dash": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period/></MPD>',
    "sdp": b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 9 RTP/AVP 26\r\n",
    "subtitles": b"1\n00:00:00,000 --> 00:00:01,000\nhello\n" * 9,
    "webvtt": b"WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "text": b"To whom it may concern\n" * 50,
    "nothing": b"",
    "zeros": bytes(4096),
    "avisynth": b'Import("/etc/passwd")\n',
    "vapoursynth": b"import os\nos.system('touch /tmp/reached')\n",
}
_SUFFIXES = (".mp4", ".mkv", ".avi", ".ts")


def make_seeds(folder: Path) -> dict[str, Path]:
    """Healthy files, each of which some of the changed ones begin with; images are in folders of their own."""
    seeds: dict[str, Path] = {}
    for name, (encoder, options, muxer) in _VIDEOS.items():
        seeds[name] = write(folder / name, encoder, options, times=range(30), muxer=muxer)
    frames = [Image.fromarray(picture(i)) for i in range(8)]
    for name, kind in _ANIMATIONS.items():
        seeds[name] = folder / name
        frames[0].save(seeds[name], kind, save_all=True, append_images=frames[1:], duration=40)
    for name, kind in _IMAGES.items():
        seeds[name] = folder / f"of {name}" / name
        seeds[name].parent.mkdir()
        frames[1].save(seeds[name], kind)
    return seeds


def is_image(name: str) -> bool:
    """Whether a seed is a frame of a folder."""
    return name in _IMAGES


def make_corpus(seeds: dict[str, Path], each: int) -> Iterator[tuple[str, str, bytes]]:
    """(what was done, name of the seed or of a text's file, content): `each` of every change of every seed."""
    for name, path in seeds.items():
        data = path.read_bytes()
        for how, change in _CHANGES.items():
            for i in range(each):
                yield how, name, bytes(change(bytearray(data), random.Random(f"{name} {how} {i}")))
    for how, text in _TEXTS.items():
        for suffix in _SUFFIXES:
            yield how, f"text{suffix}", text


def _truncate(data: bytearray, chance: random.Random) -> bytearray:
    return data[: chance.randrange(1, len(data))]


def _flip_bits(data: bytearray, chance: random.Random, most: int) -> bytearray:
    for _ in range(chance.randint(1, most)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def _break_header(data: bytearray, chance: random.Random) -> bytearray:
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(min(len(data), 600))] = chance.randrange(256)
    return data


def _lie_about_size(data: bytearray, chance: random.Random) -> bytearray:
    """Another size before a name of four letters, as MP4, or after it, as RIFF and PNG have them."""
    names = [i for i in range(4, len(data) - 8) if data[i : i + 4].isalpha()]
    at = chance.choice(names) + chance.choice((-4, 4)) if names else chance.randrange(len(data))
    size = chance.choice((0, 1, 7, 8, len(data) + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF))
    data[at : at + 4] = size.to_bytes(4, chance.choice(("big", "little")))
    return data


def _grow(data: bytearray, chance: random.Random) -> bytearray:
    """Huge in place of 64 or 48 pixels, wherever a header says so; the first time or always."""
    size = chance.choice((0, 1, 4097, 0x3FFF, 0x4000, 0x7FFF, 0xFFFF))
    for pixels in (64, 48):
        for order in ("big", "little"):
            of = pixels.to_bytes(2, order)  # type: ignore[arg-type]
            data = data.replace(of, size.to_bytes(2, order), chance.choice((1, 3)))  # type: ignore[arg-type]
    return data


def _swap(data: bytearray, chance: random.Random) -> bytearray:
    a, b, c, d = sorted(chance.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _cut_out(data: bytearray, chance: random.Random) -> bytearray:
    a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:a] + data[b:]


def _repeat(data: bytearray, chance: random.Random) -> bytearray:
    a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:b] + data[a:b] * chance.randint(1, 20) + data[b:]


def _erase(data: bytearray, chance: random.Random) -> bytearray:
    a = chance.randrange(len(data))
    size = min(chance.randint(1, 2000), len(data) - a)
    data[a : a + size] = bytes([chance.choice((0, 0xFF))]) * size
    return data


def _append_noise(data: bytearray, chance: random.Random) -> bytearray:
    return data[: chance.randrange(1, len(data))] + chance.randbytes(chance.randint(1, 5000))


_CHANGES: dict[str, Callable[[bytearray, random.Random], bytearray]] = {
    "truncated": _truncate,
    "few bits": partial(_flip_bits, most=8),
    "many bits": partial(_flip_bits, most=300),
    "header": _break_header,
    "sizes": _lie_about_size,
    "dimensions": _grow,
    "swapped": _swap,
    "cut out": _cut_out,
    "repeated": _repeat,
    "erased": _erase,
    "noise": _append_noise,
}
