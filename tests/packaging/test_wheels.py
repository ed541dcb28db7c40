"""What `make wheels` builds: contents and tags of wheels, what installers choose, and what libraries may need."""

from __future__ import annotations

import platform
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.packaging.installs import ROOT, UV, install, run
from tests.plugins.cuda_emulator import compiled
from tools import wheels


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small library with the interface of the real one, for this machine's processor."""
    return compiled(tmp_path_factory.mktemp("library")).rename(tmp_path_factory.mktemp("prebuilt") / "libtango.so")


@pytest.fixture(scope="session")
def dist(wheel_source: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheels."""
    out = tmp_path_factory.mktemp("dist")
    source = wheels.build_sdist(out, wheel_source)
    wheels.build_wheel(source, out)
    for machine in wheels.MACHINES:
        wheels.build_wheel(source, out, machine, [library])
    return out


@pytest.mark.network
@pytest.mark.nvcc
def test_a_platform_wheel_is_the_pure_one_and_the_library(dist: Path) -> None:
    def contents(tag: str) -> set[str]:
        (path,) = dist.glob(f"tango_edge-*-py3-none-{tag}.whl")
        return {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}

    pure = contents("any")
    assert {"tango_plugins/native/CMakeLists.txt", "tango_plugins/native/exports.map"} <= pure
    for machine in ("x86_64", "aarch64"):
        assert contents(f"manylinux_2_34_{machine}") - pure == {"tango_plugins/prebuilt/libtango.so"}
        assert pure <= contents(f"manylinux_2_34_{machine}")


@pytest.mark.network
@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        ("x86_64-manylinux_2_35", "manylinux_2_34_x86_64"),  # Ubuntu 22.04
        ("aarch64-manylinux_2_35", "manylinux_2_34_aarch64"),  # JetPack 6
        ("x86_64-manylinux_2_31", "any"),  # Ubuntu 20.04
        ("aarch64-apple-darwin", "any"),
    ],
)
def test_an_installer_takes_the_wheel_of_its_machine(dist: Path, tmp_path: Path, target: str, chosen: str) -> None:
    options = ("--no-index", "--no-deps", "--find-links", dist, "--python-version", "3.12", "--python-platform", target)
    run(UV, "pip", "install", "--quiet", "--target", tmp_path / "site", *options, "tango-edge")
    assert next(tmp_path.glob("site/*.dist-info/WHEEL")).read_text().split()[-1] == f"py3-none-{chosen}"


@pytest.mark.network
@pytest.mark.nvcc
@pytest.mark.skipif(platform.machine() not in wheels.MACHINES, reason="there is no wheel for this machine")
def test_an_installed_wheel_uses_its_library(dist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("PYTHONPATH", "TANGO_LIBRARY", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    (wheel,) = dist.glob(f"*_{platform.machine()}.whl")
    tango = install(tmp_path / "venv", str(wheel), "--constraint", ROOT / "constraints.txt") / "tango"
    shown = run(tango, "plugin", "info")
    assert "site-packages/tango_plugins/prebuilt\n" in shown
    assert "in use        prebuilt: " in shown
    assert "not used      built on this machine: the CUDA library" in shown
    monkeypatch.setenv("TANGO_LIBRARY", str(tmp_path / "missing.so"))
    missing = subprocess.run([tango, "plugin", "info"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert "not used      named by TANGO_LIBRARY: the CUDA library" in missing.stdout


@pytest.mark.parametrize(
    ("dynamic", "symbols", "problem"),
    [
        ("(NEEDED) Shared library: [libcudart.so.13]", "", "needs libcudart.so.13"),
        ("(RUNPATH) Library runpath: [/home/me/lib]", "", "RUNPATH"),
        ("", "1: 0 0 FUNC GLOBAL DEFAULT UND memcpy@GLIBC_2.38 (2)", "needs GLIBC_2.38"),
        ("", "1: 0 9 FUNC WEAK   DEFAULT  12 _ZNSt6vectorIiE", "exports _ZNSt6vectorIiE"),
        ("", "", None),
    ],
)
def test_a_library_that_needs_or_exports_too_much_is_rejected(
    monkeypatch: pytest.MonkeyPatch, dynamic: str, symbols: str, problem: str | None
) -> None:
    fine = (" 0x1 (NEEDED) Shared library: [libc.so.6]", " 2: 0 9 FUNC GLOBAL DEFAULT   12 tango_version")
    outputs = {"-dW": f"{fine[0]}\n {dynamic}\n", "--dyn-syms": f"{fine[1]}\n {symbols}\n"}
    monkeypatch.setattr(wheels, "run", lambda tool, option, *arguments: outputs[option])
    if problem is None:
        wheels.check(Path("libtango.so"))
    else:
        with pytest.raises(SystemExit, match=problem):
            wheels.check(Path("libtango.so"))
