"""The commands of the examples' READMEs do what they say."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples import make_clip
from tango_runtime.cli import main as cli
from tests.examples.readmes import EXAMPLES, READMES, Commands, commands, missing, pattern

ROOT = EXAMPLES.parent

#: Words that the model of models/tiny answers with. The random model of `tiny_bundle` says something else.
ANSWERS = ("cross", "yellow", "one", "three")

#: They run with models/tiny alone: an alert needs a model that knows what it sees, the others take long.
SLOW = {"05-live", "06-server-client", "10-torch-dlpack", "11-quantize"}

#: Their answers may be others on another machine: about the frames that a camera does not lose, or counts in time.
UNSURE = {"03-camera", "11-quantize"}

ids = [readme.parent.name for readme in READMES]
every_readme = pytest.mark.parametrize("readme", READMES, ids=ids)
all_blocks = [
    pytest.param(block, id=f"{readme.parent.name}-{number}")
    for readme in READMES
    for number, block in enumerate(commands(readme), 1)
]


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make demo` writes: a clip, and questions about it."""
    folder = tmp_path_factory.mktemp("demo") / "videos"
    make_clip.main([str(folder), "--frames", "16"])
    return folder


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that `make demo` exports."""
    from tango_export.export import Request, export

    tiny = ROOT / "models" / "tiny"
    output = tmp_path_factory.mktemp("demo") / "bundle"
    folders = (str(tiny / "llava"), str(tiny / "siglip"))
    return export(Request("llava-ov", *folders, output, context=12800, sink_positions=()))


@pytest.fixture
def stand(tmp_path: Path, videos: Path) -> Callable[[Path], Path]:
    """``stand(bundle)``: a folder like the root of a clone after `make demo`, with that bundle."""

    def made(bundle: Path) -> Path:
        for folder in ("examples", "plugins"):
            (tmp_path / folder).symlink_to(ROOT / folder)
        (tmp_path / "demo").mkdir()
        shutil.copytree(bundle, tmp_path / "demo" / "bundle")  # no link: a server calls a model by its folder's name
        (tmp_path / "demo" / "videos").symlink_to(videos)
        return tmp_path

    return made


def run(blocks: list[Commands], folder: Path, answers: tuple[str, ...] = ()) -> None:
    """Runs blocks in one shell, as a reader does, and compares what each prints.

    Where its shell ends, whatever it started does, too.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    outputs = [folder / f"block-{number}.out" for number in range(len(blocks))]
    script = ["set -eu -o pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for block, output in zip(blocks, outputs, strict=True):
        script += [f"exec > {shlex.quote(str(output))}", block.bash.replace("8000", port)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )
    printed = [output.read_text(encoding="utf-8") if output.exists() else "(did not run)" for output in outputs]
    assert done.returncode == 0, "\n".join([*printed, done.stderr])
    for block, text in zip(blocks, printed, strict=True):
        if block.output is not None:
            assert pattern(block.output, answers).fullmatch(text), f"{block.bash}\nprinted\n{text}\nnot\n{block.output}"


def runnable(readme: Path) -> list[Commands]:
    """The blocks that this machine can run."""
    return [block for block in commands(readme) if not missing(block.needs)]


@pytest.mark.parametrize("readme", [r for r in READMES if r.parent.name not in SLOW], ids=lambda r: r.parent.name)
def test_the_commands_run_with_a_random_model(readme: Path, tiny_bundle: Path, stand: Callable[[Path], Path]) -> None:
    blocks = [block for block in runnable(readme) if "ray" not in block.needs]  # it takes ten seconds to start
    if not blocks:
        pytest.skip(missing(commands(readme)[0].needs))
    run(blocks, stand(tiny_bundle), ANSWERS)


@pytest.mark.slow
@every_readme
def test_the_commands_print_what_the_readme_says(
    readme: Path, demo_bundle: Path, stand: Callable[[Path], Path]
) -> None:
    if not (blocks := runnable(readme)):
        pytest.skip(missing(commands(readme)[0].needs))
    run(blocks, stand(demo_bundle), ANSWERS if readme.parent.name in UNSURE else ())


@pytest.mark.parametrize("block", all_blocks)
def test_the_commands_parse(block: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    subprocess.run(["bash", "-n", "-c", block.bash], check=True)
    for command in split(block.bash):
        if command[0] == "tango":
            cli.parser(command[1], "tango").parse_args(command[2:])
        elif command[0] == "python" and command[1] != "-c":
            compile((ROOT / command[1]).read_text(encoding="utf-8"), command[1], "exec")
    if reason := missing(block.needs):
        pytest.skip(f"parsed, and not run here: {reason}")


def test_another_output_is_noticed() -> None:
    said = "yellow\nkept 327 of 3136 tokens (…)\n"
    assert pattern(said).fullmatch("yellow\nkept 5 of 64 tokens (in 1.5 s)\n")
    assert pattern(said, ("yellow",)).fullmatch("two\nlines\nkept 5 of 64 tokens ()\n")
    for other in ("red\nkept 5 of 64 tokens ()", "yellow\nkept no tokens ()", "yellow\n", ""):
        assert not pattern(said).fullmatch(other)
    assert not pattern(said, ("yellow",)).fullmatch("two\nkept 5 of 64 tokens\n")


def split(bash: str) -> Iterator[list[str]]:
    """The simple commands of a script, without redirections."""
    lexer = shlex.shlex(bash.replace("\\\n", " ").replace("\n", ";"), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    command: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";|&()"):
            if command:
                yield command[: next((i for i, w in enumerate(command) if set(w) <= set("<>")), None)]
            command = []
        else:
            command.append(word)


def test_the_index_names_every_example() -> None:
    linked = re.findall(r"\]\((\d\d-[\w-]+)/README\.md\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert linked == ids
    assert [name[:2] for name in ids] == [f"{number:02}" for number in range(1, len(ids) + 1)]


@every_readme
def test_a_readme_is_short_and_names_every_script(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    for script in readme.parent.iterdir():
        if script.suffix in (".py", ".c", ".json", ".cpp", ".h"):
            assert script.name in text
