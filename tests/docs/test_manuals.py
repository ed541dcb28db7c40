"""The manuals' commands parse and run, their Python runs, their links lead somewhere."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from examples.make_video import write
from tango_runtime.cli import main as cli
from tests.docs.manuals import (
    GUIDES,
    README,
    ROOT,
    anchors,
    blocks,
    documents,
    links,
    mentioned_commands,
    name,
    shell_commands,
    tango_commands,
    text,
)

every_document = pytest.mark.parametrize("document", documents(), ids=name)

#: Pages whose Python runs beside a bundle and a clip.
RUNNING = [README, ROOT / "docs/guide/run.md", ROOT / "docs/guide/sessions-and-streams.md"]

#: Commands that run on a small bundle in about a second, of which one of each runs in every test run, and longer ones.
QUICK, LONG = ("run", "chat", "watch", "inspect", "plan", "doctor"), ("validate", "evaluate", "calibrate", "bench")


@every_document
def test_every_link_leads_somewhere(document: Path) -> None:
    assert [target for target in links(document) if not _leads_somewhere(document, target)] == []


def _leads_somewhere(document: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    found = (document.parent / path).resolve() if path else document
    if not found.exists() or not found.is_relative_to(ROOT):
        return False
    # mkdocstrings makes places for objects and their members; whether these exist, `make docs` finds out
    described = re.findall(r"^::: (\S+)", text(found), re.MULTILINE) if found.suffix == ".md" else []
    return not anchor or found.suffix != ".md" or anchor in anchors(found) or anchor.startswith(tuple(described))


@every_document
def test_every_command_parses(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command, *arguments in tango_commands(document):
        for word in arguments:  # options that name an output want its folder to be there
            if "/" in word and not word.startswith(("/", "-")) and "://" not in word:
                (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
        cli.parser(command, "tango").parse_args(arguments)


@every_document
def test_every_option_that_is_mentioned_exists(document: Path) -> None:
    for command, *arguments in mentioned_commands(document):
        if command in ("COMMAND", "--version"):
            continue
        known = {option for leaf in cli.leaves(cli.parser(command, "tango")) for option in leaf._option_string_actions}
        assert {word for word in arguments if word.startswith("--")} <= known


@every_document
def test_what_commands_name_exists(document: Path) -> None:
    """Scripts of this repository, targets of make, and extras."""
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    for program, *arguments in shell_commands(document):
        if program == "make":
            assert arguments[0] in targets
        if program in ("python", "python3") and arguments[0].startswith(("examples/", "benchmarks/", "models/")):
            assert (ROOT / arguments[0]).is_file(), arguments[0]
    for named in re.findall(r"(?:\.|tango-edge)\[([\w,]+)\]", text(document)):
        assert set(named.split(",")) <= set(extras), named


@every_document
def test_python_compiles(document: Path) -> None:
    for block in blocks(document, "python"):
        compile(f"async def page():\n{textwrap.indent(block, '    ')}", name(document), "exec")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write(file)
    return file


@pytest.fixture
def home(tmp_path: Path, bundle: Callable[..., Path], clip: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the reader stands: beside bundles, clips, and questions about them."""
    for folder in ("demo/videos", "my-videos"):
        (tmp_path / folder).mkdir(parents=True)
    for link in ("llava-ov-0.5b", "demo/bundle"):
        (tmp_path / link).symlink_to(bundle())
    for copy in ("clip.mp4", "demo/videos/clip.mp4", *(f"my-videos/{i}.mp4" for i in range(4))):
        os.link(clip, tmp_path / copy)
    lines = [f'{{"video": "{i}.mp4", "question": "What rolls?", "answer": "a ball"}}\n' for i in range(4)]
    (tmp_path / "my-videos/questions.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runnable(*names: str) -> list[tuple[str, ...]]:
    """Commands of the README and the guides in shell blocks, on the bundles and clips that `home` has."""
    found = [words for page in (README, *GUIDES) for words in shell_commands(page) if words[0] == "tango"]
    return [
        words[1:]
        for words in dict.fromkeys(map(tuple, found))
        if words[1] in names
        and "-" not in words
        and words[words.index("--backend") + 1 if "--backend" in words else 0] not in ("tensorrt", "ort-cuda")
        and not [word for word in words if word.startswith(("qwen", "llava-video")) or word.isupper()]
        and (words[1] == "plan" or {*words} & {"llava-ov-0.5b", "demo/bundle"} or words[2:] == ())
    ]


def first_of_each_kind() -> list[tuple[str, ...]]:
    return list({arguments[0]: arguments for arguments in reversed(runnable(*QUICK))}.values())


def others() -> list[tuple[str, ...]]:
    return [arguments for arguments in runnable(*QUICK, *LONG) if arguments not in first_of_each_kind()]


@pytest.mark.parametrize("arguments", first_of_each_kind(), ids=" ".join)
def test_commands_run(home: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What rolls?\n"))
    allowed = (0, 1) if arguments[0] in ("plan", "doctor") else (0,)  # 1: it does not fit, nothing is ready
    assert cli.main(arguments) in allowed
    for option in ("--report", "--picture", "--json"):
        if option in arguments:
            assert (home / arguments[arguments.index(option) + 1]).stat().st_size > 100


@pytest.mark.slow
@pytest.mark.parametrize("arguments", others(), ids=" ".join)
def test_other_commands_run(home: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    test_commands_run(home, monkeypatch, arguments)


def test_all_kinds_of_commands_were_found() -> None:
    assert {arguments[0] for arguments in runnable(*QUICK, *LONG)} == {*QUICK, *LONG}


@pytest.mark.parametrize("page", RUNNING, ids=name)
def test_python_runs(home: Path, capsys: pytest.CaptureFixture[str], page: Path) -> None:
    found, names = blocks(page, "python"), {}
    assert found
    for block in found:
        exec(compile(block, name(page), "exec"), names)
        assert capsys.readouterr().out.strip()


@cache
def messages() -> frozenset[str]:
    """What errors say, with … in place of values."""
    found = set()
    for root in ("runtime", "export", "calibration", "plugins"):
        for file in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "TangoError" and node.args:
                    found.add(_template(node.args[0]))
    return frozenset(found)


def _template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _template(node.left) + _template(node.right)
    return "…"


def test_troubleshooting_quotes_real_errors() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", text(ROOT / "docs/guide/troubleshooting.md"), re.MULTILINE)
    assert len(rows) > 30
    for row in rows:
        pattern = ".*".join(re.escape(part) for part in row.split("…"))
        assert any(re.search(pattern, message, re.DOTALL) for message in messages()), row


def test_nginx_reads_the_configuration(tmp_path: Path) -> None:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed: apt install nginx-light")
    [site] = blocks(ROOT / "docs/guide/triton-and-balancers.md", "nginx")
    file = tmp_path / "nginx.conf"
    file.write_text(f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{\n{site}\n}}\n")
    done = subprocess.run([nginx, "-t", "-c", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pictures_are_small() -> None:
    for picture in (ROOT / "docs").rglob("*.png"):
        assert picture.stat().st_size < 300_000, picture.name
