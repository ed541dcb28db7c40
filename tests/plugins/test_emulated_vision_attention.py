"""The CUDA library's attention of a vision tower in the CUDA emulator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.plugins.cuda_emulator import compiled
from tests.plugins.vision_attentions import BIASES, Shape, Vision, check, rotated_apart

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("vision"), "vision", "rotation")


#: Attention with rotation: windows that are cut off at the right, below, and at the corner, frames that fit a window,
#: heads of each kernel, and more of them than a block has.
ROTATED = [
    Shape(2, 8, 8, 2, 80, window=8),
    Shape(1, 11, 13, 1, 80, window=8),
    Shape(2, 7, 10, 6, 80, window=4),
    Shape(1, 1, 1, 1, 16, window=8),
    Shape(1, 5, 9, 5, 48, window=3),
    Shape(1, 3, 21, 1, 64),
    Shape(1, 4, 5, 2, 128, window=50),
]


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 1, 1, 1, 72),
        Shape(2, 3, 3, 2, 72),
        Shape(1, 5, 13, 1, 80),  # one key more than a tile has
        Shape(1, 8, 16, 1, 64),  # two full tiles
        Shape(1, 10, 13, 1, 72),  # large tiles
        Shape(1, 2, 33, 1, 128),
        Shape(1, 11, 12, 1, 120),
        Shape(1, 4, 4, 3, 8),
        Shape(1, 3, 5, 2, 32),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_frame_equals_fp64(path, shape, packed):
    check(Vision(shape, packed, path=path, device="cpu"))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 4, 6, 1, 72, window=2),
        Shape(1, 7, 10, 1, 80, window=4),  # cut off at the right, below, and at the corner
        Shape(1, 9, 9, 1, 80, window=8),
        Shape(1, 3, 70, 1, 64, window=3),
        Shape(1, 5, 5, 1, 72, window=1),
        Shape(1, 4, 5, 2, 72, window=50),  # larger than a frame
        Shape(1, 4, 5, 6, 64, window=3),  # more heads than a block has
    ],
)
def test_windows_equal_fp64(path, shape):
    check(Vision(shape, path=path, device="cpu"))


def test_without_a_bias(path):
    check(Vision(Shape(1, 3, 7, 2, 72), has_bias=False, path=path, device="cpu"))


@pytest.mark.parametrize("shape", ROTATED, ids=str)
@pytest.mark.parametrize(("packed", "has_bias"), [(True, True), (False, True), (True, False)])
def test_with_a_rotation(path, shape, packed, has_bias):
    check(Vision(shape, packed, has_bias, path=path, device="cpu", rotates=True))


@pytest.mark.parametrize("shape", ROTATED, ids=str)
def test_a_rotation_before_gives_the_same_bits(path, shape):
    found = Vision(shape, path=path, device="cpu", rotates=True)
    apart = rotated_apart(found)
    assert (found.enqueue(), apart.enqueue()) == (0, 0)
    assert torch.equal(found.tensors["attn_out"], apart.tensors["attn_out"])


def test_a_bias_of_one_part(path):
    for name in BIASES:
        found = Vision(Shape(1, 4, 6, 2, 80, window=4), path=path, device="cpu", rotates=True)
        for other in set(BIASES) - {name}:
            del found.tensors[other]
        check(found)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape(1, 9, 9, 1, 80, window=9), "patches of a window with rotation is 81: it must be from 1 to 64"),
        (Shape(1, 5, 13, 1, 80), "patches of a window with rotation is 65"),
        (Shape(1, 4, 4, 1, 72, window=4), "head_dim % 16, of heads that are rotated is 8"),
    ],
)
def test_what_it_cannot_rotate_is_rejected_by_name(path, shape, words):
    found = Vision(shape, path=path, device="cpu", rotates=True)
    assert found.enqueue() != 0
    assert words in found.library.tango_last_error().decode()


@pytest.mark.parametrize("name", ["cosines", "sines"])
def test_cosines_and_sines_are_given_together(path, name):
    found = Vision(Shape(1, 2, 2, 1, 64), path=path, device="cpu", rotates=True)
    del found.tensors[name]
    assert found.enqueue() != 0
    assert found.library.tango_last_error() == f"{name} is null".encode()


def test_keys_with_large_biases_overflow_nothing(path):
    found = Vision(Shape(1, 9, 9, 2, 72), path=path, device="cpu")
    found.bias[144:288:5] = 150.0
    found.bias[145:288:7] = -150.0
    found.bias[:144] *= 20
    check(found)


def test_scores_far_apart(path):
    """One key takes all of the weight, and the others underflow; scores reach thousands."""
    found = Vision(Shape(1, 9, 9, 1, 80), scale=16.0, path=path, device="cpu")
    found.tensors["query"][5, 7] = found.tensors["key"][11, 7] = 3000.0
    check(found)


def test_an_overflow_is_visible(path):
    found = Vision(Shape(1, 4, 4, 1, 64), path=path, device="cpu")
    found.tensors["query"][7, 3] = torch.inf
    assert found.enqueue() == 0
    assert found.tensors["attn_out"][7].isnan().any()
    assert found.tensors["attn_out"][:7].isfinite().all()


def test_nothing_outside_of_the_output_is_written(path):
    found = Vision(Shape(2, 3, 5, 1, 72, window=2), path=path, device="cpu")
    around = torch.full((2 * 15 + 4, 72), -77.0, dtype=torch.float16)
    assert found.enqueue(attn_out=around[2:]) == 0
    assert (around[:2] == -77.0).all()
    assert (around[-2:] == -77.0).all()
    np.testing.assert_allclose(around[2:-2].double(), found.expected().reshape(30, 72), atol=2e-2)


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_out"])
def test_a_null_tensor_is_rejected_by_name(path, name):
    found = Vision(Shape(1, 2, 2, 1, 64), path=path, device="cpu")
    del found.tensors[name]
    assert found.enqueue() != 0
    assert found.library.tango_last_error() == f"{name} is null".encode()


@pytest.mark.parametrize("name", ["query", "key", "value", *BIASES, "cosines", "sines", "attn_out"])
def test_a_misaligned_tensor_is_rejected_by_name(path, name):
    found = Vision(Shape(1, 2, 2, 1, 64), path=path, device="cpu", rotates=True)
    assert found.enqueue(**{name: found.tensors[name][..., 1:]}) != 0
    assert f"{name} is at" in found.library.tango_last_error().decode()


@pytest.mark.parametrize("missing", [0, 1])
def test_null_arguments_are_rejected_by_name(path, missing):
    function = Vision(Shape(1, 2, 2, 1, 64), path=path, device="cpu").library.tango_vision_attention_enqueue
    given = [function.argtypes[i]._type_() for i in range(2)]
    given[missing] = None
    assert function(*given, None) != 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"rows": 0}, "rows is 0"),
        ({"columns": -1}, "columns is -1"),
        ({"heads": 0}, "heads is 0"),
        ({"head_dim": 0}, "head_dim is 0: it must be from 8 to 128"),
        ({"head_dim": 68}, "head_dim % 8 is 4"),
        ({"head_dim": 136}, "head_dim is 136"),
        ({"window": -1}, "window is -1: it must be from 0 to 1024"),
        ({"rows": 1 << 15, "columns": 1 << 15, "frames": 64}, "frames * rows * columns is"),
    ],
)
def test_a_wrong_shape_is_rejected_by_name(path, change, words):
    found = Vision(Shape(1, 2, 2, 1, 64), path=path, device="cpu")
    found.shape = Shape(**vars(found.shape) | change)
    assert found.enqueue() != 0
    assert words in found.library.tango_last_error().decode()


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("stride", [56, 196])
def test_a_wrong_stride_is_rejected_by_name(path, index, stride):
    found = Vision(Shape(1, 2, 2, 1, 64), path=path, device="cpu")
    strides = list(found.strides)
    strides[index] = stride
    assert found.enqueue(strides) != 0
    assert ("query", "key", "value")[index] + "_stride" in found.library.tango_last_error().decode()
