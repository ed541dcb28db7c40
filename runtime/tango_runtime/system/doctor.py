"""What this machine has and lacks to run a bundle, and the command that mends each lack."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tango_plugins import TangoError
from tango_plugins.build import info
from tango_plugins.native_library import installed
from tango_runtime.bundle import GRAPHS, Bundle
from tango_runtime.engines import FOLDER, Found, Machine, find, read_sidecar, release, sidecars
from tango_runtime.system import gpu as machine

State = Literal["ok", "lacking", "beware"]
EngineName = Literal["tensorrt", "ort-cuda", "ort-cpu"]

#: Pythons that may have a TensorRT which this one has not: a JetPack's, and whatever else is first on the PATH.
_INTERPRETERS = ("/usr/bin/python3", "python3", "python")
#: Major versions of CUDA that there are cuda-bindings for which this project uses.
_OLDEST_CUDA, _NEWEST_CUDA = 12, 13
_PATIENCE = 30  # seconds that one of them may take to import it

#: Linux for Tegra → JetPack, from NVIDIA's release notes. Later ones of a line are taken for the last that is known.
_JETPACKS = {(35, 1): "5.0.2", (35, 2): "5.1", (35, 3): "5.1.1", (35, 4): "5.1.2", (35, 5): "5.1.3", (35, 6): "5.1.4"}
_JETPACKS |= {
    (36, 2): "6.0 DP",
    (36, 3): "6.0",
    (36, 4): "6.1 or 6.2",
    (36, 5): "6.2.2",
    (38, 2): "7.0",
    (38, 4): "7.1",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        state: ``ok``, ``lacking``, or ``beware``: it is there and will make trouble.
        text: What was found.
        mend: The command, or what else to do about it; empty where it is ok.
        engines: Engines that cannot run without it.
    """

    name: str
    state: State
    text: str
    mend: str = ""
    engines: tuple[EngineName, ...] = ()


@dataclass(frozen=True)
class Examination:
    """All that was found.

    Attributes:
        findings: In the order of the stack, the GPU first.
    """

    findings: tuple[Finding, ...]

    @property
    def ready(self) -> tuple[EngineName, ...]:
        """Engines that lack nothing, the fastest first."""
        missing = {engine for found in self.findings if found.state == "lacking" for engine in found.engines}
        every: tuple[EngineName, ...] = ("tensorrt", "ort-cuda", "ort-cpu")
        return tuple(engine for engine in every if engine not in missing)


_GPU: tuple[EngineName, ...] = ("tensorrt", "ort-cuda")


def examine(bundle: Path | None = None, *, verify: bool = False) -> Examination:
    """Looks at this machine, and at the engines of a bundle.

    Args:
        bundle: Folder of a bundle; None looks at the machine alone.
        verify: Also compare the SHA-256 of the bundle's files and engines, which reads all of them.
    """
    gpu, found = _gpu()
    tensorrt, told = _tensorrt()
    findings = [
        Finding("Python", "ok", f"{sys.version.split()[0]}, {sys.executable}"),
        *found,
        *_jetpack(),
        *_memory(gpu),
        told,
        _bindings(gpu),
        *_plugin(tensorrt, gpu),
        *_onnxruntime(),
    ]
    if bundle is not None:
        findings += _bundle(bundle, gpu, tensorrt, verify)
    return Examination(tuple(findings))


# The GPU and its driver.


def _gpu() -> tuple[machine.Gpu | None, list[Finding]]:
    try:
        gpu = machine.gpu()
    except TangoError as error:
        return None, [Finding("GPU", "lacking", error.message, error.hint, _GPU)]
    told = f"{gpu.name}, compute capability {gpu.compute_capability}, {_gigabytes(gpu.memory)}"
    driver = f"{_driver_version() or 'of an unknown version'}, serves CUDA up to {gpu.cuda}"
    return gpu, [Finding("GPU", "ok", told), Finding("driver", "ok", driver), _toolkit()]


