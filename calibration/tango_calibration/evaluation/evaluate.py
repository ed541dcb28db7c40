"""Asks a model questions about videos, given the tokens that each trial keeps."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tango_calibration.data.dataset import Video
from tango_calibration.data.judging import is_correct
from tango_calibration.evaluation import methods
from tango_calibration.evaluation.methods import Selection, VideoFeatures
from tango_calibration.parallel import map_in_parallel
from tango_plugins import PruneParams, TangoError
from tango_plugins.reference import Reals
from tango_plugins.thinning import Thinning
from tango_runtime.backends.registry import select
from tango_runtime.bundle import Bundle, Manifest
from tango_runtime.pipeline.generate import Limits, PromptCache, decode_loop
from tango_runtime.pipeline.positions import prompt_positions
from tango_runtime.pipeline.prompt import Prompt, describe
from tango_runtime.pipeline.sampling import Sampler
from tango_runtime.pipeline.timer import StageTimer
from tango_runtime.pipeline.video_rows import video_rows
from tango_runtime.util.console import OnProgress
from tango_runtime.video import Clock, FrameStream, Sampling, Source
from tango_runtime.video.preprocess import preprocess
from tango_runtime.video.shape import ClipShape, FrameOptions, choose_size, open_clip


@dataclass(frozen=True, order=True)
class Trial:
    """A way to keep tokens.

    Attributes:
        method: One of ``methods.METHODS``.
        retention_ratio: Fraction that Tango is asked to keep; 1 for ``all`` and ``none``, which ignore it.

    Raises:
        TangoError: The method does not exist.
    """

    method: str
    retention_ratio: float = 1.0

    def __post_init__(self) -> None:
        methods.check(self.method)


#: The trial that others are compared with.
ALL = Trial("all")

#: The model without a video. If ``all`` is no better, the other trials mean nothing.
NONE = Trial("none")


def trials_of(method_names: Iterable[str], retention_ratios: Iterable[float]) -> list[Trial]:
    """``ALL`` and ``NONE``, then every method at every ratio, without duplicates.

    Raises:
        TangoError: A method does not exist.
    """
    names = list(method_names)
    given = [Trial(name, ratio) for ratio in retention_ratios for name in names]
    return list(dict.fromkeys([ALL, NONE, *(t for t in given if t.method not in (ALL.method, NONE.method))]))


@dataclass(frozen=True)
class Record:
    """One question, answered from the tokens that one trial kept.

    Attributes:
        video: Name of the video.
        question: Id of the question.
        text: The question as the model reads it.
        type: Type of the question.
        tags: Tags of the question.
        trial: The trial.
        answer: The model's answer.
        correct: Whether it is correct.
        kept: Number of kept video tokens, K; the same for all questions about a video in a trial.
        total: Number of video tokens, F·L.
        prune_ms: Time to choose the tokens, in milliseconds.
        prefill_ms: Time to prefill the text before the video and the video's tokens, in milliseconds.
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


class Evaluator(Protocol):
    """A model under evaluation; its ``str`` says what runs it."""

    def open_video(self, source: Source, frames: int) -> tuple[FrameStream, ClipShape]:
        """The sampled frames of a video, and what they become."""

    def encode_video(self, frames: NDArray[np.uint8]) -> tuple[Reals, Reals]:
        """Steps of frames, as :meth:`ClipShape.as_steps` gives them → features [F, L, D] and salience [F, L]."""

    def answer(
        self, kept: Selection, shape: ClipShape, clock: Clock, questions: Sequence[str]
    ) -> tuple[list[str], float]:
        """Answers each question independently, after one prefill of the kept tokens.

        Args:
            kept: The video's tokens, perhaps none.
            shape: Shape of the clip before pruning.
            clock: Times of its frames.
            questions: The questions.

        Returns:
            (an answer to each question, milliseconds of the prefill).
        """


