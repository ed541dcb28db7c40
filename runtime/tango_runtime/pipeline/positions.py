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
    """The rotary positions of a prompt; what is kept of a video has those that it has in the whole prompt.

    Args:
        decoder: The decoder; where it has no rotary positions of its own, nobody asks for them.
        before: Tokens before the video.
        shape: What the frames of the video became.
        clock: When they are.
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
