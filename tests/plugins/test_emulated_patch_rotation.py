"""The CUDA library's rotation of a tower's queries and keys in the CUDA emulator."""

from __future__ import annotations

import pytest
import torch

from tests.plugins.cuda_emulator import compiled
from tests.plugins.patch_rotations import Rotation, Shape, check

pytestmark = pytest.mark.nvcc


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("rotation"), "rotation")


@pytest.mark.parametrize("shape", [Shape(1, 1, 1, 16), Shape(2, 7, 3, 80), Shape(1, 33, 9, 48), Shape(3, 2, 1, 128)])
def test_it_equals_fp64(path, shape):
    check(Rotation(shape, path, device="cpu"))


@pytest.mark.parametrize("name", ["qkv", "bias", "cosines", "sines", "query", "key"])
def test_a_null_tensor_is_rejected_by_name(path, name):
    found = Rotation(Shape(1, 2, 1, 16), path, device="cpu")
    found.tensors |= found.outputs(torch.half)
    del found.tensors[name]
    assert found.enqueue() != 0
    assert found.library.tango_last_error() == f"{name} is null".encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"heads": 0}, "heads is 0"),
        ({"head_dim": 72}, "head_dim % 16 is 8"),
        ({"frames": 1 << 15, "tokens": 1 << 12, "heads": 16}, "frames * tokens is"),
    ],
)
def test_a_wrong_shape_is_rejected_by_name(path, change, words):
    found = Rotation(Shape(1, 2, 1, 16), path, device="cpu")
    outputs = found.outputs(torch.half)
    found.shape = Shape(**vars(found.shape) | change)
    assert found.enqueue(**outputs) != 0
    assert words in found.library.tango_last_error().decode()


def test_a_misaligned_tensor_is_rejected_by_name(path):
    found = Rotation(Shape(1, 2, 1, 16), path, device="cpu")
    outputs = found.outputs(torch.half)
    assert found.enqueue(**outputs | {"key": outputs["key"].view(-1)[1:]}) != 0
    assert "key is at" in found.library.tango_last_error().decode()
