"""`make demo`: its commands on a small random checkpoint, and the clip that it makes."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples import make_clip
from tango_calibration.data import synthetic
from tango_calibration.data.dataset import read_folder
from tango_runtime.video import sample

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("frames", [8, 16])
def test_sampling_the_file_gives_the_clips_own_frames(tmp_path, frames):
    clip = synthetic.make_clip(3, "test", frames)
    make_clip.write(tmp_path / "clip.mp4", clip)
    seconds, pixels = zip(*sample(tmp_path / "clip.mp4", frames), strict=True)
    np.testing.assert_allclose(seconds, clip.seconds - clip.seconds[0], atol=2e-3)
    off = [np.square(seen.astype(float) - own).mean() for seen, own in zip(pixels, clip.render(), strict=True)]
    assert max(off) < 50  # 31 dB; the frames a tenth of an interval later are up to 74 or more away


def test_the_questions_are_the_clips(tmp_path):
    make_clip.main([str(tmp_path / "made"), "--seed", "3", "--frames", "8", "--questions", "4"])
    [video] = read_folder(tmp_path / "made", 8)
    possible = synthetic.make_clip(3, "test", 8).questions(np.random.default_rng((0, 3)), 4)
    assert [(q.type, q.text, q.answer) for q in video.questions] == [(q.type, q.text, q.answer) for q in possible]


def test_too_few_frames_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_clip.main([str(tmp_path / "made"), "--frames", "4"])
    assert "at least 8 frames" in capsys.readouterr().err


def test_a_folder_that_exists_is_left_alone(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_clip.main([str(tmp_path)])
    assert "exists already" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_demo_runs(checkpoint, tmp_path):
    llava, _ = checkpoint()
    demo = tmp_path / "demo"
    variables = [f"BIN={Path(sys.executable).parent}", f"DEMO={demo}", f"CHECKPOINT={llava.parent}"]
    command = ["make", "--old-file", ".venv/demo", "demo", *variables]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Truth:") == 3
    assert (demo / "kept.html").stat().st_size > 10_000
    assert (demo / "kept.png").exists()
