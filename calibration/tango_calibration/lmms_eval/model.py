"""The model that lmms-eval runs its tasks on; only lmms-eval imports this module.

All requests of a task arrive at once, so those about one video share a session while the next videos are decoded, as in
`tango batch`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.backends.registry import select
from tango_runtime.batch.decoding import Decoders, default_count
from tango_runtime.batch.worker import SamplingOptions
from tango_runtime.bundle import Bundle
from tango_runtime.server.stops import StopTexts
from tango_runtime.util.console import progress, status
from tango_runtime.video.decoded import DecodedVideo
from tango_runtime.video.shape import FrameOptions

#: Generation parameters that are not supported, with the values that change nothing.
_NEUTRAL = {"num_beams": (1, None), "repetition_penalty": (1, None), "n": (1, None)}

#: Maximum length of an answer if a task does not set it, as in lmms-eval's own models.
_MAX_NEW_TOKENS = 1024

#: Seconds between images that a task gives as the frames of a video.
_IMAGE_SECONDS = 1.0


@dataclass(frozen=True)
class _Request:
    """A question of a task.

    Attributes:
        instance: The request as lmms-eval's object.
        video: The video; None if the task gives images.
        text: The question.
        sampling: How the answer is sampled.
        until: Texts that end the answer.
    """

    instance: Any
    video: Path | None
    text: str
    sampling: SamplingOptions
    until: tuple[str, ...]


class Tango(lmms):  # type: ignore[misc]
    """A bundle as a model of lmms-eval: ``--model tango --model_args bundle=BUNDLE,retention_ratio=0.1``.

    Args:
        bundle: Folder of the bundle.
        backend: As in `tango run`.
        retention_ratio: Fraction of the video tokens kept; the bundle's by default.
        prune: False keeps every token.
        frames: Frames sampled uniformly; the bundle's number by default.
        max_pixels: Maximum number of pixels of a frame, for a bundle that takes any size.
        sampling: ``exact`` or ``keyframes``.
        decoders: Processes that decode videos ahead of the model; half of the cores, at most 8, by default.
        threads: Threads of one operator on a CPU; 0 takes one per core.
        batch_size: Ignored; lmms-eval always passes it.
        max_batch_size: Ignored, for the same reason.
        device: Must be None.

    Raises:
        TangoError: The bundle cannot be run, an argument is out of range, or lmms-eval runs several processes.
    """

    is_simple = False  # a chat model: it takes messages

    def __init__(
        self,
        bundle: str,
        backend: str = "auto",
        retention_ratio: float | None = None,
        prune: bool = True,
        frames: int | None = None,
        max_pixels: int | None = None,
        sampling: Any = "exact",
        decoders: int | None = None,
        threads: int = 0,
        batch_size: object = None,
        max_batch_size: object = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if device is not None:
            raise TangoError(f"--device {device} is not supported", "use backend=… and CUDA_VISIBLE_DEVICES")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise TangoError(
                "lmms-eval runs several processes, and --model tango is for one",
                "run one process; for several GPUs: tango serve on each, and --model openai",
            )
        found = Bundle.load(Path(str(bundle)))
        self._pruning: dict[str, Any] = {"retention_ratio": retention_ratio, "prune": prune}
        found.manifest.params.at(found.manifest.params.retention_ratio if retention_ratio is None else retention_ratio)
        self._options = FrameOptions(frames, max_pixels=max_pixels, sampling=sampling)
        self._llm = VideoLLM(found, select(found, backend, threads=threads))
        self._count = default_count() if decoders is None else decoders
        status(f"backend: {self._llm.backend}")

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers requests.

        Returns:
            A ``GenerationResult`` for each, in their order.

        Raises:
            TangoError: A request needs something unsupported, or a video cannot be read. A score without it would not
                be comparable.
        """
        asked = [_read(instance, self._messages(instance)) for instance in requests]
        videos: dict[object, list[int]] = {}
        for i, request in enumerate(asked):
            # Images have no name, so nothing shows that two requests are about the same ones.
            videos.setdefault(request.video if self._llm.video_first and request.video else i, []).append(i)
        found: dict[int, Any] = {}
        with ExitStack() as stack:
            on_progress = stack.enter_context(progress("answers", len(asked)))
            first = [asked[numbers[0]] for numbers in videos.values()]
            decoding = stack.enter_context(closing(self._decoded(first)))
            for decoded, numbers in zip(decoding, videos.values(), strict=True):
                with self._llm.session(decoded, **self._pruning) as session:
                    for i in numbers:
                        found[i] = _answer(session, asked[i])
                        on_progress(1)
        return [found[i] for i in range(len(asked))]

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Is not supported.

        Raises:
            TangoError: Always.
        """
        raise TangoError(
            "the task needs log-likelihoods, which --model tango does not give",
            "choose a task of output_type generate_until: egoschema_subset in place of egoschema_subset_mcppl",
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Is not supported.

        Raises:
            TangoError: Always.
        """
        raise TangoError("the task has several rounds, which --model tango does not do", "choose another task")

    def _messages(self, instance: Any) -> Any:
        _, doc_to_messages, _, doc, task, split = instance.args
        return doc_to_messages(self.task_dict[task][split][doc])

    def _decoded(self, requests: Sequence[_Request]) -> Generator[DecodedVideo, None, None]:
        """Decodes the videos of requests, a few of them in advance."""
        count = min(self._count, max(len(requests) - 1, 0))
        waiting: deque[Any] = deque()
        with closing(Decoders(self._llm.bundle.manifest, self._options, count)) as decoders:
            decoders.ready(self._llm.frame_size)
            for request in requests:
                waiting.append(decoders.submit(request.video) if request.video else request)
                if len(waiting) > 2 * count:
                    yield self._frames(waiting.popleft())
            while waiting:
                yield self._frames(waiting.popleft())

    def _frames(self, waiting: Any) -> DecodedVideo:
        """The submitted video, or the images of a request, which are only read now because a task may have many."""
        if not isinstance(waiting, _Request):
            decoded: DecodedVideo = waiting.result()
            return decoded
        images = [np.asarray(image.convert("RGB")) for image in _media(self._messages(waiting.instance))[0]]
        if any(image.shape != images[0].shape for image in images):
            raise TangoError("the images of a question differ in size", "choose a task that gives videos")
        wanted = self._options.frames or self._llm.bundle.manifest.video.frames
        options = replace(self._options, frames=min(wanted, len(images)), fps=1 / _IMAGE_SECONDS)
        return self._llm.decode(np.stack(images), **asdict(options))


