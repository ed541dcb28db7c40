"""How the CUDA library finds cuBLASLt, and what it asks of it: of one that runs on a CPU, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.cuda_emulator import HERE, compiled

pytestmark = pytest.mark.nvcc

#: Opens libraries in the place of cuBLASLt, then runs statements; ``path`` is the CUDA library.
PROGRAM = """
import ctypes, sys
from tests.plugins.fp16 import GELU_SHAPES, LINEAR, LINEAR_GELU, SHAPES, Fp16Product
from tests.plugins.fp8 import Fp8Product
from tests.plugins.linears import SLABS, Product, check
path, *names = sys.argv[1:]
from pathlib import Path
path, fakes = Path(path), [ctypes.CDLL(name) for name in names]
version = ctypes.c_int32()
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("cublaslt"), "cublaslt", "linear")


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """``fake(version, source)``: a library of cuBLASLt's name, by default one that multiplies."""
    folder = tmp_path_factory.mktemp("fakes")

    def made(version, source=HERE / "cublaslt.cpp"):
        name = f"libcublasLt.so.{version}"
        file = folder / source.stem / name
        file.parent.mkdir(exist_ok=True)
        command = ["nvcc", "-x", "c++", "-std=c++17", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC"]
        command += ["-Xlinker", f"-soname={name}", str(source), "-o", str(file)]
        subprocess.run(command, check=True)
        return str(file)

    return made


def run(path, fakes, *statements):
    """What the statements print where these libraries are loaded."""
    program = PROGRAM + "\n".join(statements)
    command = [sys.executable, "-c", program, str(path), *fakes]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize("version", [13, 12, 11])
def test_what_it_describes_is_the_product(path, fake, version):
    statements = (
        "for function, shapes in ((LINEAR, SHAPES), (LINEAR_GELU, GELU_SHAPES)):",
        "    for shape in shapes: Fp16Product(*shape, path=path, device='cpu').check(function)",
        "assert Fp16Product(1, 1, 1, path=path, device='cpu').library.tango_cublaslt_version(version) == 0",
        "print(version.value)",
    )
    assert run(path, [fake(version)], *statements) == [str(version)]


def test_what_it_describes_is_the_product_of_a_slab(path, fake):
    statements = (
        "for form in ('int8', 'int4-32-zeros', 'int8-32'):",
        "    for *shape, room in SLABS: check(Product(*shape, form, path=path, device='cpu', room=room))",
        "print(fakes[0].fake_chosen() > 0)",
    )
    assert run(path, [fake(13)], *statements) == ["True"]


def test_an_algorithm_is_chosen_once_for_a_function_and_a_shape(path, fake):
    statements = (
        "for rows, function in ((3, LINEAR), (3, LINEAR), (3, LINEAR_GELU), (4, LINEAR), (4, LINEAR), (3, LINEAR)):",
        "    Fp16Product(rows, 16, 8, path=path, device='cpu').check(function)",
        "    print(fakes[0].fake_chosen())",
    )
    assert run(path, [fake(13)], *statements) == ["1", "1", "2", "3", "3", "3"]


def test_a_library_that_is_not_whole_is_passed_over(path, fake, tmp_path):
    (tmp_path / "empty.cpp").touch()
    statements = (
        "Fp16Product(3, 16, 8, path=path, device='cpu').check()",
        "print(fakes[1].fake_chosen())",
    )
    assert run(path, [fake(13, tmp_path / "empty.cpp"), fake(12)], *statements) == ["1"]


def test_version_11_has_no_fp8(path, fake):
    statements = (
        "product = Fp8Product(1, 16, 16, path=path, device='cpu')",
        "print(product.enqueue(), product.library.tango_last_error().decode())",
    )
    wanted = "3 fp8 linear: libcublasLt.so.11 has no FP8; it needs that of CUDA 12 or 13"
    assert run(path, [fake(11)], *statements) == [wanted]


def test_without_any_the_error_names_the_libraries_and_the_package(path, fake, tmp_path):
    (tmp_path / "none.cpp").touch()
    fakes = [fake(version, tmp_path / "none.cpp") for version in (13, 12, 11)]  # this machine may have some
    statements = (
        "product = Fp16Product(1, 16, 16, path=path, device='cpu')",
        "print(product.enqueue(), product.library.tango_last_error().decode())",
        "print(product.library.tango_cublaslt_version(version))",
        "linear = Product(9, 32, 8, 'int4-32', path=path, device='cpu', room=8)",
        "print(linear.wanted_workspace(), linear.enqueue())",
    )
    message, status, slabs = run(path, fakes, *statements)
    assert message.startswith("3 linear: none of libcublasLt.so.13, .12 and .11 can be loaded")
    assert message.endswith("nvidia-cublas")
    assert status == "3"
    assert slabs == "0 3"
