"""Installed packages: their versions, and TensorRT."""

from __future__ import annotations

import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from tango_plugins import TangoError
from tango_runtime.system.packages import import_tensorrt, installed_version


def test_installed_version():
    assert installed_version("numpy") == version("numpy")
    assert installed_version("no-such-distribution") is None


def test_tensorrt(monkeypatch):
    module = SimpleNamespace(__version__="10.3.0")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    assert import_tensorrt() is module
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(TangoError, match="TensorRT cannot be imported: ") as error:
        import_tensorrt()
    assert "tango doctor" in error.value.hint
