"""The GPUs that a library has kernels for."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tango_runtime.system.kernels import Kernels, kernels_of


def fat_binary(*entries: tuple[int, int]) -> bytes:
    """A fat binary of (kind, architecture)."""
    body = b"".join(
        struct.pack("<HHIQ12xI32x", kind, 257, 64, 24, architecture) + bytes(24) for kind, architecture in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(section: bytes, name: bytes = b".nv_fatbin") -> bytes:
    """A 64-bit ELF file with one section, and one of names."""
    names = b"\0" + name + b"\0.shstrtab\0"
    at = 64 + len(section) + len(names)
    headers = [(0, 0, 0), (1, 64, len(section)), (len(name) + 2, 64 + len(section), len(names))]
    table = b"".join(struct.pack("<I20xQQ24x", *header) for header in headers)
    head = struct.pack("<6s34xQ10xHHH", b"\x7fELF\x02\x01", at, 64, len(headers), 2)
    return head + section + names + table


def test_every_fat_binary_counts(tmp_path: Path) -> None:
    file = tmp_path / "lib.so"
    file.write_bytes(library(fat_binary((2, 87), (2, 90)) + bytes(8) + fat_binary((1, 90), (2, 87))))
    found = kernels_of(file)
    assert found == Kernels(frozenset({87, 90}), frozenset({90}))
    assert str(found) == "sm_87, sm_90, compute_90"


def test_who_can_run_them() -> None:
    found = Kernels(frozenset({80, 87}), frozenset({90}))
    assert [each for each in ("7.5", "8.0", "8.6", "8.9", "9.0", "11.0") if found.serve(each)] == [
        *("8.0", "8.6", "8.9"),
        *("9.0", "11.0"),
    ]
    assert not Kernels(frozenset({89}), frozenset()).serve("8.7")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        library(fat_binary((2, 87)), b".data"),
        library(fat_binary((2, 87)))[:70],
        library(bytes(64)),
        library(struct.pack("<IHHQ", 0xBA55ED50, 1, 0, 0) * 4),
        library(struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 1 << 60) + bytes(80)),
    ],
)
def test_what_has_none_or_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "lib.so"
    file.write_bytes(content)
    assert not kernels_of(file).known
    assert not kernels_of(tmp_path / "none.so").known


@pytest.mark.nvcc
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_what_nvcc_writes(tmp_path: Path) -> None:
    (tmp_path / "k.cu").write_text("__global__ void twice(float* x) { x[threadIdx.x] *= 2; }")
    flags = ["-gencode=arch=compute_87,code=sm_87", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
    command = ["nvcc", "-shared", "-Xcompiler", "-fPIC", *flags, "k.cu", "-o", "libk.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert kernels_of(tmp_path / "libk.so") == Kernels(frozenset({87, 90}), frozenset({90}))