class BundleEvaluator:
    """Evaluates a bundle, with greedy answers.

    Args:
        bundle: Folder of a bundle.
        backend: ``auto``, or the name of a backend.
        max_new_tokens: Maximum length of an answer.
        threads: Threads of one operator on a CPU; 0 uses one for each core.
        frame_size: (height, width) of the frames, for a bundle that takes any size.
        max_pixels: Maximum number of pixels of a frame, for such a bundle.
        sampling: Which frames of a video file are taken.

    Raises:
        TangoError: The bundle is damaged, the backend cannot run it, or its chat template puts the question before the
            video.
    """

    def __init__(
        self,
        bundle: str | Path,
        backend: str = "auto",
        *,
        max_new_tokens: int = 16,
        threads: int = 0,
        frame_size: tuple[int, int] | None = None,
        max_pixels: int | None = None,
        sampling: Sampling = "exact",
    ) -> None:
        self._bundle = Bundle.load(bundle)
        self._backend = select(self._bundle, backend, threads=threads)
        self._prompt = Prompt.of(self._bundle)
        self._max_new_tokens = max_new_tokens
        self._sampler = Sampler()
        self._options = FrameOptions(None, frame_size, max_pixels, sampling=sampling)

    def __str__(self) -> str:
        """The backend, in one line."""
        return self._backend.description

    def open_video(self, source: Source, frames: int) -> tuple[FrameStream, ClipShape]:
        """The sampled frames of a video, and what they become."""
        options = replace(self._options, frames=frames)
        return open_clip(self._bundle.manifest, source, options, self._backend.frame_size)

    def encode_video(self, frames: NDArray[np.uint8]) -> tuple[Reals, Reals]:
        """Steps of frames → features [F, L, D] and salience [F, L]."""
        features, salience = self._backend.vision(frames, lambda done: None)
        return self._backend.to_host(features), self._backend.to_host(salience)

    def answer(
        self, kept: Selection, shape: ClipShape, clock: Clock, questions: Sequence[str]
    ) -> tuple[list[str], float]:
        """Answers each question independently, after one prefill of the kept tokens; see :class:`Evaluator`.

        Raises:
            TangoError: A question contains a special token, or the prompt is longer than the bundle's context.
        """
        manifest, limits = self._bundle.manifest, Limits.of(self._bundle.manifest, self._max_new_tokens)
        before, afters = _encode(self._prompt, questions, describe(manifest.prompt.video_text, clock))
        video = video_rows(manifest, self._backend, kept.tokens, kept.indices)
        length = _require_room(manifest, limits, before, afters, len(video))
        pieces, newline = [self._backend.embed(before), video], manifest.prompt.after_video
        inner, whole = manifest.decoder.inner, len(kept.indices) == shape.total
        thinning = None if inner is None or whole else Thinning(len(before), len(video), inner.kept(len(video)))
        rotary = prompt_positions(manifest.decoder, len(before), shape, clock, kept.indices)
        with closing(PromptCache(self._backend, pieces, newline, length, limits.context, thinning, rotary)) as cache:
            cache.reserve(max(map(len, afters)) + self._max_new_tokens)
            begin = time.perf_counter()
            cache.prefill()
            prefill_ms = 1e3 * (time.perf_counter() - begin)
            return [self._answer(cache, after.tolist(), limits) for after in afters], prefill_ms

    def _answer(self, cache: PromptCache, question: list[int], limits: Limits) -> str:
        """The answer to a question that follows the video."""
        ids = list(decode_loop(cache, question, self._sampler, limits, [], StageTimer(self._backend)))
        return self._prompt.decode(ids).strip()


def _encode(prompt: Prompt, questions: Sequence[str], about: str) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """Token ids of the text before the video, which all questions share, and of the text after it for each question."""
    befores, afters = zip(*(prompt.encode(question, about) for question in questions), strict=True)
    if any(not np.array_equal(before, befores[0]) for before in befores):
        raise TangoError(
            "the chat template puts the question before the video", "use a model whose template puts it after the video"
        )
    return befores[0], list(afters)


def _require_room(
    manifest: Manifest, limits: Limits, before: NDArray[np.int64], afters: Sequence[NDArray[np.int64]], video: int
) -> int:
    """Returns the length of the prompt that all questions share, with ``video`` video tokens.

    Raises:
        TangoError: The longest prompt leaves no room for an answer.
    """
    length = len(before) + video + len(manifest.prompt.after_video)
    limits.require_room(length + max(map(len, afters)), video)
    return length


def check_room(
    bundle: Bundle,
    videos: Sequence[Video],
    *,
    frame_size: tuple[int, int] | None = None,
    max_pixels: int | None = None,
) -> None:
    """Checks all questions before the first video runs; the keywords are as in :class:`BundleEvaluator`.

    Raises:
        TangoError: A question contains a special token, or a prompt with all tokens is longer than the context.
    """
    prompt, manifest = Prompt.of(bundle), bundle.manifest
    for video in videos:
        zeros = Clock(np.zeros(video.frames), 0.0)  # of all times, the shortest to write
        try:
            found = video.frame_size if manifest.video.budget else None
            size = choose_size(manifest.video, video.frames, found, asked=frame_size, max_pixels=max_pixels)
            total = ClipShape.of(manifest, video.frames, size).rows(row_ends=manifest.prompt.row_end is not None)
            about = describe(manifest.prompt.video_text, zeros)
            before, afters = _encode(prompt, [question.text for question in video.questions], about)
            _require_room(manifest, Limits.of(manifest, 1), before, afters, total)
        except TangoError as error:
            raise TangoError(f"{video.name}: {error.message}", error.hint) from error


