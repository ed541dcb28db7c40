"""Interlaced H.264 that codes some frames whole and some as two fields, in macroblocks without compression."""

from __future__ import annotations

from collections.abc import Container
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.runtime.video.clips import picture

_WIDTH, _HEIGHT = 64, 64


def write(path: Path, count: int, in_fields: Container[int]) -> Path:
    """Writes numbered pictures at 25 frames a second, those of `in_fields` as two packets."""
    raw = path.with_suffix(".h264")
    units = _units(count, in_fields)
    raw.write_bytes(b"".join(data for _, _, data in units))
    with av.open(str(raw)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for half, key, data in units:
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 50), key
            packet.pts = packet.dts = half
            target.mux(packet)
    raw.unlink()
    return path


def _units(count: int, in_fields: Container[int]) -> list[tuple[int, bool, bytes]]:
    """(time in fields, whether it is a keyframe, data) of each packet."""
    units = []
    for i in range(count):
        luma = np.clip(np.pad(picture(i)[..., 0], ((0, 16), (0, 0)), "edge"), 16, 235)
        number, key = i % 10, i % 10 == 0
        head = _parameter_sets() if key else b""
        if i in in_fields:
            units.append((2 * i, key, head + _coded(luma[0::2], number, 2 * number, key, field=0)))
            units.append((2 * i + 1, False, _coded(luma[1::2], number, 2 * number + 1, False, field=1)))
        else:
            units.append((2 * i, key, head + _coded(luma, number, 2 * number, key, field=None)))
    return units


class _Bits:
    def __init__(self) -> None:
        self.bits: list[int] = []

    def u(self, count: int, value: int) -> _Bits:
        """An unsigned number."""
        self.bits += [value >> (count - 1 - i) & 1 for i in range(count)]
        return self

    def ue(self, *values: int) -> _Bits:
        """Exp-Golomb codes."""
        for value in values:
            length = (value + 1).bit_length()
            self.u(length - 1, 0).u(length, value + 1)
        return self

    def align(self) -> None:
        self.bits += [0] * (-len(self.bits) % 8)

    def unit(self, kind: int) -> bytes:
        """A NAL unit of these bits, with its start code."""
        self.u(1, 1).align()
        data = np.packbits(self.bits).tobytes()
        escaped = bytearray()
        for byte in data:
            if escaped[-2:] == b"\0\0" and byte <= 3:
                escaped.append(3)
            escaped.append(byte)
        return b"\0\0\0\1" + bytes([3 << 5 | kind]) + bytes(escaped)


def _parameter_sets() -> bytes:
    sequence = _Bits().u(8, 77).u(8, 0).u(8, 30).ue(0, 0, 0, 4, 1).u(1, 0).ue(_WIDTH // 16 - 1, _HEIGHT // 32 - 1)
    sequence.u(4, 0b0010)  # fields are allowed, not within a frame; no cropping; more follows
    sequence.u(1, 1).u(4, 0).u(1, 1).u(32, 1).u(32, 50).u(1, 1).u(4, 0)  # 25 frames a second
    pictures = _Bits().ue(0, 0).u(2, 0).ue(0, 0, 0).u(3, 0).ue(0, 0, 0).u(1, 1).u(2, 0)
    return sequence.unit(7) + pictures.unit(8)


def _coded(luma: np.ndarray, number: int, order: int, key: bool, field: int | None) -> bytes:
    """A slice: a frame, or its top (0) or bottom (1) field."""
    bits = _Bits().ue(0, 7, 0).u(4, number)
    bits.u(1, 0) if field is None else bits.u(2, 2 | field)
    if key:
        bits.ue(0 if number else 1)
    bits.u(8, order).u(2 if key else 1, 0).ue(0, 1)
    for y in range(0, luma.shape[0], 16):
        for x in range(0, _WIDTH, 16):
            bits.ue(25).align()
            for value in luma[y : y + 16, x : x + 16].ravel().tolist():
                bits.u(8, value)
            bits.bits += [1, 0, 0, 0, 0, 0, 0, 0] * 128
    return bits.unit(5 if key else 1)
