"""Limits: keys, sizes, times, queues, clients that leave or send nonsense, and the end."""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from tango_plugins import TangoError
from tango_runtime.cli import serve as serve_command
from tango_runtime.cli.main import main
from tango_runtime.server import serve as serve_module
from tango_runtime.server.events import ClientLeftError, unless_left
from tango_runtime.server.metrics import Metrics
from tango_runtime.server.stops import StopTexts
from tests.runtime.server.serving import asked, openai

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def eventually(condition, seconds=30.0):
    """Waits until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


class Gate:
    """Holds the model's thread before each step of an answer, until it is opened."""

    def __init__(self, served, monkeypatch):
        self.opened, self.steps = threading.Event(), 0
        answerer, write = served.service.answerer, served.service.answerer._write

        def gated(*arguments, **options):
            for _ in write(*arguments, **options):
                self.steps += 1
                self.opened.wait(60)
                yield

        monkeypatch.setattr(answerer, "_write", gated)


@pytest.fixture
def gate(monkeypatch):
    gates = []

    def made(served):
        gates.append(Gate(served, monkeypatch))
        return gates[-1]

    yield made
    for found in gates:
        found.opened.set()


def test_the_key_is_asked_for(serving):
    served = serving(api_key="s3cret-ß")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": "Basic x"}):
        found = served.http().get("/v1/models", headers=headers)
        assert found.status_code == 401
        assert found.json()["error"]["type"] == "authentication_error"
        assert found.headers["www-authenticate"] == "Bearer"
    right = {"Authorization": "Bearer s3cret-ß".encode()}
    assert served.http().get("/v1/models", headers=right).status_code == 200
    for path in ("/health", "/ready", "/metrics"):
        assert served.http().get(path).status_code == 200


def test_a_full_queue_refuses_and_says_when_to_ask_again(serving, gate):
    served = serving(waiting=2, together=1)
    served.openai().chat.completions.create(**asked())
    held = gate(served)
    results = []

    def ask(i):
        results.append(served.http().post("/v1/chat/completions", json=asked(f"Question {i}?")).status_code)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for count, thread in enumerate(threads):
        thread.start()
        eventually(lambda count=count: served.service.worker.running + served.service.worker.waiting == count + 1)
    refused = served.http().post("/v1/chat/completions", json=asked("One more?"))
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    held.opened.set()
    for thread in threads:
        thread.join()
    assert results == [200, 200, 200]
    assert served.metric("tango:requests_refused_total") == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_work(serving, gate, stream):
    served = serving(together=1)
    served.openai().chat.completions.create(**asked())
    before = served.metric("tango:requests_cancelled_total")
    held = gate(served)
    body = json.dumps(asked(stream=stream, max_tokens=512)).encode()
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as connection:
        connection.sendall(POST % len(body) + body)
        eventually(lambda: held.steps)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, as of a kill -9
    eventually(lambda: served.metric("tango:requests_cancelled_total") == before + 1)
    held.opened.set()
    eventually(lambda: not served.service.worker.running)
    assert held.steps < 512
    assert served.openai().chat.completions.create(**asked()).choices


def test_work_that_loses_a_cancellation_ends_too():
    """As wait_for does before Python 3.12, when the client leaves at the moment that a result comes."""
    lost = []

    async def work():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            lost.append(True)
        await asyncio.Event().wait()

    async def receive():
        return {"type": "http.disconnect"}

    with pytest.raises(ClientLeftError):
        asyncio.run(unless_left(receive, work()))
    assert lost


def test_an_answer_that_takes_too_long_is_an_error(serving, gate):
    served = serving(answer_seconds=0.5)
    held = gate(served)
    found = served.http().post("/v1/chat/completions", json=asked())
    assert found.status_code == 503
    assert "no answer within 0.5 s" in found.json()["error"]["message"]
    held.opened.set()


