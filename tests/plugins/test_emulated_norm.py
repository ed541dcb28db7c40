"""The CUDA library's norms in the CUDA emulator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.plugins.cuda_emulator import compiled
from tests.plugins.norms import HALF, SINGLE, TYPES, Rows, check

pytestmark = pytest.mark.nvcc

#: Rows of a warp, the widest ones too; of a block; then the same where no vector fits.
SIZES = [(3, 192), (5, 512), (2, 520), (1, 1280), (1, 7), (5, 255), (2, 257), (3, 1153)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("norm"), "norm")


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("size", SIZES)
def test_sum_and_norm_equal_fp64(path, kind, size):
    check(Rows(kind, *size, path=path, device="cpu"))


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("width", [64, 65])
def test_types_mix(path, types, width):
    check(Rows("layer", 3, width, types, path=path, device="cpu"))


@pytest.mark.parametrize("without", [("bias",), ("beta",), ("branch", "bias"), ("branch", "bias", "sum")])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_what_is_optional_may_be_null(path, kind, without):
    check(Rows(kind, 2, 96, (SINGLE, HALF, HALF), without, path=path, device="cpu"))


@pytest.mark.parametrize("types", [TYPES[0], TYPES[1]])
def test_misaligned_tensors_are_taken_by_element(path, types):
    check(Rows("layer", 3, 64, types, offset=1, path=path, device="cpu"))


def test_the_variance_of_rows_far_from_zero(path):
    """The mean of the squares less the square of the mean would have no digit left."""
    check(Rows("layer", 2, 1280, (SINGLE, SINGLE, SINGLE), ("branch", "bias"), mean=1000.0, path=path, device="cpu"))


@pytest.mark.parametrize("types", [TYPES[0], TYPES[2]])
def test_outputs_may_be_inputs(path, types):
    apart, within = (Rows("rms", 4, 128, types, path=path, device="cpu") for _ in range(2))
    assert apart.enqueue() == 0
    held = within.tensors
    assert within.enqueue(sum=held["residual"], y=held["branch"]) == 0
    assert torch.equal(held["residual"], apart.tensors["sum"])
    assert torch.equal(held["branch"], apart.tensors["y"])


def test_the_sum_is_normed_as_it_was_rounded(path):
    """An addition and a norm, one after the other, give the same bits."""
    together = Rows("layer", 4, 192, path=path, device="cpu")
    assert together.enqueue() == 0
    alone = Rows("layer", 4, 192, without=("branch", "bias"), path=path, device="cpu")
    assert alone.enqueue(residual=together.tensors["sum"]) == 0
    unwritten = Rows("layer", 4, 192, without=("sum",), path=path, device="cpu")
    assert unwritten.enqueue() == 0
    assert torch.equal(alone.tensors["y"], together.tensors["y"])
    assert torch.equal(unwritten.tensors["y"], together.tensors["y"])


def test_no_rows(path):
    found = Rows("layer", 1, 8, path=path, device="cpu")
    found.size = (0, 8)
    assert found.enqueue() == 0
    assert np.isnan(found.read("y")).all()


@pytest.mark.parametrize("name", ["residual", "weight", "y"])
def test_a_null_tensor_is_rejected_by_name(path, name):
    found = Rows("rms", 1, 8, without=(name,), path=path, device="cpu")
    assert found.enqueue() != 0
    assert found.library.tango_last_error() == f"{name} is null".encode()


@pytest.mark.parametrize("missing", [0, 1])
def test_null_arguments_are_rejected_by_name(path, missing):
    library = Rows("rms", 1, 8, path=path, device="cpu").library
    given = [library.tango_rms_norm_enqueue.argtypes[i]._type_() for i in range(2)]
    given[missing] = None
    assert library.tango_rms_norm_enqueue(*given, None) != 0
    assert library.tango_last_error() == f"{('shape', 'tensors')[missing]} is null".encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": (-1, 8)}, "rows is -1"),
        ({"size": (1, 0)}, "width is 0: it must be from 1 to 8192"),
        ({"size": (1, 8193)}, "width is 8193"),
    ],
)
def test_a_wrong_shape_is_rejected_by_name(path, change, words):
    found = Rows("layer", 1, 8, path=path, device="cpu")
    vars(found).update(change)
    assert found.enqueue() != 0
    assert words in found.library.tango_last_error().decode()


def test_a_negative_epsilon_is_rejected(path):
    found = Rows("layer", 1, 8, path=path, device="cpu")
    for epsilon in (-1e-6, float("nan")):
        assert found.enqueue(epsilon) != 0
        assert "it must not be negative" in found.library.tango_last_error().decode()


def test_a_bias_of_no_branch_is_rejected(path):
    found = Rows("layer", 1, 8, without=("branch",), path=path, device="cpu")
    assert found.enqueue() != 0
    assert found.library.tango_last_error() == b"bias is given without branch"


def test_an_address_inside_of_an_element_is_rejected(path):
    found = Rows("layer", 1, 8, path=path, device="cpu")
    shifted = torch.zeros(64, dtype=torch.uint8)[1:]
    assert found.enqueue(y=shifted) != 0
    assert "y is at" in found.library.tango_last_error().decode()
