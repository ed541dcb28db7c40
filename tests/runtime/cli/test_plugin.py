"""`tango plugin`: what is installed, and errors that need no compiler."""

from pathlib import Path

import pytest

from tango_plugins.build import Info
from tango_runtime.cli import plugin
from tango_runtime.cli.main import main


def test_info_shows_what_is_missing_and_how_to_build_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugin", "info", "--folder", str(tmp_path)]) == 1
    assert "tango plugin build" in capsys.readouterr().out


def test_build_names_a_missing_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["plugin", "build", "--output", str(tmp_path / "lib")]) == 2
    error = capsys.readouterr().err
    assert "error: cmake is not on the PATH" in error
    assert "hint:" in error
    assert not (tmp_path / "lib").exists()


def test_build_says_how_to_use_a_library_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "libtango.so"
    monkeypatch.setattr(plugin, "build", lambda *arguments: Info(tmp_path, library, "0.1.0 sm_87", None))
    assert main(["plugin", "build", "--output", str(tmp_path)]) == 0
    assert f"TANGO_LIBRARY={library}" in capsys.readouterr().err
    monkeypatch.setenv("TANGO_LIBRARY", str(library))
    assert main(["plugin", "build", "--output", str(tmp_path)]) == 0
    assert "TANGO_LIBRARY" not in capsys.readouterr().err


def test_build_or_info_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugin"]) == 2
    assert "build" in capsys.readouterr().err
