"""The guide for Jetson: its commands parse, and the outputs of `tango plan` in it are what the command prints."""

from __future__ import annotations

import re
import shlex

import pytest

from tango_runtime.cli import main as cli
from tests.packaging.installs import ROOT

GUIDE = (ROOT / "docs/guide/jetson.md").read_text(encoding="utf-8")
BOARDS = ("device", "orin-nano-8gb", "orin-nx-16gb", "agx-orin-64gb", "agx-thor")


def commands() -> list[list[str]]:
    lines = "\n".join(re.findall(r"(?ms)^```bash\n(.*?)^```", GUIDE)).replace("\\\n", " ").splitlines()
    called = [line.rpartition("| ")[2] if "gst-launch" in line else line for line in lines]
    return [shlex.split(line) for line in called if line.startswith("tango")]


def outputs() -> list[tuple[str, str]]:
    """(arguments of `tango plan`, the output after them)."""
    alone = re.findall(r"(?ms)^```bash\ntango plan (.+?)\n```\n\n```text\n(.*?)^```", GUIDE)
    return alone + re.findall(r"(?ms)\(`tango plan ([^`]+)`\):\n\n```text\n(.*?)^```", GUIDE)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_parses(command: list[str]) -> None:
    name, rest = ("export", command[1:]) if command[0] == "tango-export" else (command[1], command[2:])
    cli.parser(name, "tango").parse_args(rest)


@pytest.mark.parametrize(("arguments", "shown"), outputs(), ids=[arguments for arguments, _ in outputs()])
def test_the_plans_are_those_of_the_command(
    arguments: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(["plan", *shlex.split(arguments)])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    if "all" in arguments.split():
        lines = [line for line in lines if line.split()[0] in BOARDS]
    assert [line.rstrip() for line in shown.splitlines()] == lines


def test_there_are_plans_of_four_boards() -> None:
    assert len(outputs()) == 5
    assert all(f"\n{board} " in GUIDE for board in BOARDS[1:])
