"""The checkpoint in models/tiny: its size, and its accuracy on clips of the test split."""

from pathlib import Path

import pytest

from examples import make_clip, quiz
from tango_calibration.data.dataset import synthetic
from tango_calibration.evaluation.evaluate import ALL, BundleEvaluator, Trial, evaluate
from tango_calibration.evaluation.scores import Scores
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main

TINY = Path(__file__).parents[2] / "models" / "tiny"
TANGO = Trial("tango", 0.1)

#: Accuracy by number of questions, with all tokens and with a tenth, measured on ONNX Runtime's CPU provider in fp16.
EXPECTED = {40: {ALL: 0.975, TANGO: 0.95}, 200: {ALL: 0.955, TANGO: 0.895}}

#: Tolerance: another CPU rounds differently, which may change one or two of 40 answers.
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    named = [
        "--checkpoint",
        TINY / "llava",
        "--salience-checkpoint",
        TINY / "siglip",
        "--output",
        folder,
        "--context",
        12800,
    ]
    assert main(["export", *map(str, named), "--sink-positions", "--no-validate"]) == 0
    return folder


def asked(count):
    """Questions of the test split, four per clip, about clips of 8 and 16 frames in turn."""
    short, long = (synthetic(count // 4, questions=4, frames=frames) for frames in (8, 16))
    videos = [video for pair in zip(short, long, strict=False) for video in pair if len(video.questions) == 4]
    return videos[: count // 4]


@pytest.mark.slow
@pytest.mark.parametrize("count", [40, 200])
def test_accuracy_is_as_documented(bundle, count):
    evaluator = BundleEvaluator(bundle, threads=1)
    scores = Scores(evaluate(evaluator, asked(count), [ALL, TANGO], Bundle.load(bundle).manifest.params))
    assert scores.summary(ALL).questions == count
    found = {trial: scores.accuracy(trial).value for trial in EXPECTED[count]}
    assert found == pytest.approx(EXPECTED[count], abs=TOLERANCE)


def test_it_is_small():
    sizes = [file.stat().st_size for file in TINY.rglob("*.safetensors")]
    assert len(sizes) == 2
    assert max(sizes) <= 15e6
    assert sum(sizes) <= 16e6


@pytest.mark.slow
def test_it_answers_the_questions_of_the_demo(bundle, tmp_path, capsys):
    make_clip.main([str(tmp_path / "videos")])
    quiz.main([str(bundle), str(tmp_path / "videos"), "--frames", "16"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "3136 tokens" in line]
    assert len(lines) == 6
    assert sum(" right " in line for line in lines) >= 4
