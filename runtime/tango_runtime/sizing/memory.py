"""The memory model: how many bytes a graph takes beside its weights. `tango build` and `tango plan` both use it.

These are upper estimates by arithmetic, and every command that prints one says so:

- activations: of a portable graph, attention scores in fp32, twice, or the widest other tensors. Kernels that fuse
  attention, as those of device graphs do, store no scores: there it is what a layer's tensors take together, which is
  also what ONNX Runtime's arena grows to, whose blocks are of the sizes that were asked for;
- slabs: weights of 4 bits become fp16, some outputs at a time, where ONNX Runtime multiplies a prompt by them on Hopper
  (docs/design/cuda-kernels.md). They are in its arena, too;
- cache: keys and values of every position of the context;
- workspace: the Tango operator's, in its ``fast`` precision (docs/design/cuda-kernels.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from tango_plugins import PruneParams, op
from tango_runtime.bundle import DecoderSpec, GraphName, VideoSpec, VisionSpec

#: Maximum number of frames of a video: TANGO_MAX_FRAMES of tango/prune.h.
MAX_FRAMES = 256
#: Tokens around the video in a typical prompt: a chat template, a short question and the newline after the video.
#: `tango bench` measures prompts with this many, so that measurements and estimates are of the same work.
TYPICAL_TEXT_TOKENS = 31
#: Tokens around the video that a prefill pass has space for. It is larger than the typical number because it is a
#: limit: a longer question costs another prefill pass, and every engine's activations grow with it.
MAX_TEXT_TOKENS = 128
#: Tokens of a text that says how long a video is, and of each time in it, such as ``123.45s,``: a token a digit.
VIDEO_TEXT_TOKENS, TIME_TOKENS = 45, 8
#: Positions of the cache that the default context adds for the answer.
ANSWER_TOKENS = 512
#: Largest size in bytes of the operator's matrix of inner products; above it, the operator works in strips of rows.
MAX_PRODUCTS_BYTES = 160 * 10**6

#: Maximum size in bytes of the vision graph's activations if frames have any size; it limits the steps per call.
VISION_BYTES = 2 << 30

#: Size in bytes of the largest slab, and what its outputs are a multiple of: those of linear/slabs.cu.
MAX_SLAB_BYTES, SLAB_OUTPUTS = 136_000_000, 128

#: Most steps of frames of one size, and most tokens, of one pass of a device graph on ONNX Runtime.
STEPS_AT_ONCE, TOKENS_AT_ONCE = 32, 4096

_TILE = 64
_FP16, _FP32 = 2, 4


class Dimensions(Protocol):
    """What the model needs to know; a bundle's manifest has it."""

    @property
    def video(self) -> VideoSpec:
        """Frames and their tokens."""

    @property
    def vision(self) -> VisionSpec:
        """The vision tower."""

    @property
    def decoder(self) -> DecoderSpec:
        """The decoder."""


@dataclass(frozen=True)
class MaxShapes:
    """The largest shapes that the graphs run at.

    Attributes:
        frames: Frames of a video.
        pass_tokens: Tokens of one prefill pass.
        context: Positions of the cache.
    """

    frames: int
    pass_tokens: int
    context: int


def default_pass_tokens(video_tokens: int, limit: int) -> int:
    """Tokens of one prefill pass that holds the video tokens and the text around them."""
    return min(limit, _round_up(video_tokens + MAX_TEXT_TOKENS))


def default_context(pass_tokens: int, limit: int) -> int:
    """Positions of the cache that hold a prefill pass and an answer."""
    return min(limit, _round_up(pass_tokens + ANSWER_TOKENS))


def max_video_tokens(video: VideoSpec, params: PruneParams, frames: int, *, row_ends: bool = False) -> int:
    """Most video tokens that a prompt can hold after pruning.

    Args:
        video: Frames and their tokens.
        params: The operator's parameters.
        frames: Frames of the video.
        row_ends: Whether a newline token follows each grid row with a kept token.
    """
    count = video.steps(frames)
    return with_row_ends(op.capacity(count, video.tokens_per_frame, params), count, params, row_ends)


def typical_video_tokens(video: VideoSpec, params: PruneParams, frames: int, *, row_ends: bool = False) -> int:
    """Video tokens of a prompt after pruning with the ``exact`` budget; arguments as in :func:`max_video_tokens`."""
    count = video.steps(frames)
    return with_row_ends(op.exact_count(count, video.tokens_per_frame, params), count, params, row_ends)


def all_video_tokens(video: VideoSpec, params: PruneParams, frames: int, *, row_ends: bool = False) -> int:
    """Video tokens of a prompt without pruning; arguments as in :func:`max_video_tokens`."""
    return with_row_ends(video.total_tokens(frames), video.steps(frames), params, row_ends)


def video_text_tokens(frames: int, video_text: bool) -> int:
    """About how many tokens the prompt takes to say when a video's frames are, if ``video_text``."""
    return VIDEO_TEXT_TOKENS + TIME_TOKENS * frames if video_text else 0


