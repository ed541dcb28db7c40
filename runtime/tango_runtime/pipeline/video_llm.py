"""A loaded bundle that answers questions: video and question → vision → prune → prefill → decode → text."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tango_plugins import PruneParams, TangoError
from tango_plugins.version import package_version
from tango_runtime.backends.base import Backend
from tango_runtime.backends.registry import select
from tango_runtime.bundle import Bundle
from tango_runtime.pipeline.answer import Answer, AnswerStream
from tango_runtime.pipeline.encoded import EncodedClip, EncodedVideo, VideoRequest, encode
from tango_runtime.pipeline.feed import open_feed
from tango_runtime.pipeline.generate import Limits
from tango_runtime.pipeline.live import LiveVideo
from tango_runtime.pipeline.prompt import Prompt, describe
from tango_runtime.pipeline.sampling import Sampler
from tango_runtime.pipeline.session import Session, finished
from tango_runtime.pipeline.steps import DecodeSteps
from tango_runtime.pipeline.structured import JsonGrammar, JsonSchema, SchemaCompiler
from tango_runtime.pipeline.timer import StageTimer
from tango_runtime.pipeline.window import FrameWindow
from tango_runtime.util.console import OnProgress
from tango_runtime.util.numbers import is_integer
from tango_runtime.video import FrameStream, Sampling, Source
from tango_runtime.video.decoded import DecodedVideo, decode
from tango_runtime.video.shape import ClipShape, FrameOptions, choose_size, open_clip

if TYPE_CHECKING:
    from tango_runtime.report.report import Report


class VideoLLM:
    """A loaded bundle that answers questions about videos. Use it from one thread.

    Args:
        bundle: Folder of a bundle that ``tango-export`` made, or a loaded bundle.
        backend: ``auto``, a name in ``tango_runtime.backends.registry.BACKENDS``, or a loaded backend.
        sequences: Answers that may share a decode step, at most: streams of any sessions, read in turns. What an answer
            is does not depend on the others. More than one needs a GPU and device graphs.
        nvdec: Whether the GPU decodes the video files of questions and sessions, where it can: faster where there are
            few cores. Of a damaged file it shows frames that it makes up in part, and says nothing. A loaded backend
            was told already.

    Raises:
        TangoError: The bundle is incomplete, or the backend cannot run it, or has no GPU that decodes.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        backend: str | Backend = "auto",
        sequences: int = 1,
        *,
        nvdec: bool = False,
    ) -> None:
        if not is_integer(sequences) or sequences < 1:
            raise TangoError(f"sequences is {sequences!r}", "decode at least one at a time")
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        self._backend = select(self.bundle, backend, nvdec=nvdec) if isinstance(backend, str) else backend
        self._backend.batch(sequences)
        self._steps = DecodeSteps()
        self._prompt = Prompt.of(self.bundle)
        self._schemas = SchemaCompiler(self.bundle.text("tokenizer.json"), self.bundle.manifest.prompt.stop)
        self._latest: weakref.ref[Session] | None = None  # whose tensors the backend still shares

    @property
    def backend(self) -> str:
        """One line that says what runs the graphs."""
        return self._backend.description

    @property
    def sequences(self) -> int:
        """Answers that share a decode step, at most; 1 where the backend decodes one after the other."""
        return self._backend.sequences

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the frames that the backend's graphs take; None for any allowed size."""
        return self._backend.frame_size

    @property
    def fallback_reason(self) -> str:
        """Why ``auto`` took no faster backend; empty if it took the fastest, or if a backend was named."""
        return self._backend.fallback_reason

    @property
    def video_first(self) -> bool:
        """Whether the chat template puts the video before the question. Only then can questions share a session."""
        return self._prompt.video_first

    def compile_schema(self, schema: Mapping[str, Any]) -> JsonGrammar:
        """Compiles a JSON schema, so that no question waits for that; may run on any thread.

        Args:
            schema: As ``json_schema`` of every question, which takes the result in place of it.

        Raises:
            TangoError: The schema cannot be followed, or the extra ``structured`` is not installed.
        """
        return self._schemas(schema)

    def decode(
        self,
        source: Source,
        *,
        frames: int | None = None,
        frame_size: tuple[int, int] | None = None,
        max_pixels: int | None = None,
        fps: float | None = None,
        sampling: Sampling = "exact",
    ) -> DecodedVideo:
        """Decodes a video's frames ahead of a session. May be called from any thread.

        Arguments and errors are those of :meth:`session`, which takes the result in place of a source.
        """
        options = FrameOptions(frames, frame_size, max_pixels, fps, sampling)
        return decode(self.bundle.manifest, source, options, self._backend.frame_size)

    def encode(
        self,
        source: Source | DecodedVideo,
        *,
        frames: int | None = None,
        frame_size: tuple[int, int] | None = None,
        max_pixels: int | None = None,
        fps: float | None = None,
        on_progress: OnProgress | None = None,
        sampling: Sampling = "exact",
    ) -> EncodedVideo:
        """Encodes a video once, for sessions at any retention ratio; arguments and errors as of :meth:`session`."""
        options = FrameOptions(frames, frame_size, max_pixels, fps, sampling)
        request = self._request(source, options, on_progress)
        self._settle()
        return EncodedVideo(self._backend, request)

    def session(
        self,
        source: Source | DecodedVideo | EncodedVideo,
        *,
        frames: int | None = None,
        frame_size: tuple[int, int] | None = None,
        max_pixels: int | None = None,
        retention_ratio: float | None = None,
        prune: bool = True,
        fps: float | None = None,
        sampling: Sampling = "exact",
        on_progress: OnProgress | None = None,
    ) -> Session:
        """Opens a video for any number of questions. It is decoded, encoded and pruned once.

        Args:
            source: A video file, a folder of images, a uint8 array [N, H, W, 3], any iterable of (seconds, uint8
                [H, W, 3]), or the address of a live stream; see :func:`tango_runtime.video.sample`. Or the result of
                :meth:`decode` or :meth:`encode`, whose frames are chosen already.
            frames: Number of frames F, sampled uniformly; the bundle's number by default.
            frame_size: (height, width) of the frames in pixels, for a bundle that takes any size. By default it follows
                from the video's aspect ratio and the bundle's pixel budget.
            max_pixels: Maximum number of pixels of a frame, in place of the budget's.
            retention_ratio: Fraction of the video tokens that pruning keeps, in (0, 1]; the bundle's by default.
            prune: False keeps every token.
            fps: Frame rate of a folder, an array or a live stream, in frames per second.
            sampling: ``keyframes`` takes the keyframe of a video file that is nearest to each frame, and decodes less.
            on_progress: Called while the vision graph runs, with the number of frames done since the last call. A GPU
                may still be computing them.

        Raises:
            TangoError: An argument is out of range, or the video cannot be read or is shorter than ``frames``.
        """
        options = FrameOptions(frames, frame_size, max_pixels, fps, sampling)
        if isinstance(source, EncodedVideo):
            if options != FrameOptions():
                raise TangoError("a video that is encoded has its frames already", "say which when it is encoded")
            params = self._params(source.shape, retention_ratio, prune)
            return self._open(lambda timer: source.clip(self._backend), params)
        request = self._request(source, options, on_progress)
        return self._see(request, self._params(request.shape, retention_ratio, prune))

    def generate(
        self,
        source: Source | DecodedVideo,
        question: str,
        *,
        frames: int | None = None,
        frame_size: tuple[int, int] | None = None,
        max_pixels: int | None = None,
        retention_ratio: float | None = None,
        prune: bool = True,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        json_schema: JsonSchema | None = None,
        fps: float | None = None,
        sampling: Sampling = "exact",
        on_progress: OnProgress | None = None,
    ) -> Answer:
        """Answers a question about a video; arguments and errors are those of :meth:`stream`."""
        return finished(
            self.stream(
                source,
                question,
                frames=frames,
                frame_size=frame_size,
                max_pixels=max_pixels,
                retention_ratio=retention_ratio,
                prune=prune,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                json_schema=json_schema,
                fps=fps,
                sampling=sampling,
                on_progress=on_progress,
            )
        )

    def stream(
        self,
        source: Source | DecodedVideo,
        question: str,
        *,
        frames: int | None = None,
        frame_size: tuple[int, int] | None = None,
        max_pixels: int | None = None,
        retention_ratio: float | None = None,
        prune: bool = True,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        json_schema: JsonSchema | None = None,
        fps: float | None = None,
        sampling: Sampling = "exact",
        on_progress: OnProgress | None = None,
    ) -> AnswerStream:
        """Answers a question about a video, piece by piece: a session with one question.

        Everything that can be checked is checked before the video is decoded, which the first piece does.

        Args:
            source: As of :meth:`session`, like everything else that is about the video.
            question: Plain text.
            frames: Frames sampled uniformly, F; the bundle's number by default.
            frame_size: (height, width) in pixels of the frames, for a bundle that takes any size; by default what the
                video's aspect ratio gives within the bundle's budget of pixels.
            max_pixels: Maximum number of pixels of a frame, in place of the budget's.
            retention_ratio: Fraction of the video tokens that pruning keeps, in (0, 1]; the bundle's by default.
            prune: False keeps every token.
            max_new_tokens: Maximum number of tokens of the answer.
            temperature: Sampling temperature; 0 is greedy.
            top_p: Probability mass that is sampled from (nucleus sampling), in (0, 1].
            seed: Seed of the sampling.
            json_schema: The answer is JSON that fits this schema (extra ``structured``).
            fps: Frames a second of a folder, an array or a live stream.
            sampling: ``keyframes`` takes the keyframe of a video file that is nearest to each frame, and decodes less.
            on_progress: Called with the number of frames done since the last call.

        Raises:
            TangoError: An argument is out of range, the video cannot be read or is shorter than ``frames``, or the
                prompt is longer than the bundle's context.
        """
        manifest = self.bundle.manifest
        limits = Limits.of(manifest, max_new_tokens)
        sampler = Sampler(temperature, top_p, seed, self._schemas.start(json_schema))
        options = FrameOptions(frames, frame_size, max_pixels, fps, sampling)
        request = self._request(source, options, on_progress)
        params = self._params(request.shape, retention_ratio, prune)
        before, text = self._prompt.encode(question, describe(manifest.prompt.video_text, request.timed.clock))
        answer = Answer(question, params.retention_ratio if params else None, total=request.shape.total)
        video = 0 if prune else request.shape.rows(row_ends=manifest.prompt.row_end is not None)
        limits.require_room(len(before) + len(text) + len(manifest.prompt.after_video) + video, video)

        def pieces() -> Generator[str, None, None]:
            with self._see(request, params) as session:
                yield from session.answer_into(answer, *session.encode(question), sampler, limits)

        return AnswerStream(answer, pieces())

    def live(
        self,
        source: Source | Iterable[Any],
        *,
        window: int | None = None,
        fps: float = 1.0,
        frame_size: tuple[int, int] | None = None,
        max_pixels: int | None = None,
        retention_ratio: float | None = None,
        prune: bool = True,
        drop: bool | None = None,
        on_arrival: Callable[[], None] = lambda: None,
    ) -> LiveVideo:
        """Opens a stream, for questions about its newest frames at any time. Each frame is encoded once.

        Args:
            source: A camera: any iterable of (seconds, frame) or (number, seconds, frame) that is not a sequence. It is
                read on its own thread; gaps in the numbers count as lost frames. Or a recording, as for
                :meth:`session`.
            window: Number of frames that a question is about; the bundle's number by default. It is a multiple of the
                frames per step.
            fps: Frames per second taken from the stream. It is also the frame rate of a folder or an array.
            frame_size: (height, width) of the frames in pixels, for a bundle that takes any size.
            max_pixels: Maximum number of pixels of a frame, in place of the budget's.
            retention_ratio: Fraction of the video tokens that pruning keeps, in (0, 1]; the bundle's by default.
            prune: False keeps every token.
            drop: Whether newer frames replace those that still wait. By default they do for a camera, and not for a
                recording.
            on_arrival: Called on another thread when a frame of a camera arrives.

        Raises:
            TangoError: An argument is out of range, or a recording cannot be read.
        """
        manifest = self.bundle.manifest
        frames = manifest.video.frames if window is None else window
        self._params(ClipShape.of(manifest, frames), retention_ratio, prune)  # a ratio out of range is an error now
        held = FrameWindow(self._backend, manifest, frames, fps, self._settle, frame_size, max_pixels)
        feed = open_feed(source, fps, frames, drop=drop, on_arrival=on_arrival)

        def see(clip: EncodedClip) -> Session:
            return self._open(lambda timer: clip, self._params(clip.shape, retention_ratio, prune))

        return LiveVideo(feed, held, see)

    def watch(
        self,
        source: Source | Iterable[Any],
        question: str,
        *,
        window: int | None = None,
        step: float = 5.0,
        fps: float = 1.0,
        frame_size: tuple[int, int] | None = None,
        max_pixels: int | None = None,
        retention_ratio: float | None = None,
        prune: bool = True,
        drop: bool | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        json_schema: JsonSchema | None = None,
    ) -> Iterator[Answer]:
        """Answers a question every ``step`` seconds of a stream; see :meth:`live` and :meth:`LiveVideo.watch`."""
        live = self.live(
            source,
            window=window,
            fps=fps,
            frame_size=frame_size,
            max_pixels=max_pixels,
            retention_ratio=retention_ratio,
            prune=prune,
            drop=drop,
        )
        with live:
            yield from live.watch(
                question,
                step=step,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                json_schema=json_schema,
            )

    def report(self, answer: Answer, video: str) -> Report:
        """A report of what pruning kept, ready to be written as a page or a picture.

        Args:
            answer: A finished answer.
            video: The video's name in the report.
        """
        from tango_runtime.report.report import Report

        shape = answer.shape
        assert shape is not None, "the answer is finished"
        return Report(
            video=video,
            question=answer.question,
            answer=answer.text,
            bundle=self.bundle.path.resolve().name,
            backend=self.backend,
            version=package_version(),
            retention_ratio=answer.retention_ratio,
            frames=answer.frames[:: shape.frames_per_step],
            seconds=answer.seconds[:: shape.frames_per_step],
            sampling=answer.sampling,
            aspect=answer.aspect,
            grid=shape.grid,
            salience=answer.salience,
            indices=answer.indices,
            merged=answer.merged,
            segments=answer.segments,
            rows=answer.rows,
            thinned=answer.thinned,
            prompt_tokens=answer.prompt_tokens,
            generated_tokens=len(answer.ids),
            stages=list(answer.stages.items()),
            tokens_per_second=answer.tokens_per_second,
        )

    def _request(
        self, source: Source | DecodedVideo, options: FrameOptions, on_progress: OnProgress | None
    ) -> VideoRequest:
        timed: FrameStream | DecodedVideo
        if isinstance(source, DecodedVideo):
            if options != FrameOptions():
                raise TangoError("the video is decoded already", "give options of its frames where it is decoded")
            timed, shape = source, self._require_shape(source.shape)
        else:
            timed, shape = open_clip(self.bundle.manifest, source, options, self._backend.frame_size)
        return VideoRequest(timed, shape, on_progress or (lambda frames: None))

    def _require_shape(self, shape: ClipShape) -> ClipShape:
        """Rejects frames that were decoded for a bundle that takes others."""
        manifest = self.bundle.manifest
        size = choose_size(manifest.video, shape.frames, None, asked=shape.size, fixed=self._backend.frame_size)
        if ClipShape.of(manifest, shape.frames, size) != shape:
            raise TangoError("the video was decoded for a bundle that takes other frames", "decode it with this one")
        return shape

    def _params(self, shape: ClipShape, retention_ratio: float | None, prune: bool) -> PruneParams | None:
        """The operator's parameters for frames of a shape, None to keep every token."""
        params = self.bundle.manifest.params.on(shape.grid)
        params = params if retention_ratio is None else params.at(retention_ratio)
        return params if prune else None

    def _see(self, request: VideoRequest, params: PruneParams | None) -> Session:
        return self._open(lambda timer: encode(self._backend, request, timer), params)

    def _open(self, encoded: Callable[[StageTimer], EncodedClip], params: PruneParams | None) -> Session:
        """A session about frames, once the one before needs nothing more of the backend's shared tensors."""
        self._settle()
        timer = StageTimer(self._backend)
        manifest, prompt, schemas = self.bundle.manifest, self._prompt, self._schemas
        session = Session(self._backend, manifest, prompt, schemas, encoded(timer), params, timer, self._steps)
        self._latest = weakref.ref(session)
        return session

    def _settle(self) -> None:
        before = self._latest() if self._latest else None
        if before is not None:
            before.settle()
