"""Asks a model about videos of which each trial keeps other tokens."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tango_calibration.data.dataset import Video, is_correct
from tango_calibration.evaluation import methods
from tango_calibration.evaluation.methods import Kept, Seen
from tango_calibration.parallel import spread
from tango_plugins import PruneParams, TangoError
from tango_plugins.reference import Reals
from tango_runtime.backends.registry import select
from tango_runtime.bundle import Bundle
from tango_runtime.pipeline.generate import Limits, PromptCache, decode_loop
from tango_runtime.pipeline.prompt import Prompt
from tango_runtime.pipeline.sampling import Sampler
from tango_runtime.pipeline.timer import StageTimer
from tango_runtime.util.console import OnProgress
from tango_runtime.video import sample
from tango_runtime.video.preprocess import preprocess


@dataclass(frozen=True, order=True)
class Trial:
    """A way to keep tokens.

    Attributes:
        method: One of ``methods.METHODS``.
        retention_ratio: Fraction that Tango is asked to keep; 1 for ``all`` and ``none``, which take none.

    Raises:
        TangoError: There is no such method.
    """

    method: str
    retention_ratio: float = 1.0

    def __post_init__(self) -> None:
        methods.check(self.method)


#: What every other trial is held against.
ALL = Trial("all")

#: What the questions alone tell: where ``all`` does no better, nothing can be said about the others.
NONE = Trial("none")


def trials_of(method_names: Iterable[str], retention_ratios: Iterable[float]) -> list[Trial]:
    """``ALL`` and ``NONE``, then every method at every ratio; none of them twice.

    Raises:
        TangoError: There is no such method.
    """
    names = list(method_names)
    given = [Trial(name, ratio) for ratio in retention_ratios for name in names]
    return list(dict.fromkeys([ALL, NONE, *(t for t in given if t.method not in (ALL.method, NONE.method))]))


@dataclass(frozen=True)
class Record:
    """One question, answered from what one trial kept of its video.

    Attributes:
        video: Name of the video.
        question: Id of the question.
        text: The question as the model read it.
        type: What it asks for.
        tags: What it is about.
        trial: The trial.
        answer: What the model said.
        correct: Whether that is right.
        kept: Video tokens that the model was given, K; the same for all questions of a video and trial.
        total: Video tokens that there were, F·L.
        prune_ms: Milliseconds it took to choose them.
        prefill_ms: Milliseconds of the prefill, text before the video and the video's tokens.
    """

    video: str
    question: str
    text: str
    type: str
    tags: tuple[str, ...]
    trial: Trial
    answer: str
    correct: bool
    kept: int
    total: int
    prune_ms: float
    prefill_ms: float


class Reader(Protocol):
    """What evaluation asks of a model; its ``str`` is told as what ran it."""

    @property
    def size(self) -> int:
        """Edge S of the frames that it takes, in pixels."""

    def see(self, frames: NDArray[np.uint8]) -> tuple[Reals, Reals]:
        """[F, S, S, 3] → features [F, L, D] and salience [F, L]."""

    def answer(self, tokens: Reals, questions: Sequence[str]) -> tuple[list[str], float]:
        """Answers each question by itself, behind one prefill of the video's tokens [K, D]; K may be 0.

        Returns:
            (an answer to each question, milliseconds of the prefill).
        """


class ChainReader:
    """A bundle as a reader, answering greedily.

    Args:
        bundle: Folder of a bundle.
        engine: ``auto``, or an engine by name.
        max_new_tokens: Most tokens of an answer.
        threads: Threads of one operator on a CPU; 0 takes one for each core.

    Raises:
        TangoError: The bundle is not whole, the engine cannot run it, or its chat template writes the question before
            the video.
    """

    def __init__(self, bundle: str | Path, engine: str = "auto", *, max_new_tokens: int = 16, threads: int = 0) -> None:
        self._bundle = Bundle.load(bundle)
        self._backend = select(self._bundle, engine, threads=threads)
        self._prompt = Prompt.of(self._bundle)
        self._max_new_tokens = max_new_tokens
        self._sampler = Sampler()
        self.size = self._bundle.manifest.video.size[0]

    def __str__(self) -> str:
        """The engine, in one line."""
        return self._backend.description

    def see(self, frames: NDArray[np.uint8]) -> tuple[Reals, Reals]:
        """[F, size, size, 3] → features [F, L, D] and salience [F, L]."""
        features, salience = self._backend.vision(frames, lambda done: None)
        return self._backend.to_host(features), self._backend.to_host(salience)

    def answer(self, tokens: Reals, questions: Sequence[str]) -> tuple[list[str], float]:
        """Answers each question by itself, behind one prefill of the video's tokens [K, D]; K may be 0.

        Returns:
            (an answer to each question, milliseconds of the prefill).

        Raises:
            TangoError: A question holds a special token, or the prompt is longer than the bundle's context.
        """
        before, afters = encode(self._prompt, questions)
        manifest, embed = self._bundle.manifest, self._backend.embed
        length = require_room(self._bundle, before, afters, len(tokens))
        pieces, newline = [embed(before), tokens], manifest.prompt.after_video
        limits = Limits.of(manifest, self._max_new_tokens)
        cache = PromptCache(self._backend, pieces, newline, length, manifest.decoder.context)
        try:
            cache.reserve(max(map(len, afters)) + self._max_new_tokens)
            begin = time.perf_counter()
            cache.prefill()
            prefill_ms = 1e3 * (time.perf_counter() - begin)
            return [self._answer(cache, after.tolist(), limits) for after in afters], prefill_ms
        finally:
            cache.close()

    def _answer(self, cache: PromptCache, question: list[int], limits: Limits) -> str:
        """The answer to a question that follows the video."""
        ids: list[int] = []
        for _ in decode_loop(cache, question, self._sampler, limits, ids, StageTimer(self._backend)):
            pass
        return self._prompt.decode(ids).strip()


def encode(prompt: Prompt, questions: Sequence[str]) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """Token ids of the text before the video, which all questions share, and of what follows it for each."""
    befores, afters = zip(*map(prompt.encode, questions), strict=True)
    if any(len(before) != len(befores[0]) or (before != befores[0]).any() for before in befores):
        raise TangoError(
            "the chat template writes the question before the video", "only templates that write it behind can be used"
        )
    return befores[0], list(afters)


def require_room(bundle: Bundle, before: NDArray[np.int64], afters: Sequence[NDArray[np.int64]], video: int) -> int:
    """Length of what the questions share with so many video tokens; refused where an answer does not fit behind it."""
    length = len(before) + video + len(bundle.manifest.prompt.after_video)
    longest, context = length + max(map(len, afters)), bundle.manifest.decoder.context
    if longest >= context:
        raise TangoError(
            f"the prompt takes {longest} tokens, {video} of them video; the bundle's context is {context}",
            "use fewer frames (--frames), or export with a larger --context",
        )
    return length


def check_room(bundle: Bundle, videos: Sequence[Video]) -> None:
    """Refuses, before the first video runs, a question that cannot be asked or does not fit behind all the tokens.

    Raises:
        TangoError: A question holds a special token, or one of the prompts is longer than the bundle's context.
    """
    prompt, L = Prompt.of(bundle), bundle.manifest.video.tokens_per_frame
    for video in videos:
        try:
            require_room(bundle, *encode(prompt, [q.text for q in video.questions]), video.frames * L)
        except TangoError as error:
            raise TangoError(f"{video.name}: {error.message}", error.hint) from error


def evaluate(
    reader: Reader,
    videos: Sequence[Video],
    trials: Sequence[Trial],
    params: PruneParams,
    on_progress: OnProgress = lambda videos: None,
    *,
    seed: int = 0,
) -> list[Record]:
    """Asks every question about every video, once for each trial.

    A video is seen once; each trial keeps its tokens and prefills them once for all of its questions.

    Args:
        reader: The model.
        videos: What to ask about.
        trials: The ways to keep tokens.
        params: Parameters of the operator; the trials set the retention ratio.
        on_progress: Told how many more videos are done.
        seed: Of the methods that draw; what they draw for a video does not hang on the other videos or trials.

    Returns:
        A record for each video, trial and question, in this order of nesting.

    Raises:
        TangoError: A video cannot be read, or the reader refuses it.
    """
    records = []
    for video in videos:
        records += _evaluate(reader, video, trials, params, seed)
        on_progress(1)
    return records


def _evaluate(reader: Reader, video: Video, trials: Sequence[Trial], params: PruneParams, seed: int) -> list[Record]:
    frames, seconds = preprocess(sample(video.source, video.frames), reader.size)
    seen = Seen(*reader.see(frames), seconds)

    @cache
    def kept_by(trial: Trial) -> tuple[Kept, float]:
        count = seen.total
        if trial.method not in methods.OWN_COUNT:
            count = len(kept_by(Trial("tango", trial.retention_ratio))[0].indices)
        rng = np.random.default_rng((seed, zlib.crc32(f"{video.name} {trial.method} {trial.retention_ratio}".encode())))
        begin = time.perf_counter()
        kept = methods.keep(trial.method, seen, params.at(trial.retention_ratio), count, rng)
        return kept, 1e3 * (time.perf_counter() - begin)

    records = []
    for trial in trials:
        kept, prune_ms = kept_by(trial)
        answers, prefill_ms = reader.answer(kept.tokens, [question.text for question in video.questions])
        for key, question, answer in zip(video.ids, video.questions, answers, strict=True):
            correct = is_correct(question, answer)
            counts = len(kept.indices), seen.total
            what = video.name, key, question.text, question.type, question.tags
            records.append(Record(*what, trial, answer, correct, *counts, prune_ms, prefill_ms))
    return records


def evaluate_in_parallel(
    open_reader: Callable[[], Reader],
    videos: Sequence[Video],
    trials: Sequence[Trial],
    params: PruneParams,
    on_progress: OnProgress = lambda videos: None,
    *,
    jobs: int,
    seed: int = 0,
    opened: Callable[[str], None] = lambda reader: None,
) -> list[Record]:
    """Does what :func:`evaluate` does in several processes, each with a reader of its own.

    Args:
        open_reader: Opens a reader; it and the videos are pickled where there are several processes.
        videos: What to ask about.
        trials: The ways to keep tokens.
        params: Parameters of the operator.
        on_progress: Told how many more videos are done.
        jobs: Processes; 1 is this one.
        seed: Of the methods that draw.
        opened: Told, in the end, the ``str`` of every reader, equal ones once.

    Returns:
        The records that :func:`evaluate` gives, in the same order.

    Raises:
        TangoError: As :func:`evaluate`, or a process has died.
    """
    results = spread(partial(_open, open_reader, trials, params, seed), videos, on_progress, jobs=jobs)
    for reader in dict.fromkeys(reader for reader, _ in results):
        opened(reader)
    return [record for _, records in results for record in records]


def _open(
    open_reader: Callable[[], Reader], trials: Sequence[Trial], params: PruneParams, seed: int
) -> Callable[[Video], tuple[str, list[Record]]]:
    reader = open_reader()
    return lambda video: (str(reader), evaluate(reader, [video], trials, params, seed=seed))
