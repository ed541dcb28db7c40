"""How long the chain takes on an engine, stage by stage and end to end, and how much memory.

What is measured is :meth:`VideoLLM.generate` as everybody calls it, but of a fixed number of tokens. It puts each stage
between two marks of the engine, which on a GPU are events in its stream. Where a stage waits for the host, that is
between its marks too.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tango_plugins import PruneParams, TangoError
from tango_plugins.params import Budget
from tango_runtime.backends.base import Backend, KVCache, Tensor, TimingEvent
from tango_runtime.backends.cuda.device import Event, check, cudart
from tango_runtime.backends.registry import select
from tango_runtime.bundle import Bundle
from tango_runtime.pipeline.answer import Answer
from tango_runtime.pipeline.prompt import Prompt
from tango_runtime.pipeline.video_llm import VideoLLM
from tango_runtime.util.console import OnProgress

Samples = dict[str, list[float]]

CLIP = (
    "two scenes of uniform noise below 100, each still, cut in the middle of the clip; noise below 40 added to every "
    "frame; a bright block a quarter as wide and high as the frame moves across it; one frame a second"
)
DEVICE_METRIC = (
    "bytes by which used memory of the whole GPU (cudaMemGetInfo, total - free) has grown since before the engine was "
    "loaded, largest of the readings behind answers of the warm-up and of new lengths; the CUDA context is not in it"
)
HOST_METRIC = "peak resident set of this process so far (ru_maxrss), the clip and all libraries in it"
#: How many tokens pruning keeps; see :func:`measurable`.
BUDGET: Budget = "exact"
#: What of the figures is measured by the engine's marks; the rest is by the host's clock.
MARKED = ("upload", "vision", "prune", "prefill")

#: Tokens around the video: as many as `tango plan` counts for a chat template and a short question.
_TEXT = 31
_WORD = " the"  # one token of Qwen2's vocabulary
#: First tokens of prompts of lengths that no answer before had: engines may plan anew for each.
_NEW_LENGTHS = 3


@dataclass(frozen=True)
class Setting:
    """What all cases have in common.

    Attributes:
        frames: Frames of the clip, F; None takes the bundle's.
        retention_ratio: Fraction of the tokens that pruning keeps; None takes the bundle's.
        decode_tokens: Tokens of an answer behind its first.
        warm_up: Answers before those that count, at least 1: the first loads kernels, and memory is read in them.
        repeats: Answers that count, at least 1.
        seed: Of the clip.

    Raises:
        TangoError: A number is out of range.
    """

    frames: int | None = None
    retention_ratio: float | None = None
    decode_tokens: int = 64
    warm_up: int = 2
    repeats: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("decode_tokens", 1), ("warm_up", 1), ("repeats", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise TangoError(f"--{name.replace('_', '-')} is {value}", f"it must be at least {least}")
        if self.retention_ratio is not None:
            PruneParams(retention_ratio=self.retention_ratio)

    def frames_of(self, bundle: Bundle) -> int:
        """Frames of the clip, F."""
        return bundle.manifest.video.frames if self.frames is None else self.frames


@dataclass(frozen=True)
class Case:
    """What is measured: pruned or not, from frames of a size.

    Attributes:
        prune: Whether tokens are pruned.
        width: Of the source's frames, in pixels.
        height: Likewise.
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
    """What came out of a case.

    Attributes:
        kept: Video tokens that the decoder saw, K.
        total: Video tokens before pruning, F·L.
        prompt_tokens: Positions of the prompt.
        milliseconds: Samples by what they measure, in the order of the chain: ``video`` (sampling and resizing, on the
            host), ``upload`` (on a device only), ``vision``, ``prune``, ``prefill``, ``first token`` (from the call
            until it is handed out), ``decode`` (from one token to the next), ``answer`` (from the call to its end) and
            ``first token, new length`` (of prompts a few tokens shorter, of lengths that were not there before).
        device_memory: Bytes, as ``DEVICE_METRIC`` says; None where the engine uses no device.
        host_memory: Bytes, as ``HOST_METRIC`` says.
    """

    kept: int
    total: int
    prompt_tokens: int
    milliseconds: Samples
    device_memory: int | None
    host_memory: int


