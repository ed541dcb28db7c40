"""A server on the loopback, as its clients see it: the real uvicorn on a thread, and OpenAI's own client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from tango_runtime import VideoLLM  # noqa: E402
from tango_runtime.server.serve import configured, listen  # noqa: E402
from tango_runtime.server.service import Service  # noqa: E402
from tango_runtime.server.settings import Settings  # noqa: E402


class Running:
    """A server that runs.

    Attributes:
        service: What answers behind HTTP.
        url: Where it listens.
    """

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url

    def http(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def metric(self, line: str) -> float:
        """The value of a line of /metrics."""
        text = self.http().get("/metrics").text
        return float(next(row for row in text.splitlines() if row.startswith(f"{line} ")).rpartition(" ")[2])


@contextmanager
def running(models: dict[str, VideoLLM], settings: Settings) -> Iterator[Running]:
    service, sock = Service(models, settings), listen("127.0.0.1", 0)
    runner = uvicorn.Server(configured(service))
    thread = threading.Thread(target=lambda: asyncio.run(runner.serve(sockets=[sock])))
    thread.start()
    try:
        yield Running(service, f"http://127.0.0.1:{sock.getsockname()[1]}")
    finally:
        runner.should_exit = service.draining = True
        thread.join()


def asked(question="What happens?", url="file:clip.mp4", **more):
    """A request's body with one message."""
    part = {"type": "video_url", "video_url": {"url": url}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
    return {"model": "tiny", "messages": messages, "max_tokens": 8, **more}
