"""Pipelines of GStreamer's software elements, which run as processes of their own."""

from __future__ import annotations

import functools
import shutil
import subprocess
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime.video import LiveSource, gstreamer, open_source, sample
from tango_runtime.video.address import source_name

PATIENT = 60.0  # seconds; a test that passes never waits so long


@functools.cache
def is_installed():
    """Whether gst-launch-1.0 and the elements that every pipeline gets are there."""
    test = ["gst-launch-1.0", "-q", "videotestsrc", "num-buffers=1", *gstreamer._TAIL.format(1).split()]
    return shutil.which(test[0]) and subprocess.run(test, capture_output=True).returncode == 0


needs_gstreamer = pytest.mark.skipif(not is_installed(), reason=f"needs gst-launch-1.0: {gstreamer._INSTALL}")


def read(pipeline, **options):
    with LiveSource(f"gst:{pipeline}", lossless=True, stall=PATIENT, **options) as live:
        return list(live)


def failure(source, **options):
    with LiveSource(source, **options) as live, pytest.raises(TangoError) as error:
        next(iter(live))
    return error.value


@needs_gstreamer
@pytest.mark.parametrize(
    "caps",
    [
        "video/x-raw,format=I420,width=322,height=242",
        "video/x-raw,format=NV12,width=1280,height=720",
        "video/x-raw,format=YUY2,width=101,height=7",
        "video/x-raw,format=GRAY8,width=5,height=3",
        "video/x-raw,format=RGBx,width=33,height=64",
        "image/jpeg,width=64,height=48",
    ],
)
def test_pixels_of_every_kind_are_what_gstreamer_shows(caps):
    """Colors by the pipeline's matrix and range, which differ with the size; rows without their padding."""
    size, encode = caps[caps.index("width") :], "! jpegenc quality=100 " if caps.startswith("image") else ""
    shown = f"pattern=solid-color foreground-color=0xff2060c0 ! video/x-raw,format=RGB,{size}"  # 32, 96, 192
    decode = "! jpegdec" if encode else ""
    (frame,) = read(f"videotestsrc num-buffers=1 {shown} ! videoconvert {encode}! {caps} {decode}")
    width, height = (int(part.partition("=")[2]) for part in caps.split(",")[-2:])
    assert frame.frame.shape == (height, width, 3)
    wanted = [32, 96, 192] if "GRAY8" not in caps else [frame.frame[0, 0, 0]] * 3
    assert np.abs(frame.frame.astype(int) - wanted).max() <= 4


@needs_gstreamer
def test_frames_have_the_pipelines_times_however_fast_they_come():
    frames = read("videotestsrc num-buffers=61 ! video/x-raw,framerate=12/1", fps=2)
    np.testing.assert_allclose([f.seconds for f in frames], np.arange(11) / 2, atol=1e-3)
    stream = sample("gst:videotestsrc num-buffers=61 ! video/x-raw,framerate=10/1", 4, fps=1)
    np.testing.assert_allclose([seconds for seconds, _ in stream], np.arange(4), atol=1e-3)
    assert stream.frame_size == (240, 320)


@needs_gstreamer
def test_an_encoded_file_and_a_quoted_name(tmp_path):
    path = tmp_path / "two words.avi"
    write = "videotestsrc num-buffers=20 ! jpegenc ! avimux ! filesink"
    subprocess.run(["gst-launch-1.0", "-q", *write.split(), f"location={path}"], check=True)
    assert len(read(f"filesrc location='{path}' ! avidemux ! jpegdec", fps=1000)) == 20


@needs_gstreamer
def test_a_pipeline_that_breaks_is_started_again(caplog):
    broken = "gst:videotestsrc is-live=true ! identity error-after=10"
    with LiveSource(broken, fps=1000, stall=PATIENT) as live:
        frames = list(islice(live, 12))
        assert live.reconnects > 0
    assert np.all(np.diff([f.seconds for f in frames]) > 0)
    assert "identity0: Failed after iterations as requested.; connecting again" in caplog.text


@needs_gstreamer
def test_a_pipeline_that_falls_silent():
    error = failure("gst:videotestsrc is-live=true ! valve drop=true", stall=0.5)
    assert "gst:videotestsrc ! valve gave no picture for 0.5 s: nothing came" in error.message


@needs_gstreamer
def test_closing_ends_the_process(monkeypatch):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    files = Path("/proc/self/fd")
    before = set(files.iterdir())
    with LiveSource("gst:videotestsrc is-live=true", stall=PATIENT) as live:
        next(iter(live))
    with LiveSource("gst:videotestsrc is-live=true ! valve drop=true", stall=PATIENT):
        pass
    assert started
    assert all(process.returncode is not None for process in started)
    assert set(files.iterdir()) == before


@needs_gstreamer
@pytest.mark.parametrize(
    ("pipeline", "message", "hint"),
    [
        ("nosuchelement ! videoconvert", 'no element "nosuchelement"', "gst-inspect-1.0"),
        ("avdec_nosuch ! videoconvert", 'no element "avdec_nosuch"', "gstreamer1.0-libav"),
        ("v4l2src device=/dev/video98", "v4l2src0: Cannot identify device '/dev/video98'.", "gst-launch-1.0"),
        ("videotestsrc nosuch=3", 'no property "nosuch"', "gst-launch-1.0"),
        ("videotestsrc ! audioconvert", "could not link", "nvvidconv"),
    ],
)
def test_what_is_wrong_with_a_pipeline_is_said_at_once(pipeline, message, hint):
    error = failure(f"gst:{pipeline}", stall=PATIENT)
    assert message in error.message
    assert hint in error.hint


@needs_gstreamer
def test_a_jetsons_camera_without_a_jetson():
    if shutil.which("gst-inspect-1.0") and not subprocess.call(["gst-inspect-1.0", "--exists", "nvarguscamerasrc"]):
        pytest.skip("this is a Jetson")
    error = failure("csi:0", stall=PATIENT)
    assert error.message == 'csi:0 gives no picture: no element "nvarguscamerasrc"'
    assert "JetPack" in error.hint


@needs_gstreamer
@pytest.mark.parametrize(
    "word", ["rtspsrc location=rtsp://me:opensesame@127.0.0.1:9/", "rtsp://me:opensesame@[::1]:9/"]
)
def test_passwords_are_not_said(word, caplog, capfd):
    error = failure(f"gst:{word} ! decodebin", stall=PATIENT)
    assert "gives no picture" in error.message
    assert "opensesame" not in f"{error.message} {error.hint} {caplog.text} {capfd.readouterr()}"


def test_without_gstreamer(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for source in ("gst:videotestsrc", "csi:0"):
        with pytest.raises(TangoError, match="which is not installed") as error:
            open_source(source)
        assert "apt-get install gstreamer1.0-tools" in error.value.hint


def test_an_open_quote():
    with pytest.raises(TangoError, match="No closing quotation"):
        open_source("gst:filesrc location='a b.mp4")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("gst:rtspsrc location=rtsp://me:pass@camera/ ! decodebin", "gst:rtspsrc ! decodebin"),
        ("GST:v4l2src ! image/jpeg,width=640 ! jpegdec", "gst:v4l2src ! image/jpeg ! jpegdec"),
        ("gst:rtsp://me:pass@camera/live?key ! decodebin", "gst:… ! decodebin"),
    ],
)
def test_what_a_pipeline_is_called(text, name):
    assert source_name(text) == name