def spread(samples: list[float]) -> dict[str, float]:
    """Percentiles, mean and number of samples."""
    names = {"p10": 10, "p50": 50, "p90": 90, "p99": 99}
    found = {name: float(np.percentile(samples, percent)) for name, percent in names.items()}
    found |= {"min": min(samples), "max": max(samples), "mean": float(np.mean(samples))}
    return {name: round(value, 4) for name, value in found.items()} | {"count": len(samples)}


def make_clip(case: Case, frames: int, seed: int) -> NDArray[np.uint8]:
    """The clip that is measured, [F, height, width, 3]; ``CLIP`` says what it shows."""
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


def make_question(bundle: Bundle) -> str:
    """A question so long that the text around the video takes ``_TEXT`` tokens or just over, newline included."""
    prompt, newline, question = Prompt.of(bundle), len(bundle.manifest.prompt.after_video), "What"
    while sum(map(len, prompt.encode(question))) + newline < _TEXT:
        question += _WORD
    return question


def measurable(bundle: Bundle) -> Bundle:
    """The bundle as it is measured: the same work whatever its weights see and say.

    Stop tokens do not end an answer, and pruning keeps ceil(r·F·L) tokens. So does the paper's budget, about, unless
    nearly all of a video stands still: then it keeps each still token once. To random weights most clips stand still.
    """
    manifest = bundle.manifest
    endless = replace(manifest.prompt, stop=())
    return replace(bundle, manifest=replace(manifest, prompt=endless, prune=manifest.prune | {"budget": BUDGET}))


class Watched:
    """An engine that notes what the chain itself does not time; the chain takes it for the engine.

    Args:
        stages: The engine.

    Attributes:
        decoding: Host's clock, in seconds, when each token was given to the decoder: the one before has been handed
            out by then.
    """

    def __init__(self, stages: Backend) -> None:
        self._backend = stages
        self._upload: list[TimingEvent] = []
        self.decoding: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def begin(self) -> None:
        """Forgets the answer before."""
        self._upload, self.decoding = [], []

    @property
    def upload(self) -> float | None:
        """Milliseconds that the frames of the latest answer took to the device; None where they take no such way."""
        return self._upload[1].elapsed_ms(self._upload[0]) if len(self._upload) == 2 else None

    def vision(self, frames: NDArray[np.uint8], on_progress: OnProgress) -> tuple[Tensor, Tensor]:
        """The engine's."""
        self._upload.append(self._backend.record_event())

        def told(done: int) -> None:
            if not done:
                self._upload.append(self._backend.record_event())
            on_progress(done)

        return self._backend.vision(frames, told)

    def decode(self, cache: KVCache, token: int) -> Any:
        """The backend's."""
        self.decoding.append(time.perf_counter())
        return self._backend.decode(cache, token)


