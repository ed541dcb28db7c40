"""Builds the CUDA library with nvcc from a wheel, and tests the parts that need no GPU."""

from __future__ import annotations

import ctypes
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tango_plugins import PruneParams, TangoError, build, op, structs
from tango_plugins.native_library import NATIVE, load
from tango_plugins.op import attributes
from tango_plugins.pruner import CudaPruner

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.nvcc,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("nvcc") is None or shutil.which("cmake") is None, reason="nvcc or cmake is not on the PATH"
    ),
]


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The CUDA library for Orin and Hopper, built by the package that a wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in ("export", "calibration", "runtime", "plugins"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(folder)]
    subprocess.run([*pip, str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    command = [sys.executable, "-m", "tango_runtime.cli.main", "plugin", "build", "--architectures", "87", "90"]
    subprocess.run([*command, "--output", str(folder / "lib")], check=True, cwd=folder / "site")
    return folder / "lib"


def test_a_wheel_builds_the_library_for_orin_and_hopper(installed):
    found = build.info(installed)
    (version,) = re.findall(r'(?m)^version = "(.+)"', (ROOT / "pyproject.toml").read_text())
    assert re.fullmatch(rf"{re.escape(version)} CUDA \d+\.\d+ sm_87 sm_90a compute_87", found.version)
    assert found.plugin is None or found.plugin.is_file()


def test_configuring_again_keeps_optimizing(tmp_path):
    configure = ["cmake", "-S", str(NATIVE), "-B", str(tmp_path), "-DCMAKE_CUDA_ARCHITECTURES=90"]
    flags = []
    for _ in range(2):  # the first time leaves an empty CMAKE_BUILD_TYPE in the cache
        subprocess.run(configure, check=True)
        flags.append((tmp_path / "CMakeFiles/tango_core.dir/flags.make").read_text())
    assert "-O3 -DNDEBUG" in flags[0]
    assert flags[0] == flags[1]


def test_the_defaults_are_those_of_the_paper_without_sinks(installed):
    library, found = load(installed / "libtango.so"), structs.TangoPruneParams()
    library.tango_prune_defaults(14, 14, ctypes.byref(found))
    wanted = attributes(PruneParams(sink_positions=()).resolved())
    names = [name for name, value in wanted.items() if isinstance(value, int)]
    assert {name: getattr(found, name) for name in names} == {name: wanted[name] for name in names}
    assert (found.grid_rows, found.grid_columns, found.sink_count) == (14, 14, 0)
    assert not found.sink_positions


@pytest.mark.parametrize("missing", ["shape", "params", "tensors"])
def test_the_operator_rejects_null_arguments(installed, missing):
    given = {
        "shape": structs.TangoPruneShape(1, 1, 2, 0),
        "params": structs.TangoPruneParams(),
        "tensors": structs.TangoPruneTensors(),
    }
    library = load(installed / "libtango.so")
    library.tango_prune_defaults(1, 1, ctypes.byref(given["params"]))
    assert library.tango_prune_enqueue(*(given | {missing: None}).values(), None, 0, None) == 1
    assert library.tango_last_error() == f"{missing} is null".encode()


def test_capacity_is_the_same_for_every_host(installed):
    for seed in range(200):
        rng = random.Random(seed)
        grid, frames = (rng.randint(1, 32), rng.randint(1, 32)), rng.randint(1, 256)
        params = PruneParams(grid=grid, retention_ratio=rng.randint(1, 10000) / 10000)
        pruner = CudaPruner(params, frames, 64, library=installed / "libtango.so")
        assert pruner.capacity == op.capacity(frames, grid[0] * grid[1], params)


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize(("grid", "width"), [((14, 14), 64), ((14, 14), 896), ((5, 9), 3584), ((32, 32), 64)])
def test_the_workspace_of_a_video_is_enough_for_every_shorter_one(installed, grid, width, precision):
    """TensorRT allocates for the largest number of frames of a profile and enqueues any number."""
    largest = 0
    for frames in range(1, 257):
        library = installed / "libtango.so"
        pruner = CudaPruner(PruneParams(grid=grid), frames, width, precision=precision, library=library)
        assert pruner.region("final_kind").stop <= pruner.workspace_bytes  # the last region
        assert pruner.workspace_bytes >= largest, frames
        largest = pruner.workspace_bytes


def test_the_workspace_grows_with_the_video_and_not_with_its_square(installed):
    def size(frames, precision="fast"):
        return CudaPruner(
            PruneParams(), frames, 3584, precision=precision, library=installed / "libtango.so"
        ).workspace_bytes

    assert size(32) <= 256e6
    assert size(32, "exact") <= 256e6
    assert size(256) - size(128) < 1.1 * (size(128) - size(64)) * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 63}, "width is 63: it must be even"),
        ({"width": 8194}, "width is 8194: it must be from 2 to 8192"),
        ({"frames": 257}, "frames is 257: it must be from 1 to 256"),
        ({"params": PruneParams(grid=(33, 32))}, "tokens_per_frame is 1056"),
    ],
)
def test_limits_are_rejected_by_name(installed, options, message):
    options = {"params": PruneParams(), "frames": 4, "width": 64} | options
    with pytest.raises(TangoError, match=message):
        CudaPruner(**options, library=installed / "libtango.so")


def test_a_folder_without_headers_is_rejected(tmp_path):
    with pytest.raises(TangoError, match=r"has no NvInfer\.h"):
        build.build(tensorrt_include=tmp_path)
