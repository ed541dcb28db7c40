"""The C headers against what repeats them: ctypes structs, argument types, the list of sources."""

from __future__ import annotations

import ctypes
import re

import pytest

from tango_plugins import native_library, structs
from tango_plugins.native_library import NATIVE

HEADERS = {path.name: path.read_text() for path in (NATIVE / "include" / "tango").glob("*.h")}
TEXT = re.sub(r"/\*.*?\*/", "", "\n".join(HEADERS.values()), flags=re.DOTALL)
STRUCTS = {name: body for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", TEXT, re.DOTALL)}
FUNCTIONS = dict(re.findall(r"TANGO_API int (tango_\w+)\((.*?)\);", TEXT, re.DOTALL))
C_TYPES = {
    "int32_t": ctypes.c_int32,
    "int16_t": ctypes.c_int16,
    "float": ctypes.c_float,
    "TangoMatrix": structs.TangoMatrix,
}


def fields(body):
    """Name and ctypes type of each field; all pointers count as void pointers."""
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind, pointer, names = re.fullmatch(r"(?:const )?(\w+)(\*?) (\w+(?:, \w+)*)", declaration).groups()
        for name in names.split(", "):
            yield name, ctypes.c_void_p if pointer else C_TYPES[kind]


@pytest.mark.parametrize("name", sorted(STRUCTS))
def test_every_struct_has_the_same_fields_in_python(name):
    (struct,) = (struct for struct in structs.STRUCTS if struct.__name__ == name)
    assert f"TANGO_SIZE({name})" in (NATIVE / "src" / "common" / "library.cpp").read_text()
    found = [(field, kind if kind in C_TYPES.values() else ctypes.c_void_p) for field, kind in struct._fields_]
    assert found == list(fields(STRUCTS[name]))


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"tango_abi_version"}))
def test_every_function_has_argument_types_in_python(name):
    assert len(native_library._ARGUMENTS[name]) == FUNCTIONS[name].count(",") + 1


def test_python_knows_the_version_of_the_interface():
    (version,) = re.findall(r"#define TANGO_ABI_VERSION (\d+)", HEADERS["common.h"])
    assert int(version) == native_library.ABI_VERSION


@pytest.mark.parametrize("folder", ["src", "adapters"])
def test_cmake_builds_every_source(folder):
    listed = (NATIVE / "CMakeLists.txt").read_text()
    sources = [path.relative_to(NATIVE).as_posix() for path in (NATIVE / folder).rglob("*.c*") if path.suffix != ".cuh"]
    assert sources
    assert [source for source in sources if source not in listed] == []
