"""The README's commands and code do what it says, on a bundle of a small checkpoint."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.make_video import write
from tango_runtime.cli import main as cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    fenced = [line for block in blocks("bash") for line in block.splitlines()]
    inline = [code for code in re.findall(r"`([^`\n]+)`", README) if re.match(r"tango(-export)? \S+", code)]
    return [shlex.split(line) for line in [*fenced, *inline] if line.startswith("tango")]


@pytest.fixture
def home(tmp_path: Path, bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the README's reader stands: beside a bundle and a clip."""
    (tmp_path / "llava-ov-0.5b").symlink_to(bundle())
    write(tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_parses(command: list[str]) -> None:
    if "COMMAND" in command:
        return
    name, rest = ("export", command[1:]) if command[0] == "tango-export" else (command[1], command[2:])
    cli.parser(name, "tango").parse_args(rest)


def test_the_run_commands_work(home: Path) -> None:
    ran = [command[1:] for command in commands() if command[:2] in (["tango", "run"], ["tango", "inspect"])]
    assert ran
    for arguments in ran:
        assert cli.main(arguments) == 0
    assert (home / "kept.html").stat().st_size > 10_000


def test_the_python_examples_work(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_question, session, stream, operator = blocks("python")
    exec(compile(one_question, "README.md", "exec"), {})
    assert re.search(r"\d+ 512 \{'video': .*'prefill': ", capsys.readouterr().out)
    exec(compile(session, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 4
    exec(compile(stream, "README.md", "exec"), {})
    assert re.match(r"5\.\d s: ", capsys.readouterr().out)
    exec(compile(operator, "README.md", "exec"), {})
    count, width = re.fullmatch(r"(\d+) \(\1, (\d+)\) \[.*\]\n", capsys.readouterr().out).groups()
    assert (0 < int(count) < 8 * 196, width) == (True, "64")


def test_the_make_targets_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for block in blocks(""):
        for line in block.split("\n"):
            if line.startswith("make "):
                assert line.split()[1] in targets


def documents() -> list[Path]:
    folders = ("docs", "plugins", "benchmarks", "models", "examples", "tests")
    nested = [file for folder in folders for file in (ROOT / folder).rglob("*.md")]
    return [*ROOT.glob("*.md"), *nested]


def test_every_link_leads_somewhere() -> None:
    for document in documents():
        for link in re.findall(r"\]\((?!http)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
