"""Memory and time by arithmetic: the memory model of `tango build`, and `tango plan`: does a model fit a device?

It imports nothing of the engines: they import its memory model.
"""

from tango_runtime.sizing.estimate import (
    DECODER,
    VISION,
    Estimate,
    SizingOptions,
    estimate,
    nearest_fit,
    smallest_device,
)
from tango_runtime.sizing.models import ModelDimensions, find_model, released_models
from tango_runtime.sizing.streams import StreamCapacity, StreamLoad, stream_capacity
from tango_runtime.sizing.times import (
    COMPUTE,
    DECODER_PASSES,
    LAYER,
    MEMORY,
    OWN_COMPUTE,
    OWN_MEMORY,
    TOWER_PASSES,
    prefill_time,
    prune_time,
    token_time,
    vision_time,
)

__all__ = [
    "COMPUTE", "DECODER", "DECODER_PASSES", "LAYER", "MEMORY", "OWN_COMPUTE", "OWN_MEMORY", "TOWER_PASSES", "VISION",
    "Estimate", "ModelDimensions", "SizingOptions", "StreamCapacity", "StreamLoad", "estimate", "find_model",
    "nearest_fit", "prefill_time", "prune_time", "released_models", "smallest_device", "stream_capacity", "token_time",
    "vision_time",
]  # fmt: skip
