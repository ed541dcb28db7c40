"""The memory model, and models of other families that its data must be able to describe."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import tango_plugins
from tango_plugins import PruneParams, op
from tango_runtime.bundle import VideoSpec, VisionSpec
from tango_runtime.sizing import memory
from tango_runtime.sizing.memory import MaxShapes
from tango_runtime.sizing.models import released_models

SHAPES = MaxShapes(frames=32, pass_tokens=832, context=1344)


@pytest.fixture
def large():
    return released_models()["llava-ov-7b"]


@pytest.fixture
def qwen(large):
    """Qwen2.5-VL-7B's tower on frames of 560×1008 pixels: two frames a step, 20×36 tokens, most layers in windows."""
    return replace(
        large,
        video=VideoSpec(32, (560, 1008), "bicubic", 720, 2, "nearest"),
        vision=VisionSpec(32, 1280, 3420, 16, 2880, (0, 5120**2 + 5120 * 3584), "gated", global_layers=4, window=64),
        params=PruneParams(grid=(20, 36)),
    )


def test_the_limit_on_frames_is_the_librarys():
    header = Path(tango_plugins.__file__).parent / "native/include/tango/prune.h"
    (limit,) = re.findall(r"#define TANGO_MAX_FRAMES (\d+)", header.read_text())
    assert int(limit) == memory.MAX_FRAMES


def test_a_typical_prompt_fits_into_one_prefill_pass():
    assert memory.TYPICAL_TEXT_TOKENS < memory.MAX_TEXT_TOKENS
    assert memory.default_pass_tokens(628, 32768) == 768
    assert memory.default_pass_tokens(628, 700) == 700
    assert memory.default_context(768, 32768) == 1280


def test_activations_follow_from_the_models_heads_and_patches(large):
    def activations(graph, **changes):
        return memory.activation_bytes(graph, replace(large, **changes), SHAPES, 2)

    scores = 2 * 4 * 32 * 729 * 729  # of one head: fp32, twice
    more = replace(large.vision, heads=large.vision.heads + 1)
    assert activations("vision", vision=more) - activations("vision") == scores
    more = replace(large.decoder, heads=large.decoder.heads + 1)
    assert activations("decoder", decoder=more) - activations("decoder") == 2 * 4 * 832 * (1344 + 832)


def test_the_operators_workspace_is_a_graphs_activations(large):
    assert memory.activation_bytes("prune", large, SHAPES, 2) == memory.workspace_bytes(32 * 196, 3584)


def test_slabs_are_the_librarys():
    source = (Path(tango_plugins.__file__).parent / "native/src/linear/slabs.cu").read_text()
    found = [
        int(re.findall(rf"{name} = ([\d']+);", source)[0].replace("'", "")) for name in ("kSlabBytes", "kNarrowest")
    ]
    assert found == [memory.MAX_SLAB_BYTES, memory.SLAB_OUTPUTS]


def test_a_slab_takes_the_place_of_a_smaller_one(large):
    qkv, gate, head = 3584 * 4608, 3584 * 18944, 3584 * 16896  # a ninth of the head
    assert memory.slab_bytes(large.decoder, 152064) == 2 * (qkv + gate)
    narrow = replace(large.decoder, intermediate_size=1000)
    assert memory.slab_bytes(narrow, 152064) == 2 * (qkv + head)
    assert memory.slab_bytes(narrow, 1000) == 2 * qkv


def test_a_cache_has_keys_and_values_of_every_position(large):
    assert memory.cache_bytes(large.decoder, 1000, 2) == 2 * 28 * 4 * 128 * 1000 * 2


def test_row_ends_are_part_of_the_prompt():
    """LLaVA-Video: 64 frames, 13×13 tokens, a newline after each row that keeps a token."""
    video, params = VideoSpec(64, (384, 384), "bicubic", 169, 1, "floor"), PruneParams(grid=(13, 13))
    assert memory.typical_video_tokens(video, params, 64) == 1082
    assert memory.typical_video_tokens(video, params, 64, row_ends=True) == 1082 + 13 * 64
    capacity = op.capacity(64, 169, params)
    assert memory.max_video_tokens(video, params, 64, row_ends=True) == capacity + 13 * 64
    assert memory.with_row_ends(5, 64, params, row_ends=True) == 5 + 5
    assert memory.all_video_tokens(video, params, 64, row_ends=True) == 13 * 14 * 64
    assert memory.all_video_tokens(video, params, 64) == 13 * 13 * 64


def test_what_a_prompt_says_of_its_video_is_part_of_it():
    assert memory.video_text_tokens(64, video_text=False) == 0
    assert memory.video_text_tokens(64, video_text=True) == 45 + 64 * len("123.45s,")


def test_two_frames_a_step_make_one_grid(qwen):
    assert [qwen.video.steps(frames) for frames in (1, 2, 3, 32)] == [1, 1, 2, 16]
    assert memory.typical_video_tokens(qwen.video, qwen.params, 32) == 1152


def test_a_tower_with_a_gate_and_windows(qwen):
    """3.63 TFLOP of linear layers and 0.17 TFLOP of global attention for 720 tokens; windows add little."""
    assert 2 * 2880 * qwen.tower.weights == pytest.approx(3.63e12, rel=0.005)
    assert qwen.tower.mlp_width == 2 * 3420
    windows = 28 * 4 * 2880 * 64 * 1280
    assert qwen.vision_attention - windows == pytest.approx(0.17e12, rel=0.005)
