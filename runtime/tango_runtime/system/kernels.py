"""The GPUs that a library has kernels for, read from the fat binaries that nvcc puts into it.

Only headers are read, so that a library of some hundred megabytes takes a fraction of a second. The layout is not
documented; a test compares with what nvcc was asked for. What cannot be read counts as no kernels known.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tango_runtime.util.versions import release

_SECTION = b".nv_fatbin"
_MAGIC = 0xBA55ED50
_PTX, _CUBIN = 1, 2


@dataclass(frozen=True)
class Kernels:
    """What a library has kernels for.

    Attributes:
        cubins: GPU architectures that it has machine code for, as ``87``.
        ptx: Architectures that it has PTX for, which the driver translates for any later one.
    """

    cubins: frozenset[int]
    ptx: frozenset[int]

    @property
    def known(self) -> bool:
        """Whether any were found."""
        return bool(self.cubins or self.ptx)

    def serve(self, compute_capability: str) -> bool:
        """Whether a GPU can run them: machine code of the same major version and no later minor one, or earlier PTX."""
        major, minor = release(compute_capability)[:2]
        own = 10 * major + minor
        return any(arch // 10 == major and arch <= own for arch in self.cubins) or any(arch <= own for arch in self.ptx)

    def __str__(self) -> str:
        """As ``sm_89, sm_90``; PTX as ``compute_90``."""
        names = [f"sm_{arch}" for arch in sorted(self.cubins)] + [f"compute_{arch}" for arch in sorted(self.ptx)]
        return ", ".join(names)


def kernels_of(library: Path) -> Kernels:
    """The GPU architectures of a library's kernels; none if it is not there or not a library with kernels."""
    found: dict[int, set[int]] = {_PTX: set(), _CUBIN: set()}
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for kind, architecture in _entries(data):
                found.setdefault(kind, set()).add(architecture)
    except (OSError, ValueError, struct.error):
        found = {_PTX: set(), _CUBIN: set()}
    return Kernels(frozenset(found[_CUBIN]), frozenset(found[_PTX]))


def _entries(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """(kind, architecture) of each entry. A fat binary is a header and entries, each with a header of its own."""
    for begin, end in _sections(data):
        at = begin
        while at + 16 <= end:
            magic, _, header, size = struct.unpack_from("<IHHQ", data, at)
            if magic != _MAGIC or header < 16:  # padding
                at += 8
                continue
            entry, at = at + header, at + header + size
            while entry < min(at, end):
                kind, _, header, size = struct.unpack_from("<HHIQ", data, entry)
                if header < 32:
                    raise ValueError("the header of an entry is too short")
                (architecture,) = struct.unpack_from("<I", data, entry + 28)
                yield kind, architecture
                entry += header + size


def _sections(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Begin and end of each section with fat binaries, of a 64-bit ELF file of little endian."""
    if data[:6] != b"\x7fELF\x02\x01":
        return
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<I20xQQ", data, table + size * index) for index in range(count)]
    strings = headers[names][1]
    for name, offset, length in headers:
        if data[strings + name : strings + name + len(_SECTION) + 1] == _SECTION + b"\0":
            yield offset, offset + length
