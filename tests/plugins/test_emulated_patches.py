"""The CUDA library's patches of frames in the CUDA emulator."""

from __future__ import annotations

import pytest

from tests.plugins.cuda_emulator import compiled
from tests.plugins.frame_patches import SHAPES, Patches, Shape, check

pytestmark = pytest.mark.nvcc


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("patches"), "patches")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_numpy_bit_for_bit(path, shape):
    check(Patches(shape, path, device="cpu"))


def test_no_frames_are_no_patches(path):
    assert Patches(Shape(0, 2, 28, 28, 14), path, device="cpu").enqueue() == 0


@pytest.mark.parametrize("name", ["pixels", "mean", "deviation", "patches"])
def test_a_null_tensor_is_rejected_by_name(path, name):
    found = Patches(Shape(1, 1, 2, 2, 2), path, device="cpu")
    del found.tensors[name]
    assert found.enqueue() != 0
    assert found.library.tango_last_error() == f"{name} is null".encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": -1}, "frames is -1"),
        ({"steps": 0}, "steps is 0"),
        ({"rows": 0}, "rows is 0"),
        ({"size": 0}, "size is 0"),
        ({"rows": 27}, "rows is 27: it must be a multiple of 14"),
        ({"columns": 29}, "columns is 29: it must be a multiple of 14"),
        ({"frames": 1 << 15, "steps": 1 << 15}, "frames * steps * rows is"),
    ],
)
def test_a_wrong_shape_is_rejected_by_name(path, change, words):
    found = Patches(Shape(1, 2, 28, 28, 14), path, device="cpu")
    found.shape = Shape(**vars(found.shape) | change)
    assert found.enqueue() != 0
    assert words in found.library.tango_last_error().decode()


def test_a_misaligned_tensor_is_rejected_by_name(path):
    found = Patches(Shape(1, 1, 2, 2, 2), path, device="cpu")
    assert found.enqueue(mean=found.tensors["pixels"].view(-1)[1:]) != 0
    assert "mean is at" in found.library.tango_last_error().decode()
