"""One video, seen once, and any number of questions about it."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from tango_plugins import PruneParams, TangoError
from tango_plugins.thinning import Thinning
from tango_runtime.backends.base import Backend, PrunedTokens, Tensor, Trace
from tango_runtime.bundle import Manifest
from tango_runtime.pipeline.answer import Answer, AnswerStream
from tango_runtime.pipeline.encoded import EncodedClip
from tango_runtime.pipeline.generate import Limits, PromptCache, decode_loop
from tango_runtime.pipeline.positions import prompt_positions
from tango_runtime.pipeline.prompt import Prompt, describe
from tango_runtime.pipeline.sampling import Sampler
from tango_runtime.pipeline.steps import DecodeSteps
from tango_runtime.pipeline.structured import JsonSchema, SchemaCompiler
from tango_runtime.pipeline.timer import StageTimer


class Session:
    """Questions about one video, which was decoded, encoded and pruned once.

    A question costs only its own tokens, because the video's are in the session's key/value cache. Sessions of one
    ``VideoLLM``, and streams of one session, may take turns, in one thread: an answer that begins before another one
    of its session has ended has a cache of its own. :meth:`tango_runtime.VideoLLM.session` makes them; a session is a
    context manager.

    Attributes:
        kept: Number of video tokens that the decoder sees, K.
        rows: Number of positions that they take, row ends included.
        thinned: Number of rows that the upper layers see; None without inner pruning.
        total: Number of video tokens before pruning.
        shape: Size of the frames, number of steps, and token grid of a step.
        seconds: [F] fp32, time of each frame in seconds.
        off: [F] float64, seconds by which each keyframe is later than the frame of exact sampling; None for exact
            sampling.
        aspect: Width over height of the source's frames.
    """

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        prompt: Prompt,
        schemas: SchemaCompiler,
        clip: EncodedClip,
        params: PruneParams | None,
        timer: StageTimer,
        steps: DecodeSteps,
    ) -> None:
        self._backend, self._manifest, self._prompt, self._schemas = backend, manifest, prompt, schemas
        self._retention_ratio = params.retention_ratio if params else None
        self._timer = timer  # read with the first answer: until then nothing waits
        self.shape = shape = clip.shape
        self.seconds, self.aspect, self._salience = clip.seconds, clip.aspect, clip.salience
        self._read_frames = clip.read_frames
        self._frames: NDArray[np.uint8] | None = None
        self._clock, self.off = clip.clock, clip.off
        self._about = describe(manifest.prompt.video_text, self._clock)
        self.total = shape.total
        if params is None:
            self._pruned = _all_tokens(backend.flatten(clip.features), self.total)
            self._tokens, self.rows = self._with_row_ends()
        else:
            with timer.measure("prune"):
                seconds = shape.step_seconds(self.seconds)
                self._pruned = backend.prune(clip.features, self._salience, seconds, params)
                self._tokens, self.rows = self._with_row_ends()
        self.kept = self._pruned.count
        inner = manifest.decoder.inner if params else None
        self.thinned = inner.kept(self.rows) if inner else None
        self._answered = self._closed = False
        self._before: NDArray[np.int64] | None = None
        self._cache: PromptCache | None = None
        self._steps, self._in_use = steps, False  # the second: whether an answer that is not finished uses the cache
        self._trace: tuple[Trace, NDArray[np.float32]] | None = None
        self._turns: list[tuple[str, list[int]]] = []  # messages of the chat, and the ids of their answers
        self._chat_ids: list[int] = []  # all text of the chat

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        json_schema: JsonSchema | None = None,
    ) -> Answer:
        """Answers a question on its own, without the others. Arguments and errors are those of :meth:`stream`."""
        return finished(
            self.stream(
                question,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                json_schema=json_schema,
            )
        )

    def chat(
        self,
        message: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        json_schema: JsonSchema | None = None,
    ) -> Answer:
        """Continues the chat: the decoder also sees all earlier messages and answers.

        Arguments and errors are those of :meth:`stream`.
        """
        return finished(
            self.stream(
                message,
                chat=True,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                json_schema=json_schema,
            )
        )

    def stream(
        self,
        question: str,
        *,
        chat: bool = False,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        json_schema: JsonSchema | None = None,
    ) -> AnswerStream:
        """Answers a question, piece by piece.

        Args:
            question: The question, plain text.
            chat: Continue the chat. The message becomes part of it when its answer has been read to the end.
            history: Earlier (message, answer) pairs of a chat that the caller keeps.
            max_new_tokens: Maximum number of tokens of the answer.
            temperature: Sampling temperature; 0 is greedy.
            top_p: Probability mass that is sampled from (nucleus sampling), in (0, 1].
            seed: Seed of the sampling.
            json_schema: The answer is JSON that fits this schema (extra ``structured``).

        Raises:
            TangoError: An argument is out of range, the question holds a special token, the prompt is longer than the
                bundle's context, the schema cannot be followed, or the session is closed.
        """
        limits = Limits.of(self._manifest, max_new_tokens)
        sampler = Sampler(temperature, top_p, seed, self._schemas.start(json_schema))
        before, text = self.encode(question, chat=chat, history=history)
        answer = self.new_answer(question)
        limits.require_room(self._open(before).length + len(text), self.rows)
        turn = len(self._turns) if chat else None
        return AnswerStream(answer, self.answer_into(answer, before, text, sampler, limits, turn=turn))

    def encode(
        self, question: str, *, chat: bool = False, history: Sequence[tuple[str, str]] = ()
    ) -> tuple[NDArray[np.int64], list[int]]:
        """Token ids before and after the video; in a chat, with all earlier messages and answers."""
        if history:
            return self._prompt.encode_chat(history, question, self._about)
        before, after = self._prompt.encode(question, self._about)
        if not (chat and self._turns):
            return before, after.tolist()
        return before, [*self._chat_ids, *self._prompt.follow_up(question).tolist()]

    def new_answer(self, question: str) -> Answer:
        """An answer to be filled by :meth:`answer_into`."""
        return Answer(question, self._retention_ratio, total=self.total)

    def answer_into(
        self,
        answer: Answer,
        before: NDArray[np.int64],
        text: Sequence[int],
        sampler: Sampler,
        limits: Limits,
        *,
        turn: int | None = None,
    ) -> Generator[str, None, None]:
        """Fills an answer, and yields the text that each token completes, which may be empty.

        Args:
            answer: The answer to fill.
            before: Token ids before the video.
            text: Token ids after it, up to where the answer begins.
            sampler: What draws the tokens.
            limits: Where the answer ends.
            turn: The turn of the chat, from 0; None for a question outside of the chat.

        Raises:
            TangoError: As :meth:`stream`.
        """
        cache = self._open(before)
        limits.require_room(cache.length + len(text), self.rows)
        self._require_turn(turn)
        with self._own(cache, len(text) + limits.max_new_tokens) as own:
            for piece in self._prompt.stream(self._generate(answer, own, text, sampler, limits)):
                answer.text += piece
                yield piece
        self._require_turn(turn)
        if turn is not None:
            self._turns.append((answer.question, list(answer.ids)))
            self._chat_ids = [*text, *answer.ids]

    @property
    def frames(self) -> NDArray[np.uint8]:
        """[F, H, W, 3] uint8, as the vision graph took them. They are copied from the device if they are there."""
        if self._frames is None:
            self._frames = self._read_frames()
        return self._frames

    @property
    def stages(self) -> dict[str, float]:
        """Milliseconds of ``video``, ``vision`` and ``prune``; waits until they are done."""
        return {stage: ms for stage, ms in self._timer.read().items() if stage in ("video", "vision", "prune")}

    @property
    def history(self) -> tuple[tuple[str, str], ...]:
        """The chat so far, as (message, answer) pairs."""
        return tuple((message, self._prompt.decode(ids)) for message, ids in self._turns)

    def settle(self) -> None:
        """Copies what is still needed from the backend's shared tensors, before another video overwrites them."""
        _ = self.frames
        if self._closed:
            return
        self._open(self._prompt.encode("?")[0] if self._before is None else self._before).prefill()
        self.read_trace()

    def close(self) -> None:
        """Releases the key/value cache. Further questions are errors."""
        if self._cache is not None:
            self._cache.close()
        self._cache, self._closed = None, True

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _own(self, cache: PromptCache, text: int) -> Iterator[PromptCache]:
        """The cache for one answer; a fork of it, while another answer that is not finished uses it."""
        if self._in_use:
            with closing(cache.fork(text)) as fork:
                yield fork
            return
        self._in_use = True
        try:
            yield cache
        finally:
            self._in_use = False

    def _generate(
        self, answer: Answer, cache: PromptCache, text: Sequence[int], sampler: Sampler, limits: Limits
    ) -> Iterator[int]:
        """Runs the decode loop; gives the answer's ids one by one, up to a stop token."""
        timer = StageTimer(self._backend) if self._answered else self._timer
        self._answered = True
        answer.stages = timer.stages
        answer.kept, answer.rows, answer.thinned = self.kept, self.rows, self.thinned
        answer.seconds, answer.aspect, answer.shape, answer.off = self.seconds, self.aspect, self.shape, self.off
        answer.prompt_tokens = cache.length + len(text)
        answer.finish = yield from decode_loop(cache, text, sampler, limits, answer.ids, timer)
        trace, answer.salience = self.read_trace()
        answer.frames = self.frames
        answer.indices, answer.merged, answer.segments = trace.indices, trace.merged, trace.segments

    def _require_turn(self, turn: int | None) -> None:
        """Rejects a turn of the chat that another one has overtaken: its text does not have the other's."""
        if turn is not None and turn != len(self._turns):
            raise TangoError(
                "the chat went on before this message was answered",
                "read an answer of a chat to its end before the next",
            )

    def _open(self, before: NDArray[np.int64]) -> PromptCache:
        """The cache of what all questions share: the text before the video, and the video."""
        if self._closed:
            raise TangoError("the session is closed", "open another: llm.session(video)")
        if self._before is not None and not np.array_equal(self._before, before):
            raise TangoError(
                "the chat template writes the question before the video",
                "a session needs the video first: ask each question in a session of its own",
            )
        if self._cache is None:
            self._before, newline = before, self._manifest.prompt.after_video
            pieces = [self._backend.embed(before), self._tokens]
            length = len(before) + self.rows + len(newline)
            thinning = None if self.thinned is None else Thinning(len(before), self.rows, self.thinned)
            decoder, kept = self._manifest.decoder, self._pruned.indices
            if decoder.rotary is not None:
                kept = self._backend.to_host(kept)
            rotary = prompt_positions(decoder, len(before), self.shape, self._clock, kept)
            self._cache = PromptCache(
                self._backend, pieces, newline, length, decoder.context, thinning, rotary, self._steps
            )
            weakref.finalize(self, self._cache.close).atexit = False
        return self._cache

    def _with_row_ends(self) -> tuple[Tensor, int]:
        """What the decoder gets of the video, and how many positions that takes."""
        end = self._manifest.prompt.row_end
        if end is None:
            return self._pruned.tokens, self._pruned.count
        return self._backend.with_row_ends(self._pruned, self.shape.grid[1], end)

    def read_trace(self) -> tuple[Trace, NDArray[np.float32]]:
        """What was kept, and the salience [T, L] fp32 of every token. No token of an answer waits for it."""
        if self._trace is None:
            self._trace = self._pruned.trace(), self._backend.to_host(self._salience)
        return self._trace


def _all_tokens(tokens: Tensor, total: int) -> PrunedTokens:
    """What is kept when nothing is pruned."""
    indices = np.arange(total, dtype=np.int32)
    trace = Trace(indices, np.zeros(total, np.bool_), np.zeros((0, 2), np.int32))
    return PrunedTokens(tokens, indices, total, lambda: trace)


def finished(stream: AnswerStream) -> Answer:
    """The answer of a stream, read to its end."""
    for _ in stream:
        pass
    return stream.answer
