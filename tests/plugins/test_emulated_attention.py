"""Attention by Hopper's warpgroups in the CUDA emulator."""

from __future__ import annotations

import pytest
import torch

from tests.plugins import vision_attentions
from tests.plugins.attentions import Pass, Shape, check
from tests.plugins.cuda_emulator import compiled
from tests.plugins.vision_attentions import Vision

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A GPU without the shared memory that attention on mma.sync takes, so that it fails where it is chosen."""
    return compiled(tmp_path_factory.mktemp("attention_sm90"), "attention_sm90", sms=2, shared_bytes=1 << 10)


@pytest.fixture(scope="module")
def vision_path(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("vision_sm90"), "vision_sm90", sms=2, shared_bytes=1 << 10)


@pytest.mark.parametrize(
    ("shape", "begin"),
    [
        (Shape(20, 7, 1, 128, 400), 260),  # all slots of the ring are used again
        (Shape(128, 5, 5, 128, 128), 0),  # more tiles of queries than two rounds of the blocks
        (Shape(130, 2, 2, 128, 140), 3),
        (Shape(66, 4, 2, 64, 200), 90),
        (Shape(193, 2, 2, 64, 200), 0),  # three warpgroups of queries
        (Shape(70, 12, 4, 64, 170), 100),
    ],
)
@pytest.mark.parametrize("positioned", [False, True])
def test_attention_of_a_prefill_equals_fp64(path, shape, begin, positioned):
    check(Pass(shape, begin, path=path, device="cpu", positioned=positioned))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_far_apart(path, head_dim):
    """Later tiles raise the row maxima by far."""
    found = Pass(Shape(40, 4, 1, head_dim, 300), 250, path=path, device="cpu", scale=2.0)
    found.tensors["keys"][:, 200:210] *= 4
    check(found)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_an_overflow_stays_in_its_row(path, head_dim):
    found = Pass(Shape(140, 4, 2, head_dim, 150), path=path, device="cpu")
    found.tensors["qkv"][7, :head_dim] = torch.inf
    found.tensors["qkv"][130, -head_dim:] = torch.inf  # a value of the second KV head
    assert found.enqueue() == 0
    attn_out = found.tensors["attn_out"].view(140, 4, head_dim)
    assert attn_out[7, 0].isnan().any()
    assert attn_out[:7].isfinite().all()
    assert attn_out[8:, :2].isfinite().all()
    assert not attn_out[130:, 2:].isfinite().any()


@pytest.mark.parametrize(
    "shape",
    [
        Shape(31, 4, 1, 128, 40),  # fewer rows of a KV head than two warpgroups have
        Shape(140, 4, 2, 96, 150),
        Shape(140, 4, 2, 256, 150),
    ],
)
def test_other_shapes_have_no_kernel_for_warpgroups(path, shape):
    found = Pass(shape, path=path, device="cpu")
    assert found.enqueue() != 0
    assert "bytes of shared memory, this GPU has 1024" in found.library.tango_last_error().decode()


@pytest.mark.parametrize(
    "shape",
    [
        vision_attentions.Shape(2, 11, 12, 2, 64),
        vision_attentions.Shape(1, 14, 14, 2, 72),
        vision_attentions.Shape(1, 12, 13, 1, 80),
        vision_attentions.Shape(1, 11, 13, 2, 120),
        vision_attentions.Shape(1, 13, 17, 1, 72, window=12),
    ],
)
def test_attention_of_a_tower_equals_fp64(vision_path, shape):
    vision_attentions.check(Vision(shape, path=vision_path, device="cpu"))


def test_a_tower_without_a_bias(vision_path):
    vision_attentions.check(
        Vision(vision_attentions.Shape(1, 11, 12, 1, 72), has_bias=False, path=vision_path, device="cpu")
    )
