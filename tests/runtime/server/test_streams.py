"""Streams: opened, asked by id, watched by events, and closed."""

from __future__ import annotations

import io
import json
import queue
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tango_plugins import TangoError
from tango_runtime.pipeline import feed as feed_module
from tango_runtime.pipeline.feed import Arrival, CameraFeed, Rate
from tango_runtime.server import streams as streams_module
from tango_runtime.server.errors import ApiError
from tango_runtime.server.metrics import Metrics
from tango_runtime.server.rtsp import AllowedHost, checked_rtsp
from tango_runtime.server.streams import Streams
from tests.runtime.server.serving import asked, openai
from tests.runtime.server.test_server_limits import Gate, eventually
from tests.runtime.video.test_stream import Camera, gstreamer


@pytest.fixture
def camera(serving, monkeypatch):
    """A server whose streams are cameras that a test feeds: (server, queue of the newest camera)."""
    served = serving(streams=2)
    items = []

    def source(url, fps):
        found = queue.Queue()
        items.append(found)
        return iter(found.get, None)

    monkeypatch.setattr(served.service, "_source", source)
    yield served, items
    for found in items:
        found.put(None)
    for stream in served.service.streams:
        assert served.http().delete(f"/v1/streams/{stream.name}").status_code == 200


def frames(n, seed=3):
    return np.random.default_rng(seed).integers(0, 255, (n, 36, 64, 3), dtype=np.uint8)


def opened(served, **more):
    found = served.http().post("/v1/streams", json={"source": "rtsp://camera/", "window": 4, **more})
    assert found.status_code == 201, found.text
    return found.json()["id"]


def give(served, name, camera, pairs):
    encoded = served.http().get(f"/v1/streams/{name}").json()["frames_encoded"]
    for pair in pairs:
        camera.put(pair)
    eventually(lambda: served.http().get(f"/v1/streams/{name}").json()["frames_encoded"] == encoded + len(pairs))


def waits(served, monkeypatch, seconds):
    """Sets how long the first question about a stream waits for its frames."""
    monkeypatch.setattr(served.service, "settings", replace(served.service.settings, first_frame_seconds=seconds))


def test_a_stream_is_asked_by_its_id(camera, llm, monkeypatch):
    served, cameras = camera
    name = opened(served)
    pairs = list(zip(map(float, range(6)), frames(6), strict=True))
    waits(served, monkeypatch, 0.05)
    for path, body in (("chat/completions", asked(url=name)), ("videos/view", {"video_url": name})):
        early = served.http().post(f"/v1/{path}", json=body)
        assert (early.status_code, early.headers["Retry-After"]) == (503, "1")
        assert "has no frames yet" in early.text
    give(served, name, cameras[-1], pairs[:4])
    found = served.openai().chat.completions.create(**asked(url=name))
    assert found.choices[0].message.content == llm.generate(pairs[:4], "What happens?", max_new_tokens=8).text
    details = found.model_extra["tango"]["stream"]
    assert (details["begin"], details["end"], details["frames"]) == (0.0, 3.0, 4)
    assert details["lag_seconds"] > 0
    give(served, name, cameras[-1], pairs[4:])
    found = served.openai().chat.completions.create(**asked(url=name))
    assert found.choices[0].message.content == llm.generate(pairs[2:], "What happens?", max_new_tokens=8).text
    assert served.http().get("/v1/streams").json()["data"][0]["seconds"] == 5.0


@pytest.mark.parametrize("ask", ["chat", "view", "answers"])
def test_the_first_question_waits_for_the_first_frames(camera, monkeypatch, ask):
    served, cameras = camera
    name = opened(served)
    waits(served, monkeypatch, 60)
    looked, window = threading.Event(), served.service.streams.get(name).live.window
    held = type(window).held.fget
    monkeypatch.setattr(type(window), "held", property(lambda self: looked.set() or held(self)))
    found = []

    def post():
        path, body = {
            "chat": ("chat/completions", asked(url=name)),
            "view": ("videos/view", {"video_url": name}),
            "answers": (f"streams/{name}/answers", {"question": "What happens?", "every": 0.1, "max_tokens": 2}),
        }[ask]
        found.append(served.http().post(f"/v1/{path}", json=body))

    asking = threading.Thread(target=post)
    asking.start()
    assert looked.wait(60)  # there is none, and it waits
    cameras[-1].put((0.0, frames(1)[0]))
    if ask == "answers":
        eventually(lambda: served.http().get(f"/v1/streams/{name}").json()["frames_encoded"])
        cameras[-1].put(None)
    asking.join()
    assert found[0].status_code == 200
    assert "no frames" not in found[0].text


