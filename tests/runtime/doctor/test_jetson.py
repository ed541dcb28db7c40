"""The checks of a Jetson, on file systems and an nvpmodel that are made here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tango_runtime.doctor.check import Check
from tango_runtime.doctor.jetson import check_jetson, jetson_linux, python_is_too_old

MODES = """# mode 0 is the default
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=1 >
"""


@pytest.fixture
def board(tmp_path, monkeypatch):
    """``board(release="36.5.0", memory=…, cma=…, swaps=…, mode=…, modes=…)``: its checks by name."""

    def checks(
        release: str = "36.5.0",
        memory: int = 7_800_000,
        cma: int = 983_040,
        swaps: str = "/swapfile file 16777212 0 -2",
        mode: str | None = "NV Power Mode: MAXN_SUPER\n2",
        modes: str = MODES,
    ) -> dict[str, Check]:
        major, _, revision = release.partition(".")
        for name, text in {
            "etc/nv_tegra_release": f"# R{major} (release), REVISION: {revision}, GCID: 1, BOARD: generic\n# KERNEL\n",
            "etc/nvpmodel.conf": modes,
            "proc/meminfo": f"MemTotal: {memory} kB\nHugePages_Total: 0\nCmaTotal: {cma} kB\n",
            "proc/swaps": f"Filename Type Size Used Priority\n{swaps}\n",
        }.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setenv("PATH", str(_nvpmodel(tmp_path / "bin", mode)))
        return {check.name: check for check in check_jetson(tmp_path)}

    return checks


def _nvpmodel(folder: Path, output: str | None) -> Path:
    folder.mkdir(exist_ok=True)
    program = folder / "nvpmodel"
    program.unlink(missing_ok=True)
    if output is not None:
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "{output}"\n')
        program.chmod(0o755)
    return folder


def test_a_board_that_is_set_up(board):
    found = board()
    assert list(found) == ["JetPack", "power mode", "swap", "cma"]
    assert {check.status for check in found.values()} == {"ok"}


def test_elsewhere_there_is_nothing_to_check(tmp_path):
    assert check_jetson(tmp_path) == []
    assert jetson_linux(tmp_path) is None


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("36.4.0", "JetPack 6.1 ("),
        ("36.4.3", "JetPack 6.2 ("),
        ("36.4.4", "JetPack 6.2.1 ("),
        ("36.4.5", "JetPack 6.2.1 or later"),
        ("36.9.0", "JetPack 6.2.2 or later"),
        ("35.4.1", "JetPack 5.1.2 ("),
        ("39.2.0", "JetPack 7.2 ("),
        ("34.1.0", "unknown JetPack"),
    ],
)
def test_jetpack(board, release, expected):
    assert board(release)["JetPack"].text.startswith(expected)


def test_a_release_that_cannot_be_read(board, tmp_path):
    board()
    (tmp_path / "etc/nv_tegra_release").write_text("")
    assert check_jetson(tmp_path)[0].text == "unknown JetPack (Jetson Linux of an unknown version)"


def test_the_python_of_jetpack_5_is_too_old(board):
    found = board("35.4.1")["JetPack"]
    assert found.status == "warning"
    assert "Python 3.8" in found.text
    assert "from C++" in found.fix
    assert not python_is_too_old((36, 3, 0))
    assert not python_is_too_old(None)


@pytest.mark.parametrize(("release", "limited"), [("36.4.4", False), ("36.4.7", True), ("36.5.0", False)])
def test_the_allocations_that_a_kernel_refuses(board, release, limited):
    found = board(release)
    assert ("GPU allocations" in found) == limited
    if limited:
        assert "6.2.2" in found["GPU allocations"].fix


def test_a_power_mode_that_holds_clocks_down(board):
    found = board(mode="NV Power Mode: 15W\n0")["power mode"]
    assert (found.status, found.text) == ("warning", "15W: clocks are held down")
    assert found.fix.startswith("sudo nvpmodel -m 2 && sudo jetson_clocks")
    assert "-super configuration" in board(mode="NV Power Mode: 15W\n0", modes="")["power mode"].fix
    assert board(mode="Failed")["power mode"].fix == "sudo nvpmodel -q"
    assert "power mode" not in board(mode=None)


def test_swap_of_zram_is_none(board):
    found = board(swaps="/dev/zram0 partition 16777212 0 5\n/swapfile file 1048576 0 -2")["swap"]
    assert (found.status, found.text[:6]) == ("warning", "1.1 GB")
    assert "mkswap" in found.fix


def test_little_contiguous_memory(board):
    found = board(cma=262_144)["cma"]
    assert found.status == "warning"
    assert "cma=950M" in found.fix


def test_larger_boards_need_neither_swap_nor_cma(board):
    assert list(board(memory=15_600_000, cma=0, swaps="")) == ["JetPack", "power mode"]
