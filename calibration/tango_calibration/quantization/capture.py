"""One run of the pipeline on a clip, of which calibration keeps the decoder's input.

The run is complete: vision, pruning at the bundle's retention ratio, the prompt, and the answer token by token. A
:class:`DecoderInput` is enough to run the decoder again, so its ranges and losses are measured on pruned prompts.

ONNX Runtime's calibrators are not used. They hold every activation of all clips in memory, and support neither a KV
cache that one pass hands to the next nor smoothing before ranges are measured.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tango_calibration.data.dataset import Video
from tango_calibration.quantization.clips import load_clip
from tango_calibration.quantization.ranges import Array
from tango_plugins import TangoError, reference
from tango_plugins.thinning import Thinning
from tango_runtime.backends.base import Backend
from tango_runtime.backends.rotary import RotaryIds
from tango_runtime.bundle import Bundle
from tango_runtime.pipeline.generate import Limits, PromptCache, decode_loop
from tango_runtime.pipeline.positions import prompt_positions
from tango_runtime.pipeline.prompt import Prompt, describe
from tango_runtime.pipeline.sampling import Sampler
from tango_runtime.pipeline.timer import StageTimer
from tango_runtime.pipeline.video_rows import video_rows


@dataclass(frozen=True)
class DecoderInput:
    """Embeddings that the decoder read.

    Attributes:
        prompt: Text, kept video tokens, text [N, D].
        answer: The answer's tokens, which the decoder read one by one [M, D].
        rotary: Rotary positions of both [3, N + M] int64, for decoders whose positions differ from the cache's.
        thinning: Rows of the prompt that its upper layers drop; None without inner pruning.
    """

    prompt: Array
    answer: Array
    rotary: NDArray[np.int64]
    thinning: Thinning | None = None


@dataclass(frozen=True)
class Capture:
    """What the pipeline computed for a clip.

    Attributes:
        indices: Flat indices of the kept video tokens [K] int32.
        merged: Whether a kept token is a merge of several [K] bool.
        decoder_input: The decoder's input.
    """

    indices: NDArray[np.int32]
    merged: NDArray[np.bool_]
    decoder_input: DecoderInput


def capture(bundle: Bundle, backend: Backend, prompt: Prompt, video: Video, max_new_tokens: int) -> Capture:
    """Runs the pipeline on a clip and its first question, with a greedy answer.

    Raises:
        TangoError: The clip cannot be read, or its prompt does not fit into the bundle's context.
    """
    clip = load_clip(bundle, video)
    features, salience = (backend.to_host(t) for t in backend.vision(clip.steps, lambda done: None))
    pruned = reference.prune(features, salience, clip.seconds, clip.params(bundle))
    about = describe(bundle.manifest.prompt.video_text, clip.clock)
    before, after = prompt.encode(video.questions[0].text, about)
    newline = np.array(bundle.manifest.prompt.after_video, np.int64)
    texts = [backend.to_host(backend.embed(ids)) for ids in (before, np.concatenate((newline, after)))]
    rows = video_rows(bundle.manifest, backend, pruned.tokens, pruned.indices)
    whole = np.concatenate((texts[0], rows, texts[1]))
    inner, limits = bundle.manifest.decoder.inner, Limits.of(bundle.manifest, max_new_tokens)
    thinning = Thinning(len(before), len(rows), inner.kept(len(rows))) if inner else None
    try:
        rotary = prompt_positions(bundle.manifest.decoder, len(before), clip.shape, clip.clock, pruned.indices)
        limits.require_room(len(whole), len(rows))
    except TangoError as error:
        raise TangoError(f"clip {video.name}: {error.message}", error.hint) from error
    answer = backend.to_host(backend.embed(_answer(backend, whole, thinning, rotary, limits)))
    taken = DecoderInput(whole, answer, rotary.at(0, len(whole) + len(answer)), thinning)
    return Capture(pruned.indices, pruned.merged, taken)


def _answer(
    backend: Backend, prompt: Array, thinning: Thinning | None, rotary: RotaryIds, limits: Limits
) -> NDArray[np.int64]:
    """Token ids of the greedy answer to a prompt [N, D]."""
    with closing(PromptCache(backend, [prompt], [], len(prompt), limits.context, thinning, rotary)) as cache:
        return np.array(list(decode_loop(cache, [], Sampler(), limits, [], StageTimer(backend))), np.int64)