def test_a_model_that_fails_is_an_error_of_the_server_and_the_session_is_forgotten(serving, monkeypatch, caplog):
    served = serving(together=2)
    wanted = served.openai().chat.completions.create(**asked()).choices[0].message.content
    backend = served.service.answerer.models["tiny"]._backend

    def fail(*arguments):
        raise RuntimeError("out of memory at 0x1234")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "decode", fail)
        found = served.http().post("/v1/chat/completions", json=asked())
    assert (found.status_code, found.json()["error"]["type"]) == (500, "server_error")
    assert "0x1234" not in found.text  # what is inside is for the log
    assert "out of memory at 0x1234" in caplog.text
    assert served.openai().chat.completions.create(**asked()).choices[0].message.content == wanted


def test_bodies_are_limited_in_size_and_time(serving):
    served = serving(max_body=10_000, body_seconds=2.0)
    large = served.http().post("/v1/chat/completions", json=asked("x" * 20_000))
    assert large.status_code == 413
    chunked = served.http().post(
        "/v1/chat/completions", content=iter([b" " * 6000] * 3), headers={"Content-Type": "application/json"}
    )
    assert chunked.status_code == 413
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as connection:
        connection.sendall(POST % 100 + b"{")
        assert b" 408 " in connection.recv(1000)


def test_clients_that_send_large_bodies_slowly_keep_nobody_out(serving):
    served = serving(max_body=10_000, body_seconds=2.0)
    with ExitStack() as stack:
        for _ in range(8):
            address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
            connection = stack.enter_context(socket.create_connection(address))
            connection.sendall(POST % 10_000 + b"{")
        assert served.http().post("/v1/chat/completions", json=asked(max_tokens=1)).status_code == 200


def test_bodies_in_memory_are_limited(serving):
    served = serving(max_body=10_000, body_seconds=20.0)
    with ExitStack() as stack:
        connections = []
        for _ in range(5):
            address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
            connections.append(stack.enter_context(socket.create_connection(address, timeout=10)))
            connections[-1].sendall(POST % 10_000 + b" " * 9_000)
        (refused, *others), _, _ = select.select(connections, [], [], 10)
        assert not others
        assert b" 429 " in refused.recv(1000)


