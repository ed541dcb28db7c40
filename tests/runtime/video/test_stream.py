"""Live streams from real servers on the loopback, and from pipes."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import logging
import os
import shutil
import socket
import ssl
import subprocess
import threading
import traceback
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tango_plugins import TangoError
from tango_runtime.video import LiveSource, open_source, sample
from tango_runtime.video.address import source_name
from tango_runtime.video.stream import Pipe
from tests.runtime.video.clips import H264, number_in, picture, write
from tests.runtime.video.lossy import LossyProxy

SERVER = Path(__file__).with_name("rtsp_server.py")
PATIENT = 60.0  # seconds; a test that passes never waits so long


def failure(source, **options):
    """The error of a live source, which must come without a single frame."""
    with LiveSource(source, **options) as live, pytest.raises(TangoError) as error:
        next(iter(live))
    return error.value


# RTSP.


@functools.cache
def gstreamer():
    """A Python with the bindings of GStreamer's RTSP server; None where there is none."""
    check = (
        "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import Gst, GstRtspServer; "
        "Gst.init(None); assert all(map(Gst.ElementFactory.find, ('x264enc', 'rtph264pay')))"
    )
    for python in filter(None, ("/usr/bin/python3", shutil.which("python3"))):
        with contextlib.suppress(OSError):
            if subprocess.run([python, "-c", check], capture_output=True).returncode == 0:
                return python
    return None


class Camera:
    """The RTSP server in a process of its own."""

    def __init__(self, *login):
        self.login, self.port, self.process = login, 0, None
        self.start()

    def start(self):
        """Starts it, at the port that it had before."""
        command = [gstreamer(), str(SERVER), str(self.port), *self.login]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def stop(self):
        """Kills it."""
        self.process.kill()
        self.process.communicate()

    def tell(self, command):
        """Gives it a command."""
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def address(self, login="", path="live"):
        """Where it is."""
        return f"rtsp://{login}127.0.0.1:{self.port}/{path}"


@pytest.fixture
def camera():
    """Starts servers, and stops them."""
    if gstreamer() is None:
        pytest.skip(
            "needs GStreamer's RTSP server and x264: on Debian gir1.2-gst-rtsp-server-1.0, python3-gi, "
            "gstreamer1.0-plugins-good, gstreamer1.0-plugins-ugly"
        )
    with contextlib.ExitStack() as started:

        def start(*login):
            server = Camera(*login)
            started.callback(server.stop)
            return server

        yield start


def color(frame):
    """Red, green or blue, whichever the frame has most of."""
    return "rgb"[int(frame.reshape(-1, 3).mean(0).argmax())]


def first(live, wanted, shape):
    """The first frame of a color and a shape."""
    return next(f for f in live if color(f.frame) == wanted and f.frame.shape[:2] == shape)


@pytest.mark.slow
def test_a_camera_that_is_cut_restarted_and_changes_its_size(camera, caplog):
    server = camera()
    with LiveSource(server.address(), fps=25, stall=PATIENT) as live:
        frames = iter(live)
        seen = [first(frames, "r", (96, 128))]
        server.tell("160 64 00ff00")  # another size, within the connection
        seen.append(first(frames, "g", (64, 160)))
        assert live.reconnects == 0
        server.tell("drop")
        server.tell("160 64 0000ff")
        seen.append(first(frames, "b", (64, 160)))
        assert live.reconnects > 0
        server.stop()
        server.start()  # its clock and its picture begin anew
        seen.append(first(frames, "r", (96, 128)))
        seen += islice(frames, 5)
        assert live.latest(1)[0].number >= seen[-1].number
    assert np.all(np.diff([f.seconds for f in seen]) > 0)
    assert np.all(np.diff([f.number for f in seen]) > 0)
    assert "connecting again" in caplog.text


def test_the_first_frames_of_a_camera_are_a_video(camera):
    stream = sample(camera().address(), 3, fps=10)
    assert stream.frame_size == (96, 128)
    frames = list(stream)
    assert [color(rgb) for _, rgb in frames] == ["r"] * 3
    np.testing.assert_allclose(np.diff([seconds for seconds, _ in frames]), 0.1, atol=0.041)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [0.02, 0.3])
