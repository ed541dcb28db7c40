"""The rotary positions of a prompt with a video in it, for decoders that have some of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tango_runtime.backends.rotary import TEXT, RotaryIds
from tango_runtime.bundle import DecoderSpec
from tango_runtime.video import Clock
from tango_runtime.video.shape import ClipShape


def prompt_positions(
    decoder: DecoderSpec, before: int, shape: ClipShape, clock: Clock, kept: NDArray[np.integer[Any]]
) -> RotaryIds:
    """The rotary positions of a prompt. Kept tokens have the positions that they have in the whole prompt.

    Args:
        decoder: The decoder; if it has no rotary positions of its own, the result is not used.
        before: Tokens before the video.
        shape: Size of the frames, number of steps, and token grid of a step.
        clock: Times of the frames.
        kept: Flat indices of the video's tokens in the prompt [K], ascending.

    Raises:
        TangoError: The video is so long that its positions, or those of what follows it, go beyond the decoder's.
    """
    if decoder.rotary is None:
        return TEXT
    step = shape.seconds_per_step(clock)
    ids = RotaryIds.of(decoder.rotary, before, (shape.steps, *shape.grid), step, kept)
    ids.require_room(decoder.context, decoder.rotary.positions)
    return ids