def test_nobody_waits_for_a_stream_that_is_over(camera, monkeypatch):
    served, cameras = camera
    waits(served, monkeypatch, 60)
    name = opened(served)
    cameras[-1].put(None)
    with pytest.raises(openai.BadRequestError, match="ended before its first frames"):
        served.openai().chat.completions.create(**asked(url=name))


def test_a_stream_is_not_closed_under_an_answer(camera, monkeypatch):
    served, cameras = camera
    name = opened(served)
    give(served, name, cameras[-1], list(enumerate(frames(4))))
    held = Gate(served, monkeypatch)
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(served.http().post, "/v1/chat/completions", json=asked(url=name))
        eventually(lambda: held.steps)
        deleted = threads.submit(served.http().delete, f"/v1/streams/{name}")
        eventually(lambda: served.service.worker.waiting)
        held.opened.set()
        assert answer.result().status_code == 200, answer.result().text
        assert deleted.result().json()["deleted"]


def test_what_is_kept_of_a_stream_is_viewed(camera, llm):
    served, cameras = camera
    name = opened(served)
    pairs = list(zip(map(float, range(4)), frames(4), strict=True))
    give(served, name, cameras[-1], pairs)
    view = served.http().post("/v1/videos/view", json={"video_url": name, "images": True}).json()
    with llm.session(pairs, frames=4) as session:
        trace, _ = session.read_trace()
    kept = [i for i, kind in enumerate("".join(view["kinds"])) if kind != "0"]
    assert kept == trace.indices.tolist()
    assert (view["kept"], view["total"], len(view["images"])) == (len(kept), 64, 4)


def test_answers_of_a_stream_are_events(camera, llm):
    served, cameras = camera
    name = opened(served)
    pairs = list(zip(map(float, range(4)), frames(4), strict=True))
    give(served, name, cameras[-1], pairs)
    cameras[-1].put(None)
    body = {"question": "What happens?", "every": 0.1, "max_tokens": 8}
    with served.http().stream("POST", f"/v1/streams/{name}/answers", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[0])["answer"] == llm.generate(pairs, "What happens?", max_new_tokens=8).text
    assert served.http().get(f"/v1/streams/{name}").json()["state"] == "over"


def test_there_are_so_many_streams(camera):
    served, _ = camera
    names = [opened(served) for _ in range(2)]
    full = served.http().post("/v1/streams", json={"source": "rtsp://camera/"})
    assert (full.status_code, "2 streams are open" in full.text) == (429, True)
    assert served.metric("tango:streams") == 2
    assert served.http().delete(f"/v1/streams/{names[0]}").json()["deleted"]
    assert opened(served)
    assert served.http().get(f"/v1/streams/{names[0]}").status_code == 404


def test_a_camera_that_fails_says_so(camera):
    served, cameras = camera
    name = opened(served)
    cameras[-1].put("no frame")
    eventually(lambda: served.http().get(f"/v1/streams/{name}").json()["state"] != "open")
    with pytest.raises(openai.BadRequestError, match="is not a"):
        served.openai().chat.completions.create(**asked(url=name))
    found = served.http().get(f"/v1/streams/{name}").json()
    assert (found["state"], "is not a" in found["error"]) == ("failed", True)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"source": "file:none.mp4"}, 404),
        ({"source": "file:../clip.mp4"}, 404),
        ({"source": "/dev/video0"}, 400),
        ({"source": "-"}, 400),
        ({"source": "rtsp://"}, 400),
        ({"source": "rtsp://camera/"}, 403),
        ({"source": "http://127.0.0.1/"}, 403),
        ({"source": "file:clip.mp4", "window": 0}, 400),
        ({"source": "file:clip.mp4", "window": 100000}, 400),
        ({"source": "file:clip.mp4", "fps": -1}, 400),
        ({"source": "file:clip.mp4", "model": "none"}, 404),
        ({"source": "file:clip.mp4", "more": 1}, 400),
        ({"source": 1}, 400),
    ],
)
def test_what_is_no_stream(served, body, status):
    found = served.http().post("/v1/streams", json=body)
    assert (found.status_code, list(found.json())) == (status, ["error"])


