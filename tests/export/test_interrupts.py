"""An export that is stopped half-way, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(checkpoint, tmp_path):
    llava, siglip = checkpoint()
    named = ["--checkpoint", str(llava), "--salience-checkpoint", str(siglip), "--output", str(tmp_path / "out")]
    return ["export", *named, "--no-validate"]


def stop_half_way(arguments, number):
    """Sends a signal when the first weights are written; gives the exit code and what the process still printed."""
    command = [sys.executable, "-m", "tests.fakes.paused_cli", "export ", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline().startswith("export ")
        process.send_signal(number)
        process.stdin.close()  # so that it ends, whether or not it heeds the signal
        rest = process.stderr.read()
    return process.returncode, rest


def test_interrupt_leaves_nothing(arguments, tmp_path):
    code, said = stop_half_way(arguments, signal.SIGINT)
    assert code == 2
    assert said.splitlines()[-2:] == [
        "error: interrupted",
        "hint: no half-written output was left behind; run it again",
    ]
    assert not list(tmp_path.iterdir())


def test_kill_leaves_no_output_and_the_next_export_cleans_up(arguments, tmp_path):
    code, _ = stop_half_way(arguments, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial").exists()
    assert main(arguments) == 0
    Bundle.load(tmp_path / "out", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
