"""What the model's thread does: a video is encoded once, read once a ratio, and asked; a stream is asked as it is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar

import numpy as np

from tango_runtime.pipeline.answer import Answer, AnswerStream
from tango_runtime.pipeline.encoded import EncodedVideo
from tango_runtime.pipeline.session import Session
from tango_runtime.pipeline.video_llm import VideoLLM
from tango_runtime.server.chat import ChatRequest, VideoOptions
from tango_runtime.server.decoders import DecodedClip
from tango_runtime.server.errors import ApiError
from tango_runtime.server.metrics import Metrics
from tango_runtime.server.settings import Settings
from tango_runtime.server.stops import StopTexts
from tango_runtime.server.streams import Stream

_V = TypeVar("_V")

#: What the steps of a job call with their results; from the model's thread.
Emit = Callable[[Any], None]


@dataclass(frozen=True)
class VideoKey:
    """What tells one encoded video from another.

    Attributes:
        model: The bundle's name.
        digest: Hash of the media's bytes.
        frames: Frames asked for.
        fps: Frames a second asked for.
        max_pixels: Most pixels of a frame.
    """

    model: str
    digest: str
    frames: int | None
    fps: float | None
    max_pixels: int | None

    @classmethod
    def of(cls, model: str, digest: str, options: VideoOptions) -> VideoKey:
        """The key of media with options."""
        return cls(model, digest, options.frames, options.fps, options.max_pixels)


class EvictedError(Exception):
    """The video was forgotten since it was looked for, and must be decoded again."""


@dataclass(frozen=True)
class Seen:
    """An encoded video.

    Attributes:
        video: Its frames and features.
        duration: Seconds of the video; None where unknown.
        aspect: Width over height.
    """

    video: EncodedVideo
    duration: float | None
    aspect: float


@dataclass(frozen=True)
class Ending:
    """How an answer ended.

    Attributes:
        answer: The answer.
        finish: OpenAI's reason.
        cached: Positions of the prompt that were not computed again.
    """

    answer: Answer
    finish: str
    cached: int

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's numbers of tokens."""
        prompt, completion = self.answer.prompt_tokens, len(self.answer.ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    @property
    def details(self) -> dict[str, Any]:
        """What else is known of it: the video's tokens, times, and of a stream the window."""
        answer, live = self.answer, self.answer.live
        found: dict[str, Any] = {
            "video_tokens": answer.total,
            "kept_tokens": answer.kept,
            "retention_ratio": answer.retention_ratio,
            "stages_ms": _rounded(answer.stages),
        }
        if live is not None:
            found["stream"] = {
                "begin": live.begin,
                "end": live.end,
                "frames": live.frames,
                "lag_seconds": live.lag,
                "dropped": live.dropped,
                "gaps": live.gaps,
            }
        return found


class Answerer:
    """Models and what they have read; for the worker's thread, but for :meth:`knows`.

    Args:
        models: Loaded bundles by name.
        settings: How much is kept.
        metrics: Counts.
    """

    def __init__(self, models: Mapping[str, VideoLLM], settings: Settings, metrics: Metrics) -> None:
        self.models, self._metrics = models, metrics
        self._video_first = {name: llm.video_first for name, llm in models.items()}  # else questions share no session
        self._videos: OrderedDict[VideoKey, Seen] = OrderedDict()
        self._sessions: OrderedDict[tuple[VideoKey, float | None, bool], Session] = OrderedDict()
        self._most_videos, self._most_sessions = settings.videos, settings.sessions

    def knows(self, key: VideoKey) -> bool:
        """Whether a video is kept at the moment; from any thread."""
        return key in self._videos

    def answer(
        self, request: ChatRequest, key: VideoKey, clip: DecodedClip | None, emit: Emit
    ) -> Generator[None, None, None]:
        """Answers a question about a video: emits pieces of text, then an :class:`Ending`."""
        arrived = monotonic()
        name = key, request.options.retention_ratio, request.options.prune
        share = self._video_first[key.model]
        hit = share and name in self._sessions
        if not hit:
            seen = self._see(key, clip)
            yield
        if share and name in self._sessions:  # by now, another question may have opened it
            session = _used(self._sessions, name)
        else:
            session = self._open(key.model, seen, request.options)
            _put(self._sessions, name, session, self._most_sessions)
        self._metrics.add("tango:session_hits_total", hit)
        stream = session.stream(request.question, history=request.history, **_sampling(request))
        try:
            yield from self._write(request, stream, emit, arrived, cached=session.rows if hit else 0)
        except Exception:
            self._sessions.pop(name, None)  # whatever it is now, it is asked no more
            raise

    def answer_live(self, request: ChatRequest, stream: Stream, emit: Emit) -> Generator[None, None, None]:
        """Answers a question about a stream as it is: emits pieces of text, then an :class:`Ending`."""
        arrived = monotonic()
        with _used_alone(stream):
            _take_in(stream)
            pieces = stream.live.stream(request.question, history=request.history, **_sampling(request))
            yield from self._write(request, pieces, emit, arrived, cached=0)

    def view(
        self, key: VideoKey, options: VideoOptions, clip: DecodedClip | None, emit: Emit
    ) -> Generator[None, None, None]:
        """Prunes a video: emits a dict of what was kept, with the frames as an array under ``frames``."""
        seen = self._see(key, clip)
        yield
        with self._open(key.model, seen, options) as session:
            stages = {**seen.video.stages, **session.stages}
            emit({**_viewed(session), "duration": seen.duration, "aspect": seen.aspect, "stages_ms": _rounded(stages)})

    def view_live(self, stream: Stream, emit: Emit) -> Generator[None, None, None]:
        """What is kept of a stream as it is: emits the same as :meth:`view`."""
        with _used_alone(stream):
            _take_in(stream)
            session = stream.live.session()
            yield
            stages = _rounded(session.stages)
            emit({**_viewed(session), "duration": None, "aspect": session.aspect, "stages_ms": stages})

    def _see(self, key: VideoKey, clip: DecodedClip | None) -> Seen:
        if key in self._videos:
            return _used(self._videos, key)
        if clip is None:
            raise EvictedError
        llm = self.models[key.model]
        size = clip.frame_size if llm.bundle.manifest.video.budget and llm.frame_size is None else None
        video = llm.encode(clip, frames=len(clip.frames), frame_size=size)
        self._metrics.add("tango:videos_encoded_total")
        seen = Seen(video, clip.duration, clip.aspect)
        _put(self._videos, key, seen, self._most_videos)
        return seen

    def _open(self, model: str, seen: Seen, options: VideoOptions) -> Session:
        return self.models[model].session(seen.video, retention_ratio=options.retention_ratio, prune=options.prune)

    def _write(
        self, request: ChatRequest, stream: AnswerStream, emit: Emit, arrived: float, cached: int
    ) -> Generator[None, None, None]:
        model, stop, first = request.model, StopTexts(request.stop), True
        with stream:
            for piece in stop.cut(iter(stream.turn, None)):
                if first:
                    self._metrics.observe("vllm:time_to_first_token_seconds", monotonic() - arrived, model_name=model)
                    first = False
                if piece:
                    emit(piece)
                yield
        answer = stream.answer
        finish = "stop" if stop.met or answer.finish == "stop" else "length"
        self._metrics.observe("vllm:e2e_request_latency_seconds", monotonic() - arrived, model_name=model)
        if answer.live is not None and answer.live.lag is not None:
            self._metrics.observe("tango:stream_answer_lag_seconds", answer.live.lag, model_name=model)
        self._metrics.add("vllm:request_success_total", model_name=model, finished_reason=finish)
        self._metrics.add("vllm:prompt_tokens_total", answer.prompt_tokens, model_name=model)
        self._metrics.add("vllm:generation_tokens_total", len(answer.ids), model_name=model)
        self._metrics.add("tango:video_tokens_seen_total", answer.total, model_name=model)
        self._metrics.add("tango:video_tokens_kept_total", answer.kept, model_name=model)
        emit(Ending(answer, finish, cached))


def _sampling(request: ChatRequest) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_p", "seed", "json_schema")
    return {name: getattr(request, name) for name in names}


def _rounded(stages: Mapping[str, float]) -> dict[str, float]:
    return {name: round(ms, 3) for name, ms in stages.items()}


@contextmanager
def _used_alone(stream: Stream) -> Iterator[None]:
    """Keeps a stream open; the worker does one such job of a stream at a time."""
    stream.in_use = True
    try:
        yield
    finally:
        stream.in_use = False


def _take_in(stream: Stream) -> None:
    """Encodes what came of a stream.

    Raises:
        ApiError: It has no frames.
    """
    stream.take_in(0)
    if not stream.live.window.held:
        if stream.over:
            raise ApiError(400, stream.error or f"{stream.name} ended before its first frames", "url")
        raise ApiError(503, f"{stream.name} has no frames yet; ask again", headers={"Retry-After": "1"})


def _viewed(session: Session) -> dict[str, Any]:
    """What a session kept: a digit for each token of each step, 0 dropped, 1 salient, 2 merged; and its salience."""
    (trace, salience), shape = session.read_trace(), session.shape
    kinds = np.zeros(shape.total, np.uint8)
    kinds[trace.indices] = np.where(trace.merged, 2, 1)
    return {
        "frames": session.frames[:: shape.frames_per_step],
        "seconds": session.seconds[:: shape.frames_per_step].tolist(),
        "grid": list(shape.grid),
        "kept": session.kept,
        "total": session.total,
        "kinds": ["".join(map(str, row)) for row in kinds.reshape(shape.steps, -1).tolist()],
        "salience": _levels(salience),
        "segments": trace.segments.tolist(),
    }


def _levels(salience: np.ndarray[Any, Any]) -> list[str]:
    """Salience [T, L] as two hexadecimal digits a token: its rank among all tokens."""
    ranks = np.empty(salience.size)
    ranks[np.argsort(salience, axis=None, kind="stable")] = np.linspace(0, 255, salience.size)
    return [row.astype(np.uint8).tobytes().hex() for row in ranks.reshape(len(salience), -1)]


def _used(kept: OrderedDict[Any, _V], key: Any) -> _V:
    kept.move_to_end(key)
    return kept[key]


def _put(kept: OrderedDict[Any, _V], key: Any, value: _V, most: int) -> None:
    """Keeps a value, and forgets the one that was not used for the longest time; who uses that still has it."""
    kept[key] = value
    while len(kept) > most:
        kept.popitem(last=False)
