"""`tango evaluate`."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tango_calibration.data.dataset import read_folder
from tango_calibration.evaluation import results
from tango_calibration.evaluation.evaluate import (
    ALL,
    BundleEvaluator,
    evaluate,
)
from tango_calibration.evaluation.scores import Scores
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main
from tango_runtime.video.preprocess import preprocess
from tests.fakes.evaluator import TRIALS
from tests.runtime.video.clips import write

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path):
    """A folder of three videos with two questions about each."""
    frames, lines = np.random.default_rng(0).integers(0, 120, (4, 36, 64, 3), dtype=np.uint8), []
    for name in "abc":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, frame in enumerate(frames):
            Image.fromarray(frame + ord(name)).save(tmp_path / "data" / name / f"{i}.png")
        lines.append(
            {"video": name, "question": "Is it red?", "options": ["yes", "no"], "answer": "A", "type": "color"}
        )
        lines.append({"video": name, "question": "What is it?", "answer": "ball"})
    (tmp_path / "data/questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "data"


def run(*arguments):
    return main(["evaluate", *map(str, arguments)])


def test_the_command_writes_its_results(tiny_bundle, folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(tiny_bundle, "--data", folder, "--frames", 4, "--retention-ratio", 0.1, 0.3, "--output", out) == 0
    printed, progress = capsys.readouterr()
    assert re.search(r"\| +0\.3 \| +\S+ \| +tango-norope \|", printed)
    assert "videos 100%" in progress
    found = json.loads((out / "results.json").read_text())
    assert found["conditions"]["questions"] == 6
    assert found["conditions"]["backend"] == str(BundleEvaluator(tiny_bundle, "ort-cpu"))
    assert found["conditions"]["parameters of tango"]["retention_ratio"] == [0.1, 0.3]
    assert [question["answer"] for question in found["questions"]] == ["yes", "ball"] * 3
    assert [(t["method"], t["retention_ratio"]) for t in found["trials"]] == [
        (t.method, t.retention_ratio) for t in TRIALS
    ]
    records = results.read(out / "results.json")
    direct = evaluate(
        BundleEvaluator(tiny_bundle), read_folder(folder, 4), TRIALS, Bundle.load(tiny_bundle).manifest.params
    )
    timeless = [replace(record, prune_ms=0, prefill_ms=0) for record in records]
    assert sorted(timeless, key=str) == sorted((replace(r, prune_ms=0, prefill_ms=0) for r in direct), key=str)
    assert Scores(records).accuracy(ALL).value == found["summaries"][0]["accuracy"]["value"]
    assert all(line in (out / "results.md").read_text() for line in printed.splitlines())
    picture = Image.open(out / "accuracy.png")
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_video_that_cannot_be_read_is_left_out(tiny_bundle, folder, tmp_path, capsys, jobs):
    (folder / "b" / "2.png").write_bytes(b"no image")
    settings = ("--data", folder, "--frames", 4, "--method", "tango", "--retention-ratio", 0.1, "--jobs", jobs)
    assert run(tiny_bundle, *settings, "--output", tmp_path / "out") == 1
    assert "warning: b is left out of these figures" in capsys.readouterr().err.replace("\n", " ")
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert {question["video"] for question in found["questions"]} == {"a", "c"}
    assert found["conditions"]["videos"] == 2
    assert "2.png cannot be read" in found["conditions"]["videos left out"]["b"]


def test_no_video_that_can_be_read_is_an_error(tiny_bundle, folder, tmp_path, capsys):
    assert run(tiny_bundle, "--data", folder, "--frames", 5, "--output", tmp_path / "out") == 2
    assert "has 4 frames" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def generated(tiny_bundle, capsys):
    """``generated(*options)``: what is printed of questions about generated clips, without times."""

    def call(*options):
        asked = ("--videos", 2, "--questions", 2, "--frames", 8, "--method", "topk", "--retention-ratio", 0.1)
        assert run(tiny_bundle, *asked, *options) == 0
        return re.sub(r"\| +[\d.]+ \| +[\d.]+ \|$", "", capsys.readouterr().out, flags=re.MULTILINE)

    return call


def test_generated_clips_in_two_processes(generated):
    assert generated("--jobs", 2) == generated()


@pytest.mark.slow
def test_generated_clips_on_a_ray_cluster(generated, ray_cluster):
    assert generated("--ray", ray_cluster.address) == generated()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_type_of_question_can_be_printed(tiny_bundle, folder, monkeypatch, encoding):
    file = folder / "questions.jsonl"
    file.write_text(file.read_text().replace('"color"', json.dumps("größe", ensure_ascii=False)), encoding="utf-8")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run(tiny_bundle, "--data", folder, "--frames", 4, "--videos", 1, "--method", "topk") == 0
    stdout.flush()
    printed = stdout.buffer.getvalue().decode(encoding)
    assert ("größe" if encoding == "utf-8" else r"gr\xf6\xdfe") in printed


def test_results_are_written_before_they_are_printed(tiny_bundle, folder, tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return 1

    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(os, "dup2", lambda *descriptors: None)  # the command would close the standard output of pytest
    arguments = ("--data", folder, "--frames", 4, "--videos", 1, "--method", "topk", "--output", tmp_path / "out")
    assert run(tiny_bundle, *arguments) == 2
    assert results.read(tmp_path / "out/results.json")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--method", "magic"], "there is no method 'magic'"),
        (["--retention-ratio", "1.5"], "argument --retention-ratio: '1.5' is not a number above 0 and at most 1"),
        (["--videos", "0"], "argument --videos: '0' is not a positive integer"),
        (["--seed", "-1"], "argument --seed: '-1' is not a non-negative integer"),
        (["--jobs", "0"], "argument --jobs: '0' is not a positive integer"),
        (["--sampling", "keyframes"], "only video files have keyframes"),
        (["--frames", "4"], "a generated clip has at least 8 frames"),
        (["--data", "nowhere"], "there is no nowhere"),
        (["--data", "nowhere", "--questions", "3"], "--questions is for generated clips"),
        (["--frames", "512"], "test-0-512f: the prompt takes"),
        (["--output", "."], ". already exists"),
        (["--output", ".", "--overwrite"], ". has no results.json"),
    ],
)
def test_invalid_arguments_are_rejected_first(tiny_bundle, capsys, arguments, error, monkeypatch):
    monkeypatch.setattr(BundleEvaluator, "encode_video", None)
    assert run(tiny_bundle, *arguments) == 2
    first, hint = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {error}")
    assert hint.startswith("hint: ")


def test_keyframes_of_files(tiny_bundle, tmp_path):
    """Both see the same frames where every frame is a keyframe, and not where one is."""
    lines = [{"video": name, "question": "What is it?", "answer": "ball"} for name in ("all.mp4", "one.mp4")]
    for line, size in zip(lines, ("1", "60"), strict=True):
        write(tmp_path / line["video"], options={"g": size, "bf": "0", "sc_threshold": "0"})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    encoded = {}
    for sampling in ("exact", "keyframes"):
        evaluator = BundleEvaluator(tiny_bundle, sampling=sampling)
        for video in read_folder(tmp_path, 4):
            stream, shape = evaluator.open_video(video.source, 4)
            encoded[sampling, video.name] = preprocess(stream, shape.size).frames
    assert np.array_equal(encoded["exact", "all.mp4"], encoded["keyframes", "all.mp4"])
    assert not np.array_equal(encoded["exact", "one.mp4"], encoded["keyframes", "one.mp4"])
    options = ("--frames", 4, "--videos", 1, "--method", "topk", "--retention-ratio", 0.1, "--sampling", "keyframes")
    assert run(tiny_bundle, "--data", tmp_path, *options, "--output", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["conditions"]["sampling"] == "keyframes"


def test_a_picture_needs_matplotlib(tiny_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(tiny_bundle, "--output", tmp_path / "out") == 2
    assert "matplotlib is not installed\nhint: pip install 'tango-edge[calibration]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_results_are_overwritten(tiny_bundle, folder, tmp_path):
    asked = (tiny_bundle, "--data", folder, "--frames", 4, "--method", "topk", "--output", tmp_path / "out")
    assert [run(*asked), run(*asked), run(*asked, "--overwrite")] == [0, 2, 0]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupt_leaves_no_output(tiny_bundle, tmp_path, jobs):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "tests.fakes.paused_cli",
        "videos 25%",
        "evaluate",
        tiny_bundle,
        "--videos",
        8,
        "--questions",
        1,
    ]
    command += ["--frames", 8, "--method", "topk", "--retention-ratio", 0.1, "--jobs", jobs, "--output", out]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, start_new_session=True, **pipes) as process:
        assert process.stderr.readline() == "videos 25%\n"
        os.killpg(process.pid, signal.SIGINT)
        process.stdin.close()  # so that it ends, whether or not it heeds the signal
        rest = process.stderr.read()  # ends when the last process that holds it has ended
    assert process.returncode == 2
    assert rest.splitlines()[-2] == "error: interrupted"
    assert "Traceback" not in rest
    assert "videos 100%" not in rest
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_the_data_is_refused(tiny_bundle, folder, capsys):
    (folder / results.RESULTS).touch()  # as if it were the output of an evaluation, which --overwrite replaces
    assert run(tiny_bundle, "--data", folder, "--output", folder, "--overwrite") == 2
    assert "would replace --data" in capsys.readouterr().err
    assert (folder / "questions.jsonl").is_file()


def test_results_about_a_folder_whose_name_is_not_utf8(tiny_bundle, folder, tmp_path):
    renamed = folder.rename(folder.with_name(os.fsdecode(b"data\xff")))
    arguments = ("--frames", 4, "--videos", 1, "--method", "topk", "--output", tmp_path / "out")
    assert run(tiny_bundle, "--data", renamed, *arguments) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["conditions"]["data"] == renamed.name
