"""These tests need an NVIDIA GPU, PyTorch to hold memory on it, and the CUDA library; they say which is missing."""

from __future__ import annotations

import pytest

from tango_plugins import TangoError, native_library


@pytest.fixture(autouse=True, scope="session")
def gpu():
    torch = pytest.importorskip("torch", reason="PyTorch, which holds the device memory, is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU, or PyTorch cannot use it")
    try:
        native_library.load()
    except TangoError as error:
        pytest.skip(str(error))
