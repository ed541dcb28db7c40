"""Time and memory of the pipeline on a backend, stage by stage and end to end.

The measured call is :meth:`VideoLLM.generate`, with a fixed number of tokens. It records a backend event before and
after each stage; on a GPU, these are events in the backend's stream. If a stage waits for the host, its time includes
the wait.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tango_plugins import PruneParams, TangoError
from tango_plugins.device_array import DeviceArray
from tango_plugins.params import Budget
from tango_runtime.backends.base import Backend, KVCache, Tensor, TimingEvent
from tango_runtime.backends.cuda.device import Event, check, cudart
from tango_runtime.backends.registry import BACKENDS, select
from tango_runtime.bundle import Bundle
from tango_runtime.pipeline.answer import Answer
from tango_runtime.pipeline.prompt import Prompt
from tango_runtime.pipeline.video_llm import VideoLLM
from tango_runtime.sizing import memory
from tango_runtime.util.console import OnProgress
from tango_runtime.video import Sampling, sample
from tango_runtime.video.shape import at_size

Samples = dict[str, list[float]]

CLIP = (
    "two scenes of uniform noise below 100, each still, cut in the middle of the clip; noise below 40 added to every "
    "frame; a bright block a quarter as wide and high as the frame moves across it; one frame a second"
)
DEVICE_METRIC = (
    "growth in bytes of the used memory of the whole GPU (cudaMemGetInfo, total - free) since before the backend was "
    "loaded, largest of the readings after answers of the warm-up and of new lengths; without the CUDA context"
)
HOST_METRIC = "peak resident set of this process so far (ru_maxrss), including the clip and all libraries"
#: The operator's budget in measurements; see :func:`measurable`.
BUDGET: Budget = "exact"
#: Stages that are measured by the backend's events; the other times are by the host's clock.
EVENT_TIMED = ("upload", "vision", "prune", "prefill")

_WORD = " the"  # one token of Qwen2's vocabulary
#: Number of prompts of new lengths, for each of which a backend may choose its kernels again.
_NEW_LENGTHS = 3


@dataclass(frozen=True)
class Setting:
    """Parameters that all cases share.

    Attributes:
        frames: Frames of the clip, F; None takes the bundle's.
        retention_ratio: Fraction of the tokens that pruning keeps; None takes the bundle's.
        decode_tokens: Tokens of an answer after its first.
        warm_up: Answers before the measured ones, at least 1: the first loads kernels, and memory is read after each.
        repeats: Measured answers, at least 1.
        seed: Seed of the clip.
        frame_size: (height, width) that frames get, for a bundle that takes any size; None takes what follows from the
            source's.
        video: A video file in place of the generated clip.
        sampling: Which frames of the file are taken.
        nvdec: Whether the GPU decodes the file.

    Raises:
        TangoError: A number is out of range.
    """

    frames: int | None = None
    retention_ratio: float | None = None
    decode_tokens: int = 64
    warm_up: int = 2
    repeats: int = 10
    seed: int = 0
    frame_size: tuple[int, int] | None = None
    video: str | None = None
    sampling: Sampling = "exact"
    nvdec: bool = False

    def __post_init__(self) -> None:
        for name, minimum in (("frames", 1), ("decode_tokens", 1), ("warm_up", 1), ("repeats", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise TangoError(f"--{name.replace('_', '-')} is {value}", f"it must be at least {minimum}")
        if self.retention_ratio is not None:
            PruneParams(retention_ratio=self.retention_ratio)

    def of_video(self, bundle: Bundle) -> dict[str, Any]:
        """Options of the pipeline for the clip."""
        size = None if self.frame_size is None else (self.frame_size[0], self.frame_size[1])  # a list, out of JSON
        frames, ratio = self.frames_of(bundle), self.retention_ratio
        return {"frames": frames, "frame_size": size, "retention_ratio": ratio, "sampling": self.sampling}

    def clip_of(self, case: Case, bundle: Bundle) -> str | NDArray[np.uint8]:
        """The video file, or the generated clip."""
        return self.video or make_clip(case, self.frames_of(bundle), self.seed)

    def frames_of(self, bundle: Bundle) -> int:
        """Frames of the clip, F."""
        return bundle.manifest.video.frames if self.frames is None else self.frames


@dataclass(frozen=True)
class Case:
    """A case to measure: with pruning or without, from frames of one size.

    Attributes:
        prune: Whether tokens are pruned.
        width: Width of the source's frames in pixels.
        height: Height of the source's frames in pixels.
    """

    prune: bool
    width: int
    height: int

    @property
    def name(self) -> str:
        """``pruned, 384x384``."""
        return f"{'pruned' if self.prune else 'unpruned'}, {self.width}x{self.height}"


@dataclass(frozen=True)
class Measured:
    """Measurements of a case.

    Attributes:
        kept: Video tokens in the prompt, K.
        rows: Positions that they take, row ends included.
        thinned: Those of them that the decoder's upper layers see; None where every layer sees all.
        total: Video tokens before pruning, F·L.
        prompt_tokens: Positions of the prompt.
        milliseconds: Samples by name, in the order of the pipeline: ``open`` (of a file: learning its frames' times, by
            itself, as the call does it again), ``video`` (decoding and resizing),
            ``upload`` (on a device only), ``vision``, ``prune``, ``prefill``, ``first token`` (from the call to the
            first token), ``decode`` (from one token to the next), ``answer`` (from the call to its end), ``second
            question`` (from the call to its first token, in a session that has answered another question) and ``first
            token, new length`` (of prompts a few tokens shorter, of lengths not measured before).
        device_memory: Bytes, see ``DEVICE_METRIC``; None if the backend uses no device.
        host_memory: Bytes, see ``HOST_METRIC``.
    """

    kept: int
    rows: int
    thinned: int | None
    total: int
    prompt_tokens: int
    milliseconds: Samples
    device_memory: int | None
    host_memory: int


def require_room(bundle: Bundle, setting: Setting, case: Case) -> None:
    """Rejects a case whose answers cannot have their length, before anything is loaded for it.

    Raises:
        TangoError: The prompt and its answer are longer than the context.
    """
    manifest, frames, size = bundle.manifest, setting.frames_of(bundle), setting.frame_size
    video, params = manifest.video, manifest.params
    if setting.retention_ratio is not None:
        params = params.at(setting.retention_ratio)
    if size is not None:
        video, _, params = at_size(video, manifest.vision, params, size)
    elif video.budget is not None:
        return  # frames of the source's size, which the pipeline learns
    count = memory.typical_video_tokens if case.prune else memory.all_video_tokens
    tokens = count(video, params, frames, row_ends=manifest.prompt.row_end is not None)
    text = memory.video_text_tokens(frames, manifest.prompt.video_text is not None) + memory.TYPICAL_TEXT_TOKENS
    prompt, answer, context = tokens + text, 1 + setting.decode_tokens, manifest.decoder.context
    if prompt + answer > context:
        raise TangoError(
            f"a prompt of {prompt} tokens and an answer of {answer} exceed the context of {context}",
            "use fewer --decode-tokens, or fewer --frames",
        )


def spread(samples: list[float]) -> dict[str, float]:
    """Percentiles, mean and number of samples."""
    names = {"p10": 10, "p50": 50, "p90": 90, "p99": 99}
    found = {name: float(np.percentile(samples, percent)) for name, percent in names.items()}
    found |= {"min": min(samples), "max": max(samples), "mean": float(np.mean(samples))}
    return {name: round(value, 4) for name, value in found.items()} | {"count": len(samples)}


def make_clip(case: Case, frames: int, seed: int) -> NDArray[np.uint8]:
    """The clip of a case, uint8 [F, height, width, 3]; ``CLIP`` describes it."""
    random = np.random.default_rng(seed)
    size = (case.height, case.width, 3)
    scenes = random.integers(0, 100, (2, *size), dtype=np.uint8)
    clip = np.empty((frames, *size), np.uint8)
    high, wide = -(-case.height // 4), -(-case.width // 4)
    for i in range(frames):
        np.add(scenes[2 * i // frames], random.integers(0, 40, size, dtype=np.uint8), out=clip[i])
        top, left = i * (case.height - high) // frames, i * (case.width - wide) // frames
        clip[i, top : top + high, left : left + wide] = (230, 60, 40)
    return clip


def make_question(bundle: Bundle, start: str = "What") -> str:
    """A question with which the text around the video, newline included, has at least ``TYPICAL_TEXT_TOKENS``."""
    prompt, newline, question = Prompt.of(bundle), len(bundle.manifest.prompt.after_video), start
    while sum(map(len, prompt.encode(question))) + newline < memory.TYPICAL_TEXT_TOKENS:
        question += _WORD
    return question


def measurable(bundle: Bundle) -> Bundle:
    """The bundle with the same amount of work whatever its weights are.

    Stop tokens do not end an answer, and pruning keeps ceil(r·F·L) tokens. The paper's budget keeps about as many,
    except where nearly all tokens are static: then it keeps each of them once. Random weights make most clips static.
    """
    manifest = bundle.manifest
    endless = replace(manifest.prompt, stop=())
    return replace(bundle, manifest=replace(manifest, prompt=endless, prune=manifest.prune | {"budget": BUDGET}))


class TimedBackend:
    """A backend that records the times that the pipeline itself does not measure.

    Args:
        backend: The backend that does the work.

    Attributes:
        decode_starts: The host's clock, in seconds, when each decode step is asked for. The caller has the token of the
            step before by then. On a GPU, the step itself may have begun: what is measured is the time from one token
            to the next as the caller sees it, not a step's own.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._upload: list[TimingEvent] = []
        self.decode_starts: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def reset(self) -> None:
        """Drops the records of the previous answer."""
        self._upload, self.decode_starts = [], []

    @property
    def upload(self) -> float | None:
        """Milliseconds of the latest copy of frames to the device; None if the backend makes none."""
        return self._upload[1].elapsed_ms(self._upload[0]) if len(self._upload) == 2 else None

    def vision(self, frames: NDArray[np.uint8] | DeviceArray, on_progress: OnProgress) -> tuple[Tensor, Tensor]:
        """As of the backend."""
        self._upload.append(self._backend.record_event())

        def on_frames(done: int) -> None:
            if not done:
                self._upload.append(self._backend.record_event())
            on_progress(done)

        return self._backend.vision(frames, on_frames)

    def decode(self, cache: KVCache, token: int) -> Any:
        """As of the backend."""
        self.decode_starts.append(time.perf_counter())
        return self._backend.decode(cache, token)


