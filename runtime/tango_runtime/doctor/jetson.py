"""Checks of a Jetson: its JetPack, and the settings that a model needs and a fresh board does not have.

No Jetson was at hand. Sources: NVIDIA's release notes for the JetPack of each Jetson Linux
(docs.nvidia.com/jetson/jetpack); CVE-2025-33177 and github.com/ggml-org/llama.cpp/pull/23732 for the allocations of
36.4.7; hokwangchoi/jetson-orin-nano-benchmarks for what TensorRT's builder takes from CMA;
jetson-ai-lab.com/tips_ram-optimization.html for swap.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tango_runtime.doctor.check import Check
from tango_runtime.util.units import gigabytes
from tango_runtime.util.versions import release

#: Jetson Linux (L4T) → JetPack. A later one is reported as the last one before it, "or later".
_JETPACKS = {
    (35, 1): "5.0.2",
    (35, 2): "5.1",
    (35, 3): "5.1.1",
    (35, 4): "5.1.2",
    (35, 5): "5.1.3",
    (35, 6): "5.1.4",
    (36, 2): "6.0 DP",
    (36, 3): "6.0",
    (36, 4): "6.1",
    (36, 4, 3): "6.2",
    (36, 4, 4): "6.2.1",
    (36, 4, 7): "6.2.1",
    (36, 5): "6.2.2",
    (38, 2): "7.0",
    (38, 4): "7.1",
    (39, 2): "7.2",
}

#: The first Jetson Linux whose Python, 3.10, is one that tango-edge runs on.
_FIRST_USABLE = (36,)
#: From here on the kernel refuses large allocations of the GPU, until the second.
_NVMAP_LIMITED, _NVMAP_RELAXED = (36, 4, 7), (36, 5)

#: Boards of 8 GB show less than this, those of 16 GB more.
_SMALL_BOARD = 10_000_000_000
_SWAP_WANTED = 8 << 30
#: What `cma=950M` gives is 960 MiB; the default is 256.
_CMA_WANTED = 900 << 20


def jetson_linux(root: Path = Path("/")) -> tuple[int, ...] | None:
    """The version of Jetson Linux, None elsewhere; empty if it cannot be read.

    Args:
        root: Where the file system begins. The file's first line is ``# R36 (release), REVISION: 4.0, …``.
    """
    file = root / "etc/nv_tegra_release"
    if not file.is_file():
        return None
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", file.read_text(errors="replace"))
    return (int(found[1]), *release(found[2].strip("."))) if found else ()


def python_is_too_old(l4t: tuple[int, ...] | None) -> bool:
    """Whether the JetPack's TensorRT is for a Python that tango-edge does not run on: 3.8, of JetPack 5."""
    return l4t is not None and () < l4t < _FIRST_USABLE


def check_jetson(root: Path = Path("/")) -> list[Check]:
    """Checks a Jetson; nothing elsewhere."""
    l4t = jetson_linux(root)
    if l4t is None:
        return []
    memory = _meminfo(root)
    checks = [_jetpack(l4t), *_nvmap(l4t), *_power_mode(root)]
    if 0 < memory.get("MemTotal", 0) < _SMALL_BOARD:
        checks += [_swap(root), _cma(memory)]
    return checks


def _jetpack(l4t: tuple[int, ...]) -> Check:
    before = [known for known in _JETPACKS if known[:1] == l4t[:1] and known <= l4t]
    name = "unknown JetPack"
    if before:
        exact = l4t[: len(before[-1])] == before[-1]
        name = f"JetPack {_JETPACKS[before[-1]]}" + ("" if exact else " or later")
    text = f"{name} (Jetson Linux {'.'.join(map(str, l4t)) or 'of an unknown version'})"
    if python_is_too_old(l4t):
        fix = "flash JetPack 6.2 or later where the board can have it, or run the engines from C++, as the example does"
        return Check("JetPack", "warning", f"{text}: its TensorRT is for Python 3.8, tango-edge needs 3.10", fix)
    return Check("JetPack", "ok", text)


def _nvmap(l4t: tuple[int, ...]) -> Iterator[Check]:
    """Large allocations of the GPU, which 36.4.7 refuses."""
    if _NVMAP_LIMITED <= l4t < _NVMAP_RELAXED:
        text = "this kernel refuses large allocations of the GPU: NvMapMemAllocInternalTagged, error 12"
        fix = "update to JetPack 6.2.2 (docs.nvidia.com/jetson/jetpack); until then, restart before a large model"
        yield Check("GPU allocations", "warning", text, fix)


def _power_mode(root: Path) -> Iterator[Check]:
    """The power mode; nothing in a container, which has no nvpmodel."""
    nvpmodel = shutil.which("nvpmodel")
    if nvpmodel is None:
        return
    try:
        output = subprocess.run([nvpmodel, "-q"], capture_output=True, text=True, check=False, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        output = ""
    mode = re.search(r"NV Power Mode: *(\S+)", output)
    if mode is None:
        yield Check("power mode", "warning", "nvpmodel does not say which it is", "sudo nvpmodel -q")
    elif mode[1].startswith("MAXN"):
        yield Check("power mode", "ok", mode[1])
    else:
        yield Check("power mode", "warning", f"{mode[1]}: clocks are held down", _fastest(root / "etc/nvpmodel.conf"))


def _fastest(configuration: Path) -> str:
    """The command that chooses the mode without limits."""
    text = configuration.read_text(errors="replace") if configuration.is_file() else ""
    modes = {name: number for number, name in re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", text)}
    fastest = next((name for name in ("MAXN_SUPER", "MAXN") if name in modes), None)
    if fastest is None:
        return "this board's configuration has no MAXN: flash JetPack 6.2 or later with its -super configuration"
    return f"sudo nvpmodel -m {modes[fastest]} && sudo jetson_clocks  # {fastest}"


def _swap(root: Path) -> Check:
    """Swap on a disk; zram takes the same memory."""
    file = root / "proc/swaps"
    rows = [line.split() for line in file.read_text().splitlines()[1:]] if file.is_file() else []
    size = sum(int(row[2]) << 10 for row in rows if len(row) > 2 and "zram" not in row[0])
    text = f"{gigabytes(size)} on disk"
    if size < _SWAP_WANTED:
        fix = (
            "sudo fallocate -l 16G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && "
            "sudo swapon /swapfile"
        )
        return Check("swap", "warning", f"{text}: building engines may run out of memory", fix)
    return Check("swap", "ok", text)


def _cma(memory: dict[str, int]) -> Check:
    """Contiguous memory, from which TensorRT's builder takes its scratch space."""
    size = memory.get("CmaTotal", 0)
    text = f"{gigabytes(size)} of contiguous memory"
    if size < _CMA_WANTED:
        fix = "append cma=950M to the line APPEND in /boot/extlinux/extlinux.conf, and restart"
        return Check("cma", "warning", f"{text}: TensorRT's builder may find no room for its fastest kernels", fix)
    return Check("cma", "ok", text)


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    file = root / "proc/meminfo"
    lines = file.read_text().splitlines() if file.is_file() else []
    rows = (line.replace(":", "").split() for line in lines)
    return {row[0]: int(row[1]) << 10 for row in rows if len(row) == 3}