def _read(instance: Any, messages: Sequence[Mapping[str, Any]]) -> _Request:
    """Reads a request."""
    images, videos, texts = _media(messages)
    if len(videos) + bool(images) != 1:
        raise TangoError(
            f"{instance.task_name} asks about {len(videos)} videos and {len(images)} images at once",
            "choose a task whose questions are about one video, or the images of one",
        )
    return _Request(instance, _path(videos[0]) if videos else None, "\n".join(texts), *_generation(instance.args[2]))


def _media(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any], list[str]]:
    """Images, videos and texts of a chat of one turn."""
    found: dict[str, list[Any]] = {"image": [], "video": [], "text": []}
    for message in messages:
        if message["role"] not in ("system", "user"):
            raise TangoError(f"the chat has a message of the {message['role']}", "choose a task without examples")
        for part in message["content"]:
            if part["type"] not in found:
                raise TangoError(f"the task has {part['type']}", "choose a task of videos and text")
            found[part["type"]].append(part["text"] if part["type"] == "text" else part)
    return [part["url"] for part in found["image"]], found["video"], found["text"]


def _path(part: Mapping[str, Any]) -> Path:
    place, limits = part["url"], ("start_time", "end_time", "video_start", "video_end")
    if not isinstance(place, str) or any(part.get(limit) is not None for limit in limits):
        raise TangoError(f"the task asks about a part of a video: {place}", "cut it out, as a file of its own")
    if not Path(place).exists():
        raise TangoError(f"{place} does not exist", "download the task's videos")
    return Path(place)


def _generation(asked: Mapping[str, Any]) -> tuple[SamplingOptions, tuple[str, ...]]:
    """How an answer is sampled, and the texts that end it; parameters for other models are ignored."""
    for key, allowed in _NEUTRAL.items():
        if asked.get(key) not in allowed:
            raise TangoError(
                f"the task asks for {key} {asked[key]}, which is not supported", "override it: --gen_kwargs"
            )
    until = asked.get("until") or ()
    sampling = SamplingOptions(_given(asked, "max_new_tokens", _MAX_NEW_TOKENS))
    temperature = float(_given(asked, "temperature", 0.0))
    if temperature and asked.get("do_sample", True):  # a greedy task may say top_p: 0
        sampling = replace(
            sampling, temperature=temperature, top_p=float(_given(asked, "top_p", 1.0)), seed=asked.get("seed")
        )
    return sampling, (until,) if isinstance(until, str) else tuple(text for text in until if text)


def _given(asked: Mapping[str, Any], key: str, default: Any) -> Any:
    return default if asked.get(key) is None else asked[key]


def _answer(session: Any, request: _Request) -> Any:
    with session.stream(request.text, **asdict(request.sampling)) as stream:
        pieces: Iterable[str] = StopTexts(request.until).cut(stream)
        text = "".join(pieces)
        answer = stream.answer
    counts = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=len(answer.ids))
    return GenerationResult(text, counts)
