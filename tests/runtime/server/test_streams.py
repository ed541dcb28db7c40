"""Streams: opened, asked by id, watched by events, and closed."""

from __future__ import annotations

import json
import queue

import numpy as np
import pytest

from tango_runtime.server.streams import Streams
from tests.runtime.server.serving import asked, openai
from tests.runtime.server.test_server_limits import eventually


@pytest.fixture
def camera(serving, monkeypatch):
    """A server whose streams are cameras that a test feeds: (server, queue of the newest camera)."""
    served = serving(streams=2)
    items = []

    def source(url, fps):
        found = queue.Queue()
        items.append(found)
        return iter(found.get, None)

    monkeypatch.setattr(served.server, "_source", source)
    yield served, items
    for found in items:
        found.put(None)
    for stream in served.server.streams:
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


def test_a_stream_is_asked_by_its_id(camera, llm):
    served, cameras = camera
    name = opened(served)
    pairs = list(zip(map(float, range(6)), frames(6), strict=True))
    with pytest.raises(openai.InternalServerError, match="has no frames yet"):
        served.openai().chat.completions.create(**asked(url=name))
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
    assert served.http().delete(f"/v1/streams/{name}").status_code == 200


def test_streams_take_turns():
    """Each stream that has frames is served before any is served again."""

    class Fake:
        def __init__(self, name):
            self.name, self.waits, self.taken = name, True, 0

        def take_in(self, wait):
            self.taken += 1

    streams = Streams(8, None)
    fakes = [Fake(f"stream:{i}") for i in range(5)]
    streams._open = {fake.name: fake for fake in fakes}
    fakes[2].waits = False
    for _ in range(8):
        assert streams.turn()
    assert [fake.taken for fake in fakes] == [2, 2, 0, 2, 2]
    for fake in fakes:
        fake.waits = False
    assert not streams.turn()
