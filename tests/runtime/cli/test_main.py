"""`tango`: its commands, their options, exit codes and errors, and what starting it costs."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

from tango_plugins import TangoError
from tango_runtime.backends.registry import BACKENDS
from tango_runtime.cli import main as cli
from tango_runtime.cli.command import Command
from tango_runtime.cli.main import COMMANDS, Entry, leaves, main

FORBIDDEN = ["torch", "onnx", "transformers", "onnxruntime"]
#: Packages of the runtime that take longest to import.
LARGE = ["av", "jinja2", "numpy", "PIL", "rich", "tokenizers"]


def options():
    """(command, option, action) for every argument of every command and subcommand."""
    for name in COMMANDS:
        for leaf in leaves(cli.parser(name, f"tango {name}")):
            for action in leaf._actions:
                yield leaf.prog.removeprefix("tango "), (action.option_strings or [action.dest])[-1], action


def meaning(action):
    """What must be the same wherever an option has the same name: all but the defaults."""
    kind = type(action), action.type, tuple(action.choices or ())
    return kind, re.sub(r" \(.*\)", "", action.help or "")


@pytest.fixture
def command(monkeypatch):
    """``command(action)`` makes `tango run` run that action instead."""

    def replace(action):
        monkeypatch.setattr(cli, "_load", lambda name: Command(lambda parser: None, action))

    return replace


# Help.


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_overview_lists_every_command(capsys, arguments):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(entry.summary)}$", out, re.MULTILINE)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tango-edge {version('tango-edge')}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: tango {name}" in out
    assert "None" not in out


def test_every_argument_has_a_help_text():
    assert [(command, option) for command, option, action in options() if not action.help] == []


def test_an_option_means_the_same_in_every_command():
    meanings = defaultdict(dict)
    for command, option, action in options():
        meanings[option].setdefault(meaning(action), []).append(command)
    assert {option: found for option, found in meanings.items() if len(found) > 1} == {}


def test_shared_options_are_shared():
    users = defaultdict(set)
    for command, option, _ in options():
        users[option].add(command)
    videos = {"run", "chat", "watch", "batch", "bench", "evaluate"}
    making = {"export", "validate", "build", "calibrate"}
    everywhere = videos | making | {"inspect", "doctor", "plan", "serve"}
    assert users["--verbose"] == users["--quiet"] == users["--debug"] == everywhere | {"plugin build", "plugin info"}
    assert users["--backend"] == videos | {"serve", "calibrate"}
    assert users["--json"] == {"doctor", "plan", "bench"}
    assert users["--no-prune"] == {"run", "chat", "watch", "batch", "plan", "bench"}
    assert users["--overwrite"] == {"export", "calibrate", "evaluate"}


def test_backends_are_those_of_the_registry():
    choices = [action.choices for _, option, action in options() if option == "--backend"]
    assert choices == [["auto", *BACKENDS]] * 8


def test_help_uses_engine_only_for_tensorrt_engines():
    wrong = [
        (command, option)
        for command, option, action in options()
        if "engine" in (action.help or "") and command not in ("build", "doctor", "inspect", "calibrate")
    ]
    assert wrong == []


# Errors and exit codes.


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["answer"], "there is no command 'answer'", "run, chat, "),
        (["--frames"], "there is no command '--frames'", "run, chat, "),
        (["run"], "the following arguments are required: bundle, video, question", "tango run --help"),
        (
            ["run", "bundle", "clip.mp4", "--what"],
            "the following arguments are required: question",
            "--help (after -- an",
        ),
        (["inspect", "none", "--frame"], "unrecognized arguments: --frame", "tango inspect --help"),
        (["inspect", "none"], "there is no bundle at none", "tango-export"),
        (["inspect", "none", "-v", "-q"], "argument -q/--quiet: not allowed with argument -v/--verbose", "--help"),
        (["plan", "--frames", "1.5"], "argument --frames: '1.5' is not a positive integer", "tango plan --help"),
        (["doctor", "--json", "none/out.json"], "there is no folder ", "choose another file"),
        (["doctor", "--json", "/"], "/ is a folder", "give a file in it"),
    ],
)
def test_a_mistake_is_an_error_a_hint_and_exit_code_2(capsys, arguments, error, hint):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert first.startswith(f"error: {error}")
    assert second.startswith("hint: ")
    assert hint in second


def test_an_error_does_not_steer_the_terminal(capsys):
    assert main(["inspect", "a\x1b[31m\x07b"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no bundle at a\\x1b[31m\\x07b\n")


def test_debug_shows_the_traceback():
    with pytest.raises(TangoError, match="there is no bundle at none"):
        main(["inspect", "none", "--debug"])


@pytest.mark.parametrize("code", [0, 1])
def test_the_exit_code_is_the_commands(command, code):
    command(lambda args: code)
    assert main(["run"]) == code


def test_an_interrupt_is_an_error(command, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    command(interrupt)
    assert main(["run"]) == 2
    assert capsys.readouterr().err.startswith("error: interrupted\nhint: ")


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "none"), "none: No such file", "check that the path exists"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied", "check that the path exists"),
        (OSError(errno.ENOSPC, "No space left"), "No space left", "free some space"),
        (OSError(errno.ENOMEM, "Cannot allocate"), "Cannot allocate", "stop other programs"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files", "ulimit -n"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset"), "Connection reset", "add --debug"),
        (OSError("no number and no file"), "no number and no file", "add --debug"),
    ],
)
def test_a_system_error_has_a_hint_that_fits(command, capsys, error, message, hint):
    def fail(args):
        raise error

    command(fail)
    assert main(["run"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: {message}"
    assert hint in second


PLAN = ["plan", "--model", "llava-ov-7b", "--device", "all"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], PLAN])
@pytest.mark.parametrize("buffering", ["", "1"])
def test_a_full_standard_output_is_an_error_with_a_hint(arguments, buffering):
    environment = os.environ | {"PYTHONUNBUFFERED": buffering}
    command = [sys.executable, "-m", "tango_runtime.cli.main", *arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device\nhint: free some space on the disk\n"


def test_results_are_written_before_they_are_printed(tmp_path):
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "tango_runtime.cli.main", *PLAN, "--json", file]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == 2
    assert len(json.loads(file.read_text())) > 1


@pytest.mark.parametrize("command", ["bench", "doctor", "plan"])
def test_results_never_replace_a_file_of_the_bundle(tiny_bundle, capsys, command):
    file = tiny_bundle / "bundle.json"
    before = file.read_bytes()
    named = ["--model", str(tiny_bundle), "--device", "h200"] if command == "plan" else [str(tiny_bundle)]
    assert main([command, *named, "--json", str(file)]) == 2
    assert "would replace the bundle" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_tango_export_is_tango_export(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tango-export", "--model", "gpt"])
    assert cli.main_export() == 2
    assert "error: there is no model 'gpt'" in capsys.readouterr().err


def test_a_command_whose_extra_is_missing_names_it():
    code = "import sys; sys.modules['onnx'] = None; from tango_runtime.cli.main import main; sys.exit(main(['export']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: tango export needs onnx, which is not installed\nhint: pip install 'tango-edge[export]'\n"
    )


def test_a_missing_module_of_tango_itself_is_not_reported_as_a_missing_extra(monkeypatch):
    monkeypatch.setitem(COMMANDS, "run", Entry("tango_runtime.cli.gone:RUN", "cpu", "none"))
    with pytest.raises(ModuleNotFoundError, match=r"tango_runtime\.cli\.gone"):
        main(["run"])


# Starting.


@pytest.mark.parametrize(
    "code",
    ["import tango_runtime", "from tango_runtime.cli.main import main; main(['--help'])", "import tango_plugins.op"],
)
def test_the_runtime_imports_no_workstation_package_and_starts_fast(code):
    """It needs no torch, and loads its own large packages only where it uses them."""
    code = f"import sys, json; {code}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = json.loads(done.stdout.splitlines()[-1])
    assert not {*FORBIDDEN, *LARGE} & set(modules)


@pytest.mark.parametrize(
    "code", ["import tango_runtime", "from tango_runtime.cli.main import main; main(['run', '--help'])"]
)
def test_the_runtime_works_without_the_workstations_packages(code):
    absent = f"import sys; sys.modules |= dict.fromkeys({FORBIDDEN!r}); {code}"
    assert subprocess.run([sys.executable, "-c", absent], capture_output=True, check=False).returncode == 0