class Bench:
    """A bundle on an engine, ready to be measured; memory is counted from here on.

    Args:
        bundle: The bundle.
        engine: ``auto``, or an engine by name.
        setting: What all cases have in common.

    Attributes:
        load_ms: Milliseconds that loading the engine took.
        on_device: Whether the engine computes on a GPU.

    Raises:
        TangoError: The engine cannot run the bundle.
    """

    def __init__(self, bundle: Bundle, engine: str, setting: Setting) -> None:
        self._setting, self._question = setting, make_question(bundle)
        self._before, self._peak = (0 if engine == "ort-cpu" else _device_in_use()), 0
        begin = time.perf_counter()
        stages = select(bundle, engine)
        self.load_ms = 1e3 * (time.perf_counter() - begin)
        self.on_device = isinstance(stages.record_event(), Event)
        self._lengths: set[int] = set()
        self._watched = Watched(stages)
        self._llm = VideoLLM(measurable(bundle), cast(Backend, self._watched))

    @property
    def description(self) -> str:
        """The engine in one line, with why ``auto`` took it."""
        return self._llm.backend + (f" ({self._llm.fallback_reason})" if self._llm.fallback_reason else "")

    def measure(self, case: Case, on_progress: OnProgress) -> Measured:
        """Asks about the clip until there are enough samples.

        Args:
            case: What to measure.
            on_progress: Told of each answer.

        Raises:
            TangoError: The chain or its engine refuses the case.
        """
        clip = make_clip(case, self._setting.frames_of(self._llm.bundle), self._setting.seed)
        samples: Samples = {}
        for i in range(-self._setting.warm_up, self._setting.repeats):
            answer, found = self._answer(clip, case, self._question)
            if i >= 0:
                for name, values in found.items():
                    samples.setdefault(name, []).extend(values)
            else:
                self._note_peak()
            on_progress(1)
        samples |= self._new_lengths(clip, case, answer.prompt_tokens)
        device = self._peak if self.on_device else None
        return Measured(answer.kept, answer.total, answer.prompt_tokens, samples, device, peak_host())

    def _new_lengths(self, clip: NDArray[np.uint8], case: Case, longest: int) -> Samples:
        """First tokens of shorter prompts, of lengths that no answer before had, as far as the question has words."""
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
            self._peak = max(self._peak, _device_in_use() - self._before)

    def _answer(self, clip: NDArray[np.uint8], case: Case, question: str) -> tuple[Answer, Samples]:
        setting, watched = self._setting, self._watched
        watched.begin()
        begin = time.perf_counter()
        answer = self._llm.generate(
            clip,
            question,
            frames=len(clip),
            retention_ratio=setting.retention_ratio,
            prune=case.prune,
            max_new_tokens=1 + setting.decode_tokens,
        )
        end = time.perf_counter()
        if len(answer.ids) <= setting.decode_tokens:
            raise TangoError(
                f"the context ends {len(answer.ids)} tokens behind a prompt of {answer.prompt_tokens}",
                "fewer --decode-tokens, or fewer --frames",
            )
        times = [*watched.decoding, end]
        found = {"video": [answer.stages["video"]]}
        stages = {stage: answer.stages[stage] for stage in ("vision", "prune", "prefill") if stage in answer.stages}
        if watched.upload is not None:
            found["upload"] = [watched.upload]
            stages["vision"] -= watched.upload
        found |= {stage: [ms] for stage, ms in stages.items()}
        found["first token"] = [1e3 * (times[0] - begin)]
        found["decode"] = [1e3 * (later - earlier) for earlier, later in pairwise(times)]
        found["answer"] = [1e3 * (end - begin)]
        return answer, found


def cold_start(bundle: Path, engine: str, setting: Setting, case: Case) -> dict[str, float]:
    """Starts a process that imports the runtime, loads the bundle and gives one token.

    Returns:
        Milliseconds of ``import`` (from the start of the process), ``load``, ``first token`` and ``total``, and the
        process's own ``host_memory``: its peak resident set in bytes.

    Raises:
        TangoError: The process fails.
    """
    request = {"bundle": str(bundle), "engine": engine, "setting": vars(setting), "case": vars(case)}
    begin = time.monotonic()  # one clock for all processes of a Linux machine
    command = [sys.executable, "-m", "tango_runtime.bench.cold", json.dumps(request)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    said = ended.stdout.strip().splitlines()
    if ended.returncode or not said:
        reason = (ended.stderr.strip().splitlines() or [f"it ended with {ended.returncode}"])[-1]
        raise TangoError(f"the process of a cold start failed: {reason}", "leave --cold-start away, or try: tango run")
    told = json.loads(said[-1])
    if "error" in told:
        raise TangoError(told["error"], told["hint"])
    found = {"import": 1e3 * (told["imported"] - begin), "load": told["load"], "first token": told["first token"]}
    return found | {"total": sum(found.values()), "host_memory": told["host_memory"]}


def peak_host() -> int:
    """Peak resident set of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _device_in_use() -> int:
    """Bytes of the GPU that are in use, by whomever; 0 where there is no GPU."""
    try:
        free, total = check(cudart().cudaMemGetInfo())
    except TangoError:  # `auto` goes on to the CPU, and says why
        return 0
    return int(total - free)