class Bench:
    """A bundle on a backend, ready to measure; memory is counted from its construction on.

    Args:
        bundle: The bundle.
        backend: ``auto``, or a backend by name.
        setting: Parameters that all cases share.

    Attributes:
        load_ms: Milliseconds that loading the backend took.
        on_device: Whether the backend computes on a GPU.

    Raises:
        TangoError: The backend cannot run the bundle.
    """

    def __init__(self, bundle: Bundle, backend: str, setting: Setting) -> None:
        self._setting, self._question = setting, make_question(bundle)
        self._other_question = make_question(bundle, "Where")
        may_use_gpu = backend not in BACKENDS or BACKENDS[backend].on_gpu
        self._memory_before, self._peak = (_device_in_use() if may_use_gpu else 0), 0
        start = time.perf_counter()
        loaded = select(bundle, backend, nvdec=setting.nvdec)
        self.load_ms = 1e3 * (time.perf_counter() - start)
        self.on_device = isinstance(loaded.record_event(), Event)
        self._lengths: set[int] = set()
        self._timed = TimedBackend(loaded)
        self._llm = VideoLLM(measurable(bundle), cast(Backend, self._timed))

    @property
    def description(self) -> str:
        """The backend in one line, and why ``auto`` chose it."""
        return self._llm.backend + (f" ({self._llm.fallback_reason})" if self._llm.fallback_reason else "")

    def measure(self, case: Case, on_progress: OnProgress) -> Measured:
        """Asks about the clip until there are enough samples.

        Args:
            case: The case to measure.
            on_progress: Called after each answer.

        Raises:
            TangoError: The pipeline or its backend cannot run the case.
        """
        require_room(self._llm.bundle, self._setting, case)
        clip = self._setting.clip_of(case, self._llm.bundle)
        samples: Samples = {}
        for i in range(-self._setting.warm_up, self._setting.repeats):
            answer, found = self._answer(clip, case, self._question)
            if i >= 0:
                for name, values in found.items():
                    samples.setdefault(name, []).extend(values)
            else:
                self._note_peak()
            on_progress(1)
        samples["second question"] = self._second_questions(clip, case)
        samples |= self._new_lengths(clip, case, answer.prompt_tokens)
        device = self._peak if self.on_device else None
        counts = answer.kept, answer.rows, answer.thinned, answer.total, answer.prompt_tokens
        return Measured(*counts, samples, device, peak_host())

    def _second_questions(self, clip: str | NDArray[np.uint8], case: Case) -> list[float]:
        """Milliseconds to the first token of questions in a session that has answered another question.

        Successive questions differ from their first word on: a session does not prefill a common beginning again.
        """
        setting, samples = self._setting, []
        with self._llm.session(clip, **setting.of_video(self._llm.bundle), prune=case.prune) as session:
            session.ask(self._question, max_new_tokens=1)
            questions = cycle((self._other_question, self._question))
            for question in islice(questions, setting.warm_up + setting.repeats):
                start = time.perf_counter()
                session.ask(question, max_new_tokens=1)
                samples.append(1e3 * (time.perf_counter() - start))
        return samples[setting.warm_up :]

    def _new_lengths(self, clip: str | NDArray[np.uint8], case: Case, longest: int) -> Samples:
        """First tokens of shorter prompts of lengths not measured before, as far as the question has words."""
        self._lengths.add(longest)
        fresh = [n for n in range(1, self._question.count(_WORD) + 1) if longest - n not in self._lengths]
        samples: Samples = {}
        for fewer in fresh[:_NEW_LENGTHS]:
            _, found = self._answer(clip, case, self._question.removesuffix(_WORD * fewer))
            samples.setdefault("first token, new length", []).extend(found["first token"])
            self._lengths.add(longest - fewer)
            self._note_peak()
        return samples

    def _note_peak(self) -> None:
        if self.on_device:
            self._peak = max(self._peak, _device_in_use() - self._memory_before)

    def _answer(self, clip: str | NDArray[np.uint8], case: Case, question: str) -> tuple[Answer, Samples]:
        setting, timed = self._setting, self._timed
        timed.reset()
        found: Samples = {}
        if setting.video:
            start = time.perf_counter()
            sample(setting.video, setting.frames_of(self._llm.bundle), sampling=setting.sampling)
            found["open"] = [1e3 * (time.perf_counter() - start)]
        start = time.perf_counter()
        answer = self._llm.generate(
            clip,
            question,
            **setting.of_video(self._llm.bundle),
            prune=case.prune,
            max_new_tokens=1 + setting.decode_tokens,
        )
        end = time.perf_counter()
        if len(answer.ids) <= setting.decode_tokens:
            raise TangoError(
                f"the context ends {len(answer.ids)} tokens after a prompt of {answer.prompt_tokens}",
                "use fewer --decode-tokens, or fewer --frames",
            )
        times = [*timed.decode_starts, end]
        found["video"] = [answer.stages["video"]]
        stages = {stage: answer.stages[stage] for stage in ("vision", "prune", "prefill") if stage in answer.stages}
        if timed.upload is not None:
            found["upload"] = [timed.upload]
            stages["vision"] -= timed.upload
        found |= {stage: [ms] for stage, ms in stages.items()}
        found["first token"] = [1e3 * (times[0] - start)]
        found["decode"] = [1e3 * (later - earlier) for earlier, later in pairwise(times)]
        found["answer"] = [1e3 * (end - start)]
        return answer, found


