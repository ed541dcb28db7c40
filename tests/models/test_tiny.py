"""A few training steps of models/tiny, and their output."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tango_calibration.data.synthetic import make_clip
from tango_calibration.evaluation.evaluate import BundleEvaluator
from tango_calibration.evaluation.methods import Selection
from tango_runtime.cli.main import main
from tango_runtime.video import Clock
from tango_runtime.video.shape import ClipShape

TINY = Path(__file__).parents[2] / "models" / "tiny"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model trained for two steps of each stage, and its bundle."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny")
    steps = ["--frame-steps", "2", "--clip-steps", "2", "--batch", "4", "--validation-batches", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TINY)
        patch.setattr(sys, "argv", ["train.py", str(folder / "made"), *steps, "--workers", "0", "--no-compile"])
        import train

        train.main()
    named = ["--checkpoint", folder / "made" / "llava", "--salience-checkpoint", folder / "made" / "siglip"]
    assert main(["export", *map(str, named), "--output", str(folder / "bundle"), "--sink-positions"]) == 0
    return folder


@pytest.mark.slow
def test_a_training_logs_its_accuracy(trained):
    lines = [json.loads(line) for line in (trained / "made" / "training.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines[:-1]] == [1] * 2 + [2] * 7
    assert lines[-1]["done"]
    assert all(0 <= line["accuracy"] <= 1 for line in lines[:-1])


def test_background_comes_from_another_clip_and_figures_stay(monkeypatch):
    monkeypatch.syspath_prepend(TINY)
    import torch
    from train import swap_background

    near = torch.rand(16, 729) < 0.2
    hidden = torch.arange(16.0)[:, None, None].expand(16, 729, 3)
    mixed = swap_background(hidden, near)
    source = mixed[..., 0].long()
    other = (source - torch.arange(16)[:, None]) % 16
    assert (other[near] == 0).all()
    moved = other[other > 0].unique()
    assert len(moved) == 1
    assert 4 <= moved <= 12  # frames of a clip are adjacent, at most four
    assert not near[source, torch.arange(729)][
        other > 0
    ].any()  # from another frame's background, never from its figures
    assert (other[~near] > 0).float().mean() > 0.7


@pytest.mark.slow
def test_it_fits_in_16_megabytes(trained):
    assert sum(file.stat().st_size for file in (trained / "made").rglob("*.safetensors")) <= 16e6


@pytest.mark.slow
def test_the_scorer_evaluates_a_checkpoint_as_the_pipeline_does(trained, monkeypatch):
    monkeypatch.syspath_prepend(TINY)
    from score import TorchEvaluator

    frames = make_clip(0, "test", 8).render()[:2]
    ours, pipeline = TorchEvaluator(trained / "made", "cpu"), BundleEvaluator(trained / "bundle", max_new_tokens=6)
    (features, salience), (wanted, attention) = ours.encode_video(frames), pipeline.encode_video(frames)
    np.testing.assert_allclose(features, wanted, atol=2e-2)
    np.testing.assert_allclose(salience, attention, rtol=2e-2)
    questions = ["What colour is the star?", "Is there a red ring?"]
    kept, clock = Selection(wanted.reshape(-1, 256), np.arange(2 * 196, dtype=np.int32)), Clock(np.zeros(2), 2.0)
    asked = kept, ClipShape(2, (384, 384), 1, (14, 14)), clock, questions
    assert ours.answer(*asked)[0] == pipeline.answer(*asked)[0]