def with_row_ends(tokens: int, grids: int, params: PruneParams, row_ends: bool) -> int:
    """Kept tokens and, if ``row_ends``, the newlines of the rows that they can lie in."""
    return tokens + (min(tokens, grids * params.grid[0]) if row_ends else 0)


def activation_bytes(graph: GraphName, dims: Dimensions, shapes: MaxShapes, item: int, *, fused: bool = False) -> int:
    """Bytes of a graph's activations at its largest shapes.

    Args:
        graph: The graph.
        dims: The model's dimensions.
        shapes: The largest shapes.
        item: Bytes of an element of the graph's tensors.
        fused: Whether attention is fused.
    """
    hidden, tokens = dims.decoder.hidden_size, shapes.pass_tokens
    if graph == "vision":
        steps, of_step = dims.video.steps(shapes.frames), dims.video.tokens_per_frame
        if dims.video.budget is not None:
            steps = min(steps, vision_steps_at_once(dims, of_step, item, fused=fused))
        return steps * _step_bytes(dims, of_step, item, fused=fused)
    if graph == "prune":
        return workspace_bytes(dims.video.total_tokens(shapes.frames), hidden)
    if graph == "embed":
        return tokens * hidden * item
    if fused:
        return tokens * item * (6 * hidden + 3 * dims.decoder.intermediate_size)  # a stream, norms, attention, the MLP
    scores = 2 * _FP32 * dims.decoder.heads * (shapes.context + tokens)
    return tokens * (scores + 16 * item * hidden)


def vision_steps_at_once(dims: Dimensions, tokens: int, item: int, *, fused: bool = False) -> int:
    """Steps of frames that one pass of the vision graph takes within ``VISION_BYTES``, at least one.

    Args:
        dims: The model's dimensions.
        tokens: Tokens of a step.
        item: Bytes of an element of the graph's tensors.
        fused: The scores of its attention are never in memory.
    """
    return max(1, VISION_BYTES // _step_bytes(dims, tokens, item, fused=fused))


def _step_bytes(dims: Dimensions, tokens: int, item: int, *, fused: bool) -> int:
    """Bytes of the vision graph's activations for one step of ``tokens`` tokens."""
    vision, hidden = dims.vision, dims.decoder.hidden_size
    patches = vision.patches * tokens // dims.video.tokens_per_frame
    if fused:
        return patches * (_layer_bytes(vision, item) + (item * hidden if vision.projector[0] else 0))
    return patches * (2 * _FP32 * vision.heads * patches + 8 * item * hidden)


def _layer_bytes(vision: VisionSpec, item: int) -> int:
    """Bytes of a patch in a layer: its stream before and after an addition, a norm, query, key and value, and the MLP.

    The stream of a tower with a gate is fp32, and rotated queries and keys are tensors of their own.
    """
    width, inner = vision.hidden_size, vision.intermediate_size
    if vision.mlp == "gated":
        return 2 * _FP32 * width + 3 * item * (2 * width + inner)
    return item * (6 * width + inner)


def slab_bytes(decoder: DecoderSpec, head: int) -> int:
    """Bytes of the slabs of a decoder, in fp16: a product has one of its own if no earlier one is as large.

    Args:
        decoder: The decoder.
        head: Outputs of its head.
    """
    heads, hidden, intermediate = decoder.heads * decoder.head_dim, decoder.hidden_size, decoder.intermediate_size
    qkv = heads + 2 * decoder.kv_heads * decoder.head_dim
    products = (hidden, qkv), (heads, hidden), (hidden, intermediate), (intermediate, hidden), (hidden, head)
    total = largest = 0
    for inputs, outputs in products:
        size = _FP16 * inputs * _slab_outputs(inputs, outputs)
        total += size if size > largest else 0
        largest = max(largest, size)
    return total


def _slab_outputs(inputs: int, outputs: int) -> int:
    room = MAX_SLAB_BYTES // (_FP16 * inputs)
    if room >= outputs:
        return outputs
    slabs = -(-outputs // (room // SLAB_OUTPUTS * SLAB_OUTPUTS))
    return -(-outputs // (slabs * SLAB_OUTPUTS)) * SLAB_OUTPUTS


def cache_bytes(decoder: DecoderSpec, positions: int, item: int) -> int:
    """Bytes of the keys and values of ``positions`` positions."""
    return 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * positions * item


def workspace_bytes(tokens: int, hidden_size: int) -> int:
    """Bytes of the operator's workspace for ``tokens`` video tokens."""
    return math.ceil(tokens * (2.125 * hidden_size + 120)) + products_bytes(tokens)


def products_bytes(tokens: int) -> int:
    """Bytes of the operator's matrix of inner products."""
    return min(_FP32 * tokens**2, MAX_PRODUCTS_BYTES)


def _round_up(tokens: int) -> int:
    """Rounds up to whole tiles of the kernels; similar requests then share an engine."""
    return -(-tokens // _TILE) * _TILE