def malformed():
    """More than 200 bodies, none of which can be answered."""
    whole = asked(max_tokens=1)
    yield from (b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"{]", b"[" * 100_000, b'{"a":' * 5000, b"NaN")
    yield from (b'{"messages": NaN}', b"9" * 5000, b'{"seed": 1' + b"0" * 5000 + b"}", b"\x00" * 100)
    junk = [None, True, -1, 0.5, 1e400, "x", "", [], {}, [[]], [None], {"x": 1}, 10**30, "\ud800", -(10**30)]
    for key in ("messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "frames", "fps", "model"):
        for value in junk:
            yield {**whole, key: value}
    for key in (
        "retention_ratio",
        "prune",
        "max_pixels",
        "media_io_kwargs",
        "stream_options",
        "n",
        "tools",
        "logprobs",
        "response_format",
    ):
        for value in junk:
            yield {**whole, key: value}
    for content in (*junk, [1], [{}], [{"type": "text"}], [{"type": "text", "text": 1}], [{"type": "video_url"}]):
        yield {**whole, "messages": [{"role": "user", "content": content}]}
    for url in (
        *junk,
        {"url": 1},
        {"url": ""},
        {"url": "x"},
        {"url": "ftp://x"},
        {"url": "http://"},
        {"url": "http://["},
    ):
        yield asked() | {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": url}]}]}
    text, video = {"type": "text", "text": "x"}, whole["messages"][0]["content"][0]
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    for url in (
        "data:",
        "data:,",
        "data:x;base64,%",
        "data:x;base64,",
        "video:",
        "video:0",
        "stream:0",
        "rtsp://x/",
        "javascript:0",
    ):
        yield asked(url=url)
    for roles in ([], ["assistant"], ["tool"], ["user", "assistant"], ["user", "system"], [None], ["user"] * 2000):
        yield {**whole, "messages": [{"role": role, "content": [video, text]} for role in roles]}
    yield {**whole, "messages": [{"role": "user", "content": [video, video, text]}]}
    yield {**whole, "messages": [{"role": "user", "content": [video, image, text]}]}
    yield {**whole, "messages": [{"role": "user", "content": [image, text]}]}
    yield {
        **whole,
        "messages": [{"role": "user", "content": [{**image, "image_url": {"url": "data:,", "seconds": "x"}}]}],
    }
    for seconds in (10**400, 1e300, True):
        timed = {**image, "image_url": {**image["image_url"], "seconds": seconds}}
        yield {**whole, "messages": [{"role": "user", "content": [timed, text]}]}
    yield {**whole, "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 3}
    for schema in (
        *junk,
        {"schema": 1},
        {"schema": {"type": "x"}},
        {"schema": {"$ref": "file:///etc/passwd"}},
        {"x": 1},
    ):
        yield {**whole, "response_format": {"type": "json_schema", "json_schema": schema}}
    yield {**whole, "unknown": 1}
    yield {**whole, "\u0000": 1}
    yield {**whole, "\ud800": 1}
    yield asked("half a pair: \udfff")


def test_a_key_that_a_body_has_twice_is_named(served):
    body = json.dumps(asked()).replace('"text": ', '"text": "What?", "text": ')
    headers = {"Content-Type": "application/json"}
    found = served.http().post("/v1/chat/completions", content=body, headers=headers)
    assert found.status_code == 400
    assert found.json()["error"]["message"] == 'the body is not JSON: an object has the key "text" twice'


def test_no_body_harms_the_server(served):
    http, count, answered = served.http(), 0, 0
    for body in malformed():
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        found = http.post("/v1/chat/completions", content=data, headers={"Content-Type": "application/json"})
        count += 1
        if found.status_code == 200:
            answered += 1
            continue
        assert 400 <= found.status_code < 500, (data[:200], found.text)
        error = found.json()["error"]
        assert error["message"], data[:200]
        assert len(found.text) < 2000
    assert count > 300
    assert answered < 60  # junk that is a value, or leaves the default
    assert http.post("/v1/chat/completions", json=asked()).status_code == 200
    assert http.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "raw",
    [
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_no_request_line_harms_the_server(served, raw):
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        assert b"root:" not in connection.recv(10_000)
    assert served.http().get("/health").status_code == 200


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"", b""),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", b"x"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nX: ", b"x"),
        (b"POST /v1/none HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", b"x"),
    ],
)
def test_a_connection_that_asks_nothing_is_closed(served, monkeypatch, begin, more):
    monkeypatch.setattr(serve_module, "_HEAD_SECONDS", 0.5)

    def closed():
        with suppress(BlockingIOError):
            try:
                connection.sendall(more)
                return not connection.recv(10_000)
            except ConnectionError:
                return True

    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as connection:
        connection.sendall(begin)
        connection.setblocking(False)
        eventually(closed)


def test_a_connection_whose_answer_takes_long_is_kept(serving, gate, monkeypatch):
    monkeypatch.setattr(serve_module, "_HEAD_SECONDS", 2.0)
    served = serving(videos=3)  # a server of its own: what others ask of it would wait, too
    held = gate(served)
    connection = http.client.HTTPConnection("127.0.0.1", int(served.url.rpartition(":")[2]), timeout=60)
    with closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(asked()), {"Content-Type": "application/json"})
        sock = connection.sock
        eventually(lambda: held.steps)
        time.sleep(2.5)
        held.opened.set()
        assert connection.getresponse().read()
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        assert connection.sock is sock


def test_other_methods_and_paths_are_errors_of_the_same_shape(served):
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/none", 404),
        ("PUT", "/v1/streams", 405),
    ):
        found = served.http().request(method, path)
        assert (found.status_code, found.json()["error"]["code"]) == (status, status)
    found = served.http().post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert found.status_code == 415  # what a page of another origin could send unasked