def test_a_file_is_played_as_if_it_happened_now(served, llm):
    name = served.http().post("/v1/streams", json={"source": "file:clip.mp4", "window": 4, "fps": 8}).json()["id"]
    eventually(lambda: served.http().get(f"/v1/streams/{name}").json()["frames_in_window"] == 4)
    found = served.openai().chat.completions.create(**asked(url=name))
    assert found.choices[0].message.content
    assert found.model_extra["tango"]["stream"]["frames"] == 4
    wrong = served.http().post(f"/v1/streams/{name}/answers", json={"question": "x", "every": 0})
    assert (wrong.status_code, "every is a number" in wrong.text) == (400, True)
    for body in ({}, {"question": " "}):
        wrong = served.http().post(f"/v1/streams/{name}/answers", json=body)
        assert (wrong.status_code, "asks nothing" in wrong.text) == (400, True)
    assert served.http().delete(f"/v1/streams/{name}").status_code == 200


def test_streams_take_turns():
    """Each stream that has frames is served before any is served again."""

    class Fake:
        def __init__(self, name):
            self.name, self.waits, self.taken = name, True, 0

        def take_in(self, wait, most):
            self.taken += 1
            self.most = most

    streams = Streams(8, None)
    fakes = [Fake(f"stream:{i}") for i in range(5)]
    streams._open = {fake.name: fake for fake in fakes}
    fakes[2].waits = False
    for _ in range(8):
        assert streams.turn()
    assert [fake.taken for fake in fakes] == [2, 2, 0, 2, 2]
    assert len({fake.most for fake in fakes if fake.taken}) == 1  # so many frames a turn, whatever waits
    for fake in fakes:
        fake.waits = False
    assert not streams.turn()


# Fair shares, lag, capacity.