def test_packets_that_are_lost(camera, loss):
    """What is left decodes; what is damaged is left out; the connection stays."""
    server = camera()
    proxy = LossyProxy(server.port, loss)
    with LiveSource(f"rtsp://127.0.0.1:{proxy.port}/live", fps=25, stall=PATIENT, capacity=500) as live:
        frames = list(islice(live, 50))
        assert live.reconnects == 0
    proxy.close()
    assert proxy.dropped > 0
    assert {color(f.frame) for f in frames} == {"r"}
    assert {f.frame.shape for f in frames} == {(96, 128, 3)}
    assert np.all(np.diff([f.seconds for f in frames]) > 0)


@pytest.mark.slow
def test_a_server_that_is_gone_is_an_error_after_a_while(camera):
    server = camera()
    with LiveSource(server.address(), stall=2) as live:
        frames = iter(live)
        next(frames)
        server.stop()
        with pytest.raises(TangoError, match=r"gave no picture for 2 s: Connection refused") as error:
            list(frames)
        assert error.value.hint


@pytest.mark.slow
def test_passwords_are_neither_said_nor_logged(camera, caplog, capfd):
    server = camera("me", "open sesame".replace(" ", ""))
    caplog.set_level(logging.DEBUG)
    with LiveSource(server.address("me:opensesame@"), stall=PATIENT) as live:
        next(iter(live))
        assert live.name == server.address()
        server.stop()
    errors = [failure(server.address("me:opensesame@") + "?token=opensesame", stall=0.5)]
    server.start()
    errors.append(failure(server.address("me:opensesameagain@")))
    assert "401" in errors[1].message
    said = "".join("".join(traceback.format_exception(error)) for error in errors)
    assert "opensesame" not in said + caplog.text + "".join(capfd.readouterr()) + repr(live)


