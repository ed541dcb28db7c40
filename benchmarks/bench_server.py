"""What `tango serve` adds to the library: the first token over HTTP against the same in this process, and many clients.

    python -m benchmarks.bench_server BUNDLE CLIP [--questions 200] [--clients 64] [--backend auto] [--json FILE]

Each side reads the clip once. Then a session in this process and a server in its own process, over one persistent
connection, take turns answering the same questions. The difference is the time that HTTP, its parsing and the hand-over
between threads take. Finally all clients ask at once, each over its own connection, and every answer is compared with
the session's.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tango_runtime import Session, VideoLLM
from tango_runtime.server.settings import Settings

#: Questions per turn, and seconds between turns: on a CPU, ONNX Runtime's threads spin for a while after a run, on the
#: cores that the other process needs.
_BLOCK, _PAUSE = 10, 0.2


@contextmanager
def server(bundle: Path, media: Path, backend: str, waiting: int) -> Iterator[tuple[int, int]]:
    """A server of the bundle in a process of its own: process id and port."""
    command = ["serve", str(bundle), "--port", "0", "--backend", backend, "--queue", str(waiting)]
    program = [sys.executable, "-m", "tango_runtime.cli.main", *command, "--media-root", str(media)]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"serving at http://\S+:(\d+)", line):
                    break
            else:
                raise SystemExit("the server ended")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
            yield process.pid, int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)


class Client:
    """One connection to the server."""

    def __init__(self, port: int, clip: Path) -> None:
        self._connection, self._clip = http.client.HTTPConnection("127.0.0.1", port, timeout=600), clip
        self._connection.connect()

    def ask(self, question: str, tokens: int) -> tuple[float, str]:
        """Milliseconds to the first piece of the answer, and all of it."""
        part = {"type": "video_url", "video_url": {"url": f"file:{self._clip.name}"}}
        message = {"role": "user", "content": [part, {"type": "text", "text": question}]}
        body = json.dumps({"messages": [message], "max_tokens": tokens, "stream": True})
        begin, first, text = time.perf_counter(), 0.0, ""
        self._connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if data.startswith("{"):
                chunk = json.loads(data)
                if "error" in chunk:
                    raise SystemExit(f"the server answered {data}")
                piece = chunk["choices"][0]["delta"].get("content") or ""
                if piece and not first:
                    first = 1e3 * (time.perf_counter() - begin)
                text += piece
        return first, text


def ask_here(session: Session, question: str, tokens: int) -> tuple[float, str]:
    """The same from a session in this process."""
    begin = time.perf_counter()
    stream = session.stream(question, max_new_tokens=tokens)
    piece = next(stream, "")
    return 1e3 * (time.perf_counter() - begin), piece + "".join(stream)


def in_turns(client: Client, session: Session, questions: list[str], tokens: int) -> tuple[list[float], list[float]]:
    """Ascending milliseconds to the first token, here and over HTTP; every question is new to both."""
    times: dict[str, list[float]] = {"here": [], "there": []}
    for i in range(0, len(questions), _BLOCK):
        block, texts = questions[i : i + _BLOCK], {}
        for side in ("here", "there") if i // _BLOCK % 2 else ("there", "here"):
            time.sleep(_PAUSE)
            answers = [ask_here(session, q, tokens) if side == "here" else client.ask(q, tokens) for q in block]
            times[side] += [ms for ms, _ in answers]
            texts[side] = [text for _, text in answers]
        if texts["here"] != texts["there"]:
            raise SystemExit("questions are answered differently")
    return sorted(times["here"]), sorted(times["there"])


def at_once(port: int, clip: Path, wanted: dict[str, str], tokens: int) -> tuple[int, list[float], float]:
    """Asks with all clients at once.

    Returns:
        (number of answers that equal the session's, ascending milliseconds to the first token, seconds in total).
    """
    times: list[float] = []
    right = 0
    lock, start = threading.Lock(), threading.Barrier(len(wanted) + 1)

    def ask(question: str) -> None:
        nonlocal right
        client = Client(port, clip)
        start.wait()
        ms, text = client.ask(question, tokens)
        with lock:
            times.append(ms)
            right += text == wanted[question]

    threads = [threading.Thread(target=ask, args=(question,)) for question in wanted]
    for thread in threads:
        thread.start()
    start.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    return right, sorted(times), time.perf_counter() - begin


def main() -> None:
    """Measures both, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4, help="of an answer (default: %(default)s)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    llm = VideoLLM(args.bundle, args.backend, Settings().together)  # the same steps as the server's
    session = llm.session(args.clip)
    with server(args.bundle, args.clip.parent, args.backend, 2 * args.clients) as (_, port):
        client = Client(port, args.clip)
        client.ask("Which colour?", args.tokens)  # the clip is read
        ask_here(session, "Which colour?", args.tokens)
        here, there = in_turns(client, session, [f"What happens at {i}?" for i in range(args.questions)], args.tokens)
        wanted = {f"Who is number {i}?": "" for i in range(args.clients)}
        wanted = {question: ask_here(session, question, args.tokens)[1] for question in wanted}
        right, queued, seconds = at_once(port, args.clip, wanted, args.tokens)

    added = statistics.median(there) - statistics.median(here)
    result: dict[str, Any] = {
        "bundle": args.bundle.resolve().name,
        "backend": llm.backend,
        "machine": machine(),
        "questions": args.questions,
        "first_token_ms": {"here": spread(here), "server": spread(there), "added": added},
        "clients": {"asked": args.clients, "right": right, "seconds": seconds, "first_token_ms": spread(queued)},
    }
    print(f"first token here    {_line(here)}")
    print(f"first token, server {_line(there)}")
    print(f"added               p50 {added:.2f} ms")
    print(f"{right} of {args.clients} clients at once had the session's answer, in {seconds:.2f} s; {_line(queued)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    if right < args.clients:
        raise SystemExit("answers are missing")


def machine() -> str:
    """The host, in a line."""
    return f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def spread(values: list[float]) -> dict[str, float]:
    """Percentiles; NaN without values."""
    ordered = sorted(values) or [float("nan")]
    return {f"p{p}": ordered[min(len(ordered) - 1, p * len(ordered) // 100)] for p in (0, 10, 50, 90, 99, 100)}


def _line(times: list[float]) -> str:
    return ", ".join(f"{name} {ms:.2f} ms" for name, ms in spread(times).items() if name in ("p10", "p50", "p90"))


if __name__ == "__main__":
    main()
