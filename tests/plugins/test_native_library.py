"""Where the CUDA library is searched, and what load() checks."""

from __future__ import annotations

import _ctypes
import ctypes
from pathlib import Path

import pytest

from tango_plugins import TangoError, native_library, structs
from tango_plugins.native_library import install_directory, installed, load
from tests.plugins.cuda_emulator import compiled


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """No variable is set, and the home folder is empty."""
    for name in ("TANGO_LIBRARY", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_it_is_searched_in_the_home_folder(home):
    assert installed() == install_directory() / "libtango.so"
    assert install_directory().parent == home / ".local" / "share" / "tango-edge"


@pytest.mark.parametrize(("value", "used"), [("/data", True), ("", False), ("relative/path", False)])
def test_an_absolute_xdg_data_home_replaces_the_home_folder(monkeypatch, value, used):
    monkeypatch.setenv("XDG_DATA_HOME", value)
    assert (install_directory().parent == Path("/data/tango-edge")) == used


def test_tango_library_names_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TANGO_LIBRARY", str(tmp_path / "libtango.so"))
    assert installed() == tmp_path / "libtango.so"
    assert install_directory() != tmp_path


def test_a_missing_library_names_the_command_that_builds_it(tmp_path):
    with pytest.raises(TangoError, match="tango plugin build"):
        load(tmp_path / "libtango.so")
    with pytest.raises(TangoError, match=r"does not exist .*tango plugin build"):
        load()


def test_a_missing_tango_library_names_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("TANGO_LIBRARY", str(tmp_path / "libtango.so"))
    with pytest.raises(TangoError, match="correct or unset TANGO_LIBRARY"):
        load()


def test_a_file_that_is_no_library_is_rejected(monkeypatch, tmp_path):
    path = tmp_path / "libtango.so"
    path.write_text("not a library")
    with pytest.raises(TangoError, match="cannot be loaded"):
        load(path)


def test_a_library_of_something_else_is_rejected():
    with pytest.raises(TangoError, match="is not the CUDA library of tango-edge"):
        load(Path(_ctypes.__file__))


class TangoPruneShape(ctypes.Structure):
    """One field short."""

    _fields_ = structs.TangoPruneShape._fields_[:-1]


@pytest.mark.nvcc
def test_a_struct_of_another_size_is_rejected(monkeypatch, tmp_path):
    path = compiled(tmp_path)
    monkeypatch.setattr(structs, "STRUCTS", (TangoPruneShape,))
    with pytest.raises(TangoError, match="TangoPruneShape has 16 bytes in the CUDA library"):
        load(path)
    monkeypatch.undo()
    assert load(path).tango_abi_version() == native_library.ABI_VERSION


@pytest.mark.nvcc
def test_another_interface_version_is_rejected(monkeypatch, tmp_path):
    monkeypatch.setattr(native_library, "ABI_VERSION", 1)
    with pytest.raises(TangoError, match="has interface version 4, not 1"):
        load(compiled(tmp_path))


@pytest.mark.nvcc
def test_every_struct_of_the_headers_has_a_size(tmp_path):
    library = load(compiled(tmp_path))
    assert all(library.tango_sizeof(struct.__name__.encode()) for struct in structs.STRUCTS)
    assert library.tango_sizeof(b"TangoUnknown") == library.tango_sizeof(None) == 0
