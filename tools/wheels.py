"""Builds what is released into dist/: sdist, pure Python wheel, and for each machine a wheel with its CUDA library.

    python tools/wheels.py [--machines x86_64 aarch64] [--architectures 87 90a] [--tensorrt-include FOLDER] [--jobs 2]

Needs nvcc of CUDA 13, CMake, binutils and uv; for another machine also its g++ (on Debian,
g++-aarch64-linux-gnu), and a package index that has NVIDIA's CUDA runtime for it. Objects stay in build/native, so only
what changed is compiled again.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "plugins/tango_plugins/native"
MACHINES = ("x86_64", "aarch64")
#: GPUs from Turing to GB10. What is not listed runs code of its major version (10.3 that for 10.0), or the PTX.
ARCHITECTURES = ("75", "80", "86", "87", "89", "90a", "100", "110", "120", "121")
#: What the libraries may need: pip installs the wheels where glibc and libstdc++ are as recent as this.
MANYLINUX = "manylinux_2_34"
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (12, 0)}
NEEDED = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
EXPORTED = re.compile(r"tango_\w+|RegisterCustomOps|getCreators|getPluginCreators|setLoggerFinder")
UV = Path(sys.executable).with_name("uv")


def main() -> None:
    """Builds the artifacts, and prints their names and sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", nargs="*", choices=MACHINES, default=MACHINES)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="SM")
    parser.add_argument("--tensorrt-include", type=Path, metavar="FOLDER", help="also builds the TensorRT plugins")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    source = build_sdist(args.output)
    artifacts = [source, build_wheel(source, args.output)]
    for machine in args.machines:
        libraries = compile_libraries(machine, args.architectures, args.tensorrt_include, args.jobs)
        for library in libraries:
            check(library)
        artifacts.append(build_wheel(source, args.output, machine, libraries))
    for path in artifacts:
        print(f"{path.stat().st_size / 1e6:7.1f} MB  {path}")


def build_sdist(output: Path, checkout: Path = ROOT) -> Path:
    """The sdist of a checkout."""
    return _built(output, "--sdist", checkout)


def build_wheel(source: Path, output: Path, machine: str | None = None, libraries: Sequence[Path] = ()) -> Path:
    """The wheel of an sdist: pure Python, or with libraries for a machine.

    The Python tag stays ``py3-none``, because ctypes loads the libraries in any interpreter.
    """
    if machine is None:
        return _built(output, "--wheel", source)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(source) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2, of Debian 12, has none
            archive.extractall(folder)
        (tree,) = Path(folder).iterdir()
        prebuilt = tree / "plugins/tango_plugins/prebuilt"
        prebuilt.mkdir()
        for library in libraries:
            shutil.copy(library, prebuilt)
        return _built(output, "--wheel", f"--config-setting=--build-option=--plat-name={MANYLINUX}_{machine}", tree)


def _built(output: Path, *arguments: object) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        run(UV, "build", "--quiet", "--no-create-gitignore", "--out-dir", folder, *arguments)
        (made,) = Path(folder).iterdir()
        output.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(made, output / made.name))


def compile_libraries(machine: str, architectures: Sequence[str], tensorrt: Path | None, jobs: int) -> list[Path]:
    """Compiles the CUDA library for a machine, and the TensorRT plugins if there are headers; in build/native."""
    folder, environment = ROOT / "build/native" / machine, dict(os.environ)
    targets = [f"{name}-real" for name in architectures] + [f"{architectures[-1]}-virtual"]
    options = [f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(targets)}", "-DTANGO_LINE_INFO=OFF"]
    options.append("-DCMAKE_CUDA_FLAGS=--compress-mode=size")
    if tensorrt is not None:
        options.append(f"-DTENSORRT_INCLUDE_DIR={tensorrt.resolve()}")
    if machine != platform.machine():
        compiler = f"{machine}-linux-gnu-g++"
        options += ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={machine}"]
        options += [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_CUDA_HOST_COMPILER={compiler}"]
        environment["NVCC_PREPEND_FLAGS"] = _cross_flags(machine)
    run("cmake", "-S", NATIVE, "-B", folder, *options, env=environment)
    run("cmake", "--build", folder, "--parallel", jobs, env=environment)
    return sorted(folder.glob("libtango*.so"))


def _cross_flags(machine: str) -> str:
    """nvcc's options to compile for another machine: its own headers, that machine's CUDA runtime from the index."""
    version = re.search(r"release (\d+\.\d+)", run("nvcc", "--version"))
    top = re.search(r"(?m)^#\$ TOP=(.+)$", run("nvcc", "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull))
    if version is None or top is None:
        raise SystemExit("nvcc does not report its version and its folder as CUDA 13's does")
    headers = next(Path(top[1]).glob(f"targets/{platform.machine()}-linux/include")).resolve()
    runtime = ROOT / "build/native" / f"cuda-{machine}"
    target = ["--python-version", "3.12", "--python-platform", f"{machine}-{MANYLINUX}", "--target", runtime]
    run(UV, "pip", "install", "--quiet", *target, f"nvidia-cuda-runtime=={version[1]}.*")
    (static,) = runtime.rglob("libcudart_static.a")
    return f"-I{headers} -I{headers}/cccl -L{static.parent}"


def check(library: Path) -> None:
    """Raises if a library needs more than its wheel's tag says, or exports what is not its own."""
    dynamic, symbols = run("readelf", "-dW", library), run("readelf", "--dyn-syms", "-W", library)
    problems = [f"needs {name}" for name in re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic) if name not in NEEDED]
    problems += re.findall(r"\((?:RPATH|RUNPATH)\).*", dynamic)
    for name, version in re.findall(r"@([A-Z]+)_([\d.]+)", symbols):
        if tuple(int(part) for part in version.split(".")) > NEWEST[name]:
            problems.append(f"needs {name}_{version}")
    exported = re.findall(r"(?m) (?:GLOBAL|WEAK) +DEFAULT +\d+ (\S+)", symbols)
    problems += [f"exports {name}" for name in exported if not EXPORTED.fullmatch(name)]
    if problems or not exported:
        raise SystemExit(f"{library}: {', '.join(dict.fromkeys(problems)) or 'exports nothing'}")


def run(*command: object, env: dict[str, str] | None = None) -> str:
    """Output of a command that succeeds."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