def cold_start(bundle: Path, backend: str, setting: Setting, case: Case) -> dict[str, float]:
    """Starts a process that imports the runtime, loads the bundle and generates one token.

    Returns:
        Milliseconds of ``import`` (from the start of the process), ``load``, ``first token`` and ``total``, and the
        process's own ``host_memory``: its peak resident set in bytes.

    Raises:
        TangoError: The process fails.
    """
    request = {"bundle": str(bundle), "backend": backend, "setting": vars(setting), "case": vars(case)}
    start = time.monotonic()  # one clock for all processes of a Linux machine
    command = [sys.executable, "-m", "tango_runtime.bench.cold", json.dumps(request)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        reason = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise TangoError(f"the process of a cold start failed: {reason}", "drop --cold-start, or try: tango run")
    reply = json.loads(lines[-1])
    if "error" in reply:
        raise TangoError(reply["error"], reply["hint"])
    times = {"import": 1e3 * (reply["imported"] - start), "load": reply["load"], "first token": reply["first token"]}
    return times | {"total": sum(times.values()), "host_memory": reply["host_memory"]}


def peak_host() -> int:
    """Peak resident set of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _device_in_use() -> int:
    """Bytes in use on the GPU, by all processes; 0 without a GPU."""
    try:
        free, total = check(cudart().cudaMemGetInfo())
    except TangoError:  # `auto` falls back to the CPU and reports why
        return 0
    return int(total - free)
