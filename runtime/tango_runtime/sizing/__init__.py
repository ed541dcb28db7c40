"""`tango plan`: does a model fit a device, and about how fast would it be there?"""

from tango_runtime.sizing.memory import DECODER, VISION, Options, Plan, plan, remedy, smallest
from tango_runtime.sizing.models import RELEASED, Model, find_model
from tango_runtime.sizing.times import (
    COMPUTE,
    LAYER,
    MEMORY,
    PASSES,
    prefill_time,
    prune_time,
    token_time,
    vision_time,
)

__all__ = [
    "COMPUTE", "DECODER", "LAYER", "MEMORY", "PASSES", "RELEASED", "VISION", "Model", "Options", "Plan",
    "find_model", "plan", "prefill_time", "prune_time", "remedy", "smallest", "token_time", "vision_time",
]  # fmt: skip