# HTTP.


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with what the test says: path → (content type, pieces, status and headers)."""

    pages: dict[str, tuple[str, list[bytes], dict[str, str]]]

    def do_GET(self):
        """Sends the pieces; without a length, as live streams are."""
        kind, pieces, headers = self.pages.get(self.path, ("", [], {"status": "404"}))
        self.send_response(int(headers.get("status", 200)))
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            for piece in pieces:
                self.wfile.write(piece)

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture
def serve():
    """``serve(pages, tls=None)``: the base address of a server of them."""
    with contextlib.ExitStack() as running:

        def start(pages, tls=None):
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Pages", (Handler,), {"pages": pages}))
            if tls:
                server.socket = tls.wrap_socket(server.socket, server_side=True)
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            running.callback(thread.join)
            running.callback(server.server_close)
            running.callback(server.shutdown)
            return f"http{'s' if tls else ''}://localhost:{server.server_port}"

        yield start


@pytest.fixture(scope="module")
def transport_stream(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clip") / "clip.ts").read_bytes()


def jpegs(count):
    """Pictures as cameras send them over HTTP (multipart/x-mixed-replace)."""
    for i in range(count):
        image = io.BytesIO()
        Image.fromarray(picture(i)).save(image, "JPEG", quality=95)
        data = image.getvalue()
        yield b"--next\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(data), data)


def numbers(frames):
    return [number_in(frame) for _, _, frame in frames]


def test_a_stream_over_http(serve, transport_stream):
    address = serve({"/live?key=1": ("video/mp2t", [transport_stream], {})}) + "/live?key=1"
    with LiveSource(address, fps=24, lossless=True, stall=PATIENT) as live:
        frames = list(islice(live, 70))
        assert live.reconnects == 1  # to whatever the server has by then
    assert numbers(frames) == [*range(58), *range(12)]  # two were in the decoder, whose reordering waits for more
    assert np.all(np.diff([f.seconds for f in frames]) > 0)


def test_jpegs_over_http(serve):
    kind = "multipart/x-mixed-replace;boundary=next"
    address = serve({"/mjpg": (kind, list(jpegs(20)), {})}) + "/mjpg"
    with LiveSource(address, fps=1000, lossless=True, stall=PATIENT) as live:
        assert numbers(islice(live, 20)) == list(range(20))


def test_a_playlist_without_an_end_over_http(serve, transport_stream):
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:3", "#EXTINF:2.5", "part.ts", ""]
    pages = {
        "/live.m3u8": ("application/vnd.apple.mpegurl", ["\n".join(lines).encode()], {}),
        "/part.ts": ("video/mp2t", [transport_stream], {}),
    }
    with LiveSource(serve(pages) + "/live.m3u8", fps=24, lossless=True, stall=PATIENT) as live:
        assert numbers(islice(live, 50)) == list(range(50))
        del pages["/live.m3u8"]  # FFmpeg would look for more of it until the stall


def test_a_playlist_cannot_name_a_file(serve, transport_stream, tmp_path):
    secret = tmp_path / "secret.ts"
    secret.write_bytes(transport_stream)
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:3", "#EXTINF:2.5", secret.as_uri(), ""]
    pages = {
        "/live.m3u8": ("application/vnd.apple.mpegurl", ["\n".join(lines).encode()], {}),
        "/moved": ("", [], {"status": "302", "Location": secret.as_uri()}),
    }
    base = serve(pages)
    for path in ("/live.m3u8", "/moved"):
        assert "gave no picture" in failure(base + path, stall=0.3).message


def test_a_recording_is_no_stream(serve, tmp_path):
    clip = write(tmp_path / "clip.mp4").read_bytes()
    address = serve({"/clip.mp4": ("video/mp4", [clip], {"Content-Length": str(len(clip))})}) + "/clip.mp4"
    error = failure(address)
    assert error.message == f"{address} is a recording of 2.5 s, not a stream"
    assert "download" in error.hint


def test_what_is_not_there_is_said_at_once(serve):
    assert "404" in failure(serve({}) + "/live", stall=PATIENT).message


def test_a_format_that_is_not_read(serve, tmp_path):
    clip = write(tmp_path / "clip.avi", "mpeg4").read_bytes()
    address = serve({"/clip.avi": ("video/avi", [clip], {})}) + "/clip.avi"
    assert "gave no picture" in failure(address, stall=0.5).message


def test_a_server_that_never_answers(capfd):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for scheme in ("rtsp", "http"):
            error = failure(f"{scheme}://{address}/live", stall=0.5)
            assert "gave no picture for 0.5 s" in error.message


def test_tls_is_verified(serve, transport_stream, tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command, which makes a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "9",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    address = serve({"/live": ("video/mp2t", [transport_stream], {})}, context) + "/live"
    assert "gave no picture" in failure(address, stall=0.5).message
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with LiveSource(address, fps=24, stall=PATIENT, lossless=True) as live:
        assert numbers(islice(live, 50)) == list(range(50))


# Standard input.


@contextlib.contextmanager
def piped(data, *, end=True):
    """A pipe into which a thread writes; it stays open unless `end`."""
    reading, writing = os.pipe()

    def write_all():
        with contextlib.suppress(BrokenPipeError):
            view = memoryview(data)
            while view:
                view = view[os.write(writing, view) :]
        if end:
            os.close(writing)

    thread = threading.Thread(target=write_all)
    thread.start()
    try:
        yield reading
    finally:
        os.close(reading)
        thread.join()
        if not end:
            os.close(writing)


PIPED = {
    "ts": ("clip.ts", "libx264", H264, {}),
    "matroska": ("clip.mkv", "libx264", H264, {}),
    "flv": ("clip.flv", "flv", {"g": "12"}, {}),
    "raw h264": ("clip.h264", "libx264", H264, {}),
    "raw hevc": ("clip.hevc", "libx265", {"x265-params": "log-level=none"}, {}),
    "fragmented mp4": ("clip.mp4", "libx264", H264, {"movflags": "frag_keyframe+empty_moov"}),
    "webm": ("clip.webm", "libvpx", {"g": "12"}, {}),
    "y4m": ("clip.y4m", "wrapped_avframe", {}, {}),
}


@pytest.mark.parametrize("kind", PIPED)
def test_a_stream_on_a_pipe(tmp_path, kind):
    name, encoder, options, muxer = PIPED[kind]
    data = write(tmp_path / name, encoder, options, muxer=muxer).read_bytes()
    with piped(data) as descriptor, LiveSource(Pipe(descriptor), fps=6, lossless=True) as live:
        frames = list(live)
        assert live.reconnects == 0
    assert numbers(frames) == list(range(0, 60, 4))
    np.testing.assert_allclose([f.seconds for f in frames], np.arange(15) / 6, atol=2e-3)


def test_jpegs_on_a_pipe():
    with piped(b"".join(jpegs(9))) as descriptor, LiveSource(Pipe(descriptor), fps=1000, lossless=True) as live:
        assert numbers(live) == list(range(9))


def test_a_pipe_that_falls_silent(transport_stream):
    with piped(transport_stream[:5000], end=False) as descriptor:
        assert "gave nothing for 0.3 s" in failure(Pipe(descriptor), stall=0.3).message


def test_closing_a_source_whose_pipe_is_silent(transport_stream):
    with piped(transport_stream, end=False) as descriptor, LiveSource(Pipe(descriptor), stall=1000) as live:
        next(iter(live))
    assert not live._thread.is_alive()


@pytest.mark.parametrize("kind", ["empty", "text", "concat"])
def test_what_cannot_be_read_from_a_pipe(tmp_path, kind):
    (tmp_path / "other.ts").write_bytes(b"")
    data = {
        "empty": b"",
        "text": b"To whom it may concern\n" * 99,
        "concat": f"ffconcat version 1.0\nfile {tmp_path / 'other.ts'}\n".encode(),
    }[kind]
    with piped(data) as descriptor:
        error = failure(Pipe(descriptor))
    assert "cannot be read as a video" in error.message
    assert "MPEG-TS" in error.hint


# The grammar.


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("v4l2:0", "v4l2:/dev/video0"),
        ("gst: ", "gst:v4l2src"),
        ("csi:front", "csi:0"),
        ("udp://239.0.0.1:1234", "ffmpeg -loglevel error -i"),
        ("rtsps://camera/live", "ffmpeg -loglevel error -i"),
        ("file:///etc/passwd", "ffmpeg"),
        ("rtsp:///live", "HOST"),
        ("http://", "HOST"),
        ("http://[::1/live", "HOST"),
    ],
)
def test_sources_that_are_not_read(text, hint):
    for refuse in (open_source, LiveSource):
        with pytest.raises(TangoError) as error:
            refuse(text)
        assert hint in error.value.hint


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("-", "standard input"),
        ("clips/a?b.mp4", "a?b.mp4"),
        ("rtsp://me:pass@word@camera:554/live?user=me#x", "rtsp://camera:554/live"),
        ("https://[::1]:8080/?key", "https://[::1]:8080/"),
    ],
)
def test_what_sources_are_called(text, name):
    assert source_name(text) == name


def test_another_device_is_no_file():
    with pytest.raises(TangoError, match="not a regular file") as error:
        open_source("/dev/null")
    assert "/dev/video0" in error.value.hint


def test_a_file_is_no_live_source(tmp_path):
    with pytest.raises(TangoError, match="no live stream"):
        LiveSource(str(write(tmp_path / "clip.mp4")))


def test_files_go_first_whatever_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("http:/host").mkdir(parents=True)
    write(Path("http:/host/clip.mp4").absolute())
    write(Path("gst:clip.mp4").absolute())
    for name in ("http://host/clip.mp4", "gst:clip.mp4"):
        assert number_in(next(sample(name, 1))[1]) == 0


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "gst:" + "x" * 5000, ""])
def test_what_is_no_path(name):
    with pytest.raises(TangoError) as error:
        open_source(name).sample(1)
    assert error.value.hint
