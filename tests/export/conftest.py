"""What the tests of refusals share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tango_runtime.cli.main import main


@dataclass(frozen=True)
class Desk:
    """An empty folder with copies of a checkpoint and its SigLIP in it, to be spoiled and exported.

    Attributes:
        folder: The folder; the tests run in it.
        llava: The checkpoint.
        siglip: Its SigLIP.
        capsys: Where the output of the command goes.
        model: What ``--model`` says.
    """

    folder: Path
    llava: Path
    siglip: Path
    capsys: pytest.CaptureFixture[str]
    model: str = "llava-ov"

    def export(self, *arguments: str) -> int:
        """`tango export` into ``out``, unless an argument says otherwise: the last one wins."""
        named = ["--checkpoint", "llava", "--salience-checkpoint", "siglip", "--output", "out", "--no-validate"]
        return main(["export", "--model", self.model, *named, *arguments])

    def refused(self, *arguments: str) -> tuple[str, str]:
        """Exports, and expects exit code 2, two lines that say why, and nothing new on the disk; gives the lines."""
        before = set(self.folder.rglob("*"))
        assert self.export(*arguments) == 2
        return self.complaint(before)

    def complaint(self, before: set[Path]) -> tuple[str, str]:
        lines = [line for line in self.capsys.readouterr().err.splitlines() if "%" not in line]
        error, hint = lines[-2:]
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        assert "Traceback" not in "".join(lines)
        assert set(self.folder.rglob("*")) == before
        return error, hint


@pytest.fixture
def lay_desk(
    checkpoint: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[str], Desk]:
    """``lay_desk(layout)``: a desk with copies of a checkpoint of that layout."""
    from tests.export.edits import copied  # it needs torch, which is not everywhere

    monkeypatch.chdir(tmp_path)
    return lambda layout: Desk(tmp_path, *copied(checkpoint(layout), tmp_path), capsys)


@pytest.fixture
def desk(lay_desk: Callable[[str], Desk]) -> Desk:
    return lay_desk("llava-hf")


@pytest.fixture
def video_desk(lay_desk: Callable[[str], Desk]) -> Desk:
    return replace(lay_desk("llava-video"), model="llava-video")


@pytest.fixture
def lmms_desk(lay_desk: Callable[[str], Desk]) -> Desk:
    return lay_desk("lmms-lab")
