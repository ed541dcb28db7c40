"""These tests need an NVIDIA GPU, PyTorch for memory on it, and the CUDA library; else they are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tango_plugins import TangoError, native_library


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True, scope="session")
def gpu():
    torch = pytest.importorskip("torch", reason="PyTorch, which allocates the device memory, is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU, or PyTorch cannot use it")
    try:
        native_library.load()
    except TangoError as error:
        pytest.skip(str(error))
