"""A model that answers questions about one video after the other, while the next ones are decoded."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from tango_plugins import TangoError
from tango_plugins.decoder import MAX_SEQUENCES
from tango_runtime.backends.registry import select
from tango_runtime.batch.answers import Answered, Trial
from tango_runtime.batch.decoding import Decoders
from tango_runtime.batch.questions import AskedVideo, Failure, Question
from tango_runtime.bundle import MANIFEST, Bundle, sha256
from tango_runtime.pipeline.answer import Answer
from tango_runtime.pipeline.encoded import EncodedVideo
from tango_runtime.pipeline.generate import Limits
from tango_runtime.pipeline.sampling import Sampler
from tango_runtime.pipeline.together import finished_together
from tango_runtime.pipeline.video_llm import VideoLLM
from tango_runtime.video.decoded import DecodedVideo
from tango_runtime.video.shape import FrameOptions

_T = TypeVar("_T")

#: What comes of a question in a trial.
Outcome = Answered | Failure
Outcomes = Iterator[Outcome]

_Asked = tuple[Trial, tuple[Question, ...]]


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are drawn: keywords of :meth:`tango_runtime.Session.ask`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Settings:
    """How a batch is answered.

    Attributes:
        bundles: Folders of the bundles, of which each answers every question.
        retention_ratios: Fractions of the video tokens to be kept, each for every question; None keeps all tokens.
            None at all stand for the bundle's own.
        video: How videos are sampled.
        sampling: How answers are drawn.
    """

    bundles: tuple[Path, ...]
    retention_ratios: tuple[float | None, ...]
    video: FrameOptions = field(default_factory=FrameOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def trials(self) -> list[Trial]:
        """Every way to answer a question: the bundles, and for each of them the ratios.

        Raises:
            TangoError: A bundle is not whole, two of them take different frames or have one name, or an option is out
                of range.
        """
        first, names, trials = Bundle.load(self.bundles[0]), set(), []
        sampling = self.sampling
        Sampler(sampling.temperature, sampling.top_p, sampling.seed)
        for folder in self.bundles:
            bundle = Bundle.load(folder)
            Limits.of(bundle.manifest, sampling.max_new_tokens)
            if bundle.manifest.video != first.manifest.video:
                raise TangoError(
                    f"{folder} takes other frames than {self.bundles[0]}",
                    "answer with each of them in a run of its own",
                )
            name = folder.resolve().name
            if name in names:
                raise TangoError(f"two bundles are called {name}", "rename a folder, or give it once")
            names.add(name)
            trials += [Trial(name, self._digest(bundle), ratio) for ratio in self._ratios(bundle)]
        return trials

    def _ratios(self, bundle: Bundle) -> list[float | None]:
        params = bundle.manifest.params
        ratios = self.retention_ratios or (params.retention_ratio,)
        return list(dict.fromkeys(None if ratio is None else params.at(ratio).retention_ratio for ratio in ratios))

    def _digest(self, bundle: Bundle) -> str:
        options = asdict(self.video) | asdict(self.sampling) | {"bundle": sha256(bundle.path / MANIFEST)}
        return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Task:
    """A video, and what is still to be asked about it.

    Attributes:
        video: The video.
        asked: For each trial its questions, at least one.
    """

    video: AskedVideo
    asked: tuple[_Asked, ...]

    def __len__(self) -> int:
        """Number of answers that are missing."""
        return sum(len(questions) for _, questions in self.asked)

    def failures(self, error: TangoError) -> list[Failure]:
        """What comes of a video that cannot be read: each of its questions fails, in whatever trials."""
        questions = dict.fromkeys(question for _, questions in self.asked for question in questions)
        return [_failure(self.video, question, error) for question in questions]


class Worker:
    """Answers questions about the videos that are added, in the order in which they are added.

    Its processes decode from the beginning, so the first videos can be ready when the model is.

    Args:
        settings: How.
        backend: ``auto``, or the name of a backend.
        decoders: Processes that decode videos in software.
        gpu_decoders: Processes that decode videos on the GPU. Without any process, a video is decoded when it is added.
        threads: Threads of one operator on a CPU; 0 takes one for each core.

    Attributes:
        busy: Seconds that the models worked.
        early: Videos that may be added before :meth:`load`: ``depth``, if there are processes that decode them.
        depth: Videos to add before one is answered: as many are decoded or ready, and none is waited for.

    Raises:
        TangoError: A bundle is not whole.
    """

    def __init__(
        self, settings: Settings, backend: str = "auto", *, decoders: int = 0, gpu_decoders: int = 0, threads: int = 0
    ) -> None:
        self._settings, self.busy = settings, 0.0
        self._bundles = [Bundle.load(folder) for folder in settings.bundles]
        self._select = partial(select, backend=backend, threads=threads, nvdec=gpu_decoders > 0)
        self._llms: dict[str, VideoLLM] = {}
        self._waiting: deque[tuple[Task, Future[DecodedVideo]]] = deque()
        self._ahead: EncodedVideo | None = None  # by the first model of the first task that waits
        self._decoders = Decoders(self._bundles[0].manifest, settings.video, decoders, gpu_decoders)
        self.depth = 2 * len(self._decoders) + 1
        self.early = self.depth if len(self._decoders) else 0

    def load(self) -> None:
        """Loads the models; the worker is closed if it cannot.

        Raises:
            TangoError: The backend cannot run a bundle, or has no GPU that decodes.
        """
        try:
            for bundle in self._bundles:
                llm = VideoLLM(bundle, self._select(bundle), MAX_SEQUENCES)
                self._llms[bundle.path.resolve().name] = llm
            first = next(iter(self._llms.values()))
            self._decoders.ready(first.frame_size)
        except BaseException:
            self.close()
            raise

    @property
    def description(self) -> str:
        """What runs the graphs, in one line."""
        first = next(iter(self._llms.values()))
        return first.backend + (f" ({first.fallback_reason})" if first.fallback_reason else "")

    def __len__(self) -> int:
        """Videos that were added and are not answered."""
        return len(self._waiting)

    def add(self, task: Task) -> None:
        """Begins to decode a video."""
        self._waiting.append((task, self._decoders.submit(task.video.path)))

    def answer_next(self) -> Outcomes:
        """Answers the questions about the video that was added first, each when it is asked for.

        The last answer is given when the next video is on its way through the vision graph: so a GPU has work while the
        answer is written and the next questions are prepared.
        """
        before: Outcome | None = None
        for outcome in self._answer_first():
            if before:
                yield before
            before = outcome
        self._look_ahead()
        if before:
            yield before

    def close(self) -> None:
        """Ends the processes."""
        self._decoders.close()

    def _answer_first(self) -> Outcomes:
        (task, future), (ahead, self._ahead) = self._waiting.popleft(), (self._ahead, None)
        try:
            decoded = future.result()
        except TangoError as error:
            yield from task.failures(error)
            return
        for bundle, asked in groupby(task.asked, key=lambda entry: entry[0].bundle):
            yield from self._answer(task.video, ahead or decoded, self._llms[bundle], list(asked))
            ahead = None

    def _look_ahead(self) -> None:
        """Has the next video encoded, if it is decoded; whatever is wrong with it is found again when it is asked."""
        if not self._waiting or not self._waiting[0][1].done():
            return
        task, future = self._waiting[0]
        llm = self._llms[task.asked[0][0].bundle]
        with suppress(TangoError):
            self._ahead = self._timed(lambda: llm.encode(future.result()))

    def _answer(
        self, video: AskedVideo, source: DecodedVideo | EncodedVideo, llm: VideoLLM, asked: Sequence[_Asked]
    ) -> Outcomes:
        """Answers the questions of a bundle's trials; where they need several sessions, the frames are encoded once."""
        if llm.video_first:
            sessions = list(asked)
        else:
            sessions = [(trial, (question,)) for trial, questions in asked for question in questions]
        if len(sessions) > 1 and isinstance(source, DecodedVideo):
            decoded = source
            try:
                source = self._timed(lambda: llm.encode(decoded))
            except TangoError as error:
                yield from (_failure(video, question, error, trial) for trial, some in asked for question in some)
                return
        for trial, questions in sessions:
            yield from self._ask(llm, video, source, trial, questions)

    def _ask(
        self,
        llm: VideoLLM,
        video: AskedVideo,
        source: DecodedVideo | EncodedVideo,
        trial: Trial,
        questions: Sequence[Question],
    ) -> Outcomes:
        ratio, sampling = trial.retention_ratio, asdict(self._settings.sampling)
        try:
            session = self._timed(lambda: llm.session(source, retention_ratio=ratio, prune=ratio is not None))
        except TangoError as error:
            yield from (_failure(video, question, error, trial) for question in questions)
            return
        with closing(session):
            streams = (partial(session.stream, question.text, **sampling) for question in questions)
            for question, answer in zip(questions, finished_together(streams, llm.sequences, self._timed), strict=True):
                if isinstance(answer, TangoError):
                    yield _failure(video, question, answer, trial)
                else:
                    yield _answered(video, question, answer, trial)

    def _timed(self, work: Callable[[], _T]) -> _T:
        begin = time.perf_counter()
        try:
            return work()
        finally:
            self.busy += time.perf_counter() - begin


def _answered(video: AskedVideo, question: Question, answer: Answer, trial: Trial) -> Answered:
    return Answered(
        question.id,
        video.name,
        question.text,
        answer.text,
        answer.finish,
        trial.bundle,
        trial.retention_ratio,
        answer.kept,
        answer.total,
        trial.settings,
    )


def _failure(video: AskedVideo, question: Question, error: TangoError, trial: Trial | None = None) -> Failure:
    where = (trial.bundle, trial.retention_ratio) if trial else (None, None)
    return Failure(question.line, error.message, error.hint, question.id, video.name, question.text, *where)
