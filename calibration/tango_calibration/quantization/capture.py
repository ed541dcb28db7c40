"""One run of the pipeline on a clip, of which calibration keeps what the decoder takes.

The run has everything of real use: vision, pruning at the bundle's retention ratio, the prompt, the answer token by
token. From a :class:`DecoderInput` the decoder alone can be run again, so ranges and losses of the decoder are measured
on pruned prompts.

ONNX Runtime's calibrators are not used. They hold every activation of all clips in memory, and support neither a key/
value cache that one pass hands to the next nor smoothing before ranges are measured.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tango_calibration.data.dataset import Video
from tango_calibration.quantization.clips import load_frames
from tango_calibration.quantization.ranges import Array
from tango_plugins import TangoError, reference
from tango_runtime.backends.base import Backend
from tango_runtime.bundle import Bundle
from tango_runtime.pipeline.generate import Limits, PromptCache, decode_loop
from tango_runtime.pipeline.prompt import Prompt, describe
from tango_runtime.pipeline.sampling import Sampler
from tango_runtime.pipeline.timer import StageTimer
from tango_runtime.pipeline.video_rows import video_rows
from tango_runtime.video import sample


@dataclass(frozen=True)
class DecoderInput:
    """Embeddings that the decoder took.

    Attributes:
        prompt: Text, kept video tokens, text [N, D].
        answer: The answer's tokens, which came one by one [M, D].
    """

    prompt: Array
    answer: Array


@dataclass(frozen=True)
class Capture:
    """What the pipeline computed for a clip.

    Attributes:
        indices: Flat indices of the kept video tokens [K] int32.
        merged: Whether a kept token is a merge of several [K] bool.
        decoder_input: What the decoder took.
    """

    indices: NDArray[np.int32]
    merged: NDArray[np.bool_]
    decoder_input: DecoderInput


def capture(bundle: Bundle, backend: Backend, prompt: Prompt, video: Video, max_new_tokens: int) -> Capture:
    """Runs the pipeline on a clip and its first question, with a greedy answer.

    Raises:
        TangoError: The clip cannot be read, or its prompt does not fit into the bundle's context.
    """
    frames, seconds = load_frames(bundle, video)
    features, salience = (backend.to_host(t) for t in backend.vision(frames, lambda done: None))
    pruned = reference.prune(features, salience, seconds, bundle.manifest.params)
    about = describe(bundle.manifest.prompt.video_text, sample(video.source, video.frames).clock)
    before, after = prompt.encode(video.questions[0].text, about)
    newline = np.array(bundle.manifest.prompt.after_video, np.int64)
    texts = [backend.to_host(backend.embed(ids)) for ids in (before, np.concatenate((newline, after)))]
    rows = video_rows(bundle.manifest, backend, pruned.tokens, pruned.indices)
    whole = np.concatenate((texts[0], rows, texts[1]))
    answer = _answer(bundle, backend, whole, len(rows), max_new_tokens, f"clip {video.name}")
    return Capture(pruned.indices, pruned.merged, DecoderInput(whole, backend.to_host(backend.embed(answer))))


def _answer(
    bundle: Bundle, backend: Backend, prompt: Array, video_tokens: int, max_new_tokens: int, name: str
) -> NDArray[np.int64]:
    """Token ids of the greedy answer to a prompt [N, D]."""
    limits = Limits.of(bundle.manifest, max_new_tokens)
    try:
        limits.require_room(len(prompt), video_tokens)
    except TangoError as error:
        raise TangoError(f"{name}: {error.message}", error.hint) from error
    with closing(PromptCache(backend, [prompt], [], len(prompt), limits.context)) as cache:
        return np.array(list(decode_loop(cache, [], Sampler(), limits, [], StageTimer(backend))), np.int64)