def _driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The kernel module's version, the first word of that file that begins with a digit and has a point."""
    if not file.is_file():
        return None
    words = file.read_text().split("\n")[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _toolkit() -> Finding:
    """The CUDA toolkit, which only building the plugin needs."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        mend = "only for tango plugin build: install the CUDA toolkit and put its bin folder on the PATH"
        return Finding("CUDA toolkit", "beware", "nvcc is not on the PATH", mend)
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release_line = next((line.strip() for line in said.splitlines() if "release" in line), "")
    return Finding("CUDA toolkit", "ok", f"{nvcc}: {release_line.rpartition('release ')[2] or 'version unknown'}")


def _jetpack(file: Path = Path("/etc/nv_tegra_release")) -> Iterator[Finding]:
    """The JetPack, if this is one: the file says ``# R36 (release), REVISION: 4.0, …``."""
    if not file.is_file():
        return
    words = file.read_text().replace(",", " ").split()
    major = next((word[1:] for word in words if word[:1] == "R" and word[1:].isdigit()), "0")
    revision = words[words.index("REVISION:") + 1] if "REVISION:" in words[:-1] else "0"
    line = (int(major), *release(revision)[:1])
    known = [jetpack for tegra, jetpack in _JETPACKS.items() if tegra[0] == line[0] and tegra <= line]
    jetpack = f"JetPack {known[-1]}" + ("" if line in _JETPACKS else " or later") if known else "unknown JetPack"
    yield Finding("JetPack", "ok", f"{jetpack} (Linux for Tegra {major}.{revision})")


def _memory(gpu: machine.Gpu | None) -> Iterator[Finding]:
    host = machine.available_host()
    if gpu is None or gpu.integrated:
        shared = ", the GPU's too" if gpu else ""
        yield Finding("memory", "ok", f"{_gigabytes(host)} free on the host{shared}")
        return
    try:
        free = machine.free(gpu)
    except TangoError as error:
        yield Finding("memory", "lacking", error.message, error.hint, _GPU)
        return
    yield Finding("memory", "ok", f"{_gigabytes(free.device)} free on the GPU, {_gigabytes(host)} on the host")


# What is installed.


def _tensorrt() -> tuple[str | None, Finding]:
    """The version of TensorRT in this Python, and what to say of it."""
    module, why = _import("tensorrt")
    if module is not None:
        return module.__version__, Finding("TensorRT", "ok", f"{module.__version__}, {module.__file__}")
    for interpreter, found in _others():
        told = f"not in this Python, but {found} in {interpreter}"
        mend = (
            f"make the environment with it: {interpreter} -m venv --system-site-packages VENV, "
            "then install tango-edge there"
        )
        return None, Finding("TensorRT", "lacking", told, mend, ("tensorrt",))
    mend = "on x86-64: pip install 'tango-edge[tensorrt]'; on a Jetson: apt install python3-libnvinfer"
    return None, Finding("TensorRT", "lacking", why, mend, ("tensorrt",))


def _others() -> Iterator[tuple[str, str]]:
    """Other interpreters that have TensorRT, and its version."""
    own = Path(sys.executable).resolve()
    paths = {Path(path).resolve(): path for path in map(shutil.which, _INTERPRETERS) if path}
    for path, name in paths.items():
        if path == own and sys.prefix == sys.base_prefix:
            continue
        command = [name, "-c", "import tensorrt; print(tensorrt.__version__)"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.strip():
            yield name, done.stdout.split()[-1]


def _bindings(gpu: machine.Gpu | None) -> Finding:
    """cuda-bindings, whose major version is that of CUDA and must not be above the driver's."""
    found = _version("cuda-bindings")
    newest = release(gpu.cuda)[0] if gpu else _NEWEST_CUDA
    if newest < _OLDEST_CUDA:
        told = f"{found or 'not installed'}; the driver serves CUDA {newest} alone"
        mend = f"update the driver, or the JetPack: CUDA {_OLDEST_CUDA} or later is needed"
        return Finding("cuda-bindings", "lacking", told, mend, _GPU)
    mend = f"pip install 'cuda-bindings=={min(newest, _NEWEST_CUDA)}.*'"
    if found is None:
        return Finding("cuda-bindings", "lacking", "not installed", mend, _GPU)
    if release(found)[0] > newest:
        told = f"{found} is for CUDA {release(found)[0]}, the driver serves up to {newest}"
        return Finding("cuda-bindings", "lacking", told, mend, _GPU)
    return Finding("cuda-bindings", "ok", found)


def _plugin(tensorrt: str | None, gpu: machine.Gpu | None) -> list[Finding]:
    mend = "tango plugin build"
    try:
        core, plugin = info(), machine.plugin()
    except TangoError as error:
        return [Finding("CUDA library", "lacking", error.message, error.hint, _GPU)]
    if core.library is None:
        return [Finding("CUDA library", "lacking", f"not built: {installed()} does not exist", mend, _GPU)]
    told = f"{core.library}, {core.version}"
    own = f"sm_{gpu.compute_capability.replace('.', '')}" if gpu else ""
    found = [Finding("CUDA library", "ok", told)]
    if own and own not in (core.version or "").replace("90a", "90"):
        found = [Finding("CUDA library", "beware", f"{told}: not for this GPU, {own}", mend)]
    return [*found, _tensorrt_plugin(plugin, tensorrt)]


def _tensorrt_plugin(plugin: machine.Plugin | None, tensorrt: str | None) -> Finding:
    """The plugin, which only a prune engine needs."""
    mend = "tango plugin build --tensorrt-include FOLDER, which names the folder of NvInfer.h"
    if plugin is None:
        return Finding("TensorRT plugin", "beware", "not built: no prune engine", mend)
    told = f"{plugin.path}, interface {plugin.interface}, {plugin.api}"
    if tensorrt and not plugin.serves(tensorrt):
        return Finding("TensorRT plugin", "beware", f"{told}: not for TensorRT {tensorrt}", mend)
    return Finding("TensorRT plugin", "ok", told)


def _onnxruntime() -> list[Finding]:
    cpu, gpu = _version("onnxruntime"), _version("onnxruntime-gpu")
    every: tuple[EngineName, ...] = ("ort-cuda", "ort-cpu")
    if cpu and gpu:
        again = f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu=={gpu}"
        told = f"onnxruntime {cpu} and onnxruntime-gpu {gpu} are both installed and overwrite each other"
        return [Finding("ONNX Runtime", "lacking", told, again, every)]
    module, why = _import("onnxruntime")
    if module is None:
        return [Finding("ONNX Runtime", "lacking", why, "pip install 'tango-edge[cpu]', or [gpu]", every)]
    providers = module.get_available_providers()
    found = [Finding("ONNX Runtime", "ok", f"{module.__version__}: {', '.join(providers)}")]
    if "CUDAExecutionProvider" not in providers:
        mend = "pip uninstall -y onnxruntime && pip install 'tango-edge[gpu]'"
        if platform.machine() != "x86_64":
            mend = "PyPI has it for x86-64 alone: build the TensorRT engines here, tango build BUNDLE"
        found.append(Finding("its CUDA engine", "lacking", "this onnxruntime has none", mend, ("ort-cuda",)))
    return found


def _import(name: str) -> tuple[Any, str]:
    """A module, or None and why not."""
    if find_spec(name) is None:
        return None, "not installed in this Python"
    try:
        return import_module(name), ""
    except Exception as error:  # a library that it needs is missing, or it is built for another machine
        return None, f"cannot be imported: {error}"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


# A bundle's engines.


def _bundle(path: Path, gpu: machine.Gpu | None, tensorrt: str | None, verify: bool) -> list[Finding]:
    every: tuple[EngineName, ...] = (*_GPU, "ort-cpu")
    try:
        bundle = Bundle.load(path, verify=verify)
    except TangoError as error:
        return [Finding("bundle", "lacking", error.message, error.hint, every)]
    manifest = bundle.manifest
    told = f"{path}: {manifest.family}, {manifest.dtype}" + (", every SHA-256 as in bundle.json" if verify else "")
    findings = [Finding("bundle", "ok", told)]
    if gpu is None or tensorrt is None:
        there = sum(len(sidecars(bundle, graph)) for graph in GRAPHS)
        lacking = "GPU" if gpu is None else "TensorRT"
        return [
            *findings,
            Finding("engines", "beware", f"{there} there; none can run here without a {lacking}", "see above"),
        ]
    try:
        plugin = machine.plugin()
    except TangoError:
        plugin = None
    this = Machine(tensorrt, gpu.compute_capability, gpu.name, plugin.interface if plugin else None)
    return [*findings, *_engines(bundle, this, verify)]


def _engines(bundle: Bundle, this: Machine, verify: bool) -> Iterator[Finding]:
    for graph in GRAPHS:
        try:
            found = find(bundle, graph, this, verify=verify)
        except TangoError as error:
            needed: tuple[EngineName, ...] = () if graph == "prune" else ("tensorrt",)
            yield Finding(f"{graph} engine", "lacking" if needed else "beware", error.message, error.hint, needed)
            continue
        yield Finding(f"{graph} engine", "beware" if found.caution else "ok", _told(found), _or_empty(found))
    yield from _leftovers(bundle)


def _told(found: Found) -> str:
    sidecar = found.sidecar
    ranges = {"vision": "F", "prune": "F", "embed": "N", "decoder": "N"}
    axis = ranges[sidecar.recipe.graph]
    words = {"F": "frames", "N": "tokens"}
    told = (
        f"{found.path.name}, {sidecar.size / 1e6:.1f} MB, {found.smallest(axis)} to {found.largest(axis)} {words[axis]}"
    )
    if sidecar.recipe.graph == "decoder":
        told += f", context {found.largest('P', 1)}"
    return f"{told}; {found.caution}" if found.caution else told


def _or_empty(found: Found) -> str:
    return f"{found.rebuild} --rebuild" if found.caution else ""


def _leftovers(bundle: Bundle) -> Iterator[Finding]:
    """Engines of graphs that the bundle no longer has: nothing will ever load them."""
    stale = [file for graph in GRAPHS for file in sidecars(bundle, graph) if _is_stale(bundle, file)]
    engines = [file.with_suffix(".engine") for file in stale]
    size = sum(file.stat().st_size for file in engines if file.is_file())
    if stale:
        files = " ".join(shlex.quote(str(file)) for file in [*stale, *engines])
        told = f"{len(stale)} of graphs that this bundle no longer has, {size / 1e6:.1f} MB"
        yield Finding(f"{FOLDER}/", "beware", told, f"rm {files}")


def _is_stale(bundle: Bundle, file: Path) -> bool:
    try:
        recipe = read_sidecar(file).recipe
    except TangoError:
        return True
    have = {name: spec.sha256 for name, spec in bundle.manifest.files.items()}
    return any(have.get(name) != digest for name, digest in recipe.files.items())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
