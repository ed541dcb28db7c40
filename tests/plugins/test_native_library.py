"""Where the CUDA library is searched, which one is taken, and what load() checks."""

from __future__ import annotations

import _ctypes
import ctypes
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest

from tango_plugins import TangoError, build, native_library, structs
from tango_plugins.driver import Gpu
from tango_plugins.native_library import code_for, install_directory, installed, load, search
from tests.plugins.cuda_emulator import compiled


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """No variable is set, and the home folder is empty."""
    for name in ("TANGO_LIBRARY", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(native_library, "PREBUILT", tmp_path / "site" / "prebuilt")
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
    version = native_library.ABI_VERSION
    monkeypatch.setattr(native_library, "ABI_VERSION", 1)
    with pytest.raises(TangoError, match=f"has interface version {version}, not 1"):
        load(compiled(tmp_path))


@pytest.mark.nvcc
def test_every_struct_of_the_headers_has_a_size(tmp_path):
    library = load(compiled(tmp_path))
    assert all(library.tango_sizeof(struct.__name__.encode()) for struct in structs.STRUCTS)
    assert library.tango_sizeof(b"TangoUnknown") == library.tango_sizeof(None) == 0


LOCAL, PREBUILT = "0.1.0 CUDA 12.6 sm_87 compute_87", "0.1.0 CUDA 13.0 sm_75 sm_80 sm_87 sm_90a sm_110 compute_121"
ORIN_6, ORIN_7 = Gpu("Orin", "8.7", "12.6", 8 << 30, True), Gpu("Orin", "8.7", "13.2", 8 << 30, True)
THOR, H200 = Gpu("Thor", "11.0", "13.0", 8 << 30, True), Gpu("H200", "9.0", "13.0", 8 << 30, False)


@pytest.fixture
def machine(monkeypatch, home):
    """``machine(gpu, local=, prebuilt=, named=)`` has that GPU and libraries that report those versions."""

    def install(gpu, **versions):
        places = {"local": install_directory(), "prebuilt": native_library.PREBUILT, "named": home / "named"}
        reported = {places[place] / "libtango.so": version for place, version in versions.items()}
        for path in reported:
            path.parent.mkdir(parents=True)
            path.touch()
        if "named" in versions:
            monkeypatch.setenv("TANGO_LIBRARY", str(places["named"] / "libtango.so"))
        real = native_library._load
        fakes = {path: SimpleNamespace(tango_version=version.encode) for path, version in reported.items()}
        monkeypatch.setattr(native_library, "_load", lambda path: fakes[path] if path in fakes else real(path))
        monkeypatch.setattr(native_library, "_gpu", lambda: gpu)

    return install


@pytest.mark.parametrize(
    ("gpu", "versions", "origin", "code"),
    [
        (ORIN_7, {"prebuilt": PREBUILT}, "prebuilt", "sm_87"),
        (H200, {"prebuilt": PREBUILT}, "prebuilt", "sm_90a"),
        (None, {"prebuilt": PREBUILT}, "prebuilt", None),
        (ORIN_7, {"prebuilt": PREBUILT, "local": LOCAL}, "built on this machine", "sm_87"),
        (ORIN_6, {"prebuilt": PREBUILT, "local": LOCAL}, "built on this machine", "sm_87"),
        (THOR, {"prebuilt": PREBUILT, "local": LOCAL.replace(" compute_87", "")}, "prebuilt", "sm_110"),
        (THOR, {"prebuilt": PREBUILT, "local": LOCAL, "named": PREBUILT}, "named by TANGO_LIBRARY", "sm_110"),
    ],
)
def test_the_first_library_that_fits_is_taken(machine, gpu, versions, origin, code):
    machine(gpu, **versions)
    found = search()[-1]
    assert (found.origin, found.code, found.error) == (origin, code, None)
    assert installed() == found.path
    assert load().tango_version().decode() in versions.values()


@pytest.mark.parametrize(
    ("gpu", "versions", "message"),
    [
        (
            ORIN_6,
            {"prebuilt": PREBUILT},
            r"needs CUDA 13\.0; the driver supports .* 12\.6 .*plugin build",
        ),
        (
            THOR,
            {"local": LOCAL.replace(" compute_87", "")},
            r"has no code for this GPU \(Thor, .* 11\.0",
        ),
        (ORIN_6, {"named": PREBUILT, "local": LOCAL}, "named/libtango.so needs CUDA 13"),
        (Gpu("new", "13.0", "13.0", 1, False), {"prebuilt": "CUDA 13.2 sm_121 compute_121"}, r"only PTX of CUDA 13\.2"),
    ],
)
def test_a_library_that_does_not_fit_is_rejected(machine, gpu, versions, message):
    machine(gpu, **versions)
    with pytest.raises(TangoError, match=message):
        load()
    assert build.info().library is None


def test_info_says_which_library_is_in_use_and_why_another_is_not(machine):
    machine(THOR, prebuilt=PREBUILT, local=LOCAL.replace(" compute_87", ""))
    found = build.info()
    assert (found.directory, found.version) == (native_library.PREBUILT, PREBUILT)
    assert (found.origin, found.code) == ("prebuilt", "sm_110")
    assert len(found.passed_over) == 1
    assert found.passed_over[0].startswith("built on this machine: the CUDA library")
    assert "has no code for this GPU" in found.passed_over[0]


@pytest.mark.parametrize(
    ("capability", "code"),
    [
        ("8.7", "sm_87"),  # the closest machine code
        ("8.9", "sm_87"),
        ("7.2", None),
        ("9.0", "sm_90a"),
        ("9.1", "compute_80"),  # code for sm_90a runs on 9.0 alone
        ("10.3", "sm_100"),
        ("12.0", "compute_80"),
    ],
)
def test_code_for_a_gpu(capability, code):
    assert code_for("0.1.0 CUDA 13.0 sm_75 sm_86 sm_87 sm_90a sm_100 compute_80", capability) == code


def test_a_library_of_another_processor_is_rejected(tmp_path):
    machine, name = (183, "aarch64") if platform.machine() == "x86_64" else (62, "x86_64")
    path = tmp_path / "libtango.so"
    path.write_bytes(b"\x7fELF\x02\x01\x01".ljust(18, b"\0") + machine.to_bytes(2, "little"))
    with pytest.raises(TangoError, match=f"is for {name}; this machine is {platform.machine()}"):
        load(path)
