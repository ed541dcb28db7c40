"""`tango batch` that is killed at ten moments of chance, and goes on each time."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys

import pytest

from tango_runtime.cli.main import main

pytestmark = pytest.mark.slow  # eleven processes, one after the other

VIDEOS, QUESTIONS, KILLS = 5, 16, 10

#: `tango batch` that kills itself in its n-th write, of which only a share gets through.
KILLED = """
import os, signal, sys
from tango_runtime.cli.main import main
left, share, write = int(sys.argv[1]), float(sys.argv[2]), os.pwrite

def pwrite(file, data, at):
    global left
    left -= 1
    if not left:
        write(file, data[: int(share * len(data))], at)
        os.kill(os.getpid(), signal.SIGKILL)
    return write(file, data, at)

os.pwrite = pwrite
main(sys.argv[3:])
"""


@pytest.fixture
def command(tmp_path, clip, tiny_bundle):
    """``command(output)``: arguments of `tango batch` on a folder of videos, one of them damaged, one missing."""
    for i in range(VIDEOS):
        shutil.copy(clip, tmp_path / f"{i}.mp4")
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:5000])
    names = [*(f"{i}.mp4" for i in range(VIDEOS)), "cut.mp4", "none.mp4"]
    with (tmp_path / "questions.jsonl").open("w") as file:
        for i in range(QUESTIONS):
            for name in names:
                file.write(json.dumps({"video": name, "question": f"What happens {i} times?"}) + "\n")
        file.write(json.dumps({"video": "0.mp4", "question": "Twice?", "id": "1.mp4#0"}) + "\n")

    def call(output):
        paths = [tiny_bundle, tmp_path / "questions.jsonl", "--output", tmp_path / output]
        options = ["--max-new-tokens", 6, "--decoders", 1, "--retention-ratio", 0.25, 0.5]
        return ["batch", *map(str, [*paths, *options])]

    return call


def test_ten_kills_lose_and_repeat_nothing(command, tmp_path):
    """The moments are counted in writes, so that they are spread over the run on any machine, however loaded."""
    assert main(command("undisturbed.jsonl")) == 1
    undisturbed = sorted((tmp_path / "undisturbed.jsonl").read_text().splitlines())
    assert len(undisturbed) == 2 * VIDEOS * QUESTIONS
    answers, chance, written = tmp_path / "answers.jsonl", random.Random(0), []
    for _ in range(KILLS):
        moment = chance.randint(1, (len(undisturbed) - len(written)) // 4)
        share = chance.choice((0.0, chance.random(), 1.0))
        program = [sys.executable, "-c", KILLED, str(moment), str(share), *command("answers.jsonl")]
        assert subprocess.run(program, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
        found = answers.read_text().splitlines(keepends=True)
        written = [line.rstrip("\n") for line in found if line.endswith("\n")]
        assert len(found) - len(written) <= 1
        assert len(set(written)) == len(written)
        assert set(written) <= set(undisturbed)
    assert 0 < len(written) < len(undisturbed)
    assert main(command("answers.jsonl")) == 1
    assert sorted(answers.read_text().splitlines()) == undisturbed
    errors = [tmp_path / f"{name}.errors.jsonl" for name in ("answers", "undisturbed")]
    assert sorted(errors[0].open()) == sorted(errors[1].open())


def test_a_kill_before_the_table_is_in_place(command, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    code = "import os, pathlib, signal, sys; from tango_runtime.cli.main import main; "
    code += "pathlib.Path.replace = lambda *given: os.kill(os.getpid(), signal.SIGKILL); main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *command("answers.parquet")], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "answers.parquet").exists()
    assert main(command("answers.parquet")) == 1
    rows = parquet.read_table(tmp_path / "answers.parquet").to_pylist()
    assert rows == [json.loads(line) for line in (tmp_path / "answers.jsonl").open()]
    assert not list(tmp_path.glob(".*"))
