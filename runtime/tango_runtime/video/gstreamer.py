"""Pictures of a GStreamer pipeline, which runs as a process of its own and writes them into a pipe."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from tango_plugins import TangoError
from tango_runtime.video.address import Kind
from tango_runtime.video.container import lenient
from tango_runtime.video.stream import CutError, Picture, Reader, decode, options_of

#: The program; how Debian calls what has it and the elements that are added to every pipeline.
_LAUNCH = "gst-launch-1.0"
_INSTALL = "apt-get install gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-good"

#: What brings a pipeline's pictures here with their times. GStreamer converts the colors: Matroska does not say all of
#: what it knows about them, and has no room for the padding of its other formats' rows.
_TAIL = "! videoconvert ! video/x-raw,format=RGB ! matroskamux streamable=true ! fdsink fd={}"
_KIND = Kind("pipe", "matroska", {})

#: A camera at a Jetson's CSI port. Not run on one.
_CSI = "nvarguscamerasrc sensor-id={} ! video/x-raw(memory:NVMM) ! nvvidconv ! video/x-raw,format=BGRx"

#: Names of elements → what has them.
_PACKAGES = (
    (r"nv.*", "it comes with JetPack (nvidia-l4t-gstreamer), or with DeepStream"),
    (r"videoconvert|matroskamux|fdsink", _INSTALL),
    (r"av(dec|enc)_.*", "apt-get install gstreamer1.0-libav"),
    (r"x26[45]enc", "apt-get install gstreamer1.0-plugins-ugly gstreamer1.0-plugins-bad"),
    (r".*", "apt-get install gstreamer1.0-plugins-good gstreamer1.0-plugins-bad; gst-inspect-1.0 lists what is there"),
)

#: Least letters of what may be a secret.
_SECRET = 4

#: Seconds that a pipeline has to end when it is told to. A camera's driver may keep what a killed process had.
_LAST_WORDS = 3.0


def open_pipeline(pipeline: str, name: str) -> Pipeline:
    """The pictures of a pipeline, as it is written for gst-launch-1.0; it ends in raw video of the host's memory.

    Raises:
        TangoError: GStreamer is not installed, or a quote in the text is left open.
    """
    try:
        return Pipeline(shlex.split(pipeline), name)
    except ValueError as error:
        raise TangoError(f"the pipeline {name} cannot be read: {error}", "close its quotes") from None


def open_csi(sensor: str, name: str) -> Pipeline:
    """The pictures of a camera at a Jetson's CSI port."""
    return Pipeline(_CSI.format(sensor).split(), name)


class Pipeline:
    """A LiveInput of a GStreamer pipeline. An error before its first picture is final, another a cut.

    Args:
        words: The pipeline, as gst-launch-1.0 takes it. Whoever may list this machine's processes can read it.
        name: What messages call it, without secrets.
    """

    ends = True

    def __init__(self, words: list[str], name: str) -> None:
        program = shutil.which(_LAUNCH)
        if program is None:
            raise TangoError(f"{name} needs {_LAUNCH}, which is not installed", f"on Debian and Ubuntu: {_INSTALL}")
        self.name, self._words, self._program, self._gave = name, words, program, False

    def pictures(self, patience: float, closed: threading.Event) -> Iterator[Picture | None]:
        """Starts it, and reads; see :class:`tango_runtime.video.stream.LiveInput`."""
        import av

        with self._run() as (process, reading, said):
            silence = CutError(f"nothing came for {patience:.1f} s")
            reader = Reader(reading, patience, closed, silence)
            broken = ""
            try:
                with av.open(reader, options=options_of(_KIND), **lenient()) as container:
                    for picture in decode(container, self.name):
                        self._gave = self._gave or picture is not None
                        yield picture
            except av.FFmpegError as error:
                broken = error.strerror
            if closed.is_set():
                return
            if _wait(process) == 0 and not broken:
                return
            reason = said.reason(self._words) or broken or "its process ended"
            if self._gave:
                raise CutError(reason)
            raise TangoError(f"{self.name} gives no picture: {reason}", _hint(reason))

    @contextmanager
    def _run(self) -> Iterator[tuple[subprocess.Popen[bytes], int, _Said]]:
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                [self._program, "-q", *self._words, *_TAIL.format(writing).split()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(writing,),
                env={**os.environ, "LC_ALL": "C", "LANGUAGE": "C"},  # its messages are read below
                start_new_session=True,  # ctrl-C on a terminal is for this process, which ends it
                restore_signals=False,  # SIGPIPE would end it before it has let go of a camera
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        said = _Said(process)
        try:
            yield process, reading, said
        finally:
            process.send_signal(signal.SIGINT)
            os.close(reading)  # it may wait for room
            _wait(process)
            said.join()


class _Said(threading.Thread):
    """The last lines of what a process says."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(name="gst-launch messages", daemon=True)
        self._process, self._lines = process, deque[str](maxlen=100)
        self.start()

    def run(self) -> None:
        """Reads until the process ends, so that it never waits for a reader."""
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            while line := stream.readline(4096):
                self._lines.append(line.decode(errors="replace").strip())

    def reason(self, words: list[str]) -> str:
        """Its first error, without the values that the pipeline gives its properties, one of which may be a secret."""
        self.join()
        for line in self._lines:
            for pattern in _ERRORS:
                if match := pattern.fullmatch(line):
                    return _without_values(": ".join(match.groups()), words)
        return ""


_ERRORS = (
    re.compile(r"WARNING: erroneous pipeline: (.+)"),
    re.compile(r"ERROR: pipeline could not be constructed: (.+)"),
    re.compile(r"ERROR: from element \S*?([^:/\s]+): (.+)"),
)


def _without_values(text: str, words: list[str]) -> str:
    values = [word if "://" in word.partition("=")[0] else word.partition("=")[2] for word in words]
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SECRET and not value.startswith("/dev/"):
            text = text.replace(value, "…")
    return text


def _hint(reason: str) -> str:
    if match := re.match(r'no element "(.+)"', reason):
        return next(hint for names, hint in _PACKAGES if re.fullmatch(names, match[1]))
    if "could not link" in reason:
        return "end it in raw video of the host's memory: … ! decodebin, or on a Jetson … ! nvvidconv ! video/x-raw"
    return f"try it by itself: {_LAUNCH} PIPELINE ! videoconvert ! autovideosink"


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Lets a process end, at last by force; its exit code."""
    try:
        return process.wait(_LAST_WORDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