def evaluate(
    evaluator: Evaluator,
    videos: Sequence[Video],
    trials: Sequence[Trial],
    params: PruneParams,
    on_progress: OnProgress = lambda videos: None,
    *,
    seed: int = 0,
) -> list[Record]:
    """Asks every question about every video, once for each trial.

    A video is encoded once. Each trial keeps some of its tokens and prefills them once for all questions.

    Args:
        evaluator: The model.
        videos: Videos with questions.
        trials: The ways to keep tokens.
        params: Parameters of the operator; the trials set the retention ratio.
        on_progress: Called with the number of videos done since the last call.
        seed: Seed of random methods. Their draws for a video do not depend on other videos or trials.

    Returns:
        A record for each video, trial and question, nested in this order.

    Raises:
        TangoError: A video cannot be read, or the evaluator rejects it.
    """
    records = []
    for video in videos:
        records += _evaluate(evaluator, video, trials, params, seed)
        on_progress(1)
    return records


def _evaluate(
    evaluator: Evaluator, video: Video, trials: Sequence[Trial], params: PruneParams, seed: int
) -> list[Record]:
    stream, shape = evaluator.open_video(video.source, video.frames)
    batch = preprocess(stream, shape.size)
    encoded = evaluator.encode_video(shape.as_steps(batch.host_frames))
    features, params = VideoFeatures(*encoded, shape.step_seconds(batch.seconds)), params.on(shape.grid)

    @cache
    def select_tokens(trial: Trial) -> tuple[Selection, float]:
        count = features.total
        if trial.method not in methods.OWN_COUNT:
            count = len(select_tokens(Trial("tango", trial.retention_ratio))[0].indices)
        rng = np.random.default_rng((seed, zlib.crc32(f"{video.name} {trial.method} {trial.retention_ratio}".encode())))
        begin = time.perf_counter()
        selection = methods.keep(trial.method, features, params.at(trial.retention_ratio), count, rng)
        return selection, 1e3 * (time.perf_counter() - begin)

    records = []
    for trial in trials:
        selection, prune_ms = select_tokens(trial)
        asked = [question.text for question in video.questions]
        answers, prefill_ms = evaluator.answer(selection, shape, stream.clock, asked)
        counts = len(selection.indices), features.total
        for key, question, answer in zip(video.ids, video.questions, answers, strict=True):
            correct = is_correct(question, answer)
            about = video.name, key, question.text, question.type, question.tags
            records.append(Record(*about, trial, answer, correct, *counts, prune_ms, prefill_ms))
    return records


def evaluate_in_parallel(
    open_evaluator: Callable[[], Evaluator],
    videos: Sequence[Video],
    trials: Sequence[Trial],
    params: PruneParams,
    on_progress: OnProgress = lambda videos: None,
    *,
    jobs: int,
    ray: str | None = None,
    seed: int = 0,
    opened: Callable[[str], None] = lambda evaluator: None,
    on_failure: Callable[[Video, TangoError], None] | None = None,
) -> list[Record]:
    """As :func:`evaluate`, in several processes with an evaluator each.

    Args:
        open_evaluator: Opens an evaluator. It and the videos are pickled if there are several processes.
        videos: Videos with questions.
        trials: The ways to keep tokens.
        params: Parameters of the operator.
        on_progress: Called with the number of videos done since the last call.
        jobs: Number of processes; 1 uses this process.
        ray: Address of a Ray cluster that does it in their place, or ``local``.
        seed: Seed of random methods.
        opened: Called at the end with each distinct ``str`` of the evaluators.
        on_failure: Called at the end with each video that cannot be read or evaluated, and its error; it has no
            records. With None, the first such video ends the evaluation.

    Returns:
        The records of :func:`evaluate`, in the same order.

    Raises:
        TangoError: As in :func:`evaluate`, or a process died.
    """
    worker = partial(_open, open_evaluator, trials, params, seed, on_failure is not None)
    results = map_in_parallel(worker, videos, lambda video, result: on_progress(1), jobs=jobs, ray=ray)
    for evaluator in dict.fromkeys(evaluator for evaluator, *_ in results):
        opened(evaluator)
    for video, (_, _, failure) in zip(videos, results, strict=True):
        if on_failure and failure:
            on_failure(video, TangoError(*failure))
    return [record for _, records, _ in results for record in records]


#: ``str`` of the evaluator; the records of a video; message and hint of its failure.
_Result: TypeAlias = tuple[str, list[Record], tuple[str, str] | None]


def _open(
    open_evaluator: Callable[[], Evaluator],
    trials: Sequence[Trial],
    params: PruneParams,
    seed: int,
    survives: bool,
) -> Callable[[Video], _Result]:
    evaluator = open_evaluator()

    def work(video: Video) -> _Result:
        try:
            return str(evaluator), evaluate(evaluator, [video], trials, params, seed=seed), None
        except TangoError as error:
            if not survives:
                raise
            return str(evaluator), [], (error.message, error.hint)

    return work
