"""`tango`: its commands, its exit codes, and what it costs to ask for help."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from tango_plugins import TangoError
from tango_runtime.cli import main as cli
from tango_runtime.cli.main import Command, main

COMMANDS = ["run", "inspect", "export", "validate"]
FORBIDDEN = ["torch", "onnx", "transformers", "onnxruntime"]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_overview_names_every_command(capsys, arguments):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tango-edge {version('tango-edge')}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_its_defaults(capsys, name):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: tango {name}" in out
    assert "None" not in out


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["answer"], "there is no command 'answer'", "run, inspect, "),
        (["--frames"], "there is no command '--frames'", "run, inspect, "),
        (["run"], "the following arguments are required: bundle, video, question", "tango run --help"),
        (["run", "bundle", "clip.mp4"], "the following arguments are required: question", "tango run --help"),
        (["inspect", "none", "--frame"], "unrecognized arguments: --frame", "tango inspect --help"),
        (["inspect", "none"], "there is no bundle at none", "tango-export"),
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


def test_debug_shows_the_traceback():
    with pytest.raises(TangoError, match="there is no bundle at none"):
        main(["inspect", "none", "--debug"])


@pytest.fixture
def command(monkeypatch):
    """A function that makes `tango run` do something else."""

    def replace(action):
        monkeypatch.setattr(cli, "_load", lambda name: Command(lambda parser: None, action))

    return replace


@pytest.mark.parametrize("code", [0, 1])
def test_the_commands_verdict_is_the_exit_code(command, code):
    command(lambda args: code)
    assert main(["run"]) == code


def test_an_interrupt_is_an_error(command, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    command(interrupted)
    assert main(["run"]) == 2
    assert capsys.readouterr().err.startswith("error: interrupted\nhint: ")


def test_an_error_of_the_system_is_an_error(command, capsys, tmp_path):
    command(lambda args: (tmp_path / "none").read_text() and 0)
    assert main(["run"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert str(tmp_path / "none") in error
    assert hint.startswith("hint: ")


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


@pytest.mark.parametrize(
    "code",
    ["import tango_runtime", "from tango_runtime.cli.main import main; main(['--help'])", "import tango_plugins.op"],
)
def test_the_devices_side_is_light(code):
    """It needs none of the workstation's packages, and under a second of a core to begin."""
    code = f"import sys, time, json; {code}; print(json.dumps([time.process_time(), list(sys.modules)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout.splitlines()[-1])
    assert not set(FORBIDDEN) & set(modules)
    assert seconds < 1


@pytest.mark.parametrize(
    "code", ["import tango_runtime", "from tango_runtime.cli.main import main; main(['run', '--help'])"]
)
def test_the_devices_side_runs_where_the_workstations_packages_are_absent(code):
    absent = f"import sys; sys.modules |= dict.fromkeys({FORBIDDEN!r}); {code}"
    assert subprocess.run([sys.executable, "-c", absent], capture_output=True, check=False).returncode == 0
