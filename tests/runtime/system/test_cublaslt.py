"""Where cuBLASLt is found."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from tango_plugins import TangoError, native_library
from tango_runtime.system import cublaslt


@pytest.fixture
def linker(monkeypatch, tmp_path):
    """A dynamic linker that knows nothing, and a package with cuBLASLt for CUDA 12; what is loaded is listed."""
    file = tmp_path / "nvidia" / "cublas" / "lib" / "libcublasLt.so.12"
    file.parent.mkdir(parents=True)
    file.touch()
    known, loaded = {str(file)}, []

    def load(name):
        if name not in known:
            raise OSError(name)
        loaded.append(name)

    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(cublaslt, "find_spec", lambda name: spec)
    monkeypatch.setattr(ctypes, "CDLL", load)
    return SimpleNamespace(file=str(file), known=known, loaded=loaded)


def test_a_package_has_it_where_the_linker_does_not(linker):
    cublaslt.preload_cublaslt()
    assert linker.loaded == [linker.file]


def test_the_linkers_comes_first(linker):
    linker.known.add("libcublasLt.so.11")
    cublaslt.preload_cublaslt()
    assert linker.loaded == ["libcublasLt.so.11"]


@pytest.mark.parametrize("spec", [None, SimpleNamespace(submodule_search_locations=None)])
def test_where_there_is_none_nothing_is_loaded(linker, monkeypatch, spec):
    monkeypatch.setattr(cublaslt, "find_spec", lambda name: spec)
    cublaslt.preload_cublaslt()
    assert linker.loaded == []


def test_its_version_or_what_is_missing(linker, monkeypatch, tmp_path):
    def version(found):
        ctypes.cast(found, ctypes.POINTER(ctypes.c_int32))[0] = 13
        return status

    library = SimpleNamespace(tango_cublaslt_version=version, tango_last_error=lambda: b"none can be loaded")
    monkeypatch.setattr(native_library, "load", lambda path: library)
    status = 0
    assert cublaslt.cublaslt_version(tmp_path) == 13
    status = 3
    with pytest.raises(TangoError, match="none can be loaded") as error:
        cublaslt.cublaslt_version(tmp_path)
    assert "pip install nvidia-cublas" in error.value.hint
