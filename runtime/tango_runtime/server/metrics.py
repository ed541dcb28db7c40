"""Counters in Prometheus' text format, under vLLM's names where it has one."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

_HELP = {
    "vllm:num_requests_running": ("gauge", "Requests whose answer is written."),
    "vllm:num_requests_waiting": ("gauge", "Requests that wait for the model."),
    "vllm:prompt_tokens_total": ("counter", "Positions of prompts, video tokens included."),
    "vllm:generation_tokens_total": ("counter", "Tokens of answers."),
    "vllm:request_success_total": ("counter", "Answers that were finished."),
    "vllm:time_to_first_token_seconds": ("histogram", "From a request's arrival at the model to its first token."),
    "vllm:e2e_request_latency_seconds": ("histogram", "From a request's arrival at the model to its end."),
    "tango:video_tokens_seen_total": ("counter", "Video tokens that the vision tower gave for answers."),
    "tango:video_tokens_kept_total": ("counter", "Those of them that the decoder read."),
    "tango:videos_encoded_total": ("counter", "Videos that went through the vision tower."),
    "tango:session_hits_total": ("counter", "Questions whose video was read already."),
    "tango:requests_refused_total": ("counter", "Requests that found the queue full."),
    "tango:requests_cancelled_total": ("counter", "Requests whose client left, or whose time was over."),
    "tango:streams": ("gauge", "Streams that are open."),
    "tango:stream_load": ("gauge", "Share of the model's time that frames of streams take; above 1 some are given up."),
    "tango:stream_lag_seconds": ("gauge", "Longest that a frame of a stream has waited to be encoded."),
    "tango:stream_answer_lag_seconds": ("histogram", "From a window's newest frame to its answer's first piece."),
    "tango:stream_frames_encoded_total": ("counter", "Frames of streams that went through the vision tower."),
    "tango:stream_frames_dropped_total": ("counter", "Frames of streams that were given up."),
}


class Metrics:
    """Counts, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], float] = defaultdict(float)
        self._buckets: dict[tuple[str, str], list[int]] = {}
        self._gauges: dict[str, Callable[[], float]] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Adds to a counter."""
        with self._lock:
            self._counts[name, _labels(labels)] += value

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Adds to a histogram."""
        key = name, _labels(labels)
        with self._lock:
            buckets = self._buckets.setdefault(key, [0] * (len(_SECONDS) + 1))
            buckets[bisect_left(_SECONDS, seconds)] += 1
            self._counts[f"{name}_sum", key[1]] += seconds

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Names a number that is read when it is asked for."""
        self._gauges[name] = read

    def text(self) -> str:
        """All of them."""
        with self._lock:
            counts, buckets = dict(self._counts), {key: list(value) for key, value in self._buckets.items()}
        lines: list[str] = []
        for name, (kind, what) in _HELP.items():
            lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
            if kind == "gauge" and name in self._gauges:
                lines.append(f"{name} {self._gauges[name]():g}")
            elif kind == "counter":
                found = [(labels, value) for (counter, labels), value in counts.items() if counter == name]
                lines += [f"{name}{_braces(labels)} {value:.17g}" for labels, value in found or [("", 0.0)]]
            for (histogram, labels), found_buckets in buckets.items():
                if histogram == name:
                    lines += _histogram(name, labels, found_buckets, counts[f"{name}_sum", labels])
        return "\n".join([*lines, ""])


def _histogram(name: str, labels: str, buckets: list[int], total: float) -> list[str]:
    lines, count = [], 0
    for bound, found in zip((*(f"{s:g}" for s in _SECONDS), "+Inf"), buckets, strict=True):
        count += found
        inside = ",".join(filter(None, (labels, f'le="{bound}"')))
        lines.append(f"{name}_bucket{{{inside}}} {count}")
    return [*lines, f"{name}_sum{_braces(labels)} {total:.17g}", f"{name}_count{_braces(labels)} {count}"]


def _braces(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _labels(labels: dict[str, str]) -> str:
    def quoted(text: str) -> str:
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return ",".join(f'{key}="{quoted(value)}"' for key, value in labels.items())
