"""The chain: a video and a question → vision → prune → splice → prefill → decode → an answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from tango_plugins import PruneParams, TangoError
from tango_runtime.backends.base import Backend, PrunedTokens, Tensor, TimingEvent, Trace
from tango_runtime.backends.registry import select
from tango_runtime.bundle import Bundle
from tango_runtime.pipeline.prompt import Prompt
from tango_runtime.pipeline.sampling import Sampler
from tango_runtime.util.console import OnProgress
from tango_runtime.video import Source, TimedFrame, sample
from tango_runtime.video.preprocess import preprocess

if TYPE_CHECKING:
    from tango_runtime.report.report import Report

#: Why an answer ended: a stop token, ``max_new_tokens``, or the end of the bundle's context.
Finish = Literal["stop", "length", "context"]


@dataclass
class Answer:
    """An answer and what it was read from; complete when its stream has ended.

    Attributes:
        question: As asked.
        retention_ratio: Fraction of the video tokens to be kept, None where nothing was pruned.
        text: The answer.
        ids: Its token ids, without a stop token.
        finish: Why it ended.
        kept: Video tokens that the decoder saw, K.
        total: Video tokens that the vision graph gave, F·L.
        prompt_tokens: Positions of the prompt, video tokens included.
        stages: Milliseconds of each stage, in order: ``video`` (decoding and resizing), ``vision``, ``prune`` (unless
            every token is kept), ``prefill`` (up to the first token), ``decode`` (all later tokens).
        indices: [K] int32, flat index f·L + l of each kept token.
        merged: [K] bool, True for a merged context token, False for one kept as it is.
        segments: [S, 2] int32, first frame and one past the last.
        frames: [F, size, size, 3] uint8, as the vision graph took them; where that is a GPU, in page-locked memory,
            which stays locked as long as the array or a view of it is kept.
        seconds: [F] fp32, time of each frame.
        salience: [F, L] fp32.
        aspect: Width over height of the source's frames.
    """

    question: str
    retention_ratio: float | None
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: Finish = "length"
    kept: int = 0
    total: int = 0
    prompt_tokens: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    indices: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    merged: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    segments: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    frames: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 0, 0, 3), np.uint8))
    seconds: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    salience: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    aspect: float = 1.0

    @property
    def first_token_ms(self) -> float:
        """Milliseconds from the first frame to the first token."""
        return sum(ms for name, ms in self.stages.items() if name != "decode")

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second while decoding; 0 where there was one token or none."""
        decode = self.stages.get("decode", 0.0)
        return 1e3 * max(len(self.ids) - 1, 0) / decode if decode else 0.0


@dataclass(frozen=True)
class _Request:
    """A question, checked and ready to be answered once: ``timed`` is read to its end."""

    timed: Iterator[TimedFrame]
    frames: int
    prompt: tuple[NDArray[np.int64], NDArray[np.int64]]
    params: PruneParams | None
    sampler: Sampler
    max_new_tokens: int
    on_progress: OnProgress


class AnswerStream(Iterator[str]):
    """Pieces of an answer's text as they come; :attr:`answer` fills up on the way."""

    def __init__(self, answer: Answer, pieces: Iterator[str]) -> None:
        self.answer = answer
        self._pieces = pieces

    def __next__(self) -> str:
        return next(self._pieces)


