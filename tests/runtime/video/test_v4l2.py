"""Cameras of this machine: FFmpeg reads an imitation of one, which another process sees in place of a device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime.video import LiveSource, open_source
from tango_runtime.video.address import is_live, source_name

PROGRAM = """
import json, sys
from itertools import islice
from tango_plugins import TangoError
from tango_runtime.video import LiveSource
found, error = [], None
with LiveSource("v4l2:/dev/video99", fps=1000, stall=float(sys.argv[1])) as live:
    try:
        found = [(f.seconds, f.frame.shape, int(f.frame.mean())) for f in islice(live, 12)]
    except TangoError as failure:
        error = failure.message, failure.hint
print(json.dumps([found, error]))
"""


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """``camera(stall, **environment)``: what a process reads of the imitation, and its error."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux's headers, for an imitation of a camera")
    library = tmp_path_factory.mktemp("camera") / "v4l2.so"
    source = Path(__file__).parents[2] / "fakes" / "v4l2.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)

    def read(stall=60.0, **environment):
        known = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", PROGRAM, str(stall)]
        run = subprocess.run(command, env={**known, **environment}, capture_output=True, text=True, check=True)
        return *json.loads(run.stdout), run.stderr

    return read


def test_pictures_of_a_camera(camera):
    frames, error, _ = camera()
    assert error is None
    assert [shape for _, shape, _ in frames] == [[48, 64, 3]] * 12
    np.testing.assert_allclose(np.diff([seconds for seconds, _, _ in frames]), 0.04, atol=1e-3)
    levels = [level for _, _, level in frames]
    assert levels[0] == 0
    assert levels == sorted(levels)
    assert levels[-1] in (11, 12, 13)  # 11 steps of 255 / 219


def test_a_camera_that_is_unplugged_and_plugged_in_again(camera):
    frames, error, said = camera(FAKE_CUT="5")
    assert error is None
    assert np.all(np.diff([seconds for seconds, _, _ in frames]) > 0)
    assert "No such device; connecting again" in said


@pytest.mark.parametrize(
    ("name", "reason"), [("FAKE_SILENT", "nothing came for"), ("FAKE_UNPLUGGED", "No such file or directory")]
)
def test_a_camera_that_gives_no_more(camera, name, reason):
    _, (message, _), _ = camera(2, **{name: "5"})
    assert "/dev/video99 gave no picture for 2 s" in message
    assert reason in message


def test_a_camera_that_somebody_else_has(camera):
    _, (message, hint), _ = camera(FAKE_BUSY="1")
    assert "busy" in message
    assert "fuser" in hint


@pytest.mark.parametrize("source", ["v4l2:/dev/video98", "/dev/video98", Path("/dev/video98")])
def test_a_camera_that_is_not_there(source):
    with pytest.raises(TangoError, match=r"/dev/video98 cannot be read: No such file") as error:
        open_source(source).sample(1)
    assert "/dev/video" in error.value.hint


def test_what_is_no_camera():
    with pytest.raises(TangoError, match="/dev/null cannot be read") as error, LiveSource("v4l2:/dev/null") as live:
        next(iter(live))
    assert "v4l2-ctl" in error.value.hint


def test_a_link_to_a_camera_is_one(tmp_path):
    link = tmp_path / "front"
    link.symlink_to("/dev/video98")
    assert is_live(str(link))
    assert source_name(str(link)) == str(link)


def test_an_ffmpeg_without_its_part(monkeypatch):
    monkeypatch.setattr(av, "formats_available", {"mov"})
    with pytest.raises(TangoError, match="has no Video4Linux"):
        open_source("/dev/video98").sample(1)
