"""About how long a stage takes on a device. Arithmetic only.

Time, in seconds, of a stage (vision, prefill)::

    max(operations / (peak · COMPUTE), weights / (bandwidth · MEMORY))
      + PASSES · tokens · widths · 2 / (bandwidth · MEMORY) + LAYER · layers

The first term is the roofline (Williams, Waterman and Patterson 2009) under what a GPU reaches. The second is what
kernels that are not fused write and read again, the third what their launches cost. A token is the roofline's memory
and STEP · layers: in fp16, decoding is one kernel, whose blocks wait for one another; else it is LAYER · layers.

COMPUTE and MEMORY are what a matrix product and a copy reached of an H200's data sheet; PASSES, LAYER and STEP are
fitted to the times of this project's chain there, on ONNX Runtime with fused graphs (benchmarks/README.md).
tests/runtime/sizing/test_plan.py holds the estimate against those times, and against published ones of an Orin Nano
that nothing was fitted to. TensorRT 8.6, which fuses less, takes three times the estimate for the tower and for the
0.5B's prefill.
"""

from __future__ import annotations

from dataclasses import dataclass

from tango_runtime.sizing.devices import Device, Precision
from tango_runtime.sizing.models import BYTES, Layers, Model

#: Of the data sheet's 989 TFLOP/s a product of large fp16 matrices reached 687, of its 4.8 TB/s a copy 4.02.
COMPUTE, MEMORY = 687 / 989, 4.02 / 4.8
#: How often a layer's tensors cross the memory, as their widths are counted in :attr:`Layers.widths`.
PASSES = 5
#: Seconds for each layer: some fifteen kernels.
LAYER = 60e-6
#: Seconds for each layer of a token: five phases.
STEP = 23e-6
#: Seconds that the operator takes for no tokens, and tokens above which it works in strips, with three passes over the
#: inner products instead of one (plugins/README.md).
_PRUNE, _STRIPS = 100e-6, 6324
#: Most bytes of its workspace that inner products take.
PRODUCTS = 160 * 10**6


@dataclass(frozen=True)
class Times:
    """Estimated seconds; the rules are at the top of this file.

    Attributes:
        vision: Tower and projector, of all frames.
        prune: The operator, on the video that is the most work: one segment in which nothing stands still.
        prefill: The prompt, up to the first token's logits.
        token: Each token after it.
    """

    vision: float
    prune: float
    prefill: float
    token: float

    @property
    def first_token(self) -> float:
        """From frames of the model's size, on the device, to the first token."""
        return self.vision + self.prune + self.prefill


def vision_time(model: Model, device: Device, frames: int, precision: Precision = "fp16") -> float:
    """Seconds for tower and projector."""
    patches, (before, after) = frames * model.patches, model.projector
    linear = 2 * (patches * (model.tower.parameters + before) + frames * model.tokens * after)
    work = _Work(linear, precision, model.tower.attention(patches * model.patches))
    return _stage(device, model.tower, patches, work, (model.tower.parameters + before + after) * BYTES[precision])


def prune_time(model: Model, device: Device, frames: int) -> float:
    """Seconds for the operator: inner products of all tokens, once or in three passes, written and read in fp32."""
    tokens, width = frames * model.tokens, model.decoder.width
    passes = 1 if tokens <= _STRIPS else 3
    operations = passes * 2 * tokens**2 * width
    moved = 3 * 2 * tokens * width + 2 * passes * min(4 * tokens**2, PRODUCTS)
    return operations / (device.peak("fp16") * COMPUTE) + moved / _rate(device) + _PRUNE


def prefill_time(model: Model, device: Device, tokens: int, precision: Precision, weights: float) -> float:
    """Seconds from the prompt's embeddings to the logits after it; ``weights`` in bytes."""
    attention = model.decoder.attention(tokens**2 / 2)  # causal: half of the pairs
    work = _Work(2 * tokens * model.decoder.parameters, precision, attention + 2 * model.head)
    return _stage(device, model.decoder, tokens, work, weights)


def token_time(model: Model, device: Device, context: int, weights: float, precision: Precision = "fp16") -> float:
    """Seconds for one token: all weights, and ``context`` positions of the cache, cross the memory."""
    layer = STEP if precision == "fp16" else LAYER
    return (weights + model.cache_row * context) / _rate(device) + layer * model.decoder.count


@dataclass(frozen=True)
class _Work:
    """Operations of linear layers, in a precision, and others, in fp16."""

    linear: float
    precision: Precision
    other: float

    def on(self, device: Device) -> float:
        """Seconds at the rate that products reach."""
        return (self.linear / device.peak(self.precision) + self.other / device.peak("fp16")) / COMPUTE


def _stage(device: Device, layers: Layers, tokens: int, work: _Work, weights: float) -> float:
    moved = PASSES * tokens * layers.count * layers.widths * 2
    return max(work.on(device), weights / _rate(device)) + moved / _rate(device) + LAYER * layers.count


def _rate(device: Device) -> float:
    return device.bandwidth * 1e9 * MEMORY
