"""About how long a stage takes on a device. Arithmetic only.

Time of a stage (vision, prefill), in seconds::

    max(operations / (peak · COMPUTE), weights / (bandwidth · MEMORY))
      + PASSES · tokens · widths · 2 / (bandwidth · MEMORY) + LAYER · layers

The first term is the roofline (Williams, Waterman and Patterson 2009), scaled to what a GPU reaches. The second is the
memory traffic of kernels that are not fused, the third the cost of their launches. A decode step is the roofline's
memory term and STEP · layers: it is one kernel whose blocks synchronize. In quantized engines on a Jetson it costs
LAYER · layers.

COMPUTE and MEMORY are what a matrix product and a copy reached of an H200's data sheet. PASSES, LAYER, STEP and OWN are
fitted to this project's pipeline there, with device graphs on ONNX Runtime (docs/results/performance.md): OWN applies
to the CUDA library's kernels for INT8 and INT4, which no Jetson runs.
tests/runtime/sizing/test_plan.py compares the estimates with those times, and with published times of an Orin Nano to
which nothing was fitted. TensorRT 8.6 fuses less in portable graphs: they take four times the estimate for the
tower and three times that for the prefill of the 0.5B model.
"""

from __future__ import annotations

from dataclasses import dataclass

from tango_runtime.sizing.devices import Device, Precision
from tango_runtime.sizing.memory import cache_bytes, products_bytes
from tango_runtime.sizing.models import BYTES, LayerStack, ModelDimensions

#: Of the data sheet's 989 TFLOP/s a product of large fp16 matrices reached 687, of its 4.8 TB/s a copy 4.02.
COMPUTE, MEMORY = 687 / 989, 4.02 / 4.8
#: Of the peak, what products of INT8 or by INT4 weights reach, and by slabs of INT4 weights (see memory.py). Of the
#: copy's rate, what a decode step reaches that reads quantized weights.
OWN_COMPUTE, SLAB_COMPUTE, OWN_MEMORY = 0.25, 0.5, 0.75
#: How often a layer's tensors cross the memory, with widths as in :attr:`LayerStack.widths`. Of a tower, products fuse
#: more with what follows.
TOWER_PASSES, DECODER_PASSES = 2, 3
#: Seconds per layer of a stage: some fifteen kernel launches.
LAYER = 60e-6
#: Seconds per layer of a decode step: five phases.
STEP = 23e-6
#: Seconds that the operator takes for no tokens, and the number of tokens above which it works in strips, with three
#: passes over the inner products instead of one (docs/design/cuda-kernels.md).
_PRUNE, _STRIPS = 100e-6, 6324


@dataclass(frozen=True)
class StageTimes:
    """Estimated seconds; the rules are at the top of this file.

    Attributes:
        vision: Tower and projector, for all frames.
        prune: The operator, on the most expensive video: one segment without static tokens.
        prefill: The prompt, up to the first token's logits.
        token: One decode step.
    """

    vision: float
    prune: float
    prefill: float
    token: float

    @property
    def first_token(self) -> float:
        """From frames of the model's size, on the device, to the first token."""
        return self.vision + self.prune + self.prefill


def vision_time(model: ModelDimensions, device: Device, frames: int, precision: Precision = "fp16") -> float:
    """Seconds for tower and projector."""
    spec, tower = model.vision, model.tower
    grids, (per_patch, per_token) = model.video.steps(frames), spec.projector
    patches = grids * spec.patches
    linear = 2 * (patches * (tower.weights + per_patch) + model.video.total_tokens(frames) * per_token)
    work = _Work(linear, precision, grids * model.vision_attention)
    weights = (tower.weights + per_patch + per_token) * BYTES[precision]
    return _stage(device, tower, patches, TOWER_PASSES, work, weights)


def prune_time(model: ModelDimensions, device: Device, frames: int) -> float:
    """Seconds for the operator: inner products of all tokens, in one pass or three, written and read in fp32."""
    tokens, width = model.video.total_tokens(frames), model.decoder.hidden_size
    passes = 1 if tokens <= _STRIPS else 3
    operations = passes * 2 * tokens**2 * width
    moved = 3 * 2 * tokens * width + 2 * passes * products_bytes(tokens)
    return operations / (device.peak("fp16") * COMPUTE) + moved / _rate(device) + _PRUNE


def prefill_time(model: ModelDimensions, device: Device, tokens: int, precision: Precision, weights: float) -> float:
    """Seconds from the prompt's embeddings to the logits after it; ``weights`` in bytes."""
    spec, layers = model.decoder, model.decoder_layers
    attention = 4 * tokens**2 / 2 * spec.heads * spec.head_dim * spec.layers  # causal: half of the pairs
    work = _Work(2 * tokens * layers.weights, precision, attention + 2 * model.head_weights)
    return _stage(device, layers, tokens, DECODER_PASSES, work, weights)


def token_time(
    model: ModelDimensions, device: Device, context: int, weights: float, precision: Precision = "fp16"
) -> float:
    """Seconds for one decode step, which reads all weights and ``context`` positions of the cache."""
    quantized, layer = precision != "fp16", STEP
    if quantized and device.jetson:
        layer = LAYER
    elif quantized:
        weights /= OWN_MEMORY
    return (weights + cache_bytes(model.decoder, context, 2)) / _rate(device) + layer * model.decoder.layers


@dataclass(frozen=True)
class _Work:
    """Operations of linear layers, in a precision, and other operations, in fp16."""

    linear: float
    precision: Precision
    other: float

    def seconds(self, device: Device) -> float:
        """Seconds at the rate that matrix products reach."""
        share = OWN_COMPUTE if self.precision in ("int8", "int4") and not device.jetson else COMPUTE
        if self.precision == "int4" and device.multiplies_slabs:
            share = SLAB_COMPUTE
        return self.linear / (device.peak(self.precision) * share) + self.other / (device.peak("fp16") * COMPUTE)


def _stage(device: Device, layers: LayerStack, tokens: int, passes: int, work: _Work, weights: float) -> float:
    moved = passes * tokens * layers.count * layers.widths * 2
    return max(work.seconds(device), weights / _rate(device)) + moved / _rate(device) + LAYER * layers.count


def _rate(device: Device) -> float:
    return device.bandwidth * 1e9 * MEMORY