class VideoLLM:
    """A bundle, loaded and ready to answer questions about videos.

    Args:
        bundle: Folder of a bundle that ``tango-export`` made, or the bundle itself.
        backend: ``auto``, one of ``tango_runtime.backends.registry.BACKENDS``, or a backend that is loaded.

    Raises:
        TangoError: The bundle is not whole, or the engine cannot run it.
    """

    def __init__(self, bundle: str | Path | Bundle, backend: str | Backend = "auto") -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        self._backend = select(self.bundle, backend) if isinstance(backend, str) else backend
        self._prompt = Prompt.of(self.bundle)
        self._latest: Answer | None = None  # whose keys and values the engine holds

    @property
    def backend(self) -> str:
        """What runs the graphs, in one line."""
        return self._backend.description

    @property
    def fallback_reason(self) -> str:
        """Why ``auto`` took no faster engine; empty where it took the fastest, or one was asked for by name."""
        return self._backend.fallback_reason

    def generate(
        self,
        source: Source,
        question: str,
        *,
        frames: int | None = None,
        retention_ratio: float | None = None,
        prune: bool = True,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        fps: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Answer:
        """Answers a question about a video; arguments are those of :meth:`stream`."""
        stream = self.stream(
            source,
            question,
            frames=frames,
            retention_ratio=retention_ratio,
            prune=prune,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            fps=fps,
            on_progress=on_progress,
        )
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        source: Source,
        question: str,
        *,
        frames: int | None = None,
        retention_ratio: float | None = None,
        prune: bool = True,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        fps: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> AnswerStream:
        """Answers a question about a video, piece by piece.

        Args:
            source: A video file, a folder of images, a uint8 array [N, H, W, 3], or any iterable of (seconds, uint8
                [H, W, 3]); see :func:`tango_runtime.video.sample`.
            question: Plain text.
            frames: Frames sampled uniformly, F; the bundle's number by default.
            retention_ratio: Fraction of the video tokens kept; the bundle's by default.
            prune: False keeps every token.
            max_new_tokens: Most tokens of the answer.
            temperature: 0 is greedy.
            top_p: Nucleus of the sampling.
            seed: Of the sampling.
            fps: Frames a second of a folder or an array.
            on_progress: Told, while the vision graph works, how many more of the frames are done; a GPU may still be at
                work on them.

        Raises:
            TangoError: An argument is out of range, the video cannot be read or is shorter than ``frames``, or the
                prompt is longer than the bundle's context.
        """
        if max_new_tokens < 1:
            raise TangoError(f"max_new_tokens is {max_new_tokens}", "ask for at least one, --max-new-tokens 1")
        params = self.bundle.manifest.params
        params = params if retention_ratio is None else params.at(retention_ratio)
        count = self.bundle.manifest.video.frames if frames is None else frames
        request = _Request(
            timed=sample(source, count, fps=fps),
            frames=count,
            prompt=self._prompt.encode(question),
            params=params if prune else None,
            sampler=Sampler(temperature, top_p, seed),
            max_new_tokens=max_new_tokens,
            on_progress=on_progress or (lambda frames: None),
        )
        total = count * self.bundle.manifest.video.tokens_per_frame
        answer = Answer(question, params.retention_ratio if prune else None, total=total)
        self._require_room(request, 0 if prune else total)
        return AnswerStream(answer, self._texts(answer, request))

    def report(self, answer: Answer, video: str) -> Report:
        """What a run kept, ready to be written.

        Args:
            answer: A finished answer.
            video: What to call the video.
        """
        from importlib.metadata import version

        from tango_runtime.report.report import Report

        return Report(
            video=video,
            question=answer.question,
            answer=answer.text,
            bundle=self.bundle.path.resolve().name,
            engine=self.backend,
            version=version("tango-edge"),
            retention_ratio=answer.retention_ratio,
            frames=answer.frames,
            seconds=answer.seconds,
            aspect=answer.aspect,
            grid=self.bundle.manifest.params.grid,
            salience=answer.salience,
            indices=answer.indices,
            merged=answer.merged,
            segments=answer.segments,
            prompt_tokens=answer.prompt_tokens,
            generated_tokens=len(answer.ids),
            stages=list(answer.stages.items()),
            tokens_per_second=answer.tokens_per_second,
        )

    def _texts(self, answer: Answer, request: _Request) -> Iterator[str]:
        for piece in self._prompt.stream(self._ids(answer, request)):
            answer.text += piece
            yield piece

    def _ids(self, answer: Answer, request: _Request) -> Iterator[int]:
        """Runs the chain; gives the answer's ids one by one, up to a stop token."""
        spans = _Spans(self._backend)
        kept, salience = self._see(answer, request, spans)
        answer.prompt_tokens = self._require_room(request, answer.kept)
        capacity = min(answer.prompt_tokens + request.max_new_tokens, self.bundle.manifest.decoder.context)
        self._latest = answer
        with spans.of("prefill"):
            token = request.sampler(self._backend.prefill(self._splice(request, kept.tokens), capacity))
        answer.stages |= spans.milliseconds()
        yield from self._said(answer, request, token)
        self._require_latest(answer)
        self._note_trace(answer, kept, salience)

    def _said(self, answer: Answer, request: _Request, token: int) -> Iterator[int]:
        """The answer's ids from the first token on, each decoded when it is asked for."""
        context, stop = self.bundle.manifest.decoder.context, set(self.bundle.manifest.prompt.stop)
        answer.stages["decode"] = 0.0  # told even where one token is all there is
        while token not in stop:
            answer.ids.append(token)
            yield token
            if len(answer.ids) == request.max_new_tokens:
                return
            if answer.prompt_tokens + len(answer.ids) == context:
                answer.finish = "context"
                return
            self._require_latest(answer)
            with _timed(answer, "decode"):
                token = request.sampler(self._backend.decode(token))
        answer.finish = "stop"

    def _require_latest(self, answer: Answer) -> None:
        """Refuses to go on with an answer whose tensors another one has overwritten."""
        if self._latest is not answer:
            raise TangoError(
                "another answer was begun before this one ended", "read a stream to its end, or load a second VideoLLM"
            )

    def _see(self, answer: Answer, request: _Request, spans: _Spans) -> tuple[PrunedTokens, Tensor]:
        """Decodes the video, runs the vision graph and prunes → what is kept, and the salience."""
        with _timed(answer, "video"):
            timed, size = _noting_aspect(answer, request.timed), self.bundle.manifest.video.size[0]
            room = self._backend.frame_buffer(request.frames, size)
            answer.frames, answer.seconds = preprocess(timed, size, room)
        with spans.of("vision"):
            features, salience = self._backend.vision(answer.frames, request.on_progress)
        if request.params is None:
            kept = _all(self._backend.flatten(features), answer.total)
        else:
            with spans.of("prune"):
                kept = self._backend.prune(features, salience, answer.seconds, request.params)
        answer.kept = kept.count
        return kept, salience

    def _note_trace(self, answer: Answer, kept: PrunedTokens, salience: Tensor) -> None:
        """Takes what a report needs from the engine, which no token of the answer waits for."""
        trace = kept.trace()
        answer.indices, answer.merged, answer.segments = trace.indices, trace.merged, trace.segments
        answer.salience = self._backend.to_host(salience)

    def _splice(self, request: _Request, tokens: Tensor) -> list[Tensor]:
        """Embeddings of the prompt with the video's tokens in their place."""
        before, after = request.prompt
        after_video = np.array(self.bundle.manifest.prompt.after_video, np.int64)
        return [self._backend.embed(before), tokens, self._backend.embed(np.concatenate((after_video, after)))]

    def _require_room(self, request: _Request, video: int) -> int:
        """Length of the prompt with so many video tokens; refused where no token of an answer fits behind it."""
        context = self.bundle.manifest.decoder.context
        text = sum(map(len, request.prompt)) + len(self.bundle.manifest.prompt.after_video)
        if text + video >= context:
            raise TangoError(
                f"the prompt takes {text + video} tokens, {video} of them video; the bundle's context is {context}",
                "keep fewer tokens (--retention-ratio, --frames), ask less, or export with a larger --context",
            )
        return text + video


class _Spans:
    """How long stages took, between marks of the engine: so none of them need wait until its work is done."""

    def __init__(self, stages: Backend) -> None:
        self._backend = stages
        self._marks: dict[str, tuple[TimingEvent, TimingEvent]] = {}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        begin = self._backend.record_event()
        yield
        self._marks[stage] = begin, self._backend.record_event()

    def milliseconds(self) -> dict[str, float]:
        """Of each stage; waits for the last."""
        return {stage: end.elapsed_ms(begin) for stage, (begin, end) in self._marks.items()}


def _all(tokens: Tensor, total: int) -> PrunedTokens:
    """What is left when nothing is pruned."""
    trace = Trace(np.arange(total, dtype=np.int32), np.zeros(total, np.bool_), np.zeros((0, 2), np.int32))
    return PrunedTokens(tokens, total, lambda: trace)


def _noting_aspect(answer: Answer, timed: Iterator[TimedFrame]) -> Iterator[TimedFrame]:
    for seconds, frame in timed:
        answer.aspect = frame.shape[1] / frame.shape[0]
        yield seconds, frame


@contextmanager
def _timed(answer: Answer, stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    answer.stages[stage] = answer.stages.get(stage, 0.0) + 1e3 * (time.perf_counter() - begin)