class Model:
    """A stream's live video whose frames take so much time."""

    def __init__(self, clock, cost):
        self.clock, self.cost = clock, cost
        self.window = SimpleNamespace(encoded=0, newest=None, held=0, gaps=0)
        self.feed = CameraFeed(iter(()), Rate(1.0), 16)
        self.feed._thread.join()
        self.feed._ended = False

    def give(self, count):
        for _ in range(count):
            self.feed._hold(Arrival(0.0, np.zeros((1, 1, 3), np.uint8), self.clock.now))

    def take_in(self, wait, most=None):
        taken = len(self.feed.take(wait, most))
        self.clock.now += taken * self.cost
        self.window.encoded += taken

    def close(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(streams_module, "monotonic", lambda: found.now)
    monkeypatch.setattr(feed_module, "monotonic", lambda: found.now)
    return found


def test_a_fast_camera_takes_no_more_than_its_share(clock):
    """Three streams of one frame a second and one of 30, with a model that has time for 8 frames a second."""
    streams = Streams(8, Metrics())
    opened = [streams.add("tiny", fps, lambda: Model(clock, 0.125)) for fps in (1, 1, 1, 30)]
    for _ in range(20):
        for stream in opened:
            stream.live.give(int(stream.fps))
        until = clock.now + 1
        while clock.now < until and streams.turn():
            pass
        clock.now = max(clock.now, until)
    *slow, fast = opened
    assert [stream.live.window.encoded for stream in slow] == [20] * 3
    assert [stream.live.feed.dropped for stream in slow] == [0] * 3
    assert fast.live.window.encoded + fast.live.feed.waiting + fast.live.feed.dropped == 600
    assert fast.live.feed.dropped > 300  # its own
    assert fast.live.window.encoded >= 100  # and the time that the others leave
    assert [stream.load for stream in opened] == pytest.approx([0.125] * 3 + [3.75])
    assert streams.load > 4  # what was asked for is more than the model can


def test_lag_is_the_age_of_what_waits(clock):
    streams = Streams(8, Metrics())
    stream = streams.add("tiny", 1.0, lambda: Model(clock, 0.5))
    assert (streams.lag, stream.describe()["lag_seconds"], stream.load) == (0.0, 0.0, 0.0)
    stream.live.give(1)
    clock.now += 3
    assert (streams.lag, stream.describe()["lag_seconds"]) == (3.0, 3.0)
    assert streams.turn()
    assert (streams.lag, stream.describe()["load"]) == (0.0, 0.5)


def test_a_stream_that_is_over_makes_room(clock):
    streams = Streams(1, Metrics())
    first = streams.add("tiny", 1.0, lambda: Model(clock, 1))
    with pytest.raises(ApiError, match="1 streams are open"):
        streams.add("tiny", 1.0, lambda: Model(clock, 1))
    first.error, first.in_use = "it failed", True
    with pytest.raises(ApiError, match="1 streams are open"):  # what is said of it is not said to its end
        streams.add("tiny", 1.0, lambda: Model(clock, 1))
    first.in_use = False
    second = streams.add("tiny", 1.0, lambda: Model(clock, 1))
    assert [stream.name for stream in streams] == [second.name]


def test_a_stream_that_is_removed_is_over_for_those_who_wait(clock):
    streams = Streams(1, Metrics())
    stream = streams.add("tiny", 1.0, lambda: Model(clock, 1))
    assert not stream.over
    streams.remove(stream.name)
    assert stream.over


# A camera of a chat, and of a page.


def test_a_camera_is_watched_for_a_while_and_asked(camera, llm):
    served, cameras = camera
    pairs = list(zip([0.0, 0.5, 1.0, 1.5], frames(4), strict=True))
    found = []
    body = asked(url="rtsp://camera/")

    def ask():
        found.append(served.openai().chat.completions.create(**body, extra_body={"seconds": 2, "frames": 4}))

    asking = threading.Thread(target=ask)
    count = len(cameras)
    asking.start()
    eventually(lambda: len(cameras) > count)
    for pair in pairs:
        cameras[-1].put(pair)
    asking.join()
    assert found[0].choices[0].message.content == llm.generate(pairs, "What happens?", max_new_tokens=8).text
    assert found[0].model_extra["tango"]["stream"]["frames"] == 4
    cameras[-1].put(None)
    eventually(lambda: not len(served.service.streams))


def test_how_long_a_camera_is_watched_is_bounded(served):
    for url, options, message in (
        ("rtsp://camera/", {"seconds": 61}, "for at most 60 s"),
        ("rtsp://camera/", {"fps": 0.01}, "for at most 60 s"),
        ("rtsp://camera/", {}, "without --allow-rtsp"),
        ("file:clip.mp4", {"seconds": 3}, "seconds is for rtsp: videos"),
    ):
        with pytest.raises(openai.APIStatusError, match=message):
            served.openai().chat.completions.create(**asked(url=url), extra_body=options)


def jpeg(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=95)
    return file.getvalue()


def test_a_client_sends_frames(served):
    http = served.http()
    name = http.post("/v1/streams", json={"source": "push:", "window": 4, "fps": 1000}).json()["id"]
    push = f"/v1/streams/{name}/frames"
    for i, frame in enumerate(frames(4)):
        taken = http.post(push, content=jpeg(frame), headers={"Content-Type": "image/jpeg"})
        assert (taken.status_code, taken.json()["taken"]) == (202, True)
        eventually(lambda i=i: http.get(f"/v1/streams/{name}").json()["frames_encoded"] == i + 1)
    assert served.openai().chat.completions.create(**asked(url=name)).choices[0].message.content
    for body, kind, status in (
        (b"no image", "image/jpeg", 400),
        (jpeg(frames(1)[0]), "text/plain", 415),
        (bytes(5 << 20), "image/png", 413),
    ):
        assert http.post(push, content=body, headers={"Content-Type": kind}).status_code == status
    assert http.delete(f"/v1/streams/{name}").status_code == 200
    assert http.post(push, content=b"x", headers={"Content-Type": "image/jpeg"}).status_code == 404


def test_a_client_that_sends_no_more_is_gone(serving):
    http = serving(idle_seconds=0.2).http()
    name = http.post("/v1/streams", json={"source": "push:", "window": 4}).json()["id"]
    eventually(lambda: http.get(f"/v1/streams/{name}").json()["state"] == "failed")
    assert http.get(f"/v1/streams/{name}").json()["error"].startswith("no frame was sent for 0.2 s")
    late = http.post(f"/v1/streams/{name}/frames", content=jpeg(frames(1)[0]), headers={"Content-Type": "image/jpeg"})
    assert (late.status_code, "is over" in late.text) == (400, True)
    assert http.delete(f"/v1/streams/{name}").status_code == 200


# Which cameras.


@pytest.mark.parametrize(
    ("allowed", "url", "found"),
    [
        ("cam.example", "rtsp://cam.example/live", "rtsp://10.0.0.5:554/live"),
        ("CAM.example", "rtsp://u:p@cam.example:8554/live?x=1", "rtsp://u:p@10.0.0.5:8554/live?x=1"),
        ("cam.example:8554", "rtsp://cam.example:8554/", "rtsp://10.0.0.5:8554/"),
        ("10.0.0.0/24", "rtsp://cam.example/", "rtsp://10.0.0.5:554/"),
        ("10.0.0.5", "rtsp://10.0.0.5/", "rtsp://10.0.0.5:554/"),
        ("[fd00::1]:554", "rtsp://[fd00::1]/", "rtsp://[fd00::1]:554/"),
        ("fd00::/8", "rtsp://[fd00::1]/", "rtsp://[fd00::1]:554/"),
        ("cam.example:8554", "rtsp://cam.example/", None),
        ("cam.example", "rtsp://other.example/", None),
        ("cam.example", "rtsp://cam.example.evil/", None),
        ("cam.example", "rtsp://cam.example@other.example/", None),
        ("10.0.0.0/24", "rtsp://mixed.example/", None),
        ("10.0.0.0/24", "rtsp://169.254.169.254/", None),
        ("127.0.0.1", "rtsp://[::ffff:127.0.0.1]/", None),
    ],
)
def test_which_cameras_may_be_named(monkeypatch, allowed, url, found):
    addresses = {"cam.example": ["10.0.0.5"], "mixed.example": ["10.0.0.6", "127.0.0.1"]}

    def resolve(host, port, **options):
        return [(0, 0, 0, "", (address, port)) for address in addresses.get(host, [host])]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    hosts = [AllowedHost.parse(allowed)]
    if found is None:
        with pytest.raises(ApiError, match="is not among the hosts of --allow-rtsp"):
            checked_rtsp(url, hosts, allow_private=False)
    else:
        assert checked_rtsp(url, hosts, allow_private=False) == found


@pytest.mark.parametrize("text", ["", "a/b", "u@h", "h:x", "h:99999", "10.0.0.0/99", "h?x", "fd00::zz"])
def test_what_is_no_host(text):
    with pytest.raises(TangoError, match="--allow-rtsp"):
        AllowedHost.parse(text)


@pytest.mark.slow
def test_a_real_camera(serving):
    """GStreamer's RTSP server, asked about two seconds of it."""
    if gstreamer() is None:
        pytest.skip(
            "needs GStreamer's RTSP server and x264; tests/runtime/video/test_stream.py names Debian's packages"
        )
    real = Camera()
    try:
        served = serving(rtsp_hosts=(AllowedHost.parse("127.0.0.1"),))
        found = served.openai().chat.completions.create(
            **asked(url=real.address()), extra_body={"seconds": 2, "frames": 4}
        )
        assert found.choices[0].message.content
        assert found.model_extra["tango"]["stream"]["frames"] >= 3
    finally:
        real.stop()
