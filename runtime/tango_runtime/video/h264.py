"""What the NAL units of H.264 and H.265 say of packets, without decoding them (ITU-T H.264, H.265)."""

from __future__ import annotations

from collections.abc import Iterator

_SLICE, _SPS = 1, 7

#: Messages, delimiters and filler: what may be left out with the picture whose packet has them.
_BESIDE = {6, 9, 12}

#: What is before each NAL unit of Annex B.
_START = b"\0\0\1"

#: Profiles whose parameter sets describe chroma and bit depth.
_HIGH = {100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135}


def has_slice(packet: bytes, codec: str, extradata: bytes | None) -> bool:
    """Whether a packet holds part of a picture, not only parameters and messages; True where it is malformed.

    Args:
        packet: Its content.
        codec: ``h264`` or ``hevc``.
        extradata: The decoder's; see :func:`may_have_fields`.
    """
    heads = _heads(packet, _length_size(codec, extradata or b""))
    return any(head is None or (head >> 1 & 63 < 32 if codec == "hevc" else _SLICE <= head & 31 <= 5) for head in heads)


def is_disposable(packet: bytes, extradata: bytes | None) -> bool:
    """Whether an H.264 packet is a picture that no other refers to, and nothing else; False where it is malformed.

    Args:
        packet: Its content.
        extradata: The decoder's; see :func:`may_have_fields`.
    """
    heads = list(_heads(packet, _length_size("h264", extradata or b"")))
    # nal_ref_idc is 0 in all slices of such a picture (7.4.1); of the types, only a slice of no IDR picture can be one.
    return _SLICE in heads and all(head == _SLICE or (head is not None and head & 31 in _BESIDE) for head in heads)


def _heads(packet: bytes, size: int) -> Iterator[int | None]:
    """The first byte of each NAL unit, whose length ``size`` bytes before it tell; None for what is malformed."""
    begin = size or _after_start_code(packet, 0)
    well_formed = begin > 0
    while 0 < begin < len(packet):
        yield packet[begin]
        if size:
            begin += int.from_bytes(packet[begin - size : begin], "big") + size
            well_formed = begin <= len(packet) + size
        else:
            begin = _after_start_code(packet, begin)
    if not well_formed:
        yield None


def _length_size(codec: str, extradata: bytes) -> int:
    """Bytes of the length before each NAL unit (ISO/IEC 14496-15); 0 where start codes are between them (Annex B)."""
    at = 21 if codec == "hevc" else 4
    return (extradata[at] & 3) + 1 if extradata[:2] != b"\0\0" and len(extradata) > at else 0


def _after_start_code(packet: bytes, at: int) -> int:
    """The place after the next start code; 0 where there is none."""
    found = packet.find(_START, at)
    return found + len(_START) if found >= 0 else 0


def may_have_fields(extradata: bytes | None) -> bool:
    """Whether a frame may be coded as two fields, each a packet of its own (PAFF); True where nothing says it is not.

    Args:
        extradata: The decoder's, with start codes (Annex B) or as in an MP4 (avcC, ISO/IEC 14496-15).
    """
    sets = [unit for unit in _units(extradata or b"") if unit and unit[0] & 31 == _SPS]
    try:
        return not sets or any(not _is_frames_only(unit) for unit in sets)
    except IndexError:
        return True


def _units(extradata: bytes) -> list[bytes]:
    """The NAL units among which the sequence parameter sets are."""
    if extradata[:1] != b"\1":
        return extradata.split(b"\0\0\1")
    units, at = [], 6
    for _ in range(extradata[5] & 31 if len(extradata) > 5 else 0):
        length = int.from_bytes(extradata[at : at + 2], "big")
        units.append(extradata[at + 2 : at + 2 + length])
        at += 2 + length
    return units


def _is_frames_only(unit: bytes) -> bool:
    """frame_mbs_only_flag of a sequence parameter set."""
    bits = _Bits(unit[1:].replace(b"\0\0\3", b"\0\0"))
    profile = bits.take(8)
    bits.take(16)  # constraints, level
    bits.number()  # id
    if profile in _HIGH:
        _skip_chroma(bits)
    bits.number()  # length of frame_num
    order = bits.number()
    if order == 0:
        bits.number()  # length of the picture order count
    elif order == 1:
        bits.take(1)
        bits.number()
        bits.number()
        for _ in range(bits.number()):
            bits.number()
    bits.number()  # reference frames
    bits.take(1)
    bits.number()  # width
    bits.number()  # height
    return bool(bits.take(1))


def _skip_chroma(bits: _Bits) -> None:
    chroma = bits.number()
    if chroma == 3:
        bits.take(1)
    bits.number()  # bit depth of luma
    bits.number()  # and of chroma
    bits.take(1)
    if bits.take(1):
        for i in range(12 if chroma == 3 else 8):
            if bits.take(1):
                _skip_scaling_list(bits, 16 if i < 6 else 64)


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last, scale = 8, 8
    for _ in range(size):
        if scale:
            code = bits.number()
            scale = (last + (code + 1) // 2 * (1 if code % 2 else -1)) % 256
        last = scale or last


class _Bits:
    """Reads bits; IndexError beyond the last."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> int:
        """An unsigned number of `count` bits."""
        value = 0
        for _ in range(count):
            value = value << 1 | self._data[self._at // 8] >> 7 - self._at % 8 & 1
            self._at += 1
        return value

    def number(self) -> int:
        """An Exp-Golomb code, ue(v)."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)
