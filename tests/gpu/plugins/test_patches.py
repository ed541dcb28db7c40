"""Patches of frames on the GPU, against NumPy."""

from __future__ import annotations

import pytest
import torch

from tests.plugins.frame_patches import SHAPES, Patches, Shape, check


@pytest.mark.parametrize("shape", [*SHAPES, Shape(16, 2, 560, 1008, 14)], ids=str)
def test_it_equals_numpy_bit_for_bit(shape):
    check(Patches(shape))


def test_nothing_outside_of_the_output_is_written():
    found = Patches(Shape(2, 2, 28, 56, 14))
    size = found.tensors["patches"].numel()
    around = torch.full((size + 16,), -77.0, dtype=torch.half, device="cuda")
    assert found.enqueue(patches=around[8:]) == 0
    assert torch.equal(around[8:-8].cpu(), found.expected().view(-1))
    assert (torch.cat((around[:8], around[-8:])) == -77.0).all()
