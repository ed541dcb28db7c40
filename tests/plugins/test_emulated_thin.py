"""The kernels of inner pruning in the CUDA emulator, against the reference."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tango_plugins import native_library
from tango_plugins.structs import TangoThinShape, TangoThinTensors
from tests.plugins.cuda_emulator import compiled
from tests.plugins.thinnings import CASES, DTYPES, Prompt

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]

#: TANGO_BAD_ARGUMENT and TANGO_SMALL_WORKSPACE of tango/common.h, and an address that no test reads.
BAD_ARGUMENT, SMALL_WORKSPACE, HERE = 1, 2, 4096


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return native_library.load(compiled(tmp_path_factory.mktemp("thin"), "thin"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_rows_are_thinned_as_the_reference_does_it(library, case, dtype):
    prompt = Prompt(*case, dtype)
    assert prompt.enqueue(library) == 0
    prompt.check()


def test_ties_are_those_of_the_reference(library):
    prompt = Prompt(*CASES[0], torch.float32, equal=True)
    assert prompt.enqueue(library) == 0
    prompt.check()


def test_numbers_that_are_none_do_not_lead_astray(library):
    prompt = Prompt(*CASES[0], torch.float32)
    prompt.share[20:30], prompt.x[40:50] = torch.nan, torch.nan
    assert prompt.enqueue(library) == 0
    stay = prompt.stay[: prompt.stays]
    assert set(range(20, 30)) <= set(stay.tolist())
    assert (stay.diff() > 0).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 0, 0, 0, 8, 0), "rows is 0"),
        ((9, 10, 0, 0, 8, 0), "begin is 10"),
        ((9, 4, 6, 3, 8, 0), "video_rows is 6"),
        ((9, 4, 5, 6, 8, 0), "kept is 6"),
        ((9, 4, 5, 3, 0, 0), "width is 0"),
        ((9, 4, 5, 3, 8, 2), "dtype is 2"),
    ],
)
def test_shapes_out_of_range_are_rejected(library, shape, message):
    size = ctypes.c_size_t()
    assert library.tango_thin_workspace(ctypes.byref(TangoThinShape(*shape)), ctypes.byref(size)) == BAD_ARGUMENT
    assert library.tango_last_error().decode().startswith(message)


@pytest.mark.parametrize("name", ["prompt", "share", "thinned", "stay"])
def test_null_tensors_are_rejected(library, name):
    tensors = TangoThinTensors(**{field: None if field == name else HERE for field, _ in TangoThinTensors._fields_})
    shape = ctypes.byref(TangoThinShape(9, 4, 5, 3, 8, 0))
    assert library.tango_thin_enqueue(shape, ctypes.byref(tensors), HERE, 1 << 20, None) == BAD_ARGUMENT
    assert library.tango_last_error().decode() == f"{name} is null"


@pytest.mark.parametrize(
    ("workspace", "size", "status", "message"),
    [
        (None, 1 << 20, BAD_ARGUMENT, "workspace is null"),
        (HERE + 8, 1 << 20, BAD_ARGUMENT, "workspace is at"),
        (HERE, 100, SMALL_WORKSPACE, "workspace has 100 bytes: it needs"),
    ],
)
def test_a_workspace_that_does_not_do_is_rejected(library, workspace, size, status, message):
    tensors = ctypes.byref(TangoThinTensors(HERE, HERE, HERE, HERE))
    shape = ctypes.byref(TangoThinShape(9, 4, 5, 3, 8, 0))
    assert library.tango_thin_enqueue(shape, tensors, workspace, size, None) == status
    assert library.tango_last_error().decode().startswith(message)
