"""Many requests to one `tango serve`, some of them hostile, and hours of a stream: memory must not grow.

    python -m benchmarks.soak_server BUNDLE CLIP [--requests 10000] [--stream-hours 24] [--backend …] [--json …]

Of 20 requests, 9 are questions, 3 are read as events, 1 is read slowly, 1 asks for a view, 3 are reset midway as by a
killed client, and 3 are nonsense. Ratios, numbers of frames and questions vary, so that caches fill and evict.
Memory, open files and threads of the server's process are read from /proc. The stream has one frame per second, a
question every 5 s, and a gap and another frame size every hour; it is read as fast as the model allows.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import os
import platform
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_server import server
from tango_runtime import VideoLLM

_CHAT, _VIEW = "/v1/chat/completions", "/v1/videos/view"
_KINDS = ("ask",) * 9 + ("events",) * 3 + ("slow", "view") + ("reset",) * 3 + ("nonsense",) * 3

#: Bodies that are no request.
_NONSENSE: tuple[Any, ...] = (
    *(b"", b"{", b"\xff", b"[" * 9999, b"null", {"messages": 1}, {"messages": [{"role": "user", "content": "x"}]}),
    *({"messages": [], "max_tokens": value} for value in (-1, "x", 1e400, None)),
)


class Client:
    """Makes requests of all kinds, and counts their outcomes.

    Args:
        port: The server's.
        clip: Name of a clip under the media root.
        seed: Of the choices.
    """

    def __init__(self, port: int, clip: str, seed: int) -> None:
        self._port, self._clip, self._random = port, clip, random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []

    def make_one(self) -> None:
        """Makes a request."""
        kind = self._random.choice(_KINDS)
        try:
            getattr(self, f"_{kind}")()
            self.outcomes[kind] += 1
        except (OSError, http.client.HTTPException, AssertionError, ValueError) as error:
            self.failures.append(f"{kind}: {type(error).__name__}: {error}"[:200])

    def _body(self, **more: Any) -> bytes:
        chance = self._random
        part = {"type": "video_url", "video_url": {"url": f"file:{self._clip}"}}
        text = {"type": "text", "text": f"What happens at {chance.randrange(1000)}?"}
        options = {"frames": chance.choice((2, 3, 4)), "retention_ratio": chance.choice((0.1, 0.2, 0.5))}
        messages = [{"role": "user", "content": [part, text]}]
        return json.dumps({"messages": messages, "max_tokens": chance.randint(1, 6), **options, **more}).encode()

    @contextmanager
    def _response(self, path: str, body: bytes) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            yield connection.getresponse()
        finally:
            connection.close()

    def _ask(self) -> None:
        with self._response(_CHAT, self._body()) as response:
            answer = json.load(response)
            assert response.status == 200, answer
            assert answer["choices"][0]["finish_reason"] in ("stop", "length")

    def _events(self) -> None:
        with self._response(_CHAT, self._body(stream=True)) as response:
            assert response.read().endswith(b"data: [DONE]\n\n")

    def _slow(self) -> None:
        with self._response(_CHAT, self._body(stream=True)) as response:
            while response.read(50):
                time.sleep(0.01)

    def _view(self) -> None:
        body = {"video_url": f"file:{self._clip}", "retention_ratio": self._random.randint(5, 99) / 100}
        with self._response(_VIEW, json.dumps(body).encode()) as response:
            assert json.load(response)["total"] > 0

    def _reset(self) -> None:
        body = self._body(stream=self._random.random() < 0.5, max_tokens=200)
        head = (
            f"POST {_CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        message = head.encode() + body
        with socket.create_connection(("127.0.0.1", self._port)) as connection:
            connection.sendall(message[: self._random.choice((20, len(head) + 5, len(message)))])
            time.sleep(self._random.random() * 0.05)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset

    def _nonsense(self) -> None:
        body = self._random.choice(_NONSENSE)
        with self._response(_CHAT, body if isinstance(body, bytes) else json.dumps(body).encode()) as response:
            response.read()
            assert 400 <= response.status < 500, response.status


def usage(pid: int) -> dict[str, float]:
    """What a process holds: resident memory in MB, open files, threads."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return {
        "rss_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1),
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": len(list(Path(f"/proc/{pid}/task").iterdir())),
    }


def soak(bundle: Path, clip: Path, backend: str, requests: int, clients: int = 8) -> dict[str, Any]:
    """Makes requests, and watches the server.

    Args:
        bundle: Folder of the bundle to serve.
        clip: The video that requests are about.
        backend: What the server runs the bundle on.
        requests: Number of requests.
        clients: Number of concurrent clients.
    """
    with server(bundle, clip.parent, backend, 64) as (pid, port):
        made = [Client(port, clip.name, seed) for seed in range(clients)]
        lock, left, watched = threading.Lock(), requests, {0: usage(pid)}

        def work(client: Client) -> None:
            nonlocal left
            while True:
                with lock:
                    if not left:
                        return
                    left -= 1
                    done = requests - left
                client.make_one()
                if done in (100, 1000) or done % 2000 == 0:
                    watched[done] = usage(pid)
                    print(done, watched[done], flush=True)

        begin = time.monotonic()
        threads = [threading.Thread(target=work, args=(client,)) for client in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - begin
        last = Client(port, clip.name, clients)
        last._ask()  # the server still answers
        watched[requests] = usage(pid)
    outcomes = sum((client.outcomes for client in made), Counter[str]())
    failures = [failure for client in made for failure in client.failures]
    return {"requests": requests, "seconds": seconds, "outcomes": outcomes, "failures": failures, "usage": watched}


def stream(bundle: Path, backend: str, hours: float) -> dict[str, Any]:
    """Reads a stream as fast as it goes, and watches this process."""
    llm, watched, answers = VideoLLM(bundle, backend), {}, 0
    manifest = llm.bundle.manifest

    def frames() -> Iterator[tuple[float, Any]]:
        chance = np.random.default_rng(0)
        noise = [chance.integers(0, 255, (4, *size, 3), dtype=np.uint8) for size in ((72, 128), (96, 96))]
        for second in range(int(3600 * hours)):
            hour = second // 3600
            if second % 3600 not in range(1800, 1830):  # a gap
                yield float(second), noise[hour % 2][second % 4]

    begin = time.monotonic()
    window = manifest.video.frames
    for answer in llm.watch(frames(), "What happens?", drop=False, window=window, step=5.0, max_new_tokens=2):
        answers += 1
        assert answer.live is not None
        hour = int(answer.live.end // 3600)
        if hour not in watched:
            watched[hour] = usage(os.getpid())
            print(f"hour {hour}", watched[hour], flush=True)
    watched[-1] = usage(os.getpid())
    return {"hours": hours, "seconds": time.monotonic() - begin, "answers": answers, "usage": watched}


def main() -> None:
    """Soaks, and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--stream-hours", type=float, default=0.0)
    parser.add_argument("--backend", default="ort-cpu", help="default: %(default)s")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.getLogger("tango_runtime").setLevel(logging.ERROR)  # the stream's gaps would be warnings

    result: dict[str, Any] = {
        "bundle": args.bundle.resolve().name,
        "backend": args.backend,
        "machine": platform.machine(),
    }
    if args.requests:
        result["server"] = soak(args.bundle, args.clip, args.backend, args.requests)
    if args.stream_hours:
        result["stream"] = stream(args.bundle, args.backend, args.stream_hours)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    if result.get("server", {}).get("failures"):
        raise SystemExit("some requests failed")


if __name__ == "__main__":
    main()