def test_other_pages_may_call_only_where_allowed(served, serving):
    headers = {"Origin": "https://ui.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in served.http().options("/v1/chat/completions", headers=headers).headers
    allowed = serving(origins=("https://ui.example",)).http().options("/v1/chat/completions", headers=headers)
    assert allowed.headers["access-control-allow-origin"] == "https://ui.example"


def test_it_drains_when_it_is_told_to_stop(tiny_bundle, media_root):
    """The answer that is written ends, further requests find nobody, and the exit code is 0."""
    program = [sys.executable, "-m", "tango_runtime.cli.main", "serve", str(tiny_bundle), "--port", "0"]
    path = os.pathsep.join(folder for folder in sys.path if folder)
    with subprocess.Popen(
        [*program, "--media-root", str(media_root)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
    ) as process:
        try:
            url = ""
            while not url:
                line = process.stderr.readline()
                assert line, "the server ended"
                url = "".join(re.findall(r"serving at (http://\S+)", line))
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            body = {**asked(max_tokens=200), "model": Path(tiny_bundle).name, "stream": True}
            chunks = iter(client.chat.completions.create(**body))
            next(chunks)
            process.send_signal(signal.SIGTERM)
            finish = [chunk.choices[0].finish_reason for chunk in chunks][-1]
            assert finish in ("length", "stop")
            assert process.wait(60) == 0
            with pytest.raises(openai.APIConnectionError):
                client.models.list()
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--media-root", "none"], "there is no folder none"),
        (["--api-key", ""], "the API key is empty"),
        (["--allow-rtsp", "cam/x"], "'cam/x' is no host"),
        (["--host", "203.0.113.1"], "cannot listen at 203.0.113.1:8000"),
        (["--port", "99999"], "cannot listen"),
    ],
)
def test_what_cannot_be_served_is_named(tiny_bundle, capsys, options, error):
    assert main(["serve", str(tiny_bundle), *options]) == 2
    assert error in capsys.readouterr().err


def test_the_key_is_the_first_line_of_a_file(tmp_path):
    file = tmp_path / "key"
    arguments = argparse.Namespace(api_key=None, api_key_file=file)
    file.write_bytes("s3cret-ß \r\nmore".encode())
    assert serve_command._key(arguments) == "s3cret-ß"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(TangoError, match="is not text in UTF-8"):
        serve_command._key(arguments)


def test_two_bundles_of_one_name_are_refused(tiny_bundle, tmp_path, capsys):
    other = tmp_path / Path(tiny_bundle).name
    other.symlink_to(tiny_bundle)
    assert main(["serve", str(tiny_bundle), str(tiny_bundle), "--port", "0"]) == 2
    assert "two bundles are called" in capsys.readouterr().err


# Parts.


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "met"),
    [
        (["ab", "cd"], [], "abcd", False),
        (["ab", "cd"], ["bc"], "a", True),
        (["a", "b", "c", "d"], ["bcd"], "a", True),
        (["a", "b", "c", "x"], ["bcd"], "abcx", False),
        (["aaab"], ["ab"], "aa", True),
        (["x", "end", "x"], ["d", "en"], "x", True),
        (["ab"], ["abc"], "ab", False),
        ([], ["x"], "", False),
    ],
)
def test_stop_texts(pieces, stops, text, met):
    stop = StopTexts(stops)
    assert ("".join(stop.cut(iter(pieces))), stop.met) == (text, met)


def test_a_histogram_and_its_labels():
    metrics = Metrics()
    for seconds in (0.0005, 0.02, 1000):
        metrics.observe("vllm:time_to_first_token_seconds", seconds, model_name='a"b\\')
    lines = metrics.text().splitlines()
    label = r'model_name="a\"b\\"'
    assert f'vllm:time_to_first_token_seconds_bucket{{{label},le="0.001"}} 1' in lines
    assert f'vllm:time_to_first_token_seconds_bucket{{{label},le="0.03"}} 2' in lines
    assert f'vllm:time_to_first_token_seconds_bucket{{{label},le="+Inf"}} 3' in lines
    assert f"vllm:time_to_first_token_seconds_count{{{label}}} 3" in lines
